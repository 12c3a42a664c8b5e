"""Positions of tokens, and the rotation of queries and keys by them: rotary position embeddings, RoPE.

A token stands for a patch: a span of time and, in video, a rectangle of pixels. Its position is the middle of the
patch, in seconds and pixels, so that both streams are on one clock at any frame rate. Tokens are in the order (frame,
row, column). All functions here are pure.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .sizes import Sizes, StreamSizes

Rope = tuple[Tensor, Tensor]  # cosines and sines of the angles, each (B|1, T, H, R)


def video_positions(
    grid: tuple[int, ...],
    fps: float,
    config: Sizes,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Tensor:
    """Return patch bounds (1, 3, T, 2), in seconds, pixels down and pixels across, of a grid of tokens.

    `grid` is the number of token frames, rows and columns. One token spans eight video frames; only the first token
    frame spans a single one. So token frame 0 covers the time from 0 to 1 / fps, and token frame k from
    (8 k - 7) / fps to (8 k + 1) / fps.
    """
    start = torch.cartesian_prod(*(torch.arange(n, dtype=dtype, device=device) for n in grid))
    index = torch.stack([start, start + 1], dim=-1)  # (T, 3, 2)
    frames, down, across = (index[:, axis] * size for axis, size in enumerate(config.vae_scale_factors))
    frames = (frames + config.causal_offset - config.vae_scale_factors[0]).clamp(min=0)
    return rearrange([frames / fps, down, across], "p t bounds -> 1 p t bounds")


def audio_positions(
    num_frames: int,
    config: Sizes,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    first: int = 0,
) -> Tensor:
    """Return patch bounds (1, 1, T, 2), in seconds, of `num_frames` tokens that begin with number `first`.

    One token spans four mel frames, 0.04 s; only token 0 spans a single one, as in `video_positions`.
    """
    start = torch.arange(first, first + num_frames, dtype=dtype, device=device)
    mel = torch.stack([start, start + 1], dim=-1) * config.audio_scale_factor
    mel = (mel + config.causal_offset - config.audio_scale_factor).clamp(min=0)
    return rearrange(mel * config.audio_hop_length / config.audio_sampling_rate, "t bounds -> 1 1 t bounds")


def rotation(
    coords: Tensor,
    stream: StreamSizes,
    config: Sizes,
    angles_dtype: torch.dtype,
    tables_dtype: torch.dtype | None = None,
) -> Rope:
    """Return cosines and sines of the angles by which queries or keys of width D are rotated.

    `coords` are patch bounds (B, P, T, 2), or positions (B, P, T). Relative positions are computed in the dtype of
    `coords`, because to convert them first would change the result. Frequencies have `angles_dtype`, and angles the
    wider of the two. With `tables_dtype`, the tables are rounded to it at the end.

    There are D/2 angles, one for each plane. Every one of n = D // (2 P) frequencies is used on every axis, which gives
    n * P angles in the order: first frequency on each axis, second frequency on each axis, and so on. Zeros come before
    them, so that there are D/2: 2 before 2046 in video, none in audio. The first R angles are for the first head, the
    next R for the second head, and so on: heads differ.
    """
    position = (coords[..., 0] + coords[..., 1]) / 2 if coords.ndim == 4 else coords
    relative = [x / most * 2 - 1 for x, most in zip(position.unbind(1), stream.max_position, strict=True)]
    n = stream.dim // (2 * len(relative))
    freqs = frequencies(n, config, angles_dtype).to(coords.device)
    angles = torch.stack(relative, dim=-1)[..., None, :] * freqs[:, None]  # (B, T, n, P)
    angles = rearrange(angles, "b t n p -> b t (n p)")
    angles = F.pad(angles, (stream.dim // 2 - angles.shape[-1], 0))
    angles = rearrange(angles, "b t (h r) -> b t h r", h=stream.num_heads)
    cos = angles.cos()
    sin = angles.sin()
    return (cos, sin) if tables_dtype is None else (cos.to(tables_dtype), sin.to(tables_dtype))


def frequencies(n: int, config: Sizes, dtype: torch.dtype) -> Tensor:
    """Return n frequencies, a geometric series from pi / 2 to theta * pi / 2.

    A frequency is the angle, in radians, by which a plane turns from the middle of an axis to its end: from relative
    position 0 to 1.
    """
    # Made on the CPU, because MPS has no float64.
    made_in = torch.float64 if config.rope_double_precision else dtype
    exponents = torch.linspace(0, 1, n, dtype=made_in)
    return (config.rope_theta**exponents * math.pi / 2).to(dtype)


def apply_rope(x: Tensor, rope: Rope, layout: str) -> Tensor:
    """Rotate the planes of each head of x (B, T, H, 2R).

    Computes in the wider of the dtypes of x and of the tables, and rounds to x's at the end.
    """
    cos, sin = rope
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    rotate = rotate_split if layout == "split" else rotate_interleaved
    return rotate(wide, cos, sin).to(x.dtype)


def rotate_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate plane r of a head, which is channels r and r + R.

    The first product is rounded, the second one is fused with the sum, as in diffusers and in ltx-core. The sum takes
    the place of the first product and not a new tensor: here is the peak of self-attention's memory.
    """
    planes = x.unflatten(-1, (2, -1))
    first, second = planes.unbind(-2)
    rotated = planes * cos.unsqueeze(-2)
    rotated.select(-2, 0).addcmul_(second, -sin)
    rotated.select(-2, 1).addcmul_(first, sin)
    return rotated.flatten(-2)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate plane r of a head, which is channels 2r and 2r + 1."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.flatten(-2)
