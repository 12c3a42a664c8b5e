"""Audit another implementation: give it the same weights and inputs as this one, and judge every tap.

In a test, this fails and names the first divergence:

    from ltx2ref import assert_parity
    assert_parity(model, port, inputs)
"""

import importlib
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import __version__
from ..config import TransformerConfig
from ..interface import DIFFUSERS, LTX_CORE_2026_03, LTX_CORE_2026_08, Conventions, LTX2VideoTransformer3DModel
from . import record
from .arithmetic import VERSION, NotExact
from .cases import CASES, Case, Inputs
from .compare import compare_forwards
from .exact import exact
from .generator import build
from .guard import PortFailed, called_on_copies, copied_inputs, separately
from .real import RealCase, require_same_inputs
from .report.assemble import assemble
from .report.rows import BUG, DIVERGED, MISSING, PROPAGATED, ROUNDING, SUSPECT, Report, joined_names
from .run import cast, moved, run
from .trace.given import as_taps, renamed_taps, taps_to_compare
from .trace.modules import taps_of_module
from .trace.port import port_named
from .trace.probe import threads
from .trace.taps import LISTENERS, Taps
from .trace.tracefile import Trace, load_trace

Outputs = Mapping[str, Any] | tuple[Any, Any]
Fingerprint = dict[str, Any]
EQUAL = "(= "  # how levels.py names an argument that equals another one
LEVEL = re.compile(r"\b(?:audio_)?(?:timestep|sigma)\b")
# The two arithmetics, as the fingerprint of a trace file names them.
MADE_NATIVELY = "native"
MADE_EXACTLY = f"exact {VERSION}"
# Implementations whose interface changes between versions.
ONLY_VERSIONS = {"ltx-core": "1.0.0"}
NAMED = {
    "ltx2ref": DIFFUSERS,
    "ltx2ref:diffusers": DIFFUSERS,
    "ltx2ref:ltx-core-2026-03": LTX_CORE_2026_03,
    "ltx2ref:ltx-core-2026-08": LTX_CORE_2026_08,
}


class Setup(NamedTuple):
    """Everything that a candidate is given to compute a case.

    `state` holds the parameters under diffusers' names, and `inputs` the arguments of the documented forward. Ports are
    given `config` as a dict in diffusers' format. `coords` are the reference's own coordinates, (B, P, T, 2), for an
    implementation whose model takes positions instead of a grid.
    """

    config: TransformerConfig
    state: dict[str, Tensor]
    inputs: Inputs
    dtype: torch.dtype
    device: torch.device
    coords: dict[str, Tensor]


class Candidate(NamedTuple):
    """An implementation to be audited.

    `run` computes the taps of a setup, under our names, and raises `Unsupported` if the implementation cannot express
    that setup. `made_in` is set for trace files only, which nobody can run again: it names the arithmetic they were
    made in. `trace` is then the file, by its path.
    """

    name: str
    version: str | None
    run: Callable[[Setup], Mapping[str, Any]]
    made_in: str | None = None
    trace: tuple[str, Trace] | None = None


