"""The command line: one function per command."""

import argparse
import json
import math
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .checkpoint.convert import Conversion, convert
from .checkpoint.header import parse_json
from .checkpoint.inspection import Description, inspect
from .checkpoint.match import make_plan
from .checkpoint.resolve_config import RELEASES
from .config import TransformerConfig
from .describe import Architecture, Lengths, describe, lengths
from .kit.check import LEVELS, Verdict, check, failures
from .kit.export import export
from .parity import record
from .parity.arithmetic import VERSION as ARITHMETIC
from .parity.arithmetic import NotExact
from .parity.audit import audit, candidate_named, conventions_of
from .parity.cases import CASES, RECORDED, Case
from .parity.compare import compare
from .parity.kernels import KERNELS, LONG_KERNELS, Kernel
from .parity.machines import MACHINES
from .parity.report.html import html
from .parity.report.rows import DIVERGED, IDENTICAL, MISSING, SHAPE, SUSPECT
from .parity.report.rows import Report as AuditReport
from .parity.trace.probe import probe, threads
from .parity.trace.taps import OutputError
from .parity.trace.tracefile import load_trace
from .parity.verify import FAILED, INCONCLUSIVE, WITHIN, CaseResult, How, verify_all
from .progress import track
from .vendor import Copy, some, vendor
from .vendor import check as check_copy

COLOURS = {IDENTICAL: "green", WITHIN: "cyan", FAILED: "bold red", INCONCLUSIVE: "yellow"}
Command = argparse.ArgumentParser


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ltx2ref", description="The LTX-2 transformer as a reference.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_verify(commands)
    add_audit(commands)
    add_compare(commands)
    add_kit(commands)
    add_inspect(commands)
    add_convert(commands)
    add_describe(commands)
    add_vendor(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"ltx2ref: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `| head`: what is still to be flushed goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str, examples: str
) -> Command:
    command: Command = commands.add_parser(
        name,
        help=what[0].lower() + what[1:].rstrip("."),
        description=what,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run)
    return command


def print_json(value: Any) -> None:
    print(json.dumps(finite(value), indent=1, allow_nan=False))


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(value, Mapping):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def add_verify(commands: Any) -> None:
    command = add_command(
        commands,
        "verify",
        run_verify,
        "Run the conformance cases and kernel shapes and compare every tap with what diffusers and ltx-core compute.",
        """examples:
  ltx2ref verify                          every case, in exact and in this machine's own arithmetic
  ltx2ref verify --list                   the cases, and the kernel shapes
  ltx2ref verify --case 'kernel/*' --all  single operations at the shapes of real models, the long ones, too
  ltx2ref verify --case '2.3/*' --json    the cases of one release, as JSON
  ltx2ref verify --arithmetic exact       identical or not: the same on every machine
  ltx2ref verify --device cuda            on a GPU
  ltx2ref verify --machine faithful       as a simulated machine computes, natively

exit status: 0 identical or within budget, 1 failed, 2 inconclusive or unusable input""",
    )
    command.add_argument("--case", default="*", metavar="GLOB", help="RELEASE/NAME; default: all")
    command.add_argument("--dtype", choices=[*record.EXACT_DTYPES], help="default: all; float16 exactly only")
    command.add_argument("--arithmetic", choices=["exact", "native"], help="default: both")
    command.add_argument("--device", default="cpu", help="cpu, cuda or mps; default: cpu")
    command.add_argument(
        "--machine", choices=[*MACHINES], metavar="NAME", help=f"simulated, and native: {', '.join(MACHINES)}"
    )
    command.add_argument("--all", action="store_true", help="kernel shapes of 1025 tokens, too")
    command.add_argument("--list", action="store_true", help="print the names of the cases, and run none")


