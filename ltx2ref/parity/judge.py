"""Judge how wrong a tap may be, with one budget and one set of verdicts for `verify`, `audit` and the kit.

A candidate's error against its truth may be `1.5 * err(reference) + 4 * 2^-23 * |truth|`. The first term is what the
reference itself loses in the same dtype, plus half of that for the same roundings in another order. Without the second
term the reference would fail against itself on another processor. A timestep's sinusoid, and RoPE tables of float32
frequencies, have an analytic bound instead of a budget.

    share of the budget    verify, kit               audit
    up to 1                within budget             rounding
    up to 2                within budget, a note     suspect: rounded more often than the reference. It becomes
                                                     rounding if exact arithmetic shows the same operations.
    above 2                FAILED, diverged          diverged

All three treat a share above 2 as one up to 2 where explain/roundings.py explains it.

Honest ways of computing do reach shares between 1 and 2: RoPE angles that are reduced by one float32 constant take 1.8,
and a bfloat16 matrix product whose two halves are rounded before they are added takes 1.6. An analytic bound has no
such band: whatever exceeds it has diverged.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .report.rows import DIVERGED, IDENTICAL, MISSING, ORIGINATED, PROPAGATED, ROUNDING, SHAPE, SUSPECT, TapRow
from .trace.sketch import Sketch, estimate, sketch
from .trace.taps import PHASES, PROJECTED
from .truth import FLOOR, SHARE, Local, norm, phases, spread

AnyTaps = Mapping[str, Any]  # of tensors, or of sketches
SAMPLE = 2**20  # a percentile is taken from this many elements
CLEARLY = 2.0  # beyond this many budgets a tap passes only if explain/roundings.py explains it
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Against(NamedTuple):
    """Everything known about what one tap should be; errors and slack are L2 norms."""

    true: Tensor | None = None  # in float64
    candidate_true: Tensor | None = None  # the candidate's own truth, if its phases differ from the reference's
    bound: Tensor | None = None  # replaces the budget of a sinusoid, or of a table of float32 frequencies
    slack: float = 0.0  # how far phases that the candidate does not show can move this tap
    allowed: Tensor | None = None  # the tensor whose error makes the budget, if it is not the reference
    least: float = 0.0  # the smallest error from which a budget is made


class Standard(NamedTuple):
    """Everything that taps are measured against, by their names. The fields are those of `Against`."""

    true: AnyTaps = NOTHING
    candidate_true: AnyTaps = NOTHING
    bounds: AnyTaps = NOTHING
    slack: Mapping[str, float] = NOTHING
    allowed: AnyTaps = NOTHING
    least: Mapping[str, float] = NOTHING

    def of(self, name: str) -> Against:
        """Return what one tap is measured against."""
        return Against(
            self.true.get(name),
            self.candidate_true.get(name),
            self.bounds.get(name),
            self.slack.get(name, 0.0),
            self.allowed.get(name),
            self.least.get(name, 0.0),
        )


def most_of(name: str) -> float:
    """Return how many budgets a stage may use before it counts as a cause."""
    return 1.0 if name.endswith(PHASES) else CLEARLY


def judge_taps(reference: AnyTaps, candidate: AnyTaps, standard: Standard, local: Local | None = None) -> list[TapRow]:
    """Judge every tap of the reference, in its order.

    `local` is the reference run on the candidate's own taps. With it, a row also says whether its error originated
    there or was only propagated.
    """
    rows = [
        judge_tap(name, x, candidate.get(name), local, standard.of(name))
        for name, x in reference.items()
        if name in candidate or name not in PROJECTED.values()
    ]
    return after_projection(rows if local is None else amplified(rows))


def rounded_phases(reference: AnyTaps, candidate: AnyTaps, standard: Standard) -> dict[str, Tensor]:
    """Return, in the reference's shapes, those phases of the candidate whose error rounding explains.

    The candidate's other taps are measured against a truth with these phases. Wrong phases are left out, so that
    everything computed from them is reported as wrong, too.
    """
    rows = judge_taps(phases(reference), candidate, standard)
    names = [row.name for row in rows if row.verdict in (ROUNDING, SUSPECT)]
    return {
        name: spread(name, candidate[name], reference[name]) for name in names if isinstance(candidate[name], Tensor)
    }


def first_divergence(rows: list[TapRow]) -> TapRow | None:
    """Return the tap that the report is about, or None if all taps are identical or missing.

    It is the first one that is wrong, or else the first suspect one, or else the first that is not identical.
    """
    for verdicts in ((DIVERGED, SHAPE), (SUSPECT,)):
        if found := next((row for row in rows if row.verdict in verdicts), None):
            return found
    return next((row for row in rows if row.verdict not in (IDENTICAL, MISSING)), None)


def remarks(rows: list[TapRow], reference: AnyTaps, candidate: AnyTaps, truth: AnyTaps | None) -> list[str]:
    """Return notes on taps that could not be judged, or not well: without a counterpart, or without a truth."""
    extra = [name for name in candidate if name not in reference and name not in PROJECTED.values()]
    said = []
    if extra:
        said.append(f"the candidate has {len(extra)} taps that the reference lacks: {', '.join(extra[:3])}")
    said += [
        f"{part}: the candidate has none of its {count} taps, so it was never computed, or not traced"
        for part, count in parts_without_taps(reference, candidate).items()
    ]
    if truth is None and any(row.verdict in (SUSPECT, DIVERGED) for row in rows):
        said.append(
            "without a float64 truth there is no budget: a difference beyond the coarser dtype's rounding counts as "
            "a divergence above the square root of its epsilon, and as suspect below"
        )
    return said


def parts_without_taps(reference: AnyTaps, candidate: AnyTaps) -> dict[str, int]:
    """Return blocks, and sub-layers of other blocks, of which the candidate has no tap, with how many there should be.

    A candidate that shows such a part in no block is left alone.
    """
    found: dict[str, int] = {}
    for depth in (2, 3):  # transformer_blocks.0, and transformer_blocks.0.attn1
        parts = [".".join(name.split(".")[:depth]) for name in reference if name.startswith("transformer_blocks.")]
        counts = Counter(part for part in parts if not any(part.startswith(f"{other}.") for other in found))
        lacking = [part for part in counts if not any(name.startswith(f"{part}.") for name in candidate)]
        for part in lacking:
            shown = [x for x in counts if x not in lacking and x.split(".")[2:] == part.split(".")[2:]]
            if shown and counts[part] > 1:
                found[part] = counts[part]
    return found


def judge_tap(name: str, reference: Any, candidate: Any, local: Local | None, against: Against) -> TapRow:
    """Compare one tap of the candidate with the reference's and return its row, with the verdict.

    `candidate` is None if it lacks the tap. Either side may be a `Sketch`, for which all numbers are estimates.
    """
    about: dict[str, Any] = {"name": name, "shape": tuple(reference.shape), "dtype": dtype_name(reference.dtype)}
    if candidate is None:
        return TapRow(verdict=MISSING, **about)
    about |= {"candidate_shape": tuple(candidate.shape), "candidate_dtype": dtype_name(candidate.dtype)}
    if isinstance(candidate, Tensor):
        candidate = spread(name, candidate, reference)
    if tuple(candidate.shape) != tuple(reference.shape):
        return TapRow(verdict=SHAPE, **about)
    if isinstance(reference, Sketch) or isinstance(candidate, Sketch):
        return estimated(about, reference, candidate, against.true)
    reference, candidate = reference.cpu(), candidate.cpu()
    if candidate.dtype == reference.dtype and torch.equal(candidate, reference):
        return TapRow(
            verdict=IDENTICAL,
            equal_rounded=True,
            max_abs=0.0,
            relative=0.0,
            ulp_max=0.0,
            ulp_p99=0.0,
            **about,
            **errors(reference, candidate, Against(against.true)),
        )
    numbers = differences(reference, candidate) | errors(reference, candidate, against)
    most, dtype = CLEARLY if against.bound is None else 1.0, coarser(reference, candidate)
    if not same_roundings(reference, candidate):
        numbers.pop("budget", None)
    elif local is not None and name in local.truth:
        numbers |= locally(name, candidate, local, against)
        # Where the operation itself differs, equal numbers after rounding are no excuse.
        if numbers["origin"] == ORIGINATED and local.same_bits is not None:
            numbers["equal_rounded"] = False
    return TapRow(verdict=judged(numbers, dtype, most), **about, **numbers)


def amplified(rows: list[TapRow]) -> list[TapRow]:
    """Downgrade to suspect a tap over budget when no stage up to it was over budget on its own.

    In that case the error has only accumulated. The amplification, error divided by local error, is filled in for all
    rows.
    """
    result, origin = [], False
    for row in rows:
        origin |= row.origin != PROPAGATED and row.verdict == DIVERGED
        grown = row.verdict == DIVERGED and not origin
        more = row.error / row.local_error if row.error is not None and row.local_error else None
        result.append(replace(row, verdict=SUSPECT if grown else row.verdict, amplification=more))
    return result


def after_projection(rows: list[TapRow]) -> list[TapRow]:
    """Add a hint to an output that is wrong although its projection is right: it was changed in between."""
    right = {row.name for row in rows if row.verdict in (IDENTICAL, ROUNDING)}
    return [
        replace(row, hints=(f"a change after {PROJECTED[row.name]}: its output is right, and what is returned is not",))
        if PROJECTED.get(row.name) in right and row.verdict in (SUSPECT, DIVERGED, SHAPE)
        else row
        for row in rows
    ]


def judged(numbers: Mapping[str, Any], dtype: torch.dtype, most: float) -> str:
    """Return the verdict on tensors that are not identical.

    `most` is how many budgets may be used before a suspect tap has diverged; it is 1 where the budget is a bound.
    """
    budget = numbers.get("budget")
    if numbers.get("equal_rounded") or (budget is not None and budget <= 1):  # False for a NaN
        return ROUNDING
    if budget is not None:
        return SUSPECT if budget <= most else DIVERGED
    return SUSPECT if numbers["relative"] <= torch.finfo(dtype).eps ** 0.5 else DIVERGED


def differences(reference: Tensor, candidate: Tensor) -> dict[str, Any]:
    """Measure, in float64, everything that needs no truth. ULPs are counted in the coarser of the two dtypes."""
    a, b, dtype = reference.double(), candidate.double(), coarser(reference, candidate)
    gap = (b - a).abs()
    worst = int(torch.where(gap.isnan(), torch.inf, gap).argmax())
    rounded = reference.to(dtype), candidate.to(dtype)
    ulp_max, ulp_p99 = ulps(*rounded)
    apart, size = norm(gap), norm(a)
    return {
        "max_abs": gap.flatten()[worst].item(),
        "relative": ratio(apart, size),
        "ulp_max": ulp_max,
        "ulp_p99": ulp_p99,
        "sqnr_db": 20 * torch.log10(torch.tensor(size / apart)).item() if apart and size else None,
        "cosine": ratio((a * b).sum().item(), size * norm(b)),
        "equal_rounded": torch.equal(*rounded),
        "worst": tuple(int(i) for i in np.unravel_index(worst, tuple(a.shape))),
        "worst_reference": a.flatten()[worst].item(),
        "worst_candidate": b.flatten()[worst].item(),
    }


def errors(reference: Tensor, candidate: Tensor, against: Against) -> dict[str, Any]:
    """Return the relative error of each side against float64, and the candidate's error divided by the budget."""
    if against.true is None:
        return {}
    true = against.true.cpu()
    theirs = true if against.candidate_true is None else against.candidate_true.cpu()
    bound = None if against.bound is None or against.bound.shape != true.shape else against.bound
    own = reference if against.allowed is None else against.allowed
    found = measure(candidate, own, theirs, true, bound, against.slack, against.least)
    return {
        "error": ratio(found.error, found.size),
        "reference_error": ratio(found.reference, norm(true)),
        "budget": found.share,
    }


