"""`ltx2ref convert` and `save` write what they were given, bit for bit, in either dialect, and all of it or nothing.

pytest tests/checkpoint/test_convert.py
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sparse
import torch
import writers
from safetensors import safe_open
from tiny import RELEASES, random_model, tiny_config
from torch import Tensor
from writers import PREFIX, State, lightricks_metadata, original_name, prefixed

from ltx2ref import CheckpointError, ConfigError, LTX2VideoTransformer3DModel, TransformerConfig, cli, load, save, whole
from ltx2ref.checkpoint import convert as converting
from ltx2ref.checkpoint import save as saving
from ltx2ref.checkpoint.convert import convert
from ltx2ref.checkpoint.match import make_plan
from ltx2ref.checkpoint.storage import TensorFile

ROOT = Path(__file__).parents[2]
WIDTHS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
Raw = dict[str, tuple[str, list[int], bytes]]  # dtype, shape, bytes


# ---------------------------------------------------------------- helpers, which use nothing of ltx2ref
def header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON, and the byte at which the data begins."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def metadata(path: Path) -> dict[str, str]:
    found: dict[str, str] = header(path)[0]["__metadata__"]
    return found


def raw(path: Path) -> Raw:
    """Return every tensor of a file, or of all files of a folder, as it is stored."""
    if path.is_dir():
        return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in raw(file).items()}
    entries, begin = header(path)
    data, found = path.read_bytes()[begin:], {}
    for name, entry in entries.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            found[name] = (entry["dtype"], entry["shape"], data[start:stop])
    return found


def in_file(state: State) -> Raw:
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    return {name: (names[x.dtype], list(x.shape), bits(x).numpy().tobytes()) for name, x in state.items()}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(INTEGERS[x.dtype.itemsize])


def same_bits(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


def random_bits(release: str) -> tuple[State, TransformerConfig]:
    """Return random bits, including NaNs with payloads, in the published dtypes: float32 for tables, else bfloat16."""
    config, generator = tiny_config(release), torch.Generator().manual_seed(7)
    state = {}
    for name, x in writers.cast(random_model(config).state_dict(), torch.bfloat16).items():
        words = torch.randint(-(2**15), 2**15, (x.numel() * x.itemsize // 2,), generator=generator).to(torch.int16)
        state[name] = words.view(x.dtype).reshape(x.shape)
    assert sum(int(x.isnan().sum()) for x in state.values()) > 100
    return state, config


def official(path: Path, release: str) -> tuple[State, TransformerConfig]:
    """Write a tiny file of random bits in the form of Lightricks' own file of a release."""
    state, config = random_bits(release)
    foreign = prefixed(writers.connectors()) | (writers.other_models(release) if release != "2.5" else {})
    writers.save(path, writers.renamed(state) | foreign, lightricks_metadata(config))
    return state, config


def tiny_file(path: Path) -> Path:
    config = tiny_config("2.3")
    writers.write_transformer_only(path, random_model(config).state_dict(), config)
    return path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---------------------------------------------------------------- the same bits
@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_lightricks_to_diffusers_and_back_is_the_same_bits_under_the_published_names(
    release: str, tmp_path: Path
) -> None:
    state, _ = official(tmp_path / "a.safetensors", release)
    convert(tmp_path / "a.safetensors", tmp_path / "b", dialect="diffusers")
    convert(tmp_path / "b", tmp_path / "c.safetensors", dialect="lightricks")
    convert(tmp_path / "c.safetensors", tmp_path / "d", dialect="diffusers")
    theirs = {
        name: value
        for name, value in raw(tmp_path / "a.safetensors").items()
        if name.startswith(PREFIX) and "connector" not in name
    }
    assert raw(tmp_path / "b") == raw(tmp_path / "d") == in_file(state)
    assert raw(tmp_path / "c.safetensors") == theirs
    assert (tmp_path / "b/config.json").read_bytes() == (tmp_path / "d/config.json").read_bytes()


