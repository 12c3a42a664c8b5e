"""Tell how far apart two tensors on two machines are, from a kilobyte of each.

Element `index` (row-major, from 0) belongs to one of 256 buckets, with a sign. In unsigned 32-bit arithmetic:

    mix(x): x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97;  x ^= x >> 15
    hash = mix(mix(index >> 32) ^ (index mod 2**32))
    bucket = hash >> 24;  sign = -1 if the bit below, (hash >> 23) & 1, is set, else 1
    buckets[bucket] += sign * float64(element), unless that is NaN or infinite

The buckets of a difference are the difference of the buckets. The expected value of their squared norm, over hashes, is
the squared norm of the difference itself, and its variance is 2/256 * (1 - sum(d**4) / sum(d**2)**2) of its square.

The checksum compares bits. In unsigned 64-bit arithmetic it is the sum of bits(element) * (2 * hash + 1). For 64-bit
elements, bits(element) is mix(lower half) ^ upper half. Narrower elements are sign-extended: 16 set bits are -1.

Sums are float64, in any order. Torch on the CPU repeats them to the bit; a GPU or another language may differ by some
1e-16 of a bucket's sum of absolute values. The checksum is the same everywhere.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

BUCKETS = 256
# How many elements are summed at a time: few enough for a cache, and a divisor of 2**32, so that `index >> 32` is one
# number for a whole chunk.
SKETCHED_CHUNK = 2**16
MASK = 2**32 - 1
SPELLING = {  # the names of dtypes in safetensors
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
# Where many elements differ, the estimated squared norm follows a chi-square distribution with 256 degrees of freedom.
# LOW and HIGH are its quantiles at z standard deviations by the approximation of Wilson and Hilferty, as factors of the
# estimated norm. z = 1.96 would cover 95 %. Where a few elements differ by the same amount, two of them in one bucket
# change the estimate by more; 3.5 covers 95 % of these cases, too.
SPREAD = 2 / (9 * BUCKETS)
LOW, HIGH = ((1 - SPREAD + z * math.sqrt(SPREAD)) ** -1.5 for z in (3.5, -3.5))  # 0.864, 1.179
# Files round buckets to multiples of 2**-30 of the largest one. Each is off by at most half of that, and the norm over
# all 256 by at most 16 times as much.
BUCKET_ROUNDING = 16 * 2.0**-31
Whole = TypeVar("Whole", int, Tensor)


@dataclass(frozen=True, eq=False)
class Sketch:
    """Everything kept of a tensor. Norm, extrema and buckets cover its finite elements only."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    norm: float  # L2
    min: float | None  # None: no element is finite
    max: float | None
    nan: int  # how many elements are NaN
    inf: int
    neg_inf: int
    buckets: Tensor  # (256,) float64, on the CPU
    checksum: int | None  # None: the writer of the sketch left it out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sketch):
            return NotImplemented
        mine, its = vars(self), vars(other)
        same = all(mine[name] == its[name] for name in mine if name != "buckets")
        return same and torch.equal(self.buckets, other.buckets)

    @property
    def strange(self) -> tuple[int, int, int]:
        """Return how many elements are NaN, infinite and minus infinite."""
        return self.nan, self.inf, self.neg_inf

    def same_bits(self, other: "Sketch") -> bool | None:
        """Return whether both tensors have the same bits, or None if a checksum is missing.

        Two tensors that differ have the same checksum with a probability of about 2**-32.
        """
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        return None if None in (self.checksum, other.checksum) else self.checksum == other.checksum


class Estimate(NamedTuple):
    """The relative difference |b - a| / |a|, and the interval that holds it in 95 of 100 cases.

    (0, 0, 0) means that the values are the same.
    """

    relative: float
    low: float
    high: float


