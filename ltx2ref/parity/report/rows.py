"""Hold the report of a comparison as plain data: a row for each tap, and a verdict.

Tables, JSON, HTML and failing tests are all made from it.
"""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

IDENTICAL = "identical"  # the same bits
ROUNDING = "rounding"  # within the budget of the reference's own error, or equal in the coarser of the two dtypes
SUSPECT = "suspect"  # beyond rounding, but too small, or too uncertain, to be called a bug
DIVERGED = "diverged"  # another computation
MISSING = "missing"  # the candidate has no such tap
SHAPE = "shape"  # the candidate's tensor has another shape
VERDICTS = (IDENTICAL, ROUNDING, SUSPECT, DIVERGED, SHAPE, MISSING)
ORIGINATED, PROPAGATED = "originated here", "propagated"


@dataclass(frozen=True)
class TapRow:
    """One tap, compared between both implementations.

    A field is None if it needs a truth or full tensors that are not there.
    """

    name: str
    verdict: str
    shape: tuple[int, ...] | None = None  # the reference's
    dtype: str | None = None
    candidate_shape: tuple[int, ...] | None = None
    candidate_dtype: str | None = None
    max_abs: float | None = None
    relative: float | None = None  # |candidate - reference| / |reference|, L2 norms
    ulp_max: float | None = None  # counted in units in the last place of the coarser dtype
    ulp_p99: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    worst: tuple[int, ...] | None = None  # coordinate of the largest difference, and both numbers there
    worst_reference: float | None = None
    worst_candidate: float | None = None
    equal_rounded: bool | None = None  # equal after rounding to the coarser dtype
    error: float | None = None  # the candidate's error against float64, relative to the truth's norm
    reference_error: float | None = None  # the reference's error, in its own dtype
    # Error divided by the budget: above 1 is beyond rounding. Where an operation differs under exact arithmetic, this
    # is the local error divided by the budget.
    budget: float | None = None
    origin: str | None = None  # ORIGINATED or PROPAGATED, from a run on the candidate's own inputs
    local_error: float | None = None  # the candidate's error against float64 given its own inputs
    local_budget: float | None = None  # that error divided by the budget of this stage alone
    amplification: float | None = None  # error / local error
    machine: str | None = None  # simulated machine on which the reference is as far from float64
    hints: tuple[str, ...] = ()
    estimated: bool = False  # the numbers come from sketches


BUG, CONVENTION = "bug", "convention"  # verdicts on causes, beside ROUNDING


@dataclass(frozen=True)
class Cause:
    """One thing that a candidate does differently, wherever it does it."""

    place: str  # the first tap at which it shows, without the number of the block
    verdict: str  # BUG, CONVENTION (the reference has a switch for it) or ROUNDING (explained by more roundings)
    what: str | None  # what it looks like; None if nothing known fits
    taps: tuple[str, ...]  # every tap at which it originates
    blocks: int  # how many blocks the model has
    size: float | None  # the largest difference that originates at one of them, relative (L2)
    budget: float | None  # the same, divided by the budget of that stage
    effect: float | None  # how far this difference alone moves the outputs, relative (L2); None if it is not known
    hints: tuple[str, ...] = ()  # everything that it looks like


