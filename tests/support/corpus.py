"""Damaged checkpoints, always the same for a seed, with the outcomes to accept, and a guarded process to load them.

    for mutation in corpus(directory, 500, seed=0):
        ...                                            # load mutation.path, compare with mutation.expected

The files are written byte by byte, without the safetensors library. Names and shapes come from weights_manifest.json
and from the architecture, not from the loader. What a randomly damaged file states is read by `said`, which knows
nothing but the format's specification.
"""

import base64
import ctypes
import gc
import gzip
import io
import json
import logging
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import string
import struct
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import writers
from tiny import random_model, tiny_config
from torch import Tensor

from ltx2ref import ConfigError, LTX2VideoTransformer3DModel, TransformerConfig

State = dict[str, Tensor]
MANIFEST = Path(__file__).parents[2] / "weights_manifest.json"
ERROR, SAME, EITHER = "error", "same", "either"
RELEASES = ("2.0", "2.3", "2.5")
LIGHTRICKS, FP8, DIFFUSERS, SHARDED = "lightricks", "fp8", "diffusers", "sharded"
GGUF = "gguf"
QUANTO_LAYER = "transformer_blocks.0.attn1.to_q"  # the layer that quanto's map speaks of


def in_text(value: Any) -> str:
    """Return JSON as quanto puts it into the metadata."""
    return base64.b64encode(json.dumps(value).encode()).decode()


class Written(NamedTuple):
    """A layout whose files tests/support/writers.py writes: the release, the writer, and a quarter of the width."""

    release: str
    write: Callable[..., State]
    head: int = 64


def layers_by(encode: writers.Encoder, part: str = "", **metadata: str) -> Callable[..., State]:
    """Return a writer of files in which those layers of the blocks whose names have this part are encoded."""
    quantised = lambda name: writers.published_linears(name) and part in name  # noqa: E731
    return partial(writers.write_layers, encode=encode, metadata=metadata, quantised=quantised)


WRITTEN = {
    "comfy-fp8": Written("2.3", writers.write_fp8_new_comfy),
    "int8": Written("2.5", writers.write_int8_convrot),
    "nvfp4": Written("2.5", writers.write_nvfp4),
    "torchao": Written("2.5", writers.write_nvfp4_torchao),
    GGUF: Written("2.5", writers.write_gguf),
    "mxfp8": Written("2.3", layers_by(writers.encode_mxfp8({})), 16),
    "quanto": Written(
        "2.3",
        layers_by(
            writers.encode_quanto,
            quantization_format="quanto",
            quantization_map_base64=in_text({QUANTO_LAYER: {"weights": "qint8", "activations": "none"}}),
        ),
        16,
    ),
    "w4a4": Written("2.5", layers_by(writers.encode_w4a4, "attn1.")),
    "w4a8": Written("2.5", layers_by(writers.encode_w4a8(), "attn1.")),
    "nf4": Written("2.3", layers_by(writers.encode_nf4(nested=True)), 16),
    "bnb-int8": Written("2.3", layers_by(writers.encode_bnb_int8), 16),
    "mlx": Written("2.5", layers_by(writers.encode_mlx(4), format="mlx"), 16),
    "modelopt": Written(
        "2.5",
        layers_by(writers.encode_modelopt_nvfp4, "attn1.", quantization_config=json.dumps(writers.modelopt_config())),
    ),
}
QUANTISED = tuple(layout for layout in WRITTEN if layout != GGUF)
MARKED = ("comfy-fp8", "int8", "torchao", "mxfp8", "w4a4", "w4a8")  # those with a marker in each layer
# Those of which a changed name in the metadata would not say something else.
SELF_EVIDENT = tuple(layout for layout in QUANTISED if layout != "modelopt")
BASES = [(release, layout) for release in RELEASES for layout in (LIGHTRICKS, DIFFUSERS, SHARDED)] + [("2.3", FP8)]
BASES += [(written.release, layout) for layout, written in WRITTEN.items()]
ANY, FOLDERS = (LIGHTRICKS, FP8, DIFFUSERS, SHARDED), (DIFFUSERS, SHARDED)
SINGLE, WHOLE_FILES = (LIGHTRICKS, FP8), (*ANY, *QUANTISED)
LORA, ADAPTER = "lora.safetensors", "adapter"  # a file and a folder of PEFT's beside a checkpoint, loaded with it
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

PREFIX, KEYFRAMES = "model.diffusion_model.", "keyframes_abs_pos_embedding"
CONFIG, INDEX = "config.json", "diffusion_pytorch_model.safetensors.index.json"
WHOLE = "diffusion_pytorch_model.safetensors"
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8} | {
    name: dtype.itemsize for name, dtype in FLOATS.items()
}

Header = dict[str, Any]


class Entry(NamedTuple):
    """A tensor as a file stores it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Fate(NamedTuple):
    """What may become of a damaged checkpoint: see `Mutation`."""

    expected: str
    names: tuple[str, ...] = ()
    detail: str = ""
    state: State | None = None
    same_config: bool = True


@dataclass(frozen=True)
class Mutation:
    """A checkpoint at `path`, and the outcome that loading it must have.

    `expected` is one of three. ERROR: it must be rejected. SAME: it must load to exactly `state`, the original weights.
    EITHER: it is rejected, or loads to exactly `state`, which is what the file now states.
    """

    index: int
    kind: str
    base: str  # release and layout, such as "2.3 sharded"
    path: Path  # file or folder to load
    expected: str
    state: State | None  # by diffusers' names; None if it must be rejected
    files: tuple[str, ...]  # names of which an error must mention one
    names: tuple[str, ...]  # tensors or files of which a good error mentions one; () if that cannot be known
    detail: str
    options: dict[str, Any]  # further arguments of `load`: LoRAs, a prefix, a variant
    marker: Path  # a path that exists if code in the file was executed
    config: TransformerConfig | None  # the config that it must have if it loads; None if the file may state another one

    @property
    def original(self) -> "Base":
        return base(*self.base.split(" "))

    def remove(self) -> None:
        shutil.rmtree(self.marker.parent, ignore_errors=True)


def corpus(directory: Path, count: int, seed: int, start: int = 0) -> Iterator[Mutation]:
    """Yield `count` mutations, each in its own folder below `directory`.

    Kinds take turns, and what is hit is random.
    """
    return (mutation(directory, index, seed) for index in range(start, start + count))


def mutation(directory: Path, index: int, seed: int) -> Mutation:
    rng = random.Random(f"{seed} {index}")
    kind, layouts, spoil = KINDS[index % len(KINDS)]
    chosen = base(*rng.choice([names for names in BASES if names[1] in layouts]))
    root = directory / f"{index:05d}"
    root.mkdir(parents=True)
    draft = Draft(chosen, rng, root)
    fate = spoil(draft)
    state = chosen.state if fate.expected == SAME and fate.state is None else fate.state
    files = draft.write()
    return Mutation(
        index,
        kind,
        f"{chosen.release} {chosen.layout}",
        draft.path,
        fate.expected,
        state,
        files,
        fate.names,
        fate.detail,
        draft.options,
        draft.marker,
        chosen.config if fate.same_config and fate.expected != ERROR and chosen.document else None,
    )


# ---------------------------------------------------------------- the originals
@dataclass(frozen=True)
class Base:
    """A good checkpoint: the tensors and texts of its files, and the state that they mean."""

    release: str
    layout: str
    config: TransformerConfig
    files: dict[str, dict[str, Entry]]  # tensors by file and stored name, in the file's order
    metadata: dict[str, str]  # `__metadata__` without the config
    document: dict[str, Any]  # content of config.json, or of "config" in `__metadata__`
    ours: dict[str, str]  # diffusers' names of parameters by their stored names
    state: State  # diffusers names
    raw: bytes = b""  # the whole file, if it is no safetensors file


def written_base(release: str, layout: str) -> Base:
    """Return a checkpoint in a format of quantised weights, with what its writer says that it means."""
    write, head = WRITTEN[layout][1:]
    sizes = dict.fromkeys(("attention_head_dim", "audio_attention_head_dim"), head)
    sizes |= dict.fromkeys(("cross_attention_dim", "audio_cross_attention_dim", "caption_channels"), 4 * head)
    config = writers.quantisable_config(release, num_layers=1, **sizes)
    values = {name: t.detach() for name, t in random_model(config, seed=7).state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"ltx-{release}-{layout}.{'gguf' if layout == GGUF else 'safetensors'}"
        state = write(path, values, config)
        raw = path.read_bytes()
    if layout == GGUF:
        return Base(release, layout, config, {path.name: {}}, {}, {}, {}, state, raw)
    metadata = json.loads(raw[8 : 8 + header_length(raw)]).get("__metadata__", {})
    document = json.loads(metadata.pop("config", "{}"))
    names = {PREFIX + writers.original_name(name): name for name in state}
    return Base(release, layout, config, {path.name: readable(raw)}, metadata, document, names, state)


@cache
def base(release: str, layout: str) -> Base:
    if layout in WRITTEN:
        return written_base(release, layout)
    config = tiny_config(
        release,
        num_attention_heads=2,
        attention_head_dim=6,
        cross_attention_dim=12,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        in_channels=5,
        out_channels=7,
        audio_in_channels=6,
        audio_out_channels=9,
        caption_channels=11,
    )
    seed = BASES.index((release, layout))
    values = {name: t.detach() for name, t in random_model(config, seed=seed).state_dict().items()}
    single = layout in SINGLE
    ours = {PREFIX + name if single else theirs: theirs for name, theirs in names_of(release).items()}
    tensors = {name: stored_entry(name, values[theirs], layout) for name, theirs in ours.items()}
    tensors = with_scales(tensors) if layout == FP8 else tensors
    state = meaning(tensors, ours)
    assert state is not None and state.keys() == values.keys()
    document: dict[str, Any] = {"_class_name": "LTX2VideoTransformer3DModel", "_diffusers_version": "0.40.0.dev0"}
    document |= config.to_diffusers()
    if single:
        document = {"transformer": config.to_lightricks(), "scheduler": {"num_train_timesteps": 1000}, "vae": {}}
    return Base(
        release,
        layout,
        config,
        split(tensors | (foreign_tensors(seed) if single else {}), layout, release),
        metadata_of(release, layout, tensors),
        document,
        ours,
        state,
    )


def names_of(release: str) -> dict[str, str]:
    """Return diffusers' names by original names, for the parameters of a release with two blocks."""
    tensors = json.loads(MANIFEST.read_text(encoding="utf-8"))["releases"][release]["tensors"]
    return {
        name.replace("{i}", str(i)): facts["diffusers"].replace("{i}", str(i))
        for i in range(2)
        for name, facts in tensors.items()
    }


def stored_entry(name: str, value: Tensor, layout: str) -> Entry:
    """Store a tensor as the layout does.

    Tables are F32 in Lightricks' files. The fp8 file has every Linear of the last block in F8.
    """
    if layout == FP8 and is_scaled(name, value):
        value = (value / scale_of(value)).clamp(-448, 448).to(torch.float8_e4m3fn)
    elif layout == DIFFUSERS or "scale_shift_table" not in name:
        value = value.bfloat16()
    return entry(value)


def is_scaled(name: str, value: Tensor) -> bool:
    return "transformer_blocks.1." in name and name.endswith(".weight") and value.ndim == 2


def scale_of(value: Tensor) -> Tensor:
    return value.abs().amax() / 448


def with_scales(tensors: dict[str, Entry]) -> dict[str, Entry]:
    """Add a different scale for every F8 tensor, so that a swapped scale is a wrong one."""
    scaled: dict[str, Entry] = {}
    for i, (name, stored) in enumerate(tensors.items()):
        scaled[name] = stored
        if stored.dtype == "F8_E4M3":
            scaled[f"{name}_scale"] = entry(torch.tensor((i + 3) / 4096))
            scaled[f"{name.removesuffix('.weight')}.input_scale"] = entry(torch.tensor((i + 5) / 2048))
    return scaled


def entry(value: Tensor) -> Entry:
    dtype = next(name for name, dtype in FLOATS.items() if dtype == value.dtype)
    data = value.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return Entry(dtype, tuple(value.shape), data.numpy().tobytes())


def foreign_tensors(seed: int) -> dict[str, Entry]:
    """Return the tensors of other models in a Lightricks file."""
    generator = torch.Generator().manual_seed(seed)
    names = [
        f"{PREFIX}video_embeddings_connector.learnable_registers",
        "vae.decoder.conv_in.conv.weight",
        f"{PREFIX}audio_embeddings_connector.transformer_1d_blocks.0.attn1.to_q.weight",
        "audio_vae.encoder.conv_in.conv.bias",
        "vocoder.conv_pre.weight",
        "text_embedding_projection.video_aggregate_embed.weight",
    ]
    return {name: entry(torch.randn(3, 4, generator=generator).bfloat16()) for name in names}


