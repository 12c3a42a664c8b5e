"""Thirty real porting bugs, by the names under which the field knows them, and benign changes.

`inject(name, model)` returns a context manager, after which the model is as before. Four bugs are those of a loader:
`LOADERS[name](folder, seed)` writes a small file and returns the model in it, and what the bug makes of that. `FIRST`
has for each bug the taps, in any block, at which it may first show, and the hints that name it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import writers
from tiny import random_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ltx2ref.attention
import ltx2ref.block
import ltx2ref.interface
import ltx2ref.model
import ltx2ref.rope
from ltx2ref import LTX2VideoTransformer3DModel as Model
from ltx2ref import load
from ltx2ref.block import StreamLayer
from ltx2ref.checkpoint import decoders, match, shell
from ltx2ref.checkpoint.quantised import FORMATS
from ltx2ref.checkpoint.streams import needs
from ltx2ref.modulation import EPS, modulate, rms_norm, rows
from ltx2ref.rope import Rope, rotation
from ltx2ref.sizes import StreamSizes

Patch = Any
MUTANTS: dict[str, Callable[[Model], list[Patch]]] = {}


def mutant(name: str) -> Callable[[Callable[[Model], list[Patch]]], None]:
    return lambda make: MUTANTS.__setitem__(name, make)


@contextmanager
def patched(changes: Iterable[Patch]) -> Iterator[None]:
    with ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


def inject(name: str, model: Model) -> Patch:
    return patched(MUTANTS[name](model))


def config(model: Model, **changes: Any) -> list[Patch]:
    return [patch.object(model, "config", replace(model.config, **changes))]


def arguments(model: Model, change: Callable[[dict[str, Any]], dict[str, Any]]) -> list[Patch]:
    forward = model.forward
    return [patch.object(model, "forward", lambda **given: forward(**given | change(given)))]


def functional(module: Any, **changes: Any) -> list[Patch]:
    """Change torch.nn.functional for one of our modules only, since other implementations use it as well."""
    return [patch.object(module, "F", SimpleNamespace(**vars(F) | changes))]


def with_text_bias(bias: Callable[[Tensor, torch.dtype], Tensor]) -> Patch:
    """Change what text masks (B, S) add to the logits, and no other mask."""
    right = ltx2ref.interface.text_attention_mask

    def changed(mask: Tensor, dtype: torch.dtype, kind: str = "linear") -> Tensor:
        return bias(mask, dtype)[:, None, None] if mask.ndim == 2 else right(mask, dtype, kind)

    return patch.object(ltx2ref.interface, "text_attention_mask", changed)


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

    return arguments(
        model, lambda given: {"sigma": first(given["timestep"]), "audio_sigma": first(given["audio_timestep"])}
    )


@mutant("rope-float32-frequencies")
def _(model: Model) -> list[Patch]:
    return config(model, rope_double_precision=False)


@mutant("rope-bf16-positions")
def _(model: Model) -> list[Patch]:
    return with_rotation(lambda coords, *rest: rotation(coords.bfloat16(), *rest))


@mutant("rope-axis-major")
def _(model: Model) -> list[Patch]:
    rearrange = ltx2ref.rope.rearrange
    return [
        patch.object(
            ltx2ref.rope,
            "rearrange",
            lambda x, pattern, **sizes: rearrange(x, pattern.replace("(n p)", "(p n)"), **sizes),
        )
    ]


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
    return with_rotation(
        lambda coords, stream, *rest: rotation(
            at_24_fps(coords, 25.0) if len(stream.max_position) == 3 else coords, stream, *rest
        )
    )


@mutant("fps-dropped-from-exchange")
def _(model: Model) -> list[Patch]:
    return with_rotation(
        lambda coords, stream, *rest: rotation(
            at_24_fps(coords, 25.0) if len(stream.max_position) == 1 and coords.shape[2] != 11 else coords,
            stream,
            *rest,
        )
    )


@mutant("max-pos-frames")
def _(model: Model) -> list[Patch]:
    def in_latent_frames(coords: Tensor, stream: StreamSizes, *rest: Any) -> Rope:
        factor = torch.tensor([25.0 / 8, 1, 1], dtype=coords.dtype)[
            :, None, None
        ]  # frames per second, and 8 frames per latent
        return rotation(coords * factor if len(stream.max_position) == 3 else coords, stream, *rest)

    return with_rotation(in_latent_frames)


@mutant("mask-as-bool")
def _(model: Model) -> list[Patch]:
    return [with_text_bias(lambda mask, dtype: mask.to(dtype))]


@mutant("mask-ignored")
def _(model: Model) -> list[Patch]:
    return arguments(model, lambda given: {"encoder_attention_mask": None, "audio_encoder_attention_mask": None})


@mutant("stg-4d-mask")
def _(model: Model) -> list[Patch]:
    """Give the result a second batch dimension, row i blended by the mask of row j; the port goes on with the first."""
    lerp = torch.lerp

    def broadcast(v: Tensor, out: Tensor, keep: Tensor) -> Tensor:
        return lerp(v, out, keep.unsqueeze(1))[0]

    return [patch.object(ltx2ref.attention, "torch", SimpleNamespace(**vars(torch) | {"lerp": broadcast}))]


@mutant("stg-wrong-block")
def _(model: Model) -> list[Patch]:
    return arguments(
        model,
        lambda given: {
            "spatio_temporal_guidance_blocks": [i - 1 for i in given.get("spatio_temporal_guidance_blocks") or ()]
        },
    )


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
    linears = [
        x for block in model.transformer_blocks for x in block.audio_ff.modules() if isinstance(x, torch.nn.Linear)
    ]
    return [patch.object(x, "forward", lambda y, x=x: F.linear(y, x.weight)) for x in linears]


@mutant("gelu-erf")
def _(model: Model) -> list[Patch]:
    return functional(ltx2ref.attention, gelu=lambda x, approximate: F.gelu(x))


def norm_in_bfloat16(x: Tensor, shape: Any, weight: None, bias: None, eps: float, cudnn: bool) -> Tensor:
    """Round both sums after each addition."""

    def mean(terms: Tensor) -> Tensor:
        total = torch.zeros_like(terms[..., :1])
        for term in terms.split(1, dim=-1):
            total = total + term
        return total / terms.shape[-1]

    centred = x.bfloat16() - mean(x.bfloat16())
    return (centred * (mean(centred * centred) + eps).rsqrt()).to(x.dtype)


@mutant("output-norm-bf16")
def _(model: Model) -> list[Patch]:
    def layer_norm(x: Tensor, shape: Any, eps: float) -> Tensor:
        with patch.object(
            torch, "layer_norm", norm_in_bfloat16
        ):  # F.layer_norm calls this function, so a trace sees it
            return F.layer_norm(x, shape, eps=eps)

    return functional(ltx2ref.model, layer_norm=layer_norm)


@mutant("qk-norm-per-head")
def _(model: Model) -> list[Patch]:
    def per_head(norm: torch.nn.RMSNorm, heads: int) -> Patch:
        return patch.object(
            norm,
            "forward",
            lambda x: (
                norm.weight * F.rms_norm(x.unflatten(-1, (heads, -1)), (x.shape[-1] // heads,), eps=EPS).flatten(-2)
            ),
        )

    layers = [x for x in model.modules() if isinstance(x, ltx2ref.attention.Attention)]
    return [per_head(norm, layer.num_heads) for layer in layers for norm in (layer.norm_q, layer.norm_k)]


@mutant("scale-shift-swapped")
def _(model: Model) -> list[Patch]:
    def for_exchange(self: StreamLayer, h: Tensor, c: Any, direction: slice) -> Tensor:
        shift, scale = rows(self.exchange_table[direction], c.exchange_offsets[:, :, direction])
        return modulate(h, shift, scale)

    return [patch.object(StreamLayer, "for_exchange", for_exchange)]


@mutant("a2v-v2a-swapped")
def _(model: Model) -> list[Patch]:
    for_exchange = StreamLayer.for_exchange
    other = {0: ltx2ref.block.VIDEO_TO_AUDIO, 2: ltx2ref.block.AUDIO_TO_VIDEO}

    def swapped(self: StreamLayer, h: Tensor, c: Any, direction: slice) -> Tensor:
        return for_exchange(self, h, c, other[direction.start])

    return [patch.object(StreamLayer, "for_exchange", swapped)]


@mutant("sequential-exchange")
def _(model: Model) -> list[Patch]:
    def sequential(video: Any, audio: Any, vx: Tensor, ax: Tensor, vc: Any, ac: Any) -> tuple[Tensor, Tensor]:
        def part(x: Any, c: Any, h: Tensor, direction: slice) -> Tensor:
            return x.for_exchange(rms_norm(h), c, direction)

        a2v, v2a = ltx2ref.block.AUDIO_TO_VIDEO, ltx2ref.block.VIDEO_TO_AUDIO
        vx = vx + video.received(part(video, vc, vx, a2v), part(audio, ac, ax, a2v), vc, ac.exchange_rope)
        ax = ax + audio.received(part(audio, ac, ax, v2a), part(video, vc, vx, v2a), ac, vc.exchange_rope)
        return vx, ax

    return [patch.object(ltx2ref.block, "exchange", sequential)]


@mutant("per-token-timestep-averaged")
def _(model: Model) -> list[Patch]:
    def average(timestep: Tensor) -> Tensor:
        return timestep.reshape(len(timestep), -1).mean(1, keepdim=True)

    return arguments(
        model,
        lambda given: {"timestep": average(given["timestep"]), "audio_timestep": average(given["audio_timestep"])},
    )


# ---------------------------------------------------------------- a loader's bugs
Loaded = tuple[Model, Model]
LOADERS: dict[str, Callable[[Path, int], Loaded]] = {}


def loader(name: str) -> Callable[[Callable[[Path, int], Loaded]], None]:
    return lambda make: LOADERS.__setitem__(name, make)


def small_file(folder: Path, seed: int, release: str, write: Callable[..., Any], **options: Any) -> Path:
    config = writers.quantisable_config(release)
    state = {name: x.detach() for name, x in random_model(config, seed=seed).state_dict().items()}
    write(folder / "ltx.safetensors", state, config, **options)
    return folder / "ltx.safetensors"


@loader("fp8-scale-ignored")
def _(folder: Path, seed: int) -> Loaded:
    path = small_file(folder, seed, "2.3", writers.write_fp8_scaled)
    unscaled = FORMATS["fp8 scaled"]._replace(decode=lambda weight: lambda a, b: weight.tensor.rows(a, b).float())
    with patch.dict(FORMATS, {"fp8 scaled": unscaled}):
        wrong = load(path)
    return load(path), wrong


@loader("prompt-adaln-unmapped")
def _(folder: Path, seed: int) -> Loaded:
    path = small_file(folder, seed, "2.3", writers.write_single_file)
    wrong = load(path)
    torch.manual_seed(seed)
    for layer in [*wrong.prompt_adaln.modules(), *wrong.audio_prompt_adaln.modules()]:
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    return load(path), wrong


@loader("nvfp4-nibbles-swapped")
def _(folder: Path, seed: int) -> Loaded:
    path = small_file(folder, seed, "2.5", writers.write_nvfp4, quantization=False)
    return load(path, nibbles="high"), load(path, nibbles="low", scales="tiled")


@loader("int8-not-unrotated")
def _(folder: Path, seed: int) -> Loaded:
    path = small_file(folder, seed, "2.5", writers.write_int8_convrot)
    with patch.object(decoders, "hadamard", lambda size: size**0.5 * torch.eye(size)):
        wrong = load(path)
    return load(path), wrong


# ---------------------------------------------------------------- bugs of an absent stream
right_alone = StreamLayer.alone


def exchanged_with_nothing(self: StreamLayer, x: Tensor, c: Any, keep: Tensor | None) -> Tensor:
    """Let a stream whose other one is absent attend to no keys: that adds the bias of the last layer, times a gate."""
    if c is None or c.exchange_offsets.shape[1] > 0:
        return right_alone(self, x, c, keep)
    x = self.text_attention(self.self_attention(x, c, keep), c)
    nothing = x.new_zeros(len(x), 0, self.exchange_attn.to_k.in_features)
    x = x + self.exchange_table[4] * self.exchange_attn(rms_norm(x), nothing)
    return self.feed_forward(x, c)


def levels_of_nothing(own: Any, other: Any, exchange: str) -> tuple[Tensor, Tensor]:
    """Embed a noise level of the absent stream for the exchange of the one that is there."""
    level = torch.full((len(own.latent), 1), 500.0)
    return level, level


def needed_with_the_exchange(name: str, streams: Iterable[str]) -> bool:
    return any(stream in needs(name) for stream in streams)


ABSENT: dict[str, Callable[[], list[Patch]]] = {
    "exchanged": lambda: [patch.object(StreamLayer, "alone", exchanged_with_nothing)],
    "embedded": lambda: [patch.object(ltx2ref.interface, "exchange_levels", levels_of_nothing)],
    "exchange-loaded": lambda: [patch.object(x, "is_needed", needed_with_the_exchange) for x in (match, shell)],
}


# ---------------------------------------------------------------- where each shows, and the hints that name it
GATES = ("av_cross_attn_video_a2v_gate.sinusoid", "av_cross_attn_audio_v2a_gate.sinusoid")
TO_OUT = ("attn1.to_out", "audio_attn1.to_out")
TABLES = tuple(
    f"{name}.{part}"
    for name in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
    for part in ("cos", "sin")
)
FIRST: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "gate-multiplier-1": (GATES, ("wrong_level",)),
    "swapped-modality-sigma": (("av_cross_attn_video_scale_shift.sinusoid",), ("wrong_level",)),
    "unscaled-gate-timestep": (GATES, ("wrong_level",)),
    "sigma-ignored": (("prompt_adaln.sinusoid",), ("wrong_level",)),
    "rope-float32-frequencies": (TABLES, ("wrong_frequencies", "float32_angles")),
    "rope-bf16-positions": (TABLES, ("wrong_positions",)),
    "rope-axis-major": (("rope.cos",), ("axis_major",)),
    "rope-patch-start": (("rope.cos",), ("wrong_positions",)),
    "rope-right-padding": (("rope.cos",), ("padding_side",)),
    "rope-shared-heads": (("rope.cos",), ("shared_heads",)),
    "fps-dropped": (("rope.cos",), ("wrong_positions",)),
    "fps-dropped-from-exchange": (("cross_attn_rope.cos",), ("wrong_positions",)),
    "max-pos-frames": (("rope.cos",), ("wrong_positions",)),
    "mask-as-bool": (("attn2.sdpa",), ("wrong_attention",)),
    "mask-ignored": (("attn2.sdpa",), ("wrong_attention",)),
    "stg-4d-mask": (TO_OUT, ("wrong_projection", "collapsed_batch", "only_one_batch_element")),
    "stg-wrong-block": (TO_OUT, ("wrong_projection",)),
    "stg-without-gate": (TO_OUT, ("wrong_projection",)),
    "keyframes-unapplied": (("attn1.stream",), ("only_some_tokens",)),
    "ff-bias-dropped": (("audio_ff.proj",), ("constant_vector",)),
    "gelu-erf": (("ff.activation",), ("other_activation",)),
    "qk-norm-per-head": (("attn1.norm_q",), ("factor_per_head",)),
    "output-norm-bf16": (("norm_out",), ("rounded", "wrong_norm")),
    "scale-shift-swapped": (("audio_to_video_attn.input",), ("wrong_rows",)),
    "a2v-v2a-swapped": (("audio_to_video_attn.input",), ("wrong_rows",)),
    "sequential-exchange": (("video_to_audio_attn.context",), ("sequential_exchange",)),
    "per-token-timestep-averaged": (("time_embed.sinusoid", "audio_time_embed.sinusoid"), ("wrong_level",)),
    "fp8-scale-ignored": (("attn1.norm_q", "attn1.to_v"), ("scaled_weight", "constant_factor")),
    "prompt-adaln-unmapped": (("prompt_adaln.emb",), ()),
    "nvfp4-nibbles-swapped": (("attn1.norm_q",), ()),
    "int8-not-unrotated": (("attn1.norm_q",), ()),
}
ROWS = {
    name: name.removesuffix("-from-exchange") for name in FIRST
}  # names of KNOWN_BUGS, two of which are the same bug


# ---------------------------------------------------------------- changes that are none
def bfloat16_rotation(x: Tensor, rope: Any, layout: str) -> Tensor:
    """Rotate as ltx-core does, with tables and products in the model's dtype."""
    cos, sin = (part.to(x.dtype) for part in rope)
    shape, axis = ((2, -1), -2) if layout == "split" else ((-1, 2), -1)
    a, b = x.unflatten(-1, shape).unbind(axis)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=axis).flatten(-2)


