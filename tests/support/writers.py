"""Writers of every published checkpoint dialect and quantised format, independent of the loader they test.

Each takes a path, a state under diffusers' names and its config, writes files that look like the published ones, and
returns the truth: the state, under diffusers' names, that a correct reader sees. An unquantised tensor is there in the
dtype that it is stored in, bit for bit. A quantised one is there as float32: what its formula gives in float64, rounded
once. For all formats but int8 ConvRot, float32 arithmetic in the documented order gives just these bits, because
every product but the last is exact; ConvRot sums 256 terms, where a float32 reader may differ in the last bits.

A quantised weight is made from the tensor as it is in `dtype`, by this file's own arithmetic; only the five simple
GGUF formats are encoded by the gguf library, and decoded here.
"""

import itertools
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from tiny import tiny_config
from torch import Tensor

from ltx2ref import TransformerConfig

State = dict[str, Tensor]
Writer = Callable[[Path, State, TransformerConfig], State]
Chooser = Callable[[str], bool]  # decides by a Linear's diffusers name whether it is quantised
Encoder = Callable[[Tensor], tuple[State, Tensor]]  # returns the stored tensors of a weight by suffix, and its truth

PREFIX = "model.diffusion_model."
FP8_NAMES = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
CONVROT_GROUP = 256
NVFP4_BLOCK = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # values by code; bit 3 of a code is the sign

# Parts of diffusers' names, between dots, that published files call differently.
ORIGINAL_PARTS = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}

# In this order, with this scheduler and default separators, the `config` of 2.5 has the published length and sha256.
# fmt: off
CONFIG_ORDER = (
    "_class_name", "_diffusers_version", "activation_fn", "attention_bias", "attention_head_dim", "attention_type",
    "caption_channels", "cross_attention_dim", "double_self_attention", "dropout", "in_channels",
    "norm_elementwise_affine", "norm_eps", "norm_num_groups", "num_attention_heads", "num_embeds_ada_norm",
    "num_layers", "num_vector_embeds", "only_cross_attention", "cross_attention_norm", "out_channels",
    "upcast_attention", "use_linear_projection", "qk_norm", "standardization_norm", "positional_embedding_type",
    "positional_embedding_theta", "positional_embedding_max_pos", "timestep_scale_multiplier",
    "av_ca_timestep_scale_multiplier", "causal_temporal_positioning", "audio_num_attention_heads",
    "audio_attention_head_dim", "use_audio_video_cross_attention", "ff_bias", "share_ff", "audio_out_channels",
    "audio_cross_attention_dim", "audio_positional_embedding_max_pos", "av_cross_ada_norm",
    "use_embeddings_connector", "connector_attention_head_dim", "connector_num_attention_heads",
    "connector_num_layers", "connector_positional_embedding_max_pos", "connector_num_learnable_registers",
    "connector_norm_output", "use_middle_indices_grid", "apply_gated_attention", "connector_apply_gated_attention",
    "caption_projection_first_linear", "caption_projection_second_linear", "caption_proj_input_norm",
    "connector_learnable_registers_std", "caption_proj_before_connector", "audio_connector_attention_head_dim",
    "audio_connector_num_attention_heads", "cross_attention_adaln", "rope_type", "frequencies_precision",
    "text_encoder_norm_type", "use_keyframes_abs_pos_embedding", "audio_in_channels", "audio_ff_bias",
    "use_prompt_adaln_single",  # in no published file, only in tests
)
# fmt: on
SCHEDULER = {
    "_class_name": "RectifiedFlowScheduler",
    "_diffusers_version": "0.25.1",
    "num_train_timesteps": 1000,
    "shifting": None,
    "base_resolution": None,
    "sampler": "LinearQuadratic",
}
# Keys in a Lightricks config that do not concern the transformer, but stand beside those that do.
CONNECTOR_KEYS: dict[str, Any] = {
    "connector_attention_head_dim": 128,
    "connector_norm_output": True,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
}
CONNECTOR_KEYS_2_0 = CONNECTOR_KEYS | {
    "_diffusers_version": "0.25.1",
    "connector_num_attention_heads": 30,
    "connector_num_layers": 2,
}
CONNECTOR_KEYS_2_3 = CONNECTOR_KEYS | {
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_attention_heads": 32,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "connector_apply_gated_attention": True,
    "connector_learnable_registers_std": 1,
    "connector_num_attention_heads": 32,
    "connector_num_layers": 8,
    "text_encoder_norm_type": "per_token_rms",
}
EXTRA_KEYS = {
    "2.0": CONNECTOR_KEYS_2_0,
    "2.3": CONNECTOR_KEYS_2_3,
    "2.5": CONNECTOR_KEYS_2_3 | {"text_encoder_norm_type": "PER_TOKEN_RMS"},
}
GEMMA_2_5 = '{"ltx_version":"2.5.0","gemma_version":"gemma4-12b-ltx-v1"}'
DIFFUSERS_KEYS = {"_class_name": "LTX2VideoTransformer3DModel", "_diffusers_version": "0.40.0.dev0"}
CONVROT_MARK = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": CONVROT_GROUP}
TORCHAO_MARK = {
    "format": "torchao_nvfp4",
    "block_size": NVFP4_BLOCK,
    "scope": "full",
    "config": "NVFP4DynamicActivationNVFP4WeightConfig",
    "is_swizzled_scales": True,
    "use_triton_kernel": True,
    "use_dynamic_activation": True,
    "use_dynamic_per_tensor_scale": True,
}


