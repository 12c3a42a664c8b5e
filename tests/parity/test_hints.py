"""Each hint names its bug, a table says which others may appear, and only rounding is called rounding.

pytest tests/parity/test_hints.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import mutants
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig, rope
from ltx2ref.embeddings import sinusoid
from ltx2ref.interface import text_attention_mask
from ltx2ref.modulation import modulate, rms_norm
from ltx2ref.parity import verify
from ltx2ref.parity.cases import CASES, Inputs
from ltx2ref.parity.explain.evidence import Evidence, named
from ltx2ref.parity.explain.hints import HINTS
from ltx2ref.parity.record import NATIVE_DTYPES
from ltx2ref.parity.trace.taps import Taps
from ltx2ref.parity.truth import truth
from ltx2ref.rope import apply_rope, audio_positions, frequencies, rotation, video_positions

BY_ID = {case.id: case for case in CASES}
BLOCK = "transformer_blocks.0."


@dataclass(frozen=True)
class Run:
    """One case of the conformance suite as the reference computes it."""

    model: LTX2VideoTransformer3DModel
    inputs: Inputs
    taps: Taps
    truth: Taps

    @property
    def config(self) -> TransformerConfig:
        return self.model.config

    def block(self, name: str) -> Tensor:
        return self.taps[BLOCK + name]

    def weight(self, name: str) -> Tensor:
        return self.model.state_dict()[name]

    def evidence(self, name: str, candidate: Tensor, taps: Taps | None = None, with_truth: bool = False) -> Evidence:
        before, theirs = list(self.taps)[: list(self.taps).index(name)], taps or self.taps
        return Evidence(
            name,
            self.taps[name],
            candidate,
            self.truth[name] if with_truth else None,
            self.taps,
            {k: theirs[k] for k in before if k in theirs},
            self.config,
            self.inputs,
            self.model,
        )


def looks_like(e: Evidence) -> dict[str, str]:
    """Return what all hints say, by their names."""
    return named(e, HINTS)


@cache
def run(case_id: str, dtype: str) -> Run:
    case = BY_ID[case_id]
    model, inputs = verify.build(case.config, NATIVE_DTYPES[dtype]), verify.cast(case.inputs(), NATIVE_DTYPES[dtype])
    taps = verify.run(model, inputs)
    return Run(model, inputs, taps, truth(model, inputs, taps))


def noise(x: Tensor, size: float) -> Tensor:
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x.double() + size * x.double().std() * drawn).to(x.dtype)


# The matrix. Real bugs, injected into the model: (mutant, case, first divergent tap, hints, text of the first hint).
INJECTED = [
    (
        "gate-multiplier-1",
        "2.3/t2v",
        "av_cross_attn_video_a2v_gate.sinusoid",
        "wrong_level",
        "timestep (= sigma) * 0.001 in place of timestep (= sigma)",
    ),
    (
        "unscaled-gate-timestep",
        "2.3/t2v",
        "av_cross_attn_video_a2v_gate.sinusoid",
        "wrong_level",
        "timestep (= sigma) * 0.001 in place of timestep (= sigma)",
    ),
    (
        "gate-multiplier-1",
        "2.3/multipliers",
        "av_cross_attn_video_a2v_gate.sinusoid",
        "wrong_level",
        "timestep (= sigma) * 0.00285714 in place of",
    ),
    (
        "swapped-modality-sigma",
        "2.3/t2v",
        "av_cross_attn_video_scale_shift.sinusoid",
        "wrong_level another_tap",
        "audio_timestep (= audio_sigma) in place of timestep (= sigma)",
    ),
    (
        "swapped-modality-sigma",
        "2.3/i2v",
        "av_cross_attn_video_scale_shift.sinusoid",
        "wrong_level collapsed_tokens",
        "audio_sigma in place of timestep",
    ),
    (
        "swapped-modality-sigma",
        "2.3/cross-timestep",
        "av_cross_attn_video_scale_shift.sinusoid",
        "wrong_level another_tap",
        "timestep (= sigma) in place of audio_timestep (= audio_sigma)",
    ),
    (
        "sigma-ignored",
        "2.5/everything",
        "prompt_adaln.sinusoid",
        "wrong_level only_one_batch_element",
        "timestep of the last token in place of sigma",
    ),
    (
        "per-token-timestep-averaged",
        "2.3/i2v",
        "time_embed.sinusoid",
        "wrong_level collapsed_tokens",
        "mean of timestep in place of timestep",
    ),
    (
        "rope-float32-frequencies",
        "2.3/t2v",
        "rope.cos",
        "wrong_frequencies float32_angles",
        "frequencies computed in float32",
    ),
    (
        "rope-float32-frequencies",
        "2.3/coords",
        "rope.cos",
        "wrong_frequencies float32_angles",
        "frequencies computed in float32",
    ),
    ("rope-bf16-positions", "2.3/t2v", "rope.cos", "wrong_positions only_one_axis", "positions rounded to bfloat16"),
    (
        "rope-bf16-positions",
        "2.3/121-frames",
        "rope.cos",
        "wrong_positions only_one_axis",
        "positions rounded to bfloat16",
    ),
    ("rope-bf16-positions", "2.3/coords", "rope.cos", "wrong_positions", "positions rounded to bfloat16"),
    ("rope-axis-major", "2.3/t2v", "rope.cos", "axis_major", "axis-major, (p f), in place of frequency-major"),
    ("rope-axis-major", "2.3/coords", "rope.cos", "axis_major", "axis-major, (p f), in place of frequency-major"),
    ("rope-patch-start", "2.3/t2v", "rope.cos", "wrong_positions", "the start of each patch"),
    ("rope-patch-start", "2.3/coords", "rope.cos", "wrong_positions", "the start of each patch"),
    ("rope-right-padding", "2.3/t2v", "rope.cos", "padding_side", "the 2 planes without rotation at the end"),
    ("rope-right-padding", "2.3/coords", "rope.cos", "padding_side", "the 2 planes without rotation at the end"),
    ("rope-shared-heads", "2.3/t2v", "rope.cos", "shared_heads", "all heads being the same"),
    ("rope-shared-heads", "2.3/coords", "rope.cos", "shared_heads", "all heads being the same"),
    ("fps-dropped", "2.3/t2v", "rope.cos", "wrong_positions only_one_axis", "24 frames per second in place of 25"),
    (
        "fps-dropped-from-exchange",
        "2.3/t2v",
        "cross_attn_rope.cos",
        "wrong_positions",
        "24 frames per second in place of 25",
    ),
    ("mask-as-bool", "2.3/text-masks", BLOCK + "attn2.sdpa", "wrong_attention", "added to the logits"),
    ("mask-as-bool", "2.5/everything", BLOCK + "attn2.sdpa", "wrong_attention", "added to the logits"),
    ("mask-ignored", "2.3/text-masks", BLOCK + "attn2.sdpa", "wrong_attention", "a mask that is ignored"),
    (
        "stg-wrong-block",
        "2.3/stg",
        BLOCK + "attn1.to_out",
        "wrong_projection",
        "values with the gate in place of attention with the gate",
    ),
    (
        "stg-without-gate",
        "2.3/stg",
        "transformer_blocks.1.attn1.to_out",
        "wrong_projection",
        "values without the gate in place of values with the gate",
    ),
    (
        "stg-without-gate",
        "2.3/stg-one-of-batch",
        BLOCK + "attn1.to_out",
        "wrong_projection",
        "blended values without the gate",
    ),
    (
        "keyframes-unapplied",
        "2.5/keyframes",
        BLOCK + "attn1.stream",
        "only_some_tokens another_tap",
        "the tokens of keyframes alone, of one vector of norm",
    ),
    ("ff-bias-dropped", "2.3/t2v", BLOCK + "audio_ff.proj", "constant_vector", "a vector of norm 1.31"),
    ("gelu-erf", "2.3/t2v", BLOCK + "ff.activation", "other_activation", "the exact GELU (erf)"),
    ("qk-norm-per-head", "2.3/t2v", BLOCK + "attn1.norm_q", "factor_per_head", "an RMSNorm over each head"),
    (
        "scale-shift-swapped",
        "2.3/t2v",
        BLOCK + "audio_to_video_attn.input",
        "wrong_rows",
        "scale and shift swapped: scale, shift = audio_to_video_attn.rows[1, 0]",
    ),
    (
        "a2v-v2a-swapped",
        "2.3/t2v",
        BLOCK + "audio_to_video_attn.input",
        "wrong_rows another_tap",
        "scale, shift = video_to_audio_attn.context_rows[0, 1]",
    ),
    (
        "sequential-exchange",
        "2.3/t2v",
        BLOCK + "video_to_audio_attn.context",
        "sequential_exchange",
        "the other stream after the exchange",
    ),
]

# The others are changes that a mistake makes to one tap: (bug, case, tap, change, hints, text of the first hint).
Change = Callable[[Run, Tensor], Tensor]
TO_OUT, Q, V, SDPA = (BLOCK + "attn1." + part for part in ("to_out", "q", "to_v", "sdpa"))


def at(x: Tensor, where: Tensor, y: Tensor) -> Tensor:
    return torch.where(where.reshape(*where.shape, *[1] * (x.ndim - where.ndim)), y, x)


def times(factor: float) -> Change:
    return lambda run, x: x * factor


def level(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda run, x: sinusoid(change(run.inputs[name].reshape(2, -1)), torch.float32).to(x.dtype).reshape(x.shape)


def table(change: Callable[[Run, Tensor], Tensor], **config: Any) -> Change:
    """Return a change of the video's RoPE table to one from other coordinates or another config."""

    def made(run: Run, x: Tensor) -> Tensor:
        video, changed = run.config.video, replace(run.config, **config)
        return rotation(change(run, run.taps["video_coords"]), video, changed, x.dtype)[0]

    return made


