"""PEFT's config in a LoRA's metadata, which is where files of diffusers have the alpha, and where alone."""

import math
import re
import sys
from typing import Any, NamedTuple

from .files import CheckpointError, TensorFile
from .header import parse_json

ADAPTER = "lora_adapter_metadata"  # the key of the metadata
PREFIX = "transformer."  # of its own keys; diffusers' `save_lora_adapter` writes none


class Adapter(NamedTuple):
    """What decides the factors of a LoRA."""

    alpha: float
    patterns: dict[str, float]  # other alphas, by the ends of layers' names; ^ before a whole name
    rank_stabilised: bool

    def factor(self, layer: str, rank: int) -> float:
        matching = (
            alpha for end, alpha in self.patterns.items() if layer == end.removeprefix("^") or layer.endswith(f".{end}")
        )
        return next(matching, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_adapter(file: TensorFile) -> Adapter | None:
    """None without a config. Raises `CheckpointError` for one that asks for more than the product of two factors."""
    if ADAPTER not in file.metadata:
        return None
    try:
        config = {key.removeprefix(PREFIX): value for key, value in parse_json(file.metadata[ADAPTER].encode()).items()}
        config = {key: value for key, value in config.items() if "." not in key}  # the others are the connectors'
        return adapter(config) if config else None
    except ValueError as error:
        raise CheckpointError(file.path, [f"{ADAPTER}: {error}"]) from None


def adapter(config: dict[str, Any]) -> Adapter:
    for key, value in config.items():
        require(not (value and is_variant(key)), f"{key} = {value!r} is not supported")
    # The other initialisations change the base weight, too: PEFT repeats that when it loads such a file.
    initialisation = config.get("init_lora_weights", True)
    require(initialisation in (True, False, "gaussian"), f"init_lora_weights = {initialisation!r} is not supported")
    patterns = config.get("alpha_pattern") or {}
    require(isinstance(patterns, dict), f"alpha_pattern = {patterns!r}: expected an object")
    for end, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        require(finite(alpha), f"{end} = {alpha!r}: expected a finite number")
        require(re.fullmatch(r"\^?[\w.]+", end) is not None, f"{end!r}: expected the end of a layer's name")
    return Adapter(config["lora_alpha"], patterns, bool(config.get("use_rslora")))


def is_variant(key: str) -> bool:
    """Is this, if set, a method other than LoRA? PEFT adds such keys with every release: they are told by names."""
    return key.endswith(("_config", "_tokens")) or (key.startswith("use_") and key != "use_rslora")


def finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
