"""The config of a checkpoint: what the checkpoint says of itself, checked against the shapes of its tensors."""

import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

from ..config import LTX_2_0, LTX_2_3, LTX_2_5, TransformerConfig
from ..formats import LIGHTRICKS_ABSENT, LIGHTRICKS_NAMES, ConfigError
from .header import parse_json
from .sayings import QUANTISER
from .source import CheckpointFiles
from .storage import CheckpointError
from .streams import BOTH_STREAMS, is_needed, streams_of

RELEASES = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}
# The fields that tell the releases apart. Keyframes do not: one published file of 2.5 has none.
RELEASE_FIELDS = (
    "use_prompt_embeddings",
    "gated_attn",
    "audio_gated_attn",
    "cross_attn_mod",
    "audio_cross_attn_mod",
    "ff_bias",
    "audio_ff_bias",
)
ARGUMENT, CONFIG_JSON, METADATA, SHAPES = "argument", "config.json", "metadata", "shapes"
FORMAT_DEFAULT = "default of the format"  # the documented meaning of a key that is left out
RELEASE_DEFAULT = "default of the release"  # used where nothing in the file states the value
DIFFUSERS_CLASS, LIGHTRICKS_CLASS = "LTX2VideoTransformer3DModel", "AVTransformer3DModel"
FASTVIDEO_CLASS = "LTX2Transformer3DModel"

# For each config field, a tensor and the axis whose length is the field's value.
LENGTHS = {
    "in_channels": ("proj_in.weight", 1),
    "cross_attention_dim": ("proj_in.weight", 0),
    "out_channels": ("proj_out.weight", 0),
    "num_attention_heads": ("transformer_blocks.*.attn1.to_gate_logits.weight", 0),
    "audio_in_channels": ("audio_proj_in.weight", 1),
    "audio_cross_attention_dim": ("audio_proj_in.weight", 0),
    "audio_out_channels": ("audio_proj_out.weight", 0),
    "audio_num_attention_heads": ("transformer_blocks.*.audio_attn1.to_gate_logits.weight", 0),
    "caption_channels": ("caption_projection.linear_1.weight", 1),
}
# For each config field, a tensor that is present if the field is true.
PRESENCE = {
    "gated_attn": "transformer_blocks.*.attn1.to_gate_logits.weight",
    "audio_gated_attn": "transformer_blocks.*.audio_attn1.to_gate_logits.weight",
    "ff_bias": "transformer_blocks.*.ff.net.2.bias",
    "audio_ff_bias": "transformer_blocks.*.audio_ff.net.2.bias",
    "use_prompt_embeddings": "caption_projection.linear_1.weight",
    "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding",
}
# In the releases that modulate text, this tensor is present if use_prompt_adaln_single is true.
PROMPT_ADALN = "prompt_adaln.linear.weight"
# The fields above that are decided by a tensor of video, although audio has one like it.
OF_BOTH_STREAMS = ("caption_channels", "use_prompt_embeddings", "use_prompt_adaln_single")
# For each config field, a table that has 9 rows instead of 6 if the field is true.
NINE_ROWS = {
    "cross_attn_mod": "transformer_blocks.*.scale_shift_table",
    "audio_cross_attn_mod": "transformer_blocks.*.audio_scale_shift_table",
}


BLOCK_NAME = re.compile(r"transformer_blocks\.(0|[1-9][0-9]{0,5})\.")


class Facts(NamedTuple):
    """A config, and where the value of each of its fields comes from."""

    config: TransformerConfig
    origins: dict[str, str]
    problems: list[str]  # statements of the file about itself that its tensors contradict
    notes: list[str]


def release_of(config: TransformerConfig) -> str | None:
    """Return the release that a config of any size belongs to, or None."""
    wanted = [getattr(config, name) for name in RELEASE_FIELDS]
    return next(
        (
            release
            for release, preset in RELEASES.items()
            if [getattr(preset, name) for name in RELEASE_FIELDS] == wanted
        ),
        None,
    )


def resolve(source: CheckpointFiles, shapes: Mapping[str, tuple[int, ...]], given: TransformerConfig | None) -> Facts:
    """Return the config from the first source there is: the argument, config.json, the metadata, or the shapes.

    Raises `CheckpointError` for a config that is malformed or not supported.
    """
    notes: list[str] = []
    measured = from_shapes(shapes)
    said, origins = says(source, given, notes)
    base = said or presumed(measured)
    problems = [] if said is None else contradictions(asdict(said), measured, origins, notes, shapes)
    if problems:
        return Facts(base, origins, problems, notes)
    try:
        config = replace(base, **{name: measured[name] for name in measured if getattr(base, name) is not None})
    except ConfigError as error:
        raise CheckpointError(source.path, [f"the shapes of its tensors fit no config, give one: {error}"]) from None
    origins = {f.name: origins.get(f.name, SHAPES if f.name in measured else RELEASE_DEFAULT) for f in fields(config)}
    assumed = [f"{name} = {getattr(config, name)!r}" for name, origin in origins.items() if origin == RELEASE_DEFAULT]
    if assumed:
        notes.append(f"nothing in the checkpoint says {', '.join(assumed)}: as in release {release_of(config)}")
    return Facts(config, origins, [], notes)


