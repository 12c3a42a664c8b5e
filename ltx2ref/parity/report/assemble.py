"""Assemble the report from judged and explained taps: one verdict on the whole, and a sentence that states it."""

from ..judge import first_divergence
from ..trace.taps import PROJECTED
from .rows import DIVERGED, IDENTICAL, MISSING, ROUNDING, SHAPE, SUSPECT, Report, TapRow


def assemble(rows: list[TapRow], notes: list[str]) -> Report:
    """Return the report on these rows: their overall verdict, its sentence, the rows and the notes.

    Missing taps count only where an output is missing, too: with both outputs the end result was compared.
    """
    found, first = {row.verdict for row in rows}, first_divergence(rows)
    if {row.name for row in rows if row.verdict != MISSING} >= PROJECTED.keys():
        found -= {MISSING}
    other = next((row for row in rows if row.verdict not in (IDENTICAL, MISSING)), None)
    verdict = next(v for v in (DIVERGED, SHAPE, SUSPECT, MISSING, ROUNDING, IDENTICAL) if v in found or v == IDENTICAL)
    return Report(
        verdict,
        sentence(verdict, first, other, rows),
        first.name if first else None,
        rows,
        notes=notes,
        hints=first.hints if first else (),
    )


def sentence(verdict: str, first: TapRow | None, other: TapRow | None, rows: list[TapRow]) -> str:
    """Return the sentence that says where two implementations differ.

    `first` is the tap that the report is about, and `other` the first one that is not identical.
    """
    missing = sum(row.verdict == MISSING for row in rows)
    lacking = f"; {missing} of {len(rows)} taps are missing from the candidate" if missing else ""
    if first is None:
        compared = len(rows) - missing
        return f"identical at {'every tap' if not missing else f'all of {compared} taps'}{lacking}"
    looks = f", looks like {first.hints[0]}" if first.hints else ""
    if other is None or other.name == first.name:
        before = "everything before it is identical"
    else:
        before = f"before it there is only rounding, from {other.name} on"
    kind = undecided(first) if first.verdict == SUSPECT else first.verdict
    return f"first divergence at {first.name} ({kind}){looks}; {before}{lacking}"


def undecided(row: TapRow) -> str:
    """Return in plain words why a suspect tap is neither rounding nor a bug."""
    if row.budget is not None:
        return "more than rounding explains, less than a bug would cause"
    size = f"off by {row.ulp_max:.0f} in the last place" if row.ulp_max is not None else f"off by {row.relative:.2e}"
    if row.error is None:
        return f"{size}, which may be rounding or not: without a float64 truth nothing decides"
    return f"{size}, which may be rounding or not: a coarser dtype than the reference's has no budget"
