"""Call a module with the documented arguments, and read what taps it has; one without known layers is only called."""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .layouts import Layout, original
from .taps import Taps, note, returned, trace

# The documentation passes these in `attention_kwargs`; newer implementations take them as arguments of their own.
LIFTED_ARGUMENTS = ("video_self_attention_mask", "video_keyframes_mask")


def taps_of_module(model: nn.Module, inputs: Mapping[str, Any], layout: Layout | None = None) -> Taps:
    """Return the taps of one forward, with the outputs as the call returned them.

    Hooks would miss a change in an overridden `__call__`. A module from `torch.compile` gives the outputs, and the
    module that it was made from the other taps. A module that cannot be traced is called, and a note says so.

    Raises `OutputError` if the module does not return video and audio.
    """
    with torch.no_grad(), ExitStack() as stack:
        taps: Taps = {}
        try:
            taps = stack.enter_context(trace(model, layout))
        except Exception as error:
            note(f"{type(original(model)).__name__} cannot be traced ({type(error).__name__}: {error}): outputs only")
        output = call_documented(model, inputs)
    if any(original(module) is not module for module in model.modules()):
        note("a compiled module: its outputs were compared as compiled, and its other taps as not compiled")
        with torch.no_grad():
            output = call_documented(model, inputs)
    taps.update(returned(output))
    return taps


def call_documented(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Return what a module returns for the documented arguments, a pair if it can be asked for one."""
    known = inspect.signature(original(model).forward).parameters
    arguments, masks = dict(inputs), dict(inputs.get("attention_kwargs") or {})
    arguments |= {name: masks.pop(name) for name in LIFTED_ARGUMENTS if name in masks and name in known}
    if "attention_kwargs" in inputs:
        arguments["attention_kwargs"] = masks or None
    return model(**arguments, **({"return_dict": False} if "return_dict" in known else {}))
