"""Conversion of a checkpoint to the other dialect or to another dtype, bit for bit unless a dtype is given."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import LTX_2_0
from ..formats import LIGHTRICKS_ABSENT, LIGHTRICKS_FIXED, LIGHTRICKS_NAMES
from .header import parse_json
from .keep import add_sayings, kept_tensors, require_same_weights, require_sound_scales
from .match import Plan, make_plan
from .names import DIFFUSERS_DIALECT, LIGHTRICKS_DIALECT
from .quantised import PLAIN_DTYPES, Weight
from .resolve_config import DIFFUSERS_CLASS
from .save import STORED, TARGETS, Contents, checked_limit, config_of_dialect, raw, write_contents
from .sayings import ABOUT_WEIGHTS, QUANTISER
from .settle import NO_OPTIONS, ReadingOptions
from .source import CheckpointFiles
from .storage import CheckpointError, Stored
from .writer import TensorEntry

PIECE = 2**20  # bytes copied at a time; with larger pieces, memory becomes slower than the disk
GGUF = ("GGUF.", "general.")  # prefixes of the GGUF metadata that describe the container, not the model
# For each dialect, the config keys that a `TransformerConfig` holds.
HELD = {
    LIGHTRICKS_DIALECT: {"_class_name", *LIGHTRICKS_NAMES, *LIGHTRICKS_FIXED},
    DIFFUSERS_DIALECT: {"_class_name", *LTX_2_0.to_diffusers()},
}


class Conversion(NamedTuple):
    """The result of `convert`."""

    source: str
    destination: str
    source_dialect: str
    dialect: str
    tensors: int
    bytes: int
    formats: list[str]  # in which the source stores its tensors
    foreign: dict[str, dict[str, int]]  # tensors and bytes left out because other models own them, by prefix
    left_out: list[str]  # entries of the metadata and the config that the destination does not have
    assumed: list[str]  # facts that the source does not state


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dialect: str,
    dtype: torch.dtype | None = None,
    keep: bool = False,
    max_shard_size: int | str | None = None,
    options: ReadingOptions = NO_OPTIONS,
) -> Conversion:
    """Write the transformer of a checkpoint in another dialect or dtype, in bounded memory.

    The diffusers dialect is written as a folder, the Lightricks dialect as one file. Without `dtype`, the bytes of each
    tensor are copied, which is refused for quantised tensors. With `dtype`, each tensor is decoded and rounded once.
    With `keep`, quantised tensors are copied as well, with all that belongs to them, where the dialect can say how they
    are stored.

    Raises `CheckpointError` or `ValueError` as `load` and `save` do. Like `save`, it writes everything or nothing and
    never overwrites what exists.
    """
    if keep and dtype is not None:
        raise ValueError(f"keep and dtype = {dtype}: expected one of them")
    if dtype not in (None, *STORED):
        raise ValueError(f"dtype: expected one of {', '.join(map(str, STORED))}, got {dtype}")
    path = Path(destination)
    limit = checked_limit(path, dialect, max_shard_size)
    plan = make_plan(source, options)
    plan.check()
    quantised = sorted(set(plan.formats.values()) - set(PLAIN_DTYPES))
    if quantised and dtype is None and not keep:
        raise CheckpointError(
            plan.source.path,
            [
                f"quantised as {', '.join(quantised)}: say into which dtype "
                "(--dtype float32, bfloat16 or float16) to decode it, or keep it as it is (--keep)"
            ],
        )
    contents, left_out = carried_over(plan, dialect)
    if keep:
        tensors = kept_tensors(plan)
        add_sayings(plan, contents, tensors)
        require_same_weights(plan, contents, tensors, limit is not None)
        require_sound_scales(plan)
        contents.entries.update({name: TensorEntry(x.dtype, x.shape, copied(x)) for name, x in tensors.items()})
        left_out = [key for key in left_out if key.removeprefix("metadata ") not in contents.metadata]
    else:
        contents.entries.update({name: converted_tensor(weight, dtype) for name, weight in plan.weights.items()})
    size = write_contents(path, contents, limit, plan.source.files)
    return Conversion(
        str(source),
        str(destination),
        str(plan.dialect),
        str(TARGETS[dialect]),
        len(plan.weights),
        size,
        sorted(set(plan.formats.values())),
        plan.foreign_sizes(),
        left_out,
        plan.notes,
    )


def converted_tensor(weight: Weight, dtype: torch.dtype | None) -> TensorEntry:
    """Return the entry to write for a weight: its bytes if its dtype stays, or else its decoded and rounded rows."""
    if dtype is None or STORED[dtype] == weight.tensor.dtype:  # never true for a quantised weight: `convert` refuses it
        return TensorEntry(weight.tensor.dtype, weight.shape, copied(weight.tensor))
    return TensorEntry(STORED[dtype], weight.shape, (raw(rows.to(dtype)) for rows in weight.chunks()))


def copied(stored: Stored) -> Iterator[bytearray]:
    """Yield the bytes of a stored tensor in pieces."""
    for start in range(stored.start, stored.stop, PIECE):
        yield stored.file.read(start, min(start + PIECE, stored.stop), stored.name)


class Said(NamedTuple):
    """The object in which a source states its config."""

    where: str  # "config.json", the metadata key "config", or "" if there is no such object
    whole: dict[str, Any]
    inner: dict[str, Any]  # the transformer's part, or the whole if it is not divided
    dialect: str | None  # None if it is written in neither dialect

    @property
    def beside(self) -> list[str]:
        return [key for key in self.whole if self.inner is not self.whole and key != "transformer"]


def stated(source: CheckpointFiles) -> Said:
    """Return the object from which `resolve_config.says` reads the config. It has been checked there."""
    where, whole = "", dict[str, Any]()
    if source.config is not None:
        where, whole = "config.json", source.config
    elif "config" in source.metadata:
        where, whole = "config", parse_json(source.metadata["config"].encode())
    inner = whole.get("transformer", whole)
    if inner.keys() >= LIGHTRICKS_NAMES.keys() - LIGHTRICKS_ABSENT.keys():
        return Said(where, whole, inner, LIGHTRICKS_DIALECT)
    ours = where and inner.get("_class_name", DIFFUSERS_CLASS) == DIFFUSERS_CLASS
    return Said(where, whole, inner, DIFFUSERS_DIALECT if ours else None)


def carried_over(plan: Plan, dialect: str) -> tuple[Contents, list[str]]:
    """Return config and metadata for the destination, and the names of the source's entries that are not in them."""
    source, said, config = plan.source, stated(plan.source), config_of_dialect(plan.config, dialect)
    whole: dict[str, Any] = {}
    if said.dialect == dialect:  # keep the source's order; a key that our config omits gets the format's default
        theirs = {key: value for key, value in said.inner.items() if key != QUANTISER}
        config = {key: (LIGHTRICKS_ABSENT | config).get(key, value) for key, value in theirs.items()} | config
        whole = said.whole if said.inner is not said.whole else {}
    metadata = {
        key: value
        for key, value in source.metadata.items()
        if plan.dialect.names == dialect and key not in ("config", *ABOUT_WEIGHTS) and not key.startswith(GGUF)
    }
    known = {*metadata, "format", said.where}
    lost = [f"metadata {key}" for file in source.files for key in file.metadata if key not in known]
    if dialect == DIFFUSERS_DIALECT:
        metadata["format"] = "pt"
    else:
        whole = whole | {"transformer": config}
        unchanged = whole == said.whole and said.where == "config"
        metadata["config"] = source.metadata["config"] if unchanged else json.dumps(whole)
    return Contents(dialect, config, metadata, {}), [*dict.fromkeys(lost + unsaid(said, dialect))]


def unsaid(said: Said, dialect: str) -> list[str]:
    """Return the keys of the source's config that the destination's config does not have."""
    if said.dialect is None:
        return [said.where] if said.where else []
    if said.dialect == dialect == LIGHTRICKS_DIALECT:
        return []
    path = "transformer." if said.inner is not said.whole else ""
    inner = [f"{path}{key}" for key in said.inner if said.dialect != dialect and key not in HELD[said.dialect]]
    return [f"{said.where}.{key}" for key in [*said.beside, *inner]]
