"""Run ltx-core 1.0.0, the authors' implementation of the LTX-2 transformer, as a black box.

Install it with `pip install --no-deps ltx-core==1.0.0`: its transformer needs nothing else that this package lacks.
Shapes: B batch, T tokens of a stream, S text tokens, P position axes (3 for video, 1 for audio).
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import LTX2VideoTransformer3DModel
from ltx_core.components.patchifiers import AudioPatchifier, VideoLatentPatchifier
from ltx_core.guidance.perturbations import (
    BatchedPerturbationConfig,
    Perturbation,
    PerturbationConfig,
    PerturbationType,
)
from ltx_core.model.transformer.attention import AttentionFunction
from ltx_core.model.transformer.modality import Modality
from ltx_core.model.transformer.model import LTXModel
from ltx_core.model.transformer.rope import LTXRopeType
from ltx_core.model.transformer.text_projection import PixArtAlphaTextProjection
from ltx_core.tools import AudioLatentTools, VideoLatentTools
from ltx_core.types import AudioLatentShape, SpatioTemporalScaleFactors, VideoLatentShape
from torch import Tensor, nn

from ...checkpoint.names import to_lightricks
from ..guard import Unsupported
from ..trace.layouts import LIGHTRICKS_LIKE
from ..trace.taps import Taps, returned, trace
from .diffusers import Arguments, Config, adopt, without_private

# ltx-core 1.0.0 has one flag for both streams, and cannot express what is new in release 2.5.
LTX_CORE_PAIRS = {"gated_attn": "audio_gated_attn", "cross_attn_mod": "audio_cross_attn_mod"}
LTX_CORE_CONSTANTS = {
    "ff_bias": True,
    "audio_ff_bias": True,
    "attention_bias": True,
    "attention_out_bias": True,
    "causal_offset": 1,
    "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": False,
}
LTX_CORE_SAME_FIELDS = (
    "num_layers",
    "in_channels",
    "out_channels",
    "num_attention_heads",
    "attention_head_dim",
    "cross_attention_dim",
    "audio_in_channels",
    "audio_out_channels",
    "audio_num_attention_heads",
    "audio_attention_head_dim",
    "audio_cross_attention_dim",
    "timestep_scale_multiplier",
    "norm_eps",
)


class LTXCore(nn.Module):
    """The model of ltx-core, together with the config that its inputs depend on."""

    def __init__(self, model: nn.Module, config: Config):
        super().__init__()
        self.model, self.config = model, config


def build_ltx_core(config: Config, state: Mapping[str, Tensor], dtype: torch.dtype) -> LTXCore:
    """Build ltx-core's model around the given parameters, shared as in `build_diffusers`.

    `config` is diffusers', for release 2.0 or 2.3. Raises `Unsupported` for what ltx-core 1.0.0 cannot express: release
    2.5, and flags that differ between the streams.
    """
    full = _with_defaults(config)
    _check_ltx_core_config(full)
    with torch.device("meta"):
        model = LTXModel(**_ltx_core_arguments(full), **_caption_projections(full))
    return LTXCore(adopt(model, {to_lightricks(name): t for name, t in state.items()}, dtype), full)


def run_ltx_core(model: LTXCore, inputs: Arguments) -> tuple[Tensor, Tensor]:
    """Return the velocities of video (B, Tv, C) and audio (B, Ta, C) for the documented arguments.

    ltx-core 1.0.0 always conditions the exchange on the other stream's sigma. So this raises `Unsupported` unless the
    inputs contain `use_cross_timestep=True` and `sigma`, and for everything else that ltx-core has no equivalent of.
    """
    _check_ltx_core_inputs(inputs)
    kwargs = inputs.get("attention_kwargs") or {}
    video = _modality(inputs, model.config, "", kwargs.get("video_self_attention_mask"))
    audio = _modality(inputs, model.config, "audio_", None)
    found_video, found_audio = model.model(video, audio, _perturbations(inputs))
    # It returns None for an absent stream.
    pair = (
        inputs["hidden_states"] if video is None else found_video,
        inputs["audio_hidden_states"] if audio is None else found_audio,
    )
    out_video, out_audio = returned(pair).values()
    return out_video, out_audio


def video_patches(inputs: Arguments, config: Config) -> Tensor:
    """Return the bounds of video patches, (B, 3, Tv, 2), in seconds and pixels.

    ltx-core makes them in the model's dtype.
    """
    latent = inputs["hidden_states"]
    shape = VideoLatentShape(*latent.shape[::2], inputs["num_frames"], inputs["height"], inputs["width"])
    tools = VideoLatentTools(
        VideoLatentPatchifier(config["patch_size"]),
        shape,
        inputs.get("fps", 24.0),
        SpatioTemporalScaleFactors(*config["vae_scale_factors"]),  # time, height, width
    )
    positions: Tensor = tools.create_initial_state(latent.device, latent.dtype).positions
    return positions


def audio_patches(inputs: Arguments, config: Config) -> Tensor:
    """Return the bounds of audio patches, (B, 1, Ta, 2), in seconds.

    ltx-core makes them always in float32.
    """
    latent = inputs["audio_hidden_states"]
    patchifier = AudioPatchifier(
        config["audio_patch_size"],
        sample_rate=config["audio_sampling_rate"],
        hop_length=config["audio_hop_length"],
        audio_latent_downsample_factor=config["audio_scale_factor"],
    )
    shape = AudioLatentShape(*latent.shape[::2], frames=inputs["audio_num_frames"], mel_bins=1)
    state = AudioLatentTools(patchifier, shape).create_initial_state(latent.device, latent.dtype)
    positions: Tensor = state.positions
    return positions


def _with_defaults(config: Config) -> dict[str, Any]:
    """Return a diffusers config, completed with the defaults of diffusers' class."""
    parameters = inspect.signature(LTX2VideoTransformer3DModel.__init__).parameters.values()
    full = {p.name: p.default for p in parameters if p.name != "self"} | without_private(config)
    for side in ("", "audio_"):
        full[f"{side}out_channels"] = full[f"{side}out_channels"] or full[f"{side}in_channels"]
    return full


