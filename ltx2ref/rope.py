"""Positions, rotation angles and the rotation: pure functions.

A position is the middle of a token's patch: seconds in time, pixels in space. Tokens are ordered (frame,
height, width). The D/2 rotation planes are spread over all heads, so that no two heads rotate alike."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .config import TransformerConfig

Rope = tuple[Tensor, Tensor]  # cosine and sine of the angles, each (B|1, T, H, R), in the rotation's dtype
PLANES = {"split": ((2, -1), -2), "interleaved": ((-1, 2), -1)}  # how a head's 2R channels make R planes


def video_positions(grid: tuple[int, ...], fps: float, config: TransformerConfig, like: Tensor) -> Tensor:
    """Patch bounds (1, 3, T, 2) of `grid` latent frames, rows and columns: seconds, pixels, pixels."""
    start = torch.cartesian_prod(*(torch.arange(n, dtype=like.dtype, device=like.device) for n in grid))
    scale = config.vae_scale_factors
    time, y, x = (torch.stack([i, i + 1], dim=-1) * s for i, s in zip(start.unbind(1), scale, strict=True))
    # The VAE's first latent frame holds `causal_offset` pixel frames, every other one `scale[0]`.
    time = (time + config.causal_offset - scale[0]).clamp(min=0) / fps
    return rearrange([time, y, x], "p t bounds -> 1 p t bounds")


def audio_positions(grid: tuple[int, ...], config: TransformerConfig, like: Tensor) -> Tensor:
    """Patch bounds (1, 1, T, 2) of `grid` latent audio frames: seconds."""
    start = torch.arange(*grid, dtype=like.dtype, device=like.device)
    mel = torch.stack([start, start + 1], dim=-1) * config.audio_scale_factor
    mel = (mel + config.causal_offset - config.audio_scale_factor).clamp(min=0)
    return rearrange(mel * config.audio_hop_length / config.audio_sampling_rate, "t bounds -> 1 1 t bounds")


def rotation(
    coords: Tensor,
    max_position: tuple[int, ...],
    dim: int,
    config: TransformerConfig,
    dtype: torch.dtype,
    tables: torch.dtype | None = None,
) -> Rope:
    """The rotation of queries or keys of width `dim`, from patch bounds (B, P, T, 2) or positions (B, P, T).

    Coordinates are used in the dtype in which they come: casting them first would change the numbers.
    """
    middle = (coords[..., 0] + coords[..., 1]) / 2 if coords.ndim == 4 else coords
    unit = torch.stack([p / m for p, m in zip(middle.unbind(1), max_position, strict=True)], dim=-1) * 2 - 1
    made_in = torch.float64 if config.rope_double_precision else dtype  # on the CPU: MPS has no float64
    powers = torch.linspace(0, 1, dim // (2 * len(max_position)), dtype=made_in)
    freqs = (config.rope_theta**powers * math.pi / 2).to(dtype).to(coords.device)
    # Frequency-major, axis-minor. The planes left over from D/2 do not rotate, and come first.
    angles = rearrange(unit[..., None, :] * freqs[:, None], "b t f p -> b t (f p)")
    angles = F.pad(angles, (dim // 2 - angles.shape[-1], 0))
    angles = rearrange(angles, "b t (h r) -> b t h r", h=config.num_attention_heads)
    return angles.cos().to(dtype=tables), angles.sin().to(dtype=tables)


def apply_rope(x: Tensor, rope: Rope, layout: str) -> Tensor:
    """Rotate x (B, T, H, 2R) in the tables' dtype, float32 or wider, and round once at the end."""
    (cos, sin), (shape, axis) = rope, PLANES[layout]
    wide = x.to(torch.promote_types(x.dtype, cos.dtype)).unflatten(-1, shape)
    a, b = wide.unbind(axis)
    if layout == "split":  # the oracles round the first product, and fuse the second into the sum
        rotated = wide * cos.unsqueeze(axis)
        rotated.select(axis, 0).addcmul_(b, -sin)
        rotated.select(axis, 1).addcmul_(a, sin)
    else:
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=axis)
    return rotated.to(x.dtype).flatten(-2)
