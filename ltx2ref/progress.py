"""Progress bars for long work, on standard error if it is a terminal and rich is installed."""

import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Return the items, and show a bar while they are consumed. `total` is their number, for items without a length.

    Nothing is printed where standard error is not a terminal.
    """
    if not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ModuleNotFoundError:
        return items
    total = len(items) if total is None and isinstance(items, Sized) else total
    return rich_track(items, description, total=total, console=Console(stderr=True), transient=True)
