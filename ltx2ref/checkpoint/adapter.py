"""Alphas that no tensor of a LoRA file holds: PEFT's config, in the metadata or beside the file, and other entries.

PEFT scales by alpha / rank. Where diffusers writes a file, PEFT's config is in the metadata; where PEFT does, it is in
adapter_config.json beside the file. Other programs leave an alpha in the metadata that their own readers ignore.
"""

import math
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .header import parse_json
from .source import read_json
from .storage import CheckpointError, TensorFile, as_path, require

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # the files in a folder of PEFT's
ADAPTER_METADATA = "lora_adapter_metadata"  # the key of the config in the metadata
ADAPTER_PREFIX = "transformer."  # in front of the config's keys, except as `save_lora_adapter` writes them
# Metadata entries that may state an alpha. `lora_alpha` is PEFT's word, the others are kohya's and its followers'.
ALPHA_KEY, ALPHA_KEYS = "lora_alpha", ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")
# Keys that, if they are set, change more than the product of two matrices does, and the tensors of a file show it.
LARGER = ("lora_bias", "bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")
PATTERNS = ("alpha_pattern", "rank_pattern")
LISTS = ("target_modules", "exclude_modules")
WORDS = {"true": True, "false": False, "null": None, "none": None}  # as JSON and str() write them


