"""Tiny configs, models and inputs that hide nothing, for the tests: all sizes differ, no parameter is 0."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ltx2ref import LTX_2_0, LTX_2_3, LTX_2_5, LTX2VideoTransformer3DModel, TransformerConfig

Inputs = dict[str, Any]

RELEASES = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}
# Heads, and the head_dims of both streams. No video width is divisible by 6, so that some planes are padding.
SIZES = {"2.0": (2, 26, 10), "2.3": (4, 14, 10), "2.5": (2, 26, 14)}


def tiny_config(release: str, **changes: Any) -> TransformerConfig:
    """Return a release with all of its flags, and sizes of our own; `changes` are config fields."""
    heads, head_dim, audio_head_dim = SIZES[release]
    sizes = {
        "in_channels": 17,
        "out_channels": 19,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "audio_in_channels": 18,
        "audio_out_channels": 23,
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": audio_head_dim,
        "audio_cross_attention_dim": heads * audio_head_dim,
        "num_layers": 2,
        "caption_channels": 29,
    }
    return replace(RELEASES[release], **sizes | changes)


def random_model(
    config: TransformerConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LTX2VideoTransformer3DModel:
    """Return a model with random weights; a seed is a model, in any dtype.

    Linear weights ~ 1/sqrt(fan-in), norm weights around 1, biases, gates and tables ~ 1/2: activations are O(1), where
    every row, bias and gate matters and the two GELUs differ.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(config)
    state = {}
    for name, parameter in model.named_parameters():
        x = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
        is_norm, is_weight = "norm_" in name, name.endswith(".weight")
        x = 1 + 0.3 * x if is_norm else x * parameter.shape[1] ** -0.5 if is_weight else 0.5 * x
        state[name] = x.to(dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


def random_inputs(
    config: TransformerConfig,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    batch: int = 2,
    grid: tuple[int, int, int] = (3, 5, 7),
    audio_frames: int = 11,
    text_tokens: tuple[int, int] = (6, 9),
    per_token: bool = False,
    text_masks: torch.dtype | None = None,
    coords: torch.dtype | None = None,
    stg: bool = False,
    self_mask: bool = False,
    keyframes: bool = False,
    **arguments: Any,
) -> Inputs:
    """Return the documented arguments, with timesteps and sigmas that all differ; `arguments` are added as they are.

    per_token    timesteps (B, T) of both streams, about a third of them exactly 0
    text_masks   (B, S) multiplicative, of that dtype: each row of another length, audio's padded on the left
    coords       random patch bounds of that dtype, other ones in each row, in place of the frame counts
    stg          the last block is perturbed in row 0, not in row 1, and by three quarters in row 2
    self_mask    values in [0, 1]: a fifth of them 0, the others so near 1 that the bias is moderate
    keyframes    a mask that is > 0 for about a third of the tokens
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    wide = torch.promote_types(dtype, torch.float32)

    def uniform(*shape: int, dtype: torch.dtype = wide) -> Tensor:  # in (0, 1)
        return (1e-3 + 0.998 * torch.rand(shape, generator=generator, dtype=torch.float64)).to(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs: Inputs = {"fps": 25.0}
    frames, height, width = grid
    video_tokens, streams = frames * height * width, {"": config.video, "audio_": config.audio}
    for prefix, tokens, text_length in zip(streams, (video_tokens, audio_frames), text_tokens, strict=True):
        stream = streams[prefix]
        text_dim = config.caption_channels if config.use_prompt_embeddings else stream.dim
        inputs[prefix + "hidden_states"] = normal(batch, tokens, stream.in_channels)
        inputs[prefix + "encoder_hidden_states"] = normal(batch, text_length, text_dim)
        noisy = uniform(batch, tokens) > 0.3 if per_token else torch.ones(batch)
        inputs[prefix + "timestep"] = uniform(*noisy.shape) * noisy * config.timestep_scale_multiplier
        inputs[prefix + "sigma"] = uniform(batch) * config.timestep_scale_multiplier
        if text_masks is not None:
            lengths = torch.arange(text_length, text_length - batch, -1)
            mask = torch.arange(text_length) < lengths[:, None]
            inputs[prefix + "encoder_attention_mask"] = (mask.flip(1) if prefix else mask).to(text_masks)
        if coords is not None:
            maxima = torch.tensor(stream.max_position, dtype=torch.float64)[:, None, None]
            bounds = uniform(batch, len(maxima), tokens, 2, dtype=torch.float64).cumsum(-1) / 2 * maxima
            inputs[(prefix or "video_") + "coords"] = bounds.to(coords)
    if coords is None:
        inputs |= {"num_frames": frames, "height": height, "width": width, "audio_num_frames": audio_frames}
    if stg:
        inputs["spatio_temporal_guidance_blocks"] = [config.num_layers - 1]
        inputs["perturbation_mask"] = torch.tensor([0.0, 1.0, 0.25][:batch])
    masks: Inputs = {}
    if self_mask:
        near_one = 1 - uniform(batch, video_tokens, video_tokens) / 2000
        masks["video_self_attention_mask"] = near_one * (uniform(*near_one.shape) > 0.2)
    if keyframes:
        masks["video_keyframes_mask"] = (uniform(batch, video_tokens, 1) - 0.7).clamp(min=0)
    return inputs | ({"attention_kwargs": masks} if masks else {}) | arguments


def without(stream: str, inputs: Inputs) -> Inputs:
    """Return the documented arguments with one stream left out, and nothing said of it: "video" or "audio"."""
    prefix = "audio_" if stream == "audio" else ""
    latent = inputs[prefix + "hidden_states"]
    grid = {name: 0 for name in ("audio_num_frames",) if prefix} or {"num_frames": 0, "height": None, "width": None}
    said = dict.fromkeys(("encoder_hidden_states", "timestep", "sigma", "encoder_attention_mask"))
    own = {prefix + name: x for name, x in said.items()} | {f"{prefix or 'video_'}coords": None}
    if not prefix:  # audio's default to video's
        own |= {f"audio_{name}": inputs.get(f"audio_{name}", inputs.get(name)) for name in ("timestep", "sigma")}
    return inputs | own | grid | {prefix + "hidden_states": latent[:, :0]}
