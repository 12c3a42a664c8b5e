"""Evidence of where two implementations part, gathered once, and the hints that speak of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import TransformerConfig
from ..cases import Inputs
from ..judge import first_divergence
from ..report.rows import TapRow
from ..trace.taps import Taps
from ..truth import spread

NONE: Mapping[str, Tensor] = MappingProxyType({})
FLAT = (".sinusoid", ".emb", ".linear", "rows")  # taps that come as (B * T|1, ...)
OTHER = {"audio_to_video_attn": "video_to_audio_attn", "video_to_audio_attn": "audio_to_video_attn"}
KEY_TAPS = ("context", "context_rows", "norm_k", "to_v", "k")  # of an attention's keys and values


class Evidence(NamedTuple):
    """What is known of the first tap that differs. The more taps, the more hints; the reference's later taps help, too.

    `gathered` fills in the last six fields.
    """

    name: str
    reference: Tensor
    candidate: Tensor  # of the same shape; of an embedder also B rows where the other has B * T
    truth: Tensor | None = None  # in float64
    reference_taps: Mapping[str, Tensor] = NONE
    candidate_taps: Mapping[str, Any] = NONE  # those before this one; what is no tensor is not looked at
    config: TransformerConfig | None = None
    inputs: Mapping[str, Any] | None = None  # the documented arguments of the forward
    block: str = ""  # of transformer_blocks.0.attn1.q: "transformer_blocks.0."
    layer: str = ""  # "attn1"
    part: str = ""  # "q"
    audio: bool = False  # a tap of audio's tokens, or of its text
    text: bool = False  # a tap of text tokens
    kwargs: Mapping[str, Tensor] = NONE  # the inputs' attention_kwargs


Hint = Callable[[Evidence], str | None]


def explain_by_hints(
    rows: list[TapRow],
    hints: Sequence[Hint],
    ours: Taps,
    theirs: Mapping[str, Any],
    true: Taps,
    config: TransformerConfig,
    inputs: Inputs,
) -> list[TapRow]:
    """Add to the first divergence what it looks like: the mistakes that ports make, and what the numbers show."""
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
    evidence = Evidence(name, x, other, true.get(name), ours, known, config, inputs)
    said = (*first.hints, *named(evidence, hints).values())
    return [replace(row, hints=said) if row is first else row for row in rows]


def named(e: Evidence, hints: Sequence[Hint]) -> dict[str, str]:
    """Return what the hints say, by their names and in their order: the most specific first."""
    seen = gathered(e)
    said = {hint: hint(seen) for hint in sorted(hints, key=lambda hint: hint.__module__, reverse=True)}  # by files
    return {hint.__name__: sentence for hint in hints if (sentence := said[hint]) is not None}


def gathered(e: Evidence) -> Evidence:
    """Return the evidence by token, with everything that its name and its inputs say."""
    rest, _, part = e.name.rpartition(".")
    block, dot, layer = rest.rpartition(".")
    keys = part in KEY_TAPS
    return by_token(e)._replace(
        block=block + dot,
        layer=layer,
        part=part,
        # The keys and values of an exchange are the other stream's.
        audio=(layer == "video_to_audio_attn") != keys if layer in OTHER else "audio" in e.name,
        text="caption" in e.name or (layer.endswith("attn2") and keys),
        kwargs=(e.inputs or {}).get("attention_kwargs") or NONE,
    )


def view(e: Evidence, change: Callable[[Tensor], Tensor]) -> Evidence:
    """Change the shape or the order of the tap, on both sides and in its truth."""
    truth = None if e.truth is None else change(e.truth)
    return e._replace(reference=change(e.reference), candidate=change(e.candidate), truth=truth)


def by_token(e: Evidence) -> Evidence:
    """Bring B and T to the front: embedders' taps come as (B * T|1, ...), coordinates as (B, P, T, 2)."""
    if e.name.endswith("_coords"):
        return view(e, lambda x: x.movedim(2, 1))
    if not e.name.endswith(FLAT):
        return e
    size = batch(e) if len(e.reference) % batch(e) == len(e.candidate) % batch(e) == 0 else 1
    e = view(e, lambda x: unflat(x, size))
    shape = torch.broadcast_tensors(e.reference, e.candidate)[0].shape
    return view(e, lambda x: x.expand(shape))


def unflat(x: Tensor, size: int) -> Tensor:
    """Turn (B * T|1, ...) into (B, T|1, ...), in which rows may come already."""
    return x if x.ndim == 4 else x.unflatten(0, (size, -1))


def batch(e: Evidence) -> int:
    """Return B, which a flat tap alone cannot tell; 1 if nothing does."""
    if e.inputs:
        return len(e.inputs["hidden_states"])
    return next((len(x) for name, x in e.reference_taps.items() if not name.endswith(FLAT)), 1)
