"""Simulate machines: exact arithmetic with one step taken as some processor, library or kernel takes it.

A verdict that has to hold on every machine is tested on these, not only on the two or three real ones at hand:

    with ltx2ref.exact(machine("faithful")):
        model(**inputs)

Each is a correct way of computing, except `tf32`, whose matrix products keep 11 bits of their operands. Float64 results
differ only through the order of sums. Machines that draw random numbers have their own seed, and repeat themselves.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .arithmetic import Arithmetic, Scalar, highest

LANES = 16  # the width of a vector unit that sums in chunks
KEYS = 32  # how many keys a tile of attention has
# Operations that are made of matrix products.
PRODUCTS = ("linear", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")


def float32(x: Tensor) -> Tensor:
    """Round to float32, and return float64."""
    return x.to(torch.float32).double()


def ulp(x: Tensor) -> Tensor:
    """Return the distance between neighbouring float32 numbers at x."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent.clamp(min=-125) - 24)


class Machine(Arithmetic):
    """A machine that differs from the definition in one step, with random numbers of its own."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def narrow(self) -> bool:
        """Tell whether the operation's result has a narrower dtype than float64."""
        return self.dtype != torch.float64

    def draw(self, x: Tensor) -> Tensor:
        """Return random numbers, uniform in [-1, 1), in the shape of x."""
        return torch.rand(x.shape, generator=self.generator, dtype=torch.float64) * 2 - 1


class Faithful(Machine):
    """Rounds to either of the two float32 numbers around the result.

    Sums, differences and products of two numbers are rounded to the nearer one, as every processor does.
    """

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float64 or self.operation in ("add", "sub", "rsub", "mul"):
            return super().round(x, dtype)
        nearest = float32(x)
        other = float32(nearest + torch.sign(x - nearest) * ulp(x))
        return super().round(torch.where((nearest == x) | (self.draw(x) < 0), nearest, other), dtype)


class OtherFunctions(Machine):
    """Has functions (exp, cos, tanh, ...) that are off by up to `ulps` units in the last place of float32."""

    def __init__(self, ulps: float) -> None:
        super().__init__()
        self.ulps = ulps

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        y = super().function(name, x, *more)
        exact = not self.narrow or name == "sqrt"
        return y if exact else torch.where(x == 0, y, y + self.draw(y) * self.ulps * ulp(y))


class Summing(Machine):
    """Sums in float32 after rounding each product: a machine without fused multiply-add."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Add two numbers and round the sum to float32."""
        return float32(x + y) if self.narrow else x + y

    def sequential(self, terms: Tensor) -> Tensor:
        """Sum one term after the other."""
        terms = float32(terms) if self.narrow else terms
        total = torch.zeros_like(terms[0]) if len(terms) else terms.new_zeros(terms.shape[1:])
        for term in terms:
            total = self.add(total, term)
        return total


class OneByOne(Summing):
    """Sums from the first term to the last."""

    def fold(self, terms: Tensor) -> Tensor:
        return self.sequential(terms)


class Backwards(Summing):
    """Sums from the last term to the first."""

    def fold(self, terms: Tensor) -> Tensor:
        return self.sequential(terms.flip(0))


class InChunks(Summing):
    """Sums every 16th term in a lane of its own, and adds the lanes at the end."""

    def fold(self, terms: Tensor) -> Tensor:
        return self.sequential(
            torch.stack([self.sequential(terms[i::LANES]) for i in range(min(LANES, len(terms)))])
            if len(terms)
            else terms
        )


class Parts(Machine):
    """Splits a matrix product along its sum, as tensor parallelism does, and rounds each part."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        if not self.narrow:
            return super().matmul(a, b)
        size = max(-(-a.shape[-1] // self.count), 1)
        parts = [super(Parts, self).matmul(x, y) for x, y in zip(a.split(size, -1), b.split(size, -2), strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = self.round(
                self.round(total, self.dtype).double() + self.round(part, self.dtype).double(), self.dtype
            ).double()
        return total


class BiasAfterRounding(Machine):
    """Adds the bias of a matrix product after rounding the product."""

    def biased(self, y: Tensor, bias: Tensor) -> Tensor:
        return super().biased(self.round(y, self.dtype).double(), bias)


class TensorFloat32(Machine):
    """Keeps 11 bits of the operands of a matrix product, as GPUs do for float32 where it is allowed."""

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return super().matmul(*(eleven_bits(x) if self.narrow else x for x in (a, b)))


def eleven_bits(x: Tensor) -> Tensor:
    """Round to 11 significant bits, and return float64."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11)


