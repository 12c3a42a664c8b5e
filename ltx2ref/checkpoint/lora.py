"""LoRAs: low-rank changes of Linear layers, matched to a model by name and added to its weights.

All formats mean W' = W + strength * factor * B @ A. They differ in names and in the source of the factor:

- a layer with an alpha tensor has factor = alpha / rank,
- so has a file with PEFT's config in its metadata, where the config gives the alpha,
- in all other files the factor is 1.

The rank is that of the layer's own A. Published files limit it to the layer's width, whatever their metadata say.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .header import parse_json, read_header
from .match import Plan, parameter_shapes
from .names import DIFFUSERS_DIALECT, FOREIGN_INSIDE, OPENINGS, to_lightricks
from .quantised import PLAIN_DTYPES, Weight
from .storage import CheckpointError, Stored, TensorFile, require

ADAPTER = "lora_adapter_metadata"  # the key of PEFT's config in the metadata
ADAPTER_PREFIX = "transformer."  # in front of that config's keys, except as `save_lora_adapter` writes them
KOHYA = "kohya"
# How the names of each format begin. diffusers' `save_lora_adapter` writes the last one.
LORA_FORMATS = {
    "lightricks": ("diffusion_model.",),
    "diffusers": ("transformer.",),
    KOHYA: ("lora_unet_",),
    "diffusers without prefix": tuple(
        f"{name}."
        for name in (
            *OPENINGS[DIFFUSERS_DIALECT],
            "transformer_blocks",
            "proj_out",
            "audio_proj_out",
            "caption_projection",
            "audio_caption_projection",
        )
    ),
}
PARTS = {  # suffixes after the name of a layer: A has shape (RANK, IN), B has shape (OUT, RANK)
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}
# Tensors of other models that may share a file with the transformer's LoRA.
SKIPPED = (
    "text_embedding_projection.",
    "diffusion_model.text_embedding_projection.",
    "connectors.",
    *(f"diffusion_model.{part}" for part in FOREIGN_INSIDE),
)
LayerParts = dict[str, Stored]  # the tensors of one layer by "A", "B" and "alpha"


class Layer(NamedTuple):
    """The change of one weight."""

    a: Stored
    b: Stored
    factor: float

    @property
    def rank(self) -> int:
        """Return the rank of this layer's change."""
        return self.a.shape[0]


class Lora(NamedTuple):
    """A LoRA file, understood from its header and its alphas alone."""

    path: Path
    format: str
    layers: dict[str, Layer]  # by the parameters' names in the model
    skipped: dict[str, int]  # number of tensors that other models own, by prefix

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers.values()]
        factors = [layer.factor for layer in self.layers.values()]
        skipped = ", ".join(f"{count} tensors of {prefix}*" for prefix, count in self.skipped.items()) or "nothing"
        return (
            f"{self.path}: {self.format} LoRA, {len(self.layers)} layers, ranks {min(ranks)} to {max(ranks)}, "
            f"factors {min(factors):g} to {max(factors):g}, skipped {skipped}"
        )


