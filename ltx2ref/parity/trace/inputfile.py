"""Read and write the arguments of one call of the model as a file (docs/trace-format.md).

A safetensors file holds the tensors under the names of the documented forward, those inside `attention_kwargs` with
that name and a point before theirs. All other arguments are JSON, under the metadata key "inputs":

    {"schema": 1, "arguments": {"num_frames": 3, "fps": 24.0}}
"""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint.header import MAX_HEADER, parse_json, read_header
from ...checkpoint.storage import require
from ...checkpoint.writer import header, pieces
from ...interface import LTX2VideoTransformer3DModel
from ...printable import printable
from ...whole import put, replacing
from .tracefile import naming_file, of_tensor, read, to_json

INPUTS_SCHEMA = 1
INPUTS_KEY, NESTED = "inputs", "attention_kwargs"
NESTED_MASKS = ("video_self_attention_mask", "video_keyframes_mask")  # what `attention_kwargs` may hold
FORWARD_ARGUMENTS = {
    name: parameter
    for name, parameter in inspect.signature(LTX2VideoTransformer3DModel.forward).parameters.items()
    if name not in ("self", NESTED, "return_dict")
}
# The types of the arguments that are no tensors.
VALUES: dict[str, tuple[str, type]] = {
    "num_frames": ("a whole number", Integral),
    "height": ("a whole number", Integral),
    "width": ("a whole number", Integral),
    "audio_num_frames": ("a whole number", Integral),
    "fps": ("a number", Real),
    "isolate_modalities": ("true or false", bool),
    "use_cross_timestep": ("true or false", bool),
    "spatio_temporal_guidance_blocks": ("a list of whole numbers", list),
}
REQUIRED = tuple(name for name, parameter in FORWARD_ARGUMENTS.items() if parameter.default is inspect.Parameter.empty)


def save_inputs(path: str | Path, inputs: Mapping[str, Any]) -> None:
    """Write the arguments of one call, as a hook of a pipeline's model gets them.

        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: save_inputs("call.safetensors", kwargs), with_kwargs=True
        )

    Arguments that are None are left out, and so is `return_dict`. An existing file is replaced.

    Raises `TraceError` for an argument that the documented forward does not have, and for one of another type.
    """
    with naming_file(path):
        given = checked_arguments(inputs)
        nested = given.pop(NESTED, {})
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        tensors |= {f"{NESTED}.{name}": x for name, x in nested.items()}
        entries = {name: of_tensor(name, x) for name, x in tensors.items()}
        plain = {name: x for name, x in given.items() if name not in tensors}
        metadata = {INPUTS_KEY: to_json({"schema": INPUTS_SCHEMA, "arguments": plain})}
        require(len(header(entries, metadata)) <= MAX_HEADER, "too many arguments for one file")
        with replacing(Path(path)) as partial:
            put(partial, pieces(entries, metadata, "writing the inputs"))


def load_inputs(path: str | Path) -> dict[str, Any]:
    """Read the arguments of one call.

    Text and noise levels that a call without one stream lacks are None. Raises `TraceError`, which names the file and
    the argument, unless they are those of the documented forward.
    """
    with naming_file(path):
        file, stored = read_header(Path(path))
        require(file.container == "safetensors", f"a {file.container} file, expected safetensors")
        given: dict[str, Any] = plain_arguments(file.metadata)
        for name, x in stored.items():
            outer, _, inner = name.partition(".")
            require(bool(inner) == (outer == NESTED), f"{printable(name)}: no argument of the forward")
            if inner:
                given.setdefault(NESTED, {})[inner] = read(x)
            else:
                require(name not in given, f"{name}: both a tensor and a value in the metadata")
                given[name] = read(x)
        found = checked_arguments(given)
        found = dict.fromkeys(ignored(found)) | found
        missing = [name for name in REQUIRED if name not in found]
        require(not missing, f"without {', '.join(missing)}, which every call has")
        return found


def ignored(given: Mapping[str, Any]) -> list[str]:
    """Return the required arguments that a call may lack because it leaves their stream out."""
    absent = [
        name for name in ("hidden_states", "audio_hidden_states") if name in given and 0 in given[name].shape[1:2]
    ]
    levels = ["timestep"] * ("hidden_states" in absent and "audio_timestep" in given)
    return [name.replace("hidden", "encoder_hidden") for name in absent] + levels


def plain_arguments(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments in the metadata of a file, which are no tensors."""
    if INPUTS_KEY not in metadata:
        return {}
    try:
        said = parse_json(metadata[INPUTS_KEY].encode())
    except ValueError as error:
        raise ValueError(f"metadata {INPUTS_KEY!r}: {error}") from None
    schema, arguments = said.get("schema"), said.get("arguments", {})
    require(type(schema) is int and schema == INPUTS_SCHEMA, f"schema {str(schema)[:80]}, expected {INPUTS_SCHEMA}")
    require(isinstance(arguments, dict), f"arguments: expected an object, got {str(arguments)[:80]}")
    return dict(arguments)


def checked_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not None, with masks in `attention_kwargs`; refuse what the forward does not take.

    Newer implementations take the masks as arguments of their own.
    """
    found = {name: x for name, x in given.items() if x is not None and name != "return_dict"}
    nested = found.pop(NESTED, {})
    require(isinstance(nested, Mapping), f"{NESTED}: expected a dict of masks, got {type(nested).__name__}")
    nested = {name: x for name, x in nested.items() if x is not None}
    nested |= {name: found.pop(name) for name in NESTED_MASKS if name in found}
    for name, x in nested.items():
        require(name in NESTED_MASKS, f"{NESTED}.{printable(name)}: expected {' or '.join(NESTED_MASKS)}")
        require(isinstance(x, Tensor), f"{NESTED}.{name}: expected a tensor, got {type(x).__name__}")
    for name, x in found.items():
        require(name in FORWARD_ARGUMENTS, f"{printable(name)}: no argument of the forward{near(name)}")
        found[name] = checked_argument(name, x)
    return found | ({NESTED: nested} if nested else {})


def checked_argument(name: str, x: Any) -> Any:
    """Return an argument as it is stored, or refuse it for its type."""
    if name not in VALUES:
        require(isinstance(x, Tensor), f"{name}: expected a tensor, got {str(x)[:80]}")
        return x
    expected, kind = VALUES[name]
    x = list(x) if isinstance(x, tuple) else x
    is_kind = isinstance(x, kind) and (kind is bool or not isinstance(x, bool))
    if kind is list and is_kind:
        is_kind = all(isinstance(i, Integral) and not isinstance(i, bool) for i in x)
    require(is_kind, f"{name}: expected {expected}, got {printable(str(x)[:80])}")
    if kind is list:
        return [int(i) for i in x]
    return bool(x) if kind is bool else int(x) if isinstance(x, Integral) else float(x)


def near(name: str) -> str:
    """Return a question about the argument whose name is nearest to `name`, or nothing."""
    found = get_close_matches(name, FORWARD_ARGUMENTS, 1)
    return f"; did you mean {found[0]}?" if found else ""