def run_verify(options: argparse.Namespace) -> int:
    there: list[Case | Kernel] = [*RECORDED, *KERNELS, *(LONG_KERNELS if options.all else ())]
    chosen = [case for case in there if fnmatch(case.id, options.case)]
    if not chosen:
        raise ValueError(f"--case {options.case}: no such case; --list names them, and --all adds the long ones")
    if options.list:
        names = [case.id for case in chosen]
        if options.json:
            print_json(names)
        else:
            print("\n".join(names))
        return 0
    if options.machine:
        if options.arithmetic == "exact" or options.device != "cpu":
            conflict = "--arithmetic exact" if options.arithmetic == "exact" else f"--device {options.device}"
            raise ValueError(f"--machine: a simulated machine has a native verdict, on the CPU; leave out {conflict}")
        options.arithmetic = "native"
    recording, device = record.environment(), usable(options.device)
    dtypes = record.NATIVE_DTYPES if options.arithmetic == "native" else record.EXACT_DTYPES
    if options.dtype and options.dtype not in dtypes:
        raise ValueError(f"--dtype {options.dtype}: recorded under exact arithmetic only, not natively")
    runs = [(case, dtype) for case in chosen for dtype in dtypes if dtype == (options.dtype or dtype)]
    with threads(recording["threads"]):
        here = {} if options.arithmetic == "exact" else probe(device, tuple(record.NATIVE_DTYPES.values()))
        differing = [name for name, digest in recording["probe"].items() if here and here[name] != digest]
    how = How(device, not (differing or options.machine), options.arithmetic, options.machine, recording["threads"])
    results = list(track(verify_all(runs, how), "verifying", len(runs)))
    if options.json:
        rows: list[dict[str, Any]] = [asdict(result) for result in results]
        print_json(
            {
                "recording": recording,
                "here": {"torch": torch.__version__, "probe": here},
                "arithmetic": ARITHMETIC,
                "differing_operations": differing,
                "results": rows,
            }
        )
    else:
        print_results(results)
        print_failures(results)
        print_summary(results, recording, differing, options.machine)
    verdicts: set[str] = set().union(*(result.verdicts for result in results))
    return 1 if FAILED in verdicts else 2 if INCONCLUSIVE in verdicts else 0


