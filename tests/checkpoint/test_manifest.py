"""weights_manifest.json fits its schema, lists every published file once, can back what it claims, and is packaged.

pytest tests/checkpoint/test_manifest.py
"""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import make_manifest
import pytest
from jsonschema import Draft202012Validator
from test_full_size import MODEL_HASHES, connectors_2_5, manifest_shapes, model_hash

from ltx2ref.checkpoint import manifest as reader
from ltx2ref.checkpoint.manifest import ManifestFile, files, find

ROOT = Path(__file__).parents[2]
MANIFEST = json.loads((ROOT / "weights_manifest.json").read_text(encoding="utf-8"))
CHECKPOINTS = json.loads((ROOT / "scripts/checkpoints.json").read_text(encoding="utf-8"))
SCHEMA = json.loads((ROOT / "tests/checkpoint/weights_manifest.schema.json").read_text(encoding="utf-8"))

Stored = dict[str, tuple[int, tuple[int, ...]]]  # bytes per number, shape
Key = tuple[str, str | None]  # name, revision

MISSING = object()
ROW = ("releases", "2.3", "tensors", "proj_out.weight")
BROKEN = {
    "another version": (("schema_version",), 1),
    "no files": (("files",), MISSING),
    "empty files": (("files",), []),
    "a file twice": (("files", 1), MANIFEST["files"][0]),
    "a key nobody knows": (("files", 0, "size"), 1),
    "a key left out": (("files", 0, "note"), MISSING),
    "bytes as text": (("files", 0, "bytes"), "43285058242"),
    "no bytes at all": (("files", 0, "bytes"), 0),
    "a fractional number of bytes": (("files", 0, "bytes"), 1.5),
    "half a sha256": (("files", 0, "sha256"), "4a51e70aad660e55648d6f0b8af15c8a"),
    "a sha256 in capitals": (("files", 0, "sha256"), "A" * 64),
    "a branch as revision": (("files", 0, "revision"), "main"),
    "a release nobody made": (("files", 0, "release"), "2.4"),
    "no evidence": (("files", 0, "evidence"), []),
    "evidence in other words": (("files", 0, "evidence"), ["somebody said so"]),
    "a repository without an owner": (("files", 0, "repository"), "LTX-2"),
    "a name with a gap": (("files", 0, "name"), "\u2026dynamic_bf16.safetensors"),
    "a release left out": (("releases", "2.5"), MISSING),
    "connectors left out": (("releases", "2.0", "foreign", "connectors"), MISSING),
    "a total left out": (("releases", "2.0", "totals", "bytes"), MISSING),
    "a dtype no file has": ((*ROW, "dtype"), "F16"),
    "an empty dimension": ((*ROW, "shape"), [128, 0]),
    "no diffusers name": ((*ROW, "diffusers"), MISSING),
}


# ---------------------------------------------------------------- its form
def test_the_manifest_fits_its_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator(SCHEMA).validate(MANIFEST)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "value"), BROKEN.values(), ids=BROKEN)
def test_a_broken_manifest_does_not_fit(path: tuple[str | int, ...], value: Any) -> None:
    broken = copy.deepcopy(MANIFEST)
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    if value is MISSING:
        del place[path[-1]]
    assert not Draft202012Validator(SCHEMA).is_valid(broken)


def test_every_file_takes_one_line() -> None:
    lines = (ROOT / "weights_manifest.json").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines if '"repository"' in line] == MANIFEST["files"]


# ---------------------------------------------------------------- its files
def test_repository_name_and_revision_tell_every_file_from_the_others() -> None:
    assert len({(f.repository, f.name, f.revision) for f in files()}) == len(files()) == len(MANIFEST["files"])


@pytest.mark.parametrize("entry", CHECKPOINTS, ids=lambda entry: entry["file"].rpartition("/")[2])
def test_every_known_checkpoint_is_listed_with_its_facts(entry: dict[str, Any]) -> None:
    (listed,) = [
        f
        for f in files()
        if (f.repository, f.name) == (entry["repo"], entry["file"])
        and (f.revision is None) == (entry["revision_note"] is None)
    ]
    keys = ("bytes", "sha256", "format", "contents", "tensors")
    assert [getattr(listed, key) for key in keys] == [entry[key] for key in keys]
    assert int(listed.evidence[0].split()[0]) == entry["independent_sources"]
    assert f"@{listed.revision} ({listed.note})" == (entry["revision_note"] or "@None (None)")


