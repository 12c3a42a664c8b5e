"""Storage formats of parameters, and their decoding: a few rows at a time, in float32.

A format shows in a tensor's dtype and shape and in its companions (scales and markers), so the header is enough to
identify it. Producers name the companions differently, but they mean the same.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .storage import TORCH, CheckpointError, Stored, require

Rows = Callable[[int, int], Tensor]  # decodes the rows of a parameter from a start to before a stop
Nibbles = Literal["high", "low"]

# Suffixes of the companions of a layer whose .weight is quantised, and what they are.
COMPANIONS = {
    ".weight_scale": "scale",
    ".scale_weight": "scale",  # written by ComfyUI before it had comfy_quant
    ".weight_scale_2": "second scale",
    ".input_scale": "input scale",  # scales activations, not the weight
    ".scale_input": "input scale",
    ".comfy_quant": "marker",  # JSON as bytes
    ".torchao_nvfp4": "torchao marker",
}
PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")
# For each format: the dtypes of its weights, the companions it needs, and those it may have.
FORMATS: dict[str, tuple[tuple[str, ...], set[str], set[str]]] = {
    "fp8 cast": (FP8, set(), set()),
    "fp8 scaled": (FP8, {"scale"}, {"input scale", "marker"}),
    "int8 ConvRot": (("I8",), {"scale", "marker"}, set()),
    "nvfp4": (("U8",), {"scale", "second scale"}, {"input scale", "marker", "torchao marker"}),
}
# Formats as markers name them: the dtype of the weights, and the marker's other keys with the supported values.
ANY: tuple[object, ...] = ()
MARKED: dict[str, tuple[str, dict[str, tuple[object, ...]]]] = {
    "float8_e4m3fn": ("F8_E4M3", {"full_precision_matrix_mult": ANY}),
    "float8_e5m2": ("F8_E5M2", {"full_precision_matrix_mult": ANY}),
    "int8_tensorwise": ("I8", {"convrot": (True,), "convrot_groupsize": (256,)}),
    "nvfp4": ("U8", {"full_precision_matrix_mult": ANY}),
    "torchao_nvfp4": (
        "U8",
        {
            "block_size": (16,),
            "is_swizzled_scales": (True,),
            "scope": ANY,
            "config": ANY,
            "use_triton_kernel": ANY,
            "use_dynamic_activation": ANY,
            "use_dynamic_per_tensor_scale": ANY,
        },
    ),
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NVFP4_BLOCK = 16  # columns of a row that share a scale
GROUP = 256  # columns that ConvRot rotates together
CHUNK = 2**22  # elements decoded at a time, which bounds the memory


class Weight(NamedTuple):
    """A parameter of the model as it is stored."""

    shape: tuple[int, ...]
    tensor: Stored
    companions: Mapping[str, Stored]  # by kind: one of the values of `COMPANIONS`
    nibbles: Nibbles  # which of the two NVFP4 codes in a byte comes first

    def read(self, dtype: torch.dtype) -> Tensor:
        """Return the parameter: memory-mapped if it is stored in `dtype`, or else decoded and rounded once.

        Raises `CheckpointError` if it cannot be read or decoded.
        """
        if self.stored_in(dtype):
            return self.tensor.mapped().reshape(self.shape)
        return self.into(torch.empty(self.shape, dtype=dtype, device="cpu"))

    def into(self, out: Tensor) -> Tensor:
        """Decode the parameter into an existing tensor, in its dtype and on its device, and return that tensor.

        Raises `CheckpointError` if the parameter cannot be read or decoded.
        """
        if self.stored_in(out.dtype) and out.device.type == "cpu":
            self.tensor.into(out)
            return out
        at = 0
        for rows in self.chunks():
            out[at : at + len(rows)] = rows
            at += len(rows)
        return out

    def stored_in(self, dtype: torch.dtype) -> bool:
        """Return whether the parameter is stored plainly in this dtype."""
        return TORCH.get(self.tensor.dtype) == dtype and not self.companions

    def chunks(self) -> Iterator[Tensor]:
        """Yield the decoded rows in order, in pieces that bound the memory, each in float32 or as stored."""
        rows, step = self.rows(), max(1, CHUNK // torch.Size(self.shape[1:]).numel())
        for start in range(0, self.shape[0], step):
            yield rows(start, min(start + step, self.shape[0]))

    def rows(self) -> Rows:
        """Return the function that decodes rows. Companions are read and checked at once."""
        self.check_markers()
        decoders = {"fp8 cast": fp8, "fp8 scaled": fp8, "int8 ConvRot": int8_convrot, "nvfp4": nvfp4}
        if self.tensor.file.container == "gguf" and self.tensor.dtype not in PLAIN_DTYPES:
            return gguf_rows(self)
        decode = decoders.get(identify(self))
        return decode(self) if decode else self.tensor.rows

    def companion(self, kind: str) -> Tensor:
        """Return a scale in float32. Raises `CheckpointError` if it is negative or not finite."""
        stored = self.companions[kind]
        scale = stored.tensor().float()
        if not (scale.isfinite() & (scale >= 0)).all():
            raise CheckpointError(stored.file.path, [f"{stored}: a scale that is negative or not finite"])
        return scale

    def check_markers(self) -> None:
        """Raise `CheckpointError` unless the layer's own markers describe what is decoded here."""
        for kind in self.companions.keys() & {"marker", "torchao marker"}:
            stored = self.companions[kind]
            text = bytes(stored.bytes()[:1000])
            try:
                said = json.loads(text)
                dtype, keys = MARKED[said.pop("format")]
                good = dtype == self.tensor.dtype and (dtype != "I8" or said.keys() == keys.keys())
                good &= all(value in keys[key] or keys[key] is ANY for key, value in said.items())
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                good = False
            if not good:
                raise CheckpointError(
                    stored.file.path, [f"{stored} says {text!r}: no supported format of {self.tensor}"]
                )


