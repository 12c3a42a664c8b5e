"""The sparse copies have the published sizes, tensors and headers, and take no room.

pytest tests/checkpoint/test_sparse.py
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sparse
from safetensors import safe_open
from sparse import FILES, PREFIX, WIDTHS

from ltx2ref import LTX_2_0, LTX_2_3, LTX_2_5, TransformerConfig

CONFIGS = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}
HEADER_BYTES = {"2.5-bf16": 677_616, "2.5-int8": 1_086_120, "2.5-nvfp4": 1_287_600, "2.5-nvfp4-superseded": 1_179_408}
MODEL_HASHES = {"2.5-bf16": "7960c5dc4626650824e36f65a8e992e9", "2.5-int8": "57343d320cac0bbba58a488b8ebe7187"}
# Tensors of two VAEs and a vocoder in a published 2.3 single file, which are three placeholders here.
FOREIGN_2_3 = 170 + 102 + 1227
ANY_SIZE = ("2.3-kijai-fp8",)
# The number of layers with a scale and of tensors of each dtype, where they are published.
LAYERS = {
    "2.0-fp8": 1176,
    "2.3-dev-fp8": 1496,
    "2.3-distilled-fp8": 1462,
    "2.5-int8": 1440,
    "2.5-nvfp4": 1176,
    "2.5-nvfp4-superseded": 1176,
}
DTYPES = {"2.5-bf16": {"BF16": 4059, "F32": 290}, "2.5-int8": {"BF16": 2619, "F32": 1730, "I8": 1440, "U8": 1440}}

Written = Callable[[str], list[Path]]

names = pytest.mark.parametrize("name", FILES)


def read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert isinstance(header, dict)
    return header


def header_length(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Write the safetensors files of a copy, and do so only once."""
    folder = tmp_path_factory.mktemp("sparse")

    @functools.cache
    def write(name: str) -> list[Path]:
        path = FILES[name].write(folder)
        return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]

    return write


