"""`ltx2ref convert`: write the transformer of a checkpoint in another dialect or dtype."""

import argparse
from typing import TYPE_CHECKING, Any

from .command import DONE, DTYPES, add_command, add_source, add_streams, source_options
from .output import print_json, print_line

if TYPE_CHECKING:
    from ..checkpoint.convert import Conversion

CONVERT_EXAMPLES = """examples:
  ltx2ref convert ltx-2.3-22b-dev.safetensors transformer --to diffusers \\
      --max-shard-size 5GB
  ltx2ref convert transformer ltx-2.3-transformer.safetensors --to lightricks
  ltx2ref convert ltx-2.3-22b-dev-fp8.safetensors transformer --to diffusers \\
      --dtype bfloat16
  ltx2ref convert ltx-2.3-22b-dev-fp8.safetensors transformer --to diffusers \\
      --keep

Tensors keep their dtypes and bits unless --dtype is given. A quantised
checkpoint needs that, or --keep, which renames its tensors and what it says of
them. DST appears when all of it is written, and an existing DST is never
touched. What is left out is listed: other models, and metadata that are not
understood.

exit status:
  0  written
  2  unusable input"""


def add_convert(commands: Any) -> None:
    """Add `convert` to the commands."""
    command = add_command(
        commands,
        "convert",
        run_convert,
        "Write a checkpoint's transformer in the other dialect or another dtype.",
        CONVERT_EXAMPLES,
    )
    command.add_argument("source", metavar="SRC", help="a .safetensors or .gguf file, or a folder")
    command.add_argument("destination", metavar="DST", help="a new folder for diffusers, a new file for lightricks")
    add_source(command)
    add_streams(command)
    command.add_argument("--to", required=True, choices=["diffusers", "lightricks"], help="the dialect of DST")
    command.add_argument("--dtype", choices=DTYPES, help="of all tensors; default: as they are")
    command.add_argument("--keep", action="store_true", help="copy quantised tensors as they are")
    command.add_argument("--max-shard-size", metavar="SIZE", help="for diffusers: 5GB or so; default: one file")


def run_convert(options: argparse.Namespace) -> int:
    """Convert a checkpoint, and print what was written and what was left out."""
    import torch

    from ..checkpoint.convert import convert

    report = convert(
        options.source,
        options.destination,
        dialect=options.to,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        keep=options.keep,
        max_shard_size=options.max_shard_size,
        options=source_options(options),
    )
    if options.json:
        print_json(report._asdict())
    else:
        print_conversion(report)
    return DONE


def print_conversion(report: "Conversion") -> None:
    """Print both checkpoints, and what was left out or assumed."""
    print_line(f"{report.source}: {report.source_dialect}; {', '.join(report.formats)}")
    print_line(f"{report.destination}: {report.dialect}; {report.tensors:,} tensors, {report.bytes:,} bytes")
    for prefix, held in report.foreign.items():
        print_line(f"left out: {prefix}* {held['tensors']:,} tensors, {held['bytes']:,} bytes")
    if report.left_out:
        print_line(f"left out: {', '.join(report.left_out)}")
    for note in report.assumed:
        print_line(f"assumed: {note}")
