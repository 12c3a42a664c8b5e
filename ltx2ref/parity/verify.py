"""Run the conformance cases on this machine and judge every tap against the recorded one, in two ways.

*exact*: under exact arithmetic (exact.py) the bits are the same on every machine. A case passes only if every tap is
identical; there is no tolerance. This shows that the model computes what the recorded implementation computes,
operation by operation.

*native*: in this machine's own arithmetic, whose last bits vary between machines. If the machine computes with the same
bits as the recording machine (see probe.py), any difference is a failure. Elsewhere each tap has a budget, made from
the recording's own error against float64.

Some cases are recorded under exact arithmetic only. Natively they are judged by budget everywhere, against the taps
that this machine computes under exact arithmetic. Where the digest of such a tap is the recorded one, the tap is the
recorded implementation's own tensor, bit for bit. Where a digest differs, the case has failed exactly, and natively it
is inconclusive, because there is nothing to judge that tap against.

Exact arithmetic treats attention as one operation with float64 logits, which no kernel does. Next to a bias of
-10,000, a float32 logit is resolved to a thousandth only, and a bfloat16 logit is lost. So the budget of these cases
is the error of the recorded operations with attention written out: logits and weights are in the model's dtype.

The truth depends on the phases of the side that is judged (see truth.py), and the verdicts are those of judge.py.
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

DRIFT = 1e-10  # relative change of a truth's norm; float64 sums of this size differ by 1e-14 between machines
# From MANY runs on, other processes are worth the seconds that each takes to start.
MANY, MOST_JOBS = 24, 8
WRITTEN_OUT = "rounded-logits"  # the simulated machine with attention as the budget assumes it
WITHIN, FAILED, INCONCLUSIVE = "within budget", "FAILED", "inconclusive"  # verdicts besides IDENTICAL


@dataclass(frozen=True)
class ExactResult:
    """The result of one case in one dtype under exact arithmetic."""

    verdict: str
    taps: int  # how many were compared
    differing: int  # how many differ or are missing
    first: str | None  # the first tap that differs
    distance: float | None  # how far that tap is from the recorded one: relative L2, estimated
    note: str = ""


@dataclass(frozen=True)
class NativeResult:
    """The result of one case in one dtype in this machine's arithmetic."""

    verdict: str
    first: str | None  # the first tap that diverged, or else that differs
    share: float  # error divided by budget, the largest of all taps
    against_record: float  # difference from the record, relative L2, the largest of all taps
    error: float  # the outputs' error against the truth, relative L2, the larger of the two
    record_error: float  # the same for the recorded outputs
    note: str = ""


@dataclass(frozen=True)
class CaseResult:
    """Both results of a case in one dtype.

    Either is None if it was not asked for, or if nothing is recorded in this dtype.
    """

    release: str
    case: str
    dtype: str
    exact: ExactResult | None
    native: NativeResult | None

    @property
    def id(self) -> str:
        """Return the name of the case, as `--case` selects it."""
        return f"{self.release}/{self.case}"

    @property
    def verdicts(self) -> set[str]:
        """Return the verdicts of the results that there are."""
        return {result.verdict for result in (self.exact, self.native) if result is not None}


def verify(
    case: Case | Kernel,
    dtype: str,
    device: torch.device,
    same_bits: bool,
    arithmetic: str | None = None,
    machine: str | None = None,
) -> CaseResult:
    """Run one case under exact arithmetic, natively or both, and compare all its taps with the recorded ones.

    `arithmetic` is "exact", "native", or None for both. With `same_bits`, the native run passes only if it is
    identical. With `machine`, the native run is computed as that simulated machine would (see machines.py).

    Raises `RecordError` if there is no usable recording of the case.
    """
    forward = prepared(case, dtype, device)
    judged = arithmetic != "exact" and dtype in NATIVE_DTYPES
    recorded_natively = isinstance(case, Case) and case.native
    taps = run_on("exact", forward) if arithmetic != "native" or (judged and not recorded_natively) else {}
    exactly = compare_exactly(case, dtype, taps) if arithmetic != "native" else None
    natively = natively_judged(case, dtype, forward, taps, same_bits, machine) if judged else None
    return CaseResult(case.release, case.name, dtype, exactly, natively)


Forward = Callable[[], Taps]


def prepared(case: Case | Kernel, dtype: str, device: torch.device) -> Forward:
    """Build a case's model and inputs, and return a function that runs it and returns its taps."""
    inputs = moved(inputs_of(case, dtype), lambda x: x.to(device))
    if isinstance(case, Kernel):
        return lambda: run_kernel(case, inputs)
    model = build(case.config, EXACT_DTYPES[dtype], case.conventions, case.scales).to(device)
    return lambda: run(model, inputs)


def inputs_of(case: Case | Kernel, dtype: str) -> Inputs:
    """Return the inputs of a case, in the dtypes that a model of `dtype` takes."""
    if isinstance(case, Kernel):
        return case.inputs(EXACT_DTYPES[dtype])
    return cast(case.inputs(), EXACT_DTYPES[dtype])


def natively_judged(
    case: Case | Kernel, dtype: str, forward: Forward, exact_taps: Taps, same_bits: bool, machine: str | None
) -> NativeResult:
    """Run a case natively, or as a simulated machine, and judge it."""
    taps, again = run_on(machine, forward), run_on(machine, forward)
    if any(not torch.equal(taps[name], again[name]) for name in taps):
        return inconclusive("does not repeat itself")
    if isinstance(case, Case) and case.native:
        return compare_with_record(case, dtype, taps, same_bits)
    return compare_with_exact(case, dtype, taps, exact_taps, run_on(WRITTEN_OUT, forward))


