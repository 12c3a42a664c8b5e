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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from . import record
from .cases import OUTPUTS, Case, Inputs
from .exact import exact
from .judge import CLEARLY, errors, norm
from .kernels import OUTPUT as KERNEL_OUTPUT
from .kernels import Kernel, KernelTruth
from .kernels import run as run_kernel
from .machines import machine as machine_named
from .probe import threads
from .record import DTYPES, EXACT_DTYPES, ExactRecord, Record, RecordError
from .run import build, cast, moved, run
from .taps import Taps
from .truth import Truth

DRIFT = 1e-10  # relative; float64 sums of this size differ by 1e-14 between machines
MANY, MOST_JOBS = 24, 8  # runs that are worth other processes, each of which takes seconds to start; and of those
WRITTEN_OUT = "rounded-logits"  # the machine with whose attention the budget is measured
IDENTICAL, WITHIN, FAILED, INCONCLUSIVE = "identical", "within budget", "FAILED", "inconclusive"


@dataclass(frozen=True)
class TapResult:
    name: str
    verdict: str
    against_record: float  # relative L2
    error: float           # against the candidate's truth, relative L2
    record_error: float    # the recorded tensor's own, against its own truth
    share: float           # of the budget that the error takes


@dataclass(frozen=True)
class ExactResult:
    """One case in one dtype under exact arithmetic."""
    verdict: str
    taps: int                # compared
    differing: int           # or missing
    first: str | None        # differing tap
    distance: float | None   # of the first from the record, relative L2, estimated
    note: str = ""


@dataclass(frozen=True)
class NativeResult:
    """One case in one dtype in this machine's arithmetic."""
    verdict: str
    first: str | None        # divergent tap
    share: float             # of the budget that an error takes, the largest of all taps
    against_record: float    # relative L2, the largest of all taps
    error: float             # of the outputs against the truth, relative L2, the larger one
    record_error: float      # the recorded outputs' own
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


def judge(candidate: Tensor, recorded: Tensor, truths: tuple[Tensor, Tensor], name: str = "",
          bound: Tensor | None = None, budgeted: Tensor | None = None) -> TapResult:
    """Judge one tap. `truths` are the candidate's and the record's; `bound` takes the budget's place. `budgeted` has
    the error that the budget allows for, and the second truth is its own, if it is not the record."""
    true, record_true = truths
    if not candidate.shape == recorded.shape == true.shape:
        return TapResult(name, FAILED, math.inf, math.inf, math.inf, math.inf)
    found = errors(candidate, recorded if budgeted is None else budgeted, true, record_true, bound)
    if candidate.dtype == recorded.dtype and torch.equal(candidate, recorded):
        verdict = IDENTICAL
    else:  # a NaN is not within
        verdict = WITHIN if found.share <= (CLEARLY if bound is None else 1) else FAILED
    difference = norm(candidate.double() - recorded.double())
    return TapResult(name, verdict, difference / found.size, found.error / found.size, found.reference / found.size,
                     found.share)


def verify(case: Case | Kernel, dtype: str, device: torch.device, same_bits: bool, arithmetic: str | None = None,
           machine: str | None = None) -> CaseResult:
    """Run one case, exactly, natively or both, and compare all its taps. `same_bits`: natively, nothing but identical
    will do. `machine`: natively, as this simulated machine computes.

    Raises `RecordError` if there is no usable recording of it.
    """
    forward = prepared(case, dtype, device)
    judged, recorded_natively = arithmetic != "exact" and dtype in DTYPES, isinstance(case, Case) and case.native
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


def natively_judged(case: Case | Kernel, dtype: str, forward: Forward, exact_taps: Taps, same_bits: bool,
                    machine: str | None) -> NativeResult:
    taps, again = run_on(machine, forward), run_on(machine, forward)
    if any(not torch.equal(taps[name], again[name]) for name in taps):
        return NativeResult(INCONCLUSIVE, None, 0.0, 0.0, 0.0, 0.0, "does not repeat itself")
    if isinstance(case, Case) and case.native:
        return compare(case, dtype, taps, same_bits)
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
    """Verify each (case, dtype), in their order: on a CPU many of them in a process for each core."""
    jobs = min(os.cpu_count() or 1, MOST_JOBS)
    if how.device.type != "cpu" or jobs == 1 or len(runs) < MANY:
        yield from (verify_one(how, *run) for run in runs)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(verify_one, how), *zip(*runs, strict=True), chunksize=len(record.EXACT_DTYPES))


def verify_one(how: How, case: Case | Kernel, dtype: str) -> CaseResult:
    with threads(how.threads):
        return verify(case, dtype, how.device, how.same_bits, how.arithmetic, how.machine)


