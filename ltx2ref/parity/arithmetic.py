"""Define exact arithmetic: a formula for each operation, in float64, with sums in a fixed order.

docs/arithmetic.md gives the same definition for people and for other languages. exact.py makes torch compute by it. A
formula takes float64 tensors and returns one, which is then rounded once to the dtype that the result has in torch.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

VERSION = 1  # of the definition; recordings and digests of different versions cannot be compared
# How many float64 products (8 MB) and how many logits are held at a time. No bit depends on them.
TILE = 2**20
LOGITS = 2**22
DEFINED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Scalar = int | float
Dims = int | Sequence[int] | None


class NotExact(ValueError):
    """Exact arithmetic does not define something, or cannot see it; the message names it."""


class Arithmetic:
    """The steps that the formulas are made of.

    A subclass is a machine that takes one of these steps in another way.
    """

    # The operation that is being computed and the dtype of its result. Some machines use them; the definition does not.
    operation, dtype = "", torch.float64

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round float64 to nearest, ties to even.

        Numbers are rounded to float32, and from there to bfloat16 or float16.
        """
        return x if dtype == torch.float64 else x.to(torch.float32).to(dtype)

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        """Evaluate a function of the float64 library, whose last bit may differ between machines."""
        result: Tensor = getattr(torch, name)(x.contiguous(), *more)
        return result

    def fold(self, terms: Tensor) -> Tensor:
        """Sum over the first dimension, overwriting `terms`.

        The last half is added to the first half until one term is left. The middle one of an odd number of terms waits.
        """
        n = len(terms)
        while n > 1:
            half = n // 2
            terms[:half] += terms[n - half : n]
            n -= half
        return terms[0] if n else terms.new_zeros(terms.shape[1:])

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply (..., M, K) by (..., K, N), of any dtypes: float64 products, folded over K."""
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a, b = (x.expand(*batch, *x.shape[-2:]).reshape(math.prod(batch), *x.shape[-2:]) for x in (a, b))
        (count, rows, inner), columns = a.shape, b.shape[-1]
        n = min(columns, max(TILE // max(inner, 1), 1))
        m = min(rows, max(TILE // max(inner * n, 1), 1))
        c = min(count, max(TILE // max(inner * n * m, 1), 1))
        out = torch.empty(count, rows, columns, dtype=torch.float64, device=a.device)
        buffer = out.new_empty(c * m * n * inner)
        for i, j in product(range(0, count, max(c, 1)), range(0, columns, max(n, 1))):
            right = b[i : i + c, :, j : j + n].double().movedim(1, 0).contiguous()[:, :, None]
            for k in range(0, rows, max(m, 1)):
                left = a[i : i + c, k : k + m].double().movedim(2, 0).contiguous()[..., None]
                shape = torch.broadcast_shapes(left.shape, right.shape)
                terms = torch.mul(left, right, out=buffer[: math.prod(shape)].view(shape))
                out[i : i + c, k : k + m, j : j + n] = self.fold(terms)
        return out.view(*batch, rows, columns)

    def biased(self, y: Tensor, bias: Tensor) -> Tensor:
        """Add a bias to a matrix product."""
        return y + bias.double()

    def weigh(self, logits: Tensor, v: Tensor) -> Tensor:
        """Sum values (..., S, d) by the softmax of logits (..., T, S); if no logit is finite, the sum is 0."""
        weights = softmax(self, logits, -1)
        return self.matmul(weights.masked_fill(highest(logits, -1) == -math.inf, 0.0), v)

    def total(self, x: Tensor, dims: Dims = None) -> Tensor:
        """Sum over `dims`, or over all dimensions, in row-major order, and keep these dimensions with size 1."""
        among = dimensions(x, dims)
        front = x.movedim(among, tuple(range(len(among))))
        terms = front.reshape(math.prod(front.shape[: len(among)]), *front.shape[len(among) :]).clone()
        return self.fold(terms).reshape([1 if i in among else n for i, n in enumerate(x.shape)])


class Nudged(Arithmetic):
    """A machine whose float64 library differs in the last bit.

    Each result of a function is moved by -1, 0 or +1 unit in the last place. Arguments whose result is known exactly,
    such as exp(0) = 1, are left alone.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def function(self, name: str, x: Tensor, *more: Tensor | Scalar) -> Tensor:
        """Evaluate the function, and move each result by at most one unit in the last place."""
        y = super().function(name, x, *more)
        by = torch.randint(-1, 2, y.shape, generator=self.generator)
        toward = torch.where(by < 0, -math.inf, math.inf).double().to(y.device)
        known = (x == (1 if name in ("log", "log2", "log10", "pow") else 0)) | (y == 0) | (by == 0).to(y.device)
        return torch.where(known, y, torch.nextafter(y, toward))


