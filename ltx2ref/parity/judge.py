"""How wrong a tap may be: one judge for `verify`, `audit` and the kit, with one budget and one set of verdicts.

A candidate's error against its truth may be `1.5 * err(reference) + 4 * 2^-23 * |truth|`: what the reference itself
loses in the same dtype, and half of that again for another order of the same roundings; without the floor the reference
fails against itself on another processor. A timestep's sinusoid, and RoPE tables of float32 frequencies, have an
analytic bound in the budget's place.

    share of the budget        verify, kit               audit
    up to 1                    within budget             rounding
    up to 2                    within budget, a note     suspect: rounded more often than the reference; rounding if
                                                         exact arithmetic shows the same operations
    above                      FAILED, diverged          diverged
                               in both, unless roundings.py explains it: as up to 2 (not in the kit's components)

There are honest ways of computing between 1 and 2: RoPE angles that are reduced by one float32 constant take 1.8, a
bfloat16 matrix product in two halves that are rounded before they are added 1.6. A bound has no such band.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .report.rows import DIVERGED, IDENTICAL, MISSING, ORIGINATED, PROPAGATED, ROUNDING, SHAPE, SUSPECT, TapRow
from .trace.sketch import Sketch, estimate, sketch

Taps = Mapping[str, Any]  # of tensors, or of sketches
PER_TOKEN = (".sinusoid", ".emb", ".linear", ".rows", ".context_rows")  # their first dimension is B or B * T
SAMPLE = 2**20  # elements from which a percentile is taken
SHARE, FLOOR = 1.5, 4 * 2.0**-23  # of the reference's own error; of the truth's norm
CLEARLY = 2.0  # budgets, beyond which nothing passes that roundings.py does not explain


class Local(NamedTuple):
    """The reference run on the candidate's own taps: in its dtype, and in float64."""

    reference: Taps
    truth: Taps
    same_bits: Taps | None = None  # those of `reference` that the same operations have to the bit, in exact arithmetic


class Against(NamedTuple):
    """What one tap is measured against, as far as it is known."""

    true: Tensor | None = None  # in float64
    candidate_true: Tensor | None = None  # where the candidate's phases are not the reference's
    bound: Tensor | None = None  # of a sinusoid, or of a table of float32 frequencies
    slack: float = 0.0  # what phases do that the candidate does not show
    allowed: Tensor | None = None  # whose error the budget is made from, if it is not the reference's
    least: float = 0.0  # that error, if it is smaller


def judge_tap(name: str, reference: Any, candidate: Any, local: Local | None, against: Against) -> TapRow:
    """Compare one tap of a candidate, None if it has none, with the reference's, and give the verdict."""
    about: dict[str, Any] = {"name": name, "shape": tuple(reference.shape), "dtype": dtype_name(reference)}
    if candidate is None:
        return TapRow(verdict=MISSING, **about)
    about |= {"candidate_shape": tuple(candidate.shape), "candidate_dtype": dtype_name(candidate)}
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
        if numbers["origin"] == ORIGINATED and local.same_bits is not None:  # an operation that is judged on its own
            numbers["equal_rounded"] = False
    return TapRow(verdict=judged(numbers, dtype, most), **about, **numbers)


def spread(name: str, x: Tensor, like: Any) -> Tensor:
    """Repeat noise levels per batch element for each token where the other implementation has them per token."""
    if name.endswith(PER_TOKEN) and tuple(x.shape[1:]) == tuple(like.shape[1:]) and like.shape[0] % len(x) == 0:
        return x.repeat_interleave(like.shape[0] // len(x), 0)
    return x


def judged(numbers: Mapping[str, Any], dtype: torch.dtype, most: float) -> str:
    """Call tensors that are not the same rounding, suspect up to `most` budgets, or diverged."""
    budget = numbers.get("budget")
    if numbers.get("equal_rounded") or (budget is not None and budget <= 1):  # a NaN is not
        return ROUNDING
    if budget is not None:
        return SUSPECT if budget <= most else DIVERGED
    return SUSPECT if numbers["relative"] <= torch.finfo(dtype).eps ** 0.5 else DIVERGED


def differences(reference: Tensor, candidate: Tensor) -> dict[str, Any]:
    """Compute everything that needs no truth, in float64; ULPs are counted in the coarser dtype."""
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
    """Tell whether the reference's error says what the candidate may lose: of a coarser dtype it says nothing."""
    return coarser(reference, candidate) == reference.dtype


def locally(name: str, candidate: Tensor, local: Local, against: Against) -> dict[str, Any]:
    """Tell whether this stage alone, given the candidate's own inputs, is beyond the budget; under exact arithmetic,
    whether it has other bits than the same operations would have."""
    own = against._replace(true=local.truth[name], candidate_true=None, allowed=None)
    found = errors(local.reference[name].cpu(), candidate, own)
    budget, same = found["budget"], None if local.same_bits is None else local.same_bits.get(name)
    passed_on = (budget is not None and budget <= 1) if same is None else torch.equal(same.cpu(), candidate)
    counts = {} if local.same_bits is None or passed_on else {"budget": budget}
    return {"local_error": found["error"], "origin": PROPAGATED if passed_on else ORIGINATED, **counts}


def estimated(about: Mapping[str, Any], reference: Any, candidate: Any, true: Any) -> TapRow:
    """Give the same verdicts from sketches, for what they can tell: beyond the budget is what surely is."""
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
    """L2 norms."""

    error: float  # of the candidate against its truth
    reference: float  # of the reference against its own
    allowed: float  # the budget
    size: float  # of the truth

    @property
    def share(self) -> float:
        return self.error / self.allowed if self.allowed else (0.0 if self.error == 0 else float("inf"))


def norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def measure(
    candidate: Tensor,
    reference: Tensor,
    candidate_true: Tensor,
    true: Tensor,
    bound: Tensor | None = None,
    slack: float = 0.0,
    least: float = 0.0,
) -> Errors:
    """Measure both sides, each against its own truth. `bound` takes the budget's place, `slack` is added to it."""
    error, own, size = norm(candidate.double() - candidate_true), norm(reference.double() - true), norm(candidate_true)
    allowed = SHARE * max(own, least) + FLOOR * norm(true) + slack if bound is None else norm(bound)
    return Errors(error, own, allowed, size)


def ulps(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the largest distance and the 99th percentile, in steps between neighbouring numbers of their dtype."""
    steps = (ordinal(a) - ordinal(b)).abs().flatten().double()
    steps = steps[~(a.isnan() & b.isnan()).flatten()]
    if not len(steps):
        return 0.0, 0.0
    some = steps if len(steps) <= SAMPLE else steps[:: len(steps) // SAMPLE]
    return steps.max().item(), some.quantile(0.99, interpolation="lower").item()


def ordinal(x: Tensor) -> Tensor:
    """Number floating-point numbers so that neighbours are neighbouring integers, and both zeros 0."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.contiguous().view(kind).long()
    return torch.where(bits < 0, torch.iinfo(kind).min - bits, bits)


def coarser(a: Tensor | Sketch, b: Tensor | Sketch) -> torch.dtype:
    return max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)


def dtype_name(x: Any) -> str:
    return str(x.dtype).removeprefix("torch.")


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else (0.0 if part == 0 else float("inf"))


def as_sketch(x: Any) -> Sketch:
    return x if isinstance(x, Sketch) else sketch(x)
