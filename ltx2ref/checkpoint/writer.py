"""Writing safetensors files piece by piece, and places on the disk that are filled as a whole or not at all."""

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
    """Return the length of the header and the header itself, padded so that the data begins at a multiple of 8."""
    table, end = {"__metadata__": dict[str, Any](metadata)}, 0
    for name, entry in packed(tensors):
        start, end = end, end + entry.size
        table[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text)


def packed(tensors: Mapping[str, TensorEntry]) -> list[tuple[str, TensorEntry]]:
    """Return the tensors with wide dtypes first, so that each one begins at a multiple of its dtype's size."""
    return sorted(tensors.items(), key=lambda item: -BITS[item[1].dtype])


@contextmanager
def staged(path: Path, inside: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. On success it, or the file `inside` it, is renamed to `path`.

    If anything fails, nothing is left on the disk. Raises `CheckpointError` if the disk refuses.
    """
    with temporary_folder(path.parent, path) as folder:
        yield folder
        sync(folder)
        require_new(path)
        (folder / inside).rename(path)
        sync(path.parent)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files are on success those of `path`, a new or empty folder.

    If anything fails, no file is left on the disk. Raises `CheckpointError` if the disk refuses.
    """
    if not path.is_dir():
        with staged(path, "") as folder:
            yield folder
        return
    with temporary_folder(path, path) as folder:  # a folder that somebody stands in must not be replaced
        yield folder
        moved = [path / file.name for file in folder.iterdir()]
        try:
            for file in moved:
                (folder / file.name).rename(file)
        except BaseException:
            for file in moved:
                file.unlink(missing_ok=True)
            raise
        sync(path)


@contextmanager
def temporary_folder(parent: Path, path: Path) -> Iterator[Path]:
    """Yield a hidden folder, which is removed in any case. Raises `CheckpointError` for `path` if the disk refuses."""
    folder = parent / f".ltx2ref-{secrets.token_hex(4)}.partial"
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        raise CheckpointError(path, [f"cannot be written: {error.strerror or error}"]) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_new(path: Path) -> None:
    """Raise `CheckpointError` if `path` exists or its parent folder does not."""
    if os.path.lexists(path):
        raise CheckpointError(path, ["exists already and is not overwritten"])
    if not path.parent.is_dir():
        raise CheckpointError(path, [f"there is no folder {path.parent}"])


def put(path: Path, content: Iterable[Piece]) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "xb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Only POSIX systems can open a folder for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
