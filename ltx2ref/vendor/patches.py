"""Changes of a copy as unified diffs: reading, applying to files in memory, and writing.

Neither git nor `patch` is used.

A hunk fits if its old lines are found at the line it names, or else if there is only one other place where they are
found. Everything else is a conflict. Nothing is applied with less context or at the nearest of several places, where it
might be wrong.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from .record import PATCHES, RECORD

ABSENT = "/dev/null"
KEPT = ("LICENSE", RECORD)  # files that no patch may change
UNSUPPORTED = ("rename from ", "copy from ", "GIT binary patch", "Binary files ")
EMPTY = re.compile(r"diff --git a/(\S+) b/\1\n(new|deleted) file mode \d+\n(?:index .*\n?)?(?!index|---)")
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class Hunk(NamedTuple):
    """A change of consecutive lines."""

    line: int  # number, from 1, of the first old line in the old file, or of the line before the new ones
    old: list[str]
    new: list[str]


class FileChange(NamedTuple):
    """A patch's change of one file: the file is added, removed or edited."""

    path: str
    action: str
    hunks: list[Hunk]


class Conflict(NamedTuple):
    """A place where a patch does not fit."""

    patch: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}{self.reason}"


class PatchConflict(ValueError):
    """An error for a patch that does not fit, in which case nothing was written.

    `conflicts` lists all places of this patch.
    """

    def __init__(self, message: str, conflicts: list[Conflict]) -> None:
        super().__init__(message)
        self.conflicts = conflicts


# ---------------------------------------------------------------- reading
def read_patch(name: str, text: str) -> list[FileChange]:
    """Read a unified diff, of git or of `diff -u`. What stands before and between its files is ignored."""
    lines, found, i = lines_of(text), list[FileChange](), 0
    while i < len(lines):
        if empty := EMPTY.match("".join(lines[i : i + 4])):  # git has nothing else to say of an empty file
            require_changeable(f"{name}, line {i + 1}", empty[1])
            found.append(FileChange(empty[1], "add" if empty[2] == "new" else "remove", []))
        if lines[i].startswith(UNSUPPORTED):
            raise ValueError(f"{name}, line {i + 1}: expected edits of text, got {lines[i].strip()!r}")
        if lines[i].startswith("--- ") and i + 1 < len(lines) and lines[i + 1].startswith("+++ "):
            change, i = read_file(name, lines, i)
            found.append(change)
        else:
            i += 1
    if not found:
        raise ValueError(f"{name}: expected a unified diff, with lines that begin with --- and +++")
    return found


def read_file(name: str, lines: list[str], i: int) -> tuple[FileChange, int]:
    """Read one file's part of a patch that starts at line `i`, and return it with the line after it."""
    old, new = (path_of(name, line) for line in lines[i : i + 2])
    action = "add" if old == ABSENT else "remove" if new == ABSENT else "edit"
    if action == "edit" and old != new:
        raise ValueError(f"{name}, line {i + 1}: expected one path, got {old} and {new}")
    path = new if action == "add" else old
    require_changeable(f"{name}, line {i + 1}", path)
    hunks, i = [], i + 2
    while i < len(lines) and lines[i].startswith("@@"):
        hunk, i = read_hunk(name, lines, i)
        hunks.append(hunk)
    if action == "edit" and not hunks:
        raise ValueError(f"{name}: {path} has no hunks: expected lines that begin with @@")
    return FileChange(path, action, hunks), i


def path_of(name: str, line: str) -> str:
    """Return the path in a header line, without git's a/ or b/ and without the time that `diff` appends."""
    path = line[4:].rstrip("\n").split("\t")[0].strip()
    return path if path == ABSENT else re.sub(r"^(a|b|\.)/", "", path)


def require_changeable(where: str, path: str) -> None:
    """Raise `ValueError` unless a path is inside the copy and names a file that patches may change."""
    parts = re.split(r"[/\\]", path)
    if {"", ".", ".."} & {*parts} or parts[0] in ("~", PATCHES) or path in KEPT:
        raise ValueError(f"{where}: {path} is not a file of the copy that may be changed")


