"""LoRAs of every published format are merged as diffusers and PEFT fuse them, bit for bit, or are refused.

pytest tests/checkpoint/test_lora.py
"""

import json
import logging
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from safetensors.torch import save_file
from tiny import RELEASES, random_model, tiny_config
from torch import Tensor

import ltx2ref
from ltx2ref import CheckpointError, TransformerConfig
from ltx2ref.checkpoint import match, storage
from ltx2ref.checkpoint.lora import LORA_PREFIXES, SKIPPED, UNDERSCORED, lora_format, read_lora, spellings
from ltx2ref.checkpoint.settle import ReadingOptions
from ltx2ref.checkpoint.shapes import parameter_shapes

State = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]  # A (R, IN) and B (OUT, R) by diffusers' name of a layer

ROUNDOFF = 2.0**-24  # the unit roundoff of float32
RANK = 5
HIGH_RANK = 21  # larger than the width of some layers
STRENGTH = 0.7

releases = pytest.mark.parametrize("release", RELEASES)


# ---------------------------------------------------------------- bases and LoRAs
def base(path: Path, release: str, dtype: torch.dtype = torch.float32) -> tuple[Path, TransformerConfig, State]:
    """Write a checkpoint with diffusers' names, and return its path, its config and its state."""
    config = tiny_config(release)
    state = {name: tensor.detach() for name, tensor in random_model(config, dtype).state_dict().items()}
    save_file(state, path / "base.safetensors")
    return path / "base.safetensors", config, state


def make_plan(path: Path, config: TransformerConfig) -> match.Plan:
    return match.make_plan(path, ReadingOptions(config))


def linears(state: State) -> list[str]:
    return [
        name.removesuffix(".weight") for name, tensor in state.items() if name.endswith(".weight") and tensor.ndim == 2
    ]


def random_pairs(
    state: State, layers: list[str], seed: int = 1, dtype: torch.dtype = torch.float32, rank: int = RANK
) -> Pairs:
    """Return factors that change every weight by about its own size.

    The rank is clipped to the layer, as in published files.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer in layers:
        rows, columns = state[f"{layer}.weight"].shape
        r = min(rank, rows, columns)
        a, b = torch.randn(r, columns, generator=generator), torch.randn(rows, r, generator=generator)
        pairs[layer] = (a.to(dtype), (b * (r * columns) ** -0.5).to(dtype))
    return pairs


def lightricks(pairs: Pairs, prefix: str = "diffusion_model.") -> State:
    return {
        f"{prefix}{writers.original_name(layer)}.lora_{part}.weight": tensor
        for layer, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def diffusers(pairs: Pairs, prefix: str = "transformer.") -> State:
    return {
        f"{prefix}{layer}.lora_{part}.weight": tensor
        for layer, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def kohya(pairs: Pairs, prefix: str = "lora_unet_", names: Callable[[str], str] = writers.original_name) -> State:
    return {
        f"{prefix}{names(layer).replace('.', '_')}.lora_{part}.weight": tensor
        for layer, pair in pairs.items()
        for part, tensor in zip(("down", "up"), pair, strict=True)
    }


def alphas(
    pairs: Pairs, value: Callable[[int], float], shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return an alpha for every layer, computed from its position."""
    return {layer: torch.full(shape, value(i), dtype=dtype) for i, layer in enumerate(pairs)}


def save(path: Path, tensors: State, adapter: dict[str, Any] | None = None, **metadata: str) -> Path:
    if adapter is not None:
        metadata["lora_adapter_metadata"] = json.dumps(adapter, indent=2, sort_keys=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def assert_merged(merged: State, state: State, pairs: Pairs, scales: dict[str, float]) -> None:
    """Require W + scale * B @ A, compared with float64, within float32's roundings, and all other weights unchanged.

    There are r roundings for the product, and two more.
    """
    for name, weight in state.items():
        layer = name.removesuffix(".weight")
        if layer not in pairs or name == layer:
            assert torch.equal(merged[name], weight), name
            continue
        a, b = (factor.double() for factor in pairs[layer])
        exact = weight.double() + scales[layer] * (b @ a)
        bound = ROUNDOFF * ((len(a) + 2) * abs(scales[layer]) * (b.abs() @ a.abs()) + exact.abs()) * 1.01
        error = (merged[name].double() - exact).abs()
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} of the bound"


def load_state(
    path: Path, config: TransformerConfig, *lora: tuple[Path, float], dtype: torch.dtype | None = None
) -> State:
    return ltx2ref.load(path, config=config, dtype=dtype, lora=lora).state_dict()


# ---------------------------------------------------------------- the formats
@pytest.mark.slow
@releases
@pytest.mark.parametrize("format", ["lightricks", "lightricks, alpha", "diffusers", "bare", "kohya", "musubi"])
def test_every_layer_gets_strength_times_factor_times_b_a(tmp_path: Path, release: str, format: str) -> None:
    path, config, state = base(tmp_path, release)
    pairs = random_pairs(state, linears(state), rank=HIGH_RANK)
    factors = dict.fromkeys(pairs, 1.0)
    tensors, adapter = lightricks(pairs), None
    alpha = alphas(pairs, lambda i: i % 7 - 2.5)
    by_alpha = {layer: alpha[layer].item() / len(pairs[layer][0]) for layer in pairs}
    if format == "lightricks, alpha":
        factors = by_alpha
        tensors |= {f"diffusion_model.{writers.original_name(layer)}.alpha": alpha[layer] for layer in pairs}
    if format in ("diffusers", "bare"):
        prefix = "transformer." if format == "diffusers" else ""
        tensors = diffusers(pairs, prefix)
        adapter = {f"{prefix}r": HIGH_RANK, f"{prefix}lora_alpha": 3}
        factors = {layer: 3 / len(pairs[layer][0]) for layer in pairs}
    if format in ("kohya", "musubi"):
        prefix = "lora_unet_" if format == "kohya" else "lora_unet_model_"
        factors, tensors = by_alpha, kohya(pairs, prefix)
        tensors |= {
            name.replace("lora_up.weight", "alpha"): alpha[layer]
            for layer in pairs
            for name in kohya({layer: pairs[layer]}, prefix)
            if "lora_up" in name
        }
    lora = save(tmp_path / "lora.safetensors", tensors, adapter)
    merged = load_state(path, config, (lora, STRENGTH))
    assert_merged(merged, state, pairs, {layer: STRENGTH * factor for layer, factor in factors.items()})
    ranks = {len(a) for a, _ in pairs.values()}
    assert len(ranks) > 1 and max(ranks) == HIGH_RANK, "no rank is clipped"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_may_be_of_any_float_and_of_one_element(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, linears(state)[:3])
    alpha = alphas(pairs, lambda i: i + 0.3, shape, dtype)  # bfloat16 cannot represent 0.3
    lora = save(
        tmp_path / "lora.safetensors",
        lightricks(pairs) | {f"diffusion_model.{writers.original_name(layer)}.alpha": alpha[layer] for layer in pairs},
    )
    scales = {layer: STRENGTH * alpha[layer].item() / RANK for layer in pairs}
    assert_merged(load_state(path, config, (lora, STRENGTH)), state, pairs, scales)


def test_a_layer_without_alpha_has_factor_1_beside_layers_with_one(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, linears(state)[:3])
    first = next(iter(pairs))
    lora = save(
        tmp_path / "lora.safetensors",
        lightricks(pairs) | {f"diffusion_model.{writers.original_name(first)}.alpha": torch.tensor(2.0)},
    )
    assert_merged(load_state(path, config, (lora, 1)), state, pairs, dict.fromkeys(pairs, 1.0) | {first: 2 / RANK})


