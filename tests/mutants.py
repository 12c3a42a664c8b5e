"""Real porting bugs, by the name under which the field knows them, each injected into a model of ours.

`inject(name, model)` gives a context manager; the model is itself again afterwards.
"""
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import ltx2ref.attention
import ltx2ref.block
import ltx2ref.model
import ltx2ref.rope
from ltx2ref import LTX2VideoTransformer3DModel as Model
from ltx2ref.block import Block, StreamLayer
from ltx2ref.modulation import EPS, modulate, rms_norm, rows
from ltx2ref.rope import Rope, rotation

Patch = Any
MUTANTS: dict[str, Callable[[Model], list[Patch]]] = {}


def mutant(name: str) -> Callable[[Callable[[Model], list[Patch]]], None]:
    return lambda make: MUTANTS.__setitem__(name, make)


@contextmanager
def inject(name: str, model: Model) -> Iterator[None]:
    with ExitStack() as stack:
        for change in MUTANTS[name](model):
            stack.enter_context(change)
        yield


def config(model: Model, **changes: Any) -> list[Patch]:
    return [patch.object(model, "config", replace(model.config, **changes))]


def arguments(model: Model, change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Patch]:
    forward = model.forward
    return [patch.object(model, "forward", lambda **given: forward(**given | change(given)))]


def functional(module: Any, **changes: Any) -> list[Patch]:
    """Change torch.nn.functional for one of our modules alone: other implementations use it too."""
    return [patch.object(module, "F", SimpleNamespace(**vars(F) | changes))]


def with_rotation(change: Callable[..., Rope]) -> list[Patch]:
    return [patch.object(ltx2ref.model, "rotation", change)]


@mutant("gate-multiplier-1")
def _(model: Model) -> list[Patch]:
    return config(model, cross_attn_timestep_scale_multiplier=1.0)


@mutant("swapped-modality-sigma")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {"use_cross_timestep": not given.get("use_cross_timestep", False)})


@mutant("unscaled-gate-timestep")
def _(model: Model) -> list[Patch]:
    layers = model.av_cross_attn_video_a2v_gate, model.av_cross_attn_audio_v2a_gate
    return [patch.object(x, "forward", lambda timestep, forward=x.forward: forward(timestep / 1000)) for x in layers]


@mutant("sigma-ignored")
def _(model: Model) -> list[Patch]:
    def first(timestep: Tensor) -> Tensor:
        return timestep.reshape(len(timestep), -1)[:, -1]

    return arguments(model, lambda given: {
        "sigma": first(given["timestep"]), "audio_sigma": first(given["audio_timestep"])})


@mutant("rope-float32-frequencies")
def _(model: Model) -> list[Patch]:
    return config(model, rope_double_precision=False)


@mutant("rope-bf16-positions")
def _(model: Model) -> list[Patch]:
    return with_rotation(lambda coords, *rest: rotation(coords.bfloat16(), *rest))


@mutant("rope-axis-major")
def _(model: Model) -> list[Patch]:
    rearrange = ltx2ref.rope.rearrange
    return [patch.object(ltx2ref.rope, "rearrange", lambda x, pattern, **sizes: rearrange(
        x, pattern.replace("(f p)", "(p f)"), **sizes))]


@mutant("rope-patch-start")
def _(model: Model) -> list[Patch]:
    return with_rotation(lambda coords, *rest: rotation(coords[..., 0], *rest))


@mutant("rope-right-padding")
def _(model: Model) -> list[Patch]:
    return functional(ltx2ref.rope, pad=lambda x, sizes: F.pad(x, sizes[::-1]))


@mutant("rope-shared-heads")
def _(model: Model) -> list[Patch]:
    def shared(*given: Any) -> Rope:
        cos, sin = rotation(*given)
        return cos[:, :, :1].expand_as(cos), sin[:, :, :1].expand_as(sin)

    return with_rotation(shared)


def at_24_fps(coords: Tensor, fps: float) -> Tensor:
    return coords * torch.tensor([fps / 24, 1, 1], dtype=coords.dtype)[: coords.shape[1], None, None]


@mutant("fps-dropped")
def _(model: Model) -> list[Patch]:
    return with_rotation(lambda coords, axes, *rest: rotation(
        at_24_fps(coords, 25.0) if len(axes) == 3 else coords, axes, *rest))


