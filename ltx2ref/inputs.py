"""The checks at the model's boundary: of shapes and types alone, so that compiled graphs stay whole."""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import StreamConfig, TransformerConfig


class StreamInputs(NamedTuple):
    """One stream's share of the documented arguments, whose names begin with `prefix`."""

    prefix: str
    latent: Tensor  # (B, T, C)
    text: Tensor  # (B, S, E)
    timestep: Tensor  # (B,), (B, 1) or (B, T)
    sigma: Any  # (B,) or (B, 1), or None where nothing needs it
    text_mask: Tensor | None  # (B, S) multiplicative; (B, 1|T, S) a bias, or if bool True to keep
    coords: Tensor | None  # (B, P, T, 2) patch bounds, or (B, P, T) positions
    grid: tuple[Any, ...]  # latent frames[, rows, columns], for want of coords
    self_mask: Tensor | None = None  # (B, T, T) in [0, 1]
    keyframes: Tensor | None = None  # (B, T, 1)

    def double(self) -> "StreamInputs":
        numbers: dict[str, Any] = {k: x for k, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**{k: x if x.dtype == torch.bool else x.double() for k, x in numbers.items()})


def expect(name: str, x: object, *shapes: tuple[int | str, ...], dtype: torch.dtype | None = None) -> None:
    """`x` is a tensor of `dtype` and of one of `shapes`, in which a string stands for any size but 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not any(
        len(s) == x.ndim and all(n > 0 if isinstance(m, str) else m == n for m, n in zip(s, x.shape, strict=True))
        for s in shapes
    ):
        expected = " or ".join(f"({', '.join(map(str, s))})" for s in shapes) + ", not empty" * (0 in x.shape)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, the model's dtype, got {x.dtype}")


def check_stream(s: StreamInputs, stream: StreamConfig, batch: int | str, dtype: torch.dtype) -> None:
    """Raise `ValueError`, or `TypeError` for a wrong type: the argument, what was expected and what came."""
    expect(s.prefix + "hidden_states", s.latent, (batch, "T", stream.in_channels), dtype=dtype)
    expect(s.prefix + "encoder_hidden_states", s.text, (len(s.latent), "S", stream.text_dim), dtype=dtype)
    (b, t, _), n, axes = s.latent.shape, s.text.shape[1], len(stream.max_position)
    expect(s.prefix + "timestep", s.timestep, (b,), (b, 1), (b, t))
    mask, coords = s.prefix + "encoder_attention_mask", (s.prefix or "video_") + "coords"
    for name, x, *shapes in (
        (s.prefix + "sigma", s.sigma, (b,), (b, 1)),
        (mask, s.text_mask, (b, n), (b, 1, n), (b, t, n)),
        (coords, s.coords, (b, axes, t, 2), (b, axes, t)),
        ("video_self_attention_mask", s.self_mask, (b, t, t)),
        ("video_keyframes_mask", s.keyframes, (b, t, 1)),
    ):
        if x is not None:
            expect(name, x, *shapes)
    kind = s.text_mask.dtype if s.text_mask is not None and s.text_mask.ndim == 3 else torch.bool
    if not (kind.is_floating_point or kind == torch.bool):
        raise ValueError(f"{mask}: with 3 dimensions, expected floating or bool, got {kind}")
    if s.coords is None:
        for name, n in zip(("num_frames", "height", "width")[: len(s.grid)], s.grid, strict=True):
            if not isinstance(n, (int, torch.SymInt)) or n < 1:
                raise ValueError(f"{s.prefix}{name}: expected a positive integer or {coords}, got {n!r}")
        if math.prod(s.grid) != t:
            raise ValueError(f"{s.prefix}hidden_states: {t} tokens, expected {math.prod(s.grid)}, {s.grid}")


def check_options(
    config: TransformerConfig,
    video: StreamInputs,
    fps: float,
    blocks: list[int] | None,
    perturbation_mask: Tensor | None,
    guided: bool,
) -> None:
    if not isinstance(fps, (int, float)):
        raise TypeError(f"fps: expected a number, got {type(fps).__name__}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: expected a positive, finite number, got {fps}")
    if blocks is not None and not isinstance(blocks, (list, tuple)):
        raise TypeError(f"spatio_temporal_guidance_blocks: expected a list, got {type(blocks).__name__}")
    if not all(isinstance(i, int) and 0 <= i < config.num_layers for i in blocks or ()):
        raise ValueError(f"spatio_temporal_guidance_blocks: {blocks} are not in 0..{config.num_layers - 1}")
    if perturbation_mask is not None:
        expect("perturbation_mask", perturbation_mask, (len(video.latent),), (len(video.latent), 1, 1))
    for name, given, effective in (
        ("spatio_temporal_guidance_blocks", blocks or None, guided),
        ("video_keyframes_mask", video.keyframes, config.use_keyframes_abs_pos_embedding),
    ):
        if given is not None and not effective and not torch.compiler.is_compiling():  # it breaks graphs
            warnings.warn(f"{name}: no effect on a model with this config", stacklevel=5)


def attention_masks(given: dict[str, Any] | None) -> dict[str, Any]:
    """The documented `attention_kwargs`: here travels what newer diffusers takes as arguments."""
    names = {"video_self_attention_mask": "self_mask", "video_keyframes_mask": "keyframes"}
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"attention_kwargs: expected a dict, got {type(given).__name__}")
    for key in [key for key in given or {} if key not in names]:
        hint = "to scale a LoRA, load it at that strength" if key == "scale" else f"expected {sorted(names)}"
        raise ValueError(f"attention_kwargs[{key!r}]: unknown; {hint}")
    return {names[key]: value for key, value in (given or {}).items()}
