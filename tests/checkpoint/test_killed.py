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


@pytest.fixture(scope="module")
def wholes(source: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Contents, float]]:
    """Return what each way writes if it is left alone, and how long it takes."""
    found = {}
    for way in WAYS:
        folder = tmp_path_factory.mktemp("whole")
        (folder / "a.safetensors").write_bytes(source)
        begin = time.monotonic()
        process = started(folder, way)
        process.join()
        assert process.exitcode == 0
        found[way] = contents(folder), time.monotonic() - begin
    return found


def hidden_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.fixture
def times() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    yield counts
    print("\n", *(f"{count} {what};" for what, count in counts.items()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_lost_at_any_time(
    number: signal.Signals,
    source: bytes,
    wholes: dict[str, tuple[Contents, float]],
    times: Counter[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = random.Random(int(number))
    for i in range(COUNT):
        (folder := tmp_path / str(i)).mkdir()
        (folder / "a.safetensors").write_bytes(source)
        way = rng.choice([*WAYS])
        whole_one, seconds = wholes[way]
        process = started(folder, way)
        time.sleep(rng.uniform(0.3, 1.1) * seconds)
        os.kill(process.pid or 0, number)
        process.join()
        left, hidden = contents(folder), hidden_of(folder)
        seen = {name: content for name, content in left.items() if not name.startswith(".")}
        assert seen in (whole_one, {"a.safetensors": source}), f"{way}: {[*seen]}"
        if number == signal.SIGTERM:
            # Before the command line is there to handle it, the signal ends the process as it ends any other.
            assert process.exitcode in (143, 0, -number) and not hidden
        caplog.clear()
        with whole.temporary_folder(folder):
            pass
        said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == len(hidden) and all(name in line for name, line in zip(hidden, said, strict=True))
        assert contents(folder) == left
        times[f"{process.exitcode} with {'all' if len(seen) > 1 else 'nothing'} and {len(hidden)} leftovers"] += 1
