"""What is known where two implementations part, and when a guess explains it."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...config import TransformerConfig
from ..judge import norm
from ..trace.taps import PHASES

NONE: Mapping[str, Tensor] = MappingProxyType({})
FLAT = (".sinusoid", ".emb", ".linear", "rows")  # taps that come as (B * T|1, ...)
OTHER = {"audio_to_video_attn": "video_to_audio_attn", "video_to_audio_attn": "audio_to_video_attn"}
KEYS = ("context", "context_rows", "norm_k", "to_v", "k")  # taps of an attention's keys and values

# An explanation leaves at most a tenth of the difference: 99 % of its energy is gone. A wrong guess adds energy; one
# with a number fitted to each n observations removes 1/n of it by chance, which is why all hints have n > 1.
SHARE = 0.1
# What it leaves is what rounding leaves, relative to the norm: 4 units in the last place, the floor of `verify`.
ULPS = 4
# Of cosines and sines more: a float32 angle of 2**14 rad, and RoPE has such, is off by up to 2**-10.
PHASE = ULPS * 2.0**-10


class Evidence(NamedTuple):
    """The more taps, the more hints; the reference's later ones help as well."""

    name: str
    reference: Tensor
    candidate: Tensor  # of the same shape; of an embedder also B rows where the other has B * T
    truth: Tensor | None = None  # in float64
    reference_taps: Mapping[str, Tensor] = NONE
    candidate_taps: Mapping[str, Any] = NONE  # those before this one; what is no tensor is not looked at
    config: TransformerConfig | None = None
    inputs: Mapping[str, Any] | None = None  # the documented arguments of the forward


Guess = tuple[str, Tensor]  # what the candidate does, and what it then has here


def first(e: Evidence, guesses: Iterable[Guess]) -> str | None:
    """The first guess that explains the candidate."""
    return next((what for what, guess in guesses if explains(e, guess)), None)


def explains(e: Evidence, guess: Tensor) -> bool:
    return is_rather(e, guess, e.candidate, e.reference)


def reproduces(e: Evidence, guess: Tensor) -> bool:
    return is_rather(e, guess, e.reference, e.candidate)


def is_rather(e: Evidence, guess: Tensor, this: Tensor, that: Tensor) -> bool:
    """A NaN is neither."""
    if guess.numel() != this.numel():
        return False
    residual = gap(guess.reshape(this.shape), this)
    return residual < SHARE * gap(that, this) and residual <= rounding(e) * norm(guess)


def mistaken(e: Evidence, ways: Callable[[Evidence], Iterable[Guess]]) -> str | None:
    """What the candidate does in place of what the reference does, both among the `ways` to make this tap.

    The reference makes it from its taps, the candidate from its own: what it has inherited is no mistake of this
    stage. The documented way has no name.
    """
    own = next((what for what, guess in ways(e._replace(candidate_taps=NONE)) if reproduces(e, guess)), None)
    right = next((guess.reshape(e.reference.shape) for what, guess in ways(e) if what == own), e.reference)
    found = next((what for what, guess in ways(e) if is_rather(e, guess, e.candidate, right)), None)
    if own is None or not found:
        return None
    return f"{found} in place of {own}" if own else found


def rounding(e: Evidence) -> float:
    """How far two correct computations of this tap may be apart, relative to its norm."""
    errors = [ULPS * max(torch.finfo(x.dtype).eps for x in (e.reference, e.candidate))]
    if e.name.endswith(PHASES):
        errors.append(PHASE)
    if e.truth is not None:  # the reference's own error; the candidate has one, too
        errors.append(2 * gap(e.reference, e.truth) / (norm(e.truth) or 1.0))
    return max(errors)


def gap(a: Tensor, b: Tensor) -> float:
    return norm(a.double() - b.double())


# Ways to look at a tap.


def view(e: Evidence, change: Callable[[Tensor], Tensor]) -> Evidence:
    truth = None if e.truth is None else change(e.truth)
    return e._replace(reference=change(e.reference), candidate=change(e.candidate), truth=truth)


def by_token(e: Evidence) -> Evidence:
    """B and T in front: embedders' taps come as (B * T|1, ...), coordinates as (B, P, T, 2)."""
    if e.name.endswith("_coords"):
        return view(e, lambda x: x.movedim(2, 1))
    if not e.name.endswith(FLAT):
        return e
    size = batch(e) if len(e.reference) % batch(e) == len(e.candidate) % batch(e) == 0 else 1
    e = view(e, lambda x: unflat(x, size))
    shape = torch.broadcast_tensors(e.reference, e.candidate)[0].shape
    return view(e, lambda x: x.expand(shape))


def unflat(x: Tensor, size: int) -> Tensor:
    """(B * T|1, ...) to (B, T|1, ...); rows may come so already."""
    return x if x.ndim == 4 else x.unflatten(0, (size, -1))


def batch(e: Evidence) -> int:
    """B, which a flat tap alone cannot tell; 1 if nothing does."""
    if e.inputs:
        return len(e.inputs["hidden_states"])
    return next((len(x) for name, x in e.reference_taps.items() if not name.endswith(FLAT)), 1)


def by_head(e: Evidence) -> Evidence | None:
    """(B, T, H, d|R|1), if the tap has heads."""
    part = split(e.name)[2]
    if part in ("q", "k", "sdpa", "cos", "sin"):
        return e
    if part in ("gate", "to_gate_logits"):
        return view(e, lambda x: x[..., None])
    if part in ("norm_q", "norm_k", "to_v") and (heads := number_of_heads(e)):
        return view(e, lambda x: x.unflatten(-1, (heads, -1)))
    return None


def number_of_heads(e: Evidence) -> int:
    """0 if nothing tells."""
    if e.config is not None:
        return e.config.num_attention_heads
    return next((x.shape[2] for name, x in e.reference_taps.items() if name.endswith((".q", ".cos"))), 0)


def given(e: Evidence, name: str) -> Tensor | None:
    """What the candidate computed before, as far as it is known: then its earlier roundings do not count here."""
    ours, theirs = e.reference_taps.get(name), e.candidate_taps.get(name)
    if not isinstance(theirs, Tensor) or (ours is not None and theirs.shape != ours.shape):
        return ours
    return theirs if ours is None else theirs.to(ours)


def split(name: str) -> tuple[str, str, str]:
    """transformer_blocks.0.attn1.q: `transformer_blocks.0.`, `attn1` and `q`."""
    rest, _, part = name.rpartition(".")
    block, dot, layer = rest.rpartition(".")
    return block + dot, layer, part


def is_text(name: str) -> bool:
    _, layer, part = split(name)
    return "caption" in name or (layer.endswith("attn2") and part in KEYS)


def is_audio(name: str) -> bool:
    """Of audio's tokens, or of its text. The keys and values of an exchange are the other stream's."""
    _, layer, part = split(name)
    if layer in OTHER:
        return (layer == "video_to_audio_attn") != (part in KEYS)
    return "audio" in name


def kwargs(e: Evidence) -> Mapping[str, Tensor]:
    return (e.inputs or {}).get("attention_kwargs") or NONE


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
