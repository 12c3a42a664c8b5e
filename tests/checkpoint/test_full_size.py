"""The three released models at full size, on the meta device, have the published tensors, and run 1280 x 704.

pytest tests/checkpoint/test_full_size.py
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import make_manifest
import pytest
import torch
from tiny import tiny_config
from torch import nn

from ltx2ref import LTX_2_0, LTX_2_3, LTX_2_5, LTX2VideoTransformer3DModel, TransformerConfig

Shapes = dict[str, tuple[int, ...]]

PRESETS = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}
PARAMETERS = {"2.0": 18_876_174_592, "2.3": 18_988_838_144, "2.5": 18_987_859_200}
TENSORS = {"2.0": 3510, "2.3": 4186, "2.5": 4091}
TENSORS_PER_BLOCK = {"2.0": 72, "2.3": 86, "2.5": 84}
F32_TENSORS = {"2.0": 194, "2.3": 290, "2.5": 290}
# The md5 of all names and shapes of the transformer (2.0, 2.3) or of the whole bf16 file (2.5, with connectors).
MODEL_HASHES = {
    "2.0": "c567aaa37d5ed7454c73aa6024458661",
    "2.3": "1c55afad76ed33c112a2978550b524d1",
    "2.5": "7960c5dc4626650824e36f65a8e992e9",
}
# ltx-2.5-22b-dev-transformer-bf16.safetensors: an 8-byte length, a header, the data.
FILE_BYTES_2_5, HEADER_BYTES_2_5 = 42_018_190_584, 677_616

FLAGS = (
    "gated_attn",
    "audio_gated_attn",
    "cross_attn_mod",
    "audio_cross_attn_mod",
    "ff_bias",
    "audio_ff_bias",
    "use_prompt_embeddings",
    "use_prompt_adaln_single",
    "use_keyframes_abs_pos_embedding",
    "perturbed_attn",
    "rope_double_precision",
)
# The Plackett-Burman design of 12 rows with its complement, in which any three flags take all eight combinations.
FIRST = "11011100010"
HALF = [FIRST[i:] + FIRST[:i] for i in range(11)] + ["0" * 11]
DESIGN = HALF + [row.translate(str.maketrans("01", "10")) for row in HALF]

releases = pytest.mark.parametrize("release", PRESETS)


@functools.cache
def manifest() -> Any:
    return json.loads((Path(__file__).parents[2] / "weights_manifest.json").read_text(encoding="utf-8"))


def manifest_shapes(release: str, *, diffusers: bool = False) -> Shapes:
    """Return the names of one release, with `{i}` filled in, and their shapes, under published or diffusers' names."""
    described, shapes = manifest()["releases"][release], {}
    for published, tensor in described["tensors"].items():
        name = tensor["diffusers"] if diffusers else published
        for i in range(described["blocks"]) if "{i}" in name else (0,):
            shapes[name.replace("{i}", str(i))] = tuple(tensor["shape"])
    return shapes


@functools.cache
def full_size(release: str) -> LTX2VideoTransformer3DModel:
    return on_meta(PRESETS[release])


def on_meta(config: TransformerConfig) -> LTX2VideoTransformer3DModel:
    with torch.device("meta"):
        return LTX2VideoTransformer3DModel(config)


def diffusers_shapes(config: TransformerConfig) -> Shapes:
    from diffusers import LTX2VideoTransformer3DModel as DiffusersModel

    with torch.device("meta"):
        return state_shapes(DiffusersModel(**config.to_diffusers()))


