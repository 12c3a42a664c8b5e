"""Numbers that are found by fitting, and the sizes that rounding has."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from ..judge import norm
from ..trace.taps import PHASES, PROJECTED
from .evidence import SHARE, Evidence, by_head, explains, first, gap, rounding

# Numbers that are fitted.


def not_finite(e: Evidence) -> str | None:
    wrong = e.reference.isfinite() & ~e.candidate.isfinite()
    if not wrong.any():
        return None
    return (
        f"{int(wrong.sum())} of {wrong.numel()} numbers that are not finite, the first at "
        f"{tuple(wrong.nonzero()[0].tolist())}: an overflow, or a softmax over nothing"
    )


def constant_factor(e: Evidence) -> str | None:
    factor = slope(e.reference, e.candidate).item()
    if not explains(e, factor * e.reference.double()):
        return None
    known = (f"{x:.4g}: {what}" for x, what in meanings(e) if abs(factor - x) <= rounding(e) * abs(x))
    return f"a constant factor of {next(known, f'{factor:.4g}')}"


def meanings(e: Evidence) -> Iterator[tuple[float, str]]:
    yield 0.0, "never computed, or with weights that were never loaded"
    yield -1.0, "another sign"
    yield from ((factor, "a scale applied twice, or not at all (multiplier 1000)") for factor in (1000.0, 1e-3))
    if e.name not in PROJECTED:  # what is returned has no gate
        yield from ((factor, "a gate is 2 * sigmoid: its 2 twice, or not at all") for factor in (2.0, 0.5))
    sizes = {e.config.attention_head_dim, e.config.audio_attention_head_dim} if e.config else set()
    if e.name.endswith((".q", ".k", ".sdpa")):
        sizes.add(e.reference.shape[-1])
    for size in sorted(sizes):
        yield size**0.5, f"sqrt(head_dim) of {size}: the scale of attention, twice or not at all"
        yield size**-0.5, f"1 / sqrt(head_dim) of {size}: the scale of attention, twice or not at all"


def scaled_weight(e: Evidence) -> str | None:
    """A product that lacks a scale, plus a bias as it should be."""
    if tokens(e) < 3 or e.name.endswith(PHASES) or constant_factor(e) or constant_vector(e):
        return None
    x, y = (z.double() - z.double().mean((0, 1), keepdim=True) for z in (e.reference, e.candidate))
    factor = slope(x, y)
    offset = (e.candidate.double() - factor * e.reference.double()).mean((0, 1), keepdim=True)
    if not explains(e, factor * e.reference.double() + offset):
        return None
    return f"a constant factor of {factor.item():.4g}, but not of the bias: a weight without its scale"


def constant_vector(e: Evidence) -> str | None:
    vector = (e.candidate.double() - e.reference.double()).mean((0, 1), keepdim=True)
    if tokens(e) < 2 or e.name.endswith(PHASES) or not explains(e, e.reference.double() + vector):
        return None
    known = [
        name
        for name, x in e.reference_taps.items()
        if x.numel() == vector.numel()
        and min(gap(x.flatten(), sign * vector.flatten()) for sign in (1, -1)) <= SHARE * norm(vector)
    ]
    what = known[0] if known else "a bias, table or embedding"
    return f"a vector of norm {norm(vector):.3g} that all tokens have too much or too little: {what}"


def factor_per_channel(e: Evidence) -> str | None:
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
    h = by_head(e)
    if h is None or h.reference.shape[3] < 2 or e.name.endswith(PHASES) or constant_factor(e):
        return None
    factor = slope(h.reference, h.candidate, 3)
    if factor.shape[2] < 2 or not explains(h, factor * h.reference):
        return None
    # The mean square of the whole width is the mean of the heads' ones, whatever the weight is.
    per_head = abs((factor**-2).mean(2) - 1).max() <= 2 * rounding(e)
    what = "an RMSNorm over each head in place of the whole width" if per_head else "a gate or norm of its own"
    return f"a factor for each head of each token, {factor.min():.3g} to {factor.max():.3g}: {what}"


def slope(x: Tensor, y: Tensor, dims: int | tuple[int, ...] | None = None) -> Tensor:
    """The factor that takes x to y, with the least squares; 0 where x is 0."""
    x, y, keep = x.double(), y.double(), dims is not None
    return ((x * y).sum(dims, keepdim=keep) / x.square().sum(dims, keepdim=keep)).nan_to_num()


def tokens(e: Evidence) -> int:
    return prod(e.reference.shape[:2])


# Rounding. A number of n significant bits is off by at most 2**-n of itself.

FORMATS = {"bfloat16": 8, "float16 or TF32": 11, "float32": 24}


def rounded(e: Evidence) -> str | None:
    """The reference's numbers, rounded; the candidate may well keep them in a wider dtype."""
    return first(
        e, ((f"the reference rounded to {name}", to_bits(e.reference, bits)) for name, bits in FORMATS.items())
    )


