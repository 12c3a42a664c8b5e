"""Configs of both published formats are read and written without loss; the unsupported is refused by name.

pytest tests/model/test_config.py
"""

import copy
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest
from diffusers import LTX2VideoTransformer3DModel as DiffusersModel
from hypothesis import given, settings
from hypothesis import strategies as st

from ltx2ref import LTX_2_0, LTX_2_3, LTX_2_5, ConfigError, TransformerConfig

Config = dict[str, Any]
PRESETS = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}

# transformer/config.json of Lightricks/LTX-2 as published. Those of 2.3 and 2.5 have these fields as well.
DIFFUSERS_2_0: Config = {
    "_class_name": "LTX2VideoTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 128,
    "attention_out_bias": True,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_hop_length": 160,
    "audio_in_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "audio_patch_size": 1,
    "audio_patch_size_t": 1,
    "audio_pos_embed_max_pos": 20,
    "audio_sampling_rate": 16000,
    "audio_scale_factor": 4,
    "base_height": 2048,
    "base_width": 2048,
    "caption_channels": 3840,
    "causal_offset": 1,
    "cross_attention_dim": 4096,
    "cross_attn_timestep_scale_multiplier": 1000,
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "num_attention_heads": 32,
    "num_layers": 48,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "pos_embed_max_pos": 20,
    "qk_norm": "rms_norm_across_heads",
    "rope_double_precision": True,
    "rope_theta": 10000.0,
    "rope_type": "split",
    "timestep_scale_multiplier": 1000,
    "vae_scale_factors": [8, 32, 32],
}
DIFFUSERS_2_3 = DIFFUSERS_2_0 | {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
DIFFUSERS_2_5 = DIFFUSERS_2_3 | {
    "ff_bias": False,
    "audio_ff_bias": True,
    "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": True,
}
DIFFUSERS = {"2.0": DIFFUSERS_2_0, "2.3": DIFFUSERS_2_3, "2.5": DIFFUSERS_2_5}

# config["transformer"] in the metadata of Lightricks' files: first what is equal in all three releases, then the rest.
LIGHTRICKS_ALL: Config = {
    "_class_name": "AVTransformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 128,
    "attention_type": "default",
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "audio_positional_embedding_max_pos": [20],
    "av_ca_timestep_scale_multiplier": 1000.0,
    "av_cross_ada_norm": True,
    "caption_channels": 3840,
    "causal_temporal_positioning": True,
    "connector_attention_head_dim": 128,
    "connector_norm_output": True,
    "connector_num_learnable_registers": 128,
    "connector_positional_embedding_max_pos": [4096],
    "cross_attention_dim": 4096,
    "cross_attention_norm": True,
    "double_self_attention": False,
    "dropout": 0.0,
    "frequencies_precision": "float64",
    "in_channels": 128,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "num_attention_heads": 32,
    "num_embeds_ada_norm": 1000,
    "num_layers": 48,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 128,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "rope_type": "split",
    "share_ff": False,
    "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
    "upcast_attention": False,
    "use_audio_video_cross_attention": True,
    "use_embeddings_connector": True,
    "use_linear_projection": False,
    "use_middle_indices_grid": True,
}
LIGHTRICKS_2_0 = LIGHTRICKS_ALL | {
    "_diffusers_version": "0.25.1",
    "connector_num_attention_heads": 30,
    "connector_num_layers": 2,
}
LIGHTRICKS_2_3 = LIGHTRICKS_ALL | {
    "apply_gated_attention": True,
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_attention_heads": 32,
    "caption_proj_before_connector": True,
    "caption_proj_input_norm": False,
    "caption_projection_first_linear": False,
    "caption_projection_second_linear": False,
    "connector_apply_gated_attention": True,
    "connector_learnable_registers_std": 1,
    "connector_num_attention_heads": 32,
    "connector_num_layers": 8,
    "cross_attention_adaln": True,
    "text_encoder_norm_type": "per_token_rms",
}
LIGHTRICKS_2_5 = LIGHTRICKS_2_3 | {
    "ff_bias": False,
    "text_encoder_norm_type": "PER_TOKEN_RMS",
    "use_keyframes_abs_pos_embedding": True,
}
LIGHTRICKS = {"2.0": LIGHTRICKS_2_0, "2.3": LIGHTRICKS_2_3, "2.5": LIGHTRICKS_2_5}

# Keys of the connectors and of the text encoder, not of the transformer.
FOREIGN = {
    "_diffusers_version",
    "audio_connector_attention_head_dim",
    "audio_connector_num_attention_heads",
    "caption_proj_input_norm",
    "caption_projection_first_linear",
    "caption_projection_second_linear",
    "connector_apply_gated_attention",
    "connector_attention_head_dim",
    "connector_learnable_registers_std",
    "connector_norm_output",
    "connector_num_attention_heads",
    "connector_num_layers",
    "connector_num_learnable_registers",
    "connector_positional_embedding_max_pos",
    "text_encoder_norm_type",
}
LIGHTRICKS_OPTIONAL = {  # keys that at least one release leaves out, with the values that ltx-core then uses
    "apply_gated_attention",
    "audio_ff_bias",
    "audio_in_channels",
    "caption_proj_before_connector",
    "cross_attention_adaln",
    "ff_bias",
    "use_keyframes_abs_pos_embedding",
    "use_prompt_adaln_single",
}

LIGHTRICKS_RENAMED = {  # an error may be about the field that their key becomes
    "apply_gated_attention": "gated_attn",
    "av_ca_timestep_scale_multiplier": "cross_attn_timestep_scale_multiplier",
    "caption_proj_before_connector": "use_prompt_embeddings",
    "cross_attention_adaln": "cross_attn_mod",
    "frequencies_precision": "rope_double_precision",
    "positional_embedding_theta": "rope_theta",
}

# For each field with a single supported value, another value.
DIFFUSERS_FIXED: Config = {
    "activation_fn": "gelu",
    "attention_bias": False,
    "attention_out_bias": False,
    "audio_patch_size": 2,
    "audio_patch_size_t": 2,
    "audio_pos_embed_max_pos": 30,
    "base_height": 1024,
    "base_width": 1024,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "patch_size": 2,
    "patch_size_t": 4,
    "pos_embed_max_pos": 10,
    "qk_norm": "layer_norm",
}
LIGHTRICKS_FIXED: Config = {
    "activation_fn": "gelu",
    "attention_bias": False,
    "attention_type": "gated",
    "audio_positional_embedding_max_pos": [30],
    "av_cross_ada_norm": False,
    "causal_temporal_positioning": False,
    "cross_attention_norm": False,
    "double_self_attention": True,
    "dropout": 0.1,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "norm_num_groups": 16,
    "num_embeds_ada_norm": 2000,
    "num_vector_embeds": 8,
    "only_cross_attention": True,
    "positional_embedding_max_pos": [20, 2048, 1024],
    "positional_embedding_type": "learned",
    "qk_norm": "layer_norm",
    "share_ff": True,
    "standardization_norm": "layer_norm",
    "upcast_attention": True,
    "use_audio_video_cross_attention": False,
    "use_embeddings_connector": False,
    "use_linear_projection": True,
    "use_middle_indices_grid": False,
}
LIGHTRICKS_HONOURED = sorted(LIGHTRICKS_ALL.keys() - LIGHTRICKS_FIXED.keys() - FOREIGN - {"_class_name"})

FLOATS = {"rope_theta", "timestep_scale_multiplier", "cross_attn_timestep_scale_multiplier"}  # integers too
# For each type of field, values that it may not have.
NOT_A_SIZE = (0, -1, 1.5, 8.0, math.inf, math.nan, True, None, "8", [8])
NOT_A_NUMBER = (0, 0.0, -1.0, math.inf, math.nan, True, None, "1000", [1000.0])
NOT_A_FLAG = (0, 1, 1.0, None, "true", [True])
WRONG: dict[str, tuple[Any, ...]] = {
    **{
        field.name: NOT_A_FLAG if isinstance(field.default, bool) else NOT_A_SIZE for field in fields(TransformerConfig)
    },
    **dict.fromkeys(FLOATS, NOT_A_NUMBER),
    "out_channels": tuple(v for v in NOT_A_SIZE if v is not None),  # None means the same as in_channels
    "audio_out_channels": tuple(v for v in NOT_A_SIZE if v is not None),
    "causal_offset": (*NOT_A_SIZE[1:], False, 0.0),
    "rope_type": ("spilt", "SPLIT", "", 1, True, None),
    "vae_scale_factors": ([8, 32], [8, 32, 32, 32], [8, 0, 32], [8, 32, 32.0], [8, 32, True], "8,32,32", 8, None),
}
WRONG_VALUES = [(name, value) for name, values in WRONG.items() for value in values]

releases = pytest.mark.parametrize("release", PRESETS)


def refused(config: Config, name: str, *said: object, lightricks: bool = False) -> None:
    """Require a `ConfigError` on reading `config` that begins with the field's name and contains all of `said`."""
    with pytest.raises(ConfigError) as error:
        (TransformerConfig.from_lightricks if lightricks else TransformerConfig.from_diffusers)(config)
    message = str(error.value)
    assert re.match(rf"({name}|{LIGHTRICKS_RENAMED.get(name, name)})(?!\w)", message), message
    assert all(str(part) in message for part in said), message


def class_defaults() -> Config:
    """Return the defaults of diffusers' class, as JSON has them."""
    parameters = inspect.signature(DiffusersModel.__init__).parameters.values()
    return json.loads(json.dumps({p.name: p.default for p in parameters if p.name != "self"}))


@st.composite
def configs(draw: st.DrawFn, *, lightricks: bool = False) -> TransformerConfig:
    """Generate valid configs, either any of them or only those that a Lightricks config can express."""
    sizes, heads = st.integers(1, 2**16), draw(st.integers(1, 64))
    given: Config = {
        field.name: draw(st.booleans() if isinstance(field.default, bool) else sizes)
        for field in fields(TransformerConfig)
    }
    given |= {name: draw(st.floats(1e-6, 1e9) | st.integers(1, 10**6)) for name in sorted(FLOATS)}
    head_dim, audio_head_dim = 2 * draw(st.integers(1, 128)), 2 * draw(st.integers(1, 128))
    given |= {
        "out_channels": draw(sizes | st.none()),
        "audio_out_channels": draw(sizes | st.none()),
        "num_attention_heads": heads,
        "audio_num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "audio_attention_head_dim": audio_head_dim,
        "cross_attention_dim": heads * head_dim,
        "audio_cross_attention_dim": heads * audio_head_dim,
        "causal_offset": draw(st.integers(0, 8)),
        "rope_type": draw(st.sampled_from(["split", "interleaved"])),
        "vae_scale_factors": tuple(draw(st.lists(sizes, min_size=3, max_size=3))),
    }
    if lightricks:  # one flag there sets several fields here, and the units of time and space are implied
        given |= {
            "audio_gated_attn": given["gated_attn"],
            "audio_cross_attn_mod": given["cross_attn_mod"],
            "perturbed_attn": given["cross_attn_mod"],
        }
        units = ("audio_scale_factor", "audio_sampling_rate", "audio_hop_length", "causal_offset")
        given |= {name: getattr(LTX_2_0, name) for name in ("vae_scale_factors", *units)}
    return TransformerConfig(**given)


# ---------------------------------------------------------------- what is published
@releases
def test_the_presets_are_the_published_diffusers_configs(release: str) -> None:
    assert TransformerConfig.from_diffusers(DIFFUSERS[release]) == PRESETS[release]


@releases
def test_the_presets_are_the_published_lightricks_configs_in_which_nothing_is_unknown(release: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TransformerConfig.from_lightricks(LIGHTRICKS[release]) == PRESETS[release]


@releases
def test_to_lightricks_writes_the_published_config(release: str) -> None:
    published = {key: value for key, value in LIGHTRICKS[release].items() if key not in FOREIGN}
    assert PRESETS[release].to_lightricks() == published


@releases
def test_to_diffusers_writes_the_published_config_completed_by_the_class_defaults(release: str) -> None:
    published = {key: value for key, value in DIFFUSERS[release].items() if key != "_class_name"}
    assert PRESETS[release].to_diffusers() == class_defaults() | published


def test_the_2_5_config_json_read_and_written_back_is_as_long_as_the_published_file() -> None:
    config = TransformerConfig.from_diffusers(DIFFUSERS_2_5).to_diffusers()
    private = {"_class_name": "LTX2VideoTransformer3DModel", "_diffusers_version": "0.40.0.dev0"}
    written = json.dumps(config | private, indent=2, sort_keys=True) + "\n"
    assert len(written) == 1440, written


# ---------------------------------------------------------------- diffusers
def test_to_diffusers_has_the_46_fields_and_the_defaults_of_diffusers_class() -> None:
    defaults = class_defaults()
    assert len(defaults) == 46
    assert TransformerConfig().to_diffusers() == defaults


def test_absent_diffusers_keys_take_the_class_defaults() -> None:
    assert TransformerConfig.from_diffusers({}) == TransformerConfig()
    assert TransformerConfig.from_diffusers({"rope_type": "split"}) == LTX_2_0


@pytest.mark.parametrize("name", sorted(class_defaults()))
def test_a_diffusers_key_may_be_absent_or_at_its_default(name: str) -> None:
    default = class_defaults()[name]
    assert TransformerConfig.from_diffusers({name: default}) == TransformerConfig()


@settings(deadline=None)
@given(configs())
def test_from_diffusers_inverts_to_diffusers_and_survives_json(config: TransformerConfig) -> None:
    written = config.to_diffusers()
    assert written.keys() == class_defaults().keys()
    again = TransformerConfig.from_diffusers(json.loads(json.dumps(written)))
    assert again == config and again.to_diffusers() == written


@pytest.mark.parametrize(("name", "value"), DIFFUSERS_FIXED.items())
def test_a_fixed_diffusers_field_is_refused_at_another_value(name: str, value: object) -> None:
    refused(DIFFUSERS_2_5 | {name: value}, name, repr(value), class_defaults()[name])


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_an_honoured_field_is_refused_with_a_wrong_type_or_value(name: str, value: Any) -> None:
    refused(DIFFUSERS_2_5 | {name: value}, name, repr(tuple(value) if isinstance(value, list) else value))


def test_every_field_of_diffusers_is_either_fixed_or_honoured() -> None:
    assert class_defaults().keys() == WRONG.keys() | DIFFUSERS_FIXED.keys()


def test_an_unknown_diffusers_key_is_refused() -> None:
    refused(DIFFUSERS_2_5 | {"use_tread": True}, "use_tread", "True")


# ---------------------------------------------------------------- Lightricks
@settings(deadline=None)
@given(configs(lightricks=True))
def test_from_lightricks_inverts_to_lightricks_and_survives_json(config: TransformerConfig) -> None:
    written = config.to_lightricks()
    again = TransformerConfig.from_lightricks(json.loads(json.dumps(written)))
    assert again == config and again.to_lightricks() == written


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vae_scale_factors", (8, 16, 16)),
        ("audio_scale_factor", 8),
        ("audio_sampling_rate", 44100),
        ("audio_hop_length", 256),
        ("causal_offset", 0),
        ("perturbed_attn", False),
        ("audio_gated_attn", False),
        ("audio_cross_attn_mod", False),
    ],
)
def test_to_lightricks_refuses_what_that_format_cannot_say(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}\b"):
        replace(LTX_2_5, **{name: value}).to_lightricks()


