"""Models without values, into which a checkpoint is loaded."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config import TransformerConfig
from ..interface import DIFFUSERS, Conventions, LTX2VideoTransformer3DModel
from .streams import BOTH_STREAMS, is_needed

Built = TypeVar("Built", bound=LTX2VideoTransformer3DModel)


def without_values(
    kind: type[Built],
    config: TransformerConfig,
    conventions: Conventions = DIFFUSERS,
    streams: tuple[str, ...] = BOTH_STREAMS,
) -> Built:
    """Build a model on the meta device, where its parameters have shapes but no values.

    A model of one stream has None in place of the parameters that it never uses.
    """
    with torch.device("meta"), WithoutValues():
        model = kind(config, conventions)
    for path, module in model.named_modules():
        for leaf in list(module._parameters):
            if not is_needed(f"{path}.{leaf}".lstrip("."), streams):
                setattr(module, leaf, None)
    return model


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make tensors the parameters of a model, which has exactly these names.

    `load_state_dict` would take several times as long: for each layer it goes through all names.
    """
    differing = {name for name, _ in model.named_parameters()} ^ state.keys()
    assert not differing, differing
    for path, module in model.named_modules():
        for leaf, empty in module._parameters.items():
            if empty is not None:
                module._parameters[leaf] = nn.Parameter(state[f"{path}.{leaf}".lstrip(".")])


INITIAL = (torch.Tensor.mul, torch.Tensor.fill_)  # arithmetic of initial values outside torch.nn.init


class WithoutValues(TorchFunctionMode):
    """A mode that skips the arithmetic of initial values, which takes longer on meta than all else that loads a file.

    Some of it would also import a second's worth of torch's code.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init" or func in INITIAL:
            return args[0] if args else (kwargs or {})["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))
