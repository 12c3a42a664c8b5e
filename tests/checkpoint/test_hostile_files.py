"""No file makes the loader wait, run on or take memory: every count is checked, and only regular files are opened.

pytest tests/checkpoint/test_hostile_files.py
"""

import itertools
import json
import os
import random
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus import idle_memory, peak

import ltx2ref
from ltx2ref import CheckpointError
from ltx2ref.checkpoint.gguf_header import MAX_PASSED
from ltx2ref.checkpoint.header import read_header
from ltx2ref.checkpoint.inspection import inspect
from ltx2ref.checkpoint.source import open_source, read_json
from ltx2ref.checkpoint.storage import open_regular

TEXT, ARRAY, U32, F32 = 8, 9, 4, 6  # types of GGUF metadata


# ---------------------------------------------------------------- GGUF, written byte by byte
def text(x: str) -> bytes:
    return struct.pack("<Q", len(x.encode())) + x.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def gguf(
    entries: list[bytes], tensors: list[bytes], data: int = 0, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    """Return a file. `counts` is what it states as the numbers of its tensors and entries."""
    said = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *said) + b"".join(entries + tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


GOOD = gguf([entry("general.architecture", TEXT, text("ltxv"))], [tensor("a", [4, 2]), tensor("b", [3], 0, 32)], 44)
BOMB = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry("a", ARRAY, array(U32, 2**40, b"\0"))
# What a file of a few bytes may claim, and a word of the error.
CLAIMS: dict[str, tuple[bytes, str]] = {
    "an array of 2^40 numbers, in 50 bytes": (BOMB, "a: 1099511627776 values at byte 49, but 1 bytes are left"),
    "an array of 2^63 texts": (gguf([entry("a", ARRAY, array(TEXT, 2**63, b""))], []), "9223372036854775808 texts"),
    "texts longer than the file": (
        gguf([entry("a", ARRAY, array(TEXT, 1, struct.pack("<Q", 2**40)))], [], 40),
        "a text that is long",
    ),
    "a text of 2^62 bytes": (gguf([entry("a", TEXT, struct.pack("<Q", 2**62))], []), "4611686018427387904 bytes of"),
    "a key of 2^50 bytes": (gguf([struct.pack("<Q", 2**50)], [], 64), "1125899906842624 bytes of text"),
    "2^60 entries": (gguf([], [], counts=(0, 2**60)), "1152921504606846976 entries"),
    "2^60 tensors": (gguf([], [], counts=(2**60, 0)), "1152921504606846976 tensors"),
    "one more tensor than there is": (gguf([], [tensor("a", [4])], 0, counts=(2, 0)), "left"),
    "2^31 dimensions": (gguf([], [text("a") + struct.pack("<I", 2**31)], 40), "a: 2147483648 dimensions"),
    "a tensor of 2^128 elements": (gguf([], [tensor("a", [2**63, 2**63, 4])], 64), "ends at byte"),
    "a tensor beyond the end": (gguf([], [tensor("a", [4], 0, 2**62)], 64), "ends at byte"),
    "two tensors in the same place": (gguf([], [tensor("a", [4]), tensor("b", [4])], 64), "inside a"),
    "an offset of 1": (gguf([], [tensor("a", [4], 0, 1)], 64), "a: its offset is no multiple of 32"),
    "a name twice": (gguf([], [tensor("a", [4]), tensor("a", [4], 0, 32)], 64), "a: occurs twice"),
    "a key twice": (gguf([entry("a", U32, bytes(4))] * 2, []), "a: occurs twice"),
    "an array of arrays": (gguf([entry("a", ARRAY, array(ARRAY, 1, bytes(12)))], [], 64), "an array of arrays"),
    "an unknown type of value": (gguf([entry("a", 77, bytes(8))], [], 64), "unknown type of value 77"),
    "an unknown ggml type": (gguf([], [tensor("a", [32], 999)], 64), "ggml type 999"),
    "a row that is no whole block": (gguf([], [tensor("a", [40], 8)], 64), "Q8_0 needs columns in groups of 32"),
    "an alignment of 3": (gguf([entry("general.alignment", U32, b"\3\0\0\0")], []), "3 is no power of two"),
    "an alignment of 0": (gguf([entry("general.alignment", U32, bytes(4))], []), "0 is no power of two"),
    "an original shape of another size": (
        gguf(
            [entry("comfy.gguf.orig_shape.a", ARRAY, array(U32, 2, struct.pack("<II", 3, 3)))], [tensor("a", [8])], 64
        ),
        "[3, 3] is no shape of 8",
    ),
    "an original shape with a negative length": (
        gguf(
            [entry("comfy.gguf.orig_shape.a", ARRAY, array(5, 2, struct.pack("<ii", -2, -4)))], [tensor("a", [8])], 64
        ),
        "[-2, -4] is no shape of 8",
    ),
    "the order of bytes of another machine": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (gguf([], [], version=1), "version 1, expected 2 or 3"),
    "text that is no UTF-8": (gguf([entry("a", TEXT, struct.pack("<Q", 1) + b"\xff")], []), "utf-8"),
    "nothing after the magic": (b"GGUF", "4 bytes at byte 4, but 0 bytes are left"),
}


def written(folder: Path, content: bytes) -> Path:
    (path := folder / "x.gguf").write_bytes(content)
    return path


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_gguf_header_is_refused_before_anything_of_its_size_is_made(claim: str, tmp_path: Path) -> None:
    content, problem = CLAIMS[claim]
    path, begin = written(tmp_path, content), time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert time.process_time() - begin < 2
    assert str(path) in str(caught.value) and problem in str(caught.value)


def test_the_bomb_has_50_bytes() -> None:
    assert len(BOMB) == 50


def test_a_gguf_header_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    import gguf as library

    file, tensors = read_header(written(tmp_path, GOOD))
    reader = library.GGUFReader(tmp_path / "x.gguf")
    assert file.metadata == {"general.architecture": "ltxv"}
    assert [*tensors] == [x.name for x in reader.tensors] == ["a", "b"]
    for theirs, ours in zip(reader.tensors, tensors.values(), strict=True):
        assert (ours.start, ours.stop) == (theirs.data_offset, theirs.data_offset + theirs.n_bytes)
        assert (ours.dtype, [*ours.shape]) == (theirs.tensor_type.name, theirs.shape.tolist()[::-1])


def test_any_gguf_that_is_cut_or_has_another_byte_is_refused_or_read(tmp_path: Path) -> None:
    rng, read = random.Random(0), 0
    cuts = [GOOD[:at] for at in range(4, len(GOOD))]
    others = [bytearray(GOOD) for _ in range(600)]
    for content in others:
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(4, len(content))] = rng.choice([0, 1, 2, 4, 8, 9, 127, 128, 255])
    for content in itertools.chain(cuts, map(bytes, others)):
        try:
            file, tensors = read_header(written(tmp_path, content))
        except CheckpointError:
            continue
        read += 1
        assert all(0 < x.start <= x.stop <= file.size for x in tensors.values())
    assert 0 < read < len(others)


