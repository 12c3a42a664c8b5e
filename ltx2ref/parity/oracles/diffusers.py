"""Run diffusers' implementation of the LTX-2 transformer as a black box.

This module and ltx_core.py take a diffusers config, parameters under diffusers' names and the arguments of the
documented forward, so that a test or a benchmark can feed the same inputs to every implementation and compare the
outputs. Gradients follow the caller's mode: wrap the calls in `torch.no_grad()`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel  # type: ignore[import-untyped, unused-ignore]
from einops import rearrange
from torch import Tensor, nn

from ..trace.taps import ROPES, Layout, On, Recorder, Taps, returned, trace

Config = Mapping[str, Any]
Arguments = Mapping[str, Any]

# The documentation passes these in `attention_kwargs`; diffusers 0.42.1 takes them as arguments of their own.
LIFTED_ARGUMENTS = ("video_self_attention_mask", "video_keyframes_mask")


def build_diffusers(config: Config, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Build diffusers' model around the given parameters, which are shared if they have this dtype already."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**without_private(config))
    return adopt(model, state, dtype)


def run_diffusers(model: nn.Module, inputs: Arguments) -> tuple[Tensor, Tensor]:
    """Return the velocities of video (B, Tv, C) and audio (B, Ta, C) for the documented arguments."""
    arguments, kwargs = dict(inputs), dict(inputs.get("attention_kwargs") or {})
    arguments |= {name: kwargs.pop(name) for name in LIFTED_ARGUMENTS if name in kwargs}
    video, audio = returned(model(**arguments | {"attention_kwargs": kwargs or None, "return_dict": False})).values()
    return video, audio


def adopt(model: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Load parameters into a model on the meta device, and return it in evaluation mode without gradients.

    Raises `RuntimeError` if the model has buffers that no parameter fills.
    """
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, strict=True, assign=True)
    left = [name for name, t in model.named_buffers() if t.is_meta]
    if left:
        raise RuntimeError(f"{type(model).__name__} keeps {len(left)} buffers that no parameter fills: {left[:4]}")
    adopted: nn.Module = model.requires_grad_(False).eval()
    return adopted


def without_private(config: Config) -> dict[str, Any]:
    """Return a config without the keys that begin with an underscore, such as `_class_name`."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def planes(x: Tensor, heads: int) -> Tensor:
    """Return a RoPE table as (B, T, H, R).

    The split layout is (B, H, T, R). The interleaved one is (B, T, 2HR), with each number twice in a row.
    """
    if x.ndim == 4:
        return rearrange(x, "b h t r -> b t h r")
    return rearrange(x, "b t (h r two) -> two b t h r", h=heads, two=2)[0]


def doors(model: Any, tap: Recorder, on: On) -> None:
    """Record coordinates and RoPE tables.

    diffusers has four RoPE modules that take coordinates and return tables. Those of the exchange take times only.
    """

    def tables(name: str, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
        if not name.startswith("cross_attn_"):
            tap("audio_coords" if name.startswith("audio_") else "video_coords", args[0])
        for part, x in zip((".cos", ".sin"), out, strict=True):
            tap(name + part, planes(x, model.config.num_attention_heads))

    for name in ROPES:
        on(getattr(model, name).register_forward_hook(lambda _, args, out, name=name: tables(name, args, out)))


LAYOUT = Layout(
    doors,
    norms={
        "attn1": "norm1",
        "audio_attn1": "audio_norm1",
        "attn2": "norm2",
        "audio_attn2": "audio_norm2",
        "audio_to_video_attn": "audio_to_video_norm",
        "video_to_audio_attn": "video_to_audio_norm",
        "ff": "norm3",
        "audio_ff": "audio_norm3",
    },
)


def taps(setup: Any) -> Taps:
    """Return all taps of one forward of diffusers; `setup` is an `audit.Setup`."""
    return traced(build_diffusers(setup.config.to_diffusers(), setup.state, setup.dtype).to(setup.device), setup.inputs)


def traced(model: nn.Module, inputs: Arguments) -> Taps:
    """Return all taps of one forward, with the outputs as the call returned them.

    The module's forward hooks would miss a change in an overridden `__call__`.
    """
    with torch.no_grad(), trace(model, LAYOUT) as found:
        outputs = run_diffusers(model, inputs)
    return found | returned(outputs)