def says(
    source: CheckpointFiles, given: TransformerConfig | None, notes: list[str]
) -> tuple[TransformerConfig | None, dict[str, str]]:
    """Return the config that the caller or the files state, with the origins of its fields, or None if neither does."""
    if given is not None:
        return given, dict.fromkeys(asdict(given), ARGUMENT)
    try:
        origin, config = CONFIG_JSON, source.config
        if config is None and "config" in source.metadata:
            origin, config = METADATA, parse_json(source.metadata["config"].encode())
        if config is None:
            return None, {}
        config = {key: value for key, value in config.get("transformer", config).items() if key != QUANTISER}
        name = config.get("_class_name", DIFFUSERS_CLASS)
        if name not in (DIFFUSERS_CLASS, LIGHTRICKS_CLASS, FASTVIDEO_CLASS):
            raise ConfigError(f"_class_name = {str(name)[:80]!r}: expected {DIFFUSERS_CLASS} or {LIGHTRICKS_CLASS}")
        if name == LIGHTRICKS_CLASS or config.keys() >= LIGHTRICKS_NAMES.keys() - LIGHTRICKS_ABSENT.keys():
            return lightricks(config, origin, notes)
        if name == DIFFUSERS_CLASS:
            present = TransformerConfig.from_diffusers(config)
            return present, {f.name: origin if f.name in config else FORMAT_DEFAULT for f in fields(present)}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(source.path, [f"{origin}: {error}"]) from None
    notes.append(f"{origin} is of class {name} but lacks the keys of a Lightricks config, so it is not used")
    return None, {}


def lightricks(config: Mapping[str, Any], origin: str, notes: list[str]) -> tuple[TransformerConfig, dict[str, str]]:
    """Parse a Lightricks config and return it with the origins of its fields. Unknown keys become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = TransformerConfig.from_lightricks(config)
    notes += [f"{origin}: {warning.message}" for warning in caught[:5]]
    notes += [f"{origin}: and {len(caught) - 5} more unknown keys"] if len(caught) > 5 else []
    stated = {name for key, names in LIGHTRICKS_NAMES.items() if key in config for name in names}
    return result, {f.name: origin if f.name in stated else FORMAT_DEFAULT for f in fields(result)}


def from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return every config field that the shapes decide.

    `shapes` are those of the unpacked tensors, by the parameters' names in the model. Those of one stream alone decide
    nothing about the other one, of which some tensors outside the blocks may be there.
    """
    streams = streams_of(filter(BLOCK_NAME.match, shapes)) or streams_of(shapes) or BOTH_STREAMS
    blocks = {match[1] for name in shapes if (match := BLOCK_NAME.match(name))}
    alike: dict[str, Counter[tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        alike.setdefault(any_block(name), Counter())[shape] += 1
    most = {name: counter.most_common(1)[0][0] for name, counter in alike.items()}
    facts: dict[str, Any] = {"num_layers": len(blocks)} if blocks else {}
    lengths = {field: (witness(field, name, streams), axis) for field, (name, axis) in LENGTHS.items()}
    facts |= {field: most[name][axis] for field, (name, axis) in lengths.items() if len(most.get(name, ())) == 2}
    presence = {field: witness(field, name, streams) for field, name in PRESENCE.items()}
    facts |= {field: name in most for field, name in presence.items() if is_needed(name, streams)}
    facts |= {field: most[name][0] == 9 for field, name in NINE_ROWS.items() if most.get(name)}
    if facts.get("cross_attn_mod") or facts.get("audio_cross_attn_mod"):
        facts["use_prompt_adaln_single"] = witness("use_prompt_adaln_single", PROMPT_ADALN, streams) in most
    for stream, heads in (("", "num_attention_heads"), ("audio_", "audio_num_attention_heads")):
        if facts.get(heads) and f"{stream}cross_attention_dim" in facts:
            facts[f"{stream}attention_head_dim"] = facts[f"{stream}cross_attention_dim"] // facts[heads]
    return facts


def witness(field: str, name: str, streams: Sequence[str]) -> str:
    """Return the tensor that decides a field of both streams: audio's own if there is no video, or else video's."""
    return f"audio_{name}" if field in OF_BOTH_STREAMS and "video" not in streams else name


def any_block(name: str) -> str:
    """Return a parameter's name with `*` in place of the block's number."""
    parts = name.split(".")
    return ".".join([parts[0], "*", *parts[2:]]) if parts[0] == "transformer_blocks" else name


def presumed(measured: Mapping[str, Any]) -> TransformerConfig:
    """Return the preset of the release that the tensors look most like.

    Models without gates do not show their number of heads, so they keep the published one.
    """
    release = "2.0" if measured["use_prompt_embeddings"] else "2.3" if measured.get("ff_bias", True) else "2.5"
    return RELEASES[release]


def contradictions(
    said: Mapping[str, Any],
    measured: Mapping[str, Any],
    origins: dict[str, str],
    notes: list[str],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """Return the statements about the config that the tensors contradict."""
    problems = []
    for name, value in measured.items():
        if name == "use_keyframes_abs_pos_embedding" and said[name] != value:
            # ComfyUI goes by the tensor as well: a file of 2.5, since replaced, was published without it.
            notes.append(f"{origins[name]} says {name} = {said[name]}, the tensors say {value}: they decide")
            origins[name] = SHAPES
        elif said[name] is not None and said[name] != value:
            by = evidence(name, said[name], shapes)
            problems.append(f"{name} = {said[name]!r} by {origins[name]}, but {value!r} by {by}")
    return problems


def evidence(name: str, said: Any, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return which tensors show the value of a config field, in words for a message."""
    if name == "num_layers":
        beyond = [tensor for tensor in shapes if (match := BLOCK_NAME.match(tensor)) and int(match[1]) >= said]
        return f"the presence of {beyond[0]}" if beyond else "the transformer_blocks.* that are there"
    tensors = {field: tensor for field, (tensor, _) in LENGTHS.items()} | PRESENCE | NINE_ROWS
    tensors |= {"use_prompt_adaln_single": PROMPT_ADALN}
    return f"the shape or presence of {tensors[name]}" if name in tensors else "the tensors"
