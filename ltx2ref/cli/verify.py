"""`ltx2ref verify`: run the recorded cases on this machine."""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from ..progress import track
from .command import DONE, DTYPES, UNCLEAR, WRONG, add_case, add_command, add_device, device_named
from .output import Column, print_json, print_names, print_table

if TYPE_CHECKING:
    import torch

    from ..parity.cases import Case
    from ..parity.kernels import Kernel
    from ..parity.verify import CaseResult, NativeResult

VERIFY_EXAMPLES = """examples:
  ltx2ref verify                          every case, in exact arithmetic and
                                          in this machine's own
  ltx2ref verify --list                   the names of the cases
  ltx2ref verify --list machines          the names of the simulated machines
  ltx2ref verify --case '2.3/*' --json    the cases of one release, as JSON
  ltx2ref verify --case 'kernel/*' --all  single operations at the shapes of
                                          real models, the long ones as well
  ltx2ref verify --arithmetic exact       identical or not, on any machine
  ltx2ref verify --device cuda            on a GPU
  ltx2ref verify --machine faithful       as a simulated machine computes

exit status:
  0  every case is identical or within its budget
  1  a case has failed
  2  unusable input, or a case that is undecided"""


def add_verify(commands: Any) -> None:
    """Add `verify` to the commands."""
    command = add_command(
        commands,
        "verify",
        run_verify,
        "Run the recorded cases, and compare every tap with what diffusers and ltx-core compute.",
        VERIFY_EXAMPLES,
    )
    add_case(command)
    command.add_argument("--dtype", choices=DTYPES, help="default: all; float16 is recorded only in exact arithmetic")
    command.add_argument("--arithmetic", choices=["exact", "native"], help="default: both")
    add_device(command)
    command.add_argument("--machine", metavar="NAME", help="compute as this simulated machine, in native arithmetic")
    command.add_argument("--all", action="store_true", help="include the kernel shapes of 1025 tokens")
    command.add_argument(
        "--list",
        nargs="?",
        const="cases",
        choices=["cases", "machines"],
        metavar="machines",
        help="print the names of the cases, or of the simulated machines, and run nothing",
    )


def run_verify(options: argparse.Namespace) -> int:
    """Verify the chosen cases in each dtype, and print the verdicts."""
    from ..parity import record
    from ..parity.verify import How, verify_all

    if options.list:
        print_names(machines() if options.list == "machines" else [case.id for case in chosen(options)], options.json)
        return DONE
    require_consistent(options)
    runs = runs_of(chosen(options), options)
    recording, device = record.environment(), device_named(options.device)
    probed = {} if options.arithmetic == "exact" else probed_here(device, recording["threads"])
    differing = [name for name, digest in recording["probe"].items() if probed and probed[name] != digest]
    same_bits = not (differing or options.machine)
    how = How(device, same_bits, arithmetic_of(options), options.machine, recording["threads"])
    results = list(track(verify_all(runs, how), "verifying", len(runs)))
    if options.json:
        print_json(as_json(results, recording, probed, differing))
    else:
        print_results(results)
        print_failures(results)
        print_summary(results, recording, differing, options.machine)
    return exit_status(results)


def machines() -> list[str]:
    """Return the names of the simulated machines."""
    from ..parity.machines import MACHINES

    return [*MACHINES]


def chosen(options: argparse.Namespace) -> "list[Case | Kernel]":
    """Return the cases that --case selects. Raises `ValueError` if there are none."""
    from ..parity.cases import RECORDED
    from ..parity.kernels import KERNELS, LONG_KERNELS

    cases: list[Case | Kernel] = [*RECORDED, *KERNELS, *(LONG_KERNELS if options.all else ())]
    found = [case for case in cases if fnmatch(case.id, options.case)]
    if not found:
        raise ValueError(f"--case {options.case}: no such case; --list names them, and --all adds the long ones")
    return found


def require_consistent(options: argparse.Namespace) -> None:
    """Raise `ValueError` for options that exclude each other, and for an unknown machine."""
    if not options.machine:
        return
    if options.arithmetic == "exact" or options.device != "cpu":
        conflict = "--arithmetic exact" if options.arithmetic == "exact" else f"--device {options.device}"
        raise ValueError(f"--machine: a simulated machine has a native verdict, on the CPU; leave out {conflict}")
    if options.machine not in machines():
        raise ValueError(f"--machine {options.machine}: no such machine; --list machines names them")


def arithmetic_of(options: argparse.Namespace) -> str | None:
    """Return the arithmetic to verify in, or None for both. A simulated machine has only a native verdict."""
    arithmetic: str | None = "native" if options.machine else options.arithmetic
    return arithmetic


def runs_of(cases: "Sequence[Case | Kernel]", options: argparse.Namespace) -> "list[tuple[Case | Kernel, str]]":
    """Return each case with each dtype to run it in.

    Raises `ValueError` if --dtype names a dtype that is recorded only under exact arithmetic.
    """
    from ..parity import record

    dtypes = record.NATIVE_DTYPES if arithmetic_of(options) == "native" else record.EXACT_DTYPES
    if options.dtype and options.dtype not in dtypes:
        raise ValueError(f"--dtype {options.dtype}: recorded under exact arithmetic only, not natively")
    return [(case, dtype) for case in cases for dtype in dtypes if dtype == (options.dtype or dtype)]


def probed_here(device: "torch.device", threads: int) -> dict[str, str]:
    """Return the digests of the probe on this machine.

    They show whether this machine computes the same bits as the one that made the recordings.
    """
    from ..parity import record
    from ..parity.trace import probe

    with probe.threads(threads):
        return probe.probe(device, tuple(record.NATIVE_DTYPES.values()))


