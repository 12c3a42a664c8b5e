"""The formats of weights: a table of what marks each one, what accompanies it, and which function decodes its rows.

How a weight is stored shows in dtypes and shapes, in its companions (scales and markers), and in what the file states
(`sayings`). All of it is known before data are read. Producers name the companions differently, but they mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..lazy import torch
from . import decoders
from .decoders import TILE_COLUMNS, TILE_ROWS, Rows
from .sayings import DATA, NOT_QUANTISED, FactMap, Saying
from .storage import Stored, require, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

Nibbles = Literal["high", "low"]
ScaleOrder = Literal["tiled", "flat"]
Shape = tuple[int, ...]
Permitted = dict[str, list[Shape]]  # permitted shapes of a companion, by the value of the fact `scales` that each shows

# Suffixes of the companions of a layer, behind its name, and what they are.
COMPANIONS = {
    ".weight_scale": "scale",
    ".scale_weight": "scale",  # written by ComfyUI before it had comfy_quant
    ".weight._scale": "scale",  # quanto's
    ".weight_scale_2": "second scale",
    ".input_scale": "input scale",  # scales activations, not the weight
    ".scale_input": "input scale",
    ".output_scale": "output scale",
    ".comfy_quant": "marker",  # JSON as bytes
    ".torchao_nvfp4": "torchao marker",
    ".weight_scalar": "scale of all",  # of hybrid mxfp8: an approximation that is not used
    ".weight_s_rel": "group scale",
    ".weight_s_channel": "channel scale",
    ".weight_codebook": "codebook",
    ".weight_correction": "correction",
    ".weight.absmax": "absmax",
    ".weight.quant_map": "quant map",
    ".weight.nested_absmax": "nested absmax",
    ".weight.nested_quant_map": "nested quant map",
    ".weight.quant_state.bitsandbytes__nf4": "quant state",
    ".weight.quant_state.bitsandbytes__fp4": "quant state",
    ".SCB": "scb",
    ".weight_format": "weight format",
    ".scales": "scales",
    ".biases": "biases",
}
PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")
FP8 = ("F8_E4M3", "F8_E5M2")
BLOCK_SIDES = (16, 32, 64, 128, 256, 512)  # sides of blocks that share a scale
ROTATIONS = (4, 16, 64, 256, 1024)
SCALAR: list[Shape] = [(), (1,), (1, 1)]
CHUNK = 2**18  # elements decoded at a time: few enough for the caches of a processor


class Companion(NamedTuple):
    """A tensor that belongs to a weight: its dtypes, and its shapes for a parameter's shape. None means any."""

    dtypes: tuple[str, ...] | None = None
    shapes: Callable[[Shape, FactMap], Permitted] | None = None
    needed: bool = True


class Format(NamedTuple):
    """A way to store a weight."""

    dtypes: tuple[str, ...]
    companions: dict[str, Companion]
    decode: Callable[[Weight], Rows]
    facts: tuple[str, ...] = ()  # that must be known to decode it, and that its shapes may leave open
    stored: Callable[[Shape], list[Shape]] = lambda shape: [shape]  # shapes of the tensor for a parameter's shape
    unpacked: Callable[[Stored, Mapping[str, Stored], FactMap], Shape] = lambda stored, companions, facts: stored.shape
    implied: FactMap = MappingProxyType({})
    declared: bool = False  # whether nothing but a saying tells it from another format
    suffix: str = ""  # of the tensor, behind the parameter's name