def test_alpha_0_is_the_rank_to_kohya_and_nothing_to_lightricks(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    layer = "transformer_blocks.1.attn1.to_out.0"
    pairs, zero = random_pairs(state, [layer]), torch.tensor(0.0)
    kohyas = save(tmp_path / "k.safetensors", kohya(pairs) | {f"lora_unet_{layer.replace('.', '_')}.alpha": zero})
    assert_merged(load_state(path, config, (kohyas, 1)), state, pairs, {layer: 1.0})
    ours = save(tmp_path / "l.safetensors", lightricks(pairs) | {f"diffusion_model.{layer}.alpha": zero})
    assert_merged(load_state(path, config, (ours, 1)), state, {}, {})


def test_lightricks_own_metadata_scale_nothing(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.5")
    pairs = random_pairs(state, linears(state))
    lora = save(tmp_path / "lora.safetensors", lightricks(pairs), lora_rank="450", lora_alpha="225")
    assert_merged(load_state(path, config, (lora, 1)), state, pairs, dict.fromkeys(pairs, 1.0))


@pytest.mark.slow
def test_kohya_names_of_either_dialect_and_comfyui_names_with_up_and_down_are_read(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, linears(state))
    endings = {"A": "down", "B": "up"}
    for tensors in (
        kohya(pairs, names=str),
        {f"{name[:-8]}{endings[name[-8]]}.weight": tensor for name, tensor in lightricks(pairs).items()},
    ):
        lora = save(tmp_path / "lora.safetensors", tensors)
        assert_merged(load_state(path, config, (lora, 1)), state, pairs, dict.fromkeys(pairs, 1.0))


@releases
def test_no_two_layers_have_the_same_spelling(release: str) -> None:
    shapes = parameter_shapes(RELEASES[release])
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    owners: dict[str, set[str]] = {}
    for layer in layers:
        for prefix in LORA_PREFIXES:
            for name in spellings(layer):
                flat = name.replace(".", "_") if prefix in UNDERSCORED else name
                owners.setdefault(prefix + flat, set()).add(layer)
    assert [names for names in owners.values() if len(names) > 1] == []
    assert len(layers) > 1370 and len(owners) > len(LORA_PREFIXES) * len(layers)
    assert [name for name in owners if name.startswith(SKIPPED)] == []


def test_what_is_not_the_transformer_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, config, state = base(tmp_path, "2.0")
    pairs = random_pairs(state, linears(state)[:4])
    lora = save(
        tmp_path / "lora.safetensors",
        lightricks(pairs)
        | {
            "text_embedding_projection.aggregate_embed.lora_A.weight": torch.ones(2, 3),
            "text_embedding_projection.aggregate_embed.lora_B.weight": torch.ones(3, 2),
            "diffusion_model.video_embeddings_connector.transformer_1d_blocks.0.ff.net.2.lora_A.weight": torch.ones(
                1, 1
            ),
        },
    )
    with caplog.at_level(logging.INFO, "ltx2ref"):
        assert_merged(load_state(path, config, (lora, 0.5)), state, pairs, dict.fromkeys(pairs, 0.5))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.INFO] == [
        f"{lora}: lightricks LoRA, 4 layers, ranks 5 to 5, factors 1 to 1 by no alpha, skipped 1 tensors of "
        "diffusion_model.video_embeddings_connector.*, 2 tensors of text_embedding_projection.*, strength 0.5"
    ]


def test_a_lora_is_described_by_its_header_and_alphas(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, ["proj_in", "transformer_blocks.0.attn1.to_gate_logits"])
    lora = read_lora(
        save(tmp_path / "lora.safetensors", diffusers(pairs), {"transformer.r": 5, "transformer.lora_alpha": 10}),
        make_plan(path, config),
    )
    assert lora.format == "diffusers" and lora.skipped == {}
    assert {name: (layer.rank, layer.factor) for name, layer in lora.layers.items()} == {
        "proj_in.weight": (5, 2.0),
        "transformer_blocks.0.attn1.to_gate_logits.weight": (4, 2.5),
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["diffusion_model.transformer_blocks.0.ff.net.2.lora_B.weight"], "lightricks"),
        (["diffusion_model.transformer_blocks.0.ff.net.2.lora_up.weight"], "lightricks"),
        (["transformer.proj_in.lora_A.weight"], "diffusers"),
        (["proj_in.lora_A.weight"], "without prefix"),
        (["patchify_proj.lora_A.weight"], "without prefix"),
        (["base_model.model.proj_in.lora_A.weight"], "peft"),
        (["base_model.model.diffusion_model.patchify_proj.lora_A.weight"], "peft"),
        (["diffusion_model.proj_in.lora_A.default.weight"], "lightricks"),
        (["model.diffusion_model.proj_in.lora.down.weight"], "lightricks"),
        (["lycoris_proj_out.lokr_w2_b", "lycoris_proj_out.alpha"], "kohya"),
        (["lora_transformer_proj_out.lora_up.weight"], "kohya"),
        (["lora_unet_model_transformer_blocks_0_ff_net_2.lora_down.weight"], "kohya"),
        (["connectors.x.lora_A.weight", "transformer.proj_in.lora_A.weight"], "diffusers"),
        (["lora_unet_proj_out.lora_up.weight", "diffusion_model.proj_out.lora_B.weight"], "kohya and lightricks"),
        (["model.diffusion_model.patchify_proj.weight"], None),
        (["transformer.proj_in.weight", "transformer.proj_in.alpha"], None),
        (["diffusion_model.proj_out.lokr_w1", "transformer.proj_out.diff"], "diffusers and lightricks"),
        (["blocks.0.attn.lora_A.weight"], None),
        ([], None),
    ],
)
def test_a_format_is_told_by_names_alone(names: list[str], expected: str | None) -> None:
    assert lora_format(names) == expected
    assert expected is None or set(expected.split(" and ")) <= {*LORA_PREFIXES.values()}


# ---------------------------------------------------------------- spellings
FIVE = ["proj_in", "time_embed.linear", "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_ff.net.2"]
FIVE += ["transformer_blocks.1.audio_attn1.to_out.0"]
LIGHTRICKS_NAME = writers.original_name


def spelled(pairs: Pairs, prefix: str, name: Callable[[str], str], a: str, b: str) -> State:
    """Return factors under any names: a prefix, a layer's name, and the endings of A and B."""
    return {
        f"{prefix}{name(layer)}{ending}": factor
        for layer, pair in pairs.items()
        for ending, factor in zip((a, b), pair, strict=True)
    }


def without_0(name: str) -> str:
    return name.removesuffix(".0")


def flat(name: str) -> str:
    return name.replace(".", "_")


