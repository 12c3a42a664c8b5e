"""The judge of results that a port in any language computed for the kit's cases.

On the native level each output is judged by its budget. Outputs over budget are compared with simulated machines, as in
`audit` and `verify`. The reference for both is this package's model with the weights and inputs of the case. For whole
models, the report also says where an error is made and what it looks like. The exact level has no budget: see
identity.py.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.shell import without_values
from ..config import TransformerConfig
from ..interface import LTX2VideoTransformer3DModel
from ..parity.cases import Inputs
from ..parity.compare import compare, compare_forwards
from ..parity.exact import exact
from ..parity.explain.roundings import explain_by_machines, machine_notes
from ..parity.judge import CLEARLY
from ..parity.record import NATIVE_DTYPES
from ..parity.report.assemble import assemble
from ..parity.report.rows import ROUNDING, SUSPECT, Report
from ..parity.run import run
from ..parity.trace.taps import Taps
from ..parity.truth import least_lost, sinusoid_bound
from .cases import COMPONENTS
from .export import export
from .identity import identity
from .reading import KitEntry, read_kit, read_results, read_tensors, tensors_under
from .recorded import ComponentRun, RecordedModel
from .verdict import EXACT_LEVEL, LEVELS, NATIVE_LEVEL, Result, Verdict

LIFTED = ("video_self_attention_mask", "video_keyframes_mask")  # arguments that travel in attention_kwargs


def check_results(
    results: str | Path, kit: str | Path | None = None, level: str = NATIVE_LEVEL, partial: bool = False
) -> Verdict:
    """Judge a folder of results on one level, "native" or "exact".

    `kit` is the folder of a kit, by default the one that this version exports. `partial` says that missing results were
    left out on purpose. Raises `ValueError` for another level, if a folder is no kit or holds no results, and if
    results cannot be read.
    """
    if level not in LEVELS:
        raise ValueError(f"level = {level!r}: expected {' or '.join(LEVELS)}")
    folder = Path(results)
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of results")
    if level == EXACT_LEVEL and not (folder / EXACT_LEVEL).is_dir():
        raise ValueError(
            f"{folder / EXACT_LEVEL}: expected a folder of results that were computed under exact arithmetic"
        )
    if kit is not None:
        return Verdict(judge_all(folder, Path(kit), level), level, partial)
    with tempfile.TemporaryDirectory() as temporary:
        export(temporary)
        return Verdict(judge_all(folder, Path(temporary), level), level, partial)


def judge_all(folder: Path, kit: Path, level: str) -> list[Result]:
    """Judge each case of a kit in each dtype. Raises `ValueError` for a file that is the result of no case."""
    cases = read_kit(kit)
    known = {folder / name for case in cases for name in result_files(case, level).values()}
    strange = sorted(
        {path for parent in {name.parent for name in known} for path in parent.glob("*.safetensors")} - known
    )
    if strange:
        raise ValueError(
            f"{strange[0].parent}: {strange[0].name} is the result of no case of the kit ({len(strange)} such files)"
        )
    return [
        judge_one(case, dtype, folder / name, kit, level)
        for case in cases
        for dtype, name in result_files(case, level).items()
    ]


def result_files(case: KitEntry, level: str) -> dict[str, str]:
    """Return the name of the file with the results for each dtype."""
    if level == EXACT_LEVEL:
        return {dtype: said["results"] for dtype, said in case["exact"].items()}
    names: dict[str, str] = case["results"]
    return names


def judge_one(case: KitEntry, dtype: str, path: Path, kit: Path, level: str) -> Result:
    """Judge one file of results. It need not exist."""
    if not path.exists():
        return Result(case["id"], dtype, None)
    file = read_tensors(kit / case["file"])
    given = read_results(path, case["exact"][dtype]["digests"] if level == EXACT_LEVEL else case["outputs"])
    if not given:
        return Result(case["id"], dtype, None)
    report = (judge_by_digests if level == EXACT_LEVEL else judge_natively)(case, dtype, file, given)
    return Result(case["id"], dtype, replace(report, candidate={"implementation": path.name}))


def judge_by_digests(case: KitEntry, dtype: str, file: Taps, given: Taps) -> Report:
    """Judge the results of a case on the exact level."""
    digests = case["exact"][dtype]["digests"]

    def expected() -> Taps:
        if case["operation"] != "model":
            return tensors_under(file, f"{dtype}/exact/expected/")
        with exact():
            taps = run(*model_of(case, dtype, file))
        return {name: taps[name] for name in digests}

    return identity(digests, case["outputs"], given, expected)


def judge_natively(case: KitEntry, dtype: str, file: Taps, given: Taps) -> Report:
    """Judge the results of a case on the native level."""
    recorded = tensors_under(file, f"{dtype}/expected/")
    expected = {name: recorded[name] for name in case["outputs"]}
    if case["operation"] == "model":
        return noted(compare_forwards(*model_of(case, dtype, file), expected, given))
    return noted(judge_component(case, dtype, file, expected, given))


def judge_component(case: KitEntry, dtype: str, file: Taps, expected: Taps, given: Taps) -> Report:
    """Judge what a component computed from the taps that diffusers had before it."""
    error, inputs = tensors_under(file, f"{dtype}/error/"), tensors_under(file, f"{dtype}/inputs/")
    timestep = inputs.get("timestep")
    bounds = {
        name: sinusoid_bound(timestep, NATIVE_DTYPES[dtype])
        for name in expected
        if timestep is not None and name.endswith(".sinusoid")
    }
    true = {name: x.double() - error[name].double() for name, x in expected.items()}
    config = TransformerConfig.from_diffusers(case["config"])
    least = {name: x for name, x in least_lost(config, inputs).items() if name in expected}
    report = compare(expected, given, true, bounds=bounds, least=least)
    component = component_of(case, dtype, file) if report.failed else None
    if component is None:
        return report
    rows = explain_by_machines(report.rows, component.forward, component, given, true)
    return assemble(rows, [*report.notes, *machine_notes(rows)])


def component_of(case: KitEntry, dtype: str, file: Taps) -> ComponentRun | None:
    """Return this version's model of a component, to be run on the kit's inputs.

    Return None for a kit of another version, in which the component has other weights or arguments.
    """
    component = next((x for x in COMPONENTS if x.id == case["id"]), None)
    if component is None:
        return None
    source, inputs = RecordedModel(component.case, dtype), tensors_under(file, f"{dtype}/inputs/")
    arguments = {name: x for name, x in inputs.items() if name not in component.given}
    for here, there in (
        (source.weights_of(component), tensors_under(file, f"{dtype}/weights/")),
        (source.arguments_of(component), arguments),
    ):
        if here.keys() != there.keys() or any(not torch.equal(x, there[name]) for name, x in here.items()):
            return None
    return ComponentRun(source, component, {name: inputs[name] for name in component.given})


def noted(report: Report) -> Report:
    """Accept outputs that take up to two budgets, or that a simulated machine explains, as rounding with a note.

    `verify` does the same. A bound has no such band, so outputs judged by a bound stay as they are.
    """
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


def model_of(case: KitEntry, dtype: str, file: Taps) -> tuple[LTX2VideoTransformer3DModel, Inputs]:
    """Build a model with the kit's weights, and return it together with its inputs."""
    model = without_values(LTX2VideoTransformer3DModel, TransformerConfig.from_diffusers(case["config"]))
    model.load_state_dict(tensors_under(file, f"{dtype}/weights/"), assign=True)
    inputs: Inputs = tensors_under(file, f"{dtype}/inputs/") | case["arguments"]
    lifted = {name: inputs.pop(name) for name in LIFTED if name in inputs}
    return model.to(NATIVE_DTYPES[dtype]).eval(), inputs | {"attention_kwargs": lifted or None}
