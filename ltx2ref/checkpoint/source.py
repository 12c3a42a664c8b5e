"""A checkpoint as it lies on disk: one file, or a folder with a config.json and perhaps an index of shards."""

import os
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from .header import MAX_HEADER, parse_json, read_header
from .storage import CheckpointError, Stored, TensorFile, as_path, open_regular, reading

PLAIN_NAME = "diffusion_pytorch_model.safetensors"  # the name that diffusers gives to weights
INDEX = ".safetensors.index."  # in the name of every index of shards; then comes "json", or a variant and ".json"
FILE_ENDINGS = ("*.safetensors", "*.gguf")


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


def open_source(path: str | Path, variant: str | None = None) -> CheckpointFiles:
    """Read all headers of a file, an index of shards, or a folder with one of them.

    Raises `CheckpointError` if there is no checkpoint. The message for a whole pipeline's folder says which one to
    give.
    """
    path = as_path(path)
    if os.path.isdir(path):
        config = read_json(path / "config.json") if (path / "config.json").exists() else None
        return open_file(chosen_checkpoint(path, variant), config)._replace(path=path)
    if not os.path.exists(path):
        raise CheckpointError(path, ["there is no such file or folder"])
    if variant is not None:
        raise CheckpointError(path, [f"variant = {variant!r} chooses in a folder, and this is a file"])
    return open_file(path, None)


def open_file(path: Path, config: dict[str, Any] | None) -> CheckpointFiles:
    """Read the header of a file, or all headers that an index of shards names. Raises `CheckpointError`."""
    if INDEX in path.name and path.suffix == ".json":
        return open_shards(path, config)
    file, tensors = read_header(path)
    return CheckpointFiles(path, [file], tensors, config, file.metadata)


def chosen_checkpoint(folder: Path, variant: str | None) -> Path:
    """Return the file or index of a folder's one checkpoint, or of one of several.

    A variant is what its name has in front of the last dot. Without one, the checkpoint with diffusers' plain name is
    chosen, as diffusers does. Raises `CheckpointError` unless that leaves one.
    """
    if (folder / "model_index.json").exists():
        raise CheckpointError(folder, ["the folder of a whole pipeline: expected its transformer/"])
    found = checkpoints_in(folder)
    if variant is not None:
        fitting = [file for file in found if file.name.split(".")[-2] == variant != INDEX.split(".")[-2]]
    else:
        plain = [file for file in found if file.name in (PLAIN_NAME, f"{PLAIN_NAME}.index.json")]
        fitting = found if len(found) == 1 else plain
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(file.name for file in found) or "none"
    if variant is not None:
        expected = f"variant = {variant!r}: expected one *.{variant}.safetensors or *.safetensors.index.{variant}.json"
    elif len(found) > 1 and not plain:
        expected = "several checkpoints: give the path of one, or the variant in its name (variant=, --variant)"
    else:
        expected = "expected one .safetensors file, or one index of shards"
    raise CheckpointError(folder, [f"{expected}; found {names}"])


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder: its indices of shards, and each file that no index names."""
    indices = sorted(folder.glob(f"*{INDEX}*json"))
    shards = {name for index in indices for name in named_shards(index)}
    files = sorted(file for ending in FILE_ENDINGS for file in folder.glob(ending))
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
        if not os.path.exists(index.parent / shard):  # also False for a name that is too long
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
    with reading(path), BufferedReader(open_regular(path)) as file:
        text = file.read(MAX_HEADER + 1)
    try:
        return parse_json(text)
    except ValueError as error:
        raise CheckpointError(path, [str(error)]) from None
