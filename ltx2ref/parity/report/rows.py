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

    @property
    def places(self) -> str:
        """Return all taps, with a star for the number of the block."""
        return joined_names([*self.taps], self.blocks, count=6)

    def __str__(self) -> str:
        looks = self.what or "nothing known looks like it"
        effect = "unknown" if self.effect is None else f"{self.effect:.1e}"
        return f"effect {effect}, {self.verdict} at {self.place}: {looks}"


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

    @property
    def passed(self) -> bool:
        """Tell whether nothing but rounding was found."""
        return self.verdict in (IDENTICAL, ROUNDING)

    @property
    def failed(self) -> bool:
        """Tell whether the candidate computes something else, or a tensor of another shape."""
        return self.verdict in (DIVERGED, SHAPE)

    def details(self, count: int = 10) -> str:
        """Return the sentence, the other hints, and up to `count` taps.

        These are the taps beyond rounding, or the rounded ones if there are no others.
        """
        beyond = sorted(
            (row for row in self.rows if row.verdict not in (IDENTICAL, ROUNDING)),
            key=lambda row: row.verdict == MISSING,
        )
        lines = [
            f"  {row.name}: {row.verdict}{f' ({row.origin})' if row.origin else ''}"
            f"{f', {row.candidate_shape} in place of {row.shape}' if row.verdict == SHAPE else ''}"
            f"{f', relative difference {row.relative:.2e}' if row.relative is not None else ''}"
            f"{f', {row.budget:.3g} times the budget' if row.budget is not None else ''}"
            for row in beyond or self.rows
            if row.verdict != IDENTICAL
        ]
        more = [f"  and {len(lines) - count} more"] if len(lines) > count else []
        return "\n".join([self.sentence, *(f"  {hint}" for hint in self.hints[1:]), *lines[:count], *more])

    def to_json(self) -> dict[str, Any]:
        """Return the report as a dict of plain data, ready for `json.dumps`."""
        return asdict(self)

    def __str__(self) -> str:
        return self.sentence


def joined_names(names: list[str], blocks: int, count: int = 12) -> str:
    """Join names of taps or parameters.

    A name that occurs in each of `blocks` blocks is written once, with a star. At most `count` names are listed.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"^transformer_blocks\.\d+\.", "transformer_blocks.*.", name), []).append(name)
    shown = [x for group, found in groups.items() for x in ([group] if len(found) == blocks > 1 else found)]
    return ", ".join(shown[:count]) + (f" and {len(shown) - count} more" if len(shown) > count else "")