class OnlineSoftmax(Machine):
    """Attends to one tile of keys after the other.

    It rescales in float32 what it has summed so far, and rounds weights to the model's dtype.
    """

    def weigh(self, logits: Tensor, v: Tensor) -> Tensor:
        if not self.narrow:
            return super().weigh(logits, v)
        most = torch.full_like(logits[..., :1], -math.inf)
        weight, total = torch.zeros_like(most), logits.new_zeros(*logits.shape[:-1], v.shape[-1])
        for i in range(0, logits.shape[-1], KEYS):
            tile = float32(logits[..., i : i + KEYS])
            before, most = most, torch.maximum(most, highest(tile, -1))
            e = float32((tile - most).exp()).masked_fill(most == -math.inf, 0.0)
            rescale = float32((before - most).exp()).masked_fill(before == -math.inf, 0.0)
            weight = float32(float32(weight * rescale) + self.total(e, -1))
            rounded = self.round(e, self.dtype)
            total = float32(float32(total * rescale) + self.matmul(rounded, v[..., i : i + KEYS, :]))
        return torch.where(weight > 0, total / weight, total)


class RoundedLogits(Machine):
    """Stores logits and weights in the model's dtype, as code does that writes attention out."""

    def weigh(self, logits: Tensor, v: Tensor) -> Tensor:
        e = self.round((logits := self.round(logits, self.dtype).double()) - highest(logits, -1), self.dtype).double()
        e = e.exp()
        weights = self.round(e / self.total(e, -1), self.dtype).double()
        return self.matmul(weights.masked_fill(highest(logits, -1) == -math.inf, 0.0), v)


class NumPyFunctions(Machine):
    """Has NumPy's float32 functions."""

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        if not self.narrow or name not in ("exp", "sin", "cos", "tanh"):
            return super().function(name, x, *more)
        return torch.from_numpy(np.asarray(getattr(np, name)(x.float().numpy()))).double()


class OneConstant(Machine):
    """Subtracts multiples of one float32 constant, 2 pi, from an angle in float32 before its sine or cosine."""

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        if self.narrow and name in ("sin", "cos"):
            turn = float32(torch.tensor(2 * math.pi, dtype=torch.float64))
            x = float32(x - float32((x / turn).round() * turn))
        return super().function(name, x, *more)


class Recurrence(Machine):
    """Computes each frequency of the timestep's sinusoid from the previous one, in float32."""

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        y = super().function(name, x, *more)
        if not self.narrow or name != "exp" or x.ndim != 1 or len(x) != 128 or x[0] != 0:
            return y
        ratio, powers = float32(y[1]), [torch.ones_like(y[0])]
        for _ in range(len(x) - 1):
            powers.append(float32(powers[-1] * ratio))
        return torch.stack(powers)


# ---------------------------------------------------------------- machines added after judge.py's bounds were chosen
class Pairwise(Summing):
    """Adds neighbouring terms, and then neighbouring sums, in float32."""

    def fold(self, terms: Tensor) -> Tensor:
        terms = float32(terms) if self.narrow else terms
        while len(terms) > 1:
            odd = terms[len(terms) - len(terms) % 2 :]
            terms = torch.cat([self.add(terms[:-1:2], terms[1::2]), odd])
        return terms[0] if len(terms) else terms.new_zeros(terms.shape[1:])


class FusedMultiplyAdd(Summing):
    """Sums in float32 and adds each product before it is rounded: fused multiply-add."""

    def fold(self, terms: Tensor) -> Tensor:
        total = terms.new_zeros(terms.shape[1:])
        for term in terms:
            total = self.add(total, term)
        return total


class SplitSum(FusedMultiplyAdd):
    """Splits each sum into parts that are added in float32, as are the terms of each part.

    GPUs do this if they have more multiprocessors than there are results.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def fold(self, terms: Tensor) -> Tensor:
        parts = [super(SplitSum, self).fold(part) for part in terms.tensor_split(self.count)]
        return self.sequential(torch.stack(parts))


class Blocks(FusedMultiplyAdd):
    """Sums blocks of terms without rounding, and adds these to a float32 sum."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def fold(self, terms: Tensor) -> Tensor:
        blocks = [super(Summing, self).fold(part.clone()) for part in terms.split(self.size)]
        return super().fold(torch.stack(blocks)) if blocks else terms.new_zeros(terms.shape[1:])


