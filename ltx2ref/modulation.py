"""Adaptive normalisation, and the legend of who uses which row: the trap that every port meets.

block scale_shift_table, audio_...                      0-2  self-attention: shift, scale, gate
                                                        3-5  feed-forward: shift, scale, gate
                                                        6-8  text attention: shift, scale, gate (2.3 on)
prompt_scale_shift_table, audio_...                     0-1  text keys and values: shift, scale (2.3 on)
video_a2v_cross_attn_scale_shift_table, audio_a2v_...   0-1  audio to video: scale, shift
                                                        2-3  video to audio: scale, shift
                                                        4    gate of what this stream hears
top-level scale_shift_table, audio_...                  0-1  output: shift, scale
"""

import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # of every norm, in every checkpoint


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without weights; reduces in float32 or wider, and rounds once."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * (1 + scale) + shift. Here and below the sum takes the product's place: same bits, a tensor less."""
    return (x * (1 + scale)).add_(shift)


def residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return (gate * y).add_(x)


def rows(table: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    """Learned table (K, D) + timestep offsets (B, T|1, K, D): K tensors (B, T|1, D)."""
    return (table + offsets).unbind(-2)