def _check_ltx_core_config(config: Config) -> None:
    for ours, theirs in LTX_CORE_PAIRS.items():
        if config[ours] != config[theirs]:
            raise Unsupported(f"ltx-core has one flag for {ours}={config[ours]} and {theirs}={config[theirs]}")
    for key, value in LTX_CORE_CONSTANTS.items():
        if config[key] != value:
            raise Unsupported(f"ltx-core 1.0.0 runs releases 2.0 and 2.3: {key}={config[key]}, expected {value}")


def _ltx_core_arguments(config: Config) -> dict[str, Any]:
    return {key: config[key] for key in LTX_CORE_SAME_FIELDS} | {
        "attention_type": AttentionFunction.PYTORCH,
        "positional_embedding_theta": config["rope_theta"],
        "positional_embedding_max_pos": [config[k] for k in ("pos_embed_max_pos", "base_height", "base_width")],
        "audio_positional_embedding_max_pos": [config["audio_pos_embed_max_pos"]],
        "av_ca_timestep_scale_multiplier": config["cross_attn_timestep_scale_multiplier"],
        "rope_type": LTXRopeType(config["rope_type"]),
        "double_precision_rope": config["rope_double_precision"],
        "apply_gated_attention": config["gated_attn"],
        "cross_attention_adaln": config["cross_attn_mod"],
    }


def _caption_projections(config: Config) -> dict[str, nn.Module]:
    if not config["use_prompt_embeddings"]:
        return {}
    channels = config["caption_channels"]
    return {
        "caption_projection": PixArtAlphaTextProjection(channels, config["cross_attention_dim"]),
        "audio_caption_projection": PixArtAlphaTextProjection(channels, config["audio_cross_attention_dim"]),
    }


def _check_ltx_core_inputs(inputs: Arguments) -> None:
    sigma = inputs.get("sigma" if inputs["hidden_states"].shape[1] else "audio_sigma")
    if not inputs.get("use_cross_timestep") or sigma is None:
        raise Unsupported("ltx-core 1.0.0 computes use_cross_timestep=True only, and needs sigma")
    if (inputs.get("attention_kwargs") or {}).get("video_keyframes_mask") is not None:
        raise Unsupported("ltx-core 1.0.0 has no video_keyframes_mask")


