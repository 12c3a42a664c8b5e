"""Header-accurate sparse copies of the published files: true names, shapes, dtypes and metadata, and a hole as data.

    python tests/support/sparse.py DIR             writes all of FILES below DIR, in folders named like the repositories
    python tests/support/sparse.py DIR 2.5-int8    writes these only

A 46 GB file takes the room of its header; every weight in it reads as 0. Nothing is invented in the transformer, the
connectors and the text projection. What is:

* `vae.`, `audio_vae.` and `vocoder.` are one placeholder tensor each, which together fill a single file up to its
  published size: it has fewer tensors than the published one, and another header.
* The 2.5 files, vonkaiser's too, have the published number of tensors, header length and size to the byte. Only the
  text of the licence is a placeholder, of about its length.
* Which six blocks of the 2.0 FP8 files are BF16 is unknown: the first and the last three here. Nor is it known what
  Kijai's FP8 file quantises: here what 2.3's distilled FP8 file does, without the gates, so its size is not the
  published one.
* Names and sizes of diffusers' shards are unknown: here as diffusers would write them, at most 10 GB each.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import writers
from writers import PREFIX

from ltx2ref import LTX_2_0, LTX_2_3, LTX_2_5

CONFIGS = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}
BLOCKS, VIDEO, AUDIO = 48, 4096, 2048
# In the order of the safetensors library, which writes wide types first.
WIDTHS = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
TEXT_WIDTH = 188_160
# Characters of the 2.5 metadata's `config`, `gemma_source_checkpoint` and `license` as JSON writes them. 37,617 would
# give the same header lengths, since headers are padded to 8 bytes.
METADATA_2_5 = 37_616
SHARD_BYTES = 10_000_000_000
# Bytes of the two placeholders that are not the largest one. In 2.3 and 2.5 they are about 365 MB together.
PLACEHOLDERS = {"audio_vae.placeholder": 107_000_000, "vocoder.placeholder": 257_000_000}
# What the config.json of 2.0 leaves to the defaults of the class.
ABSENT_2_0 = (
    "gated_attn",
    "cross_attn_mod",
    "ff_bias",
    "audio_gated_attn",
    "audio_cross_attn_mod",
    "audio_ff_bias",
    "use_prompt_embeddings",
    "use_prompt_adaln_single",
    "use_keyframes_abs_pos_embedding",
    "perturbed_attn",
)


class Spec(NamedTuple):
    """A tensor without its numbers, unless it is a marker."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes = b""

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype]


Specs = dict[str, Spec]
Metadata = dict[str, str] | None
Chooser = Callable[[str], bool]  # decides by a Linear's published name without a prefix whether it is quantised


class SparseFile(NamedTuple):
    """A published file, and how to write its sparse copy."""

    release: str
    format: str
    repository: str
    file: str  # path in the repository; the folder if there are shards
    contents: Callable[[], tuple[Specs, Metadata]]
    tensors: int  # size of the copy in bytes
    published_tensors: int | None  # None if unknown
    published_bytes: int | None
    revision: str = ""  # given if it is not the newest

    @property
    def path(self) -> Path:
        """Return the path below the folder that all copies are written to."""
        return Path(self.repository + ("@" + self.revision if self.revision else ""), self.file)

    @property
    def sharded(self) -> bool:
        return not self.file.endswith(".safetensors")

    def write(self, folder: Path) -> Path:
        """Write a copy, and return its path: a file, or the folder of the shards, their index and config.json."""
        specs, metadata = self.contents()
        if self.sharded:
            write_shards(folder / self.path, specs, self.release)
        else:
            write_sparse(folder / self.path, specs, metadata)
        return folder / self.path


# ---------------------------------------------------------------- files
def write_sparse(path: Path, specs: Specs, metadata: Metadata) -> None:
    head = header(specs, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + total(specs))
    described = json.loads(head)
    with path.open("r+b") as file:
        for name, spec in specs.items():
            if spec.content:
                file.seek(8 + len(head) + described[name]["data_offsets"][0])
                file.write(spec.content)


