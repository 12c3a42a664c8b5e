"""`ltx2ref audit`: run another implementation with the same weights and inputs."""

import argparse
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from ..progress import track
from .command import (
    DONE,
    DTYPES,
    RELEASE_NAMES,
    UNCLEAR,
    WRONG,
    add_case,
    add_checkpoint,
    add_command,
    add_device,
    add_list,
    add_page,
    add_partial,
    device_named,
    required,
)
from .output import print_json, print_line, print_names, print_text, write_page

if TYPE_CHECKING:
    from ..parity.cases import Case
    from ..parity.report.rows import Report

DEFAULT_REFERENCE = "ltx2ref"  # under diffusers' conventions
AUDIT_USAGE = "ltx2ref audit [OPTIONS] [REFERENCE] CANDIDATE"
CANDIDATES = """CANDIDATE is one of
  diffusers, ltx-core             if it is installed (ltx-core 1.0.0)
  module:callable                 your own port, in the current folder or
  path/to/file.py:callable        installed; it is given config, state, inputs
                                  and dtype, and returns taps by name, or both
                                  outputs
  FILE                            a trace file of one case
  ltx2ref:ltx-core-2026-03        this model under the conventions of another
  ltx2ref:ltx-core-2026-08        implementation
  ltx2ref:diffusers
REFERENCE is one of the last three; default: ltx2ref:diffusers.

"""
AUDIT_EXAMPLES = """examples:
  ltx2ref audit diffusers --release 2.3 --dtype bfloat16
      every case of a release
  ltx2ref audit my_port:run --case 2.3/t2v --json
      your own port, in the current folder or installed
  ltx2ref audit path/to/my_port.py:run --case 2.3/t2v
      a port in another folder
  ltx2ref audit ltx-core --case '2.3/i2v*' --html report.html
      a page about the first case that differs
  ltx2ref audit ltx2ref:ltx-core-2026-03 ltx-core --case 2.3/i2v
      against ltx-core's own conventions
  ltx2ref audit diffusers --arithmetic exact --dtype bfloat16
      differences of operations alone, not hidden by rounding
  ltx2ref audit --list
      the names of the cases

exit status:
  0  identical, or nothing but rounding
  1  diverged
  2  unusable input, or undecided: something suspect, or (without --partial)
     missing taps, or cases that the candidate cannot express"""


def add_audit(commands: Any) -> None:
    """Add `audit` to the commands."""
    command = add_command(
        commands,
        "audit",
        run_audit,
        "Run another implementation with the same weights and inputs, and compare every tap.",
        CANDIDATES + AUDIT_EXAMPLES,
    )
    command.usage = AUDIT_USAGE
    command.add_argument("reference", metavar="REFERENCE", nargs="?", help=argparse.SUPPRESS)
    command.add_argument("candidate", metavar="CANDIDATE", nargs="?", help=argparse.SUPPRESS)
    command.add_argument("--release", choices=RELEASE_NAMES, help="default: all")
    add_case(command)
    add_checkpoint(command)
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="default: float32; float16 only in exact arithmetic"
    )
    command.add_argument(
        "--arithmetic",
        choices=["native", "exact"],
        default="native",
        help="exact: differences are then in operations, not in rounding; default: native",
    )
    add_device(command)
    add_partial(command)
    add_page(command, "the first case that differs, or the first,")
    add_list(command)


def run_audit(options: argparse.Namespace) -> int:
    """Audit the candidate in the chosen cases, and print a verdict for each."""
    if options.list:
        print_names([case.id for case in chosen_cases(options)], options.json)
        return DONE
    reports, impossible = audited(options)
    if not reports:
        reasons = "; ".join(sorted(set(impossible.values()))) or f"--case {options.case}: no such case; see --list"
        raise ValueError(f"nothing was compared: {reasons}")
    show_reports(reports, impossible, options)
    return audit_status(reports.values(), impossible, options.partial)


def chosen_cases(options: argparse.Namespace) -> "list[Case]":
    """Return the cases that --case and --release select."""
    from ..parity.cases import CASES

    release = options.release or "*"
    return [case for case in CASES if fnmatch(case.id, options.case) and fnmatch(case.release, release)]


def audited(options: argparse.Namespace) -> "tuple[dict[str, Report], dict[str, str]]":
    """Return a report for each case, and the reason for each case that the candidate cannot express.

    Raises `ValueError` for an error that would be the same in all cases.
    """
    from ..parity import record
    from ..parity.arithmetic import NotExact
    from ..parity.audit import audit, candidate_named, conventions_of
    from ..parity.real import cases_to_audit
    from ..parity.trace.taps import OutputError

    if options.candidate is None:  # a single name is that of the candidate
        options.reference, options.candidate = DEFAULT_REFERENCE, options.reference
    required(options, "candidate", "CANDIDATE")
    candidate, device = candidate_named(options.candidate), device_named(options.device)
    conventions_of(options.reference)
    if options.arithmetic == "native" and options.dtype not in record.NATIVE_DTYPES:
        raise ValueError(f"--dtype {options.dtype}: under exact arithmetic only; add --arithmetic exact")
    dtype = record.EXACT_DTYPES[options.dtype]
    reports: dict[str, Report] = {}
    impossible: dict[str, str] = {}
    cases = cases_to_audit(chosen_cases(options), candidate.trace, options.checkpoint, options.inputs)
    for case in track(cases, f"auditing {candidate.name}"):
        try:
            reports[case.id] = audit(candidate, case, dtype, device, options.reference, options.arithmetic)
        except (NotExact, OutputError) as error:
            raise ValueError(f"{case.id}: {error}") from None
        except ValueError as error:
            impossible[case.id] = str(error)
    return reports, impossible


def audit_status(reports: "Iterable[Report]", impossible: Mapping[str, str], partial: bool) -> int:
    """Return the exit status. With `partial`, missing taps and cases do not count."""
    from ..parity.report.rows import DIVERGED, MISSING, SHAPE, SUSPECT

    verdicts = {report.verdict for report in reports} | ({MISSING} if impossible else set())
    if verdicts & {DIVERGED, SHAPE}:
        return WRONG
    return UNCLEAR if verdicts & ({SUSPECT} if partial else {SUSPECT, MISSING}) else DONE


def show_reports(reports: "Mapping[str, Report]", impossible: Mapping[str, str], options: argparse.Namespace) -> None:
    """Print the reports, and write the page that --html asks for.

    The page shows the first report that does not pass, or else the first report.
    """
    if options.html:
        failed = (report for report in reports.values() if not report.passed)
        write_page(options.html, next(failed, next(iter(reports.values()))))
    if options.json:
        found = {name: report.to_json() for name, report in reports.items()}
        print_json({"reports": found, "not_expressible": impossible})
        return
    for name, report in reports.items():
        print_text(f"{name}: {report.verdict}: {report.details() if len(reports) == 1 else report.sentence}")
        for note in report.notes if len(reports) == 1 else ():
            print_line(f"  {note}")
    for name, reason in impossible.items():
        print_line(f"{name}: not compared: {reason}")
