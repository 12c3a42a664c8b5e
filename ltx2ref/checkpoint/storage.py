"""Stored tensors: ranges of bytes, read or mapped, in files that must not change meanwhile."""

import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..printable import printable

SHOWN = 20  # problems listed in a message; `CheckpointError.problems` has all of them
TORCH = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
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
        try:
            file = FileIO(self.path)
        except OSError as error:
            raise CheckpointError(self.path, [f"cannot be read: {error.strerror}"]) from None
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime):
            file.close()
            raise CheckpointError(
                self.path, [f"changed while it was being read: from {self.size} bytes to {stat.st_size}"]
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
        with self.open() as file:
            try:
                file.seek(start)
                while done < len(memory) and (count := file.readinto(memory[done:])):
                    done += count
            except OSError as error:
                raise CheckpointError(self.path, [f"{name}: cannot be read: {error.strerror}"]) from None
        if done < len(memory):
            raise CheckpointError(self.path, [f"{name}: ends at byte {start + done}, expected {stop}"])


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
        return torch.frombuffer(self.bytes(), dtype=TORCH[self.dtype]).reshape(self.shape)

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
        return torch.frombuffer(data, dtype=TORCH[self.dtype]).reshape(-1, *self.shape[1:])

    def mapped(self) -> Tensor:
        """Map the tensor: pages are read from the file when they are first used, and copied when they are written to.

        Each tensor has its own map, because mapping a whole file is refused where it is larger than the memory.
        """
        page = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        if self.start % TORCH[self.dtype].itemsize or self.start == self.stop:
            return self.tensor()  # an unaligned or empty range cannot be mapped
        with self.file.open() as file:
            try:
                memory = mmap.mmap(file.fileno(), self.stop - page, access=mmap.ACCESS_COPY, offset=page)
            except (OSError, ValueError) as error:  # the file is shorter by now, or too large for this machine
                raise CheckpointError(self.file.path, [f"{self}: cannot be mapped: {error}"]) from None
        return torch.frombuffer(memory, dtype=TORCH[self.dtype], offset=self.start - page).reshape(self.shape)


def require(holds: bool, problem: str) -> None:
    """Raise `ValueError` with this problem unless something holds."""
    if not holds:
        raise ValueError(problem)
