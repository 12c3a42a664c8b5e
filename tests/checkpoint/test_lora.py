"""LoRAs of every published format are merged as diffusers and PEFT fuse them, bit for bit, or are refused.

pytest tests/checkpoint/test_lora.py
"""

import json
import logging
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
from ltx2ref.checkpoint.keywords import ReadingOptions
from ltx2ref.checkpoint.lora import LORA_FORMATS, lora_format, read_lora, spellings

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
    shapes = match.parameter_shapes(RELEASES[release])
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith(".weight")]
    owners: dict[str, set[str]] = {}
    for layer in layers:
        for spelling in spellings(layer):
            owners.setdefault(spelling, set()).add(layer)
    assert [names for names in owners.values() if len(names) > 1] == []
    assert len(layers) > 1370 and len(owners) > 5 * len(layers)


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
        f"{lora}: lightricks LoRA, 4 layers, ranks 5 to 5, factors 1 to 1, skipped 1 tensors of "
        "diffusion_model.video_embeddings_connector.*, 2 tensors of text_embedding_projection.*, strength 0.5"
    ]


def test_a_lora_is_described_by_its_header_and_alphas(tmp_path: Path) -> None:
    path, config, state = base(tmp_path, "2.3")
    pairs = random_pairs(state, ["proj_in", "transformer_blocks.0.attn1.to_gate_logits"])
    lora = read_lora(
        save(tmp_path / "lora.safetensors", diffusers(pairs), {"transformer.r": 5, "transformer.lora_alpha": 10}),
        match.make_plan(path, ReadingOptions(config)),
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
        (["proj_in.lora_A.weight"], "diffusers without prefix"),
        (["lora_unet_model_transformer_blocks_0_ff_net_2.lora_down.weight"], "kohya"),
        (["connectors.x.lora_A.weight", "transformer.proj_in.lora_A.weight"], "diffusers"),
        (["lora_unet_proj_out.lora_up.weight", "diffusion_model.proj_out.lora_B.weight"], "kohya and lightricks"),
        (["model.diffusion_model.patchify_proj.weight"], None),
        (["transformer.proj_in.weight", "transformer.proj_in.alpha"], None),
        (["diffusion_model.proj_out.lokr_w1", "diffusion_model.proj_out.diff"], None),
        ([], None),
    ],
)
def test_a_format_is_told_by_names_alone(names: list[str], expected: str | None) -> None:
    assert lora_format(names) == expected
    assert expected is None or set(expected.split(" and ")) <= LORA_FORMATS.keys()


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
        layers = read_lora(lora, match.make_plan(path, ReadingOptions(config))).layers
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
OUT = "diffusion_model.proj_out"
TOGETHER = "A and B belong together, but the layer has only"


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape).to(dtype)


# Tensors that replace those of a good file, or None to remove one, and texts of which each is in one of the problems.
REFUSED: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "B missing": ({f"{TO_Q}.lora_B.weight": None}, [f"{TO_Q}.lora_A.weight F32 [5, 56]: {TOGETHER} A"]),
    "A missing": ({f"{TO_Q}.lora_A.weight": None}, [f"{TO_Q}.lora_B.weight F32 [56, 5]: {TOGETHER} B"]),
    "alpha alone": ({f"{OUT}.alpha": ones()}, [f"{OUT}.alpha F32 []: {TOGETHER} alpha"]),
    "unknown layer": (
        {"diffusion_model.transformer_blocks.2.attn1.to_q.lora_A.weight": ones(1, 1)},
        ["transformer_blocks.2.attn1.to_q.lora_A.weight F32 [1, 1]: the model has no such layer"],
    ),
    "a name of the other dialect": (
        {"diffusion_model.proj_in.lora_A.weight": ones(1, 1)},
        ["diffusion_model.proj_in.lora_A.weight F32 [1, 1]: the model has no such layer"],
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
        [f"{TO_Q}.lora_A.weight I8 [5, 56]: expected [5, 56], BF16, F16, F32, F64"],
    ),
    "float8": (
        {f"{TO_Q}.lora_A.weight": ones(5, 56, dtype=torch.float8_e4m3fn)},
        ["F8_E4M3 [5, 56]: expected [5, 56], BF16"],
    ),
    "an alpha for each row": ({f"{TO_Q}.alpha": ones(5)}, [f"{TO_Q}.alpha F32 [5]: expected [] or [1]"]),
    "up beside B": ({f"{TO_Q}.lora_up.weight": ones(56, 5)}, [": the same as"]),
    "DoRA, as ComfyUI": ({f"{TO_Q}.dora_scale": ones(56, 1)}, [".dora_scale F32 [56, 1]: not supported"]),
    "DoRA, as PEFT": ({f"{TO_Q}.lora_magnitude_vector": ones(56)}, [".lora_magnitude_vector F32 [56]: not supported"]),
    "a whole difference": ({f"{OUT}.diff": ones(19, 56)}, [f"{OUT}.diff F32 [19, 56]: not supported"]),
    "a bias' difference": ({f"{TO_Q}.diff_b": ones(56)}, [".diff_b F32 [56]: not supported"]),
    "a bias, as PEFT": ({f"{TO_Q}.lora_B.bias": ones(56)}, [".lora_B.bias F32 [56]: not supported"]),
    "LoHa": ({f"{TO_Q}.hada_w1_a": ones(56, 2)}, [".hada_w1_a F32 [56, 2]: not supported"]),
    "LoKr": ({f"{TO_Q}.lokr_w1": ones(2, 2)}, [".lokr_w1 F32 [2, 2]: not supported"]),
    "two formats": (
        {"transformer.proj_out.lora_A.weight": ones(2, 56), "transformer.proj_out.lora_B.weight": ones(19, 2)},
        ["names of several formats: diffusers and lightricks"],
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


@pytest.mark.parametrize("name", ["base_model.model.proj_out", "connectors.x", "unet.x", f"model.{OUT}"])
def test_a_file_without_a_lora_of_the_transformer_is_refused(tmp_path: Path, name: str) -> None:
    """The first file is PEFT's own, which has the alpha in another file. diffusers ignores such tensors."""
    path, config, _ = base(tmp_path, "2.3")
    lora = save(
        tmp_path / "lora.safetensors", {f"{name}.lora_A.weight": ones(2, 56), f"{name}.lora_B.weight": ones(19, 2)}
    )
    found = problems(path, config, lora)
    assert found[0] == "no LoRA of the transformer in it"
    assert len(found) == (1 if name == "connectors.x" else 3)


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
    with pytest.raises(CheckpointError, match=r"to_q\.lora_A\.weight: the merged weight is not finite"):
        load_state(path, config, (lora, 10))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({"r": 5}, "lora_alpha = None: expected a finite number"),
        ({"lora_alpha": "8"}, "lora_alpha = '8': expected a finite number"),
        ({"lora_alpha": True}, "lora_alpha = True: expected a finite number"),
        ({"lora_alpha": 10**400}, "expected a finite number"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": None}}, "to_q = None: expected a finite number"),
        ({"lora_alpha": 8, "alpha_pattern": {".*to_q": 3}}, "'.*to_q': expected the end of a layer's name"),
        ({"lora_alpha": 8, "alpha_pattern": [3]}, "alpha_pattern = [3]: expected an object"),
        ({"lora_alpha": 8, "use_dora": True}, "use_dora = True is not supported"),
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
