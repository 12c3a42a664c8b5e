"""`ltx2ref describe`: print the architecture in numbers."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import DONE, RELEASE_NAMES, add_command, add_streams
from .output import Column, print_json, print_table

if TYPE_CHECKING:
    from ..checkpoint.streams import StreamName
    from ..config import TransformerConfig
    from ..describe import Architecture, Lengths

DESCRIBE_EXAMPLES = """examples:
  ltx2ref describe 2.3
      121 frames of 768 x 512 and their audio
  ltx2ref describe 2.0 --frames 241 --width 1280 --height 704 --seconds 10
  ltx2ref describe transformer/ --tokens 14080 126 1024 --dtype float32 --json

A multiplication with an addition counts as 2 FLOPs; matrix products and
attention are counted. Memory is that of a forward without gradients, with one
noise level for each video, if attention and RMSNorm hold nothing but their
results.

exit status:
  0  described
  2  unusable input"""


def add_describe(commands: Any) -> None:
    """Add `describe` to the commands."""
    command = add_command(
        commands,
        "describe",
        run_describe,
        "Say what the architecture is made of, and what one forward costs.",
        DESCRIBE_EXAMPLES,
    )
    command.add_argument(
        "what",
        nargs="?",
        default="2.3",
        metavar="RELEASE|PATH",
        help=f"{', '.join(RELEASE_NAMES)}, a checkpoint, or a diffusers config.json; default: 2.3",
    )
    command.add_argument("--frames", type=int, default=121, help="of the video; default: 121")
    command.add_argument("--height", type=int, default=512, help="in pixels; default: 512")
    command.add_argument("--width", type=int, default=768, help="in pixels; default: 768")
    command.add_argument("--fps", type=float, default=24.0, help="default: 24")
    command.add_argument("--seconds", type=float, help="of the audio; default: as long as the video")
    command.add_argument("--text", type=int, default=1024, metavar="TOKENS", help="default: 1024")
    command.add_argument("--batch", type=int, default=1, help="default: 1")
    command.add_argument("--tokens", type=int, nargs=3, metavar=("VIDEO", "AUDIO", "TEXT"), help="in place of sizes")
    add_streams(command)
    command.add_argument(
        "--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="bfloat16", help="default: bfloat16"
    )


def run_describe(options: argparse.Namespace) -> int:
    """Describe a config for the given sizes."""
    import torch

    from ..describe import describe

    config, streams = config_and_stream(options.what, options.streams)
    n = lengths_of(config, options, streams)
    described = describe(config, n, getattr(torch, options.dtype), streams)
    if options.json:
        print_json(asdict(described) | {"lengths": described.lengths._asdict()})
    else:
        print_architecture(options.what, described)
    return DONE


def config_and_stream(what: str, streams: "StreamName | None") -> "tuple[TransformerConfig, StreamName | None]":
    """Return the config of a release, a checkpoint or a config.json, and the stream that is described alone, if any.

    That is the one that is wanted, `streams`, or the only one that a checkpoint has. Raises `ValueError` if `what` is
    none of these, or a checkpoint without that stream.
    """
    from ..checkpoint.match import make_plan
    from ..checkpoint.resolve_config import RELEASES
    from ..checkpoint.settle import ReadingOptions
    from ..checkpoint.source import read_json
    from ..config import TransformerConfig

    if what in RELEASES:
        return RELEASES[what], streams
    if not Path(what).exists():
        raise ValueError(f"{what}: expected one of the releases {', '.join(RELEASES)}, or a file or folder")
    if what.endswith(".json"):
        return TransformerConfig.from_diffusers(read_json(Path(what))), streams
    plan = make_plan(what, ReadingOptions(streams=streams))
    plan.check()
    return plan.config, plan.streams[0] if len(plan.streams) == 1 else None


def lengths_of(config: "TransformerConfig", o: argparse.Namespace, streams: "StreamName | None") -> "Lengths":
    """Return the lengths that the options give, as tokens or as the size of a video."""
    from ..describe import Lengths, lengths

    if o.tokens:
        return Lengths._make([*o.tokens, o.batch])
    return lengths(config, o.frames, o.height, o.width, o.seconds, o.fps, o.text, o.batch, streams)


def print_architecture(what: str, d: "Architecture") -> None:
    """Print the sizes, the total costs, and a table of the steps."""
    v, a, n = d.config.video, d.config.audio, d.lengths
    print(f"{what}: {d.config.num_layers} blocks")
    for stream, sizes in (("video", v), ("audio", a)):
        if stream in d.streams:
            print(f"  {stream} {sizes.dim:,} wide, {sizes.num_heads} heads of {sizes.head_dim}")
    print(f"  {d.parameters:,} parameters, {gib(d.weight_bytes)} in {d.dtype}")
    print(f"one forward: {d.flops / 1e12:,.4g} TFLOP, {gib(d.activation_bytes)} of activations")
    print(f"  {n.video:,} video, {n.audio:,} audio and {n.text:,} text tokens in a batch of {n.batch}\n")
    print_table(
        [
            Column("step", [row.step for row in d.rows]),
            Column("stream", [row.stream for row in d.rows]),
            Column("parameters", [f"{row.parameters:,}" for row in d.rows]),
            Column("share", [f"{row.parameters / d.parameters:.1%}" for row in d.rows], joined=True),
            Column("TFLOP", [f"{row.flops / 1e12:,.3f}" for row in d.rows]),
            Column("share", [f"{row.flops / d.flops:.1%}" for row in d.rows], joined=True),
            Column("GiB", [held(d, row.step) if row.stream == d.streams[0] else "" for row in d.rows]),
            Column("matrices, in x out", [", ".join(row.matrices) for row in d.rows]),
        ],
        keys=2,
    )


def held(d: "Architecture", step: str) -> str:
    """Return the activation memory of a step, which counts both streams together, as text."""
    return f"{d.activation_bytes_in[step] / 2**30:.2f}" if step in d.activation_bytes_in else ""


def gib(size: int) -> str:
    """Return a size in GiB as text."""
    return f"{size / 2**30:.2f} GiB"
