"""How far two tensors on two machines are apart, told from a kilobyte of each.

Element `index` (row-major, from 0) belongs to one of 256 buckets, with a sign. In unsigned arithmetic of 32 bits:

    mix(x): x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97;  x ^= x >> 15
    hash = mix(mix(index >> 32) ^ (index mod 2**32))
    bucket = hash >> 24;  sign = -1 if the bit below, (hash >> 23) & 1, is set, else 1
    buckets[bucket] += sign * float64(element), unless that is NaN or infinite

The buckets of a difference are the difference of the buckets, and their squared norm is in expectation, over hashes,
the squared norm of the difference itself; its variance is 2/256 * (1 - sum(d**4) / sum(d**2)**2) of its square.

The checksum compares bits. In unsigned arithmetic of 64 bits it is the sum of bits(element) * (2 * hash + 1); of an
element that has 64 bits itself, bits is mix(lower half) ^ upper half. Narrower ones are signed: 16 set bits are -1.

Sums are float64, in any order: torch's on the CPU repeat themselves to the bit, those of a GPU or another language
differ by some 1e-16 of a bucket's sum of absolute values. The checksum is the same everywhere.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

BUCKETS = 256
SKETCHED_CHUNK = (
    2**16
)  # elements, whatever fits a cache; divides 2**32, so that `index >> 32` is one number for a chunk
MASK = 2**32 - 1
SPELLING = {  # as safetensors has it
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
# The estimated squared norm is distributed as chi-square with 256 degrees of freedom where many elements differ; its
# quantiles by Wilson and Hilferty, at z standard deviations, as factors of the estimated norm. 1.96 would hold 95 %.
# Where few and equal elements differ, two in one bucket change it by more: 3.5 hold 95 % of these cases, too.
SPREAD = 2 / (9 * BUCKETS)
LOW, HIGH = ((1 - SPREAD + z * math.sqrt(SPREAD)) ** -1.5 for z in (3.5, -3.5))  # 0.864, 1.179
# Files round buckets to 2**-30 of the largest one: by half of that each, and by 16 times it, in norm, if all do so.
BUCKET_ROUNDING = 16 * 2.0**-31
Whole = TypeVar("Whole", int, Tensor)


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is kept of a tensor. Norm, extrema and buckets are of its finite elements."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    norm: float  # L2
    min: float | None  # None: no element is finite
    max: float | None
    nan: int  # how many
    inf: int
    neg_inf: int
    buckets: Tensor  # (256,) float64, on the CPU
    checksum: int | None  # None: whoever made the sketch left it out

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sketch):
            return NotImplemented
        mine, its = vars(self), vars(other)
        return all(mine[name] == its[name] for name in mine if name != "buckets") and torch.equal(
            self.buckets, other.buckets
        )

    @property
    def strange(self) -> tuple[int, int, int]:
        return self.nan, self.inf, self.neg_inf

    def same_bits(self, other: "Sketch") -> bool | None:
        """Return whether both tensors have the same bits, or None if a checksum is missing.

        Two tensors that differ have the same checksum with a probability of about 2**-32.
        """
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        return None if None in (self.checksum, other.checksum) else self.checksum == other.checksum


class Estimate(NamedTuple):
    """|b - a| / |a|, and the interval that holds it in 95 of 100 cases. (0, 0, 0): the values are the same."""

    relative: float
    low: float
    high: float


def sketch(x: Tensor) -> Sketch:
    """Sketch a tensor on any device. This takes 40 MB beside it, and a copy of it if it is not contiguous.

    Raises `ValueError` for a dtype of which safetensors has no real number; of complex ones give `view_as_real`.
    """
    if x.dtype not in SPELLING:
        raise ValueError(f"cannot sketch {x.dtype}, only {', '.join(map(str, SPELLING))}")
    x = x.detach() if x.device.type in ("cpu", "cuda") else x.detach().cpu()  # others lack float64
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
    """Estimate how far `b` is from `a`. docs/trace-format.md says how good the estimate is.

    Infinite if they have other numbers of NaN or infinite elements. Raises `ValueError` for different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"sketches of different shapes: {list(a.shape)} and {list(b.shape)}")
    if a.same_bits(b) or (a.norm == b.norm == 0 and a.strange == b.strange):
        return Estimate(0.0, 0.0, 0.0)
    if a.strange != b.strange or a.norm == 0:
        return Estimate(math.inf, math.inf, math.inf)
    distance = torch.linalg.vector_norm(b.buckets - a.buckets).item()
    rounding = BUCKET_ROUNDING * (a.buckets.abs().max() + b.buckets.abs().max()).item()
    # The norms are exact, and bound the difference.
    least, most = abs(b.norm - a.norm), a.norm + b.norm
    return Estimate(
        *(min(max(x, least), most) / a.norm for x in (distance, distance * LOW - rounding, distance * HIGH + rounding))
    )


class ChunkSummary(NamedTuple):
    """The part of a sketch that some elements of a tensor make."""

    sums: Tensor  # (512,) float64, on the CPU: for each bucket, of the elements with sign 1 and of those with -1
    norm: float
    extrema: tuple[float, ...]  # of the finite ones; empty if there are none
    strange: tuple[int, int, int]  # NaN, inf, -inf
    checksum: int


def chunk_summary(x: Tensor, chunk: int) -> ChunkSummary:
    """Sum up one chunk, whose first element has the index chunk * SKETCHED_CHUNK."""
    odd, values = odd_hashes(chunk, x.device)[: len(x)], x.double()
    checksum = int(bits(x).mul_(odd).sum())  # int64 wraps around as uint64 does
    strange, extrema = (0, 0, 0), range_of(values)
    if not all(map(math.isfinite, extrema)):  # a NaN is both
        strange = int(values.isnan().sum()), int((values == math.inf).sum()), int((values == -math.inf).sum())
        extrema = range_of(values[values.isfinite()])
        values = values.nan_to_num(0.0, 0.0, 0.0)
    sums = values.new_zeros(2 * BUCKETS).scatter_add_(0, odd >> 24, values)
    return ChunkSummary(sums.cpu(), torch.linalg.vector_norm(values).item(), extrema, strange, checksum)


def range_of(values: Tensor) -> tuple[float, ...]:
    """Return minimum and maximum, or nothing without elements."""
    return tuple(y.item() for y in values.aminmax()) if len(values) else ()


@lru_cache(maxsize=64)  # 32 MB
def odd_hashes(chunk: int, device: torch.device) -> Tensor:
    """Return 2 * hash + 1 of each index in a chunk, as int64. Its upper 9 of 33 bits are the bucket and the sign."""
    above, below = divmod(chunk * SKETCHED_CHUNK, 2**32)
    return 2 * mix(torch.arange(below, below + SKETCHED_CHUNK, device=device) ^ mix(above)) + 1


def mix(x: Whole) -> Whole:
    """Permute the numbers of 32 bits. Both factors are below 2**31, so nothing overflows in int64."""
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
