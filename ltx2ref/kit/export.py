"""Writes the kit: kit.json, one safetensors file for each case, and a README for those who port.

What is expected are diffusers' recorded tensors. The truth is this package's float64 model, given what the case gives;
it is stored as the recorded tensors' own error, `expected - truth`, which in float32 keeps more digits than needed.

On the exact level the digests that diffusers left under exact arithmetic are expected. What a component needs besides,
tensors with these digests, this package's model computes: if any of its taps had another digest, nothing is written.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..interface import LTX2VideoTransformer3DModel
from ..parity import record
from ..parity.arithmetic import VERSION
from ..parity.cases import Case, Inputs
from ..parity.exact import exact
from ..parity.generator import build
from ..parity.judge import CLEARLY
from ..parity.record import NATIVE_DTYPES, RecordError
from ..parity.run import cast, run
from ..parity.trace.taps import PROJECTED, Taps
from ..parity.truth import FLOOR, SHARE, doubled, norm, truth, wide
from ..progress import track
from .cases import COMPONENTS, MASKED, MODELS, Component

SCHEMA = 2
ABOUT = {
    "bfloat16": "stored as uint16 bit patterns: the upper half of a float32's bits",
    "tensors": "DTYPE/weights/NAME, DTYPE/inputs/NAME, DTYPE/expected/NAME and DTYPE/error/NAME, with DTYPE float32 or "
    "bfloat16, NAME of a parameter, an argument or a tap; of ltx2ref/parity/trace/taps.py",
    "error": "expected - truth, in float32: of diffusers' own tensors against float64, given the same inputs",
    "results": "a file for each case and dtype, with tensors of the names in outputs: float16, bfloat16 (or its bits "
    "as uint16), float32 or float64",
    "exact": "what diffusers computes under exact arithmetic, see docs/arithmetic.md: for each dtype the results file "
    "of a port that computes so, too, and a digest of each tap, the first 16 bytes of the SHA-256 of "
    "'{dtype} {shape}\\n' and the elements; DTYPE/exact/inputs/NAME takes the place of DTYPE/inputs/NAME "
    "where there is one, and DTYPE/exact/expected/NAME has a component's digest",
}


def export(directory: str | Path) -> dict[str, Any]:
    """Write the kit into a new or empty folder, and return what is in its kit.json.

    Raises `ValueError` if something is there, and `RecordError` if a recording is missing, or is not what this
    package's model computes under exact arithmetic.
    """
    folder = Path(directory)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for about, tensors in everything():
        save_file(tensors, folder / about["file"])
        cases.append(about)
    kit = {
        "schema": SCHEMA,
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
    return {key: value for key, value in record.environment().items() if key != "probe"}


def everything() -> Iterator[tuple[dict[str, Any], Taps]]:
    """Yield for each case its entry in kit.json, and the tensors of its file; components before models."""
    parts: list[Case | Component] = [*COMPONENTS, *MODELS]
    cases = {origin(part).id: origin(part) for part in parts}
    sources = {name: {dtype: Source(case, dtype) for dtype in NATIVE_DTYPES} for name, case in cases.items()}
    for part in track(parts, "writing the kit"):
        yield entry(part, sources[origin(part).id])


def origin(part: Case | Component) -> Case:
    return part if isinstance(part, Case) else part.case


class Source:
    """A recorded model: everything that it and its components need, in one dtype."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.dtype = case, dtype
        self.model: LTX2VideoTransformer3DModel = build(case.config, NATIVE_DTYPES[dtype])
        self.double = doubled(self.model)
        self.inputs: Inputs = cast(case.inputs(), NATIVE_DTYPES[dtype])
        self.exact, self.digests = exactly(self.model, self.inputs, case, dtype)
        self.taps = self.exact if case == MASKED else record.load_record(case, dtype).taps
        self.flat = self.inputs | (self.inputs.get("attention_kwargs") or {})
        self.weights = {name: x.detach() for name, x in self.model.state_dict().items()}

    def truth(self, part: "Case | Component") -> Taps:
        """Compute in float64: a model given the recorded phases, a component given its inputs."""
        if isinstance(part, Case):
            return truth(self.model, self.inputs, self.taps)
        given = {name: self.taps[name] for name in part.given}
        coords = {name: x.double() for name, x in given.items() if name.endswith("_coords")}
        found = run(self.double, wide(self.inputs) | coords, given)
        for before, after in part.chain:
            found[after] = given[before].double() + found[after] - found[before]
        return found

    def outputs(self, part: "Case | Component") -> tuple[str, ...]:
        """Name what a port is asked for: of a model all taps but derived ones, and what `sample` says again."""
        return (
            part.outputs
            if isinstance(part, Component)
            else tuple(
                name for name in self.taps if not name.endswith(("rows", ".gate")) and name not in PROJECTED.values()
            )
        )

    def tensors(self, part: "Case | Component") -> dict[str, Taps]:
        """Return what the case's file has of this dtype, by kind."""
        more: dict[str, Taps] = {}
        if isinstance(part, Case):
            weights, given = self.weights, record.tensors(self.inputs)
        else:
            weights = {name: x for name, x in self.weights.items() if part.weights and name.startswith(part.weights)}
            given = {name: self.taps[name] for name in part.given} | {name: self.flat[name] for name in part.raw}
            more = {
                "exact/inputs": {name: self.exact[name] for name in part.given},
                "exact/expected": {name: self.exact[name] for name in part.outputs},
            }
        true, outputs = self.truth(part), self.outputs(part)
        return {
            "weights": weights,
            "inputs": given,
            "expected": {name: self.taps[name] for name in outputs},
            "error": {name: self.taps[name].double() - true[name] for name in outputs},
        } | more