def same_roundings(reference: Tensor | Sketch, candidate: Tensor | Sketch) -> bool:
    """Tell whether the reference's own error says how much the candidate may lose.

    It does not if the candidate's dtype is the coarser one.
    """
    return coarser(reference, candidate) == reference.dtype


def locally(name: str, candidate: Tensor, local: Local, against: Against) -> dict[str, Any]:
    """Measure this stage alone: the candidate's tap against the reference's stage, run on the candidate's own inputs.

    Under exact arithmetic, an error originated here if the bits differ from those of the same operations. Otherwise, it
    originated here if it is over budget.
    """
    true, reference = local.truth[name], local.reference[name].cpu()
    if not true.isfinite().all() and true.shape == candidate.shape == reference.shape:
        known = true.isfinite()  # what is not finite came from before
        true, candidate, reference = (torch.where(known, x, torch.zeros_like(x)) for x in (true, candidate, reference))
    own = against._replace(true=true, candidate_true=None, allowed=None)
    found = errors(reference, candidate, own)
    budget = found["budget"]
    same = None if local.same_bits is None else local.same_bits.get(name)
    passed_on = (budget is not None and budget <= 1) if same is None else torch.equal(same.cpu(), candidate)
    counts = {} if local.same_bits is None or passed_on else {"budget": budget}
    return {
        "local_error": found["error"],
        "local_budget": budget,
        "origin": PROPAGATED if passed_on else ORIGINATED,
        **counts,
    }


