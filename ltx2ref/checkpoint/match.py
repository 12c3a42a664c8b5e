"""Matching: which stored tensor holds which parameter of the model, and everything that is wrong with a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from ..config import TransformerConfig
from ..interface import DIFFUSERS, Conventions, LTX2VideoTransformer3DModel
from .header import parse_json
from .keywords import NO_OPTIONS, ReadingOptions
from .names import OPENINGS, PREFIXES, Dialect, common_prefixes, dialects
from .quantised import COMPANIONS, MARKED, Nibbles, Weight, identify
from .resolve_config import resolve
from .source import CheckpointFiles, open_source
from .storage import CheckpointError, Stored

SCALE = "_scale"  # suffix of a tensor that is the scale of another one
FILE_MARKER = "scaled_fp8"  # a tensor of old ComfyUI files, named after the prefix: float8 weights have scales
QUANTISATION = "_quantization_metadata"  # key of the metadata that lists the formats of layers
FIRST_BLOCK = "transformer_blocks.0."
Shapes = dict[str, tuple[int, ...]]
Built = TypeVar("Built", bound=LTX2VideoTransformer3DModel)


@dataclass(frozen=True)
class Plan:
    """A checkpoint matched to a model, from its headers alone."""

    source: CheckpointFiles
    dialect: Dialect
    config: TransformerConfig
    origins: dict[str, str]  # where the value of each config field comes from
    weights: dict[str, Weight]  # by the parameters' names in the model
    formats: dict[str, str]  # by the parameters' names in the model
    foreign: dict[str, list[Stored]]  # tensors that other models own, by prefix
    unknown: list[Stored]  # tensors that belong neither to the model nor to a known other one
    problems: list[str]
    notes: list[str]

    def check(self) -> None:
        """Raise `CheckpointError` with all problems, if there are any."""
        if self.problems:
            raise CheckpointError(self.source.path, self.problems)


def make_plan(path: str | Path | CheckpointFiles, options: ReadingOptions = NO_OPTIONS) -> Plan:
    """Match a checkpoint to a model by its headers.

    Raises `CheckpointError` if the checkpoint has no transformer. Lesser faults are listed in the plan's `problems`.
    """
    source = path if isinstance(path, CheckpointFiles) else open_source(path, options.variant)
    dialect = the_dialect(source, options.prefix)
    foreign: dict[str, list[Stored]] = {}
    own: dict[str, Stored] = {}
    for name, stored in source.tensors.items():
        prefix = dialect.foreign(name)
        if prefix is None:
            own[name] = stored
        else:
            foreign.setdefault(prefix, []).append(stored)
    companions = {name: owner for name in own if (owner := find_owner(name, own))}
    packed = {owner for owner, kind in companions.values() if kind == "second scale"}
    shapes = {
        dialect.ours(name): unpacked(stored, name in packed)
        for name, stored in own.items()
        if name.startswith(dialect.prefix) and name not in companions
    }
    facts = resolve(source, shapes, options.config)
    plan = Plan(source, dialect, facts.config, facts.origins, {}, {}, foreign, [], facts.problems, facts.notes)
    if not facts.problems:  # with a wrong config, all further problems would only be consequences
        match_weights(plan, own, companions, options.nibbles)
    return plan


def the_dialect(source: CheckpointFiles, prefix: str | None) -> Dialect:
    """Return the dialect of a source, whose names all begin with `prefix` if that is given.

    Raises `CheckpointError` if its names fit no dialect, or several.
    """
    found = dialects(source.tensors, prefix or "")
    if len(found) == 1:
        return found.pop()
    if found:
        speakers = {
            str(dialect): [name for name in source.tensors if dialect in dialects([name], prefix or "")]
            for dialect in found
        }
        counts = "; ".join(
            f"{len(names)} have {dialect}, such as {names[0]}"
            for dialect, names in sorted(speakers.items(), key=lambda item: len(item[1]))
        )
        raise CheckpointError(source.path, [f"names of several dialects: {counts}"])
    example = ", ".join(list(source.tensors)[:3]) or "none at all"
    openings = " or ".join(names[0] for names in OPENINGS.values())
    problem = (
        f"no LTX-2 transformer in it: no tensor begins with {openings} etc., bare or after "
        f"{' or '.join(filter(None, PREFIXES))}"
    )
    if prefix:
        problem += f", all after the given prefix {prefix!r}"
    problem += f"; its {len(source.tensors)} tensors: {example}"
    common = common_prefixes(source.tensors)
    if len(common) == 1 and common[0] != prefix:
        problem += (
            f". All its names fit after {common[0]}: to read it, give prefix={common[0]!r} (--prefix {common[0]})"
        )
    raise CheckpointError(source.path if len(source.files) > 1 else source.files[0].path, [problem])


def find_owner(name: str, own: Mapping[str, Stored]) -> tuple[str, str] | None:
    """Return the tensor that this one is a companion of, and which kind of companion it is, or None."""
    for suffix, kind in COMPANIONS.items():
        if name.endswith(suffix) and (owner := name.removesuffix(suffix) + ".weight") in own:
            return owner, kind
    owner = name.removesuffix(SCALE)
    return (owner, "scale") if owner != name and owner in own else None


def unpacked(stored: Stored, fp4: bool) -> tuple[int, ...]:
    """Return the shape of a tensor once its fp4 codes, two in a byte, are unpacked."""
    return (*stored.shape[:-1], 2 * stored.shape[-1]) if fp4 and stored.shape else stored.shape


def match_weights(
    plan: Plan, own: Mapping[str, Stored], companions: Mapping[str, tuple[str, str]], nibbles: Nibbles | None
) -> None:
    """Fill in the plan's weights and formats, and list what is missing, unexpected or cannot be decoded."""
    problems, dialect = plan.problems, plan.dialect
    parts: dict[str, dict[str, Stored]] = {}
    used = {dialect.prefix + FILE_MARKER} & own.keys()
    for name, (owner, kind) in companions.items():
        if parts.setdefault(owner, {}).setdefault(kind, own[name]) is own[name]:
            used.add(name)
    expected = parameter_shapes(plan.config)
    for name, shape in expected.items():
        stored = own.get(dialect.stored(name))
        if stored is None:
            problems.append(f"{dialect.stored(name)}: missing, expected {list(shape)}")
            continue
        used.add(stored.name)
        kinds = parts.get(stored.name, {})
        weight = Weight(shape, stored, kinds, "low" if "torchao marker" in kinds else nibbles or "high")
        try:
            plan.formats[name] = identify(weight)
        except ValueError as error:
            problems.append(str(error))
        plan.weights[name] = weight
    for name in own.keys() - used | {name for name, (owner, _) in companions.items() if owner not in used}:
        plan.unknown.append(own[name])
    problems += [f"{stored}: {unexpected(stored.name)}" for stored in sorted(plan.unknown, key=lambda s: s.name)]
    check_formats(plan, bool(used & {dialect.prefix + FILE_MARKER}))
    if "nvfp4" in plan.formats.values():
        check_nibbles(plan, nibbles)
    skipped = sum(map(len, plan.foreign.values()))
    assert len(used) + len(plan.unknown) + skipped == len(plan.source.tensors)