def _modality(inputs: Arguments, config: Config, side: str, attention_mask: Tensor | None) -> Modality | None:
    """Return the input of one stream, or None if it is absent; `side` is the prefix of its arguments."""
    latent = inputs[f"{side}hidden_states"]
    if latent.shape[1] == 0:
        return None
    timestep, sigma = (_own(inputs, side, name) for name in ("timestep", "sigma"))
    multiplier = config["timestep_scale_multiplier"]
    return Modality(
        latent=latent,
        timesteps=_unscaled(timestep.reshape(len(latent), -1), multiplier),
        sigma=_unscaled(sigma.flatten(), multiplier),
        positions=_positions(inputs, config, side),
        context=inputs[f"{side}encoder_hidden_states"],
        context_mask=_text_mask(inputs.get(f"{side}encoder_attention_mask")),
        attention_mask=attention_mask,
    )


def _unscaled(timestep: Tensor, multiplier: float) -> Tensor:
    """Return the number that ltx-core's multiplication turns back into exactly `timestep`.

    It is float64 if there is no such number in the timestep's own dtype.
    """
    unscaled = timestep / multiplier
    return unscaled if torch.equal(unscaled * multiplier, timestep) else timestep.double() / multiplier


def _own(inputs: Arguments, side: str, name: str) -> Tensor:
    """Return the stream's own timestep or sigma; audio's default to video's."""
    own = inputs.get(side + name)
    value: Tensor = inputs[name] if own is None else own
    return value


def _positions(inputs: Arguments, config: Config, side: str) -> Tensor:
    coords: Tensor | None = inputs.get("audio_coords" if side else "video_coords")
    if coords is None:
        return audio_patches(inputs, config) if side else video_patches(inputs, config)
    is_middle = coords.ndim == 3  # (B, P, T); ltx-core takes bounds only, so both are the middle
    return torch.stack([coords, coords], -1) if is_middle else coords


def _text_mask(mask: Tensor | None) -> Tensor | None:
    """Return a text mask as ltx-core reads it the same way.

    A mask (B, S) of zeros and ones has to be integers, because ltx-core adds a floating-point mask to the logits. That
    is what a bias (B, 1|T, S) is for.
    """
    if mask is None or (mask.ndim == 3 and mask.is_floating_point()):
        return mask
    if mask.ndim != 2 or not ((mask == 0) | (mask == 1)).all():
        raise Unsupported(
            "ltx-core needs a text mask (B, S) of zeros and ones, or a bias (B, 1|T, S), "
            f"got {tuple(mask.shape)} {mask.dtype}"
        )
    return mask.long()


def _perturbations(inputs: Arguments) -> BatchedPerturbationConfig:
    """Return what each batch element skips.

    That is self-attention in the STG blocks where the mask is 0, and the exchange if modalities are isolated.
    """
    batch, blocks = len(inputs["hidden_states"]), inputs.get("spatio_temporal_guidance_blocks")
    mask = inputs.get("perturbation_mask")
    kept = [0.0] * batch if mask is None else [x.item() for x in mask.flatten()]
    if blocks and not set(kept) <= {0.0, 1.0}:
        raise Unsupported(f"ltx-core perturbs a batch element wholly or not at all: perturbation_mask {kept}")
    isolated = _skips(("A2V_CROSS_ATTN", "V2A_CROSS_ATTN"), None) if inputs.get("isolate_modalities") else []
    skipped = _skips(("VIDEO_SELF_ATTN", "AUDIO_SELF_ATTN"), blocks) if blocks else []
    return BatchedPerturbationConfig([PerturbationConfig(isolated + (skipped if k == 0 else [])) for k in kept])


def _skips(names: tuple[str, ...], blocks: list[int] | None) -> list[Perturbation]:
    return [Perturbation(PerturbationType[f"SKIP_{name}"], blocks) for name in names]


LAYOUT = LIGHTRICKS_LIKE


def taps(setup: Any) -> Taps:
    """Return all taps of one forward of ltx-core; `setup` is an `audit.Setup`.

    Version 1.0.0 conditions the exchange on the other stream's sigma, whatever `use_cross_timestep` says. Its model
    takes positions, which its pipelines make; here they are the reference's.
    """
    model = build_ltx_core(setup.config.to_diffusers(), setup.state, setup.dtype).to(setup.device)
    with torch.no_grad(), trace(model.model, LAYOUT) as found:
        outputs = run_ltx_core(model, {**setup.inputs, **setup.coords, "use_cross_timestep": True})
    return found | returned(outputs)
