"""The writers of checkpoint dialects and quantised formats agree with published facts, and with slow decoders.

pytest tests/checkpoint/test_writers.py
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import random_model
from torch import Tensor
from writers import PREFIX, WRITERS, State, original_name

from ltx2ref import LTX_2_0, LTX_2_3, LTX_2_5, TransformerConfig

pytestmark = pytest.mark.slow

RELEASES = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SAFETENSORS = [name for name in WRITERS if name != "gguf" and not name.endswith("/")]
UNPREFIXED = {"diffusers/": "", "fastvideo/": "", "prefixed_diffusers": "transformer."}
DIFFUSERS_NAMES = ("diffusers/", "prefixed_diffusers")

releases = pytest.mark.parametrize("release", RELEASES)


def weights(rows: int, columns: int) -> Tensor:
    """Return rows of very different sizes, one of which is zero."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 0, rows)[:, None]
    x[rows // 2] = 0
    return x


@pytest.fixture(scope="module")
def config() -> TransformerConfig:
    return writers.quantisable_config("2.5", num_layers=1)


@pytest.fixture(scope="module")
def state(config: TransformerConfig) -> State:
    return random_model(config).state_dict()


def read(path: Path) -> State:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def metadata_of(path: Path) -> dict[str, str] | None:
    with safe_open(path, "np") as file:
        metadata: dict[str, str] | None = file.metadata()
    return metadata


# ---------------------------------------------------------------- names and metadata
@releases
def test_the_published_names_are_those_of_the_manifest(release: str) -> None:
    path = Path(__file__).parents[2] / "weights_manifest.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["releases"][release]["tensors"]
    assert [original_name(row["diffusers"]) for row in rows.values()] == list(rows)


@releases
def test_the_config_in_the_metadata_reads_back(release: str) -> None:
    for config in (RELEASES[release], writers.quantisable_config(release), writers.padded_config(release)):
        said = json.loads(writers.lightricks_metadata(config)["config"])["transformer"]
        assert TransformerConfig.from_lightricks(said) == config
        assert TransformerConfig.from_diffusers(writers.diffusers_config(config)) == config
    assert len(writers.lightricks_config(RELEASES[release])) == {"2.0": 49, "2.3": 59, "2.5": 61}[release]


def test_the_configs_of_2_5_are_the_published_ones() -> None:
    text = writers.lightricks_metadata(LTX_2_5)["config"]
    assert len(text) == 2199
    assert hashlib.sha256(text.encode()).hexdigest().startswith("13be9edf16635af9")


def test_the_diffusers_config_of_2_5_has_the_published_size(tmp_path: Path) -> None:
    writers.write_json(tmp_path / "config.json", writers.diffusers_config(LTX_2_5))
    assert (tmp_path / "config.json").stat().st_size == 1440


def test_the_marks_of_layers_have_the_published_lengths() -> None:
    assert (len(writers.blob(writers.CONVROT_MARK)), len(writers.blob(writers.TORCHAO_MARK))) == (72, 240)


# ---------------------------------------------------------------- files
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "gguf"])
def test_what_a_file_stores_unquantised_is_the_truth_bit_for_bit(
    name: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    truth = WRITERS[name](tmp_path / name, state, config)
    stored = read(tmp_path / name)
    assert truth.keys() == state.keys()
    quantised = 0
    for key, tensor in truth.items():
        found = stored[UNPREFIXED.get(name, PREFIX) + (key if name in DIFFUSERS_NAMES else original_name(key))]
        quantised += found.dtype.itemsize == 1
        assert found.dtype.itemsize == 1 or (torch.equal(found, tensor) and found.dtype == tensor.dtype)
        assert found.dtype.itemsize > 1 or tensor.dtype == torch.float32
        assert tensor.shape == state[key].shape
    plain = name in ("single_file", "split", "transformer_only", "prefixed_diffusers") or name.endswith("/")
    assert quantised == (0 if plain else len(truth) if name == "fp8_vonkaiser" else 28)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_truth_is_near_the_state_in_every_dialect(
    name: str, state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    truth = WRITERS[name](tmp_path / name, state, config)
    for key, tensor in state.items():
        assert (truth[key].double() - tensor.double()).norm() < 0.11 * tensor.double().norm(), key


@releases
def test_a_single_file_has_tensors_of_every_foreign_prefix(release: str, tmp_path: Path) -> None:
    config = writers.quantisable_config(release, num_layers=1)
    state = random_model(config).state_dict()
    writers.write_single_file(tmp_path / "file", state, config)
    foreign = read(tmp_path / "file").keys() - {PREFIX + original_name(name) for name in state}
    prefixes = (
        "vae.",
        "audio_vae.",
        "vocoder.",
        "text_embedding_projection.",
        PREFIX + "video_embeddings_connector.",
        PREFIX + "audio_embeddings_connector.",
    )
    legacy = PREFIX + "embeddings_connector."
    assert all(any(name.startswith(prefix) for name in foreign) for prefix in prefixes)
    assert all(name.startswith((*prefixes, legacy)) for name in foreign)
    assert any(name.startswith(legacy) for name in foreign) == (release == "2.0")


def test_metadata_is_where_the_published_files_have_it(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    four = {"config", "gemma_source_checkpoint", "license", "model_version"}
    listed = four | {"_quantization_metadata"}
    for name, keys in {
        "split": four,
        "int8_convrot": four,
        "nvfp4": listed,
        "fp8_scaled": listed,
        "fp8_new_comfy": four,
        "fp8_vonkaiser": None,
        "nvfp4_torchao": None,
    }.items():
        WRITERS[name](tmp_path / name, state, config)
        found = metadata_of(tmp_path / name)
        assert (found.keys() if found else None) == keys, name


def test_shards_hold_every_tensor_once_where_the_index_says(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    truth = writers.write_diffusers(tmp_path, state, config, dtype=torch.float32, shards=3)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in truth.values())
    found = {name: path.name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert found == index["weight_map"] and found.keys() == truth.keys() and len(set(found.values())) == 3


def test_a_layer_says_its_format_in_a_blob_or_in_the_metadata(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    writers.write_fp8_new_comfy(tmp_path / "file", state, config, blobs=False, metadata_says="float8_e4m3fn")
    found = metadata_of(tmp_path / "file")
    layers = json.loads(found["_quantization_metadata"])["layers"] if found else {}
    assert len(layers) == 28 and not any("comfy_quant" in name for name in read(tmp_path / "file"))
    writers.write_fp8_new_comfy(tmp_path / "file", state, config, fp8=torch.float8_e5m2)
    stored = read(tmp_path / "file")
    for layer in layers:
        assert json.loads(bytes(stored[layer + ".comfy_quant"].tolist())) == {"format": "float8_e5m2"}
        assert stored[layer + ".weight"].dtype == torch.float8_e5m2


@pytest.mark.parametrize("options", [{}, {"marker_dtype": torch.float32, "marker_elements": 0, "scale_shape": (1,)}])
def test_the_old_comfy_marker_is_as_asked_for(
    options: dict[str, Any], state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    writers.write_fp8_old_comfy(tmp_path / "file", state, config, **options)
    stored = read(tmp_path / "file")
    marker = stored[PREFIX + "scaled_fp8"]
    assert marker.dtype == options.get("marker_dtype", torch.float8_e4m3fn)
    assert len(marker) == options.get("marker_elements", 2)
    scale = stored[PREFIX + "transformer_blocks.0.attn1.to_q.scale_weight"]
    assert scale.shape == options.get("scale_shape", ())


def test_biases_are_cast_too_if_asked_for(state: State, config: TransformerConfig, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn1.to_q.bias"
    for biases in (False, True):
        truth = writers.write_fp8_cast(tmp_path / "file", state, config, biases=biases)
        assert (read(tmp_path / "file")[PREFIX + name].dtype == torch.float8_e4m3fn) == biases
        assert (truth[name].dtype == torch.float32) == biases


# ---------------------------------------------------------------- fp8
@pytest.mark.parametrize("fp8", FP8)
def test_fp8_is_within_half_a_step(fp8: torch.dtype) -> None:
    weight = weights(40, 48)
    parts, truth = writers.fp8_encoder(fp8)(weight)
    assert torch.equal(truth, parts["weight"].float() * parts["weight_scale"])
    info = torch.finfo(fp8)
    half_step = torch.maximum(
        weight.double().abs() * info.eps / 2, parts["weight_scale"].double() * info.smallest_normal * info.eps / 2
    )
    assert ((truth.double() - weight.double()).abs() <= half_step * (1 + 1e-6)).all()


# ---------------------------------------------------------------- int8 ConvRot
def test_the_hadamard_matrix_is_symmetric_and_orthogonal() -> None:
    h = writers.hadamard()
    assert torch.equal(h, h.T) and torch.equal(h @ h, torch.eye(256, dtype=torch.float64))
    assert torch.equal(h.abs(), torch.full_like(h, 1 / 16))


def test_int8_is_within_half_a_step_where_it_is_rotated_and_within_eight_where_it_is_not() -> None:
    weight = weights(40, 512)
    parts, truth = writers.encode_int8_convrot(weight)
    error, scale = truth.double() - weight.double(), parts["weight_scale"].double()
    assert (writers.rotate(error).abs() <= scale / 2 * (1 + 1e-3)).all()
    assert (
        error.abs() <= 16 * scale / 2
    ).all()  # the sum of 256 errors, each of which is at most scale / 2, divided by 16
    assert parts["weight"].abs().amax() == 127 and (parts["weight"] != 0).float().mean() > 0.9


def test_a_rotated_weight_is_another_one() -> None:
    weight = weights(40, 512).double()
    turned = writers.rotate(weight)
    assert (turned - weight).norm() > 0.9 * weight.norm()
    assert torch.allclose(writers.rotate(turned), weight, rtol=0, atol=1e-14)
    assert torch.allclose(turned[:, 256:], weight[:, 256:] @ writers.hadamard(), rtol=0, atol=1e-14)


# ---------------------------------------------------------------- NVFP4
@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (256, 12), (384, 8)])
def test_the_tile_formula_is_a_bijection_of_integers_and_of_arrays(rows: int, columns: int) -> None:
    one_by_one = [writers.tile_offset(r, c, columns) for r, c in itertools.product(range(rows), range(columns))]
    at_once = writers.tile_offset(torch.arange(rows)[:, None], torch.arange(columns)[None], columns)
    assert one_by_one == at_once.flatten().tolist()
    assert sorted(one_by_one) == list(range(rows * columns))


@pytest.mark.parametrize(
    ("r", "c", "columns", "offset"),
    [
        (0, 0, 4, 0),
        (0, 3, 4, 3),
        (1, 0, 4, 16),
        (32, 0, 4, 4),
        (127, 3, 4, 511),
        (0, 4, 8, 512),
        (128, 0, 8, 1024),
        (33, 5, 8, 533),
    ],
)
def test_scales_are_where_the_tiles_have_them(r: int, c: int, columns: int, offset: int) -> None:
    assert writers.tile_offset(r, c, columns) == offset


def test_tiles_are_padded_with_zeros() -> None:
    tiled = writers.swizzle(torch.ones(40, 3).to(torch.float8_e4m3fn)).float()
    assert tiled.shape == (128, 4) and tiled.sum() == 120


def test_the_order_of_nibbles_matters() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert writers.pack_nibbles(codes, high_first=True).tolist() == [[0x12, 0xF0]]
    assert writers.pack_nibbles(codes, high_first=False).tolist() == [[0x21, 0x0F]]


def slow_nvfp4(parts: State, rows: int, columns: int, high_first: bool, tiled: bool = True) -> Tensor:
    """Decode element by element, as the documents describe the format."""
    scales, packed = parts["weight_scale"].flatten().float().tolist(), parts["weight"].tolist()
    scale_2 = parts["weight_scale_2"].item()
    padded = -(-columns // 64) * 4
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    for r, k in itertools.product(range(rows), range(columns)):
        high = (k % 2 == 0) == high_first
        code = packed[r][k // 2] >> 4 if high else packed[r][k // 2] & 15
        value = (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7] * (-1 if code & 8 else 1)
        where = writers.tile_offset(r, k // 16, padded) if tiled else r * (columns // 16) + k // 16
        weight[r, k] = value * scales[where] * scale_2
    return weight.float()


@pytest.mark.parametrize(("rows", "columns"), [(40, 48), (130, 80)])
def test_a_slow_decoder_reads_the_truth_from_nvfp4(rows: int, columns: int) -> None:
    weight, groups = weights(rows, columns), columns // 16
    parts, truth = writers.encode_nvfp4(weight)
    assert parts["weight_scale"].shape == (-(-rows // 128) * 128, -(-groups // 4) * 4)
    assert torch.equal(slow_nvfp4(parts, rows, columns, high_first=True), truth)
    assert not torch.equal(slow_nvfp4(parts, rows, columns, high_first=False), truth)
    parts, same = writers.encode_torchao(weight)
    assert parts["weight_scale"].shape == (32 * -(-rows // 128), 16 * -(-groups // 4))
    assert torch.equal(same, truth) and torch.equal(slow_nvfp4(parts, rows, columns, high_first=False), truth)
    parts, _ = writers.encode_torchao(weight, swizzled=False)
    assert torch.equal(slow_nvfp4(parts, rows, columns, high_first=False, tiled=False), truth)


def test_nvfp4_is_within_half_a_step_of_what_the_scales_can_say() -> None:
    blocks = weights(40, 48).double().unflatten(1, (-1, 16))
    codes, scales, scale_2 = writers.quantise_nvfp4(blocks.flatten(1))
    truth = writers.dequantise_nvfp4(codes, scales, scale_2).double().unflatten(1, (-1, 16))
    steps = (scales.double() * scale_2.double())[:, :, None]
    size = blocks.abs() / steps.clamp(min=1e-300)
    half_step = torch.where(size < 2, 0.25, torch.where(size < 4, 0.5, 1.0)) * steps
    assert ((truth - blocks).abs() <= half_step * (1 + 1e-6))[steps.expand_as(blocks) > 0].all()
    assert set(codes.flatten().tolist()) >= set(range(16)) - {
        8
    }  # all values occur except negative zero, which is not needed


# ---------------------------------------------------------------- GGUF
@pytest.mark.parametrize("kind", writers.GGUF_BLOCKS)
def test_the_decoder_of_gguf_blocks_agrees_with_the_library(kind: str) -> None:
    import gguf

    weight, ggml_type = weights(40, 96), gguf.GGMLQuantizationType[kind]
    coded = gguf.quants.quantize(weight.numpy(), ggml_type)
    decoded = writers.decode_gguf(torch.from_numpy(coded), kind)
    assert decoded.shape == weight.shape
    assert torch.equal(decoded, torch.from_numpy(gguf.quants.dequantize(coded, ggml_type)))


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_the_gguf_library_reads_the_truth(prefix: str, state: State, config: TransformerConfig, tmp_path: Path) -> None:
    import gguf

    truth = writers.write_gguf(tmp_path / "file", state, config, prefix=prefix)
    reader = gguf.GGUFReader(tmp_path / "file")
    found = {tensor.name: tensor for tensor in reader.tensors}
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {"F32", "F16", "BF16", *writers.GGUF_BLOCKS}
    for name, tensor in truth.items():
        stored = found[prefix + original_name(name)]
        decoded = gguf.quants.dequantize(stored.data, stored.tensor_type)
        assert torch.equal(torch.from_numpy(decoded.copy()).reshape(tensor.shape), tensor.float()), name
    assert any("connector" in name for name in found)


def test_a_gguf_file_has_its_architecture_config_and_the_shape_of_what_is_reshaped(
    state: State, config: TransformerConfig, tmp_path: Path
) -> None:
    import gguf

    writers.write_gguf(tmp_path / "file", state, config)
    reader = gguf.GGUFReader(tmp_path / "file")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "ltxv" and said["model_version"] == "2.5.0"
    assert TransformerConfig.from_lightricks(json.loads(said["config"])["transformer"]) == config
    assert said["comfy.gguf.orig_shape.patchify_proj.weight"] == [256, 17]
    (stored,) = [tensor for tensor in reader.tensors if tensor.name == "patchify_proj.weight"]
    assert stored.shape.tolist() == [256, 17]  # columns first: 17 rows of 256


# ---------------------------------------------------------------- configs
@releases
def test_the_layers_inside_the_blocks_fit_every_format(release: str) -> None:
    state = random_model(writers.quantisable_config(release)).state_dict()
    chosen = [
        name
        for name, tensor in state.items()
        if tensor.ndim == 2 and name.endswith(".weight") and writers.published_linears(name.removesuffix(".weight"))
    ]
    assert len(chosen) == 2 * 28 and all(state[name].shape[1] % 256 == 0 for name in chosen)


@releases
def test_padded_configs_have_layers_that_fill_no_tile(release: str, tmp_path: Path) -> None:
    config = writers.padded_config(release, num_layers=1)
    state = random_model(config).state_dict()
    for name in ("nvfp4", "nvfp4_torchao"):
        WRITERS[name](tmp_path / name, state, config)
    scales = read(tmp_path / "nvfp4")
    layer = PREFIX + "transformer_blocks.0.attn1.to_q"
    assert scales[layer + ".weight"].shape == (48, 24) and scales[layer + ".weight_scale"].shape == (128, 4)
    assert read(tmp_path / "nvfp4_torchao")[layer + ".weight_scale"].shape == (32, 16)