@cache
def parameter_shapes(config: TransformerConfig) -> Shapes:
    """Return the shapes of all parameters by name. All blocks are alike, so only one is built."""
    model = without_values(LTX2VideoTransformer3DModel, replace(config, num_layers=1))
    first = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    block = {name.removeprefix(FIRST_BLOCK): shape for name, shape in first.items() if name.startswith(FIRST_BLOCK)}
    outside = {name: shape for name, shape in first.items() if not name.startswith(FIRST_BLOCK)}
    return outside | {
        f"transformer_blocks.{i}.{name}": shape for i in range(config.num_layers) for name, shape in block.items()
    }


def without_values(kind: type[Built], config: TransformerConfig, conventions: Conventions = DIFFUSERS) -> Built:
    """Build a model on the meta device, where its parameters have shapes but no values."""
    with torch.device("meta"), WithoutValues():
        return kind(config, conventions)


class WithoutValues(TorchFunctionMode):
    """A mode that skips the arithmetic of initial values.

    To do it on meta, torch would import a second's worth of code.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.mul:
            return args[0]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def unexpected(name: str) -> str:
    """Return why a tensor is not expected."""
    if name.endswith((*COMPANIONS, SCALE, "scale")):
        return "a scale or marker that no tensor uses"
    return "not expected in this model"


def check_formats(plan: Plan, marked: bool) -> None:
    """Report float8 weights that lack a scale if other weights have one or the file says that there are scales.

    Without such a hint, a float8 weight without a scale is a plain cast.
    """
    scaled = [name for name, format in plan.formats.items() if format == "fp8 scaled"]
    cast = [name for name, format in plan.formats.items() if format == "fp8 cast"]
    if cast and (scaled or marked):
        why = f"{len(scaled)} others have one" if scaled else f"{FILE_MARKER} says that it has one"
        plan.problems.extend(f"{plan.weights[name].tensor}: its scale is missing, {why}" for name in cast)
    if QUANTISATION in plan.source.metadata:
        plan.problems.extend(misquoted(plan))


def misquoted(plan: Plan) -> list[str]:
    """Return the layers of the transformer that the metadata declare to have another format than they have.

    A layer's own marker takes precedence over the metadata, as it does in ComfyUI.
    """
    try:
        layers = parse_json(plan.source.metadata[QUANTISATION].encode())["layers"]
        declared = {f"{layer}.weight": said["format"] for layer, said in layers.items()}
        marked = {weight.tensor.name for weight in plan.weights.values() if "marker" in weight.companions}
        wanted = {
            name: MARKED[kind][0]
            for name, kind in declared.items()
            if plan.dialect.foreign(name) is None and name not in marked
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{QUANTISATION}: not the formats of layers: {type(error).__name__} {error}"]
    tensors = plan.source.tensors
    return [
        f"{QUANTISATION}: {name} is {declared[name]}, but the file has "
        f"{tensors[name].dtype if name in tensors else 'no such tensor'}"
        for name, dtype in wanted.items()
        if name not in tensors or tensors[name].dtype != dtype
    ]


def check_nibbles(plan: Plan, nibbles: Nibbles | None) -> None:
    """Report a wrong order of NVFP4 codes, and note it when the order has to be assumed.

    Files from torchao carry its markers. Files with either kind of metadata come from ComfyUI or Lightricks.
    """
    kinds = [plan.weights[name].companions.keys() for name, format in plan.formats.items() if format == "nvfp4"]
    if nibbles and any("torchao marker" in kind for kind in kinds) and nibbles == "high":
        plan.problems.append("nibbles = 'high', but its torchao_nvfp4 markers say low")
    told = QUANTISATION in plan.source.metadata or all(kind & {"marker", "torchao marker"} for kind in kinds)
    if not told and nibbles is None:
        plan.notes.append(
            "nothing in the checkpoint says which NVFP4 code of a byte comes first: assumed the high "
            "nibble, as in Lightricks' files (nibbles='low' for the other order)"
        )
