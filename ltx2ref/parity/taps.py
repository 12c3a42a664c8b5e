"""Reading what the model computes on the way, without a line in the model: hooks that always come off again.

Names follow the parameters' (which are diffusers'):

    rope, audio_rope, cross_attn_rope, cross_attn_audio_rope + .cos, .sin   (B, T, H, R)
    time_embed.sinusoid    (B * T|1, 256)    what linear_1 of that embedder is given; so for every AdaLN layer
    time_embed.emb         (B * T|1, D)
    transformer_blocks.0.video, .audio       (B, T, D) after that block
    sample, audio_sample                     (B, T, C)
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..block import Conditioning
from ..model import LTX2VideoTransformer3DModel

Taps = dict[str, Tensor]
ADALN_LAYERS = (
    "time_embed", "audio_time_embed", "prompt_adaln", "audio_prompt_adaln", "av_cross_attn_video_scale_shift",
    "av_cross_attn_audio_scale_shift", "av_cross_attn_video_a2v_gate", "av_cross_attn_audio_v2a_gate",
)
PHASES = (".cos", ".sin", ".sinusoid")  # taps that are judged against pure float64


@contextmanager
def trace(model: LTX2VideoTransformer3DModel) -> Iterator[Taps]:
    """The taps of the last forward within the context."""
    taps: Taps = {}

    def conditioning(block: nn.Module, args: tuple[Any, ...]) -> None:
        for prefix, x, c in (("", args[0], args[2]), ("audio_", args[1], args[3])):
            put_ropes(taps, prefix, c, len(x))

    with hooks() as on:
        on(model.transformer_blocks[0].register_forward_pre_hook(conditioning))
        record_embeddings(model, taps, on)
        for i, block in enumerate(model.transformer_blocks):
            on(block.register_forward_hook(lambda _, args, out, i=i: put_pair(
                taps, (f"transformer_blocks.{i}.video", f"transformer_blocks.{i}.audio"), out)))
        on(model.register_forward_hook(lambda _, args, out: put_pair(taps, ("sample", "audio_sample"), out)))
        yield taps


@contextmanager
def hooks() -> Iterator[Callable[[Any], None]]:
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()


def put_ropes(taps: Taps, prefix: str, c: Conditioning, batch: int) -> None:
    for name, rope in ((prefix + "rope", c.rope), (f"cross_attn_{prefix}rope", c.cross_rope)):
        for part, x in zip((".cos", ".sin"), rope, strict=True):
            taps[name + part] = x.detach().expand(batch, *x.shape[1:])


def put_pair(taps: Taps, names: tuple[str, str], pair: tuple[Tensor, Tensor]) -> None:
    taps |= {name: x.detach() for name, x in zip(names, pair, strict=True)}


def record_embeddings(model: nn.Module, taps: Taps, on: Callable[[Any], None]) -> None:
    """The same for diffusers' model, whose modules have the same names."""
    for name in ADALN_LAYERS:
        if getattr(model, name, None) is None:
            continue
        embedder = getattr(model, name).emb.get_submodule("timestep_embedder")
        on(embedder.linear_1.register_forward_pre_hook(
            lambda _, args, name=name: taps.__setitem__(f"{name}.sinusoid", args[0].detach().flatten(0, -2))))
        on(embedder.register_forward_hook(
            lambda _, args, out, name=name: taps.__setitem__(f"{name}.emb", out.detach().flatten(0, -2))))