def test_a_tokenizer_of_256k_texts_is_passed_over_and_not_kept(tmp_path: Path) -> None:
    words = b"".join(text(f"word {i}") for i in range(2**18))
    scores = array(F32, 2**18, bytes(2**20))
    entries = [entry("tokenizer.ggml.tokens", ARRAY, array(TEXT, 2**18, words)), entry("scores", ARRAY, scores)]
    path, idle, begin = written(tmp_path, gguf(entries, [tensor("a", [4])], 16)), idle_memory(), time.process_time()
    file, tensors = read_header(path)
    assert time.process_time() - begin < 2
    assert peak() - idle < 4  # megabytes, of 6 in the file
    assert [*tensors] == ["a"] and file.metadata == {}


def test_an_endless_array_of_empty_texts_in_a_sparse_file_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, gguf([entry("a", ARRAY, array(TEXT, MAX_PASSED + 1, b""))], []))
    os.truncate(path, 2**34)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=f"a: arrays of more than {MAX_PASSED} texts"):
        read_header(path)
    assert time.process_time() - begin < 1


# ---------------------------------------------------------------- what is no regular file
def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket may have 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
PLACES: dict[str, Callable[[Path], Any]] = {
    "model.safetensors": ltx2ref.load,
    "model.gguf": ltx2ref.load,
    "folder/config.json": lambda path: ltx2ref.load(path.parent),
    "folder/diffusion_pytorch_model.safetensors": lambda path: ltx2ref.load(path.parent),
    "folder/diffusion_pytorch_model.safetensors.index.json": lambda path: ltx2ref.load(path.parent),
    "shards/x.safetensors": lambda path: open_source(index_beside(path)),
    "call.safetensors": read_header,
}


def index_beside(shard: Path) -> Path:
    index = shard.parent / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard.name}}), encoding="utf-8")
    return index


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_regular_file_is_named_and_never_waited_for(place: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / place
    if kind == "a folder" and path.parent == tmp_path:
        pytest.skip("a folder is looked into")
    path.parent.mkdir(exist_ok=True)
    KINDS[kind](path)
    with pytest.raises(CheckpointError) as caught:
        PLACES[place](path)
    assert f"{path.name}: not a regular file, but {kind}" in str(caught.value)


def test_a_file_that_becomes_a_fifo_before_it_is_opened_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, GOOD)
    regular, stat = os.stat(path), os.stat
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(os, "stat", lambda x, **options: regular if x == path else stat(x, **options))
    with pytest.raises(CheckpointError, match="not a regular file, but a FIFO"):
        open_regular(path)


# Paths that no file can have, and one that is longer than any name.
IMPOSSIBLE = ["a\0b", "\ud800", "x" * 300]


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_path_that_no_file_can_have_is_a_checkpoint_error_where_something_is_read(name: str, tmp_path: Path) -> None:
    for read in (ltx2ref.load, ltx2ref.stream, inspect, read_header, read_json):
        for path in (tmp_path / name, tmp_path / name / "x", tmp_path / f"{name}.safetensors"):
            with pytest.raises(CheckpointError):
                read(path)
