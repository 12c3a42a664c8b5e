"""Sizes and presence facts of a transformer."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from . import formats


def fits(value: Any, like: Any) -> bool:
    """Of the type of `like` and, if a number, positive."""
    if isinstance(like, tuple):
        return isinstance(value, tuple) and len(value) == len(like) and all(map(fits, value, like))
    if isinstance(like, bool | str):
        return type(value) is type(like)
    return type(value) in (int, type(like)) and 0 < value < math.inf


class StreamConfig(NamedTuple):
    """One stream's share of a `TransformerConfig`."""

    in_channels: int
    out_channels: int
    num_heads: int
    head_dim: int
    dim: int
    mod_rows: int  # 9 with modulated and gated text attention, else 6
    gated_attn: bool  # a gate per head on the three attentions that write into this stream
    ff_bias: bool
    text_dim: int  # of the text as it arrives: projected in the model, or already `dim` wide
    max_position: tuple[int, ...]  # (s, px, px) or (s,): seconds, not latent frames


@dataclass(frozen=True)
class TransformerConfig:
    """What distinguishes one LTX-2 transformer from another, under the names of diffusers' `config.json`.

    The defaults are those of the diffusers class, because shipped 2.0 files rely on them: mind `rope_type`.
    Raises `ConfigError` for a wrong type, and for sizes that the oracles refuse or compute nonsense with.
    """

    in_channels: int = 128
    out_channels: int | None = 128  # None: as in_channels
    num_attention_heads: int = 32
    attention_head_dim: int = 128
    cross_attention_dim: int = 4096
    vae_scale_factors: tuple[int, int, int] = (8, 32, 32)  # frames, height, width
    gated_attn: bool = False
    cross_attn_mod: bool = False
    ff_bias: bool = True
    audio_in_channels: int = 128
    audio_out_channels: int | None = 128
    audio_num_attention_heads: int = 32
    audio_attention_head_dim: int = 64
    audio_cross_attention_dim: int = 2048
    audio_scale_factor: int = 4
    audio_sampling_rate: int = 16000
    audio_hop_length: int = 160
    audio_gated_attn: bool = False
    audio_cross_attn_mod: bool = False
    audio_ff_bias: bool = True
    num_layers: int = 48
    caption_channels: int = 3840
    rope_type: str = "interleaved"  # every checkpoint says "split"
    rope_theta: float = 10000.0
    rope_double_precision: bool = True
    causal_offset: int = 1
    timestep_scale_multiplier: float = 1000
    cross_attn_timestep_scale_multiplier: float = 1000
    use_prompt_embeddings: bool = True  # the text is projected inside the transformer
    use_prompt_adaln_single: bool = True  # False: the static table alone modulates the text
    use_keyframes_abs_pos_embedding: bool = False
    perturbed_attn: bool = False  # spatio-temporal guidance has an effect

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value, like = field.name, getattr(self, field.name), field.default
            good = fits(value, like) or (field.type is float and fits(value, 1.0))
            good |= f"{name} {value!r}" in ("out_channels None", "audio_out_channels None", "causal_offset 0")
            formats.require_supported(good, name, value, f"one like {like!r}")
        for name, holds, expected in (
            ("audio_num_attention_heads", self.audio.num_heads == self.video.num_heads, self.video.num_heads),
            ("cross_attention_dim", self.cross_attention_dim == self.video.dim, self.video.dim),
            ("audio_cross_attention_dim", self.audio_cross_attention_dim == self.audio.dim, self.audio.dim),
            ("attention_head_dim", self.attention_head_dim % 2 == 0, "an even number"),
            ("audio_attention_head_dim", self.audio_attention_head_dim % 2 == 0, "an even number"),
            ("rope_type", self.rope_type in ("split", "interleaved"), "'split' or 'interleaved'"),
        ):
            formats.require_supported(holds, name, getattr(self, name), expected)

    @property
    def video(self) -> StreamConfig:
        channels, heads, head_dim = self.in_channels, self.num_attention_heads, self.attention_head_dim
        dim, rows = heads * head_dim, 9 if self.cross_attn_mod else 6
        text_dim = self.caption_channels if self.use_prompt_embeddings else dim
        return StreamConfig(
            channels,
            self.out_channels or channels,
            heads,
            head_dim,
            dim,
            rows,
            self.gated_attn,
            self.ff_bias,
            text_dim,
            (20, 2048, 2048),
        )

    @property
    def audio(self) -> StreamConfig:
        channels, heads = self.audio_in_channels, self.audio_num_attention_heads
        head_dim, rows = self.audio_attention_head_dim, 9 if self.audio_cross_attn_mod else 6
        text_dim = self.caption_channels if self.use_prompt_embeddings else heads * head_dim
        return StreamConfig(
            channels,
            self.audio_out_channels or channels,
            heads,
            head_dim,
            heads * head_dim,
            rows,
            self.audio_gated_attn,
            self.audio_ff_bias,
            text_dim,
            (20,),
        )

    @property
    def modulated_text(self) -> bool:
        return self.cross_attn_mod or self.audio_cross_attn_mod  # one is enough, and then for both

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read a diffusers `config.json`: absent keys take the class defaults, unknown ones are errors."""
        return cls(**formats.read_diffusers(config, {field.name for field in fields(cls)}))

    def to_diffusers(self) -> dict[str, Any]:
        """All 46 fields of a diffusers `config.json`."""
        return formats.DIFFUSERS_FIXED | asdict(self) | {"vae_scale_factors": list(self.vae_scale_factors)}

    @classmethod
    def from_lightricks(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read `config["transformer"]` of a Lightricks file's metadata: unknown keys are warnings."""
        return cls(**formats.read_lightricks(config))

    def to_lightricks(self) -> dict[str, Any]:
        """The inverse of `from_lightricks`; `ConfigError` for what that format cannot say."""
        return formats.write_lightricks(asdict(self))


LTX_2_0 = TransformerConfig(rope_type="split")
LTX_2_3 = replace(
    LTX_2_0,
    gated_attn=True,
    audio_gated_attn=True,
    cross_attn_mod=True,
    audio_cross_attn_mod=True,
    use_prompt_embeddings=False,
    perturbed_attn=True,
)
LTX_2_5 = replace(LTX_2_3, ff_bias=False, use_keyframes_abs_pos_embedding=True)
