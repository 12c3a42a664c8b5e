"""Noise levels and text features as vectors of a stream's width."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def sinusoid(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) to [cos, sin] of 128 phases each, (B, T, 256), computed in `dtype`."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(128, dtype=dtype, device=timestep.device) / 128)
    phases = timestep[..., None].to(dtype) * freqs
    return torch.cat([phases.cos(), phases.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(256, dim), nn.Linear(dim, dim)

    def forward(self, timestep: Tensor) -> Tensor:
        dtype = self.linear_1.weight.dtype
        x = sinusoid(timestep, torch.promote_types(dtype, torch.float32)).to(dtype)
        return self.linear_2(F.silu(self.linear_1(x)))


class AdaLayerNormSingle(nn.Module):
    """Timesteps (B,) or (B, T) to offsets of K modulation rows (B, T|1, K, D), and an embedding (B, T|1, D).
    One layer serves all blocks, each of which adds a table of its own (AdaLN-single, PixArt-alpha)."""

    def __init__(self, dim: int, num_rows: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(dim)})
        self.linear, self.num_rows = nn.Linear(dim, num_rows * dim), num_rows

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        emb = self.emb["timestep_embedder"](timestep.reshape(len(timestep), -1))
        return rearrange(self.linear(F.silu(emb)), "b t (k d) -> b t k d", k=self.num_rows), emb


class TextProjection(nn.Module):
    """Text features (B, S, E) to the stream's width, (B, S, D): release 2.0."""

    def __init__(self, text_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(text_channels, dim), nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
