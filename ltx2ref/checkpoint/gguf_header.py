"""The header of a GGUF file: metadata and tensors, in which no count is believed that the file has no bytes for.

The gguf library's own reader is not used. It makes several arrays for each value that a header says it has, before
anything is checked, and maps the whole file. From the library come the types of ggml, and what a block of each takes.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from .storage import Stored, TensorFile, require

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # followed by a tensor's name: its shape, where GGUF stores another one
ALIGNMENT = "general.alignment"  # key of the metadata: the data, and each tensor in it, begin at a multiple of this
VERSIONS = (2, 3)
TEXT, ARRAY = 8, 9  # the types of a value in the metadata that have no fixed size
VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # the bytes of each other type
SIGNED = {0: False, 1: True, 2: False, 3: True, 4: False, 5: True, 10: False, 11: True}  # and whether it has a sign
GGUF_DIMENSIONS = 8
# Bounds for honest files. The largest tokenizers have 780,000 texts, which are passed over and not kept.
MAX_ENTRIES, MAX_KEPT, MAX_PASSED = 2**16, 2**23, 2**20
Types = Callable[[int], tuple[str, int, int]]  # from a number: the name of a ggml type, and elements and bytes a block


class GgufTensor(NamedTuple):
    """A tensor as a header describes it. ggml lists dimensions from the last to the first."""

    name: str
    dimensions: list[int]
    type: int
    offset: int


class GgufBytes:
    """The bytes of a header, taken one after the other. Raises `ValueError` where a count exceeds what is left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left = file, size, size
        self.kept, self.passed = MAX_KEPT, MAX_PASSED

    def require(self, count: int, least: int, what: str) -> None:
        """Raise `ValueError` unless `count` things of at least `least` bytes fit into what is left."""
        if count * least > self.left:
            raise ValueError(f"{count} {what} at byte {self.size - self.left}, but {self.left} bytes are left")

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self.require(count, 1, "bytes")
        self.left -= count
        found = self.file.read(count)
        if len(found or b"") < count:
            raise ValueError(f"the file ends before byte {self.size - self.left}")
        return found

    def skip(self, count: int, size: int, what: str) -> None:
        """Pass over `count` things of `size` bytes without reading them."""
        self.require(count, size, what)
        self.left -= count * size
        self.file.seek(count * size, 1)

    def number(self, size: int, signed: bool = False) -> int:
        """Return the next integer."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def text(self) -> str:
        """Return the next text, which counts among what is kept."""
        length = self.number(8)
        self.require(length, 1, "bytes of text")
        self.kept -= length
        require(self.kept >= 0, f"names and texts of more than {MAX_KEPT} bytes")
        return self.take(length).decode()

    def pass_over(self, kind: int) -> None:
        """Pass over a value that is neither a text nor an array of shape."""
        if kind != ARRAY:
            self.skip(1, scalar_size(kind), "value")
            return
        kind, count = self.number(4), self.number(8)
        if kind != TEXT:
            self.skip(count, scalar_size(kind), "values")
            return
        self.require(count, 8, "texts")
        self.passed -= count
        require(self.passed >= 0, f"arrays of more than {MAX_PASSED} texts")
        for _ in range(count):  # a function call for each would be most of the time that a large header takes
            length = int.from_bytes(self.file.read(8), "little")
            self.left -= 8 + length
            require(self.left >= 0, "a text that is longer than the file")
            self.file.seek(length, 1)

    def shape(self) -> tuple[int, ...]:
        """Return the next value, an array of integers."""
        kind, count = self.number(4), self.number(8)
        require(kind in SIGNED and count <= GGUF_DIMENSIONS, f"expected at most {GGUF_DIMENSIONS} whole numbers")
        return tuple(self.number(VALUE_SIZES[kind], SIGNED[kind]) for _ in range(count))


def scalar_size(kind: int) -> int:
    """Return the size of a value of a type. Raises `ValueError` for a type that is unknown, or an array in an array."""
    require(kind in VALUE_SIZES, "an array of arrays" if kind == ARRAY else f"unknown type of value {kind}")
    return VALUE_SIZES[kind]


def read_gguf(file: TensorFile, content: BinaryIO, types: Types) -> dict[str, Stored]:
    """Read the header of a GGUF file: its texts go into the metadata of `file`, and its tensors are returned.

    Raises `ValueError` for a header that is not valid.
    """
    header = GgufBytes(content, file.size)
    require(header.take(4) == b"GGUF", "the file does not begin with GGUF")
    version = header.number(4)
    require(version % 2**16 != 0, "written for a machine with another order of bytes (big-endian)")
    require(version in VERSIONS, f"version {version}, expected {' or '.join(map(str, VERSIONS))}")
    tensors, entries = header.number(8), header.number(8)
    header.require(entries, 13, "entries of metadata")
    header.require(tensors, 24, "tensors")
    require(max(tensors, entries) <= MAX_ENTRIES, f"{tensors} tensors and {entries} entries, at most {MAX_ENTRIES}")
    shapes, alignment = read_entries(header, entries, file.metadata)
    described = [read_tensor(header) for _ in range(tensors)]
    data = -(-(file.size - header.left) // alignment) * alignment
    stored: dict[str, Stored] = {}
    for tensor in described:
        require(tensor.name not in stored, f"{tensor.name}: occurs twice")
        require(tensor.offset % alignment == 0, f"{tensor.name}: its offset is no multiple of {alignment}")
        stored[tensor.name] = gguf_tensor(file, tensor, shapes.get(tensor.name), data, types)
    require_apart(stored)
    return stored


def read_entries(header: GgufBytes, count: int, metadata: dict[str, str]) -> tuple[dict[str, tuple[int, ...]], int]:
    """Read all metadata. Texts are added to `metadata`; the original shapes of tensors and the alignment are returned.

    Numbers and arrays that say nothing about tensors are passed over.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    alignment, names = 32, set[str]()
    for _ in range(count):
        name, kind = header.text(), header.number(4)
        require(name not in names, f"{name}: occurs twice")
        names.add(name)
        try:
            if kind == TEXT:
                metadata[name] = header.text()
            elif name.startswith(ORIGINAL_SHAPE) and kind == ARRAY:
                shapes[name.removeprefix(ORIGINAL_SHAPE)] = header.shape()
            elif name == ALIGNMENT:
                require(kind == 4, "expected a whole number of 32 bits")
                alignment = header.number(4)
                require(alignment.bit_count() == 1, f"{alignment} is no power of two")
            else:
                header.pass_over(kind)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return shapes, alignment


