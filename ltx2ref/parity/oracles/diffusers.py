"""Run diffusers' implementation of the LTX-2 transformer as a black box.

This module and ltx_core.py take a diffusers config, parameters under diffusers' names and the arguments of the
documented forward, so that a test or a benchmark can feed the same inputs to every implementation and compare the
outputs. Gradients follow the caller's mode: wrap the calls in `torch.no_grad()`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

from ..trace.layouts import DIFFUSERS_LIKE
from ..trace.modules import call_documented
from ..trace.taps import Taps, returned, trace

Config = Mapping[str, Any]
Arguments = Mapping[str, Any]


def build_diffusers(config: Config, state: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Build diffusers' model around the given parameters, which are shared if they have this dtype already."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**without_private(config))
    return adopt(model, state, dtype)


def run_diffusers(model: nn.Module, inputs: Arguments) -> tuple[Tensor, Tensor]:
    """Return the velocities of video (B, Tv, C) and audio (B, Ta, C) for the documented arguments."""
    video, audio = returned(call_documented(model, inputs)).values()
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


LAYOUT = DIFFUSERS_LIKE


def taps(setup: Any) -> Taps:
    """Return all taps of one forward of diffusers; `setup` is an `audit.Setup`."""
    return traced(build_diffusers(setup.config.to_diffusers(), setup.state, setup.dtype).to(setup.device), setup.inputs)


def traced(model: nn.Module, inputs: Arguments) -> Taps:
    """Return all taps of one forward, with the outputs as the call returned them.

    The module's forward hooks would miss a change in an overridden `__call__`.
    """
    with torch.no_grad(), trace(model, LAYOUT) as found:
        outputs = run_diffusers(model, inputs)
    found.update(returned(outputs))
    return found
