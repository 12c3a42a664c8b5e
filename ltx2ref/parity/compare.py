"""Compare two implementations tap by tap: where they first differ, by how much, and whether rounding explains it.

Every audit goes through `compare_forwards`: the truth, the judge, the three explanations and the report, once each.

Where there is a float64 truth, only the budget in judge.py decides between rounding and a bug. Without a truth, a
difference counts as a divergence if it affects more than half of the digits of the coarser dtype (a relative L2 norm
above the square root of its epsilon). A smaller one is suspect.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..interface import LTX2VideoTransformer3DModel
from .cases import Inputs
from .exact import exact
from .explain.causes import accepted, causes, deviations_of, origins, with_machines, with_switches
from .explain.conventions import explain_by_conventions
from .explain.evidence import Sides, stage_evidence, with_hints
from .explain.fingerprint import followed_conventions
from .explain.hints import HINTS
from .explain.roundings import LARGE, explain_by_machines, machine_notes
from .judge import AnyTaps, Standard, judge_taps, remarks, rounded_phases
from .report.assemble import assemble
from .report.rows import DIVERGED, Report, TapRow
from .run import run
from .trace.given import require_common
from .trace.taps import PROJECTED, Taps
from .truth import NO_DEVIATIONS, Deviations, Local, Truth, isolate, norm, unseen


def compare(
    reference: AnyTaps,
    candidate: AnyTaps,
    truth: AnyTaps | None = None,
    local: Local | None = None,
    candidate_truth: AnyTaps | None = None,
    bounds: AnyTaps | None = None,
    slack: Mapping[str, float] | None = None,
    least: Mapping[str, float] | None = None,
) -> Report:
    """Return the report on a candidate's taps, in the order of the reference's.

    `truth` holds the taps in float64. `local` is the reference run on the candidate's own taps, which tells where an
    error originated. `candidate_truth` is the truth for a candidate whose phases differ from the reference's. `bounds`
    hold the permitted error of each element of a sinusoid, or of a RoPE table made from float32 frequencies; `least`
    the smallest error that the other RoPE tables' budgets assume (see truth.py). `slack` is added to a tap's budget.
    `least` and `slack` are L2 norms.

    Raises `ValueError` if both sides have no tap in common.
    """
    require_common(reference, candidate)
    standard = Standard(truth or {}, candidate_truth or {}, bounds or {}, slack or {}, least=least or {})
    rows = judge_taps(reference, candidate, standard, local)
    return assemble(rows, remarks(rows, reference, candidate, truth))


def compare_forwards(
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    ours: Taps,
    theirs: Mapping[str, Any],
    exactly: bool = False,
    accept: Sequence[str] = (),
) -> Report:
    """Compare taps of this model with those that a candidate computed with its weights, here or elsewhere.

    `ours` and `theirs` are taps by our names, computed from the same `inputs`. `exactly` says that both were computed
    under exact arithmetic. Causes at the places `accept` are put into the reference, which goes on from there as the
    candidate does. Returns the report, with causes, hints, conventions, and machines that explain a difference.

    Raises `ValueError` if a place in `accept` is not that of a cause.
    """
    if all(isinstance(theirs.get(name), Tensor) and torch.equal(x, theirs[name].cpu()) for name, x in ours.items()):
        sides = Sides(model, inputs, ours, theirs, Local(ours, ours))
        return replace(compare(ours, theirs), conventions=followed_conventions(sides))

    judged = judge_forwards(model, inputs, ours, theirs, exactly)
    theirs = {**theirs, **judged.queries}
    notes = [f"q holds the scale of attention in {len(judged.queries)} attentions: divided out"] * bool(judged.queries)
    if accept:
        sides = Sides(model, inputs, ours, theirs, judged.local)
        stages = stage_evidence(judged.rows, sides, judged.true, exactly)
        every, _ = origins(judged.rows, HINTS, stages, sides, exactly)
        every = with_switches(every, sides, followed_conventions(sides))
        found = accepted(every, accept)
        deviations = deviations_of(found, every, ours, judged.truth.pure)
        with exact() if exactly else nullcontext():
            moved = run(model, inputs, deviations=deviations.reference)
        ours = {name: moved[name] for name in ours}
        judged = judge_forwards(model, inputs, ours, theirs, exactly, deviations)
        notes += [
            f"accepted: {cause.place}: {cause.hints[0] if cause.hints else 'like nothing known'}" for cause in found
        ]
    rows = judged.rows
    notes = [*remarks(rows, ours, theirs, judged.true), *notes]
    machines = not exactly and sum(x.numel() for x in model.parameters()) <= LARGE
    if machines:
        rows = explain_by_machines(rows, lambda: run(model, inputs), judged.truth, theirs, judged.candidate_true)
        notes += machine_notes(rows)
    rows, said = explain_by_conventions(rows, model, inputs, ours, theirs, exactly)
    sides = Sides(model, inputs, ours, theirs, judged.local)
    found, hints = origins(rows, HINTS, stage_evidence(rows, sides, judged.true, exactly), sides, exactly)
    if not any(name in ours and name not in PROJECTED for name in theirs):
        found = []  # outputs alone cannot tell where a difference begins
    if machines and not all(row.machine for row in rows if row.verdict == DIVERGED):
        with_machines(found, sides)
    conventions = followed_conventions(sides)
    return replace(
        assemble(with_hints(rows, hints), [*notes, *said]),
        causes=causes(with_switches(found, sides, conventions), judged.truth),
        conventions=conventions,
    )


class Judged(NamedTuple):
    """The rows of a comparison, and everything that they were measured against."""

    rows: list[TapRow]
    truth: Truth
    true: Taps  # in float64, given the reference's phases
    candidate_true: Taps  # the same, given the candidate's
    local: Local
    standard: Standard
    queries: Taps  # those of the candidate that held the scale of attention, without it


def judge_forwards(
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    ours: Taps,
    theirs: Mapping[str, Any],
    exactly: bool,
    deviations: Deviations = NO_DEVIATIONS,
) -> Judged:
    """Judge every tap, each against its own truth, and each stage alone. `deviations` are put into the reference."""
    queries = unscaled(ours, theirs)
    truth = Truth(model, inputs, deviations.truth)
    theirs = {**theirs, **queries}
    with exact() if exactly else nullcontext():
        local = isolate(model, inputs, ours, theirs, exactly, deviations)
    slack = unseen(truth, ours, theirs) | {name: torch.finfo(x.dtype).eps * norm(x) for name, x in queries.items()}
    true = truth.of(ours)
    standard = Standard(true, bounds=truth.bounds, slack=slack, least=truth.least)
    if phases := rounded_phases(ours, theirs, standard):
        standard = standard._replace(candidate_true=truth.of(ours | phases))
    rows = judge_taps(ours, theirs, standard, local)
    return Judged(rows, truth, true, dict(standard.candidate_true or true), local, standard, queries)


def unscaled(ours: Taps, theirs: Mapping[str, Any]) -> Taps:
    """Return, with the scale divided out, those queries of the candidate that already contain the scale of attention.

    Some implementations multiply q by the scale themselves. That is no error where their attention is right.
    """
    found: Taps = {}
    for name in (name for name in ours if name.endswith(".q")):
        at = f"{name.removesuffix('.q')}.sdpa"
        x, y = theirs.get(name), theirs.get(at)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and at in ours:
            scale = x.shape[-1] ** -0.5
            if close(ours[name].double() * scale, x) and close(ours[at].double(), y):
                found[name] = (x.double() / scale).to(x.dtype)
    return found


def close(a: Tensor, b: Tensor) -> bool:
    """Tell whether `b` differs from `a`, a float64 tensor, by less than half of the digits of b's dtype."""
    return a.shape == b.shape and norm(a - b.cpu().double()) <= torch.finfo(b.dtype).eps ** 0.5 * norm(a)
