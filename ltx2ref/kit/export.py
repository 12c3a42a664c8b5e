"""The export of the kit: kit.json, one safetensors file for each case, and a README for whoever ports the model.

Expected tensors are those that diffusers computed when it was recorded. The truth is what this package's model computes
in float64 from the inputs of the case. It is stored as `expected - truth`, in float32, which keeps more digits of the
truth than are needed.

On the exact level, the expected digests are those that diffusers left under exact arithmetic. Components also need
tensors, which this package's model computes. Nothing is written unless every tap of that model has diffusers' digest.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..checkpoint.writer import writing
from ..parity import record
from ..parity.arithmetic import VERSION
from ..parity.cases import Case
from ..parity.judge import CLEARLY
from ..parity.record import NATIVE_DTYPES
from ..parity.trace.taps import Taps
from ..parity.truth import FLOOR, SHARE, norm
from ..progress import track
from ..whole import make_parents, staged_folder, warn_of_leftovers
from .cases import COMPONENTS, MODELS, Component
from .recorded import RecordedModel

KIT_SCHEMA = 2
ABOUT = {
    "bfloat16": "stored as uint16 bit patterns: the upper half of a float32's bits",
    "tensors": "DTYPE/weights/NAME, DTYPE/inputs/NAME, DTYPE/expected/NAME and DTYPE/error/NAME, where DTYPE is "
    "float32 or bfloat16, and NAME names a parameter, an argument or a tap (ltx2ref/parity/trace/taps.py)",
    "error": "expected - truth, in float32: the error of diffusers' tensors against float64, from the same inputs",
    "results": "a file for each case and dtype, with tensors named as in outputs: float16, bfloat16 (or its bits as "
    "uint16), float32 or float64",
    "exact": "what diffusers computes under exact arithmetic (docs/arithmetic.md): for each dtype, the name of the "
    "results file of a port that computes this as well, and a digest of each tap: the first 16 bytes of the "
    "SHA-256 of '{dtype} {shape}\\n' and the elements; DTYPE/exact/inputs/NAME takes the place of DTYPE/inputs/NAME "
    "where it exists, and DTYPE/exact/expected/NAME is the tensor that has the digest, for components",
}


def export(directory: str | Path) -> dict[str, Any]:
    """Write the kit into a new or empty folder, and return the contents of its kit.json.

    If anything fails, no file is left. Raises `ValueError` if the folder holds anything. Raises `RecordError` if a
    recording is missing, or differs from what this package's model computes under exact arithmetic.
    """
    folder = Path(directory)
    warn_of_leftovers(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder")
    with writing(folder):
        make_parents(folder)
        with staged_folder(folder) as partial:
            return write_kit(partial)


def write_kit(folder: Path) -> dict[str, Any]:
    """Write the files of the kit, and return the contents of its kit.json."""
    cases = []
    for about, tensors in everything():
        save_file(tensors, folder / about["file"])
        cases.append(about)
    kit = {
        "schema": KIT_SCHEMA,
        "ltx2ref": __version__,
        "arithmetic": VERSION,
        "recorded": provenance(),
        "about": ABOUT,
        "budget": {"share": SHARE, "floor": FLOOR, "with_a_note_up_to": CLEARLY},
        "cases": cases,
    }
    (folder / "kit.json").write_text(json.dumps(kit, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text((files(__package__) / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return kit


def provenance() -> dict[str, Any]:
    """Return the versions and the machine with which diffusers was recorded."""
    return {key: value for key, value in record.environment().items() if key != "probe"}


def everything() -> Iterator[tuple[dict[str, Any], Taps]]:
    """Yield the entry of each case in kit.json and the tensors of its file. Components come before models."""
    parts: list[Case | Component] = [*COMPONENTS, *MODELS]
    cases = {model_case(part).id: model_case(part) for part in parts}
    sources = {name: {dtype: RecordedModel(case, dtype) for dtype in NATIVE_DTYPES} for name, case in cases.items()}
    for by_dtype in sources.values():
        for source in by_dtype.values():
            source.require_digests()  # a faulty recording must be found before anything is written
    for part in track(parts, "writing the kit"):
        by_dtype = sources[model_case(part).id]
        tensors = {dtype: case_tensors(source, part) for dtype, source in by_dtype.items()}
        yield case_entry(part, by_dtype, tensors), stored(tensors)


def model_case(part: Case | Component) -> Case:
    """Return the case itself, or the case of the model that a component belongs to."""
    return part if isinstance(part, Case) else part.case


def case_tensors(source: RecordedModel, part: Case | Component) -> dict[str, Taps]:
    """Return the tensors of one dtype that go into the file of a case, by kind."""
    more: dict[str, Taps] = {}
    if isinstance(part, Case):
        weights, given = source.weights, record.tensors(source.inputs)
    else:
        weights = source.weights_of(part)
        given = source.given(part) | source.arguments_of(part)
        more = {
            "exact/inputs": {name: source.exact_taps[name] for name in part.given},
            "exact/expected": {name: source.exact_taps[name] for name in part.outputs},
        }
    true, outputs = source.truth(part), source.outputs(part)
    return {
        "weights": weights,
        "inputs": given,
        "expected": {name: source.taps[name] for name in outputs},
        "error": {name: source.taps[name].double() - true[name] for name in outputs},
    } | more


def case_entry(
    part: Case | Component, sources: Mapping[str, RecordedModel], tensors: Mapping[str, Mapping[str, Taps]]
) -> dict[str, Any]:
    """Return the entry of a case in kit.json."""
    some = next(iter(sources.values()))
    flat, outputs = some.flat, some.outputs(part)
    if isinstance(part, Case):
        operation, module = "model", ""
        arguments = {name: x for name, x in flat.items() if not isinstance(x, Tensor | dict) and x is not None}
    else:
        operation, module, arguments = part.operation, part.module, part.arguments(part.case.config, flat)
    slug, case = part.id.replace("/", "-"), model_case(part)
    results = {dtype: f"{slug}.{dtype}.safetensors" for dtype in sources}
    return {
        "id": part.id,
        "operation": operation,
        "module": module,
        "file": f"{slug}.safetensors",
        "release": case.release,
        "from": None if isinstance(part, Case) else case.id,
        "config": case.config.to_diffusers(),
        "arguments": arguments,
        "inputs": list(tensors[some.dtype]["inputs"]),
        "outputs": list(outputs),
        "results": results,
        "exact": {
            dtype: {
                "results": f"exact/{results[dtype]}",
                "digests": {
                    name: x.hex() for name, x in source.digests.items() if isinstance(part, Case) or name in outputs
                },
            }
            for dtype, source in sources.items()
        },
        "own_error": {
            dtype: {name: relative_error(x, found["expected"][name]) for name, x in found["error"].items()}
            for dtype, found in tensors.items()
        },
    }


def relative_error(error: Tensor, expected: Tensor) -> float:
    """Return the norm of the error divided by the norm of the truth."""
    size = norm(expected.double() - error)
    return norm(error) / size if size else 0.0


def stored(tensors: Mapping[str, Mapping[str, Taps]]) -> Taps:
    """Return the tensors of all dtypes under their names in the file of a case."""
    return {
        f"{dtype}/{kind}/{name}": plain(x.float() if kind == "error" else x)
        for dtype, kinds in tensors.items()
        for kind, found in kinds.items()
        for name, x in found.items()
    }


def plain(x: Tensor) -> Tensor:
    """Return a copy that can be read by libraries without bfloat16, whose bits are stored as uint16."""
    x = x.contiguous().clone()
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