def compare_exactly(case: Case | Kernel, dtype: str, taps: Taps) -> ExactResult:
    """The verdict on what was computed for a case under exact arithmetic: the recorded bits, or not."""
    recorded = record.load_exact(case, dtype)
    require_inputs(case, dtype, recorded)
    missing = [name for name in recorded.digests if name not in taps]
    differing = [name for name, digest in recorded.digests.items()
                 if name in taps and record.digest(taps[name]) != digest]
    first = next(iter([*differing, *missing]), None)
    note = f"the model lacks {len(missing)} taps, the first is {missing[0]}" if missing else ""
    return ExactResult(IDENTICAL if first is None else FAILED, len(recorded.digests), len(differing) + len(missing),
                       first, apart(taps[first], recorded.buckets[first]) if first and differing else None, note)


def apart(x: Tensor, recorded: Tensor) -> float | None:
    """Estimate the relative L2 distance from four numbers of the recorded tensor: right to a factor of two or so."""
    return norm(record.buckets(x) - recorded) / norm(x) if norm(x) else None


def truth_of(case: Case | Kernel, dtype: torch.dtype) -> Truth | KernelTruth:
    if isinstance(case, Kernel):
        return KernelTruth(case, case.inputs(dtype))
    return Truth(build(case.config, dtype, case.conventions, case.scales), cast(case.inputs(), dtype))


def compare(case: Case, dtype: str, taps: Taps, same_bits: bool) -> NativeResult:
    """The verdict on what was computed for a case in native arithmetic."""
    recorded = record.load(case, dtype)
    require_inputs(case, dtype, recorded)
    truth = truth_of(case, DTYPES[dtype])
    theirs = {name: taps[name] for name in recorded.taps}
    true, record_true = truth.of(theirs), truth.of(recorded.taps)
    results = [judge(theirs[name], x, (true[name], record_true[name]), name, truth.bounds.get(name))
               for name, x in recorded.taps.items()]
    return summary(results, same_bits, drifted({name: record_true[name] for name in recorded.taps}, recorded))


def compare_with_exact(case: Case | Kernel, dtype: str, taps: Taps, exact_taps: Taps,
                       written_out: Taps) -> NativeResult:
    """The verdict on what was computed in native arithmetic for a case that is recorded under exact arithmetic alone.
    `exact_taps`: what the same model computes there; `written_out`: with attention written out."""
    recorded = record.load_exact(case, dtype)
    require_inputs(case, dtype, recorded)
    known = {name: exact_taps[name] for name, digest in recorded.digests.items()
             if name in exact_taps and record.digest(exact_taps[name]) == digest}
    truth = truth_of(case, DTYPES[dtype])
    true, own = truth.of(taps), truth.of(written_out)
    results = [judge(taps[name], x, (true[name], own[name]), name, truth.bounds.get(name), written_out[name])
               for name, x in known.items()]
    unknown = [name for name in recorded.digests if name not in known]
    if unknown and not any(result.verdict == FAILED for result in results):
        return NativeResult(INCONCLUSIVE, None, 0.0, 0.0, 0.0, 0.0, (
            f"{len(unknown)} of {len(recorded.digests)} taps, the first is {unknown[0]}, are not the recorded ones "
            "under exact arithmetic: there is nothing to judge them against"))
    return summary(results, False, None)


def require_inputs(case: Case | Kernel, dtype: str, recorded: Record | ExactRecord) -> None:
    if recorded.input_digests != record.digests(inputs_of(case, dtype)):
        raise RecordError(f"{case.id} {dtype}: recorded from other inputs than this version makes")


def drifted(true: Taps, recorded: Record) -> str | None:
    """The first tap whose truth is not what it was when the case was recorded."""
    norms = recorded.truth_norms
    return next((name for name, x in true.items() if not abs(norm(x) - norms[name]) <= DRIFT * norms[name]), None)


def summary(results: list[TapResult], same_bits: bool, drift: str | None) -> NativeResult:
    first = next((r.name for r in results if r.verdict != IDENTICAL), None)
    if first is None and drift is None:
        verdict = IDENTICAL
    elif drift is not None or same_bits or any(r.verdict == FAILED for r in results):
        verdict = FAILED
        first = next((r.name for r in results if r.verdict == FAILED), first)
    else:
        verdict = WITHIN
    most = max(results, key=lambda r: r.share)
    note = "" if drift is None else f"the float64 truth of {drift} has changed since the recording"
    if verdict == WITHIN and most.share > 1:
        note = f"{most.name} takes {most.share:.2f} of its budget: rounded more often than the record"
    outputs = [r for r in results if r.name in (*OUTPUTS, KERNEL_OUTPUT)]
    return NativeResult(verdict, first, most.share, max(r.against_record for r in results),
                        max((r.error for r in outputs), default=math.nan),
                        max((r.record_error for r in outputs), default=math.nan), note)
