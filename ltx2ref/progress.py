"""Progress of long work: a bar on a terminal's standard error, if rich is installed."""
import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str) -> Iterable[T]:
    """`items`, with a bar while they are worked on. Nothing is printed where no person watches."""
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ModuleNotFoundError:
        return items
    return rich_track(items, description, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