# ---------------------------------------------------------------- configs
def quantisable_config(release: str, **changes: Any) -> TransformerConfig:
    """Return a small release whose blocks' Linear layers fit all formats: every width is a multiple of 256.

    Both streams are 256 wide; the audio stream's `in_channels`, 18, and the video stream's, 17, fit no format.
    """
    sizes = {
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "cross_attention_dim": 256,
        "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 256,
        "caption_channels": 256,
    }
    return tiny_config(release, **sizes | changes)


def padded_config(release: str, **changes: Any) -> TransformerConfig:
    """Return a smaller release, only for NVFP4: no scale of a square layer fills its 128 x 4 tiles."""
    sizes = {
        "attention_head_dim": 12,
        "cross_attention_dim": 48,
        "audio_attention_head_dim": 20,
        "audio_cross_attention_dim": 80,
        "caption_channels": 112,
    }
    return quantisable_config(release, **sizes | changes)


def release_of(config: TransformerConfig) -> str:
    return "2.0" if config.use_prompt_embeddings else "2.3" if config.ff_bias else "2.5"


def published_linears(name: str) -> bool:
    """Tell what official files quantise, by a Linear's diffusers name: the blocks' layers, but not the gates."""
    return name.startswith("transformer_blocks.") and not name.endswith("to_gate_logits")


# ---------------------------------------------------------------- names, dtypes, metadata
def original_name(name: str) -> str:
    """Return the published name, without a prefix, of what diffusers calls `name`."""
    return ".".join(ORIGINAL_PARTS.get(part, part) for part in name.split("."))


def cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    """Cast a state to `dtype`, except for the scale-shift tables, which all files but diffusers' keep in float32."""
    return {
        name: tensor.to(torch.float32 if "scale_shift_table" in name else dtype).contiguous()
        for name, tensor in state.items()
    }


def lightricks_config(config: TransformerConfig) -> dict[str, Any]:
    """Return the object `transformer` of the metadata's `config`, with the keys that concern the connectors."""
    found = config.to_lightricks() | EXTRA_KEYS[release_of(config)]
    found["av_ca_timestep_scale_multiplier"] = float(found["av_ca_timestep_scale_multiplier"])
    return {key: found[key] for key in sorted(found, key=CONFIG_ORDER.index)}


def lightricks_metadata(config: TransformerConfig) -> dict[str, str]:
    """Return `__metadata__` of a single file (2.0, 2.3) or a split one (2.5). 2.0's version is unknown and left out."""
    release = release_of(config)
    described: dict[str, Any] = {"transformer": lightricks_config(config), "scheduler": SCHEDULER}
    if release != "2.5":
        described |= {"vae": {"_class_name": "CausalVideoAutoencoder"}, "audio_vae": {}, "vocoder": {}}
    metadata = {"config": json.dumps(described)}
    if release != "2.0":
        metadata["model_version"] = f"{release}.0"
    if release == "2.5":
        metadata |= {"gemma_source_checkpoint": GEMMA_2_5, "license": "A licence, in many words."}
    return metadata


def quantization_metadata(layers: Mapping[str, str]) -> dict[str, str]:
    """Return `_quantization_metadata` from the full name and the format of each quantised layer."""
    described = {"format_version": "1.0", "layers": {name: {"format": text} for name, text in layers.items()}}
    return {"_quantization_metadata": json.dumps(described)}


def diffusers_config(config: TransformerConfig) -> dict[str, Any]:
    return config.to_diffusers() | DIFFUSERS_KEYS


def blob(value: object) -> Tensor:
    """Return JSON as the bytes of a U8 tensor, with which ComfyUI and torchao mark a layer."""
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


# ---------------------------------------------------------------- foreign tensors
def connectors(dtype: torch.dtype = torch.bfloat16) -> State:
    """Return a part of both embeddings connectors, 256 wide, under published names without a prefix."""
    names = [f"{stream}_embeddings_connector." for stream in ("video", "audio")]
    linears = ("attn1.to_q", "attn1.to_out.0", "attn1.to_gate_logits", "ff.net.0.proj")
    state: State = {}
    for name in names:
        state[name + "learnable_registers"] = noise(128, 256, dtype=dtype)
        state[name + "transformer_1d_blocks.0.attn1.q_norm.weight"] = noise(256, dtype=dtype)
        for linear in linears:
            rows = 4 if linear.endswith("logits") else 256
            state[f"{name}transformer_1d_blocks.0.{linear}.weight"] = noise(rows, 256, dtype=dtype)
            state[f"{name}transformer_1d_blocks.0.{linear}.bias"] = noise(rows, dtype=dtype)
    return state


def other_models(release: str, dtype: torch.dtype = torch.bfloat16) -> State:
    """Return what else is in a single file, under full names: a tensor or two of every prefix."""
    shapes: dict[str, tuple[int, ...]] = {
        "vae.decoder.conv_in.conv.weight": (4, 3, 3, 3, 3),
        "vae.per_channel_statistics.mean-of-means": (4,),
        "audio_vae.decoder.conv_in.conv.weight": (4, 3, 3, 3),
        "vocoder.conv_pre.weight": (4, 3, 7),
    }
    if release == "2.0":  # with the legacy name of the video connector
        shapes |= {
            "text_embedding_projection.aggregate_embed.weight": (8, 24),
            PREFIX + "embeddings_connector.learnable_registers": (8, 8),
        }
    else:
        for name in ("video_aggregate_embed", "audio_aggregate_embed"):
            shapes |= {
                f"text_embedding_projection.{name}.weight": (8, 24),
                f"text_embedding_projection.{name}.bias": (8,),
            }
    return {name: noise(*shape, dtype=dtype) for name, shape in shapes.items()}


