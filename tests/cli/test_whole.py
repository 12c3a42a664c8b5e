"""Whatever is written appears whole or not at all, replaces nothing in any race, and what a kill leaves is named.

pytest tests/cli/test_whole.py
"""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ltx2ref import cli, whole
from ltx2ref.cli import command
from ltx2ref.whole import put, replacing, require_new, staged, staged_folder, temporary_folder

ROOT = Path(whole.__file__).parents[1]


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---------------------------------------------------------------- nothing is replaced
OCCUPIED: dict[str, Callable[[Path], object]] = {
    "a file": lambda path: path.write_bytes(b"precious"),
    "a folder": lambda path: (path.mkdir(), (path / "x").write_bytes(b"precious")),
    "an empty folder": lambda path: path.mkdir(),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this a file system without second names for a file."""

    def link(source: Path, path: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


@pytest.fixture(params=["links", "no links"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no links":
        refuse_links(monkeypatch)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("inside", ["", "file"])
@pytest.mark.parametrize("there", OCCUPIED)
def test_what_appears_in_the_last_moment_is_not_replaced(
    there: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, place, before = tmp_path / "b", whole.place, list[object]()

    def late(source: Path, target: Path) -> None:
        OCCUPIED[there](target)
        before.append((listing(path), path.lstat().st_ino))
        place(source, target)

    monkeypatch.setattr(whole, "place", late)
    with pytest.raises(FileExistsError), staged(path, inside) as folder:
        put(folder / "file", [b"new"])
    assert before == [(listing(path), path.lstat().st_ino)] and not [*tmp_path.glob(".*")]


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("inside", ["", "file"])
def test_what_is_staged_appears_whole(inside: str, tmp_path: Path) -> None:
    with staged(tmp_path / "b", inside) as folder:
        put(folder / "file", [b"ne", b"w"])
        assert not (tmp_path / "b").exists()
    assert listing(tmp_path) == (["b"] if inside else ["b", "b/file"])
    assert (tmp_path / "b" / ("" if inside else "file")).read_bytes() == b"new"


@pytest.mark.parametrize("inside", ["", "file"])
def test_one_of_several_writers_of_a_name_succeeds(inside: str, tmp_path: Path) -> None:
    path, done, start = tmp_path / "b", list[int](), threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        with suppress(FileExistsError):
            with staged(path, inside) as folder:
                put(folder / "file", [bytes([number]) * 1000])
            done.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 1 and (path / ("" if inside else "file")).read_bytes() == bytes(done) * 1000


def test_a_failure_in_a_folder_that_was_there_removes_its_own_files_alone(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir()
    with pytest.raises(FileExistsError), staged_folder(tmp_path / "kit") as folder:
        for name in "abc":
            put(folder / name, [b"new"])
        (tmp_path / "kit" / "b").write_bytes(b"precious")
    assert listing(tmp_path / "kit") == ["b"] and (tmp_path / "kit" / "b").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_a_name_that_no_file_can_have_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        require_new(tmp_path / name)
    with pytest.raises(OSError), staged(tmp_path / name, ""):
        pytest.fail("begun")


def test_a_page_is_replaced_whole_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    page, link = tmp_path / "page", tmp_path / "link"
    page.write_text("old", encoding="utf-8")
    link.symlink_to(page)
    with pytest.raises(KeyboardInterrupt), replacing(link) as path:
        path.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert page.read_text(encoding="utf-8") == "old" and listing(tmp_path) == ["link", "page"]
    with replacing(link) as path:
        path.write_text("new", encoding="utf-8")
    assert link.is_symlink() and page.read_text(encoding="utf-8") == "new"
    with replacing(Path("/dev/null")) as path:
        assert path == Path("/dev/null")


# ---------------------------------------------------------------- leftovers
def test_leftovers_are_named_with_their_size_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".ltx2ref-1.partial" / "in").mkdir(parents=True)
    (tmp_path / ".ltx2ref-1.partial" / "in" / "x").write_bytes(bytes(1234567))
    (tmp_path / ".ltx2ref-2.old").mkdir()
    (tmp_path / ".ltx2ref-3.partial").write_bytes(bytes(10))
    before = listing(tmp_path)
    with temporary_folder(tmp_path):
        pass
    assert listing(tmp_path) == before
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.removeprefix(f"{tmp_path}/").partition(" bytes")[0] for line in said] == [
        ".ltx2ref-1.partial: 1,234,567",
        ".ltx2ref-3.partial: 10",
        ".ltx2ref-2.old: 0",
    ]
    assert "the only copy" in said[2]


def test_what_another_run_is_writing_is_no_leftover(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with temporary_folder(tmp_path), temporary_folder(tmp_path):
        assert len([*tmp_path.iterdir()]) == 2
    assert not caplog.records and not [*tmp_path.iterdir()]


# ---------------------------------------------------------------- signals
@pytest.fixture
def defaults() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_command_as_ctrl_c_does(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(arguments: list[str] | None) -> int:
        with temporary_folder(tmp_path):
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)  # a second one does not disturb what cleans up
        return 0

    monkeypatch.setattr(cli, "run_command", stopped)
    assert cli.main([]) == 128 + number
    assert not [*tmp_path.iterdir()] and signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.usefixtures("defaults")
def test_a_signal_that_is_ignored_or_handled_already_stays_so() -> None:
    for handler in (signal.SIG_IGN, lambda *_: None):
        signal.signal(signal.SIGHUP, handler)
        with command.signals_interrupt():
            assert signal.getsignal(signal.SIGHUP) == handler
        assert signal.getsignal(signal.SIGHUP) == handler


def test_commands_run_in_threads_which_have_no_signals() -> None:
    found = list[int]()
    thread = threading.Thread(target=lambda: found.append(cli.main(["verify", "--list"])))
    thread.start()
    thread.join()
    assert found == [0]


WRITES = """
import os, signal, sys
from pathlib import Path
from ltx2ref import cli, whole
signal.signal(signal.SIGTERM, signal.SIG_DFL)
real = getattr(os, sys.argv[1])
def signalled(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments, **options)
setattr(os, sys.argv[1], signalled)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("fsync", "trace --case 2.3/t2v -o {}/trace"),
        ("replace", "trace --case 2.3/t2v --files {}"),
        ("mkdir", "vendor {} --as copied --model"),
        ("replace", "audit ltx2ref --case 2.3/t2v --html {}/page.html"),
    ],
)
def test_each_command_that_writes_leaves_nothing_after_sigterm(call: str, words: str, tmp_path: Path) -> None:
    run = [sys.executable, "-c", WRITES, call, *words.format(tmp_path).split()]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "")
    assert listing(tmp_path) == []
