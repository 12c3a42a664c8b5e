"""Recognise patterns in the numbers themselves, and decide when a guess explains a difference.

A hint is given only if it explains the difference: it repeats a mistake on the reference's numbers, and this must
reproduce the candidate's (see `explains`). Its sentence says what the candidate has, with the number that was found.
"""

from collections.abc import Callable, Iterable, Iterator
from math import prod

import torch
from einops import rearrange
from torch import Tensor

from ..trace.taps import PHASES
from ..truth import norm
from .evidence import Evidence, view

# When does a guess explain a difference?

# An explanation leaves at most a tenth of the difference, so that 99 % of its energy is gone. A wrong guess adds
# energy, but one with a number fitted to every n observations removes 1/n of it by chance; so all hints have n > 1.
UNEXPLAINED = 0.1
# It may leave no more than rounding would, relative to the norm: 4 units in the last place, the floor of `verify`.
ULPS = 4
# Cosines and sines may be off by more: RoPE's angles reach 2**14 rad, where a float32 is off by up to 2**-10.
PHASE = ULPS * 2.0**-10

Guess = tuple[str, Tensor]  # a mistake in words, and the tap that it produces


def first_explaining(e: Evidence, guesses: Iterable[Guess]) -> str | None:
    """Return the words of the first guess that explains the candidate, or None."""
    return next((what for what, guess in guesses if explains(e, guess)), None)


def explains(e: Evidence, guess: Tensor) -> bool:
    """Tell whether a guess is the candidate up to rounding, and clearly not the reference."""
    return is_rather(e, guess, e.candidate, e.reference)


def reproduces(e: Evidence, guess: Tensor) -> bool:
    """Tell whether a guess is the reference up to rounding, and clearly not the candidate."""
    return is_rather(e, guess, e.reference, e.candidate)


def is_rather(e: Evidence, guess: Tensor, this: Tensor, that: Tensor) -> bool:
    """Tell whether a guess is `this` up to rounding, and clearly not `that`; a NaN is neither."""
    if guess.numel() != this.numel():
        return False
    residual = gap(guess.reshape(this.shape), this)
    return residual < UNEXPLAINED * gap(that, this) and residual <= rounding(e) * norm(guess)


def rounding(e: Evidence) -> float:
    """Return how far apart two correct computations of this tap may be, relative to its norm."""
    errors = [ULPS * max(torch.finfo(x.dtype).eps for x in (e.reference, e.candidate))]
    if e.name.endswith(PHASES):
        errors.append(PHASE)
    if e.truth is not None:  # twice the reference's own error, because the candidate has one, too
        errors.append(2 * gap(e.reference, e.truth) / (norm(e.truth) or 1.0))
    return max(errors)


def gap(a: Tensor, b: Tensor) -> float:
    """Return the L2 norm of the difference of two tensors, in float64."""
    return norm(a.double() - b.double())


def by_head(e: Evidence) -> Evidence | None:
    """Return the evidence in the shape (B, T, H, d|R|1), or None if the tap has no heads."""
    part = e.part
    if part in ("q", "k", "sdpa", "cos", "sin"):
        return e
    if part in ("gate", "to_gate_logits"):
        return view(e, lambda x: x[..., None])
    if part in ("norm_q", "norm_k", "to_v") and (heads := number_of_heads(e)):
        return view(e, lambda x: x.unflatten(-1, (heads, -1)))
    return None


def number_of_heads(e: Evidence) -> int:
    """Return the number of heads, or 0 if it is not known."""
    if e.config is not None:
        return e.config.num_attention_heads
    return next((x.shape[2] for name, x in e.reference_taps.items() if name.endswith((".q", ".cos"))), 0)


# Order: the numbers are right, but in other places.


def another_tap(e: Evidence) -> str | None:
    """Recognise another tap of the reference in this place.

    If a step was left out, that is the tap before.
    """
    return first_explaining(
        e,
        (
            (f"the reference's {name} in its place: another stream or direction, or a step left out", x)
            for name, x in e.reference_taps.items()
            if name != e.name and len(x) == len(e.candidate)
        ),
    )


