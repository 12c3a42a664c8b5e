"""Descriptions of files from their headers: release, dialect, formats, config, and the published file that matches."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..progress import track
from . import manifest
from .lora import is_lora, lora_format, read_lora
from .match import Plan, make_plan
from .quantised import COMPANIONS, Weight
from .resolve_config import any_block, release_of
from .sayings import MARKER_READERS
from .settle import NO_OPTIONS, ReadingOptions
from .source import CheckpointFiles, checkpoints_in, open_source, read_json
from .storage import CheckpointError, Stored, as_path
from .streams import is_needed

READ = 2**24  # bytes read at a time
UNREADABLE = "unreadable"  # the kind of a file that cannot be read, in a folder with others
OUTLIER = 8  # a tensor is reported if its RMS differs by this factor from the median of the same tensor over blocks
# The purpose of a parameter by a part of its name. The first part that is in the name counts.
LAYERS = {
    "scale_shift_table": "tables",
    "keyframes_abs_pos": "tables",
    ".bias": "biases",
    "norm_": "norms",
    "to_gate_logits": "gates",
    "attn": "attention",
    "ff.": "feed-forward",
    "": "projections and embeddings",
}


@dataclass(frozen=True)
class Published:
    """A published file of the same size, and whether its sha256 was compared as well."""

    repository: str
    name: str
    revision: str | None
    tensors: int | None  # number of tensors in the published file, None if it is not known
    by: str  # what was compared and found equal


@dataclass(frozen=True)
class Description:
    """All facts that `ltx2ref inspect` shows. Files without a transformer have neither release nor config."""

    path: str
    kind: str
    container: str
    files: int
    bytes: int
    tensors: int
    release: str | None = None
    dialect: str | None = None
    streams: list[str] = field(default_factory=list)  # those whose parameters it has
    parameters: int | None = None
    published_shapes: bool | None = None  # whether all names and shapes are those of the published release
    formats: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, dict[str, Any]] = field(default_factory=dict)  # "value" and "origin" of each field
    metadata: list[str] = field(default_factory=list)
    foreign: dict[str, dict[str, int]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifest: list[Published] = field(default_factory=list)
    cannot_tell: list[str] = field(default_factory=list)
    stats: list[dict[str, Any]] | None = None


def inspect(
    path: str | Path, options: ReadingOptions = NO_OPTIONS, *, sha256: bool = False, stats: bool = False
) -> Description:
    """Describe a file or folder from its headers and from what it says of its weights.

    With `sha256` or `stats` the whole file is read, in bounded memory. Faults of a transformer are listed in
    `problems`. Raises `CheckpointError` for files that cannot be read.
    """
    return description(open_source(path, options.variant), options, sha256=sha256, stats=stats)


def inspect_all(
    path: str | Path, options: ReadingOptions = NO_OPTIONS, *, sha256: bool = False, stats: bool = False
) -> list[Description]:
    """Describe a file, or every checkpoint in a folder if no variant is given.

    In a folder with several checkpoints, one that cannot be read is described as unreadable. In all other cases that
    raises `CheckpointError`.
    """
    folder = as_path(path)
    several = options.variant is None and folder.is_dir() and not (folder / "model_index.json").exists()
    found = checkpoints_in(folder) if several else []
    if len(found) < 2:
        return [inspect(path, options, sha256=sha256, stats=stats)]
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    described = []
    for file in found:
        try:
            source = open_source(file)
            source = source if "config" in source.metadata else source._replace(config=config)
            described.append(description(source, options, file, sha256=sha256, stats=stats))
        except CheckpointError as error:
            described.append(Description(str(file), UNREADABLE, "", 1, file.stat().st_size, 0, problems=error.problems))
    return described


def description(
    source: CheckpointFiles,
    options: ReadingOptions,
    path: Path | None = None,
    *,
    sha256: bool = False,
    stats: bool = False,
) -> Description:
    """Describe an opened checkpoint, under its own path or another one."""
    digest = sha256_of(source) if sha256 else None
    common: dict[str, Any] = {
        "path": str(path or source.path),
        "container": source.files[0].container,
        "files": len(source.files),
        "bytes": source.size,
        "tensors": len(source.tensors),
        "metadata": sorted(source.metadata),
        "manifest": published(source, digest),
    }
    unread = ["the numbers were not read: --stats looks at those of a transformer"] if stats else []
    if is_lora(source.tensors):
        return lora_description(source, common, unread)
    try:
        plan = make_plan(source, options)
    except CheckpointError as error:
        kind = other_model(source.tensors)
        problems = [] if kind else error.problems
        return Description(kind=kind or "not understood", problems=problems, notes=unread, **common)
    release = release_of(plan.config)
    described = [Stored.__str__(stored) for stored in plan.unknown]
    return Description(
        kind="transformer",
        release=release,
        streams=[*plan.streams],
        dialect=str(plan.dialect),
        formats=formats(plan),
        parameters=sum(math.prod(weight.shape) for weight in plan.weights.values()),
        published_shapes=release is not None and has_published_shapes(plan, release),
        config={name: {"value": value, "origin": plan.origins[name]} for name, value in asdict(plan.config).items()},
        foreign=plan.foreign_sizes(),
        unknown=described,
        problems=plan.problems,
        notes=plan.notes,
        stats=statistics(plan) if stats else None,
        cannot_tell=cannot_tell(plan, common["manifest"], digest),
        **common,
    )


def lora_description(source: CheckpointFiles, common: dict[str, Any], notes: list[str]) -> Description:
    """Describe a LoRA, with all that is wrong with it whatever the model is."""
    kind = f"LoRA, {lora_format(source.tensors)}"
    try:
        return Description(kind=kind, notes=read_lora(source.path).notes + notes, **common)
    except CheckpointError as error:
        return Description(kind=kind, problems=error.problems, notes=notes, **common)


def other_model(names: Iterable[str]) -> str | None:
    """Return the models whose tensors a file holds, judged by how their names begin, or None."""
    parts = Counter(name.split(".")[0] for name in names)
    literal = {
        "vae": "VAE",
        "audio_vae": "audio VAE",
        "vocoder": "vocoder",
        "duration_head": "duration head",
        "text_embedding_projection": "text projection",
        "encoder": "VAE",
        "decoder": "VAE",
    }
    kinds = sorted({literal[part] for part in parts if part in literal})
    return " + ".join(kinds) if kinds and len(parts) <= 8 else None


def formats(plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each group of layers that are stored alike, with the blocks in which they are."""
    rows: dict[tuple[bool, str, str, str], list[str]] = {}
    for name, format in plan.formats.items():
        layers = next(layers for part, layers in LAYERS.items() if part in name)
        key = name.startswith("transformer_blocks."), layers, format, str(how_stored(plan.weights[name]))
        rows.setdefault(key, []).append(name)
    return [
        {
            "layers": layers,
            "format": format,
            "stored": how_stored(plan.weights[names[0]]),
            "tensors": len(names),
            "bytes": sum(stored_bytes(plan, names)),
            "blocks": ranges(int(name.split(".")[1]) for name in names) if inside else None,
        }
        for (inside, layers, format, _), names in rows.items()
    ]


