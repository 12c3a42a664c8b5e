"""diffusers' implementation of the LTX-2 transformer, run as a black box; for ltx-core's see oracle_ltx_core.py.

Both take a diffusers config, parameters under diffusers' names and the arguments of the documented forward, so a test
or a benchmark feeds one set of inputs to everything and compares outputs. Only scripts import them.
Gradients follow the caller's mode: wrap the calls in `torch.no_grad()`.
"""
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

Config = Mapping[str, Any]
Inputs = Mapping[str, Any]

# What the documentation passes in `attention_kwargs`, and diffusers 0.42.1 takes as arguments of their own.
LIFTED_ARGUMENTS = ("video_self_attention_mask", "video_keyframes_mask")


def build_diffusers(config: Config, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """diffusers' model around the given parameters: shared, not copied, where `dtype` is theirs."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**without_private(config))
    return adopt(model, state, dtype)


def run_diffusers(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Denoised video (B, Tv, C) and audio (B, Ta, C) for the documented forward arguments."""
    arguments, kwargs = dict(inputs), dict(inputs.get("attention_kwargs") or {})
    arguments |= {name: kwargs.pop(name) for name in LIFTED_ARGUMENTS if name in kwargs}
    video, audio = model(**arguments | {"attention_kwargs": kwargs or None, "return_dict": False})
    return video, audio


def adopt(model: Any, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    model.load_state_dict({name: t.to(dtype) for name, t in state.items()}, strict=True, assign=True)
    left = [name for name, t in model.named_buffers() if t.is_meta]
    if left:
        raise RuntimeError(
            f"{type(model).__name__} keeps {len(left)} buffers that no parameter fills: {left[:4]}"
        )
    adopted: nn.Module = model.requires_grad_(False).eval()
    return adopted


def without_private(config: Config) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}
