"""`ltx2ref kit export` and `ltx2ref kit check`: write files for a port in any language, and judge its results."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import DONE, KIT_LEVELS, add_command, add_list, add_page, add_partial, layout, required
from .output import print_json, print_line, print_names, print_text, write_page

if TYPE_CHECKING:
    from ..kit.verdict import Verdict
    from ..parity.report.rows import Report

LISTED = 4  # missing results that are named before the others are only counted

KIT_EXAMPLES = """examples:
  ltx2ref kit export kit           write the kit
  ltx2ref kit check results        judge what your port computed
  ltx2ref kit export --list        the names of its cases"""
EXPORT_EXAMPLES = """examples:
  ltx2ref kit export kit
  ltx2ref kit export kit --json > cases.json
  ltx2ref kit export --list                     the names of the cases

exit status:
  0  written
  2  unusable input"""
CHECK_EXAMPLES = """examples:
  ltx2ref kit check results
  ltx2ref kit check results --level exact       results/exact, to the bit: for a
                                                port that rounds as diffusers
  ltx2ref kit check results --partial           only some cases or outputs
  ltx2ref kit check results --html report.html  the first case that is wrong
  ltx2ref kit check results --kit kit --json    against a kit written before

exit status:
  0  conformant, or on the exact level identical
  1  something is wrong
  2  unusable input, or undecided: something suspect, or (without --partial)
     missing cases or outputs"""


def add_kit(commands: Any) -> None:
    """Add `kit` and its actions to the commands."""
    kit = commands.add_parser(
        "kit",
        help="write the conformance kit for a port in any language, and judge its results",
        description="Write the conformance kit for a port in any language, and judge its results.",
        epilog=KIT_EXAMPLES,
        formatter_class=layout,
    )
    kit.set_defaults(parser=kit)
    actions = kit.add_subparsers(metavar="ACTION", title="actions")
    add_kit_export(actions)
    add_kit_check(actions)


def add_kit_export(actions: Any) -> None:
    """Add `kit export` to the actions."""
    command = add_command(
        actions,
        "export",
        run_kit_export,
        "Write kit.json, a safetensors file for each case, and a README.",
        EXPORT_EXAMPLES,
    )
    command.add_argument("directory", metavar="DIR", nargs="?", help="a new or empty folder")
    add_list(command)


def add_kit_check(actions: Any) -> None:
    """Add `kit check` to the actions."""
    command = add_command(actions, "check", run_kit_check, "Judge a folder of results against the kit.", CHECK_EXAMPLES)
    command.add_argument(
        "results", metavar="RESULTS", nargs="?", help="a folder of result files, as kit.json names them"
    )
    command.add_argument(
        "--level",
        choices=KIT_LEVELS,
        default=KIT_LEVELS[0],
        help="native (default): within rounding of diffusers; exact: its bits under exact arithmetic",
    )
    add_partial(command)
    command.add_argument("--kit", metavar="DIR", help="default: the kit that this version exports")
    add_page(command, "the first case that is wrong, or the first,")
    add_list(command)


def run_kit_export(options: argparse.Namespace) -> int:
    """Write the kit, or list its cases."""
    from ..kit.export import export
    from ..parity.trace.probe import threads

    if options.list:
        return list_kit(options)
    required(options, "directory", "DIR")
    with threads(1):  # one thread is fastest for tensors this small
        kit = export(options.directory)
    if options.json:
        print_json(kit)
    else:
        size = sum(file.stat().st_size for file in Path(options.directory).iterdir())
        print(f"{options.directory}: {len(kit['cases'])} cases, {size / 1e6:.1f} MB; begin with its README.md")
    return DONE


def run_kit_check(options: argparse.Namespace) -> int:
    """Judge the results, and print what is wrong or missing."""
    from ..kit.check import check_results
    from ..parity.trace.probe import threads

    if options.list:
        return list_kit(options)
    required(options, "results", "RESULTS")
    with threads(1):
        verdict = check_results(options.results, options.kit, options.level, options.partial)
    wrong = verdict.failures
    if options.html and verdict.given:
        write_page(options.html, next(iter(wrong.values()), verdict.given[0]))
    if options.json:
        print_json(verdict.to_json())
    else:
        print_verdict(verdict, wrong)
    return verdict.status


def list_kit(options: argparse.Namespace) -> int:
    """Print the names of the kit's cases."""
    from ..kit.cases import COMPONENTS, MODELS

    print_names([case.id for case in (*COMPONENTS, *MODELS)], options.json)
    return DONE


def print_verdict(verdict: "Verdict", wrong: "Mapping[str, Report]") -> None:
    """Print the details of each case that fails, what is missing, and the summary."""
    for name, report in wrong.items():
        print_text(f"{name}: {report.details(5)}")
    for result in verdict.results:
        for note in result.report.notes if result.report is not None else ():
            print_line(f"{result.name}: {note}")
    if verdict.missing:
        print_line(f"{len(verdict.missing)} missing: {first_missing(verdict.missing)}{partial_hint(verdict)}")
    print_text(verdict.summary)


def first_missing(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def partial_hint(verdict: "Verdict") -> str:
    """Return a hint at --partial, unless it was given."""
    return "" if verdict.partial else "; --partial judges what is there alone"