def how_stored(weight: Weight) -> dict[str, dict[str, Any]]:
    """Return the facts about how a weight is stored, each with its value and where it is said."""
    return {
        fact: {"value": weight.facts[fact], "said": said_where(weight.said[fact])}
        for fact in ("nibbles", "scales", "group", "rotation")
        if weight.facts.get(fact)
    }


def said_where(said: str) -> str:
    """Return where a fact is said, without the name of the layer."""
    endings = {suffix: "marker" for suffix, kind in COMPANIONS.items() if kind in MARKER_READERS}
    known = {"the shape of": "shape", "the format": "format", "the argument": "argument"}
    return next(
        (short for text, short in endings.items() if said.endswith(text)),
        next((short for text, short in known.items() if said.startswith(text)), said),
    )


def stored_bytes(plan: Plan, names: Iterable[str]) -> Iterable[int]:
    """Yield the bytes that each of these parameters takes in the file, with its scales and markers."""
    for name in names:
        weight = plan.weights[name]
        yield sum(stored.stop - stored.start for stored in (weight.tensor, *weight.companions.values()))


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers as text with ranges, such as "0-3, 7, 9-12"."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][-1] == number - 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, part)) for part in found)


def published(source: CheckpointFiles, digest: str | None) -> list[Published]:
    """Return the published files that have the size of this file and, if `digest` is given, its sha256."""
    by = "size" if digest is None else "size and sha256"
    same = [file for file in manifest.find(source.size) if len(source.files) == 1]
    return [
        Published(file.repository, file.name, file.revision, file.tensors, by)
        for file in same
        if digest is None or file.sha256 == digest
    ]


