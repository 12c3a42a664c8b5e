"""Reading a kit's folder, the files of its cases, and the results that a port wrote."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.header import read_header
from ..parity.arithmetic import VERSION
from ..parity.trace.taps import Taps
from .export import KIT_SCHEMA

RESULT_DTYPES = (torch.float16, torch.bfloat16, torch.uint16, torch.float32, torch.float64)
KitEntry = Mapping[str, Any]  # the entry of a case in kit.json


def read_kit(folder: Path) -> list[KitEntry]:
    """Return the cases in a kit's kit.json.

    Raises `ValueError` if there is no such file, or if its schema or its version of exact arithmetic is another one.
    """
    try:
        said = json.loads((folder / "kit.json").read_text(encoding="utf-8"))
        for key, here in (("schema", KIT_SCHEMA), ("arithmetic", VERSION)):
            if said[key] != here:
                raise ValueError(f"{key} {said[key]}, expected {here}")
        cases: list[KitEntry] = said["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no kit of this version: {error}") from None
    return cases


def read_results(path: Path, expected: Iterable[str]) -> Taps:
    """Read the results of one case.

    Raises `ValueError` if the file is not a safetensors file, if a tensor has a name that is not expected, or if a
    tensor has a dtype that results cannot have.
    """
    found = tensors_under(read_tensors(path), "")
    for name, x in found.items():
        if name not in expected:
            raise ValueError(f"{path.name}: {name} is no output of this case")
        if x.dtype not in RESULT_DTYPES:
            raise ValueError(f"{path.name}: {name} is {x.dtype}, expected float16, bfloat16, float32 or float64")
    return found


def read_tensors(path: Path) -> Taps:
    """Read a safetensors file. Raises `CheckpointError`, a `ValueError`, if it is not one."""
    read_header(path)
    return load_file(path)


def tensors_under(file: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Return the tensors whose names begin with a prefix, by the rest of their names.

    Tensors stored as uint16 are returned as bfloat16, since that is what they contain.
    """
    return {
        name.removeprefix(prefix): x.view(torch.bfloat16) if x.dtype == torch.uint16 else x
        for name, x in file.items()
        if name.startswith(prefix)
    }
