"""The right numbers in another place, in some places alone, or everywhere the same."""

from collections.abc import Iterator
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from ..judge import norm
from ..trace.taps import PHASES
from .evidence import (
    SHARE,
    Evidence,
    Guess,
    by_head,
    explains,
    first,
    gap,
    given,
    is_audio,
    is_text,
    kwargs,
    reproduces,
    rounding,
)

# Order: the same numbers elsewhere.


def another_tap(e: Evidence) -> str | None:
    """Also of a step that was left out: then it is the tap before."""
    return first(
        e,
        (
            (f"the reference's {name} in its place: another stream or direction, or a step left out", x)
            for name, x in e.reference_taps.items()
            if name != e.name and len(x) == len(e.candidate)
        ),
    )


def swapped_rows(e: Evidence) -> str | None:
    width = given(e, e.name.replace(".linear", ".emb"))
    if e.name.endswith(".linear") and width is not None:
        e = e._replace(reference=unrow(e.reference, width), candidate=unrow(e.candidate, width), truth=None)
    if e.reference.ndim != 4 or not e.name.endswith((".linear", "rows")):
        return None
    order = reordering(e, 2)
    return None if order is None else f"modulation rows in another order, {moved(order)}: shift, scale, gate swapped"


def unrow(x: Tensor, like: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, like.shape[-1]))


def permuted_heads(e: Evidence) -> str | None:
    h = by_head(e)
    order = None if h is None else reordering(h, 2)
    return None if order is None else f"heads in another order, {moved(order)}"


def swapped_halves(e: Evidence) -> str | None:
    h = by_head(e)
    return None if h is None else first(h, dealt(h.reference, e.name.endswith(PHASES)))


