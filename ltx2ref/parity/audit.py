"""Another implementation against this one: the same weights and inputs in both, every tap compared and judged.

from ltx2ref import assert_parity
assert_parity(model, port, inputs)      # in a test: fails with the first divergence
"""

import importlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from ..interface import DIFFUSERS, LTX_CORE_2026_03, LTX_CORE_2026_08, Conventions, LTX2VideoTransformer3DModel
from . import record
from .arithmetic import VERSION, NotExact
from .cases import Case, Inputs
from .compare import compare_forwards
from .exact import exact
from .generator import build
from .report.assemble import assemble
from .report.rows import DIVERGED, MISSING, PROPAGATED, ROUNDING, SUSPECT, Report, joined_names
from .run import cast, moved, run
from .trace.port import port_named
from .trace.probe import threads
from .trace.sketch import Sketch
from .trace.taps import PROJECTED, OutputError, Taps, brief, returned
from .trace.tracefile import load_trace

Outputs = Mapping[str, Any] | tuple[Tensor, Tensor]
Fingerprint = dict[str, Any]
MADE_NATIVELY = "native"
MADE_EXACTLY = f"exact {VERSION}"  # arithmetic, as a trace file's fingerprint names it
NAMED = {
    "ltx2ref": DIFFUSERS,
    "ltx2ref:diffusers": DIFFUSERS,
    "ltx2ref:ltx-core-2026-03": LTX_CORE_2026_03,
    "ltx2ref:ltx-core-2026-08": LTX_CORE_2026_08,
}


class Setup(NamedTuple):
    """What both implementations are given: a diffusers config, and parameters under diffusers' names. `coords` are
    those of the reference, for an implementation whose model is given positions in place of a grid."""

    config: TransformerConfig
    state: dict[str, Tensor]
    inputs: Inputs
    dtype: torch.dtype
    device: torch.device
    coords: dict[str, Tensor]


class Candidate(NamedTuple):
    """An implementation. `run` computes taps, by our names, for a setup, or raises `ValueError` if it cannot express
    that. `made_in` is the arithmetic of a trace file, which nobody can run again."""

    name: str
    version: str | None
    run: Callable[[Setup], Mapping[str, Any]]
    made_in: str | None = None


def audit(
    candidate: Candidate,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    reference: str = "ltx2ref",
    arithmetic: str = MADE_NATIVELY,
) -> Report:
    """Run one conformance case in both, in this machine's arithmetic or, with "exact", in exact arithmetic.

    Raises `ValueError` if the candidate has no equivalent of the case, and `NotExact` if it computes what exact
    arithmetic cannot see. `reference` is ltx2ref, or ltx2ref:NAME for other conventions than diffusers'.
    """
    about, conventions = fingerprint(device, dtype) | {"arithmetic": arithmetic}, conventions_of(reference)
    given = case.inputs()
    model = build(case.config, dtype, conventions, case.scales).to(device)
    inputs = moved(cast(given, dtype), lambda x: x.to(device))
    coords = {name: x for name, x in run(model, inputs).items() if name.endswith("_coords")}

    def theirs() -> Mapping[str, Any]:
        state = {name: x.detach().clone() for name, x in model.state_dict().items()}
        coordinates = {name: x.to(device) for name, x in coords.items()}
        return candidate.run(Setup(case.config, state, inputs, dtype, device, coordinates))

    if arithmetic == MADE_NATIVELY:
        report = audit_natively(model, inputs, theirs())
        if report.verdict == SUSPECT and candidate.made_in is None:
            report = cleared(report, model, inputs, theirs)
    elif candidate.made_in not in (None, MADE_EXACTLY):
        raise NotExact(
            f"{candidate.name}: computed in {candidate.made_in} arithmetic, expected {MADE_EXACTLY}: what its "
            "fingerprint says, as docs/trace-format.md has it"
        )
    else:
        with threads(1):  # no bit depends on it, and for tensors this small it is the fastest
            report = audit_exactly(model, inputs, theirs)
        unclear = not report.failed and any(row.verdict in (ROUNDING, SUSPECT) for row in report.rows)
        if unclear and dtype != torch.float32 and candidate.made_in is None:
            report = widened(report, audit(candidate, case, torch.float32, device, reference, arithmetic))
    return replace(
        report,
        reference={"implementation": reference, **about},
        candidate={"implementation": candidate.name, "version": candidate.version, **about},
    )


def audit_natively(model: LTX2VideoTransformer3DModel, inputs: Inputs, theirs: Mapping[str, Any]) -> Report:
    """Compare what another implementation computed with this model's weights from these inputs."""
    ours, again = run(model, inputs), run(model, inputs)
    if any(not torch.equal(x, again[name]) for name, x in ours.items()):
        return Report(SUSPECT, "inconclusive: the reference does not repeat itself", None, [])
    notes = without_effect(model)
    report = compare_forwards(model, inputs, shown(ours, theirs, inputs), theirs)
    return replace(report, notes=[*report.notes, *notes])