class Truncating(Blocks):
    """Sums as tensor cores do: 8 products are added to the sum so far at once.

    Bits beyond float32 are cut off instead of rounded.
    """

    def __init__(self) -> None:
        super().__init__(8)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Add two numbers and cut the sum off to float32 in matrix products; round it elsewhere."""
        total = x + y
        nearest = float32(total)
        away = nearest.abs() > total.abs()
        cut = torch.where(away, float32(nearest - torch.sign(nearest) * ulp(total)), nearest)
        return cut if self.narrow and self.operation in PRODUCTS else super().add(x, y)


class ByExp2(Machine):
    """Computes exp(x) as exp2(x * log2(e)), with a float32 constant and a float32 product."""

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        if not self.narrow or name != "exp":
            return super().function(name, x, *more)
        log2e = float32(torch.tensor(math.log2(math.e), dtype=torch.float64))
        return float32(super().function("exp2", float32(float32(x) * log2e)))


class Newton(Machine):
    """Has an inverse square root of 12 bits, improved by one step of Newton's method in float32."""

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        root = super().function(name, x, *more)
        if not self.narrow or name != "sqrt" or self.operation == "sqrt":
            return root
        mantissa, exponent = torch.frexp(1 / root)
        y = torch.ldexp((mantissa * 2**12).round(), exponent - 12)
        correction = float32(1.5 - float32(float32(float32(0.5 * x) * y) * y))
        return 1 / float32(y * correction)


class Unshifted(Machine):
    """Takes the exponential of attention's logits without subtracting the largest one first.

    It does so only where all logits of a row are far from overflow.
    """

    def weigh(self, logits: Tensor, v: Tensor) -> Tensor:
        most = highest(logits, -1)
        if not self.narrow or not bool((most.abs() < 60).all()):
            return super().weigh(logits, v)
        e = float32(float32(logits).exp())
        return self.matmul(e, v) / float32(self.total(e, -1))


class TanhByExp(Machine):
    """Computes GELU's tanh z as 1 - 2 / (exp(2 z) + 1) in float32, and adds 1 to it.

    The addition cancels digits where z < 0.
    """

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        if not self.narrow or name != "exp" or self.operation != "gelu":
            return super().function(name, x, *more)
        tanh = float32(1 - float32(2 / float32(float32(super().function("exp", float32(-x))) + 1)))
        return (1 - tanh) / (1 + tanh)  # from which the formula makes (1 + tanh) / 2, on both sides of 0


MACHINES: dict[str, Callable[[], Machine]] = {
    "faithful": Faithful,
    "functions-1ulp": lambda: OtherFunctions(1.0),
    "functions-2ulp": lambda: OtherFunctions(2.0),
    "sums-one-by-one": OneByOne,
    "sums-backwards": Backwards,
    "sums-in-chunks": InChunks,
    "halves": lambda: Parts(2),
    "quarters": lambda: Parts(4),
    "eighths": lambda: Parts(8),
    "bias-after-rounding": BiasAfterRounding,
    "tf32": TensorFloat32,
    "online-softmax": OnlineSoftmax,
    "rounded-logits": RoundedLogits,
    "numpy-functions": NumPyFunctions,
    "one-constant-reduction": OneConstant,
    "phases-by-recurrence": Recurrence,
    "sums-pairwise": Pairwise,
    "fused-multiply-add": FusedMultiplyAdd,
    "split-sums": lambda: SplitSum(4),
    "blocks-of-8": lambda: Blocks(8),
    "blocks-of-64": lambda: Blocks(64),
    "truncated-sums": Truncating,
    "exp-by-exp2": ByExp2,
    "newton-rsqrt": Newton,
    "unshifted-softmax": Unshifted,
    "tanh-by-exp": TanhByExp,
}


def machine(name: str) -> Machine:
    """Return a new simulated machine by its name in `MACHINES`.

    Raises `ValueError` for an unknown name.
    """
    if name not in MACHINES:
        raise ValueError(f"no such machine: {name}; there are {', '.join(MACHINES)}")
    return MACHINES[name]()
