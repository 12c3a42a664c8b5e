"""Define the conformance cases: for each a configuration, and inputs that do not hide bugs.

Batch 2; frames, height and width odd and different; widths that RoPE has to pad; streams of different width and length;
unequal noise levels; no weight, table, gate or bias is zero. The first cases are the calls that a pipeline makes. The
last ones cover what the others leave unused; they were found by changing diffusers in ways that no case noticed
(tests/parity/test_cases.py).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config import LTX_2_0, LTX_2_3, LTX_2_5, TransformerConfig
from ..interface import DIFFUSERS, LTX_CORE_2026_03, Conventions
from ..rope import audio_positions, video_positions
from .generator import SEED, Scales, uniform

BATCH, TEXT_TOKENS, AUDIO_TOKENS = 2, 9, 11
CASE_GRID = (3, 5, 7)
LONG_CASE_GRID = (16, 1, 3)  # 121 pixel frames
SIZES: dict[str, Any] = {
    "in_channels": 6,
    "out_channels": 5,
    "num_attention_heads": 2,
    "attention_head_dim": 14,
    "cross_attention_dim": 28,
    "audio_in_channels": 7,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 10,
    "audio_cross_attention_dim": 20,
    "num_layers": 2,
    "caption_channels": 12,
}
SMALL_RELEASES = {"2.0": replace(LTX_2_0, **SIZES), "2.3": replace(LTX_2_3, **SIZES), "2.5": replace(LTX_2_5, **SIZES)}
Inputs = dict[str, Any]
OUTPUTS = ("sample", "audio_sample")


@dataclass(frozen=True)
class Case:
    """A configuration and the documented arguments of one forward.

    Tensors are float32, except where an argument has a dtype of its own.
    """

    release: str
    name: str
    change: dict[str, Any] = field(default_factory=dict)  # fields that replace the release's
    grid: tuple[int, int, int] = CASE_GRID
    extras: tuple[Callable[["Case", Inputs], Inputs], ...] = ()  # each returns arguments to add or replace
    conventions: Conventions = DIFFUSERS  # those of the implementation that is recorded
    batch: int = BATCH
    absent: tuple[str, ...] = ()  # arguments that are not passed
    scales: Scales = ()  # factors on the weights
    seed: int = SEED  # for the inputs
    native: bool = True  # recorded in native arithmetic, too
    alone: str | None = None  # "video" or "audio" leaves the other stream out
    config: TransformerConfig = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", replace(SMALL_RELEASES[self.release], **self.change))

    @property
    def id(self) -> str:
        """Return the name of the case with its release, such as "2.3/t2v"."""
        return f"{self.release}/{self.name}"

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the taps that a recording stores as tensors: an absent stream has none."""
        return OUTPUTS if self.alone is None else (OUTPUTS[self.alone == "audio"],)

    def about(self) -> dict[str, Any]:
        """Return what a recording holds of the case besides its inputs."""
        return {"config": self.config.to_diffusers(), "conventions": asdict(self.conventions)} | (
            {"scales": [list(x) for x in self.scales]} if self.scales else {}
        )

    @property
    def small(self) -> bool:
        """Return whether the model may be run many times over, which that of a checkpoint may not."""
        return True

    def draw(self, name: str, *shape: int) -> Tensor:
        """Return a generated tensor that depends on the case, the name and the seed."""
        return uniform(f"{self.id}/{name}", shape, seed=self.seed)

    def inputs(self) -> Inputs:
        """Return the arguments of the forward, made anew by each call."""
        video, audio, (frames, height, width) = self.config.video, self.config.audio, self.grid
        level = torch.tensor([731.25, 402.5, 64.5][: self.batch])
        audio_level = torch.tensor([518.75, 883.0, 240.25][: self.batch])
        base: Inputs = {
            "hidden_states": self.draw("hidden_states", self.batch, frames * height * width, video.in_channels),
            "audio_hidden_states": self.draw("audio_hidden_states", self.batch, AUDIO_TOKENS, audio.in_channels),
            "encoder_hidden_states": self.draw("encoder_hidden_states", self.batch, TEXT_TOKENS, video.text_dim),
            "audio_encoder_hidden_states": self.draw(
                "audio_encoder_hidden_states", self.batch, TEXT_TOKENS, audio.text_dim
            ),
            "timestep": level,
            "audio_timestep": audio_level,
            "sigma": level.clone(),
            "audio_sigma": audio_level.clone(),
            "num_frames": frames,
            "height": height,
            "width": width,
            "audio_num_frames": AUDIO_TOKENS,
            "fps": 25.0,
        }
        for extra in self.extras:
            base |= extra(self, base)
        base |= {"video": without_audio, "audio": without_video}[self.alone](base) if self.alone else {}
        return {name: x for name, x in base.items() if name not in self.absent}