class Weight(NamedTuple):
    """A parameter of the model as it is stored."""

    shape: Shape
    tensor: Stored
    companions: Mapping[str, Stored]  # by kind: one of the values of `COMPANIONS`
    format: str  # a name in `FORMATS`, or the dtype of a tensor that is not quantised, or a ggml type
    facts: dict[str, Any]  # how exactly it is stored
    said: dict[str, str]  # for each fact, where it was said

    @property
    def label(self) -> str:
        """Return the name of the format, in which a rotation shows."""
        return "int8 ConvRot" if self.format == "int8" and self.facts.get("rotation") else self.format

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
        return self.format in PLAIN_DTYPES and torch_dtype(self.format) == dtype

    def chunks(self) -> Iterator[Tensor]:
        """Yield the decoded rows in order, in pieces that bound the memory, each in float32 or as stored."""
        step = max(1, CHUNK // math.prod(self.shape[1:]))
        with torch.device("cpu"):
            rows = self.rows()
        for start in range(0, self.shape[0], step):
            with torch.device("cpu"):
                piece = rows(start, min(start + step, self.shape[0]))
            yield piece

    def rows(self) -> Rows:
        """Return the function that decodes rows. Companions are read and checked at once."""
        if self.format in PLAIN_DTYPES:
            return self.tensor.rows
        return FORMATS[self.format].decode(self) if self.format in FORMATS else decoders.gguf_rows(self)


def grid(shape: Shape, facts: FactMap) -> Permitted:
    """Return the shapes of scales that are for the whole weight, for rows, or for blocks of rows and columns."""
    found: Permitted = {"one": SCALAR}
    if len(shape) == 2:
        rows, columns = shape
        found["rows"] = [(rows,), (rows, 1)]
        sides = [side for side in BLOCK_SIDES if columns % side == 0]
        found["blocks"] = [(rows // side, columns // side) for side in sides if rows % side == 0]
        found["parts of rows"] = [x for side in sides for x in ((rows, columns // side), (rows, columns // side, 1))]
    return found


def blocks_of(size: int) -> Callable[[Shape, FactMap], Permitted]:
    """Return the shapes of the scales of blocks in a row: in tiles of cuBLAS, which torchao frames anew, or flat."""

    def shapes(shape: Shape, facts: FactMap) -> Permitted:
        rows, groups = shape[0], -(-shape[1] // size)
        down, across = -(-rows // TILE_ROWS), -(-groups // TILE_COLUMNS)
        tiled: list[Shape] = [(down * TILE_ROWS, across * TILE_COLUMNS), (down * 32, across * 4 * TILE_COLUMNS)]
        return {"tiled": tiled, "flat": [(rows, groups)]}

    return shapes


def fixed(shape: Callable[[int, int, FactMap], Shape]) -> Callable[[Shape, FactMap], Permitted]:
    """Return the one shape of a companion, by the rows and columns of the parameter."""
    return lambda of, facts: {"": [shape(of[0], of[1], facts)] if len(of) == 2 else []}


def unpacked_columns(factor: int) -> Callable[[Stored, Mapping[str, Stored], FactMap], Shape]:
    """Return the shape of a parameter whose columns are packed by this factor."""
    return lambda stored, companions, facts: (*stored.shape[:-1], factor * stored.shape[-1])


def by_groups(kind: str) -> Callable[[Stored, Mapping[str, Stored], FactMap], Shape]:
    """Return the shape of a parameter by the groups of columns that a companion has a scale for."""

    def shape(stored: Stored, companions: Mapping[str, Stored], facts: FactMap) -> Shape:
        scales = companions[kind].shape
        return (scales[0], scales[1] * facts.get("group", 64)) if len(scales) == 2 else stored.shape

    return shape


def halved(shape: Shape) -> list[Shape]:
    """Return the shape of a tensor with two codes in a byte."""
    return [(*shape[:-1], shape[-1] // 2)] if len(shape) == 2 and shape[-1] % 2 == 0 else []


def padded(shape: Shape) -> list[Shape]:
    """Return a shape, and the same with both sides rounded up to 32."""
    return [shape, tuple(-(-length // 32) * 32 for length in shape)] if len(shape) == 2 else []


def said_shape(stored: Stored, companions: Mapping[str, Stored], facts: FactMap) -> Shape:
    """Return the shape that a marker gives, or that of the tensor."""
    return tuple(facts.get("shape", stored.shape))


UNUSED = Companion(needed=False)
FLAG = Companion(("U8",), needed=False)
ONE_NUMBER = Companion(PLAIN_DTYPES, lambda shape, facts: {"": SCALAR})
GRID = Companion(PLAIN_DTYPES, grid)
ROWS = Companion(PLAIN_DTYPES, lambda shape, facts: {"rows": [shape[:1], (shape[0], 1)] if len(shape) == 2 else []})
USUAL = {"input scale": UNUSED, "marker": UNUSED}
PER_64 = Companion(PLAIN_DTYPES, fixed(lambda rows, columns, facts: (rows, columns // 64)))
BNB = Format(
    ("U8",),
    {
        "absmax": Companion(("F32", "U8"), fixed(lambda rows, columns, facts: (-(-rows * columns // facts["group"]),))),
        "quant map": Companion(("F32",), fixed(lambda rows, columns, facts: (16,))),
        "quant state": Companion(("U8",)),
        "nested absmax": Companion(
            ("F32",),
            fixed(
                lambda rows, columns, facts: (-(-rows * columns // (facts["group"] * facts.get("nested group", 1))),)
            ),
            needed=False,
        ),
        "nested quant map": Companion(("F32",), fixed(lambda rows, columns, facts: (256,)), needed=False),
    },
    decoders.bitsandbytes_4bit,
    stored=lambda shape: [(math.prod(shape) // 2, 1), (1, math.prod(shape) // 2)],
    unpacked=said_shape,
    declared=True,
)
# The first format that fits a tensor's dtype and companions is taken, unless a saying names another one.
FORMATS = {
    "fp8 cast": Format(FP8, {}, decoders.fp8),
    "fp8 scaled": Format(FP8, {"scale": GRID, **USUAL}, decoders.fp8),
    "mxfp8": Format(
        ("F8_E4M3",),
        {"scale": Companion(("U8", "F8_E8M0"), blocks_of(32)), "scale of all": UNUSED, **USUAL},
        decoders.mxfp8,
        ("scales",),
        padded,
        said_shape,
        {"group": 32},
    ),
    "int8": Format(("I8",), {"scale": GRID, **USUAL}, decoders.int8, ("rotation",)),
    "quanto int8": Format(
        ("I8",),
        {"scale": ROWS, "input scale": UNUSED, "output scale": UNUSED},
        decoders.int8,
        implied={"rotation": 0},
        suffix=DATA,
    ),
    "bitsandbytes int8": Format(
        ("I8",),
        {"scb": Companion(PLAIN_DTYPES, fixed(lambda rows, columns, facts: (rows,))), "weight format": FLAG},
        decoders.bitsandbytes_int8,
    ),
    "nvfp4": Format(
        ("U8",),
        {
            "scale": Companion(("F8_E4M3",), blocks_of(16)),
            "second scale": ONE_NUMBER,
            "torchao marker": UNUSED,
            **USUAL,
        },
        decoders.nvfp4,
        ("nibbles", "scales"),
        halved,
        unpacked_columns(2),
        {"group": 16},
    ),
    "convrot_w4a4": Format(
        ("I8",),
        {"scale": ROWS, **USUAL},
        decoders.int4_convrot,
        ("rotation",),
        halved,
        unpacked_columns(2),
        declared=True,
    ),
    "asym_w4a8_int8": Format(
        ("I8", "U8"),
        {
            "group scale": Companion(
                ("F8_E4M3", "U8", "F32"), fixed(lambda rows, columns, facts: (rows, columns // facts["group"]))
            ),
            "channel scale": Companion(PLAIN_DTYPES, fixed(lambda rows, columns, facts: (rows,))),
            "codebook": Companion(("F32",), fixed(lambda rows, columns, facts: (16,)), needed=False),
            "correction": Companion(
                PLAIN_DTYPES, fixed(lambda rows, columns, facts: (columns // facts["group"], rows)), needed=False
            ),
            **USUAL,
        },
        decoders.w4a8,
        ("rotation", "group"),
        lambda shape: [(shape[0], shape[1] * bits // 8) for bits in (4, 6)] if len(shape) == 2 else [],
        by_groups("group scale"),
        declared=True,
    ),
    "bitsandbytes nf4": BNB,
    "bitsandbytes fp4": BNB,
    "mlx": Format(
        ("U32",),
        {"scales": PER_64, "biases": PER_64},
        decoders.mlx,
        stored=lambda shape: [(shape[0], shape[1] * bits // 32) for bits in (8, 4, 2)] if len(shape) == 2 else [],
        unpacked=by_groups("scales"),
        implied={"group": 64},
    ),
}


def identify(shape: Shape, tensor: Stored, companions: Mapping[str, Stored], sayings: Sequence[Saying] = ()) -> Weight:
    """Return how a parameter is stored. Facts that neither sayings nor shapes decide are left out.

    Raises `ValueError`, with the reason, if it is in no known format, or if what is said of it does not fit.
    """
    if tensor.dtype in PLAIN_DTYPES or tensor.file.container == "gguf":
        return unquantised(shape, tensor, companions, sayings)
    facts, said = combined(tensor, sayings)
    try:
        name = find_format(tensor, companions, facts, said)
    except ValueError as error:
        raise ValueError(f"{error}{hint(shape, tensor)}") from None
    format = FORMATS[name]
    require(
        tensor.shape in format.stored(shape),
        f"{tensor} has the wrong shape, expected {list(shape)}{hint(shape, tensor)}",
    )
    for fact, value in format.implied.items():
        add_fact(facts, said, fact, value, tensor, f"the format {name}")
    add_fact(facts, said, "shape", shape, tensor, "the model")
    for kind in companions:
        read_shapes(shape, companions[kind], format.companions[kind], facts, said)
    check_groups(name, shape, tensor, facts, said)
    check_parts(name, tensor, companions, facts)
    said.setdefault("format", "dtypes")
    return Weight(shape, tensor, companions, name, facts, said)


def unquantised(shape: Shape, tensor: Stored, companions: Mapping[str, Stored], sayings: Sequence[Saying]) -> Weight:
    """Return a weight that has neither scales nor markers. Raises `ValueError` unless it fits.

    ggml drops leading dimensions of 1, so a GGUF file gives the others alone.
    """
    if companions:
        raise ValueError(f"{tensor} is not quantised, but comes with {in_words(companions)}")
    for where, facts in sayings:
        require(
            facts.get("format") in (None, NOT_QUANTISED),
            f"{where}: {tensor.name} is {facts.get('format')}, but the file has {tensor.dtype}",
        )
    if tensor.file.container == "gguf":
        require(ggml_decodable(tensor), f"{tensor.name}: the gguf library cannot decode {tensor.dtype}")
        if [x for x in tensor.shape if x > 1] == [x for x in shape if x > 1]:
            tensor = tensor._replace(shape=shape)
    if tensor.shape != shape:
        raise ValueError(f"{tensor} has the wrong shape, expected {list(shape)}")
    return Weight(shape, tensor, companions, tensor.dtype, {}, {"format": "dtype"})


def ggml_decodable(tensor: Stored) -> bool:
    """Return whether a tensor of a GGUF file can be decoded."""
    return tensor.dtype in PLAIN_DTYPES or decoders.ggml_decodes(tensor.dtype)


def combined(tensor: Stored, sayings: Sequence[Saying]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return all facts that are stated about a weight, and where. Raises `ValueError` for two that differ."""
    facts: dict[str, Any] = {}
    said: dict[str, str] = {}
    for where, stated in sayings:
        for fact, value in stated.items():
            add_fact(facts, said, fact, value, tensor, where)
    return facts, said


def parameter_shape(tensor: Stored, companions: Mapping[str, Stored], sayings: Sequence[Saying]) -> Shape:
    """Return the shape of a parameter by its tensor alone, which is that of the tensor if its format is not known."""
    if tensor.dtype in PLAIN_DTYPES or tensor.file.container == "gguf" or not tensor.shape:
        return tensor.shape
    try:
        facts, said = combined(tensor, sayings)
        format = FORMATS[find_format(tensor, companions, facts, said)]
    except ValueError:
        return tensor.shape
    return format.unpacked(tensor, companions, facts)


def find_format(tensor: Stored, companions: Mapping[str, Stored], facts: FactMap, said: Mapping[str, str]) -> str:
    """Return the name of the format that a tensor, its companions and sayings show. Raises `ValueError` if none."""
    declared, by = facts.get("format"), said.get("format", "")
    possible = {
        name: lacking(format, companions)
        for name, format in FORMATS.items()
        if tensor.dtype in format.dtypes and companions.keys() <= format.companions.keys()
        if tensor.name.endswith(DATA) == (format.suffix == DATA)
        if name == declared or not (declared or format.declared)
    }
    missing = f", {next(iter(possible.values()))}" if possible else ""
    fitting = [name for name, fault in possible.items() if not fault]
    dtypes = facts.get("dtypes", (tensor.dtype,))
    if fitting and tensor.dtype in dtypes:
        return fitting[0]
    what = f"{tensor} with {in_words(companions)}"
    if fitting:
        raise ValueError(f"{said['dtypes']} says {' or '.join(dtypes)}, but it is {tensor}")
    if declared:
        raise ValueError(f"{by}: {tensor.name} is {declared}, but the file has {what}{missing}")
    raise ValueError(f"{what} is no supported format{missing}")


def lacking(format: Format, companions: Mapping[str, Stored]) -> str:
    """Return what a format lacks among the companions, or which one has the wrong dtype, in words; "" if nothing."""
    missing = [kind for kind, companion in format.companions.items() if companion.needed and kind not in companions]
    if missing:
        return f"its {' and '.join(sorted(missing))} is missing"
    for kind, stored in companions.items():
        dtypes = format.companions[kind].dtypes
        if dtypes is not None and stored.dtype not in dtypes:
            return f"{stored} has the wrong dtype, expected {' or '.join(dtypes)}"
    return ""


def read_shapes(
    shape: Shape, stored: Stored, companion: Companion, facts: dict[str, Any], said: dict[str, str]
) -> None:
    """Check the shape of a companion, and add what it shows. Raises `ValueError` if it contradicts a saying."""
    if companion.shapes is None:
        return
    permitted = companion.shapes(shape, facts)
    shown = [value for value, shapes in permitted.items() if stored.shape in shapes]
    expected = " or ".join(dict.fromkeys(str(x) for shapes in permitted.values() for x in shapes[:2]))
    require(bool(shown), f"{stored} has the wrong shape, expected {expected}")
    if shown == [""]:
        return
    known = facts.get("scales", shown[0])
    if known not in shown:
        raise ValueError(f"{stored}: scales are {known} by {said['scales']}, but {' or '.join(shown)} by its shape")
    if known == "blocks" or known == "parts of rows":
        add_fact(facts, said, "group", shape[1] // stored.shape[1], stored, f"the shape of {stored.name}")
    if len(shown) == 1 or "tiled" not in shown:  # else tiles look like flat scales
        facts["scales"] = known
        said.setdefault("scales", "shape")


def add_fact(facts: dict[str, Any], said: dict[str, str], fact: str, value: Any, tensor: Stored, by: str) -> None:
    """Add a fact. Raises `ValueError`, with both places, if something else is known already."""
    known = facts.setdefault(fact, value)
    require(known == value, f"{tensor.name}: {fact} is {known} by {said.get(fact)}, but {value} by {by}")
    said.setdefault(fact, by)


def check_groups(name: str, shape: Shape, tensor: Stored, facts: dict[str, Any], said: dict[str, str]) -> None:
    """Raise `ValueError` unless columns come in whole groups that share a scale or are rotated together."""
    rotation, group = facts.get("rotation", 0), facts.get("group")
    if name.startswith("bitsandbytes"):  # its blocks reach across rows
        require(math.prod(shape) % 2 == 0 and shape[-1] % 2 == 0, f"{tensor}: {name} needs an even number of columns")
        return
    whole = group is None or name.startswith("fp8") or name == "int8" or tensor.shape[0] == 0
    columns = -(-shape[-1] // 32) * 32 if name == "mxfp8" else shape[-1]
    require(whole or columns % (group or 1) == 0, f"{tensor}: {name} needs columns in groups of {group}")
    if not rotation:
        return
    require(
        rotation in ROTATIONS,
        f"{tensor.name}: a rotation of {rotation} columns, expected {', '.join(map(str, ROTATIONS))}",
    )
    require(shape[-1] % rotation == 0, f"{tensor}: ConvRot needs columns in groups of {rotation}")
    scales = facts.get("scales", "one")
    by_row = f"{tensor.name}: rotated by {said.get('rotation')}, which needs a scale for each row, but has {scales}"
    require(scales in ("one", "rows"), by_row)


def check_parts(name: str, tensor: Stored, companions: Mapping[str, Stored], facts: FactMap) -> None:
    """Raise `ValueError` unless the parts that a format may have belong together."""
    nested = {"nested absmax" in companions, "nested quant map" in companions, "nested group" in facts}
    if "absmax" in companions:
        nested.add(companions["absmax"].dtype == "U8")
    require(len(nested) == 1, f"{tensor}: its quant_state, absmax and nested tensors do not belong together")
    six_bits = name == "asym_w4a8_int8" and tensor.shape[-1] * 8 > facts["shape"][-1] * 4
    require(not (six_bits and "codebook" in companions), f"{tensor}: codes of 6 bits have no codebook")


def in_words(companions: Mapping[str, Stored]) -> str:
    """Return the companions of a tensor in words."""
    return " and ".join(map(str, companions.values())) or "no scales"


def hint(shape: Shape, tensor: Stored) -> str:
    """Return what a tensor of another shape may be, for a message."""
    return f": {list(tensor.shape)} is packed fp4 of {list(shape)}" if [tensor.shape] == halved(shape) else ""
