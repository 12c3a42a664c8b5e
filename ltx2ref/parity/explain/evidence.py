"""Gather evidence on the first tap where two implementations differ, and ask the hints what it looks like."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...config import TransformerConfig
from ...interface import LTX2VideoTransformer3DModel
from ..cases import Inputs
from ..judge import first_divergence
from ..report.rows import TapRow
from ..trace.taps import Taps
from ..truth import Local, spread

NONE: Mapping[str, Tensor] = MappingProxyType({})
FLAT = (".sinusoid", ".emb", ".linear", "rows")  # taps of the shape (B * T|1, ...)
OTHER = {"audio_to_video_attn": "video_to_audio_attn", "video_to_audio_attn": "audio_to_video_attn"}
KEY_TAPS = ("context", "context_rows", "norm_k", "to_v", "k")  # taps of an attention's keys and values


class Evidence(NamedTuple):
    """Everything known about the first tap that differs.

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


def explain_by_hints(
    rows: list[TapRow],
    hints: Sequence[Hint],
    ours: Taps,
    theirs: Mapping[str, Any],
    true: Taps,
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
) -> list[TapRow]:
    """Add to the first divergence what it looks like: a known mistake, or a pattern in the numbers."""
    first = first_divergence(rows)
    other = None if first is None else theirs.get(first.name)
    if first is None or not isinstance(other, Tensor):
        return rows
    name, x = first.name, ours[first.name]
    other = spread(name, other, x).cpu()
    if other.shape != x.shape:
        return rows
    before = list(ours)[: list(ours).index(name)]
    known = {name: theirs[name] for name in before if name in theirs}
    evidence = Evidence(name, x, other, true.get(name), ours, known, model.config, inputs, model)
    said = (*first.hints, *named(evidence, hints).values())
    return [replace(row, hints=said) if row is first else row for row in rows]


def local_evidence(
    name: str,
    model: LTX2VideoTransformer3DModel,
    inputs: Mapping[str, Any],
    ours: Taps,
    theirs: Mapping[str, Any],
    local: Local,
) -> Evidence | None:
    """Return the evidence on one stage alone: both sides have the candidate's own inputs. None without tensors."""
    if not isinstance(theirs.get(name), Tensor) or name not in local.truth:
        return None
    own = local.reference[name]
    other = spread(name, theirs[name], own).cpu()
    if other.shape != own.shape:
        return None
    names = [*local.reference]
    earlier = names[: names.index(name)]
    known = {x: spread(x, y, local.reference[x]).cpu() for x in earlier if isinstance(y := theirs.get(x), Tensor)}
    known = {x: y for x, y in known.items() if y.shape == local.reference[x].shape}
    own = own.to(torch.promote_types(other.dtype, model.proj_in.weight.dtype))
    # Later taps are those of a right forward: in `local` they are made from the candidate's wrong one.
    taps = {**ours, **{x: local.reference[x] for x in earlier}, **known, name: own}
    return gathered(Evidence(name, own, other, local.truth[name], taps, known, model.config, inputs, model))


def named(e: Evidence, hints: Sequence[Hint]) -> dict[str, str]:
    """Return the sentences of the hints that have one, by the hints' names and in their order."""
    return what_fits(gathered(e), hints)


def what_fits(seen: Evidence, hints: Sequence[Hint]) -> dict[str, str]:
    """Return the same for evidence that is gathered already."""
    # Asked file by file, so that the path of an audit enters each file once; hints do not depend on one another.
    said = {hint: hint(seen) for hint in sorted(hints, key=lambda hint: hint.__module__, reverse=True)}
    return {hint.__name__: sentence for hint in hints if (sentence := said[hint]) is not None}


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
