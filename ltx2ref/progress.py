"""Progress of long work: a bar on a terminal's standard error, if rich is installed."""

import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Return `items`, with a bar while they are worked on. `total` is how many they are, if they do not say so.

    Where standard error is no terminal, nothing is printed.
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
