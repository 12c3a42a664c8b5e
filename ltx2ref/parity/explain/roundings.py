"""Explain a difference by other roundings: run the reference on simulated machines that round more often (machines.py).

A tap beyond the band of judge.py may still come from an honest way of computing. Tensor parallelism rounds each part of
a matrix product, and a kernel that stores its logits keeps little of them next to a bias of -10,000. How far this leads
depends on the numbers, so it is measured. It is an explanation and does not widen the budget: it is tried only if a tap
is beyond the band, it has to hold for all such taps, and they become suspect, or get a note, instead of simply passing.
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
FAR = 300  # no machine explains this many budgets, so the slow run under exact arithmetic is skipped
LARGE = 2**22  # models with more parameters than this take too long


class InFloat64(Protocol):
    """Anything that computes taps in float64, given the phases of the taps that are judged."""

    def of(self, taps: Taps) -> Taps: ...


def explain_by_machines(
    rows: Sequence[TapRow],
    forward: Callable[[], Taps],
    truth: InFloat64,
    theirs: Mapping[str, Any],
    true: Mapping[str, Tensor],
) -> list[TapRow]:
    """Downgrade diverged taps to suspect if simulated machines explain all of them.

    A machine explains a tap if the reference, run on that machine, is as far from the truth there. `forward` runs the
    reference, a model or a component. `true` is what `theirs`, the candidate's taps, are measured against. Either all
    diverged taps are explained, and their rows name a machine, or the rows are returned as they are. Phases are never
    explained.
    """
    wrong = [row.name for row in rows if row.verdict == DIVERGED]
    given = {tap: theirs[tap] for tap in wrong}
    budgets = [row.budget or math.inf for row in rows if row.verdict == DIVERGED]
    if not wrong or any(name.endswith(PHASES) for name in wrong) or not all(budget <= FAR for budget in budgets):
        return [*rows]
    if not all(isinstance(x, Tensor) for x in given.values()):  # sketches give only estimates
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
    """Return the note on rows that a machine explains, or nothing if there are no such rows."""
    found = sorted({row.machine for row in rows if row.machine is not None})
    said = f"no farther from float64 than ltx2ref on simulated machines that round more often: {', '.join(found)}"
    return [said] if found else []


def lost_on_machine(forward: Callable[[], Taps], truth: InFloat64, name: str, taps: Sequence[str]) -> dict[str, float]:
    """Return the error of each of these taps of the reference on a simulated machine, as L2 norms."""
    with exact(machine(name)):
        found = forward()
    true = truth.of(found)
    return {tap: norm(found[tap].double() - true[tap]) for tap in taps}
