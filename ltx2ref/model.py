"""The model: two streams enter, pass through the blocks together, and leave as velocities.

`Stream` is what one of them is given. interface.py makes it from the documented arguments.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Block, Conditioning, Perturbation, learned_rows
from .embeddings import AdaLayerNormSingle, TextProjection
from .modulation import EPS, modulate, rows
from .rope import rotation
from .sizes import Sizes, StreamSizes


class Stream(NamedTuple):
    """What one stream is given, in full: every noise level is chosen, every mask is made, coordinates are there.

    A noise level is the share of noise, 0 to 1, already times `timestep_scale_multiplier`. A stream has two: its
    `timestep`, which may differ from token to token (0 for tokens of an image that is given), and its `sigma`, the one
    number at which the sampler is. The caller chooses those of the exchange, for this stream, by one of three rules:

        scale and shift           gate                      rule of
        own timestep              own timestep              2.0, and every release without `use_cross_timestep`
        the other stream's sigma  the other stream's sigma  2.3 and 2.5 in diffusers' pipelines: `use_cross_timestep`
        own timestep              the other stream's sigma  ltx-core since 2026-05-28
    """

    latent: Tensor  # (B, T, C); (B, 0, C) leaves the stream out, and then nothing else of it is read
    text: Tensor  # (B, S, E)
    coords: Tensor  # (B|1, P, T, 2) patch bounds, or (B|1, P, T) positions: seconds, for video also pixels
    timestep: Tensor  # (B, T|1), for the rows of self-attention, text attention (queries), feed-forward and output
    sigma: Tensor | None  # (B, 1), this stream's own, for the rows of the text; None where the text has none
    exchange_timestep: Tensor  # (B, T|1), for scale and shift in the exchange; (B, 0) if the other stream is absent
    exchange_gate_timestep: Tensor  # (B, T|1), for the gate in the exchange; (B, 0) likewise
    text_mask: Tensor | None  # (B, 1, 1|T, S), see `Attention.forward`
    self_mask: Tensor | None  # (B, 1, T, T), the same for self-attention
    keyframes: Tensor | None  # (B, T, 1) bool, True for the tokens of keyframes
    tables_dtype: torch.dtype | None = None  # of RoPE: see `rotation`


@dataclass(frozen=True)
class StreamEnds:
    """The weights of one stream outside the blocks. Video and audio are two of these."""

    stream: StreamSizes
    proj_in: nn.Linear
    keyframes: Tensor | None  # (1, D), added to the tokens of keyframes
    text_projection: TextProjection | None
    time_embed: AdaLayerNormSingle  # 6 or 9 rows
    text_embed: AdaLayerNormSingle | None  # 2 rows
    exchange_embed: AdaLayerNormSingle  # 4 rows
    exchange_gate_embed: AdaLayerNormSingle  # 1 row
    table: Tensor  # (2, D)
    proj_out: nn.Linear

    def enter(self, s: Stream, config: Sizes) -> tuple[Tensor, Conditioning | None]:
        """Return tokens (B, T, D), and what the blocks take: None if the stream is absent."""
        if s.latent.shape[1] == 0:
            return s.latent, None
        x = self.proj_in(s.latent)
        if s.keyframes is not None and self.keyframes is not None:
            x = torch.where(s.keyframes, x + self.keyframes, x)
        offsets, embedding = self.time_embed(s.timestep)
        # 1000 / 1000 in every checkpoint. A port with 1 / 1000 sounded garbled for months.
        gate_factor = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier
        angles_dtype = torch.promote_types(x.dtype, torch.float32)
        return x, Conditioning(
            offsets=offsets,
            embedding=embedding,
            text=s.text if self.text_projection is None else self.text_projection(s.text),
            text_offsets=None if self.text_embed is None else self.text_embed(s.sigma)[0],
            text_mask=s.text_mask,
            self_mask=s.self_mask,
            exchange_offsets=self.exchange_embed(s.exchange_timestep)[0],
            exchange_gate_offset=self.exchange_gate_embed(s.exchange_gate_timestep * gate_factor)[0],
            rope=rotation(s.coords, self.stream, config, angles_dtype, s.tables_dtype),
            # The exchange happens at audio's width and heads, and over audio's one axis, time.
            exchange_rope=rotation(s.coords[:, :1], config.audio, config, angles_dtype, s.tables_dtype),
        )

    def leave(self, x: Tensor, c: Conditioning | None) -> Tensor:
        """Return the velocity (B, T, C) of each token."""
        if c is None:
            return x.new_empty(len(x), 0, self.stream.out_channels)
        shift, scale = rows(self.table, c.embedding[:, :, None])  # the same embedding is added to both rows
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS)
        return self.proj_out(modulate(normed, shift, scale))


class LTX2Transformer(nn.Module):
    """The model itself. The parameters have diffusers' names; `video` and `audio` say which of them does what."""

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.config = config
        v = config.video
        a = config.audio
        self.proj_in = nn.Linear(v.in_channels, v.dim)
        self.audio_proj_in = nn.Linear(a.in_channels, a.dim)
        self.time_embed = AdaLayerNormSingle(v.dim, v.num_rows)
        self.audio_time_embed = AdaLayerNormSingle(a.dim, a.num_rows)
        self.av_cross_attn_video_scale_shift = AdaLayerNormSingle(v.dim, 4)
        self.av_cross_attn_audio_scale_shift = AdaLayerNormSingle(a.dim, 4)
        self.av_cross_attn_video_a2v_gate = AdaLayerNormSingle(v.dim, 1)
        self.av_cross_attn_audio_v2a_gate = AdaLayerNormSingle(a.dim, 1)
        self.caption_projection = None
        self.audio_caption_projection = None
        if config.use_prompt_embeddings:
            self.caption_projection = TextProjection(config.caption_channels, v.dim)
            self.audio_caption_projection = TextProjection(config.caption_channels, a.dim)
        self.prompt_adaln = None
        self.audio_prompt_adaln = None
        if config.has_text_tables and config.use_prompt_adaln_single:
            self.prompt_adaln = AdaLayerNormSingle(v.dim, 2)
            self.audio_prompt_adaln = AdaLayerNormSingle(a.dim, 2)
        keyframes = learned_rows(1, v.dim) if config.use_keyframes_abs_pos_embedding else None
        self.keyframes_abs_pos_embedding = keyframes
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = learned_rows(2, v.dim)
        self.audio_scale_shift_table = learned_rows(2, a.dim)
        self.proj_out = nn.Linear(v.dim, v.out_channels)
        self.audio_proj_out = nn.Linear(a.dim, a.out_channels)

    @property
    def video(self) -> StreamEnds:
        return StreamEnds(
            stream=self.config.video,
            proj_in=self.proj_in,
            keyframes=self.keyframes_abs_pos_embedding,
            text_projection=self.caption_projection,
            time_embed=self.time_embed,
            text_embed=self.prompt_adaln,
            exchange_embed=self.av_cross_attn_video_scale_shift,
            exchange_gate_embed=self.av_cross_attn_video_a2v_gate,
            table=self.scale_shift_table,
            proj_out=self.proj_out,
        )

    @property
    def audio(self) -> StreamEnds:
        return StreamEnds(
            stream=self.config.audio,
            proj_in=self.audio_proj_in,
            keyframes=None,
            text_projection=self.audio_caption_projection,
            time_embed=self.audio_time_embed,
            text_embed=self.audio_prompt_adaln,
            exchange_embed=self.av_cross_attn_audio_scale_shift,
            exchange_gate_embed=self.av_cross_attn_audio_v2a_gate,
            table=self.audio_scale_shift_table,
            proj_out=self.audio_proj_out,
        )

    def velocities(
        self, video: Stream, audio: Stream, keep: Tensor, perturbed_blocks: set[int], isolated: bool
    ) -> tuple[Tensor, Tensor]:
        """Predict the velocities of video (B, T, C) and of audio (B, T, C), or (B, 0, C) of one that is absent.

        `keep` acts in `perturbed_blocks` alone, and `isolated` in all blocks: see `Perturbation`.
        """
        vx, vc = self.video.enter(video, self.config)
        ax, ac = self.audio.enter(audio, self.config)
        for i, block in enumerate(self.transformer_blocks):
            perturbation = Perturbation(keep if i in perturbed_blocks else None, isolated)
            vx, ax = block(vx, ax, vc, ac, perturbation)
        return self.video.leave(vx, vc), self.audio.leave(ax, ac)