AS_DEFINED = Arithmetic()


# ---------------------------------------------------------------- formulas, in float64 unless they are in NARROW
def dimensions(x: Tensor, dims: Dims) -> tuple[int, ...]:
    """Return the dimensions that `dims` means, sorted and not negative."""
    some = range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    return tuple(sorted(d % max(x.ndim, 1) for d in some)) if x.ndim else ()


def kept(y: Tensor, x: Tensor, dims: Dims, keepdim: bool) -> Tensor:
    """Drop the reduced dimensions of a result unless they are to be kept."""
    return y if keepdim else y.reshape([n for i, n in enumerate(x.shape) if i not in dimensions(x, dims)])


def add(m: Arithmetic, x: Tensor, y: Tensor | Scalar, alpha: Scalar = 1) -> Tensor | Scalar:
    """Return x + alpha * y."""
    return x + (y if alpha == 1 else alpha * y)


def sub(m: Arithmetic, x: Tensor, y: Tensor | Scalar, alpha: Scalar = 1) -> Tensor | Scalar:
    """Return x - alpha * y."""
    return x - (y if alpha == 1 else alpha * y)


def rsub(m: Arithmetic, x: Tensor, y: Tensor | Scalar, alpha: Scalar = 1) -> Tensor | Scalar:
    """Return y - alpha * x."""
    return y - (x if alpha == 1 else alpha * x)


def div(m: Arithmetic, x: Tensor, y: Tensor | Scalar, rounding_mode: str | None = None) -> Tensor:
    """Return x / y; raise `NotExact` for a rounding mode."""
    if rounding_mode is not None:
        raise NotExact(f"exact arithmetic does not define a division with rounding_mode={rounding_mode!r}")
    return x / divisor(y, x)


def divisor(y: Tensor | Scalar, like: Tensor) -> Tensor:
    """Return a divisor as a tensor, because some devices multiply by the reciprocal of a Python number."""
    return y if isinstance(y, Tensor) else torch.full((), y, dtype=torch.float64, device=like.device)


def addcmul(m: Arithmetic, x: Tensor, a: Tensor, b: Tensor, value: Scalar = 1) -> Tensor:
    """Return x + value * (a * b)."""
    return x + (a * b if value == 1 else value * (a * b))


def addcdiv(m: Arithmetic, x: Tensor, a: Tensor, b: Tensor, value: Scalar = 1) -> Tensor:
    """Return x + value * (a / b)."""
    return x + (a / b if value == 1 else value * (a / b))


def lerp(m: Arithmetic, x: Tensor, y: Tensor, weight: Tensor | Scalar) -> Tensor:
    """Return x + weight * (y - x)."""
    return x + weight * (y - x)


def power(m: Arithmetic, x: Tensor | Scalar, exponent: Tensor | Scalar) -> Tensor:
    """Return a power; small whole and half exponents are products, reciprocals and square roots."""
    if isinstance(x, Tensor) and isinstance(exponent, int | float):
        if exponent in range(1, 9):
            return math.prod([x] * (int(exponent) - 1), start=x)
        if exponent in (-2, -1):
            return 1 / (x if exponent == -1 else x * x)
        if exponent in (-0.5, 0.5):
            return m.function("sqrt", x) if exponent > 0 else rsqrt(m, x)
    return m.function("pow", *as_tensors(x, exponent))


def as_tensors(x: Tensor | Scalar, y: Tensor | Scalar) -> tuple[Tensor, Tensor]:
    """Return both operands as tensors."""
    like = x if isinstance(x, Tensor) else y
    assert isinstance(like, Tensor)
    a, b = (z if isinstance(z, Tensor) else like.new_tensor(z, dtype=torch.float64) for z in (x, y))
    return a, b


def rsqrt(m: Arithmetic, x: Tensor) -> Tensor:
    """Return 1 / sqrt(x)."""
    return 1 / m.function("sqrt", x)