def read_tensor(header: GgufBytes) -> GgufTensor:
    """Read what a header says about its next tensor."""
    name, count = header.text(), header.number(4)
    require(count <= GGUF_DIMENSIONS, f"{name}: {count} dimensions, at most {GGUF_DIMENSIONS}")
    return GgufTensor(name, [header.number(8) for _ in range(count)], header.number(4), header.number(8))


def gguf_tensor(
    file: TensorFile, tensor: GgufTensor, original: tuple[int, ...] | None, data: int, types: Types
) -> Stored:
    """Return a tensor that lies in the data of a file, which begins at byte `data`.

    Raises `ValueError` if it does not, or if its shape and type do not fit.
    """
    name, dimensions, number, offset = tensor
    kind, elements, size = types(number)
    shape, count = original if original is not None else tuple(reversed(dimensions)), math.prod(dimensions)
    require(math.prod(shape) == count and min(shape, default=0) >= 0, f"{name}: {list(shape)} is no shape of {count}")
    require(math.prod(dimensions[:1]) % elements == 0, f"{name}: {kind} needs columns in groups of {elements}")
    start, stop = data + offset, data + offset + count // elements * size
    require(stop <= file.size, f"{name}: ends at byte {stop}, but the file has {file.size} bytes")
    return Stored(file, name, kind, shape, start, stop)


def require_apart(tensors: dict[str, Stored]) -> None:
    """Raise `ValueError` if two tensors share bytes."""
    inside = sorted((tensor for tensor in tensors.values() if tensor.start < tensor.stop), key=lambda x: x.start)
    for before, after in pairwise(inside):
        require(before.stop <= after.start, f"{after.name}: begins at byte {after.start}, inside {before.name}")