def estimated(about: Mapping[str, Any], reference: Any, candidate: Any, true: Any) -> TapRow:
    """Judge a tap from sketches, as far as they can tell.

    Only what is surely beyond the budget is called so: the low end of the candidate's estimated error is compared with
    the high end of the budget.
    """
    a, b = as_sketch(reference), as_sketch(candidate)
    same = a.same_bits(b)
    if same or (same is None and a == b):
        return TapRow(verdict=IDENTICAL, relative=0.0, estimated=True, **about)
    numbers: dict[str, Any] = {"relative": estimate(a, b).relative}
    if true is not None:
        error, own = estimate(as_sketch(true), b), estimate(as_sketch(true), a)
        budget = error.low / (SHARE * own.high + FLOOR) if same_roundings(a, b) else None
        numbers |= {"error": error.relative, "reference_error": own.relative, "budget": budget}
    return TapRow(verdict=judged(numbers, coarser(a, b), CLEARLY), estimated=True, **about, **numbers)


# ---------------------------------------------------------------- numbers
class Errors(NamedTuple):
    """The L2 norms that a share of the budget is made from."""

    error: float  # the candidate's error against its truth
    reference: float  # the reference's error against the truth
    allowed: float  # the budget
    size: float  # the norm of the candidate's truth

    @property
    def share(self) -> float:
        """Return the candidate's error divided by the budget."""
        return ratio(self.error, self.allowed)


