"""`ltx2ref compare`: compare two trace files."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .audit import Audited, audit_status, finished, show_reports
from .command import add_command, add_names, add_page, add_partial, add_taps, names_in
from .output import page_path

COMPARE_EXAMPLES = """examples:
  ltx2ref compare reference.safetensors port.safetensors
  ltx2ref compare reference.safetensors port.safetensors \\
      --truth float64.safetensors --html report.html

exit status:
  0  identical, or nothing but rounding
  1  diverged
  2  unusable input, or undecided: something suspect, or (without --partial)
     missing outputs"""


def add_compare(commands: Any) -> None:
    """Add `compare` to the commands."""
    command = add_command(commands, "compare", run_compare, "Compare two trace files tap by tap.", COMPARE_EXAMPLES)
    command.add_argument("reference", metavar="REFERENCE", help="a trace file (docs/trace-format.md)")
    command.add_argument("candidate", metavar="CANDIDATE", help="another one")
    command.add_argument("--truth", metavar="FILE", help="the same taps in float64, from which a budget follows")
    add_names(command)
    add_taps(command)
    add_partial(command)
    add_page(command, "the comparison")


def run_compare(options: argparse.Namespace) -> int:
    """Compare the candidate's taps with the reference's, and print the verdict."""
    from ..parity.compare import compare
    from ..parity.trace.given import renamed_taps
    from ..parity.trace.tracefile import load_trace

    options.html = options.html and page_path(options.html)
    reference, candidate = load_trace(options.reference), load_trace(options.candidate)
    taps = renamed_taps(candidate.taps, names_in(options.names))
    truth = load_trace(options.truth).taps if options.truth else None
    report = replace(
        compare(reference.taps, taps, truth),
        reference={"implementation": reference.implementation, **reference.fingerprint},
        candidate={"implementation": candidate.implementation, **candidate.fingerprint},
    )
    found = Audited({Path(options.candidate).name: report})
    show_reports(found.reports, {}, options)
    return finished([audit_status([report], {}, options.partial)], found, options)
