"""Gather evidence on the stages in which two implementations differ, and ask the hints what it looks like."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...config import TransformerConfig
from ...interface import LTX2VideoTransformer3DModel
from ..judge import first_divergence, most_of
from ..report.rows import DIVERGED, ORIGINATED, SHAPE, SUSPECT, TapRow
from ..trace.taps import Taps
from ..truth import EMBEDDER_TAPS, Local, for_each_token, spread

NONE: Mapping[str, Tensor] = MappingProxyType({})
FLAT = (".sinusoid", ".emb", ".linear", "rows")  # taps of the shape (B * T|1, ...)
OTHER = {"audio_to_video_attn": "video_to_audio_attn", "video_to_audio_attn": "audio_to_video_attn"}
KEY_TAPS = ("context", "context_rows", "norm_k", "to_v", "k")  # taps of an attention's keys and values


class Evidence(NamedTuple):
    """Everything known about one tap that differs.

    More taps make more hints possible, including the reference's later ones. `gathered` fills in the last six fields.
    """

    name: str
    reference: Tensor
    candidate: Tensor  # same shape, except that an embedder may have B rows, not B * T
    truth: Tensor | None = None  # in float64
    reference_taps: Mapping[str, Tensor] = NONE
    candidate_taps: Mapping[str, Any] = NONE  # those before this one; only tensors are used
    config: TransformerConfig | None = None
    inputs: Mapping[str, Any] | None = None  # the documented arguments of the forward
    model: nn.Module | None = None  # the reference, for its weights
    block: str = ""  # "transformer_blocks.0." if the name is transformer_blocks.0.attn1.q
    layer: str = ""  # "attn1"
    part: str = ""  # "q"
    audio: bool = False  # the tap is about audio's tokens, or audio's text
    text: bool = False  # the tap is about text tokens
    kwargs: Mapping[str, Tensor] = NONE  # the inputs' attention_kwargs


Hint = Callable[[Evidence], str | None]


class Sides(NamedTuple):
    """What the two sides of a comparison were given, and what they computed from it."""

    model: LTX2VideoTransformer3DModel  # the reference, whose weights both have
    inputs: Mapping[str, Any]
    ours: Taps
    theirs: Mapping[str, Any]
    local: Local  # the reference run on the candidate's taps


def stage_evidence(rows: Sequence[TapRow], sides: Sides, true: Taps, exactly: bool) -> dict[str, Evidence]:
    """Return the evidence on every stage at which an error originated, and on the first divergence.

    `true` are the taps in float64.
    """
    found = {row.name: e for row in originating(rows, exactly) if (e := local_evidence(row.name, sides))}
    first = first_divergence(list(rows))
    if first is None or first.name in found or not isinstance(sides.theirs.get(first.name), Tensor):
        return found
    model, inputs, ours, theirs, _ = sides
    x = ours[first.name]
    other = spread(first.name, theirs[first.name], x).cpu()
    if other.shape != x.shape:
        return found
    before = list(ours)[: list(ours).index(first.name)]
    known = {name: theirs[name] for name in before if name in theirs}
    e = Evidence(first.name, x, other, true.get(first.name), ours, known, model.config, inputs, model)
    return {first.name: gathered(e), **found}


def originating(rows: Sequence[TapRow], exactly: bool) -> list[TapRow]:
    """Return the rows at which a cause begins.

    Noise levels for each token in place of one for each batch element begin at the sinusoid, and the shapes of what is
    computed from them follow.
    """
    found = [row for row in rows if originates(row, exactly)]
    each = any(row.verdict == SHAPE and row.name.endswith(".sinusoid") for row in found)
    follow = (*EMBEDDER_TAPS[1:], "rows")
    return [row for row in found if not (each and row.verdict == SHAPE and row.name.endswith(follow))]


def originates(row: TapRow, exactly: bool) -> bool:
    """Tell whether a cause begins at this tap: more than rounding went wrong in this stage alone."""
    if row.verdict == SHAPE or (exactly and row.verdict == DIVERGED and row.origin == ORIGINATED):
        return True
    beyond = row.local_budget is None or not row.local_budget <= most_of(row.name)  # True for a NaN
    return row.verdict in (DIVERGED, SUSPECT) and row.origin == ORIGINATED and beyond


def with_hints(rows: Sequence[TapRow], said: Mapping[str, Mapping[str, str]]) -> list[TapRow]:
    """Add to the first divergence what it looks like: a known mistake, or a pattern in the numbers."""
    first = first_divergence(list(rows))
    return [
        replace(row, hints=(*row.hints, *said[row.name].values())) if row is first and row.name in said else row
        for row in rows
    ]


def local_evidence(name: str, sides: Sides) -> Evidence | None:
    """Return the evidence on one stage alone: both sides have the candidate's own inputs. None without tensors."""
    model, inputs, ours, theirs, local = sides
    if not isinstance(theirs.get(name), Tensor) or name not in local.truth:
        return None
    own = local.reference[name]
    other = spread(name, theirs[name], own).cpu()
    if other.shape != own.shape and not for_each_token(name, other, {name: own}):
        return None
    names = [*local.reference]
    earlier = names[: names.index(name)]
    known = {x: spread(x, y, local.reference[x]).cpu() for x in earlier if isinstance(y := theirs.get(x), Tensor)}
    # In the reference's dtypes: a candidate may mix others in ways that no operation takes.
    known = {x: y.to(ours[x].dtype) for x, y in known.items() if y.shape == local.reference[x].shape}
    own = own.to(torch.promote_types(other.dtype, model.dtype))
    # Later taps are those of a right forward: in `local` they are made from the candidate's wrong one.
    taps = {**ours, **{x: local.reference[x] for x in earlier}, **known, name: own}
    return gathered(Evidence(name, own, other, local.truth[name], taps, known, model.config, inputs, model))


