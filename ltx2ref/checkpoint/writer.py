"""Writing safetensors files piece by piece."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..progress import track
from ..whole import EXISTS
from .header import BITS
from .storage import CheckpointError

Piece = bytearray | memoryview


class TensorEntry(NamedTuple):
    """A tensor to be written. Its pieces are made one by one when its turn comes."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    pieces: Iterable[Piece]

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return torch.Size(self.shape).numel() * BITS[self.dtype] // 8


def pieces(tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str], title: str) -> Iterator[Piece]:
    """Yield the bytes of a safetensors file."""
    yield header(tensors, metadata)
    for name, entry in track(packed(tensors), title):
        left = entry.size
        for piece in entry.pieces:
            left -= len(piece)
            yield piece
        assert left == 0, f"{name}: {left} of {entry.size} bytes are missing"


def header(tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytearray:
    """Return the length of the header and the header itself, padded so that the data begins at a multiple of 64."""
    table, end = {"__metadata__": dict[str, Any](metadata)}, 0
    for name, entry in packed(tensors):
        start, end = end, end + entry.size
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return bytearray(len(text).to_bytes(8, "little") + text)


def packed(tensors: Mapping[str, TensorEntry]) -> list[tuple[str, TensorEntry]]:
    """Return the tensors with wide dtypes first, so that each one begins at a multiple of its dtype's size."""
    return sorted(tensors.items(), key=lambda item: -BITS[item[1].dtype])


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `CheckpointError` for `path` in place of an error of the system."""
    try:
        yield
    except FileExistsError as error:
        raise CheckpointError(path, [EXISTS if error.strerror == EXISTS else f"cannot be written: {error}"]) from None
    except OSError as error:
        raise CheckpointError(path, [f"cannot be written: {error.strerror or error}"]) from None
