"""What the commands have in common: how one is declared, the options that several have, and the exit statuses.

The names in the helps are literals, for what they list imports torch; tests/test_cli.py compares them with it.
"""

import argparse
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Exit statuses, of every command: docs/command-line.md has the table.
DONE, WRONG, UNCLEAR = 0, 1, 2
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # 128 + the number of SIGINT, SIGPIPE and SIGTERM

RELEASE_NAMES = ("2.0", "2.3", "2.5")
DTYPES = ("float32", "bfloat16", "float16")  # of the cases
KIT_LEVELS = ("native", "exact")  # of the kit
Run = Callable[[argparse.Namespace], int]


def layout(prog: str) -> argparse.RawDescriptionHelpFormatter:
    """Lay out help so that the examples keep their lines, and option names leave room for what they do."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)


def add_command(commands: Any, name: str, run: Run, what: str, examples: str) -> argparse.ArgumentParser:
    """Add a command that `run` runs. `what` it does is a sentence; `examples` end its help, with the exit statuses."""
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
    command.add_argument("--case", default="*", metavar="GLOB", help="cases by RELEASE/NAME; default: all")


def add_list(command: argparse.ArgumentParser) -> None:
    command.add_argument("--list", action="store_true", help="print the names of the cases, and run none")


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu, cuda or mps; default: cpu")


def add_page(command: argparse.ArgumentParser, which: str) -> None:
    command.add_argument("--html", metavar="FILE", help=f"write the report of {which} as a page")


def add_partial(command: argparse.ArgumentParser) -> None:
    command.add_argument("--partial", action="store_true", help="what is missing was left out on purpose")


def required(options: argparse.Namespace, argument: str, metavar: str) -> None:
    """Refuse, as the parser would, a positional argument that only --list can do without."""
    if getattr(options, argument) is None:
        options.parser.error(f"the following arguments are required: {metavar}")


def device_named(name: str) -> "torch.device":
    """Return the device. Raises `ValueError` if there is no such device here."""
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def worst(statuses: Iterable[int]) -> int:
    """Return the exit status of several results: something wrong outweighs what is not decided."""
    return min((status for status in statuses if status != DONE), default=DONE)
