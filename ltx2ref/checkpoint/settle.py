"""Facts that are still open after shapes and layers' own sayings: decided by the quantiser, the caller, or refused."""

import re
from collections.abc import Collection, Mapping
from fnmatch import translate
from typing import Any, NamedTuple, get_args

from ..config import TransformerConfig
from .names import PREFIXES
from .quantised import FORMATS, Nibbles, ScaleOrder, Weight, add_fact
from .sayings import COMFY, DATA, QUANTISATION, QUANTISER, FactMap, Saying
from .storage import require
from .streams import StreamName

# For each fact that shapes may leave open: what is open, and whose files have which value.
OPEN = {
    "nibbles": (
        "which of two codes in a byte comes first",
        "nibbles='high' (ComfyUI, Lightricks) or nibbles='low' (ModelOpt, torchao)",
    ),
    "scales": (
        "whether scales of blocks are in cuBLAS' tiles",
        "scales='tiled' (ComfyUI, Lightricks) or scales='flat' (ModelOpt)",
    ),
}
ASKING = ": give "  # between a problem and the arguments that settle it
# The formats that ModelOpt's algorithms make, and bitsandbytes'.
ALGORITHMS = {"NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4", "FP8": "fp8 scaled", "MXFP8": "mxfp8"} | {
    kind: f"bitsandbytes {kind}" for kind in ("int8", "nf4", "fp4")
}


class ReadingOptions(NamedTuple):
    """The caller's word on a checkpoint where its files say nothing. `load` documents each field."""

    config: TransformerConfig | None = None
    nibbles: Nibbles | None = None
    scales: ScaleOrder | None = None
    prefix: str | None = None
    variant: str | None = None
    streams: StreamName | None = None


NO_OPTIONS = ReadingOptions()


def require_choices(nibbles: str | None, scales: str | None) -> None:
    """Raise `ValueError` unless both arguments have values that `OPEN` offers, or None."""
    for name, given, known in (("nibbles", nibbles, get_args(Nibbles)), ("scales", scales, get_args(ScaleOrder))):
        require(given in (*known, None), f"{name}: expected {' or '.join(map(repr, known))}, or None, got {given!r}")


def settle_facts(
    weights: Collection[Weight],
    metadata: Mapping[str, str],
    quantiser: Saying | None,
    nibbles: str | None,
    scales: str | None,
    whole: bool = True,
) -> tuple[list[str], list[str]]:
    """Decide the open facts of weights, and return problems and notes.

    The config of the quantiser comes first, then what shapes of others in the file show, then the caller's arguments,
    then habits: ModelOpt's, and that of Lightricks and ComfyUI, whose files have Lightricks' config in the metadata and
    no config of a quantiser. A fact that is open after that is a problem.

    Unless these weights are the `whole` file, what matches none of them may be about the others, and is no problem.
    """
    problems, notes = not_skipped(weights, quantiser), list[str]()
    if whole:
        problems += wrong_algorithm(weights, quantiser)
    concerned = {fact: [x for x in weights if x.format in FORMATS and fact in FORMATS[x.format].facts] for fact in OPEN}
    for fact, argument in (("nibbles", nibbles), ("scales", scales)):
        problems += decide(concerned[fact], fact, certain(quantiser, fact), quantiser.where if quantiser else "")
        decide_alike(concerned[fact], fact)
        problems += decide(concerned[fact], fact, argument, f"the argument {fact}")
        if argument is not None and not concerned[fact] and whole:
            problems.append(f"{fact} = {argument!r} settles nothing: no weight is in a format that leaves it open")
    customs, why = habits(metadata, quantiser)
    if any(x.facts.get(fact, customs.get(fact)) != customs.get(fact) for fact in OPEN for x in concerned[fact]):
        customs = {}  # a producer that does otherwise elsewhere in the file has other habits
    for fact, (what, choice) in OPEN.items():
        undecided = [weight for weight in concerned[fact] if fact not in weight.facts]
        if not undecided:
            continue
        value = customs.get(fact)
        problems += decide(undecided, fact, value, why)
        if value is None:
            example = undecided[0].tensor.name
            problems.append(f"nothing says {what}, in {len(undecided)} weights such as {example}{ASKING}{choice}")
        elif quantiser.where == QUANTISER if quantiser else QUANTISATION not in metadata:
            notes.append(f"nothing in the checkpoint says {what}: assumed {value}, {why} ({choice})")
    return problems + unlike_others(weights) + lost_parts(weights), notes + not_rotated(weights)


def wrong_algorithm(weights: Collection[Weight], quantiser: Saying | None) -> list[str]:
    """Return the problem that a quantiser's config names a format which no weight has."""
    algorithm = quantiser.facts.get("algorithm", "") if quantiser else ""
    if quantiser is None or algorithm not in ALGORITHMS:
        return []
    wanted = ALGORITHMS[algorithm]
    if any(weight.format == wanted for weight in weights):
        return []
    return [f"{quantiser.where} says {algorithm}, but no weight is {wanted}"]


