"""Assemble the report from judged and explained taps: one verdict on the whole, and a sentence that states it."""

from typing import NamedTuple

from ..judge import first_divergence
from ..trace.taps import PROJECTED
from .rows import DIVERGED, IDENTICAL, MISSING, ROUNDING, SHAPE, SUSPECT, Report, TapRow


class Finding(NamedTuple):
    """What a report's sentence says, in parts: the place, what it looks like, what came before, and what is missing."""

    first: TapRow | None  # the tap that the report is about
    other: TapRow | None  # the first one that is not identical
    missing: int
    of: int  # how many taps the reference has
    unseen: bool  # there are taps before it, and the candidate has none of them

    @property
    def kind(self) -> str:
        """Return in words how far the tap differs that the report is about."""
        if self.first is None:
            return IDENTICAL
        return undecided(self.first) if self.first.verdict == SUSPECT else self.first.verdict

    @property
    def rounded_from(self) -> str | None:
        """Return the first of the taps before it that are rounded; None if all of them are identical."""
        return None if self.other is None or self.other is self.first else self.other.name

    def __str__(self) -> str:
        lacking = f"; {self.missing} of {self.of} taps are missing from the candidate" if self.missing else ""
        if self.first is None:
            every = f"all of {self.of - self.missing} taps" if self.missing else "every tap"
            return f"identical at {every}{lacking}"
        looks = f", looks like {self.first.hints[0]}" if self.first.hints else ""
        before = "nothing before it was compared" if self.unseen else "everything before it is identical"
        if self.rounded_from:
            before = f"before it there is only rounding, from {self.rounded_from} on"
        return f"first divergence at {self.first.name} ({self.kind}){looks}; {before}{lacking}"


def assemble(rows: list[TapRow], notes: list[str]) -> Report:
    """Return the report on these rows: their overall verdict, its sentence, the rows and the notes.

    Missing taps count only where an output is missing, too: with both outputs the end result was compared.
    """
    found, finding = {row.verdict for row in rows}, finding_in(rows)
    first = finding.first
    outputs = PROJECTED.keys() & {row.name for row in rows}  # without that of an absent stream
    if outputs and outputs <= {row.name for row in rows if row.verdict != MISSING}:
        found -= {MISSING}
    verdict = next(v for v in (DIVERGED, SHAPE, SUSPECT, MISSING, ROUNDING, IDENTICAL) if v in found or v == IDENTICAL)
    return Report(
        verdict, str(finding), first.name if first else None, rows, notes=notes, hints=first.hints if first else ()
    )


def finding_in(rows: list[TapRow]) -> Finding:
    """Return where two implementations differ first, and what came before that."""
    other = next((row for row in rows if row.verdict not in (IDENTICAL, MISSING)), None)
    first = first_divergence(rows)
    before = {row.verdict for row in rows[: rows.index(first)]} if first else set()
    return Finding(first, other, sum(row.verdict == MISSING for row in rows), len(rows), before == {MISSING})


def undecided(row: TapRow) -> str:
    """Return in plain words why a suspect tap is neither rounding nor a bug."""
    if row.budget is not None or (row.ulp_max is None and row.relative is None):
        return "more than rounding explains, less than a bug would cause"
    size = f"off by {row.ulp_max:.0f} in the last place" if row.ulp_max is not None else f"off by {row.relative:.2e}"
    if row.error is None:
        return f"{size}, which may be rounding or not: without a float64 truth nothing decides"
    return f"{size}, which may be rounding or not: a coarser dtype than the reference's has no budget"