def usable(name: str) -> torch.device:
    """Raises `ValueError` if there is no such device here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def print_results(results: list[CaseResult]) -> None:
    """Print a row for each case: for each dtype the exact verdict, and the native one as a share of its budget."""
    columns = [key for dtype in record.EXACT_DTYPES for key in (dtype, f"{dtype} native")]
    rows: dict[str, dict[str, str]] = {}
    for result in results:
        row = rows.setdefault(f"{result.release}/{result.case}", {})
        if result.exact:
            row[result.dtype] = result.exact.verdict
        if result.native:
            within = {WITHIN: f"{result.native.share:.2f}"}
            row[f"{result.dtype} native"] = within.get(result.native.verdict, result.native.verdict)
    shown = [key for key in columns if any(key in row for row in rows.values())]
    failed = [any(verdict in (FAILED, INCONCLUSIVE) for verdict in row.values()) for row in rows.values()]
    header = ["native" if key.endswith(" native") and key.removesuffix(" native") in shown else key for key in shown]
    print_table(
        ["case", *header],
        [[name, *(row.get(key, "") for key in shown)] for name, row in rows.items()],
        ["bold red" if bad else None for bad in failed],
    )


def print_failures(results: list[CaseResult]) -> None:
    for result in results:
        at = f"{result.release}/{result.case} {result.dtype}"
        if result.exact and result.exact.verdict == FAILED:
            far = f", about {result.exact.distance:.1e} apart" if result.exact.distance is not None else ""
            note = f"; {result.exact.note}" if result.exact.note else ""
            print(
                f"{at}: exact: first differs at {result.exact.first}{far}; {result.exact.differing} of "
                f"{result.exact.taps} taps differ{note}"
            )
        if result.native and result.native.verdict in (FAILED, INCONCLUSIVE):
            first = f" at {result.native.first}, {result.native.share:.3g} of the budget" if result.native.first else ""
            print(f"{at}: native: {result.native.verdict}{first}{'; ' * bool(result.native.note)}{result.native.note}")
        elif result.native and result.native.note:
            print(f"{at}: native: {result.native.note}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str | None]) -> None:
    try:
        from rich.console import Console
        from rich.table import Column, Table
    except ModuleNotFoundError:
        print("\n".join("\t".join(row) for row in [header, *rows]))
        return
    table = Table(*(Column(name, no_wrap=True) for name in header), box=None, pad_edge=False)
    for row, style in zip(rows, styles, strict=True):
        table.add_row(*row, style=style)
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


def print_summary(
    results: list[CaseResult], recording: dict[str, Any], differing: list[str], machine: str | None
) -> None:
    exact = [result.exact for result in results if result.exact]
    native = [result.native for result in results if result.native]
    oracles = f"diffusers {recording['diffusers']} and ltx-core {recording['ltx-core']}"
    print()
    if exact:
        same, taps = sum(x.verdict == IDENTICAL for x in exact), sum(x.taps for x in exact)
        equal = taps - sum(x.differing for x in exact)
        print(f"exact: {same} of {len(exact)} runs identical, {equal:,} of {taps:,} taps.")
        print(
            "  In arithmetic that is the same on every machine, this code computes\n"
            f"  {'what' if equal == taps else 'something else than'} {oracles} compute."
        )
    if native:
        counts = [f"{n} {verdict}" for verdict in COLOURS if (n := sum(r.verdict == verdict for r in native))]
        noted = sum(r.verdict == WITHIN and r.share > 1 for r in native)
        most = max((r.share for r in native if r.verdict == WITHIN), default=0.0)
        counts += [f"{noted} of them with a note, up to {most:.2f} budgets"] if noted else []
        here = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
        here = here if machine is None else f"{machine}, simulated"
        print(f"native: {', '.join(counts)}, in {len(native)} runs ({here}).")
        if machine is not None:
            print("  The numbers above are errors against float64, as a share of what is allowed.")
        elif differing:
            there = f"torch {recording['torch']}, {recording['cpu_capability']}"
            print(
                f"  {len(differing)} of {len(recording['probe'])} probed operations have other bits here than on the "
                f"recording machine\n  ({there}). The numbers above are errors against float64,\n"
                f"  as a share of what is allowed; the largest is {max(r.share for r in native):.2f}."
            )
        else:
            print("  This machine has the bits of the recording one: nothing but identical passes.")


def add_inspect(commands: Any) -> None:
    command = add_command(
        commands,
        "inspect",
        run_inspect,
        "Say what a checkpoint is, from the headers of its files alone.",
        """examples:
  ltx2ref inspect ltx-2.3-22b-dev.safetensors             release, dialect, formats, config, published file
  ltx2ref inspect transformer/ --json                     a diffusers folder, as JSON
  ltx2ref inspect model.safetensors --sha256 --stats      read it all: the digest, and tensors that look damaged