PEFTS = (".lora_A.weight", ".lora_B.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
KOHYAS = (".lora_down.weight", ".lora_up.weight")
SPELLINGS: dict[str, tuple[str, Callable[[str], str], tuple[str, str]]] = {
    "default": ("transformer.", str, DEFAULT),
    "default, after diffusion_model.": ("diffusion_model.", LIGHTRICKS_NAME, DEFAULT),
    "default, bare": ("", LIGHTRICKS_NAME, DEFAULT),
    "bare, Lightricks' names": ("", LIGHTRICKS_NAME, PEFTS),
    "diffusion_model. and diffusers' names": ("diffusion_model.", str, PEFTS),
    "transformer. and Lightricks' names": ("transformer.", LIGHTRICKS_NAME, PEFTS),
    "to_out without 0": ("diffusion_model.", lambda name: without_0(LIGHTRICKS_NAME(name)), PEFTS),
    "to_out without 0, diffusers' names": ("transformer.", without_0, PEFTS),
    "to_out without 0, kohya": ("lora_unet_", lambda name: flat(without_0(LIGHTRICKS_NAME(name))), KOHYAS),
    "model.diffusion_model.": ("model.diffusion_model.", LIGHTRICKS_NAME, PEFTS),
    "lycoris": ("lycoris_", lambda name: flat(LIGHTRICKS_NAME(name)), KOHYAS),
    "lycoris, diffusers' names": ("lycoris_", flat, KOHYAS),
    "lora_transformer_": ("lora_transformer_", flat, KOHYAS),
    "lora.down": ("transformer.", str, (".lora.down.weight", ".lora.up.weight")),
    "lora.down, kohya": ("lora_unet_", flat, (".lora.down.weight", ".lora.up.weight")),
    "up and down": ("diffusion_model.", LIGHTRICKS_NAME, KOHYAS),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_changes_the_same_layers(tmp_path: Path, case: str) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE)
    prefix, name, endings = SPELLINGS[case]
    lora = save(tmp_path / "lora.safetensors", spelled(pairs, prefix, name, *endings))
    assert_merged(load_state(path, config, (lora, STRENGTH)), state, pairs, dict.fromkeys(pairs, STRENGTH))


def test_global_layers_may_be_spelled_otherwise_than_those_of_blocks(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE)
    blocks = {layer: pair for layer, pair in pairs.items() if layer.startswith("transformer_blocks.")}
    others = {layer: pair for layer, pair in pairs.items() if layer not in blocks}
    mixed = (("", LIGHTRICKS_NAME), ("", str), ("transformer.", LIGHTRICKS_NAME), ("diffusion_model.", str))
    for prefix, name in mixed:
        tensors = lightricks(blocks) | spelled(others, prefix, name, *PEFTS)
        lora = save(tmp_path / "lora.safetensors", tensors)
        assert_merged(load_state(path, config, (lora, STRENGTH)), state, pairs, dict.fromkeys(pairs, STRENGTH))


# Tensors of connectors and text encoders, and the prefix by which each is skipped.
OTHER_MODELS = {
    "lora_unet_embeddings_connector_0_attn1_to_q": "lora_unet_embeddings_connector_",
    "lora_unet_video_embeddings_connector_x": "lora_unet_video_embeddings_connector_",
    "lora_unet_text_embedding_projection_aggregate_embed": "lora_unet_text_embedding_projection_",
    "lora_te_text_model_x": "lora_te_",
    "diffusion_model.connectors.x": "diffusion_model.connectors.",
    "diffusion_model.feature_extractor_linear.aggregate_embed": "diffusion_model.feature_extractor_linear.",
    "diffusion_model.audio_embeddings_connector.x": "diffusion_model.audio_embeddings_connector.",
    "model.diffusion_model.video_embeddings_connector.x": "model.diffusion_model.video_embeddings_connector.",
    "base_model.model.text_embedding_projection.x": "base_model.model.text_embedding_projection.",
    "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q": "video_embeddings_connector.",
    "connectors.video_connector.x": "connectors.",
    "text_encoder.model.layers.0.self_attn.q_proj": "text_encoder.",
}


@pytest.mark.parametrize("format", ["lightricks", "kohya"])
def test_layers_of_other_models_are_skipped_by_literal_prefixes_and_counted(tmp_path: Path, format: str) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE)
    others = {f"{name}{ending}": torch.ones(2, 3) for name in OTHER_MODELS for ending in (".lora_down.weight", ".what")}
    lora = save(tmp_path / "lora.safetensors", (lightricks(pairs) if format == "lightricks" else kohya(pairs)) | others)
    assert_merged(load_state(path, config, (lora, 1)), state, pairs, dict.fromkeys(pairs, 1.0))
    assert read_lora(lora, make_plan(path, config)).skipped == dict.fromkeys(OTHER_MODELS.values(), 2)
    for name in OTHER_MODELS:  # one letter more, and it is a name that nobody knows
        strange = name.replace("connector", "connectorx").replace("text_e", "text_x").replace("_te_", "_tex_")
        strange = strange.replace("extractor", "extractorx")
        strange += ".lora_down.weight"
        damaged = save(tmp_path / "x.safetensors", lightricks(pairs) | {strange: torch.ones(2, 3)})
        assert problems(path, config, damaged)[-1] == f"{strange} F32 [2, 3]: the model has no such layer"


# ---------------------------------------------------------------- other factors and other changes
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_factors_are_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = {layer: (a.to(dtype), b.to(dtype)) for layer, (a, b) in random_pairs(state, FIVE).items()}
    alpha = {f"diffusion_model.{LIGHTRICKS_NAME(layer)}.alpha": torch.tensor(3.0).to(dtype) for layer in pairs}
    lora = save(tmp_path / "lora.safetensors", lightricks(pairs) | alpha)
    wide = {layer: (a.float(), b.float()) for layer, (a, b) in pairs.items()}
    assert_merged(load_state(path, config, (lora, 1)), state, wide, dict.fromkeys(pairs, 3 / RANK))


def test_a_float8_factor_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = {layer: (a.to(torch.float8_e4m3fn), b) for layer, (a, b) in random_pairs(state, FIVE[:1]).items()}
    next(iter(pairs.values()))[0].view(torch.uint8)[0, 0] = 0x7F
    lora = save(tmp_path / "lora.safetensors", lightricks(pairs))
    with pytest.raises(CheckpointError, match=r"lora_A\.weight: the merged weight is not finite"):
        load_state(path, config, (lora, 1))


# The shapes of a LoKr's parts for a weight (56, 56), and its rank.
LOKRS: dict[str, tuple[dict[str, tuple[int, int]], int | None]] = {
    "both whole": ({"w1": (4, 7), "w2": (14, 8)}, None),
    "w2 in two": ({"w1": (4, 7), "w2_a": (14, 3), "w2_b": (3, 8)}, 3),
    "w1 in two": ({"w1_a": (4, 2), "w1_b": (2, 7), "w2": (14, 8)}, 2),
    "both in two": ({"w1_a": (4, 5), "w1_b": (5, 7), "w2_a": (14, 5), "w2_b": (5, 8)}, 5),
}