def audit_exactly(
    model: LTX2VideoTransformer3DModel, inputs: Inputs, theirs: Callable[[], Mapping[str, Any]]
) -> Report:
    """Run both under exact arithmetic, in which whatever differs differs in operations, and compare that.

    Raises `NotExact`, also if the candidate does not repeat itself: layers may draw the numbers that weights then
    replace, but nothing may depend on them.
    """
    with exact():
        ours = run(model, inputs)
    with torch.random.fork_rng(devices=[]), exact(random=True):
        given, second = theirs(), theirs()
    changed = [
        name for name, x in given.items() if isinstance(x, Tensor) and record.digest(x) != record.digest(second[name])
    ]
    if changed:
        raise NotExact(
            f"the candidate does not repeat itself under exact arithmetic, at {changed[0]}: it computes "
            "with random numbers, or with memory that nobody has written"
        )
    notes = without_effect(model)
    report = compare_forwards(model, inputs, shown(ours, given, inputs), given, exactly=True)
    return replace(report, notes=[*report.notes, *notes])


def shown(ours: Taps, theirs: Mapping[str, Any], inputs: Inputs) -> Taps:
    """Return the taps of ours that are compared: those that the candidate has, or should have."""
    return {
        name: x
        for name, x in ours.items()
        if name in theirs or not (unused(name, inputs) or name in PROJECTED.values())
    }


def cleared(
    report: Report, model: LTX2VideoTransformer3DModel, inputs: Inputs, theirs: Callable[[], Mapping[str, Any]]
) -> Report:
    """Compute what is suspect again, under exact arithmetic: with the same operations it is rounding after all."""
    if report.verdict != SUSPECT or report.first is None:
        return report
    try:
        exactly = audit_exactly(model, inputs, theirs)
    except NotExact as error:
        return replace(report, notes=[*report.notes, f"exact arithmetic could not tell more: {error}"])
    if exactly.failed or exactly.verdict == SUSPECT:
        return report
    most = max(row.budget for row in report.rows if row.verdict == SUSPECT and row.budget is not None)
    said = f"{report.first} takes {most:.2f} of its budget in this machine's arithmetic"
    verdict = MISSING if exactly.verdict == MISSING else ROUNDING
    return replace(report, verdict=verdict, sentence=f"rounding: {said}; under exact arithmetic: {exactly.sentence}")


def widened(report: Report, wide: Report) -> Report:
    """Put into the report in a narrow dtype what is wrong in float32, and less than the narrow dtype's rounding."""
    if wide.passed:
        rows = [replace(row, verdict=ROUNDING) if row.verdict == SUSPECT else row for row in report.rows]
        said = "what is suspect in this dtype is rounding in float32, and so it is rounding here, at other places"
        return assemble(rows, [*report.notes, said]) if report.verdict == SUSPECT else report
    wrong = {row.name: row for row in wide.rows if row.verdict in (DIVERGED, SUSPECT) and row.origin != PROPAGATED}
    rows = [
        replace(row, verdict=wrong[row.name].verdict, hints=wrong[row.name].hints)
        if row.name in wrong and row.verdict != MISSING
        else row
        for row in report.rows
    ]
    report = assemble(rows, report.notes)
    hidden = [
        f"{row.name}: {wrong[row.name].budget:.3g} times the budget in float32, which {row.dtype} hides"
        for row in report.rows
        if row.name == report.first and row.name in wrong
    ]
    return replace(report, notes=[*report.notes, *hidden])


def without_effect(model: nn.Module) -> list[str]:
    """Name the parameters that a port could ignore without being told: all zero, or of a norm and all one."""
    blocks = len(model.transformer_blocks)  # type: ignore[arg-type]
    there = {name: x for name, x in model.named_parameters() if not x.is_meta}  # the rest is in a streamed model's file
    zero = [name for name, x in there.items() if not x.any()]
    one = [name for name, x in there.items() if name.endswith((".norm_q.weight", ".norm_k.weight")) and (x == 1).all()]
    return [
        f"{what}: {joined_names(names, blocks)}"
        for names, what in (
            (zero, "parameters that are all zero, so that a port passes without them"),
            (one, "norm weights that are all one, and without effect"),
        )
        if names
    ]