def sketch(x: Tensor) -> Sketch:
    """Sketch a tensor on any device.

    This takes 40 MB of memory, and a copy of the tensor if it is not contiguous.

    Raises `ValueError` for a dtype that `SPELLING` lacks. Sketch a complex tensor as `view_as_real`.
    """
    if x.dtype not in SPELLING:
        raise ValueError(f"cannot sketch {x.dtype}, only {', '.join(map(str, SPELLING))}")
    x = x.detach() if x.device.type in ("cpu", "cuda") else x.detach().cpu()  # other devices lack float64
    parts = [chunk_summary(piece, i) for i, piece in enumerate(x.flatten().split(SKETCHED_CHUNK))]
    sums = torch.stack([part.sums for part in parts]).sum(0).view(BUCKETS, 2)
    extrema = [y for part in parts for y in part.extrema]
    nan, inf, neg_inf = (sum(counts) for counts in zip(*(part.strange for part in parts), strict=True))
    return Sketch(
        tuple(x.shape),
        x.dtype,
        math.hypot(*(part.norm for part in parts)),
        min(extrema, default=None),
        max(extrema, default=None),
        nan,
        inf,
        neg_inf,
        sums[:, 0] - sums[:, 1],
        sum(part.checksum for part in parts) % 2**64,
    )


def estimate(a: Sketch, b: Sketch) -> Estimate:
    """Estimate how far `b` is from `a`; docs/trace-format.md says how good the estimate is.

    The result is infinite if they differ in how many elements are NaN or infinite. Raises `ValueError` for different
    shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"sketches of different shapes: {list(a.shape)} and {list(b.shape)}")
    if a.same_bits(b) or (a.norm == b.norm == 0 and a.strange == b.strange):
        return Estimate(0.0, 0.0, 0.0)
    if a.strange != b.strange or a.norm == 0:
        return Estimate(math.inf, math.inf, math.inf)
    distance = torch.linalg.vector_norm(b.buckets - a.buckets).item()
    rounding = BUCKET_ROUNDING * (a.buckets.abs().max() + b.buckets.abs().max()).item()
    # The norms are exact, and the triangle inequality bounds the difference.
    least, most = abs(b.norm - a.norm), a.norm + b.norm
    return Estimate(
        *(min(max(x, least), most) / a.norm for x in (distance, distance * LOW - rounding, distance * HIGH + rounding))
    )


class ChunkSummary(NamedTuple):
    """The contribution of some elements of a tensor to its sketch."""

    sums: Tensor  # (512,) float64, on the CPU: for each bucket, the sum of elements with sign 1, then with -1
    norm: float
    extrema: tuple[float, ...]  # smallest and largest finite element; empty if there are none
    strange: tuple[int, int, int]  # how many are NaN, inf, -inf
    checksum: int


def chunk_summary(x: Tensor, chunk: int) -> ChunkSummary:
    """Sum up one chunk, whose first element has the index chunk * SKETCHED_CHUNK."""
    odd, values = odd_hashes(chunk, x.device)[: len(x)], x.double()
    checksum = int(bits(x).mul_(odd).sum())  # int64 wraps around as uint64 does
    strange, extrema = (0, 0, 0), range_of(values)
    if not all(map(math.isfinite, extrema)):  # with a NaN, minimum and maximum are NaN
        strange = int(values.isnan().sum()), int((values == math.inf).sum()), int((values == -math.inf).sum())
        extrema = range_of(values[values.isfinite()])
        values = values.nan_to_num(0.0, 0.0, 0.0)
    sums = values.new_zeros(2 * BUCKETS).scatter_add_(0, odd >> 24, values)
    return ChunkSummary(sums.cpu(), torch.linalg.vector_norm(values).item(), extrema, strange, checksum)


def range_of(values: Tensor) -> tuple[float, ...]:
    """Return the minimum and maximum, or nothing if there are no elements."""
    return tuple(y.item() for y in values.aminmax()) if len(values) else ()


@lru_cache(maxsize=64)  # at most 32 MB
def odd_hashes(chunk: int, device: torch.device) -> Tensor:
    """Return 2 * hash + 1 of each index in a chunk, as int64.

    The upper 9 of its 33 bits are the bucket and the sign.
    """
    above, below = divmod(chunk * SKETCHED_CHUNK, 2**32)
    return 2 * mix(torch.arange(below, below + SKETCHED_CHUNK, device=device) ^ mix(above)) + 1


def mix(x: Whole) -> Whole:
    """Permute 32-bit numbers. Both factors are below 2**31, so nothing overflows in int64."""
    x = x ^ (x >> 16)
    x = x * 0x21F0AAAD & MASK
    x = x ^ (x >> 15)
    x = x * 0x735A2D97 & MASK
    return x ^ (x >> 15)


def bits(x: Tensor) -> Tensor:
    """Return the bits of each element, as int64."""
    if x.element_size() == 8:
        x = x.view(torch.int64)
        return mix(x & MASK) ^ (x >> 32 & MASK)
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()]).long()