@pytest.mark.parametrize("prefix", ["lycoris_", "diffusion_model."])
@pytest.mark.parametrize("alpha", [None, 6.0, 0.0])
@pytest.mark.parametrize("case", LOKRS)
def test_a_lokr_adds_the_kronecker_product_of_its_sides(
    tmp_path: Path, case: str, alpha: float | None, prefix: str
) -> None:
    path, config, state = base(tmp_path, "2.3")
    shapes, rank = LOKRS[case]
    generator = torch.Generator().manual_seed(1)
    parts = {part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    layer = "transformer_blocks.1.attn1.to_out.0"
    name = prefix + (flat(layer) if prefix == "lycoris_" else layer)
    tensors = {f"{name}.lokr_{part}": tensor for part, tensor in parts.items()}
    tensors |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
    lora = save(tmp_path / "lora.safetensors", tensors)
    merged = load_state(path, config, (lora, STRENGTH))
    left, right = (parts[side] if side in parts else parts[f"{side}_a"] @ parts[f"{side}_b"] for side in ("w1", "w2"))
    kron = (left[:, None, :, None] * right[None, :, None, :]).reshape(56, 56)
    factor = 1.0 if rank is None or alpha is None else alpha / rank
    factor = 1.0 if alpha == 0 and prefix == "lycoris_" else factor
    expected = state[f"{layer}.weight"] + kron * (STRENGTH * factor)
    assert torch.equal(merged[f"{layer}.weight"], expected)
    assert all(torch.equal(merged[other], x) for other, x in state.items() if other != f"{layer}.weight")
    if factor:
        assert not torch.equal(expected, state[f"{layer}.weight"])


def test_differences_of_weights_norms_and_biases_are_added(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    attention = "transformer_blocks.0.attn1"
    changed = {
        f"{attention}.to_q.weight": f"{attention}.to_q.diff",
        f"{attention}.to_q.bias": f"{attention}.to_q.diff_b",
        f"{attention}.norm_q.weight": f"{attention}.q_norm.diff",
        "proj_in.bias": "patchify_proj.diff_b",
    }
    generator = torch.Generator().manual_seed(1)
    deltas = {name: torch.randn(state[name].shape, generator=generator) for name in changed}
    pairs = random_pairs(state, ["proj_in"])  # a bias may change beside a LoRA of its weight
    for prefix, spell in (("diffusion_model.", str), ("lycoris_", lambda name: flat(name.rpartition(".")[0]))):
        named = {
            f"{prefix}{spell(theirs)}{'' if prefix[-1] == '.' else '.' + theirs.rpartition('.')[2]}": deltas[name]
            for name, theirs in changed.items()
        }
        own = lightricks(pairs) if prefix[-1] == "." else kohya(pairs)
        lora = save(tmp_path / "lora.safetensors", named | own)
        merged = load_state(path, config, (lora, STRENGTH))
        for name, delta in deltas.items():
            assert torch.equal(merged[name], state[name] + delta * STRENGTH), name
        rest = {name: x for name, x in state.items() if name not in deltas}
        assert_merged(merged, rest, pairs, {"proj_in": STRENGTH})
        streamed = ltx2ref.stream(path, config=config, lora=[(lora, STRENGTH)])
        assert torch.equal(streamed.proj_in.bias, merged["proj_in.bias"])


@pytest.mark.parametrize("streams", ["video", "audio"])
def test_for_one_stream_a_lora_is_read_whole_and_applied_in_part(tmp_path: Path, streams: Any) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE)
    lora = save(tmp_path / "lora.safetensors", lightricks(pairs))
    both = load_state(path, config, (lora, STRENGTH))
    one = ltx2ref.load(path, config=config, lora=[(lora, STRENGTH)], streams=streams).state_dict()
    assert one and all(torch.equal(x, both[name]) for name, x in one.items())
    assert 0 < sum(not torch.equal(x, state[name]) for name, x in one.items()) < len(pairs)
    for layer in pairs:  # a tensor of either stream that does not fit
        name = f"diffusion_model.{LIGHTRICKS_NAME(layer)}.lora_A.weight"
        damaged = save(tmp_path / "x.safetensors", lightricks(pairs) | {name: torch.ones(RANK, 3)})
        with pytest.raises(CheckpointError, match=re.escape(f"{name} F32 [5, 3]: expected")):
            ltx2ref.load(path, config=config, lora=[(damaged, 1)], streams=streams)
    other = {layer: pair for layer, pair in pairs.items() if f"{layer}.weight" not in one}
    lora = save(tmp_path / "x.safetensors", lightricks(other))
    with pytest.raises(CheckpointError, match=f"nothing in it is of the {streams} stream"):
        ltx2ref.load(path, config=config, lora=[(lora, 1)], streams=streams)


# ---------------------------------------------------------------- where the alpha comes from
RAW = "base_model.model."


def peft_folder(path: Path, pairs: Pairs, config: dict[str, Any], prefix: str = RAW, **metadata: str) -> Path:
    path.mkdir()
    save(path / "adapter_model.safetensors", diffusers(pairs, prefix), **metadata)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK} | config))
    return path


@pytest.mark.parametrize("prefix", [RAW, f"{RAW}transformer.", f"{RAW}diffusion_model."])
def test_a_folder_of_pefts_and_a_file_in_it_have_the_alpha_beside_them(
    tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE)
    folder = peft_folder(tmp_path / "p", pairs, {"lora_alpha": 3, "alpha_pattern": {"to_q": 7, "^proj_in": 2}}, prefix)
    factors = dict.fromkeys(pairs, 3 / RANK) | {FIVE[2]: 7 / RANK, "proj_in": 2 / RANK}
    weights = folder / "adapter_model.safetensors"
    renamed = folder / "renamed.safetensors"
    renamed.write_bytes(weights.read_bytes())
    for lora in (folder, weights, renamed):
        with caplog.at_level(logging.INFO, "ltx2ref"):
            assert_merged(load_state(path, config, (lora, 1)), state, pairs, factors)
        assert "by adapter_config.json, skipped" in caplog.messages[-1]


def test_patterns_of_pefts_are_in_the_files_own_dialect(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, ["proj_in", "proj_out"])
    folder = tmp_path / "p"
    peft_folder(folder, {}, {"lora_alpha": 3, "alpha_pattern": {"patchify_proj": 7}})
    save(folder / "adapter_model.safetensors", lightricks(pairs, RAW))
    factors = {"proj_in": 7 / RANK, "proj_out": 3 / RANK}
    assert_merged(load_state(path, config, (folder, 1)), state, pairs, factors)


def test_a_raw_file_of_pefts_without_its_config_is_refused(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE[:1])
    lora = save(tmp_path / "x.safetensors", diffusers(pairs, RAW))
    assert problems(path, config, lora) == [
        "its names are PEFT's, whose alpha is in adapter_config.json, and that is not beside it"
    ]
    lora = save(tmp_path / "x.safetensors", diffusers(pairs, RAW), lora_alpha="2")
    assert_merged(load_state(path, config, (lora, 1)), state, pairs, {"proj_in": 2 / RANK})
    lora = save(tmp_path / "x.safetensors", diffusers(pairs, RAW) | {f"{RAW}proj_in.alpha": torch.tensor(4.0)})
    assert_merged(load_state(path, config, (lora, 1)), state, pairs, {"proj_in": 4 / RANK})


def test_a_config_beside_a_file_that_is_not_pefts_is_not_its_config(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE)
    folder = peft_folder(tmp_path / "p", pairs, {"lora_alpha": 3})
    lora = save(folder / "other.safetensors", lightricks(pairs))
    assert_merged(load_state(path, config, (lora, 1)), state, pairs, dict.fromkeys(pairs, 1.0))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "expected a JSON object"),
        ('{"lora_alpha": NaN}', "not JSON: NaN"),
        ('{"r": 4}', "adapter_config.json: not a config of PEFT's for a LoRA: it has no lora_alpha"),
        ('{"lora_alpha": 4, "peft_type": "LOKR"}', "adapter_config.json: peft_type = 'LOKR' is not supported"),
        ('{"lora_alpha": 4, "use_dora": true}', "adapter_config.json: use_dora = True is not supported"),
        (None, "a folder of PEFT has adapter_model.safetensors and adapter_config.json: no adapter_config.json in it"),
    ],
)
def test_a_config_of_pefts_that_is_damaged_or_says_more_is_refused(
    tmp_path: Path, content: str | None, text: str
) -> None:
    path, config, state = base(tmp_path, "2.3")
    folder = peft_folder(tmp_path / "p", random_pairs(state, FIVE[:1]), {"lora_alpha": 3})
    (folder / "adapter_config.json").unlink()
    if content is not None:
        (folder / "adapter_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_state(path, config, (folder, 1))


def test_two_configs_that_differ_are_refused_with_both_places(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE[:1])
    same, other = ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})} for alpha in (3, 4))
    folder = peft_folder(tmp_path / "a", pairs, {"lora_alpha": 3}, **same)
    assert_merged(load_state(path, config, (folder, 1)), state, pairs, {"proj_in": 3 / RANK})
    folder = peft_folder(tmp_path / "b", pairs, {"lora_alpha": 3}, **other)
    with pytest.raises(
        CheckpointError, match=r": lora_alpha = 4 by lora_adapter_metadata, but lora_alpha = 3 by adapter_config"
    ):
        load_state(path, config, (folder, 1))


# What PEFT's config says of ranks and layers, and what is objected to for `FIVE`, of rank 5.
DENIALS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "the rank": ({"r": 8}, ["its rank is 5, but 8 by adapter_config.json"] * 5),
    "the rank of a layer": (
        {"rank_pattern": {"to_q": 3}},
        ["attn1.to_q.lora_A.weight F32 [5, 56]: its rank is 5, but 3 by"],
    ),
    "no rank": ({"r": None}, []),
    "a layer that is not listed": (
        {"target_modules": ["proj_in", "to_q", "net.2", "to_out.0"]},
        ["time_embed.linear.lora_A.weight F32 [5, 56]: not among the target_modules by adapter_config.json"],
    ),
    "Lightricks' names": ({"target_modules": ["patchify_proj", "adaln_single.linear", "to_q", "2", "to_out"]}, []),
    "a layer that is excluded": (
        {"exclude_modules": ["attn1.to_q"]},
        ["to_q.lora_A.weight F32 [5, 56]: among the excl"],
    ),
    "a regular expression": ({"target_modules": "(a+)+$"}, []),
}