def split(tensors: dict[str, Entry], layout: str, release: str) -> dict[str, dict[str, Entry]]:
    if layout != SHARDED:
        return {WHOLE if layout == DIFFUSERS else f"ltx-{release}-{layout}-tiny.safetensors": tensors}
    size = -(-len(tensors) // len(SHARDS))
    names = list(tensors)
    return {shard: {name: tensors[name] for name in names[i * size : (i + 1) * size]} for i, shard in enumerate(SHARDS)}


def metadata_of(release: str, layout: str, tensors: Mapping[str, Entry]) -> dict[str, str]:
    if layout in FOLDERS:
        return {"format": "pt"}
    layers = {
        name.removesuffix(".weight"): {"format": "float8_e4m3fn"}
        for name, stored in tensors.items()
        if stored.dtype == "F8_E4M3"
    }
    quantised = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return {"model_version": f"{release}.0", "license": "a licence"} | (quantised if layers else {})


# ---------------------------------------------------------------- a checkpoint in the making
class Draft:
    """A copy of a good checkpoint that can be damaged at any level: tensors, texts, the header, bytes or the folder."""

    def __init__(self, original: Base, rng: random.Random, root: Path) -> None:
        self.base, self.rng, self.root = original, rng, root
        self.folder = root / "transformer" if original.layout in FOLDERS else root
        self.files = {name: dict(tensors) for name, tensors in original.files.items()}
        self.metadata, self.document = dict(original.metadata), deepcopy(original.document)
        self.document_text: str | None = None  # replaces the document; "" leaves it out
        self.index: Any = None
        self.index_name = INDEX
        if original.layout == SHARDED:
            weight_map = {name: file for file, tensors in self.files.items() for name in tensors}
            self.index = {"metadata": {"total_size": 70000}, "weight_map": weight_map}
        self.target = rng.choice([*self.files])  # the file that is hit
        self.raw: dict[str, bytes] = (
            {self.target: original.raw} if original.raw else {}
        )  # whole files that replace the above or lie beside it
        self.sizes: dict[str, int] = {}  # sizes to which files are extended with a hole
        self.links: dict[str, Path] = {}
        self.options: dict[str, Any] = {}
        self.path = self.folder if original.layout in FOLDERS else root / self.target
        self.marker, self.outside = root / "code-was-executed", root / "outside"

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = self.document["transformer"] if self.base.layout in SINGLE else self.document
        return config

    @property
    def config_file(self) -> str:
        return self.target if self.base.layout in SINGLE else CONFIG

    @property
    def tensors(self) -> dict[str, Entry]:
        return self.files[self.target]

    def weight(self, fits: Callable[[Entry], bool] = lambda _: True) -> str:
        """Return the name of a random parameter in the target."""
        names = [name for name, stored in self.tensors.items() if name in self.base.ours and fits(stored)]
        return self.rng.choice(names)

    def layout(self, file: str = "") -> tuple[Header, bytes]:
        """Return header and data of a file from its current tensors and texts, by default for the target."""
        header: Header = {"__metadata__": dict(self.metadata)}
        if self.base.layout not in FOLDERS and self.document and self.document_text != "":
            header["__metadata__"]["config"] = self.document_text or dumps(self.document)
        data = bytearray()
        for name, stored in self.files[file or self.target].items():
            offsets = [len(data), len(data) + len(stored.data)]
            header[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": offsets}
            data += stored.data
        return header, bytes(data)

    def put(self, header: Any, data: bytes, length: int | None = None) -> None:
        self.raw[self.target] = pack(header, data, length)

    def bytes_of(self, file: str = "") -> bytes:
        file = file or self.target
        return self.raw[file] if file in self.raw else pack(*self.layout(file))

    def texts(self) -> dict[str, bytes]:
        texts: dict[str, str] = {}
        if self.base.layout in FOLDERS and self.document_text != "":
            texts[CONFIG] = self.document_text or dumps(self.document)
        if self.index is not None:
            texts[self.index_name] = self.index if isinstance(self.index, str) else dumps(self.index)
        return {name: text.encode("utf-8", "surrogatepass") for name, text in texts.items()}

    def write(self) -> tuple[str, ...]:
        """Write everything to disk, and return the names by which an error may call it."""
        self.folder.mkdir(exist_ok=True)
        contents = self.texts() | {file: self.bytes_of(file) for file in self.files} | self.raw
        for name, content in contents.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        for name, size in self.sizes.items():
            os.truncate(self.folder / name, size)
        for name, target in self.links.items():
            (self.folder / name).symlink_to(target)
        return tuple(dict.fromkeys([self.path.name, *(Path(name).name for name in (*contents, *self.links))]))

    def other_weights(self, file: str) -> bytes:
        """Return the same file with other values, to tell which file was read."""
        header, data = self.layout(file)
        return pack(header, bytes(byte ^ 1 for byte in data))


def pack(header: Any, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file.

    `header` is JSON, text or bytes, and `length` is what the file states as its header's length.
    """
    text = header if isinstance(header, bytes) else dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def dumps(value: Any) -> str:
    """Return JSON in which the texts of `literal` appear unquoted."""
    return re.sub(r'"@@(.*?)@@"', lambda m: m[1], value if isinstance(value, str) else json.dumps(value))


def literal(text: str) -> str:
    return f"@@{text}@@"


# ---------------------------------------------------------------- what a file says
def said(draft: Draft) -> State | None:
    """Read the parameters that the drafted files hold, leniently, or return None if one is missing or malformed."""
    tensors: dict[str, Entry] = {}
    for file in draft.files:
        tensors |= readable(draft.bytes_of(file))
    return meaning(
        tensors,
        draft.base.ours,
        {
            draft.base.ours[name]: stored.shape
            for tensors_ in draft.base.files.values()
            for name, stored in tensors_.items()
            if name in draft.base.ours
        },
    )


def readable(raw: bytes) -> dict[str, Entry]:
    """Return the tensors of a safetensors file whose dtype, shape and offsets are consistent."""
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length], raw[8 + length :]
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        return {}
    if len(text) < length or not isinstance(header, dict):
        return {}
    entries = {name: read_entry(facts, data) for name, facts in header.items()}
    return {name: stored for name, stored in entries.items() if stored is not None}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("duplicate names")
    return dict(pairs)


def refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def read_entry(facts: Any, data: bytes) -> Entry | None:
    try:
        dtype, shape, (begin, end) = facts["dtype"], facts["shape"], facts["data_offsets"]
        numbers = [*shape, begin, end]
        right = all(type(n) is int and n >= 0 for n in numbers) and begin <= end <= len(data)
        right = right and math.prod(shape) * WIDTHS[dtype] == end - begin
    except (KeyError, TypeError, ValueError):
        return None
    return Entry(dtype, tuple(shape), data[begin:end]) if right else None


def meaning(
    tensors: Mapping[str, Entry], ours: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> State | None:
    """Return parameters by diffusers' names: as stored, or F8 times its scale in float32. None if one cannot be had."""
    state: State = {}
    for name, theirs in ours.items():
        stored = tensors.get(name)
        if stored is None or stored.dtype not in FLOATS or (shapes and stored.shape != shapes[theirs]):
            return None
        state[theirs] = value = tensor(stored)
        if stored.dtype.startswith("F8"):
            scale = tensors.get(f"{name}_scale")
            rows = len(value)
            if scale is None or scale.dtype not in FLOATS or scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
                return None
            by_row = scale._replace(shape=(rows, 1)) if scale.shape == (rows,) else scale
            state[theirs] = value.float() * tensor(by_row).float()
    return state


def tensor(stored: Entry) -> Tensor:
    data = torch.frombuffer(bytearray(stored.data), dtype=torch.uint8) if stored.data else torch.empty(0).byte()
    return data.view(FLOATS[stored.dtype]).reshape(stored.shape)


# ---------------------------------------------------------------- fates
def error(detail: str, *names: str) -> Fate:
    return Fate(ERROR, names, detail)


def same(detail: str) -> Fate:
    return Fate(SAME, (), detail)


def either(draft: Draft, detail: str, state: State | None = None, same_config: bool = True) -> Fate:
    return Fate(EITHER, (), detail, draft.base.state if state is None else state, same_config)


def judged(draft: Draft, detail: str, same_config: bool = True) -> Fate:
    """Return the acceptable outcomes by what the damaged files now state."""
    state = said(draft)
    return error(detail) if state is None else either(draft, detail, state, same_config)


def about(draft: Draft, name: str) -> tuple[str, ...]:
    """Return the names by which an error may call a tensor."""
    return name, draft.base.ours.get(name, name)


# ---------------------------------------------------------------- kinds: sizes and lengths
def untouched(draft: Draft) -> Fate:
    return same("nothing")


def rewritten(draft: Draft) -> Fate:
    """Write the same file in another way."""
    way = draft.rng.choice(
        [
            "reordered header",
            "reordered data",
            "padded",
            "escaped",
            "spaced",
            "more metadata",
            "no metadata",
            "unaligned",
        ]
    )
    if way == "reordered data":
        draft.files[draft.target] = shuffled(draft.rng, draft.tensors)
    if way == "more metadata":
        draft.metadata |= {"author": "somebody", "": "", "é": "\u2028", "long": "x" * 100_000}
    header, data = draft.layout()
    if way == "no metadata" and draft.base.layout in FOLDERS:
        del header["__metadata__"]
    text = json.dumps(
        shuffled(draft.rng, header) if way == "reordered header" else header, indent=1 if way == "spaced" else None
    )
    if way == "escaped":
        text = text.replace('"dtype"', '"\\u0064type"').replace("attn", "\\u0061ttn")
    if way in ("padded", "unaligned"):
        text += " " * draft.rng.randrange(1, 9 if way == "padded" else 1000)
    draft.put(text.encode(), data)
    return same(way)


def shuffled(rng: random.Random, mapping: dict[str, Any]) -> dict[str, Any]:
    items = [*mapping.items()]
    rng.shuffle(items)
    return dict(items)


def cut(draft: Draft, at: int) -> Fate:
    raw = draft.bytes_of()
    draft.raw[draft.target] = raw[:at]
    return error(f"cut to {at} of {len(raw)} bytes", draft.target)


def cut_header(draft: Draft) -> Fate:
    return cut(draft, draft.rng.randrange(8, 8 + header_length(draft.bytes_of())))


def cut_data(draft: Draft) -> Fate:
    raw = draft.bytes_of()
    return cut(draft, draft.rng.randrange(8 + header_length(raw), len(raw)))


def cut_last_bytes(draft: Draft) -> Fate:
    return cut(draft, len(draft.bytes_of()) - draft.rng.choice([1, 1, 1, 2, 4, 7, 8]))


def cut_to_nothing(draft: Draft) -> Fate:
    return cut(draft, draft.rng.choice([0, 0, 1, 4, 7, 8, 9]))


def header_length(raw: bytes | bytearray) -> int:
    return int.from_bytes(raw[:8], "little")


def trailing(draft: Draft) -> Fate:
    raw, rng = draft.bytes_of(), draft.rng
    tail = rng.choice([b"\0", b"\0" * 4096, rng.randbytes(rng.randrange(1, 5000)), raw, b" ", b"\n"])
    draft.raw[draft.target] = raw + tail
    return error(f"{len(tail)} bytes more", draft.target)


def lying_length(draft: Draft) -> Fate:
    header, data = draft.layout()
    true, rng = header_length(pack(header, data)), draft.rng
    length = rng.choice(
        [
            0,
            1,
            2,
            true - 1,
            true + 1,
            true - 8,
            true + 8,
            rng.randrange(true),
            len(data) + true,
            true + rng.randrange(1, len(data)),
            len(data) + true + 8,
            10**8,
            2**31 - 1,
            2**31,
            2**32,
            true + 2**32,
            2**53,
            2**62,
            2**63 - 1,
            2**63,
            2**64 - 8 - true,
            2**64 - 8,
            2**64 - 1,
        ]
    )
    draft.put(header, data, length)
    return error(f"header length {length}, truly {true}", draft.target)


def sparse_header(draft: Draft) -> Fate:
    """Write a huge header, which takes no space on disk."""
    header, data = draft.layout()
    length = draft.rng.choice([10**6, 10**7, 5 * 10**7, 99_999_999, 10**8, 2**30, 2**33, 2**40])
    draft.put(header, data, length)
    draft.sizes[draft.target] = 8 + length + draft.rng.choice([0, 100, len(data)])
    return error(f"header length {length} in a sparse file", draft.target)


def sparse_tensor(draft: Draft) -> Fate:
    """Replace one of the transformer's tensors with a huge one, which takes no space on disk."""
    name, rows = draft.weight(), 2 ** draft.rng.randrange(16, 24)
    dtype = draft.tensors.pop(name).dtype
    header, data = draft.layout()
    size = rows * 4096 * WIDTHS[dtype]
    header[name] = {"dtype": dtype, "shape": [rows, 4096], "data_offsets": [len(data), len(data) + size]}
    draft.put(header, data)
    draft.sizes[draft.target] = len(draft.bytes_of()) + size
    return error(f"{name} of {size} bytes in a sparse file", *about(draft, name))


def sparse_foreign(draft: Draft) -> Fate:
    """Add a huge tensor of another model, which nothing has to read."""
    header, data = draft.layout()
    size = 2 ** draft.rng.randrange(28, 34)
    name = draft.rng.choice(["vae.huge", f"{PREFIX}video_embeddings_connector.huge", "vocoder.huge"])
    header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [len(data), len(data) + size]}
    draft.put(header, data)
    draft.sizes[draft.target] = len(draft.bytes_of()) + size
    return same(f"{name} of {size} bytes in a sparse file")


# ---------------------------------------------------------------- kinds: the header's text
def broken_json(draft: Draft) -> Fate:
    header, data = draft.layout()
    text, rng = json.dumps(header).encode(), draft.rng
    variants = {
        "cut": text[: rng.randrange(1, len(text))],
        "without its end": text[:-1],
        "extra comma": text[:-1] + b",}",
        "trailing text": text + rng.choice([b"x", b"{}", b"]", b"}", text]),
        "padded with NUL": text + b"\0" * 8,
        "doubled comma": text.replace(b", ", b",, ", 1),
        "NaN": text.replace(b"[0,", b"[NaN,", 1),
        "Infinity": text.replace(b"[0,", b"[-Infinity,", 1),
        "single quotes": text.replace(b'"', b"'"),
        "comment": b"{/* */" + text[1:],
        "byte order mark": b"\xef\xbb\xbf" + text,
        "empty": b"",
        "blank": b" " * 64,
        "line break in a name": text.replace(b"scale_shift", b"scale\nshift", 1),
        "open string": text[:-1] + b'"}',
        "hexadecimal": text.replace(b"[0,", b"[0x0,", 1),
        "leading zero": text.replace(b"[0,", b"[00,", 1),
        "bad escape": text.replace(b"scale_shift", b"scale\\xshift", 1),
    }
    detail = rng.choice([name for name, variant in variants.items() if variant != text])
    draft.put(variants[detail], data)
    return error(f"JSON: {detail}", draft.target)


def broken_utf8(draft: Draft) -> Fate:
    header, data = draft.layout()
    text = json.dumps(header).encode()
    bad = draft.rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80"])
    at = draft.rng.choice([m.end() for m in re.finditer(rb'"[a-z_.]', text)])
    draft.put(draft.rng.choice([text[:at] + bad + text[at:], text.decode().encode("utf-16")]), data)
    return error(f"{bad!r} at {at}, or UTF-16", draft.target)


def not_an_object(draft: Draft) -> Fate:
    header, data = draft.layout()
    value = draft.rng.choice(
        [[header], [[k, v] for k, v in header.items()], json.dumps(header), 7, None, True, [], "", 1.5]
    )
    draft.put(json.dumps(value).encode(), data)
    return error(f"header is a {type(value).__name__}", draft.target)


def nested(rng: random.Random) -> str:
    depth, (opening, closing) = rng.choice([2000, 100_000, 100_000]), rng.choice([("[", "]"), ('{"a":', "}")])
    return opening * depth + "0" * (opening != "[") + closing * depth * (rng.random() < 0.8)


def nested_header(draft: Draft) -> Fate:
    header, data = draft.layout()
    text, bomb = json.dumps(header), nested(draft.rng)
    where = draft.rng.choice(["header", "shape", "extra", "metadata"])
    text = {
        "header": bomb,
        "shape": re.sub(r'("shape": )\[.*?\]', lambda m: m[1] + bomb, text, count=1),
        "extra": f'{{"extra": {bomb}, {text[1:]}',
        "metadata": '{"__metadata__": {"a": ' + bomb + "}}",
    }[where]
    draft.put(text.encode(), data)
    return error(f"{where} nested {bomb.count(bomb[0])} deep", draft.target)


def crowded(rng: random.Random) -> bytes:
    """Write up to 8 MB of small JSON values, which take more memory than text, and repeat a name near the end."""
    size = rng.choice([10**5, 10**6, 4 * 10**6, 8 * 10**6])
    twice = [('"{0:05x}": 0', '"{0:05x}": 0'), ('"{0:05x}": ""', '"00001": ""'), ('"{0:05x}": {{}}', '"{0:05x}": 0')]
    once = [(item, "") for item in ("{{}}", "[]", "1e1", "0", '"{0:04x}"', '"{0:05x}": 0', '"{0:05x}": [[]]')]
    item, end = rng.choice(twice + once)
    count = size // (len(item.format(0)) + 1)
    text = ",".join([*map(item.format, range(count)), *([end.format(count - 1)] if end else [])])
    return (f"{{{text}}}" if ":" in item else f"[{text}]").encode()


def crowded_header(draft: Draft) -> Fate:
    header, data = draft.layout()
    text, crowd, rng = json.dumps(header).encode(), crowded(draft.rng), draft.rng
    where = rng.choice(["header", "extra", "metadata", "first", "text"])
    text = {
        "header": crowd,
        "extra": text[:-1] + b', "extra": ' + crowd + b"}",
        "metadata": b'{"__metadata__": ' + crowd + b", " + re.sub(rb'"__metadata__"', b'"x"', text, count=1)[1:],
        "first": b'{"extra": ' + crowd + b", " + text[1:],
        "text": b'{"__metadata__": {"config": ' + json.dumps(crowd.decode()).encode() + b"}}",
    }[where]
    draft.put(text, data)
    return error(f"{len(crowd)} bytes of small values as {where}: {crowd[:20]!r}")


def crowded_text(draft: Draft) -> Fate:
    """Crowd a config or an index with values."""
    crowd = crowded(draft.rng).decode()
    if draft.index is not None and draft.rng.random() < 0.5:
        draft.index = draft.rng.choice([crowd, f'{{"weight_map": {crowd}}}'])
        return error(f"{len(crowd)} bytes of small values as index: {crowd[:20]!r}", INDEX)
    draft.document_text = crowd
    if draft.rng.random() < 0.5:
        draft.document_text = f'{dumps(draft.document)[:-1]}, "x": {crowd}}}'
    if draft.base.layout in SINGLE and draft.document_text != crowd:
        return either(draft, "small values beside the transformer")
    return error(f"{len(crowd)} bytes of small values as config: {crowd[:20]!r}")


def odd_number(draft: Draft) -> Fate:
    """Put something that is not a natural number into a shape or an offset."""
    header, data = draft.layout()
    name, rng = draft.weight(), draft.rng
    key = rng.choice(["shape", "shape", "data_offsets"])
    at = rng.randrange(len(header[name][key]))
    n = header[name][key][at]
    odd = rng.choice(
        [
            literal("1e999"),
            literal("-1e999"),
            literal("1e2"),
            literal(f"{n}.0"),
            True,
            False,
            -1,
            -n - 1,
            str(n),
            None,
            [n],
            {},
            10**25,
            literal("9" * 5000),
            n + 0.5,
            2**63,
            2**64,
            literal("1E400"),
        ]
    )
    header[name][key][at] = odd
    draft.put(dumps(header).encode(), data)
    return error(f"{key}[{at}] of {name} is {str(odd)[:20]!r}, not {n}", *about(draft, name) * ("999" not in str(odd)))


def odd_entry(draft: Draft) -> Fate:
    """Replace an entry that must be an object with something else."""
    header, data = draft.layout()
    name, rng = draft.weight(), draft.rng
    facts, key = header[name], rng.choice(["dtype", "shape", "data_offsets"])
    del facts[key]
    odd = [{key: None}, {key: 7}, {key: {}}, {key: "x"}, {}, {}]
    header[name] = rng.choice([*(facts | value for value in odd), None, [], "BF16", 3])
    draft.put(header, data)
    return error(f"{name} is {header[name]}", *about(draft, name))


def overflowing_shape(draft: Draft) -> Fate:
    """Write a shape that is right only modulo 2**64."""
    header, data = draft.layout()
    name = draft.weight()
    count, width = math.prod(header[name]["shape"]), WIDTHS[header[name]["dtype"]]
    a = draft.rng.getrandbits(64) | 1
    shape = draft.rng.choice(
        [
            [a, count * pow(a, -1, 2**64) % 2**64],
            [2**64 // width + count],
            [2**64 + count],
            [2**32, 2**32, count],
            [2**63, 2, count],
            [count, 2**62, 4],
        ]
    )
    header[name]["shape"] = shape
    draft.put(header, data)
    return error(f"{name} has shape {shape}", *about(draft, name))


def odd_offsets(draft: Draft) -> Fate:
    header, data = draft.layout()
    name, size, rng = draft.weight(), len(data), draft.rng
    begin, end = header[name]["data_offsets"]
    length = end - begin
    another = rng.choice([facts["data_offsets"] for key, facts in header.items() if key not in ("__metadata__", name)])
    odd = rng.choice(
        [
            [end, begin],
            [begin - length - 1, begin - 1],
            [-length, 0],
            [begin + 1, end + 1],
            [begin, end - 1],
            [begin + 1, end],
            [begin, end + 1],
            [size, size + length],
            [size - length + 1, size + 1],
            [begin, 2**63],
            [2**63, 2**63 + length],
            [2**64 - length, 2**64],
            [2**64 - length, 0],
            [begin],
            [begin, end, end],
            [],
            [begin, begin],
            [0, size],
            another,
        ]
    )
    header[name]["data_offsets"] = odd
    draft.put(header, data)
    moved = len(odd) == 2 and odd[1] - odd[0] == length  # then its neighbours may look wrong instead
    return error(f"{name} is at {odd}, not {[begin, end]}", *about(draft, name) * (not moved))


def shared_data(draft: Draft) -> Fate:
    """Put two tensors of one size in the same place, and leave no hole where the second one was."""
    header, data = draft.layout()
    places = {name: facts["data_offsets"] for name, facts in header.items() if name in draft.base.ours}
    first = draft.weight(lambda stored: sum(len(x.data) == len(stored.data) for x in draft.tensors.values()) > 1)
    begin, end = places[first]
    second = draft.rng.choice([name for name, (b, e) in places.items() if e - b == end - begin and name != first])
    b, e = places[second]
    for key, facts in header.items():
        if key != "__metadata__" and facts["data_offsets"][0] >= e:
            facts["data_offsets"] = [x - (e - b) for x in facts["data_offsets"]]
    header[second]["data_offsets"] = list(header[first]["data_offsets"])
    draft.put(header, data[:b] + data[e:])
    return error(f"{second} lies on {first}", *about(draft, first), *about(draft, second))


def hole(draft: Draft) -> Fate:
    """Leave bytes between two tensors, or before the first one, that belong to none."""
    header, data = draft.layout()
    size, name = draft.rng.choice([1, 8, 64, 1000]), draft.weight()
    at = header[name]["data_offsets"][0] if draft.rng.random() < 0.8 else 0
    for key, facts in header.items():
        if key != "__metadata__" and facts["data_offsets"][0] >= at:
            facts["data_offsets"] = [x + size for x in facts["data_offsets"]]
    draft.put(header, data[:at] + draft.rng.randbytes(size) + data[at:])
    return error(f"{size} bytes at {at} belong to no tensor", draft.target)


def duplicate(draft: Draft) -> Fate:
    """Repeat a name, in the same place or in another one."""
    header, data = draft.layout()
    pairs, rng = [*header.items()], draft.rng
    name = draft.weight()
    what = rng.choice(["as it is", "elsewhere", "key", "metadata"])
    again = header[name]
    if what == "elsewhere":
        size = len(draft.tensors[name].data)
        again = again | {"data_offsets": [len(data), len(data) + size]}
        data += rng.randbytes(size)
    if what == "metadata":
        name, again = "__metadata__", header["__metadata__"]
    text = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in [*pairs, (name, again)])
    if what == "key":
        text = json.dumps(header)[1:-1].replace('"dtype": ', f'"dtype": "{rng.choice(["F32", "BF16"])}", "dtype": ', 1)
    draft.put(f"{{{text}}}".encode(), data)
    return error(f"{name} twice: {what}", *(about(draft, name) if what in ("as it is", "elsewhere") else ()))


# ---------------------------------------------------------------- kinds: tensors
def unknown_dtype(draft: Draft) -> Fate:
    header, data = draft.layout()
    name = draft.weight()
    value: Any = draft.rng.choice(
        [
            "BF17",
            "F128",
            "",
            "bf16",
            "bfloat16",
            "F8",
            "F4",
            "BF16 ",
            "C64",
            None,
            5,
            "torch.bfloat16",
            ["BF16"],
            {},
            True,
            "\u0000",
            "x" * 9999,
        ]
    )
    header[name]["dtype"] = value
    draft.put(header, data)
    return error(f"{name} has dtype {str(value)[:20]!r}", *about(draft, name))


def relabelled(draft: Draft) -> Fate:
    """Name another known dtype of the same size. Floats are then read as the file says, and others are no weights."""
    name = draft.weight()
    stored = draft.tensors[name]
    others = [dtype for dtype, width in WIDTHS.items() if width == WIDTHS[stored.dtype] and dtype != stored.dtype]
    draft.tensors[name] = stored._replace(dtype=draft.rng.choice(others))
    fate = judged(draft, f"{name} is {draft.tensors[name].dtype}, not {stored.dtype}")
    return fate._replace(names=about(draft, name) if fate.expected == ERROR else ())


def dtype_of_other_size(draft: Draft) -> Fate:
    header, data = draft.layout()
    name = draft.weight()
    width = WIDTHS[header[name]["dtype"]]
    header[name]["dtype"] = draft.rng.choice([dtype for dtype, other in WIDTHS.items() if other != width])
    draft.put(header, data)
    return error(f"{name} is {header[name]['dtype']}, not {draft.tensors[name].dtype}", *about(draft, name))


def converted(draft: Draft) -> Fate:
    """Store some tensors in another dtype that holds the same values."""
    wide = draft.rng.choice(["F32", "F32", "F64"])
    for _ in range(draft.rng.randrange(1, 9)):
        name = draft.weight(lambda stored: stored.dtype in ("BF16", "F32"))
        draft.tensors[name] = entry(tensor(draft.tensors[name]).to(FLOATS[wide]))
    return same("F32") if wide == "F32" else either(draft, "F64")


def same_count(draft: Draft) -> Fate:
    """Write another shape with the same number of elements."""
    name = draft.weight()
    stored = draft.tensors[name]
    shape, count = stored.shape, math.prod(stored.shape)
    shapes = [shape[::-1], (count,), (1, *shape), (*shape, 1), (2, count // 2), (count, 1), (1, count)]
    wrong = draft.rng.choice([x for x in shapes if x != shape and math.prod(x) == count])
    draft.tensors[name] = stored._replace(shape=wrong)
    return error(f"{name} has shape {wrong}, not {shape}", *about(draft, name))


def other_count(draft: Draft) -> Fate:
    """Write another shape, with the data that it needs."""
    name, rng = draft.weight(), draft.rng
    stored = draft.tensors[name]
    shape = list(stored.shape)
    shape[rng.randrange(len(shape))] += rng.choice([-1, 1, 1, 100])
    shape = rng.choice([shape, shape, [0, *stored.shape[1:]], [], [0], [*stored.shape, 2]])
    draft.tensors[name] = Entry(stored.dtype, tuple(shape), rng.randbytes(math.prod(shape) * WIDTHS[stored.dtype]))
    return error(f"{name} has shape {shape}, not {stored.shape}", *about(draft, name))


def missing(draft: Draft) -> Fate:
    names = {draft.weight() for _ in range(draft.rng.choice([1, 1, 1, 2, 10]))}
    keyframes = {name for name in names if name.endswith(KEYFRAMES)}
    if len(names) > 1:
        names -= keyframes
    for name in names:
        del draft.tensors[name]
        if draft.index is not None and draft.rng.random() < 0.5:
            del draft.index["weight_map"][name]
    if names == keyframes:  # as in a published file of 2.5
        state = {name: t for name, t in draft.base.state.items() if name != KEYFRAMES}
        return either(draft, "without the keyframes", state, same_config=False)
    return error(f"without {sorted(names)}", *(n for name in names for n in about(draft, name)))


def extra(draft: Draft) -> Fate:
    """Add a tensor that this transformer does not have."""
    prefix, rng = PREFIX if draft.base.layout in SINGLE else "", draft.rng
    name = prefix + rng.choice(
        [
            "transformer_blocks.2.attn1.to_q.weight",
            "transformer_blocks.0.attn9.to_q.bias",
            "foo",
            "transformer_blocks.00.attn1.to_q.bias",
            "transformer_blocks.-1.scale_shift_table",
            "pos_embed.weight",
            "transformer_blocks.0.attn1.to_q.lora_A.weight",
            "transformer_blocks.0.attn1.to_out.1.weight",
            "transformer_blocks",
            "proj_out.weight2",
            ".",
            "\u202e\x1b[31m",
            "../../../etc/passwd",
            "x" * 10_000,
            "\n\n",
            "\ud800",
        ]
    )
    draft.tensors[name] = Entry("BF16", (3,), bytes(6))
    if draft.index is not None and rng.random() < 0.5:
        draft.index["weight_map"][name] = draft.target
    return error(f"and {name[:60]!r}", *((name,) if name.isprintable() and len(name) < 100 else ()))


def many_extra(draft: Draft) -> Fate:
    prefix, count = PREFIX if draft.base.layout in SINGLE else "", draft.rng.choice([100, 2000])
    for i in range(count):
        draft.tensors[f"{prefix}extra.{i}"] = Entry("F32", (0,), b"")
    return error(f"and {count} unknown tensors")


def more_foreign(draft: Draft) -> Fate:
    """Add tensors of other models. Known groups must be skipped, and unknown ones may be refused."""
    known = draft.rng.random() < 0.7
    group = draft.rng.choice(
        ["vae.", "audio_vae.", "vocoder.", f"{PREFIX}audio_embeddings_connector."]
        if known
        else ["unknown.", "first_stage_model.", "", "transformerx.", "model."]
    )
    for i in range(draft.rng.choice([1, 1000])):
        odd = [Entry("I64", (), bytes(8)), Entry("F32", (0, 3), b""), Entry("BF16", (2,), b"\xff" * 4)]
        draft.tensors[f"{group}x{i}"] = draft.rng.choice([*odd, Entry("U8", (5,), b"hello")])
    return same(f"and {group}*") if known else either(draft, f"and {group}*")


def renamed(draft: Draft) -> Fate:
    """Rename a tensor to a slightly wrong name."""
    name, rng = draft.weight(), draft.rng
    at = rng.randrange(len(name))
    prefix = PREFIX if name.startswith(PREFIX) else "transformer."
    wrong = rng.choice(
        [
            name[:at] + rng.choice("abcxyz_.0") + name[at + 1 :],
            name[:at] + name[at + 1 :],
            name.upper(),
            name + " ",
            name + ".",
            "." + name,
            prefix + name,
            name.replace("_", "."),
            name.replace(".", "_"),
            name + "\0",
            "",
            "x",
            name.replace("e", "\u0435"),
        ]
    )
    if wrong == name or wrong in draft.tensors:
        wrong = name + "_"
    rename(draft, {name: wrong})
    return error(f"{name} is called {wrong!r}", *about(draft, name), wrong or name)


def rename(draft: Draft, names: Mapping[str, str]) -> None:
    draft.files[draft.target] = {names.get(name, name): stored for name, stored in draft.tensors.items()}
    if draft.index is not None:
        for name, new in names.items():
            draft.index["weight_map"][new] = draft.index["weight_map"].pop(name)


def other_dialect(draft: Draft) -> Fate:
    """Name one tensor, or several, in the other dialect."""
    single = draft.base.layout in SINGLE
    ours = {PREFIX + name: theirs for name, theirs in names_of(draft.base.release).items()}
    names = {name: PREFIX + theirs if single else name.removeprefix(PREFIX) for name, theirs in ours.items()}
    if not single:
        names = {theirs: names[name] for name, theirs in ours.items()}
    names = {name: new for name, new in names.items() if new != name and name in draft.tensors}
    chosen = draft.rng.sample([*names], draft.rng.choice([1, 1, 1, 5]))
    rename(draft, {name: names[name] for name in chosen})
    mentioned = [n for name in chosen for n in (*about(draft, name), names[name])]
    return error(f"{chosen[0]} is called {names[chosen[0]]}", *mentioned)


def other_prefix(draft: Draft) -> Fate:
    """Use two prefixes."""
    single, rng = draft.base.layout in SINGLE, draft.rng
    prefix = rng.choice(["", "transformer.", "model."] if single else [PREFIX, "transformer.", "model."])
    names = [name for name in draft.tensors if name in draft.base.ours]
    chosen = rng.sample(names, rng.choice([1, 5, len(names) // 2]))
    if rng.random() < 0.3:  # the whole transformer a second time, with other values
        for name in names:
            stored = draft.tensors[name]
            draft.tensors[prefix + name.removeprefix(PREFIX)] = stored._replace(data=bytes(len(stored.data)))
        return error(f"all again with prefix {prefix!r}")
    rename(draft, {name: prefix + name.removeprefix(PREFIX) for name in chosen})
    return error(f"{len(chosen)} with prefix {prefix!r}")


def swapped_files(draft: Draft) -> Fate:
    """Replace the target with an intact file of something else."""
    other = draft.rng.choice(["another model", "nothing", "metadata only", "only foreign tensors", "a LoRA"])
    names = {
        "another model": ["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"],
        "nothing": [],
        "metadata only": [],
        "only foreign tensors": ["vae.decoder.conv_in.conv.weight"],
        "a LoRA": [f"diffusion_model.transformer_blocks.0.attn1.to_q.lora_{x}.weight" for x in "AB"],
    }[other]
    draft.files = {file: {} for file in draft.files}
    draft.files[draft.target] = {name: Entry("BF16", (2, 2), bytes(8)) for name in names}
    if other == "nothing":
        draft.put({}, b"")
    return error(f"a file of {other}")


# ---------------------------------------------------------------- kinds: random damage
def flipped(draft: Draft, begin: int, end: int, what: str) -> Fate:
    raw, rng = bytearray(draft.bytes_of()), draft.rng
    places = [rng.randrange(begin, end) for _ in range(rng.choice([1, 1, 1, 2, 4]))]
    for at in places:
        raw[at] = raw[at] ^ (1 << rng.randrange(8)) if rng.random() < 0.7 else rng.randrange(256)
    draft.raw[draft.target] = bytes(raw)
    return judged(draft, f"{what} bytes {places}", same_config=what == "data")


def flipped_header(draft: Draft) -> Fate:
    return flipped(draft, 8, 8 + header_length(draft.bytes_of()), "header")


def flipped_digits(draft: Draft) -> Fate:
    """Change a digit of the header."""
    raw = bytearray(draft.bytes_of())
    at = draft.rng.choice([m.start() for m in re.finditer(rb"\d", raw[8 : 8 + header_length(raw)])]) + 8
    old, raw[at] = raw[at], draft.rng.choice(string.digits.encode())
    draft.raw[draft.target] = bytes(raw)
    return judged(draft, f"digit {chr(old)} at {at} becomes {chr(raw[at])}", same_config=False)


def flipped_length(draft: Draft) -> Fate:
    return flipped(draft, 0, 8, "length")


def flipped_data(draft: Draft) -> Fate:
    raw = draft.bytes_of()
    return flipped(draft, 8 + header_length(raw), len(raw), "data")


def spliced(draft: Draft) -> Fate:
    """Join the headers of two files, or a header with another file's data."""
    raw, rng = draft.bytes_of(), draft.rng
    other = Draft(base(*rng.choice(BASES)), rng, draft.root).bytes_of()
    (n, m), a, b = (header_length(raw), header_length(other)), rng.random(), rng.random()
    head, tail, data = raw[8 : 8 + int(a * n)], other[8 + int(b * m) : 8 + m], raw[8 + n :]
    draft.raw[draft.target] = rng.choice(
        [
            struct.pack("<Q", m) + other[8 : 8 + m] + data,
            struct.pack("<Q", n) + raw[8 : 8 + n] + other[8 + m :],
            pack(head + tail, data),
            pack(head + tail, other[8 + m :]),
            raw[: int(a * len(raw))] + other[int(a * len(other)) :],
            pack(raw[8 : 8 + n - 1] + b", " + other[9 : 8 + m], data + other[8 + m :]),
        ]
    )
    return judged(draft, f"with {len(other)} bytes of another, at {a:.3f} and {b:.3f}", same_config=False)


def moved_chunk(draft: Draft) -> Fate:
    raw, rng = draft.bytes_of(), draft.rng
    limit = rng.choice([8 + header_length(raw), len(raw)])
    begin, end = sorted(rng.sample(range(limit), 2))
    size = rng.choice([end - begin, min(end - begin, 16), 512])
    chunk, where = raw[begin : begin + size], rng.randrange(len(raw))
    what = rng.choice(["deleted", "doubled", "zeroed", "moved", "random"])
    rest = raw[:begin] + raw[begin + size :]
    draft.raw[draft.target] = {
        "deleted": rest,
        "doubled": raw[:begin] + chunk + raw[begin:],
        "zeroed": raw[:begin] + bytes(len(chunk)) + raw[begin + size :],
        "moved": rest[:where] + chunk + rest[where:],
        "random": raw[:begin] + rng.randbytes(len(chunk)) + raw[begin + size :],
    }[what]
    return judged(draft, f"{len(chunk)} bytes at {begin} {what}", same_config=False)


# ---------------------------------------------------------------- kinds: other things under the name
class Bomb:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def pickled(draft: Draft) -> Fate:
    bomb, rng = Bomb(draft.marker), draft.rng
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        torch.save({"proj_in.weight": bomb}, buffer, _use_new_zipfile_serialization=rng.random() < 0.7)
    else:
        pickle.dump({"proj_in.weight": bomb}, buffer, protocol=rng.randrange(6))
    draft.raw[draft.target] = buffer.getvalue()
    if draft.base.layout == DIFFUSERS and rng.random() < 0.3:  # only the form that diffusers wrote in earlier years
        draft.files, draft.raw = {}, {"diffusion_pytorch_model.bin": buffer.getvalue()}
    return error(f"a pickle of {len(buffer.getvalue())} bytes")


def pickled_config(draft: Draft) -> Fate:
    draft.raw[draft.rng.choice([CONFIG] + [INDEX] * (draft.index is not None))] = pickle.dumps(Bomb(draft.marker))
    return error("a pickle for a JSON file")


def something_else(draft: Draft) -> Fate:
    raw, rng = draft.bytes_of(), draft.rng
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 43285058242\n"
    header, data = raw[8 : 8 + header_length(raw)], raw[8 + header_length(raw) :]
    things = {
        "an LFS pointer": pointer,
        "HTML": b"<!DOCTYPE html><html>404</html>" * 9,
        "a zip": b"PK\3\4" + raw,
        "a PNG": b"\x89PNG\r\n\x1a\n" + raw,
        "gzip": gzip.compress(raw, mtime=0),
        "zeros": bytes(len(raw)),
        "GGUF": b"GGUF\3\0\0\0" + bytes(16),
        "ones": b"\xff" * len(raw),
        "noise": rng.randbytes(5000),
        "JSON": header,
        "the data alone": data,
        "big-endian": raw[:8][::-1] + raw[8:],
    }
    thing = rng.choice([*things])
    draft.raw[draft.target] = things[thing]
    return error(thing, draft.target)


def no_file(draft: Draft) -> Fate:
    """Remove the file, or put something in its place that is no file."""
    what = draft.rng.choice(
        [
            "absent",
            "a folder",
            "a folder with a file",
            "a dangling link",
            "a link to itself",
            "a link to /dev/zero",
            "a link to /dev/null",
            "a link to /dev/full",
        ]
    )
    del draft.files[draft.target]
    if what.startswith("a folder"):
        (draft.folder / draft.target).mkdir(parents=True)
    if what == "a folder with a file":
        draft.raw[f"{draft.target}/{WHOLE}"] = pack({}, b"")
    if "link" in what:
        links = {"a dangling link": "nowhere", "a link to itself": draft.target}
        draft.links[draft.target] = Path(links.get(what, what.split(" ")[-1]))
    return error(f"{draft.target} is {what}", draft.target, draft.path.name)


# ---------------------------------------------------------------- kinds: config
SIZE_KEYS = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "cross_attention_dim",
    "in_channels",
    "audio_num_attention_heads",
    "audio_attention_head_dim",
    "audio_cross_attention_dim",
    "audio_in_channels",
    "caption_channels",
    "out_channels",
    "audio_out_channels",
)
FLAG_KEYS = {
    DIFFUSERS: (
        "gated_attn",
        "audio_gated_attn",
        "cross_attn_mod",
        "audio_cross_attn_mod",
        "ff_bias",
        "audio_ff_bias",
        "use_prompt_embeddings",
        "use_prompt_adaln_single",
        "rope_double_precision",
        "use_keyframes_abs_pos_embedding",
        "perturbed_attn",
    ),
    LIGHTRICKS: (
        "apply_gated_attention",
        "cross_attention_adaln",
        "ff_bias",
        "audio_ff_bias",
        "caption_proj_before_connector",
        "use_prompt_adaln_single",
        "use_keyframes_abs_pos_embedding",
    ),
}


def flags(draft: Draft) -> tuple[str, ...]:
    return FLAG_KEYS[LIGHTRICKS if draft.base.layout in SINGLE else DIFFUSERS]


def contradicting_config(draft: Draft) -> Fate:
    """Write a supported config of another model."""
    config, rng = draft.config, draft.rng
    key = rng.choice([*SIZE_KEYS, *flags(draft), "heads", "all"])
    if key == "heads":  # the same widths, divided into other heads
        config |= {
            "num_attention_heads": 1,
            "attention_head_dim": 12,
            "audio_num_attention_heads": 1,
            "audio_attention_head_dim": 8,
        }
    elif key == "all":
        other = Draft(base(*rng.choice([x for x in BASES if x[1] == draft.base.layout])), rng, draft.root)
        config |= other.config | {"num_layers": rng.choice([1, 2, 3, 48])}
    elif key in SIZE_KEYS:
        config[key] = rng.choice([config[key] - 1, config[key] + 1, config[key] * 2, config[key] + 2])
    else:
        config[key] = not config.get(key, key.endswith("bias") or key == "use_prompt_adaln_single")
    shapes, expected = shapes_of(draft), {name: t.shape for name, t in draft.base.state.items()}
    if shapes == expected:
        return either(draft, key, same_config=False)
    if key == "use_keyframes_abs_pos_embedding":  # a published file lacks the tensor although its config says it
        return either(draft, f"{key}: {config[key]}, against the tensors", same_config=False)
    return error(f"{key}: {config.get(key)}")


def shapes_of(draft: Draft) -> dict[str, torch.Size] | None:
    read = TransformerConfig.from_lightricks if draft.base.layout in SINGLE else TransformerConfig.from_diffusers
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = LTX2VideoTransformer3DModel(read(draft.config))
    except ConfigError:
        return None
    return {name: t.shape for name, t in model.state_dict().items()}


def no_config(draft: Draft) -> Fate:
    if draft.base.layout in SINGLE and draft.rng.random() < 0.5:
        header, data = draft.layout()
        del header["__metadata__"]
        draft.put(header, data)
    elif draft.base.layout in SINGLE and draft.rng.random() < 0.5:
        draft.document["transformers"] = draft.document.pop("transformer")
    else:
        draft.document_text = ""
    return either(draft, "no config: the tensors tell the sizes, if there are gates", same_config=False)


def broken_config(draft: Draft) -> Fate:
    text, rng = dumps(draft.document), draft.rng
    draft.document_text = rng.choice(
        [
            text[: rng.randrange(1, len(text))],
            " ",
            text + "x",
            text + text,
            "{",
            "\0",
            "\ud800",
            text.replace('"', "'"),
            text[:-1] + ",}",
            text.replace(":", "", 1),
            nested(rng),
            f'{text[:-1]}, "deep": {nested(rng)}}}',
            "nul",
        ]
    )
    if draft.base.layout in FOLDERS and rng.random() < 0.3:
        draft.document_text = None
        draft.raw[CONFIG] = rng.choice([b"", b"\xff\xfe{}", rng.randbytes(500), text.encode("utf-16")])
    return error(f"config: {(draft.document_text or 'bytes')[:40]!r}", draft.config_file)


def config_of_other_type(draft: Draft) -> Fate:
    """Write a config that is not an object."""
    value = draft.rng.choice([[], [draft.config], "config", 7, None, True, 1.5])
    if draft.base.layout in SINGLE and draft.rng.random() < 0.5:
        draft.document["transformer"] = value
    else:
        draft.document_text = json.dumps(value)
    return error(f"config is {type(value).__name__}", draft.config_file)


def odd_config_value(draft: Draft) -> Fate:
    config, rng = draft.config, draft.rng
    if rng.random() < 0.6:
        key = rng.choice(SIZE_KEYS[:10])
        odd: Any = rng.choice(
            [
                str(config.get(key, 1)),
                True,
                None,
                [2],
                {},
                0,
                -1,
                2.5,
                "",
                -(2**63),
                literal("1e999"),
                literal("NaN"),
                literal(f"{config.get(key, 6)}.0"),
                literal("9" * 5000),
            ]
        )
    else:
        key = rng.choice([*flags(draft)[:6], "rope_type", "norm_eps", "qk_norm", "activation_fn"])
        odd = rng.choice(["maybe", 7, None, [], {}, literal("NaN"), -1, "true", "\u0000"])
    config[key] = odd
    return error(f"{key} is {str(odd)[:20]!r}", *((key,) if "9999" not in str(odd) and "NaN" not in str(odd) else ()))


def huge_config(draft: Draft) -> Fate:
    """Write sizes that would take forever, or all memory, if they were believed."""
    config, n = draft.config, draft.rng.choice([10**4, 10**6, 10**9, 2**31, 2**62, 2**63, 10**30])
    key = draft.rng.choice(["num_layers", "num_layers", "in_channels", "caption_channels", "width", "heads"])
    if key == "width":
        config |= {"attention_head_dim": 2 * n, "cross_attention_dim": 4 * n}
    elif key == "heads":
        config |= {
            "num_attention_heads": n,
            "cross_attention_dim": 6 * n,
            "audio_num_attention_heads": n,
            "audio_cross_attention_dim": 4 * n,
        }
    else:
        config[key] = n
    if shapes_are_small(key, n, draft):
        return either(draft, f"{key} {n}, on which nothing depends", same_config=False)
    return error(f"{key} {n}")


def shapes_are_small(key: str, n: int, draft: Draft) -> bool:
    """Return whether no tensor has this size.

    Releases 2.3 and 2.5 project their text before the transformer.
    """
    return key == "caption_channels" and draft.base.release != "2.0" and n > 0


def unknown_key(draft: Draft) -> Fate:
    """Add an unknown key: an error in config.json, a warning in a Lightricks config, and nothing if it is private."""
    rng = draft.rng
    key = rng.choice(["brand_new_option", "x" * 5000, "\u00e9", "private"])
    draft.config["_private" if key == "private" else key] = rng.choice([True, 5, "text", [1, {"a": None}]])
    if draft.base.layout in SINGLE or key == "private":
        return same(f"and {key[:30]}")
    return error(f"and {key[:30]}", *((key,) if len(key) < 100 else ()))


def other_class(draft: Draft) -> Fate:
    name: Any = draft.rng.choice(
        [
            "LTXVideoTransformer3DModel",
            "UNet2DConditionModel",
            "AutoencoderKLLTX2Video",
            "Transformer3DModel",
            "",
            "ltx2videotransformer3dmodel",
            5,
            None,
            [],
            "os.system",
        ]
    )
    draft.config["_class_name"] = name
    return error(f"_class_name is {name!r}", "_class_name")


def odd_metadata(draft: Draft) -> Fate:
    """Write `__metadata__` that is not a map from strings to strings."""
    header, data = draft.layout()
    metadata, rng = header["__metadata__"], draft.rng
    header["__metadata__"] = rng.choice(
        [
            [metadata],
            "text",
            5,
            None,
            True,
            [],
            metadata | {"config": draft.document},
            metadata | {"a": 1},
            metadata | {"a": None},
            metadata | {"a": ["b"]},
            {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        ]
    )
    draft.put(header, data)
    return error(f"__metadata__ is {str(header['__metadata__'])[:30]}", draft.target)


def harmless_metadata(draft: Draft) -> Fate:
    """Change metadata other than the config."""
    draft.metadata["model_version"] = draft.rng.choice(["", "2.3-1", "9.9.9", "None", "{", "2" * 5000])
    draft.metadata["license"] = "x" * draft.rng.choice([0, 150_000])
    return either(draft, f"model_version {draft.metadata['model_version'][:20]!r}")


# ---------------------------------------------------------------- kinds: folders and indices
def no_weights(draft: Draft) -> Fate:
    """Leave a folder without weights or without any file."""
    draft.files = {}
    if draft.rng.random() < 0.5:
        draft.document_text, draft.index = "", None
    return error("no weights", draft.path.name)


def two_files(draft: Draft) -> Fate:
    """Leave two files, either of which could be meant."""
    stored = draft.files.pop(WHOLE) if WHOLE in draft.files else {}
    if draft.base.layout == DIFFUSERS and draft.rng.random() < 0.6:
        draft.files |= {f"{letter}.safetensors": stored for letter in "ab"}
        return error("a.safetensors and b.safetensors", draft.path.name, "a.safetensors", "b.safetensors")
    everything = {name: x for file in draft.base.files.values() for name, x in file.items()}
    draft.files[WHOLE] = {name: everything[name] for name in draft.base.ours}
    if draft.index is None:
        draft.files |= split(everything, SHARDED, "")
        draft.index = {"weight_map": {name: shard for shard in SHARDS for name in draft.files[shard]}}
    return either(draft, "a whole file and shards")


def lone_shard(draft: Draft) -> Fate:
    draft.path = draft.folder / draft.target
    return error("only this shard is loaded", draft.target)


def missing_shard(draft: Draft) -> Fate:
    if draft.rng.random() < 0.3:
        for file in [file for file in draft.files if file != draft.target]:
            del draft.files[file]
        return error(f"only {draft.target}", *SHARDS)
    del draft.files[draft.target]
    return error(f"without {draft.target}", draft.target)


def shard_beside(draft: Draft) -> Fate:
    """Add a shard that the index does not know, with other values for known names."""
    name = draft.rng.choice([SHARDS[0].replace("00001-", "00004-"), "a.safetensors", "model.safetensors"])
    draft.raw[name] = draft.other_weights(draft.target)
    return either(draft, f"and {name}")


def odd_index(draft: Draft) -> Fate:
    """Write an index that is not an index."""
    rng, weight_map, text = draft.rng, draft.index["weight_map"], json.dumps(draft.index)
    maps: list[Any] = [None, [], 5, "x", {}, [*weight_map], [*weight_map.items()]]
    draft.index = rng.choice(
        [
            "",
            text[: rng.randrange(len(text))],
            "[]",
            "7",
            "null",
            "{}",
            '{"metadata": {}}',
            text + "x",
            nested(rng),
            *(json.dumps({"weight_map": value}) for value in maps),
            f'{{"weight_map": {nested(rng)}}}',
            text.replace('"', "'"),
            "\ud800",
            "NaN",
        ]
    )
    return error(f"index: {draft.index[:40]!r}", INDEX)


def odd_index_value(draft: Draft) -> Fate:
    """Write a weight_map whose values are not names of shards."""
    name, rng = draft.weight(), draft.rng
    odd: Any = rng.choice(
        [
            5,
            None,
            [],
            [draft.target],
            {"file": draft.target},
            True,
            1.5,
            "",
            ".",
            "..",
            "\0",
            "\ud800",
            "~",
            "%s",
            "x" * 300,
            "x" * 5000,
            "x/" * 3000,
            CONFIG,
            INDEX,
            "absent.safetensors",
            draft.target.upper(),
            "$HOME",
            draft.target + " ",
            "file://" + draft.target,
            "\0.safetensors",
            "\ud800.safetensors",
            ".safetensors",
            "x" * 5000 + ".safetensors",
            "\n.safetensors",
        ]
    )
    draft.index["weight_map"][name] = odd
    shard = (odd,) if isinstance(odd, str) and odd.endswith(".safetensors") else ()
    return error(f"{name} is in {str(odd)[:40]!r}", INDEX, *about(draft, name), *shard)


def escaping_index(draft: Draft) -> Fate:
    """Write a weight_map that leads out of its folder to a good shard with other values."""
    target = draft.target
    odd = draft.rng.choice(
        [
            f"../outside/{target}",
            str(draft.outside / target),
            f"sub/../../outside/{target}",
            f"./../outside/{target}",
            f"..//outside/{target}",
            f"link/{target}",
        ]
    )
    chosen = lead_outside(draft, odd)
    if odd.startswith("link"):
        draft.links["link"] = draft.outside
    if odd.startswith("sub"):
        draft.raw["sub/.keep"] = b""
    return error(f"{len(chosen)} tensors in {odd.replace(str(draft.root), '')}", INDEX, *about(draft, chosen[0]))


def lead_outside(draft: Draft, file: str) -> list[str]:
    """Make the index lead to that file for some tensors of the target, and return their names."""
    draft.outside.mkdir()
    (draft.outside / draft.target).write_bytes(draft.other_weights(draft.target))
    chosen = [*draft.tensors] if draft.rng.random() < 0.7 else [draft.weight()]
    draft.index["weight_map"] |= dict.fromkeys(chosen, file)
    return chosen


def linked_index(draft: Draft) -> Fate:
    """weight_map with a plain name, which is a link to a file elsewhere: no loader that reads `hub_cache` can tell."""
    chosen = lead_outside(draft, "link.safetensors")
    draft.links["link.safetensors"] = draft.outside / draft.target
    others = meaning(readable(draft.other_weights(draft.target)), {name: draft.base.ours[name] for name in chosen})
    return either(draft, f"{len(chosen)} tensors in a link", draft.base.state | (others or {}))


def wrong_index(draft: Draft) -> Fate:
    """Write a well-formed index that does not fit its shards."""
    rng, weight_map, name = draft.rng, draft.index["weight_map"], draft.weight()
    what = rng.choice(["wrong shard", "unknown tensor", "lacks a tensor", "lacks a shard", "twice"])
    other = rng.choice([shard for shard in SHARDS if shard != draft.target])
    if what == "wrong shard":
        weight_map[name] = other
    elif what == "unknown tensor":
        weight_map[name := "transformer_blocks.0.attn1.to_q.gate"] = other
    elif what == "lacks a tensor":
        del weight_map[name]
        return either(draft, f"{what}: {name}")
    elif what == "lacks a shard":
        draft.index["weight_map"] = {key: shard for key, shard in weight_map.items() if shard != draft.target}
        return error(f"{what}: {draft.target}")
    else:
        text = json.dumps(draft.index)
        draft.index = f'{text[:-2]}, "{name}": "{other}"}}}}'
    return error(f"{what}: {name} in {other}", name, other)


def harmless_index(draft: Draft) -> Fate:
    """Change parts of the index other than its map."""
    draft.index["metadata"] = draft.rng.choice([None, {}, [], *({"total_size": size} for size in (-1, "x", 1e300))])
    draft.index["x"] = draft.rng.choice([None, [[[]]], "text"])
    return either(draft, f"metadata {draft.index['metadata']}")


def tensor_twice(draft: Draft) -> Fate:
    """Store a tensor in two shards with different values. The index says which one is meant."""
    name = draft.weight()
    stored = draft.tensors[name]
    other = draft.rng.choice([shard for shard in SHARDS if shard != draft.target])
    draft.files[other][name] = stored._replace(data=bytes(byte ^ 1 for byte in stored.data))
    return either(draft, f"{name} also in {other}")


def hub_cache(draft: Draft) -> Fate:
    """Make every file a link to a file outside its folder, as in the cache of the Hugging Face hub."""
    contents = draft.texts() | {file: draft.bytes_of(file) for file in draft.files}
    draft.folder = draft.path = draft.root / "snapshots" / "0123456789abcdef" / "transformer"
    (blobs := draft.root / "blobs").mkdir(parents=True)
    draft.folder.mkdir(parents=True)
    for i, (name, content) in enumerate(contents.items()):
        (blobs / f"{i:064x}").write_bytes(content)
        draft.links[name] = Path("../../../blobs") / f"{i:064x}"
    draft.files, draft.index, draft.document_text = {}, None, ""
    return same("all files are links")


# ---------------------------------------------------------------- kinds: scales
def scaled_weight(draft: Draft) -> str:
    return draft.weight(lambda stored: stored.dtype == "F8_E4M3")


def odd_scale_value(draft: Draft) -> Fate:
    """Change the value of a scale: if it is not finite, nor is the layer; any other number means what it says."""
    name = scaled_weight(draft)
    value = draft.rng.choice([math.nan, math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, -1e-3, 1e-45, 1e-40, 3e38, 1.0])
    draft.tensors[f"{name}_scale"] = entry(torch.tensor(value))
    if not math.isfinite(value):
        return error(f"scale {value} of {name}", *about(draft, name), f"{name}_scale")
    return judged(draft, f"scale {value} of {name}")


def odd_scale_form(draft: Draft) -> Fate:
    """Give a scale another shape or dtype."""
    name, rng = scaled_weight(draft), draft.rng
    rows, columns = draft.tensors[name].shape
    scale = tensor(draft.tensors[f"{name}_scale"])
    shape = rng.choice(
        [(1,), (1, 1), (rows, 1), (2,), (0,), (columns,), (1, columns), (rows, columns), (), (), (rows + 1, 1)]
    )
    dtype = "F32" if shape else rng.choice(["F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "BOOL", "I64"])
    value = torch.full(shape, float(scale))
    if dtype in FLOATS:
        draft.tensors[f"{name}_scale"] = entry(value.to(FLOATS[dtype]))
    else:
        draft.tensors[f"{name}_scale"] = Entry(dtype, (), bytes([1]) + bytes(WIDTHS[dtype] - 1))
    fate = judged(draft, f"scale of {name} is {dtype} {shape}")
    return fate._replace(names=(*about(draft, name), f"{name}_scale")) if fate.expected == ERROR else fate


def lost_scale(draft: Draft) -> Fate:
    """Remove a layer or its scale, or add a scale for a layer that has none."""
    name, what = scaled_weight(draft), draft.rng.choice(["lost", "lost", "renamed", "for another", "lost entirely"])
    scale = f"{name}_scale"
    if what == "for another":
        name = draft.weight(lambda stored: stored.dtype == "BF16" and len(stored.shape) == 2)
        draft.tensors[scale := f"{name}_scale"] = entry(torch.tensor(0.5))
    else:
        stored = draft.tensors.pop(scale)
        if what == "renamed":
            draft.tensors[scale.replace("weight_scale", "scale")] = stored
        if what == "lost entirely":
            del draft.tensors[f"{name.removesuffix('.weight')}.input_scale"]
    return error(f"scale {what}: {scale}", *about(draft, name), scale)


def odd_input_scale(draft: Draft) -> Fate:
    """Change the static scale of an activation, which changes nothing in the weights."""
    name = scaled_weight(draft).removesuffix(".weight") + ".input_scale"
    odd = [entry(torch.tensor(math.nan)), entry(torch.zeros(3)), Entry("I8", (), b"\1")]
    draft.tensors[name] = draft.rng.choice(odd)
    if draft.rng.random() < 0.3:
        del draft.tensors[name]
    return either(draft, f"{name} {draft.tensors.get(name, 'lost')}")


def odd_quantisation(draft: Draft) -> Fate:
    """Write metadata about the quantisation that are malformed or contradict the tensors."""
    key, rng, name = "_quantization_metadata", draft.rng, scaled_weight(draft).removesuffix(".weight")
    facts = json.loads(draft.metadata[key])
    what = rng.choice(["gone", "malformed", "more layers", "fewer layers", "version", "format"])
    if what == "gone":
        del draft.metadata[key]
        return either(draft, what)
    if what == "more layers":
        facts["layers"][rng.choice([f"{PREFIX}proj_out", "nothing", ""])] = {"format": "float8_e4m3fn"}
    if what == "fewer layers":
        del facts["layers"][name]
    if what == "version":
        facts["format_version"] = "2.0"
    if what == "format":
        facts["layers"][name]["format"] = rng.choice(["nvfp4", "int8_tensorwise", "mxfp8"])
    malformed = ["", "{", "[]", "null", "7", '{"layers": 5}', '{"layers": null}', '{"layers": {"a": 7}}', nested(rng)]
    draft.metadata[key] = rng.choice(malformed) if what == "malformed" else json.dumps(facts)
    return error(f"{what}: {name}", name, key) if what == "format" else either(draft, what)


def swapped_scales(draft: Draft) -> Fate:
    """Exchange the scales of two layers. Nothing can notice that, and the weights must be what the file states."""
    first, second = (f"{scaled_weight(draft)}_scale" for _ in range(2))
    draft.tensors[first], draft.tensors[second] = draft.tensors[second], draft.tensors[first]
    return judged(draft, f"{first} and {second}")


# ---------------------------------------------------------------- kinds: formats of quantised weights
MARKERS, STATE = (".comfy_quant", ".torchao_nvfp4"), ".weight.quant_state.bitsandbytes__nf4"
# Suffixes of the companions of weights, behind a layer's name: numbers that are not negative, finite ones, all that a
# weight cannot be decoded without, and all.
SCALES = (".weight_scale", ".weight_scale_2", ".weight_s_rel", ".weight_s_channel", ".weight._scale", ".SCB")
NUMBERS = (
    *(f".weight.{nested}{part}" for nested in ("", "nested_") for part in ("absmax", "quant_map")),
    *(".weight_codebook", ".scales", ".biases"),
)
NEEDED = (*SCALES, *NUMBERS, STATE)
COMPANIONS = (*NEEDED, *MARKERS, ".input_scale", ".output_scale", ".weight_format")
SAME_SIZE = (
    ("U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2"),
    ("F16", "BF16", "I16", "U16"),
    ("F32", "I32", "U32"),
    ("F64", "I64", "U64"),
)


def companion_of(draft: Draft, endings: tuple[str, ...], fits: Callable[[Entry], bool] = lambda _: True) -> str:
    """Return the name of a random companion in the blocks."""
    blocks = f"{PREFIX}transformer_blocks."
    return draft.rng.choice(
        [name for name, x in draft.tensors.items() if name.endswith(endings) and name.startswith(blocks) and fits(x)]
    )


def owner(companion: str) -> str:
    """Return the name of the weight that a companion belongs to."""
    ending = max((ending for ending in COMPANIONS if companion.endswith(ending)), key=len)
    return f"{companion.removesuffix(ending)}.weight"


def quantised_weight(draft: Draft) -> str:
    """Return the name of a random weight of the blocks that has companions."""
    kinds = ("U8", "I8", "U32", "F8_E4M3")
    return companion_of(draft, (".weight", "._data"), lambda stored: stored.dtype in kinds)


def odd_marker(draft: Draft) -> Fate:
    """Change the marker of a layer: malformed, of another format, or with a key or a value that nobody knows."""
    name, rng = companion_of(draft, MARKERS), draft.rng
    said = json.loads(draft.tensors[name].data)
    what = rng.choice(["malformed", "another format", "no format", "unknown key", "value", "dtype", "twice"])
    others = ["mxfp8", "int4", "float8_e5m2", "convrot_w4a4", "asym_w4a8_int8", "svdquant", 7, None]
    another = rng.choice([other for other in others if other != said["format"]])
    text = {
        "malformed": rng.choice(["", "{", "[]", "null", "7", '"nvfp4"', "\0" * 72, nested(rng)]),
        "another format": json.dumps(said | {"format": another}),
        "no format": json.dumps({key: value for key, value in said.items() if key != "format"}),
        "unknown key": json.dumps(said | {"surprise": rng.choice([True, 1, "x", None])}),
        "value": json.dumps({key: rng.choice([True, False, 0, -1, "x"]) for key in said} | {"format": said["format"]}),
        "dtype": json.dumps(said),
        "twice": json.dumps(said)[:-1] + f', "format": {json.dumps(said["format"])}}}',
    }[what]
    data = text.encode()
    draft.tensors[name] = Entry("I8" if what == "dtype" else "U8", (len(data),), data)
    if what in ("malformed", "another format", "no format"):
        return error(f"{what}: {name}", name, owner(name))
    return either(draft, f"{what}: {name}")


def flipped_marker(draft: Draft) -> Fate:
    """Flip bits in the marker of a layer."""
    name = companion_of(draft, MARKERS)
    data = bytearray(draft.tensors[name].data)
    for _ in range(draft.rng.choice([1, 1, 2, 3])):
        data[draft.rng.randrange(len(data))] ^= 1 << draft.rng.randrange(8)
    draft.tensors[name] = draft.tensors[name]._replace(data=bytes(data))
    return either(draft, f"{name} says {bytes(data)!r}")


def odd_quantised_scale(draft: Draft) -> Fate:
    """Make one number of a companion not finite, or a scale negative."""
    numeric = lambda stored: stored.dtype in FLOATS or draft.base.layout == "mxfp8"  # noqa: E731
    name = companion_of(draft, (*SCALES, *NUMBERS), numeric)
    stored, rng = draft.tensors[name], draft.rng
    if stored.dtype == "U8":
        data = bytearray(stored.data)
        data[rng.randrange(len(data))] = 255
        draft.tensors[name] = stored._replace(data=bytes(data))
        return error(f"{name} has a NaN", name)
    value = tensor(stored).float().flatten()
    odd = [math.nan] + [math.inf] * ("F8" not in stored.dtype) + [-1.0] * name.endswith(SCALES)
    value[rng.randrange(len(value))] = rng.choice(odd)
    draft.tensors[name] = entry(value.to(FLOATS[stored.dtype]).reshape(stored.shape))
    return error(f"{name} is not finite or negative", name)


def lost_companion(draft: Draft) -> Fate:
    """Remove a part without which nobody knows the weight, or one that may not be needed."""
    name = companion_of(draft, COMPANIONS)
    del draft.tensors[name]
    return error(f"lost {name}", name, owner(name)) if name.endswith(NEEDED) else either(draft, f"lost {name}")


def odd_companion(draft: Draft) -> Fate:
    """Give a companion another shape of as many elements, or one too few, or another dtype of the same size."""
    name, rng = companion_of(draft, NEEDED), draft.rng
    stored = draft.tensors[name]
    if rng.random() < 0.3:
        draft.tensors[name] = relabelled_entry(rng, stored)
        return either(draft, f"{name} is {draft.tensors[name].dtype}")
    n, width = math.prod(stored.shape), WIDTHS[stored.dtype]
    shape = rng.choice([(n,), (n, 1), (1, n), (1, 1, n), stored.shape[::-1], (2, n // 2), (n - 1,)])
    draft.tensors[name] = Entry(stored.dtype, shape, stored.data[: math.prod(shape) * width])
    if shape == (n - 1,) and n > 1:
        return error(f"{name} lacks an element", name)
    return either(draft, f"{name} is {list(shape)}")


def relabelled_entry(rng: random.Random, stored: Entry) -> Entry:
    """Return the same bytes as another dtype of the same size, which nobody takes for other numbers."""
    names = next(names for names in SAME_SIZE if stored.dtype in names)
    others = [name for name in names if name != stored.dtype and (WIDTHS[name] == 1 or name not in FLOATS)]
    return stored._replace(dtype=rng.choice(others))


def odd_quantised_weight(draft: Draft) -> Fate:
    """Give a quantised weight another dtype of the same size, another shape, or one row too few."""
    name, rng = quantised_weight(draft), draft.rng
    stored = draft.tensors[name]
    what = rng.choice(["dtype", "shape", "a row too few"])
    if what == "dtype":
        draft.tensors[name] = relabelled_entry(rng, stored)
        return either(draft, f"{name} is {draft.tensors[name].dtype}")
    rows, columns = stored.shape
    if what == "shape":
        n = rows * columns
        draft.tensors[name] = stored._replace(
            shape=rng.choice([(n,), (n, 1), (1, n), (rows, columns, 1), (2 * rows, columns // 2)])
        )
        return either(draft, f"{name} is {list(draft.tensors[name].shape)}")
    draft.tensors[name] = Entry(stored.dtype, (rows - 1, columns), stored.data[: len(stored.data) * (rows - 1) // rows])
    return error(f"{name} lacks a row", name)


def mixed_companions(draft: Draft) -> Fate:
    """Add a companion that a weight of its format does not have."""
    name = quantised_weight(draft).removesuffix("._data").removesuffix(".weight")
    known = {name.removeprefix(f"{PREFIX}{QUANTO_LAYER}") for name in draft.tensors}
    foreign = [".qweight", ".wscales", ".zero_point", *NEEDED, *MARKERS]
    added = name + draft.rng.choice([suffix for suffix in foreign if suffix not in known])
    draft.tensors[added] = entry(torch.ones(3))
    return error(f"with {added}", added, f"{name}.weight")


def flipped_quantised(draft: Draft) -> Fate:
    """Flip bits in the header of a quantised file."""
    fate = flipped(draft, 8, 8 + header_length(draft.bytes_of()), "header")
    return either(draft, fate.detail, same_config=False)


# Values in the state that bitsandbytes stores with a layer: those that contradict the file or mean nothing.
ODD_STATES: dict[str, list[Any]] = {
    "quant_type": ["fp4", "int4", 7, None],
    "blocksize": [128, 0, -1, "64", True, 2**40, 64.0],
    "dtype": ["int8", "float7", 5, None],
    "shape": [[], "x", None, [4096], [1, 4096], [64.0, 64.0], [-64, -64]],
    "nested_blocksize": [0, "256", True, None],
    "nested_offset": ["x", True, None, literal("NaN"), literal("1e999")],
}


def odd_state(draft: Draft) -> Fate:
    """Change the state that bitsandbytes stores with a layer."""
    name, rng = companion_of(draft, (STATE,)), draft.rng
    said = json.loads(draft.tensors[name].data)
    key = rng.choice([*ODD_STATES, "", "", "another dtype"])
    detail, text = key, rng.choice(["", "{", "[]", "null", "7", nested(rng)])
    if key in ODD_STATES:
        said[key] = rng.choice(ODD_STATES[key])
        detail, text = f"{key} = {said[key]!r}", dumps(said)
    elif rng.random() < 0.5 and not key:
        lost = rng.choice(["quant_type", "blocksize", "shape", "nested_offset", "nested_blocksize"])
        detail, text = f"no {lost}", json.dumps({key: value for key, value in said.items() if key != lost})
    elif key:
        text = json.dumps(said | {"dtype": rng.choice(["float32", "float16"]), "nested_dtype": "float32"})
    data = text.encode()
    draft.tensors[name] = Entry("U8", (len(data),), data)
    return either(draft, detail) if detail == "another dtype" else error(f"{detail}: {name}", name, owner(name))


def odd_map(draft: Draft) -> Fate:
    """Change quanto's map of formats."""
    key, rng = "quantization_map_base64", draft.rng
    layer, odd = QUANTO_LAYER, rng.choice(["qint4", "qfloat8", 7, ["qint8"], {}])
    what = rng.choice(["malformed", "weights", "a layer that is not there", "not quantised"])
    draft.metadata[key] = {
        "malformed": rng.choice(["", "{}", "7w==", in_text([]), in_text(7), in_text({layer: 7}), in_text(None)[:-2]]),
        "weights": in_text({layer: {"weights": odd}}),
        "a layer that is not there": in_text({"nothing": {"weights": "qint8"}}),
        "not quantised": in_text({"transformer_blocks.0.attn1.to_gate_logits": {"weights": "qint8"}}),
    }[what]
    return error(f"{what}: {draft.metadata[key][:60]}", key, layer)


# Changes of ModelOpt's config, and whether they are harmless.
ODD_QUANTISERS: list[tuple[dict[str, Any], bool]] = [
    ({"ignore": []}, True),
    ({"ignore": ["proj_out", "*adaln*"]}, True),
    ({"version": 7, "kv_cache_quant_algo": None}, True),
    ({"producer": {"name": "modelopt", "version": "0.99"}}, True),
    ({"quant_algo": "INT4_AWQ"}, False),
    ({"quant_algo": "FP8"}, False),
    ({"quant_algo": "nothing"}, False),
    ({"quant_method": "awq"}, False),
    ({"quant_method": "hqq"}, False),
    ({"quant_method": "", "producer": None}, False),
    ({"swizzled": "yes"}, False),
    ({"swizzled": True, "is_swizzled": False}, False),
    ({"ignore": [f"{QUANTO_LAYER}"]}, False),
    ({"ignore": ["transformer_blocks.0.attn1*"]}, False),
]


def odd_quantiser(draft: Draft) -> Fate:
    """Change the config of the quantiser."""
    key, rng = "quantization_config", draft.rng
    change, harmless = rng.choice(ODD_QUANTISERS)
    draft.metadata[key] = json.dumps(json.loads(draft.metadata[key]) | change)
    if rng.random() < 0.2:
        change, harmless = {"": draft.metadata[key][:9]}, False
        draft.metadata[key] = rng.choice(["", "{", "[]", "7", nested(rng), "modelopt"])
    return same(f"{key}: {change}") if harmless else error(f"{key}: {change}", key, *map(str, change), QUANTO_LAYER)


def odd_layers(draft: Draft) -> Fate:
    """Say in the metadata of a layer that it has another format, or that of a tensor that is none."""
    rng, key = draft.rng, "_quantization_metadata"
    layer = owner(companion_of(draft, NEEDED)).removesuffix(".weight")
    format = rng.choice(["mxfp8", "convrot_w4a4", "float8_e5m2", "asym_w4a8_int8", "nothing", 7, None, [], {"a": 1}])
    layers = {rng.choice([layer, layer, layer.removeprefix(PREFIX), "nothing"]): {"format": format}}
    draft.metadata[key] = rng.choice(
        [json.dumps({"format_version": "1.0", "layers": layers}), "{", nested(rng), '{"layers": 3}']
    )
    return either(draft, f"{key}: {draft.metadata[key][:80]}")


# ---------------------------------------------------------------- kinds: GGUF
def cut_gguf(draft: Draft) -> Fate:
    raw = draft.base.raw
    return cut(draft, draft.rng.choice([draft.rng.randrange(4, 3000), draft.rng.randrange(4, len(raw) - 64)]))


def flipped_gguf(draft: Draft) -> Fate:
    """Change bytes of a GGUF file's header: of counts, keys, values, and names, dimensions and offsets of tensors."""
    raw, rng = bytearray(draft.base.raw), draft.rng
    names = [writers.original_name(name).encode() for name in draft.base.state]
    name = rng.choice(names)
    after = raw.rindex(len(name).to_bytes(8, "little") + name) + 8 + len(name)
    dimensions = int.from_bytes(raw[after : after + 4], "little")
    places = [
        range(4, 24),
        range(24, raw.index(b"general.architecture") + 64),
        range(after - len(name) - 8, after),
        range(after, after + 4 + 8 * dimensions),
        range(after + 8 + 8 * dimensions, after + 16 + 8 * dimensions),
    ]
    place = rng.choice(places)
    at = [rng.choice(place) for _ in range(rng.choice([1, 1, 2, 4]))]
    for byte in at:
        raw[byte] = rng.choice([raw[byte] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)])
    draft.raw[draft.target] = bytes(raw)
    return either(draft, f"bytes {at}", same_config=False)


def inflated_gguf(draft: Draft) -> Fate:
    """Begin the metadata with an array of more elements than there are bytes, or more than anybody needs."""
    raw, rng = draft.base.raw, draft.rng
    kind, count = rng.choice([0, 1, 4, 6, 8, 9, 12]), rng.choice([2**20 + 1, 2**31, 2**40, 2**60, 2**63, 2**64 - 1])
    entries = int.from_bytes(raw[16:24], "little")
    array = struct.pack("<Q", 3) + b"bad" + struct.pack("<IIQ", 9, kind, count)
    draft.raw[draft.target] = raw[:16] + (entries + 1).to_bytes(8, "little") + array + raw[24:]
    if rng.random() < 0.5:
        draft.sizes[draft.target] = 2**34
    return error(f"an array of {count} values of type {kind}", draft.target)


# ---------------------------------------------------------------- kinds: LoRA
class LoraFile(NamedTuple):
    """A good LoRA in one of the published spellings, and the state that it makes of the checkpoint."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    config: dict[str, Any] | None  # of PEFT, beside the file
    layers: list[str]  # by diffusers' names
    state: State


PLAIN, FLAT = "lightricks", "kohya"
# What names begin with, for each spelling, and what else the same names may begin with.
LORA_PREFIXES = {
    PLAIN: ("diffusion_model.", "model.diffusion_model."),
    "default": ("diffusion_model.", "model.diffusion_model."),
    "fp8": ("diffusion_model.", "model.diffusion_model."),
    "diffusers": ("transformer.", ""),
    FLAT: ("lora_unet_", "lora_unet_model_"),
    "LoKr": ("lycoris_", "lora_unet_"),
    "difference": ("diffusion_model.", "model.diffusion_model."),
    "peft": ("base_model.model.", "base_model.model.transformer."),
}
LORA_ENDINGS = {
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
    FLAT: (".lora_down.weight", ".lora_up.weight"),
}
LORA_RANK = 2


def lora_file(draft: Draft, spelling: str, **config: Any) -> LoraFile:
    """Return a LoRA for some layers. `config` is said in PEFT's config besides what is usual."""
    generator = torch.Generator().manual_seed(draft.rng.randrange(2**31))
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    state, tensors = dict(draft.base.state), dict[str, Entry]()
    linears = [
        (name, theirs.removesuffix(".weight"))
        for name, theirs in draft.base.ours.items()
        if theirs.endswith(".weight") and state[theirs].ndim == 2
    ]
    chosen = draft.rng.sample(linears, 3)
    layers = [theirs for _, theirs in chosen]
    said = {"r": LORA_RANK, "lora_alpha": 3, "target_modules": layers} | config
    factor, kind = 1.0, torch.float8_e4m3fn if spelling == "fp8" else torch.float32
    if spelling in ("diffusers", "peft"):
        factor = said["lora_alpha"] / (LORA_RANK**0.5 if said.get("use_rslora") else LORA_RANK)
    for name, layer in chosen:
        rows, columns = state[f"{layer}.weight"].shape
        parts: dict[str, Tensor] = {}
        if spelling == "difference":
            change = parts[".diff"] = random(rows, columns)
            bias = state.get(f"{layer}.bias")
            if bias is not None:
                parts[".diff_b"] = random(rows)
                state[f"{layer}.bias"] = bias.float() + parts[".diff_b"]
        elif spelling == "LoKr":
            tall, wide = (next((n for n in range(2, size) if size % n == 0), size) for size in (rows, columns))
            w1, a, b = random(tall, wide), random(rows // tall, LORA_RANK), random(LORA_RANK, columns // wide)
            parts |= {".lokr_w1": w1, ".lokr_w2_a": a, ".lokr_w2_b": b}
            change = torch.kron(w1, a @ b)
        else:
            a, b = random(LORA_RANK, columns).to(kind), random(rows, LORA_RANK).to(kind)
            parts |= dict(zip(LORA_ENDINGS.get(spelling, (".lora_A.weight", ".lora_B.weight")), (a, b), strict=True))
            change = b.float() @ a.float()
        if spelling in (FLAT, "LoKr"):
            parts[".alpha"] = torch.tensor(3.0)
            factor = 3 / LORA_RANK
        original = name.removeprefix(PREFIX).removesuffix(".weight")
        spelled = layer if spelling in ("diffusers", "peft") else original
        if spelling in (FLAT, "LoKr"):
            spelled = spelled.replace(".", "_")
        tensors |= {LORA_PREFIXES[spelling][0] + spelled + ending: entry(x) for ending, x in parts.items()}
        state[f"{layer}.weight"] = change.mul(factor).add(state[f"{layer}.weight"].float())
    metadata = {"format": "pt"}
    if spelling == "diffusers":
        of_transformer = {f"transformer.{key}": value for key, value in said.items()}
        metadata["lora_adapter_metadata"] = json.dumps(of_transformer)
    peft = {"peft_type": "LORA", "alpha_pattern": {}, "bias": "none"} | said if spelling == "peft" else None
    return LoraFile(tensors, metadata, peft, layers, state)


def put_lora(
    draft: Draft, lora: LoraFile, damage: Callable[[bytes], bytes] = lambda raw: raw, config: str = ""
) -> None:
    """Put a LoRA beside the checkpoint, and let it be loaded."""
    header: Header = {"__metadata__": lora.metadata}
    data = bytearray()
    for key, value in lora.tensors.items():
        offsets = [len(data), len(data) + len(value.data)]
        header[key] = {"dtype": value.dtype, "shape": list(value.shape), "data_offsets": offsets}
        data += value.data
    folder = lora.config is not None
    draft.raw[f"{ADAPTER}/{ADAPTER_WEIGHTS}" if folder else LORA] = damage(pack(header, bytes(data)))
    if folder:
        draft.raw[f"{ADAPTER}/{ADAPTER_CONFIG}"] = (config or dumps(lora.config)).encode()
    draft.options["lora"] = [(draft.folder / (ADAPTER if folder else LORA), 1.0)]


def part_of(draft: Draft, lora: LoraFile) -> tuple[str, str]:
    """Return the name of a random tensor of a LoRA that is no alpha, and what it begins with: prefix and layer."""
    name = draft.rng.choice([name for name in lora.tensors if not name.endswith(".alpha")])
    return name, re.split(r"\.(?:lora_|lokr_|diff)", name)[0]


def odd_lora(draft: Draft) -> Fate:
    """Load a LoRA with the checkpoint, whole or damaged."""
    rng, spelling = draft.rng, draft.rng.choice([*LORA_PREFIXES])
    lora = lora_file(draft, spelling)
    what = rng.choice([x for x in LORA_DAMAGE if spelling != "difference" or x not in ("lost", "flips in the header")])
    name, layer = part_of(draft, lora)
    tensors, stored = lora.tensors, lora.tensors[name]
    detail, names, damage = f"{spelling}, {what}: {name}", (layer, "another"), lambda raw: raw
    if what in ("lost", "renamed"):
        del tensors[name]
    if what == "renamed":
        renamed = [f"{name}_", re.sub("lora_(?=A|B|down|up)|lokr_(?=w)", "loha_", name), "another"]
        tensors[rng.choice([other for other in renamed if other != name])] = stored
    if what == "shape":
        n = math.prod(stored.shape)
        tensors[name] = stored._replace(shape=(n,) if len(stored.shape) > 1 else (1, n))
    if what == "a row more":
        row = stored.data[: len(stored.data) // stored.shape[0]]
        tensors[name] = Entry(stored.dtype, (stored.shape[0] + 1, *stored.shape[1:]), stored.data + row)
    if what == "dtype":
        tensors[name] = stored._replace(dtype=rng.choice(["I32", "U32"] if stored.dtype == "F32" else ["I8", "U8"]))
    if what == "alpha":
        odd = [entry(torch.tensor(x)) for x in (math.nan, math.inf, -math.inf)]
        tensors[f"{layer}.alpha"] = rng.choice([*odd, entry(torch.ones(2)), Entry("I64", (), bytes([2, *bytes(7)]))])
    if what == "not finite":
        value = tensor(stored).float()
        value.view(-1)[rng.randrange(value.numel())] = math.nan
        tensors[name] = entry(value.to(FLOATS[stored.dtype]))
    if what == "doubled":
        first, second = LORA_PREFIXES[spelling]
        tensors[second + name.removeprefix(first)] = stored
        names = (layer, layer.removeprefix(first))
    if what == "foreign":
        begins = ["lora_te_text_model", "text_encoder.layers.0.q", f"{LORA_PREFIXES[spelling][0]}connectors.0"]
        tensors[f"{rng.choice(begins[:2] if spelling in (FLAT, 'LoKr') else begins)}.lora_A.weight"] = entry(
            torch.ones(2, 3)
        )
    if what == "reordered":
        lora = lora._replace(tensors=shuffled(rng, tensors))
    if what == "adapter":
        odd = [
            "{",
            "[]",
            '{"r": 2}',
            '{"lora_alpha": NaN}',
            nested(rng),
            '{"lora_alpha": "2"}',
            '{"lora_alpha": 1e999}',
        ]
        lora.metadata["lora_adapter_metadata"] = rng.choice([*odd, '{"lora_alpha": 2, "use_dora": true}'])
        names = ("lora_adapter_metadata",)
    if what == "cut":
        damage, names = lambda raw: raw[: rng.randrange(len(raw))], ()
    if what == "trailing":
        damage, names = lambda raw: raw + bytes(rng.randrange(1, 100)), ()
    if what == "flips in the header":
        begin = 8 + len(dumps({"__metadata__": lora.metadata}))  # what the metadata say may mean other factors
        damage = partial(with_flips, rng, begin)
    put_lora(draft, lora, damage)
    if what in ("nothing", "foreign", "reordered"):
        return Fate(SAME, (), detail, lora.state)
    if what == "flips in the header":
        return either(draft, detail, lora.state)
    return error(detail, *names)


def with_flips(rng: random.Random, begin: int, raw: bytes) -> bytes:
    """Return a file with flipped bits in its header, from a byte on."""
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 2, 3])):
        changed[rng.randrange(begin, 8 + header_length(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


LORA_DAMAGE = ["nothing", "foreign", "reordered", "lost", "renamed", "shape", "a row more", "dtype", "alpha", "doubled"]
LORA_DAMAGE += ["not finite", "adapter", "cut", "trailing"] + ["flips in the header"] * 3
# Changes of PEFT's config that must be refused, by key; and those after which it means what it then says.
REFUSED_ADAPTERS: dict[str, list[Any]] = {
    "lora_alpha": [True, "3", None, [3], literal("NaN"), literal("1e999"), literal("9" * 400)],
    "r": [3, "2", True, literal("Infinity")],
    "rank_pattern": [{QUANTO_LAYER.rpartition(".")[2]: "x"}, [1], {".*": 2}],
    "alpha_pattern": [{"to_q": "x"}, {"to_q": True}, {"(a+)+$": 2}, "x"],
    "peft_type": ["LOKR", "LOHA", "", 7, None],
    "target_modules": [["nothing"]],
    "use_dora": [True],
    "lora_bias": [True],
    "bias": ["all", "lora_only"],
    "modules_to_save": [["proj_out"]],
    "init_lora_weights": ["pissa", "olora"],
    "loftq_config": [{"bits": 4}],
}
READ_ADAPTERS: list[dict[str, Any]] = [
    {"lora_alpha": 5},
    {"lora_alpha": 0.25},
    {"use_rslora": True},
    {"r": None, "base_model_name_or_path": "x", "task_type": None},
    {"target_modules": ".*"},
    {
        "use_dora": False,
        "loftq_config": {},
        "modules_to_save": None,
        "peft_version": "0.99",
        "init_lora_weights": False,
    },
]


def odd_adapter(draft: Draft) -> Fate:
    """Change the config in a folder of PEFT's."""
    rng = draft.rng
    what = rng.choice(["refused", "refused", "refused", "read", "read", "text", "text", "gone"])
    change = rng.choice(READ_ADAPTERS) if what == "read" else {}
    lora = lora_file(draft, "peft", **change)
    assert lora.config is not None
    if what == "read":
        put_lora(draft, lora)
        return Fate(SAME, (), f"{what}: {change}", lora.state)
    text, detail, key = "", what, ADAPTER_CONFIG
    if what == "refused":
        key = rng.choice([*REFUSED_ADAPTERS, "exclude_modules"])
        value = rng.choice(REFUSED_ADAPTERS.get(key, [lora.layers[:1]]))
        lora.config[key] = value
        detail = f"{key} = {str(value)[:40]}"
    if what == "text":
        whole = dumps(lora.config)
        text = rng.choice([" ", "{", "[]", "null", "7", whole[:-1], whole + "}", whole.replace('"', "'"), nested(rng)])
        detail = f"{what}: {text[:40]!r}"
    put_lora(draft, lora, config=text)
    if what == "gone":
        del draft.raw[f"{ADAPTER}/{ADAPTER_CONFIG}"]
        if rng.random() < 0.5:
            draft.raw[f"{ADAPTER}/{ADAPTER_CONFIG}/file"] = b""
            detail = "a folder"
    return error(detail, ADAPTER_CONFIG, key)


# ---------------------------------------------------------------- kinds: prefixes and variants
def another_prefix(draft: Draft) -> Fate:
    """Put a prefix that no publisher uses in front of all names of the transformer."""
    rng, prefix = draft.rng, draft.rng.choice(["velocity_model.", "module.", "pipe.dit.", "my_transformer."])
    what = rng.choice(["given", "given", "not given", "another", "two names without", "two models"])
    own = [name for name in draft.tensors if name in draft.base.ours or name.startswith(PREFIX)]
    without = rng.sample([name for name in own if name in draft.base.ours], 2) if what == "two names without" else []
    draft.files[draft.target] = {
        (prefix if name in own and name not in without else "") + name: x for name, x in draft.tensors.items()
    }
    if what == "two models":
        draft.tensors.update({f"ema.{name}": x for name, x in draft.base.files[draft.target].items() if name in own})
    if what != "not given":
        draft.options["prefix"] = "b." if what == "another" else prefix
    if what == "given":
        return same(f"{what}: {prefix}")
    return error(f"{what}: {prefix}", prefix, "ema.", *(spelled for name in without for spelled in about(draft, name)))


def variants(draft: Draft) -> Fate:
    """Name the files of a folder as a variant, beside others with other values, of which one may be asked for."""
    rng, stem = draft.rng, WHOLE.removesuffix(".safetensors")
    others = {name: draft.other_weights(draft.target) for name in (f"{stem}.bf16.safetensors", f"{stem}.x.safetensors")}
    what = rng.choice(["asked for", "asked for", "the only one", "plain beside", "not asked for", "no such", "odd"])
    if what == "plain beside":
        draft.raw |= others
        return same(what)
    if draft.index is None:
        draft.target = f"{stem}.fp16.safetensors"
        draft.files = {draft.target: draft.files[WHOLE]}
    else:
        draft.index_name = INDEX.replace(".json", ".fp16.json")
    if what != "the only one":
        draft.raw |= others
    if what in ("asked for", "no such", "odd"):
        odd = ["", "safetensors", "index", "json", "..", "../outside", "\0", "fp16.", "*", "FP16", "x" * 5000]
        draft.options["variant"] = {"asked for": "fp16", "no such": "fp8", "odd": rng.choice(odd)}[what]
    if what in ("asked for", "the only one"):
        return same(what)
    return error(f"{what}: {draft.options.get('variant', '')[:20]!r}", *others)


# For each kind: its name, its layouts, and its function. Random damage is listed several times, because there is more
# of it to find.
KINDS: list[tuple[str, tuple[str, ...], Callable[[Draft], Fate]]] = [
    ("untouched", WHOLE_FILES, untouched),
    ("written otherwise", WHOLE_FILES, rewritten),
    ("cut in the header", WHOLE_FILES, cut_header),
    ("cut in the data", WHOLE_FILES, cut_data),
    ("cut by some bytes", WHOLE_FILES, cut_last_bytes),
    ("cut to nothing", WHOLE_FILES, cut_to_nothing),
    ("trailing bytes", WHOLE_FILES, trailing),
    ("lying header length", WHOLE_FILES, lying_length),
    ("lying header length", WHOLE_FILES, lying_length),
    ("huge header, sparse", WHOLE_FILES, sparse_header),
    ("huge tensor, sparse", ANY, sparse_tensor),
    ("huge foreign tensor, sparse", SINGLE, sparse_foreign),
    ("invalid JSON", WHOLE_FILES, broken_json),
    ("invalid JSON", WHOLE_FILES, broken_json),
    ("invalid UTF-8", WHOLE_FILES, broken_utf8),
    ("header is no object", WHOLE_FILES, not_an_object),
    ("nested header", WHOLE_FILES, nested_header),
    ("crowded header", ANY, crowded_header),
    ("crowded JSON", ANY, crowded_text),
    ("odd number", ANY, odd_number),
    ("odd number", ANY, odd_number),
    ("odd entry", ANY, odd_entry),
    ("overflowing shape", ANY, overflowing_shape),
    ("odd offsets", ANY, odd_offsets),
    ("odd offsets", ANY, odd_offsets),
    ("shared data", ANY, shared_data),
    ("hole in the data", ANY, hole),
    ("duplicate names", ANY, duplicate),
    ("unknown dtype", ANY, unknown_dtype),
    ("dtype of the same size", ANY, relabelled),
    ("dtype of another size", ANY, dtype_of_other_size),
    ("converted dtype", ANY, converted),
    ("shape of the same count", ANY, same_count),
    ("shape of another count", ANY, other_count),
    ("missing tensor", ANY, missing),
    ("extra tensor", ANY, extra),
    ("many extra tensors", ANY, many_extra),
    ("more foreign tensors", SINGLE, more_foreign),
    ("renamed tensor", ANY, renamed),
    ("name of the other dialect", ANY, other_dialect),
    ("two prefixes", ANY, other_prefix),
    ("another model's file", ANY, swapped_files),
    ("flips in the header", ANY, flipped_header),
    ("flips in the header", ANY, flipped_header),
    ("flips in the header", ANY, flipped_header),
    ("flips in the header", ANY, flipped_header),
    ("flipped digit in the header", ANY, flipped_digits),
    ("flipped digit in the header", ANY, flipped_digits),
    ("flips in the length", ANY, flipped_length),
    ("flips in the data", ANY, flipped_data),
    ("flips in the data", ANY, flipped_data),
    ("spliced files", ANY, spliced),
    ("spliced files", ANY, spliced),
    ("moved chunk", ANY, moved_chunk),
    ("moved chunk", ANY, moved_chunk),
    ("pickle", ANY, pickled),
    ("pickle for JSON", FOLDERS, pickled_config),
    ("something else", ANY, something_else),
    ("no file", ANY, no_file),
    ("contradicting config", ANY, contradicting_config),
    ("contradicting config", ANY, contradicting_config),
    ("no config", ANY, no_config),
    ("broken config", ANY, broken_config),
    ("config is no object", ANY, config_of_other_type),
    ("odd config value", ANY, odd_config_value),
    ("odd config value", ANY, odd_config_value),
    ("huge config", ANY, huge_config),
    ("unknown config key", ANY, unknown_key),
    ("config of another class", ANY, other_class),
    ("odd metadata", ANY, odd_metadata),
    ("harmless metadata", SINGLE, harmless_metadata),
    ("no weights", FOLDERS, no_weights),
    ("two files", FOLDERS, two_files),
    ("lone shard", (SHARDED,), lone_shard),
    ("missing shard", (SHARDED,), missing_shard),
    ("shard beside the index", (SHARDED,), shard_beside),
    ("odd index", (SHARDED,), odd_index),
    ("odd index value", (SHARDED,), odd_index_value),
    ("index leads outside", (SHARDED,), escaping_index),
    ("index leads to a link", (SHARDED,), linked_index),
    ("wrong index", (SHARDED,), wrong_index),
    ("harmless index", (SHARDED,), harmless_index),
    ("tensor in two shards", (SHARDED,), tensor_twice),
    ("cache of the hub", FOLDERS, hub_cache),
    ("odd scale", (FP8,), odd_scale_value),
    ("odd form of a scale", (FP8,), odd_scale_form),
    ("lost scale", (FP8,), lost_scale),
    ("odd input scale", (FP8,), odd_input_scale),
    ("odd quantisation metadata", (FP8,), odd_quantisation),
    ("swapped scales", (FP8,), swapped_scales),
    ("odd marker", MARKED, odd_marker),
    ("odd marker", MARKED, odd_marker),
    ("odd marker", MARKED, odd_marker),
    ("flips in a marker", MARKED, flipped_marker),
    ("odd quantised scale", QUANTISED, odd_quantised_scale),
    ("odd quantised scale", QUANTISED, odd_quantised_scale),
    ("lost companion", QUANTISED, lost_companion),
    ("lost companion", QUANTISED, lost_companion),
    ("odd form of a companion", QUANTISED, odd_companion),
    ("odd form of a companion", QUANTISED, odd_companion),
    ("odd form of a quantised weight", QUANTISED, odd_quantised_weight),
    ("companion of another format", QUANTISED, mixed_companions),
    ("flips in a quantised header", SELF_EVIDENT, flipped_quantised),
    ("flips in a quantised header", SELF_EVIDENT, flipped_quantised),
    ("odd metadata of layers", QUANTISED, odd_layers),
    ("odd state of bitsandbytes", ("nf4",), odd_state),
    ("odd map of quanto", ("quanto",), odd_map),
    ("odd config of ModelOpt", ("modelopt",), odd_quantiser),
    ("GGUF, untouched", (GGUF,), untouched),
    ("GGUF, cut", (GGUF,), cut_gguf),
    ("GGUF, flips in the header", (GGUF,), flipped_gguf),
    ("GGUF, flips in the header", (GGUF,), flipped_gguf),
    ("GGUF, inflated", (GGUF,), inflated_gguf),
    ("LoRA", (LIGHTRICKS,), odd_lora),
    ("LoRA", (LIGHTRICKS,), odd_lora),
    ("LoRA", (LIGHTRICKS,), odd_lora),
    ("LoRA", (LIGHTRICKS,), odd_lora),
    ("odd config of PEFT", (LIGHTRICKS,), odd_adapter),
    ("another prefix", (LIGHTRICKS, DIFFUSERS), another_prefix),
    ("variants", FOLDERS, variants),
]
# Kinds that concern the config in Lightricks' files, which diffusers does not read from there.
CONFIG_KINDS = {
    name
    for name, _, spoil in KINDS
    if spoil
    in (
        contradicting_config,
        no_config,
        broken_config,
        config_of_other_type,
        odd_config_value,
        huge_config,
        unknown_key,
        other_class,
    )
}


# ---------------------------------------------------------------- files that change while they are read
@contextmanager
def resized_at_call(path: Path, size: int, call: int) -> Iterator[list[int]]:
    """Cut or extend a file just before the block's `call`th function call, and yield the number of calls.

    Functions of Python and of C count.
    """
    count = [0]

    def hook(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            count[0] += 1
            if count[0] == call:
                os.truncate(path, size)

    sys.setprofile(hook)
    try:
        yield count
    finally:
        sys.setprofile(None)


@contextmanager
def resized_by_thread(path: Path, sizes: tuple[int, ...], seconds: float) -> Iterator[None]:
    """Change a file's size again and again, every `seconds`, from a thread until the block ends."""
    stop = threading.Event()

    def work() -> None:
        for i in range(1_000_000):
            if stop.wait(seconds):
                return
            os.truncate(path, sizes[i % len(sizes)])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------- a process that may die
REJECTED, RIGHT, INTACT, WRONG = "rejected", "right", "intact", "wrong"
CRASHED, HUNG, MEMORY, EXECUTED = "crashed", "hung", "out of memory", "executed code"
Loader = Callable[[Mutation], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Report:
    """The outcome of a mutation. INTACT means that something to be rejected loaded to the original weights."""

    mutation: Mutation
    outcome: str
    error: str = ""  # type of the error, with its module
    message: str = ""  # message of the error, or the first difference
    seconds: float = 0.0  # of the processor
    megabytes: float = 0.0  # peak above the idle process

    def __str__(self) -> str:
        m = self.mutation
        return (
            f"{m.index} {m.kind} ({m.base}; {m.detail}): expected {m.expected}, {self.outcome}"
            f" {self.error} {self.message[:300]!r} in {self.seconds:.2f} s, {self.megabytes:.0f} MB"
        )


@dataclass
class Guarded:
    """A process that loads mutations and is started again whenever it dies, hangs or takes too much memory."""

    loader: Loader
    directory: Path
    seed: int
    seconds: float = 30.0
    megabytes: float = 1500.0
    process: Any = field(default=None, init=False)
    pipe: Any = field(default=None, init=False)

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def report(self, index: int) -> Report:
        answer = self.attempt(index)
        if not isinstance(answer, Report) and answer[0] == HUNG:  # a busy machine can stop for seconds: try again
            answer = self.attempt(index)
        if isinstance(answer, Report):
            answer.mutation.remove()
            return answer
        mutant = replace(mutation(self.directory, index, self.seed), state=None)
        mutant.remove()
        return Report(mutant, *answer)

    def attempt(self, index: int) -> "Report | tuple[str, str, str]":
        shutil.rmtree(self.directory / f"{index:05d}", ignore_errors=True)
        if self.process is None:
            self.start()
        self.pipe.send(index)
        answer = self.wait()
        if not isinstance(answer, Report):
            self.stop()
            shutil.rmtree(self.directory / f"{index:05d}", ignore_errors=True)
        return answer

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.loader, self.directory, self.seed), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(120) or self.pipe.recv() != "ready":
            raise RuntimeError("the process that loads does not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def wait(self) -> "Report | tuple[str, str, str]":
        """Return the report, or what happened instead, as the fields of one."""
        idle, end = resident(self.process.pid), time.monotonic() + self.seconds
        while time.monotonic() < end:
            if self.pipe.poll(0.02):
                try:
                    report: Report = self.pipe.recv()
                    return report
                except (EOFError, ConnectionError):  # the other end is gone
                    return CRASHED, "", self.died()
            if resident(self.process.pid) - idle > self.megabytes:
                return MEMORY, "", f"more than {self.megabytes:.0f} MB"
        return HUNG, "", f"more than {self.seconds:.0f} s"

    def died(self) -> str:
        self.process.join(5)
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def serve(pipe: Connection, loader: Loader, directory: Path, seed: int) -> None:
    """Serve as the other process: an index comes in, a report goes out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    observe(loader, mutation(directory / f"warm-{os.getpid()}", 0, seed))
    shutil.rmtree(directory / f"warm-{os.getpid()}")
    pipe.send("ready")
    while True:
        index = pipe.recv()
        report = observe(loader, mutation(directory, index, seed))
        pipe.send(replace(report, mutation=replace(report.mutation, state=None)))


def observe(loader: Loader, mutant: Mutation) -> Report:
    idle = idle_memory()
    begin = time.process_time()
    try:
        loaded, outcome, failed = loader(mutant), "", None
    except Exception as failure:
        loaded, failed = {}, failure
        outcome = MEMORY if isinstance(failure, MemoryError) else REJECTED
    seconds, megabytes = time.process_time() - begin, peak() - idle
    if mutant.marker.exists():
        outcome = EXECUTED
    if failed is not None:
        name = f"{type(failed).__module__}.{type(failed).__name__}"
        return Report(mutant, outcome, name, str(failed), seconds, megabytes)
    expected = mutant.original.state if mutant.state is None else mutant.state
    message = difference(loaded, expected)
    outcome = outcome or (WRONG if message else INTACT if mutant.expected == ERROR else RIGHT)
    return Report(mutant, outcome, "", message, seconds, megabytes)


def difference(loaded: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return the first difference of two states, bit for bit in the dtype of what was loaded; "" if there is none."""
    if loaded.keys() != expected.keys():
        return f"names differ: {sorted(loaded.keys() ^ expected.keys())[:3]}"
    for name, value in expected.items():
        x = loaded[name].detach()
        if x.is_meta or x.shape != value.shape or not x.is_floating_point():
            return f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, expected {tuple(value.shape)}"
        y = value.to(x.dtype)
        bits = x.contiguous().view(torch.uint8) == y.contiguous().view(torch.uint8) if x.ndim else torch.tensor(x == y)
        same_bits = bits.reshape(*x.shape, -1).all(-1)
        if not (same_bits | (x.isnan() & y.isnan())).all():
            return f"{name} differs"
    return ""


def resident(pid: int) -> float:
    """Return the megabytes of memory that a process has."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * resource.getpagesize() / 1e6


def idle_memory() -> float:
    """Return this process's megabytes after giving back what it does not need. `peak` counts from here."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident(os.getpid())


def peak() -> float:
    """Return the largest number of megabytes that this process has had since `idle_memory`."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6
