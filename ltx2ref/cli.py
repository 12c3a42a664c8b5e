"""The command line: one function per command."""
import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any

import torch

from . import __version__
from .parity import record
from .parity.cases import CASES
from .parity.probe import probe, threads
from .parity.verify import FAILED, IDENTICAL, INCONCLUSIVE, WITHIN, CaseResult, verify

EXAMPLES = """examples:
  ltx2ref verify                          every case, float32 and bfloat16, on the CPU
  ltx2ref verify --case '2.3/*' --json    the cases of one release, as JSON
  ltx2ref verify --device cuda            on a GPU: within the budget of the recording's own error

exit status: 0 identical or within budget, 1 failed, 2 inconclusive or unusable input"""
COLOURS = {IDENTICAL: "green", WITHIN: "cyan", FAILED: "bold red", INCONCLUSIVE: "yellow"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ltx2ref", description="The LTX-2 transformer as a reference.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "verify", help="run the conformance cases here and compare every tap with the recorded oracle",
        description="Run the conformance cases here and compare every tap with what diffusers was recorded to compute.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--case", default="*", metavar="GLOB", help="of RELEASE/NAME; default: all")
    command.add_argument("--dtype", choices=[*record.DTYPES], help="default: all")
    command.add_argument("--device", default="cpu", help="cpu, cuda or mps; default: cpu")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.set_defaults(run=run_verify)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"ltx2ref: {error}", file=sys.stderr)
        return 2


def run_verify(options: argparse.Namespace) -> int:
    recording, device = record.environment(), usable(options.device)
    chosen = [(case, dtype) for case in CASES for dtype in record.DTYPES
              if fnmatch(case.id, options.case) and dtype == (options.dtype or dtype)]
    if not chosen:
        raise ValueError(f"--case {options.case}: no such case; there are {', '.join(case.id for case in CASES)}")
    with threads(recording["threads"]):
        here = probe(device, tuple(record.DTYPES.values()))
        differing = [name for name, digest in recording["probe"].items() if here[name] != digest]
        results = [verify(case, dtype, device, not differing) for case, dtype in progress(chosen)]
    if options.json:
        rows: list[dict[str, Any]] = [asdict(result) for result in results]
        print(json.dumps({"recording": recording, "here": {"torch": torch.__version__, "probe": here},
                          "differing_operations": differing, "results": rows}, indent=1))
    else:
        print_table(results)
        print_summary(results, recording, differing)
    verdicts = {result.verdict for result in results}
    return 1 if FAILED in verdicts else 2 if INCONCLUSIVE in verdicts else 0


def usable(name: str) -> torch.device:
    """Raises `ValueError` if there is no such device here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def progress(items: list[Any]) -> Iterable[Any]:
    """A progress bar on a terminal's standard error, if rich is there."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return items
    return track(items, "verifying", console=Console(stderr=True), transient=True)


def cells(result: CaseResult) -> list[str]:
    return [result.release, result.case, result.dtype, result.verdict, result.first or "",
            f"{result.against_record:.1e}" if result.against_record else "0",
            f"{result.error:.1e} ({result.record_error:.1e})", result.note]


def print_table(results: list[CaseResult]) -> None:
    header = ["release", "case", "dtype", "verdict", "first divergent tap", "vs record", "vs float64 (record's)", ""]
    try:
        from rich.console import Console
        from rich.table import Column, Table
    except ModuleNotFoundError:
        print("\n".join("\t".join(row) for row in [header, *map(cells, results)]))
        return
    table = Table(*(Column(name, no_wrap=True) for name in header), box=None, pad_edge=False)
    for result in results:
        table.add_row(*cells(result), style=COLOURS[result.verdict] if result.verdict != IDENTICAL else None)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def print_summary(results: list[CaseResult], recording: dict[str, Any], differing: list[str]) -> None:
    counts = [f"{n} {verdict}" for verdict in COLOURS if (n := sum(r.verdict == verdict for r in results))]
    oracle = f"diffusers {recording['diffusers']} on torch {recording['torch']}, {recording['cpu_capability']}"
    print(f"\n{len(results)} cases against {oracle}: {', '.join(counts)}.")
    if differing:
        print(f"This machine's bits differ from the recording one's in {len(differing)} of {len(recording['probe'])} "
              f"probed operations ({', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}): "
              "an error against float64 of up to 1.5 times the record's own is accepted, in each tap.")
    else:
        print("This machine computes with the recording one's bits: nothing but identical passes.")


if __name__ == "__main__":
    sys.exit(main())
