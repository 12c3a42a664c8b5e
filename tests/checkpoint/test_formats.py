"""Every quantised format, in every layout that published files have, loads bit for bit as its own formula says.

pytest tests/checkpoint/test_formats.py
"""

import base64
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from safetensors.torch import load_file, save_file
from tiny import random_model
from writers import PREFIX, Encoder, State

import ltx2ref
from ltx2ref import CheckpointError, TransformerConfig
from ltx2ref.checkpoint import sayings
from ltx2ref.checkpoint.convert import convert
from ltx2ref.checkpoint.inspection import inspect
from ltx2ref.checkpoint.match import make_plan
from ltx2ref.checkpoint.settle import ReadingOptions

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
ROW, COLUMN, ALL = (lambda n, k: (n,)), (lambda n, k: (n, 1)), (lambda n, k: ())
ALWAYS = {"orig_dtype": "torch.bfloat16"}  # keys that convert_to_quant writes into every marker


def blocks(side: int) -> Callable[[int, int], tuple[int, ...]]:
    return lambda n, k: (n // side, k // side)


def int8(shape: Callable[[int, int], tuple[int, ...]], rotation: int = 0, **keys: Any) -> Encoder:
    return writers.encode_grid(INT8, shape, {"format": "int8_tensorwise"} | keys, rotation)


def fp8(name: str, shape: Callable[[int, int], tuple[int, ...]], kind: torch.dtype = E4M3, **keys: Any) -> Encoder:
    return writers.encode_grid(kind, shape, {"format": name} | keys)


# For each layout: the name of its format, and how its layers are encoded. All markers are as their writers make them.
LAYOUTS: dict[str, tuple[str, Encoder]] = {
    "int8 ConvRot, as published": ("int8 ConvRot", int8(COLUMN, 256, convrot=True, convrot_groupsize=256)),
    "int8 ConvRot, no group size": ("int8 ConvRot", int8(COLUMN, 256, convrot=True, per_row=True)),
    "int8 ConvRot, 64": ("int8 ConvRot", int8(COLUMN, 64, convrot=True, convrot_groupsize=64)),
    "int8 ConvRot, 16": ("int8 ConvRot", int8(ROW, 16, convrot=True, convrot_groupsize=16)),
    "int8 ConvRot, one scale": ("int8 ConvRot", int8(ALL, 256, convrot=True, full_precision_matrix_mult=True)),
    "int8 not rotated": ("int8", int8(COLUMN, convrot=False, convrot_groupsize=256)),
    "int8 by row": ("int8", int8(ROW, per_row=True, **ALWAYS)),
    "int8 with one scale": ("int8", int8(ALL, full_precision_matrix_mult=True)),
    "int8 with one scale, a vector": ("int8", int8(lambda n, k: (1,))),
    "int8 in blocks": (
        "int8",
        writers.encode_grid(INT8, blocks(128), {"format": "int8_blockwise", "group_size": 128, **ALWAYS}),
    ),
    "int8 in nested keys": (
        "int8",
        writers.encode_grid(INT8, blocks(64), {"format": "int8_blockwise", "params": {"group_size": 64}}),
    ),
    "int8 without a marker": ("int8", writers.encode_grid(INT8, COLUMN, None)),
    "fp8 by row": ("fp8 scaled", fp8("float8_e4m3fn_rowwise", ROW, **ALWAYS)),
    "fp8 by row, a column": ("fp8 scaled", fp8("float8_e4m3fn", COLUMN)),
    "fp8 in blocks": ("fp8 scaled", fp8("float8_e4m3fn_blockwise", blocks(64), group_size=64, **ALWAYS)),
    "fp8 in parts of rows": ("fp8 scaled", fp8("float8_e4m3fn", lambda n, k: (n, k // 64, 1))),
    "fp8 e5m2 by row": ("fp8 scaled", fp8("float8_e5m2", COLUMN, E5M2)),
    "mxfp8": ("mxfp8", writers.encode_mxfp8({})),
    "mxfp8 by convert_to_quant": ("mxfp8", writers.encode_mxfp8({"group_size": 32, **ALWAYS}, torch.float8_e8m0fnu)),
    "quanto int8": ("quanto int8", writers.encode_quanto),
    "convrot_w4a4": ("convrot_w4a4", writers.encode_w4a4),
    "convrot_w4a4, 64": ("convrot_w4a4", lambda weight: writers.encode_w4a4(weight, 64)),
    "asym_w4a8_int8": ("asym_w4a8_int8", writers.encode_w4a8()),
    "asym_w4a8_int8, no table": ("asym_w4a8_int8", writers.encode_w4a8(codebook=False)),
    "asym_w4a8_int8, scales as bytes": ("asym_w4a8_int8", writers.encode_w4a8(declared=torch.uint8)),
    "asym_w4a8_int8 of 6 bits": ("asym_w4a8_int8", writers.encode_w4a8(6, codebook=False)),
    "MLX q8": ("mlx", writers.encode_mlx(8)),
    "MLX q4": ("mlx", writers.encode_mlx(4)),
    "MLX q4 in float32": ("mlx", writers.encode_mlx(4, torch.float32)),
    "bitsandbytes nf4": ("bitsandbytes nf4", writers.encode_nf4()),
    "bitsandbytes nf4, nested": ("bitsandbytes nf4", writers.encode_nf4(nested=True)),
    "bitsandbytes int8": ("bitsandbytes int8", writers.encode_bnb_int8),
}


@pytest.fixture(scope="module")
def config() -> TransformerConfig:
    return writers.quantisable_config("2.5", num_layers=1)


@pytest.fixture(scope="module")
def state(config: TransformerConfig) -> State:
    return {name: tensor.detach() for name, tensor in random_model(config).state_dict().items()}


def assert_loads(path: Path, truth: State, **options: Any) -> None:
    """Require the weights that the writer decodes, in float32 bit for bit."""
    loaded = ltx2ref.load(path, dtype=torch.float32, **options).state_dict()
    assert loaded.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(loaded[name], tensor.float()), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_loads_as_its_own_formula_says(
    layout: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    format, encode = LAYOUTS[layout]
    path = tmp_path / "ltx.safetensors"
    truth = writers.write_layers(path, state, config, encode=encode, metadata={})
    plan = make_plan(path)
    assert list(plan.formats.values()).count(format) == 28 and plan.problems == []
    assert_loads(path, truth)
    assert inspect(path).problems == []


# Entries of `_quantization_metadata` in place of markers.
ENTRIES: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "int8": (writers.encode_grid(INT8, COLUMN, None), {"format": "int8_tensorwise", **ALWAYS}),
    "int8 ConvRot": (
        writers.encode_grid(INT8, COLUMN, None, 256),
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256},
    ),
    "fp8 scaled": (
        writers.encode_grid(E4M3, blocks(128), None),
        {"format": "float8_e4m3fn_blockwise", "group_size": 128},
    ),
    "mxfp8": (writers.encode_mxfp8(), {"format": "mxfp8", "group_size": 32}),
    "nvfp4": (writers.encode_nvfp4, {"format": "nvfp4"}),
}


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("format", ENTRIES)
def test_a_format_may_be_said_by_the_metadata_alone_with_the_prefix_or_without(
    format: str, prefixed: bool, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    encode, entry = ENTRIES[format]
    path = tmp_path / "ltx.safetensors"
    truth = writers.write_layers(
        path, state, config, encode=encode, entry=entry, metadata={}, prefix_in_entries=prefixed
    )
    assert list(make_plan(path).formats.values()).count(format) == 28
    assert_loads(path, truth)


def test_a_file_of_several_formats_loads_each_layer_by_its_own_marker(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, count = tmp_path / "ltx.safetensors", iter(range(10**6))
    encoders = [writers.encode_nvfp4, LAYOUTS["int8 by row"][1], LAYOUTS["mxfp8"][1], LAYOUTS["asym_w4a8_int8"][1]]
    mark = writers.blob({"format": "nvfp4"})

    def encode(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        i = next(count) % len(encoders)
        parts, truth = encoders[i](weight)
        return parts | ({"comfy_quant": mark.clone()} if i == 0 else {}), truth

    assert_loads(path, writers.write_layers(path, state, config, encode=encode, metadata={}))
    assert {"nvfp4", "int8", "mxfp8", "asym_w4a8_int8"} < {*make_plan(path).formats.values()}


# ---------------------------------------------------------------- what has to be known, and is not in the layers
def modelopt_file(
    path: Path, state: State, config: TransformerConfig, said: Mapping[str, Any] | None, **options: Any
) -> State:
    metadata = {} if said is None else {"quantization_config": json.dumps(said)}
    encode = options.pop("encode", writers.encode_modelopt_nvfp4)
    return writers.write_layers(path, state, config, encode=encode, metadata=metadata, **options)


@pytest.mark.parametrize("entry", [None, {"format": "nvfp4"}])
def test_modelopts_nvfp4_is_read_by_its_config(
    entry: Mapping[str, Any] | None, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    truth = modelopt_file(path, state, config, writers.modelopt_config(), entry=entry)
    assert_loads(path, truth)
    assert any("whether scales of blocks are in cuBLAS' tiles" in note for note in inspect(path).notes)
    tiled = modelopt_file(
        path,
        state,
        config,
        writers.modelopt_config(),
        encode=lambda weight: writers.encode_modelopt_nvfp4(weight, tiled=True),
    )
    assert_loads(path, tiled, scales="tiled")
    with pytest.raises(AssertionError):
        assert_loads(path, tiled)


def test_modelopts_config_may_say_that_scales_are_swizzled(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    tiled = modelopt_file(
        path,
        state,
        config,
        writers.modelopt_config(swizzled=True),
        encode=lambda weight: writers.encode_modelopt_nvfp4(weight, tiled=True),
    )
    assert_loads(path, tiled)
    with pytest.raises(
        CheckpointError, match="scales is tiled by quantization_config, but flat by the argument scales"
    ):
        ltx2ref.load(path, scales="flat")


def test_what_nothing_says_is_refused_with_the_arguments_that_settle_it(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    truth = writers.write_layers(path, state, config, encode=writers.encode_modelopt_nvfp4, entry={"format": "nvfp4"})
    with pytest.raises(CheckpointError) as caught:
        ltx2ref.load(path)
    assert "nibbles='high'" in str(caught.value) and "scales='flat'" in str(caught.value)
    assert len(caught.value.problems) == 2 == len(inspect(path).problems)
    assert_loads(path, truth, nibbles="low", scales="flat")
    assert inspect(path, ReadingOptions(nibbles="low", scales="flat")).problems == []


def test_scales_that_do_not_fill_their_tiles_show_whether_they_are_tiled(tmp_path: Path) -> None:
    config = writers.padded_config("2.5", num_layers=1)
    state, path = random_model(config).state_dict(), tmp_path / "ltx.safetensors"
    truth = writers.write_layers(path, state, config, encode=writers.encode_modelopt_nvfp4)
    assert_loads(path, truth, nibbles="low")
    with pytest.raises(CheckpointError, match="scales is flat by shape, but tiled by the argument scales"):
        ltx2ref.load(path, nibbles="low", scales="tiled")


def every_linear(name: str) -> bool:
    return name.startswith("transformer_blocks.")  # with the gates, whose 32 rows at published widths fill no tile


@pytest.mark.parametrize("option", [{"nibbles": "High"}, {"scales": "Flat"}, {"scales": True}, {"nibbles": ""}])
def test_arguments_have_the_values_that_are_documented(
    option: dict[str, Any], state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    writers.write_transformer_only(tmp_path / "ltx.safetensors", state, config)
    calls: tuple[Callable[..., Any], ...] = (
        ltx2ref.load,
        ltx2ref.stream,
        lambda path, **said: inspect(path, ReadingOptions(**said)),
        lambda path, **said: convert(path, tmp_path / "there", dialect="diffusers", options=ReadingOptions(**said)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"^{next(iter(option))}: expected '(high|tiled)' or"):
            call(tmp_path / "ltx.safetensors", **option)


def test_what_the_shape_of_some_scales_shows_is_true_of_the_whole_file(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, tiled = tmp_path / "ltx.safetensors", lambda weight: writers.encode_modelopt_nvfp4(weight, tiled=True)
    truth = modelopt_file(path, state, config, writers.modelopt_config(), encode=tiled, quantised=every_linear)
    assert_loads(path, truth)
    assert make_plan(path).notes == []
    with pytest.raises(CheckpointError, match=r"scales is tiled by .*shape.*, but flat by the argument scales"):
        ltx2ref.load(path, scales="flat")


def test_flat_scales_are_not_as_in_lightricks_files_so_nothing_is_assumed(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    options: dict[str, Any] = {"encode": writers.encode_modelopt_nvfp4, "entry": {"format": "nvfp4"}}
    truth = modelopt_file(path, state, config, None, quantised=every_linear, **options)
    assert len(inspect(path).problems) == 1
    with pytest.raises(CheckpointError, match="nothing says which of two codes in a byte comes first"):
        ltx2ref.load(path)
    assert_loads(path, truth, nibbles="low")
    truth = modelopt_file(path, state, config, None, **options)
    for option in ({"nibbles": "low"}, {"scales": "flat"}):
        with pytest.raises(CheckpointError, match="nothing says wh"):
            ltx2ref.load(path, **option)
    assert_loads(path, truth, nibbles="low", scales="flat")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"swizzled": "false"}, "swizzled: expected bool, got 'false'"),
        ({"swizzle_scales": 1}, "swizzle_scales: expected bool, got '1'"),
        ({"swizzled": True, "is_swizzled": False}, "contradict one another"),
    ],
)
def test_modelopts_keys_about_swizzled_scales_are_true_or_false_and_agree(
    keys: dict[str, Any], message: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    modelopt_file(path, state, config, writers.modelopt_config(**keys))
    assert any(message in problem for problem in inspect(path).problems)
    with pytest.raises(CheckpointError, match=message):
        ltx2ref.load(path)


# ---------------------------------------------------------------- contradictions and unknown keys
MARK = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
WRONG: dict[str, tuple[Encoder, dict[str, Any] | None, list[str]]] = {
    "metadata without the rotation of the marker": (
        writers.encode_grid(INT8, COLUMN, MARK),
        {"format": "int8_tensorwise"},
        ["rotation", "comfy_quant", "_quantization_metadata"],
    ),
    "another format": (
        fp8("float8_e4m3fn", ALL),
        {"format": "nvfp4"},
        ["format", "fp8 scaled", "nvfp4", "comfy_quant", "_quantization_metadata"],
    ),
    "a rotation of nvfp4": (writers.encode_nvfp4, {"format": "nvfp4", "convrot": True}, ["convrot", "nvfp4"]),
    "an unknown key": (int8(COLUMN, zero_point=True), None, ["zero_point", "comfy_quant"]),
    "an unknown format": (int8(COLUMN), {"format": "int3"}, ["int3", "_quantization_metadata"]),
    "SVDQuant": (int8(COLUMN), {"format": "svdquant_w4a4"}, ["SVDQuant"]),
    "AWQ": (int8(COLUMN), {"format": "awq_w4a16"}, ["AWQ"]),
    "rows said, one scale there": (int8(ALL, per_row=True), None, ["rows", "comfy_quant", "shape"]),
    "other blocks": (
        writers.encode_grid(INT8, blocks(64), {"format": "int8_blockwise", "group_size": 128}),
        None,
        ["group", "128", "64"],
    ),
    "another shape": (int8(COLUMN, orig_shape=[3, 256]), None, ["shape", "(3, 256)"]),
    "a rotation that is no power of 4": (int8(COLUMN, convrot=True, convrot_groupsize=128), None, ["128"]),
    "a rotation of text": (int8(COLUMN, convrot="yes"), None, ["convrot", "expected bool"]),
    "another dtype": (fp8("float8_e5m2", ALL), None, ["F8_E5M2", "comfy_quant"]),
    "one scale said, rows there": (int8(COLUMN, per_row=False), None, ["one", "rows", "comfy_quant", "shape"]),
    "a dtype of integers before": (int8(COLUMN, orig_dtype="torch.int3"), None, ["orig_dtype", "torch.int3"]),
    "no format": (writers.encode_grid(INT8, COLUMN, {"convrot": False}), None, ["no key 'format'", "comfy_quant"]),
}


def test_every_dtype_of_floating_point_and_no_other_may_be_that_of_a_weight_before() -> None:
    names = {name: x.is_floating_point for name, x in vars(torch).items() if isinstance(x, torch.dtype)}
    assert {name for name in names if sayings.FLOATING.fullmatch(f"torch.{name}")} == {x for x in names if names[x]}
    assert not any(sayings.FLOATING.fullmatch(name) for name in ("bfloat32", "torch.float8_e4m3", "torch.torch.half"))


@pytest.mark.parametrize("what", WRONG)
def test_a_contradiction_is_a_problem_that_names_both_sayings_before_data_are_read(
    what: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    encode, entry, said = WRONG[what]
    path = tmp_path / "ltx.safetensors"
    writers.write_layers(path, state, config, encode=encode, entry=entry, metadata={})
    problems = inspect(path).problems
    assert problems
    for part in said:
        assert part in " ".join(problems), problems
    with pytest.raises(CheckpointError):
        ltx2ref.load(path)


def test_int8_without_a_marker_is_refused_where_others_have_one(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    writers.write_layers(path, state, config, encode=int8(COLUMN, 256, convrot=True), metadata={})
    tensors = load_file(path)
    layer = PREFIX + "transformer_blocks.0.attn1.to_q"
    del tensors[layer + ".comfy_quant"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{layer}.weight .*its marker is missing, 27 others have one"):
        ltx2ref.load(path)


def test_int4_without_a_marker_is_refused(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path = tmp_path / "ltx.safetensors"
    for encode in (writers.encode_w4a4, writers.encode_w4a8()):
        writers.write_layers(path, state, config, encode=encode, metadata={})
        tensors = {name: tensor for name, tensor in load_file(path).items() if "comfy_quant" not in name}
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=r"to_q\.weight I8"):
            ltx2ref.load(path)


def without(*suffixes: str) -> Callable[[State], State]:
    return lambda tensors: {name: x for name, x in tensors.items() if not name.endswith(suffixes)}


def with_tensor(suffix: str, value: torch.Tensor) -> Callable[[State], State]:
    name = PREFIX + "transformer_blocks.0.attn1.to_q" + suffix
    return lambda tensors: tensors | {name: value}


QUANT_STATE = ".quant_state.bitsandbytes__nf4"
DAMAGED: dict[str, tuple[str, Callable[[State], State]]] = {
    "MLX without biases": ("MLX q4", without(".biases")),
    "MLX with fewer biases": ("MLX q4", with_tensor(".biases", torch.ones(256, 2, dtype=torch.bfloat16))),
    "w4a8 without one codebook": ("asym_w4a8_int8", without("0.attn1.to_q.weight_codebook")),
    "int8 of bitsandbytes in tiles": (
        "bitsandbytes int8",
        with_tensor(".weight_format", torch.ones((), dtype=torch.uint8)),
    ),
    "nf4 without its state": ("bitsandbytes nf4", without(QUANT_STATE)),
    "nf4 without what is nested": ("bitsandbytes nf4, nested", without(".nested_absmax", ".nested_quant_map")),
    "nf4 with a state that is no JSON": (
        "bitsandbytes nf4",
        with_tensor(".weight" + QUANT_STATE, torch.zeros(9, dtype=torch.uint8)),
    ),
    "nf4 with fewer blocks": ("bitsandbytes nf4", with_tensor(".weight.absmax", torch.ones(7))),
    "6 bits with a codebook": ("asym_w4a8_int8 of 6 bits", with_tensor(".weight_codebook", torch.ones(16))),
    "w4a8 without scales": ("asym_w4a8_int8", without("_s_channel")),
    "mxfp8 with a NaN": ("mxfp8", with_tensor(".weight_scale", torch.full((256, 8), 255, dtype=torch.uint8))),
    "int8 of a norm": ("bitsandbytes int8", lambda tensors: norm(tensors, SCB=torch.ones(256))),
    "quanto's int8 of a norm": ("quanto int8", lambda tensors: norm(tensors, data="._data")),
}


def norm(tensors: State, data: str = "", **parts: torch.Tensor) -> State:
    """Quantise a norm's weight, which has one dimension."""
    layer = PREFIX + "transformer_blocks.0.attn1.q_norm"
    found = {name: x for name, x in tensors.items() if name != f"{layer}.weight"}
    found[f"{layer}.weight{data}"] = torch.ones(256, dtype=INT8)
    if data:
        found[f"{layer}.weight._scale"] = torch.ones(256, 1)
    return found | {f"{layer}.{name}": x for name, x in parts.items()}


@pytest.mark.parametrize("what", DAMAGED)
def test_parts_that_are_missing_or_do_not_fit_are_refused_with_a_message(
    what: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    layout, damage = DAMAGED[what]
    path = tmp_path / "ltx.safetensors"
    writers.write_layers(path, state, config, encode=LAYOUTS[layout][1], metadata={})
    save_file(damage(load_file(path)), path, writers.lightricks_metadata(config))
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.0\.attn1"):
        ltx2ref.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_type": "fp4"}, "it is bitsandbytes fp4, but by its name bitsandbytes nf4"),
        ({"dtype": "int8"}, "dtype: expected a dtype of floating point, got 'int8'"),
        ({"nested_dtype": 7}, "nested_dtype: expected str, got '7'"),
        ({"nested_offset": float("inf")}, "nested_offset: expected a finite number, got inf"),
    ],
)
def test_a_state_of_bitsandbytes_agrees_with_its_name_and_has_values_that_mean_something(
    change: dict[str, Any], message: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, ending = tmp_path / "ltx.safetensors", f"transformer_blocks.0.attn1.to_q.weight{QUANT_STATE}"
    writers.write_layers(path, state, config, encode=writers.encode_nf4(nested=True), metadata={})
    tensors = load_file(path)
    said = json.loads(bytes(tensors[PREFIX + ending].tolist()))
    text = json.dumps(said | change).replace("Infinity", "1e999")
    save_file(tensors | {PREFIX + ending: torch.tensor([*text.encode()], dtype=torch.uint8)}, path)
    problems = inspect(path).problems
    assert [problem for problem in problems if ending in problem and message in problem], problems
    with pytest.raises(CheckpointError, match=message):
        ltx2ref.load(path, config=config)


@pytest.mark.parametrize(("marker", "weights"), [(E5M2, E4M3), (E4M3, E5M2)])
def test_the_marker_of_a_float8_file_has_the_dtype_of_its_weights(
    marker: torch.dtype, weights: torch.dtype, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    writers.write_fp8_old_comfy(path, state, config, fp8=weights)
    assert inspect(path).problems == []
    writers.write_fp8_old_comfy(path, state, config, fp8=weights, marker_dtype=marker)
    with pytest.raises(CheckpointError, match=r"scaled_fp8 F8_.*: the weights have its dtype, but .* and 27 more"):
        ltx2ref.load(path)


def test_a_float8_file_with_its_marker_may_hold_one_stream(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, there = tmp_path / "ltx.safetensors", tmp_path / "audio.safetensors"
    truth = writers.write_fp8_old_comfy(path, state, config)
    convert(path, there, dialect="lightricks", keep=True, options=ReadingOptions(streams="audio"))
    loaded = ltx2ref.load(there, dtype=torch.float32)
    assert loaded.streams == ("audio",)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, truth[name].float()), name


def test_one_wrong_marker_is_one_problem(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path = tmp_path / "ltx.safetensors"
    writers.write_layers(path, state, config, encode=int8(COLUMN), metadata={})
    bad = with_tensor(".comfy_quant", writers.blob({"format": "int9"}))
    save_file(bad(load_file(path)), path, writers.lightricks_metadata(config))
    assert len(inspect(path).problems) == 1


def test_a_message_names_a_tensor_and_a_shape_once(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path = tmp_path / "ltx.safetensors"
    writers.write_layers(path, state, config, encode=fp8("float8_e5m2", ALL), metadata={})
    assert all(problem.count("to_q.weight") < 2 for problem in inspect(path).problems)
    writers.write_layers(path, state, config, encode=writers.encode_mxfp8({}), metadata={})
    bad = with_tensor(".weight_scale", torch.ones(3, 3, dtype=torch.uint8))
    save_file(bad(load_file(path)), path, writers.lightricks_metadata(config))
    assert inspect(path).problems[0].endswith("expected (256, 8) or (64, 32)")


@pytest.mark.parametrize(
    ("said", "message"),
    [({"format_version": "9.0"}, "format_version '9.0' is not supported"), ({"convrot": True}, "unknown keys convrot")],
)
def test_what_is_said_around_the_entries_of_layers_is_known(
    said: dict[str, Any], message: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    metadata = {"_quantization_metadata": json.dumps({"layers": {}} | said)}
    writers.write_layers(path, state, config, encode=int8(COLUMN), metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        ltx2ref.load(path)


def test_an_argument_that_settles_nothing_is_a_problem(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path = tmp_path / "ltx.safetensors"
    writers.write_layers(path, state, config, encode=writers.encode_w4a4, metadata={})
    with pytest.raises(CheckpointError, match="nibbles = 'high' settles nothing"):
        ltx2ref.load(path, nibbles="high")


# ---------------------------------------------------------------- quantisers' configs
def folder(tmp_path: Path, state: State, config: TransformerConfig, said: Any, encode: Encoder) -> tuple[Path, State]:
    """Write a diffusers folder with a quantiser's config."""
    layers, truth = {}, {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    for name, tensor in truth.copy().items():
        module = name.removesuffix(".weight")
        if writers.published_linears(module) and name != module and writers.is_linear(module, state):
            parts, truth[name] = encode(tensor)
            layers |= {f"{module}.{part}": value for part, value in parts.items()}
        else:
            layers[name] = tensor
    path = tmp_path / "transformer"
    writers.save(path / "diffusion_pytorch_model.safetensors", layers, {"format": "pt"})
    writers.write_json(path / "config.json", writers.diffusers_config(config) | {"quantization_config": said})
    return path, truth


def modelopt_fp8(weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    return writers.fp8_encoder(E4M3, input_scale="input_scale")(weight)


FOLDERS: dict[str, tuple[Any, Encoder]] = {
    "none": (None, lambda weight: ({"weight": weight}, weight)),
    "modelopt FP8": (writers.modelopt_config("FP8"), modelopt_fp8),
    "modelopt NVFP4": (writers.modelopt_config(), writers.encode_modelopt_nvfp4),
    "bitsandbytes nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        writers.encode_nf4(),
    ),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, writers.encode_bnb_int8),
    "quanto": ({"quant_method": "quanto", "weights_dtype": "int8"}, writers.encode_quanto),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_with_a_quantisers_config_loads(
    what: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, truth = folder(tmp_path, state, config, *FOLDERS[what])
    assert make_plan(path).notes == []
    assert_loads(path, truth)


@pytest.mark.parametrize(
    ("method", "name"), [("sdnq", "SDNQ"), ("nunchaku", "SVDQuant"), ("awq", "AWQ"), ("hqq", "hqq")]
)
def test_another_quantiser_is_named_in_the_error(
    method: str, name: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, _ = folder(tmp_path, state, config, {"quant_method": method}, FOLDERS["none"][1])
    with pytest.raises(CheckpointError, match=name):
        ltx2ref.load(path)


def test_a_config_of_a_format_that_no_weight_has_is_a_contradiction(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, _ = folder(tmp_path, state, config, writers.modelopt_config(), FOLDERS["none"][1])
    with pytest.raises(CheckpointError, match="says NVFP4, but no weight is nvfp4"):
        ltx2ref.load(path)


@pytest.mark.parametrize("what", ["modelopt NVFP4", "bitsandbytes nf4"])
def test_a_format_of_the_other_stream_is_none_of_this_one(
    what: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, truth = folder(tmp_path, state, config, *FOLDERS[what])
    file = path / "diffusion_pytorch_model.safetensors"
    layers = {name: x for name, x in load_file(file).items() if "audio" not in name}
    layers |= {name: x for name, x in truth.items() if "audio" in name}
    writers.save(file, layers, {"format": "pt"})
    alone = ltx2ref.load(path, streams="audio", dtype=torch.float32).state_dict()
    assert alone and all(torch.equal(x, truth[name].float()) for name, x in alone.items())
    assert len(ltx2ref.load(path, streams="video").state_dict()) > 1
    writers.save(file, truth, {"format": "pt"})
    with pytest.raises(CheckpointError, match="but no weight is"):
        ltx2ref.load(path)


LAYER = "transformer_blocks.0.attn1.to_q"
# Configs that contradict the weights: what they change, whose files they lie in, and what the error says.
CONTRADICTING: dict[str, tuple[str, dict[str, Any], str]] = {
    "8 bits of 4": (
        "bitsandbytes nf4",
        {"load_in_4bit": False, "load_in_8bit": True},
        "no weight is bitsandbytes int8",
    ),
    "4 bits of 8": (
        "bitsandbytes int8",
        {"load_in_8bit": False, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "no weight is bitsandbytes nf4",
    ),
    "another type": ("bitsandbytes nf4", {"bnb_4bit_quant_type": "fp4"}, "no weight is bitsandbytes fp4"),
    "both": ("bitsandbytes nf4", {"load_in_8bit": True}, "load_in_8bit and load_in_4bit contradict one another"),
    "a layer is skipped": ("bitsandbytes nf4", {"llm_int8_skip_modules": [LAYER]}, f"{LAYER}.weight U8 .*: quantised"),
    "a layer is ignored": ("modelopt NVFP4", {"ignore": ["proj_out", LAYER]}, f"{LAYER}.weight U8 .*: quantised, but"),
    "a pattern is": (
        "modelopt FP8",
        {"ignore": ["*.0.attn1.to_*"]},
        r"attn1\..*\(and 3 more\): quantised, but .* says",
    ),
    "a layer of quanto's": ("quanto", {"modules_to_not_convert": [LAYER]}, f"{LAYER}.weight._data .*: quantised, but"),
    "far too many patterns": ("modelopt FP8", {"ignore": ["*x"] * 1025}, "more than 1024 patterns"),
}


@pytest.mark.parametrize("case", CONTRADICTING)
def test_a_quantisers_config_that_contradicts_the_weights_is_a_problem(
    case: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    what, change, message = CONTRADICTING[case]
    said, encode = FOLDERS[what]
    path, _ = folder(tmp_path, state, config, said | change, encode)
    assert len(inspect(path).problems) == 1
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json") as caught:
        ltx2ref.load(path)
    assert re.search(message, str(caught.value))


def test_a_quantisers_config_may_list_layers_that_are_not_quantised(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    ignored = ["proj_out", "attn1", "*norm*", "*.to_gate_logits", 7, "transformer_blocks.0.attn1"]
    path, truth = folder(tmp_path, state, config, writers.modelopt_config(ignore=ignored), FOLDERS["modelopt NVFP4"][1])
    assert_loads(path, truth)


def test_quantos_map_is_read_and_must_fit(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path = tmp_path / "ltx.safetensors"
    layer = "transformer_blocks.0.attn1.to_q"

    def write(weights: str) -> State:
        said = base64.b64encode(json.dumps({layer: {"weights": weights, "activations": "none"}}).encode()).decode()
        metadata = {"quantization_format": "quanto", "quantization_map_base64": said}
        return writers.write_layers(path, state, config, encode=writers.encode_quanto, metadata=metadata)

    assert_loads(path, write("qint8"))
    write("qint4")
    with pytest.raises(CheckpointError, match=f"quantization_map_base64: {layer}: 'qint4' is not supported"):
        ltx2ref.load(path)
    write("none")
    with pytest.raises(
        CheckpointError, match=rf"quantization_map_base64: .*{layer}.weight._data is not quantised, but"
    ):
        ltx2ref.load(path)
    layer = "transformer_blocks.0.attn1.to_gate_logits"
    assert_loads(path, write("none"))
    layer = "a.norm.without.a.weight"
    assert_loads(path, write("none"))


@pytest.mark.parametrize(
    ("suffix", "name"),
    [(".qweight", "AWQ"), (".wscales", "SVDQuant"), (".svd_up", "SDNQ"), (".pre_quant_scale", "AWQ")],
)
def test_tensors_of_a_format_that_is_not_read_are_named_first(
    suffix: str, name: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    writers.write_transformer_only(path, state, config)
    tensors = load_file(path)
    tensors[PREFIX + "transformer_blocks.0.attn1.to_q" + suffix] = torch.ones(4)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        ltx2ref.load(path)
    assert caught.value.problems[0] == f"it is quantised with {name}, which is not supported"


# ---------------------------------------------------------------- names and GGUF
def test_mlx_may_leave_out_the_number_in_to_out(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path = tmp_path / "ltx.safetensors"
    truth = writers.write_layers(path, state, config, encode=writers.encode_mlx(8), metadata={"format": "mlx"})
    tensors = {name.replace(".to_out.0.", ".to_out."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"config": writers.lightricks_metadata(config)["config"], "format": "mlx"})
    assert_loads(path, truth)
    both = PREFIX + "transformer_blocks.0.attn1.to_out.0.bias"
    save_file(tensors | {both: tensors[both.replace(".0.bias", ".bias")].clone()}, path)
    with pytest.raises(CheckpointError, match=r"to_out\.bias"):
        ltx2ref.load(path)


def test_a_gguf_file_may_lack_dimensions_of_1(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path = tmp_path / "ltx.gguf"
    name = "keyframes_abs_pos_embedding"
    truth = writers.write_gguf(path, state | {name: state[name][0]}, config)
    assert_loads(path, truth | {name: truth[name][None]})


def test_a_ggml_type_that_cannot_be_decoded_is_a_problem(
    state: State, config: TransformerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gguf import quants

    path = tmp_path / "ltx.gguf"
    writers.write_gguf(
        path, state, config, types=lambda name, tensor: "Q8_0" if name.endswith("to_q.weight") else "F32"
    )
    from ltx2ref.checkpoint import decoders

    decoders.ggml_decodes.cache_clear()
    monkeypatch.setattr(quants, "_type_traits", {})
    problems = inspect(path).problems
    decoders.ggml_decodes.cache_clear()
    assert len(problems) == 6 and all("the gguf library cannot decode Q8_0" in problem for problem in problems)


# ---------------------------------------------------------------- statistics and the command
def test_statistics_of_a_broken_file_skip_what_has_no_format(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    writers.write_fp8_scaled(path, state, config)
    tensors = load_file(path)
    layer = PREFIX + "transformer_blocks.0.attn1.to_q."
    tensors[layer + "bias"] = tensors[layer + "bias"][1:].clone()
    tensors[PREFIX + "transformer_blocks.0.attn1.to_k.weight_scale"] = torch.tensor(float("nan"))
    save_file(tensors, path)
    found = inspect(path, stats=True)
    assert found.stats == []
    assert [problem for problem in found.problems if "attn1.to_q.bias" in problem and "wrong shape" in problem]
    assert [problem for problem in found.problems if "attn1.to_k.weight_scale" in problem and "not finite" in problem]


def test_inspect_says_how_weights_are_stored_and_who_says_so(
    state: State,
    config: TransformerConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ltx2ref.cli import main

    monkeypatch.setenv("COLUMNS", "200")  # no cell of the table is wrapped

    path = tmp_path / "ltx.safetensors"
    writers.write_layers(path, state, config, encode=int8(COLUMN, 64, convrot=True, convrot_groupsize=64), metadata={})
    assert main(["inspect", str(path), "--json"]) == 0
    rows = [row for row in json.loads(capsys.readouterr().out)["formats"] if row["format"] == "int8 ConvRot"]
    assert rows and all(row["stored"]["rotation"] == {"value": 64, "said": "marker"} for row in rows)
    assert rows[0]["stored"]["scales"] == {"value": "rows", "said": "shape"}
    assert main(["inspect", str(path)]) == 0
    assert "rotation 64 (marker)" in capsys.readouterr().out
    writers.write_layers(path, state, config, encode=writers.encode_modelopt_nvfp4)
    assert main(["inspect", str(path)]) == 1
    assert main(["inspect", str(path), "--nibbles", "low", "--scales", "flat"]) == 0
    assert "nibbles low (argument)" in capsys.readouterr().out


# ---------------------------------------------------------------- convert --keep
@pytest.mark.parametrize("layout", [name for name, (format, _) in LAYOUTS.items() if "float32" not in name])
def test_a_quantised_file_keeps_its_bits_and_its_sayings_in_the_other_dialect_and_back(
    layout: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, there, back = tmp_path / "ltx.safetensors", tmp_path / "transformer", tmp_path / "back.safetensors"
    truth = writers.write_layers(path, state, config, encode=LAYOUTS[layout][1], metadata={})
    report = convert(path, there, dialect="diffusers", keep=True)
    assert_loads(there, truth)
    convert(there, back, dialect="lightricks", keep=True)
    assert_loads(back, truth)
    first, last = load_file(path), load_file(back)
    assert first.keys() == last.keys() and report.dialect.startswith("diffusers")
    for name, tensor in first.items():
        assert tensor.dtype == last[name].dtype and tensor.shape == last[name].shape
        assert torch.equal(tensor.flatten().view(torch.uint8), last[name].flatten().view(torch.uint8)), name


def test_the_scale_of_a_table_is_renamed_with_it(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path, there, back = tmp_path / "ltx.safetensors", tmp_path / "transformer", tmp_path / "back.safetensors"
    truth = writers.write_fp8_vonkaiser(path, state, config)
    convert(path, there, dialect="diffusers", keep=True)
    assert_loads(there, truth)
    convert(there, back, dialect="lightricks", keep=True)
    assert load_file(path).keys() >= load_file(back).keys()
    assert_loads(back, truth)


@pytest.mark.parametrize("format", ["int8 ConvRot", "fp8 scaled", "int8"])
def test_entries_of_the_metadata_are_renamed(
    format: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    encode, entry = ENTRIES[format]
    path, there, back = tmp_path / "ltx.safetensors", tmp_path / "transformer", tmp_path / "back.safetensors"
    truth = writers.write_layers(path, state, config, encode=encode, entry=entry, metadata={})
    convert(path, there, dialect="diffusers", keep=True)
    assert_loads(there, truth)
    convert(there, back, dialect="lightricks", keep=True)
    assert_loads(back, truth)
    assert {*make_plan(back).weights["transformer_blocks.0.attn1.to_q.weight"].said.values()} >= {
        "_quantization_metadata"
    }


@pytest.mark.parametrize("what", [name for name in FOLDERS if name != "none"])
def test_a_quantisers_config_goes_along(what: str, state: State, config: TransformerConfig, tmp_path: Path) -> None:
    path, truth = folder(tmp_path, state, config, *FOLDERS[what])
    convert(path, tmp_path / "ltx.safetensors", dialect="lightricks", keep=True)
    assert_loads(tmp_path / "ltx.safetensors", truth)
    convert(path, tmp_path / "decoded", dialect="diffusers", dtype=torch.float32)
    assert_loads(tmp_path / "decoded", truth)


def test_what_the_other_dialect_cannot_say_is_refused_before_anything_is_written(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path = tmp_path / "ltx.safetensors"
    writers.write_nvfp4(path, state, config)
    with pytest.raises(
        CheckpointError, match=r"diffusers files cannot say this: nothing says which of two codes.*use --dtype"
    ) as x:
        convert(path, tmp_path / "transformer", dialect="diffusers", keep=True)
    assert "nibbles=" not in str(x.value)
    assert not (tmp_path / "transformer").exists()
    convert(path, tmp_path / "alone.safetensors", dialect="lightricks", keep=True)
    assert_loads(tmp_path / "alone.safetensors", writers.write_nvfp4(tmp_path / "again", state, config))
    with pytest.raises(ValueError, match="keep and dtype"):
        convert(path, tmp_path / "transformer", dialect="diffusers", keep=True, dtype=torch.float32)


@pytest.mark.parametrize(
    "layout", ["int8 by row", "fp8 in blocks", "mxfp8", "asym_w4a8_int8", "bitsandbytes nf4", "MLX q4"]
)
def test_scales_that_nothing_could_be_decoded_with_are_not_kept(
    layout: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    path, endings = tmp_path / "ltx.safetensors", (".weight_scale", ".weight_s_channel", ".weight.absmax", ".scales")
    writers.write_layers(path, state, config, encode=LAYOUTS[layout][1], metadata={})
    tensors = load_file(path)
    for layer in ("to_q", "to_k"):
        name = next(
            n for n in tensors if n.startswith(f"{PREFIX}transformer_blocks.0.attn1.{layer}") and n.endswith(endings)
        )
        bad = tensors[name].clone()
        bad.view(-1)[-1] = 255 if bad.dtype == torch.uint8 else float("nan") if layer == "to_q" else float("inf")
        tensors[name] = bad
    save_file(tensors, path, writers.lightricks_metadata(config))
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "transformer", dialect="diffusers", keep=True)
    assert len(caught.value.problems) == 2 and all("not finite" in problem for problem in caught.value.problems)
    assert not (tmp_path / "transformer").exists()


def test_formats_of_gguf_cannot_be_kept(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    writers.write_gguf(tmp_path / "ltx.gguf", state, config)
    with pytest.raises(CheckpointError, match=r"only GGUF has .*Q8_0"):
        convert(tmp_path / "ltx.gguf", tmp_path / "transformer", dialect="diffusers", keep=True)
