"""Find everything that a candidate does differently, and how much each difference alone moves the outputs.

A *cause* begins at a tap at which an error originated: the reference, run on the candidate's own numbers, computes
something else there. The same difference in all blocks, in both streams or in both directions of the exchange is one
cause. A cause behind another one is found all the same, because each stage starts from what the candidate had before.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...interface import LTX2VideoTransformer3DModel
from ..exact import exact
from ..judge import CLEARLY
from ..machines import machine
from ..report.rows import BUG, CONVENTION, DIVERGED, ORIGINATED, ROUNDING, SHAPE, SUSPECT, Cause, TapRow, without_block
from ..trace.taps import PHASES, PROJECTED, Taps
from ..truth import CHAINS, FLOOR, SHARE, Deviations, Local, Truth, isolate, norm, spread
from .evidence import Evidence, Hint, local_evidence, what_fits
from .fingerprint import switched_at
from .levels import levels, sines
from .mistakes import own_table
from .roundings import FAR, ROUND_MORE

# Hints on what is one decision of a port, wherever it shows: the same class is used in all attentions and streams.
EVERYWHERE = frozenset(
    {"other_epsilon", "wrong_positions", "wrong_frequencies", "float32_angles", "wrong_rotation", "other_activation"}
)
EXCHANGE = {
    "video_to_audio_attn": "audio_to_video_attn",
    "av_cross_attn_audio_scale_shift": "av_cross_attn_video_scale_shift",
    "av_cross_attn_audio_v2a_gate": "av_cross_attn_video_a2v_gate",
}


@dataclass(eq=False)
class Difference:
    """A cause while it is gathered: where it is, what it looks like, and what it adds to each tap."""

    taps: list[TapRow] = field(default_factory=list)
    hints: tuple[str, ...] = ()
    added: Taps = field(default_factory=dict)  # in float64
    machine: str | None = None  # the simulated machine on which the reference loses as much in these stages
    whole: Taps = field(default_factory=dict)  # where several causes are at one tap: what all of them add together

    @property
    def place(self) -> str:
        """Return the first tap, without the number of its block."""
        return without_block(self.taps[0].name)


def alike(name: str) -> str:
    """Return what the names of corresponding taps have in common: in all blocks, both streams, both directions."""
    parts = [EXCHANGE.get(part, part).removeprefix("audio_") for part in without_block(name).split(".")]
    if parts[-1] in ("cos", "sin"):
        return "rope"
    if parts[-1] in ("video", "audio"):  # a stream as it leaves the block
        return "stream after the block"
    return ".".join(parts)


def origins(
    rows: Sequence[TapRow],
    hints: Sequence[Hint],
    model: LTX2VideoTransformer3DModel,
    inputs: Mapping[str, Any],
    ours: Taps,
    theirs: Mapping[str, Any],
    local: Local,
    exactly: bool = False,
) -> list[Difference]:
    """Return everything that a candidate does differently, in the order of the computation."""
    wrong = [row for row in rows if originates(row, exactly)]
    found: dict[str, Difference] = {}
    known: dict[str, tuple[str, tuple[str, ...]]] = {}  # by place: the key of its cause, and the hints
    for row in wrong:
        e = local_evidence(row.name, model, inputs, ours, theirs, local)
        if e is None:
            found.setdefault(alike(row.name), Difference(hints=row.hints)).taps.append(row)
        elif inherited(e):
            continue
        elif single := noise_levels(e):
            for what, added in single.items():
                cause = add_to(found, general(what, "audio" in row.name), row, (what,), added)
                cause.whole[row.name] = theirs_minus_truth(row.name, theirs, local)
        else:
            place = alike(row.name)
            if place not in known:
                said = what_fits(e, hints)
                known[place] = key_of(place, said), tuple(said.values())
            key, said_here = known[place]
            add_to(found, key, row, said_here, theirs_minus_truth(row.name, theirs, local))
    return [*found.values()]


def key_of(place: str, said: Mapping[str, str]) -> str:
    """Return what a cause at this place has in common with the same cause at others."""
    hint = next(iter(said), "")
    if hint == "factor_per_head":  # the factors differ
        return f"{hint}: {said[hint].partition(': ')[2]}"
    if hint == "wrong_rows" and said[hint].startswith("scale and shift swapped"):  # in queries and in the context
        return f"{hint}: {place.rpartition('.')[0]}"
    return f"{hint}: {said[hint]}" if hint in EVERYWHERE else place


def originates(row: TapRow, exactly: bool) -> bool:
    """Tell whether a cause begins at this tap: more than rounding went wrong in this stage alone."""
    if row.verdict == SHAPE or (exactly and row.verdict == DIVERGED and row.origin == ORIGINATED):
        return True
    most = 1.0 if row.name.endswith(PHASES) else CLEARLY
    beyond = row.local_budget is None or not row.local_budget <= most  # True for a NaN
    return row.verdict in (DIVERGED, SUSPECT) and row.origin == ORIGINATED and beyond


def add_to(found: dict[str, Difference], key: str, row: TapRow, hints: tuple[str, ...], added: Tensor) -> Difference:
    """Add a tap to the cause with this key, and return that cause."""
    cause = found.setdefault(key, Difference(hints=hints))
    cause.taps.append(row)
    cause.added[row.name] = added
    return cause


def theirs_minus_truth(name: str, theirs: Mapping[str, Any], local: Local) -> Tensor:
    """Return what the candidate's stage adds to the right result, in float64 and in the reference's shape."""
    true = local.truth[name].double()
    return spread(name, theirs[name], true).cpu().double() - true


def inherited(e: Evidence) -> bool:
    """Tell whether a RoPE table is right for the candidate's own coordinates, which are the cause."""
    table, coords = own_table(e), e.candidate_taps.get(f"{'audio' if 'audio' in e.name else 'video'}_coords")
    if table is None or coords is None or torch.equal(coords, e.reference_taps.get(f"{e.name}", coords)):
        return False
    made = table.moved(coords.to(table.coords.dtype)).make(e)
    far = norm(e.candidate.double() - e.reference.double())
    return norm(made.double() - e.candidate.double()) < 0.1 * far


