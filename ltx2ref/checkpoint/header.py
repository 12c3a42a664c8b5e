"""Headers of safetensors and GGUF files, which say what tensors a file holds, checked before anything is believed.

The safetensors library is not used here for two reasons. It accepts names that occur twice, and it maps whole files,
so that a file which shrinks while it is read crashes the process.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from .gguf_header import read_gguf
from .storage import CheckpointError, Stored, TensorFile, open_regular, reading

MAX_HEADER = 8 * 2**20  # bytes; the largest published header has 1.3 MB
MAX_VALUES = 400_000  # brackets and commas, eight for each tensor; bounds the memory that a hostile header can take
MAX_DIMENSIONS = 8
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
# First bytes of files that often have the wrong extension. They are never opened, because unpickling runs code.
PICKLES = {b"PK": "a zip archive, as torch.save writes it", b"\x80": "a pickle"}


def read_header(path: Path) -> tuple[TensorFile, dict[str, Stored]]:
    """Read the header of a file and return the file with its tensors, in the order of the header.

    Raises `CheckpointError` if the file cannot be read or its header is not valid.
    """
    with reading(path), BufferedReader(open_regular(path)) as file:
        stat, first = os.fstat(file.fileno()), file.read(8)
        if first.startswith(b"GGUF"):
            return read_gguf_file(path, file, TensorFile(path, "gguf", stat.st_size, stat.st_mtime_ns))
        length = int.from_bytes(first, "little")
        header = file.read(length) if length <= MAX_HEADER else b""
    try:
        require_length(first, length, stat.st_size, header)
        entries = parse_json(header)
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__: expected an object of strings")
        opened = TensorFile(path, "safetensors", stat.st_size, stat.st_mtime_ns, metadata)
        stored = [stored_tensor(opened, name, value, 8 + length) for name, value in entries.items()]
        require_packed(stored, 8 + length, stat.st_size)
    except ValueError as error:
        raise CheckpointError(path, [f"header: {error}"]) from None
    return opened, {tensor.name: tensor for tensor in stored}


def require_length(first: bytes, length: int, size: int, header: bytes) -> None:
    """Raise `ValueError` unless the file begins with the length of a header that it holds in full."""
    for magic, what in PICKLES.items():
        if first.startswith(magic) and length > MAX_HEADER:
            raise ValueError(f"not a safetensors file, but {what}: such files are never opened")
    if len(first) < 8:
        raise ValueError(f"not a safetensors file: it has {size} bytes, and the length of the header takes 8")
    if length > MAX_HEADER:
        raise ValueError(f"not a safetensors file: a header of {length} bytes, expected at most {MAX_HEADER}")
    if len(header) < length:
        raise ValueError(f"the header has {length} bytes, the file only {size}")


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse a JSON object from untrusted bytes.

    Raises `ValueError` for anything that is not such an object, is too large or has the same name twice.
    """
    if len(text) > MAX_HEADER or sum(map(text.count, (b"[", b"{", b","))) > MAX_VALUES:
        raise ValueError(f"JSON of more than {MAX_HEADER} bytes or {MAX_VALUES} values")
    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at byte {error.pos}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict. Raises `ValueError` for a name that occurs twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]}: occurs twice")
    return result


def refuse(constant: str) -> None:
    """Raise `ValueError` for NaN and infinities, which Python accepts but JSON does not have."""
    raise ValueError(f"not JSON: {constant}")


def stored_tensor(file: TensorFile, name: str, value: Any, data: int) -> Stored:
    """Return the tensor that a header's entry describes. Raises `ValueError` unless the entry is consistent.

    `data` is the byte at which the data begins; offsets in the header count from there.
    """
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: expected dtype, shape and data_offsets, got {str(value)[:80]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name}: unknown dtype {str(dtype)[:80]!r}")
    if not whole(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name}: expected a shape of at most {MAX_DIMENSIONS} whole numbers, got {str(shape)[:80]}")
    if not whole(offsets) or len(offsets) != 2:
        raise ValueError(f"{name}: expected two whole numbers as data_offsets, got {str(offsets)[:80]}")
    bits, has = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * has:
        raise ValueError(f"{name}: {dtype} {shape} needs {bits // 8} bytes, its data_offsets hold {has}")
    return Stored(file, name, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def whole(values: Any) -> bool:
    """Return whether a value is a list of integers between 0 and 2**63."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def require_packed(tensors: Sequence[Stored], data: int, size: int) -> None:
    """Raise `ValueError` unless every byte after the header belongs to exactly one tensor.

    This way no bytes are hidden in a file, and no tensor is cut off.
    """
    end, before = data, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start != end:
            raise ValueError(f"{tensor.name}: begins at byte {tensor.start}, but {before} ends at byte {end}")
        end, before = tensor.stop, tensor.name
    if end != size:
        raise ValueError(f"the file has {size} bytes, but {before} ends at byte {end}")


def read_gguf_file(path: Path, content: BinaryIO, file: TensorFile) -> tuple[TensorFile, dict[str, Stored]]:
    """Read the header of a GGUF file. Raises `CheckpointError`, also where the gguf library is not installed."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ModuleNotFoundError:
        raise CheckpointError(path, ["a GGUF file: `pip install 'ltx2ref[gguf]'` to read it"]) from None

    def ggml_type(number: int) -> tuple[str, int, int]:
        if number not in GGML_QUANT_SIZES:
            raise ValueError(f"ggml type {number}, which the gguf library does not know")
        return GGMLQuantizationType(number).name, *GGML_QUANT_SIZES[GGMLQuantizationType(number)]

    try:
        content.seek(0)
        return file, read_gguf(file, content, ggml_type)
    except ValueError as error:
        raise CheckpointError(path, [f"not a readable GGUF file: {error}"]) from None