def audit(
    candidate: Candidate,
    case: Case | RealCase,
    dtype: torch.dtype,
    device: torch.device,
    reference: str = "ltx2ref",
    arithmetic: str = MADE_NATIVELY,
    accept: Sequence[str] = (),
) -> Report:
    """Run one conformance case in both implementations and return the report on their taps.

    `arithmetic` is "native" for this machine's own, or "exact". `reference` is "ltx2ref", or "ltx2ref:NAME" to follow
    other conventions than diffusers'. In native arithmetic, a suspect result is checked again under exact arithmetic.
    In a narrow dtype, what is still unclear then is checked again in float32. Causes at the places `accept` are put
    into the reference, so that only what else is wrong is reported.

    Raises `Unsupported` if the candidate has no equivalent of the case, `PortFailed` if it raises anything else,
    `OutputError` if it returns no tensors, `ValueError` if these have no names in common with ours, if `reference` is
    unknown, or if no cause is at some place in `accept`, and `NotExact` if the candidate uses an operation that exact
    arithmetic does not define, or is a trace that was not made in exact arithmetic.
    """
    about = fingerprint(device, dtype) | {"arithmetic": arithmetic}
    conventions = conventions_of(reference)
    given = case.inputs()
    if isinstance(case, Case):
        model = build(case.config, dtype, conventions, case.scales).to(device)
    else:
        model = case.model(dtype, conventions, device)
    inputs = moved(cast(given, dtype), lambda x: x.to(device))
    if candidate.trace is not None:
        require_same_inputs(*candidate.trace, inputs, case.config, dtype)
    before = run(model, inputs)
    heard: list[str] = []
    written: list[str] = []  # inputs that the candidate changed

    def theirs() -> Any:
        kept = model if isinstance(case, Case) else case.stored(model)
        state = {name: x.detach().clone() for name, x in kept.state_dict().items()}
        coordinates = {name: x.to(device, copy=True) for name, x in before.items() if name.endswith("_coords")}

        def on(arguments: Inputs) -> Any:
            return candidate.run(Setup(case.config, state, arguments, dtype, device, coordinates))

        with noted_in(heard):
            given, changed = called_on_copies(on, inputs)
        written.extend(changed)
        return given

    if arithmetic == MADE_NATIVELY:
        report = audit_natively(model, inputs, theirs(), accept, before)
        if report.verdict == SUSPECT and candidate.made_in is None and case.small:
            report = cleared(report, model, inputs, theirs, accept)
            if report.verdict == SUSPECT and dtype != torch.float32:
                with suppress(NotExact, PortFailed, ValueError):  # a port without a float32 stays suspect
                    wide = audit(candidate, case, torch.float32, device, reference, MADE_EXACTLY, accept)
                    report = widened(report, wide) if wide.passed else report
    elif candidate.made_in not in (None, MADE_EXACTLY):
        raise NotExact(
            f"{candidate.name}: computed in {candidate.made_in} arithmetic, expected {MADE_EXACTLY} "
            "(see the trace's fingerprint, and docs/trace-format.md)"
        )
    else:
        with threads(1):  # the bits do not depend on it, and one thread is fastest for tensors this small
            report = audit_exactly(model, inputs, theirs, accept)
        unclear = not report.failed and any(row.verdict in (ROUNDING, SUSPECT) for row in report.rows)
        if unclear and dtype != torch.float32 and candidate.made_in is None and case.small:
            report = widened(report, audit(candidate, case, torch.float32, device, reference, arithmetic, accept))
    return replace(
        report,
        notes=[
            *report.notes,
            *heard,
            *(f"the port changed its input `{name}` in place" for name in dict.fromkeys(written)),
        ],
        case=case.id,
        reference={"implementation": reference, "version": __version__, **about},
        candidate={"implementation": candidate.name, "version": candidate.version, **about},
    )


def settled(
    report: Report,
    candidate: Candidate,
    case: Case | RealCase,
    dtype: torch.dtype,
    device: torch.device,
    reference: str = "ltx2ref",
    arithmetic: str = MADE_NATIVELY,
) -> Report:
    """Ask another case about causes for which two explanations fit because two inputs of this one are equal.

    It is the next case of the release, in the order of the suite, in which those inputs differ and the exchange follows
    the same level. The cause at the same place there says which explanation remains.
    """
    unclear = [cause for cause in report.causes if EQUAL in (cause.what or "") and cause.verdict == BUG]
    if not unclear or candidate.made_in is not None or not isinstance(case, Case):
        return report
    arguments = {name for cause in unclear for name in LEVEL.findall(cause.what or "")}
    other = next((x for x in CASES if x.release == case.release and tells_apart(x, case, arguments)), None)
    if other is None:
        return report
    try:
        told = audit(candidate, other, dtype, device, reference, arithmetic)
    except (ValueError, PortFailed):
        return report
    there = {cause.place: cause.what for cause in told.causes if cause.what and EQUAL not in cause.what}
    return replace(
        report,
        causes=tuple(
            replace(cause, what=f"{there[cause.place]} (told by {other.id})")
            if cause in unclear and cause.place in there
            else cause
            for cause in report.causes
        ),
    )


