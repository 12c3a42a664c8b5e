"""Sizes and presence facts of a transformer, and the two published formats that hold them."""
from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

# What each format spells out although it is the same in every published file: checked, and otherwise constant.
DIFFUSERS_FIXED = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "attention_out_bias": True, "patch_size": 1,
    "patch_size_t": 1, "audio_patch_size": 1, "audio_patch_size_t": 1, "pos_embed_max_pos": 20, "base_height": 2048,
    "base_width": 2048, "audio_pos_embed_max_pos": 20, "norm_elementwise_affine": False, "norm_eps": 1e-6,
    "qk_norm": "rms_norm_across_heads",
}
LIGHTRICKS_FIXED = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "attention_type": "default", "dropout": 0.0,
    "audio_positional_embedding_max_pos": [20], "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_type": "rope", "causal_temporal_positioning": True, "use_middle_indices_grid": True,
    "norm_elementwise_affine": False, "norm_eps": 1e-6, "norm_num_groups": 32, "num_embeds_ada_norm": 1000,
    "qk_norm": "rms_norm", "standardization_norm": "rms_norm", "cross_attention_norm": True, "share_ff": False,
    "av_cross_ada_norm": True, "use_audio_video_cross_attention": True, "use_embeddings_connector": True,
    "double_self_attention": False, "only_cross_attention": False, "upcast_attention": False,
    "use_linear_projection": False, "num_vector_embeds": None,
}
LIGHTRICKS_NAMES = {  # their key: our fields, where one flag of theirs is several of ours, or has another name
    "apply_gated_attention": ("gated_attn", "audio_gated_attn"),
    "av_ca_timestep_scale_multiplier": ("cross_attn_timestep_scale_multiplier",),
    "caption_proj_before_connector": ("use_prompt_embeddings",),
    "cross_attention_adaln": ("cross_attn_mod", "audio_cross_attn_mod", "perturbed_attn"),
    "frequencies_precision": ("rope_double_precision",),
    "positional_embedding_theta": ("rope_theta",),
} | {name: (name,) for name in (
    "in_channels", "out_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "ff_bias",
    "audio_in_channels", "audio_out_channels", "audio_num_attention_heads", "audio_attention_head_dim",
    "audio_cross_attention_dim", "audio_ff_bias", "num_layers", "caption_channels", "rope_type",
    "timestep_scale_multiplier", "use_prompt_adaln_single", "use_keyframes_abs_pos_embedding",
)}
LIGHTRICKS_VALUES = {  # their key: (their value, ours), where these differ
    "caption_proj_before_connector": ((True, False), (False, True)),
    "frequencies_precision": (("float64", True), ("float32", False)),
}
LIGHTRICKS_OPTIONAL = {  # absent: the default below. Any other key has to be there
    "apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector", "ff_bias", "audio_ff_bias",
    "use_keyframes_abs_pos_embedding", "use_prompt_adaln_single", "audio_in_channels",
}
LIGHTRICKS_FOREIGN = ("_", "connector_", "audio_connector_", "caption_proj", "text_encoder_norm_type")


class ConfigError(ValueError):
    """A configuration that is malformed, or that describes a model which no release and no oracle has."""


def require(holds: bool, name: str, value: object, expected: object) -> None:
    if not holds:
        raise ConfigError(f"{name} = {value!r} is not supported: expected {expected}")


