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
    latent: Tensor                   # (B, T, C)
    text: Tensor                     # (B, S, E)
    timestep: Tensor                 # (B,), (B, 1) or (B, T)
    sigma: Tensor | None             # (B,) or (B, 1)
    text_mask: Tensor | None         # (B, S) multiplicative; (B, 1|T, S) bias, or if bool True to keep
    coords: Tensor | None            # (B, P, T, 2) patch bounds or (B, P, T) positions
    grid: tuple[int | None, ...]     # latent frames[, rows, columns], for want of coords
    self_mask: Tensor | None = None  # (B, T, T) in [0, 1]
    keyframes: Tensor | None = None  # (B, T, 1)

    def double(self) -> "StreamInputs":
        return self._make(x.double() if isinstance(x, Tensor) and x.dtype != torch.bool else x for x in self)


def expect(name: str, x: object, *shapes: tuple[int | str, ...], dtype: torch.dtype | None = None) -> None:
    """`x` is a tensor of `dtype` and of one of `shapes`, in which a string stands for any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not any(len(s) == x.ndim and all(m == n or isinstance(m, str) for m, n in zip(s, x.shape)) for s in shapes):
        expected = " or ".join(f"({', '.join(map(str, s))})" for s in shapes)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, the model's dtype, got {x.dtype}")


def check_stream(s: StreamInputs, stream: StreamConfig, text_dim: int, batch: int | str, dtype: torch.dtype) -> None:
    expect(s.prefix + "hidden_states", s.latent, (batch, "T", stream.in_channels), dtype=dtype)
    expect(s.prefix + "encoder_hidden_states", s.text, (len(s.latent), "S", text_dim), dtype=dtype)
    (b, t, _), n, axes = s.latent.shape, s.text.shape[1], len(stream.max_position)
    expect(s.prefix + "timestep", s.timestep, (b,), (b, 1), (b, t))
    for name, x, *shapes in (
        (s.prefix + "sigma", s.sigma, (b,), (b, 1)),
        (s.prefix + "encoder_attention_mask", s.text_mask, (b, n), (b, 1, n), (b, t, n)),
        ((s.prefix or "video_") + "coords", s.coords, (b, axes, t, 2), (b, axes, t)),
        ("video_self_attention_mask", s.self_mask, (b, t, t)),
        ("video_keyframes_mask", s.keyframes, (b, t, 1)),
    ):
        if x is not None:
            expect(name, x, *shapes)
    if s.text_mask is not None and s.text_mask.ndim == 3 and not s.text_mask.is_floating_point():
        if s.text_mask.dtype != torch.bool:
            raise ValueError(f"{s.prefix}encoder_attention_mask: expected floating or bool, got {s.text_mask.dtype}")
    if s.coords is None:
        check_grid(s, [s.prefix + name for name in ("num_frames", "height", "width")][:axes])


def check_grid(s: StreamInputs, names: list[str]) -> None:
    for name, n in zip(names, s.grid, strict=True):
        if n is None or n < 1:
            raise ValueError(f"{name}: expected a positive integer, for want of {s.prefix or 'video_'}coords; got {n}")
    if math.prod(s.grid) != s.latent.shape[1]:
        tokens = " * ".join(names)
        raise ValueError(f"{s.prefix}hidden_states: expected {tokens} = {math.prod(s.grid)} tokens, got {s.latent.shape[1]}")


def check_inputs(
    config: TransformerConfig, video: StreamInputs, audio: StreamInputs, dtype: torch.dtype, needs_sigma: bool
) -> None:
    """Raise `ValueError`, or `TypeError` for a wrong type, naming the argument, what was expected and what came."""
    text_dims = (config.caption_channels,) * 2 if config.use_prompt_embeddings else (config.video.dim, config.audio.dim)
    check_stream(video, config.video, text_dims[0], "B", dtype)
    check_stream(audio, config.audio, text_dims[1], len(video.latent), dtype)
    if needs_sigma and video.sigma is None:
        raise ValueError("sigma: expected a tensor (B,): prompt_adaln or use_cross_timestep needs it; got None")


def check_options(
    config: TransformerConfig, fps: float, blocks: list[int] | None, perturbation_mask: Tensor | None, batch: int
) -> None:
    if not isinstance(fps, int | float):
        raise TypeError(f"fps: expected a number, got {type(fps).__name__}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: expected a positive, finite number, got {fps}")
    for i in blocks or ():
        if not isinstance(i, int) or not 0 <= i < config.num_layers:
            raise ValueError(f"spatio_temporal_guidance_blocks: expected 0 to {config.num_layers - 1}, got {i!r}")
    if perturbation_mask is not None:
        expect("perturbation_mask", perturbation_mask, (batch,), (batch, 1, 1))
    if blocks and not config.perturbed_attn and not torch.compiler.is_compiling():  # a warning breaks the graph
        warnings.warn("spatio_temporal_guidance_blocks has no effect: config.perturbed_attn is False", stacklevel=4)


def attention_masks(given: dict[str, Any] | None) -> dict[str, Any]:
    """The `attention_kwargs`, in which travels what newer diffusers takes as arguments."""
    names = {"video_self_attention_mask": "self_mask", "video_keyframes_mask": "keyframes"}
    for key in (given or {}).keys() - names.keys():
        advice = "to scale a LoRA, load it with that strength" if key == "scale" else f"expected {sorted(names)}"
        raise ValueError(f"attention_kwargs[{key!r}]: unknown; {advice}")
    return {names[key]: value for key, value in (given or {}).items()}