def noise(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def prefixed(state: Mapping[str, Tensor], prefix: str = PREFIX) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save(path: Path, tensors: State, metadata: Mapping[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata=dict(metadata) if metadata is not None else None)


def write_json(path: Path, value: object) -> None:
    """Write JSON as diffusers writes its configs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- unquantised files
def write_diffusers(
    folder: Path, state: State, config: TransformerConfig, *, dtype: torch.dtype = torch.bfloat16, shards: int = 1
) -> State:
    """Write config.json, and one file or `shards` of them with an index. Tables are in `dtype` as well."""
    truth = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    write_json(folder / "config.json", diffusers_config(config))
    write_shards(folder, truth, shards)
    return truth


def write_shards(folder: Path, tensors: State, shards: int) -> None:
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = shard_name(i, shards)
        here = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        save(folder / file, {name: tensors[name] for name in here}, {"format": "pt"})
        weight_map |= dict.fromkeys(here, file)
    if shards > 1:
        write_index(folder, sum(tensor.nbytes for tensor in tensors.values()), weight_map)


def shard_name(i: int, shards: int) -> str:
    part = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
    return f"diffusion_pytorch_model{part}.safetensors"


def write_index(folder: Path, total_size: int, weight_map: Mapping[str, str]) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def write_single_file(
    path: Path, state: State, config: TransformerConfig, *, dtype: torch.dtype = torch.bfloat16
) -> State:
    """Write Lightricks' file of 2.0 and 2.3, with connectors, text projection, VAEs, vocoder and metadata."""
    truth = cast(state, dtype)
    foreign = prefixed(connectors(dtype)) | other_models(release_of(config), dtype)
    save(path, renamed(truth) | foreign, lightricks_metadata(config))
    return truth


def write_split(path: Path, state: State, config: TransformerConfig, *, dtype: torch.dtype = torch.bfloat16) -> State:
    """Write Lightricks' file of 2.5: the transformer, the connectors and four metadata keys."""
    truth = cast(state, dtype)
    save(path, renamed(truth) | prefixed(connectors(dtype)), lightricks_metadata(config))
    return truth


def write_transformer_only(
    path: Path, state: State, config: TransformerConfig, *, dtype: torch.dtype = torch.bfloat16, metadata: bool = True
) -> State:
    """Write the repackaged files of ComfyUI and Kijai, which keep the prefix, and with `metadata` the metadata."""
    truth = cast(state, dtype)
    save(path, renamed(truth), lightricks_metadata(config) if metadata else None)
    return truth


def write_diffsynth(
    folder: Path, state: State, config: TransformerConfig, *, dtype: torch.dtype = torch.bfloat16
) -> State:
    """Write DiffSynth's repackaged file, `transformer.safetensors`, which keeps the prefix but no metadata."""
    return write_transformer_only(folder / "transformer.safetensors", state, config, dtype=dtype, metadata=False)


def write_fastvideo(
    folder: Path, state: State, config: TransformerConfig, *, dtype: torch.dtype = torch.bfloat16
) -> State:
    """Write FastVideo's folder: published names without a prefix, and a Lightricks config of another class."""
    truth = cast(state, dtype)
    save(folder / "model.safetensors", renamed(truth, prefix=""))
    write_json(folder / "config.json", lightricks_config(config) | {"_class_name": "LTX2Transformer3DModel"})
    return truth


def write_prefixed_diffusers(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    prefix: str = "transformer.",
) -> State:
    """Write diffusers' names behind a prefix, tables in `dtype`, and no config anywhere."""
    truth = {name: tensor.to(dtype).contiguous() for name, tensor in state.items()}
    save(path, prefixed(truth, prefix))
    return truth


def renamed(state: Mapping[str, Tensor], prefix: str = PREFIX) -> State:
    return {prefix + original_name(name): tensor for name, tensor in state.items()}


# ---------------------------------------------------------------- fp8
def write_fp8_cast(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    fp8: torch.dtype = torch.float8_e4m3fn,
    biases: bool = False,
    quantised: Chooser = published_linears,
    dtype: torch.dtype = torch.bfloat16,
) -> State:
    """Weights of the quantised layers, and their biases if `biases`, are cast, without scales.

    Truth: the FP8 values as float32, which holds them exactly.
    """
    stored, truth = cast(state, dtype), cast(state, dtype)
    for name in state:
        module, _, leaf = name.rpartition(".")
        if is_linear(module, state) and quantised(module) and (leaf == "weight" or biases):
            stored[name] = stored[name].to(fp8)
            truth[name] = stored[name].float()
    save(path, renamed(stored), lightricks_metadata(config))
    return truth


def write_fp8_scaled(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    fp8: torch.dtype = torch.float8_e4m3fn,
    quantised: Chooser = published_linears,
    dtype: torch.dtype = torch.bfloat16,
) -> State:
    """Lightricks' own FP8 single file: 0-dim `.weight_scale` and `.input_scale`, `_quantization_metadata`."""
    layers, truth = encode_linears(cast(state, dtype), quantised, fp8_encoder(fp8, input_scale="input_scale"))
    foreign = prefixed(connectors(dtype)) | other_models(release_of(config), dtype)
    said = quantization_metadata(dict.fromkeys(quantised_layers(layers), FP8_NAMES[fp8]))
    save(path, prefixed(layers) | foreign, lightricks_metadata(config) | said)
    return truth


def write_fp8_old_comfy(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    fp8: torch.dtype = torch.float8_e4m3fn,
    marker_dtype: torch.dtype | None = None,
    marker_elements: int = 2,
    scale_shape: tuple[int, ...] = (),
    quantised: Chooser = published_linears,
    dtype: torch.dtype = torch.bfloat16,
) -> State:
    """ComfyUI's first convention: `.scale_weight`, `.scale_input`, and one marker `scaled_fp8` behind the prefix.

    The marker's dtype is `fp8`, or float32, which means e4m3; its number of elements speaks of matrix products.
    """
    encode = fp8_encoder(fp8, scale="scale_weight", input_scale="scale_input", shape=scale_shape)
    layers, truth = encode_linears(cast(state, dtype), quantised, encode)
    layers["scaled_fp8"] = torch.zeros(marker_elements, dtype=marker_dtype or fp8)
    save(path, prefixed(layers), lightricks_metadata(config))
    return truth


def write_fp8_new_comfy(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    fp8: torch.dtype = torch.float8_e4m3fn,
    blobs: bool = True,
    metadata_says: str | None = None,
    quantised: Chooser = published_linears,
    dtype: torch.dtype = torch.bfloat16,
) -> State:
    """ComfyUI's second convention: `.weight_scale`, and what a layer is in its own `.comfy_quant` or in the metadata.

    blobs            each layer has a `.comfy_quant`, which is right
    metadata_says    the format of all layers in `_quantization_metadata`, which may be wrong where there are blobs
    """
    mark = {"comfy_quant": blob({"format": FP8_NAMES[fp8]})} if blobs else {}
    layers, truth = encode_linears(cast(state, dtype), quantised, fp8_encoder(fp8, marks=mark))
    metadata = lightricks_metadata(config)
    if metadata_says is not None:
        metadata |= quantization_metadata(dict.fromkeys(quantised_layers(layers), metadata_says))
    save(path, prefixed(layers), metadata)
    return truth


def write_fp8_vonkaiser(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    fp8: torch.dtype = torch.float8_e4m3fn,
    quantised: Chooser = lambda name: True,
    dtype: torch.dtype = torch.bfloat16,
) -> State:
    """Write vonkaiser's 2.5 file: an F32 0-dim `<tensor name>_scale` for every FP8 tensor, no metadata.

    `quantised` is asked about tensors, not layers, and by default takes all of them, biases and tables too. (The
    published file has in FP8 what is BF16 and has two dimensions.)
    """
    stored: State = {}
    truth = cast(state, dtype)
    for name, tensor in (truth | connectors(dtype)).items():
        key = PREFIX + original_name(name)
        if quantised(name):
            parts, decoded = fp8_encoder(fp8, scale="scale")(tensor)
            stored |= {key: parts["weight"], key + "_scale": parts["scale"]}
            truth |= {name: decoded} if name in state else {}
        else:
            stored[key] = tensor
    save(path, stored)
    return truth


def fp8_encoder(
    fp8: torch.dtype,
    scale: str = "weight_scale",
    input_scale: str = "",
    shape: tuple[int, ...] = (),
    marks: Mapping[str, Tensor] = MappingProxyType({}),
) -> Encoder:
    """Truth: `weight.float() * scale`, a single product of float32 numbers.

    Scales are stored under the suffixes given; `marks` are stored with each layer as they are.
    """

    def encode(weight: Tensor) -> tuple[State, Tensor]:
        factor = (weight.double().abs().max() / torch.finfo(fp8).max).float().clamp(min=1e-12)
        codes = (weight.double() / factor.double()).clamp(-torch.finfo(fp8).max, torch.finfo(fp8).max).to(fp8)
        parts = {"weight": codes, scale: factor.reshape(shape)} | {name: mark.clone() for name, mark in marks.items()}
        if input_scale:
            parts[input_scale] = torch.tensor(0.0625).reshape(shape)
        return parts, (codes.double() * factor.double()).float()

    return encode


# ---------------------------------------------------------------- int8 ConvRot
def write_int8_convrot(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    quantised: Chooser = published_linears,
    dtype: torch.dtype = torch.bfloat16,
) -> State:
    """Write the split 2.5 file in int8: a scale per row, `.comfy_quant`, weights rotated, connectors quantised, too."""
    layers, truth = encode_linears(cast(state, dtype), quantised, encode_int8_convrot)
    ours = [name for name in connectors() if "gate_logits" not in name]
    others, _ = encode_linears(connectors(dtype), lambda name: name + ".weight" in ours, encode_int8_convrot)
    save(path, prefixed(layers | others), lightricks_metadata(config))
    return truth


def encode_int8_convrot(weight: Tensor) -> tuple[State, Tensor]:
    """Truth: int8 times its row's scale, then un-rotated, in float64. K must be a multiple of 256."""
    turned = rotate(weight.double())
    scale = (turned.abs().amax(1, keepdim=True) / 127).float().clamp(min=1e-12)
    codes = (turned / scale.double()).round().clamp(-127, 127).to(torch.int8)
    parts = {"weight": codes, "weight_scale": scale, "comfy_quant": blob(CONVROT_MARK)}
    return parts, rotate(codes.double() * scale.double()).float()


def rotate(weight: Tensor) -> Tensor:
    """Multiply each group of 256 columns by the Hadamard matrix, which is its own inverse."""
    return (weight.reshape(-1, CONVROT_GROUP) @ hadamard()).reshape(weight.shape)


def hadamard() -> Tensor:
    """Return a symmetric, orthogonal matrix (256, 256) in float64, whose elements are 1/16 or -1/16."""
    h4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64)
    return torch.kron(torch.kron(h4, h4), torch.kron(h4, h4)) / 16


# ---------------------------------------------------------------- NVFP4
def write_nvfp4(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    quantised: Chooser = published_linears,
    dtype: torch.dtype = torch.bfloat16,
    quantization: bool = True,
) -> State:
    """Lightricks' NVFP4 split file: high nibble first. `quantization`: with `_quantization_metadata`, as the newer one.

    The scales of `weight_scale` are in 128 x 4 tiles, [roundup(N, 128), roundup(K / 16, 4)], padded with zeros.
    """
    layers, truth = encode_linears(cast(state, dtype), quantised, encode_nvfp4)
    metadata = lightricks_metadata(config)
    if quantization:
        metadata |= quantization_metadata(dict.fromkeys(quantised_layers(layers), "nvfp4"))
    save(path, prefixed(layers | connectors(dtype)), metadata)
    return truth


def write_nvfp4_torchao(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    quantised: Chooser = published_linears,
    dtype: torch.dtype = torch.bfloat16,
    swizzled: bool = True,
) -> State:
    """torchao's: low nibble first, a marker `.torchao_nvfp4` for each layer, no metadata.

    The bytes of `weight_scale` are the same tiles, but [32 * ceil(N / 128), 16 * ceil(G / 4)]; or, where not
    `swizzled`, the scales are plainly [N, G], which no published file has.
    """
    layers, truth = encode_linears(cast(state, dtype), quantised, lambda weight: encode_torchao(weight, swizzled))
    save(path, prefixed(layers | connectors(dtype)))
    return truth


def encode_nvfp4(weight: Tensor) -> tuple[State, Tensor]:
    codes, scales, scale_2 = quantise_nvfp4(weight)
    parts = {
        "weight": pack_nibbles(codes, high_first=True),
        "weight_scale": swizzle(scales),
        "weight_scale_2": scale_2,
        "input_scale": torch.tensor(0.03125),
    }
    return parts, dequantise_nvfp4(codes, scales, scale_2)


def encode_torchao(weight: Tensor, swizzled: bool = True) -> tuple[State, Tensor]:
    codes, scales, scale_2 = quantise_nvfp4(weight)
    tiled = swizzle(scales)
    stored = tiled.reshape(tiled.shape[0] // 4, tiled.shape[1] * 4) if swizzled else scales
    parts = {
        "weight": pack_nibbles(codes, high_first=False),
        "weight_scale": stored,
        "weight_scale_2": scale_2,
        "torchao_nvfp4": blob(TORCHAO_MARK | {"is_swizzled_scales": swizzled}),
    }
    return parts, dequantise_nvfp4(codes, scales, scale_2)


def quantise_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes 0 to 15 (N, K), e4m3 scales (N, K / 16) of 16 columns each, and the float32 scale of all."""
    blocks = weight.double().unflatten(1, (-1, NVFP4_BLOCK))
    scale_2 = (blocks.abs().max() / 2688).float().clamp(min=1e-30)
    scales = (blocks.abs().amax(2) / 6 / scale_2.double()).clamp(max=448).to(torch.float8_e4m3fn)
    steps = (scales.double() * scale_2.double())[:, :, None]
    x = torch.where(steps > 0, blocks / steps, 0)  # a block of tiny numbers has the scale 0
    midpoints = [(low + high) / 2 for low, high in itertools.pairwise(E2M1)]
    magnitude = torch.bucketize(x.abs(), torch.tensor(midpoints, dtype=torch.float64))
    return (magnitude + 8 * (x < 0)).to(torch.uint8).flatten(1), scales, scale_2


def dequantise_nvfp4(codes: Tensor, scales: Tensor, scale_2: Tensor) -> Tensor:
    """Return the truth: value times scale, which is exact, times `scale_2`, rounded to float32."""
    values = torch.tensor(E2M1 + tuple(-x for x in E2M1), dtype=torch.float64)[codes.long()]
    return (values.unflatten(1, (-1, NVFP4_BLOCK)) * scales.double()[:, :, None] * scale_2.double()).flatten(1).float()


def pack_nibbles(codes: Tensor, *, high_first: bool) -> Tensor:
    """Pack two codes (N, K) into each byte (N, K / 2)."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    return even << 4 | odd if high_first else odd << 4 | even


def swizzle(scales: Tensor) -> Tensor:
    """Arrange (N, G) in 128 x 4 tiles (roundup(N, 128), roundup(G, 4)), with zeros where the tiles stick out."""
    rows, columns = scales.shape
    padded_rows, padded_columns = -(-rows // 128) * 128, -(-columns // 4) * 4
    tiled = torch.zeros(padded_rows * padded_columns, dtype=torch.uint8)
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None]
    tiled[tile_offset(r, c, padded_columns)] = scales.view(torch.uint8)
    return tiled.reshape(padded_rows, padded_columns).view(scales.dtype)


def tile_offset(r: Any, c: Any, columns: int) -> Any:
    """Return where the scale of row r and block c is stored, for integers or tensors. `columns` is padded to 4."""
    tile = (r // 128) * (columns // 4) + c // 4
    return tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4


# ---------------------------------------------------------------- other formats, layer by layer
def write_layers(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    encode: Encoder,
    entry: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    prefix_in_entries: bool = True,
    quantised: Chooser = published_linears,
    dtype: torch.dtype = torch.bfloat16,
) -> State:
    """Write a file whose quantised layers an encoder makes, with or without markers.

    entry       what `_quantization_metadata` says of each of them
    metadata    more metadata; None leaves out Lightricks' as well
    """
    layers, truth = encode_linears(cast(state, dtype), quantised, encode)
    modules = [name.removesuffix(".weight") for name in state if is_linear(name.removesuffix(".weight"), state)]
    names = [original_name(module) for module in modules if quantised(module)]
    found = None if metadata is None else lightricks_metadata(config) | dict(metadata)
    if entry is not None:
        described = {(PREFIX if prefix_in_entries else "") + name: dict(entry) for name in names}
        found = (found or {}) | {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": described})}
    save(path, prefixed(layers), found)
    return truth


def spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Return a scale for each element, of scales for all, for rows, or for blocks."""
    grid = scale.double().reshape(1, 1) if scale.numel() == 1 else scale.double().reshape(len(scale), -1)
    return grid.repeat_interleave(rows // grid.shape[0], 0).repeat_interleave(columns // grid.shape[1], 1)


def largest(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the largest magnitude in each block of a weight, of which a grid of this shape has one each."""
    rows, columns = weight.shape
    grid = {0: (1, 1), 1: (shape[0] if shape else 1, 1)}.get(len(shape), shape[:2])
    blocks = weight.double().abs().reshape(grid[0], rows // grid[0], grid[1], columns // grid[1])
    return blocks.amax((1, 3)).reshape(shape).clamp(min=1e-12)


def encode_grid(
    kind: torch.dtype, shape: Callable[[int, int], tuple[int, ...]], mark: Mapping[str, Any] | None, rotation: int = 0
) -> Encoder:
    """Int8 or float8 times scales in any grid, perhaps rotated. Truth: number times scale, in float64, un-rotated."""

    def encode(weight: Tensor) -> tuple[State, Tensor]:
        rows, columns = weight.shape
        turned = turn(weight.double(), rotation)
        top = 127 if kind == torch.int8 else torch.finfo(kind).max
        scale = (largest(turned, shape(rows, columns)) / top).float()
        steps = spread(scale, rows, columns)
        codes = (turned / steps).clamp(-top, top)
        codes = (codes.round() if kind == torch.int8 else codes).to(kind)
        parts = {"weight": codes, "weight_scale": scale} | ({} if mark is None else {"comfy_quant": blob(mark)})
        return parts, turn(codes.double() * steps, rotation).float()

    return encode


def turn(weight: Tensor, group: int) -> Tensor:
    """Multiply each group of columns by the Hadamard matrix of its size, element by element of its definition."""
    if not group:
        return weight
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < group:
        matrix = torch.cat([torch.cat([matrix * x for x in row], 1) for row in H4], 0)
    return (weight.reshape(-1, group) @ matrix / group**0.5).reshape(weight.shape)


H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def encode_mxfp8(mark: Mapping[str, Any] | None = None, declared: torch.dtype = torch.uint8) -> Encoder:
    """Float8 times a power of two for each 32 columns, whose exponents are in tiles. Truth: the exact product."""

    def encode(weight: Tensor) -> tuple[State, Tensor]:
        blocks = weight.double().unflatten(1, (-1, 32))
        exponents = torch.floor(torch.log2(blocks.abs().amax(2).clamp(min=2.0**-120))).int() - 8
        codes = (blocks / torch.exp2(exponents.double())[:, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        truth = (codes.double() * torch.exp2(exponents.double())[:, :, None]).flatten(1).float()
        tiles = swizzle((exponents + 127).to(torch.uint8)).view(declared)
        marks = {"comfy_quant": blob({"format": "mxfp8"} | dict(mark))} if mark is not None else {}
        return {"weight": codes.flatten(1), "weight_scale": tiles, **marks}, truth

    return encode


def encode_modelopt_nvfp4(weight: Tensor, tiled: bool = False) -> tuple[State, Tensor]:
    """ModelOpt's NVFP4: the first code low, scales flat or, if exported for cuBLAS, in tiles."""
    codes, scales, scale_2 = quantise_nvfp4(weight)
    parts = {
        "weight": pack_nibbles(codes, high_first=False),
        "weight_scale": swizzle(scales) if tiled else scales,
        "weight_scale_2": scale_2,
        "input_scale": torch.tensor(0.03125),
    }
    return parts, dequantise_nvfp4(codes, scales, scale_2)


def modelopt_config(algorithm: str = "NVFP4", **more: Any) -> dict[str, Any]:
    """Return the `quantization_config` that ModelOpt writes into config.json, and into metadata after merging."""
    return {
        "config_groups": {"group_0": {"weights": {"dynamic": False, "num_bits": 4, "type": "float"}}},
        "ignore": ["proj_out"],
        "quant_algo": algorithm,
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
        **more,
    }


def encode_quanto(weight: Tensor) -> tuple[State, Tensor]:
    """Quanto's int8: names of its own, a bfloat16 scale for each row, and scales of activations that are 1."""
    scale = (weight.double().abs().amax(1, keepdim=True) / 127).clamp(min=1e-12).to(torch.bfloat16)
    codes = (weight.double() / scale.double()).round().clamp(-127, 127).to(torch.int8)
    ones = {name: torch.ones((), dtype=torch.bfloat16) for name in ("input_scale", "output_scale")}
    return {"weight._data": codes, "weight._scale": scale, **ones}, (codes.double() * scale.double()).float()


def encode_w4a4(weight: Tensor, group: int = 256) -> tuple[State, Tensor]:
    """Int4 from -7 to 7, the first number in the low nibble, rotated, with a scale for each row."""
    turned = turn(weight.double(), group)
    scale = (turned.abs().amax(1) / 7).float().clamp(min=1e-12)
    codes = (turned / scale.double()[:, None]).round().clamp(-7, 7)
    packed = pack_nibbles(codes.int().bitwise_and(15).to(torch.uint8), high_first=False).view(torch.int8)
    mark = blob({"format": "convrot_w4a4", "convrot_groupsize": group, "linear_dtype": "int8"})
    truth = turn(codes * scale.double()[:, None], group).float()
    return {"weight": packed, "weight_scale": scale, "comfy_quant": mark}, truth


def encode_w4a8(bits: int = 4, codebook: bool = True, declared: torch.dtype = torch.float8_e4m3fn) -> Encoder:
    """Codes of 4 or 6 bits that become int8 by a table and a float8 scale for 16 columns; rotated, a scale by row."""

    def encode(weight: Tensor) -> tuple[State, Tensor]:
        turned = turn(weight.double(), 256)
        channel = (turned.abs().amax(1) / 127).float().clamp(min=1e-12)
        groups = (turned / channel.double()[:, None]).unflatten(1, (-1, 16))
        half = 2 ** (bits - 1)
        table = (torch.arange(2.0**bits) - half).double()
        if codebook:
            table = torch.linspace(-1.7, 1.9, 16).double()
        scale = (groups.abs().amax(2) / table.abs().max()).clamp(max=448).to(torch.float8_e4m3fn)
        steps = scale.double()[:, :, None].clamp(min=2.0**-9)
        codes = (groups / steps)[..., None].sub(table).abs().argmin(-1).flatten(1)
        levels = (table[codes].unflatten(1, (-1, 16)).float() * scale.float()[:, :, None]).round().clamp(-127, 127)
        packed = pack_nibbles((codes & 15).to(torch.uint8), high_first=False)
        if bits == 6:
            upper = sum((codes[:, i::4] >> 4) << 2 * i for i in range(4))
            packed = torch.cat([packed, upper.to(torch.uint8)], 1)
        mark = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 256}
        parts = {
            "weight": packed.view(torch.int8),
            "weight_s_rel": scale.view(declared),
            "weight_s_channel": channel,
            "comfy_quant": blob(mark),
        }
        if codebook:
            parts["weight_codebook"] = table.float()
        return parts, turn(levels.flatten(1).double() * channel.double()[:, None], 256).float()

    return encode


NF4 = tuple(x / 8 for x in (-8, -5.6, -4.2, -3.2, -2.3, -1.5, -0.7, 0, 0.6, 1.3, 2, 2.7, 3.5, 4.5, 5.8, 8))


def encode_nf4(nested: bool = False) -> Encoder:
    """bitsandbytes' codes of 4 bits, high nibble first, times the largest of each 64, which may be coded themselves.

    The sixteen values are stored with each layer, so any will do.
    """

    def encode(weight: Tensor) -> tuple[State, Tensor]:
        table, blocks = torch.tensor(NF4), weight.float().reshape(-1, 64)
        top = blocks.abs().amax(1).clamp(min=1e-12)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        more: State = {}
        stored = top
        if nested:
            of = torch.arange(len(top)) // 256
            offset = float(top.mean())
            second = torch.stack([part.abs().max() for part in (top - offset).split(256)])
            levels = torch.linspace(-1, 1, 256)
            stored = ((top - offset) / second[of])[:, None].sub(levels).abs().argmin(1).to(torch.uint8)
            top = levels[stored.long()] * second[of] + offset
            more = {"weight.nested_absmax": second, "weight.nested_quant_map": levels}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        codes = (blocks / top[:, None])[..., None].sub(table).abs().argmin(-1).reshape(1, -1)
        parts = {
            "weight": pack_nibbles(codes.to(torch.uint8), high_first=True).reshape(-1, 1),
            "weight.absmax": stored,
            "weight.quant_map": table,
            "weight.quant_state.bitsandbytes__nf4": blob(state),
            **more,
        }
        truth = (table[codes.reshape(-1, 64)].double() * top.double()[:, None]).float()
        return parts, truth.reshape(weight.shape)

    return encode


def encode_bnb_int8(weight: Tensor) -> tuple[State, Tensor]:
    """bitsandbytes' int8, whose scales are 127 times those of a number. Truth in its own two products in float32."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12)
    codes = (weight.double() * 127 / scale.double()[:, None]).round().to(torch.int8)
    truth = codes.float() * scale[:, None] * 7.874015718698502e-3
    return {"weight": codes, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, truth


def encode_mlx(bits: int, dtype: torch.dtype = torch.bfloat16) -> Encoder:
    """MLX's affine codes, packed from the low end of words of 32 bits. Truth: code * scale + bias in float32."""

    def encode(weight: Tensor) -> tuple[State, Tensor]:
        groups = weight.double().unflatten(1, (-1, 64))
        low, high = groups.amin(2), groups.amax(2)
        scale = (((high - low) / (2**bits - 1)).clamp(min=1e-9)).to(dtype)
        bias = low.to(dtype)
        codes = ((groups - bias.double()[..., None]) / scale.double()[..., None]).round().clamp(0, 2**bits - 1).long()
        words = codes.flatten(1).unflatten(1, (-1, 32 // bits))
        packed = (words << bits * torch.arange(32 // bits)).sum(2)
        truth = codes.float() * scale.float()[..., None] + bias.float()[..., None]
        signed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
        return {"weight": signed.view(torch.uint32), "scales": scale, "biases": bias}, truth.flatten(1)

    return encode


# ---------------------------------------------------------------- layers of a state
def encode_linears(state: State, quantised: Chooser, encode: Encoder) -> tuple[State, State]:
    """Return what to store, under published names without a prefix, and the truth, under the names of `state`."""
    stored: State = {}
    truth = dict(state)
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and is_linear(module, state) and quantised(module):
            parts, truth[name] = encode(tensor)
            stored |= {f"{original_name(module)}.{part}": value for part, value in parts.items()}
        else:
            stored[original_name(name)] = tensor
    return stored, truth


def is_linear(module: str, state: Mapping[str, Tensor]) -> bool:
    return module + ".weight" in state and state[module + ".weight"].ndim == 2


def quantised_layers(stored: State) -> list[str]:
    """Return the full names of the layers that have a scale."""
    return [PREFIX + name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")]


# ---------------------------------------------------------------- GGUF
def mixed_gguf_types(name: str, tensor: Tensor) -> str:
    """Choose types by diffusers' name: F32 for vectors and tables, as converters do, and any type for the others."""
    if tensor.ndim == 1 or "scale_shift_table" in name:
        return "F32"
    fitting = (*GGUF_BLOCKS, "F16", "BF16") if tensor.shape[-1] % 32 == 0 else ("F16", "BF16", "F32")
    return fitting[zlib.crc32(name.encode()) % len(fitting)]


def write_gguf(
    path: Path,
    state: State,
    config: TransformerConfig,
    *,
    types: Callable[[str, Tensor], str] = mixed_gguf_types,
    prefix: str = "",
    reshaped: str = "proj_in.weight",
    metadata: bool = True,
) -> State:
    """Write a GGUF file of the architecture "ltxv", connectors included. It needs the gguf library.

    types       the ggml type of a tensor: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0
    prefix      usually none, sometimes `model.diffusion_model.`
    reshaped    this tensor is stored with 256 columns, its own shape in `comfy.gguf.orig_shape.<name>`; "": none is
    metadata    the strings `config` and `model_version` are there
    """
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "ltxv")
    for key, text in lightricks_metadata(config).items() if metadata else ():
        writer.add_string(key, text)
    truth: State = {}
    for name, tensor in (state | connectors(torch.float32)).items():
        key, shape = prefix + original_name(name), tensor.shape
        if name == reshaped:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(shape))
            tensor = tensor.reshape(-1, 256)
        decoded = add_gguf_tensor(writer, key, tensor, types(name, tensor)).reshape(shape)
        truth |= {name: decoded} if name in state else {}
    finish_gguf(writer)
    return truth


def add_gguf_tensor(writer: Any, key: str, tensor: Tensor, kind: str) -> Tensor:
    """Write one tensor, and return the truth: in the stored dtype, or decoded in float64 and rounded to float32."""
    from gguf import GGMLQuantizationType, quants

    ggml_type = GGMLQuantizationType[kind]
    if kind in GGUF_BLOCKS:
        coded = quants.quantize(tensor.float().contiguous().numpy(), ggml_type)
        writer.add_tensor(key, coded, raw_dtype=ggml_type)
        return decode_gguf(torch.from_numpy(coded), kind)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    stored = tensor.to(dtype).contiguous()
    plain = stored.view(torch.uint8) if kind == "BF16" else stored  # because numpy has no bfloat16
    writer.add_tensor(key, plain.numpy(), raw_dtype=ggml_type)
    return stored


def finish_gguf(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Bytes in a block of 32 numbers: a float16 scale, perhaps a float16 minimum, perhaps 4 bytes of fifth bits, and codes.
GGUF_BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}


def decode_gguf(coded: Tensor, kind: str) -> Tensor:
    """Decode bytes (N, ...) to float32 (N, K): scale * (code - centre), or scale * code + minimum."""
    blocks = coded.reshape(-1, GGUF_BLOCKS[kind])
    scale = half(blocks[:, :2])
    if kind == "Q8_0":
        values = scale * blocks[:, 2:].contiguous().view(torch.int8).double()
    elif kind.endswith("_1"):
        values = scale * gguf_codes(blocks[:, 4:]).double() + half(blocks[:, 2:4])
    else:
        values = scale * (gguf_codes(blocks[:, 2:]).double() - {"Q4_0": 8, "Q5_0": 16}[kind])
    return values.float().reshape(len(coded), -1)


def gguf_codes(block: Tensor) -> Tensor:
    """Return codes (B, 32) from 16 bytes of nibbles, the first half of the numbers low.

    They come after 0 or 4 bytes of fifth bits.
    """
    nibbles = block[:, -16:].int()
    codes = torch.cat([nibbles & 15, nibbles >> 4], 1)
    if block.shape[1] == 20:  # bit i % 8 of byte i // 8 belongs to number i
        fifth = block[:, :4].int()[:, :, None] >> torch.arange(8) & 1
        codes = codes + 16 * fifth.flatten(1)
    return codes


def half(two_bytes: Tensor) -> Tensor:
    return two_bytes.contiguous().view(torch.float16).double()


# ---------------------------------------------------------------- all
# Writers with default options, by name. The path is a folder where the name ends in /.
WRITERS: dict[str, Writer] = {
    "diffusers/": write_diffusers,
    "single_file": write_single_file,
    "split": write_split,
    "transformer_only": write_transformer_only,
    "diffsynth/": write_diffsynth,
    "fastvideo/": write_fastvideo,
    "prefixed_diffusers": write_prefixed_diffusers,
    "fp8_cast": write_fp8_cast,
    "fp8_scaled": write_fp8_scaled,
    "fp8_old_comfy": write_fp8_old_comfy,
    "fp8_new_comfy": write_fp8_new_comfy,
    "fp8_vonkaiser": write_fp8_vonkaiser,
    "int8_convrot": write_int8_convrot,
    "nvfp4": write_nvfp4,
    "nvfp4_torchao": write_nvfp4_torchao,
    "gguf": write_gguf,
}