def in_time(change: Callable[[Run, Tensor], Tensor]) -> Callable[[Run, Tensor], Tensor]:
    return lambda run, x: torch.cat([change(run, x[:, :1]), x[:, 1:]], 1)


def grid(**config: Any) -> Callable[[Run, Tensor], Tensor]:
    """Return the coordinates of video under another config."""

    def made(run: Run, x: Tensor) -> Tensor:
        fps = config.get("fps", 25.0)
        changed = replace(run.config, **{k: v for k, v in config.items() if k != "fps"})
        return video_positions((3, 5, 7), fps, changed, x.dtype).expand_as(x)

    return made


def narrow_rotation(run: Run, x: Tensor) -> Tensor:
    """Rotate as ltx-core does, in the model's dtype. Here that is bfloat16 even in a float32 model."""
    (a, b), (cos, sin) = (
        run.block("attn1.norm_q").bfloat16().unflatten(-1, x.shape[2:]).chunk(2, -1),
        (run.taps[f"rope.{part}"].bfloat16() for part in ("cos", "sin")),
    )
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1).to(x.dtype)


def interleaved_rotation(run: Run, x: Tensor) -> Tensor:
    q, cos, sin = (
        run.block("attn1.norm_q").float().unflatten(-1, x.shape[2:]),
        *(run.taps[f"rope.{part}"] for part in ("cos", "sin")),
    )
    a, b = q[..., ::2], q[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


def attention(run: Run, x: Tensor, scale: float | None = None) -> Tensor:
    q, k = run.block("attn1.q").transpose(1, 2), run.block("attn1.k").transpose(1, 2)
    v = run.block("attn1.to_v").unflatten(-1, x.shape[2:]).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def unscaled_weight(run: Run, x: Tensor) -> Tensor:
    bias = run.weight(BLOCK + "ff.net.0.proj.bias")
    return ((x.double() - bias) * 770 + bias).to(x.dtype)


def narrow_norm(run: Run, x: Tensor) -> Tensor:
    y = run.taps["transformer_blocks.1.video"].bfloat16()
    y = y - y.mean(-1, keepdim=True)
    return (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


CHANGED: list[tuple[str, str, str, Change, str, str]] = [
    # noise levels
    (
        "scaled twice",
        "2.3/t2v",
        "time_embed.sinusoid",
        level("timestep", lambda x: x * 1000),
        "wrong_level",
        "timestep (= sigma) * 1000 in place of",
    ),
    (
        "rounded timestep",
        "2.3/t2v",
        "time_embed.sinusoid",
        level("timestep", Tensor.bfloat16),
        "wrong_level",
        "timestep (= sigma) rounded to bfloat16 in place of",
    ),
    (
        "integer timestep",
        "2.3/t2v",
        "audio_time_embed.sinusoid",
        level("audio_timestep", Tensor.floor),
        "wrong_level only_one_batch_element",
        "audio_timestep (= audio_sigma) truncated to an integer in place of",
    ),
    (
        "sines first",
        "2.3/t2v",
        "time_embed.sinusoid",
        lambda run, x: x.roll(128, -1),
        "other_sinusoid",
        "sines before cosines",
    ),
    (
        "first token's timestep",
        "2.3/i2v",
        "audio_time_embed.sinusoid",
        level("audio_timestep", lambda x: x[:, :1].expand_as(x)),
        "wrong_level collapsed_tokens",
        "audio_timestep of the first token in place of audio_timestep",
    ),
    # positions and tables
    (
        "half positions",
        "2.3/121-frames",
        "rope.cos",
        table(lambda run, x: x.half()),
        "wrong_positions only_one_axis",
        "positions rounded to float16",
    ),
    ("patch end", "2.3/t2v", "rope.cos", table(lambda run, x: x[..., 1]), "wrong_positions", "the end of each patch"),
    (
        "height and width",
        "2.3/t2v",
        "rope.cos",
        table(lambda run, x: x[:, [0, 2, 1]]),
        "wrong_positions reordered_planes",
        "height and width swapped",
    ),
    (
        "frames, not seconds",
        "2.3/t2v",
        "rope.cos",
        table(in_time(lambda run, x: x * 25)),
        "wrong_positions only_one_axis",
        "time in frames in place of seconds",
    ),
    (
        "max-pos-frames",
        "2.3/t2v",
        "rope.cos",
        table(in_time(lambda run, x: x * 25 / 8)),
        "wrong_positions only_one_axis",
        "a largest position of 20 latent frames",
    ),
    (
        "latent frames",
        "2.3/t2v",
        "rope.cos",
        table(grid(fps=1.0, vae_scale_factors=(1, 32, 32))),
        "wrong_positions only_one_axis",
        "time in latent frames",
    ),
    (
        "no causal offset",
        "2.3/t2v",
        "rope.cos",
        table(grid(causal_offset=0)),
        "wrong_positions only_one_axis",
        "no causal offset",
    ),
    (
        "no causal frame",
        "2.3/t2v",
        "video_coords",
        grid(causal_offset=8),
        "wrong_positions only_one_axis",
        "a first latent frame as long as all others",
    ),
    (
        "24 fps",
        "2.3/t2v",
        "video_coords",
        in_time(lambda run, x: x * 25 / 24),
        "wrong_positions only_one_axis",
        "24 frames per second",
    ),
    (
        "audio without offset",
        "2.3/t2v",
        "audio_coords",
        lambda run, x: audio_positions(11, replace(run.config, causal_offset=0), x.dtype).expand_as(x),
        "wrong_positions",
        "no causal offset",
    ),
    (
        "[0, 1]",
        "2.3/t2v",
        "rope.cos",
        table(lambda run, x: (x.mean(-1) + torch.tensor([[20.0], [2048], [2048]])) / 2),
        "wrong_frequencies",
        "positions from 0 to 1",
    ),
    (
        "without pi / 2",
        "2.3/t2v",
        "rope.cos",
        table(
            lambda run, x: (
                ((x.mean(-1) * 2 / torch.tensor([[20.0], [2048], [2048]]) - 1) * 2 / torch.pi + 1)
                * torch.tensor([[10.0], [1024], [1024]])
            )
        ),
        "wrong_frequencies",
        "without the factor pi / 2",
    ),
    # stages
    (
        "ff rows",
        "2.3/t2v",
        BLOCK + "ff.input",
        lambda run, x: modulate(
            rms_norm(run.block("ff.stream")), *(run.block("attn2.rows")[:, None, i] for i in (0, 1))
        ),
        "wrong_rows",
        "scale, shift = attn2.rows[1, 0] in place of scale, shift = ff.rows[1, 0]",
    ),
    (
        "scale without one",
        "2.3/t2v",
        BLOCK + "ff.input",
        lambda run, x: (
            rms_norm(run.block("ff.stream")) * run.block("ff.rows")[:, None, 1] + run.block("ff.rows")[:, None, 0]
        ),
        "wrong_rows",
        "x * scale, not x * (1 + scale)",
    ),
    (
        "ungated residual",
        "2.3/t2v",
        BLOCK + "attn2.stream",
        lambda run, x: run.block("attn1.stream") + run.block("attn1.to_out"),
        "wrong_residual",
        "a residual without a gate in place of gate = attn1.rows[2]",
    ),
    (
        "no residual",
        "2.3/t2v",
        BLOCK + "video",
        lambda run, x: run.block("ff.rows")[:, None, 2] * run.block("ff.output"),
        "wrong_residual",
        "no residual, and gate = ff.rows[2] in place of gate = ff.rows[2]",
    ),
    (
        "rotation layout",
        "2.3/t2v",
        Q,
        interleaved_rotation,
        "wrong_rotation",
        "the interleaved rotation in place of the split rotation",
    ),
    (
        "narrow rotation",
        "2.3/t2v",
        Q,
        narrow_rotation,
        "wrong_rotation narrow_numbers|float32 rounding_noise",
        "the split rotation, computed in bfloat16,",
    ),
    ("unscaled logits", "2.3/t2v", SDPA, lambda run, x: attention(run, x, 1.0), "wrong_attention", "not scaled"),
    ("self mask ignored", "2.3/self-mask", SDPA, attention, "wrong_attention", "a mask that is ignored"),
    (
        "rotation backwards",
        "2.3/interleaved",
        Q,
        lambda run, x: apply_rope(  # sin(-a) = -sin(a)
            run.block("attn1.norm_q").unflatten(-1, x.shape[2:]),
            (run.taps["rope.cos"], -run.taps["rope.sin"]),
            "interleaved",
        ),
        "wrong_rotation",
        "the interleaved rotation the other way in place of the interleaved rotation",
    ),
    (
        "joined heads",
        "2.3/t2v",
        TO_OUT,
        lambda run, x: F.linear(
            rearrange(run.block("attn1.sdpa") * run.block("attn1.gate")[..., None], "b t h d -> b t (d h)"),
            run.weight(TO_OUT + ".0.weight"),
            run.weight(TO_OUT + ".0.bias"),
        ),
        "wrong_projection",
        "heads joined as (d h)",
    ),
    (
        "half a gate",
        "2.3/t2v",
        TO_OUT,
        lambda run, x: F.linear(
            (run.block("attn1.sdpa") * run.block("attn1.gate")[..., None] / 2).flatten(2),
            run.weight(TO_OUT + ".0.weight"),
            run.weight(TO_OUT + ".0.bias"),
        ),
        "wrong_projection scaled_weight",
        "attention with half the gate in place of attention with the gate",
    ),
    (
        "output-norm-bf16",
        "2.3/t2v",
        "norm_out",
        narrow_norm,
        "wrong_norm narrow_numbers|float32 rounding_noise",
        "LayerNorm computed in bfloat16",
    ),
    # order
    (
        "permuted rows",
        "2.3/t2v",
        BLOCK + "attn1.rows",
        lambda run, x: x[:, [1, 0, 2]],
        "swapped_rows",
        "at 0, 1 what the reference has at 1, 0",
    ),
    (
        "permuted offsets",
        "2.3/i2v",
        "time_embed.linear",
        lambda run, x: x.unflatten(-1, (9, -1)).roll(3, 1).flatten(1),
        "swapped_rows",
        "at 0, 1, 2, 3 what the reference has at 6, 7, 8, 0",
    ),
    ("permuted heads", "2.3/t2v", Q, lambda run, x: x.flip(2), "permuted_heads", "at 0, 1 what the reference has at 1"),
    ("permuted values", "2.3/t2v", V, lambda run, x: x.roll(14, -1), "permuted_heads", "at 0, 1"),
    ("permuted table", "2.3/coords", "rope.cos", lambda run, x: x.flip(2), "permuted_heads", "at 0, 1"),
    (
        "pairs",
        "2.3/t2v",
        BLOCK + "attn1.norm_q",
        lambda run, x: rearrange(x, "b t (h z r) -> b t (h r z)", h=2, z=2),
        "swapped_halves",
        "neighbouring pairs in place of halves",
    ),
    ("halves", "2.3/t2v", Q, lambda run, x: x.roll(7, -1), "swapped_halves", "both halves of each head swapped"),
    (
        "dealt heads",
        "2.3/t2v",
        SDPA,
        lambda run, x: rearrange(x, "b t h d -> b t (d h)").reshape(x.shape),
        "swapped_halves",
        "components dealt out to heads in turn",
    ),
    (
        "reversed planes",
        "2.3/coords",
        "rope.cos",
        lambda run, x: x.flatten(2).flip(2).reshape(x.shape),
        "reordered_planes",
        "frequencies in another order",
    ),
    ("shifted", "2.3/t2v", "proj_in", lambda run, x: torch.cat([x[:, :1], x[:, :-1]], 1), "shifted_token", "earlier"),
    (
        "shifted table",
        "2.3/coords",
        "rope.cos",
        lambda run, x: torch.cat([x[:, 1:], x[:, -1:]], 1),
        "shifted_token",
        "later",
    ),
    ("rolled", "2.3/t2v", "proj_in", lambda run, x: x.roll(1, 1), "shifted_token reordered_tokens", "earlier"),
    (
        "column-major",
        "2.3/t2v",
        "proj_in",
        lambda run, x: rearrange(x, "b (f h w) c -> b (f w h) c", f=3, h=5),
        "reordered_tokens",
        "tokens in another order, at 1, 2, 3, 4 what the reference has at 7, 14, 21, 28",
    ),
    (
        "not rotated",
        "2.3/t2v",
        Q,
        lambda run, x: run.block("attn1.norm_q").unflatten(-1, x.shape[2:]),
        "another_tap",
        "the reference's transformer_blocks.0.attn1.norm_q",
    ),
    # numbers
    ("a thousand", "2.3/t2v", TO_OUT, times(1000), "constant_factor", "a constant factor of 1000: a scale applied"),
    ("a thousandth", "2.3/t2v", TO_OUT, times(1e-3), "constant_factor", "a constant factor of 0.001"),
    ("sign", "2.3/t2v", BLOCK + "ff.output", times(-1), "constant_factor", "a constant factor of -1: another sign"),
    ("head_dim", "2.3/t2v", Q, times(14**0.5), "constant_factor", "sqrt(head_dim) of 14"),
    (
        "1 / head_dim",
        "2.3/t2v",
        BLOCK + "audio_attn1.q",
        times(10**-0.5),
        "constant_factor",
        "1 / sqrt(head_dim) of 10",
    ),
    (
        "doubled",
        "2.3/t2v",
        BLOCK + "attn1.gate",
        times(2),
        "constant_factor",
        "a constant factor of 2: the 2 of a gate",
    ),
    (
        "halved",
        "2.3/t2v",
        BLOCK + "attn1.gate",
        times(0.5),
        "constant_factor",
        "a constant factor of 0.5: the 2 of a gate",
    ),
    ("another factor", "2.3/t2v", "proj_in", times(1.75), "constant_factor", "a constant factor of 1.75"),
    ("zeros", "2.3/t2v", "prompt_adaln.emb", times(0), "constant_factor", "a constant factor of 0: never computed"),
    (
        "fp8-scale-ignored",
        "2.3/t2v",
        BLOCK + "ff.proj",
        unscaled_weight,
        "scaled_weight",
        "a constant factor of 770 for everything but the bias",
    ),
    (
        "table unapplied",
        "2.3/i2v",
        BLOCK + "attn1.rows",
        lambda run, x: x - run.weight(BLOCK + "scale_shift_table")[:3],
        "constant_vector",
        "a bias, table or embedding",
    ),
    (
        "norm weight unapplied",
        "2.3/t2v",
        BLOCK + "attn1.norm_q",
        lambda run, x: x / run.weight(BLOCK + "attn1.norm_q.weight"),
        "factor_per_channel",
        "a norm's weight",
    ),
    (
        "gated queries",
        "2.3/t2v",
        Q,
        lambda run, x: x * run.block("attn1.gate")[..., None],
        "factor_per_head",
        "a gate or norm of its own",
    ),
    (
        "overflow",
        "2.3/t2v",
        SDPA,
        lambda run, x: at(x, torch.arange(105)[None] == 3, torch.tensor(torch.nan)),
        "not_finite",
        "56 of 5880 numbers that are not finite, the first at (0, 3, 0, 0)",
    ),
    # places
    (
        "masked text",
        "2.0/text-masks",
        "caption_projection",
        lambda run, x: at(x, run.inputs["encoder_attention_mask"] == 0, torch.zeros(())),
        "only_some_tokens",
        "masked text tokens alone",
    ),
    (
        "clean tokens",
        "2.3/i2v",
        BLOCK + "attn1.input",
        lambda run, x: at(x, run.inputs["timestep"] == 0, noise(x, 0.5)),
        "only_some_tokens",
        "at tokens of timestep 0",
    ),
    (
        "one of the batch",
        "2.3/t2v",
        TO_OUT,
        lambda run, x: at(x, torch.tensor([[False], [True]]), noise(x, 0.5)),
        "only_one_batch_element",
        "only in element 1 of the batch of 2",
    ),
    (
        "batch broadcast",
        "2.3/t2v",
        TO_OUT,
        lambda run, x: x[:1].expand_as(x),
        "collapsed_batch only_one_batch_element",
        "all elements of the batch being the same",
    ),
    (
        "one axis",
        "2.3/t2v",
        "rope.cos",
        lambda run, x: torch.cat(
            [
                x.flatten(2)[..., :2],
                torch.stack(
                    [
                        *noise(x.flatten(2)[..., 2:], 0.5).unflatten(-1, (-1, 3)).unbind(-1)[:1],
                        *x.flatten(2)[..., 2:].unflatten(-1, (-1, 3)).unbind(-1)[1:],
                    ],
                    -1,
                ).flatten(2),
            ],
            -1,
        ).reshape(x.shape),
        "only_one_axis",
        "the time axis alone",
    ),
    (
        "one axis of positions",
        "2.3/coords",
        "video_coords",
        lambda run, x: torch.cat([x[:, :2], x[:, 2:] * 1.5], 1),
        "only_one_axis",
        "the width axis alone",
    ),
    # rounding
    (
        "bfloat16 table",
        "2.3/coords",
        "rope.cos",
        lambda run, x: x.bfloat16().float(),
        "rounded narrow_numbers rounding_noise",
        "the reference rounded to bfloat16",
    ),
    (
        "float16 table",
        "2.3/coords",
        "rope.cos",
        lambda run, x: x.half().float(),
        "rounded narrow_numbers rounding_noise",
        "the reference rounded to float16 or TF32",
    ),
]


def cosines_with(run: Run, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the cosines of self-attention in video, made from changed frequencies."""

    def changed(n: int, config: TransformerConfig, dtype: torch.dtype) -> Tensor:
        return change(frequencies(n, config, torch.float64)).to(dtype)

    with patch.object(rope, "frequencies", changed):
        return rotation(run.taps["video_coords"], run.config.video, run.config, torch.float32)[0]


def queries(run: Run) -> Tensor:
    """Return the queries of self-attention before their norm."""
    to_q = BLOCK + "attn1.to_q."
    return F.linear(run.block("attn1.input"), run.weight(to_q + "weight"), run.weight(to_q + "bias"))


def norm_weight(run: Run, name: str) -> Tensor:
    return run.weight(f"{BLOCK}attn1.{name}.weight")


ONLY_FLOAT32: list[tuple[str, str, str, Change, str, str]] = [
    (
        "epsilon of q",
        "2.3/t2v",
        BLOCK + "attn1.norm_q",
        lambda run, x: F.rms_norm(
            F.linear(
                run.block("attn1.input"), run.weight(BLOCK + "attn1.to_q.weight"), run.weight(BLOCK + "attn1.to_q.bias")
            ),
            x.shape[-1:],
            run.weight(BLOCK + "attn1.norm_q.weight"),
            1e-4,
        ),
        "other_epsilon",
        "an epsilon of 0.0001",
    ),
    (
        "epsilon of a stream",
        "2.3/t2v",
        BLOCK + "attn1.input",
        lambda run, x: modulate(
            F.rms_norm(run.block("attn1.stream"), x.shape[-1:], eps=1e-3),
            *(row[:, None] for row in run.block("attn1.rows")[:, :2].unbind(1)),
        ),
        "other_epsilon",
        "an epsilon of 0.001",
    ),
    (
        "a scaled shift",
        "2.3/t2v",
        BLOCK + "attn1.input",
        lambda run, x: x - 0.25 * run.block("attn1.rows")[:, :1],
        "wrong_operand",
        "the shift times 0.75",
    ),
    (
        "rounded values of attention",
        "2.3/t2v",
        BLOCK + "attn2.sdpa",
        lambda run, x: F.scaled_dot_product_attention(
            *(
                rearrange(y, "b t h d -> b h t d")
                for y in (
                    run.block("attn2.q"),
                    run.block("attn2.k"),
                    run.block("attn2.to_v").roll(1, 1).unflatten(-1, run.block("attn2.k").shape[2:]),
                )
            )
        ).transpose(1, 2),
        "wrong_operand",
        "keys, in relation to values, of the next token",
    ),
    (
        "scale and shift in bfloat16",
        "2.3/t2v",
        BLOCK + "attn1.input",
        lambda run, x: modulate(
            F.rms_norm(run.block("attn1.stream"), x.shape[-1:], eps=1e-6),
            *(row[:, None] for row in run.block("attn1.rows")[:, :2].bfloat16().float().unbind(1)),
        ),
        "wrong_operand",
        "scale and shift rounded to bfloat16",
    ),
    (
        "a mean square that is too large",
        "2.3/t2v",
        BLOCK + "attn1.input",
        lambda run, x: modulate(
            run.block("attn1.stream") * (run.block("attn1.stream").square().mean(-1, keepdim=True) + 0.02).rsqrt(),
            *(row[:, None] for row in run.block("attn1.rows")[:, :2].unbind(1)),
        ),
        "wrong_operand",
        "the mean square plus 0.02",
    ),
    (
        "a norm without the mean",
        "2.3/t2v",
        BLOCK + "attn1.input",
        lambda run, x: modulate(
            run.block("attn1.stream") * (run.block("attn1.stream").square() + 1e-6).rsqrt(),
            *(row[:, None] for row in run.block("attn1.rows")[:, :2].unbind(1)),
        ),
        "wrong_operand",
        "the square of each channel in place of the mean square",
    ),
    (
        "a norm of each head",
        "2.3/t2v",
        BLOCK + "attn1.norm_q",
        lambda run, x: rms_norm(queries(run).unflatten(-1, (2, -1))).flatten(-2) * norm_weight(run, "norm_q"),
        "wrong_operand factor_per_head",
        "the mean square of each head, not of all heads",
    ),
    (
        "the weight of the keys' norm",
        "2.3/t2v",
        BLOCK + "attn1.norm_q",
        lambda run, x: rms_norm(queries(run)) * norm_weight(run, "norm_k"),
        "wrong_operand factor_per_channel",
        "the weight of norm_k in place of the weight of norm_q",
    ),
    (
        "a number added to the result of a feed-forward",
        "2.3/t2v",
        BLOCK + "video",
        lambda run, x: x + 0.03 * run.block("ff.rows")[:, 2:3],
        "wrong_operand",
        "the result of ff plus 0.03",
    ),
    (
        "a rotation without cosines",
        "2.3/t2v",
        BLOCK + "attn1.q",
        lambda run, x: (
            x
            + run.block("attn1.norm_q").unflatten(-1, x.shape[2:])
            * (1 - torch.cat([run.taps["rope.cos"], run.taps["rope.cos"]], -1))
        ),
        "wrong_operand",
        "x1 - x2 sin and x1 sin + x2 in place of x1 cos - x2 sin and x2 cos + x1 sin",
    ),
    (
        "phases in bfloat16",
        "2.3/t2v",
        "time_embed.sinusoid",
        lambda run, x: (lambda phases: torch.cat([phases.cos(), phases.sin()], -1))(
            (run.inputs["timestep"].reshape(-1, 1) * torch.exp(-math.log(10_000) / 128 * torch.arange(128)))
            .bfloat16()
            .float()
        ),
        "wrong_operand",
        "the phases rounded to bfloat16",
    ),
    (
        "frequencies in float16",
        "2.3/t2v",
        "rope.cos",
        lambda run, x: cosines_with(run, lambda freqs: freqs.half().double()),
        "wrong_operand",
        "frequencies rounded to float16",
    ),
    (
        "patches without a size",
        "2.3/t2v",
        "video_coords",
        lambda run, x: x[..., :1].expand_as(x),
        "wrong_operand only_one_bound",
        "the sizes of patches left out",
    ),
    (
        "patches before time 0",
        "2.3/t2v",
        "audio_coords",
        lambda run, x: x - torch.where(x == 0, 0.03, 0.0),
        "wrong_operand only_one_bound",
        "patches that begin before time 0",
    ),
    (
        "the mask's opposite",
        "2.3/text-masks",
        BLOCK + "attn2.sdpa",
        lambda run, x: F.scaled_dot_product_attention(
            *(
                rearrange(y, "b t h d -> b h t d")
                for y in (
                    run.block("attn2.q"),
                    run.block("attn2.k"),
                    run.block("attn2.to_v").unflatten(-1, run.block("attn2.k").shape[2:]),
                )
            ),
            attn_mask=-text_attention_mask(run.inputs["encoder_attention_mask"], x.dtype),
        ).transpose(1, 2),
        "wrong_operand",
        "the mask's bias negated",
    ),
    (
        "bfloat16 matmul",
        "2.3/t2v",
        BLOCK + "ff.proj",
        lambda run, x: F.linear(
            run.block("ff.input").bfloat16(),
            run.weight(BLOCK + "ff.net.0.proj.weight").bfloat16(),
            run.weight(BLOCK + "ff.net.0.proj.bias").bfloat16(),
        ).float(),
        "narrow_numbers rounding_noise",
        "a step computed in bfloat16",
    ),
    (
        "TF32 matmul",
        "2.3/t2v",
        BLOCK + "ff.proj",
        lambda run, x: F.linear(
            run.block("ff.input").half().float(),
            run.weight(BLOCK + "ff.net.0.proj.weight").half().float(),
            run.weight(BLOCK + "ff.net.0.proj.bias"),
        ),
        "rounding_noise",
        "noise as from rounding to float16 or TF32",
    ),
    (
        "bfloat16 attention",
        "2.3/t2v",
        SDPA,
        lambda run, x: (
            F.scaled_dot_product_attention(
                *(
                    run.block("attn1." + part).unflatten(-1, (-1, 14)).flatten(2, -2).bfloat16().transpose(1, 2)
                    for part in ("q", "k", "to_v")
                )
            )
            .transpose(1, 2)
            .float()
        ),
        "wrong_attention narrow_numbers rounding_noise",
        "attention in bfloat16",
    ),
]
ROUNDING = {
    "rounding_noise",
    "float32_angles",
    "more_exact",
}  # may mention benign differences, since they are named as such


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize(("bug", "case", "tap", "expected", "says"), INJECTED)
def test_real_bugs_are_named(bug: str, case: str, tap: str, expected: str, says: str, dtype: str) -> None:
    reference = run(case, dtype)
    with mutants.inject(bug, reference.model):
        taps = verify.run(reference.model, reference.inputs)
    differ = (
        name
        for name, x in reference.taps.items()
        if name in taps and not (x.shape == taps[name].shape and torch.equal(x, taps[name]))
    )
    assert next(differ) == tap
    check(reference, tap, taps[tap], expected, says, dtype, taps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize(("bug", "case", "tap", "change", "expected", "says"), CHANGED)
def test_bugs_of_one_tap_are_named(
    bug: str, case: str, tap: str, change: Change, expected: str, says: str, dtype: str
) -> None:
    reference = run(case, dtype)
    check(reference, tap, change(reference, reference.taps[tap]), expected, says, dtype)


@pytest.mark.parametrize(("bug", "case", "tap", "change", "expected", "says"), ONLY_FLOAT32)
def test_narrow_stages_of_a_float32_model_are_named(
    bug: str, case: str, tap: str, change: Change, expected: str, says: str
) -> None:
    reference = run(case, "float32")
    check(reference, tap, change(reference, reference.taps[tap]), expected, says, "float32")


def check(
    reference: Run, tap: str, candidate: Tensor, expected: str, says: str, dtype: str, taps: Taps | None = None
) -> None:
    """Require exactly these hints, with the float64 truth and without it."""
    words = [word.split("|") for word in expected.split()]
    wanted = {name for name, *only in words if dtype in (only or [dtype])}
    for with_truth in (False, True):
        found = looks_like(reference.evidence(tap, candidate, taps, with_truth))
        if "wrong_operand" not in wanted:  # it finds again what more specific hints have named
            found.pop("wrong_operand", None)
        assert set(found) == wanted, found
        assert says in found[words[0][0]]


def test_every_hint_has_a_bug() -> None:
    expected = {word.split("|")[0] for row in (*INJECTED, *CHANGED, *ONLY_FLOAT32) for word in row[-2].split()}
    assert {hint.__name__ for hint in HINTS} == expected | {"more_exact"}


# Differences that are not bugs.


def summed_in_halves(layer: nn.Linear, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return F.linear(x[..., :half], layer.weight[:, :half], layer.bias) + F.linear(x[..., half:], layer.weight[:, half:])


@cache
def in_another_order(case_id: str, dtype: str) -> Taps:
    with patch.object(nn.Linear, "forward", summed_in_halves):
        return verify.run(run(case_id, dtype).model, run(case_id, dtype).inputs)


def ulps(x: Tensor) -> Tensor:
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (x.double() * (1 + torch.finfo(x.dtype).eps * drawn)).to(x.dtype)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("case", ["2.0/t2v", "2.5/everything"])
def test_nothing_but_rounding_is_said_of_rounding(case: str, dtype: str) -> None:
    reference = run(case, dtype)
    for name, x in first_block(reference):
        for candidate, taps in (
            (in_another_order(case, dtype)[name], in_another_order(case, dtype)),
            (reference.truth[name].to(x.dtype), None),
            (ulps(x), None),
        ):
            said = looks_like(
                reference.evidence(name, candidate, taps, with_truth=True)
            )  # the more tolerant of the two
            assert set(said) <= ROUNDING, (name, said)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("case", "dtype", "size"),
    [
        ("2.5/everything", "float32", 0.02),
        ("2.5/everything", "bfloat16", 0.02),
        ("2.5/everything", "bfloat16", 1.0),
        ("2.3/text-masks-3d", "float32", 1.0),
        ("2.3/coords", "float32", 1.0),
        ("2.3/self-mask", "float32", 1.0),
        ("2.3/one-stream-flags", "float32", 1.0),
        ("2.3/stg-one-of-batch", "float32", 1.0),
    ],
)
def test_nothing_is_said_of_random_differences(case: str, dtype: str, size: float) -> None:
    reference = run(case, dtype)
    for name, x in first_block(reference):
        assert not looks_like(reference.evidence(name, noise(x, size))), name


def first_block(reference: Run) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in reference.taps.items() if not name.startswith("transformer_blocks.1")]


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_a_candidate_that_computes_wider_is_recognised(dtype: str) -> None:
    reference, name = run("2.3/t2v", dtype), BLOCK + "attn1.norm_q"
    exact = reference.truth[name].to(NATIVE_DTYPES[dtype])
    assert "more_exact" in looks_like(reference.evidence(name, exact, with_truth=True))


def test_a_mistake_that_was_inherited_is_not_one_of_this_stage() -> None:
    reference = run("2.3/t2v", "float32")
    proj = noise(reference.block("ff.proj"), 0.1)
    taps = reference.taps | {BLOCK + "ff.proj": proj}
    inherited = F.gelu(proj, approximate="tanh")
    assert not looks_like(reference.evidence(BLOCK + "ff.activation", inherited, taps))
    assert tuple(looks_like(reference.evidence(BLOCK + "ff.activation", F.gelu(proj), taps)).values()) == (
        "the exact GELU (erf) in place of the tanh GELU",
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_hints_need_nothing_but_the_tap(dtype: str) -> None:
    reference = run("2.5/everything", dtype)
    for name, x in reference.taps.items():
        assert set(looks_like(Evidence(name, x, x * 2))) <= {"constant_factor"}, name
        assert not looks_like(Evidence(name, x, x)), name


def test_taps_of_another_kind_or_shape_are_not_looked_at() -> None:
    reference = run("2.3/t2v", "float32")
    name, others = BLOCK + "ff.activation", {BLOCK + "ff.proj": "a sketch", BLOCK + "ff.input": torch.ones(3)}
    exact = F.gelu(reference.block("ff.proj"))
    assert list(looks_like(reference.evidence(name, exact, others))) == ["other_activation"]


def test_the_most_specific_hint_comes_first() -> None:
    reference = run("2.3/t2v", "float32")
    config, coords = reference.config, reference.taps["video_coords"].bfloat16()
    candidate, _ = rotation(coords, config.video, config, torch.float32)
    assert tuple(looks_like(reference.evidence("rope.cos", candidate)).values()) == (
        "positions rounded to bfloat16",
        "positions between -1 and 1 rounded to bfloat16",
        "a difference on the time axis alone",
    )