@pytest.mark.parametrize("case", DENIALS)
def test_a_config_of_pefts_that_contradicts_ranks_or_layers_is_refused(tmp_path: Path, case: str) -> None:
    path, config, state = base(tmp_path, "2.3")
    said, expected = DENIALS[case]
    folder = peft_folder(tmp_path / "p", random_pairs(state, FIVE), {"lora_alpha": 3} | said)
    if expected:
        with pytest.raises(CheckpointError) as caught:
            load_state(path, config, (folder, 1))
        found = caught.value.problems
        assert len(found) == len(expected) and all(text in line for text, line in zip(expected, found, strict=True)), (
            found
        )
    else:
        load_state(path, config, (folder, 1))


@pytest.mark.parametrize("rank", [4, RANK])  # clipped as in published files, and as PEFT writes it
def test_a_rank_above_the_width_may_be_clipped_or_not(tmp_path: Path, rank: int) -> None:
    path, config, state = base(tmp_path, "2.3")
    gate = "transformer_blocks.0.attn1.to_gate_logits"
    rows, columns = state[f"{gate}.weight"].shape
    assert rows == 4
    generator = torch.Generator().manual_seed(1)
    pairs = {gate: (torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))}
    folder = peft_folder(tmp_path / "p", pairs, {"lora_alpha": 3})
    assert_merged(load_state(path, config, (folder, 1)), state, pairs, dict.fromkeys(pairs, 3 / rank))


