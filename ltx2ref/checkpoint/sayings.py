"""Sayings: what files state about how their weights are stored, read before any data.

A layer's own marker is a small tensor of JSON. The metadata may hold an entry for each layer, and a config of the
quantiser for the whole file, which also stands in config.json. All of them become facts under the same few names, so
that `quantised` can compare them with one another and with the shapes.
"""

import base64
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from .header import parse_json
from .names import Dialect
from .storage import CheckpointError, Stored, require

Read = TypeVar("Read")
FactMap = Mapping[str, Any]  # by the name of a fact: format, dtypes, nibbles, scales, group, rotation, shape, ...

NO_FACTS: FactMap = MappingProxyType({})

QUANTISATION = "_quantization_metadata"  # key of the metadata with an entry for each layer, as in its marker
QUANTISER = "quantization_config"  # key of the metadata and of config.json: what a quantiser did to the whole file
QUANTO_MAP = "quantization_map_base64"  # key of the metadata: quanto's formats of layers
QUANTO_KEYS = ("quantization_format", QUANTO_MAP, "config_base64")
# Keys of quantisers' configs that list the layers which they leave alone, by names or patterns.
SKIPPING = ("ignore", "exclude_modules", "llm_int8_skip_modules", "modules_to_not_convert")
MAX_PATTERNS = 1024  # each of which is compared with each layer
ABOUT_WEIGHTS = (QUANTISATION, QUANTISER, *QUANTO_KEYS)  # keys of metadata that are wrong once weights are decoded
DATA = "._data"  # suffix of quanto's weights, behind the parameter's name
NOT_QUANTISED = "not quantised"  # in place of a format, of a layer that a quantiser has left alone
MARKER_BYTES = 4096  # the longest published marker has 240


class Saying(NamedTuple):
    """What one place in a checkpoint states about a weight."""

    where: str
    facts: FactMap


class Declared(NamedTuple):
    """A format as markers name it."""

    facts: FactMap  # that the name implies
    keys: tuple[str, ...] = ()  # that may stand beside it, besides those of `KEYS_OF_ALL`
    marker: FactMap = NO_FACTS  # that a layer's own marker implies besides, and an entry of the metadata does not


# Torch's names of dtypes of floating point.
FLOATING = re.compile(
    r"(torch\.)?(bfloat16|float(16|32|64)?|half|double|float8_(e4m3fn|e5m2|e4m3fnuz|e5m2fnuz|e8m0fnu)|float4_e2m1fn_x2)"
)
KEYS_OF_ALL = ("full_precision_matrix_mult", "orig_dtype", "orig_shape")
CONVROT = ("convrot", "convrot_groupsize")
TORCHAO = ("scope", "config", "use_triton_kernel", "use_dynamic_activation", "use_dynamic_per_tensor_scale")
# ComfyUI's arrangement of formats with scales of blocks. ModelOpt writes the same names into metadata for other ones.
COMFY: FactMap = {"nibbles": "high", "scales": "tiled"}
DECLARED = {
    "float8_e4m3fn": Declared({"format": "fp8 scaled", "dtypes": ("F8_E4M3",)}, ("group_size",)),
    "float8_e5m2": Declared({"format": "fp8 scaled", "dtypes": ("F8_E5M2",)}),
    "float8_e4m3fn_rowwise": Declared({"format": "fp8 scaled", "dtypes": ("F8_E4M3",), "scales": "rows"}),
    "float8_e4m3fn_blockwise": Declared(
        {"format": "fp8 scaled", "dtypes": ("F8_E4M3",), "scales": "blocks"}, ("group_size",)
    ),
    "fp8": Declared({"format": "fp8 scaled", "dtypes": ("F8_E4M3",)}),  # ModelOpt's
    "int8_tensorwise": Declared({"format": "int8", "rotation": 0}, (*CONVROT, "per_row")),
    "int8_blockwise": Declared({"format": "int8", "rotation": 0, "scales": "blocks"}, ("group_size",)),
    "mxfp8": Declared({"format": "mxfp8", "group": 32}, ("group_size",), {"scales": "tiled"}),
    "hybrid_mxfp8": Declared({"format": "mxfp8", "group": 32}, ("group_size",), {"scales": "tiled"}),
    "nvfp4": Declared({"format": "nvfp4", "group": 16}, ("group_size",), COMFY),
    "torchao_nvfp4": Declared(
        {"format": "nvfp4", "group": 16, "nibbles": "low"}, ("block_size", "is_swizzled_scales", *TORCHAO)
    ),
    "convrot_w4a4": Declared(
        {"format": "convrot_w4a4", "rotation": 256}, (*CONVROT, "quant_group_size", "linear_dtype")
    ),
    "asym_w4a8_int8": Declared({"format": "asym_w4a8_int8", "rotation": 256, "group": 16}, (*CONVROT, "group_size")),
}
# Formats that are known and not read: by the names that markers and configs have for them.
REFUSED = {
    "SVDQuant": ("svdquant_w4a4", "nunchaku", "svdquant", "nvfp4_svd", "nvfp4_svdquant"),
    "AWQ": ("awq_w4a16", "awq", "nvfp4_awq", "w4a16_awq", "w4a8_awq"),
    "SDNQ": ("sdnq", "sdnq_training"),
}


