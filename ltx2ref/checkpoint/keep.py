"""Quantised weights as they are, under the names of the other dialect: nothing is decoded, no byte of data changes.

What the source states about its weights goes along, with its layers renamed. The result is planned from the renamed
tensors before anything is written, so that it is sure to load as the source does, by itself.
"""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .header import parse_json
from .match import FILE_MARKER, Plan, make_plan
from .names import DIFFUSERS_DIALECT, Dialect
from .quantised import FORMATS, PLAIN_DTYPES
from .save import TARGETS, Contents
from .sayings import DATA, QUANTISATION, QUANTISER, QUANTO_KEYS, QUANTO_MAP
from .settle import ASKING
from .source import CheckpointFiles
from .storage import CheckpointError, Stored


def kept_tensors(plan: Plan) -> dict[str, Stored]:
    """Return all tensors of the weights, with scales and markers, by the names that they have beside our parameters'.

    Raises `CheckpointError` for formats of GGUF, which safetensors files do not have.
    """
    ggml = sorted({weight.format for weight in plan.weights.values()} - FORMATS.keys() - {*PLAIN_DTYPES})
    if ggml:
        raise CheckpointError(plan.source.path, [f"only GGUF has {', '.join(ggml)}: give a dtype in place of keep"])
    found = {plan.dialect.ours(stored.name): stored for stored in kept_of(plan)}
    marker = plan.source.tensors.get(plan.dialect.prefix + FILE_MARKER)
    return found | ({FILE_MARKER: marker} if marker else {})


def require_sound_scales(plan: Plan) -> None:
    """Raise `CheckpointError`, with all problems, for scales that nothing could be decoded with."""
    problems: list[str] = []
    for weight in plan.weights.values():
        try:
            weight.rows()  # reads and checks the companions, and no weight
        except CheckpointError as error:
            problems.extend(error.problems)
    if problems:
        raise CheckpointError(plan.source.path, problems)


def kept_of(plan: Plan) -> Iterator[Stored]:
    """Yield the tensor of each weight and its companions."""
    for weight in plan.weights.values():
        yield weight.tensor
        yield from weight.companions.values()


def add_sayings(plan: Plan, contents: Contents, tensors: Mapping[str, Stored]) -> None:
    """Add what the source's metadata and config state about its weights, with the names of the destination."""
    source, target = plan.source, TARGETS[contents.dialect]
    for key in (QUANTISATION, QUANTO_MAP):
        if key in source.metadata:
            contents.metadata[key] = with_renamed_layers(key, source.metadata[key], plan.dialect, target, tensors)
    for key in QUANTO_KEYS:
        if key in source.metadata and key != QUANTO_MAP:
            contents.metadata[key] = source.metadata[key]
    quantiser = (source.config or {}).get(QUANTISER)
    if QUANTISER in source.metadata:
        quantiser = json.loads(source.metadata[QUANTISER])
    if quantiser is not None and contents.dialect == DIFFUSERS_DIALECT:
        contents.config[QUANTISER] = quantiser
    elif quantiser is not None:
        contents.metadata[QUANTISER] = json.dumps(quantiser)


def with_renamed_layers(key: str, text: str, dialect: Dialect, target: Dialect, tensors: Mapping[str, Stored]) -> str:
    """Return metadata about layers with the layers' names in another dialect, without those that are not kept."""

    def renamed(layers: dict[str, Any]) -> dict[str, Any]:
        ours = {dialect.ours(layer): said for layer, said in layers.items()}
        there = {layer for layer in ours for end in ("", DATA) if f"{layer}.weight{end}" in tensors}
        return {target.stored(layer): said for layer, said in ours.items() if layer in there}

    if key == QUANTO_MAP:
        return base64.b64encode(json.dumps(renamed(parse_json(base64.b64decode(text)))).encode()).decode()
    said = parse_json(text.encode())
    return json.dumps(said | {"layers": renamed(said["layers"])})


def require_same_weights(plan: Plan, contents: Contents, tensors: dict[str, Stored], sharded: bool) -> None:
    """Raise `CheckpointError` unless the destination, by itself, says the same of its weights as the source."""
    target = TARGETS[contents.dialect]
    renamed = {target.stored(name): stored._replace(name=target.stored(name)) for name, stored in tensors.items()}
    config = contents.config if contents.dialect == DIFFUSERS_DIALECT else None
    metadata = {} if sharded else contents.metadata
    result = make_plan(CheckpointFiles(Path(plan.source.path), plan.source.files, renamed, config, metadata))
    differing = [
        f"{name} is {result.weights[name].facts if name in result.weights else 'lost'}, in the source {weight.facts}"
        for name, weight in plan.weights.items()
        if name not in result.weights or result.weights[name].facts != weight.facts
    ]
    if result.problems or differing:
        found = [problem.partition(ASKING)[0] for problem in result.problems or differing]
        problems = [f"{contents.dialect} files cannot say this: {x}: use --dtype in place of --keep" for x in found]
        raise CheckpointError(plan.source.path, problems)