def noise_levels(e: Evidence) -> dict[str, Tensor]:
    """Return each single difference of a sinusoid's noise level in words, and what it adds to the sinusoid."""
    own, found = levels(e)
    if own is None or found is None:
        return {}
    right = sines(e, own)
    return {what: (sines(e, level) - right).flatten(0, 1) for what, level in found.differences(own).items()}


def general(what: str, audio: bool) -> str:
    """Return the words on a noise level as they are for the other stream, too: with video's and audio's swapped."""
    what = re.sub(r" \(= [^)]*\)", "", what)
    if " * " in what:  # a factor is one decision, whatever it is applied to
        return re.sub(r"\b(audio_)?(timestep|sigma)\b", "the level", what)
    own = "audio_" if audio else ""
    return re.sub(
        r"\b(audio_)?(timestep|sigma)\b", lambda x: f"{'own' if (x[1] or '') == own else 'other'} {x[2]}", what
    )


def effect(truth: Truth, added: Taps) -> float | None:
    """Return how far the outputs move if the reference, in float64, has this one deviation more."""
    outputs = [name for name in PROJECTED if name in added]
    pure = truth.pure
    moved = truth.moved(carried(added)) if len(outputs) < len(added) else pure
    return max(norm(moved[name] + added.get(name, 0.0) - pure[name]) / (norm(pure[name]) or 1.0) for name in PROJECTED)


def carried(added: Taps) -> Taps:
    """Return deviations in which those of a residual go on through the rest of its block."""
    found = dict(added)
    for name, x in added.items():
        block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
        for chain in CHAINS:
            for _, later in pairwise(chain[chain.index(rest) :] if rest in chain else ()):
                at = f"transformer_blocks.{block}.{later}"
                found[at] = x + found[at] if at in found else x
    return found


