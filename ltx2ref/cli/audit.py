"""`ltx2ref audit`: run another implementation with the same weights and inputs."""

import argparse
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..progress import track
from .command import (
    DONE,
    DTYPES,
    INTERRUPTED,
    RAISED,
    RELEASE_NAMES,
    UNCLEAR,
    WRONG,
    add_case,
    add_checkpoint,
    add_command,
    add_device,
    add_list,
    add_names,
    add_page,
    add_partial,
    add_taps,
    device_named,
    names_in,
    required,
    worst,
)
from .output import page_path, print_error, print_json, print_line, print_names, print_text, stdout_kept, write_page

if TYPE_CHECKING:
    from ..parity.cases import Case
    from ..parity.real import RealCase
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
  ltx2ref audit my_port:run --case 2.3/t2v \\
      --reproduce av_cross_attn_video_a2v_gate.sinusoid gate
      one stage that is wrong, and a script that fails until it is mended
  ltx2ref audit --list
      the names of the cases

exit status:
  0  identical, or nothing but rounding
  1  diverged
  2  unusable input, or undecided: something suspect, or (without --partial)
     missing outputs, or cases that the candidate cannot express
  3  the candidate raised an exception, or returned no tensors"""


@dataclass(frozen=True)
class Failure:
    """Why a case has no verdict: one line, the status that it is worth, and where an exception came from."""

    said: str
    status: int
    exception: str | None = None
    at: str | None = None
    traceback: str | None = None


@dataclass
class Audited:
    """What became of each case: a report, the reason why the candidate cannot express it, or a failure."""

    reports: "dict[str, Report]" = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    interrupted: str | None = None  # the case in which the user stopped the audit


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
    add_names(command)
    command.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="PLACE",
        help="go on as the candidate does at the place of a cause, and report what else is wrong; may be repeated",
    )
    add_taps(command)
    add_partial(command)
    add_page(command, "the first case that differs, or the first,")
    command.add_argument(
        "--reproduce",
        nargs=2,
        metavar=("PLACE", "DIR"),
        help="write the stage at PLACE, a cause's, to a new folder, with a script that fails until it is mended",
    )
    add_list(command)


def run_audit(options: argparse.Namespace) -> int:
    """Audit the candidate in the chosen cases, and print a verdict for each."""
    cases = chosen_cases(options)
    if options.list:
        print_names([case.id for case in cases], options.json)
        return DONE
    if options.candidate is None:  # a single name is that of the candidate
        options.reference, options.candidate = DEFAULT_REFERENCE, options.reference
    required(options, "candidate", "CANDIDATE")
    options.html = options.html and page_path(options.html)
    from ..parity.guard import PortFailed

    try:
        with stdout_kept():
            found = audited(cases, options)
    except PortFailed as error:
        print_error(str(error))
        return RAISED
    failed = [failure.status for failure in found.failures.values()]
    if not found.reports and RAISED not in failed and not found.interrupted:
        reasons = {**found.impossible, **{case: failure.said for case, failure in found.failures.items()}}
        raise ValueError(f"nothing was compared: {'; '.join(sorted(set(reasons.values())))}")
    show_reports(found.reports, found.impossible, options, found.failures, found.interrupted)
    if options.reproduce and found.reports:
        write_reproducer(*next(iter(found.reports.items())), options)
    return finished([audit_status(found.reports.values(), found.impossible, options.partial), *failed], found, options)


def chosen_cases(options: argparse.Namespace) -> "list[Case]":
    """Return the cases that --case and --release select. Raises `ValueError` if there are none.

    Cases in which a stream is absent, which few ports can express, have to be called by their whole names.
    """
    from ..parity.cases import CASES, ONE_STREAM_CASES

    release = options.release or "*"
    there = [*CASES, *(case for case in ONE_STREAM_CASES if case.id == options.case)]
    found = [case for case in there if fnmatch(case.id, options.case) and fnmatch(case.release, release)]
    if not found:
        of = f" of release {options.release}" if options.release else ""
        raise ValueError(f"--case {options.case}: no such case{of}; `ltx2ref audit --list` names them")
    return found


def audited(chosen: "list[Case]", options: argparse.Namespace) -> Audited:
    """Audit the candidate in each case. What it does in one case does not keep the others from being audited.

    Raises `ValueError` for an error that would be the same in all cases.
    """
    from ..parity import record
    from ..parity.audit import audit, candidate_named, conventions_of, settled
    from ..parity.real import cases_to_audit
    from ..parity.trace.given import renamed_taps

    names, device = names_in(options.names), device_named(options.device)
    conventions_of(options.reference)
    if options.arithmetic == "native" and options.dtype not in record.NATIVE_DTYPES:
        raise ValueError(f"--dtype {options.dtype}: under exact arithmetic only; add --arithmetic exact")
    dtype = record.EXACT_DTYPES[options.dtype]
    candidate = candidate_named(options.candidate)
    renamed = candidate._replace(run=lambda setup: renamed_taps(candidate.run(setup), names))
    found = Audited()
    given = (dtype, device, options.reference, options.arithmetic)
    nowhere: dict[str, list[str]] = {}  # places without a cause, and what was said of them in each case

    def report_on(case: "Case | RealCase") -> "Report":
        report = accepting(options.accept, nowhere, lambda places: audit(renamed, case, *given, places))
        return settled(report, renamed, case, *given) if len(cases) == 1 else report

    cases = cases_to_audit(chosen, candidate.trace, options.checkpoint, options.inputs)
    if options.reproduce:
        require_reproducible(cases, options)
    for case in track(cases, f"auditing {candidate.name}"):
        try:
            settle(found, case.id, partial(report_on, case))
        except KeyboardInterrupt:
            found.interrupted = case.id
            break
    if wrong := next((said[0] for said in nowhere.values() if len(said) == len(found.reports)), None):
        raise ValueError(wrong)
    return found


def accepting(places: "list[str]", nowhere: dict[str, list[str]], audit: "Callable[[list[str]], Report]") -> "Report":
    """Audit one case, and accept those of the places at which it has a cause; `nowhere` gets the others."""
    from ..parity.explain.causes import NoCause

    there = [*places]
    while True:
        try:
            return audit(there)
        except NoCause as error:
            there.remove(error.place)
            nowhere.setdefault(error.place, []).append(str(error))


def settle(found: Audited, case: str, audit: "Callable[[], Report]") -> None:
    """Audit one case, and enter what became of it."""
    from ..parity.guard import PortFailed, Unsupported, described
    from ..parity.trace.taps import OutputError

    try:
        found.reports[case] = audit()
    except Unsupported as error:
        found.impossible[case] = str(error)
    except PortFailed as error:
        found.failures[case] = Failure(str(error), RAISED, error.exception, error.at, error.traceback)
    except OutputError as error:
        found.failures[case] = Failure(str(error), RAISED)
    except ValueError as error:  # the audit's own: nothing in common, or nothing that exact arithmetic could see
        found.failures[case] = Failure(str(error), UNCLEAR)
    except Exception as error:
        said = f"ltx2ref itself {described(error)}: please report it, with what the port returned"
        found.failures[case] = Failure(said, UNCLEAR, type(error).__name__, None, traceback.format_exc())


def finished(statuses: Iterable[int], found: Audited, options: argparse.Namespace) -> int:
    """Write the page that --html asks for, of the first report that does not pass, or else of the first.

    Returns the exit status. A page that cannot be written takes nothing from what was printed.
    """
    status = worst(statuses)
    failed = (report for report in found.reports.values() if not report.passed)
    if options.html and found.reports:
        try:
            write_page(options.html, next(failed, next(iter(found.reports.values()))))
        except ValueError as error:
            print_error(str(error))
            status = worst([status, UNCLEAR])
    return INTERRUPTED if found.interrupted else status


def require_reproducible(cases: "Sequence[Case | RealCase]", options: argparse.Namespace) -> None:
    """Raise `ValueError` unless --reproduce has one case, native arithmetic and a new folder."""
    from ..parity.reproduce import require_new_folder

    if len(cases) != 1 or options.checkpoint:
        got = "a checkpoint" if options.checkpoint else f"{len(cases)} cases"
        raise ValueError(f"--reproduce: expected one case, got {got}; name the case with --case")
    if options.arithmetic != "native":
        raise ValueError("--reproduce: expected --arithmetic native, in which a stage has a budget")
    require_new_folder(Path(options.reproduce[1]))


def write_reproducer(case: str, report: "Report", options: argparse.Namespace) -> None:
    """Write the stage that --reproduce names, and say what was written."""
    from ..parity.reproduce import Again, reproduce

    place, folder = options.reproduce
    again = Again(case, options.dtype, options.device, options.reference, options.candidate, names_in(options.names))
    with stdout_kept():
        written = reproduce(report, place, Path(folder), again)
    if not options.json:
        what = f"{len(written.files)} files, {sum(written.files.values()):,} bytes"
        print_line(f"{folder}: {written.place}, {written.share:.3g} times the budget: {what}")


def audit_status(reports: "Iterable[Report]", impossible: Mapping[str, str], partial: bool) -> int:
    """Return the exit status. With `partial`, missing taps and cases do not count."""
    from ..parity.report.rows import DIVERGED, MISSING, SHAPE, SUSPECT

    verdicts = {report.verdict for report in reports} | ({MISSING} if impossible else set())
    if verdicts & {DIVERGED, SHAPE}:
        return WRONG
    return UNCLEAR if verdicts & ({SUSPECT} if partial else {SUSPECT, MISSING}) else DONE


def show_reports(
    reports: "Mapping[str, Report]",
    impossible: Mapping[str, str],
    options: argparse.Namespace,
    failures: Mapping[str, Failure] = MappingProxyType({}),
    interrupted: str | None = None,
) -> None:
    """Print the reports, and what became of the other cases."""
    if options.json:
        found = {name: report.to_json() for name, report in reports.items()}
        why = {name: asdict(failure) for name, failure in failures.items()}
        print_json({"reports": found, "not_expressible": impossible, "failures": why, "interrupted": interrupted})
        return
    for name, report in reports.items():
        every = len(report.rows) if options.taps else 10
        told = report.details(every, options.taps or None) if len(reports) == 1 or options.taps else report.brief()
        print_text(f"{name}: {report.verdict}: {told}")
    if len(reports) > 1 and (follows := common_conventions(reports.values())):
        print_line(f"all cases follow {follows}")
    for note in common_notes(reports.values()):
        print_line(f"  {note}")
    for name, reason in impossible.items():
        print_line(f"{name}: not compared: {reason}")
    for name, failure in failures.items():
        print_line(f"{name}: {'failed' if failure.status == RAISED else 'not compared'}: {failure.said}")
    if interrupted:
        print_line(f"{interrupted}: interrupted; this case and those after it were not compared")


def common_conventions(reports: "Iterable[Report]") -> str:
    """Return the conventions that the candidate follows in all cases, with every value that a case has shown."""
    found: dict[str, list[str]] = {}
    for report in reports:
        for name, value in report.conventions.items():
            found.setdefault(name, []).append(value)
    return ", ".join(f"{name} = {' or '.join(dict.fromkeys(values))}" for name, values in found.items())


def common_notes(reports: "Iterable[Report]") -> list[str]:
    """Return the notes that all reports have."""
    first, *others = [report.notes for report in reports] or [[]]
    return [note for note in first if all(note in notes for notes in others)]