@pytest.mark.parametrize("flags", [("gated_attn", "audio_gated_attn"), ("cross_attn_mod", "audio_cross_attn_mod")])
@releases
def test_to_lightricks_refuses_streams_that_differ(flags: tuple[str, str], release: str) -> None:
    for name in flags:
        config = replace(PRESETS[release], **{name: not getattr(PRESETS[release], name)})
        with pytest.raises(ConfigError, match=rf"^({flags[0]}|{flags[1]})\b"):
            config.to_lightricks()


@pytest.mark.parametrize(("name", "value"), LIGHTRICKS_FIXED.items())
def test_a_fixed_lightricks_field_is_refused_at_another_value(name: str, value: object) -> None:
    refused(LIGHTRICKS_2_5 | {name: value}, name, repr(value), LIGHTRICKS_ALL[name], lightricks=True)


@pytest.mark.parametrize("name", sorted({*LIGHTRICKS_HONOURED, *LIGHTRICKS_OPTIONAL}))
def test_an_honoured_lightricks_field_is_refused_with_a_wrong_type(name: str) -> None:
    refused(LIGHTRICKS_2_5 | {name: "8"}, name, "'8'", lightricks=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("apply_gated_attention", 1),
        ("caption_proj_before_connector", 1),
        ("cross_attention_adaln", 1),
        ("frequencies_precision", True),
        ("frequencies_precision", "bfloat16"),
        ("rope_type", "spilt"),
    ],
)
def test_a_lightricks_flag_is_no_number_and_a_precision_no_flag(name: str, value: object) -> None:
    refused(LIGHTRICKS_2_5 | {name: value}, name, repr(value), lightricks=True)


