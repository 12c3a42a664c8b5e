"""Code that all commands share: their declaration, common options, and the exit statuses.

Names in help texts are literals, because importing the lists of them would import torch. tests/cli compares them.
"""

import argparse
import json
import signal
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

    from ..checkpoint.settle import ReadingOptions

# Exit statuses of all commands. docs/command-line.md has the table.
DONE, WRONG, UNCLEAR, RAISED = 0, 1, 2, 3
WORST_FIRST = (WRONG, RAISED, UNCLEAR)  # what was found to be wrong stays wrong, whatever raised elsewhere
HUNG_UP, INTERRUPTED, BROKEN_PIPE, TERMINATED = 129, 130, 141, 143  # 128 + SIGHUP, SIGINT, SIGPIPE or SIGTERM

RELEASE_NAMES = ("2.0", "2.3", "2.5")
DTYPES = ("float32", "bfloat16", "float16")  # dtypes in which cases are recorded
KIT_LEVELS = ("native", "exact")
Run = Callable[[argparse.Namespace], int]


def layout(prog: str) -> argparse.RawDescriptionHelpFormatter:
    """Return the formatter of help texts.

    It keeps the lines of examples and leaves room beside the names of options.
    """
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)


def add_command(commands: Any, name: str, run: Run, what: str, examples: str) -> argparse.ArgumentParser:
    """Add a command and return its parser.

    `what` is a sentence that says what the command does. `examples` go to the end of its help, together with its exit
    statuses.
    """
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what[0].lower() + what[1:].rstrip("."),
        description=textwrap.fill(what, 78),
        epilog=examples,
        formatter_class=layout,
    )
    command.add_argument("--json", action="store_true", help="print JSON instead")
    command.set_defaults(run=run, parser=command)
    return command


def add_case(command: argparse.ArgumentParser) -> None:
    """Add the option that selects cases."""
    command.add_argument("--case", default="*", metavar="GLOB", help="cases by RELEASE/NAME; default: all")


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Add the options that replace a case by real weights and real inputs."""
    command.add_argument("--checkpoint", metavar="FILE", help="real weights in place of a case, with --inputs")
    command.add_argument("--inputs", metavar="FILE", help="the arguments of one call (docs/trace-format.md)")


def add_source(command: argparse.ArgumentParser) -> None:
    """Add the options that choose a checkpoint in a folder, and that say of it what it does not say itself."""
    command.add_argument("--prefix", metavar="TEXT", help="what all its names begin with: module. or so")
    command.add_argument("--variant", metavar="NAME", help="which checkpoint of a folder: fp16 or so")
    command.add_argument("--nibbles", choices=["high", "low"], help="which of two codes in a byte comes first")
    command.add_argument("--scales", choices=["tiled", "flat"], help="how scales of blocks are arranged")


def source_options(options: argparse.Namespace) -> "ReadingOptions":
    """Return the values of these options, and of --streams where a command has it."""
    from ..checkpoint.settle import ReadingOptions

    given = vars(options)
    return ReadingOptions(**{name: given[name] for name in ReadingOptions._fields if name in given})


def add_streams(command: argparse.ArgumentParser) -> None:
    """Add the option that chooses one stream of a model."""
    command.add_argument("--streams", choices=["video", "audio"], help="one of them alone; default: all that there are")


def add_list(command: argparse.ArgumentParser) -> None:
    """Add the option that lists cases."""
    command.add_argument("--list", action="store_true", help="print the names of the cases and run none")


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the option that selects the device."""
    command.add_argument("--device", default="cpu", help="cpu, cuda or mps; default: cpu")


def add_taps(command: argparse.ArgumentParser) -> None:
    """Add the option --taps."""
    command.add_argument("--taps", action="store_true", help="show all taps that differ, failures first")


def add_page(command: argparse.ArgumentParser, which: str) -> None:
    """Add the option that writes a page. `which` names the report that is written."""
    command.add_argument("--html", metavar="FILE", help=f"write the report of {which} as a page")


def add_partial(command: argparse.ArgumentParser) -> None:
    """Add the option that accepts missing results."""
    command.add_argument("--partial", action="store_true", help="what is missing was left out on purpose")


def add_names(command: argparse.ArgumentParser) -> None:
    """Add the option that translates names of taps."""
    command.add_argument("--names", metavar="FILE", help='the candidate\'s names: JSON, {"their name": "our name"}')


def names_in(path: str | None) -> dict[str, str]:
    """Return the names in the file of --names, {"their name": "our name"}; none without a file.

    Raises `ValueError` for a file that is no such map.
    """
    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise ValueError(f"--names {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--names {path}: not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(x, str) for x in found.values()):
        raise ValueError(f'--names {path}: expected a JSON object, {{"their name": "our name"}}')
    twice = [ours for ours, count in Counter(found.values()).items() if count > 1 and "*" not in ours]
    if twice:
        raise ValueError(f"--names {path}: several names would become {twice[0]}")
    return found


def required(options: argparse.Namespace, argument: str, metavar: str) -> None:
    """Exit with a usage error unless a positional argument, which only --list can do without, is given."""
    if getattr(options, argument) is None:
        options.parser.error(f"the following arguments are required: {metavar}")


def device_named(name: str) -> "torch.device":
    """Return a device by name. Raises `ValueError` if there is no such device here."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


@contextmanager
def signals_interrupt() -> Iterator[list[int]]:
    """Make the signals that end a process interrupt it as Ctrl-C does, so that nothing half-written is left.

    Yields a list that gets the signal. Later ones are ignored, since nothing must interrupt what cleans up. A signal
    that is ignored already, as under nohup, or handled by somebody else, stays so.
    """
    came: list[int] = []

    def interrupt(number: int, frame: object) -> NoReturn:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        came.append(number)
        raise KeyboardInterrupt

    here = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():  # handlers can be set in the main thread only
        here = []
    before = [number for number in here if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield came
    finally:
        for number in before:
            signal.signal(number, signal.SIG_DFL)


def worst(statuses: Iterable[int]) -> int:
    """Return the exit status for several results: the worst counts, a failure being worse than what is undecided."""
    found = set(statuses)
    return next((status for status in WORST_FIRST if status in found), DONE)
