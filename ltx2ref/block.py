"""One block: two streams, the same code, that listen to each other."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import Attention, FeedForward
from .config import StreamConfig, TransformerConfig
from .modulation import modulate, residual, rms_norm, rows
from .rope import Rope

A2V, V2A = slice(0, 2), slice(2, 4)  # the rows of each direction in the exchange's tables


class Conditioning(NamedTuple):
    """What one stream carries unchanged through all blocks."""

    mod: Tensor  # (B, T|1, 6|9, D)
    text: Tensor  # (B, S, D)
    text_mod: Tensor | None  # (B, 1, 2, D)
    text_mask: Tensor | None  # (B, 1, 1|T, S)
    self_mask: Tensor | None  # (B, 1, T, T)
    cross_mod: Tensor  # (B, T|1, 4, D)
    cross_gate: Tensor  # (B, T|1, 1, D)
    rope: Rope  # (B|1, T, H, R)
    cross_rope: Rope  # (B|1, T, H, R of audio): of time, the one axis that both streams have
    isolated: bool  # no exchange


@dataclass(frozen=True)
class StreamLayer:
    """One stream's weights in one block, and the sub-layers they compute. Video and audio are both this."""

    self_attn: Attention
    text_attn: Attention
    cross_attn: Attention  # queries: this stream; keys and values: the other one
    ff: FeedForward
    table: Tensor  # (6|9, D)
    text_table: Tensor | None  # (2, D)
    cross_table: Tensor  # (5, D)
    listens: slice  # the direction in which this stream is the listener

    def attend(self, x: Tensor, c: Conditioning, keep: Tensor | None) -> Tensor:
        shift, scale, gate = rows(self.table[0:3], c.mod[:, :, 0:3])
        h = modulate(rms_norm(x), scale, shift)
        return residual(x, gate, self.self_attn(h, h, (c.rope, c.rope), c.self_mask, keep))

    def read(self, x: Tensor, c: Conditioning) -> Tensor:
        h, text = rms_norm(x), c.text
        if self.text_table is not None:
            shift, scale = self.text_table if c.text_mod is None else rows(self.text_table, c.text_mod)
            text = modulate(text, scale, shift)
        if len(self.table) == 6:
            return x + self.text_attn(h, text, mask=c.text_mask)
        shift, scale, gate = rows(self.table[6:9], c.mod[:, :, 6:9])
        return residual(x, gate, self.text_attn(modulate(h, scale, shift), text, mask=c.text_mask))

    def show(self, h: Tensor, c: Conditioning, direction: slice) -> Tensor:
        """This stream, normalised, as the exchange sees it, listening or heard: scale before shift."""
        scale, shift = rows(self.cross_table[direction], c.cross_mod[:, :, direction])
        return modulate(h, scale, shift)

    def hear(self, h: Tensor, c: Conditioning, other: "StreamLayer", g: Tensor, d: Conditioning) -> Tensor:
        (gate,) = rows(self.cross_table[4:5], c.cross_gate)
        q, kv = self.show(h, c, self.listens), other.show(g, d, self.listens)
        return gate * self.cross_attn(q, kv, (c.cross_rope, d.cross_rope))

    def feed_forward(self, x: Tensor, c: Conditioning) -> Tensor:
        shift, scale, gate = rows(self.table[3:6], c.mod[:, :, 3:6])
        return residual(x, gate, self.ff(modulate(rms_norm(x), scale, shift)))


def table(num_rows: int, x: StreamConfig) -> nn.Parameter:
    """Return learned rows, at first N(0, 1 / dim) as is usual: with zeros, a port could ignore them."""
    return nn.Parameter(torch.randn(num_rows, x.dim) * x.dim**-0.5)


class Block(nn.Module):
    """Parameters under diffusers' names; `video` and `audio` are the legend from those names to roles."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        v, a = config.video, config.audio

        def attention(x: StreamConfig, kv: StreamConfig, heads: StreamConfig) -> Attention:
            return Attention(x.dim, kv.dim, heads.num_heads, heads.head_dim, x.gated_attn, config.rope_type)

        self.attn1, self.audio_attn1 = attention(v, v, v), attention(a, a, a)
        self.attn2, self.audio_attn2 = attention(v, v, v), attention(a, a, a)
        self.audio_to_video_attn, self.video_to_audio_attn = attention(v, a, a), attention(a, v, a)
        self.ff, self.audio_ff = FeedForward(v.dim, v.ff_bias), FeedForward(a.dim, a.ff_bias)
        self.scale_shift_table, self.audio_scale_shift_table = table(v.mod_rows, v), table(a.mod_rows, a)
        self.video_a2v_cross_attn_scale_shift_table = table(5, v)
        self.audio_a2v_cross_attn_scale_shift_table = table(5, a)
        self.prompt_scale_shift_table = table(2, v) if config.modulated_text else None
        self.audio_prompt_scale_shift_table = table(2, a) if config.modulated_text else None

    @property
    def video(self) -> StreamLayer:
        return StreamLayer(
            self_attn=self.attn1,
            text_attn=self.attn2,
            cross_attn=self.audio_to_video_attn,
            ff=self.ff,
            table=self.scale_shift_table,
            text_table=self.prompt_scale_shift_table,
            cross_table=self.video_a2v_cross_attn_scale_shift_table,
            listens=A2V,
        )

    @property
    def audio(self) -> StreamLayer:
        return StreamLayer(
            self_attn=self.audio_attn1,
            text_attn=self.audio_attn2,
            cross_attn=self.video_to_audio_attn,
            ff=self.audio_ff,
            table=self.audio_scale_shift_table,
            text_table=self.audio_prompt_scale_shift_table,
            cross_table=self.audio_a2v_cross_attn_scale_shift_table,
            listens=V2A,
        )

    def forward(
        self, vx: Tensor, ax: Tensor, vc: Conditioning, ac: Conditioning, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        video, audio = self.video, self.audio
        vx, ax = video.attend(vx, vc, keep), audio.attend(ax, ac, keep)
        vx, ax = video.read(vx, vc), audio.read(ax, ac)
        if not vc.isolated:  # one simultaneous exchange: both hear the streams as they were before it
            vh, ah = rms_norm(vx), rms_norm(ax)
            vx, ax = vx + video.hear(vh, vc, audio, ah, ac), ax + audio.hear(ah, ac, video, vh, vc)
            del vh, ah  # or the feed-forward, where memory peaks, would hold them, too
        return video.feed_forward(vx, vc), audio.feed_forward(ax, ac)