class Adapter(NamedTuple):
    """The part of PEFT's config that decides the factors of a LoRA, and what it says of the ranks and the layers."""

    alpha: float
    alpha_pattern: dict[str, float]  # alphas of single layers by the end of a name, or by "^" and the whole name
    rank_stabilised: bool
    rank: float | None  # None if the config does not say it
    rank_pattern: dict[str, float]  # by the same ends
    layers: dict[str, list[str]]  # ends of names under the keys that list them

    def __str__(self) -> str:
        pattern = f", alpha_pattern = {self.alpha_pattern}" if self.alpha_pattern else ""
        return f"lora_alpha = {self.alpha:g}{pattern}{', use_rslora' * self.rank_stabilised}"

    def factor(self, layer: str, rank: int) -> float:
        """Return the factor of a layer: alpha / rank, or alpha / sqrt(rank) if the LoRA is rank-stabilised."""
        matching = (alpha for end, alpha in self.alpha_pattern.items() if ends(end, [layer]))
        return next(matching, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def denials(self, names: Collection[str], rank: int, width: int) -> list[str]:
        """Return what the config says against a layer of these names.

        Published files clip the rank to the width of the layer, the smaller of its sides. PEFT does not.
        """
        stated = next((r for end, r in self.rank_pattern.items() if ends(end, names)), self.rank)
        listed = {key: any(ends(end, names) for end in self.layers[key]) for key in self.layers}
        wrong_rank = stated is not None and rank not in (stated, min(stated, width))
        return [
            *([f"its rank is {rank}, but {stated:g}"] if wrong_rank else []),
            *(["not among the target_modules"] if not listed.get("target_modules", True) else []),
            *(["among the exclude_modules"] if listed.get("exclude_modules") else []),
        ]


def ends(end: str, names: Iterable[str]) -> bool:
    """Return whether PEFT's config means one of these names by an end of a name, or by "^" and a whole name."""
    return any(name == end.removeprefix("^") or name.endswith(f".{end}") for name in names)


def files_of(path: str | Path) -> Path:
    """Return a path unchanged, or the weights in a folder of PEFT's. Raises `CheckpointError` for another folder."""
    path = as_path(path)
    if not path.is_dir():
        return path
    missing = [name for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            path, [f"a folder of PEFT has {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG}: no {' and no '.join(missing)} in it"]
        )
    return path / ADAPTER_WEIGHTS


def read_adapters(file: TensorFile, by_peft: bool) -> dict[str, Adapter]:
    """Return PEFT's configs by where they were found. They agree on all factors.

    `by_peft` says that the names in the file are PEFT's own, so that the config beside it is the file's.

    Raises `CheckpointError` for a config that asks for more than the product of two matrices, and for several that
    differ.
    """
    beside = file.path.with_name(ADAPTER_CONFIG)
    configs: dict[str, Mapping[str, Any]] = {}
    if ADAPTER_METADATA in file.metadata:
        configs[ADAPTER_METADATA] = of_transformer(json_of(file, ADAPTER_METADATA))
    if ADAPTER_PREFIX + ALPHA_KEY in file.metadata:
        plain = {key: value for key, value in file.metadata.items() if key.startswith(ADAPTER_PREFIX)}
        configs[f"{ADAPTER_PREFIX}{ALPHA_KEY} in the metadata"] = of_transformer(parsed(plain))
    if (by_peft or file.path.name == ADAPTER_WEIGHTS) and beside.is_file():
        configs[ADAPTER_CONFIG] = read_json(beside)
    elif by_peft and not configs and ALPHA_KEY in file.metadata:
        configs[f"{ALPHA_KEY} in the metadata"] = parsed({ALPHA_KEY: file.metadata[ALPHA_KEY]})
    found: dict[str, Adapter] = {}
    for where, config in configs.items():
        try:
            found |= {where: parse_adapter(config)} if config else {}
        except ValueError as error:
            raise CheckpointError(file.path, [f"{where}: {error}"]) from None
    first, *others = found.values() or [None]
    if first and any(other[:3] != first[:3] for other in others if other):
        said = ", but ".join(f"{adapter} by {where}" for where, adapter in found.items())
        raise CheckpointError(file.path, [said])
    return found


def json_of(file: TensorFile, key: str) -> dict[str, Any]:
    """Return the JSON object in an entry of the metadata. Raises `CheckpointError`."""
    try:
        return parse_json(file.metadata[key].encode())
    except ValueError as error:
        raise CheckpointError(file.path, [f"{key}: {error}"]) from None


def of_transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config that concern the transformer. Those of the connectors keep a dot."""
    own = {key.removeprefix(ADAPTER_PREFIX): value for key, value in config.items()}
    return {key: value for key, value in own.items() if "." not in key}


def parsed(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return entries of the metadata as what they say: numbers and truth values, or else the texts."""
    return {key: WORDS.get(text.lower(), as_number(text)) for key, text in texts.items()}


def as_number(text: str) -> float | str:
    """Return the number that a text says, or else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_adapter(config: Mapping[str, Any]) -> Adapter:
    """Check PEFT's config and return what decides the factors. Raises `ValueError` for what is not supported."""
    for key, value in config.items():
        unset = not value or (key, value) == ("bias", "none")
        require(unset or not (is_variant(key) or key in LARGER), f"{key} = {value!r} is not supported")
    require(config.get("peft_type", "LORA") == "LORA", f"peft_type = {config.get('peft_type')!r} is not supported")
    require(ALPHA_KEY in config, f"not a config of PEFT's for a LoRA: it has no {ALPHA_KEY}")
    # The other initialisations change the base weight as well, and PEFT does so again when it loads such a file.
    initialisation = config.get("init_lora_weights", True)
    require(initialisation in (True, False, "gaussian"), f"init_lora_weights = {initialisation!r} is not supported")
    patterns = {key: config.get(key) or {} for key in PATTERNS}
    numbers = {ALPHA_KEY: config[ALPHA_KEY], **({"r": config["r"]} if config.get("r") is not None else {})}
    for key, pattern in patterns.items():
        require(isinstance(pattern, dict), f"{key} = {pattern!r}: expected an object")
        for end in pattern:
            require(re.fullmatch(r"\^?[\w.]+", end) is not None, f"{end!r}: expected the end of a layer's name")
    for what, number in [pair for stated in (numbers, *patterns.values()) for pair in stated.items()]:
        require(is_finite_number(number), f"{what} = {number!r}: expected a finite number")
    # Regular expressions in place of lists are not evaluated: some take forever.
    layers = {key: config[key] for key in LISTS if is_list_of_texts(config.get(key))}
    alphas, ranks = patterns.values()
    return Adapter(config[ALPHA_KEY], alphas, bool(config.get("use_rslora")), config.get("r"), ranks, layers)


def is_list_of_texts(value: object) -> bool:
    """Return whether a value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_variant(key: str) -> bool:
    """Return whether this key, if set, asks for a method other than LoRA.

    PEFT adds such keys with every release, so they are recognised by how they are named.
    """
    return key.endswith(("_config", "_tokens")) or (key.startswith("use_") and key != "use_rslora")


def is_finite_number(value: object) -> bool:
    """Return whether a value is a finite int or float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def unused_alphas(metadata: Mapping[str, str], rank: int) -> list[str]:
    """Return notes on alphas in the metadata of a file whose factor is 1. `rank` is the largest of its layers.

    Lightricks' own LoRAs state an alpha that equals the rank. Kohya's scripts write theirs for the reader, and keep it
    when they have multiplied the weights by it. An alpha that equals the rank means 1 in any case.
    """
    stated = {key: as_number(metadata[key]) for key in ALPHA_KEYS if key in metadata}
    notes = []
    for key, alpha in stated.items():
        if alpha != rank:
            meant = f", which would be a factor of {alpha / rank:g}" if isinstance(alpha, float) else ""
            notes.append(
                f"{key} = {alpha} in the metadata is not used{meant}: without alpha tensors the factor of such files "
                "is 1; if another is meant, put it into the strength"
            )
    return notes
