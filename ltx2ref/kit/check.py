"""Judges what a port computed for the kit's cases: results that any program wrote, against files alone.

On the native level components are compared with what is expected, by the budget. A model is built from the kit's own
weights as well, for what the audit can say on top: errors made at a stage or only passed on, and what the first of them
looks like. On the exact level there is no budget: see identity.py.
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
from ..interface import LTX2VideoTransformer3DModel
from ..parity.arithmetic import VERSION
from ..parity.cases import Inputs
from ..parity.compare import compare, compare_forwards
from ..parity.exact import exact
from ..parity.judge import CLEARLY
from ..parity.record import NATIVE_DTYPES
from ..parity.report.assemble import assemble
from ..parity.report.rows import DIVERGED, IDENTICAL, MISSING, ROUNDING, SHAPE, SUSPECT, Report
from ..parity.run import run
from ..parity.trace.taps import Taps
from ..parity.truth import least_lost, sinusoid_bound
from .export import SCHEMA, export
from .identity import identity

NATIVE, EXACT = LEVELS = ("native", "exact")
LIFTED = ("video_self_attention_mask", "video_keyframes_mask")  # arguments that travel in attention_kwargs
NUMBERS = (torch.float16, torch.bfloat16, torch.uint16, torch.float32, torch.float64)
Entry = Mapping[str, Any]  # of a case, in kit.json


@dataclass(frozen=True)
class Result:
    """One case in one dtype. No report: the port wrote nothing for it."""

    case: str
    dtype: str
    report: Report | None

    @property
    def name(self) -> str:
        return f"{self.case} {self.dtype}"

    @property
    def missing(self) -> list[str]:
        return [] if self.report is None else [row.name for row in self.report.rows if row.verdict == MISSING]


@dataclass(frozen=True)
class Verdict:
    """All cases on one level. `partial`: what is missing was left out on purpose."""

    results: list[Result]
    level: str = NATIVE
    partial: bool = False

    @property
    def given(self) -> list[Report]:
        return [result.report for result in self.results if result.report is not None]

    @property
    def missing(self) -> list[str]:
        """Name the cases, and then the outputs of cases, that the port did not write."""
        return [result.name for result in self.results if result.report is None] + [
            f"{result.name}: {name}" for result in self.results for name in result.missing
        ]

    @property
    def passed(self) -> int:
        return sum(not verdicts(report) & {DIVERGED, SHAPE, SUSPECT} for report in self.given)

    @property
    def suspect(self) -> bool:
        return any(SUSPECT in verdicts(report) for report in self.given)

    @property
    def status(self) -> int:
        """Return 0 for conformant, 1 for something wrong, 2 for inconclusive: suspect, or something is missing."""
        if any(verdicts(report) & {DIVERGED, SHAPE} for report in self.given):
            return 1
        return 2 if self.suspect or not self.given or (self.missing and not self.partial) else 0

    @property
    def summary(self) -> str:
        """Say it all in one line, for a badge."""
        right = "identical" if self.level == EXACT else "conformant"
        word = (right, f"not {right}", "inconclusive" if self.suspect else "incomplete")[self.status]
        without = len(self.results) - len(self.given)
        lacking = sum(map(bool, (result.missing for result in self.results)))
        counts = [f"{self.passed} of {len(self.results)} cases pass"]
        if self.level == EXACT:
            rows = [row for report in self.given for row in report.rows]
            counts += [f"{sum(row.verdict == IDENTICAL for row in rows):,} of {len(rows):,} taps identical"]
        counts += [f"{without} not given"] if without else []
        counts += [f"{lacking} with outputs missing"] if lacking else []
        return f"ltx2ref kit: {word}, {', '.join(counts)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "summary": self.summary,
            "status": self.status,
            "level": self.level,
            "partial": self.partial,
            "missing": self.missing,
            "results": [asdict(x) for x in self.results],
        }


def verdicts(report: Report) -> set[str]:
    return {row.verdict for row in report.rows}


def check(results: str | Path, kit: str | Path | None = None, level: str = NATIVE, partial: bool = False) -> Verdict:
    """Judge all cases of a kit, by default of this version's own, on one level: native or exact.

    Raises `ValueError` for a folder that is no kit, or that holds no results, and for results that cannot be read.
    """
    folder = Path(results)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of results")
    if level == EXACT and not (folder / EXACT).is_dir():
        raise ValueError(f"{folder / EXACT}: expected a folder of results that were computed under exact arithmetic")
    if kit is not None:
        return Verdict(judge_all(folder, Path(kit), level), level, partial)
    with tempfile.TemporaryDirectory() as temporary:
        export(temporary)
        return Verdict(judge_all(folder, Path(temporary), level), level, partial)


def judge_all(folder: Path, kit: Path, level: str) -> list[Result]:
    cases = read_kit(kit)
    known = {folder / name for case in cases for name in asked(case, level).values()}
    strange = sorted({path for name in known for path in name.parent.glob("*.safetensors")} - known)
    if strange:
        raise ValueError(
            f"{strange[0].parent}: {strange[0].name} is the result of no case of the kit ({len(strange)} such files)"
        )
    return [
        judge_one(case, dtype, folder / name, kit, level)
        for case in cases
        for dtype, name in asked(case, level).items()
    ]


def asked(case: Entry, level: str) -> dict[str, str]:
    """Return for each dtype the name of the file with the results."""
    return {dtype: said["results"] for dtype, said in case["exact"].items()} if level == EXACT else case["results"]


def read_kit(kit: Path) -> list[dict[str, Any]]:
    try:
        said = json.loads((kit / "kit.json").read_text(encoding="utf-8"))
        for key, here in (("schema", SCHEMA), ("arithmetic", VERSION)):
            if said[key] != here:
                raise ValueError(f"{key} {said[key]}, expected {here}")
        cases: list[dict[str, Any]] = said["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{kit}: no kit of this version: {error}") from None
    return cases


def judge_one(case: Entry, dtype: str, path: Path, kit: Path, level: str) -> Result:
    if not path.exists():
        return Result(case["id"], dtype, None)
    file = read_tensors(kit / case["file"])
    given = read_results(path, case["exact"][dtype]["digests"] if level == EXACT else case["outputs"])
    report = (judge_exactly if level == EXACT else judge_natively)(case, dtype, file, given)
    return Result(case["id"], dtype, replace(report, candidate={"implementation": path.name}) if given else None)


def judge_exactly(case: Entry, dtype: str, file: Taps, given: Taps) -> Report:
    def expected() -> Taps:
        if case["operation"] != "model":
            return part(file, f"{dtype}/exact/expected/")
        with exact():
            taps = run(*model_of(case, dtype, file))
        return {name: taps[name] for name in digests}

    digests = case["exact"][dtype]["digests"]
    return identity(digests, case["outputs"], given, expected)


def judge_natively(case: Entry, dtype: str, file: Taps, given: Taps) -> Report:
    expected = {name: part(file, f"{dtype}/expected/")[name] for name in case["outputs"]}
    if case["operation"] == "model":
        return noted(compare_forwards(*model_of(case, dtype, file), expected, given))
    error, inputs = part(file, f"{dtype}/error/"), part(file, f"{dtype}/inputs/")
    timestep = inputs.get("timestep")
    bounds = {
        name: sinusoid_bound(timestep, NATIVE_DTYPES[dtype])
        for name in expected
        if timestep is not None and name.endswith(".sinusoid")
    }
    true = {name: x.double() - error[name].double() for name, x in expected.items()}
    config = TransformerConfig.from_diffusers(case["config"])
    least = {name: x for name, x in least_lost(config, inputs).items() if name in expected}
    return noted(compare(expected, given, true, bounds=bounds, least=least))


def noted(report: Report) -> Report:
    """Take what is between one budget and two, or explained by a simulated machine, as within it, with a note, as
    `verify` does. A bound has no such band."""
    more = {
        row.name: row.budget
        for row in report.rows
        if row.verdict == SUSPECT and row.budget is not None and (row.budget <= CLEARLY or row.machine)
    }
    if not more:
        return report
    most = max(more, key=lambda name: more[name])
    note = f"{most} takes {more[most]:.2f} of its budget: rounded more often than the record"
    others = f" (and {len(more) - 1} more outputs take more than theirs)" if len(more) > 1 else ""
    rows = [replace(row, verdict=ROUNDING, hints=()) if row.name in more else row for row in report.rows]
    return assemble(rows, [*report.notes, note + others])


def model_of(case: Entry, dtype: str, file: Taps) -> tuple[LTX2VideoTransformer3DModel, Inputs]:
    """Build a model with the kit's weights, and return it with its inputs."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(TransformerConfig.from_diffusers(case["config"]))
    model.load_state_dict(part(file, f"{dtype}/weights/"), assign=True)
    inputs: Inputs = part(file, f"{dtype}/inputs/") | case["arguments"]
    lifted = {name: inputs.pop(name) for name in LIFTED if name in inputs}
    return model.to(NATIVE_DTYPES[dtype]).eval(), inputs | {"attention_kwargs": lifted or None}


def part(file: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): x.view(torch.bfloat16) if x.dtype == torch.uint16 else x
        for name, x in file.items()
        if name.startswith(prefix)
    }


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
    return {
        x.name: x.report
        for x in verdict.results
        if x.report is not None and verdicts(x.report) & {DIVERGED, SHAPE, SUSPECT}
    }