exit status: 0 understood, 1 a transformer with problems, for which it would not be loaded, 2 unusable input""",
    )
    command.add_argument("path", metavar="PATH", help="a .safetensors or .gguf file, or a folder")
    command.add_argument("--sha256", action="store_true", help="compare the digest with the published ones, too")
    command.add_argument("--stats", action="store_true", help="look for non-finite values, zeros and outliers")


def run_inspect(options: argparse.Namespace) -> int:
    described = inspect(options.path, sha256=options.sha256, stats=options.stats)
    if options.json:
        print_json(asdict(described))
    else:
        print_description(described)
    return 1 if described.problems else 0


def print_description(d: Description) -> None:
    print(f"{d.path}: {d.kind}{f', release {d.release}' if d.release else ''}")
    print(
        f"  {d.bytes:,} bytes in {d.files} {d.container} file{'s' * (d.files > 1)}, {d.tensors:,} tensors; "
        f"metadata: {', '.join(d.metadata) or 'none'}"
    )
    if d.kind == "transformer":
        shapes = "those of the published release" if d.published_shapes else "not those of a published release"
        print(f"  {d.dialect}; {d.parameters:,} parameters; names and shapes: {shapes}\n")
        rows = [
            [row["layers"], row["blocks"] or "", row["format"], f"{row['tensors']:,}", f"{row['bytes']:,}"]
            for row in d.formats
        ]
        print_table(["layers", "blocks", "format", "tensors", "bytes"], rows, [None] * len(rows))
        print()
        for origin in dict.fromkeys(fact["origin"] for fact in d.config.values()):
            facts = [f"{name} {fact['value']}" for name, fact in d.config.items() if fact["origin"] == origin]
            print(f"config by {origin}: {', '.join(facts)}")
    for prefix, held in d.foreign.items():
        print(f"not the transformer: {prefix}* {held['tensors']:,} tensors, {held['bytes']:,} bytes")
    for entry in d.manifest:
        tensors = f", published with {entry.tensors:,} tensors" if entry.tensors else ""
        print(f"published, by its {entry.by}: {entry.repository}/{entry.name} {entry.revision or ''}{tensors}")
    if not d.manifest:
        print("published: no file of this size is in the manifest")
    for title, lines in (("note", d.notes), ("cannot be told", d.cannot_tell), ("problem", d.problems)):
        print("".join(f"{title}: {line}\n" for line in lines), end="")
    if d.stats is not None:
        print(f"suspicious tensors: {len(d.stats)}")
        print_table(
            ["tensor", "non-finite", "all zero", "rms", "times the median of the other blocks"],
            [
                [
                    row["name"],
                    f"{row['nonfinite']}",
                    "yes" if row["all_zero"] else "",
                    f"{row['rms']:.3g}",
                    f"{row['times_the_median']:.3g}" if row["times_the_median"] is not None else "",
                ]
                for row in d.stats
            ],
            [None] * len(d.stats),
        )


def add_convert(commands: Any) -> None:
    command = add_command(
        commands,
        "convert",
        run_convert,
        "Write a checkpoint's transformer in the other dialect or another dtype.",
        """examples:
  ltx2ref convert ltx-2.3-22b-dev.safetensors transformer --to diffusers --max-shard-size 5GB
  ltx2ref convert transformer ltx-2.3-transformer.safetensors --to lightricks
  ltx2ref convert ltx-2.3-22b-dev-fp8.safetensors transformer --to diffusers --dtype bfloat16

Tensors keep their dtypes and bits unless --dtype is given, which a quantised checkpoint needs. Nothing is at DST until
all is; an existing DST is never touched. What DST does not have is listed: other models, unknown metadata.

exit status: 0 written, 2 unusable input""",
    )
    command.add_argument("source", metavar="SRC", help="a .safetensors or .gguf file, or a folder")
    command.add_argument("destination", metavar="DST", help="a new folder for diffusers, a new file for lightricks")
    command.add_argument("--to", required=True, choices=["diffusers", "lightricks"], help="the dialect of DST")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of all tensors; default: kept")
    command.add_argument("--max-shard-size", metavar="SIZE", help="for diffusers: 5GB or so; default: one file")


def run_convert(options: argparse.Namespace) -> int:
    with ended_by_exceptions():
        report = convert(
            options.source,
            options.destination,
            dialect=options.to,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            max_shard_size=options.max_shard_size,
        )
    if options.json:
        print_json(report._asdict())
    else:
        print_report(report)
    return 0


@contextmanager
def ended_by_exceptions() -> Iterator[None]:
    """SIGTERM unwinds the stack, as Ctrl-C does, so that nothing half-written is left."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_report(report: Conversion) -> None:
    print(f"{report.source}: {report.source_dialect}; {', '.join(report.formats)}")
    print(f"{report.destination}: {report.dialect}; {report.tensors:,} tensors, {report.bytes:,} bytes")
    for prefix, held in report.foreign.items():
        print(f"left out: {prefix}* {held['tensors']:,} tensors, {held['bytes']:,} bytes")
    if report.left_out:
        print(f"left out: {', '.join(report.left_out)}")
    for note in report.assumed:
        print(f"assumed: {note}")


