"""Run this model once and return every tap; prepare the inputs for a dtype or device."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..interface import LTX2VideoTransformer3DModel
from .cases import Inputs
from .trace.taps import PROJECTED, Taps, returned, trace


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Cast the arguments of a forward to the dtypes that a model of `dtype` takes.

    Everything else keeps its own: noise levels, coordinates, and masks in which 1 keeps a token.
    """
    main = ("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states")
    masks = ("encoder_attention_mask", "audio_encoder_attention_mask")
    biases = [name for name in masks if inputs.get(name) is not None and added_to_logits(inputs[name])]
    given = [name for name in (*main, *biases, "perturbation_mask") if inputs.get(name) is not None]
    return inputs | {name: inputs[name].to(dtype) for name in given}


def added_to_logits(mask: Tensor) -> bool:
    """Tell whether a text mask is added to the logits."""
    return mask.ndim == 3 and mask.is_floating_point()


def moved(inputs: Inputs, move: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply `move` to every tensor in the arguments of a forward, including those in nested dicts."""

    def walk(x: Any) -> Any:
        return move(x) if isinstance(x, Tensor) else {k: walk(v) for k, v in x.items()} if isinstance(x, dict) else x

    return {name: walk(x) for name, x in inputs.items()}


def run(
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    inject: Taps | None = None,
    deviations: Mapping[str, Tensor] | None = None,
) -> Taps:
    """Run the model and return all taps, including the returned outputs, on the CPU. An absent stream has none.

    Taps in `inject` are recorded, and then replaced for the rest of the forward. `deviations` are added to taps before
    they are recorded. Raises `OutputError` if the model does not return video and audio.
    """
    with torch.no_grad(), trace(model, inject=inject, deviations=deviations) as taps:
        output = model(**inputs)
    found = {name: x.cpu() for name, x in (taps | returned(output)).items() if x.numel()}
    changed = {name: x for name, x in (deviations or {}).items() if name in PROJECTED}  # what no layer computes
    return found | {name: (found[name].double() + x).to(found[name].dtype) for name, x in changed.items()}
