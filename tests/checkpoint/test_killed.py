"""A conversion that is terminated or killed at any time loses nothing; what a kill leaves is named by the next one.

pytest tests/checkpoint/test_killed.py -s                            # 4 of each signal
LTX2REF_CORPUS=full pytest tests/checkpoint/test_killed.py -s        # 20 of each
"""

import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import writers
from tiny import random_model, tiny_config

from ltx2ref import cli, whole

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")]

FULL = "full" in (os.environ.get("LTX2REF_CORPUS"), os.environ.get("HYPOTHESIS_PROFILE"))
COUNT = 20 if FULL else 4
WAYS = {
    "a file": ["b.safetensors", "--to", "lightricks", "--dtype", "float32"],
    "a folder": ["b", "--to", "diffusers"],
    "shards": ["b", "--to", "diffusers", "--max-shard-size", "100KB"],
}
Contents = dict[str, bytes]


def contents(folder: Path) -> Contents:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def convert(folder: Path, way: str) -> None:
    """Be the other process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    destination, *options = WAYS[way]
    words = ["convert", str(folder / "a.safetensors"), str(folder / destination), *options]
    with open(os.devnull, "w", encoding="utf-8") as sys.stdout:
        os._exit(cli.main(words))


def started(folder: Path, way: str) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=convert, args=(folder, way))
    process.start()
    return process


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path, config = tmp_path_factory.mktemp("source") / "a.safetensors", tiny_config("2.3", num_layers=12)
    writers.write_transformer_only(path, random_model(config).state_dict(), config)
    return path.read_bytes()


class Whole(NamedTuple):
    """What a conversion writes if it is left alone, and how long that takes: until it begins to write, and then."""

    content: Contents
    before: float
    writing: float


@pytest.fixture(scope="module")
def wholes(source: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """Return what each way writes, and the shortest of three times."""
    found = {}
    for way in WAYS:
        times = []
        for _ in range(3):
            folder, begin = tmp_path_factory.mktemp("whole"), time.monotonic()
            (folder / "a.safetensors").write_bytes(source)
            process = started(folder, way)
            wait_for_writing(folder, process)
            writing = time.monotonic()
            process.join()
            assert process.exitcode == 0
            times.append((writing - begin, time.monotonic() - writing))
        found[way] = Whole(contents(folder), *map(min, zip(*times, strict=True)))
    return found


def wait_for_writing(folder: Path, process: multiprocessing.process.BaseProcess) -> None:
    """Wait until a conversion has begun to write, or is over."""
    while process.is_alive() and len([*folder.iterdir()]) == 1:
        time.sleep(0.0005)


def hidden_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def stage_of(folder: Path) -> str:
    """Return how far a conversion has come, by what is in its folder."""
    if hidden_of(folder):
        return "while writing"
    return "when all was there" if len([*folder.iterdir()]) > 1 else "before writing"


@pytest.fixture
def times() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    yield counts
    print("", *(f"  {count:3} {what}" for what, count in sorted(counts.items())), sep="\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_lost_at_any_time(
    number: signal.Signals,
    source: bytes,
    wholes: dict[str, Whole],
    times: Counter[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(int(number))
    for i in range(COUNT):
        (folder := tmp_path / str(i)).mkdir()
        (folder / "a.safetensors").write_bytes(source)
        way = rng.choice([*WAYS])
        expected = wholes[way]
        process = started(folder, way)
        if i % 2:  # at any time, which is mostly before it writes
            time.sleep(rng.uniform(0.1, 1.1) * (expected.before + expected.writing))
        else:  # while it writes, or soon after
            wait_for_writing(folder, process)
            time.sleep(rng.uniform(0, 1.2) * expected.writing)
        stage = stage_of(folder)
        os.kill(process.pid or 0, number)
        process.join()
        left, hidden = contents(folder), hidden_of(folder)
        seen = {name: content for name, content in left.items() if not name.startswith(".")}
        assert seen in (expected.content, {"a.safetensors": source}), f"{way}: {[*seen]}"
        if number == signal.SIGTERM:
            # Before the command line is there to handle it, the signal ends the process as it ends any other.
            assert process.exitcode in (143, 0, -number) and not hidden
        caplog.clear()
        with whole.temporary_folder(folder):
            pass
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == len(hidden) and all(name in line for name, line in zip(hidden, said, strict=True))
        assert contents(folder) == left
        result = "all" if len(seen) > 1 else "nothing"
        times[f"{stage}: exit status {process.exitcode}, {result} there, {len(hidden)} leftovers"] += 1