def tensors(paths: list[Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in paths:
        found |= read_header(path)
    found.pop("__metadata__", None)
    return found


def model_hash(shapes: Mapping[str, Any]) -> str:
    """Return DiffSynth's hash: the md5 of all names, alone and with their shapes."""
    parts = [part for name, shape in shapes.items() for part in (name, f"{name}:{'_'.join(map(str, shape))}")]
    return hashlib.md5(",".join(sorted(parts)).encode()).hexdigest()


@pytest.mark.slow
@names
def test_a_copy_opens_has_its_tensors_and_takes_no_room(name: str, written: Written) -> None:
    keys: list[str] = []
    for path in written(name):
        with safe_open(path, "np") as file:  # "pt" maps privately, which the kernel counts as memory
            keys += file.keys()
        assert path.stat().st_blocks * 512 < 4_000_000 < path.stat().st_size
    assert len(keys) == len(set(keys)) == FILES[name].tensors


@pytest.mark.parametrize(
    ("release", "tensors", "parameters"),
    [("2.0", 58, 708_940_800), ("2.3", 258, 2_016_166_400), ("2.5", 258, 2_016_166_400)],
)
def test_the_connectors_have_the_published_totals(release: str, tensors: int, parameters: int) -> None:
    found = sparse.connectors(release).values()
    assert (len(found), sum(math.prod(spec.shape) for spec in found)) == (tensors, parameters)


@pytest.mark.slow
@names
def test_sizes_and_numbers_of_tensors_are_the_published_ones(name: str, written: Written) -> None:
    entry, paths = FILES[name], written(name)
    if entry.published_bytes is not None and name not in ANY_SIZE:
        assert sum(path.stat().st_size for path in paths) == entry.published_bytes
    if entry.published_tensors is not None:
        placeholders = FOREIGN_2_3 - 3 if entry.release == "2.3" and not entry.sharded and "kijai" not in name else 0
        assert entry.tensors + placeholders == entry.published_tensors


@pytest.mark.parametrize("name", HEADER_BYTES)
def test_the_headers_of_the_2_5_files_have_the_published_lengths(name: str, written: Written) -> None:
    (path,) = written(name)
    assert header_length(path) == HEADER_BYTES[name]


@pytest.mark.parametrize("name", MODEL_HASHES)
def test_names_and_shapes_have_the_published_md5(name: str, written: Written) -> None:
    shapes = {key: tensor["shape"] for key, tensor in tensors(written(name)).items()}
    assert model_hash(shapes) == MODEL_HASHES[name]


@pytest.mark.parametrize("name", DTYPES)
def test_the_number_of_tensors_of_each_dtype_is_the_published_one(name: str, written: Written) -> None:
    found = [tensor["dtype"] for tensor in tensors(written(name)).values()]
    assert {dtype: found.count(dtype) for dtype in set(found)} == DTYPES[name]


@pytest.mark.parametrize("name", LAYERS)
def test_as_many_layers_are_quantised_as_published_and_the_metadata_lists_them(name: str, written: Written) -> None:
    (path,) = written(name)
    header = read_header(path)
    scaled = {key.removesuffix(".weight_scale") for key in header if key.endswith(".weight_scale")}
    assert len(scaled) == LAYERS[name]
    assert all(header[layer + ".weight"]["dtype"] in ("F8_E4M3", "I8", "U8") for layer in scaled)
    said = header["__metadata__"].get("_quantization_metadata")
    assert (said is not None) == (name not in ("2.5-int8", "2.5-nvfp4-superseded"))
    assert said is None or json.loads(said)["layers"].keys() == scaled


@pytest.mark.slow
@names
def test_offsets_leave_no_gap_and_wide_types_come_first(name: str, written: Written) -> None:
    for path in written(name):
        header, end = read_header(path), 0
        header.pop("__metadata__", None)
        for tensor in header.values():
            assert tensor["data_offsets"] == [end, end + math.prod(tensor["shape"]) * WIDTHS[tensor["dtype"]]]
            end = tensor["data_offsets"][1]
        widths = [WIDTHS[tensor["dtype"]] for tensor in header.values()]
        assert widths == sorted(widths, reverse=True)
        assert path.stat().st_size == 8 + header_length(path) + end


def test_the_metadata_of_2_5_has_the_published_config(written: Written) -> None:
    (path,) = written("2.5-bf16")
    metadata = read_header(path)["__metadata__"]
    assert metadata.keys() == {"config", "gemma_source_checkpoint", "license", "model_version"}
    assert len(metadata["config"]) == 2199
    assert hashlib.sha256(metadata["config"].encode()).hexdigest().startswith("13be9edf16635af9")


@pytest.mark.parametrize("name", [name for name, entry in FILES.items() if not entry.sharded and "vonk" not in name])
def test_the_config_in_the_metadata_is_that_of_the_release(name: str, written: Written) -> None:
    (path,) = written(name)
    described = json.loads(read_header(path)["__metadata__"]["config"])["transformer"]
    assert TransformerConfig.from_lightricks(described) == CONFIGS[FILES[name].release]


@pytest.mark.parametrize("name", [name for name, entry in FILES.items() if entry.sharded])
def test_the_config_and_the_index_describe_the_shards(name: str, written: Written) -> None:
    paths = written(name)
    assert len(paths) == 4
    config = json.loads((paths[0].parent / "config.json").read_text())
    assert TransformerConfig.from_diffusers(config) == CONFIGS[FILES[name].release]
    index = json.loads((paths[0].parent / "diffusion_pytorch_model.safetensors.index.json").read_text())
    sizes = 0
    for path in paths:
        header = read_header(path)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert header.keys() == {key for key, file in index["weight_map"].items() if file == path.name}
        assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
        sizes += path.stat().st_size - 8 - header_length(path)
    assert index["metadata"]["total_size"] == sizes


def test_the_superseded_nvfp4_file_differs_by_the_keyframes_tensor_and_the_list_of_layers(written: Written) -> None:
    newer, older = (tensors(written(name)) for name in ("2.5-nvfp4", "2.5-nvfp4-superseded"))
    assert newer.keys() - older.keys() == {PREFIX + "keyframes_abs_pos_embedding"}
    assert older.keys() < newer.keys()


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse.main([str(tmp_path), "2.5-int8"]) == 0
    assert capsys.readouterr().out.split() == ["2.5-int8", str(tmp_path / FILES["2.5-int8"].path)]
    assert sparse.main([str(tmp_path), "nothing"]) == 2
