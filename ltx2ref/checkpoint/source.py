"""A checkpoint as it lies on disk: one file, or a folder with a config.json and perhaps an index of shards."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from .header import MAX_HEADER, parse_json, read_header
from .storage import CheckpointError, Stored, TensorFile

INDEX = ".safetensors.index.json"


class CheckpointFiles(NamedTuple):
    """Everything that the files of a checkpoint state. `tensors` go by the names in the files."""

    path: Path
    files: list[TensorFile]
    tensors: dict[str, Stored]
    config: dict[str, Any] | None  # the content of config.json, if there is one
    metadata: dict[str, str]  # the file's metadata; empty if there are several files

    @property
    def size(self) -> int:
        """Return the size of all files in bytes."""
        return sum(file.size for file in self.files)


def open_source(path: str | Path) -> CheckpointFiles:
    """Read all headers of a file, an index of shards, or a folder with one of them.

    Raises `CheckpointError` if there is no checkpoint. The message for a whole pipeline's folder says which one to
    give.
    """
    path = Path(path)
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise CheckpointError(path, ["there is no such file or folder"])
        if path.name.endswith(".json") and INDEX.removesuffix("json") in path.name:  # a variant's has it in between
            return open_shards(path, None)
        file, tensors = read_header(path)
        return CheckpointFiles(path, [file], tensors, None, file.metadata)
    if (path / "model_index.json").exists():
        raise CheckpointError(path, ["the folder of a whole pipeline: expected its transformer/"])
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    indices = sorted(path.glob("*" + INDEX))
    if len(indices) == 1:
        return open_shards(indices[0], config)
    files = sorted(file for ending in ("*.safetensors", "*.gguf") for file in path.glob(ending))
    if len(files) != 1 or indices:
        found = ", ".join(file.name for file in [*files, *indices]) or "none"
        raise CheckpointError(path, [f"expected one .safetensors file, or one index of shards; found {found}"])
    file, tensors = read_header(files[0])
    return CheckpointFiles(path, [file], tensors, config, file.metadata)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder: its indices of shards, and each file that no index names."""
    indices = sorted(folder.glob("*" + INDEX))
    shards = {name for index in indices for name in named_shards(index)}
    files = sorted(file for ending in ("*.safetensors", "*.gguf") for file in folder.glob(ending))
    return [*indices, *(file for file in files if file.name not in shards)]


def named_shards(index: Path) -> list[str]:
    """Return the file names that an index lists, or none if it cannot be read: opening it will report that."""
    try:
        return [name for name in read_json(index)["weight_map"].values() if isinstance(name, str)]
    except (CheckpointError, KeyError, AttributeError):
        return []


def open_shards(index: Path, config: dict[str, Any] | None) -> CheckpointFiles:
    """Read the headers of all shards that an index names.

    Raises `CheckpointError` unless they are plain names of files beside the index which hold exactly its tensors.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(index, ["expected a weight_map of tensor names to file names"])
    files: list[TensorFile] = []
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    for shard in sorted(set(shards.values())):
        if not shard.endswith(".safetensors") or Path(shard).name != shard or "\\" in shard or ":" in shard:
            raise CheckpointError(index, [f"{shard}: not the plain name of a .safetensors file in this folder"])
        if not os.path.isfile(index.parent / shard):  # also False for a name that is too long
            lost = next(name for name in shards if shards[name] == shard)
            raise CheckpointError(index, [f"{shard}: there is no such file in this folder; {lost} should be in it"])
        file, stored = read_header(index.parent / shard)
        files.append(file)
        problems += [
            f"{name}: in {shard}, but not according to the index" for name in stored if shards.get(name) != shard
        ]
        tensors |= stored
    problems += [
        f"{name}: in no shard, but in {shard} according to the index"
        for name, shard in shards.items()
        if name not in tensors
    ]
    if problems:
        raise CheckpointError(index, problems)
    return CheckpointFiles(index.parent, files, tensors, config, {})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size. Raises `CheckpointError`."""
    try:
        with open(path, "rb") as file:
            return parse_json(file.read(MAX_HEADER + 1))
    except OSError as error:
        raise CheckpointError(path, [f"cannot be read: {error.strerror}"]) from None
    except ValueError as error:
        raise CheckpointError(path, [str(error)]) from None