def unused(name: str, inputs: Inputs) -> bool:
    """Tell whether a tap has no effect: it belongs to a self-attention that is perturbed in all rows, of which nothing
    but the values matters; diffusers skips it."""
    block, _, tap = name.removeprefix("transformer_blocks.").partition(".")
    mask = inputs.get("perturbation_mask")
    perturbed = int(block) in (inputs.get("spatio_temporal_guidance_blocks") or ()) if block.isdigit() else False
    attention, _, part = tap.partition(".")
    return (
        perturbed
        and (mask is None or not mask.any())
        and attention in ("attn1", "audio_attn1")
        and part in ("norm_q", "norm_k", "q", "k", "sdpa")
    )


def assert_parity(
    model: LTX2VideoTransformer3DModel,
    candidate: nn.Module | Callable[..., Outputs],
    inputs: Inputs,
    names: Mapping[str, str] | None = None,
    arithmetic: str = MADE_NATIVELY,
) -> Report:
    """Raises `AssertionError` with the first divergence if the candidate computes something else from `inputs`.

    `candidate` has the same weights. A module with diffusers' names is called with the documented arguments and
    traced; a callable returns taps, by our names or by those that `names` (theirs: ours) translates, or the two
    outputs. Taps that it lacks are no failure, but the outputs are. Of a module the outputs are what the call returned.
    `arithmetic` is "native" or "exact"; what exact arithmetic cannot see raises `NotExact`. What bfloat16 hides shows
    with float32 models alone: unlike `audit`, this runs them in no other dtype.
    """

    def theirs() -> Mapping[str, Any]:
        return {(names or {}).get(name, name): x for name, x in taps_of(candidate, inputs).items()}

    if arithmetic not in (MADE_NATIVELY, "exact"):
        raise ValueError(f"arithmetic: expected 'native' or 'exact', got {arithmetic!r}")
    if arithmetic == MADE_NATIVELY:
        report = cleared(audit_natively(model, inputs, theirs()), model, inputs, theirs)
    else:
        report = audit_exactly(model, inputs, theirs)
    outputs = [row.verdict for row in report.rows if row.name in ("sample", "audio_sample")]
    if not report.passed and (report.verdict != MISSING or MISSING in outputs):
        raise AssertionError(report.details())
    return report


def taps_of(candidate: nn.Module | Callable[..., Outputs], inputs: Inputs) -> Mapping[str, Any]:
    if isinstance(candidate, LTX2VideoTransformer3DModel):
        return run(candidate, inputs)
    if isinstance(candidate, nn.Module):
        from .oracles import diffusers

        return diffusers.traced(candidate, inputs)
    return as_taps(candidate(**inputs))


def as_taps(given: Outputs) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        for name, x in given.items():
            if not isinstance(x, Tensor | Sketch) or not x.dtype.is_floating_point:
                raise OutputError(f"{name}: expected a floating-point tensor, got {brief(x)}")
        return given
    return returned(given)


def candidate_named(name: str) -> Candidate:
    """Find an implementation: diffusers, ltx-core, ltx2ref:CONVENTIONS, a trace file, or a port's function.

    A port (trace/port.py) takes a `Setup`'s fields and returns taps.

    Raises `ValueError` if there is no such one here.
    """
    if name.partition(":")[0] == "ltx2ref":
        conventions = conventions_of(name)
        return Candidate(name, None, lambda s: run(ours(s, conventions), s.inputs))
    if name in ("diffusers", "ltx-core"):
        return oracle(name)
    if Path(name).exists() and not name.endswith(".py"):
        found = load_trace(name)
        return Candidate(
            found.implementation or name,
            None,
            lambda setup: found.taps,
            str(found.fingerprint.get("arithmetic", MADE_NATIVELY)),
        )
    function = port_named(name)
    return Candidate(
        name,
        None,
        lambda s: as_taps(function(config=s.config.to_diffusers(), state=s.state, inputs=s.inputs, dtype=s.dtype)),
    )


def conventions_of(implementation: str) -> Conventions:
    """Return the conventions of ltx2ref:NAME; those of ltx2ref alone are diffusers'. Raises `ValueError` for others."""
    if implementation not in NAMED:
        raise ValueError(f"{implementation}: no such conventions; expected {', '.join(NAMED)}")
    return NAMED[implementation]


def ours(s: Setup, conventions: Conventions) -> LTX2VideoTransformer3DModel:
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(s.config, conventions)
    model.load_state_dict(s.state, assign=True)
    return model.eval()


def oracle(name: str) -> Candidate:
    try:
        module: Any = importlib.import_module(f".oracles.{name.replace('-', '_')}", __package__)
        return Candidate(name, version(name), module.taps)
    except (ImportError, PackageNotFoundError) as error:
        raise ValueError(f"{name} is not installed here: {error}") from None


def fingerprint(device: torch.device, dtype: torch.dtype) -> Fingerprint:
    """Return everything on which bits depend."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "sdpa": [
            name
            for name in ("flash", "mem_efficient", "math", "cudnn")
            if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
        ],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