def tells_apart(other: Case, case: Case, names: set[str]) -> bool:
    """Tell whether these noise levels differ from one another in another case, which is the same in all else."""
    x, own = other.inputs(), case.inputs()
    found = [x[name].reshape(len(x[name]), -1) for name in sorted(names) if x.get(name) is not None]
    alike = x.get("use_cross_timestep") == own.get("use_cross_timestep") and other.config == case.config
    return alike and len(found) == len(names) and not any(torch.equal(a, b) for a, b in combinations(found, 2))


@contextmanager
def noted_in(heard: list[str]) -> Iterator[None]:
    """Add to a list what no trace within the context could read, each sentence once."""
    token = LISTENERS.set((*LISTENERS.get(), heard))
    try:
        yield
    finally:
        LISTENERS.reset(token)


def audit_natively(
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    theirs: Any,
    accept: Sequence[str] = (),
    before: Taps | None = None,
) -> Report:
    """Compare taps that a candidate computed from this model's weights and inputs with the model's own.

    `before` holds the model's own taps from before the candidate ran.
    """
    ours = run(model, inputs)
    if first_unlike(ours, before or run(model, inputs)) is None:
        return compared(model, inputs, ours, theirs, accept=accept)
    changed = before is not None and first_unlike(ours, run(model, inputs)) is None
    said = (
        "the candidate changed the reference's results: a weight that they share, or a function or setting of torch"
        if changed
        else "the reference does not repeat itself"
    )
    return Report(SUSPECT, f"inconclusive: {said}", None, [])


def first_unlike(taps: Taps, others: Taps) -> str | None:
    """Return the first tap that has other bits in another forward of the same model, or None."""
    return next((name for name, x in taps.items() if not torch.equal(x, others[name])), None)


def audit_exactly(
    model: LTX2VideoTransformer3DModel, inputs: Inputs, theirs: Callable[[], Any], accept: Sequence[str] = ()
) -> Report:
    """Run both implementations under exact arithmetic, where a difference in bits is a difference in operations.

    The candidate runs twice. It may draw random numbers, because layers initialise weights that are replaced
    afterwards, but no tap may depend on them.

    Raises `NotExact` if the candidate does not repeat itself, or if it uses an operation that exact arithmetic does not
    define.
    """
    with exact():
        ours = run(model, inputs)
    with torch.random.fork_rng(devices=[]), exact(random=True):
        given, second = (as_taps(x, exactly=True) for x in (theirs(), theirs()))
    changed = [
        name
        for name, x in given.items()
        if name not in second or (isinstance(x, Tensor) and record.digest(x) != record.digest(second[name]))
    ]
    if changed:
        raise NotExact(
            f"the candidate does not repeat itself under exact arithmetic, at {changed[0]}: it computes "
            "with random numbers, or with uninitialised memory"
        )
    return compared(model, inputs, ours, given, True, accept)


def compared(
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    ours: Taps,
    theirs: Any,
    exactly: bool = False,
    accept: Sequence[str] = (),
) -> Report:
    """Compare the taps that count, and note what is not localised, what is cut, and parameters without effect.

    Raises `ValueError` if the candidate has no tap under one of our names.
    """
    notes = without_effect(model)
    compared_taps, theirs, said = taps_to_compare(ours, theirs, inputs, exactly)
    report = compare_forwards(model, inputs, compared_taps, theirs, exactly, accept)
    return replace(report, notes=[*report.notes, *said, *notes])


