"""Audit DiffSynth's model, if it is installed: `pip install --no-deps diffsynth==2.1.12` is enough.

    ltx2ref audit tests/support/diffsynth_port.py:run --case 2.3/t2v

The file of the model is imported without the rest of the package, which needs much that an audit does not.
"""

import importlib
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ltx2ref import trace
from ltx2ref.checkpoint.names import to_lightricks
from ltx2ref.config import TransformerConfig
from ltx2ref.parity.trace.layouts import LIGHTRICKS_LIKE
from ltx2ref.rope import audio_positions, video_positions

MODEL = "diffsynth.models.ltx2_dit"
# DiffSynth has no argument for these.
REFUSED = ("encoder_attention_mask", "audio_encoder_attention_mask", "spatio_temporal_guidance_blocks")


def model_file() -> Any:
    """Return the module that has the model."""
    if MODEL in sys.modules:
        return sys.modules[MODEL]
    found = find_spec("diffsynth")
    assert found is not None and found.submodule_search_locations
    for name in ("diffsynth", "diffsynth.core", "diffsynth.models"):
        if name not in sys.modules:
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = [f"{x}/{name.partition('.')[2]}" for x in found.submodule_search_locations]
    gradient = importlib.import_module("diffsynth.core.gradient.gradient_checkpoint")
    sys.modules["diffsynth.core"].gradient_checkpoint_forward = gradient.gradient_checkpoint_forward  # type: ignore[attr-defined]
    return importlib.import_module(MODEL)


def run(
    config: dict[str, Any], state: dict[str, Tensor], inputs: dict[str, Any], dtype: torch.dtype
) -> Mapping[str, Any]:
    """Return the taps of DiffSynth's model."""
    c = TransformerConfig.from_diffusers(config)
    given = [name for name in REFUSED if inputs.get(name) is not None]
    kwargs = inputs.get("attention_kwargs") or {}
    if given or inputs.get("isolate_modalities") or "video_self_attention_mask" in kwargs:
        raise ValueError(f"DiffSynth has no argument for {', '.join(given) or 'this'}")
    port = model_file()
    with torch.device("meta"):
        model = port.LTXModel(**arguments(c, port))
    names = {to_lightricks(name): x for name, x in state.items()}
    model.load_state_dict(names, strict=True, assign=True)
    model.eval()
    batch = len(inputs["hidden_states"])

    def coords(name: str, own: Tensor) -> Tensor:
        x = inputs.get(name)
        return (own if x is None else x).expand(batch, *own.shape[1:]).to(torch.float32)

    def levels(name: str, tokens: int) -> Tensor:
        x = inputs.get(name)
        x = inputs["timestep"] if x is None else x
        return x.reshape(batch, -1)[..., None].expand(batch, tokens if x.ndim > 1 else 1, 1) / 1000

    grid = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
    video = (
        coords("video_coords", video_positions(grid, inputs.get("fps", 24.0), c)) if grid[0] else inputs["video_coords"]
    )
    frames = inputs.get("audio_num_frames")
    audio = coords("audio_coords", audio_positions(frames, c)) if frames else inputs["audio_coords"]
    with torch.no_grad(), trace(model, LIGHTRICKS_LIKE) as taps:
        sample, audio_sample = model(
            inputs["hidden_states"],
            video,
            inputs["encoder_hidden_states"],
            levels("timestep", inputs["hidden_states"].shape[1]),
            inputs["audio_hidden_states"],
            audio,
            inputs["audio_encoder_hidden_states"],
            levels("audio_timestep", inputs["audio_hidden_states"].shape[1]),
            inputs["sigma"].reshape(batch) / 1000,
            video_keyframes_mask=kwargs.get("video_keyframes_mask"),
        )
    return taps | {"sample": sample, "audio_sample": audio_sample, "video_coords": video, "audio_coords": audio}


def arguments(c: TransformerConfig, port: Any) -> dict[str, Any]:
    """Return DiffSynth's arguments for a config."""
    return {
        "num_attention_heads": c.num_attention_heads,
        "attention_head_dim": c.attention_head_dim,
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "num_layers": c.num_layers,
        "cross_attention_dim": c.cross_attention_dim,
        "caption_channels": c.caption_channels if c.use_prompt_embeddings else None,
        "audio_num_attention_heads": c.audio_num_attention_heads,
        "audio_attention_head_dim": c.audio_attention_head_dim,
        "audio_in_channels": c.audio_in_channels,
        "audio_out_channels": c.audio_out_channels,
        "audio_cross_attention_dim": c.audio_cross_attention_dim,
        "timestep_scale_multiplier": int(c.timestep_scale_multiplier),
        "av_ca_timestep_scale_multiplier": int(c.cross_attn_timestep_scale_multiplier),
        "rope_type": port.LTXRopeType(c.rope_type),
        "double_precision_rope": c.rope_double_precision,
        "apply_gated_attention": c.gated_attn,
        "cross_attention_adaln": c.cross_attn_mod,
        "use_prompt_adaln_single": c.use_prompt_adaln_single,
        "ff_bias": c.ff_bias,
        "audio_ff_bias": c.audio_ff_bias,
        "use_tokenwise_av_ca_scale_shift": c.use_keyframes_abs_pos_embedding,  # in 2.5
        "use_keyframes_abs_pos_embedding": c.use_keyframes_abs_pos_embedding,
    }
