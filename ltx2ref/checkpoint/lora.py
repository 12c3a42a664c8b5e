"""LoRAs: low-rank changes of Linear layers in a file, matched to a model by name, and added to its weights.

Every format means W' = W + strength * factor * B @ A, and differs in names and in where the factor comes from: from a
layer's alpha, factor = alpha / rank; from PEFT's config in the metadata, the same; it is 1 where nothing says it. The
rank is that of the layer's own A: published files clip it to the layer's width, whatever their metadata say.
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
from .match import Plan
from .names import DIFFUSERS_DIALECT, FOREIGN_INSIDE, OPENINGS, to_lightricks
from .quantised import PLAIN_DTYPES, Weight
from .storage import CheckpointError, Stored, TensorFile, require

ADAPTER = "lora_adapter_metadata"  # the key of PEFT's config in the metadata
ADAPTER_PREFIX = "transformer."  # of that config's own keys; diffusers' `save_lora_adapter` writes none
KOHYA = "kohya"
# Format: how its names begin. The last is what diffusers' `save_lora_adapter` writes.
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
PARTS = {  # what follows the name of a layer: A is (rank, in), B is (out, rank)
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".alpha": "alpha",
}
# Not the transformer, although in its LoRA's file.
SKIPPED = (
    "text_embedding_projection.",
    "diffusion_model.text_embedding_projection.",
    "connectors.",
    *(f"diffusion_model.{part}" for part in FOREIGN_INSIDE),
)
LayerParts = dict[str, Stored]  # of one layer


class Layer(NamedTuple):
    """The change of one weight."""

    a: Stored
    b: Stored
    factor: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Lora(NamedTuple):
    """A LoRA file understood. Made from its header and its alphas alone."""

    path: Path
    format: str
    layers: dict[str, Layer]  # by our names of the weights
    skipped: dict[str, int]  # how many tensors are not the transformer's, by the prefix that says so

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers.values()]
        factors = [layer.factor for layer in self.layers.values()]
        skipped = ", ".join(f"{count} tensors of {prefix}*" for prefix, count in self.skipped.items()) or "nothing"
        return (
            f"{self.path}: {self.format} LoRA, {len(self.layers)} layers, ranks {min(ranks)} to {max(ranks)}, "
            f"factors {min(factors):g} to {max(factors):g}, skipped {skipped}"
        )


class Adapter(NamedTuple):
    """Hold what PEFT's config says that decides the factors of a LoRA."""

    alpha: float
    patterns: dict[str, float]  # other alphas, by the ends of layers' names; ^ before a whole name
    rank_stabilised: bool

    def factor(self, layer: str, rank: int) -> float:
        matching = (
            alpha for end, alpha in self.patterns.items() if layer == end.removeprefix("^") or layer.endswith(f".{end}")
        )
        return next(matching, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def lora_format(names: Iterable[str]) -> str | None:
    """The format of a file with tensors of these names, "kohya and lightricks" for a mixture, None if it is no LoRA."""
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
    """A LoRA for the model of a plan. Raises `CheckpointError`, with all problems, unless it is wholly understood."""
    file, tensors = read_header(Path(path))
    own = [stored for stored in tensors.values() if not stored.name.startswith(SKIPPED)]
    skipped = Counter(prefix for name in tensors for prefix in SKIPPED if name.startswith(prefix))
    parts, problems = match_layers(own, plan)
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
    """Raises `ValueError` for the argument `lora` of `load`."""
    for i, pair in enumerate(files):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not is_finite_number(pair[1]):
            raise ValueError(f"lora[{i}]: expected a path and a strength that is a finite number, got {pair!r}")


def merged(name: str, weight: Weight, loras: Sequence[tuple[Lora, float]], dtype: torch.dtype) -> Tensor:
    """A weight with LoRAs of given strengths added one by one, in float32 or wider, and rounded once.

    The order of operations is that of PEFT, for the same bits in float32. A weight that nothing changes is read as if
    there were no LoRA. Raises `CheckpointError` where the sum is not finite.
    """
    changed = changes(name, loras)
    return added(weight, changed, dtype) if changed else weight.read(dtype)


def merged_into(out: Tensor, name: str, weight: Weight, loras: Sequence[tuple[Lora, float]]) -> None:
    """`merged`, in memory that is there already."""
    if changed := changes(name, loras):
        out.copy_(added(weight, changed, out.dtype))
    else:
        weight.into(out)


def changes(name: str, loras: Sequence[tuple[Lora, float]]) -> list[tuple[Layer, float]]:
    """What the LoRAs add to a weight, and how strongly."""
    return [
        (lora.layers[name], strength)
        for lora, strength in loras
        if name in lora.layers and strength * lora.layers[name].factor
    ]


def added(weight: Weight, changed: Sequence[tuple[Layer, float]], dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    result = weight.into(torch.empty(weight.shape, dtype=wide, device="cpu"))
    for layer, strength in changed:
        delta = layer.b.tensor().to(wide) @ layer.a.tensor().to(wide)
        result = delta.mul_(strength * layer.factor).add_(result)
        if not result.isfinite().all():
            raise CheckpointError(layer.a.file.path, [f"{layer.a.name}: the merged weight is not finite"])
    return result.to(dtype)


def layer_and_part(name: str) -> tuple[str, str]:
    """The layer that a tensor belongs to, and which part of its LoRA it is; two empty strings if it is none."""
    return next(
        ((name.removesuffix(ending), part) for ending, part in PARTS.items() if name.endswith(ending)), ("", "")
    )


def spellings(layer: str) -> list[str]:
    """How the formats call the layer of our name. Kohya's come in either dialect; musubi-tuner wraps the model."""
    theirs = to_lightricks(layer)
    flat = [name.replace(".", "_") for name in (layer, theirs)]
    return [
        f"diffusion_model.{theirs}",
        f"transformer.{layer}",
        layer,
        *(f"lora_unet_{wrapper}{name}" for wrapper in ("", "model_") for name in flat),
    ]


def match_layers(tensors: Iterable[Stored], plan: Plan) -> tuple[dict[str, LayerParts], list[str]]:
    """The parts of each weight's LoRA, by our names, and what is wrong with the names."""
    weights = {
        spelling: name
        for name in plan.weights
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
    """What is wrong with the parts of one layer, by the header."""
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
    """alpha / rank, the alpha being a tensor of the layer's, or in PEFT's config; 1 without either."""
    rank = parts["A"].shape[0]
    by_peft = adapter.factor(name.removesuffix(".weight"), rank) if adapter else 1.0
    if "alpha" not in parts:
        return by_peft
    alpha = parts["alpha"].tensor().double().item()
    result = (alpha or rank) / rank if kohya else alpha / rank  # to kohya's scripts, 0 means the rank
    if adapter and not math.isclose(result, by_peft, rel_tol=2**-8):  # alpha may be rounded to bfloat16
        raise CheckpointError(
            parts["alpha"].file.path, [f"{parts['alpha']} = {alpha}: a factor of {result}, but {by_peft} by {ADAPTER}"]
        )
    return result


def raise_problems(file: TensorFile, problems: Sequence[str]) -> None:
    if problems:
        raise CheckpointError(file.path, problems)


# PEFT's config, in the metadata of files that diffusers writes: the only place where these have the alpha.


def read_adapter(file: TensorFile) -> Adapter | None:
    """Return PEFT's config from the metadata, None without one.

    Raises `CheckpointError` for a config that asks for more than the product of two factors.
    """
    if ADAPTER not in file.metadata:
        return None
    try:
        config = {
            key.removeprefix(ADAPTER_PREFIX): value
            for key, value in parse_json(file.metadata[ADAPTER].encode()).items()
        }
        config = {key: value for key, value in config.items() if "." not in key}  # the others are the connectors'
        return parse_adapter(config) if config else None
    except ValueError as error:
        raise CheckpointError(file.path, [f"{ADAPTER}: {error}"]) from None


def parse_adapter(config: dict[str, Any]) -> Adapter:
    """Check PEFT's config. Raises `ValueError` for what is not supported."""
    for key, value in config.items():
        require(not (value and is_variant(key)), f"{key} = {value!r} is not supported")
    # The other initialisations change the base weight, too: PEFT repeats that when it loads such a file.
    initialisation = config.get("init_lora_weights", True)
    require(initialisation in (True, False, "gaussian"), f"init_lora_weights = {initialisation!r} is not supported")
    patterns = config.get("alpha_pattern") or {}
    require(isinstance(patterns, dict), f"alpha_pattern = {patterns!r}: expected an object")
    for end, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        require(is_finite_number(alpha), f"{end} = {alpha!r}: expected a finite number")
        require(re.fullmatch(r"\^?[\w.]+", end) is not None, f"{end!r}: expected the end of a layer's name")
    return Adapter(config["lora_alpha"], patterns, bool(config.get("use_rslora")))


def is_variant(key: str) -> bool:
    """Tell whether this key, if set, asks for a method other than LoRA. PEFT adds such keys with every release, so they
    are recognised by their names."""
    return key.endswith(("_config", "_tokens")) or (key.startswith("use_") and key != "use_rslora")


def is_finite_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
