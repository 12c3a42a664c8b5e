"""LoRAs: changes of weights, matched to a model by name and added to them.

All formats mean W' = W + strength * factor * change. The tables below say how they spell names and what a change is
made from: the product B @ A of two narrow matrices (LoRA), a Kronecker product (LoKr), or the difference itself. The
factor is

- alpha / rank of a layer with an alpha tensor,
- what PEFT's config says (adapter.py), if there is one,
- 1 in all other files.

The rank is that of the layer's own tensors. Published files limit it to the layer's width, whatever their metadata say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..lazy import torch
from .adapter import Adapter, files_of, is_finite_number, read_adapters, unused_alphas
from .header import read_header
from .match import Plan
from .names import FOREIGN_INSIDE, OPENINGS, to_diffusers, to_lightricks
from .quantised import FP8, PLAIN_DTYPES, Weight
from .shapes import parameter_shapes
from .storage import CheckpointError, Stored, TensorFile

if TYPE_CHECKING:
    from torch import Tensor

PEFT, KOHYA = "peft", "kohya"
# What names begin with, and the format that this shows. A layer's name follows in either dialect. Longer ones are first
# where one begins with another.
LORA_PREFIXES = {
    "base_model.model.diffusion_model.": PEFT,
    "base_model.model.transformer.": PEFT,
    "base_model.model.": PEFT,
    "model.diffusion_model.": "lightricks",
    "diffusion_model.": "lightricks",
    "transformer.": "diffusers",
    "lora_unet_model_": KOHYA,  # musubi-tuner's
    "lora_unet_": KOHYA,
    "lora_transformer_": KOHYA,
    "lycoris_": KOHYA,
    "": "without prefix",
}
UNDERSCORED = tuple(prefix for prefix, format in LORA_PREFIXES.items() if format == KOHYA)  # then dots are underscores
# The first segments of layers' names, which show what a name without a prefix is.
FIRST_SEGMENTS = tuple(
    f"{segment}."
    for segment in (
        *(segment for segments in OPENINGS.values() for segment in segments),
        "transformer_blocks",
        "proj_out",
        "audio_proj_out",
        "caption_projection",
        "audio_caption_projection",
    )
)
# What follows the name of a layer, and which part of its change it is.
PARTS = {
    ".lora_A.weight": "A",
    ".lora_A.default.weight": "A",
    ".lora_down.weight": "A",
    ".lora.down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.default.weight": "B",
    ".lora_up.weight": "B",
    ".lora.up.weight": "B",
    ".alpha": "alpha",
    ".lokr_w1": "w1",
    ".lokr_w1_a": "w1_a",
    ".lokr_w1_b": "w1_b",
    ".lokr_w2": "w2",
    ".lokr_w2_a": "w2_a",
    ".lokr_w2_b": "w2_b",
    ".diff": "diff",
    ".diff_b": "diff of the bias",
}
BIAS = "diff of the bias"  # the part that changes a bias; all others change the weight
# Parts of other models after any prefix: the connectors, what is before them, and text encoders.
FOREIGN_LAYERS = (
    *FOREIGN_INSIDE,
    "text_embedding_projection.",
    "feature_extractor_linear.",
    "connectors.",
    "text_encoder.",
)
TEXT_ENCODERS = ("lora_te_", "lora_te1_", "lora_te2_")  # kohya's prefixes of them
SKIPPED = (
    tuple(
        prefix + (part.replace(".", "_") if prefix in UNDERSCORED else part)
        for prefix in LORA_PREFIXES
        for part in FOREIGN_LAYERS
    )
    + TEXT_ENCODERS
)
NO_ALPHA = "its names are PEFT's, whose alpha is in adapter_config.json, and that is not beside it"
FACTOR_DTYPES = (*PLAIN_DTYPES, *FP8)
LayerParts = dict[str, Stored]  # the tensors of one parameter's change, by the values of `PARTS`


def low_rank(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the product of the two narrow matrices of a LoRA."""
    return parts["B"] @ parts["A"]