def fits(value: Any, like: Any) -> bool:
    """Of the type of `like`, and if a number, positive."""
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
    timestep_scale_multiplier: float = 1000.0
    cross_attn_timestep_scale_multiplier: float = 1000.0
    use_prompt_embeddings: bool = True  # the text is projected inside the transformer
    use_prompt_adaln_single: bool = True  # False: the static table alone modulates the text
    use_keyframes_abs_pos_embedding: bool = False
    perturbed_attn: bool = False  # spatio-temporal guidance has an effect

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            exempt = (name, value) in (("out_channels", None), ("audio_out_channels", None), ("causal_offset", 0))
            require(exempt or fits(value, field.default), name, value, f"{field.type}, like {field.default!r}")
        for name, wanted in (
            ("audio_num_attention_heads", self.num_attention_heads), ("cross_attention_dim", self.video.dim),
            ("audio_cross_attention_dim", self.audio.dim),
        ):
            require(getattr(self, name) == wanted, name, getattr(self, name), wanted)
        for name in ("attention_head_dim", "audio_attention_head_dim"):
            require(getattr(self, name) % 2 == 0, name, getattr(self, name), "an even number")
        require(self.rope_type in ("split", "interleaved"), "rope_type", self.rope_type, "'split' or 'interleaved'")

    @property
    def video(self) -> StreamConfig:
        heads, head_dim, rows = self.num_attention_heads, self.attention_head_dim, 9 if self.cross_attn_mod else 6
        return StreamConfig(self.in_channels, self.out_channels or self.in_channels, heads, head_dim,
                            heads * head_dim, rows, self.gated_attn, self.ff_bias, (20, 2048, 2048))

    @property
    def audio(self) -> StreamConfig:
        heads, head_dim = self.audio_num_attention_heads, self.audio_attention_head_dim
        channels, rows = self.audio_in_channels, 9 if self.audio_cross_attn_mod else 6
        return StreamConfig(channels, self.audio_out_channels or channels, heads, head_dim,
                            heads * head_dim, rows, self.audio_gated_attn, self.audio_ff_bias, (20,))

    @property
    def modulated_text(self) -> bool:
        """One stream that modulates its text attention is enough for the text of both to be modulated."""
        return self.cross_attn_mod or self.audio_cross_attn_mod

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Read a diffusers `config.json`: absent keys take the class defaults, unknown ones are errors."""
        given, names = {}, {field.name for field in fields(cls)}
        for key, value in config.items():
            if key in names:  # JSON has no tuples
                given[key] = tuple(value) if isinstance(value, list) else value
            elif not key.startswith("_"):
                fixed = DIFFUSERS_FIXED.get(key, "no such field")
                require(key in DIFFUSERS_FIXED and value == fixed, key, value, fixed)
        return cls(**given)

    def to_diffusers(self) -> dict[str, Any]:
        """All 46 fields of a diffusers `config.json`."""
        return DIFFUSERS_FIXED | asdict(self) | {"vae_scale_factors": list(self.vae_scale_factors)}

    @classmethod
    def from_lightricks(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Read `config["transformer"]` of a Lightricks file's metadata: unknown keys are warnings."""
        given: dict[str, Any] = {}
        for key in LIGHTRICKS_NAMES.keys() - LIGHTRICKS_OPTIONAL - config.keys():
            raise ConfigError(f"{key} is missing from the Lightricks config, and has no default there")
        for key, value in config.items():
            if key in LIGHTRICKS_NAMES:
                ours = next((o for theirs, o in LIGHTRICKS_VALUES.get(key, ()) if theirs == value), value)
                given |= dict.fromkeys(LIGHTRICKS_NAMES[key], ours)
            elif key in LIGHTRICKS_FIXED:
                require(value == LIGHTRICKS_FIXED[key], key, value, LIGHTRICKS_FIXED[key])
            elif not key.startswith(LIGHTRICKS_FOREIGN):
                warnings.warn(f"{key} = {value!r}: unknown key of a Lightricks config, ignored", stacklevel=2)
        return cls(**given)

    def to_lightricks(self) -> dict[str, Any]:
        """The inverse of `from_lightricks`; `ConfigError` for what that format cannot say."""
        config: dict[str, Any] = {"_class_name": "AVTransformer3DModel"} | LIGHTRICKS_FIXED
        for key, (name, *_) in LIGHTRICKS_NAMES.items():
            ours = getattr(self, name)
            if key not in LIGHTRICKS_OPTIONAL or ours != getattr(type(self), name):
                config[key] = next((theirs for theirs, o in LIGHTRICKS_VALUES.get(key, ()) if o == ours), ours)
        for name, said in asdict(self.from_lightricks(config)).items():
            require(getattr(self, name) == said, name, getattr(self, name), f"{said} in a Lightricks config")
        return config


LTX_2_0 = TransformerConfig(rope_type="split")
LTX_2_3 = replace(LTX_2_0, gated_attn=True, audio_gated_attn=True, cross_attn_mod=True, audio_cross_attn_mod=True,
                  use_prompt_embeddings=False, perturbed_attn=True)
LTX_2_5 = replace(LTX_2_3, ff_bias=False, use_keyframes_abs_pos_embedding=True)
