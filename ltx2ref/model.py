"""The model: two streams enter, pass through the blocks together, and leave."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

from .attention import attention_bias, text_mask
from .block import Block, Conditioning, table
from .config import StreamConfig, TransformerConfig
from .conventions import BY_OTHER, DIFFUSERS, Conventions
from .embeddings import AdaLayerNormSingle, TextProjection
from .inputs import StreamInputs, attention_masks, check_options, check_stream
from .modulation import EPS, modulate, rows
from .rope import audio_positions, rotation, video_positions


class AudioVisualModelOutput(NamedTuple):
    """The velocities of both streams, (B, Tv, C) and (B, Ta, C): by attribute, by key or by index."""

    sample: Tensor
    audio_sample: Tensor

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)

    def to_tuple(self) -> tuple[Tensor, Tensor]:
        return self.sample, self.audio_sample


@dataclass(frozen=True)
class StreamEnds:
    """One stream's way into the blocks and out of them. Video and audio are both this."""

    config: TransformerConfig
    stream: StreamConfig
    proj_in: nn.Linear
    keyframes: Tensor | None  # (1, D), added to the tokens of keyframes
    text_projection: TextProjection | None
    time_embed: AdaLayerNormSingle  # 6|9 rows
    prompt_embed: AdaLayerNormSingle | None  # 2 rows
    cross_embed: AdaLayerNormSingle  # 4 rows
    gate_embed: AdaLayerNormSingle  # 1 row
    table: Tensor  # (2, D)
    proj_out: nn.Linear

    def enter(
        self, s: StreamInputs, coords: Tensor, cross: list[Tensor], how: Conventions, isolated: bool
    ) -> tuple[Tensor, Tensor, Conditioning]:
        """Tokens (B, T, D), timestep embedding (B, T|1, D), and what stays the same through all blocks."""
        config, dtype, wide = self.config, s.latent.dtype, torch.promote_types(s.latent.dtype, torch.float32)
        dtypes = wide, dtype if how.rotation_dtype == "model" else None  # of frequencies, of RoPE tables
        x, (mod, emb) = self.proj_in(s.latent), self.time_embed(s.timestep)
        if s.keyframes is not None and self.keyframes is not None:
            x = torch.where(s.keyframes > 0, x + self.keyframes, x)
        # 1 in every checkpoint. A port with a code's default, 1/1000, sounded garbled for months.
        gate_factor = config.cross_attn_timestep_scale_multiplier / config.timestep_scale_multiplier
        return (
            x,
            emb,
            Conditioning(
                mod=mod,
                text=s.text if self.text_projection is None else self.text_projection(s.text),
                text_mod=None if self.prompt_embed is None else self.prompt_embed(s.sigma)[0],
                text_mask=None if s.text_mask is None else text_mask(s.text_mask, dtype, how.text_mask_bias),
                self_mask=None
                if s.self_mask is None
                else attention_bias(s.self_mask, dtype, how.self_mask_bias)[:, None],
                cross_mod=self.cross_embed(cross[0])[0],
                cross_gate=self.gate_embed(cross[1] * gate_factor)[0],
                rope=rotation(coords, self.stream.max_position, self.stream.dim, config, *dtypes),
                cross_rope=rotation(coords[:, :1], config.audio.max_position, config.audio.dim, config, *dtypes),
                isolated=isolated,
            ),
        )

    def leave(self, x: Tensor, emb: Tensor) -> Tensor:
        shift, scale = rows(self.table, emb[:, :, None])  # the same emb for both rows
        return self.proj_out(modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), scale, shift))