def test_negative_factors_are_noted(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    folder = peft_folder(tmp_path / "p", random_pairs(state, ["proj_in"]), {"lora_alpha": -3})
    tensors = lightricks(random_pairs(state, ["proj_in"])) | {f"{IN}.alpha": torch.tensor(-1.0)}
    lora, plan = save(tmp_path / "x.safetensors", tensors), make_plan(path, config)
    for changed, where in ((folder, "adapter_config.json"), (lora, "alpha tensors")):
        assert read_lora(changed, plan).notes == [
            f"1 negative factors by {where}, such as that of proj_in.weight: they subtract"
        ]


def test_pefts_keys_of_the_transformer_in_the_plain_metadata_are_used(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE[:1])
    for stabilised, root in ((None, 1.0), ("False", 1.0), ("false", 1.0), ("True", RANK**0.5), ("true", RANK**0.5)):
        said = {"transformer.lora_alpha": "8", "transformer.r": "5", "connectors.lora_alpha": "3"}
        said |= {"transformer.use_rslora": stabilised} if stabilised else {}
        lora = save(tmp_path / "x.safetensors", diffusers(pairs), **said)
        assert_merged(load_state(path, config, (lora, 1)), state, pairs, {"proj_in": 8 / RANK * root})
    lora = save(tmp_path / "x.safetensors", diffusers(pairs), **{"transformer.lora_alpha": "eight"})
    with pytest.raises(
        CheckpointError, match=r"transformer\.lora_alpha in the metadata: lora_alpha = 'eight': expected"
    ):
        load_state(path, config, (lora, 1))


@pytest.mark.parametrize("key", ["lora_alpha", "ss_network_alpha", "network_alpha", "alpha"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer.", "lora_unet_"])
def test_an_alpha_in_the_metadata_that_no_reader_uses_is_noted(
    tmp_path: Path, key: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, FIVE)
    tensors = kohya(pairs, prefix) if prefix[-1] == "_" else spelled(pairs, prefix, LIGHTRICKS_NAME, *PEFTS)
    lora = save(tmp_path / "x.safetensors", tensors, **{key: "2.5"})
    assert_merged(load_state(path, config, (lora, 1)), state, pairs, dict.fromkeys(pairs, 1.0))
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING][-1] == (
        f"{lora}: {key} = 2.5 in the metadata is not used, which would be a factor of 0.5: without alpha tensors the "
        "factor of such files is 1; if another is meant, put it into the strength"
    )
    plan = make_plan(path, config)
    for said in ({key: str(RANK)}, {key: f"{RANK}.0"}):  # then it means 1 in any case
        assert read_lora(save(lora, tensors, **said), plan).notes == []
    alpha = {next(iter(tensors)).partition(".lora")[0] + ".alpha": torch.tensor(4.0)}
    assert read_lora(save(lora, tensors | alpha, **{key: "2.5"}), plan).notes == []  # the tensors say it


# ---------------------------------------------------------------- precision
@pytest.mark.slow
def test_several_loras_are_added_in_float32_and_rounded_once(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3", torch.bfloat16)
    loras = [
        (
            save(
                tmp_path / f"{seed}.safetensors", lightricks(random_pairs(state, linears(state), seed, torch.bfloat16))
            ),
            strength,
        )
        for seed, strength in ((1, 1.0), (2, -0.3), (3, 2))
    ]
    merged = load_state(path, config, *loras)
    wide = load_state(path, config, *loras, dtype=torch.float32)
    one_by_one = state
    for i, lora in enumerate(loras):
        save_file(one_by_one, tmp_path / f"step{i}.safetensors")
        one_by_one = load_state(tmp_path / f"step{i}.safetensors", config, lora)
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wide[name].bfloat16()), name
    assert any(not torch.equal(one_by_one[name], merged[name]) for name in merged), "rounding thrice is no different"


def test_in_float64_loras_are_merged_in_float64(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.0", torch.float64)
    pairs = random_pairs(state, linears(state))
    lora = save(tmp_path / "lora.safetensors", lightricks(pairs))
    merged = load_state(path, config, (lora, STRENGTH), dtype=torch.float64)
    for layer, (a, b) in pairs.items():
        exact = state[f"{layer}.weight"] + STRENGTH * (b.double() @ a.double())
        assert (merged[f"{layer}.weight"] - exact).abs().max() < 1e-14


def test_a_quantised_weight_is_decoded_merged_and_rounded_once(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3", torch.bfloat16)
    layers = [f"transformer_blocks.0.attn1.to_{part}" for part in "qkv"]
    stored, decoded = dict(state), dict(state)
    for i, layer in enumerate(layers):
        scale = torch.tensor(0.003 * (i + 1))
        codes = (state[f"{layer}.weight"].float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
        decoded[f"{layer}.weight"] = codes.float() * scale
    save_file(stored, path)
    pairs = random_pairs(state, layers[:2], dtype=torch.bfloat16)
    lora = (save(tmp_path / "lora.safetensors", lightricks(pairs)), STRENGTH)
    wide = load_state(path, config, lora, dtype=torch.float32)
    assert_merged(
        wide, {name: tensor.float() for name, tensor in decoded.items()}, pairs, dict.fromkeys(pairs, STRENGTH)
    )
    for name, tensor in load_state(path, config, lora).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, wide[name].bfloat16()), name


def test_what_no_lora_changes_stays_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config, state = base(tmp_path, "2.3", torch.bfloat16)
    state["proj_in.weight"][0, 0] = -0.0  # -0.0 + 0.0 is another bit pattern
    save_file(state, path)
    layers = ["proj_in", "proj_out"]
    lora = save(tmp_path / "lora.safetensors", lightricks(random_pairs(state, layers)))
    mapped: list[str] = []
    original = storage.Stored.mapped
    monkeypatch.setattr(storage.Stored, "mapped", lambda stored: mapped.append(stored.name) or original(stored))
    untouched = load_state(path, config, (lora, 0), (lora, 0.0))
    assert sorted(mapped) == sorted(state)
    assert all(torch.equal(untouched[name].view(torch.uint8), state[name].view(torch.uint8)) for name in state)
    mapped.clear()
    load_state(path, config, (lora, 1), (lora, 0))
    assert sorted(mapped) == sorted(state.keys() - {f"{layer}.weight" for layer in layers})


def test_merging_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    lora = save(tmp_path / "lora.safetensors", lightricks(random_pairs(state, linears(state))))
    before = path.read_bytes(), lora.read_bytes()
    first = load_state(path, config, (lora, 1), (lora, 1))
    second = load_state(path, config, (lora, 1), (lora, 1))
    assert (path.read_bytes(), lora.read_bytes()) == before
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------- diffusers, PEFT and ltx-core
def fused(config: TransformerConfig, state: State, adapters: dict[Path, float], **arguments: Any) -> State:
    """Merge LoRA files with diffusers and PEFT."""
    from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin

    from ltx2ref.parity.oracles import diffusers as oracles

    model = oracles.build_diffusers(config.to_diffusers(), state, torch.float32)
    for i, path in enumerate(adapters):
        tensors, metadata = LTX2LoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
        model.load_lora_adapter(tensors, metadata=metadata, adapter_name=f"lora{i}", **arguments)
    if len(adapters) == 1:
        model.fuse_lora(lora_scale=next(iter(adapters.values())))
    else:
        names = [f"lora{i}" for i in range(len(adapters))]
        model.set_adapters(names, list(adapters.values()))
        model.fuse_lora(adapter_names=names)
    model.unload_lora()
    result: State = model.state_dict()
    return result


def assert_equal(ours: State, theirs: State, state: State, changed: int) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert sum(not torch.equal(theirs[name], state[name]) for name in state) == changed


@pytest.mark.slow
@releases
def test_lightricks_files_are_merged_as_diffusers_converts_and_fuses_them(tmp_path: Path, release: str) -> None:
    path, config, state = base(tmp_path, release)
    pairs = random_pairs(state, linears(state))
    lora = save(tmp_path / "lora.safetensors", lightricks(pairs))
    ours = load_state(path, config, (lora, STRENGTH))
    assert_equal(ours, fused(config, {n: t.clone() for n, t in state.items()}, {lora: STRENGTH}), state, len(pairs))


@pytest.mark.slow
@pytest.mark.diffusers
@releases
@pytest.mark.parametrize("rslora", [False, True])
def test_what_diffusers_saves_is_merged_as_diffusers_fuses_it(tmp_path: Path, release: str, rslora: bool) -> None:
    """Some layers have an alpha of their own. Files of `save_lora_adapter` and of `save_lora_weights` are both read."""
    from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    from ltx2ref.parity.oracles import diffusers as oracles

    path, config, state = base(tmp_path, release)
    model = oracles.build_diffusers(config.to_diffusers(), {n: t.clone() for n, t in state.items()}, torch.float32)
    torch.manual_seed(3)
    model.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=7,
            init_lora_weights=False,
            target_modules=["to_q", "to_out.0", "ff.net.2", "proj_in"],
            rank_pattern={"proj_in": 3},
            use_rslora=rslora,
            alpha_pattern={"attn2.to_q": 2, "^proj_in": 5, "transformer_blocks.1.attn1.to_out.0": 11},
        )
    )
    model.save_lora_adapter(tmp_path, weight_name="bare.safetensors")
    LTX2LoraLoaderMixin.save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(model),
        weight_name="prefixed.safetensors",
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    alphas = set()
    for name, prefix in (("bare", None), ("prefixed", "transformer")):
        lora = tmp_path / f"{name}.safetensors"
        theirs = fused(config, {n: t.clone() for n, t in state.items()}, {lora: STRENGTH}, prefix=prefix)
        ours = load_state(path, config, (lora, STRENGTH))
        layers = read_lora(lora, make_plan(path, config)).layers
        assert_equal(ours, theirs, state, len(layers))
        alphas |= {round(layer.factor * (layer.rank**0.5 if rslora else layer.rank)) for layer in layers.values()}
    assert alphas == {2, 5, 7, 11}


@pytest.mark.slow
def test_several_loras_are_merged_as_diffusers_fuses_them(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.5")
    loras = {}
    for seed, strength in ((1, 0.7), (2, -1.3), (3, 0.1)):
        layers = linears(state)[seed::2]
        lora = save(tmp_path / f"{seed}.safetensors", lightricks(random_pairs(state, layers, seed, rank=4 * seed)))
        loras[lora] = strength
    changed = len({layer for seed in (1, 2, 3) for layer in linears(state)[seed::2]})
    theirs = fused(config, {n: t.clone() for n, t in state.items()}, loras)
    assert_equal(load_state(path, config, *loras.items()), theirs, state, changed)


@pytest.mark.slow
@pytest.mark.ltx_core
def test_ltx_core_adds_the_same_with_more_roundings(tmp_path: Path) -> None:
    """ltx-core rounds B * strength, the product and the sum to bfloat16, each time by at most 2^-8."""
    from ltx_core.loader.fuse_loras import apply_loras
    from ltx_core.loader.primitives import LoraStateDictWithStrength, StateDict

    path, config, state = base(tmp_path, "2.3", torch.bfloat16)
    pairs = random_pairs(state, linears(state), dtype=torch.bfloat16)
    lora = save(tmp_path / "lora.safetensors", lightricks(pairs))
    ours = load_state(path, config, (lora, STRENGTH))
    cpu = torch.device("cpu")
    theirs = apply_loras(
        StateDict({n: t.clone() for n, t in state.items()}, cpu, 0, {torch.bfloat16}),
        [LoraStateDictWithStrength(StateDict(diffusers(pairs, ""), cpu, 0, {torch.bfloat16}), STRENGTH)],
    ).sd
    same = 0
    for layer, (a, b) in pairs.items():
        name = f"{layer}.weight"
        size = STRENGTH * (b.double().abs() @ a.double().abs())
        bound = 2.0**-8 * (2 * size + 2 * ours[name].double().abs()) * 1.02
        error = (ours[name].double() - theirs[name].double()).abs()
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} of the bound"
        same += int(torch.equal(ours[name], theirs[name]))
    assert same < len(pairs)


# ---------------------------------------------------------------- what is refused
TO_Q = "diffusion_model.transformer_blocks.0.attn1.to_q"
IN = "diffusion_model.patchify_proj"
OUT = "diffusion_model.proj_out"
ONLY = "the layer has {}; expected A and B, or w1 and w2, or "


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape).to(dtype)


# Tensors that replace those of a good file, or None to remove one, and texts of which each is in one of the problems.
REFUSED: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "B missing": ({f"{TO_Q}.lora_B.weight": None}, [f"{TO_Q}.lora_A.weight F32 [5, 56]: {ONLY.format('A')}"]),
    "A missing": ({f"{TO_Q}.lora_A.weight": None}, [f"{TO_Q}.lora_B.weight F32 [56, 5]: {ONLY.format('B')}"]),
    "alpha alone": ({f"{OUT}.alpha": ones()}, [f"{OUT}.alpha F32 []: {ONLY.format('alpha')}"]),
    "unknown layer": (
        {"diffusion_model.transformer_blocks.2.attn1.to_q.lora_A.weight": ones(1, 1)},
        ["transformer_blocks.2.attn1.to_q.lora_A.weight F32 [1, 1]: the model has no such layer"],
    ),
    "half a name": (
        {"diffusion_model.attn1.to_q.lora_A.weight": ones(1, 1)},
        ["diffusion_model.attn1.to_q.lora_A.weight F32 [1, 1]: the model has no such layer"],
    ),
    "a table": (
        {"diffusion_model.scale_shift_table.lora_A.weight": ones(1, 1)},
        ["scale_shift_table.lora_A.weight F32 [1, 1]: the model has no such layer"],
    ),
    "a norm": (
        {"diffusion_model.transformer_blocks.0.attn1.q_norm.lora_A.weight": ones(1, 1)},
        ["q_norm.lora_A.weight F32 [1, 1]: transformer_blocks.0.attn1.norm_q.weight is not of a Linear layer"],
    ),
    "ranks that differ": (
        {f"{TO_Q}.lora_A.weight": ones(6, 56)},
        [f"{TO_Q}.lora_B.weight F32 [56, 5]: expected [56, 6]"],
    ),
    "in": ({f"{TO_Q}.lora_A.weight": ones(5, 55)}, [f"{TO_Q}.lora_A.weight F32 [5, 55]: expected [5, 56]"]),
    "out": ({f"{TO_Q}.lora_B.weight": ones(57, 5)}, [f"{TO_Q}.lora_B.weight F32 [57, 5]: expected [56, 5]"]),
    "no dimension": (
        {f"{TO_Q}.lora_A.weight": ones()},
        [f"{TO_Q}.lora_A.weight F32 []: expected [1, 56]", "[56, 5]: expected"],
    ),
    "rank 0": (
        {f"{TO_Q}.lora_A.weight": ones(0, 56), f"{TO_Q}.lora_B.weight": ones(56, 0)},
        [f"{TO_Q}.lora_A.weight F32 [0, 56]: expected [1, 56]", f"{TO_Q}.lora_B.weight F32 [56, 0]: expected"],
    ),
    "integers": (
        {f"{TO_Q}.lora_A.weight": ones(5, 56, dtype=torch.int8)},
        [f"{TO_Q}.lora_A.weight I8 [5, 56]: expected BF16, F16, F32, F64"],
    ),
    "a scale of float8": (
        {f"{TO_Q}.lora_A.weight": ones(5, 56, dtype=torch.float8_e4m3fn), f"{TO_Q}.lora_A.weight_scale": ones()},
        [f"{TO_Q}.lora_A.weight_scale F32 []: not supported"],
    ),
    "an alpha for each row": ({f"{TO_Q}.alpha": ones(5)}, [f"{TO_Q}.alpha F32 [5]: expected [] or [1]"]),
    "up beside B": ({f"{TO_Q}.lora_up.weight": ones(56, 5)}, [": the same as"]),
    "DoRA, as ComfyUI": ({f"{TO_Q}.dora_scale": ones(56, 1)}, [".dora_scale F32 [56, 1]: not supported"]),
    "DoRA, as PEFT": ({f"{TO_Q}.lora_magnitude_vector": ones(56)}, [".lora_magnitude_vector F32 [56]: not supported"]),
    "a difference of another shape": ({f"{OUT}.diff": ones(19, 55)}, [f"{OUT}.diff F32 [19, 55]: expected [19, 56]"]),
    "a bias' difference of another shape": ({f"{TO_Q}.diff_b": ones(55)}, [".diff_b F32 [55]: expected [56]"]),
    "a difference with an alpha": (
        {f"{OUT}.diff": ones(19, 56), f"{OUT}.alpha": ones()},
        [f"{OUT}.diff F32 [19, 56]: {ONLY.format('alpha and diff')}", f"{OUT}.alpha F32 []: the layer has"],
    ),
    "a difference beside A and B": (
        {f"{TO_Q}.diff": ones(56, 56)},
        [f"{TO_Q}.diff F32 [56, 56]: {ONLY.format('A and B and diff')}", "lora_A.weight F32 [5, 56]: the", "lora_B"],
    ),
    "a table's difference": (
        {"diffusion_model.scale_shift_table.diff": ones(2, 56)},
        ["scale_shift_table.diff F32 [2, 56]: the model has no such layer"],
    ),
    "a norm's bias": (
        {"diffusion_model.transformer_blocks.0.attn1.q_norm.diff_b": ones(56)},
        ["q_norm.diff_b F32 [56]: the model has no such layer with a bias"],
    ),
    "a bias, as PEFT": ({f"{TO_Q}.lora_B.bias": ones(56)}, [".lora_B.bias F32 [56]: not supported"]),
    "LoHa": ({f"{TO_Q}.hada_w1_a": ones(56, 2)}, [".hada_w1_a F32 [56, 2]: not supported"]),
    "half a LoKr": ({f"{OUT}.lokr_w1": ones(1, 2)}, [f".lokr_w1 F32 [1, 2]: {ONLY.format('w1')}"]),
    "LoKr, the first side twice": (
        {f"{OUT}.lokr_{name}": ones(1, 1) for name in ("w1", "w1_a", "w1_b", "w2")},
        [f"{name} F32 [1, 1]: the layer has w1 and w1_a and w1_b and w2; " for name in ("w1", "w1_a", "w1_b", "w2")],
    ),
    "LoKr of another size": (
        {f"{OUT}.lokr_w1": ones(19, 7), f"{OUT}.lokr_w2": ones(2, 8)},
        [f"{OUT}.lokr_w2 F32 [2, 8]: expected [1, 8]"],
    ),
    "LoKr that does not divide": (
        {f"{OUT}.lokr_w1": ones(2, 9), f"{OUT}.lokr_w2": ones(9, 6)},
        [f"{OUT}.lokr_w1 F32 [2, 9]: expected [1, 1]", f"{OUT}.lokr_w2 F32 [9, 6]: expected [19, 56]"],
    ),
    "LoKr of two ranks": (
        {f"{OUT}.lokr_w1_a": ones(1, 2), f"{OUT}.lokr_w1_b": ones(2, 7)}
        | {f"{OUT}.lokr_w2_a": ones(19, 3), f"{OUT}.lokr_w2_b": ones(3, 8)},
        [f"{OUT}.lokr_w2_a F32 [19, 3]: expected [19, 2]", f"{OUT}.lokr_w2_b F32 [3, 8]: expected [2, 8]"],
    ),
    "LoKr, Tucker": ({f"{OUT}.lokr_t2": ones(2, 2)}, [".lokr_t2 F32 [2, 2]: not supported"]),
    "LoKr of a norm": (
        {f"diffusion_model.transformer_blocks.0.attn1.q_norm.lokr_{side}": ones(1, 1) for side in ("w1", "w2")},
        ["lokr_w1 F32 [1, 1]: transformer_blocks.0.attn1.norm_q.weight is not of a Linear layer", "lokr_w2 F32 [1, 1]"],
    ),
    "two formats": (
        {"lora_unet_proj_out.lora_down.weight": ones(2, 56), "lora_unet_proj_out.lora_up.weight": ones(19, 2)},
        ["names of several formats: kohya and lightricks"],
    ),
    "a layer in two spellings": (
        {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": ones(5, 56)},
        ["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight F32 [5, 56]: the same as diffusion_model."],
    ),
    "another model's layer": (
        {"unet.x.lora_A.weight": ones(1, 1)},
        ["unet.x.lora_A.weight F32 [1, 1]: the model has no such layer"],
    ),
}


def problems(path: Path, config: TransformerConfig, lora: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        load_state(path, config, (lora, 0.5))
    assert caught.value.path == lora
    return caught.value.problems


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_lora_that_is_not_wholly_understood_is_refused_by_its_header(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config, state = base(tmp_path, "2.3")
    tensors = lightricks(random_pairs(state, [f"transformer_blocks.0.attn1.to_{part}" for part in "qk"]))
    change, expected = REFUSED[case]
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    lora = save(tmp_path / "lora.safetensors", changed)

    def read(*arguments: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(storage.TensorFile, "read", read)
    monkeypatch.setattr(storage.Stored, "mapped", read)
    found = problems(path, config, lora)
    assert [sum(text in problem for problem in found) for text in expected] == [1] * len(expected), found


@pytest.mark.parametrize("name", ["connectors.x", "unet.x", "blocks.0.attn.q", "lora_te_x"])
def test_a_file_without_a_lora_of_the_transformer_is_refused(tmp_path: Path, name: str) -> None:
    """diffusers ignores such tensors."""
    path, config, _ = base(tmp_path, "2.3")
    lora = save(
        tmp_path / "lora.safetensors", {f"{name}.lora_A.weight": ones(2, 56), f"{name}.lora_B.weight": ones(19, 2)}
    )
    found = problems(path, config, lora)
    assert found[0] == "no LoRA of the transformer in it"
    assert len(found) == (1 if name in ("connectors.x", "lora_te_x") else 3)


def test_a_lora_for_another_release_is_refused_with_every_layer_named(tmp_path: Path) -> None:
    path, config, _ = base(tmp_path, "2.0")
    other = tiny_config(
        "2.3",
        **{
            name: getattr(config, name)
            for name in (
                "num_attention_heads",
                "attention_head_dim",
                "cross_attention_dim",
                "audio_num_attention_heads",
                "audio_attention_head_dim",
                "audio_cross_attention_dim",
            )
        },
    )
    state = dict(random_model(other).state_dict())
    lora = save(tmp_path / "lora.safetensors", lightricks(random_pairs(state, linears(state))))
    found = problems(path, config, lora)
    missing = [problem for problem in found if problem.endswith("the model has no such layer")]
    gates, prompts = 2 * 6 * config.num_layers, 2 * 2 * 3
    assert len(missing) == gates + prompts
    assert any(problem.startswith("diffusion_model.prompt_adaln_single.linear.lora_A.weight") for problem in missing)
    wrong = [problem for problem in found if problem not in missing]
    assert [problem.split(" ")[0] for problem in wrong] == [  # 9 rows instead of 6
        "diffusion_model.adaln_single.linear.lora_B.weight",
        "diffusion_model.audio_adaln_single.linear.lora_B.weight",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_alpha_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    path, config, state = base(tmp_path, "2.3")
    lora = save(
        tmp_path / "lora.safetensors",
        lightricks(random_pairs(state, [TO_Q[16:], "proj_out"]))
        | {f"{TO_Q}.alpha": torch.tensor(value, dtype=torch.bfloat16), f"{OUT}.alpha": torch.tensor(1.0)},
    )
    assert problems(path, config, lora) == [f"{TO_Q}.alpha BF16 []: not finite"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_merged_weight_that_is_not_finite_is_refused(tmp_path: Path, part: str, value: float) -> None:
    path, config, state = base(tmp_path, "2.3")
    tensors = lightricks(random_pairs(state, [TO_Q[16:]]))
    tensors[f"{TO_Q}.lora_{part}.weight"][1, 2] = value
    lora = save(tmp_path / "lora.safetensors", tensors)
    named = "A" if value == 3e38 else part  # nothing is damaged, and the sum is too large
    with pytest.raises(CheckpointError, match=rf"to_q\.lora_{named}\.weight: the merged weight is not finite"):
        load_state(path, config, (lora, 10))


def test_a_base_that_is_not_finite_is_named_in_place_of_the_lora(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    state["proj_in.weight"][0, 0] = float("nan")
    save_file(state, path)
    lora = save(tmp_path / "lora.safetensors", lightricks(random_pairs(state, ["proj_in"])))
    with pytest.raises(CheckpointError, match=r"base\.safetensors: proj_in\.weight: the merged weight is not finite"):
        load_state(path, config, (lora, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({"r": 5}, "not a config of PEFT's for a LoRA: it has no lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha = None: expected a finite number"),
        ({"lora_alpha": "8"}, "lora_alpha = '8': expected a finite number"),
        ({"lora_alpha": True}, "lora_alpha = True: expected a finite number"),
        ({"lora_alpha": 10**400}, "expected a finite number"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": None}}, "to_q = None: expected a finite number"),
        ({"lora_alpha": 8, "alpha_pattern": {".*to_q": 3}}, "'.*to_q': expected the end of a layer's name"),
        ({"lora_alpha": 8, "alpha_pattern": [3]}, "alpha_pattern = [3]: expected an object"),
        ({"lora_alpha": 8, "use_dora": True}, "use_dora = True is not supported"),
        ({"lora_alpha": 8, "r": "5"}, "r = '5': expected a finite number"),
        ({"lora_alpha": 8, "rank_pattern": {"to_q": True}}, "to_q = True: expected a finite number"),
        ({"lora_alpha": 8, "lora_bias": True}, "lora_bias = True is not supported"),
        ({"lora_alpha": 8, "bias": "all"}, "bias = 'all' is not supported"),
        ({"lora_alpha": 8, "modules_to_save": ["proj_out"]}, "modules_to_save = ['proj_out'] is not supported"),
        ({"lora_alpha": 8, "arrow_config": {"x": 1}}, "arrow_config = {'x': 1} is not supported"),
        ({"lora_alpha": 8, "alora_invocation_tokens": [1]}, "alora_invocation_tokens = [1] is not supported"),
        ({"lora_alpha": 8, "init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"lora_alpha": 8, "init_lora_weights": ["pissa"]}, "init_lora_weights = ['pissa'] is not supported"),
    ],
)
def test_a_config_of_pefts_that_is_more_than_a_lora_is_refused(
    tmp_path: Path, adapter: dict[str, Any], text: str
) -> None:
    path, config, state = base(tmp_path, "2.3")
    for prefix in ("", "transformer."):
        lora = save(
            tmp_path / "lora.safetensors",
            diffusers(random_pairs(state, ["proj_out"]), prefix),
            {f"{prefix}{key}": value for key, value in adapter.items()},
        )
        (problem,) = problems(path, config, lora)
        assert problem.startswith("lora_adapter_metadata: ") and text in problem


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN}', '{"r": 1, "r": 2}', "[" * 100_000, "\ud800"])
def test_metadata_that_are_no_json_object_are_refused(tmp_path: Path, text: str) -> None:
    path, config, state = base(tmp_path, "2.3")
    tensors = save(tmp_path / "plain.safetensors", diffusers(random_pairs(state, ["proj_out"]))).read_bytes()
    length = struct.unpack("<Q", tensors[:8])[0]
    header = json.dumps(
        json.loads(tensors[8 : 8 + length]) | {"__metadata__": {"lora_adapter_metadata": text}}
    ).encode()
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(struct.pack("<Q", len(header)) + header + tensors[8 + length :])
    with pytest.raises(CheckpointError, match="lora_adapter_metadata: "):
        load_state(path, config, (lora, 1))


def test_the_connectors_config_is_not_the_transformers(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, ["proj_out"])
    lora = save(tmp_path / "lora.safetensors", diffusers(pairs), {"connectors.r": 5, "connectors.lora_alpha": 50})
    assert_merged(load_state(path, config, (lora, 1)), state, pairs, {"proj_out": 1.0})


def test_an_alpha_and_a_config_have_to_agree(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, ["proj_out"])
    tensors = lightricks(pairs) | {"diffusion_model.proj_out.alpha": torch.tensor(9.7).bfloat16()}
    agreeing = save(tmp_path / "a.safetensors", tensors, {"transformer.lora_alpha": 9.7})
    scale = torch.tensor(9.7).bfloat16().item() / RANK
    assert_merged(load_state(path, config, (agreeing, 1)), state, pairs, {"proj_out": scale})
    lora = save(tmp_path / "b.safetensors", tensors, {"transformer.lora_alpha": 9})
    with pytest.raises(CheckpointError, match=r"a factor of 1\.9\d*, but 1\.8 by lora_adapter_metadata"):
        load_state(path, config, (lora, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"\x80" + data[1:], lambda data: b"", None],
)
def test_a_damaged_lora_is_a_checkpoint_error(tmp_path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    path, config, state = base(tmp_path, "2.3")
    lora = save(tmp_path / "lora.safetensors", lightricks(random_pairs(state, ["proj_out"])))
    if damage is None:
        lora.unlink()
    else:
        lora.write_bytes(damage(lora.read_bytes()))
    with pytest.raises(CheckpointError, match=r"lora\.safetensors"):
        load_state(path, config, (lora, 1))


@pytest.mark.parametrize(
    "lora",
    [
        [("x", float("nan"))],
        [("x", float("inf"))],
        [("x", "1")],
        [("x", True)],
        [("x", None)],
        [("x", 10**400)],
        [("x", torch.ones(()))],
        [("x",)],
        ["x"],
        ("x", 1.0),
        "x",
    ],
)
def test_what_is_no_path_and_finite_strength_is_a_value_error_that_names_the_argument(lora: Any) -> None:
    path = Path("never/opened.safetensors")
    with pytest.raises(ValueError, match=r"lora\[0\]: expected a path and a strength") as caught:
        ltx2ref.load(path, lora=lora)
    assert not isinstance(caught.value, CheckpointError)