def identify(weight: Weight) -> str:
    """Return the name of a weight's format. Raises `ValueError`, with the reason, if it has none."""
    shape, tensor, kinds = weight.shape, weight.tensor, weight.companions.keys()
    halved = (*shape[:-1], shape[-1] // 2) if len(shape) == 2 else None
    packed = f": {list(tensor.shape)} is packed fp4 of {list(shape)}" if tensor.shape == halved else ""
    companions = " and ".join(map(str, weight.companions.values())) or "no scales"
    if tensor.dtype in PLAIN_DTYPES or tensor.file.container == "gguf":
        name, right = tensor.dtype, shape
        require(not kinds, f"{tensor} is not quantised, but comes with {companions}")
    else:
        fitting = [
            name
            for name, (dtypes, needed, allowed) in FORMATS.items()
            if tensor.dtype in dtypes and needed <= kinds <= needed | allowed
        ]
        lacking = [
            needed - kinds
            for dtypes, needed, allowed in FORMATS.values()
            if tensor.dtype in dtypes and kinds <= needed | allowed and needed - kinds
        ]
        missing = f", its {' and '.join(sorted(lacking[0]))} is missing" if lacking else ""
        require(len(fitting) == 1, f"{tensor} with {companions} is no supported format{packed}{missing}")
        name, right = fitting[0], halved if halved and fitting == ["nvfp4"] else shape
    require(tensor.shape == right, f"{tensor} has the wrong shape, expected {list(shape)}{packed}")
    for kind, columns in (("nvfp4", NVFP4_BLOCK), ("int8 ConvRot", GROUP)):
        require(name != kind or shape[-1] % columns == 0, f"{tensor}: {kind} needs columns in groups of {columns}")
    for kind, shapes in scale_shapes(name, weight).items():
        stored = weight.companions[kind]
        require(stored.shape in shapes, f"{stored} has the wrong shape, expected {' or '.join(map(str, shapes))}")
        dtypes = ("F8_E4M3",) if (name, kind) == ("nvfp4", "scale") else PLAIN_DTYPES
        require(stored.dtype in dtypes, f"{stored} has the wrong dtype, expected {' or '.join(dtypes)}")
    return name


def scale_shapes(name: str, weight: Weight) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Return the shapes that the scales of a format may have, by kind of companion."""
    scalar: tuple[tuple[int, ...], ...] = ((), (1,))
    if name == "fp8 scaled":
        return {"scale": scalar}
    if name == "int8 ConvRot":
        return {"scale": ((weight.shape[0], 1),)}
    if name == "nvfp4":
        tiles, groups = -(-weight.shape[0] // 128), -(-weight.shape[1] // NVFP4_BLOCK // 4)
        tiled = (32 * tiles, 16 * groups) if "torchao marker" in weight.companions else (128 * tiles, 4 * groups)
        return {"scale": (tiled,), "second scale": scalar}
    return {}


def fp8(weight: Weight) -> Rows:
    """Decode float8 by a table of all 256 values, times the scale if there is one."""
    table = torch.arange(256, dtype=torch.uint8, device="cpu").view(TORCH[weight.tensor.dtype]).float()
    if "scale" in weight.companions:
        table *= weight.companion("scale").reshape(())
    return lambda start, stop: taken(table, weight, start, stop).reshape(-1, *weight.shape[1:])


def taken(table: Tensor, weight: Weight, start: int, stop: int) -> Tensor:
    """Return the table's entries for each byte of these rows.

    NumPy's take is several times faster than torch's indexing.
    """
    return torch.from_numpy(table.numpy().take(np.frombuffer(weight.tensor.row_bytes(start, stop), np.uint8), axis=0))


def int8_convrot(weight: Weight) -> Rows:
    """Decode int8 weights that ConvRot rotated before rounding.

    Stored is round(W H / scale), where H is orthogonal and symmetric in each group of 256 columns and each row has a
    scale. Sums of at most 256 int8 values are exact in float32, and so is the division by 16: only one rounding
    happens.
    """
    scale, signs = weight.companion("scale") / 16, hadamard()

    def rows(start: int, stop: int) -> Tensor:
        groups = rearrange(weight.tensor.rows(start, stop).float(), "n (g c) -> n g c", c=GROUP)
        return rearrange(groups @ signs, "n g c -> n (g c)") * scale[start:stop]

    return rows


def hadamard() -> Tensor:
    """Return a matrix (256, 256) of 1 and -1: ConvRot's matrix times 16.

    ConvRot's own matrix is the fourth Kronecker power of half the 4 by 4 matrix below.
    """
    h4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], device="cpu")
    return torch.kron(torch.kron(h4, h4), torch.kron(h4, h4))


def nvfp4(weight: Weight) -> Rows:
    """Decode NVFP4: E2M1 codes, two in a byte, times a float8 scale for each 16 columns, times one scale for all."""
    values = torch.tensor(E2M1, device="cpu")
    pairs = torch.cartesian_prod(values, values)  # (256, 2): the two values of each byte, high nibble first
    if weight.nibbles == "low":
        pairs = pairs.flip(1)
    scales, scale = untiled(weight.companion("scale"), weight.shape), weight.companion("second scale").reshape(())

    def rows(start: int, stop: int) -> Tensor:
        codes = taken(pairs, weight, start, stop)  # (ROWS * COLUMNS / 2, 2)
        blocks = codes.reshape(stop - start, -1, NVFP4_BLOCK) * scales[start:stop, :, None]
        return rearrange(blocks, "n g c -> n (g c)") * scale

    return rows


def untiled(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return scales (ROWS, COLUMNS / 16) from cuBLAS' padded tiles of 128 rows and 4 columns.

    Inside a tile, consecutive entries are 32 rows apart.
    """
    rows, groups = shape[0], shape[1] // NVFP4_BLOCK
    tiles = scale.reshape(-(-rows // 128), -(-groups // 4), 32, 4, 4)
    return rearrange(tiles, "rt ct r32 q c -> (rt q r32) (ct c)")[:rows, :groups]


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