def add_describe(commands: Any) -> None:
    command = add_command(
        commands,
        "describe",
        run_describe,
        "Say what the architecture is made of, and what one forward costs.",
        """examples:
  ltx2ref describe 2.3                                              121 frames of 768 x 512 and their audio
  ltx2ref describe 2.0 --frames 241 --width 1280 --height 704 --seconds 10
  ltx2ref describe transformer/ --tokens 14080 126 1024 --dtype float32 --json

FLOPs are 2 for each multiplication with an addition, of matrix products and attention alone. Memory is that of a
forward without gradients, one noise level per video, and attention and RMSNorm that hold nothing but their result.

exit status: 0 described, 2 unusable input""",
    )
    command.add_argument(
        "what",
        nargs="?",
        default="2.3",
        metavar="RELEASE|PATH",
        help=f"{', '.join(RELEASES)}, a checkpoint, or a diffusers config.json; default: 2.3",
    )
    command.add_argument("--frames", type=int, default=121, help="of the video; default: 121")
    command.add_argument("--height", type=int, default=512, help="in pixels; default: 512")
    command.add_argument("--width", type=int, default=768, help="in pixels; default: 768")
    command.add_argument("--fps", type=float, default=24.0, help="default: 24")
    command.add_argument("--seconds", type=float, help="of the audio; default: as long as the video")
    command.add_argument("--text", type=int, default=1024, metavar="TOKENS", help="default: 1024")
    command.add_argument("--batch", type=int, default=1, help="default: 1")
    command.add_argument("--tokens", type=int, nargs=3, metavar=("VIDEO", "AUDIO", "TEXT"), help="in place of sizes")
    command.add_argument(
        "--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="bfloat16", help="default: bfloat16"
    )


def run_describe(options: argparse.Namespace) -> int:
    config = config_named(options.what)
    n = (
        Lengths._make([*options.tokens, options.batch])
        if options.tokens
        else lengths(
            config,
            options.frames,
            options.height,
            options.width,
            options.seconds,
            options.fps,
            options.text,
            options.batch,
        )
    )
    described = describe(config, n, getattr(torch, options.dtype))
    if options.json:
        print_json(asdict(described) | {"lengths": n._asdict()})
    else:
        print_architecture(options.what, described)
    return 0


def config_named(what: str) -> TransformerConfig:
    """Raises `ValueError` for what is neither a release nor a file that says its config."""
    if what in RELEASES:
        return RELEASES[what]
    if not Path(what).exists():
        raise ValueError(f"{what}: expected one of the releases {', '.join(RELEASES)}, or a file or folder")
    if what.endswith(".json"):
        return TransformerConfig.from_diffusers(parse_json(Path(what).read_bytes()))
    plan = make_plan(what)
    plan.check()
    return plan.config


