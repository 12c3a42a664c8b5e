"""A checkpoint into the other dialect or another dtype: every tensor bit for bit, unless a dtype is asked for."""
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import LTX_2_0
from ..formats import LIGHTRICKS_ABSENT, LIGHTRICKS_FIXED, LIGHTRICKS_NAMES
from .facts import DIFFUSERS_CLASS, LIGHTRICKS_CLASS
from .files import TORCH, CheckpointError, Stored
from .header import parse_json
from .names import DIFFUSERS, LIGHTRICKS
from .plan import QUANTISATION, Plan, make_plan
from .quantised import PLAIN, Weight
from .save import STORED, TARGETS, Contents, check, described, raw, write
from .source import Source
from .writer import Entry

PIECE = 2**24  # bytes that are copied at a time
# By class, the keys that a `TransformerConfig` stands for.
HELD = {LIGHTRICKS_CLASS: {"_class_name", *LIGHTRICKS_NAMES, *LIGHTRICKS_FIXED},
        DIFFUSERS_CLASS: {"_class_name", *LTX_2_0.to_diffusers()}}


class Report(NamedTuple):
    """What `convert` did."""
    source: str
    destination: str
    source_dialect: str
    dialect: str
    tensors: int
    bytes: int
    formats: list[str]                  # of the source's tensors
    foreign: dict[str, dict[str, int]]  # left out, for they are not the transformer's: tensors and bytes by prefix
    left_out: list[str]                 # of the metadata and the config
    assumed: list[str]                  # about the source


def convert(source: str | Path, destination: str | Path, *, dialect: str, dtype: torch.dtype | None = None,
            max_shard_size: int | str | None = None) -> Report:
    """Write the transformer in a checkpoint anew, in bounded memory: a folder for diffusers, one file for Lightricks.

    Without a `dtype` each tensor's bytes are copied, which a quantised one's cannot be; with one, each is decoded
    and rounded once. Raises as `load` and `save` do, and does as these: all or nothing, and never over anything.
    """
    path = Path(destination)
    limit = check(path, dialect, max_shard_size)
    plan = make_plan(source)
    plan.check()
    quantised = sorted(set(plan.formats.values()) - set(PLAIN))
    if quantised and dtype is None:
        raise CheckpointError(plan.source.path, [f"quantised as {', '.join(quantised)}: say into which dtype "
                                                 "(--dtype float32, bfloat16 or float16) to decode it"])
    contents, left_out = carried_over(plan, dialect)
    contents.entries.update({name: entry(weight, dtype) for name, weight in plan.weights.items()})
    size = write(path, contents, limit, plan.source.files)
    foreign = {prefix: {"tensors": len(stored), "bytes": sum(s.stop - s.start for s in stored)}
               for prefix, stored in plan.foreign.items()}
    return Report(str(source), str(destination), str(plan.dialect), str(TARGETS[dialect]), len(plan.weights), size,
                  sorted(set(plan.formats.values())), foreign, left_out, plan.notes)


def entry(weight: Weight, dtype: torch.dtype | None) -> Entry:
    if dtype is None or (TORCH.get(weight.tensor.dtype) == dtype and not weight.companions):
        return Entry(weight.tensor.dtype, weight.shape, copied(weight.tensor))
    return Entry(STORED[dtype], weight.shape, (raw(rows.to(dtype)) for rows in weight.chunks()))


def copied(stored: Stored) -> Iterator[bytearray]:
    for start in range(stored.start, stored.stop, PIECE):
        yield stored.file.read(start, min(start + PIECE, stored.stop), stored.name)


class Said(NamedTuple):
    """The object in which a source states its config."""
    where: str | None
    whole: dict[str, Any]
    inner: dict[str, Any]  # the transformer's part, or the whole
    kind: str | None       # its class


def stated(source: Source) -> Said:
    """The same that `facts.says` reads."""
    if source.config is not None:
        where, whole, usual = "config.json ", source.config, DIFFUSERS_CLASS
    elif "config" in source.metadata:
        where, whole, usual = "config.", parse_json(source.metadata["config"].encode()), LIGHTRICKS_CLASS
    else:
        return Said(None, {}, {}, None)
    inner = whole.get("transformer", whole)
    return Said(where, whole, inner, inner.get("_class_name", usual))


def carried_over(plan: Plan, dialect: str) -> tuple[Contents, list[str]]:
    """Config and metadata for the destination, and which of the source's are not in there."""
    source, said, config = plan.source, stated(plan.source), described(plan.config, dialect)
    alike = said.kind == config["_class_name"]
    if alike:  # in the source's order; a key that ours leaves out means the format's default
        config = {key: (LIGHTRICKS_ABSENT | config).get(key, value) for key, value in said.inner.items()} | config
    keep = plan.dialect.names == dialect and source.files[0].container == "safetensors"
    metadata = {key: value for key, value in source.metadata.items() if keep and key not in ("config", QUANTISATION)}
    stays = {"format", *metadata, *(["config"] if said.where == "config." else [])}
    lost = [f"metadata {key}" for file in source.files for key in file.metadata if key not in stays]
    if dialect == DIFFUSERS:
        metadata["format"] = "pt"
    else:
        whole = (said.whole if alike and said.inner is not said.whole else {}) | {"transformer": config}
        metadata["config"] = source.metadata["config"] if whole == said.whole else json.dumps(whole)
    return Contents(dialect, config, metadata, {}), [*dict.fromkeys(lost + unsaid(said, alike, dialect))]


def unsaid(said: Said, alike: bool, dialect: str) -> list[str]:
    """The keys of a config that the destination's does not have."""
    if said.kind not in HELD:
        return [said.where.rstrip(" .")] if said.where else []
    nested = said.inner is not said.whole
    inner = [] if alike else [key for key in said.inner if key not in HELD[said.kind]]
    beside = [key for key in said.whole if nested and key != "transformer" and not (alike and dialect == LIGHTRICKS)]
    return [f"{said.where}{key}" for key in [*beside, *(f"transformer.{key}" if nested else key for key in inner)]]
