"""A synthetic port that differs in five things at once, each of which a real port had.

    ltx2ref audit tests/support/five.py:run --case 2.3/i2v

It is this model with other operations put in. `DIFFERENCES` says, for each, where an audit has to find it, and in which
words.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import ltx2ref.block
from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig
from ltx2ref.block import AUDIO_TO_VIDEO, VIDEO_TO_AUDIO
from ltx2ref.modulation import rms_norm
from ltx2ref.parity.run import run as run_model

DIFFERENCES = {
    "epsilon": ("transformer_blocks.*.attn1.norm_q", "an epsilon of 1e-05"),
    "sequential": ("transformer_blocks.*.video_to_audio_attn.context", "the other stream after the exchange"),
    "gate": ("av_cross_attn_video_a2v_gate.sinusoid", "* 0.001 in place of"),
    "sigma": ("time_embed.sinusoid", "rounded to bfloat16"),
    "frequencies": ("rope.cos", "frequencies computed in float32"),
}


def run(
    config: dict[str, Any], state: dict[str, Tensor], inputs: dict[str, Any], dtype: torch.dtype, *names: str
) -> Mapping[str, Tensor]:
    """Return the taps of a port with these differences, by default with all five."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(TransformerConfig.from_diffusers(config))
    model.load_state_dict(state, assign=True)
    with different(model, *(names or DIFFERENCES)):
        return run_model(model.eval(), rounded(inputs) if not names or "sigma" in names else inputs)


def rounded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Round all noise levels to bfloat16."""
    return inputs | {
        name: inputs[name].bfloat16().float()
        for name in ("timestep", "audio_timestep", "sigma", "audio_sigma")
        if name in inputs
    }


@contextmanager
def different(model: LTX2VideoTransformer3DModel, *names: str) -> Iterator[None]:
    """Put differences into this model, but for that of sigma, which is one of the inputs."""
    with ExitStack() as stack:
        if "epsilon" in names:
            for path, norm in model.named_modules():
                if path.endswith((".norm_q", ".norm_k")):
                    stack.enter_context(patch.object(norm, "eps", 1e-5))
        if "sequential" in names:
            stack.enter_context(patch.object(ltx2ref.block, "exchange", one_after_the_other))
        config = model.config
        if "gate" in names:
            config = replace(config, cross_attn_timestep_scale_multiplier=config.timestep_scale_multiplier / 1000)
        if "frequencies" in names:
            config = replace(config, rope_double_precision=False)
        stack.enter_context(patch.object(model, "config", config))
        yield


def one_after_the_other(video: Any, audio: Any, vx: Tensor, ax: Tensor, vc: Any, ac: Any) -> tuple[Tensor, Tensor]:
    """Let audio attend to video as it is after video has attended to audio."""

    def heard(own: Any, other: Any, h: Tensor, g: Tensor, c: Any, d: Any, direction: slice) -> Tensor:
        query, context = own.for_exchange(h, c, direction), other.for_exchange(g, d, direction)
        return own.received(query=query, context=context, c=c, context_rope=d.exchange_rope)

    vh, ah = rms_norm(vx), rms_norm(ax)
    vx = vx + heard(video, audio, vh, ah, vc, ac, AUDIO_TO_VIDEO)
    ah, vh = rms_norm(ax), rms_norm(vx)  # `trace` takes what is normalised first for the stream of the queries
    return vx, ax + heard(audio, video, ah, vh, ac, vc, VIDEO_TO_AUDIO)