def dealt(x: Tensor, planes: bool) -> Iterator[Guess]:
    """Other ways to read (B, T, H, d); rotation planes have no halves."""
    yield "components dealt out to heads in turn, (d h) in place of (h d)", rearrange(x, "b t h d -> b t (d h)")
    yield (
        "components of a head from every head, (h d) in place of (d h)",
        rearrange(x.flatten(2), "b t (d h) -> b t h d", h=x.shape[2]),
    )
    if not planes and x.shape[3] % 2 == 0:
        pairs, halves = "b t h (r two)", "b t h (two r)"
        yield "neighbouring pairs in place of halves", rearrange(x, f"{halves} -> {pairs}", two=2)
        yield "halves in place of neighbouring pairs", rearrange(x, f"{pairs} -> {halves}", two=2)
        yield "both halves of each head swapped", x.roll(x.shape[3] // 2, 3)


def axis_major(e: Evidence) -> str | None:
    """Of the table of three axes. Its planes without rotation are the D/2 that three axes do not divide."""
    planes, pad = by_plane(e)
    return (
        None
        if planes is None
        else first(
            e,
            [
                (
                    "frequencies that are axis-major, (p f), in place of frequency-major, (f p)",
                    torch.cat([planes[..., :pad], rearrange(planes[..., pad:], "b t (f p) -> b t (p f)", p=3)], -1),
                )
            ],
        )
    )


def padding_side(e: Evidence) -> str | None:
    planes, pad = by_plane(e)
    return (
        None
        if planes is None
        else first(e, [(f"the {pad} planes without rotation last in place of first", planes.roll(-pad, -1))])
    )


def by_plane(e: Evidence) -> tuple[Tensor | None, int]:
    if not e.name.startswith("rope."):
        return None, 0
    return e.reference.flatten(2), prod(e.reference.shape[2:]) % 3


def reordered_planes(e: Evidence) -> str | None:
    """Of a RoPE table, in no order that has a name."""
    if not e.name.endswith((".cos", ".sin")) or any(
        hint(e) for hint in (axis_major, padding_side, swapped_halves, permuted_heads)
    ):
        return None
    order = reordering(e._replace(reference=e.reference.flatten(2), candidate=e.candidate.flatten(2), truth=None), 2)
    return None if order is None else f"frequencies in another order, {moved(order)}"


def shifted_token(e: Evidence) -> str | None:
    if e.reference.shape[1] < 3:
        return None
    for what, here, there in (("earlier", slice(1, None), slice(None, -1)), ("later", slice(None, -1), slice(1, None))):
        part = e._replace(reference=e.reference[:, here], candidate=e.candidate[:, here], truth=None)
        if explains(part, e.reference[:, there]):
            return f"a shift by one token: each has what the reference has one token {what}"
    return None


def reordered_tokens(e: Evidence) -> str | None:
    """All pairs are compared, of not too many."""
    order = reordering(e, 1) if e.reference.shape[1] <= 4096 else None
    return None if order is None else f"tokens in another order, {moved(order)}"


def reordering(e: Evidence, dim: int) -> list[int] | None:
    """Which of the reference's slices each of the candidate's is; None if they are others, or if some are lost."""
    there, back = nearest(e.candidate, e.reference, dim), nearest(e.reference, e.candidate, dim)
    if not (explains(e, e.reference.index_select(dim, there)) and reproduces(e, e.candidate.index_select(dim, back))):
        return None
    return [int(i) for i in there]


def nearest(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """The index of the slice of y that is most like each slice of x."""
    x, y = (z.double().movedim(dim, 0).flatten(1).nan_to_num() for z in (x, y))
    return torch.cdist(x, y).argmin(1)


def moved(order: list[int]) -> str:
    pairs = [(i, j) for i, j in enumerate(order) if i != j][:4]
    here, there = (", ".join(map(str, x)) for x in zip(*pairs, strict=True))
    return f"at {here} what the reference has at {there}"


# Parts: everything else is right.


def only_some_tokens(e: Evidence) -> str | None:
    return next(
        (f"a difference at {what} alone{one_vector(e, where)}" for what, where in marked(e) if only(e, where)), None
    )


def one_vector(e: Evidence, where: Tensor) -> str:
    difference = (e.candidate.double() - e.reference.double())[where.expand(e.reference.shape[:2])]
    vector = difference.mean(0, keepdim=True)
    same = len(difference) > 1 and gap(vector, difference) <= SHARE * norm(difference)
    return f", of one vector of norm {norm(vector):.3g}: an embedding that one of the two does not add" if same else ""


def marked(e: Evidence) -> Iterator[tuple[str, Tensor]]:
    """What distinguishes some positions, and which (B, T|S)."""
    if not e.inputs or e.reference.ndim < 3:
        return
    stream, text = "audio_" if is_audio(e.name) else "", is_text(e.name)
    mask, timestep = e.inputs.get(stream + "encoder_attention_mask"), e.inputs.get(stream + "timestep")
    keyframes = kwargs(e).get("video_keyframes_mask")
    if text and mask is not None and mask.ndim == 2:
        yield "masked text tokens", mask == 0
    if not text and keyframes is not None and not stream:
        yield "the tokens of keyframes", keyframes[..., 0] > 0
    if not text and timestep is not None:
        yield "tokens of timestep 0", timestep.reshape(len(timestep), -1) == 0


def only_one_batch_element(e: Evidence) -> str | None:
    size = len(e.reference)
    return next(
        (
            f"a difference in element {i} of the batch alone, of {size}"
            for i in range(size)
            if only(e, torch.arange(size)[:, None] == i)
        ),
        None,
    )


def only_one_axis(e: Evidence) -> str | None:
    """Of video's coordinates, and of the frequencies of its RoPE table."""
    if e.name == "video_coords":
        axis = torch.arange(3)
    elif e.name in ("rope.cos", "rope.sin"):
        axis = torch.arange(prod(e.reference.shape[2:])) - by_plane(e)[1]
        axis = torch.where(axis < 0, -1, axis % 3).reshape(e.reference.shape[2:])  # the padding is of no axis
    else:
        return None
    axis = axis.reshape(1, 1, *axis.shape, *[1] * (e.reference.ndim - 2 - axis.ndim))
    return first(
        e,
        (
            (f"a difference on the {name} axis alone", torch.where(axis == i, e.candidate, e.reference))
            for i, name in enumerate(("time", "height", "width"))
        ),
    )


def only(e: Evidence, where: Tensor) -> bool:
    """Does the difference lie where (B, T|1) is True, and only there?"""
    if len(where) != len(e.reference) or where.shape[1] not in (1, e.reference.shape[1]) or where.all():
        return False
    where = where.reshape(*where.shape, *[1] * (e.reference.ndim - 2))
    beyond = gap(e.reference, e.candidate) > rounding(e) * norm(where * e.reference)  # few roundings are anywhere
    return beyond and explains(e, torch.where(where, e.candidate, e.reference))


# Sameness: what should differ does not.


def collapsed_batch(e: Evidence) -> str | None:
    return "all elements of the batch the same, which the reference's are not" if collapsed(e, 0) else None


def collapsed_tokens(e: Evidence) -> str | None:
    return "all tokens the same, which the reference's are not" if collapsed(e, 1) else None


def shared_heads(e: Evidence) -> str | None:
    h = by_head(e)
    return "all heads the same, which the reference's are not" if h is not None and collapsed(h, 2) else None


def collapsed(e: Evidence, dim: int) -> bool:
    """To rounding, and by as much as an explanation has to explain; not because everything is 0."""
    here, there = (gap(x, x.double().mean(dim, keepdim=True)) / (norm(x) or 1.0) for x in (e.candidate, e.reference))
    return here <= min(rounding(e), SHARE * there) and there > rounding(e) and norm(e.candidate) > 0
