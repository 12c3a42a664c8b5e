"""Norms, modulation, and which row of which table does what: the order that every port gets wrong once.

    of each block
    scale_shift_table, audio_scale_shift_table                0-2  self-attention: shift, scale, gate
                                                              3-5  feed-forward: shift, scale, gate
                                                              6-8  text attention: shift, scale, gate (from 2.3 on)
    prompt_scale_shift_table, audio_prompt_scale_shift_table  0-1  keys, values of the text: shift, scale (from 2.3 on)
    {video,audio}_a2v_cross_attn_scale_shift_table            0-1  exchange, audio to video: scale, shift
                                                              2-3  exchange, video to audio: scale, shift
                                                              4    exchange: gate of what this stream receives
    of the model
    scale_shift_table, audio_scale_shift_table                0-1  output: shift, scale

In the exchange a stream always uses its own table, whether it gives the queries of a direction or the context. In spite
of "a2v" in their names, both tables serve both directions.
"""

import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # of every norm, in every checkpoint


def rms_norm(x: Tensor) -> Tensor:
    """Normalise without weights. Sums in float32 or wider, and rounds once."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def rows(table: Tensor, offsets: Tensor | None) -> tuple[Tensor, ...]:
    """Return the K rows of a learned table (K, D) plus offsets (B, T|1, K, D), if there are any: each (B, T|1, D)."""
    return (table if offsets is None else table + offsets).unbind(-2)