def test_a_superseded_file_has_its_revision_and_a_note() -> None:
    superseded = {(f.name.rpartition("/")[2], f.revision, f.note) for f in files() if "superseded" in (f.note or "")}
    assert superseded == {
        ("ltx-2.5-22b-distilled-transformer-nvfp4.safetensors", "8a4ff96f", "2026-08-12, superseded"),
        ("gemma4-12b-with-proj-ltx-2.5-bf16.safetensors", "8a4ff96f", "superseded"),
        ("gemma4-12b-with-proj-ltx-2.5-comfy-int8-convrot.safetensors", "8a4ff96f", "superseded"),
    }


def test_a_file_is_of_the_release_that_its_repository_and_name_state() -> None:
    for file in files():
        stated = set(re.findall(r"19b|2\.[35]", file.repository + file.name))
        assert stated <= {"19b" if file.release == "2.0" else file.release}, file


# ---------------------------------------------------------------- its evidence
def bf16() -> Stored:
    shapes = manifest_shapes("2.5") | connectors_2_5()
    return {name: (4 if "scale_shift_table" in name else 2, shape) for name, shape in shapes.items()}


def linears(stored: Stored, blocks: str) -> Iterator[tuple[str, int, int]]:
    """Return name, output width and input width of every layer in these blocks except the gates."""
    for name, (_, shape) in stored.items():
        if re.match(blocks, name) and name.endswith(".weight") and len(shape) == 2 and "to_gate_logits" not in name:
            yield name.removesuffix(".weight"), *shape


def int8() -> Stored:
    """Return the sizes for all blocks: a byte for each weight, a float32 scale for each row, and 72 bytes of JSON."""
    stored = bf16()
    for name, out, width in linears(bf16(), r"transformer_blocks|\w+_connector\.transformer_1d_blocks"):
        stored |= {
            f"{name}.weight": (1, (out, width)),
            f"{name}.weight_scale": (4, (out, 1)),
            f"{name}.comfy_quant": (1, (72,)),
        }
    return stored