@pytest.mark.diffusers
@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("limit", [None, "200KB"])
def test_diffusers_loads_the_folder_bit_by_bit(release: str, limit: str | None, tmp_path: Path) -> None:
    from diffusers import LTX2VideoTransformer3DModel as DiffusersModel

    state, _ = random_bits(release)
    config = tiny_config(release)
    writers.save(tmp_path / "a.safetensors", writers.renamed(state), lightricks_metadata(config))
    convert(tmp_path / "a.safetensors", tmp_path / "mixed", dialect="diffusers", max_shard_size=limit)
    wide = DiffusersModel.from_pretrained(str(tmp_path / "mixed"), torch_dtype=torch.float32)
    assert same_bits(wide.state_dict(), {name: x.float() for name, x in state.items()})
    convert(tmp_path / "a.safetensors", tmp_path / "b", dialect="diffusers", max_shard_size=limit, dtype=torch.bfloat16)
    theirs = DiffusersModel.from_pretrained(str(tmp_path / "b"), torch_dtype=torch.bfloat16)
    assert same_bits(theirs.state_dict(), {name: x.to(torch.bfloat16) for name, x in state.items()})
    said = TransformerConfig.from_diffusers(theirs.config)
    assert replace(said, vae_scale_factors=tuple(said.vae_scale_factors)) == config


@pytest.mark.slow
@pytest.mark.ltx_core
@pytest.mark.parametrize("release", ["2.0", "2.3"])  # ltx-core 1.0.0 has no 2.5
def test_ltx_core_loads_the_lightricks_file_strictly_by_its_own_config(release: str, tmp_path: Path) -> None:
    from ltx_core.model.transformer.model_configurator import LTXModelConfigurator

    model = random_model(tiny_config(release))
    save(model, tmp_path / "a.safetensors", dialect="lightricks")
    with safe_open(tmp_path / "a.safetensors", "pt") as file, torch.device("meta"):
        theirs = LTXModelConfigurator.from_config(json.loads(file.metadata()["config"]))
        stored = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    theirs.load_state_dict(stored, strict=True, assign=True)
    assert same_bits(theirs.state_dict(), {original_name(name): x for name, x in model.state_dict().items()})