def has_published_shapes(plan: Plan, release: str) -> bool:
    """Return whether all names and shapes are those of the published release."""
    rows = manifest.manifest().get("releases", {}).get(release, {}).get("tensors", {})
    names = {row["diffusers"].replace("{i}", "0"): tuple(row["shape"]) for row in rows.values()}
    theirs = {any_block(name): shape for name, shape in names.items() if is_needed(name, plan.streams)}
    return bool(theirs) and {any_block(name): weight.shape for name, weight in plan.weights.items()} == theirs


def cannot_tell(plan: Plan, same: Sequence[Published], digest: str | None) -> list[str]:
    """Return the facts that a user may want to know and that the file does not reveal."""
    unsure = (
        []
        if digest and len(same) == 1
        else ["dev or distilled: nothing in the tensors or the metadata says it (--sha256 does, for a published file)"]
    )
    unsure += [f"{note.removeprefix('nothing in the checkpoint says ')}" for note in plan.notes if "assumed" in note]
    return unsure


def sha256_of(source: CheckpointFiles) -> str | None:
    """Return the sha256 of a single file, or None if there are several files."""
    if len(source.files) != 1:
        return None
    digest, file = hashlib.sha256(), source.files[0]
    for start in track(range(0, file.size, READ), f"sha256 of {file.path.name}"):
        digest.update(file.read(start, min(start + READ, file.size), "sha256"))
    return digest.hexdigest()


def statistics(plan: Plan) -> list[dict[str, Any]]:
    """Return a row for each tensor that looks damaged or is an outlier.

    A tensor looks damaged if it has values that are not finite, or if it is all zero. It is an outlier if its RMS
    differs by a factor of `OUTLIER` from the median over the blocks. What cannot be decoded becomes a problem of the
    plan.
    """
    measured = {}
    for name, weight in track([*plan.weights.items()], "reading tensors"):
        try:
            measured[name] = weight_statistics(weight)
        except CheckpointError as error:
            plan.problems.extend(error.problems)
    alike: dict[str, list[float]] = {}
    for name, (_, rms, _) in measured.items():
        alike.setdefault(any_block(name), []).append(rms)
    rows = []
    for name, (nonfinite, rms, largest) in measured.items():
        median = sorted(alike[any_block(name)])[len(alike[any_block(name)]) // 2]
        ratio = rms / median if median else None
        outlier = ratio is not None and len(alike[any_block(name)]) > 2 and not 1 / OUTLIER <= ratio <= OUTLIER
        if nonfinite or largest == 0 or outlier:
            rows.append(
                {
                    "name": name,
                    "nonfinite": nonfinite,
                    "all_zero": largest == 0 and not nonfinite,
                    "rms": rms,
                    "largest": largest,
                    "times_the_median": ratio,
                }
            )
    return rows


def weight_statistics(weight: Weight) -> tuple[int, float, float]:
    """Return the number of values that are not finite, and the RMS and the largest magnitude of the others."""
    finite, squares, largest, count = 0, 0.0, 0.0, math.prod(weight.shape)
    for rows in weight.chunks():
        values = rows.double().flatten()
        values = values[values.isfinite()]
        finite += len(values)
        squares += float(values.square().sum())
        largest = max(largest, float(values.abs().max())) if len(values) else largest
    return count - finite, (squares / max(finite, 1)) ** 0.5, largest