@mutant("fps-dropped-from-exchange")
def _(model: Model) -> list[Patch]:
    return with_rotation(lambda coords, axes, dim, *rest: rotation(
        at_24_fps(coords, 25.0) if len(axes) == 1 and coords.shape[2] != 11 else coords, axes, dim, *rest))


@mutant("mask-as-bool")
def _(model: Model) -> list[Patch]:
    return [patch.object(ltx2ref.attention, "attention_bias", lambda mask, dtype, kind: mask.to(dtype))]


@mutant("mask-ignored")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {"encoder_attention_mask": None, "audio_encoder_attention_mask": None})


@mutant("stg-wrong-block")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {
        "spatio_temporal_guidance_blocks": [i - 1 for i in given.get("spatio_temporal_guidance_blocks") or ()]})


@mutant("stg-without-gate")
def _(model: Model) -> list[Patch]:
    def patched(layer: ltx2ref.attention.Attention) -> Patch:
        forward = layer.forward

        def ungated(x: Tensor, kv: Tensor, ropes: Any = None, mask: Any = None, keep: Any = None) -> Tensor:
            if keep is None:
                return forward(x, kv, ropes, mask)
            with patch.object(layer, "to_gate_logits", None):
                return forward(x, kv, ropes, mask, keep)

        return patch.object(layer, "forward", ungated)

    return [patched(layer) for block in model.transformer_blocks for layer in (block.attn1, block.audio_attn1)]


@mutant("keyframes-unapplied")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {"attention_kwargs": None})


@mutant("ff-bias-dropped")
def _(model: Model) -> list[Patch]:
    linears = [x for block in model.transformer_blocks for x in block.audio_ff.modules()
               if isinstance(x, torch.nn.Linear)]
    return [patch.object(x, "forward", lambda y, x=x: F.linear(y, x.weight)) for x in linears]


@mutant("gelu-erf")
def _(model: Model) -> list[Patch]:
    return functional(ltx2ref.attention, gelu=lambda x, approximate: F.gelu(x))


@mutant("qk-norm-per-head")
def _(model: Model) -> list[Patch]:
    def per_head(norm: torch.nn.RMSNorm, heads: int) -> Patch:
        return patch.object(norm, "forward", lambda x: norm.weight * F.rms_norm(
            x.unflatten(-1, (heads, -1)), (x.shape[-1] // heads,), eps=EPS).flatten(-2))

    layers = [x for x in model.modules() if isinstance(x, ltx2ref.attention.Attention)]
    return [per_head(norm, layer.num_heads) for layer in layers for norm in (layer.norm_q, layer.norm_k)]


@mutant("scale-shift-swapped")
def _(model: Model) -> list[Patch]:
    def show(self: StreamLayer, x: Tensor, c: Any, direction: slice) -> Tensor:
        shift, scale = rows(self.cross_table[direction], c.cross_mod[:, :, direction])
        return modulate(rms_norm(x), scale, shift)

    return [patch.object(StreamLayer, "show", show)]


@mutant("a2v-v2a-swapped")
def _(model: Model) -> list[Patch]:
    show = StreamLayer.show
    other = {0: ltx2ref.block.V2A, 2: ltx2ref.block.A2V}
    return [patch.object(StreamLayer, "show", lambda self, x, c, direction: show(self, x, c, other[direction.start]))]


@mutant("sequential-exchange")
def _(model: Model) -> list[Patch]:
    def forward(self: Block, vx: Tensor, ax: Tensor, vc: Any, ac: Any, keep: Any = None) -> tuple[Tensor, Tensor]:
        video, audio = self.video, self.audio
        vx, ax = video.attend(vx, vc, keep), audio.attend(ax, ac, keep)
        vx, ax = video.read(vx, vc), audio.read(ax, ac)
        vx = video.hear(vx, vc, audio, ax, ac)
        ax = audio.hear(ax, ac, video, vx, vc)
        return video.feed_forward(vx, vc), audio.feed_forward(ax, ac)

    return [patch.object(Block, "forward", forward)]


@mutant("per-token-timestep-averaged")
def _(model: Model) -> list[Patch]:
    def average(timestep: Tensor) -> Tensor:
        return timestep.reshape(len(timestep), -1).mean(1, keepdim=True)

    return arguments(model, lambda given: {
        "timestep": average(given["timestep"]), "audio_timestep": average(given["audio_timestep"])})