def without_audio(x: Inputs) -> Inputs:
    """Leave the audio out: no tokens of it, and none of its text. Its noise levels stay, and are ignored."""
    empty = {name: x[name][:, :0] for name in ("audio_hidden_states", "audio_encoder_hidden_states")}
    return empty | {"audio_num_frames": 0, "audio_encoder_attention_mask": None, "audio_coords": None}


def without_video(x: Inputs) -> Inputs:
    """Leave the video out, likewise."""
    empty = {name: x[name][:, :0] for name in ("hidden_states", "encoder_hidden_states")}
    return empty | {"num_frames": 0, "encoder_attention_mask": None, "video_coords": None}


def per_token(case: Case, x: Inputs) -> Inputs:
    """Add noise levels per token, as for image to video: a different share of clean tokens in each row and stream."""
    tokens, audio_tokens = torch.arange(x["hidden_states"].shape[1]), torch.arange(AUDIO_TOKENS)
    first_frame = case.grid[1] * case.grid[2]
    video = torch.stack([(tokens >= first_frame).float(), (tokens % 4 != 0) * 0.5 + (tokens % 2) * 0.5])
    audio = torch.stack([(audio_tokens >= 2).float(), (audio_tokens % 3 != 1).float()])
    return {"timestep": video * x["sigma"][:, None], "audio_timestep": audio * x["audio_sigma"][:, None]}


def cross_timestep(case: Case, x: Inputs) -> Inputs:
    """Let the exchange follow the other stream's noise level."""
    return {"use_cross_timestep": True}


def text_masks(case: Case, x: Inputs) -> Inputs:
    """Add text masks of different length in each row; the audio's text is padded on the left."""
    tokens, lengths = torch.arange(TEXT_TOKENS), torch.tensor([[TEXT_TOKENS - 2], [4]])
    return {
        "encoder_attention_mask": (tokens < lengths).long(),
        "audio_encoder_attention_mask": (tokens >= TEXT_TOKENS - lengths.flip(0)).float(),
    }


def text_masks_3d(case: Case, x: Inputs) -> Inputs:
    """Add text masks of three dimensions: a floating one is a bias, a boolean one is True where it keeps."""
    bias = case.draw("bias", case.batch, x["hidden_states"].shape[1], TEXT_TOKENS)
    keep = case.draw("keep", case.batch, 1, TEXT_TOKENS) > -0.8
    return {"encoder_attention_mask": bias, "audio_encoder_attention_mask": keep}


def coords(case: Case, x: Inputs) -> Inputs:
    """Replace frame, row and column numbers by arbitrary coordinates that differ between rows."""
    start = (case.draw("video_coords", case.batch, 3, x["hidden_states"].shape[1], 1) + 2) / 4
    audio = (case.draw("audio_coords", case.batch, 1, AUDIO_TOKENS, 1) + 2) / 4 * 20
    start = start * torch.tensor([20.0, 1000.0, 2000.0])[:, None, None]
    size = torch.tensor([1 / 3, 32.0, 32.0])[:, None, None]
    return {
        "video_coords": torch.cat([start, start + size], -1),
        "audio_coords": torch.cat([audio, audio + 0.04], -1),
        "num_frames": None,
        "height": None,
        "width": None,
        "audio_num_frames": None,
    }