def swapped_rows(e: Evidence) -> str | None:
    """Recognise rows of modulation in another order."""
    embedding = e.name.replace(".linear", ".emb")
    width = e.reference_taps.get(embedding, e.candidate_taps.get(embedding))
    if e.name.endswith(".linear") and isinstance(width, Tensor):
        e = e._replace(reference=unrow(e.reference, width), candidate=unrow(e.candidate, width), truth=None)
    if e.reference.ndim != 4 or not e.name.endswith((".linear", "rows")):
        return None
    order = reordering(e, 2)
    if order is None:
        return None
    return f"modulation rows in another order, {order_in_words(order)}: shift, scale or gate swapped"


def unrow(x: Tensor, like: Tensor) -> Tensor:
    """Split the last dimension into rows of the width of `like`."""
    rows: Tensor = x.unflatten(-1, (-1, like.shape[-1]))
    return rows


def permuted_heads(e: Evidence) -> str | None:
    """Recognise heads in another order."""
    h = by_head(e)
    order = None if h is None else reordering(h, 2)
    return None if order is None else f"heads in another order, {order_in_words(order)}"


def swapped_halves(e: Evidence) -> str | None:
    """Recognise heads that were split or paired in another way."""
    h = by_head(e)
    return None if h is None else first_explaining(h, dealt(h.reference, e.name.endswith(PHASES)))


def dealt(x: Tensor, planes: bool) -> Iterator[Guess]:
    """Yield other ways to read (B, T, H, d).

    `planes` says that the last dimension holds rotation planes, which have no halves.
    """
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
    """Recognise frequencies ordered by axis.

    Planes that three axes do not divide evenly are padding without rotation, and stay first.
    """
    planes, pad = by_plane(e)
    if planes is None:
        return None
    guess = torch.cat([planes[..., :pad], rearrange(planes[..., pad:], "b t (f p) -> b t (p f)", p=3)], -1)
    what = "frequencies that are axis-major, (p f), in place of frequency-major, (f p)"
    return first_explaining(e, [(what, guess)])


def padding_side(e: Evidence) -> str | None:
    """Recognise planes without rotation at the end instead of at the beginning."""
    planes, pad = by_plane(e)
    if planes is None:
        return None
    what = f"the {pad} planes without rotation at the end in place of the beginning"
    return first_explaining(e, [(what, planes.roll(-pad, -1))])


def by_plane(e: Evidence) -> tuple[Tensor | None, int]:
    """Return the video's RoPE table with all planes in one dimension, and how many of them are padding."""
    if not e.name.startswith("rope."):
        return None, 0
    return e.reference.flatten(2), prod(e.reference.shape[2:]) % 3


def reordered_planes(e: Evidence) -> str | None:
    """Recognise planes of a RoPE table in an order that has no name."""
    if not e.name.endswith((".cos", ".sin")) or any(
        hint(e) for hint in (axis_major, padding_side, swapped_halves, permuted_heads)
    ):
        return None
    order = reordering(e._replace(reference=e.reference.flatten(2), candidate=e.candidate.flatten(2), truth=None), 2)
    return None if order is None else f"frequencies in another order, {order_in_words(order)}"


def shifted_token(e: Evidence) -> str | None:
    """Recognise a shift by one token."""
    if e.reference.shape[1] < 3:
        return None
    for what, here, there in (("earlier", slice(1, None), slice(None, -1)), ("later", slice(None, -1), slice(1, None))):
        part = e._replace(reference=e.reference[:, here], candidate=e.candidate[:, here], truth=None)
        if explains(part, e.reference[:, there]):
            return f"a shift by one token: each has what the reference has one token {what}"
    return None


