"""Other roundings: the reference is run on simulated machines that round more often (machines.py).

What is beyond the band of judge.py may still be an honest way of computing: tensor parallelism rounds each part of a
matrix product, and a kernel that stores its logits keeps little of them beside a bias of -10,000. How far that leads
depends on the numbers, so it is measured. It is an explanation, and no wider budget: it is asked for only where a tap
is beyond the band, it has to hold at all of those, and what it explains is suspect, or a note, and not simply passed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from ..exact import exact
from ..machines import machine
from ..report.rows import DIVERGED, SUSPECT, TapRow
from ..trace.taps import PHASES, Taps
from ..truth import FLOOR, SHARE, norm, spread

ROUND_MORE = ("quarters", "eighths", "rounded-logits")
FAR = 300  # budgets that none of them reaches: not worth the time that exact arithmetic takes
LARGE = 2**22  # parameters of a model for which it takes too long


class InFloat64(Protocol):
    def of(self, taps: Taps) -> Taps: ...


def explain_by_machines(
    rows: Sequence[TapRow], forward: Callable[[], Taps], truth: InFloat64, theirs: Mapping[str, Any], true: Taps
) -> list[TapRow]:
    """Make suspect what diverged, with a machine's name, if the reference is as wrong on a machine at each such tap.

    `forward` runs the reference, a model or a component; `true` is what `theirs` are measured against.
    """
    wrong = [row.name for row in rows if row.verdict == DIVERGED]
    given = {tap: theirs[tap] for tap in wrong}
    budgets = [row.budget or math.inf for row in rows if row.verdict == DIVERGED]
    if not wrong or any(name.endswith(PHASES) for name in wrong) or not all(budget <= FAR for budget in budgets):
        return [*rows]
    if not all(isinstance(x, Tensor) for x in given.values()):  # of a sketch the distance is only estimated
        return [*rows]
    lost = {name: lost_on_machine(forward, truth, name, wrong) for name in ROUND_MORE}
    found: dict[str, str] = {}
    for tap in wrong:
        most = max(lost, key=lambda name: lost[name][tap])
        candidate = spread(tap, given[tap].cpu(), true[tap]).double()
        if norm(candidate - true[tap]) <= SHARE * lost[most][tap] + FLOOR * norm(true[tap]):
            found[tap] = most
    if len(found) < len(wrong):
        return [*rows]
    return [replace(row, verdict=SUSPECT, machine=found[row.name]) if row.name in found else row for row in rows]


def machine_notes(rows: Sequence[TapRow]) -> list[str]:
    """Return the note on rows that a machine explains, if there are such rows."""
    found = sorted({row.machine for row in rows if row.machine is not None})
    said = f"no farther from float64 than ltx2ref on simulated machines that round more often: {', '.join(found)}"
    return [said] if found else []


def lost_on_machine(forward: Callable[[], Taps], truth: InFloat64, name: str, taps: Sequence[str]) -> dict[str, float]:
    """Return what the reference loses on a machine, as L2 norms."""
    with exact(machine(name)):
        found = forward()
    true = truth.of(found)
    return {tap: norm(found[tap].double() - true[tap]) for tap in taps}