def cleared(
    report: Report,
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    theirs: Callable[[], Any],
    accept: Sequence[str] = (),
) -> Report:
    """Judge a suspect report again under exact arithmetic, and call it rounding if the operations are the same.

    Other reports are returned as they are.
    """
    if report.verdict != SUSPECT or report.first is None:
        return report
    try:
        exactly = audit_exactly(model, inputs, theirs, accept)
    except (NotExact, ValueError) as error:  # or a cause to be accepted is none there
        return replace(report, notes=[*report.notes, f"exact arithmetic could not settle it: {error}"])
    if exactly.failed or exactly.verdict == SUSPECT:
        return report
    most = max(row.budget for row in report.rows if row.verdict == SUSPECT and row.budget is not None)
    said = f"{report.first} takes {most:.2f} of its budget in this machine's arithmetic"
    verdict = MISSING if exactly.verdict == MISSING else ROUNDING
    return replace(report, verdict=verdict, sentence=f"rounding: {said}; under exact arithmetic: {exactly.sentence}")


def widened(report: Report, wide: Report) -> Report:
    """Add to a report in a narrow dtype what only the report in float32, `wide`, can show.

    An error that is smaller than the narrow dtype's own rounding is still an error if it is one in float32, and what is
    merely suspect in the narrow dtype is rounding if float32 finds nothing wrong.
    """
    if wide.passed:
        rows = [replace(row, verdict=ROUNDING) if row.verdict == SUSPECT else row for row in report.rows]
        said = "the taps that are suspect in this dtype are within rounding in float32, so they count as rounding here"
        if report.verdict != SUSPECT:
            return report
        return replace(assemble(rows, [*report.notes, said]), conventions=report.conventions)
    wrong = {row.name: row for row in wide.rows if row.verdict in (DIVERGED, SUSPECT) and row.origin != PROPAGATED}
    rows = [
        replace(row, verdict=wrong[row.name].verdict, hints=wrong[row.name].hints)
        if row.name in wrong and row.verdict != MISSING
        else row
        for row in report.rows
    ]
    report = replace(
        assemble(rows, report.notes), causes=wide.causes, conventions=wide.conventions | report.conventions
    )
    hidden = [
        f"{row.name}: {wrong[row.name].budget:.3g} times the budget in float32, which {row.dtype} hides"
        for row in report.rows
        if row.name == report.first and row.name in wrong
    ]
    return replace(report, notes=[*report.notes, *hidden])


def without_effect(model: nn.Module) -> list[str]:
    """Return notes on the parameters that a port could ignore without being noticed.

    These are parameters that are all zero, and the weights of query and key norms that are all one.
    """
    blocks = len(model.transformer_blocks)  # type: ignore[arg-type]
    # A streamed model's other weights are on disk.
    there = {name: x for name, x in model.named_parameters() if not x.is_meta}
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


def assert_parity(
    model: LTX2VideoTransformer3DModel,
    candidate: nn.Module | Callable[..., Outputs],
    inputs: Inputs,
    names: Mapping[str, str] | None = None,
    arithmetic: str = MADE_NATIVELY,
) -> Report:
    """Raise `AssertionError`, naming the first divergence, unless the candidate computes what the model computes.

    `candidate` has the same weights as `model`, and is called with `inputs`, the arguments of the documented forward.
    It is one of two things:

    - A module. It is traced, if its layers are under names that are known, and its outputs are what the call returned.
    - A callable that returns the two outputs, or taps under our names or under those that `names` translates
      (`{"their name": "our name"}`).

    Missing taps are no failure, but missing outputs are. What the candidate raises is raised. `arithmetic` is "native"
    or "exact". Unlike `audit`, this runs the models in their own dtype only, so an error that bfloat16 rounding hides
    is found with float32 models alone.

    Returns the report. Raises `ValueError` for another `arithmetic` or if the candidate has no tap under our names,
    `OutputError` if it returns anything else, and `NotExact` if it uses an operation that exact arithmetic does not
    define.
    """
    heard: list[str] = []

    def theirs() -> Any:
        with noted_in(heard), separately({}):
            return renamed_taps(taps_of(candidate, copied_inputs(inputs)), names or {})

    if arithmetic not in (MADE_NATIVELY, "exact"):
        raise ValueError(f"arithmetic: expected 'native' or 'exact', got {arithmetic!r}")
    if arithmetic == MADE_NATIVELY:
        before = run(model, inputs)
        report = cleared(audit_natively(model, inputs, theirs(), before=before), model, inputs, theirs)
    else:
        report = audit_exactly(model, inputs, theirs)
    report = replace(report, notes=[*report.notes, *heard])
    if not report.passed:
        raise AssertionError(report.details(taps=True))
    return report