def isolated(case: Case, x: Inputs) -> Inputs:
    """Leave out the exchange."""
    return {"isolate_modalities": True}


def stg(case: Case, x: Inputs) -> Inputs:
    """Perturb self-attention in block 1, in all rows."""
    return {"spatio_temporal_guidance_blocks": [1]}


def stg_second(case: Case, x: Inputs) -> Inputs:
    """Perturb self-attention in block 0, in the second row only."""
    return {"spatio_temporal_guidance_blocks": [0], "perturbation_mask": torch.tensor([1.0, 0.0])}


def binary_self_mask(case: Case, x: Inputs) -> Inputs:
    """Add a self-attention mask of zeros and ones."""
    tokens = x["hidden_states"].shape[1]
    mask = case.draw("mask", case.batch, tokens, tokens) > -0.5
    return {"attention_kwargs": {"video_self_attention_mask": mask.float()}}


def fractional_self_mask(case: Case, x: Inputs) -> Inputs:
    """Add a self-attention mask close to 1, where the bias does more than switch tokens off."""
    tokens = x["hidden_states"].shape[1]
    mask = 1 - (case.draw("mask", case.batch, tokens, tokens) + 1.75).clamp(min=0) * 2**-12
    return {"attention_kwargs": {"video_self_attention_mask": mask}}


def soft_self_mask(case: Case, x: Inputs) -> Inputs:
    """Add a self-attention mask of values in [0, 1], a fifth of them 0."""
    tokens = x["hidden_states"].shape[1]
    mask = case.draw("mask", case.batch, tokens, tokens) * 0.5 + 0.5
    return {"attention_kwargs": {"video_self_attention_mask": mask.clamp(0, 1)}}


def empty_text_masks(case: Case, x: Inputs) -> Inputs:
    """Add text masks that leave no token in one row of each stream, as for a dropped prompt."""
    masks = text_masks(case, x)
    masks["encoder_attention_mask"][1] = 0
    masks["audio_encoder_attention_mask"][0] = 0
    return masks


def keyframes(case: Case, x: Inputs) -> Inputs:
    """Mark some video tokens as keyframes."""
    mask = case.draw("mask", case.batch, x["hidden_states"].shape[1], 1) > 0.5
    return {"attention_kwargs": {"video_keyframes_mask": mask.float()}}


def guided_rows(case: Case, x: Inputs) -> Inputs:
    """Call the model as a pipeline does with classifier-free guidance.

    Two rows differ only in their text. They have one noise level and one text mask for both streams. The pipeline has
    made coordinates beforehand, and passes the grid nevertheless.
    """
    sigma = x["sigma"][:1].expand(case.batch).clone()
    n = case.batch
    tokens, lengths = torch.arange(TEXT_TOKENS), torch.tensor([[3], [TEXT_TOKENS - 1]])
    mask = (tokens >= TEXT_TOKENS - lengths).long()  # padded on the left
    return {
        "hidden_states": x["hidden_states"][:1].repeat(n, 1, 1),
        "audio_hidden_states": x["audio_hidden_states"][:1].repeat(n, 1, 1),
        "timestep": sigma,
        "sigma": sigma.clone(),
        "fps": 24.0,
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask.clone(),
        "video_coords": video_positions(case.grid, 24.0, case.config).repeat(n, 1, 1, 1),
        "audio_coords": audio_positions(AUDIO_TOKENS, case.config).repeat(n, 1, 1, 1),
    }