def state_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def connectors_2_5() -> Shapes:
    """Return what shares the published 2.5 files with the transformer: a text model's tensors, all in BF16."""
    shapes: Shapes = {}
    for stream, width in (("video", 4096), ("audio", 2048)):
        shapes[f"{stream}_embeddings_connector.learnable_registers"] = (128, width)
        for i in range(8):
            block = f"{stream}_embeddings_connector.transformer_1d_blocks.{i}"
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= make_manifest.linear(f"{block}.attn1.{name}", width, width)
            shapes |= make_manifest.linear(f"{block}.attn1.to_gate_logits", 32, width)
            shapes |= {f"{block}.attn1.{name}.weight": (width,) for name in ("q_norm", "k_norm")}
            shapes |= make_manifest.linear(f"{block}.ff.net.0.proj", 4 * width, width)
            shapes |= make_manifest.linear(f"{block}.ff.net.2", width, 4 * width)
    return shapes


def model_hash(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return DiffSynth's hash: the md5 of all names, alone and with their shapes."""
    parts = [part for name, shape in shapes.items() for part in (name, f"{name}:{'_'.join(map(str, shape))}")]
    return hashlib.md5(",".join(sorted(parts)).encode()).hexdigest()


def count(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


# ---------------------------------------------------------------- the manifest
def test_the_manifest_is_what_its_script_writes(capsys: pytest.CaptureFixture[str]) -> None:
    status = make_manifest.main(["--check"])
    assert (status, capsys.readouterr().out) == (0, "")


@pytest.mark.parametrize(
    "changed",
    [("[4096, 128]", "[4096, 127]"), ("18876174592", "18876174593"), ("schema_version", "")],
    ids=["shape", "total", "missing"],
)
def test_check_fails_where_the_manifest_is_missing_or_differs_and_shows_the_difference(
    changed: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = tmp_path / "weights_manifest.json", make_manifest.PATH.read_text(encoding="utf-8")
    monkeypatch.setattr(make_manifest, "PATH", path)
    right, wrong = changed
    if wrong:
        path.write_text(text.replace(right, wrong, 1), encoding="utf-8")
    assert make_manifest.main(["--check"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("+") and right in line for line in printed), printed
    assert any(line.startswith("-") and wrong in line for line in printed), printed
    assert make_manifest.main([]) == 0
    assert path.read_text(encoding="utf-8") == text


@releases
def test_the_manifests_names_and_shapes_have_the_published_md5(release: str) -> None:
    shapes = manifest_shapes(release) | (connectors_2_5() if release == "2.5" else {})
    assert model_hash({manifest()["prefix"] + name: s for name, s in shapes.items()}) == MODEL_HASHES[release]


def test_the_manifests_dtypes_account_for_every_byte_of_the_published_2_5_file() -> None:
    data = manifest()["releases"]["2.5"]["totals"]["bytes"] + 2 * count(connectors_2_5())
    assert 8 + HEADER_BYTES_2_5 + data == FILE_BYTES_2_5


@releases
def test_the_manifests_totals_are_the_published_ones_and_those_of_its_own_rows(release: str) -> None:
    described = manifest()["releases"][release]
    totals, rows = described["totals"], described["tensors"]
    f32, parameters = F32_TENSORS[release], PARAMETERS[release]
    tables = {name: shape for name, shape in manifest_shapes(release).items() if "scale_shift_table" in name}
    assert totals == {
        "tensors": TENSORS[release],
        "tensors_per_block": TENSORS_PER_BLOCK[release],
        "parameters": parameters,
        "bytes": 2 * parameters + 2 * count(tables),
        "F32": f32,
        "BF16": TENSORS[release] - f32,
    }
    shapes = manifest_shapes(release)
    assert (len(shapes), count(shapes)) == (totals["tensors"], totals["parameters"])
    assert sum("{i}" in name for name in rows) == totals["tensors_per_block"]
    assert len(tables) == f32
    for name, row in rows.items():
        assert row["dtype"] == ("F32" if "scale_shift_table" in name else "BF16"), name


# ---------------------------------------------------------------- the models
@pytest.mark.slow
@releases
def test_a_full_size_model_has_the_published_number_of_parameters_and_tensors(release: str) -> None:
    parameters = list(full_size(release).parameters())
    assert sum(p.numel() for p in parameters) == PARAMETERS[release]
    assert len(parameters) == len(full_size(release).state_dict()) == TENSORS[release]
    assert all(p.is_meta for p in parameters)


@pytest.mark.slow
@releases
def test_a_full_size_model_has_the_names_and_shapes_of_the_manifest(release: str) -> None:
    assert state_shapes(full_size(release)) == manifest_shapes(release, diffusers=True)


@pytest.mark.diffusers
@pytest.mark.slow
@releases
def test_a_full_size_model_has_the_names_and_shapes_of_diffusers(release: str) -> None:
    assert state_shapes(full_size(release)) == diffusers_shapes(PRESETS[release])


# A block takes 0.1 s even on the meta device. All blocks of a release are alike, so only one release runs all of them.
@pytest.mark.slow
@pytest.mark.parametrize(("release", "blocks"), [("2.0", 2), ("2.3", 2), ("2.5", 48)])
def test_five_seconds_at_1280_by_704_come_out_in_the_shapes_that_went_in(
    release: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = full_size(release).to(torch.bfloat16), PRESETS[release]
    (frames, height, width), audio_frames = (16, 704 // 32, 1280 // 32), 126  # for 121 frames at 24 per second
    tokens = frames * height * width
    assert (tokens, 1 + 8 * (frames - 1)) == (14_080, 121)

    def bf16(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    text_dims = (3840, 3840) if config.use_prompt_embeddings else (4096, 2048)
    monkeypatch.setattr(model, "transformer_blocks", model.transformer_blocks[:blocks])
    with torch.inference_mode():
        video, audio = model(
            bf16(1, tokens, 128),
            bf16(1, audio_frames, 128),
            *(bf16(1, 1024, dim) for dim in text_dims),
            timestep=bf16(1),
            sigma=bf16(1),
            num_frames=frames,
            height=height,
            width=width,
            audio_num_frames=audio_frames,
            return_dict=False,
        )
    for x, n in ((video, tokens), (audio, audio_frames)):
        assert (tuple(x.shape), x.dtype, x.device.type) == ((1, n, 128), torch.bfloat16, "meta")


# ---------------------------------------------------------------- other configs
def test_the_sweep_tries_every_combination_of_any_three_flags() -> None:
    assert set(FLAGS) == {name for name, value in vars(LTX_2_0).items() if isinstance(value, bool)}
    for i, j, k in itertools.combinations(range(len(FLAGS)), 3):
        assert len({row[i] + row[j] + row[k] for row in DESIGN}) == 8, (FLAGS[i], FLAGS[j], FLAGS[k])


@pytest.mark.diffusers
@pytest.mark.slow
@pytest.mark.parametrize("row", DESIGN)
def test_with_any_flags_the_names_and_shapes_are_those_of_diffusers(row: str) -> None:
    flags = {flag: bit == "1" for flag, bit in zip(FLAGS, row, strict=True)}
    config = tiny_config("2.5", num_layers=1, **flags)
    assert state_shapes(on_meta(config)) == diffusers_shapes(config)


@pytest.mark.diffusers
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"out_channels": None},
        {"audio_out_channels": None},
        {"rope_type": "interleaved"},
        {"num_layers": 3},
        {
            "num_attention_heads": 3,
            "audio_num_attention_heads": 3,
            "cross_attention_dim": 78,
            "audio_cross_attention_dim": 42,
        },
        {"audio_attention_head_dim": 40, "audio_cross_attention_dim": 80},  # audio is the wider stream
    ],
    ids=lambda changes: "-".join(changes),
)
@releases
def test_with_other_sizes_the_names_and_shapes_are_those_of_diffusers(release: str, changes: dict[str, Any]) -> None:
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 26,
        "cross_attention_dim": 52,
        "num_layers": 1,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 14,
        "audio_cross_attention_dim": 28,
    }
    config = tiny_config(release, **sizes | changes)
    assert state_shapes(on_meta(config)) == diffusers_shapes(config)