@pytest.mark.parametrize("name", LIGHTRICKS_HONOURED)
def test_a_lightricks_key_that_all_releases_have_may_not_be_missing(name: str) -> None:
    refused({k: v for k, v in LIGHTRICKS_2_5.items() if k != name}, name, "missing", lightricks=True)


@pytest.mark.parametrize("name", sorted(LIGHTRICKS_OPTIONAL))
def test_a_lightricks_key_that_a_release_leaves_out_may_be_missing(name: str) -> None:
    absent = {k: v for k, v in LIGHTRICKS_2_5.items() if k != name}
    default = asdict(LTX_2_0) | {
        "apply_gated_attention": False,
        "caption_proj_before_connector": False,
        "cross_attention_adaln": False,
    }
    assert TransformerConfig.from_lightricks(absent) == TransformerConfig.from_lightricks(
        LIGHTRICKS_2_5 | {name: default[name]}
    )


def test_an_unknown_lightricks_key_is_a_warning_that_points_here() -> None:
    with pytest.warns(UserWarning, match=r"use_tread.*yes") as caught:
        config = TransformerConfig.from_lightricks(LIGHTRICKS_2_5 | {"use_tread": "yes"})
    assert config == LTX_2_5
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("write", [TransformerConfig.to_lightricks, TransformerConfig.to_diffusers])
def test_what_is_written_is_the_callers_to_change(write: Callable[[TransformerConfig], Config]) -> None:
    expected = copy.deepcopy(write(LTX_2_5))
    lists = [value for value in write(LTX_2_5).values() if isinstance(value, list)]
    assert lists
    for value in lists:
        value.append(1)
    found = copy.deepcopy(write(LTX_2_5))
    for value in lists:  # restores the lists for the tests after this one
        value.pop()
    assert found == expected