def exit_status(results: "Sequence[CaseResult]") -> int:
    """Return the exit status of all results."""
    from ..parity.verify import FAILED, INCONCLUSIVE

    verdicts: set[str] = set().union(*(result.verdicts for result in results))
    return WRONG if FAILED in verdicts else UNCLEAR if INCONCLUSIVE in verdicts else DONE


def as_json(
    results: "Sequence[CaseResult]", recording: dict[str, Any], probed: dict[str, str], differing: list[str]
) -> dict[str, Any]:
    """Return everything as plain data, for `--json`."""
    import torch

    from ..parity.arithmetic import VERSION

    return {
        "recording": recording,
        "here": {"torch": torch.__version__, "probe": probed},
        "arithmetic": VERSION,
        "differing_operations": differing,
        "results": [asdict(result) for result in results],
    }


def print_results(results: "Sequence[CaseResult]") -> None:
    """Print a row for each case, with the exact and the native verdict in each dtype.

    A native verdict within budget is printed as the share of the budget.
    """
    from ..parity.verify import FAILED, INCONCLUSIVE

    cases = [*dict.fromkeys(result.id for result in results)]
    cells = {(result.id, result.dtype): result for result in results}
    columns = [Column("case", cases)]
    for dtype in DTYPES:
        found = [cells.get((case, dtype)) for case in cases]
        exact = [result.exact.verdict if result and result.exact else "" for result in found]
        native = [native_cell(result.native) if result and result.native else "" for result in found]
        columns += [Column(dtype, exact)] if any(exact) else []
        columns += [Column("native" if any(exact) else f"{dtype} native", native, any(exact))] if any(native) else []
    bad = {result.id for result in results if result.verdicts & {FAILED, INCONCLUSIVE}}
    print_table(columns, alarming=[case in bad for case in cases])


def native_cell(native: "NativeResult") -> str:
    """Return the text for a native verdict."""
    from ..parity.verify import WITHIN

    return f"{native.share:.2f}" if native.verdict == WITHIN else native.verdict


def print_failures(results: "Sequence[CaseResult]") -> None:
    """Print where each failed run differs first, and by how much."""
    from ..parity.verify import FAILED, INCONCLUSIVE

    for result in results:
        at, exact, native = f"{result.id} {result.dtype}", result.exact, result.native
        if exact and exact.verdict == FAILED:
            far = f", about {exact.distance:.1e} apart" if exact.distance is not None else ""
            counts = f"{exact.differing} of {exact.taps} taps differ"
            print(f"{at}: exact: first differs at {exact.first}{far}; {counts}{after_semicolon(exact.note)}")
        if native and native.verdict in (FAILED, INCONCLUSIVE):
            first = f" at {native.first}, {native.share:.3g} of the budget" if native.first else ""
            print(f"{at}: native: {native.verdict}{first}{after_semicolon(native.note)}")
        elif native and native.note:
            print(f"{at}: native: {native.note}")


def after_semicolon(note: str) -> str:
    """Return a note as the end of a line."""
    return f"; {note}" if note else ""


def print_summary(
    results: "Sequence[CaseResult]", recording: dict[str, Any], differing: list[str], machine: str | None
) -> None:
    """Print how many runs are identical or within budget."""
    print()
    if any(result.exact for result in results):
        print_exact_summary(results, recording)
    if any(result.native for result in results):
        print_native_summary(results, recording, differing, machine)


def print_exact_summary(results: "Sequence[CaseResult]", recording: dict[str, Any]) -> None:
    """Print the summary of the runs in exact arithmetic."""
    from ..parity.report.rows import IDENTICAL

    exact = [result.exact for result in results if result.exact]
    same, taps = sum(x.verdict == IDENTICAL for x in exact), sum(x.taps for x in exact)
    equal = taps - sum(x.differing for x in exact)
    oracles = f"diffusers {recording['diffusers']} and ltx-core {recording['ltx-core']}"
    print(f"exact: {same} of {len(exact)} runs identical, {equal:,} of {taps:,} taps.")
    print("  In arithmetic that is the same on every machine, this code computes")
    print(f"  {'what' if equal == taps else 'something other than what'} {oracles} compute.")


def print_native_summary(
    results: "Sequence[CaseResult]", recording: dict[str, Any], differing: list[str], machine: str | None
) -> None:
    """Print the summary of the runs in native arithmetic."""
    from ..parity.report.rows import IDENTICAL
    from ..parity.verify import FAILED, INCONCLUSIVE, WITHIN

    native = [result.native for result in results if result.native]
    within = [result.share for result in native if result.verdict == WITHIN]
    verdicts = (IDENTICAL, WITHIN, FAILED, INCONCLUSIVE)
    counts = [f"{n} {verdict}" for verdict in verdicts if (n := sum(r.verdict == verdict for r in native))]
    if beyond := sum(share > 1 for share in within):
        counts.append(f"{beyond} of them with a note, up to {max(within):.2f} budgets")
    print(f"native: {', '.join(counts)}, in {len(native)} runs ({this_machine(machine)}).")
    if machine is not None:
        print("  The numbers above are errors against float64, as a share of what is allowed.")
    elif differing:
        print(f"  {len(differing)} of {len(recording['probe'])} probed operations have other bits here than on the")
        print(f"  recording machine (torch {recording['torch']}, {recording['cpu_capability']}).")
        print("  The numbers above are errors against float64, as a share of what is")
        print(f"  allowed; the largest is {max(r.share for r in native):.2f}.")
    else:
        print("  This machine computes the recording machine's bits: only identical runs pass.")


def this_machine(simulated: str | None) -> str:
    """Return a description of this machine, or the name of the simulated one."""
    import torch

    here = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    return here if simulated is None else f"{simulated}, simulated"