def exactly(
    model: LTX2VideoTransformer3DModel, inputs: Inputs, case: Case, dtype: str
) -> tuple[Taps, dict[str, bytes]]:
    """Compute every tap under exact arithmetic, and return them with diffusers' digests, which are theirs as well.

    Raises `RecordError` if one differs: then nobody has the tensors that diffusers computed.
    """
    with exact():
        taps = run(model, inputs)
    recorded = record.load_exact(case, dtype).digests
    other = [name for name, x in recorded.items() if name not in taps or record.digest(taps[name]) != x]
    if other:
        raise RecordError(
            f"{case.id} {dtype}: {len(other)} of {len(recorded)} taps have another digest here than "
            f"recorded, the first is {other[0]}"
        )
    return taps, recorded


def entry(part: Case | Component, sources: Mapping[str, Source]) -> tuple[dict[str, Any], Taps]:
    tensors = {dtype: source.tensors(part) for dtype, source in sources.items()}
    some = next(iter(sources.values()))
    flat, outputs = some.flat, some.outputs(part)
    if isinstance(part, Case):
        operation, module = "model", ""
        arguments = {name: x for name, x in flat.items() if not isinstance(x, Tensor | dict) and x is not None}
    else:
        operation, module, arguments = part.operation, part.module, part.arguments(part.case.config, flat)
    slug, case = part.id.replace("/", "-"), origin(part)
    results = {dtype: f"{slug}.{dtype}.safetensors" for dtype in sources}
    about = {
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
            dtype: {name: share(x, found["expected"][name]) for name, x in found["error"].items()}
            for dtype, found in tensors.items()
        },
    }
    return about, stored(tensors)


def share(error: Tensor, expected: Tensor) -> float:
    """Relative to the truth's norm."""
    size = norm(expected.double() - error)
    return norm(error) / size if size else 0.0


def stored(tensors: Mapping[str, Mapping[str, Taps]]) -> Taps:
    return {
        f"{dtype}/{kind}/{name}": plain(x.float() if kind == "error" else x)
        for dtype, found in tensors.items()
        for kind, name, x in chain.from_iterable(
            ((kind, name, x) for name, x in some.items()) for kind, some in found.items()
        )
    }


def plain(x: Tensor) -> Tensor:
    """Readable by those who have no bfloat16."""
    x = x.contiguous().clone()
    return x.view(torch.uint16) if x.dtype == torch.bfloat16 else x
