"""Decoders: the values of a stored weight in float32, a few rows at a time, one small function for each format."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from einops import rearrange

from ..lazy import numpy as np
from ..lazy import torch
from .storage import CheckpointError, Stored, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from .quantised import Weight

Rows: TypeAlias = "Callable[[int, int], Tensor]"  # decodes the rows of a parameter from a start to before a stop

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
INT4 = (*range(8), *range(-8, 0))  # two's complement
BNB_STEP = 7.874015718698502e-3  # 1/127 as bitsandbytes writes it
TILE_ROWS, TILE_COLUMNS = 128, 4  # cuBLAS' tiles of scales


def fp8(weight: Weight) -> Rows:
    """Decode float8 by a table of all 256 values, times the scales if there are any."""
    table = fp8_table(weight.tensor)
    if "scale" not in weight.companions:
        return lookup(table, weight)
    scale = scales(weight, "scale")
    if scale.numel() == 1:
        return lookup(table * scale.reshape(()), weight)
    return scaled(lookup(table, weight), scale, weight)


def mxfp8(weight: Weight) -> Rows:
    """Decode MXFP8: float8 times a power of two for each 32 columns, whose exponent is stored with 127 added."""
    exponents = bytes_of(weight.companions["scale"])
    if (exponents == 255).any():
        raise CheckpointError(weight.tensor.file.path, [f"{weight.companions['scale']}: a scale that is not finite"])
    powers = exponents.view(torch.float8_e8m0fnu).float()
    _, columns = weight.shape
    padded = weight._replace(shape=weight.tensor.shape)
    decoded = scaled(lookup(fp8_table(weight.tensor), padded), block_scales(padded, powers, 32), padded)
    return lambda start, stop: decoded(start, stop)[:, :columns]


def int8(weight: Weight) -> Rows:
    """Decode int8: the number times its scale, and the rotation undone if there is one."""
    numbers: Rows = lambda start, stop: weight.tensor.rows(start, stop).float()  # noqa: E731
    return rotated_back(numbers, scales(weight, "scale"), weight)


def bitsandbytes_int8(weight: Weight) -> Rows:
    """Decode the int8 of bitsandbytes: each row's scale is 127 times that of a number."""
    decoded = scaled(lambda start, stop: weight.tensor.rows(start, stop).float(), scales(weight, "scb"), weight)
    return lambda start, stop: decoded(start, stop) * BNB_STEP


def nvfp4(weight: Weight) -> Rows:
    """Decode NVFP4: E2M1 codes, two in a byte, times a float8 scale for each 16 columns, times one scale for all."""
    by_block = block_scales(weight, scales(weight, "scale"), 16)
    codes = lookup(values_by_byte(E2M1, str(weight.facts["nibbles"])), weight)
    scale = scales(weight, "second scale").reshape(())
    decoded = scaled(codes, by_block, weight)
    return lambda start, stop: decoded(start, stop) * scale


def int4_convrot(weight: Weight) -> Rows:
    """Decode convrot_w4a4: signed numbers of 4 bits, the first one in the low nibble, rotated before rounding."""
    return rotated_back(lookup(values_by_byte(INT4, "low"), weight), scales(weight, "scale"), weight)