def named(e: Evidence, hints: Sequence[Hint]) -> dict[str, str]:
    """Return the sentences of the hints that have one, by the hints' names and in their order."""
    return what_fits({e.name: gathered(e)}, hints)[e.name]


def what_fits(stages: Mapping[str, Evidence], hints: Sequence[Hint]) -> dict[str, dict[str, str]]:
    """Return what the hints say of each stage, by the hints' names and in their order."""
    # Asked file by file, so that the path of an audit enters each file once; hints do not depend on one another.
    by_file = sorted(hints, key=lambda hint: hint.__module__, reverse=True)
    said = {hint: {name: hint(e) for name, e in stages.items()} for hint in by_file}
    return {
        name: {hint.__name__: sentence for hint in hints if (sentence := said[hint][name]) is not None}
        for name in stages
    }


def gathered(e: Evidence) -> Evidence:
    """Return the evidence by token, with the fields filled in that its name and its inputs determine."""
    rest, _, part = e.name.rpartition(".")
    block, dot, layer = rest.rpartition(".")
    keys = part in KEY_TAPS
    return by_token(e)._replace(
        block=block + dot,
        layer=layer,
        part=part,
        # The keys and values of an exchange come from the other stream.
        audio=(layer == "video_to_audio_attn") != keys if layer in OTHER else "audio" in e.name,
        text="caption" in e.name or (layer.endswith("attn2") and keys),
        kwargs=(e.inputs or {}).get("attention_kwargs") or NONE,
    )


def view(e: Evidence, change: Callable[[Tensor], Tensor]) -> Evidence:
    """Change the shape or the order of the tap on both sides and in its truth."""
    truth = None if e.truth is None else change(e.truth)
    return e._replace(reference=change(e.reference), candidate=change(e.candidate), truth=truth)


def by_token(e: Evidence) -> Evidence:
    """Bring B and T to the front.

    Taps of embedders have the shape (B * T|1, ...), and coordinates (B, P, T, 2).
    """
    if e.name.endswith("_coords"):
        return view(e, lambda x: x.movedim(2, 1))
    if not e.name.endswith(FLAT):
        return e
    size = batch(e) if len(e.reference) % batch(e) == len(e.candidate) % batch(e) == 0 else 1
    e = view(e, lambda x: unflat(x, size))
    shape = torch.broadcast_tensors(e.reference, e.candidate)[0].shape
    return view(e, lambda x: x.expand(shape))


def unflat(x: Tensor, size: int) -> Tensor:
    """Turn (B * T|1, ...) into (B, T|1, ...); rows may already have that shape."""
    return x if x.ndim == 4 else x.unflatten(0, (size, -1))


def batch(e: Evidence) -> int:
    """Return B, which a flat tap alone cannot tell, or 1 if nothing tells it."""
    if e.inputs:
        return len(e.inputs["hidden_states"])
    return next((len(x) for name, x in e.reference_taps.items() if not name.endswith(FLAT)), 1)