def first_frame(case: Case, x: Inputs) -> Inputs:
    """Call the model as the image-to-video pipeline does.

    The first frame is clean, the audio has one noise level, and the text is padded with registers, so that its mask is
    all ones.
    """
    noisy = (torch.arange(x["hidden_states"].shape[1]) >= case.grid[1] * case.grid[2]).float()
    mask = torch.ones_like(x["encoder_attention_mask"])
    return {
        "timestep": x["sigma"][:, None] * noisy,
        "audio_timestep": x["sigma"].clone(),
        "encoder_attention_mask": mask,
        "audio_encoder_attention_mask": mask.clone(),
    }


def fps_23976(case: Case, x: Inputs) -> Inputs:
    """Use a frame rate that float32 cannot express."""
    return {"fps": 23.976}


def other_sigma(case: Case, x: Inputs) -> Inputs:
    """Replace sigmas by values that no token has, about a third below the highest timestep."""
    return {"sigma": x["sigma"] * 0.625, "audio_sigma": x["audio_sigma"] * 0.6875}


def video_mask(case: Case, x: Inputs) -> Inputs:
    """Add a mask for the video's text only."""
    return {"encoder_attention_mask": (torch.arange(TEXT_TOKENS) < 6).long().expand(case.batch, -1).clone()}


def audio_mask(case: Case, x: Inputs) -> Inputs:
    """Add a mask for the audio's text only, of different length in each row."""
    lengths = torch.tensor([[5], [8], [2]][: case.batch])
    return {"audio_encoder_attention_mask": (torch.arange(TEXT_TOKENS) < lengths).long()}


def stg_shares(case: Case, x: Inputs) -> Inputs:
    """Perturb self-attention in two blocks in part, by different shares in each row."""
    return {"spatio_temporal_guidance_blocks": [1, 0], "perturbation_mask": torch.tensor([[[0.75]], [[0.375]]])}


def low_self_mask(case: Case, x: Inputs) -> Inputs:
    """Add a self-attention mask of values in [0, 1], at most 3/4 in every other row.

    In these rows everything is masked in part, in each dtype.
    """
    mask = soft_self_mask(case, x)["attention_kwargs"]["video_self_attention_mask"]
    mask[:, 1::2] *= 0.75
    return {"attention_kwargs": {"video_self_attention_mask": mask}}


INTERLEAVED = {"rope_type": "interleaved"}
SAME_CHANNELS = {"out_channels": SIZES["in_channels"], "audio_out_channels": SIZES["audio_in_channels"]}
OTHER_RATES = {
    "audio_hop_length": 256,
    "audio_sampling_rate": 44100,
    "audio_scale_factor": 8,
    "vae_scale_factors": (4, 16, 24),
    "rope_theta": 5000.0,
}
# A residual stream, queries and keys of about 1e-3, so that the epsilon of each norm matters as much as its input.
SMALL_STREAM: Scales = (
    ("*proj_in.*", 2.0**-10),
    ("*.to_out.0.*", 2.0**-10),
    ("*ff.net.2.*", 2.0**-10),
    ("*.to_q.*", 2.0**-10),
    ("*.to_k.*", 2.0**-10),
)
LARGE_OUTPUTS: Scales = (("*proj_out.*", 8.0),)