class LTX2VideoTransformer3DModel(nn.Module):
    """The LTX-2 audio-video diffusion transformer, releases 2.0, 2.3 and 2.5, under diffusers' names."""

    def __init__(self, config: TransformerConfig, conventions: Conventions = DIFFUSERS) -> None:
        super().__init__()
        self.config, self.conventions = config, conventions
        v, a, ada = config.video, config.audio, AdaLayerNormSingle
        self.proj_in, self.audio_proj_in = nn.Linear(v.in_channels, v.dim), nn.Linear(a.in_channels, a.dim)
        self.time_embed, self.audio_time_embed = ada(v.dim, v.mod_rows), ada(a.dim, a.mod_rows)
        self.av_cross_attn_video_scale_shift = ada(v.dim, 4)
        self.av_cross_attn_audio_scale_shift = ada(a.dim, 4)
        self.av_cross_attn_video_a2v_gate, self.av_cross_attn_audio_v2a_gate = ada(v.dim, 1), ada(a.dim, 1)
        self.caption_projection = self.audio_caption_projection = None
        if config.use_prompt_embeddings:
            self.caption_projection = TextProjection(config.caption_channels, v.dim)
            self.audio_caption_projection = TextProjection(config.caption_channels, a.dim)
        self.prompt_adaln = self.audio_prompt_adaln = self.keyframes_abs_pos_embedding = None
        if config.modulated_text and config.use_prompt_adaln_single:
            self.prompt_adaln, self.audio_prompt_adaln = ada(v.dim, 2), ada(a.dim, 2)
        if config.use_keyframes_abs_pos_embedding:
            self.keyframes_abs_pos_embedding = table(1, v)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table, self.audio_scale_shift_table = table(2, v), table(2, a)
        self.proj_out, self.audio_proj_out = (nn.Linear(x.dim, x.out_channels) for x in (v, a))

    @property
    def video(self) -> StreamEnds:
        return StreamEnds(
            self.config,
            self.config.video,
            self.proj_in,
            self.keyframes_abs_pos_embedding,
            self.caption_projection,
            self.time_embed,
            self.prompt_adaln,
            self.av_cross_attn_video_scale_shift,
            self.av_cross_attn_video_a2v_gate,
            self.scale_shift_table,
            self.proj_out,
        )

    @property
    def audio(self) -> StreamEnds:
        return StreamEnds(
            self.config,
            self.config.audio,
            self.audio_proj_in,
            None,
            self.audio_caption_projection,
            self.audio_time_embed,
            self.audio_prompt_adaln,
            self.av_cross_attn_audio_scale_shift,
            self.av_cross_attn_audio_v2a_gate,
            self.audio_scale_shift_table,
            self.audio_proj_out,
        )

    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        timestep: LongTensor,
        audio_timestep: LongTensor | None = None,
        sigma: Tensor | None = None,
        audio_sigma: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float = 24.0,
        audio_num_frames: int | None = None,
        video_coords: Tensor | None = None,
        audio_coords: Tensor | None = None,
        isolate_modalities: bool = False,
        spatio_temporal_guidance_blocks: list[int] | None = None,
        perturbation_mask: Tensor | None = None,
        use_cross_timestep: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> AudioVisualModelOutput | tuple[Tensor, Tensor]:
        """Predict both velocities from the documented arguments; for shapes see `StreamInputs`.

        Timesteps and sigmas come times `timestep_scale_multiplier`; audio's default to video's. With
        `use_cross_timestep` the other stream's sigma drives the exchange. `perturbation_mask`, (B,) or
        (B, 1, 1), is 0 where guidance blocks are perturbed. Errors name the argument (`check_stream`).
        """
        config, how, dtype = self.config, self.conventions, self.proj_in.weight.dtype
        video = StreamInputs(
            "",
            hidden_states,
            encoder_hidden_states,
            timestep,
            sigma,
            encoder_attention_mask,
            video_coords,
            (num_frames, height, width),
            **attention_masks(attention_kwargs),
        )
        audio = StreamInputs(
            "audio_",
            audio_hidden_states,
            audio_encoder_hidden_states,
            timestep if audio_timestep is None else audio_timestep,
            sigma if audio_sigma is None else audio_sigma,
            audio_encoder_attention_mask,
            audio_coords,
            (audio_num_frames,),
        )
        check_stream(video, config.video, "B", dtype)
        check_stream(audio, config.audio, len(hidden_states), dtype)
        guided = config.perturbed_attn or how.guidance == "always"
        check_options(config, video, fps, spatio_temporal_guidance_blocks, perturbation_mask, guided)
        by_other = BY_OTHER.get(how.exchange, (use_cross_timestep, use_cross_timestep))
        if sigma is None and (any(by_other) or self.prompt_adaln is not None):
            raise ValueError("sigma: expected a tensor, for prompt_adaln or use_cross_timestep; got None")
        if dtype == torch.float64:  # the truth that others are measured against: never through float32
            video, audio = video.double(), audio.double()

        like = hidden_states.new_empty(0, dtype=torch.promote_types(dtype, torch.float32))
        into = dtype if how.positions_dtype == "model" else like.dtype
        vp = video_positions(video.grid, fps, config, like).to(into) if video.coords is None else video.coords
        ap = audio_positions(audio.grid, config, like) if audio.coords is None else audio.coords
        v_cross = [audio.sigma if other else video.timestep for other in by_other]
        a_cross = [video.sigma if other else audio.timestep for other in by_other]
        vx, v_emb, vc = self.video.enter(video, vp, v_cross, how, isolate_modalities)
        ax, a_emb, ac = self.audio.enter(audio, ap, a_cross, how, isolate_modalities)

        keep = vx.new_zeros(1) if perturbation_mask is None else perturbation_mask.to(dtype)
        perturbed = set(spatio_temporal_guidance_blocks or ()) if guided else set()
        for i, block in enumerate(self.transformer_blocks):
            vx, ax = block(vx, ax, vc, ac, keep.reshape(-1, 1, 1) if i in perturbed else None)
        output = AudioVisualModelOutput(self.video.leave(vx, v_emb), self.audio.leave(ax, a_emb))
        return output if return_dict else output.to_tuple()