class Adapter(NamedTuple):
    """The part of PEFT's config that decides the factors of a LoRA."""

    alpha: float
    patterns: dict[str, float]  # alphas of single layers by the end of a name, or by "^" and the whole name
    rank_stabilised: bool

    def factor(self, layer: str, rank: int) -> float:
        """Return the factor of a layer: alpha / rank, or alpha / sqrt(rank) if the LoRA is rank-stabilised."""
        matching = (
            alpha for end, alpha in self.patterns.items() if layer == end.removeprefix("^") or layer.endswith(f".{end}")
        )
        return next(matching, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def lora_format(names: Iterable[str]) -> str | None:
    """Return the format of a LoRA with these tensor names, or None if they belong to no LoRA.

    A mixture is named like "kohya and lightricks".
    """
    factors = [name for name in names if layer_and_part(name)[1] in ("A", "B")]
    return (
        " and ".join(
            sorted(
                format
                for format, openings in LORA_FORMATS.items()
                if any(name.startswith(openings) for name in factors)
            )
        )
        or None
    )


def read_lora(path: str | Path, plan: Plan) -> Lora:
    """Read a LoRA for the model of a plan. What it has for a stream that is not read is left out.

    Raises `CheckpointError`, with all problems, unless every tensor of the file is understood and fits the model.
    """
    file, tensors = read_header(Path(path))
    own = [stored for stored in tensors.values() if not stored.name.startswith(SKIPPED)]
    skipped = Counter(prefix for name in tensors for prefix in SKIPPED if name.startswith(prefix))
    fitting, problems = match_layers(own, plan)
    parts = {name: part for name, part in fitting.items() if name in plan.weights}
    if fitting and not parts:
        problems.append(f"nothing in it is of the {' and '.join(plan.streams)} stream")
    format = lora_format(stored.name for stored in own)
    if format not in LORA_FORMATS:
        problems.insert(0, f"names of several formats: {format}" if format else "no LoRA of the transformer in it")
    problems += [problem for name in parts for problem in faults(plan.weights[name], parts[name])]
    raise_problems(file, problems)
    adapter = read_adapter(file)
    layers = {
        name: Layer(part["A"], part["B"], factor(name, part, format == KOHYA, adapter)) for name, part in parts.items()
    }
    raise_problems(
        file,
        [f"{parts[name]['alpha']}: not finite" for name, layer in layers.items() if not math.isfinite(layer.factor)],
    )
    return Lora(file.path, str(format), layers, dict(skipped))


def require_strengths(files: Sequence[tuple[str | Path, float]]) -> None:
    """Raise `ValueError` unless the argument `lora` of `load` is a sequence of paths with finite strengths."""
    for i, pair in enumerate(files):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not is_finite_number(pair[1]):
            raise ValueError(f"lora[{i}]: expected a path and a strength that is a finite number, got {pair!r}")


def merged(name: str, weight: Weight, loras: Sequence[tuple[Lora, float]], dtype: torch.dtype) -> Tensor:
    """Return a weight with all LoRAs added one after the other, in float32 or wider, and rounded once to `dtype`.

    The operations come in PEFT's order, so that float32 results have the same bits. A weight that no LoRA changes is
    read as if there were none. Raises `CheckpointError` where the sum is not finite.
    """
    changed = changes(name, loras)
    return added(weight, changed, dtype) if changed else weight.read(dtype)


def merged_into(out: Tensor, name: str, weight: Weight, loras: Sequence[tuple[Lora, float]]) -> None:
    """Write the result of `merged` into an existing tensor."""
    if changed := changes(name, loras):
        out.copy_(added(weight, changed, out.dtype))
    else:
        weight.into(out)


def changes(name: str, loras: Sequence[tuple[Lora, float]]) -> list[tuple[Layer, float]]:
    """Return the changes of a weight with their strengths, without those that add nothing."""
    return [
        (lora.layers[name], strength)
        for lora, strength in loras
        if name in lora.layers and strength * lora.layers[name].factor
    ]


def added(weight: Weight, changed: Sequence[tuple[Layer, float]], dtype: torch.dtype) -> Tensor:
    """Return the sum of a weight and its changes, rounded once. Raises `CheckpointError` if it is not finite."""
    wide = torch.promote_types(dtype, torch.float32)
    result = weight.into(torch.empty(weight.shape, dtype=wide, device="cpu"))
    for layer, strength in changed:
        delta = layer.b.tensor().to(wide) @ layer.a.tensor().to(wide)
        result = delta.mul_(strength * layer.factor).add_(result)
        if not result.isfinite().all():
            raise CheckpointError(layer.a.file.path, [f"{layer.a.name}: the merged weight is not finite"])
    return result.to(dtype)


def layer_and_part(name: str) -> tuple[str, str]:
    """Return the layer that a tensor belongs to and which part of its LoRA it is, or two empty strings."""
    return next(
        ((name.removesuffix(ending), part) for ending, part in PARTS.items() if name.endswith(ending)), ("", "")
    )


def spellings(layer: str) -> list[str]:
    """Return the names that the formats use for a layer of the model.

    Kohya's names come in either dialect, and musubi-tuner's have one more prefix.
    """
    theirs = to_lightricks(layer)
    flat = [name.replace(".", "_") for name in (layer, theirs)]
    return [
        f"diffusion_model.{theirs}",
        f"transformer.{layer}",
        layer,
        *(f"lora_unet_{wrapper}{name}" for wrapper in ("", "model_") for name in flat),
    ]


def match_layers(tensors: Iterable[Stored], plan: Plan) -> tuple[dict[str, LayerParts], list[str]]:
    """Return the LoRA tensors of each weight, by the weight's name in the model, and all problems with the names."""
    weights = {
        spelling: name
        for name in parameter_shapes(plan.config)
        if name.endswith(".weight")
        for spelling in spellings(name.removesuffix(".weight"))
    }
    parts: dict[str, LayerParts] = {}
    problems = []
    for stored in tensors:
        layer, part = layer_and_part(stored.name)
        if not part:
            problems.append(f"{stored}: not supported, a layer can have {', '.join(PARTS)}")
        elif layer not in weights:
            problems.append(f"{stored}: the model has no such layer")
        elif parts.setdefault(weights[layer], {}).setdefault(part, stored) is not stored:
            problems.append(f"{stored}: the same as {parts[weights[layer]][part].name}")
    return parts, problems


def faults(weight: Weight, parts: LayerParts) -> list[str]:
    """Return what is wrong with the tensors of one layer, judged by their names, shapes and dtypes."""
    if len(weight.shape) != 2:
        return [f"{stored}: {weight.tensor.name} is not of a Linear layer" for stored in parts.values()]
    if not {"A", "B"} <= parts.keys():
        return [
            f"{stored}: A and B belong together, but the layer has only {' and '.join(sorted(parts))}"
            for stored in parts.values()
        ]
    (rows, columns), rank = weight.shape, max((1, *parts["A"].shape[:1]))
    shapes: dict[str, list[tuple[int, ...]]] = {"A": [(rank, columns)], "B": [(rows, rank)], "alpha": [(), (1,)]}
    return [
        f"{stored}: expected {' or '.join(str(list(shape)) for shape in shapes[part])}, {', '.join(PLAIN_DTYPES)}"
        for part, stored in parts.items()
        if stored.shape not in shapes[part] or stored.dtype not in PLAIN_DTYPES
    ]


def factor(name: str, parts: LayerParts, kohya: bool, adapter: Adapter | None) -> float:
    """Return the factor of one layer: alpha / rank if the file has an alpha, or else 1.

    Raises `CheckpointError` if the layer's alpha tensor and PEFT's config disagree.
    """
    rank = parts["A"].shape[0]
    by_peft = adapter.factor(name.removesuffix(".weight"), rank) if adapter else 1.0
    if "alpha" not in parts:
        return by_peft
    alpha = parts["alpha"].tensor().double().item()
    result = (alpha or rank) / rank if kohya else alpha / rank  # kohya's scripts take 0 to mean the rank
    if adapter and not math.isclose(result, by_peft, rel_tol=2**-8):  # alpha may be rounded to bfloat16
        raise CheckpointError(
            parts["alpha"].file.path, [f"{parts['alpha']} = {alpha}: a factor of {result}, but {by_peft} by {ADAPTER}"]
        )
    return result


def raise_problems(file: TensorFile, problems: Sequence[str]) -> None:
    """Raise `CheckpointError` if there are problems."""
    if problems:
        raise CheckpointError(file.path, problems)


# PEFT's config is in the metadata of the files that diffusers writes. They have the alpha nowhere else.


def read_adapter(file: TensorFile) -> Adapter | None:
    """Return PEFT's config from the metadata, or None if there is none.

    Raises `CheckpointError` for a config that asks for more than the product of two matrices.
    """
    if ADAPTER not in file.metadata:
        return None
    try:
        config = {
            key.removeprefix(ADAPTER_PREFIX): value
            for key, value in parse_json(file.metadata[ADAPTER].encode()).items()
        }
        config = {key: value for key, value in config.items() if "." not in key}  # dotted keys are for connectors
        return parse_adapter(config) if config else None
    except ValueError as error:
        raise CheckpointError(file.path, [f"{ADAPTER}: {error}"]) from None


def parse_adapter(config: dict[str, Any]) -> Adapter:
    """Check PEFT's config and return what decides the factors. Raises `ValueError` for what is not supported."""
    for key, value in config.items():
        require(not (value and is_variant(key)), f"{key} = {value!r} is not supported")
    # The other initialisations change the base weight as well, and PEFT does so again when it loads such a file.
    initialisation = config.get("init_lora_weights", True)
    require(initialisation in (True, False, "gaussian"), f"init_lora_weights = {initialisation!r} is not supported")
    patterns = config.get("alpha_pattern") or {}
    require(isinstance(patterns, dict), f"alpha_pattern = {patterns!r}: expected an object")
    for end, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        require(is_finite_number(alpha), f"{end} = {alpha!r}: expected a finite number")
        require(re.fullmatch(r"\^?[\w.]+", end) is not None, f"{end!r}: expected the end of a layer's name")
    return Adapter(config["lora_alpha"], patterns, bool(config.get("use_rslora")))


def is_variant(key: str) -> bool:
    """Return whether this key, if set, asks for a method other than LoRA.

    PEFT adds such keys with every release, so they are recognised by how they are named.
    """
    return key.endswith(("_config", "_tokens")) or (key.startswith("use_") and key != "use_rslora")


def is_finite_number(value: object) -> bool:
    """Return whether a value is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