PIPELINE_CASES = (
    *(
        Case(
            release,
            "pipeline-t2v",
            SAME_CHANNELS,
            extras=(guided_rows, *more),
            native=False,
            absent=("audio_timestep", "audio_sigma"),
        )
        for release, more in (("2.0", ()), ("2.3", (cross_timestep,)), ("2.5", (cross_timestep,)))
    ),
    *(
        Case(
            release,
            "pipeline-i2v",
            SAME_CHANNELS,
            extras=(guided_rows, first_frame, *more),
            native=False,
            absent=("audio_sigma",),
        )
        for release, more in (("2.0", ()), ("2.3", (cross_timestep,)), ("2.5", (cross_timestep,)))
    ),
)
MORE_CASES = tuple(
    replace(case, native=False)
    for case in (
        Case("2.0", "empty-text-rows", extras=(empty_text_masks,)),
        Case("2.0", "other-rates", OTHER_RATES, extras=(fps_23976,)),
        Case(
            "2.3",
            "defaults",
            extras=(other_sigma, video_mask),
            batch=1,
            absent=("audio_timestep", "audio_sigma", "fps"),
        ),
        Case("2.5", "batch-3", extras=(audio_mask,), batch=3),
        Case("2.3", "other-sigma", extras=(per_token, other_sigma, cross_timestep)),
        Case("2.3", "stg-shares", extras=(stg_shares,)),
        Case("2.3", "soft-self-mask", extras=(low_self_mask,)),
        Case("2.3", "gates-without-guidance", {"perturbed_attn": False}),
        Case("2.3", "small-stream-large-outputs", scales=SMALL_STREAM + LARGE_OUTPUTS),
    )
)
CASES = (
    *PIPELINE_CASES,
    Case("2.0", "t2v"),
    Case("2.0", "i2v", extras=(per_token,)),
    Case("2.0", "cross-timestep", extras=(cross_timestep,)),
    Case("2.0", "text-masks", extras=(text_masks,)),
    Case("2.0", "isolated", extras=(isolated,)),
    Case("2.0", "interleaved", INTERLEAVED),
    Case("2.0", "121-frames", grid=LONG_CASE_GRID),
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
    Case("2.3", "121-frames", grid=LONG_CASE_GRID),
    Case("2.3", "float32-frequencies", {"rope_double_precision": False}),
    Case("2.3", "multipliers", {"timestep_scale_multiplier": 500.0, "cross_attn_timestep_scale_multiplier": 350.0}),
    Case("2.3", "no-prompt-adaln", {"use_prompt_adaln_single": False}),
    Case("2.3", "one-stream-flags", {"audio_gated_attn": False, "cross_attn_mod": False}),
    Case("2.5", "t2v"),
    Case("2.5", "keyframes", extras=(per_token, keyframes)),
    Case(
        "2.5", "everything", INTERLEAVED, extras=(per_token, cross_timestep, text_masks, coords, stg_second, keyframes)
    ),
    *MORE_CASES,
)

# Each convention makes a difference in one of these, except for those that differ in rounding only, in float32.
LTX_CORE_CASES = tuple(
    replace(case, conventions=LTX_CORE_2026_03)
    for case in (
        Case("2.0", "ltx-core-t2v"),
        Case("2.0", "ltx-core-everything", extras=(per_token, empty_text_masks, soft_self_mask, stg_second)),
        Case("2.3", "ltx-core-i2v", extras=(per_token,)),
        Case("2.3", "ltx-core-interleaved", INTERLEAVED, extras=(text_masks, stg)),
        Case(
            "2.3",
            "ltx-core-everything",
            grid=LONG_CASE_GRID,
            extras=(per_token, empty_text_masks, soft_self_mask, stg_second),
        ),
    )
)
# diffusers cannot leave a stream out. Recorded is what it computes for the other one with isolated modalities.
ONE_STREAM_CASES = tuple(
    replace(case, native=False)
    for case in (
        Case("2.0", "video-alone", extras=(text_masks,), alone="video"),
        Case("2.0", "audio-alone", extras=(per_token, text_masks), alone="audio"),
        Case("2.3", "video-alone", extras=(per_token, cross_timestep, stg_second, binary_self_mask), alone="video"),
        Case("2.3", "audio-alone", extras=(cross_timestep, text_masks, stg), alone="audio"),
        Case("2.5", "video-alone", INTERLEAVED, extras=(per_token, keyframes, coords), alone="video"),
        Case("2.5", "audio-alone", extras=(per_token, coords), batch=2, alone="audio"),
    )
)
RECORDED = CASES + LTX_CORE_CASES + ONE_STREAM_CASES