def halves(self: torch.nn.Linear, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    a, b = (
        F.linear(x[..., part].to(dtype), self.weight[:, part].to(dtype)) for part in (slice(half, None), slice(half))
    )
    return a, b


def split_matmul(self: torch.nn.Linear, x: Tensor) -> Tensor:
    parts = halves(self, x, torch.promote_types(x.dtype, torch.float32))
    return (sum(parts) if self.bias is None else sum(parts, self.bias.to(parts[0].dtype))).to(x.dtype)


def rounded_partial_sums(self: torch.nn.Linear, x: Tensor) -> Tensor:
    """Add as tensor parallelism does, with each half of a matrix product in the model's dtype."""
    a, b = halves(self, x, x.dtype)
    return a + b if self.bias is None else a + b + self.bias


def exact_gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x.double(), approximate=approximate).to(x.dtype)


BENIGN: dict[str, Callable[[], Any]] = {
    "math attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "flash attention": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    "rotation in the model's dtype": lambda: patch.object(ltx2ref.attention, "apply_rope", bfloat16_rotation),
    "another mask fill": lambda: with_text_bias(lambda mask, dtype: (1 - mask.to(dtype)) * torch.finfo(dtype).min),
    "another order of sums": lambda: patch.object(torch.nn.Linear, "forward", split_matmul),
    "rounded partial sums": lambda: patch.object(torch.nn.Linear, "forward", rounded_partial_sums),
    "a more exact GELU": lambda: patch.object(
        ltx2ref.attention, "F", SimpleNamespace(**vars(F) | {"gelu": exact_gelu})
    ),
    "nothing": nullcontext,
}
