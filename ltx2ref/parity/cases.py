"""The conformance cases: for each a configuration, and inputs that do not hide bugs.

Batch 2; frames, height and width odd and different; widths that RoPE has to pad; streams of different width and
length; unequal noise levels; no weight, table, gate or bias is zero.
"""
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config import LTX_2_0, LTX_2_3, LTX_2_5, TransformerConfig
from ..conventions import DIFFUSERS, LTX_CORE_2026_03, Conventions
from .generator import uniform

SEED = 20261122
BATCH, TEXT_TOKENS, AUDIO_TOKENS, GRID = 2, 9, 11, (3, 5, 7)
LONG_GRID = (16, 1, 3)  # 121 pixel frames
SIZES: dict[str, Any] = {
    "in_channels": 6, "out_channels": 5, "num_attention_heads": 2, "attention_head_dim": 14,
    "cross_attention_dim": 28, "audio_in_channels": 7, "audio_out_channels": 4, "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 10, "audio_cross_attention_dim": 20, "num_layers": 2, "caption_channels": 12,
}
RELEASES = {"2.0": replace(LTX_2_0, **SIZES), "2.3": replace(LTX_2_3, **SIZES), "2.5": replace(LTX_2_5, **SIZES)}
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A configuration and the documented arguments of one forward; tensors float32, or of their own dtype."""

    release: str
    name: str
    change: dict[str, Any] = field(default_factory=dict)  # of the release's configuration
    grid: tuple[int, int, int] = GRID
    extras: tuple[Callable[["Case", Inputs], Inputs], ...] = ()
    conventions: Conventions = DIFFUSERS  # of the implementation that is recorded

    @property
    def id(self) -> str:
        return f"{self.release}/{self.name}"

    @property
    def config(self) -> TransformerConfig:
        return replace(RELEASES[self.release], **self.change)

    def draw(self, name: str, *shape: int) -> Tensor:
        return uniform(f"{self.id}/{name}", shape, seed=SEED)

    def inputs(self) -> Inputs:
        video, audio, (frames, height, width) = self.config.video, self.config.audio, self.grid
        base: Inputs = {
            "hidden_states": self.draw("hidden_states", BATCH, frames * height * width, video.in_channels),
            "audio_hidden_states": self.draw("audio_hidden_states", BATCH, AUDIO_TOKENS, audio.in_channels),
            "encoder_hidden_states": self.draw("encoder_hidden_states", BATCH, TEXT_TOKENS, video.text_dim),
            "audio_encoder_hidden_states": self.draw(
                "audio_encoder_hidden_states", BATCH, TEXT_TOKENS, audio.text_dim),
            "timestep": torch.tensor([731.25, 402.5]),
            "audio_timestep": torch.tensor([518.75, 883.0]),
            "sigma": torch.tensor([731.25, 402.5]),
            "audio_sigma": torch.tensor([518.75, 883.0]),
            "num_frames": frames, "height": height, "width": width, "audio_num_frames": AUDIO_TOKENS, "fps": 25.0,
        }
        for extra in self.extras:
            base |= extra(self, base)
        return base


def per_token(case: Case, x: Inputs) -> Inputs:
    """Image to video: clean tokens at timestep zero, a different share in each row and stream."""
    tokens, audio_tokens = torch.arange(x["hidden_states"].shape[1]), torch.arange(AUDIO_TOKENS)
    first_frame = case.grid[1] * case.grid[2]
    video = torch.stack([(tokens >= first_frame).float(), (tokens % 4 != 0) * 0.5 + (tokens % 2) * 0.5])
    audio = torch.stack([(audio_tokens >= 2).float(), (audio_tokens % 3 != 1).float()])
    return {"timestep": video * x["sigma"][:, None], "audio_timestep": audio * x["audio_sigma"][:, None]}


def cross_timestep(case: Case, x: Inputs) -> Inputs:
    return {"use_cross_timestep": True}


def text_masks(case: Case, x: Inputs) -> Inputs:
    """Another length in each row; the audio's text is padded on the left."""
    tokens, lengths = torch.arange(TEXT_TOKENS), torch.tensor([[TEXT_TOKENS - 2], [4]])
    return {"encoder_attention_mask": (tokens < lengths).long(),
            "audio_encoder_attention_mask": (tokens >= TEXT_TOKENS - lengths.flip(0)).float()}


def text_masks_3d(case: Case, x: Inputs) -> Inputs:
    """A mask of three dimensions is a bias if floating, and True to keep if bool."""
    bias = case.draw("bias", BATCH, x["hidden_states"].shape[1], TEXT_TOKENS)
    keep = case.draw("keep", BATCH, 1, TEXT_TOKENS) > -0.8
    return {"encoder_attention_mask": bias, "audio_encoder_attention_mask": keep}


def coords(case: Case, x: Inputs) -> Inputs:
    """Any coordinates, other ones for each row, in place of frame, row and column numbers."""
    start = (case.draw("video_coords", BATCH, 3, x["hidden_states"].shape[1], 1) + 2) / 4
    audio = (case.draw("audio_coords", BATCH, 1, AUDIO_TOKENS, 1) + 2) / 4 * 20
    start = start * torch.tensor([20.0, 1000.0, 2000.0])[:, None, None]
    size = torch.tensor([1 / 3, 32.0, 32.0])[:, None, None]
    return {"video_coords": torch.cat([start, start + size], -1), "audio_coords": torch.cat([audio, audio + 0.04], -1),
            "num_frames": None, "height": None, "width": None, "audio_num_frames": None}