def of_type(kind: type, value: Any) -> Any:
    """Return a value of the right kind. Raises `ValueError` for any other, and for integers that count nothing."""
    good = type(value) is kind and (not isinstance(value, int) or isinstance(value, bool) or 0 < value < 2**31)
    require(good, f"expected {kind.__name__}, got {str(value)[:80]!r}")
    return value


def flag(yes: Any = None, no: Any = None) -> Callable[[Any], Any]:
    """Return a function that turns true and false into what they mean."""
    return lambda value: yes if of_type(bool, value) else no


def named_dtype(value: Any) -> None:
    """Check the name of a dtype that a weight had before it was quantised, which changes nothing."""
    good = FLOATING.fullmatch(of_type(str, value)) is not None
    require(good, f"expected a dtype of floating point, got {value!r}")


def shape_of(value: Any) -> tuple[int, ...]:
    """Return the shape that a list of integers gives."""
    return tuple(of_type(int, length) for length in of_type(list, value))


# The keys of markers: which fact each states, if any, and a function that reads its value.
MARKER_KEYS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "convrot": ("rotation", flag(256, 0)),
    "convrot_groupsize": ("rotation", lambda value: of_type(int, value)),
    "group_size": ("group", lambda value: of_type(int, value)),
    "block_size": ("group", lambda value: of_type(int, value)),
    "quant_group_size": ("", lambda value: of_type(int, value)),  # of activations
    "per_row": ("scales", flag("rows", "one")),
    "is_swizzled_scales": ("scales", flag("tiled", "flat")),
    "orig_shape": ("shape", shape_of),
    "orig_dtype": ("", named_dtype),
    "full_precision_matrix_mult": ("", flag()),
    **{key: ("", lambda value: None) for key in (*TORCHAO, "linear_dtype")},
}


def facts_of(said: Mapping[str, Any], *, marker: bool) -> dict[str, Any]:
    """Return the facts that a layer's marker, or its entry in the metadata, states. Raises `ValueError`."""
    nested = said.get("params")  # an early writer put the other keys into an object of their own
    said = {**said, **nested} if isinstance(nested, dict) else said
    require("format" in said, "no key 'format'")
    name = of_type(str, said["format"])
    require(name in DECLARED, f"format {name!r} is not supported{refused(name)}")
    facts, keys, own = DECLARED[name]
    found = {**facts, **(own if marker else {})}
    for key, value in said.items():
        if key == "format" or value is nested is not None:
            continue
        require(key in (*keys, *KEYS_OF_ALL), f"unknown key {key!r} of format {name!r}")
        fact, read = MARKER_KEYS[key]
        try:
            meaning = read(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
        if fact and meaning is not None:
            found[fact] = meaning
    if "rotation" in found:  # the size of its groups counts only if there is a rotation, which two formats always have
        rotated = said.get("convrot", bool(facts["rotation"]))
        found["rotation"] = said.get("convrot_groupsize", 256) if rotated else 0
    return found


def refused(name: str) -> str:
    """Return a remark on the name of a format or quantiser, for a message."""
    return next((f" ({known})" for known, names in REFUSED.items() if name.lower() in names), "")


def read_marker(kind: str, stored: Stored) -> Saying:
    """Read the marker of a layer. Raises `CheckpointError`, which names it and what it says."""
    text = b"more than the longest marker" if stored.stop - stored.start > MARKER_BYTES else bytes(stored.bytes())
    try:
        facts = MARKER_READERS[kind](text)
        named = next((format for end, format in NAMED_FORMATS.items() if stored.name.endswith(end)), None)
        require(named in (None, facts.get("format")), f"it is {facts.get('format')}, but by its name {named}")
        return Saying(stored.name, facts)
    except ValueError as error:
        raise CheckpointError(stored.file.path, [f"{stored} says {text[:200]!r}: {error}"]) from None


def weight_format(text: bytes) -> dict[str, Any]:
    """Return no facts for the one order of bitsandbytes' int8 that is stored by row. Raises `ValueError`."""
    require(text == b"\0", "only weights by row are supported, whose format is 0")
    return {}


def quant_state(text: bytes) -> dict[str, Any]:
    """Return the facts in the state that bitsandbytes stores with a layer of 4 bits. Raises `ValueError`."""
    said = parse_json(text)
    require(said.get("quant_type") in ("nf4", "fp4"), f"quant_type {said.get('quant_type')!r} is not supported")
    known = {"quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"}
    require(said.keys() <= known, f"unknown keys {', '.join(sorted(said.keys() - known))}")
    needed = ["blocksize", "shape", *(["nested_offset"] if "nested_blocksize" in said else [])]
    missing = [key for key in needed if key not in said]
    require(not missing, f"no key {', '.join(map(repr, missing))}")
    for key in said.keys() & {"dtype", "nested_dtype"}:
        placed(key, named_dtype, said[key])
    facts = {
        "format": f"bitsandbytes {said['quant_type']}",
        "group": of_type(int, said["blocksize"]),
        "shape": shape_of(said["shape"]),
    }
    if "nested_blocksize" in said:
        facts |= {
            "nested group": of_type(int, said["nested_blocksize"]),
            "offset": of_type(float, said["nested_offset"]),
        }
        require(math.isfinite(facts["offset"]), f"nested_offset: expected a finite number, got {facts['offset']}")
    return facts


# Companions whose names state a format, which their content states as well.
NAMED_FORMATS = {f".bitsandbytes__{kind}": f"bitsandbytes {kind}" for kind in ("nf4", "fp4")}
# The companions that say something, by kind, and what reads their bytes.
MARKER_READERS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "marker": lambda text: facts_of(parse_json(text), marker=True),
    "torchao marker": lambda text: facts_of(parse_json(text), marker=True),
    "quant state": quant_state,
    "weight format": weight_format,
}


