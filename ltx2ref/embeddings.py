"""Noise levels as modulation, and the projection of the text."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

FREQUENCIES = 128


def sinusoid(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 128 cosines and then 128 sines, (B, T|1, 256), of noise levels (B, T|1)."""
    index = torch.arange(FREQUENCIES, dtype=dtype, device=timestep.device)
    phases = timestep[..., None].to(dtype) * torch.exp(-math.log(10_000) * index / FREQUENCIES)
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Noise levels (B, T|1) to embeddings (B, T|1, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(2 * FREQUENCIES, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        dtype = self.linear_1.weight.dtype
        x = sinusoid(timestep, torch.promote_types(dtype, torch.float32)).to(dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class AdaLayerNormSingle(nn.Module):
    """Noise levels (B, T|1) to the offsets of K rows (B, T|1, K, D), and to the embedding (B, T|1, D).

    One such layer serves all blocks. Each block adds a learned table of its own: AdaLN-single, from PixArt-alpha.
    """

    def __init__(self, dim: int, num_rows: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(dim)})
        self.linear = nn.Linear(dim, num_rows * dim)
        self.num_rows = num_rows

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        if timestep.shape[1] == 0:  # no levels, for the exchange of a stream that is alone; nothing reads its rows
            return timestep, timestep
        embedding = self.emb["timestep_embedder"](timestep)
        offsets = self.linear(F.silu(embedding))
        return rearrange(offsets, "b t (k d) -> b t k d", k=self.num_rows), embedding


class TextProjection(nn.Module):
    """Text (B, S, E) to the width of a stream, (B, S, D)."""

    def __init__(self, text_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