def print_architecture(what: str, d: Architecture) -> None:
    v, a = d.config.video, d.config.audio
    print(
        f"{what}: {d.config.num_layers} blocks; video {v.dim} wide, {v.num_heads} heads of {v.head_dim}; "
        f"audio {a.dim} wide, {a.num_heads} heads of {a.head_dim}"
    )
    print(
        f"{d.parameters:,} parameters, {gib(d.weight_bytes)} in {d.dtype}; of one forward with {d.lengths.video:,} "
        f"video, {d.lengths.audio:,} audio and {d.lengths.text:,} text tokens in a batch of {d.lengths.batch}: "
        f"{d.flops / 1e12:,.4g} TFLOP, {gib(d.activation_bytes)} of activations\n"
    )
    rows = [
        [
            row.step,
            row.stream,
            f"{row.parameters:,}",
            f"{row.parameters / d.parameters:.1%}",
            f"{row.flops / 1e12:,.3f}",
            f"{row.flops / d.flops:.1%}",
            f"{held / 2**30:.2f}" if (held := d.activation_bytes_in.get(row.step)) and row.stream == "video" else "",
            ", ".join(row.matrices[:3]) + ", ..." * (len(row.matrices) > 3),
        ]
        for row in d.rows
    ]
    print_table(
        ["step", "stream", "parameters", "share", "TFLOP", "share", "GiB", "matrices, in x out"],
        rows,
        [None] * len(rows),
    )


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def add_vendor(commands: Any) -> None:
    command = add_command(
        commands,
        "vendor",
        run_vendor,
        "Copy this package, or the model alone, into another project.",
        """examples:
  ltx2ref vendor myproject --as ltx2_reference             to myproject/ltx2_reference; or replace an unchanged copy
  ltx2ref vendor myproject --as ltx2_model --model         the architecture files, which need torch and einops alone
  ltx2ref vendor myproject --as ltx2_reference --check     what was changed there since, and what is newer here

exit status: 0 copied, or the same as here; 1 (of --check) changed there or outdated; 2 unusable input""",
    )
    command.add_argument("parent", metavar="DIR", help="the folder in which the copy is to stand")
    command.add_argument(
        "--as", dest="name", required=True, metavar="NAME", help="the copy's name, as in `import NAME`"
    )
    action = command.add_mutually_exclusive_group()
    action.add_argument("--model", action="store_true", help="the model alone: no checkpoints, verify, audit, ...")
    action.add_argument("--check", action="store_true", help="compare only")


def run_vendor(options: argparse.Namespace) -> int:
    target = Path(options.parent) / options.name
    copy = check_copy(target) if options.check else vendor(options.parent, options.name, model_only=options.model)
    if options.json:
        print_json(asdict(copy))
    else:
        print_copy(copy)
    return 0 if copy.current else 1


def print_copy(copy: Copy) -> None:
    origin = f"ltx2ref {copy.version}{f', commit {copy.commit}' if copy.commit else ''}"
    print(f"{copy.folder}: {'the model' if copy.model_only else 'all'} of {origin}; {copy.files} files")
    if copy.changed:
        print(f"changed there: {some(copy.changed)}")
    if copy.outdated:
        print(f"another version here, {__version__}, differs in: {some(copy.outdated)}")
    if copy.current:
        print(f"unchanged, and the same as version {__version__} here")