def sigmoid(m: Arithmetic, x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), from an exponential that cannot overflow."""
    e = m.function("exp", -x.abs())
    return torch.where(x >= 0, 1 / (1 + e), e / (1 + e))


def silu(m: Arithmetic, x: Tensor) -> Tensor:
    """Return x * sigmoid(x)."""
    return x * sigmoid(m, x)


def gelu(m: Arithmetic, x: Tensor, approximate: str = "none") -> Tensor:
    """Evaluate 0.5 x (1 + tanh z) as x sigmoid(2 z), which loses no digits where x is negative."""
    if approximate == "tanh":
        return x * sigmoid(m, 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return x * (0.5 * m.function("erfc", -x / divisor(math.sqrt(2), x)))


def softmax(m: Arithmetic, x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """Return exp(x - max) divided by its sum."""
    e = m.function("exp", x - highest(x, dim))
    return e / m.total(e, dim)


def safe_softmax(m: Arithmetic, x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """Return the softmax, but 0 where every element is -inf."""
    return softmax(m, x, dim).masked_fill(highest(x, dim) == -math.inf, 0.0)


def log_softmax(m: Arithmetic, x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    """Return the logarithm of the softmax."""
    y = x - highest(x, dim)
    return y - m.function("log", m.total(m.function("exp", y), dim))


def highest(x: Tensor, dim: int) -> Tensor:
    """Return the largest element along a dimension, which stays; an empty tensor is allowed."""
    return x.amax(dim, keepdim=True) if x.numel() else x.sum(dim, keepdim=True)


def total(m: Arithmetic, x: Tensor, dims: Dims = None, keepdim: bool = False) -> Tensor:
    """Return the sum."""
    return kept(m.total(x, dims), x, dims, keepdim)


def mean(m: Arithmetic, x: Tensor, dims: Dims = None, keepdim: bool = False) -> Tensor:
    """Return the mean."""
    return kept(average(m, x, dims), x, dims, keepdim)


def average(m: Arithmetic, x: Tensor, dims: Dims, fewer: Scalar = 0) -> Tensor:
    """Return the sum divided by the number of elements, or by `fewer` less."""
    count = math.prod(x.shape[i] for i in dimensions(x, dims)) - fewer
    return m.total(x, dims) / divisor(max(count, 0), x)


def var(m: Arithmetic, x: Tensor, dims: Dims = None, correction: Scalar | None = None, keepdim: bool = False) -> Tensor:
    """Return the variance: the sum of squared deviations, divided by the count minus the correction."""
    d = x - average(m, x, dims)
    return kept(average(m, d * d, dims, 1 if correction is None else correction), x, dims, keepdim)


def std(m: Arithmetic, x: Tensor, dims: Dims = None, correction: Scalar | None = None, keepdim: bool = False) -> Tensor:
    """Return the square root of the variance."""
    return m.function("sqrt", var(m, x, dims, correction, keepdim))


def vector_norm(m: Arithmetic, x: Tensor, ord: Scalar = 2, dims: Dims = None, keepdim: bool = False) -> Tensor:
    """Return the norm of order 2; raise `NotExact` for another order."""
    if ord != 2:
        raise NotExact(f"exact arithmetic does not define a norm of order {ord}, only of order 2")
    return m.function("sqrt", total(m, x * x, dims, keepdim))


def layer_norm(
    m: Arithmetic, x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, the mean and the inverse deviation, as ATen does."""
    dims = list(range(x.ndim - len(shape), x.ndim))
    center = average(m, x, dims)
    d = x - center
    deviation = m.function("sqrt", average(m, d * d, dims) + eps)
    y = d / deviation
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, center, 1 / deviation


# ---- formulas that take tensors in their own dtypes, and convert to float64 when needed, to save memory
def exact_rms_norm(
    m: Arithmetic,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute RMSNorm step by step, each rounded to float32 or wider, as code does that writes the norm out.

    The second result is the factor, which ATen's fused operator returns, too.
    """
    wide = torch.promote_types(input.dtype, torch.float32)

    def step(y: Tensor) -> Tensor:
        return m.round(y, wide).double()

    x, dims = input.double(), list(range(input.ndim - len(normalized_shape), input.ndim))
    square = step(average(m, step(x * x), dims))
    factor = step(rsqrt(m, step(square + (torch.finfo(wide).eps if eps is None else eps))))
    y = step(x * factor)
    return y if weight is None else step(y * weight.double()), factor


def mm(m: Arithmetic, a: Tensor, b: Tensor) -> Tensor:
    """Return a matrix product, with or without a batch."""
    return m.matmul(a, b)


def mv(m: Arithmetic, a: Tensor, b: Tensor) -> Tensor:
    """Return the product of a matrix and a vector."""
    return m.matmul(a, b[:, None])[:, 0]


def dot(m: Arithmetic, a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two vectors."""
    return m.matmul(a[None], b[:, None])[0, 0]


def addmm(m: Arithmetic, x: Tensor, a: Tensor, b: Tensor, beta: Scalar = 1, alpha: Scalar = 1) -> Tensor:
    """Return beta * x + alpha * a @ b, where b is a matrix or a vector."""
    y = m.matmul(a, b) if b.ndim > 1 else mv(m, a, b)
    y = y if alpha == 1 else alpha * y
    return y if beta == 0 else m.biased(y, x if beta == 1 else beta * x.double())


def linear(m: Arithmetic, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return input @ weight.T + bias."""
    a, b = (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (input, weight))
    y = m.matmul(a, b.mT)
    y = y.view(*input.shape[:-1], *weight.shape[:-1])
    return y if bias is None else m.biased(y, bias)


def exact_attention(
    m: Arithmetic,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend from (..., T, d) to (..., S, d) as one operation with one rounding.

    The result of a query with nothing to attend to is 0. Raises `NotExact` for dropout.
    """
    if dropout_p:
        raise NotExact(f"exact arithmetic does not define dropout: expected dropout_p=0, got {dropout_p}")
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    (length, width), keys = query.shape[-2:], key.shape[-2]
    if is_causal:
        attn_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
    masked = () if attn_mask is None else attn_mask.shape[:-2]
    batch = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2], masked)
    query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
    mask = None if attn_mask is None else attn_mask.expand(*batch, length, keys)
    return attend(m, query, key, value, mask, 1 / math.sqrt(max(width, 1)) if scale is None else scale)