def isolated(case: Case, x: Inputs) -> Inputs:
    return {"isolate_modalities": True}


def stg(case: Case, x: Inputs) -> Inputs:
    return {"spatio_temporal_guidance_blocks": [1]}


def stg_second(case: Case, x: Inputs) -> Inputs:
    return {"spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.tensor([1.0, 0.0])}


def binary_self_mask(case: Case, x: Inputs) -> Inputs:
    tokens = x["hidden_states"].shape[1]
    mask = case.draw("mask", BATCH, tokens, tokens) > -0.5
    return {"attention_kwargs": {"video_self_attention_mask": mask.float()}}


def fractional_self_mask(case: Case, x: Inputs) -> Inputs:
    """Near 1, where the bias does not just switch a token off."""
    tokens = x["hidden_states"].shape[1]
    mask = 1 - (case.draw("mask", BATCH, tokens, tokens) + 1.75).clamp(min=0) * 2**-12
    return {"attention_kwargs": {"video_self_attention_mask": mask}}


def soft_self_mask(case: Case, x: Inputs) -> Inputs:
    """All of [0, 1], and a fifth of it 0."""
    tokens = x["hidden_states"].shape[1]
    mask = case.draw("mask", BATCH, tokens, tokens) * 0.5 + 0.5
    return {"attention_kwargs": {"video_self_attention_mask": mask.clamp(0, 1)}}


def empty_text_masks(case: Case, x: Inputs) -> Inputs:
    """In one row of each stream no token is left, as in a prompt that was dropped."""
    masks = text_masks(case, x)
    masks["encoder_attention_mask"][1] = 0
    masks["audio_encoder_attention_mask"][0] = 0
    return masks


def keyframes(case: Case, x: Inputs) -> Inputs:
    mask = case.draw("mask", BATCH, x["hidden_states"].shape[1], 1) > 0.5
    return {"attention_kwargs": {"video_keyframes_mask": mask.float()}}


INTERLEAVED = {"rope_type": "interleaved"}
CASES = (
    Case("2.0", "t2v"),
    Case("2.0", "i2v", extras=(per_token,)),
    Case("2.0", "cross-timestep", extras=(cross_timestep,)),
    Case("2.0", "text-masks", extras=(text_masks,)),
    Case("2.0", "isolated", extras=(isolated,)),
    Case("2.0", "interleaved", INTERLEAVED),
    Case("2.0", "121-frames", grid=LONG_GRID),
    Case("2.0", "float32-frequencies", {"rope_double_precision": False}),
    Case("2.3", "t2v"),
    Case("2.3", "i2v", extras=(per_token,)),
    Case("2.3", "cross-timestep", extras=(cross_timestep,)),
    Case("2.3", "i2v-cross-timestep", extras=(per_token, cross_timestep)),
    Case("2.3", "text-masks", extras=(text_masks,)),
    Case("2.3", "text-masks-3d", extras=(text_masks_3d,)),
    Case("2.3", "coords", extras=(coords,)),
    Case("2.3", "isolated", extras=(isolated,)),
    Case("2.3", "stg", extras=(stg,)),
    Case("2.3", "stg-one-of-batch", extras=(stg_second,)),
    Case("2.3", "self-mask", extras=(binary_self_mask,)),
    Case("2.3", "fractional-self-mask", extras=(fractional_self_mask,)),
    Case("2.3", "interleaved", INTERLEAVED),
    Case("2.3", "121-frames", grid=LONG_GRID),
    Case("2.3", "float32-frequencies", {"rope_double_precision": False}),
    Case("2.3", "multipliers", {"timestep_scale_multiplier": 500.0, "cross_attn_timestep_scale_multiplier": 350.0}),
    Case("2.3", "no-prompt-adaln", {"use_prompt_adaln_single": False}),
    Case("2.3", "one-stream-flags", {"audio_gated_attn": False, "cross_attn_mod": False}),
    Case("2.5", "t2v"),
    Case("2.5", "keyframes", extras=(per_token, keyframes)),
    Case("2.5", "everything", INTERLEAVED, extras=(
        per_token, cross_timestep, text_masks, coords, stg_second, keyframes)),
)

LTX_CORE_CASES = tuple(  # each convention shows in one of them, except in float32 what only rounds
    replace(case, conventions=LTX_CORE_2026_03) for case in (
        Case("2.0", "ltx-core-t2v"),
        Case("2.0", "ltx-core-everything", extras=(per_token, empty_text_masks, soft_self_mask, stg_second)),
        Case("2.3", "ltx-core-i2v", extras=(per_token,)),
        Case("2.3", "ltx-core-interleaved", INTERLEAVED, extras=(text_masks, stg)),
        Case("2.3", "ltx-core-everything", grid=LONG_GRID, extras=(
            per_token, empty_text_masks, soft_self_mask, stg_second)),
    ))
RECORDED = CASES + LTX_CORE_CASES
