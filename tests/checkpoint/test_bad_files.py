"""A damaged, contradictory or hostile checkpoint is refused with a clear error, or loads to exactly what it says.

pytest tests/checkpoint/test_bad_files.py -s                          # 125 mutations, and counts per kind
LTX2REF_CORPUS=full pytest tests/checkpoint/test_bad_files.py -s      # 5,000
"""

import json
import os
import random
import re
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from corpus import (
    CRASHED,
    ERROR,
    EXECUTED,
    HUNG,
    KINDS,
    MEMORY,
    REJECTED,
    RIGHT,
    SAME,
    WRONG,
    Guarded,
    Mutation,
    Report,
    base,
    mutation,
    pack,
    resized_at_call,
    resized_by_thread,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltx2ref
from ltx2ref import CheckpointError

pytestmark = pytest.mark.slow

FULL = "full" in (os.environ.get("LTX2REF_CORPUS"), os.environ.get("HYPOTHESIS_PROFILE"))
COUNT, RESIZED, EXAMPLES = (5000, 600, 3000) if FULL else (125, 30, 50)
SEED, SECONDS, MEGABYTES = 0, 2.0, 200.0
ERROR_TYPE = f"{CheckpointError.__module__}.{CheckpointError.__name__}"
bounded = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------- the corpus
def load(mutant: Mutation) -> Mapping[str, Tensor]:
    """Load a file with ltx2ref, every other one to float32, which holds everything that a file can express."""
    model = ltx2ref.load(mutant.path, dtype=torch.float32 if mutant.index % 2 else None, **mutant.options)
    if model.training or mutant.config not in (None, model.config):
        raise AssertionError(f"in training mode, or another config: {model.config}")
    return model.state_dict()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[Report]:
    begin, found = time.monotonic(), list[Report]()
    with Guarded(load, tmp_path_factory.mktemp("corpus"), SEED, seconds=15) as guarded:
        for index in range(COUNT):
            found.append(guarded.report(index))
            if len(found) % 500 == 0:
                good = sum(map(is_good, found))
                print(f"\n{good} of {len(found)} after {time.monotonic() - begin:.0f} s", end="", flush=True)
    show(found, time.monotonic() - begin)
    return found


def show(found: list[Report], seconds: float) -> None:
    outcomes = sorted({report.outcome for report in found})
    print(f"\n{sum(map(is_good, found))} of {len(found)} mutations as they should be, in {seconds:.0f} s")
    print(f"loading took {sum(r.seconds for r in found):.0f} s; the slowest: {max(found, key=lambda r: r.seconds)}")
    print(f"the largest: {max(found, key=lambda r: r.megabytes)}")
    for kind in dict.fromkeys(name for name, *_ in KINDS):
        counts = Counter(report.outcome for report in found if report.mutation.kind == kind)
        print(f"  {kind:30}", *(f"{counts[outcome]:5} {outcome}" for outcome in outcomes))


def none_of(faults: list[Report]) -> None:
    assert not faults, "\n".join([f"{len(faults)}:", *map(str, faults[:30])])


def as_expected(r: Report) -> bool:
    return r.outcome in {ERROR: {REJECTED}, SAME: {RIGHT}}.get(r.mutation.expected, {REJECTED, RIGHT})


def is_checkpoint_error(r: Report) -> bool:
    return r.outcome != REJECTED or r.error == ERROR_TYPE


def names_the_file(r: Report) -> bool:
    return r.outcome != REJECTED or any(name in r.message for name in r.mutation.files)


def names_the_tensor(r: Report) -> bool:
    if r.outcome != REJECTED or r.mutation.expected != ERROR or not r.mutation.names:
        return True
    spelled = [spelled for name in r.mutation.names for spelled in (as_parameter(name), in_any_block(name))]
    return any(name in r.message for name in spelled)


def is_quick(r: Report) -> bool:
    return r.seconds <= SECONDS


def is_small(r: Report) -> bool:
    return r.megabytes <= MEGABYTES


CLAIMS = (as_expected, is_checkpoint_error, names_the_file, names_the_tensor, is_quick, is_small)


def is_good(r: Report) -> bool:
    return all(holds(r) for holds in CLAIMS)


def in_any_block(name: str) -> str:
    return re.sub(r"transformer_blocks\.\d", "transformer_blocks.*", name)


def as_parameter(name: str) -> str:
    """Remove the file's prefix, because contradictions of the config are reported by the model's own names."""
    return name.removeprefix("model.diffusion_model.")


def test_every_file_is_rejected_or_loads_to_exactly_what_it_says(reports: list[Report]) -> None:
    none_of([r for r in reports if not as_expected(r)])


def test_every_rejection_is_a_checkpoint_error(reports: list[Report]) -> None:
    none_of([r for r in reports if not is_checkpoint_error(r)])


def test_every_rejection_names_the_file(reports: list[Report]) -> None:
    none_of([r for r in reports if not names_the_file(r)])


def test_rejections_name_the_tensor_or_key_where_there_is_one(reports: list[Report]) -> None:
    none_of([r for r in reports if not names_the_tensor(r)])


def test_no_file_takes_more_than_2_seconds(reports: list[Report]) -> None:
    none_of([r for r in reports if not is_quick(r)])


def test_no_file_takes_more_than_200_megabytes(reports: list[Report]) -> None:
    none_of([r for r in reports if not is_small(r)])


def misbehave(mutant: Mutation) -> Mapping[str, Tensor]:
    """Do what the guard has to notice: fail to return in one of four ways, or change the last bit of a weight."""
    what = mutant.index // len(KINDS) % 5
    if what == 1:
        os.kill(os.getpid(), signal.SIGBUS)
    if what == 2:
        time.sleep(60)
    if what == 3:
        return {"x": torch.ones(2**29)}
    if what == 4:
        mutant.marker.mkdir()
    state = {name: value.clone() for name, value in mutant.original.state.items()}
    state["proj_in.bias"].view(torch.uint8)[0] ^= 1
    return state


def test_the_guard_sees_crashes_hangs_memory_executed_code_and_a_single_bit(tmp_path: Path) -> None:
    with Guarded(misbehave, tmp_path, SEED, seconds=5) as guarded:
        outcomes = [guarded.report(len(KINDS) * i).outcome for i in range(6)]
    assert outcomes == [WRONG, CRASHED, HUNG, MEMORY, EXECUTED, WRONG]


def test_a_seed_is_a_corpus(tmp_path: Path) -> None:
    for index in range(0, len(KINDS), 5):
        first, second = (mutation(tmp_path / name, index, SEED) for name in "ab")
        assert (first.kind, first.base, first.expected) == (second.kind, second.base, second.expected)
        assert first.kind.startswith(("pickle", "index leads")) or contents(first) == contents(second)


def contents(mutant: Mutation) -> dict[str, bytes]:
    files = [path for path in mutant.marker.parent.rglob("*") if path.is_file() and path.stat().st_size < 10**7]
    return {str(path.relative_to(mutant.marker.parent)): path.read_bytes() for path in files}


# ---------------------------------------------------------------- files that change while they are read
def load_while_resized(mutant: Mutation) -> Mapping[str, Tensor]:
    """Load a file that is cut or extended, before a random function call of the loader or repeatedly from a thread.

    The file has its old size again when weights are compared: tensors may be mapped, so it must not shrink after
    loading.
    """
    rng = random.Random(mutant.index)
    files = [mutant.path] if mutant.path.is_file() else sorted(mutant.path.glob("*.safetensors"))
    file = rng.choice(files)
    content = file.read_bytes()
    size = rng.choice([0, 8, rng.randrange(len(content)), len(content) - 1, len(content) + 1, 2 * len(content)])
    try:
        if rng.random() < 0.5:
            with resized_by_thread(file, (size, len(content)), rng.choice([1e-4, 1e-3, 5e-3])):
                return load(mutant)
        with resized_at_call(file, len(content), 0) as calls:
            load(mutant)
        with resized_at_call(file, size, rng.randrange(1, calls[0])):
            return load(mutant)
    finally:
        file.write_bytes(content)


def test_a_file_that_changes_while_it_is_read_is_rejected_or_was_read_before(tmp_path: Path) -> None:
    with Guarded(load_while_resized, tmp_path, SEED) as guarded:
        found = [guarded.report(len(KINDS) * i) for i in range(RESIZED)]
    print("\nresized:", Counter(report.outcome for report in found))
    none_of([r for r in found if r.outcome != RIGHT and (r.outcome, r.error) != (REJECTED, ERROR_TYPE)])
    assert any(r.outcome == REJECTED for r in found)


# ---------------------------------------------------------------- arbitrary bytes
numbers = st.integers() | st.integers(0, 300) | st.floats() | st.sampled_from([2**63, 2**64, -1, 0])
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=12,
)
names = st.sampled_from([*base("2.3", "lightricks").ours, *base("2.0", "diffusers").ours, "__metadata__"])
dtypes = st.sampled_from(["BF16", "F32", "F8_E4M3", "U8", "I8", "BOOL", "F4"])
entries = st.fixed_dictionaries(
    {
        "dtype": dtypes | anything,
        "shape": st.lists(numbers, max_size=3) | anything,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | anything,
    }
)
headers = st.dictionaries(names | st.text(), entries | anything, max_size=6) | anything


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def refused(path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        ltx2ref.load(path)
    assert path.name in str(caught.value)


@bounded
@given(content=st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(folder: Path, content: bytes) -> None:
    (folder / "x.safetensors").write_bytes(content)
    refused(folder / "x.safetensors")


@bounded
@given(text=st.binary(max_size=200), data=st.binary(max_size=50), more=st.integers(-9, 9))
def test_arbitrary_headers_are_refused(folder: Path, text: bytes, data: bytes, more: int) -> None:
    length = struct.pack("<Q", max(0, len(text) + more))
    (folder / "x.safetensors").write_bytes(length + text + data)
    refused(folder / "x.safetensors")


@bounded
@given(header=headers, data=st.binary(max_size=50))
def test_arbitrary_json_headers_are_refused(folder: Path, header: object, data: bytes) -> None:
    (folder / "x.safetensors").write_bytes(pack(json.dumps(header).encode(), data))
    refused(folder / "x.safetensors")


@bounded
@given(
    config=anything | st.dictionaries(st.sampled_from([*base("2.0", "diffusers").document]), anything, min_size=1),
    index=anything | st.fixed_dictionaries({"weight_map": st.dictionaries(names, anything)}),
)
def test_arbitrary_configs_and_indices_are_refused(folder: Path, config: object, index: object) -> None:
    good = base("2.0", "sharded")
    (sharded := folder / "sharded").mkdir(exist_ok=True)
    (sharded / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in good.files:
        (sharded / name).write_bytes(pack({}, b""))
    refused(sharded)
