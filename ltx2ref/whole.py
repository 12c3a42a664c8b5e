"""Files and folders that appear whole or not at all, and take no other's place unless that is asked for.

All is written to a hidden folder beside the destination, `.ltx2ref-TOKEN.partial`, and gets its name at the end. What
fails or is interrupted leaves nothing. A process that is killed leaves its hidden folder, which the next one that
writes beside it names in a warning and does not touch. Functions raise `OSError`.
"""

import errno
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .printable import printable

warnings_log = logging.getLogger("ltx2ref")

HIDDEN = ".ltx2ref-{}.{}"  # a token, and what it is: "partial", or "old" for what was moved aside
LEFTOVERS = {
    "partial": "left behind by a run that was killed; delete it, unless one is still writing there",
    "old": "moved aside by a run that was killed, and perhaps the only copy of what was there",
}
EXISTS = "exists already and is not overwritten"
# Errors by which file systems say that they have no second names for a file.
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}


@contextmanager
def staged(path: Path, inside: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. On success it, or the file `inside` it, gets that name.

    Raises `FileExistsError` if there is anything at `path`, at the beginning or by then.
    """
    require_new(path)
    with temporary_folder(path.parent) as folder:
        yield folder
        sync(folder)
        place(folder / inside, path)
        sync(path.parent)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files are on success those of `path`, a new or empty folder."""
    if not path.is_dir():
        with staged(path, "") as folder:
            yield folder
        return
    with temporary_folder(path) as folder:  # a folder that somebody stands in must not be replaced
        yield folder
        placed: dict[Path, os.stat_result] = {}
        try:
            for file in sorted(folder.iterdir()):
                placed[path / file.name] = file.stat()
                place(file, path / file.name)
        except BaseException:
            for target, ours in placed.items():
                with suppress(OSError):
                    if os.path.samestat(target.lstat(), ours):
                        target.unlink()
            raise
        sync(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the place of `path` at the end.

    What is there and is no regular file, as a pipe, is written to as it is.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    with temporary_folder(path.parent) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a hidden folder, which is removed in any case, and warn of those that were left there."""
    warn_of_leftovers(parent)
    folder = hidden(parent, "partial")
    try:
        folder.mkdir()
        with folder_held(folder):
            yield folder
    finally:
        try:  # without a call before it, at which a signal could be noticed
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def hidden(parent: Path, what: str) -> Path:
    """Return a new hidden path in a folder."""
    return parent / HIDDEN.format(secrets.token_hex(4), what)


def place(source: Path, path: Path) -> None:
    """Give a file or folder its name. Raises `FileExistsError`, and changes nothing, if anything has it by now.

    A file gets a second name, which cannot be that of another, and loses the first one when its folder goes. For
    a folder, an empty one takes the name, which is the only thing that a folder can replace. On Windows nothing is
    ever replaced by a new name. A file system without second names is the exception: there an empty file takes the
    name, and what somebody writes into that before it is replaced is lost.
    """
    try:
        if os.name == "nt":
            source.rename(path)
        elif source.is_dir():
            path.mkdir()
            renamed_over_empty(source, path)
        else:
            second_name(source, path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise FileExistsError(errno.EEXIST, EXISTS, str(path)) from None
        raise


def second_name(source: Path, path: Path) -> None:
    """Give a file a second name, or the only one where the file system has no second names."""
    try:
        os.link(source, path)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        renamed_over_empty(source, path)


def renamed_over_empty(source: Path, path: Path) -> None:
    """Rename a file or folder to a path at which an empty one was just made, and remove that if it fails."""
    try:
        source.rename(path)
    except BaseException:
        if source.exists():
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def require_new(path: Path) -> None:
    """Raise `OSError` unless `path` is new, in a folder that exists, and a name that a file can have."""
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            os.lstat(path)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error), str(path)) from None
        raise FileExistsError(errno.EEXIST, EXISTS, str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}", str(path))


def make_parents(path: Path) -> None:
    """Make the folder of `path` and those above it. Raises `OSError`, also for a name that no folder can have."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None


def put(path: Path, content: Iterable[bytes | bytearray | memoryview]) -> None:
    """Write a new file and wait until it is on the disk."""
    with open(path, "xb") as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Only POSIX systems can open a folder for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


# ---------------------------------------------------------------- what killed processes leave
def warn_of_leftovers(folder: Path) -> None:
    """Log a warning for each hidden folder, or file of an older version, that no process holds."""
    for what, said in LEFTOVERS.items():
        for path in sorted(folder.glob(HIDDEN.format("*", what))):
            if not in_use(path):
                warnings_log.warning("%s", printable(f"{path}: {size_of(path):,} bytes {said}"))


@contextmanager
def folder_held(folder: Path) -> Iterator[None]:
    """Hold a folder by a lock, which a system with locks on folders takes from a process that dies."""
    descriptor = None
    with suppress(OSError):
        descriptor = locked(folder, "LOCK_SH")
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def in_use(path: Path) -> bool:
    """Return whether a process is known to hold a folder."""
    try:
        os.close(locked(path, "LOCK_EX", "LOCK_NB"))
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def locked(path: Path, *how: str) -> int:
    """Open and lock a file or folder. Raises `OSError` where there are no locks, or if another process has one."""
    try:
        import fcntl
    except ModuleNotFoundError:
        raise OSError(errno.ENOSYS, "no locks on this system") from None
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, sum(getattr(fcntl, name) for name in how))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
    found = 0
    for file in [path, *inside]:
        with suppress(OSError):  # it may be going just now
            state = os.lstat(file)
            found += state.st_size if stat.S_ISREG(state.st_mode) else 0
    return found