def taps_of(candidate: nn.Module | Callable[..., Outputs], inputs: Inputs) -> Any:
    """Run a candidate of any supported kind on `inputs` and return its taps, or both outputs."""
    if isinstance(candidate, LTX2VideoTransformer3DModel):
        return run(candidate, inputs)
    if isinstance(candidate, nn.Module):
        return taps_of_module(candidate, inputs)
    return candidate(**inputs)


def candidate_named(name: str) -> Candidate:
    """Return the candidate that a command-line name stands for.

    `name` is "diffusers", "ltx-core", "ltx2ref:CONVENTIONS", the path of a trace file, or a port's function as
    "module:callable" or "path/to/file.py:callable". Such a function takes `config`, `state`, `inputs` and `dtype`, and
    returns taps or the two outputs.

    Raises `ValueError` if there is no such implementation here.
    """
    if name.partition(":")[0] == "ltx2ref":
        conventions = conventions_of(name)
        return Candidate(name, __version__, lambda s: run(ours(s, conventions), s.inputs))
    if name in ("diffusers", "ltx-core"):
        return oracle(name)
    if Path(name).exists() and not name.endswith(".py"):
        found = load_trace(name)
        made_in = str(found.fingerprint.get("arithmetic", MADE_NATIVELY))
        return Candidate(found.implementation or name, None, lambda setup: found.taps, made_in, (name, found))
    function = port_named(name)
    return Candidate(
        name, None, lambda s: function(config=s.config.to_diffusers(), state=s.state, inputs=s.inputs, dtype=s.dtype)
    )


def conventions_of(implementation: str) -> Conventions:
    """Return the conventions of "ltx2ref:NAME"; plain "ltx2ref" follows diffusers'.

    Raises `ValueError` for an unknown name.
    """
    if implementation not in NAMED:
        raise ValueError(f"{implementation}: no such conventions; expected {', '.join(NAMED)}")
    return NAMED[implementation]


def ours(s: Setup, conventions: Conventions) -> LTX2VideoTransformer3DModel:
    """Build this model from a candidate's setup, with the given conventions."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(s.config, conventions)
    model.load_state_dict(s.state, assign=True)
    return model.eval()


def oracle(name: str) -> Candidate:
    """Return the candidate that runs an installed implementation, diffusers or ltx-core.

    Raises `ValueError` if it is not installed.
    """
    try:
        installed = version(name)
        if installed != ONLY_VERSIONS.get(name, installed):
            raise ValueError(f"{name}: needs {name} {ONLY_VERSIONS[name]}, and {installed} is installed")
        module: Any = importlib.import_module(f".oracles.{name.replace('-', '_')}", __package__)
        return Candidate(name, installed, module.taps)
    except (ImportError, PackageNotFoundError) as error:
        raise ValueError(f"{name} is not installed here: {error}") from None


def fingerprint(device: torch.device, dtype: torch.dtype) -> Fingerprint:
    """Return the versions, device and settings on which the bits of native arithmetic depend."""
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
    """Return the name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