# ---------------------------------------------------------------- both
@pytest.mark.parametrize("name", ["num_attention_heads", "audio_num_attention_heads"])
def test_the_streams_have_equally_many_heads(name: str) -> None:
    width = ("audio_cross_attention_dim", 16 * 64) if "audio" in name else ("cross_attention_dim", 16 * 128)
    refused(DIFFUSERS_2_5 | dict([(name, 16), width]), "audio_num_attention_heads", 16, 32)


@pytest.mark.parametrize("prefix", ["", "audio_"])
def test_head_dims_are_even(prefix: str) -> None:
    changes = {f"{prefix}attention_head_dim": 63, f"{prefix}cross_attention_dim": 32 * 63}
    refused(DIFFUSERS_2_5 | changes, f"{prefix}attention_head_dim", 63, "even")


@pytest.mark.parametrize(("name", "width"), [("cross_attention_dim", 4096), ("audio_cross_attention_dim", 2048)])
@pytest.mark.parametrize("lightricks", [False, True])
def test_the_text_is_as_wide_as_its_stream(name: str, width: int, lightricks: bool) -> None:
    config = LIGHTRICKS_2_5 if lightricks else DIFFUSERS_2_5
    refused(config | {name: 1024}, name, 1024, width, lightricks=lightricks)


