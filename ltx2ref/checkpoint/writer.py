"""safetensors files written piece by piece, and a place on the disk that is filled as a whole or not at all."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..progress import track
from .header import BITS
from .storage import CheckpointError

Piece = bytearray | memoryview


class TensorEntry(NamedTuple):
    """A tensor that is to be written. Its pieces are made one by one, when it is its turn."""

    dtype: str  # in safetensors' spelling
    shape: tuple[int, ...]
    pieces: Iterable[Piece]

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel() * BITS[self.dtype] // 8


def pieces(tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str], title: str) -> Iterator[Piece]:
    """A safetensors file."""
    yield header(tensors, metadata)
    for name, entry in track(packed(tensors), title):
        left = entry.size
        for piece in entry.pieces:
            left -= len(piece)
            yield piece
        assert left == 0, f"{name}: {left} of {entry.size} bytes are missing"


def header(tensors: Mapping[str, TensorEntry], metadata: Mapping[str, str]) -> bytearray:
    """Its length and JSON, with spaces behind: then what follows begins at a multiple of 8."""
    table, end = {"__metadata__": dict[str, Any](metadata)}, 0
    for name, entry in packed(tensors):
        start, end = end, end + entry.size
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text)


def packed(tensors: Mapping[str, TensorEntry]) -> list[tuple[str, TensorEntry]]:
    """Wide dtypes first: then each tensor begins at a multiple of its dtype's size."""
    return sorted(tensors.items(), key=lambda item: -BITS[item[1].dtype])


@contextmanager
def staged(path: Path, inside: str) -> Iterator[Path]:
    """A folder beside `path`: itself, or the file `inside` it, gets that name at the end. Else nothing is left."""
    folder = path.parent / f".ltx2ref-{secrets.token_hex(4)}.partial"
    try:
        folder.mkdir()
        yield folder
        sync(folder)
        require_new(path)
        (folder / inside).rename(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(path, [f"cannot be written: {error.strerror or error}"]) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_new(path: Path) -> None:
    if os.path.lexists(path):
        raise CheckpointError(path, ["exists already, and is not touched"])
    if not path.parent.is_dir():
        raise CheckpointError(path, [f"there is no folder {path.parent}"])


def put(path: Path, content: Iterable[Piece]) -> None:
    with open(path, "xb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """The names in a folder reach the disk. Only POSIX systems let one open it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
