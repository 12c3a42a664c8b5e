"""Stored tensors: ranges of bytes, read or mapped, in files that must not change meanwhile."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..lazy import torch
from ..printable import printable

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 20  # problems listed in a message; `CheckpointError.problems` has all of them
# What torch calls the dtypes that it computes with, by safetensors' spelling.
TORCH_NAMES = {
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
NUMBERS = {"F16": "<e", "F32": "<f", "F64": "<d"}  # how Python unpacks them
# Not blocking, for a file that has become a FIFO meanwhile. The flags that a system lacks are zero.
OPENED = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
NOT_REGULAR = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class CheckpointError(ValueError):
    """An error for a file that is damaged, is not what it seems, or does not hold one whole model.

    `path` and all `problems` are kept as they are. The message lists the first problems, without control characters.
    """

    def __init__(self, path: Path | str, problems: Sequence[str]) -> None:
        self.path, self.problems = Path(path), list(problems)
        lines = [printable(problem) for problem in self.problems[:SHOWN]]
        lines += [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        shown = printable(str(path))
        super().__init__(f"{shown}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{shown}:", *lines]))


@contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Raise `CheckpointError` in place of an error of the system, and for a path that no file can have."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(path, [f"{what}cannot be read: {getattr(error, 'strerror', None) or error}"]) from None


def open_regular(path: Path) -> FileIO:
    """Open a regular file to read it. Raises `CheckpointError` for a FIFO, a device, a folder or the like.

    What the path leads to is looked at before it is opened, since opening a device may already do something, and
    afterwards, since it may lead elsewhere by then: so it is opened in a way that waits for nobody.
    """
    with reading(path):
        found = os.stat(path).st_mode
        if stat.S_ISREG(found):
            file = FileIO(os.open(path, OPENED))
            found = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(found):
                return file
            file.close()
    kind = NOT_REGULAR.get(stat.S_IFMT(found), "something else")
    raise CheckpointError(path, [f"not a regular file, but {kind}"])


@dataclass(frozen=True)
class TensorFile:
    """An opened file. Its `size` and `mtime` are those at the time when its header was read."""

    path: Path
    container: str  # "safetensors" or "gguf"
    size: int
    mtime: int
    metadata: dict[str, str] = field(default_factory=dict)

    def open(self) -> FileIO:
        """Open the file again. Raises `CheckpointError` if it is gone or has changed since its header was read."""
        file = open_regular(self.path)
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime):
            file.close()
            raise CheckpointError(
                self.path, [f"changed while it was being read: from {self.size} bytes to {now.st_size}"]
            )
        return file

    def read(self, start: int, stop: int, name: str) -> bytearray:
        """Read the bytes from `start` to `stop`. Raises `CheckpointError`, which names the tensor."""
        buffer = bytearray(stop - start)
        self.fill(memoryview(buffer), start, name)
        return buffer

    def fill(self, memory: memoryview, start: int, name: str) -> None:
        """Fill the memory with the bytes from `start` on. Raises `CheckpointError`, which names the tensor."""
        done, stop = 0, start + len(memory)
        with reading(self.path, f"{name}: "), self.open() as file:
            file.seek(start)
            while done < len(memory) and (count := file.readinto(memory[done:])):
                done += count
        if done < len(memory):
            raise CheckpointError(self.path, [f"{name}: ends at byte {start + done}, expected {stop}"])


def as_path(path: str | Path) -> Path:
    """Return a path. Raises `ValueError` for an empty text, which would mean the current folder."""
    require(path != "", "path: expected a file or a folder, got an empty text")
    return Path(path)


def require_unchanged(files: Iterable[TensorFile]) -> None:
    """Raise `CheckpointError` if a file is gone or has changed since its header was read."""
    for file in files:
        file.open().close()


class Stored(NamedTuple):
    """A tensor in a file that has not been read yet. `start` and `stop` count bytes from the file's beginning."""

    file: TensorFile
    name: str
    dtype: str  # as safetensors or ggml spells it: "BF16", "F8_E4M3", "Q4_K"
    shape: tuple[int, ...]
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"

    def bytes(self) -> bytearray:
        """Read all bytes."""
        return self.file.read(self.start, self.stop, self.name)

    def tensor(self) -> Tensor:
        """Read the tensor into new memory."""
        out = torch.empty(self.shape, dtype=torch_dtype(self.dtype), device="cpu")
        self.into(out)
        return out

    def number(self) -> float:
        """Read a tensor of one number, without torch where Python knows its dtype."""
        if self.dtype not in (*NUMBERS, "BF16"):
            return self.tensor().double().item()
        padding, dtype = (bytes(2), "F32") if self.dtype == "BF16" else (b"", self.dtype)
        (found,) = struct.unpack(NUMBERS[dtype], padding + self.bytes())
        return float(found)

    def into(self, out: Tensor) -> None:
        """Read the tensor into an existing contiguous one on the CPU."""
        self.file.fill(out.detach().flatten().view(torch.uint8).numpy().data, self.start, self.name)

    def row_bytes(self, start: int, stop: int) -> bytearray:
        """Read the bytes of some rows."""
        size = (self.stop - self.start) // self.shape[0]
        return self.file.read(self.start + start * size, self.start + stop * size, self.name)

    def rows(self, start: int, stop: int) -> Tensor:
        """Read some rows, as in `tensor()[start:stop]`, and nothing else."""
        data = self.row_bytes(start, stop)
        return torch.frombuffer(data, dtype=torch_dtype(self.dtype)).reshape(-1, *self.shape[1:])

    def mapped(self) -> Tensor:
        """Map the tensor: pages are read from the file when they are first used, and copied when they are written to.

        Each tensor has its own map, because mapping a whole file is refused where it is larger than the memory. An
        empty tensor cannot be mapped, and one that is not aligned is read instead.
        """
        page = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        if self.start % alignment(torch_dtype(self.dtype)) or self.start == self.stop:
            return self.tensor()
        with self.file.open() as file:
            try:
                memory = mmap.mmap(file.fileno(), self.stop - page, access=mmap.ACCESS_COPY, offset=page)
            except (OSError, ValueError) as error:  # the file is shorter by now, or too large for this machine
                raise CheckpointError(self.file.path, [f"{self}: cannot be mapped: {error}"]) from None
        return torch.frombuffer(memory, dtype=torch_dtype(self.dtype), offset=self.start - page).reshape(self.shape)


def torch_dtype(stored: str) -> torch.dtype:
    """Return torch's dtype for one of `TORCH_NAMES`."""
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[stored])
    return dtype


def alignment(dtype: torch.dtype) -> int:
    """Return what the address of a tensor has to be a multiple of, for results to have the bits of torch's own memory.

    Products with float32 and float64 weights at other addresses are summed in another order. Narrower ones are not.
    """
    return 16 if dtype in (torch.float32, torch.float64) else dtype.itemsize


def require(holds: bool, problem: str) -> None:
    """Raise `ValueError` with this problem unless something holds."""
    if not holds:
        raise ValueError(problem)
