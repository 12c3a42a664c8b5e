"""Exact arithmetic in plain Python, written from docs/arithmetic.md: lists of floats, `math`, and a rounding.

It imports neither torch nor the package, as a port in another language would not. Tensors are lists of rows.
"""

import math
import struct
from collections.abc import Sequence

Row = list[float]


def float32(x: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def bfloat16(x: float) -> float:
    bits = struct.unpack("<I", struct.pack("<f", float32(x)))[0]
    if not math.isnan(x):
        bits += 0x7FFF + (bits >> 16 & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def float16(x: float) -> float:
    narrow = float32(x)
    if abs(narrow) >= 65520:
        return math.copysign(math.inf, narrow)
    return struct.unpack("<e", struct.pack("<e", narrow))[0]


ROUND = {"float32": float32, "bfloat16": bfloat16, "float16": float16}


def fold(terms: Sequence[float]) -> float:
    x = list(terms)
    while len(x) > 1:
        half = len(x) // 2
        for i in range(half):
            x[i] = x[i] + x[len(x) - half + i]
        del x[len(x) - half :]
    return x[0] if x else 0.0


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return fold([x * y for x, y in zip(a, b, strict=True)])


def linear(x: Row, weight: list[Row], bias: Row, dtype: str) -> Row:
    return [ROUND[dtype](dot(x, row) + b) for row, b in zip(weight, bias, strict=True)]


def sigmoid(x: float) -> float:
    e = math.exp(-abs(x))
    return 1 / (1 + e) if x >= 0 else e / (1 + e)


def silu(x: float) -> float:
    return x * sigmoid(x)


def gelu(x: float) -> float:
    return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def softmax(x: Sequence[float]) -> Row:
    e = [math.exp(y - max(x)) for y in x]
    total = fold(e)
    return [y / total for y in e]


def attention(q: Row, k: list[Row], v: list[Row], mask: Row, dtype: str) -> Row:
    scale = 1 / math.sqrt(len(q))
    logits = [dot(q, row) * scale + m for row, m in zip(k, mask, strict=True)]
    if max(logits) == -math.inf:
        return [0.0] * len(v[0])
    p = softmax(logits)
    return [ROUND[dtype](dot(p, [row[i] for row in v])) for i in range(len(v[0]))]


def rms_norm(x: Row, weight: Row, dtype: str, eps: float = 1e-6) -> Row:
    square = float32(float32(fold([float32(y * y) for y in x]) / len(x)) + eps)
    factor = float32(1 / math.sqrt(square))
    return [ROUND[dtype](float32(float32(y * factor) * w)) for y, w in zip(x, weight, strict=True)]


def layer_norm(x: Row, dtype: str, eps: float = 1e-6) -> Row:
    mean = fold(x) / len(x)
    deviation = math.sqrt(fold([(y - mean) * (y - mean) for y in x]) / len(x) + eps)
    return [ROUND[dtype]((y - mean) / deviation) for y in x]


def linspace(start: float, end: float, steps: int) -> Row:
    step = (end - start) / (steps - 1)
    return [start + step * i if i < steps // 2 else end - step * (steps - 1 - i) for i in range(steps)]
