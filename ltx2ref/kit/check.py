"""Judges what a port computed for the kit's cases: results that any program wrote, against files alone.

Components are compared with what is expected, by the budget. A model is built from the kit's own weights as well, for
what the audit can say on top: errors made at a stage or only passed on, and what the first of them looks like.
"""
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint.header import read_header
from ..config import TransformerConfig
from ..model import LTX2VideoTransformer3DModel
from ..parity.audit import judge_taps
from ..parity.cases import Inputs
from ..parity.compare import compare
from ..parity.record import DTYPES
from ..parity.report import DIVERGED, MISSING, SHAPE, SUSPECT, Report
from ..parity.taps import Taps
from ..parity.truth import sinusoid_bound
from .export import SCHEMA, export

LIFTED = ("video_self_attention_mask", "video_keyframes_mask")  # arguments that travel in attention_kwargs
NUMBERS = (torch.float16, torch.bfloat16, torch.uint16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Result:
    """One case in one dtype. No report: the port wrote no file for it."""
    case: str
    dtype: str
    report: Report | None


@dataclass(frozen=True)
class Verdict:
    results: list[Result]

    @property
    def given(self) -> list[Report]:
        return [result.report for result in self.results if result.report is not None]

    @property
    def passed(self) -> int:
        return sum(not verdicts(report) & {DIVERGED, SHAPE, SUSPECT} for report in self.given)

    @property
    def status(self) -> int:
        """0 conformant in all that was given, 1 something is wrong, 2 suspect, or nothing was given."""
        found: set[str] = set().union(*map(verdicts, self.given))
        return 1 if found & {DIVERGED, SHAPE} else 2 if SUSPECT in found or not self.given else 0

    @property
    def summary(self) -> str:
        """The line for a badge."""
        word = ("conformant", "not conformant", "inconclusive")[self.status]
        missing = len(self.results) - len(self.given)
        return f"ltx2ref kit: {word}, {self.passed} of {len(self.results)} cases pass" + (
            f", {missing} not given" if missing else "")

    def to_json(self) -> dict[str, Any]:
        return {"summary": self.summary, "status": self.status, "results": [asdict(x) for x in self.results]}


def verdicts(report: Report) -> set[str]:
    return {row.verdict for row in report.rows}


def check(results: str | Path, kit: str | Path | None = None) -> Verdict:
    """All cases of a kit, by default of this version's own.

    Raises `ValueError` for a folder that is no kit, or that holds no results, and for results that cannot be read.
    """
    folder = Path(results)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of results")
    if kit is not None:
        return judge_all(folder, Path(kit))
    with tempfile.TemporaryDirectory() as temporary:
        export(temporary)
        return judge_all(folder, Path(temporary))


def judge_all(folder: Path, kit: Path) -> Verdict:
    cases = read_kit(kit)
    known = {name for case in cases for name in case["results"].values()}
    strange = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in known)
    if strange:
        raise ValueError(f"{folder}: {strange[0]} is the result of no case of the kit ({len(strange)} such files)")
    return Verdict([judge_one(case, dtype, folder / name, kit)
                    for case in cases for dtype, name in case["results"].items()])


def read_kit(kit: Path) -> list[dict[str, Any]]:
    try:
        said = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
        if said["schema"] != SCHEMA:
            raise ValueError(f"schema {said['schema']}, expected {SCHEMA}")
        cases: list[dict[str, Any]] = said["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{kit}: no kit of this version: {error}") from None
    return cases


def judge_one(case: Mapping[str, Any], dtype: str, path: Path, kit: Path) -> Result:
    if not path.exists():
        return Result(case["id"], dtype, None)
    file = read_tensors(kit / case["file"])
    expected = {name: part(file, f"{dtype}/expected/")[name] for name in case["outputs"]}
    given = read_results(path, expected)
    if case["operation"] == "model":
        report = judge_model(case, dtype, file, expected, given)
    else:
        error, timestep = part(file, f"{dtype}/error/"), part(file, f"{dtype}/inputs/").get("timestep")
        bounds = {name: sinusoid_bound(timestep, DTYPES[dtype]) for name in expected
                  if timestep is not None and name.endswith(".sinusoid")}
        true = {name: x.double() - error[name].double() for name, x in expected.items()}
        report = compare(expected, given, true, bounds=bounds)
    return Result(case["id"], dtype, replace(report, candidate={"implementation": path.name}))


def judge_model(case: Mapping[str, Any], dtype: str, file: Taps, expected: Taps, given: Taps) -> Report:
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(TransformerConfig.from_diffusers(case["config"]))
    model.load_state_dict(part(file, f"{dtype}/weights/"), assign=True)
    inputs: Inputs = part(file, f"{dtype}/inputs/") | case["arguments"]
    lifted = {name: inputs.pop(name) for name in LIFTED if name in inputs}
    return judge_taps(model.to(DTYPES[dtype]).eval(), inputs | {"attention_kwargs": lifted or None}, expected, given)


def part(file: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): x.view(torch.bfloat16) if x.dtype == torch.uint16 else x
            for name, x in file.items() if name.startswith(prefix)}


def read_results(path: Path, expected: Iterable[str]) -> Taps:
    """Raises `ValueError` for a file that is none, an unknown name, or a dtype that is no number's."""
    found = part(read_tensors(path), "")
    for name, x in found.items():
        if name not in expected:
            raise ValueError(f"{path.name}: {name} is no output of this case")
        if x.dtype not in NUMBERS:
            raise ValueError(f"{path.name}: {name} is {x.dtype}, expected float16, bfloat16, float32 or float64")
    return found


def read_tensors(path: Path) -> Taps:
    """Raises `CheckpointError`, a `ValueError`, for a file that is none."""
    read_header(path)
    return load_file(path)


def failures(verdict: Verdict) -> dict[str, Report]:
    return {f"{x.case} {x.dtype}": x.report for x in verdict.results
            if x.report is not None and verdicts(x.report) & {DIVERGED, SHAPE, SUSPECT}}


def lacking(report: Report) -> int:
    return sum(row.verdict == MISSING for row in report.rows)
