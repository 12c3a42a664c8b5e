"""Explain a difference by other conventions: run the reference again, each time with one of them switched."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ...config import TransformerConfig
from ...interface import Conventions, LTX2VideoTransformer3DModel
from ..cases import Inputs
from ..exact import exact
from ..judge import first_divergence
from ..report.rows import DIVERGED, ORIGINATED, ROUNDING, SUSPECT, TapRow, joined_names
from ..run import run
from ..truth import phases, spread


class Explanation(NamedTuple):
    """The conventions to switch so that the first divergence disappears.

    `next` is the tap that differs first after that, or None if none does.
    """

    switches: dict[str, str]
    next: str | None

    def __str__(self) -> str:
        names = ", ".join(f"`{name}` to {value!r}" for name, value in self.switches.items())
        return f"identical to your candidate after switching {names}{f', up to {self.next}' if self.next else ''}"

    def beyond(self, tap: str, ours: Mapping[str, Tensor]) -> bool:
        """Tell whether the switches explain this tap, too."""
        names = [*ours]
        return self.next is None or names.index(self.next) > names.index(tap)


def explain_by_conventions(
    rows: list[TapRow],
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Any],
    exactly: bool,
) -> tuple[list[TapRow], list[str]]:
    """Add to the first divergence the conventions that explain it.

    Returns the rows, and notes on what other switches explain. Under exact arithmetic, RoPE tables with other
    frequencies are recognised by their bits.
    """
    notes = []
    with exact() if exactly else nullcontext():
        why = explanation(model, inputs, ours, theirs)
    if exactly:
        rows = with_other_frequencies(rows, model, inputs, theirs)
        other = [row.name for row in rows if row.verdict == ROUNDING and row.origin == ORIGINATED]
        if other:
            names = joined_names(other, len(model.transformer_blocks))
            notes.append(f"operations in another order, or rounded in other places: {names}")
    first = first_divergence(rows)
    if why is None or first is None:
        return rows, notes
    if not why.beyond(first.name, ours):  # the switches explain only roundings before it
        return rows, [*notes, str(why)]
    said = (f"another convention, {why}", *first.hints)
    return [replace(row, hints=said) if row is first else row for row in rows], notes


def with_other_frequencies(
    rows: list[TapRow], model: LTX2VideoTransformer3DModel, inputs: Inputs, theirs: Mapping[str, Any]
) -> list[TapRow]:
    """Call RoPE tables diverged whose frequencies are float32 instead of float64, or the other way round.

    This works under exact arithmetic only: the budget hardly tells such tables from other ways of rounding an angle,
    but the bits do.
    """
    double = model.config.rope_double_precision
    other = switched(model, config=replace(model.config, rope_double_precision=not double))
    with exact():
        tables = {name: x for name, x in phases(run(other, inputs)).items() if name.endswith((".cos", ".sin"))}
    found = {
        row.name
        for row in rows
        if row.verdict in (ROUNDING, SUSPECT)
        and row.name in tables
        and isinstance(x := theirs.get(row.name), Tensor)
        and torch.equal(tables[row.name], x.cpu())
    }
    hint = f"frequencies computed in float{32 if double else 64}"
    return [replace(row, verdict=DIVERGED, hints=(hint,)) if row.name in found else row for row in rows]


def switched(
    model: LTX2VideoTransformer3DModel, conventions: Conventions | None = None, config: TransformerConfig | None = None
) -> LTX2VideoTransformer3DModel:
    """Return a model that shares these parameters, under other conventions or another configuration."""
    other = object.__new__(type(model))  # `copy.copy` would ask a streamed model for its state
    other.__dict__ = vars(model) | {"conventions": conventions or model.conventions, "config": config or model.config}
    return other


def explanation(
    model: LTX2VideoTransformer3DModel, inputs: Inputs, ours: Mapping[str, Tensor], theirs: Mapping[str, Any]
) -> Explanation | None:
    """Return the conventions that the candidate has in place of the model's.

    Returns None if no switch moves the first divergence. Switches are found one after the other, each judged by the
    bits of all taps up to the next difference.
    """
    conventions, at = model.conventions, divergence(ours, theirs)
    switches: dict[str, str] = {}
    while at is not None:
        found = [
            (step, *far)
            for step in other_conventions(conventions, model, inputs)
            if (far := after(switched(model, replace(conventions, **step)), inputs, theirs, at))
        ]
        if not found:
            break
        step, _, at = max(found, key=lambda x: x[1])
        conventions = replace(conventions, **step)
        switches |= step
    return Explanation(switches, at) if switches else None


def other_conventions(
    conventions: Conventions, model: LTX2VideoTransformer3DModel, x: Inputs
) -> Iterator[dict[str, Any]]:
    """Yield each other value of each convention that can change anything for these inputs.

    A forward can take minutes, so conventions without an effect are not tried.
    """
    narrow = torch.finfo(model.dtype).bits < 32
    acts = {
        "rotation_dtype": narrow,
        "positions_dtype": narrow and x.get("video_coords") is None,
        "text_mask_bias": any(x.get(f"{stream}encoder_attention_mask") is not None for stream in ("", "audio_")),
        "self_mask_bias": (x.get("attention_kwargs") or {}).get("video_self_attention_mask") is not None,
        "exchange": x.get("sigma") is not None,
        "guidance": bool(x.get("spatio_temporal_guidance_blocks")) and not model.config.perturbed_attn,
    }
    for field in fields(conventions):
        for value in get_args(field.type):
            if acts[field.name] and value != getattr(conventions, field.name):
                yield {field.name: value}


def after(
    model: LTX2VideoTransformer3DModel, inputs: Inputs, theirs: Mapping[str, Any], before: str
) -> tuple[int, str | None] | None:
    """Return how many taps are identical before this model diverges, and where it does.

    Returns None if that is no later than at the tap `before`, or if the model has no such tap: a stream is absent.
    """
    taps = run(model, inputs)
    names, at = [*taps], divergence(taps, theirs)
    count = len(names) if at is None else names.index(at)
    return (count, at) if before in names and count > names.index(before) else None


def divergence(ours: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> str | None:
    """Return the first tap, among those that both sides have, whose bits differ."""
    for name, x in ours.items():
        y = theirs.get(name)
        if isinstance(y, Tensor):
            y = spread(name, y.cpu(), x)
            if y.dtype != x.dtype or not torch.equal(x, y):
                return name
    return None