def add_audit(commands: Any) -> None:
    command = add_command(
        commands,
        "audit",
        run_audit,
        "Run another implementation with the same weights and compare every tap.",
        """CANDIDATE is diffusers or ltx-core (1.0.0), if it is installed; a trace file (docs/trace-format.md) of one
case; module:callable or path/to/file.py:callable, which is given config, state, inputs and dtype, and returns taps by
name, or both outputs; or this model under other conventions: ltx2ref:ltx-core-2026-03, ltx2ref:ltx-core-2026-08 or
ltx2ref:diffusers, which REFERENCE can be, too (docs/divergences.md). Default: ltx2ref, with those of diffusers.

examples:
  ltx2ref audit diffusers --release 2.3 --dtype bfloat16          every case of a release
  ltx2ref audit ltx-core --case '2.3/i2v*' --html report.html     the first case that differs, as a page
  ltx2ref audit my_port:run --case 2.3/t2v --json                 a port of yours, in the current folder or installed
  ltx2ref audit path/to/my_port.py:run --case 2.3/t2v             a port in another folder
  ltx2ref audit ltx2ref:ltx-core-2026-03 ltx-core                 against ltx-core's conventions
  ltx2ref audit diffusers --arithmetic exact --dtype bfloat16     what differs is an operation, and no rounding hides it

exit status: 0 identical or rounding, 1 diverged, 2 inconclusive: suspect, taps missing, or nothing could be run""",
    )
    command.add_argument("reference", metavar="REFERENCE", nargs="?", default="ltx2ref")
    command.add_argument("candidate", metavar="CANDIDATE")
    command.add_argument("--release", choices=sorted({case.release for case in CASES}), help="default: all")
    command.add_argument("--case", default="*", metavar="GLOB", help="of RELEASE/NAME; default: all")
    command.add_argument(
        "--dtype", choices=[*record.EXACT_DTYPES], default="float32", help="default: float32; float16 exactly only"
    )
    command.add_argument(
        "--arithmetic",
        choices=["native", "exact"],
        default="native",
        help="exact: what differs then differs in operations; default: native",
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda or mps; default: cpu")
    command.add_argument("--html", metavar="FILE", help="write the report of the first case that differs, or the first")


def run_audit(options: argparse.Namespace) -> int:
    candidate, device = candidate_named(options.candidate), usable(options.device)
    conventions_of(options.reference)
    if options.arithmetic == "native" and options.dtype not in record.NATIVE_DTYPES:
        raise ValueError(f"--dtype {options.dtype}: under exact arithmetic only; add --arithmetic exact")
    chosen = [
        case for case in CASES if fnmatch(case.id, options.case) and case.release == (options.release or case.release)
    ]
    reports: dict[str, AuditReport] = {}
    impossible: dict[str, str] = {}
    for case in track(chosen, f"auditing {candidate.name}"):
        try:
            reports[case.id] = audit(
                candidate, case, record.EXACT_DTYPES[options.dtype], device, options.reference, options.arithmetic
            )
        except NotExact as error:  # of all cases, most likely
            raise ValueError(f"{case.id}: {error}") from None
        except OutputError as error:  # not a case that it cannot express: an answer that is none
            raise ValueError(f"{case.id}: {error}") from None
        except ValueError as error:
            impossible[case.id] = str(error)
    if not reports:
        reasons = "; ".join(sorted(set(impossible.values()))) or f"--case {options.case}: no such case"
        raise ValueError(f"nothing was compared: {reasons}")
    show_reports(reports, impossible, options)
    return status(reports.values())


def add_compare(commands: Any) -> None:
    command = add_command(
        commands,
        "compare",
        run_compare,
        "Compare two trace files tap by tap.",
        """examples:
  ltx2ref compare reference.safetensors port.safetensors
  ltx2ref compare reference.safetensors port.safetensors --truth float64.safetensors --html report.html

exit status: 0 identical or rounding, 1 diverged, 2 inconclusive: suspect, taps missing, or unusable input""",
    )
    command.add_argument("reference", metavar="REFERENCE", help="a trace file (docs/trace-format.md)")
    command.add_argument("candidate", metavar="CANDIDATE", help="another one")
    command.add_argument("--truth", metavar="FILE", help="the same taps from float64: with it there is a budget")
    command.add_argument("--html", metavar="FILE", help="write the report as a page")


def run_compare(options: argparse.Namespace) -> int:
    reference, candidate = load_trace(options.reference), load_trace(options.candidate)
    truth = load_trace(options.truth).taps if options.truth else None
    report = replace(
        compare(reference.taps, candidate.taps, truth),
        reference={"implementation": reference.implementation, **reference.fingerprint},
        candidate={"implementation": candidate.implementation, **candidate.fingerprint},
    )
    show_reports({Path(options.candidate).name: report}, {}, options)
    return status([report])


def add_kit(commands: Any) -> None:
    kit = commands.add_parser(
        "kit",
        help="conformance of a port in any language: write the kit, judge its results",
        description="Conformance of a port in any language: write the kit, judge the results that the port computed.",
    )
    actions = kit.add_subparsers(required=True, metavar="ACTION")
    export = add_command(
        actions,
        "export",
        run_kit_export,
        "Write kit.json, a safetensors file for each case, and a README.",
        """examples:
  ltx2ref kit export kit
  ltx2ref kit export kit --json > cases.json

exit status: 0 written, 2 unusable folder""",
    )
    export.add_argument("directory", metavar="DIR", help="a new or empty folder")
    check = add_command(
        actions,
        "check",
        run_kit_check,
        "Judge a folder of results against the kit.",
        """examples:
  ltx2ref kit check results
  ltx2ref kit check results --level exact               results/exact, to the bit: for a port that rounds as diffusers
  ltx2ref kit check results --partial                   of some cases, or some outputs
  ltx2ref kit check results --html report.html          the first case that is wrong, as a page
  ltx2ref kit check results --kit kit --json            against a kit that was written before

exit status: 0 conformant, or identical; 1 something is wrong; 2 inconclusive, results missing, or unusable""",
    )
    check.add_argument("results", metavar="RESULTS", help="a folder of result files, as kit.json names them")
    check.add_argument(
        "--level",
        choices=LEVELS,
        default=LEVELS[0],
        help="native (default): within rounding of diffusers; exact: its bits under exact arithmetic",
    )
    check.add_argument("--partial", action="store_true", help="results that are missing were left out on purpose")
    check.add_argument("--kit", metavar="DIR", help="default: the kit that this version exports")
    check.add_argument("--html", metavar="FILE", help="write the report of the first case that is wrong, or the first")


def run_kit_export(options: argparse.Namespace) -> int:
    with threads(1):  # for tensors this small the fastest
        kit = export(options.directory)
    size = sum(file.stat().st_size for file in Path(options.directory).iterdir())
    if options.json:
        print_json(kit)
    else:
        print(f"{options.directory}: {len(kit['cases'])} cases, {size / 1e6:.1f} MB; begin with its README.md")
    return 0


def run_kit_check(options: argparse.Namespace) -> int:
    with threads(1):
        verdict = check(options.results, options.kit, options.level, options.partial)
    wrong = failures(verdict)
    if options.html and verdict.given:
        Path(options.html).write_text(html(next(iter(wrong.values()), verdict.given[0])), encoding="utf-8")
    if options.json:
        print_json(verdict.to_json())
        return verdict.status
    show_kit(verdict, wrong)
    return verdict.status


def show_kit(verdict: Verdict, wrong: Mapping[str, AuditReport]) -> None:
    for name, report in wrong.items():
        print(f"{name}: {report.details(5)}")
    for result in verdict.results:
        for note in result.report.notes if result.report is not None else ():
            print(f"{result.name}: {note}")
    if verdict.missing:
        most = 4
        more = f" and {len(verdict.missing) - most} more" if len(verdict.missing) > most else ""
        print(
            f"{len(verdict.missing)} missing: {', '.join(verdict.missing[:most])}{more}"
            f"{'' if verdict.partial else '; --partial judges what is there alone'}"
        )
    print(verdict.summary)


def status(reports: Iterable[AuditReport]) -> int:
    verdicts = {report.verdict for report in reports}
    return 1 if verdicts & {DIVERGED, SHAPE} else 2 if verdicts & {SUSPECT, MISSING} else 0


def show_reports(
    reports: Mapping[str, AuditReport], impossible: Mapping[str, str], options: argparse.Namespace
) -> None:
    shown = next((report for report in reports.values() if not report.passed), next(iter(reports.values())))
    if options.html:
        Path(options.html).write_text(html(shown), encoding="utf-8")
    if options.json:
        print_json(
            {"reports": {name: report.to_json() for name, report in reports.items()}, "not_expressible": impossible}
        )
        return
    for name, report in reports.items():
        print(f"{name}: {report.verdict}: {report.details() if len(reports) == 1 else report.sentence}")
        print("".join(f"  {note}\n" for note in report.notes if len(reports) == 1), end="")
    for name, reason in impossible.items():
        print(f"{name}: not compared: {reason}")


if __name__ == "__main__":
    sys.exit(main())