def nvfp4() -> Stored:
    """Return the sizes for any 42 blocks: two weights in a byte, a byte of scale for 16 weights, and two scalars."""
    stored = bf16()
    for name, out, width in linears(bf16(), r"transformer_blocks\.([0-9]|[123][0-9]|4[01])\."):
        stored |= {
            f"{name}.weight": (1, (out, width // 2)),
            f"{name}.weight_scale": (1, (out, width // 16)),
            f"{name}.weight_scale_2": (4, ()),
            f"{name}.input_scale": (4, ()),
        }
    return stored


def nvfp4_of_august() -> Stored:
    return {name: tensor for name, tensor in nvfp4().items() if name != "keyframes_abs_pos_embedding"}


def of_2_5(name: str, revision: str | None = None) -> Key:
    return f"diffusion_models/ltx-2.5-22b-{name}.safetensors", revision


INT8_HASH = "57343d320cac0bbba58a488b8ebe7187"
# The contents of the file, the length of its header, and the published md5 of all its names and shapes.
LAYOUTS: dict[Key, tuple[Callable[[], Stored], int, str | None]] = {
    of_2_5("dev-transformer-bf16"): (bf16, 677_616, MODEL_HASHES["2.5"]),
    of_2_5("distilled-transformer-bf16"): (bf16, 677_616, MODEL_HASHES["2.5"]),
    of_2_5("dev-transformer-comfy-int8-convrot"): (int8, 1_086_120, INT8_HASH),
    of_2_5("distilled-transformer-comfy-int8-convrot"): (int8, 1_086_120, INT8_HASH),
    of_2_5("distilled-transformer-nvfp4"): (nvfp4, 1_287_600, None),
    of_2_5("distilled-transformer-nvfp4", "8a4ff96f"): (nvfp4_of_august, 1_179_408, None),
}
# The quantised layers, with two scales each, in a file that holds everything.
QUANTISED: dict[Key, int] = {
    ("ltx-2.3-22b-dev.safetensors", None): 0,
    ("ltx-2.3-22b-distilled.safetensors", None): 0,
    ("ltx-2.3-22b-distilled-1.1.safetensors", None): 0,
    ("ltx-2.3-22b-dev-fp8.safetensors", None): 1496,
    ("ltx-2.3-22b-distilled-fp8.safetensors", None): 1462,
}
# Tensors of the video VAE, the audio VAE, the vocoder and the text projection in such a file.
OTHER_TENSORS = 170 + 102 + 1227 + 4


def backed(evidence: str) -> set[Key]:
    return {(f.name, f.revision) for f in files() if evidence in f.evidence}


def entry(key: Key) -> ManifestFile:
    (found,) = [f for f in files() if (f.name, f.revision) == key]
    return found


def test_nothing_is_called_verified_but_what_is_verified_below() -> None:
    assert backed("bytes verified") == set(LAYOUTS)
    assert backed("model hash verified") == {key for key, (_, _, md5) in LAYOUTS.items() if md5}
    assert backed("tensors verified") == {*LAYOUTS, *QUANTISED}


@pytest.mark.parametrize("key", LAYOUTS, ids=lambda key: key[0].split("22b-")[1] + (key[1] or ""))
def test_the_rows_of_2_5_account_for_every_tensor_and_byte_of_its_files(key: Key) -> None:
    layout, header, md5 = LAYOUTS[key]
    stored = layout()
    assert len(stored) == entry(key).tensors
    assert 8 + header + sum(size * math.prod(shape) for size, shape in stored.values()) == entry(key).bytes
    prefixed = {MANIFEST["prefix"] + name: shape for name, (_, shape) in stored.items()}
    assert md5 is None or model_hash(prefixed) == md5


@pytest.mark.parametrize("key", QUANTISED, ids=lambda key: key[0])
def test_the_rows_of_2_3_account_for_every_tensor_of_its_files(key: Key) -> None:
    release = MANIFEST["releases"]["2.3"]
    transformer = release["totals"]["tensors"] + release["foreign"]["connectors"]["tensors"]
    assert transformer + OTHER_TENSORS + 2 * QUANTISED[key] == entry(key).tensors


@pytest.mark.parametrize(
    ("release", "widths", "layers", "gated"),
    [("2.0", (3840, 3840), 2, 0), ("2.3", (4096, 2048), 8, 1), ("2.5", (4096, 2048), 8, 1)],
)
def test_the_connectors_are_as_large_as_their_layers(
    release: str, widths: tuple[int, int], layers: int, gated: int
) -> None:
    # 128 registers. In a layer: 4 projections, 2 norms and a gate of 32 heads; a feed-forward, 4 times as wide.
    tensors = [1 + layers * (8 + 2 + 2 * gated + 4) for _ in widths]
    parameters = [
        128 * d + layers * (4 * d * (d + 1) + 2 * d + gated * 32 * (d + 1) + 8 * d * d + 5 * d) for d in widths
    ]
    connectors = MANIFEST["releases"][release]["foreign"]["connectors"]
    assert connectors == {"tensors": sum(tensors), "parameters": sum(parameters)}


@pytest.mark.parametrize(
    ("name", "changed", "others"),
    [
        ("ltx-2-19b-distilled-lora-384.safetensors", "", 1),  # adds the text projection
        ("ltx-2.3-22b-distilled-lora-384.safetensors", "", 0),
        ("ltx-2.3-22b-distilled-lora-384-1.1.safetensors", "", 0),
        ("loras/ltx-2.5-22b-distilled-lora-450-bf16.safetensors", "", 0),
        ("ltx-2.5-22b-ic-lora-pixel-spatial-upscaler-x2-1.0.safetensors", r"\S+\.\d+\.(attn[12]\.to_[qkvo]|ff\.)", 0),
    ],
)
def test_a_lora_has_two_tensors_for_every_layer_it_changes(name: str, changed: str, others: int) -> None:
    file = entry((name, "5863fdef3eaa8b2d69fa22e259a1d75fede215dd" if changed else None))
    layers = [
        layer
        for layer, shape in manifest_shapes(file.release).items()
        if re.match(changed, layer) and layer.endswith(".weight") and len(shape) == 2
    ]
    assert file.tensors == 2 * (len(layers) + others)


# ---------------------------------------------------------------- finding a file
def names(found: list[ManifestFile]) -> list[str]:
    return [f.name.rpartition("/")[2] for f in found]


def test_size_alone_leaves_every_file_of_that_size() -> None:
    both = ["ltx-2.5-22b-dev-transformer-bf16.safetensors", "ltx-2.5-22b-distilled-transformer-bf16.safetensors"]
    assert names(find(42_018_190_584)) == names(find(42_018_190_584, tensors=4349)) == both
    assert find(42_018_190_583) == []


def test_the_sha256_tells_two_files_of_one_size_apart() -> None:
    distilled = "31eb3cad89b9e54e99dd3baf286f70825ac4f6c660a70d9184d895be76d7bff4"
    assert names(find(42_018_190_584, 4349, distilled)) == ["ltx-2.5-22b-distilled-transformer-bf16.safetensors"]


def test_one_fact_that_contradicts_rules_a_file_out() -> None:
    (lora,) = [f for f in files() if f.name.endswith("lora-384.safetensors") and f.release == "2.0"]
    assert lora.bytes is not None
    assert find(lora.bytes, lora.tensors, lora.sha256) == [lora]
    assert find(lora.bytes, 2743, lora.sha256) == find(lora.bytes, lora.tensors, "0" * 64) == []


def test_a_fact_not_known_of_a_file_rules_nothing_out() -> None:
    assert len(find(327_309_305)) == len(find(327_309_305, 960, "0" * 64)) == 3


def test_a_file_of_unknown_size_is_never_found() -> None:
    unknown = {f.name for f in files() if f.bytes is None}
    assert unknown >= {"ltx-2-19b-dev-fp4.safetensors", "ltx-2.5-22b-pt-bf16.safetensors"}
    assert not unknown & {f.name for size in {f.bytes for f in files() if f.bytes} for f in find(size)}


# ---------------------------------------------------------------- where it is read from
@pytest.mark.parametrize(
    ("present", "version"),
    [({"ltx2ref": 1, ".": 2}, 1), ({".": 2}, 2), ({}, None)],
    ids=["installed", "checkout", "only the folder"],
)
def test_the_packages_own_manifest_comes_first_and_none_is_needed(
    present: dict[str, int], version: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ltx2ref").mkdir()
    for folder, number in present.items():
        text = json.dumps({"schema_version": number, "files": MANIFEST["files"][:number]})
        (tmp_path / folder / "weights_manifest.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(reader, "PACKAGE_FOLDER", tmp_path / "ltx2ref")
    reader.manifest.cache_clear()
    try:
        assert (reader.manifest().get("schema_version"), len(files())) == (version, version or 0)
        assert len(find(43_285_058_242)) == (version is not None)
    finally:
        reader.manifest.cache_clear()


def test_the_reader_and_the_script_name_the_same_facts() -> None:
    assert ManifestFile._fields == make_manifest.File._fields


def build(target: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy everything that is built, caches included, because the tree may change while the tests run."""
    copied = tmp_path_factory.mktemp("checkout")
    for name in (".gitignore", "LICENSE", "README.md", "pyproject.toml", "weights_manifest.json"):
        shutil.copy(ROOT / name, copied)
    shutil.copytree(ROOT / "ltx2ref", copied / "ltx2ref")
    return copied


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_manifest_the_licence_and_nothing_else(checkout: Path, wheel: Path) -> None:
    paths = [path.relative_to(checkout) for path in (checkout / "ltx2ref").rglob("*") if path.is_file()]
    expected = {
        path.as_posix(): (checkout / path).read_bytes()
        for path in paths
        if not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }
    assert {"ltx2ref/py.typed", "ltx2ref/parity/reference/recording.json"} < set(expected)
    expected |= {f"ltx2ref/{name}": (ROOT / name).read_bytes() for name in ("weights_manifest.json", "LICENSE")}
    found = contents(wheel)
    assert sorted(found) == sorted(expected)
    assert found == expected


@pytest.mark.slow
def test_the_wheel_of_the_source_distribution_is_the_same(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build("sdist", checkout, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    assert again.name == wheel.name and contents(again) == contents(wheel)


@pytest.mark.slow
def test_an_installed_package_reads_the_manifest_that_came_with_it(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "from ltx2ref.checkpoint import manifest as m; print(m.__file__, len(m.files()), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    place, count = done.stdout.split("\n")[:2]
    assert Path(place).is_relative_to(tmp_path) and int(count) == len(MANIFEST["files"])