def test_keys_that_begin_with_an_underscore_are_ignored() -> None:
    private = {"_class_name": "SomethingElse", "_diffusers_version": "0.99", "_name_or_path": ["x"]}
    assert TransformerConfig.from_diffusers(DIFFUSERS_2_5 | private) == LTX_2_5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TransformerConfig.from_lightricks(LIGHTRICKS_2_5 | private) == LTX_2_5


@releases
def test_reading_does_not_change_what_is_read(release: str) -> None:
    config = copy.deepcopy((DIFFUSERS[release], LIGHTRICKS[release]))
    TransformerConfig.from_diffusers(config[0])
    TransformerConfig.from_lightricks(config[1])
    assert config == (DIFFUSERS[release], LIGHTRICKS[release])


@pytest.mark.parametrize(("ours", "prefix"), [("video", ""), ("audio", "audio_")])
def test_out_channels_none_means_in_channels(ours: str, prefix: str) -> None:
    config = TransformerConfig.from_diffusers({f"{prefix}in_channels": 5, f"{prefix}out_channels": None})
    assert getattr(config, ours).out_channels == 5
    assert config.to_diffusers()[f"{prefix}out_channels"] is None


def test_a_config_is_frozen_and_hashable() -> None:
    with pytest.raises(FrozenInstanceError):
        LTX_2_0.num_layers = 2  # type: ignore[misc]
    assert len({LTX_2_0, LTX_2_3, LTX_2_5, replace(LTX_2_5)}) == 3


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