def narrow_numbers(e: Evidence) -> str | None:
    """Numbers that a narrower dtype has, too: the step that made them computed in it, or was given such inputs."""
    for name, bits in FORMATS.items():
        if not torch.equal(to_bits(e.candidate, bits), e.candidate.double()):
            continue
        own = torch.equal(to_bits(e.reference, bits), e.reference.double())
        close = gap(e.reference, e.candidate) <= SIZE[1] * 2 * 2.0**-bits * norm(e.reference)
        return f"a step computed in {name}: all numbers are such" if close and not own else None
    return None


# A uniform error of half a unit in the last place is 0.2 units of root mean square, relative to numbers of all
# mantissas: at least half of that is a rounding, and at most five of them one stage.
SIZE = 0.1, 1.0


def rounding_noise(e: Evidence) -> str | None:
    """A difference as large, and as random, as one rounding makes it."""
    difference = e.candidate.double() - e.reference.double()
    size = norm(difference) / (norm(e.reference) or 1.0)
    name = next((name for name, bits in FORMATS.items() if SIZE[0] <= size * 2.0 ** (bits - 1) <= SIZE[1]), None)
    if name is None or not random(difference, e.reference.double()):
        return None
    return f"the noise of a rounding to {name}: a random difference of {size:.1e}"


def random(difference: Tensor, x: Tensor) -> bool:
    """Like rounding errors: nearly no part of x, spread over all tokens and channels, and with hardly any mean.

    Of n independent tokens the mean has 1/n of the energy, on average over the channels, of which each has a
    chi-squared law: 5 standard deviations are allowed. Errors of a weight share the mean of what they multiply.
    """
    difference, x = (y.flatten(0, 1).flatten(1) for y in (difference, x))
    count, width = difference.shape
    if min(count, width) < 4:
        return False
    means = [count * y.mean(0).square().sum() / y.square().sum() for y in (difference, x)]
    along = (difference * x).sum().square() / difference.square().sum() / x.square().sum()
    spread = [difference.square().sum(dim) / x.square().sum(dim) for dim in (0, 1)]
    even = all(part.median() > part.max() / 16 for part in spread)
    return bool(along <= SHARE**2 and even and means[0] <= (1 + 5 * (2 / width) ** 0.5) / count + means[1])


def more_exact(e: Evidence) -> str | None:
    if e.truth is None or not norm(e.truth):
        return None
    own, other = gap(e.reference, e.truth), gap(e.candidate, e.truth)
    if not other < own / 2:  # a stage computed wider; two roundings alike differ by less
        return None
    return f"a more exact computation: its error is {other / own:.2g} of the reference's"


def to_bits(x: Tensor, bits: int) -> Tensor:
    """Rounded to so many significant bits, half to even, as the dtypes do; in float64."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2.0**bits).round(), exponent - bits)
