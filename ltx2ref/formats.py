"""The two published config formats as literal tables, and the translation between plain dicts of them.

Field names are diffusers', whose config is a dict of fields. A Lightricks file states the same facts with other keys,
fewer flags and some other values.
"""

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

# Keys that each format has although their values are the same in every published file.
DIFFUSERS_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_out_bias": True,
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
    "audio_pos_embed_max_pos": 20,
    "base_height": 2048,
    "base_width": 2048,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "patch_size": 1,
    "patch_size_t": 1,
    "pos_embed_max_pos": 20,
    "qk_norm": "rms_norm_across_heads",
}
LIGHTRICKS_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "audio_positional_embedding_max_pos": [20],
    "av_cross_ada_norm": True,
    "causal_temporal_positioning": True,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}
# Fields that a Lightricks file does not state. Its causal_temporal_positioning means causal_offset = 1.
LIGHTRICKS_IMPLIED = {
    "audio_hop_length": 160,
    "audio_sampling_rate": 16000,
    "audio_scale_factor": 4,
    "causal_offset": 1,
    "vae_scale_factors": (8, 32, 32),
}
# For each Lightricks key, the fields here. One flag there may set several fields.
LIGHTRICKS_NAMES: dict[str, tuple[str, ...]] = {
    "apply_gated_attention": ("gated_attn", "audio_gated_attn"),
    "attention_head_dim": ("attention_head_dim",),
    "audio_attention_head_dim": ("audio_attention_head_dim",),
    "audio_cross_attention_dim": ("audio_cross_attention_dim",),
    "audio_ff_bias": ("audio_ff_bias",),
    "audio_in_channels": ("audio_in_channels",),
    "audio_num_attention_heads": ("audio_num_attention_heads",),
    "audio_out_channels": ("audio_out_channels",),
    "av_ca_timestep_scale_multiplier": ("cross_attn_timestep_scale_multiplier",),
    "caption_channels": ("caption_channels",),
    "caption_proj_before_connector": ("use_prompt_embeddings",),
    "cross_attention_adaln": ("cross_attn_mod", "audio_cross_attn_mod", "perturbed_attn"),
    "cross_attention_dim": ("cross_attention_dim",),
    "ff_bias": ("ff_bias",),
    "frequencies_precision": ("rope_double_precision",),
    "in_channels": ("in_channels",),
    "num_attention_heads": ("num_attention_heads",),
    "num_layers": ("num_layers",),
    "out_channels": ("out_channels",),
    "positional_embedding_theta": ("rope_theta",),
    "rope_type": ("rope_type",),
    "timestep_scale_multiplier": ("timestep_scale_multiplier",),
    "use_keyframes_abs_pos_embedding": ("use_keyframes_abs_pos_embedding",),
    "use_prompt_adaln_single": ("use_prompt_adaln_single",),
}
# For each Lightricks key whose values differ as well, pairs of the value there and the value here.
LIGHTRICKS_VALUES = {
    "caption_proj_before_connector": ((True, False), (False, True)),
    "frequencies_precision": (("float64", True), ("float32", False)),
}
# The values of keys that a Lightricks file may leave out, as 2.0 does with most. All other keys must be present.
LIGHTRICKS_ABSENT = {
    "apply_gated_attention": False,
    "audio_ff_bias": True,
    "audio_in_channels": 128,
    "caption_proj_before_connector": False,
    "cross_attention_adaln": False,
    "ff_bias": True,
    "use_keyframes_abs_pos_embedding": False,
    "use_prompt_adaln_single": True,
}
# Prefixes of Lightricks keys that do not concern the transformer. Keys in the tables above are exceptions.
LIGHTRICKS_FOREIGN = ("_", "connector_", "audio_connector_", "caption_proj", "text_encoder_norm_type")


class ConfigError(ValueError):
    """An error for a config that is malformed, or that describes a model which no release and no oracle has."""


def require_supported(holds: bool, name: str, value: object, expected: object) -> None:
    """Raise `ConfigError`, with the value and what is expected, unless something holds."""
    if not holds:
        raise ConfigError(f"{name} = {value!r} is not supported: expected {expected}")


def read_diffusers(config: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Return the fields of a diffusers `config.json` that are `known`.

    Raises `ConfigError` if another field has any value but the published one.
    """
    given = {}
    for key, value in config.items():
        if key in known:  # JSON has no tuples
            given[key] = tuple(value) if isinstance(value, list) else value
        elif not key.startswith("_"):
            expected = DIFFUSERS_FIXED.get(key, "no such field")  # unknown fields are errors, unlike Lightricks'
            require_supported(key in DIFFUSERS_FIXED and value == expected, key, value, expected)
    return given


def read_lightricks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that `config["transformer"]` in a Lightricks file's metadata states.

    Unknown keys cause warnings. Raises `ConfigError` for a missing key and for a value that is not supported.
    """
    for key in sorted(LIGHTRICKS_NAMES.keys() - LIGHTRICKS_ABSENT.keys() - config.keys()):
        raise ConfigError(f"{key} is missing from the Lightricks config and has no default there")
    given: dict[str, Any] = dict(LIGHTRICKS_IMPLIED)
    for key, value in (LIGHTRICKS_ABSENT | dict(config)).items():
        if key in LIGHTRICKS_NAMES:
            given |= dict.fromkeys(LIGHTRICKS_NAMES[key], translated(key, value))
        elif key in LIGHTRICKS_FIXED:
            require_supported(value == LIGHTRICKS_FIXED[key], key, value, LIGHTRICKS_FIXED[key])
        elif not key.startswith(LIGHTRICKS_FOREIGN):
            warnings.warn(f"{key} = {value!r}: unknown key of a Lightricks config, ignored", stacklevel=3)
    return given


def translated(key: str, value: Any) -> Any:
    """Return the value here of a value in a Lightricks config. Raises `ConfigError` if it is not supported."""
    flag = isinstance(LIGHTRICKS_ABSENT.get(key), bool)
    values = LIGHTRICKS_VALUES.get(key, ((True, True), (False, False)) if flag else ((value, value),))
    ours = [ours for theirs, ours in values if theirs == value and type(theirs) is type(value)]
    require_supported(len(ours) == 1, key, value, " or ".join(repr(theirs) for theirs, _ in values))
    return ours[0]


def write_lightricks(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Lightricks config for these fields, the inverse of `read_lightricks`.

    Raises `ConfigError` for fields that the format cannot express.
    """
    config: dict[str, Any] = {"_class_name": "AVTransformer3DModel"} | deepcopy(LIGHTRICKS_FIXED)
    for key, (name, *_) in LIGHTRICKS_NAMES.items():
        values = LIGHTRICKS_VALUES.get(key, ())
        config[key] = next((theirs for theirs, ours in values if ours == fields[name]), fields[name])
    for name, said in read_lightricks(config).items():
        require_supported(fields[name] == said, name, fields[name], f"{said}: Lightricks configs cannot express it")
    return {key: value for key, value in config.items() if value != LIGHTRICKS_ABSENT.get(key, ...)}