def read_hunk(name: str, lines: list[str], i: int) -> tuple[Hunk, int]:
    """Read a hunk that starts at line `i`, and return it with the number of the line after it."""
    head = HUNK.match(lines[i])
    if head is None:
        raise ValueError(f"{name}, line {i + 1}: expected '@@ -LINE,COUNT +LINE,COUNT @@', got {lines[i].strip()!r}")
    line, removed, _, added = (1 if x is None else int(x) for x in head.groups())
    start, old, new, i = i, list[str](), list[str](), i + 1
    sides: tuple[list[str], ...] = ()  # the side or sides to which the last line was added
    while len(old) < removed or len(new) < added or (i < len(lines) and lines[i].startswith("\\")):
        mark, rest = (lines[i][0], lines[i][1:]) if i < len(lines) else ("", "")
        if mark == "\n":  # an empty line of context, from which an editor removed the blank
            mark, rest = " ", "\n"
        if mark == "\\" and sides:  # "\ No newline at end of file"
            for side in sides:
                side[-1] = side[-1].removesuffix("\n")
        elif mark and mark in " -+":
            sides = {" ": (old, new), "-": (old,), "+": (new,)}[mark]
            for side in sides:
                side.append(rest)
        else:
            break
        i += 1
    if (len(old), len(new)) != (removed, added):
        raise ValueError(
            f"{name}, line {start + 1}: expected {removed} old and {added} new lines, got {len(old)} and {len(new)}"
        )
    return Hunk(line, old, new), i


# ---------------------------------------------------------------- applying
def apply_patch(
    files: Mapping[str, bytes], name: str, changes: list[FileChange]
) -> tuple[dict[str, bytes], list[Conflict]]:
    """Return the files with a patch applied, and every place where it does not fit."""
    result, conflicts = dict(files), list[Conflict]()
    for path, action, hunks in changes:
        if action == "add" and path in result:
            conflicts.append(Conflict(name, path, " exists already"))
        elif action != "add" and path not in result:
            conflicts.append(Conflict(name, path, " does not exist: paths start in the copy's folder"))
        else:
            text, reasons = apply_hunks(lines_of(result.get(path, b"").decode()), hunks)
            conflicts += [Conflict(name, path, reason) for reason in reasons]
            if action == "remove" and not reasons and text:
                conflicts.append(Conflict(name, path, " has more lines than the patch removes"))
            result[path] = "".join(text).encode()
            if action == "remove":
                del result[path]
    return result, conflicts


def apply_hunks(lines: list[str], hunks: list[Hunk]) -> tuple[list[str], list[str]]:
    """Return the lines with all fitting hunks applied, and the reasons why the others do not fit."""
    # Lines before `done` are settled. Hunks belong `shift` lines after the line they name.
    done, reasons, shift = 0, [], 0
    for line, old, new in hunks:
        expected = line - 1 + shift + (not old)
        places = [i for i in range(done, len(lines) - len(old) + 1) if lines[i : i + len(old)] == old]
        if expected in places:
            places = [expected]
        if len(places) == 1 and old:
            (at,) = places
        elif not old and expected in range(done, len(lines) + 1):
            at = expected
        else:
            reasons.append(why_not(lines, expected, old, new, len(places)))
            continue
        lines = [*lines[:at], *new, *lines[at + len(old) :]]
        done, shift = at + len(new), at + len(new) - len(old) - (line - 1 + (not old))
    return lines, reasons


def why_not(lines: list[str], expected: int, old: list[str], new: list[str], places: int) -> str:
    """Return the reason why a hunk does not fit."""
    if places > 1:
        return f", line {expected + 1}: the lines to change are at {places} other places and not here"
    if new and any(lines[i : i + len(new)] == new for i in range(len(lines))):
        return f", line {expected + 1}: already has this change"
    for i, wanted in enumerate(old, expected):
        if i >= len(lines) or i < 0 or lines[i] != wanted:
            got = repr(lines[i].strip()) if 0 <= i < len(lines) else "the end of the file"
            return f", line {i + 1}: expected {wanted.strip()!r}, got {got}"
    return f", line {expected + 1}: overlaps the change before it"


# ---------------------------------------------------------------- writing
def write_patch(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> str:
    """Return a unified diff between two sets of files. Raises `ValueError` for a file that is not text."""
    return "".join(
        line
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
        for line in difference(path, before.get(path), after.get(path))
    )


def difference(path: str, before: bytes | None, after: bytes | None) -> Iterator[str]:
    """Yield the lines of a unified diff between two versions of a file. None means that the file does not exist."""
    try:
        old, new = (lines_of((x or b"").decode()) for x in (before, after))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text, because patches hold no other changes: {error}") from None
    if before is None or after is None:
        yield f"diff --git a/{path} b/{path}\n{'new' if before is None else 'deleted'} file mode 100644\n"
    if not before and not after:
        return
    yield f"--- {ABSENT if before is None else f'a/{path}'}\n"
    yield f"+++ {ABSENT if after is None else f'b/{path}'}\n"
    for line in [*difflib.unified_diff(old, new)][2:]:
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def lines_of(text: str) -> list[str]:
    """Split text at line feeds only. Python's `splitlines` would also split at form feeds."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)
