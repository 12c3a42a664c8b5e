"""Writing a model in either dialect: as a folder for diffusers, or as one file for Lightricks."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import TransformerConfig
from ..interface import LTX2VideoTransformer3DModel
from ..whole import put, require_new, staged
from .names import DIFFUSERS_DIALECT, LIGHTRICKS_DIALECT, PREFIXES, Dialect
from .quantised import CHUNK, PLAIN_DTYPES
from .resolve_config import DIFFUSERS_CLASS
from .shapes import parameter_shapes
from .storage import CheckpointError, TensorFile, require_unchanged, torch_dtype
from .writer import TensorEntry, header, pieces, writing

TARGETS = {
    DIFFUSERS_DIALECT: Dialect(DIFFUSERS_DIALECT, ""),
    LIGHTRICKS_DIALECT: Dialect(LIGHTRICKS_DIALECT, PREFIXES[0]),
}
STORED = {torch_dtype(name): name for name in PLAIN_DTYPES}
FILE = "diffusion_pytorch_model{}.safetensors"  # diffusers' name
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # powers of ten, as in diffusers


class Contents(NamedTuple):
    """Everything to be written.

    `config` becomes diffusers' config.json. Lightricks' config is part of the files' `metadata`.
    """

    dialect: str
    config: dict[str, Any]
    metadata: dict[str, str]
    entries: dict[str, TensorEntry]  # by the parameters' names in the model


def save(
    model: LTX2VideoTransformer3DModel,
    path: str | Path,
    *,
    dialect: str = DIFFUSERS_DIALECT,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a model with each parameter in its own dtype: a diffusers folder or, in dialect "lightricks", one file.

    `max_shard_size`, in bytes or like "5GB", splits the weights in a folder. A file exceeds it only if it holds a
    single tensor that is larger. Nothing appears at `path` until everything is written, and nothing that exists is
    overwritten.

    Raises `CheckpointError` if `path` exists, if the disk lacks room or if parameters do not fit the config, and
    `ConfigError` for a config that the dialect cannot express.
    """
    limit, state = checked_limit(Path(path), dialect, max_shard_size), model.state_dict()
    wanted = {name: str(list(shape)) for name, shape in parameter_shapes(model.config, model.streams).items()}
    has = {
        name: str(list(x.shape) if x.dtype in STORED and not x.is_meta else f"{x.dtype} on {x.device}")
        for name, x in state.items()
    }
    problems = [
        f"{name}: the model has {has.get(name, 'none')}, its config expects {wanted.get(name, 'none')}"
        for name in wanted | has
        if has.get(name) != wanted.get(name)
    ]
    if problems:
        raise CheckpointError(path, problems)
    config = config_of_dialect(model.config, dialect)
    metadata = {"format": "pt"} if dialect == DIFFUSERS_DIALECT else {"config": json.dumps({"transformer": config})}
    write_contents(
        Path(path), Contents(dialect, config, metadata, {name: parameter_entry(state[name]) for name in wanted}), limit
    )


def config_of_dialect(config: TransformerConfig, dialect: str) -> dict[str, Any]:
    """Return a config in the keys of a dialect."""
    if dialect == LIGHTRICKS_DIALECT:
        return config.to_lightricks()
    return {"_class_name": DIFFUSERS_CLASS} | config.to_diffusers()


def parameter_entry(x: Tensor) -> TensorEntry:
    """Return the entry to write for a parameter."""
    return TensorEntry(STORED[x.dtype], tuple(x.shape), map(raw, x.detach().split(max(1, CHUNK // x[0].numel()))))


def raw(x: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    return x.cpu().flatten().view(torch.uint8).numpy().data


def checked_limit(path: Path, dialect: str, max_shard_size: int | str | None) -> int | None:
    """Return the maximum size of a shard in bytes, or None.

    Raises `ValueError` for arguments that do not fit together.
    """
    if dialect not in TARGETS:
        raise ValueError(f"dialect = {dialect!r}: expected {' or '.join(TARGETS)}")
    if (path.suffix == ".safetensors") != (dialect == LIGHTRICKS_DIALECT):
        kind = "a folder" if dialect == DIFFUSERS_DIALECT else "a .safetensors file"
        raise CheckpointError(path, [f"expected the name of {kind}, because {dialect} is written as such"])
    with writing(path):
        require_new(path)
    if max_shard_size is None:
        return None
    parsed = re.fullmatch(r"([0-9.]*[0-9]) ?([KMGT]B|)", str(max_shard_size).upper())
    limit = int(float(parsed[1]) * UNITS[parsed[2]]) if parsed and parsed[1].count(".") < 2 else 0
    if not limit or dialect == LIGHTRICKS_DIALECT:
        expected = "bytes, or a size like 5GB" if dialect == DIFFUSERS_DIALECT else "none, lightricks is one file"
        raise ValueError(f"max_shard_size = {max_shard_size!r}: expected {expected}")
    return limit


def write_contents(path: Path, contents: Contents, limit: int | None, sources: Sequence[TensorFile] = ()) -> int:
    """Write all files and return the size of the tensor files in bytes.

    `sources` are the files that are read meanwhile. Raises `CheckpointError` if one of them changes or the disk is
    full.
    """
    metadata, single = contents.metadata, contents.dialect == LIGHTRICKS_DIALECT
    parts = shards(contents, limit)
    sizes = [len(header(part, metadata)) + sum(entry.size for entry in part.values()) for part in parts]
    names = [FILE.format(f"-{i + 1:05d}-of-{len(parts):05d}" if len(parts) > 1 else "") for i in range(len(parts))]
    files = dict(zip([path.name] if single else names, parts, strict=True))
    with writing(path), staged(path, path.name if single else "") as folder:
        if sum(sizes) > (free := shutil.disk_usage(folder).free):
            raise CheckpointError(path, [f"needs {sum(sizes):,} bytes, but the disk has only {free:,} free"])
        for name, part in files.items():
            put(folder / name, pieces(part, metadata, f"writing {name}"))
        for name, text in ({} if single else texts(contents, files)).items():
            put(folder / name, [bytearray(json.dumps(text, indent=2, sort_keys=True) + "\n", "utf-8")])
        require_unchanged(sources)
    return sum(sizes)


def texts(contents: Contents, files: Mapping[str, Mapping[str, TensorEntry]]) -> dict[str, Any]:
    """Return the JSON files of a diffusers folder, by name."""
    total = {"total_size": sum(entry.size for entry in contents.entries.values())}
    weight_map = {tensor: name for name, part in files.items() for tensor in part}
    index = {FILE.format("") + ".index.json": {"metadata": total, "weight_map": weight_map}}
    return {"config.json": contents.config} | (index if len(files) > 1 else {})


def shards(contents: Contents, limit: int | None) -> list[dict[str, TensorEntry]]:
    """Divide the tensors into files, in order. Each file gets as many as are sure to fit beside its header."""
    target, parts, room = TARGETS[contents.dialect], list[dict[str, TensorEntry]](), 0
    for ours, entry in contents.entries.items():
        name = target.stored(ours)
        # Among others, the tensor's two offsets have more digits than alone, but no more than the limit has.
        size = entry.size + len(header({name: entry}, {})) + 2 * len(str(limit))
        if not parts or (limit and size > room):
            parts.append({})
            room = (limit or 0) - len(header({}, contents.metadata))
        room -= size
        parts[-1][name] = entry
    return parts