def run_on(machine: str | None, forward: Forward) -> Taps:
    """Run natively (None), under exact arithmetic ("exact"), or as a simulated machine."""
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
    """Verify each (case, dtype), and yield the results in that order.

    On a CPU, many of them are spread over processes, one for each core. Where processes cannot be started, as in some
    emulators, they run one after the other.
    """
    jobs, done = min(os.cpu_count() or 1, MOST_JOBS), 0
    if how.device.type == "cpu" and jobs > 1 and len(runs) >= MANY:
        with suppress(BrokenProcessPool, OSError), process_pool(jobs) as pool:
            with interrupts_ignored():  # the new processes inherit this
                results = pool.map(partial(verify_one, how), *zip(*runs, strict=True), chunksize=len(EXACT_DTYPES))
            for result in results:
                yield result
                done += 1
    yield from (verify_one(how, *run) for run in runs[done:])


@contextmanager
def process_pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes that end at once if this process is interrupted.

    Without this they would first finish the case that each has begun.
    """
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
    """Ignore Ctrl-C in the context, so that processes started there ignore it.

    They leave it to this process; otherwise each would print a traceback.
    """
    if current_thread() is not main_thread():  # handlers can be set in the main thread only
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def verify_one(how: How, case: Case | Kernel, dtype: str) -> CaseResult:
    """Verify one case with the given number of threads."""
    with threads(how.threads):
        return verify(case, dtype, how.device, how.same_bits, how.arithmetic, how.machine)


def compare_exactly(case: Case | Kernel, dtype: str, taps: Taps) -> ExactResult:
    """Judge taps that were computed under exact arithmetic: they have the recorded bits, or they have failed."""
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
    """Estimate the relative L2 distance of a tap from a recorded one, of which four numbers are known.

    The estimate is right within a factor of about two. Returns None for a tap that is all zero.
    """
    return norm(record.buckets(x) - recorded) / norm(x) if norm(x) else None


def truth_of(case: Case | Kernel, dtype: torch.dtype) -> Truth | KernelTruth:
    """Return the float64 truth of a case."""
    if isinstance(case, Kernel):
        return KernelTruth(case, case.inputs(dtype))
    return Truth(build(case.config, dtype, case.conventions, case.scales), cast(case.inputs(), dtype))


def compare_with_record(case: Case, dtype: str, taps: Taps, same_bits: bool) -> NativeResult:
    """Judge taps that were computed in native arithmetic against taps recorded in native arithmetic."""
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
    """Judge taps that were computed in native arithmetic for a case recorded under exact arithmetic only.

    `exact_taps` are the same model's taps under exact arithmetic; `written_out` are its taps with attention written
    out, from which the budget is made.
    """
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
        return inconclusive(
            f"{len(unknown)} of {len(recorded.digests)} taps, the first is {unknown[0]}, are not the recorded ones "
            "under exact arithmetic: there is nothing to judge them against"
        )
    return native_result(rows, False, None)


def inconclusive(why: str) -> NativeResult:
    """Return the result of a run that cannot be judged."""
    return NativeResult(INCONCLUSIVE, None, 0.0, 0.0, 0.0, 0.0, why)


def require_inputs(case: Case | Kernel, dtype: str, recorded: Record | ExactRecord) -> None:
    """Raise `RecordError` unless the recording was made from the inputs that this version makes."""
    if recorded.input_digests != record.digests(inputs_of(case, dtype)):
        raise RecordError(f"{case.id} {dtype}: recorded from other inputs than this version makes")


def drifted(true: Taps, recorded: Record) -> str | None:
    """Return the first tap whose truth has changed since the case was recorded, or None."""
    norms = recorded.truth_norms
    return next((name for name, x in true.items() if not abs(norm(x) - norms[name]) <= DRIFT * norms[name]), None)


def share_of_budget(row: TapRow) -> float:
    """Return how much of its budget a tap takes: without end for another shape, and nothing where there is none."""
    return math.inf if row.verdict == SHAPE else row.budget or 0.0


def native_result(rows: list[TapRow], same_bits: bool, drift: str | None) -> NativeResult:
    """Return the result of a case from the verdicts on its taps.

    A tap that an audit would suspect counts as within budget, with a note.
    """
    first = next((row.name for row in rows if row.verdict != IDENTICAL), None)
    wrong = next((row.name for row in rows if row.verdict in (DIVERGED, SHAPE)), None)
    worst = max(rows, key=share_of_budget)
    share = share_of_budget(worst)
    if first is None and drift is None:
        verdict = IDENTICAL
    elif drift is not None or same_bits or wrong is not None:
        verdict, first = FAILED, wrong or first
    else:
        verdict = WITHIN
    note = "" if drift is None else f"the float64 truth of {drift} has changed since the recording"
    if verdict == WITHIN and share > 1:
        note = f"{worst.name} takes {share:.2f} of its budget: rounded more often than the record"
        if worst.machine is not None:
            note += f", and no more than on the simulated machine {worst.machine}"
    outputs = [row for row in rows if row.name in (*OUTPUTS, OUTPUT)]
    return NativeResult(
        verdict,
        first,
        share,
        largest(row.relative for row in rows),
        largest(row.error for row in outputs),
        largest(row.reference_error for row in outputs),
        note,
    )


def largest(numbers: Iterable[float | None]) -> float:
    """Return the largest number, counting None as infinite; NaN if there are none."""
    return max((math.inf if x is None else x for x in numbers), default=math.nan)