def w4a8(weight: Weight) -> Rows:
    """Decode asym_w4a8_int8: codes of 4 or 6 bits that a table and a group's scale turn into int8, rotated.

    Codes of 6 bits have their upper two bits in a plane of their own, behind the nibbles. There is no table for them.
    """
    columns, wide = weight.shape[1], weight.tensor.shape[1] * 8 // weight.shape[1]
    table = numbers_of(weight, "codebook") if "codebook" in weight.companions else torch.arange(64.0) - 2 ** (wide - 1)
    group_scale, group = s_rel(weight.companions["group scale"]), weight.facts["group"]

    def levels(start: int, stop: int) -> Tensor:
        data = torch.frombuffer(weight.tensor.row_bytes(start, stop), dtype=torch.uint8).reshape(stop - start, -1)
        nibbles = data[:, : columns // 2].int()
        codes = torch.stack((nibbles & 15, nibbles >> 4), 2).flatten(1)
        if wide == 6:
            upper = data[:, columns // 2 :, None].int() >> torch.arange(0, 8, 2) & 3
            codes |= upper.flatten(1) << 4
        exact = rearrange(table[codes.long()], "n (g c) -> n g c", c=group) * group_scale[start:stop, :, None]
        return rearrange(exact.round().clamp(-127, 127), "n g c -> n (g c)")

    channel = scales(weight, "channel scale")
    if "correction" not in weight.companions:
        return rotated_back(levels, channel, weight)
    correction, plain = numbers_of(weight, "correction").T, scaled(levels, channel, weight)  # (ROWS, GROUPS)

    def corrected(start: int, stop: int) -> Tensor:
        return plain(start, stop) + correction[start:stop].repeat_interleave(int(group), 1)

    return rotated_back(corrected, torch.ones(1), weight)


def bitsandbytes_4bit(weight: Weight) -> Rows:
    """Decode nf4 or fp4: codes, the first one in the high nibble, of a table, times the largest of each block."""
    table, block = numbers_of(weight, "quant map").reshape(-1), weight.facts["group"]
    columns, largest = weight.shape[1], numbers_of(weight, "absmax").reshape(-1)
    if "nested absmax" in weight.companions:  # the largest ones are quantised themselves
        codes = numbers_of(weight, "nested quant map").reshape(-1)[largest.long()]
        of = torch.arange(len(codes)) // weight.facts["nested group"]
        largest = codes * numbers_of(weight, "nested absmax").reshape(-1)[of] + weight.facts["offset"]
    values = values_by_byte(tuple(table.tolist()), "high")

    def rows(start: int, stop: int) -> Tensor:
        data = weight.tensor.file.read(
            weight.tensor.start + start * columns // 2, weight.tensor.start + stop * columns // 2, weight.tensor.name
        )
        of = torch.arange(start * columns, stop * columns) // block
        return (take_bytes(values, data).reshape(-1) * largest[of]).reshape(-1, columns)

    return rows


def mlx(weight: Weight) -> Rows:
    """Decode MLX's affine formats: whole numbers, from the low bits of a word up, times a scale, plus a bias."""
    columns, groups = weight.shape[1], weight.companions["scales"].shape[1]
    per_byte = columns // (4 * weight.tensor.shape[1])
    bits = 8 // per_byte
    numbers = torch.arange(256)[:, None] >> bits * torch.arange(per_byte) & 2**bits - 1
    scale, bias = numbers_of(weight, "scales"), numbers_of(weight, "biases")

    def decoded(start: int, stop: int) -> Tensor:
        codes = take_bytes(numbers.float(), weight.tensor.row_bytes(start, stop)).reshape(stop - start, groups, -1)
        return rearrange(codes * scale[start:stop, :, None] + bias[start:stop, :, None], "n g c -> n (g c)")

    return decoded


def gguf_rows(weight: Weight) -> Rows:
    """Decode a GGUF quantisation with the gguf library."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[weight.tensor.dtype]
    elements, size = GGML_QUANT_SIZES[kind]

    def rows(start: int, stop: int) -> Tensor:
        blocks = np.frombuffer(weight.tensor.row_bytes(start, stop), np.uint8).reshape(-1, size)
        return torch.from_numpy(dequantize(blocks, kind)).reshape(-1, *weight.shape[1:])

    if weight.shape[-1] % elements == 0:
        return rows
    whole = rows(0, weight.shape[0])  # a quantised block reaches across rows, so all rows are decoded at once
    return lambda start, stop: whole[start:stop]


@cache
def ggml_decodes(dtype: str) -> bool:
    """Return whether the gguf library can decode a ggml type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[dtype]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


# What the decoders share.


def scales(weight: Weight, kind: str) -> Tensor:
    """Return the scales of a weight in float32. Raises `CheckpointError` if one is negative or not finite."""
    found = numbers_of(weight, kind)
    if (found < 0).any():
        raise CheckpointError(weight.tensor.file.path, [f"{weight.companions[kind]}: a scale that is negative"])
    return found


def numbers_of(weight: Weight, kind: str) -> Tensor:
    """Return a companion in float32. Raises `CheckpointError` if a number of it is not finite."""
    stored = weight.companions[kind]
    found = stored.tensor().float()
    if not found.isfinite().all():
        raise CheckpointError(stored.file.path, [f"{stored}: a scale that is not finite"])
    return found


def s_rel(stored: Stored) -> Tensor:
    """Return the scales of groups, which are float32, or float8 that may be declared as bytes."""
    found = stored.tensor() if stored.dtype == "F32" else bytes_of(stored).view(torch.float8_e4m3fn).float()
    if not (found.isfinite() & (found >= 0)).all():
        raise CheckpointError(stored.file.path, [f"{stored}: a scale that is negative or not finite"])
    return found


def bytes_of(stored: Stored) -> Tensor:
    """Return a tensor with elements of one byte, whatever they mean, as uint8."""
    return torch.frombuffer(stored.bytes(), dtype=torch.uint8).reshape(stored.shape)


def fp8_table(stored: Stored) -> Tensor:
    """Return the values of all 256 bytes of a float8 dtype."""
    return torch.arange(256, dtype=torch.uint8).view(torch_dtype(stored.dtype)).float()


def values_by_byte(values: tuple[float, ...], first: str) -> Tensor:
    """Return (256, 2): the two values of each byte, of which the first one has its code in the high or low nibble."""
    table = torch.tensor(values, dtype=torch.float32)
    both = torch.cartesian_prod(table, table)
    return both if first == "high" else both.flip(1)


def take_bytes(table: Tensor, data: bytearray) -> Tensor:
    """Return the table's entry for each byte. NumPy's take is several times faster than torch's indexing."""
    return torch.from_numpy(table.numpy().take(np.frombuffer(data, np.uint8), axis=0))


def lookup(table: Tensor, weight: Weight) -> Rows:
    """Decode each byte of a weight by a table."""
    return lambda start, stop: take_bytes(table, weight.tensor.row_bytes(start, stop)).reshape(-1, *weight.shape[1:])


def scaled(values: Rows, scale: Tensor, weight: Weight) -> Rows:
    """Multiply rows by scales, each of which is for a block of rows and columns: all, one row, or a part of it."""
    by_block = scale.reshape(1, 1) if scale.numel() == 1 else scale.reshape(len(scale), -1)
    if scale.numel() == 1:
        return lambda start, stop: values(start, stop) * by_block.reshape(())
    tall, groups = weight.shape[0] // len(by_block), by_block.shape[1]

    def rows(start: int, stop: int) -> Tensor:
        blocks = values(start, stop).reshape(stop - start, groups, -1)
        return rearrange(blocks * by_block[torch.arange(start, stop) // tall, :, None], "n g c -> n (g c)")

    return rows


def rotated_back(values: Rows, scale: Tensor, weight: Weight) -> Rows:
    """Undo ConvRot's rotation of groups of columns, and multiply by one scale, or one for each row.

    The rotated numbers were rounded: stored is round(W H / scale), where H is orthogonal and symmetric. Sums of at most
    1,024 whole numbers up to 127 are exact in float32, and so is the division by a power of two, so that only the
    product with the scale rounds.
    """
    group = weight.facts.get("rotation", 0)
    if not group:
        return scaled(values, scale, weight)
    signs = hadamard(group)

    def turned(start: int, stop: int) -> Tensor:
        groups = rearrange(values(start, stop), "n (g c) -> n g c", c=group)
        return rearrange(groups @ signs, "n g c -> n (g c)")

    return scaled(turned, scale / group**0.5, weight)


def hadamard(size: int) -> Tensor:
    """Return a matrix of 1 and -1, which is ConvRot's times the root of its size: a Kronecker power of a 4 by 4 one."""
    h4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    result = h4
    while len(result) < size:
        result = torch.kron(result, h4)
    return result


def block_scales(weight: Weight, scale: Tensor, group: int) -> Tensor:
    """Return the scales (ROWS, GROUPS) of blocks in a row, out of cuBLAS' tiles if they are stored so.

    Tiles have 128 rows and 4 columns and are padded. Inside one, consecutive entries are 32 rows apart.
    """
    rows, groups = weight.shape[0], weight.shape[1] // group
    if weight.facts["scales"] == "flat":
        return scale
    tiles = scale.reshape(-(-rows // TILE_ROWS), -(-groups // TILE_COLUMNS), 32, 4, TILE_COLUMNS)
    return rearrange(tiles, "rt ct r32 q c -> (rt q r32) (ct c)")[:rows, :groups].contiguous()