def test_every_tensor_is_aligned_and_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3"))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.to([torch.bfloat16, torch.float32, torch.float64][i % 3])
    assert any(parameter.nbytes % 8 for parameter in model.parameters())
    save(model, tmp_path / "a")
    file = tmp_path / "a/diffusion_pytorch_model.safetensors"
    entries, begin = header(file)
    assert entries.pop("__metadata__") == {"format": "pt"}
    assert all((begin + entry["data_offsets"][0]) % WIDTHS[entry["dtype"]] == 0 for entry in entries.values())
    with safe_open(file, "pt") as opened:
        assert same_bits({name: opened.get_tensor(name) for name in entries}, model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dialect", ["diffusers", "lightricks"])
def test_with_a_dtype_the_result_is_what_load_gives(dtype: torch.dtype, dialect: str, tmp_path: Path) -> None:
    official(tmp_path / "a.safetensors", "2.5")
    destination = tmp_path / ("b" if dialect == "diffusers" else "b.safetensors")
    convert(tmp_path / "a.safetensors", destination, dialect=dialect, dtype=dtype)
    here, there = load(tmp_path / "a.safetensors", dtype=dtype), load(destination)
    assert same_bits(here.state_dict(), there.state_dict()) and here.config == there.config
    assert {stored for stored, _, _ in raw(destination).values()} == {saving.STORED[dtype]}


# ---------------------------------------------------------------- shards
@pytest.mark.slow
@pytest.mark.parametrize("limit", ["50KB", "120 kb", "200000", 4 * 10**5, "0.3MB"])
def test_no_shard_is_larger_than_asked_for_unless_it_is_one_tensor(limit: str | int, tmp_path: Path) -> None:
    state, _ = official(tmp_path / "a.safetensors", "2.3")
    convert(tmp_path / "a.safetensors", tmp_path / "b", dialect="diffusers", max_shard_size=limit)
    most = {"50KB": 50_000, "120 kb": 120_000, "200000": 200_000, "0.3MB": 300_000}.get(str(limit), 4 * 10**5)
    index = json.loads((tmp_path / "b/diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    n = len(files)
    assert [file.name for file in files] == [
        f"diffusion_pytorch_model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)
    ]
    assert all(file.stat().st_size <= most or len(raw(file)) == 1 for file in files)
    assert n <= 2 + 2 * sum(file.stat().st_size for file in files) / most  # and there are no more shards than necessary
    assert index["weight_map"] == {name: file.name for file in files for name in raw(file)}
    assert index["metadata"] == {"total_size": sum(x.nbytes for x in state.values())}
    assert raw(tmp_path / "b") == in_file(state)
    assert same_bits(load(tmp_path / "b").state_dict(), load(tmp_path / "a.safetensors").state_dict())


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path: Path) -> None:
    model = random_model(tiny_config("2.0"))
    save(model, tmp_path / "a", max_shard_size="5KB")
    files = [raw(file) for file in (tmp_path / "a").glob("*.safetensors")]
    assert any(len(file) == 1 and len(data) > 5000 for file in files for _, _, data in file.values())
    assert same_bits(load(tmp_path / "a").state_dict(), model.state_dict())


def test_one_shard_is_one_plain_file_as_in_diffusers(tmp_path: Path) -> None:
    save(random_model(tiny_config("2.0")), tmp_path / "a", max_shard_size="5GB")
    assert listing(tmp_path / "a") == ["config.json", "diffusion_pytorch_model.safetensors"]


# ---------------------------------------------------------------- save
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dialect", ["diffusers", "lightricks"])
@pytest.mark.parametrize("release", RELEASES)
def test_a_saved_model_loads_as_the_same_model(release: str, dialect: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, path = random_model(tiny_config(release), dtype), tmp_path / "a.safetensors"
    path = path if dialect == "lightricks" else tmp_path / "a"
    save(model, path, dialect=dialect)
    again = load(path)
    assert same_bits(again.state_dict(), model.state_dict()) and again.config == model.config
    assert {"argument", "default of the release", "shapes"}.isdisjoint(make_plan(path).origins.values())


def test_each_parameter_is_saved_in_its_own_dtype_wherever_its_bytes_lie(tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3"))
    for i, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.to([torch.bfloat16, torch.float32, torch.float16, torch.float64][i % 4])
        if parameter.ndim == 2:
            parameter.data = parameter.data.t().contiguous().t()
    save(model, tmp_path / "a")
    assert raw(tmp_path / "a") == in_file(model.state_dict())


def broken(what: str) -> LTX2VideoTransformer3DModel:
    model = random_model(tiny_config("2.0"))
    if what == "missing":
        del model.proj_in.bias
    elif what == "unknown":
        model.proj_in.extra = torch.nn.Parameter(torch.zeros(3))
    elif what == "resized":
        model.proj_in.bias = torch.nn.Parameter(torch.zeros(3))
    elif what == "float8":
        model.proj_in.bias.data = model.proj_in.bias.data.to(torch.float8_e4m3fn)
    else:
        model.proj_in.to("meta")
    return model


@pytest.mark.parametrize(
    "what, said",
    [
        ("missing", "proj_in.bias: the model has none, its config expects [52]"),
        ("unknown", "proj_in.extra: the model has [3], its config expects none"),
        ("resized", "proj_in.bias: the model has [3], its config expects [52]"),
        ("float8", "proj_in.bias: the model has torch.float8_e4m3fn on cpu, its config expects [52]"),
        ("meta", "proj_in.bias: the model has torch.float32 on meta, its config expects [52]"),
    ],
)
def test_a_model_that_could_not_be_loaded_is_not_saved(what: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        save(broken(what), tmp_path / "a")
    assert said in caught.value.problems
    assert listing(tmp_path) == []


def test_a_config_that_lightricks_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3", audio_gated_attn=False))
    with pytest.raises(ConfigError, match="audio_gated_attn"):
        save(model, tmp_path / "a.safetensors", dialect="lightricks")
    assert listing(tmp_path) == []


# ---------------------------------------------------------------- config and metadata
@pytest.mark.parametrize("release", RELEASES)
def test_lightricks_to_lightricks_keeps_all_metadata_as_they_are(release: str, tmp_path: Path) -> None:
    official(tmp_path / "a.safetensors", release)
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dialect="lightricks", dtype=torch.float16)
    assert metadata(tmp_path / "b.safetensors") == metadata(tmp_path / "a.safetensors")
    assert report.left_out == []


def test_keys_of_lightricks_that_nobody_knows_are_kept(tmp_path: Path) -> None:
    state, config = random_bits("2.3")
    said = lightricks_metadata(config)
    described = json.loads(said["config"])
    described["transformer"]["from_the_future"] = {"a": [1, 2.50, None]}
    said |= {"config": json.dumps(described, indent=1), "note": "b"}
    writers.save(tmp_path / "a.safetensors", writers.renamed(state), said)
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dialect="lightricks")
    assert metadata(tmp_path / "b.safetensors") == said
    report = convert(tmp_path / "a.safetensors", tmp_path / "c", dialect="diffusers")
    assert {"config.transformer.from_the_future", "metadata note"} <= {*report.left_out}


def test_a_config_that_its_tensors_corrected_is_written_corrected(tmp_path: Path) -> None:
    state, config = random_bits("2.5")
    del state["keyframes_abs_pos_embedding"]  # as in a published file of 2.5
    writers.save(tmp_path / "a.safetensors", writers.renamed(state), lightricks_metadata(config))
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dialect="lightricks")
    assert any("use_keyframes_abs_pos_embedding" in note for note in report.assumed)
    before, after = (json.loads(metadata(tmp_path / f"{name}.safetensors")["config"]) for name in "ab")
    before["transformer"]["use_keyframes_abs_pos_embedding"] = False
    assert before == after and make_plan(tmp_path / "b.safetensors").notes == []


def test_diffusers_to_diffusers_keeps_the_private_keys_of_its_config(tmp_path: Path) -> None:
    state, config = random_bits("2.3")
    writers.save(tmp_path / "a/diffusion_pytorch_model.safetensors", state, {"format": "pt", "note": "b"})
    said = writers.diffusers_config(config) | {"_name_or_path": "somewhere"}
    writers.write_json(tmp_path / "a/config.json", said)
    report = convert(tmp_path / "a", tmp_path / "b", dialect="diffusers")
    assert (tmp_path / "b/config.json").read_bytes() == (tmp_path / "a/config.json").read_bytes()
    assert metadata(tmp_path / "b/diffusion_pytorch_model.safetensors") == {"format": "pt", "note": "b"}
    assert report.left_out == []


def test_what_the_other_dialect_cannot_hold_is_named(tmp_path: Path) -> None:
    state, config = official(tmp_path / "a.safetensors", "2.5")
    report = convert(tmp_path / "a.safetensors", tmp_path / "b", dialect="diffusers")
    extra = [f"config.transformer.{key}" for key in writers.CONNECTOR_KEYS_2_3]
    assert sorted(report.left_out) == sorted(
        ["metadata gemma_source_checkpoint", "metadata license", "metadata model_version", "config.scheduler", *extra]
    )
    connectors = {name: x for name, x in writers.connectors().items() if name.startswith("video")}
    held = {"tensors": len(connectors), "bytes": sum(x.nbytes for x in connectors.values())}
    assert report.foreign[PREFIX + "video_embeddings_connector."] == held
    writers.write_diffusers(tmp_path / "c", state, config)
    report = convert(tmp_path / "c", tmp_path / "d.safetensors", dialect="lightricks")
    assert report.left_out == ["config.json._diffusers_version"]
    assert metadata(tmp_path / "d.safetensors").keys() == {"config"}


def test_a_config_of_another_class_and_the_metadata_of_shards_are_left_out_by_name(tmp_path: Path) -> None:
    state, config = random_bits("2.3")
    writers.save(tmp_path / "a/model.safetensors", writers.renamed(state, prefix=""))
    writers.write_json(tmp_path / "a/config.json", {"_class_name": "LTX2Transformer3DModel", "x": 1})
    report = convert(tmp_path / "a", tmp_path / "b.safetensors", dialect="lightricks")
    assert report.left_out == ["config.json"]
    writers.write_diffusers(tmp_path / "c", state, config, shards=2)
    shard = tmp_path / "c" / writers.shard_name(1, 2)
    with safe_open(shard, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    writers.save(shard, tensors, {"format": "pt", "note": "b"})
    assert convert(tmp_path / "c", tmp_path / "d", dialect="diffusers").left_out == ["metadata note"]


def test_what_was_assumed_about_the_source_is_said(tmp_path: Path) -> None:
    state, config = random_bits("2.3")
    writers.write_transformer_only(tmp_path / "a.safetensors", state, config, metadata=False)
    report = convert(tmp_path / "a.safetensors", tmp_path / "b", dialect="diffusers")
    assert len(report.assumed) == 1 and "nothing in the checkpoint says" in report.assumed[0]


# ---------------------------------------------------------------- quantised sources
QUANTISED: dict[str, tuple[Callable[..., State], str, str]] = {
    "fp8 scaled": (writers.write_fp8_scaled, "2.3", ""),
    "fp8 cast": (writers.write_fp8_cast, "2.3", ""),
    "int8 ConvRot": (writers.write_int8_convrot, "2.5", ""),
    "nvfp4": (writers.write_nvfp4, "2.5", ""),
    "Q8_0": (writers.write_gguf, "2.3", ".gguf"),
}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("quantised"), {}
    for name, (write, release, suffix) in QUANTISED.items():
        config = writers.quantisable_config(release, num_layers=1)
        paths[name] = folder / (name.replace(" ", "-") + (suffix or ".safetensors"))
        write(paths[name], random_model(config).state_dict(), config)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_source_needs_a_dtype_which_is_a_plain_one(
    name: str, quantised: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=rf"quantised as .*{name}.*--dtype"):
        convert(quantised[name], tmp_path / "a", dialect="diffusers")
    with pytest.raises(ValueError, match=r"dtype: expected one of torch.bfloat16, .*, got torch.float8_e4m3fn"):
        convert(quantised[name], tmp_path / "a", dialect="diffusers", dtype=torch.float8_e4m3fn)
    assert listing(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_source_is_decoded_as_load_does(
    name: str, dtype: torch.dtype, quantised: dict[str, Path], tmp_path: Path
) -> None:
    report = convert(quantised[name], tmp_path / "a.safetensors", dialect="lightricks", dtype=dtype)
    assert same_bits(load(tmp_path / "a.safetensors").state_dict(), load(quantised[name], dtype=dtype).state_dict())
    plan, written = make_plan(quantised[name]), metadata(tmp_path / "a.safetensors")
    assert json.loads(written.pop("config")) == json.loads(plan.source.metadata["config"])
    left_out = {"_quantization_metadata", "general.architecture"}
    assert written == {key: text for key, text in plan.source.metadata.items() if key not in {"config", *left_out}}
    assert report.left_out == [f"metadata {key}" for key in plan.source.metadata if key in left_out]


def test_a_gguf_file_without_quantised_tensors_keeps_its_bits(tmp_path: Path) -> None:
    config = writers.quantisable_config("2.3", num_layers=1)
    truth = writers.write_gguf(
        tmp_path / "a.gguf",
        random_model(config).state_dict(),
        config,
        types=lambda name, x: "F32" if x.ndim == 1 else "BF16",
    )
    convert(tmp_path / "a.gguf", tmp_path / "b", dialect="diffusers")
    assert raw(tmp_path / "b") == in_file(truth)


# ---------------------------------------------------------------- all or nothing
@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("dialect", ["diffusers", "lightricks"])
def test_an_interruption_leaves_nothing(
    dialect: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls, read = tiny_file(tmp_path / "a.safetensors"), [0], TensorFile.read

    def interrupted(file: TensorFile, start: int, stop: int, name: str) -> bytearray:
        calls[0] += 1
        if calls[0] == 50:
            assert any(".partial" in path for path in listing(tmp_path))  # otherwise the test shows nothing
            raise error
        return read(file, start, stop, name)

    monkeypatch.setattr(TensorFile, "read", interrupted)
    with pytest.raises(error):
        convert(source, tmp_path / ("b" if dialect == "diffusers" else "b.safetensors"), dialect=dialect)
    assert listing(tmp_path) == ["a.safetensors"]


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from ltx2ref import cli
from ltx2ref.checkpoint.storage import TensorFile
read = TensorFile.read
def slow(*arguments):
    time.sleep(0.1)
    return read(*arguments)
TensorFile.read = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, dialect", [(signal.SIGTERM, "diffusers"), (signal.SIGINT, "lightricks")])
def test_a_signal_leaves_nothing(number: signal.Signals, dialect: str, tmp_path: Path) -> None:
    source, destination = tiny_file(tmp_path / "a.safetensors"), "b" if dialect == "diffusers" else "b.safetensors"
    command = [sys.executable, "-c", SLOW, "convert", str(source), str(tmp_path / destination), "--to", dialect]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.glob(".*.partial/*")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    assert list(tmp_path.glob(".*.partial/*"))
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number and said == ""
    assert listing(tmp_path) == ["a.safetensors"]


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Return every file, link and folder, except for what is being written."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if ".partial" not in str(path)
    }


@pytest.mark.slow
@pytest.mark.parametrize("there", ["a file", "a folder", "an empty folder", "a dangling link"])
@pytest.mark.parametrize("dialect", ["diffusers", "lightricks"])
@pytest.mark.parametrize("late", [False, True])
def test_what_is_there_is_never_touched(
    there: str, dialect: str, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = tiny_file(tmp_path / "a.safetensors"), dict[str, bytes | str | None]()
    destination = tmp_path / ("b" if dialect == "diffusers" else "b.safetensors")

    def occupy(folder: Path | None = None) -> None:
        if there == "a file":
            destination.write_bytes(b"precious")
        elif there == "a dangling link":
            destination.symlink_to("nowhere")
        else:
            destination.mkdir()
            if there == "a folder":
                (destination / "config.json").write_bytes(b"precious")
        expected.update(snapshot(tmp_path))

    if late:
        monkeypatch.setattr(whole, "sync", occupy)  # happens before the destination is looked at again
    else:
        occupy()
        monkeypatch.setattr(converting, "make_plan", None)  # happens before any work
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, destination, dialect=dialect)
    assert snapshot(tmp_path) == expected and str(destination) in expected
    assert not any(".partial" in path for path in listing(tmp_path))


def test_a_source_that_changes_after_it_was_read_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, put = tiny_file(tmp_path / "a.safetensors"), saving.put

    def changing(path: Path, content: Any) -> None:
        put(path, content)
        os.utime(source, (1, 1))

    monkeypatch.setattr(saving, "put", changing)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        convert(source, tmp_path / "b.safetensors", dialect="lightricks")
    assert listing(tmp_path) == ["a.safetensors"]


def test_a_disk_without_room_is_noticed_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_file(tmp_path / "a.safetensors")
    convert(source, tmp_path / "b.safetensors", dialect="lightricks")
    size = (tmp_path / "b.safetensors").stat().st_size
    usage = type(saving.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage(2 * size, size + 1, size - 1))
    monkeypatch.setattr(TensorFile, "read", None)
    with pytest.raises(CheckpointError, match=f"needs {size:,} bytes, but the disk has only {size - 1:,} free"):
        convert(source, tmp_path / "c.safetensors", dialect="lightricks")
    assert listing(tmp_path) == ["a.safetensors", "b.safetensors"]


def test_a_disk_that_fills_up_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"b: cannot be written: No space left on device"):
        save(random_model(tiny_config("2.0")), tmp_path / "b")
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "name, dialect, limit, said",
    [
        ("b", "comfy", None, "dialect = 'comfy': expected diffusers or lightricks"),
        ("b", "lightricks", None, "expected the name of a .safetensors file"),
        ("b.safetensors", "diffusers", None, "expected the name of a folder"),
        ("no/b", "diffusers", None, "there is no folder"),
        ("b.safetensors", "lightricks", "5GB", "expected none, lightricks is one file"),
        *(
            ("b", "diffusers", limit, "expected bytes, or a size like 5GB")
            for limit in ("", "0GB", 0, -1, "1.2.3GB", "5 bytes", "GB", "1e9", True, ".")
        ),
    ],
)
def test_a_destination_that_cannot_be_meant_is_refused(
    name: str, dialect: str, limit: str | int | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        convert(tmp_path / "source", tmp_path / name, dialect=dialect, max_shard_size=limit)
    assert listing(tmp_path) == []


# ---------------------------------------------------------------- memory
PEAK = """
import resource, sys
from pathlib import Path
import torch
from ltx2ref.checkpoint.convert import convert
torch.set_num_threads(1)
folder, peaks = Path(sys.argv[1]), []
for size in ("small", "large"):
    for name, dtype in (("bf16", None), ("bf16", torch.float16), ("fp8", torch.bfloat16)):
        convert(folder / f"{size}-{name}.safetensors", folder / "b.safetensors", dialect="lightricks", dtype=dtype)
        assert size == "small" or (folder / "b.safetensors").stat().st_size > 256e6
        (folder / "b.safetensors").unlink()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(max(peaks) - peaks[2])
"""


def with_out_channels(path: Path, rows: int, fp8: bool) -> None:
    """Write a sparse 2.3 file whose proj_out has this many rows of 64 elements."""
    config = tiny_config("2.3", attention_head_dim=16, cross_attention_dim=64, out_channels=rows)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in LTX2VideoTransformer3DModel(config).state_dict().items()}
    specs = {PREFIX + original_name(name): sparse.Spec("BF16", tuple(shape)) for name, shape in shapes.items()}
    if fp8:
        name = PREFIX + "proj_out.weight"
        specs |= {name: sparse.Spec("F8_E4M3", specs[name].shape), name + "_scale": sparse.Spec("F32", ())}
    sparse.write_sparse(path, specs, lightricks_metadata(config))


@pytest.mark.slow
def test_a_tensor_of_256_mb_takes_no_more_memory_than_one_of_12_8_mb_and_64_mb(tmp_path: Path) -> None:
    for size, rows in (("small", 10**5), ("large", 2 * 10**6)):
        for name in ("bf16", "fp8"):
            with_out_channels(tmp_path / f"{size}-{name}.safetensors", rows, name == "fp8")
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024  # kB


# ---------------------------------------------------------------- the command
def test_the_command_reports_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official(tmp_path / "a.safetensors", "2.5")
    arguments = ["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b"), "--to", "diffusers", "--json"]
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(
        json.dumps(
            converting.Conversion(
                str(tmp_path / "a.safetensors"),
                str(tmp_path / "b"),
                "lightricks names, prefix model.diffusion_model.",
                "diffusers names, no prefix",
                len(raw(tmp_path / "b")),
                (tmp_path / "b/diffusion_pytorch_model.safetensors").stat().st_size,
                ["BF16", "F32"],
                report["foreign"],
                report["left_out"],
                [],
            )._asdict()
        )
    )
    assert cli.main(arguments) == 2
    assert "b: exists already and is not overwritten" in capsys.readouterr().err


def test_the_command_prints_what_it_left_out_and_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, _ = random_bits("2.3")
    tensors = writers.renamed(state) | prefixed(writers.connectors())
    writers.save(tmp_path / "a.safetensors", tensors, {"license": "a"})
    assert (
        cli.main(
            [
                "convert",
                str(tmp_path / "a.safetensors"),
                str(tmp_path / "b"),
                "--to",
                "diffusers",
                "--dtype",
                "float16",
                "--max-shard-size",
                "100KB",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for line in (
        f"left out: {PREFIX}video_embeddings_connector.* 10 tensors, 462,856 bytes",
        "left out: metadata license\n",
        "assumed: nothing in the checkpoint says",
        f"{len(state)} tensors, ",
    ):
        assert line in printed
    assert {dtype for dtype, _, _ in raw(tmp_path / "b").values()} == {"F16"}
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2


def test_a_damaged_source_is_unusable_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_file(tmp_path / "a.safetensors")
    source.write_bytes(source.read_bytes()[:-1])
    assert cli.main(["convert", str(source), str(tmp_path / "b"), "--to", "diffusers"]) == 2
    assert "a.safetensors: header: the file has" in capsys.readouterr().err
    assert listing(tmp_path) == ["a.safetensors"]