def header(specs: Specs, metadata: Metadata) -> bytes:
    """Return the header as the safetensors library writes it: wide types first, then by name, padded to 8 bytes."""
    described: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    order, end = list(WIDTHS), 0
    for name, spec in sorted(specs.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        start, end = end, end + spec.bytes
        described[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def write_shards(folder: Path, specs: Specs, release: str) -> None:
    """Write the shards, their index and config.json."""
    shards = shards_of(specs)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = writers.shard_name(i, len(shards))
        write_sparse(folder / file, shard, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    writers.write_index(folder, total(specs), weight_map)
    config = writers.diffusers_config(CONFIGS[release])
    absent = ABSENT_2_0 if release == "2.0" else ()
    writers.write_json(folder / "config.json", {key: value for key, value in config.items() if key not in absent})


def shards_of(specs: Specs) -> list[Specs]:
    """Fill shards greedily in the order of `specs`, as diffusers splits a state."""
    shards: list[Specs] = [{}]
    used = 0
    for name, spec in specs.items():
        if used + spec.bytes > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = spec
        used += spec.bytes
    return shards


def total(specs: Specs) -> int:
    return sum(spec.bytes for spec in specs.values())


# ---------------------------------------------------------------- tensors
@functools.cache
def manifest() -> Any:
    """Read the manifest's published names; tests/checkpoint/test_full_size.py proves them."""
    return json.loads((Path(__file__).parents[2] / "weights_manifest.json").read_text(encoding="utf-8"))["releases"]


def transformer(release: str, *, diffusers: bool = False) -> Specs:
    """Return published names without a prefix, with dtypes; or diffusers' names, all of them BF16."""
    specs: Specs = {}
    for published, row in manifest()[release]["tensors"].items():
        name = row["diffusers"] if diffusers else published
        for i in range(BLOCKS) if "{i}" in name else (0,):
            dtype = "BF16" if diffusers else row["dtype"]
            specs[name.replace("{i}", str(i))] = Spec(dtype, tuple(row["shape"]))
    return specs


def connectors(release: str) -> Specs:
    """Return published names of connectors without a prefix: 58 tensors of 2.0, 258 of 2.3 and 2.5."""
    widths, layers = ((3840, 3840), 2) if release == "2.0" else ((VIDEO, AUDIO), 8)
    specs: Specs = {}
    for stream, width in zip(("video", "audio"), widths, strict=True):
        name = f"{stream}_embeddings_connector"
        specs[f"{name}.learnable_registers"] = Spec("BF16", (128, width))
        for i in range(layers):
            specs |= connector_layer(f"{name}.transformer_1d_blocks.{i}", width, gated=release != "2.0")
    return specs


def connector_layer(name: str, width: int, gated: bool) -> Specs:
    specs = {f"{name}.attn1.{norm}.weight": Spec("BF16", (width,)) for norm in ("q_norm", "k_norm")}
    for attention in ("to_q", "to_k", "to_v", "to_out.0"):
        specs |= linear(f"{name}.attn1.{attention}", width, width)
    if gated:
        specs |= linear(f"{name}.attn1.to_gate_logits", 32, width)
    return specs | linear(f"{name}.ff.net.0.proj", 4 * width, width) | linear(f"{name}.ff.net.2", width, 4 * width)


def linear(name: str, out: int, width: int, bias: bool = True) -> Specs:
    weight = {f"{name}.weight": Spec("BF16", (out, width))}
    return weight | ({f"{name}.bias": Spec("BF16", (out,))} if bias else {})


def text_projection(release: str) -> Specs:
    name = "text_embedding_projection."
    if release == "2.0":
        return linear(name + "aggregate_embed", 3840, TEXT_WIDTH, bias=False)
    return linear(name + "video_aggregate_embed", VIDEO, TEXT_WIDTH) | linear(
        name + "audio_aggregate_embed", AUDIO, TEXT_WIDTH
    )


def prefixed(specs: Specs) -> Specs:
    return {PREFIX + name: spec for name, spec in specs.items()}


# ---------------------------------------------------------------- quantised layers
def quantised(specs: Specs, chosen: Chooser, encode: Callable[[str, Spec], Specs]) -> Specs:
    """Replace the weight of each chosen layer by what `encode` makes of it, given its module's name."""
    result: Specs = {}
    for name, spec in specs.items():
        module = name.removesuffix(".weight")
        is_weight = module != name and len(spec.shape) == 2
        result |= encode(module, spec) if is_weight and chosen(module) else {name: spec}
    return result


def in_blocks(blocks: Iterable[int], gates: bool = False) -> Chooser:
    """Choose the layers of these blocks: 28 of each, or 34 with the gates."""
    prefixes = tuple(f"transformer_blocks.{i}." for i in blocks)
    return lambda module: module.startswith(prefixes) and (gates or not module.endswith("to_gate_logits"))


def in_int8(module: str) -> bool:
    """Choose the layers of blocks and connectors, but no gates."""
    return module.startswith(("transformer_blocks.", "video_", "audio_embeddings")) and "gate_logits" not in module


def fp8_scaled(module: str, weight: Spec) -> Specs:
    return {
        f"{module}.weight": Spec("F8_E4M3", weight.shape),
        f"{module}.weight_scale": Spec("F32", ()),
        f"{module}.input_scale": Spec("F32", ()),
    }


def marker(said: dict[str, Any]) -> Spec:
    """Return ComfyUI's marker of a layer, which has the published length."""
    text = json.dumps(said).encode()
    return Spec("U8", (len(text),), text)


def fp8_comfy(module: str, weight: Spec) -> Specs:
    return {
        f"{module}.weight": Spec("F8_E4M3", weight.shape),
        f"{module}.weight_scale": Spec("F32", ()),
        f"{module}.comfy_quant": marker({"format": "float8_e4m3fn"}),
    }


def int8_convrot(module: str, weight: Spec) -> Specs:
    return {
        f"{module}.weight": Spec("I8", weight.shape),
        f"{module}.weight_scale": Spec("F32", (weight.shape[0], 1)),
        f"{module}.comfy_quant": marker({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}),
    }


def nvfp4(module: str, weight: Spec) -> Specs:
    """Encode in NVFP4. All widths fill the 128 x 4 tiles of the scales."""
    out, width = weight.shape
    return {
        f"{module}.weight": Spec("U8", (out, width // 2)),
        f"{module}.weight_scale": Spec("F8_E4M3", (out, width // 16)),
        f"{module}.weight_scale_2": Spec("F32", ()),
        f"{module}.input_scale": Spec("F32", ()),
    }


def layers_of(specs: Specs) -> list[str]:
    """Return the full names of the layers that have a scale."""
    return [name.removesuffix(".weight_scale") for name in specs if name.endswith(".weight_scale")]


# ---------------------------------------------------------------- contents
def single_file(release: str, size: int, chosen: Chooser | None = None) -> tuple[Specs, Metadata]:
    """Return the tensors of a single file in BF16, with `chosen` layers in scaled FP8, that fill `size` bytes."""
    ours = transformer(release) | connectors(release)
    metadata = writers.lightricks_metadata(CONFIGS[release])
    if chosen is not None:
        ours = quantised(ours, chosen, fp8_scaled)
        metadata |= writers.quantization_metadata(dict.fromkeys(layers_of(prefixed(ours)), "float8_e4m3fn"))
    return filled(prefixed(ours) | text_projection(release), metadata, size), metadata


def filled(specs: Specs, metadata: Metadata, size: int) -> Specs:
    """Add the three placeholders, so that the file has `size` bytes."""
    specs = specs | {name: Spec("U8", (n,)) for name, n in PLACEHOLDERS.items()}
    rest = size - 8 - total(specs)
    guess = {"vae.placeholder": Spec("U8", (rest - 1_000_000,))}  # only the number of digits matters
    return specs | {"vae.placeholder": Spec("U8", (rest - len(header(specs | guess, metadata)),))}


def split(chosen: Chooser = lambda module: False, encode: Callable[[str, Spec], Specs] = nvfp4) -> Specs:
    return prefixed(quantised(transformer("2.5") | connectors("2.5"), chosen, encode))


def metadata_2_5(layers: Iterable[str] = ()) -> dict[str, str]:
    """Return the four published keys, and for `layers` in NVFP4 also their list."""
    metadata = writers.lightricks_metadata(LTX_2_5) | {"license": ""}
    said = sum(len(json.dumps(metadata[key])) - 2 for key in ("config", "gemma_source_checkpoint"))
    metadata["license"] = "x" * (METADATA_2_5 - said)
    return metadata | (writers.quantization_metadata(dict.fromkeys(layers, "nvfp4")) if layers else {})


def nvfp4_2_5(newer: bool) -> tuple[Specs, Metadata]:
    """Both revisions have the blocks 0 to 41 in NVFP4; the older has no keyframes tensor and no list of layers."""
    specs = split(in_blocks(range(42)))
    if newer:
        return specs, metadata_2_5(layers_of(specs))
    return {name: spec for name, spec in specs.items() if "keyframes" not in name}, metadata_2_5()


def vonkaiser() -> Specs:
    """Put in FP8 what is BF16 elsewhere and has two dimensions: all weights, the registers, the keyframes tensor."""
    specs: Specs = {}
    for name, spec in split().items():
        if spec.dtype == "BF16" and len(spec.shape) == 2:
            specs |= {name: Spec("F8_E4M3", spec.shape), name + "_scale": Spec("F32", ())}
        else:
            specs[name] = spec
    return specs


def kijai() -> Specs:
    return prefixed(quantised(transformer("2.3"), in_blocks(range(4, 47)), fp8_comfy))


def sharded(release: str) -> tuple[Specs, Metadata]:
    return dict(sorted(transformer(release, diffusers=True).items())), None


def without(blocks: Iterable[int], gates: bool = False) -> Chooser:
    return in_blocks(set(range(BLOCKS)) - set(blocks), gates)


FILES: dict[str, SparseFile] = {
    "2.0-bf16": SparseFile(
        "2.0",
        "bf16",
        "Lightricks/LTX-2",
        "ltx-2-19b-dev.safetensors",
        lambda: single_file("2.0", 43_285_058_242),
        3572,
        None,
        43_285_058_242,
    ),
    "2.0-fp8": SparseFile(
        "2.0",
        "fp8 scaled",
        "Lightricks/LTX-2",
        "ltx-2-19b-dev-fp8.safetensors",
        lambda: single_file("2.0", 27_078_716_018, without((0, 1, 2, 45, 46, 47))),
        5924,
        None,
        27_078_716_018,
    ),
    "2.0-diffusers": SparseFile(
        "2.0", "bf16", "Lightricks/LTX-2", "transformer", lambda: sharded("2.0"), 3510, 3510, None
    ),
    "2.3-bf16": SparseFile(
        "2.3",
        "bf16",
        "Lightricks/LTX-2.3",
        "ltx-2.3-22b-dev.safetensors",
        lambda: single_file("2.3", 46_149_344_974),
        4451,
        5947,
        46_149_344_974,
    ),
    "2.3-dev-fp8": SparseFile(
        "2.3",
        "fp8 scaled",
        "Lightricks/LTX-2.3-fp8",
        "ltx-2.3-22b-dev-fp8.safetensors",
        lambda: single_file("2.3", 29_145_431_166, without((0, 1, 46, 47), gates=True)),
        7443,
        8939,
        29_145_431_166,
    ),
    "2.3-distilled-fp8": SparseFile(
        "2.3",
        "fp8 scaled",
        "Lightricks/LTX-2.3-fp8",
        "ltx-2.3-22b-distilled-fp8.safetensors",
        lambda: single_file("2.3", 29_531_884_062, without((0, 1, 2, 3, 47), gates=True)),
        7375,
        8871,
        29_531_884_062,
    ),
    "2.3-kijai-fp8": SparseFile(
        "2.3",
        "fp8 comfy",
        "Kijai/LTX2.3_comfy",
        "diffusion_models/ltx-2.3-22b-distilled-1.1_transformer_only_fp8_scaled.safetensors",
        lambda: (kijai(), writers.lightricks_metadata(LTX_2_3)),
        6594,
        None,
        25_226_571_988,
    ),
    "2.3-diffusers": SparseFile(
        "2.3", "bf16", "diffusers/LTX-2.3-Diffusers", "transformer", lambda: sharded("2.3"), 4186, 4186, None
    ),
    "2.5-bf16": SparseFile(
        "2.5",
        "bf16",
        "Lightricks/LTX-2.5",
        "diffusion_models/ltx-2.5-22b-dev-transformer-bf16.safetensors",
        lambda: (split(), metadata_2_5()),
        4349,
        4349,
        42_018_190_584,
    ),
    "2.5-int8": SparseFile(
        "2.5",
        "int8 convrot",
        "Lightricks/LTX-2.5",
        "diffusion_models/ltx-2.5-22b-dev-transformer-comfy-int8-convrot.safetensors",
        lambda: (split(in_int8, int8_convrot), metadata_2_5()),
        7229,
        7229,
        21_504_034_224,
    ),
    "2.5-nvfp4": SparseFile(
        "2.5",
        "nvfp4",
        "Lightricks/LTX-2.5",
        "diffusion_models/ltx-2.5-22b-distilled-transformer-nvfp4.safetensors",
        lambda: nvfp4_2_5(newer=True),
        7877,
        7877,
        18_721_548_408,
    ),
    "2.5-nvfp4-superseded": SparseFile(
        "2.5",
        "nvfp4",
        "Lightricks/LTX-2.5",
        "diffusion_models/ltx-2.5-22b-distilled-transformer-nvfp4.safetensors",
        lambda: nvfp4_2_5(newer=False),
        7876,
        7876,
        18_721_432_024,
        "8a4ff96f",
    ),
    "2.5-vonkaiser-fp8": SparseFile(
        "2.5",
        "fp8 vonkaiser",
        "vonkaiser/LTX-2.5-FP8-NVFP4",
        "ltx-2.5-22b-distilled-fp8.safetensors",
        lambda: (vonkaiser(), None),
        6124,
        6124,
        21_025_119_068,
    ),
    "2.5-diffusers": SparseFile(
        "2.5", "bf16", "Lightricks/LTX-2.5-Diffusers", "transformer", lambda: sharded("2.5"), 4091, 4091, None
    ),
}


def main(arguments: list[str]) -> int:
    if not arguments or set(arguments[1:]) - FILES.keys():
        print(f"usage: sparse.py DIR [{'|'.join(FILES)} ...]", file=sys.stderr)
        return 2
    for name in arguments[1:] or FILES:
        print(name, FILES[name].write(Path(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