def layer_sayings(metadata: Mapping[str, str]) -> dict[str, list[Saying]]:
    """Return what the metadata state about single layers, by the layers' names there. Raises `ValueError`."""
    found: dict[str, list[Saying]] = {}
    for key, read in {QUANTISATION: entry_facts, QUANTO_MAP: quanto_facts}.items():
        for layer, entry in (layers_of(key, metadata[key]) if key in metadata else {}).items():
            found.setdefault(layer, []).append(Saying(key, placed(f"{key}: {layer}", read, entry)))
    return found


def layers_of(key: str, text: str) -> dict[str, Any]:
    """Return the entries of layers in the metadata. Raises `ValueError` unless each one is an object."""
    try:
        layers = entries(parse_json(text.encode())) if key == QUANTISATION else parse_json(base64.b64decode(text))
        require(isinstance(layers, dict), f"expected an object of layers, got {str(layers)[:80]}")
        return {layer: of_type(dict, entry) for layer, entry in layers.items()}
    except (ValueError, KeyError) as error:
        raise ValueError(f"{key}: not the formats of layers: {type(error).__name__} {error}") from None


def entries(said: Mapping[str, Any]) -> Any:
    """Return the object of layers in `_quantization_metadata`, which has a version. Raises `ValueError`."""
    unknown = said.keys() - {"format_version", "layers"}
    require(not unknown, f"unknown keys {', '.join(sorted(unknown))}")
    version = said.get("format_version", "1.0")
    require(version == "1.0", f"format_version {version!r} is not supported, expected '1.0'")
    return said["layers"]


def entry_facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts in a layer's entry of the metadata, which has the keys of its marker. Raises `ValueError`."""
    return facts_of(entry, marker=False)


def quanto_facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts in a layer's entry of quanto's map. Raises `ValueError`."""
    weights = entry.get("weights")
    require(weights in ("qint8", "none", None), f"{weights!r} is not supported, expected qint8")
    return {"format": "quanto int8" if weights == "qint8" else NOT_QUANTISED}


def placed(where: str, read: Callable[[Any], Read], value: Any) -> Read:
    """Return what a function reads, with its place in front of the message of an error."""
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def quantiser_saying(metadata: Mapping[str, str], config: Mapping[str, Any] | None) -> Saying | None:
    """Return what a quantiser's config states about all weights of the file. Raises `ValueError`."""
    configs = [(f"{QUANTISER} in config.json", config[QUANTISER])] if config and QUANTISER in config else []
    if QUANTISER in metadata:
        text = metadata[QUANTISER].strip()
        configs.append((QUANTISER, None if text == "null" else parse_json(text.encode())))
    sayings = [Saying(where, placed(where, quantiser_facts, said)) for where, said in configs if said is not None]
    stated = " and ".join(f"{saying.where}: {dict(saying.facts)}" for saying in sayings)
    require(len({str(saying.facts) for saying in sayings}) < 2, f"two configs of quantisers differ: {stated}")
    return sayings[-1] if sayings else None