def not_skipped(weights: Collection[Weight], quantiser: Saying | None) -> list[str]:
    """Return the problem that weights are quantised which the quantiser's config says it has left alone."""
    skipped = frozenset(quantiser.facts.get("skipped", ()) if quantiser else ())
    patterns = [re.compile(translate(name)) for name in sorted(skipped) if "*" in name]
    there = []
    for weight in weights if skipped else ():
        layer = weight.tensor.name.removesuffix(DATA).removesuffix(".weight")
        layer = next(layer.removeprefix(prefix) for prefix in PREFIXES if layer.startswith(prefix))
        if weight.format in FORMATS and (layer in skipped or any(pattern.match(layer) for pattern in patterns)):
            there.append(str(weight.tensor))
    if quantiser is None or not there:
        return []
    more = f" (and {len(there) - 1} more)" if len(there) > 1 else ""
    return [f"{there[0]}{more}: quantised, but {quantiser.where} says that it is not"]


def certain(quantiser: Saying | None, fact: str) -> Any:
    """Return what the quantiser's config states about a fact, or None."""
    if quantiser is None or (fact == "scales" and not quantiser.facts.get("scales said")):
        return None
    return quantiser.facts.get(fact)


def habits(metadata: Mapping[str, str], quantiser: Saying | None) -> tuple[FactMap, str]:
    """Return what the producer of such a file does where it says nothing, and the reason to think so."""
    if quantiser is not None:
        return quantiser.facts, f"the default of {quantiser.facts['quantiser']}"
    return (COMFY, "as in Lightricks' files, whose config it has") if "config" in metadata else ({}, "")


def decide_alike(weights: Collection[Weight], fact: str) -> None:
    """Take what the shapes of some weights show for the others of their format, unless those shapes differ."""
    for format in {weight.format for weight in weights}:
        alike = [weight for weight in weights if weight.format == format]
        shown = {x.facts[fact]: x.tensor.name for x in alike if x.said.get(fact) == "shape"}
        if len(shown) == 1:
            value, example = shown.popitem()
            decide([x for x in alike if fact not in x.facts], fact, value, f"the shape of the scales of {example}")


def decide(weights: Collection[Weight], fact: str, value: Any, by: str) -> list[str]:
    """Add a fact to weights, and return a problem if something else is known of some already."""
    contradicted = []
    for weight in weights if value is not None else ():
        try:
            add_fact(weight.facts, weight.said, fact, value, weight.tensor, by)
        except ValueError as error:
            contradicted.append(str(error))
    more = f" (and {len(contradicted) - 1} more)" if len(contradicted) > 1 else ""
    return [contradicted[0] + more] if contradicted else []


def silent(weights: Collection[Weight]) -> tuple[list[Weight], int]:
    """Return the int8 weights of whose rotation nothing is said, and the number of the others."""
    int8 = [weight for weight in weights if weight.format == "int8"]
    mute = [weight for weight in int8 if weight.said.get("rotation", "nothing") == "nothing"]
    found = [weight for weight in mute if "marker" not in weight.companions]  # a marker that is wrong is a problem
    return found, len(int8) - len(found)


def unlike_others(weights: Collection[Weight]) -> list[str]:
    """Return the int8 weights without a marker in a file where others have one."""
    found, others = silent(weights)
    return [f"{weight.tensor}: its marker is missing, {others} others have one" for weight in found if others]


def lost_parts(weights: Collection[Weight]) -> list[str]:
    """Return the weights without a part that their format may do without, in a file where others have it.

    Formats of 4 and of 6 bits under the same name do not have the same parts.
    """
    groups: dict[tuple[str, float], list[Weight]] = {}
    for weight in weights:
        if weight.format in FORMATS:
            packed = weight.tensor.shape[-1] / weight.shape[-1]
            groups.setdefault((weight.format, packed), []).append(weight)
    problems = []
    for (format, _), alike in groups.items():
        for kind in [kind for kind, part in FORMATS[format].companions.items() if part.shapes and not part.needed]:
            lacking = [weight.tensor for weight in alike if kind not in weight.companions]
            others = len(alike) - len(lacking)
            problems += [f"{stored}: its {kind} is missing, {others} others have one" for stored in lacking if others]
    return problems


def not_rotated(weights: Collection[Weight]) -> list[str]:
    """Take int8 weights of which nothing is said as not rotated, and return a note if there are any."""
    found, _ = silent(weights)
    decide(found, "rotation", 0, "nothing")
    count = f"{len(found)} int8 weights are rotated (ConvRot)"
    return [f"nothing in the checkpoint says whether its {count}: assumed not"] if found else []