def measure(
    candidate: Tensor,
    reference: Tensor,
    candidate_true: Tensor,
    true: Tensor,
    bound: Tensor | None = None,
    slack: float = 0.0,
    least: float = 0.0,
) -> Errors:
    """Measure both sides, each against its own truth, and return L2 norms.

    `bound`, if it is given, replaces the budget. Otherwise `least` is the smallest reference error that the budget
    assumes, and `slack` is added to the budget.
    """
    error, own, size = norm(candidate.double() - candidate_true), norm(reference.double() - true), norm(candidate_true)
    allowed = SHARE * max(own, least) + FLOOR * norm(true) + slack if bound is None else norm(bound)
    return Errors(error, own, allowed, size)


def ulps(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the largest distance and the 99th percentile, in steps between neighbouring numbers of the dtype.

    Both tensors have the same dtype. Elements that are NaN in both are left out.
    """
    steps = (ordinal(a) - ordinal(b)).abs().flatten().double()
    steps = steps[~(a.isnan() & b.isnan()).flatten()]
    if not len(steps):
        return 0.0, 0.0
    some = steps if len(steps) <= SAMPLE else steps[:: len(steps) // SAMPLE]
    return steps.max().item(), some.quantile(0.99, interpolation="lower").item()


def ordinal(x: Tensor) -> Tensor:
    """Map floating-point numbers to integers so that neighbours stay neighbours; both zeros become 0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.contiguous().view(kind).long()
    return torch.where(bits < 0, torch.iinfo(kind).min - bits, bits)


def coarser(a: Tensor | Sketch, b: Tensor | Sketch) -> torch.dtype:
    """Return the dtype with the larger epsilon."""
    return max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype as text, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def ratio(part: float, whole: float) -> float:
    """Divide; 0 / 0 is 0, and anything else divided by 0 is infinite."""
    return part / whole if whole else (0.0 if part == 0 else float("inf"))


def as_sketch(x: Any) -> Sketch:
    """Return the sketch of a tensor, or the sketch that is already given."""
    return x if isinstance(x, Sketch) else sketch(x)
