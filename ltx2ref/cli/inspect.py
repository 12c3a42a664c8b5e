"""`ltx2ref inspect`: say what a checkpoint is."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import DONE, UNCLEAR, WRONG, add_command, add_source, source_options, worst
from .output import Column, print_json, print_line, print_table

if TYPE_CHECKING:
    from ..checkpoint.inspection import Description

INSPECT_EXAMPLES = """examples:
  ltx2ref inspect ltx-2.3-22b-dev.safetensors
      release, dialect, formats, config, and the published file that it may be
  ltx2ref inspect transformer/ --json
      a diffusers folder, as JSON; of a folder with several checkpoints a line
      for each
  ltx2ref inspect model.safetensors --sha256 --stats
      read it all: compare its digest, and look for damaged tensors

With --stats, tensors far larger or smaller than in other blocks are listed as
well. Healthy checkpoints have some, so they do not change the exit status.

exit status:
  0  understood; with --stats, no tensor looks damaged
  1  a file with problems, for which it would not be loaded; with --stats,
     values that are not finite
  2  unusable input; with --stats, tensors that are all zero"""


def add_inspect(commands: Any) -> None:
    """Add `inspect` to the commands."""
    command = add_command(
        commands, "inspect", run_inspect, "Say what a checkpoint is, from its headers alone.", INSPECT_EXAMPLES
    )
    command.add_argument("path", metavar="PATH", help="a .safetensors or .gguf file, or a folder")
    add_source(command)
    command.add_argument("--sha256", action="store_true", help="compare the digest with the published ones as well")
    command.add_argument("--stats", action="store_true", help="look for non-finite values, zeros and outliers")


def run_inspect(options: argparse.Namespace) -> int:
    """Describe a checkpoint, or each checkpoint in a folder."""
    from ..checkpoint.inspection import inspect_all

    found = inspect_all(options.path, source_options(options), sha256=options.sha256, stats=options.stats)
    if options.json:
        print_json(
            asdict(found[0]) if len(found) == 1 else {"path": options.path, "checkpoints": [*map(asdict, found)]}
        )
    elif len(found) == 1:
        print_description(found[0])
    else:
        print_descriptions(found)
    return worst(map(inspect_status, found))


def inspect_status(d: "Description") -> int:
    """Return the exit status for one checkpoint. Tensors that are all zero leave it undecided; outliers do not."""
    from ..checkpoint.inspection import UNREADABLE

    if d.kind == UNREADABLE:
        return UNCLEAR
    stats = d.stats or []
    if d.problems or any(row["nonfinite"] for row in stats):
        return WRONG
    return UNCLEAR if any(row["all_zero"] for row in stats) else DONE


def print_descriptions(found: "Sequence[Description]") -> None:
    """Print a line for each checkpoint of a folder, and the first problem of each."""
    print_table(
        [
            Column("file", [Path(d.path).name for d in found]),
            Column("kind", [f"{d.kind} {d.release or ''}".strip() + only_stream(d) for d in found]),
            Column("formats", [", ".join(dict.fromkeys(row["format"] for row in d.formats)) for d in found]),
            Column("tensors", [f"{d.tensors:,}" for d in found]),
            Column("bytes", [f"{d.bytes:,}" for d in found]),
        ],
        alarming=[inspect_status(d) != DONE for d in found],
    )
    for d in found:
        for problem in d.problems[:1]:
            more = f" (and {len(d.problems) - 1} more)" if len(d.problems) > 1 else ""
            print_line(f"{Path(d.path).name}: {problem}{more}")
        if d.stats:
            print_line(f"{Path(d.path).name}: {len(d.stats)} tensors stand out; inspect the file alone for their names")


def only_stream(d: "Description") -> str:
    """Return in words which stream a transformer has, if it has only one."""
    return f", {d.streams[0]} stream only" if len(d.streams) == 1 else ""


def print_description(d: "Description") -> None:
    """Print everything that is known about a checkpoint."""
    print_line(f"{d.path}: {d.kind}{only_stream(d)}{f', release {d.release}' if d.release else ''}")
    size = f"{d.bytes:,} bytes in {d.files} {d.container} file{'s' * (d.files > 1)}"
    print_line(f"  {size}, {d.tensors:,} tensors; metadata: {', '.join(d.metadata) or 'none'}")
    if d.kind == "transformer":
        print_transformer(d)
    for prefix, held in d.foreign.items():
        print_line(f"not the transformer: {prefix}* {held['tensors']:,} tensors, {held['bytes']:,} bytes")
    print_published(d)
    for title, lines in (("note", d.notes), ("cannot be told", d.cannot_tell), ("problem", d.problems)):
        for line in lines:
            print_line(f"{title}: {line}")
    if d.stats is not None:
        print_stats(d.stats)


def print_transformer(d: "Description") -> None:
    """Print the formats of a transformer and its config as tables."""
    shapes = "those of the published release" if d.published_shapes else "not those of a published release"
    print_line(f"  {d.dialect}; {d.parameters:,} parameters; names and shapes: {shapes}")
    print()
    print_table(
        [
            Column("layers", [row["layers"] for row in d.formats]),
            Column("blocks", [row["blocks"] or "" for row in d.formats]),
            Column("format", [row["format"] for row in d.formats]),
            Column("stored", [stored_words(row["stored"]) for row in d.formats]),
            Column("tensors", [f"{row['tensors']:,}" for row in d.formats]),
            Column("bytes", [f"{row['bytes']:,}" for row in d.formats]),
        ]
    )
    print()
    print_table(
        [
            Column("config", [*d.config]),
            Column("value", [str(fact["value"]) for fact in d.config.values()]),
            Column("from", [fact["origin"] for fact in d.config.values()]),
        ]
    )
    print()


def stored_words(facts: dict[str, dict[str, Any]]) -> str:
    """Return the facts about how weights are stored, each with where it is said, in a line."""
    return ", ".join(f"{fact} {x['value']} ({x['said']})" for fact, x in facts.items())


def print_published(d: "Description") -> None:
    """Print which published files a checkpoint may be."""
    for entry in d.manifest:
        tensors = f", published with {entry.tensors:,} tensors" if entry.tensors else ""
        print_line(f"published, by its {entry.by}: {entry.repository}/{entry.name} {entry.revision or ''}{tensors}")
    if not d.manifest:
        print_line("published: the manifest has no such file")


def print_stats(stats: Sequence[dict[str, Any]]) -> None:
    """Print a line for each tensor that looks damaged, and then for each that is merely an outlier."""
    damaged = [row for row in stats if row["nonfinite"] or row["all_zero"]]
    outliers = [row for row in stats if row not in damaged]
    print_line(f"damaged tensors: {len(damaged)}")
    for row in damaged:
        print_line(f"  {row['name']}: {finding(row)}")
    if outliers:
        print_line(f"note: outliers, of which healthy checkpoints have some: {len(outliers)}")
    for row in outliers:
        print_line(f"  {row['name']}: {finding(row)}")


def finding(row: dict[str, Any]) -> str:
    """Return in words what is unusual about a tensor."""
    if row["nonfinite"]:
        return f"{row['nonfinite']:,} values are not finite"
    if row["all_zero"]:
        return "all zero"
    return f"rms {row['rms']:.3g}, {row['times_the_median']:.3g} times the median of the other blocks"
