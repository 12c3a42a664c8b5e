"""Two implementations compared tap by tap: where they first part, by how much, and whether rounding explains it.

Where there is a truth, nothing but the budget of judge.py decides between rounding and a bug. Where there is none, a
difference is called a divergence only if it takes half of the digits of the coarser dtype (relative L2 above the square
root of its epsilon), and else stays suspect.
"""

from collections.abc import Mapping
from dataclasses import replace

from .judge import Against, Local, Taps, judge_tap
from .report.rows import DIVERGED, IDENTICAL, MISSING, PROPAGATED, ROUNDING, SHAPE, SUSPECT, Report, TapRow
from .trace.taps import PROJECTED


def compare(
    reference: Taps,
    candidate: Taps,
    truth: Taps | None = None,
    local: Local | None = None,
    candidate_truth: Taps | None = None,
    bounds: Taps | None = None,
    slack: Mapping[str, float] | None = None,
    least: Mapping[str, float] | None = None,
) -> Report:
    """Every tap of the reference, in its order. `truth` holds float64 values; `local` tells origin from consequence.

    `candidate_truth` is what the candidate is measured against, where its phases are not the reference's. `bounds` are
    of sinusoids and tables of float32 frequencies, `least` of other RoPE tables (see truth.py). `slack`, in L2 norms,
    is added to budgets.
    """
    true, theirs, bounds, slack, least = truth or {}, candidate_truth or {}, bounds or {}, slack or {}, least or {}
    rows = [
        judge_tap(
            name,
            x,
            candidate.get(name),
            local,
            Against(
                true.get(name), theirs.get(name), bounds.get(name), slack.get(name, 0.0), least=least.get(name, 0.0)
            ),
        )
        for name, x in reference.items()
        if name in candidate or name not in PROJECTED.values()
    ]
    rows = after_projection(amplified(rows) if local is not None else rows)
    return summary(rows, notes(rows, reference, candidate, truth))


def amplified(rows: list[TapRow]) -> list[TapRow]:
    """What is beyond its budget although no stage so far is beyond its own has only grown: suspect, not diverged."""
    result, origin = [], False
    for row in rows:
        origin |= row.origin != PROPAGATED and row.verdict == DIVERGED
        grown = row.verdict == DIVERGED and not origin
        more = row.error / row.local_error if row.error is not None and row.local_error else None
        result.append(replace(row, verdict=SUSPECT if grown else row.verdict, amplification=more))
    return result


def after_projection(rows: list[TapRow]) -> list[TapRow]:
    """Say of an output that is wrong although what its projection put out is right, that it was changed in between."""
    right = {row.name for row in rows if row.verdict in (IDENTICAL, ROUNDING)}
    return [
        replace(
            row, hints=(f"a change after {PROJECTED[row.name]}: what it put out is right, what is returned is not",)
        )
        if PROJECTED.get(row.name) in right and row.verdict in (SUSPECT, DIVERGED, SHAPE)
        else row
        for row in rows
    ]


def summary(rows: list[TapRow], remarks: list[str]) -> Report:
    """The verdict of the whole, and the sentence that says it."""
    found = {row.verdict for row in rows}
    wrong = next((row for row in rows if row.verdict in (DIVERGED, SHAPE)), None)
    other = next((row for row in rows if row.verdict not in (IDENTICAL, MISSING)), None)
    first = wrong or next((row for row in rows if row.verdict == SUSPECT), None) or other
    verdict = next(v for v in (DIVERGED, SHAPE, SUSPECT, MISSING, ROUNDING, IDENTICAL) if v in found or v == IDENTICAL)
    return Report(
        verdict,
        sentence(verdict, first, other, rows),
        first.name if first else None,
        rows,
        notes=remarks,
        hints=first.hints if first else (),
    )


def sentence(verdict: str, first: TapRow | None, other: TapRow | None, rows: list[TapRow]) -> str:
    missing = sum(row.verdict == MISSING for row in rows)
    lacking = f"; {missing} of {len(rows)} taps are missing from the candidate" if missing else ""
    if first is None:
        compared = len(rows) - missing
        return f"identical at {'every tap' if not missing else f'all of {compared} taps'}{lacking}"
    looks = f", looks like {first.hints[0]}" if first.hints else ""
    if other is None or other.name == first.name:
        before = "everything before it is identical"
    else:
        before = f"before it only rounding, from {other.name} on"
    kind = {ROUNDING: "rounding", SUSPECT: "more than rounding explains, less than a bug would do"}.get(
        first.verdict, first.verdict
    )
    return f"first divergence at {first.name} ({kind}){looks}; {before}{lacking}"


def notes(rows: list[TapRow], reference: Taps, candidate: Taps, truth: Taps | None) -> list[str]:
    extra = [name for name in candidate if name not in reference and name not in PROJECTED.values()]
    remarks = []
    if extra:
        remarks.append(f"the candidate has {len(extra)} taps that the reference has not: {', '.join(extra[:3])}")
    if truth is None and any(row.verdict in (SUSPECT, DIVERGED) for row in rows):
        remarks.append(
            "without a float64 truth there is no budget: a difference that is not the coarser dtype's "
            "rounding is called a divergence above the square root of its epsilon, and else suspect"
        )
    return remarks
