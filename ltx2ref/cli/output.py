"""Printing what a command found: JSON, names, or tables whose cells are never cut."""

import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..printable import printable, printable_lines

if TYPE_CHECKING:
    from ..parity.report.rows import Report

GAP = "  "  # between columns
LEAST_TEXT = 20  # characters that a column of text keeps when its cells are wrapped
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?%?|-?inf|nan|")
ALARM, UNCOLOURED = "\033[1;31m", "\033[0m"  # bold red on a terminal


class Column(NamedTuple):
    """A column of a table."""

    name: str
    cells: Sequence[str]
    joined: bool = False  # whether it must stay beside the column before it when a table is split

    @property
    def is_number(self) -> bool:
        """Return whether all cells are numbers."""
        return all(NUMBER.fullmatch(cell) for cell in self.cells)

    @property
    def width(self) -> int:
        """Return the width of the widest cell."""
        return max(map(len, [self.name, *self.cells]))

    @property
    def least(self) -> int:
        """Return the width to which the column can be narrowed. Numbers and words are never broken."""
        pieces = [piece for cell in self.cells for piece in re.split(r"\s+|(?<=-)", cell)]
        return self.width if self.is_number else min(self.width, max(LEAST_TEXT, *map(len, pieces)))


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(finite(value), indent=1, allow_nan=False))


def print_line(text: str) -> None:
    """Print a line that may quote untrusted files, whose unprintable characters are escaped."""
    print(printable(text))


def print_text(text: str) -> None:
    """Print lines that may quote untrusted files, whose unprintable characters are escaped."""
    print(printable_lines(text))


def print_error(text: str) -> None:
    """Print a line to standard error, as `main` does for an error of the command line."""
    print(f"ltx2ref: {printable_lines(text)}", file=sys.stderr)


def print_names(names: Sequence[str], as_json: bool) -> None:
    """Print names, one to a line."""
    if as_json:
        print_json(names)
    else:
        for name in names:
            print_line(name)


def print_table(columns: Sequence[Column], keys: int = 1, alarming: Sequence[bool] = ()) -> None:
    """Print a table as wide as the terminal, or as wide as needed if there is none.

    Rows that are `alarming` are red.
    """
    width = shutil.get_terminal_size((sys.maxsize, 0)).columns
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shown = [column._replace(cells=[printable(cell) for cell in column.cells]) for column in columns]
    print("\n".join(table_lines(shown, width, keys, alarming if coloured else ())))


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Send to standard error what others' code prints, so that standard output has the results alone.

    This is also done below Python, for processes that a port starts and for libraries that write by themselves.
    """
    sys.stdout.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # there is none, as in some notebooks
        kept = None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if kept is not None:
            os.dup2(kept, 1)
            os.close(kept)


def page_path(path: str) -> str:
    """Return where a page will be written, wherever the current folder is by then.

    Raises `ValueError` if nothing can be written there.
    """
    page = Path(path).absolute()
    if page.is_dir() or not page.parent.is_dir():
        raise ValueError(
            f"--html {path}: {'this is a folder' if page.is_dir() else f'there is no folder {page.parent}'}"
        )
    if not os.access(page if page.exists() else page.parent, os.W_OK):
        raise ValueError(f"--html {path}: Permission denied")
    return str(page)


def write_page(path: str, report: "Report") -> None:
    """Write a report as an HTML page. Raises `ValueError` if the file cannot be written."""
    from ..parity.report.html import html
    from ..whole import replacing

    try:
        with replacing(Path(path)) as page:
            page.write_text(html(report), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--html {path}: {error.strerror}") from None


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, with strings."""
    if isinstance(value, Mapping):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table_lines(columns: Sequence[Column], width: int, keys: int = 1, alarming: Sequence[bool] = ()) -> list[str]:
    """Return the lines of a table that is at most `width` characters wide, if that is possible without cutting a cell.

    If a table is too wide, text is wrapped, to no less than 20 characters. If that is not enough, the columns are split
    into several tables, each of which begins with the first `keys` columns.
    """
    lines: list[str] = []
    for part in split(columns, width, keys):
        lines += ["", *part_lines(part, width, alarming)] if lines else part_lines(part, width, alarming)
    return lines


def split(columns: Sequence[Column], width: int, keys: int) -> list[list[Column]]:
    """Divide the columns into tables that fit into the width, each with the first `keys` columns."""
    if least_width(columns) <= width:
        return [[*columns]]
    first = [*columns[:keys]]
    found: list[list[Column]] = []
    for group in groups(columns[keys:]):
        if found and least_width([*first, *found[-1], *group]) <= width:
            found[-1] += group
        else:
            found.append(group)
    return [[*first, *some] for some in found]


def groups(columns: Sequence[Column]) -> list[list[Column]]:
    """Return the columns in groups that must stay beside each other."""
    found: list[list[Column]] = []
    for column in columns:
        if found and column.joined:
            found[-1].append(column)
        else:
            found.append([column])
    return found


def least_width(columns: Sequence[Column]) -> int:
    """Return the width to which a table can be narrowed."""
    return sum(column.least for column in columns) + len(GAP) * (len(columns) - 1)


def part_lines(columns: Sequence[Column], width: int, alarming: Sequence[bool]) -> list[str]:
    """Return the lines of one table."""
    widths = narrowed_widths(columns, width)
    rows = [[column.name for column in columns], *zip(*(column.cells for column in columns), strict=True)]
    lines: list[str] = []
    for i, row in enumerate(rows):
        alarm = i > 0 and any(alarming[i - 1 : i])
        lines += [f"{ALARM}{line}{UNCOLOURED}" if alarm else line for line in row_lines(row, columns, widths)]
    return lines


def narrowed_widths(columns: Sequence[Column], width: int) -> list[int]:
    """Return the width of each column. Columns of text are narrowed, the widest first, until the table fits."""
    widths = [column.width for column in columns]
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        taken = max(0, min(excess, widths[i] - columns[i].least))
        widths[i], excess = widths[i] - taken, excess - taken
    return widths


def row_lines(row: Iterable[str], columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    """Return the lines of one row. There are several if a cell is wrapped."""
    cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    return [
        GAP.join(
            part.rjust(width) if column.is_number else part.ljust(width)
            for part, column, width in zip(line, columns, widths, strict=True)
        ).rstrip()
        for line in zip_longest(*cells, fillvalue="")
    ]
