"""The command line: `main`, and one file for each command.

torch is imported inside the functions that run a command, so that help and usage errors do not wait for it.
"""

import argparse
import os
import sys
from contextlib import suppress

from .. import __version__
from ..printable import printable_lines
from .audit import add_audit
from .command import BROKEN_PIPE, INTERRUPTED, UNCLEAR, layout, signals_interrupt
from .compare import add_compare
from .convert import add_convert
from .describe import add_describe
from .inspect import add_inspect
from .kit import add_kit
from .trace import add_trace
from .vendor import add_vendor
from .verify import add_verify

EXAMPLES = """examples:
  ltx2ref verify                              are results right on my machine?
  ltx2ref audit my_port:run --case 2.3/t2v    where does my port differ?
  ltx2ref inspect model.safetensors           what is this file?

Every command has more examples: see `ltx2ref verify --help`.

exit status of every command:
  0    done, and nothing is wrong
  1    something is wrong: a difference beyond rounding, a damaged file
  2    undecided: unusable input, or something suspect or missing
  3    audit: the port raised an exception, or returned no tensors
  129  the terminal was closed
  130  interrupted with Ctrl-C
  141  whoever reads the output has stopped, as after `| head -1`
  143  terminated"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status (docs/command-line.md)."""
    with signals_interrupt() as came:
        status = guarded(arguments)
    return 128 + came[0] if came else status


def guarded(arguments: list[str] | None) -> int:
    """Run one command and return its exit status, whatever becomes of standard output."""
    try:
        try:
            return run_command(arguments)
        finally:
            sys.stdout.flush()  # when Python flushes at exit, it is too late to handle a closed pipe
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return BROKEN_PIPE
    except OSError as error:  # standard output cannot be written, as on a full disk
        discard_output()
        return report_error(error)


def run_command(arguments: list[str] | None) -> int:
    """Parse the arguments and run the command. Errors of the input are reported without a traceback."""
    parser = whole_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        options.parser.print_help(sys.stderr)
        return UNCLEAR
    try:
        status: int = options.run(options)
        return status
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return report_error(error)


def report_error(error: ValueError | OSError) -> int:
    """Print an error to standard error, and return the exit status that it means."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    print(f"ltx2ref: {printable_lines(said)}", file=sys.stderr)
    return UNCLEAR


def discard_output() -> None:
    """Discard what is still in the buffer of standard output, which Python would try to write when it ends."""
    with suppress(OSError):  # there is no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="ltx2ref",
        description="Verify the LTX-2 reference, audit ports against it, and read checkpoints.",
        epilog=EXAMPLES,
        formatter_class=layout,
    )
    parser.add_argument(
        "--version", action="version", version=f"ltx2ref {__version__}", help="print the version and exit"
    )
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for add in (
        add_verify,
        add_audit,
        add_compare,
        add_trace,
        add_kit,
        add_inspect,
        add_convert,
        add_describe,
        add_vendor,
    ):
        add(commands)
    return parser
