"""One block: two streams that run the same code, and an exchange between them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import Attention, FeedForward
from .modulation import modulate, rms_norm, rows
from .rope import Rope
from .sizes import Sizes, StreamSizes

AUDIO_TO_VIDEO = slice(0, 2)  # rows of the exchange's tables
VIDEO_TO_AUDIO = slice(2, 4)
EXCHANGE_GATE = slice(4, 5)


class Conditioning(NamedTuple):
    """What one stream takes unchanged through all blocks. Each block adds the offsets to its own tables."""

    offsets: Tensor  # (B, T|1, 6|9, D), from `Stream.timestep`
    embedding: Tensor  # (B, T|1, D), from the same, for the output
    text: Tensor  # (B, S, D)
    text_offsets: Tensor | None  # (B, 1, 2, D), from `Stream.sigma`; None if the text has no offsets
    text_mask: Tensor | None  # (B, 1, 1|T, S)
    self_mask: Tensor | None  # (B, 1, T, T)
    exchange_offsets: Tensor  # (B, T|1, 4, D), from `Stream.exchange_timestep`
    exchange_gate_offset: Tensor  # (B, T|1, 1, D), from `Stream.exchange_gate_timestep`
    rope: Rope  # (B|1, T, H, R), over time and, for video, space
    exchange_rope: Rope  # (B|1, T, H, R of audio), over time, the one axis that both streams have


class Perturbation(NamedTuple):
    """What one block leaves out on purpose.

    A sampler runs the model a second time with parts left out, and moves its prediction away from that result.
    """

    keep: Tensor | None  # spatio-temporal guidance, see `Attention.forward`; None: self-attention is as always
    isolated: bool  # modality guidance: True leaves the exchange out, so that each stream is alone


@dataclass(frozen=True)
class StreamLayer:
    """The weights of one stream in one block, and its sub-layers. Video and audio are two of these."""

    self_attn: Attention
    text_attn: Attention
    exchange_attn: Attention  # queries from this stream, keys and values from the other one
    ff: FeedForward
    table: Tensor  # (6|9, D)
    text_table: Tensor | None  # (2, D), from 2.3 on
    exchange_table: Tensor  # (5, D)

    def self_attention(self, x: Tensor, c: Conditioning, keep: Tensor | None) -> Tensor:
        shift, scale, gate = rows(self.table[0:3], c.offsets[:, :, 0:3])
        h = modulate(rms_norm(x), shift, scale)
        return x + gate * self.self_attn(h, h, (c.rope, c.rope), c.self_mask, keep)

    def text_attention(self, x: Tensor, c: Conditioning) -> Tensor:
        h = rms_norm(x)
        text = self.text_context(c)
        if len(self.table) == 6:  # in 2.0 neither the queries are modulated nor the result is gated
            return x + self.text_attn(h, text, mask=c.text_mask)
        shift, scale, gate = rows(self.table[6:9], c.offsets[:, :, 6:9])
        return x + gate * self.text_attn(modulate(h, shift, scale), text, mask=c.text_mask)

    def text_context(self, c: Conditioning) -> Tensor:
        if self.text_table is None:
            return c.text
        shift, scale = rows(self.text_table, c.text_offsets)
        return modulate(c.text, shift, scale)

    def for_exchange(self, h: Tensor, c: Conditioning, direction: slice) -> Tensor:
        """Modulate this stream, normalised, as the queries or the context of a direction. Rows are (scale, shift)."""
        scale, shift = rows(self.exchange_table[direction], c.exchange_offsets[:, :, direction])
        return modulate(h, shift, scale)

    def received(self, query: Tensor, context: Tensor, c: Conditioning, context_rope: Rope) -> Tensor:
        (gate,) = rows(self.exchange_table[EXCHANGE_GATE], c.exchange_gate_offset)
        return gate * self.exchange_attn(query, context, (c.exchange_rope, context_rope))

    def feed_forward(self, x: Tensor, c: Conditioning) -> Tensor:
        shift, scale, gate = rows(self.table[3:6], c.offsets[:, :, 3:6])
        return x + gate * self.ff(modulate(rms_norm(x), shift, scale))

    def alone(self, x: Tensor, c: Conditioning | None, keep: Tensor | None) -> Tensor:
        """Pass through the block without an exchange. An absent stream stays as it is: without tokens."""
        if c is None:
            return x
        x = self.self_attention(x, c, keep)
        x = self.text_attention(x, c)
        return self.feed_forward(x, c)


def exchange(
    video: StreamLayer, audio: StreamLayer, vx: Tensor, ax: Tensor, vc: Conditioning, ac: Conditioning
) -> tuple[Tensor, Tensor]:
    """Let each stream attend to the other. Both directions read the streams as they were before the exchange."""
    vh = rms_norm(vx)
    ah = rms_norm(ax)
    to_video = video.received(
        query=video.for_exchange(vh, vc, AUDIO_TO_VIDEO),
        context=audio.for_exchange(ah, ac, AUDIO_TO_VIDEO),
        c=vc,
        context_rope=ac.exchange_rope,
    )
    to_audio = audio.received(
        query=audio.for_exchange(ah, ac, VIDEO_TO_AUDIO),
        context=video.for_exchange(vh, vc, VIDEO_TO_AUDIO),
        c=ac,
        context_rope=vc.exchange_rope,
    )
    return vx + to_video, ax + to_audio


class Block(nn.Module):
    """The parameters have diffusers' names; `video` and `audio` say which of them does what."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        v = config.video
        a = config.audio

        def attention(x: StreamSizes, context: StreamSizes, heads: StreamSizes) -> Attention:
            return Attention(x.dim, context.dim, heads.num_heads, heads.head_dim, x.gated_attn, config.rope_type)

        self.attn1 = attention(v, v, v)
        self.audio_attn1 = attention(a, a, a)
        self.attn2 = attention(v, v, v)
        self.audio_attn2 = attention(a, a, a)
        self.audio_to_video_attn = attention(v, a, heads=a)
        self.video_to_audio_attn = attention(a, v, heads=a)
        self.ff = FeedForward(v.dim, v.ff_bias)
        self.audio_ff = FeedForward(a.dim, a.ff_bias)
        self.scale_shift_table = learned_rows(v.num_rows, v.dim)
        self.audio_scale_shift_table = learned_rows(a.num_rows, a.dim)
        self.video_a2v_cross_attn_scale_shift_table = learned_rows(5, v.dim)
        self.audio_a2v_cross_attn_scale_shift_table = learned_rows(5, a.dim)
        self.prompt_scale_shift_table = learned_rows(2, v.dim) if config.has_text_tables else None
        self.audio_prompt_scale_shift_table = learned_rows(2, a.dim) if config.has_text_tables else None

    @property
    def video(self) -> StreamLayer:
        return StreamLayer(
            self_attn=self.attn1,
            text_attn=self.attn2,
            exchange_attn=self.audio_to_video_attn,
            ff=self.ff,
            table=self.scale_shift_table,
            text_table=self.prompt_scale_shift_table,
            exchange_table=self.video_a2v_cross_attn_scale_shift_table,
        )

    @property
    def audio(self) -> StreamLayer:
        return StreamLayer(
            self_attn=self.audio_attn1,
            text_attn=self.audio_attn2,
            exchange_attn=self.video_to_audio_attn,
            ff=self.audio_ff,
            table=self.audio_scale_shift_table,
            text_table=self.audio_prompt_scale_shift_table,
            exchange_table=self.audio_a2v_cross_attn_scale_shift_table,
        )

    def forward(
        self, vx: Tensor, ax: Tensor, vc: Conditioning | None, ac: Conditioning | None, perturbation: Perturbation
    ) -> tuple[Tensor, Tensor]:
        video = self.video
        audio = self.audio
        if vc is None or ac is None or perturbation.isolated:
            return video.alone(vx, vc, perturbation.keep), audio.alone(ax, ac, perturbation.keep)
        vx = video.self_attention(vx, vc, perturbation.keep)
        ax = audio.self_attention(ax, ac, perturbation.keep)
        vx = video.text_attention(vx, vc)
        ax = audio.text_attention(ax, ac)
        vx, ax = exchange(video, audio, vx, ax, vc, ac)
        return video.feed_forward(vx, vc), audio.feed_forward(ax, ac)


def learned_rows(num_rows: int, dim: int) -> nn.Parameter:
    """Return a table to be learned, at first random: with zeros, no test of a new model could see a table ignored."""
    return nn.Parameter(torch.randn(num_rows, dim) * dim**-0.5)