@dataclass(frozen=True)
class Report:
    """The result of a comparison.

    It has a verdict, a sentence that states it, and a row for every tap in the order of the computation.
    """

    verdict: str
    sentence: str
    first: str | None  # the tap that the report is about
    rows: list[TapRow]
    reference: dict[str, Any] = field(default_factory=dict)  # fingerprint: name, versions, device, dtype, threads
    candidate: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hints: tuple[str, ...] = ()  # what the first divergence looks like
    causes: tuple[Cause, ...] = ()  # everything that the candidate does differently, by effect
    conventions: dict[str, str] = field(default_factory=dict)  # which conventions it follows, as far as that shows
    case: str | None = None  # the case that an audit ran; None if both sides were given as they are

    @property
    def passed(self) -> bool:
        """Tell whether nothing but rounding was found."""
        return self.verdict in (IDENTICAL, ROUNDING)

    @property
    def failed(self) -> bool:
        """Tell whether the candidate computes something else, or a tensor of another shape."""
        return self.verdict in (DIVERGED, SHAPE)

    def details(self, count: int = 10, taps: bool | None = None) -> str:
        """Return the sentence, the causes, what conventions the candidate follows, and up to `count` taps.

        By default, taps are shown where there are no causes. These are the taps beyond rounding, failures first, or the
        rounded ones if there are no others.
        """
        lines = [self.sentence, *(f"  {hint}" for hint in self.hints[1:])] if not self.causes else [self.sentence]
        if self.causes:
            many = "1 cause" if len(self.causes) == 1 else f"{len(self.causes)} causes"
            lines.append(f"  {many}, by how far each alone moves the outputs (relative, L2):")
            lines += [line for cause in self.causes for line in cause_lines(cause)]
        if self.conventions:
            lines.append(f"  follows {', '.join(f'{name} = {value}' for name, value in self.conventions.items())}")
        return "\n".join([*lines, *(self.tap_lines(count) if taps or (taps is None and not self.causes) else ())])

    def brief(self) -> str:
        """Return the sentence, and a line for each cause if there are several."""
        return "\n".join([self.sentence, *(line for cause in self.causes for line in cause_lines(cause)[:1])])

    def tap_lines(self, count: int) -> list[str]:
        """Return a line for each of up to `count` taps: failures first, suspect ones next, missing ones counted."""
        order = (DIVERGED, SHAPE, SUSPECT, ROUNDING)
        beyond = [row for row in self.rows if row.verdict in order[:3]]
        shown = sorted(beyond or self.rows, key=lambda row: row.origin == PROPAGATED or row.verdict == SUSPECT)
        lines = [
            f"  {row.name}: {row.verdict}{f' ({row.origin})' if row.origin else ''}"
            f"{f', {row.candidate_shape} in place of {row.shape}' if row.verdict == SHAPE else ''}"
            f"{f', relative difference {row.relative:.2e}' if row.relative is not None else ''}"
            f"{f', {row.budget:.3g} times the budget' if row.budget is not None else ''}"
            for row in shown
            if row.verdict in order
        ]
        missing = [row.name for row in self.rows if row.verdict == MISSING]
        more = [f"  and {len(lines) - count} more"] if len(lines) > count else []
        lacking = [f"  missing: {len(missing)} taps, such as {missing[0]}"] if missing else []
        return [*lines[:count], *more, *lacking]

    def to_json(self) -> dict[str, Any]:
        """Return the report as a dict of plain data, ready for `json.dumps`."""
        return asdict(self)

    def __str__(self) -> str:
        return self.sentence


def cause_lines(cause: Cause) -> list[str]:
    """Return what is printed about a cause: its effect, verdict and place, what it looks like, and its other taps."""
    effect = "unknown" if cause.effect is None else f"{cause.effect:.1e}"
    looks = cause.what or "like nothing known"
    others = joined_names([x for x in cause.taps if cause.place not in (x, without_block(x))], cause.blocks, count=3)
    also = [f"      also at {others}"] if others else []
    return [f"    {effect}  {cause.verdict} at {cause.place}: {looks}", *also]


def without_block(name: str) -> str:
    """Return the name of a tap with a star in place of the number of its block."""
    return re.sub(r"^transformer_blocks\.\d+\.", "transformer_blocks.*.", name)


def joined_names(names: list[str], blocks: int, count: int = 12) -> str:
    """Join names of taps or parameters.

    A name that occurs in each of `blocks` blocks is written once, with a star. At most `count` names are listed.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"^transformer_blocks\.\d+\.", "transformer_blocks.*.", name), []).append(name)
    shown = [x for group, found in groups.items() for x in ([group] if len(found) == blocks > 1 else found)]
    return ", ".join(shown[:count]) + (f" and {len(shown) - count} more" if len(shown) > count else "")
