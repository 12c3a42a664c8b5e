"""Find everything that a candidate does differently, and how much each difference alone moves the outputs.

A *cause* begins at a tap at which an error originated: the reference, run on the candidate's own numbers, computes
something else there. The same difference in all blocks, in both streams or in both directions of the exchange is one
cause. A cause behind another one is found all the same, because each stage starts from what the candidate had before.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from ..exact import exact
from ..machines import machine
from ..report.rows import BUG, CONVENTION, ROUNDING, SHAPE, Cause, TapRow, without_block
from ..run import run
from ..trace.taps import PHASES, Taps
from ..truth import FLOOR, SHARE, Deviations, Truth, carried, isolate, norm, spread
from .conventions import switched
from .evidence import Evidence, Hint, Sides, originating, what_fits
from .fingerprint import switched_at
from .levels import single_differences
from .mistakes import inherited_tables
from .roundings import FAR, ROUND_MORE

# Hints on what is one decision of a port, wherever it shows: the same class is used in all attentions and streams.
EVERYWHERE = frozenset(
    {"other_epsilon", "wrong_positions", "wrong_frequencies", "float32_angles", "wrong_rotation", "other_activation"}
)
EACH = "a noise level for each token, not for each batch element"
EXCHANGE = {
    "video_to_audio_attn": "audio_to_video_attn",
    "av_cross_attn_audio_scale_shift": "av_cross_attn_video_scale_shift",
    "av_cross_attn_audio_v2a_gate": "av_cross_attn_video_a2v_gate",
}


class NoCause(ValueError):
    """There is no cause at a place that is to be accepted."""

    def __init__(self, place: str, known: Sequence[str]) -> None:
        super().__init__(f"--accept {place}: no cause there; there are causes at {', '.join(known) or 'no tap'}")
        self.place = place


@dataclass(eq=False)
class Difference:
    """A cause while it is gathered: where it is, what it looks like, and what it adds to each tap."""

    blocks: int  # how many the model has
    taps: list[TapRow] = field(default_factory=list)
    hints: tuple[str, ...] = ()
    added: Taps = field(default_factory=dict)  # in float64
    switch: str | None = None  # the convention of the reference that it is, such as "exchange = 'other'"
    machine: str | None = None  # the simulated machine on which the reference loses as much in these stages
    whole: Taps = field(default_factory=dict)  # where several causes are at one tap: what all of them add together

    @property
    def place(self) -> str:
        """Return the first tap, with a star for the number of the block if the cause is in all blocks."""
        first = without_block(self.taps[0].name)
        everywhere = sum(without_block(row.name) == first for row in self.taps) == self.blocks
        return first if everywhere else self.taps[0].name


def alike(name: str) -> str:
    """Return what the names of corresponding taps have in common: in all blocks, both streams, both directions."""
    parts = [EXCHANGE.get(part, part).removeprefix("audio_") for part in without_block(name).split(".")]
    if parts[-1] in ("cos", "sin"):
        return "rope"
    if parts[-1] in ("video", "audio"):  # a stream as it leaves the block
        return "stream after the block"
    return ".".join(parts)


def origins(
    rows: Sequence[TapRow], hints: Sequence[Hint], stages: Mapping[str, Evidence], sides: Sides, exactly: bool = False
) -> tuple[list[Difference], dict[str, dict[str, str]]]:
    """Return everything that a candidate does differently, in the order of the computation, and what the hints said.

    `stages` has the evidence on everything that originated, and on the first divergence.
    """
    asked = {alike(name): name for name in reversed([*stages])}  # the first tap of each place
    said = what_fits({name: stages[name] for name in stages if asked[alike(name)] == name}, hints)
    inherited, levels = inherited_tables(stages), single_differences(stages)
    blocks, found = sides.model.config.num_layers, dict[str, Difference]()
    for row in originating(rows, exactly):
        place = alike(row.name)
        if row.name in inherited:
            continue
        if row.name not in stages:
            shapes = (f"a tensor of {row.candidate_shape} in place of {row.shape}",) if row.verdict == SHAPE else ()
            found.setdefault(place, Difference(blocks, hints=(*row.hints, *shapes))).taps.append(row)
        elif row.verdict == SHAPE:  # nothing can be added to the reference's tap
            looks = (*levels.get(row.name, {}), *said[asked[place]].values())
            found.setdefault(place, Difference(blocks, hints=looks or (EACH,))).taps.append(row)
        elif row.name in levels:
            for what, added in levels[row.name].items():
                key = general(what, "audio" in row.name)
                add_to(found, key, Difference(blocks, hints=(what,)), row, added)
                found[key].whole[row.name] = theirs_minus_truth(row.name, sides)
        else:
            known = said[asked[place]]
            new = Difference(blocks, hints=tuple(known.values()))
            add_to(found, key_of(place, known), new, row, theirs_minus_truth(row.name, sides))
    for name in inherited:  # wrong coordinates act through the tables that are made from them
        coords = f"{'audio' if 'audio' in name else 'video'}_coords"
        for cause in found.values():
            if any(row.name == coords for row in cause.taps):
                cause.added[name] = theirs_minus_truth(name, sides)
    return [*found.values()], said


def key_of(place: str, said: Mapping[str, str]) -> str:
    """Return what a cause at this place has in common with the same cause at others."""
    hint = next(iter(said), "")
    if hint == "factor_per_head":  # the factors differ
        return f"{hint}: {said[hint].partition(': ')[2]}"
    if hint == "wrong_rows" and said[hint].startswith("scale and shift swapped"):  # in queries and in the context
        return f"{hint}: {place.rpartition('.')[0]}"
    if hint == "wrong_operand":  # all attentions are of one class, and so are all layers of noise levels
        return f"{place.rpartition('.')[2]}: {said[hint]}"
    return f"{hint}: {said[hint]}" if hint in EVERYWHERE else place


def add_to(found: dict[str, Difference], key: str, new: Difference, row: TapRow, added: Tensor) -> None:
    """Add a tap to the cause with this key, or to a new one."""
    cause = found.setdefault(key, new)
    cause.taps.append(row)
    cause.added[row.name] = added


def theirs_minus_truth(name: str, sides: Sides) -> Tensor:
    """Return what the candidate's stage adds to the right result, in float64 and in the reference's shape."""
    true = sides.local.truth[name].double()
    return spread(name, sides.theirs[name], true).cpu().double() - true


def general(what: str, audio: bool) -> str:
    """Return the words on a noise level as they are for the other stream, too: with video's and audio's swapped."""
    what = re.sub(r" \(= [^)]*\)", "", what)
    if " * " in what:  # a factor is one decision, whatever it is applied to
        return re.sub(r"\b(audio_)?(timestep|sigma)\b", "the level", what)
    own = "audio_" if audio else ""
    return re.sub(
        r"\b(audio_)?(timestep|sigma)\b", lambda x: f"{'own' if (x[1] or '') == own else 'other'} {x[2]}", what
    )


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
    phases = {name: x + pure[name] - ours[name].double() for name, x in added.items() if name.endswith(PHASES)}
    return Deviations(added | phases, added)


def with_machines(found: Sequence[Difference], sides: Sides) -> None:
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
            there = isolate(sides.model, dict(sides.inputs), sides.ours, sides.theirs)
        for cause in left:
            if all(within(x, there.reference[tap], sides.local.truth[tap]) for tap, x in cause.added.items()):
                cause.machine = cause.machine or name


def within(error: Tensor, there: Tensor, true: Tensor) -> bool:
    """Tell whether an error is within the budget that a result on another machine allows."""
    return norm(error) <= SHARE * norm(there.double() - true) + FLOOR * norm(true)


def with_switches(found: Iterable[Difference], sides: Sides, conventions: Mapping[str, str]) -> list[Difference]:
    """Note which causes are a switch of the reference, and return them as one cause for each switch.

    `conventions` are the candidate's (fingerprint.py).
    """
    result: list[Difference] = []
    for cause in found:
        hint = cause.hints[0] if cause.hints else ""
        cause.switch = switched_at(conventions, sides, [row.name for row in cause.taps], hint)
        other = next((x for x in result if cause.switch and x.switch == cause.switch), None)
        if other is None:
            result.append(cause)
        else:
            other.taps += cause.taps
            other.added |= cause.added
            other.whole |= cause.whole
    return result


def effect_of(cause: Difference, truth: Truth) -> float | None:
    """Return how far a cause moves the outputs; None if there is nothing to put into the reference."""
    if not all(x.isfinite().all() for x in cause.added.values()):
        return float("inf")
    if cause.added or cause.switch is None:
        return truth.effect(cause.added) if cause.added else None
    name, _, quoted = cause.switch.partition(" = ")
    value, inputs = quoted.strip("'"), truth.inputs
    if value == "own":  # of the exchange: an argument chooses it
        value, inputs = "argument", {**inputs, "use_cross_timestep": False}
    change: dict[str, Any] = {name: value}
    other = switched(truth.model, replace(truth.model.conventions, **change))
    return truth.far(run(other, inputs, deviations=truth.deviations))


def causes(found: Iterable[Difference], truth: Truth) -> tuple[Cause, ...]:
    """Return the causes by their effect on the outputs, the largest first."""
    made = []
    for cause in found:
        errors = [row.local_error for row in cause.taps if row.local_error is not None]
        shares = [row.local_budget for row in cause.taps if row.local_budget is not None]
        hints = cause.hints
        if cause.switch:
            hints = (f"another convention, {cause.switch}", *hints)
        if cause.machine:
            hints = (f"no more than ltx2ref loses on a simulated machine, {cause.machine}", *hints)
        made.append(
            Cause(
                place=cause.place,
                verdict=ROUNDING if cause.machine else CONVENTION if cause.switch else BUG,
                what=hints[0] if hints else None,
                taps=tuple(row.name for row in cause.taps),
                blocks=truth.model.config.num_layers,
                size=max(errors, default=None),
                budget=max(shares, default=None),
                effect=effect_of(cause, truth),
                hints=hints,
            )
        )
    return tuple(sorted(made, key=lambda cause: float("inf") if cause.effect is None else cause.effect, reverse=True))


def accepted(found: Sequence[Difference], places: Sequence[str]) -> list[Difference]:
    """Return the causes at these places: a cause's first tap, or else any of its taps.

    Raises `NoCause` if no cause is at one of them, and `ValueError` if a cause cannot be put into the reference.
    """
    chosen: list[Difference] = []
    for place in places:
        here = (
            [cause for cause in found if place in (cause.place, without_block(cause.place))]
            or [cause for cause in found if any(place in (row.name, without_block(row.name)) for row in cause.taps)]
            or [cause for cause in found if fnmatchcase(cause.place, place)]
        )
        if not here:
            raise NoCause(place, [cause.place for cause in found])
        for cause in here:
            if not cause.added or not all(x.isfinite().all() for x in cause.added.values()):
                why = "its numbers are not finite" if cause.added else "it has another shape"
                raise ValueError(f"--accept {place}: the reference cannot go on as the candidate does there: {why}")
        chosen += [cause for cause in here if cause not in chosen]
    return chosen