def reordered_tokens(e: Evidence) -> str | None:
    """Recognise tokens in another order.

    All pairs are compared, so long sequences are left out.
    """
    order = reordering(e, 1) if e.reference.shape[1] <= 4096 else None
    return None if order is None else f"tokens in another order, {order_in_words(order)}"


def reordering(e: Evidence, dim: int) -> list[int] | None:
    """Return for each of the candidate's slices the index of the reference's slice that it is.

    Returns None if any slice is changed or lost.
    """
    there, back = nearest(e.candidate, e.reference, dim), nearest(e.reference, e.candidate, dim)
    if not (explains(e, e.reference.index_select(dim, there)) and reproduces(e, e.candidate.index_select(dim, back))):
        return None
    return [int(i) for i in there]


def nearest(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Return, for each slice of x, the index of the slice of y nearest to it."""
    x, y = (z.double().movedim(dim, 0).flatten(1).nan_to_num() for z in (x, y))
    return torch.cdist(x, y).argmin(1)


def order_in_words(order: list[int]) -> str:
    """Describe a permutation by up to four of its changes."""
    pairs = [(i, j) for i, j in enumerate(order) if i != j][:4]
    here, there = (", ".join(map(str, x)) for x in zip(*pairs, strict=True))
    return f"at {here} what the reference has at {there}"


# Parts: only some of the tap is wrong.


def only_some_tokens(e: Evidence) -> str | None:
    """Recognise a difference at masked, keyframe or clean tokens only."""
    return next(
        (f"a difference at {what} alone{one_vector(e, where)}" for what, where in marked(e) if only(e, where)), None
    )


def one_vector(e: Evidence, where: Tensor) -> str:
    """Say whether the difference is the same vector at all of these tokens."""
    difference = (e.candidate.double() - e.reference.double())[where.expand(e.reference.shape[:2])]
    vector = difference.mean(0, keepdim=True)
    same = len(difference) > 1 and gap(vector, difference) <= UNEXPLAINED * norm(difference)
    return f", of one vector of norm {norm(vector):.3g}: an embedding that only one of the two adds" if same else ""


def marked(e: Evidence) -> Iterator[tuple[str, Tensor]]:
    """Yield what distinguishes some tokens, in words, and a mask (B, T|S) of these tokens."""
    if not e.inputs or e.reference.ndim < 3:
        return
    stream, text = "audio_" if e.audio else "", e.text
    mask, timestep = e.inputs.get(stream + "encoder_attention_mask"), e.inputs.get(stream + "timestep")
    keyframes = e.kwargs.get("video_keyframes_mask")
    if text and mask is not None and mask.ndim == 2:
        yield "masked text tokens", mask == 0
    if not text and keyframes is not None and not stream:
        yield "the tokens of keyframes", keyframes[..., 0] > 0
    if not text and timestep is not None:
        yield "tokens of timestep 0", timestep.reshape(len(timestep), -1) == 0


def only_one_batch_element(e: Evidence) -> str | None:
    """Recognise a difference in one element of the batch only."""
    size = len(e.reference)
    return next(
        (
            f"a difference only in element {i} of the batch of {size}"
            for i in range(size)
            if only(e, torch.arange(size)[:, None] == i)
        ),
        None,
    )


def only_one_axis(e: Evidence) -> str | None:
    """Recognise a difference on one axis of the video's coordinates, or of its RoPE table."""
    if e.name == "video_coords":
        axis = torch.arange(3)
    elif e.name in ("rope.cos", "rope.sin"):
        axis = torch.arange(prod(e.reference.shape[2:])) - by_plane(e)[1]
        axis = torch.where(axis < 0, -1, axis % 3).reshape(e.reference.shape[2:])  # padding belongs to no axis
    else:
        return None
    axis = axis.reshape(1, 1, *axis.shape, *[1] * (e.reference.ndim - 2 - axis.ndim))
    return first_explaining(
        e,
        (
            (f"a difference on the {name} axis alone", torch.where(axis == i, e.candidate, e.reference))
            for i, name in enumerate(("time", "height", "width"))
        ),
    )


def only_one_bound(e: Evidence) -> str | None:
    """Recognise coordinates (B, T, P, 2) whose starts, or whose ends, alone differ."""
    if not e.name.endswith("_coords"):
        return None
    bound = torch.arange(2).reshape(1, 1, 1, 2)
    guesses = (
        (f"a difference in the {what} of patches alone", torch.where(bound == i, e.candidate, e.reference))
        for i, what in enumerate(("starts", "ends"))
    )
    return first_explaining(e, guesses)


def only(e: Evidence, where: Tensor) -> bool:
    """Tell whether the tap differs where the mask `where`, (B, T|1), is True, and nowhere else."""
    if len(where) != len(e.reference) or where.shape[1] not in (1, e.reference.shape[1]) or where.all():
        return False
    where = where.reshape(*where.shape, *[1] * (e.reference.ndim - 2))
    # A difference no larger than rounding could be at these tokens by chance.
    beyond = gap(e.reference, e.candidate) > rounding(e) * norm(where * e.reference)
    return beyond and explains(e, torch.where(where, e.candidate, e.reference))


# Collapse: slices that should differ are the same.


def collapsed_batch(e: Evidence) -> str | None:
    """Recognise elements of the batch that are all the same."""
    return "all elements of the batch being the same, unlike the reference's" if collapsed(e, 0) else None


def collapsed_tokens(e: Evidence) -> str | None:
    """Recognise tokens that are all the same."""
    return "all tokens being the same, unlike the reference's" if collapsed(e, 1) else None


def shared_heads(e: Evidence) -> str | None:
    """Recognise heads that are all the same."""
    h = by_head(e)
    return "all heads being the same, unlike the reference's" if h is not None and collapsed(h, 2) else None


def collapsed(e: Evidence, dim: int) -> bool:
    """Tell whether the candidate is the same along a dimension, up to rounding, where the reference is not.

    A candidate that is 0 everywhere does not count.
    """
    here, there = (gap(x, x.double().mean(dim, keepdim=True)) / (norm(x) or 1.0) for x in (e.candidate, e.reference))
    return here <= min(rounding(e), UNEXPLAINED * there) and there > rounding(e) and norm(e.candidate) > 0


# Fitted numbers: a factor or an offset.


def not_finite(e: Evidence) -> str | None:
    """Recognise NaNs and infinities that the reference does not have."""
    wrong = e.reference.isfinite() & ~e.candidate.isfinite()
    if not wrong.any():
        return None
    return (
        f"{int(wrong.sum())} of {wrong.numel()} numbers that are not finite, the first at "
        f"{tuple(wrong.nonzero()[0].tolist())}: an overflow, or a softmax over nothing"
    )


def constant_factor(e: Evidence) -> str | None:
    """Recognise one factor for the whole tap."""
    factor = slope(e.reference, e.candidate).item()
    if not explains(e, factor * e.reference.double()):
        return None
    known = (f"{x:.4g}: {what}" for x, what in meanings(e) if abs(factor - x) <= rounding(e) * abs(x))
    return f"a constant factor of {next(known, f'{factor:.4g}')}"


def meanings(e: Evidence) -> Iterator[tuple[float, str]]:
    """Yield factors that have a known cause, with that cause in words."""
    yield 0.0, "never computed, or with weights that were never loaded"
    yield -1.0, "another sign"
    yield from ((factor, "a scale applied twice, or not at all (multiplier 1000)") for factor in (1000.0, 1e-3))
    if e.part in ("gate", "to_gate_logits", "to_out"):
        yield from ((factor, "the 2 of a gate, 2 * sigmoid, applied twice, or not at all") for factor in (2.0, 0.5))
    sizes = {e.config.attention_head_dim, e.config.audio_attention_head_dim} if e.config else set()
    if e.name.endswith((".q", ".k", ".sdpa")):
        sizes.add(e.reference.shape[-1])
    for size in sorted(sizes):
        yield size**0.5, f"sqrt(head_dim) of {size}: the scale of attention applied twice, or not at all"
        yield size**-0.5, f"1 / sqrt(head_dim) of {size}: the scale of attention applied twice, or not at all"


def scaled_weight(e: Evidence) -> str | None:
    """Recognise a linear layer's output whose product lacks a scale while its bias is right."""
    if tokens(e) < 3 or e.name.endswith(PHASES) or constant_factor(e) or constant_vector(e):
        return None
    x, y = (z.double() - z.double().mean((0, 1), keepdim=True) for z in (e.reference, e.candidate))
    factor = slope(x, y)
    offset = (e.candidate.double() - factor * e.reference.double()).mean((0, 1), keepdim=True)
    if not explains(e, factor * e.reference.double() + offset):
        return None
    what = f"a constant factor of {factor.item():.4g}"
    return f"{what} for everything but the bias: its weight or its input, without a scale"


def constant_vector(e: Evidence) -> str | None:
    """Recognise one vector that is missing from, or added to, every token."""
    vector = (e.candidate.double() - e.reference.double()).mean((0, 1), keepdim=True)
    if tokens(e) < 2 or e.name.endswith(PHASES) or not explains(e, e.reference.double() + vector):
        return None
    known = [
        name
        for name, x in e.reference_taps.items()
        if x.numel() == vector.numel()
        and min(gap(x.flatten(), sign * vector.flatten()) for sign in (1, -1)) <= UNEXPLAINED * norm(vector)
    ]
    what = known[0] if known else "a bias, table or embedding"
    return f"a vector of norm {norm(vector):.3g} added to every token, or missing from every token: {what}"


def factor_per_channel(e: Evidence) -> str | None:
    """Recognise a factor for each channel."""
    factor = slope(e.reference, e.candidate, (0, 1))
    if tokens(e) < 2 or e.name.endswith((*PHASES, "_coords")) or constant_factor(e):
        return None
    if not explains(e, factor * e.reference):
        return None
    return (
        f"a factor for each channel, {factor.min():.3g} to {factor.max():.3g}: "
        "a norm's weight, or a row, that is applied twice or not at all"
    )


def factor_per_head(e: Evidence) -> str | None:
    """Recognise a factor for each head of each token."""
    h = by_head(e)
    if h is None or h.reference.shape[3] < 2 or e.name.endswith(PHASES) or constant_factor(e):
        return None
    factor = slope(h.reference, h.candidate, 3)
    if factor.shape[2] < 2 or not explains(h, factor * h.reference):
        return None
    if (factor.amax(2) - factor.amin(2)).max() <= UNEXPLAINED * (factor - 1).abs().max():
        return None  # the same for all heads: an epsilon
    # The mean square over the whole width is the mean of the heads' mean squares, whatever the weight is.
    per_head = abs((factor**-2).mean(2) - 1).max() <= 2 * rounding(e)
    what = "an RMSNorm over each head in place of the whole width" if per_head else "a gate or norm of its own"
    return f"a factor for each head of each token, {factor.min():.3g} to {factor.max():.3g}: {what}"


def slope(x: Tensor, y: Tensor, dims: int | tuple[int, ...] | None = None) -> Tensor:
    """Return the least-squares factor that takes x to y, over all dimensions or over `dims`; 0 where x is 0."""
    x, y, keep = x.double(), y.double(), dims is not None
    return ((x * y).sum(dims, keepdim=keep) / x.square().sum(dims, keepdim=keep)).nan_to_num()


def tokens(e: Evidence) -> int:
    """Return how many tokens the tap has in all elements of the batch."""
    return prod(e.reference.shape[:2])


# Rounding. A number rounded to n significant bits is off by at most 2**-n of itself.

SIGNIFICANT_BITS = {"bfloat16": 8, "float16 or TF32": 11, "float32": 24}
ROUND_TO: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {  # significant bits, and rounding to them
    "bfloat16": (8, lambda x: to_bits(x, 8)),
    "float16": (11, lambda x: x.half().double()),  # fewer bits below 2**-14, and nothing above 65504
    "TF32": (11, lambda x: to_bits(x, 11)),
    "float32": (24, lambda x: to_bits(x, 24)),
}


def rounded(e: Evidence) -> str | None:
    """Recognise the reference's numbers rounded to a narrower dtype.

    The candidate may keep them in a wider one.
    """
    found = [name for name, (_, narrow) in ROUND_TO.items() if explains(e, narrow(e.reference))]
    return f"the reference rounded to {' or '.join(found)}" if found else None


def narrow_numbers(e: Evidence) -> str | None:
    """Recognise numbers that all fit a narrower dtype.

    The step that made them was computed in that dtype, or was given inputs in it.
    """
    fitting = [name for name, (_, narrow) in ROUND_TO.items() if torch.equal(narrow(e.candidate), e.candidate.double())]
    if not fitting:
        return None
    bits, narrow = ROUND_TO[fitting[0]]
    same = [name for name in fitting if ROUND_TO[name][0] == bits]  # what fits bfloat16 fits the wider ones, too
    own = torch.equal(narrow(e.reference), e.reference.double())
    close = gap(e.reference, e.candidate) <= SIZE[1] * 2 * 2.0**-bits * norm(e.reference)
    return f"a step computed in {' or '.join(same)}: no number has more bits" if close and not own else None


# The root mean square of a uniform error of up to half a unit in the last place is 0.2 units, averaged over all
# mantissas. Half of that is the least that counts as a rounding, and five times it the most that one stage makes.
SIZE = 0.1, 1.0


def rounding_noise(e: Evidence) -> str | None:
    """Recognise a difference that is as large and as random as one rounding makes it."""
    if e.part in ("stream", "video", "audio"):  # a sum of two tensors: how far off it is does not tell what was rounded
        return None
    difference = e.candidate.double() - e.reference.double()
    size = norm(difference) / (norm(e.reference) or 1.0)
    name = next(
        (name for name, bits in SIGNIFICANT_BITS.items() if SIZE[0] <= size * 2.0 ** (bits - 1) <= SIZE[1]), None
    )
    if name is None or not looks_random(difference, e.reference.double()):
        return None
    return f"noise as from rounding to {name}: a random relative difference of {size:.1e}"


def looks_random(difference: Tensor, x: Tensor) -> bool:
    """Tell whether a difference looks like rounding errors: unrelated to x, spread evenly, and with hardly any mean.

    The mean over n independent tokens has 1/n of the energy on average. Each channel's share follows a chi-squared law,
    and 5 standard deviations are allowed. Errors of a weight have the same mean as the numbers that it multiplies.
    """
    difference, x = (y.flatten(0, 1).flatten(1) for y in (difference, x))
    count, width = difference.shape
    if min(count, width) < 4:
        return False
    means = [count * y.mean(0).square().sum() / y.square().sum() for y in (difference, x)]
    along = (difference * x).sum().square() / difference.square().sum() / x.square().sum()
    spread = [difference.square().sum(dim) / x.square().sum(dim) for dim in (0, 1)]
    even = all(part.median() > part.max() / 16 for part in spread)
    return bool(along <= UNEXPLAINED**2 and even and means[0] <= (1 + 5 * (2 / width) ** 0.5) / count + means[1])


def more_exact(e: Evidence) -> str | None:
    """Recognise a candidate that is clearly closer to float64 than the reference."""
    if e.truth is None or not norm(e.truth):
        return None
    own, other = gap(e.reference, e.truth), gap(e.candidate, e.truth)
    if not other < own / 2:  # a wider computation; two similar ones differ by less
        return None
    return f"a more exact computation: its error is {other / own:.2g} of the reference's"


def to_bits(x: Tensor, bits: int) -> Tensor:
    """Round to a number of significant bits, half to even, as the dtypes do, and return float64."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).round(), exponent - bits)
