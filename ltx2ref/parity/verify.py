"""Runs the conformance cases on this machine and judges every tap against the recorded one, in two ways.

*exact*: under exact arithmetic (exact.py) the bits are the same on every machine. Each tap is identical, or the case
has failed; there is no tolerance. This shows that the model computes what the recorded implementation computes,
operation by operation.

*native*: in this machine's own arithmetic, whose last bits are its own. Where it computes with the bits of the
recording machine (see probe.py), anything but identical is a failure. Elsewhere a budget decides for each tap, which
comes from the record's own error against float64. A case that is recorded under exact arithmetic alone is judged by
budget everywhere, against the exact taps: those whose digests are the recorded ones are the recorded implementation's
own tensors, bit for bit. Where a digest is another, the case has failed exactly, and natively it is inconclusive:
there is nothing to judge that tap against. Exact arithmetic takes attention as one operation, with logits in float64,
which no kernel does; beside a bias of -10,000 float32 keeps a thousandth of a logit, and bfloat16 nothing of it. So
the budget is what the recorded operations lose with attention written out: logits and weights in the model's dtype.

The truth is conditional on the phases of the side that is judged (see truth.py), and the verdicts are judge.py's.
"""

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context
from threading import current_thread, main_thread

import torch
from torch import Tensor

from . import record
from .cases import OUTPUTS, Case, Inputs
from .exact import exact
from .explain.roundings import explain_by_machines
from .generator import build
from .judge import Standard, judge_taps
from .kernels import OUTPUT, Kernel, KernelTruth, run_kernel
from .machines import machine as machine_named
from .record import EXACT_DTYPES, NATIVE_DTYPES, ExactRecord, Record, RecordError
from .report.rows import DIVERGED, IDENTICAL, SHAPE, TapRow
from .run import cast, moved, run
from .trace.probe import threads
from .trace.taps import Taps
from .truth import Truth, norm

DRIFT = 1e-10  # relative; float64 sums of this size differ by 1e-14 between machines
MANY, MOST_JOBS = 24, 8  # runs that are worth other processes, each of which takes seconds to start; and of those
WRITTEN_OUT = "rounded-logits"  # the machine with whose attention the budget is measured
WITHIN, FAILED, INCONCLUSIVE = "within budget", "FAILED", "inconclusive"  # verdicts, beside IDENTICAL


@dataclass(frozen=True)
class ExactResult:
    """One case in one dtype under exact arithmetic."""

    verdict: str
    taps: int  # compared
    differing: int  # or missing
    first: str | None  # differing tap
    distance: float | None  # of the first from the record, relative L2, estimated
    note: str = ""


@dataclass(frozen=True)
class NativeResult:
    """One case in one dtype in this machine's arithmetic."""

    verdict: str
    first: str | None  # divergent tap
    share: float  # of the budget that an error takes, the largest of all taps
    against_record: float  # relative L2, the largest of all taps
    error: float  # of the outputs against the truth, relative L2, the larger one
    record_error: float  # the recorded outputs' own
    note: str = ""


@dataclass(frozen=True)
class CaseResult:
    """Both verdicts on a case in one dtype. None: not asked for, or nothing is recorded in this dtype."""

    release: str
    case: str
    dtype: str
    exact: ExactResult | None
    native: NativeResult | None

    @property
    def verdicts(self) -> set[str]:
        return {result.verdict for result in (self.exact, self.native) if result is not None}


def verify(
    case: Case | Kernel,
    dtype: str,
    device: torch.device,
    same_bits: bool,
    arithmetic: str | None = None,
    machine: str | None = None,
) -> CaseResult:
    """Run one case, exactly, natively or both, and compare all its taps. `same_bits`: natively, nothing but identical
    will do. `machine`: natively, as this simulated machine computes.

    Raises `RecordError` if there is no usable recording of it.
    """
    forward = prepared(case, dtype, device)
    judged, recorded_natively = arithmetic != "exact" and dtype in NATIVE_DTYPES, isinstance(case, Case) and case.native
    taps = run_on("exact", forward) if arithmetic != "native" or (judged and not recorded_natively) else {}
    exactly = compare_exactly(case, dtype, taps) if arithmetic != "native" else None
    natively = natively_judged(case, dtype, forward, taps, same_bits, machine) if judged else None
    return CaseResult(case.release, case.name, dtype, exactly, natively)


Forward = Callable[[], Taps]