def attend(m: Arithmetic, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend with at most about LOGITS logits in memory.

    Large batches and long sequences are computed in parts, which does not change any bit.
    """
    if math.prod(q.shape[:-1]) * k.shape[-2] > LOGITS and q.ndim > 2:
        parts = [attend(m, q[i], k[i], v[i], None if mask is None else mask[i], scale) for i in range(len(q))]
        return torch.stack(parts)
    if len(q) * k.shape[-2] > LOGITS and q.ndim == 2 and len(q) > 1:
        half = len(q) // 2
        return torch.cat(
            [
                attend(m, q[part], k, v, None if mask is None else mask[part], scale)
                for part in (slice(0, half), slice(half, None))
            ]
        )
    logits = m.matmul(q, k.mT) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask.double()
    return m.weigh(logits, v)


def linspace(m: Arithmetic, start: Tensor | Scalar, end: Tensor | Scalar, steps: int) -> Tensor:
    """Return evenly spaced numbers, counted from both ends so that they are symmetric."""
    a, b = (float(x) for x in (start, end))
    i = torch.arange(steps, dtype=torch.float64)
    step = (b - a) / max(steps - 1, 1)
    return torch.where(i < steps // 2 if steps > 1 else i >= 0, a + step * i, b - step * (steps - 1 - i))


def logspace(m: Arithmetic, start: Scalar, end: Scalar, steps: int, base: float = 10.0) -> Tensor:
    """Return powers of the base with evenly spaced exponents."""
    return m.function("pow", *as_tensors(base, linspace(m, start, end, steps)))


def arange(m: Arithmetic, *bounds: Scalar) -> Tensor:
    """Return start + step * i for all numbers below the end."""
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1), 3: bounds}[len(bounds)]
    return float(start) + float(step) * torch.arange(math.ceil((end - start) / step), dtype=torch.float64)


# fmt: off
FUNCTIONS = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "sinh", "cosh", "asin",
    "acos", "atan", "atan2", "sqrt", "erf", "erfc",
)
# fmt: on
NARROW: dict[str, Callable[..., Any]] = {
    "rms_norm": exact_rms_norm,
    "_fused_rms_norm": exact_rms_norm,
    "mm": mm,
    "bmm": mm,
    "mv": mv,
    "dot": dot,
    "vdot": dot,
    "addmm": addmm,
    "baddbmm": addmm,
    "addmv": addmm,
    "linear": linear,
    "scaled_dot_product_attention": exact_attention,
    "linspace": linspace,
    "logspace": logspace,
    "arange": arange,
}
FORMULAS: dict[str, Callable[..., Any]] = (
    NARROW
    | {
        "add": add,
        "sub": sub,
        "rsub": rsub,
        "mul": lambda m, x, y: x * y,
        "div": div,
        "addcmul": addcmul,
        "addcdiv": addcdiv,
        "lerp": lerp,
        "pow": power,
        "square": lambda m, x: x * x,
        "rsqrt": rsqrt,
        "reciprocal": lambda m, x: 1 / x,
        "sigmoid": sigmoid,
        "silu": silu,
        "gelu": gelu,
        "_softmax": softmax,
        "_safe_softmax": safe_softmax,
        "_log_softmax": log_softmax,
        "sum": total,
        "mean": mean,
        "var": var,
        "std": std,
        "linalg_vector_norm": vector_norm,
        "native_layer_norm": layer_norm,
    }
    | {name: lambda m, *x, name=name: m.function(name, *x) for name in FUNCTIONS}
)