def kronecker(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the Kronecker product of a LoKr, each side of which is whole or the product of two matrices."""
    return torch.kron(
        *(parts[side] if side in parts else parts[f"{side}_a"] @ parts[f"{side}_b"] for side in ("w1", "w2"))
    )


def whole_difference(parts: Mapping[str, Tensor]) -> Tensor:
    """Return a change that is stored whole."""
    return next(iter(parts.values()))


class Kind(NamedTuple):
    """A way to store a change: its parts with their sizes, and what is computed from them."""

    sizes: dict[str, str]  # by part: OUT and IN are the weight's, R is the rank; "" is the weight's whole shape
    change: Callable[[Mapping[str, Tensor]], Tensor]

    def __str__(self) -> str:
        return " and ".join(self.sizes)

    @property
    def scaled(self) -> bool:
        """Return whether an alpha may lie beside the parts."""
        return any(self.sizes.values())

    def fits(self, parts: LayerParts) -> bool:
        """Return whether these are the parts of such a change."""
        return self.sizes.keys() == parts.keys() - ({"alpha"} if self.scaled else set())

    def shape(self, parts: LayerParts) -> tuple[int, ...]:
        """Return the shape of the weight that these parts are for, judged by them alone."""
        size = {
            letter: length
            for part, letters in self.sizes.items()
            for letter, length in zip(letters.split(), parts[part].shape, strict=False)
        }
        if not self.scaled:
            return next(iter(parts.values())).shape
        return tuple(math.prod(size[letter] for letter in size if letter[0] == side) for side in "OI")

    def rank(self, parts: LayerParts) -> int | None:
        """Return the rank by which an alpha is divided, or None if an alpha has no effect."""
        for part, letters in self.sizes.items():
            if "R" in letters.split():
                return parts[part].shape[letters.split().index("R")]
        return None

    def shapes(self, parts: LayerParts, whole: tuple[int, ...]) -> dict[str, list[tuple[int, ...]]]:
        """Return the shapes that each part may have. The first part with a size decides the size.

        OUT is O1 * O2, and IN is I1 * I2.
        """
        size = dict(zip(("OUT", "IN"), whole, strict=False))
        result: dict[str, list[tuple[int, ...]]] = {"alpha": [(), (1,)]}
        for part, letters in self.sizes.items():
            for i, letter in enumerate(letters.split()):
                size.setdefault(letter, max((1, *parts[part].shape[i : i + 1])))
                if letter in ("O1", "I1"):
                    product = size["OUT" if letter == "O1" else "IN"]
                    size[letter] = math.gcd(product, size[letter])
                    size[f"{letter[0]}2"] = product // size[letter]
            result[part] = [tuple(size[letter] for letter in letters.split()) if letters else whole]
        return result


LEFT_SIDES = ({"w1": "O1 I1"}, {"w1_a": "O1 R", "w1_b": "R I1"})
RIGHT_SIDES = ({"w2": "O2 I2"}, {"w2_a": "O2 R", "w2_b": "R I2"})
KINDS = (
    Kind({"A": "R IN", "B": "OUT R"}, low_rank),
    *(Kind(left | right, kronecker) for left in LEFT_SIDES for right in RIGHT_SIDES),
    Kind({"diff": ""}, whole_difference),
    Kind({BIAS: ""}, whole_difference),
)


class Layer(NamedTuple):
    """The change of one parameter."""

    kind: Kind
    parts: LayerParts
    factor: float

    @property
    def rank(self) -> int | None:
        """Return the rank of this change, or None if it has none."""
        return self.kind.rank(self.parts)

    def change(self, dtype: torch.dtype) -> Tensor:
        """Return the change without its factor, computed in a dtype."""
        return self.kind.change({part: self.parts[part].tensor().to(dtype) for part in self.kind.sizes})


class Lora(NamedTuple):
    """A LoRA file, understood from its header and its alphas alone."""

    path: Path
    format: str
    layers: dict[str, Layer]  # by the parameters' names in the model
    skipped: dict[str, int]  # number of tensors that other models own, by prefix
    alphas: str  # where they were found
    notes: list[str]

    def __str__(self) -> str:
        ranks = [layer.rank for layer in self.layers.values() if layer.rank is not None]
        factors = [layer.factor for layer in self.layers.values()]
        skipped = ", ".join(f"{count} tensors of {prefix}*" for prefix, count in self.skipped.items()) or "nothing"
        return (
            f"{self.path}: {self.format} LoRA, {len(self.layers)} layers, "
            f"{f'ranks {min(ranks)} to {max(ranks)}' if ranks else 'no ranks'}, "
            f"factors {min(factors):g} to {max(factors):g} by {self.alphas}, skipped {skipped}"
        )


class Found(NamedTuple):
    """What the names of a file say of the change of one parameter."""

    module: str  # the layer as the file spells it, without its prefix
    flat: bool
    parts: LayerParts


def lora_format(names: Iterable[str]) -> str | None:
    """Return the format of a LoRA with these tensor names, or None if they belong to no LoRA.

    A mixture is named like "kohya and lightricks".
    """
    found = set()
    for name in names:
        prefix = next(prefix for prefix in LORA_PREFIXES if name.startswith(prefix))
        if layer_and_part(name)[1] not in ("", "alpha") and (prefix or name.startswith(FIRST_SEGMENTS)):
            found.add(LORA_PREFIXES[prefix])
    return " and ".join(sorted(found)) or None


def is_lora(names: Collection[str]) -> bool:
    """Return whether most of these tensors are parts of a LoRA of the transformer."""
    return 2 * sum(name.endswith((*PARTS,)) for name in names) > len(names) and lora_format(names) is not None


def read_lora(path: str | Path, plan: Plan | None = None) -> Lora:
    """Read a LoRA for the model of a plan, from a file or from a folder of PEFT's.

    What it has for a stream that is not read is checked as well, and left out. Without a plan, its layers and shapes
    only have to agree with each other.

    Raises `CheckpointError`, with all problems, unless every tensor of the file is understood and fits the model.
    """
    file, tensors = read_header(files_of(path))
    skipped = Counter(owner for name in tensors if (owner := foreign(name)))
    own = [stored for stored in tensors.values() if not foreign(stored.name)]
    shapes = parameter_shapes(plan.config) if plan else {}
    whole, problems = match_layers(own, shapes or implied_names(own))
    found = {name: it for name, it in whole.items() if not plan or name in plan.weights}
    if plan and whole and not found:
        problems.append(f"nothing in it is of the {' and '.join(plan.streams)} stream")
    format = lora_format(stored.name for stored in own) or ""
    if not format or (KOHYA in format and format != KOHYA):
        problems.insert(0, f"names of several formats: {format}" if format else "no LoRA of the transformer in it")
    problems += [problem for name, it in whole.items() for problem in faults(name, shapes.get(name), it.parts)]
    raise_problems(file, problems)
    by_peft = format == PEFT or any(".default." in stored.name for stored in own)
    adapters = read_adapters(file, by_peft)
    raise_problems(file, [problem for name, it in whole.items() for problem in denied(name, it, adapters)])
    adapter, origin = next(iter(adapters.values()), None), " and ".join(adapters)
    layers = {
        name: Layer(kind, it.parts, factor(it, kind, adapter, origin))
        for name, it in found.items()
        if (kind := kind_of(it.parts))
    }
    alphas = [layer.parts["alpha"] for layer in layers.values() if "alpha" in layer.parts]
    ranks = [layer.rank for layer in layers.values() if layer.rank is not None]
    where = " and ".join(filter(None, ["alpha tensors" if alphas else "", origin])) or "no alpha"
    unsaid = ranks and not adapter and not alphas
    raise_problems(file, [NO_ALPHA] if unsaid and PEFT in format else [])
    notes = unused_alphas(file.metadata, max(ranks)) if unsaid else []
    if negative := [name for name, layer in layers.items() if layer.factor < 0]:
        notes.append(f"{len(negative)} negative factors by {where}, such as that of {negative[0]}: they subtract")
    return Lora(file.path, format, layers, dict(skipped), where, notes)


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
        result = layer.change(wide).mul_(strength * layer.factor).add_(result)
        if not result.isfinite().all():
            culprit = culprit_of(layer, weight)
            raise CheckpointError(culprit.file.path, [f"{culprit.name}: the merged weight is not finite"])
    return result.to(dtype)


def culprit_of(layer: Layer, weight: Weight) -> Stored:
    """Return the tensor whose values make a sum infinite or NaN: the first one with such values, or else the first."""
    parts = [layer.parts[part] for part in layer.kind.sizes]
    damaged = (stored for stored in parts if not stored.tensor().double().isfinite().all())
    base = [] if weight.read(torch.float64).isfinite().all() else [weight.tensor]
    return next(damaged, (base or parts)[0])


def foreign(name: str) -> str | None:
    """Return the prefix that shows that a tensor belongs to another model, or None."""
    return next((prefix for prefix in SKIPPED if name.startswith(prefix)), None)


def layer_and_part(name: str) -> tuple[str, str]:
    """Return the layer that a tensor belongs to and which part of its change it is, or two empty strings."""
    return next(
        ((name.removesuffix(ending), part) for ending, part in PARTS.items() if name.endswith(ending)), ("", "")
    )


def spellings(layer: str) -> set[str]:
    """Return the names of a layer: in both dialects, and without the 0 of `to_out.0`."""
    names = {layer, to_lightricks(layer)}
    return names | {name.removesuffix(".0") for name in names if name.endswith(".to_out.0")}


def implied_names(tensors: Iterable[Stored]) -> set[str]:
    """Return the names of the parameters that a LoRA may change, judged by its own names. Underscores stay in them."""
    wholes = {whole for stored in tensors for whole, part in [layer_and_part(stored.name)] if part}
    openings = {whole: next(prefix for prefix in LORA_PREFIXES if whole.startswith(prefix)) for whole in wholes}
    layers = {to_diffusers(whole.removeprefix(prefix)) for whole, prefix in openings.items()}
    layers = {f"{layer}.0" if layer.endswith(".to_out") else layer for layer in layers}
    return {f"{layer}.{parameter}" for layer in layers for parameter in ("weight", "bias")}


def match_layers(tensors: Iterable[Stored], names: Collection[str]) -> tuple[dict[str, Found], list[str]]:
    """Return what a LoRA has for each of the parameters of a model, and all problems with its names."""
    layers = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    dotted = {name: layer for layer in layers for name in spellings(layer)}
    flat = {name.replace(".", "_"): layer for name, layer in dotted.items()}
    found: dict[str, Found] = {}
    problems = []
    for stored in tensors:
        whole, part = layer_and_part(stored.name)
        matching = (
            (prefix, module, known[module])
            for prefix in LORA_PREFIXES
            for known, module in [(flat if prefix in UNDERSCORED else dotted, whole.removeprefix(prefix))]
            if whole.startswith(prefix) and module in known
        )
        prefix, module, layer = next(matching, ("", "", ""))
        name = layer + (".bias" if part == BIAS else ".weight")
        if not part:
            problems.append(f"{stored}: not supported, a layer can have {', '.join(PARTS)}")
        elif name not in names:
            problems.append(f"{stored}: the model has no such layer{' with a bias' * (layer != '')}")
        else:
            parts = found.setdefault(name, Found(module, prefix in UNDERSCORED, {})).parts
            if parts.setdefault(part, stored) is not stored:
                problems.append(f"{stored}: the same as {parts[part].name}")
    return found, problems


def kind_of(parts: LayerParts) -> Kind | None:
    """Return the kind of change that has exactly these parts, or None."""
    return next((kind for kind in KINDS if kind.fits(parts)), None)


def faults(name: str, shape: tuple[int, ...] | None, parts: LayerParts) -> list[str]:
    """Return what is wrong with the tensors of one parameter's change, judged by names, shapes and dtypes.

    `shape` is the parameter's, or None if there is no model.
    """
    kind = kind_of(parts)
    if shape is not None and len(shape) != 2 and not parts.keys() <= {"diff", BIAS}:
        return [f"{stored}: {name} is not of a Linear layer" for stored in parts.values()]
    if kind is None:
        has, known = " and ".join(sorted(parts)), ", or ".join(map(str, KINDS))
        return [f"{stored}: the layer has {has}; expected {known}" for stored in parts.values()]
    shapes = kind.shapes(parts, kind.shape(parts) if shape is None else shape)
    return [f"{stored}: expected {said}" for part, stored in parts.items() if (said := misfit(stored, shapes[part]))]


def misfit(stored: Stored, shapes: Sequence[tuple[int, ...]]) -> str:
    """Return the shapes and dtypes that a tensor may have, as far as its own are others."""
    shape = "" if stored.shape in shapes else " or ".join(str(list(right)) for right in shapes)
    return ", ".join(filter(None, [shape, "" if stored.dtype in FACTOR_DTYPES else ", ".join(FACTOR_DTYPES)]))


def denied(name: str, found: Found, adapters: Mapping[str, Adapter]) -> list[str]:
    """Return what PEFT's configs say against the change of one parameter."""
    a, b = found.parts.get("A"), found.parts.get("B")
    if a is None or b is None:
        return []
    names = spellings(name.removesuffix(".weight")) | {found.module}
    rank, width = a.shape[0], min(a.shape[1], b.shape[0])
    return [
        f"{a}: {said} by {where}" for where, adapter in adapters.items() for said in adapter.denials(names, rank, width)
    ]


def factor(found: Found, kind: Kind, adapter: Adapter | None, origin: str) -> float:
    """Return the factor of one change: alpha / rank if the file has an alpha, or else 1.

    A LoKr whose sides are both whole has no rank, and the factor 1: trainers write an alpha there that means nothing.

    Raises `CheckpointError` if the alpha is not finite, or disagrees with PEFT's config.
    """
    parts, rank = found.parts, kind.rank(found.parts)
    by_peft = adapter.factor(found.module, rank) if adapter and rank and "A" in parts else 1.0
    if rank is None or "alpha" not in parts:
        return by_peft
    alpha = parts["alpha"].number()
    result = (alpha or rank) / rank if found.flat else alpha / rank  # kohya's scripts take 0 to mean the rank
    if not math.isfinite(result):
        raise_problems(parts["alpha"].file, [f"{parts['alpha']}: not finite"])
    if adapter and not math.isclose(result, by_peft, rel_tol=2**-8):  # alpha may be rounded to bfloat16
        said = f"{parts['alpha']} = {alpha}: a factor of {result}, but {by_peft} by {origin}"
        raise_problems(parts["alpha"].file, [said])
    return result


def raise_problems(file: TensorFile, problems: Sequence[str]) -> None:
    """Raise `CheckpointError` if there are problems."""
    if problems:
        raise CheckpointError(file.path, problems)