def prepared(case: Case | Kernel, dtype: str, device: torch.device) -> Forward:
    inputs = moved(inputs_of(case, dtype), lambda x: x.to(device))
    if isinstance(case, Kernel):
        return lambda: run_kernel(case, inputs)
    model = build(case.config, EXACT_DTYPES[dtype], case.conventions, case.scales).to(device)
    return lambda: run(model, inputs)


def inputs_of(case: Case | Kernel, dtype: str) -> Inputs:
    if isinstance(case, Kernel):
        return case.inputs(EXACT_DTYPES[dtype])
    return cast(case.inputs(), EXACT_DTYPES[dtype])


def natively_judged(
    case: Case | Kernel, dtype: str, forward: Forward, exact_taps: Taps, same_bits: bool, machine: str | None
) -> NativeResult:
    taps, again = run_on(machine, forward), run_on(machine, forward)
    if any(not torch.equal(taps[name], again[name]) for name in taps):
        return NativeResult(INCONCLUSIVE, None, 0.0, 0.0, 0.0, 0.0, "does not repeat itself")
    if isinstance(case, Case) and case.native:
        return compare_with_record(case, dtype, taps, same_bits)
    return compare_with_exact(case, dtype, taps, exact_taps, run_on(WRITTEN_OUT, forward))


def run_on(machine: str | None, forward: Forward) -> Taps:
    """Run natively, under exact arithmetic ("exact"), or as a simulated machine."""
    if machine is None:
        return forward()
    with exact() if machine == "exact" else exact(machine_named(machine)):
        return forward()


@dataclass(frozen=True)
class How:
    """The arguments of `verify` that are the same for all cases."""

    device: torch.device
    same_bits: bool
    arithmetic: str | None = None
    machine: str | None = None
    threads: int = 1


def verify_all(runs: Sequence[tuple[Case | Kernel, str]], how: How) -> Iterator[CaseResult]:
    """Verify each (case, dtype), in their order: on a CPU many of them in a process for each core, where there can be
    such processes. An emulator has none."""
    jobs, done = min(os.cpu_count() or 1, MOST_JOBS), 0
    if how.device.type == "cpu" and jobs > 1 and len(runs) >= MANY:
        with suppress(BrokenProcessPool, OSError), process_pool(jobs) as pool:
            with interrupts_ignored():  # which the processes inherit
                results = pool.map(
                    partial(verify_one, how), *zip(*runs, strict=True), chunksize=len(record.EXACT_DTYPES)
                )
            for result in results:
                yield result
                done += 1
    yield from (verify_one(how, *run) for run in runs[done:])


@contextmanager
def process_pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Have processes that end at once, and not after the case that each has begun, if this one is interrupted."""
    others = active_children()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            yield pool
        except KeyboardInterrupt:
            for child in active_children():
                if child not in others:
                    child.terminate()
            raise


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Start processes that leave Ctrl-C to this one, or each would print a traceback."""
    if current_thread() is not main_thread():  # only there can a handler be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def verify_one(how: How, case: Case | Kernel, dtype: str) -> CaseResult:
    with threads(how.threads):
        return verify(case, dtype, how.device, how.same_bits, how.arithmetic, how.machine)


def compare_exactly(case: Case | Kernel, dtype: str, taps: Taps) -> ExactResult:
    """Judge what was computed for a case under exact arithmetic: the recorded bits, or not."""
    recorded = record.load_exact(case, dtype)
    require_inputs(case, dtype, recorded)
    missing = [name for name in recorded.digests if name not in taps]
    differing = [
        name for name, digest in recorded.digests.items() if name in taps and record.digest(taps[name]) != digest
    ]
    first = next(iter([*differing, *missing]), None)
    note = f"the model lacks {len(missing)} taps, the first is {missing[0]}" if missing else ""
    return ExactResult(
        IDENTICAL if first is None else FAILED,
        len(recorded.digests),
        len(differing) + len(missing),
        first,
        apart(taps[first], recorded.buckets[first]) if first and differing else None,
        note,
    )


def apart(x: Tensor, recorded: Tensor) -> float | None:
    """Estimate the relative L2 distance from four numbers of the recorded tensor: right to a factor of two or so."""
    return norm(record.buckets(x) - recorded) / norm(x) if norm(x) else None


def truth_of(case: Case | Kernel, dtype: torch.dtype) -> Truth | KernelTruth:
    if isinstance(case, Kernel):
        return KernelTruth(case, case.inputs(dtype))
    return Truth(build(case.config, dtype, case.conventions, case.scales), cast(case.inputs(), dtype))


