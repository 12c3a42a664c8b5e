"""Progress of long work: a bar on a terminal's standard error, if rich is installed."""

import sys
from collections.abc import Iterable, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """`items`, with a bar while they are worked on: `total`, if they do not say how many they are. Nothing is printed
    where no person watches."""
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ModuleNotFoundError:
        return items
    total = len(items) if total is None and isinstance(items, Sized) else total
    return rich_track(
        items, description, total=total, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    )