def deviations_of(chosen: Sequence[Difference], found: Sequence[Difference], ours: Taps, pure: Taps) -> Deviations:
    """Return what puts the chosen causes, out of all that were found, into the reference.

    `ours` are its taps and `pure` those in float64. Where a phase is changed, the reference gets the exact one: its own
    error, that of another phase, would not do.
    """
    added: Taps = {}
    for cause in chosen:
        for name, x in cause.added.items():
            added[name] = added[name] + x if name in added else x
            if name in cause.whole and all(other in chosen for other in found if name in other.added):
                added[name] = cause.whole[name]
    added = carried(added)
    exact = {name: x + pure[name] - ours[name].double() for name, x in added.items() if name.endswith(PHASES)}
    return Deviations(added | exact, added)


def with_machines(
    found: Sequence[Difference],
    model: LTX2VideoTransformer3DModel,
    inputs: Mapping[str, Any],
    ours: Taps,
    theirs: Mapping[str, Any],
    local: Local,
) -> None:
    """Note which causes without an explanation are no more than a simulated machine loses in the same stages."""
    left = [
        cause
        for cause in found
        if not cause.hints
        and cause.added
        and all((row.local_budget or FAR + 1) <= FAR and not row.name.endswith(PHASES) for row in cause.taps)
    ]
    for name in ROUND_MORE if left else ():
        with exact(machine(name)):
            there = isolate(model, dict(inputs), ours, theirs)
        for cause in left:
            if all(within(x, there.reference[tap], local.truth[tap]) for tap, x in cause.added.items()):
                cause.machine = cause.machine or name


def within(error: Tensor, there: Tensor, true: Tensor) -> bool:
    """Tell whether an error is within the budget that a result on another machine allows."""
    return norm(error) <= SHARE * norm(there.double() - true) + FLOOR * norm(true)


def causes(
    found: Iterable[Difference], truth: Truth, inputs: Mapping[str, Any], conventions: Mapping[str, str]
) -> tuple[Cause, ...]:
    """Return the causes by their effect on the outputs, the largest first.

    `conventions` are the candidate's (fingerprint.py). A cause is one of them if the reference has a switch for it.
    """
    made = []
    for cause in found:
        convention = switched_at(
            conventions, truth.model, inputs, [row.name for row in cause.taps], (cause.hints or ("",))[0]
        )
        errors = [row.local_error for row in cause.taps if row.local_error is not None]
        shares = [row.local_budget for row in cause.taps if row.local_budget is not None]
        hints = cause.hints if convention is None else (f"another convention, {convention}", *cause.hints)
        if cause.machine:
            hints = (f"no more than ltx2ref loses on a simulated machine, {cause.machine}", *hints)
        made.append(
            Cause(
                place=cause.place,
                verdict=ROUNDING if cause.machine else BUG if convention is None else CONVENTION,
                what=hints[0] if hints else None,
                taps=tuple(row.name for row in cause.taps),
                blocks=truth.model.config.num_layers,
                size=max(errors, default=None),
                budget=max(shares, default=None),
                effect=effect(truth, cause.added) if cause.added else None,
                hints=hints,
            )
        )
    return tuple(sorted(made, key=lambda cause: float("inf") if cause.effect is None else cause.effect, reverse=True))


def accepted(found: Iterable[Difference], places: Sequence[str]) -> list[Difference]:
    """Return the causes at these places: a cause's first tap, with or without the number of its block.

    Raises `ValueError` if no cause is at one of them.
    """
    known = {cause.place: cause for cause in found}
    chosen: dict[str, Difference] = {}
    for place in places:
        here = {at: cause for at, cause in known.items() if fnmatchcase(at, without_block(place))}
        if not here:
            raise ValueError(f"--accept {place}: no cause there; there are causes at {', '.join(known) or 'no tap'}")
        chosen |= here
    return [*chosen.values()]
