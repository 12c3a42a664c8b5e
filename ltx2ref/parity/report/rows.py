"""The report of a comparison as plain data, for tables, JSON, HTML and failing tests: a row for each tap, a verdict."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

IDENTICAL = "identical"  # the same bits
ROUNDING = "rounding"  # within the budget of the reference's own error, or equal in the coarser of the two dtypes
SUSPECT = "suspect"  # beyond rounding, but too small, or too uncertain, to be called a bug
DIVERGED = "diverged"  # another computation
MISSING = "missing"  # the candidate has no such tap
SHAPE = "shape"  # the candidate's has another shape
VERDICTS = (IDENTICAL, ROUNDING, SUSPECT, DIVERGED, SHAPE, MISSING)
ORIGINATED, PROPAGATED = "originated here", "propagated"


@dataclass(frozen=True)
class TapRow:
    """One tap of both implementations. None where a number needs a truth or full tensors that are not there."""

    name: str
    verdict: str
    shape: tuple[int, ...] | None = None  # the reference's
    dtype: str | None = None
    candidate_shape: tuple[int, ...] | None = None
    candidate_dtype: str | None = None
    max_abs: float | None = None
    relative: float | None = None  # |candidate - reference| / |reference|, L2
    ulp_max: float | None = None  # in units in the last place of the coarser dtype
    ulp_p99: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    worst: tuple[int, ...] | None = None  # where the difference is largest
    worst_reference: float | None = None
    worst_candidate: float | None = None
    equal_rounded: bool | None = None  # equal after rounding to the coarser dtype
    error: float | None = None  # of the candidate against float64, relative to its norm
    reference_error: float | None = None  # of the reference, in the dtype that it has
    budget: float | None = None  # error / what is allowed: above 1 is beyond rounding. Under exact
    # arithmetic, where an operation differs: local error / what is allowed
    origin: str | None = None  # ORIGINATED or PROPAGATED, from a run on the candidate's own inputs
    local_error: float | None = None  # of the candidate against float64, given its own inputs
    amplification: float | None = None  # error / local error
    machine: str | None = None  # simulated: the reference is as far from float64 there
    hints: tuple[str, ...] = ()
    estimated: bool = False  # from sketches


@dataclass(frozen=True)
class Report:
    """The verdict of a comparison, the sentence that people want, and every tap in the order of the computation."""

    verdict: str
    sentence: str
    first: str | None  # divergent tap
    rows: list[TapRow]
    reference: dict[str, Any] = field(default_factory=dict)  # fingerprint: name, versions, device, dtype, threads
    candidate: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hints: tuple[str, ...] = ()  # of the first divergent tap

    @property
    def passed(self) -> bool:
        """Return whether nothing but rounding was found."""
        return self.verdict in (IDENTICAL, ROUNDING)

    @property
    def failed(self) -> bool:
        """Return whether the candidate computes something else, or nothing."""
        return self.verdict in (DIVERGED, SHAPE)

    def details(self, count: int = 10) -> str:
        """Return the sentence, and the first taps that it is about: those beyond rounding, or else the rounded ones."""
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
        return asdict(self)

    def __str__(self) -> str:
        return self.sentence


def joined_names(names: list[str], blocks: int, count: int = 12) -> str:
    """Join names of taps or parameters. One that occurs in each of `blocks` blocks is written once, with a star."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"^transformer_blocks\.\d+\.", "transformer_blocks.*.", name), []).append(name)
    shown = [x for group, found in groups.items() for x in ([group] if len(found) == blocks > 1 else found)]
    return ", ".join(shown[:count]) + (f" and {len(shown) - count} more" if len(shown) > count else "")