def compare_with_record(case: Case, dtype: str, taps: Taps, same_bits: bool) -> NativeResult:
    """Judge what was computed for a case in native arithmetic."""
    recorded = record.load_record(case, dtype)
    require_inputs(case, dtype, recorded)
    truth = truth_of(case, NATIVE_DTYPES[dtype])
    theirs = {name: taps[name] for name in recorded.taps}
    true, record_true = truth.of(theirs), truth.of(recorded.taps)
    rows = judge_taps(recorded.taps, theirs, Standard(record_true, true, truth.bounds, least=truth.least))
    rows = explain_by_machines(rows, lambda: prepared(case, dtype, torch.device("cpu"))(), truth, theirs, true)
    return native_result(rows, same_bits, drifted({name: record_true[name] for name in recorded.taps}, recorded))


def compare_with_exact(
    case: Case | Kernel, dtype: str, taps: Taps, exact_taps: Taps, written_out: Taps
) -> NativeResult:
    """Judge what was computed in native arithmetic for a case that is recorded under exact arithmetic alone.
    `exact_taps`: what the same model computes there; `written_out`: with attention written out."""
    recorded = record.load_exact(case, dtype)
    require_inputs(case, dtype, recorded)
    known = {
        name: exact_taps[name]
        for name, digest in recorded.digests.items()
        if name in exact_taps and record.digest(exact_taps[name]) == digest
    }
    truth = truth_of(case, NATIVE_DTYPES[dtype])
    true, own = truth.of(taps), truth.of(written_out)
    standard = Standard(own, true, truth.bounds, allowed=written_out, least=truth.least)
    rows = judge_taps(known, taps, standard)
    rows = explain_by_machines(rows, lambda: prepared(case, dtype, torch.device("cpu"))(), truth, taps, true)
    unknown = [name for name in recorded.digests if name not in known]
    if unknown and not any(row.verdict in (DIVERGED, SHAPE) for row in rows):
        return NativeResult(
            INCONCLUSIVE,
            None,
            0.0,
            0.0,
            0.0,
            0.0,
            (
                f"{len(unknown)} of {len(recorded.digests)} taps, the first is {unknown[0]}, are not the recorded ones "
                "under exact arithmetic: there is nothing to judge them against"
            ),
        )
    return native_result(rows, False, None)


def require_inputs(case: Case | Kernel, dtype: str, recorded: Record | ExactRecord) -> None:
    if recorded.input_digests != record.digests(inputs_of(case, dtype)):
        raise RecordError(f"{case.id} {dtype}: recorded from other inputs than this version makes")


def drifted(true: Taps, recorded: Record) -> str | None:
    """Return the first tap whose truth is not what it was when the case was recorded."""
    norms = recorded.truth_norms
    return next((name for name, x in true.items() if not abs(norm(x) - norms[name]) <= DRIFT * norms[name]), None)


def native_result(rows: list[TapRow], same_bits: bool, drift: str | None) -> NativeResult:
    """Return the verdict on a case from those on its taps; what an audit suspects is within budget, with a note."""
    first = next((row.name for row in rows if row.verdict != IDENTICAL), None)
    wrong = next((row.name for row in rows if row.verdict in (DIVERGED, SHAPE)), None)
    shares = {row.name: math.inf if row.verdict == SHAPE else row.budget or 0.0 for row in rows}
    most = max(shares, key=lambda name: shares[name])
    if first is None and drift is None:
        verdict = IDENTICAL
    elif drift is not None or same_bits or wrong is not None:
        verdict, first = FAILED, wrong or first
    else:
        verdict = WITHIN
    note = "" if drift is None else f"the float64 truth of {drift} has changed since the recording"
    if verdict == WITHIN and shares[most] > 1:
        machine = next((row.machine for row in rows if row.machine is not None), None)
        note = f"{most} takes {shares[most]:.2f} of its budget: rounded more often than the record" + (
            "" if machine is None else f", and no more than on the simulated machine {machine}"
        )
    outputs = [row for row in rows if row.name in (*OUTPUTS, OUTPUT)]
    return NativeResult(
        verdict,
        first,
        shares[most],
        largest(row.relative for row in rows),
        largest(row.error for row in outputs),
        largest(row.reference_error for row in outputs),
        note,
    )


def largest(numbers: Iterable[float | None]) -> float:
    return max((math.inf if x is None else x for x in numbers), default=math.nan)
