"""Every published dialect and format loads into the weights that an independent writer put into it, or not at all.

pytest tests/checkpoint/test_checkpoints.py
"""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import make_manifest
import pytest
import torch
import writers
from safetensors.torch import load_file, save_file
from tiny import RELEASES, random_inputs, random_model, tiny_config
from writers import PREFIX, State

import ltx2ref
from ltx2ref import CheckpointError, LTX2VideoTransformer3DModel, TransformerConfig
from ltx2ref.checkpoint import names
from ltx2ref.checkpoint.inspection import inspect
from ltx2ref.checkpoint.match import Plan, make_plan
from ltx2ref.checkpoint.shapes import parameter_shapes
from ltx2ref.checkpoint.shell import without_values

pytestmark = pytest.mark.slow

releases = pytest.mark.parametrize("release", RELEASES)
Write = Callable[..., State]


def state_of(config: TransformerConfig) -> State:
    return {name: tensor.detach() for name, tensor in random_model(config).state_dict().items()}


def direct(config: TransformerConfig, state: State, dtype: torch.dtype) -> LTX2VideoTransformer3DModel:
    """Return a model with these weights, made without any file."""
    model = random_model(config, dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
    return model


def assert_same(loaded: LTX2VideoTransformer3DModel, expected: LTX2VideoTransformer3DModel) -> None:
    """Require the same weights and the same outputs, bit for bit."""
    theirs = expected.state_dict()
    assert loaded.state_dict().keys() == theirs.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert not loaded.training and not any(p.is_meta for p in loaded.parameters())
    inputs = random_inputs(expected.config, next(iter(theirs.values())).dtype)
    with torch.no_grad():
        for ours, wanted in zip(loaded(**inputs), expected(**inputs), strict=True):
            assert torch.equal(ours, wanted)


# ---------------------------------------------------------------- names
@releases
def test_names_are_a_bijection_between_the_dialects(release: str) -> None:
    described = make_manifest.manifest()["releases"][release]
    rows = {published: row["diffusers"] for published, row in described["tensors"].items()}
    assert {names.to_diffusers(theirs) for theirs in rows} == set(rows.values())
    for published, ours in rows.items():
        assert (names.to_diffusers(published), names.to_lightricks(ours)) == (ours, published)
    assert len(set(rows.values())) == len(rows)
    expected = parameter_shapes(RELEASES[release])
    assert {names.to_lightricks(name) for name in expected} == {
        name.replace("{i}", str(i)) for name in rows for i in range(48 if "{i}" in name else 1)
    }


@releases
def test_parameter_shapes_are_those_of_the_whole_model_with_each_flag_on_and_off(release: str) -> None:
    config = tiny_config(release)
    flags = [field.name for field in fields(config) if isinstance(field.default, bool)]
    assert len(flags) > 10
    for flag in flags:
        for value in (True, False):
            changed = replace(config, **{flag: value})
            model = without_values(LTX2VideoTransformer3DModel, changed)
            assert parameter_shapes(changed) == {name: tuple(x.shape) for name, x in model.named_parameters()}, flag


def test_the_dialect_is_detected_and_never_guessed() -> None:
    detect = names.dialects
    assert detect(["model.diffusion_model.patchify_proj.weight"]) == {names.Dialect("lightricks", PREFIX)}
    assert detect(["audio_adaln_single.linear.bias"]) == {names.Dialect("lightricks", "")}
    assert detect(["transformer.time_embed.linear.bias"]) == {names.Dialect("diffusers", "transformer.")}
    assert detect(["vae.proj_in.weight", "diffusion_model.proj_in.weight", "blocks.0.proj_in.weight"]) == set()
    assert len(detect(["proj_in.weight", "prompt_adaln_single.linear.weight"])) == 2


# ---------------------------------------------------------------- dialects
DIALECTS: dict[str, tuple[str, Write, dict[str, Any]]] = {
    "diffusers": ("transformer", writers.write_diffusers, {}),
    "diffusers-sharded": ("transformer", writers.write_diffusers, {"shards": 3}),
    "lightricks-single": ("ltx.safetensors", writers.write_single_file, {}),
    "lightricks-split": ("ltx.safetensors", writers.write_split, {}),
    "kijai": ("ltx.safetensors", writers.write_transformer_only, {}),
    "comfy-without-metadata": ("ltx.safetensors", writers.write_transformer_only, {"metadata": False}),
    "diffsynth": ("repackage", writers.write_diffsynth, {}),
    "fastvideo": ("fastvideo", writers.write_fastvideo, {}),
    "prefixed-diffusers": ("ltx.safetensors", writers.write_prefixed_diffusers, {}),
}
WITHOUT_CONFIG = ("comfy-without-metadata", "diffsynth", "prefixed-diffusers")


def written(
    tmp_path: Path, dialect: str, release: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, State, TransformerConfig]:
    name, write, options = DIALECTS[dialect]
    config = tiny_config(release)
    return tmp_path / name, write(tmp_path / name, state_of(config), config, dtype=dtype, **options), config


@pytest.mark.parametrize("dialect", DIALECTS)
@releases
def test_a_dialect_loads_as_the_weights_that_were_written(dialect: str, release: str, tmp_path: Path) -> None:
    path, truth, config = written(tmp_path, dialect, release)
    # Without gates, the heads cannot be counted.
    given = config if dialect in WITHOUT_CONFIG and release == "2.0" else None
    assert_same(ltx2ref.load(path, config=given), direct(config, truth, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_given_dtype_is_that_of_every_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    path, truth, config = written(tmp_path, "lightricks-single", "2.3")
    assert_same(ltx2ref.load(path, dtype=dtype), direct(config, truth, dtype))


def test_without_a_dtype_that_of_the_linear_weights_is_taken(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        path, _, _ = written(tmp_path, "lightricks-split", "2.5", dtype)
        assert {p.dtype for p in ltx2ref.load(path).parameters()} == {dtype}


def test_tensors_in_the_wanted_dtype_stay_mapped_and_can_be_written_to(tmp_path: Path) -> None:
    path, truth, config = written(tmp_path, "lightricks-single", "2.3")
    before = path.read_bytes()
    model = ltx2ref.load(path)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    assert len(mapped) > 100 or not Path("/proc/self/maps").exists()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    assert_same(ltx2ref.load(path), direct(config, truth, torch.bfloat16))


# ---------------------------------------------------------------- quantised formats
FORMATS: dict[str, tuple[str, Write, dict[str, Any], str]] = {
    "fp8-cast": ("fp8 cast", writers.write_fp8_cast, {}, "2.3"),
    "fp8-cast-e5m2-biases": ("fp8 cast", writers.write_fp8_cast, {"fp8": torch.float8_e5m2, "biases": True}, "2.0"),
    "fp8-scaled": ("fp8 scaled", writers.write_fp8_scaled, {}, "2.0"),
    "fp8-scaled-everywhere": ("fp8 scaled", writers.write_fp8_scaled, {"quantised": lambda name: True}, "2.3"),
    "fp8-old-comfy": ("fp8 scaled", writers.write_fp8_old_comfy, {}, "2.3"),
    "fp8-old-comfy-f32-marker": (
        "fp8 scaled",
        writers.write_fp8_old_comfy,
        {"marker_dtype": torch.float32, "scale_shape": (1,)},
        "2.5",
    ),
    "fp8-new-comfy": ("fp8 scaled", writers.write_fp8_new_comfy, {"fp8": torch.float8_e5m2}, "2.3"),
    "fp8-new-comfy-metadata-only": (
        "fp8 scaled",
        writers.write_fp8_new_comfy,
        {"blobs": False, "metadata_says": "float8_e4m3fn"},
        "2.3",
    ),
    "fp8-vonkaiser": ("fp8 scaled", writers.write_fp8_vonkaiser, {}, "2.5"),
    "int8-convrot": ("int8 ConvRot", writers.write_int8_convrot, {}, "2.5"),
    "nvfp4": ("nvfp4", writers.write_nvfp4, {}, "2.5"),
    "nvfp4-superseded": ("nvfp4", writers.write_nvfp4, {"quantization": False}, "2.5"),
    "nvfp4-torchao": ("nvfp4", writers.write_nvfp4_torchao, {}, "2.3"),
}
GGUF = {
    "gguf": ({}, "2.5"),
    "gguf-2.0-prefixed": ({"prefix": PREFIX}, "2.0"),
    "gguf-without-metadata": ({"metadata": False}, "2.3"),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_format_loads_as_the_dequantised_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    format, write, options, release = FORMATS[name]
    config, path = writers.quantisable_config(release), tmp_path / "ltx.safetensors"
    truth = write(path, state_of(config), config, **options)
    assert format in make_plan(path).formats.values()
    assert_same(ltx2ref.load(path, dtype=dtype), direct(config, truth, dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_file_loads_as_bfloat16_by_default(name: str, tmp_path: Path) -> None:
    _, write, options, release = FORMATS[name]
    config, path = writers.quantisable_config(release), tmp_path / "ltx.safetensors"
    write(path, state_of(config), config, **options)
    assert {p.dtype for p in ltx2ref.load(path).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("write", [writers.write_nvfp4, writers.write_nvfp4_torchao])
def test_nvfp4_scales_that_do_not_fill_their_tiles_are_untiled(write: Write, tmp_path: Path) -> None:
    config, path = writers.padded_config("2.5"), tmp_path / "ltx.safetensors"
    truth = write(path, state_of(config), config)
    assert_same(ltx2ref.load(path, dtype=torch.float32), direct(config, truth, torch.float32))


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_file_loads_as_the_dequantised_weights(name: str, tmp_path: Path) -> None:
    (options, release), path = GGUF[name], tmp_path / "ltx.gguf"
    config = writers.quantisable_config(release)
    truth = writers.write_gguf(path, state_of(config), config, **options)
    assert_same(ltx2ref.load(path, dtype=torch.float32), direct(config, truth, torch.float32))


K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize("kind", K_QUANTS)
def test_k_quants_are_what_their_library_makes_of_random_blocks(kind: str, tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, dequantize

    config, path = writers.quantisable_config("2.5"), tmp_path / "ltx.gguf"
    state, ggml = state_of(config), GGMLQuantizationType[kind]
    elements, size = GGML_QUANT_SIZES[ggml]
    random, name = np.random.default_rng(0), "transformer_blocks.1.ff.net.0.proj.weight"
    blocks = random.integers(0, 256, (1024, 256 // elements * size), dtype=np.uint8)
    blocks.view()[:, 1::2] &= 0x3B  # float16 scales are finite wherever they are
    writer = GGUFWriter(path, "ltxv")
    for key, tensor in state.items():
        if key == name:
            writer.add_tensor(names.to_lightricks(key), blocks, raw_dtype=ggml)
        else:
            writer.add_tensor(names.to_lightricks(key), tensor.numpy())
    writer.add_string("config", json.dumps({"transformer": config.to_lightricks()}))
    writers.finish_gguf(writer)
    loaded = ltx2ref.load(path, dtype=torch.float32).state_dict()[name]
    assert loaded.isfinite().all() and torch.equal(loaded, torch.from_numpy(dequantize(blocks, ggml)))


# Real widths of the layers in a block: the widest, and those of either stream.
REAL = {
    "transformer_blocks.0.ff.net.0.proj": (16384, 4096),
    "transformer_blocks.0.audio_ff.net.2": (2048, 8192),
    "transformer_blocks.0.audio_to_video_attn.to_q": (2048, 4096),
}
ENCODERS = {
    "fp8 scaled": lambda weight: writers.fp8_encoder(torch.float8_e4m3fn)(weight),
    "int8 ConvRot": writers.encode_int8_convrot,
    "nvfp4": writers.encode_nvfp4,
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("layer", REAL)
@pytest.mark.parametrize("format", ENCODERS)
def test_a_layer_of_real_size_is_decoded_in_pieces_to_the_same_weights(format: str, layer: str, tmp_path: Path) -> None:
    from ltx2ref.checkpoint.header import read_header
    from ltx2ref.checkpoint.quantised import COMPANIONS, identify
    from ltx2ref.checkpoint.sayings import read_marker

    weight = torch.randn(REAL[layer], generator=torch.Generator().manual_seed(1)).to(torch.bfloat16) / 64
    stored, truth = ENCODERS[format](weight)
    save_file({f"layer.{suffix}": tensor for suffix, tensor in stored.items()}, tmp_path / "layer.safetensors")
    _, tensors = read_header(tmp_path / "layer.safetensors")
    companions = {
        COMPANIONS[name.removeprefix("layer")]: tensor for name, tensor in tensors.items() if name != "layer.weight"
    }
    sayings = [read_marker("marker", companions["marker"])] if "marker" in companions else []
    read = identify(REAL[layer], tensors["layer.weight"], companions, sayings)
    read.facts.update(nibbles="high", scales=read.facts.get("scales", "tiled"))
    assert read.label == format
    assert torch.equal(read.read(torch.float32), truth.float())


# ---------------------------------------------------------------- what is refused
def edited(path: Path, edit: Callable[[State], object]) -> None:
    """Change the tensors of a file in place; its metadata stay."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


def fp8_file(tmp_path: Path) -> tuple[Path, State, TransformerConfig]:
    config, path = writers.quantisable_config("2.3"), tmp_path / "ltx.safetensors"
    return path, writers.write_fp8_scaled(path, state_of(config), config), config


LAYER = PREFIX + "transformer_blocks.0.attn1.to_q"


def drop_scale(tensors: State) -> None:
    del tensors[LAYER + ".weight_scale"]


def add_scale(tensors: State) -> None:
    tensors[PREFIX + "patchify_proj.weight_scale"] = torch.ones(())


def add_orphan(tensors: State) -> None:
    tensors[PREFIX + "transformer_blocks.0.attn9.to_q.weight_scale"] = torch.ones(())


def pack(tensors: State) -> None:
    n, k = tensors[LAYER + ".weight"].shape
    tensors[LAYER + ".weight"] = torch.zeros(n, k // 2, dtype=torch.uint8)
    del tensors[LAYER + ".weight_scale"], tensors[LAYER + ".input_scale"]


def nan_scale(tensors: State) -> None:
    tensors[LAYER + ".weight_scale"] = torch.tensor(float("nan"))


def negative_scale(tensors: State) -> None:
    tensors[LAYER + ".weight_scale"] *= -1


def scale_of_seven_rows(tensors: State) -> None:
    tensors[LAYER + ".weight_scale"] = torch.ones(7, 1)


def smoothing(tensors: State) -> None:
    tensors[LAYER + ".pre_quant_scale"] = torch.ones(256)


BAD = {
    "a missing scale": (drop_scale, [LAYER + ".weight", "scale is missing"]),
    "a scale of a layer that is not quantised": (add_scale, ["patchify_proj.weight BF16", "not quantised"]),
    "a scale of nothing": (add_orphan, ["attn9.to_q.weight_scale", "no tensor uses"]),
    "packed fp4": (pack, ["[256, 128] is packed fp4 of [256, 256]"]),
    "a NaN scale": (nan_scale, [LAYER + ".weight_scale", "not finite"]),
    "a negative scale": (negative_scale, [LAYER + ".weight_scale", "negative"]),
    "scales of other rows": (scale_of_seven_rows, [LAYER + ".weight_scale", "wrong shape"]),
    "scales of the inputs": (smoothing, [LAYER + ".pre_quant_scale", "no tensor uses"]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_damaged_quantised_file_is_refused_by_name(what: str, tmp_path: Path) -> None:
    path, _, _ = fp8_file(tmp_path)
    ltx2ref.load(path)
    edit, said = BAD[what]
    edited(path, edit)
    with pytest.raises(CheckpointError) as caught:
        ltx2ref.load(path)
    for part in [str(path), *said]:
        assert part in str(caught.value), str(caught.value)


def test_all_problems_are_collected_in_one_error(tmp_path: Path) -> None:
    path, _, _ = written(tmp_path, "lightricks-single", "2.3")

    def edit(tensors: State) -> None:
        del tensors[LAYER + ".bias"], tensors[PREFIX + "proj_out.bias"]
        tensors[PREFIX + "adaln_single.linear.bias"] = torch.zeros(3)
        tensors[PREFIX + "something.else"] = torch.zeros(3)

    edited(path, edit)
    with pytest.raises(CheckpointError) as caught:
        ltx2ref.load(path)
    assert len(caught.value.problems) == 4
    for part in (
        "attn1.to_q.bias: missing",
        "proj_out.bias: missing",
        "adaln_single.linear.bias F32 [3] has the wrong",
        "something.else F32 [3]: not expected",
        str(path),
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 3}, "num_layers = 3"),
        ({"gated_attn": False, "audio_gated_attn": False}, "gated_attn = False"),
        ({"in_channels": 19}, "in_channels = 19"),
        ({"ff_bias": False}, "ff_bias = False"),
    ],
    ids=["layers", "gates", "channels", "biases"],
)
def test_a_config_that_contradicts_the_shapes_is_refused_with_both(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = tiny_config("2.3")
    writers.write_diffusers(tmp_path / "transformer", state_of(config), config)
    wrong = config.to_diffusers() | change
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(CheckpointError, match=f"{said} by config.json, but"):
        ltx2ref.load(tmp_path / "transformer")


def test_what_had_to_be_assumed_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, path = writers.quantisable_config("2.5"), tmp_path / "ltx.safetensors"
    with caplog.at_level(logging.WARNING, "ltx2ref"):
        writers.write_nvfp4(path, state_of(config), config)
        ltx2ref.load(path)
        assert not caplog.records
        writers.write_nvfp4(path, state_of(config), config, quantization=False)
        ltx2ref.load(path)
        assert "assumed high, as in Lightricks' files" in caplog.text
        caplog.clear()
        ltx2ref.load(path, nibbles="high", scales="tiled")
        assert not caplog.records
        writers.write_transformer_only(path, state_of(config), config, metadata=False)
        ltx2ref.load(path)
        assert "rope_type = 'split'" in caplog.text and "release 2.5" in caplog.text


def test_keyframes_go_by_the_tensor_as_in_the_superseded_file(tmp_path: Path) -> None:
    path, _, config = written(tmp_path, "lightricks-split", "2.5")
    assert ltx2ref.load(path).config == config and config.use_keyframes_abs_pos_embedding
    edited(path, lambda tensors: tensors.pop(PREFIX + "keyframes_abs_pos_embedding"))
    assert not ltx2ref.load(path).config.use_keyframes_abs_pos_embedding
    assert inspect(path).config["use_keyframes_abs_pos_embedding"] == {"value": False, "origin": "shapes"}


@pytest.mark.parametrize("left", [0.999, 0.1, 0.0])
def test_a_file_that_changes_while_it_is_read_is_refused(
    left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, _ = written(tmp_path, "lightricks-single", "2.3")
    check = Plan.check

    def shrinking(plan: Plan) -> None:
        check(plan)
        with open(path, "r+b") as file:
            file.truncate(int(left * path.stat().st_size))

    monkeypatch.setattr(Plan, "check", shrinking)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        ltx2ref.load(path)


# ---------------------------------------------------------------- KNOWN_BUGS: the loader's rows 27 to 30, and 28's file
def test_unscaled_fp8_weights_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltx2ref.checkpoint.quantised import FORMATS as TABLE

    path, truth, config = fp8_file(tmp_path)
    unscaled = TABLE["fp8 scaled"]._replace(decode=lambda weight: lambda a, b: weight.tensor.rows(a, b).float())
    monkeypatch.setitem(TABLE, "fp8 scaled", unscaled)
    with pytest.raises(AssertionError):
        assert_same(ltx2ref.load(path), direct(config, truth, torch.bfloat16))


def test_unmapped_prompt_adaln_names_are_refused_and_never_left_at_initial_values(tmp_path: Path) -> None:
    path, _, _ = written(tmp_path, "diffusers", "2.3")
    file = path / "diffusion_pytorch_model.safetensors"

    def unmap(tensors: State) -> None:
        for name in [name for name in tensors if "prompt_adaln." in name]:
            tensors[name.replace("prompt_adaln.", "prompt_adaln_single.")] = tensors.pop(name)

    edited(file, unmap)
    with pytest.raises(CheckpointError, match="several dialects"):
        ltx2ref.load(path)


def test_a_table_of_names_that_stops_at_2_0_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _, _ = written(tmp_path, "lightricks-single", "2.3")
    monkeypatch.delitem(names.SEGMENTS, "prompt_adaln_single")
    with pytest.raises(CheckpointError, match=r"presence of prompt_adaln\.linear\.weight"):
        ltx2ref.load(path)


def test_swapped_nibbles_would_be_seen(tmp_path: Path) -> None:
    config, path = writers.quantisable_config("2.5"), tmp_path / "ltx.safetensors"
    truth = writers.write_nvfp4(path, state_of(config), config, quantization=False)
    assert_same(ltx2ref.load(path, nibbles="high"), direct(config, truth, torch.bfloat16))
    with pytest.raises(AssertionError):
        assert_same(ltx2ref.load(path, nibbles="low", scales="tiled"), direct(config, truth, torch.bfloat16))


def test_weights_that_are_not_unrotated_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltx2ref.checkpoint import decoders

    config, path = writers.quantisable_config("2.5"), tmp_path / "ltx.safetensors"
    truth = writers.write_int8_convrot(path, state_of(config), config)
    monkeypatch.setattr(decoders, "hadamard", lambda size: size**0.5 * torch.eye(size))
    with pytest.raises(AssertionError):
        assert_same(ltx2ref.load(path), direct(config, truth, torch.bfloat16))


# ---------------------------------------------------------------- the documented snippet
def test_from_pretrained_reads_a_local_pipeline_folder(tmp_path: Path) -> None:
    config = tiny_config("2.0")
    truth = writers.write_diffusers(tmp_path / "ltx" / "transformer", state_of(config), config)
    for options in ({"torch_dtype": torch.float32}, {"dtype": torch.float32}):
        model = LTX2VideoTransformer3DModel.from_pretrained(tmp_path / "ltx", subfolder="transformer", **options)
        assert isinstance(model, LTX2VideoTransformer3DModel)
        assert_same(model, direct(config, truth, torch.float32))
    with pytest.raises(ValueError, match="torch_dtype"):
        LTX2VideoTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.float32, dtype=torch.float16)


def hub_cache(tmp_path: Path) -> tuple[Path, State, TransformerConfig]:
    """Make a cache folder of the hub's library, as a download of Lightricks/LTX-2 leaves it."""
    config, commit = tiny_config("2.0"), "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--Lightricks--LTX-2"
    truth = writers.write_diffusers(repository / "snapshots" / commit / "transformer", state_of(config), config)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "hub", truth, config


def test_from_pretrained_takes_a_hub_id_offline_from_the_cache(tmp_path: Path) -> None:
    cache, truth, config = hub_cache(tmp_path)
    model = LTX2VideoTransformer3DModel.from_pretrained(
        "Lightricks/LTX-2", subfolder="transformer", torch_dtype=torch.bfloat16, cache_dir=cache, local_files_only=True
    )
    assert_same(model, direct(config, truth, torch.bfloat16))
    with pytest.raises(CheckpointError, match="cannot be fetched from the hub"):
        LTX2VideoTransformer3DModel.from_pretrained("Lightricks/LTX-9", cache_dir=cache, local_files_only=True)


def test_a_hub_id_without_the_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ltx2ref\[hub\]'"):
        LTX2VideoTransformer3DModel.from_pretrained("Lightricks/LTX-2", subfolder="transformer")


def test_a_gguf_file_without_the_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, path = writers.quantisable_config("2.5"), tmp_path / "ltx.gguf"
    writers.write_gguf(path, state_of(config), config)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ltx2ref\[gguf\]'"):
        ltx2ref.load(path)


def test_an_unsuitable_dtype_or_path_is_refused(tmp_path: Path) -> None:
    path, _, _ = written(tmp_path, "lightricks-single", "2.3")
    with pytest.raises(ValueError, match="dtype: expected float64"):
        ltx2ref.load(path, dtype=torch.int8)
    for missing in (tmp_path / "nothing", tmp_path / "nothing.safetensors"):
        with pytest.raises(CheckpointError, match="no such file"):
            ltx2ref.load(missing)