def quantiser_facts(config: Any) -> dict[str, Any]:
    """Return the facts in a quantiser's config. Raises `ValueError` for a quantiser whose files are not read.

    ModelOpt puts the first of two codes into the low nibble. It leaves scales of blocks flat unless it was told to
    arrange them for cuBLAS.
    """
    require(isinstance(config, dict), f"expected an object, got {str(config)[:80]}")
    producer = config.get("producer") if isinstance(config.get("producer"), dict) else {}
    method = str(config.get("quant_method") or producer.get("name") or "").lower()
    inner = config.get("quantization") if isinstance(config.get("quantization"), dict) else {}
    algorithm = str(config.get("quant_algo") or inner.get("quant_algo") or "").upper()
    skipped = {"skipped": skipped_layers(config) + skipped_layers(inner)}
    if method == "modelopt":
        supported = ("FP8", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION", "")
        require(algorithm in supported, f"ModelOpt's {algorithm} is not supported{refused(algorithm)}")
        swizzled = [*said_flags(config, "swizzle"), *said_flags(inner, "swizzle")]
        require(len({*swizzled}) < 2, "its keys about swizzled scales contradict one another")
        return {
            "quantiser": "ModelOpt",
            "algorithm": algorithm,
            "nibbles": "low",
            "scales": "tiled" if any(swizzled) else "flat",
            "scales said": bool(swizzled),
            **skipped,
        }
    require(
        method in ("bitsandbytes", "quanto"),
        f"the quantiser {method or str(config)[:80]!r} is not supported{refused(method)}",
    )
    return {"quantiser": method, "algorithm": bits_said(config), **skipped}


def bits_said(config: Mapping[str, Any]) -> str:
    """Return the format that a config of bitsandbytes asks for, or "". Raises `ValueError` if it asks for two."""
    wide, narrow = (config.get(key) is True for key in ("load_in_8bit", "load_in_4bit"))
    require(not (wide and narrow), "load_in_8bit and load_in_4bit contradict one another")
    return "int8" if wide else str(config.get("bnb_4bit_quant_type") or "") if narrow else ""


def skipped_layers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names and patterns of layers that a quantiser's config says it has left alone. Raises `ValueError`."""
    lists = [config[key] for key in SKIPPING if isinstance(config.get(key), list)]
    names = tuple(name for names in lists for name in names if isinstance(name, str))
    require(sum("*" in name for name in names) <= MAX_PATTERNS, f"more than {MAX_PATTERNS} patterns of layers")
    return names


def said_flags(config: Mapping[str, Any], word: str) -> list[bool]:
    """Return the values of all keys with this word in their names. Raises `ValueError` for one that is no bool."""
    flags = {key: value for key, value in config.items() if word in key.lower()}
    return [placed(key, flag(True, False), value) for key, value in flags.items()]


class Stated(NamedTuple):
    """Everything that a checkpoint states about how its weights are stored."""

    layers: dict[str, list[Saying]]  # by the tensors' names
    quantiser: Saying | None  # about the whole file
    problems: list[str]

    def of(self, name: str) -> list[Saying]:
        """Return what is stated about one tensor."""
        return self.layers.get(name, [])


def read_sayings(
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    dialect: Dialect,
    own: Mapping[str, Stored],
    companions: Mapping[str, Mapping[str, Stored]],
) -> Stated:
    """Read what markers, metadata and the config state about weights, with every problem of these texts."""
    stated = Stated({}, None, [])
    for owner, kinds in companions.items():
        for kind in (kind for kind in MARKER_READERS if kind in kinds):
            try:
                stated.layers.setdefault(owner, []).append(read_marker(kind, kinds[kind]))
            except CheckpointError as error:
                stated.problems.extend(error.problems)
    try:
        layers = layer_sayings(metadata)
    except ValueError as error:
        stated.problems.append(str(error))
        layers = {}
    for layer, sayings in layers.items():
        names = [f"{before}{layer}.weight{end}" for before in ("", dialect.prefix) for end in ("", DATA)]
        name = next((name for name in names if name in own), None)
        if name is not None:
            stated.layers.setdefault(name, []).extend(sayings)
        elif any(saying.facts["format"] != NOT_QUANTISED for saying in sayings) and not any(
            map(dialect.foreign, names)
        ):
            stated.problems.append(f"{sayings[0].where}: {layer} has a format, but the file has no such tensor")
    try:
        return stated._replace(quantiser=quantiser_saying(metadata, config))
    except ValueError as error:
        stated.problems.append(str(error))
        return stated
