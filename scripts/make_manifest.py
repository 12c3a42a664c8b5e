"""Write weights_manifest.json: every tensor of the three released transformers, and the files that hold them.

    python scripts/make_manifest.py            write the file, at the top of the repository
    python scripts/make_manifest.py --check    print how the file differs, with exit status 1 if it does

The sources are the literal tables below, and checkpoints.json beside this script, which lists Lightricks' own files.
Nothing comes from the model's code, so the manifest can judge it. What is not known is null. `evidence` says what backs
an entry: the number of independent sources that state it; "verified", if it was computed from the rows of its release
and found to be as published (test_full_size.py and test_manifest.py in tests/checkpoint check the number of bytes or
tensors, and the md5 of all names and shapes); or "derived", if it follows from other facts and no source states it.
"""

import argparse
import difflib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PATH = Path(__file__).parents[1] / "weights_manifest.json"
CHECKPOINTS = Path(__file__).with_name("checkpoints.json")
SCHEMA_VERSION = 2
PREFIX = "model.diffusion_model."  # before the published names, in Lightricks' own files

Releases = tuple[str, ...]
ALL: Releases = ("2.0", "2.3", "2.5")
OLD: Releases = ("2.0",)
NEW: Releases = ("2.3", "2.5")
BIASED: Releases = ("2.0", "2.3")

VIDEO, AUDIO, TEXT, LATENT, SINUSOID = 4096, 2048, 3840, 128, 256  # widths
HEADS, BLOCKS = 32, 48
BYTES = {"F32": 4, "BF16": 2}

Shapes = dict[str, tuple[int, ...]]

# Outside the blocks. Linear layers: name, width out, width in, releases.
LINEARS = (
    ("patchify_proj", VIDEO, LATENT, ALL),
    ("audio_patchify_proj", AUDIO, LATENT, ALL),
    ("caption_projection.linear_1", VIDEO, TEXT, OLD),
    ("caption_projection.linear_2", VIDEO, VIDEO, OLD),
    ("audio_caption_projection.linear_1", AUDIO, TEXT, OLD),
    ("audio_caption_projection.linear_2", AUDIO, AUDIO, OLD),
    ("proj_out", LATENT, VIDEO, ALL),
    ("audio_proj_out", LATENT, AUDIO, ALL),
)
# Timestep embedders of three linear layers: name, width, rows of modulation, releases.
ADALNS = (
    ("adaln_single", VIDEO, 6, OLD),
    ("adaln_single", VIDEO, 9, NEW),
    ("audio_adaln_single", AUDIO, 6, OLD),
    ("audio_adaln_single", AUDIO, 9, NEW),
    ("prompt_adaln_single", VIDEO, 2, NEW),
    ("audio_prompt_adaln_single", AUDIO, 2, NEW),
    ("av_ca_video_scale_shift_adaln_single", VIDEO, 4, ALL),
    ("av_ca_audio_scale_shift_adaln_single", AUDIO, 4, ALL),
    ("av_ca_a2v_gate_adaln_single", VIDEO, 1, ALL),
    ("av_ca_v2a_gate_adaln_single", AUDIO, 1, ALL),
)
# Bare parameters: name, rows, width, releases.
TABLES = (
    ("scale_shift_table", 2, VIDEO, ALL),
    ("audio_scale_shift_table", 2, AUDIO, ALL),
    ("keyframes_abs_pos_embedding", 1, VIDEO, ("2.5",)),
)

# In each block. Attention: name, width of the queries' input and the output, of the keys' and values', inner.
ATTENTIONS = (
    ("attn1", VIDEO, VIDEO, VIDEO),
    ("attn2", VIDEO, VIDEO, VIDEO),
    ("audio_attn1", AUDIO, AUDIO, AUDIO),
    ("audio_attn2", AUDIO, AUDIO, AUDIO),
    ("audio_to_video_attn", VIDEO, AUDIO, AUDIO),
    ("video_to_audio_attn", AUDIO, VIDEO, AUDIO),
)
GATED = NEW
# Feed-forward: name, width, releases that have biases.
FEED_FORWARDS = (("ff", VIDEO, BIASED), ("audio_ff", AUDIO, ALL))
BLOCK_TABLES = (
    ("scale_shift_table", 6, VIDEO, OLD),
    ("scale_shift_table", 9, VIDEO, NEW),
    ("audio_scale_shift_table", 6, AUDIO, OLD),
    ("audio_scale_shift_table", 9, AUDIO, NEW),
    ("scale_shift_table_a2v_ca_video", 5, VIDEO, ALL),
    ("scale_shift_table_a2v_ca_audio", 5, AUDIO, ALL),
    ("prompt_scale_shift_table", 2, VIDEO, NEW),
    ("audio_prompt_scale_shift_table", 2, AUDIO, NEW),
)

# Dotted parts of a name that diffusers calls differently.
DIFFUSERS_PARTS = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}

# What shares a file with the transformer, under its prefix: tensors, parameters.
CONNECTORS = {"2.0": (58, 708_940_800), "2.3": (258, 2_016_166_400), "2.5": (258, 2_016_166_400)}
RELEASE_EVIDENCE = {
    "2.0": ("model hash verified", "F32 derived"),
    "2.3": ("model hash verified",),
    "2.5": ("model hash verified", "bytes verified"),
}

RELEASE_OF = {
    "Lightricks/LTX-2": "2.0",
    "Lightricks/LTX-2.3": "2.3",
    "Lightricks/LTX-2.3-fp8": "2.3",
    "Lightricks/LTX-2.3-nvfp4": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Clean-Plate": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Colorization": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Cross-Eyed": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Day-To-Night": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Deblur": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Decompression": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-HDR": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-In-Outpainting": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Ingredients": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Instant-Shave": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Pixel-Spatial-Upscaler": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Union-Control": "2.3",
    "Lightricks/LTX-2.3-22b-IC-LoRA-Water-Simulation": "2.3",
    "Lightricks/LTX-2.3-22b-LoRA-Cinemagraph": "2.3",
    "Lightricks/LTX-2.5": "2.5",
    "Lightricks/LTX-2.5-22b-IC-LoRA-Pixel-Spatial-Upscaler": "2.5",
    "Lightricks/LTX-2.5-Pre-Trained": "2.5",
    "Comfy-Org/ltx-2.3": "2.3",
    "DeepBeepMeep/LTX-2": "2.3",  # the file listed below; others there are of 2.0
    "Kijai/LTX2.3_comfy": "2.3",
    "Kijai/LTXV2_comfy": "2.0",
    "Winnougan/ltx-2.5-w4a8-convrot-int4-convrot-Winnougan-Blessing": "2.5",
    "elismasilva/ltx2.3-image-comfyui": "2.3",
    "rockerBOO/ltx-2.5-nvfp4-convrot": "2.5",
    "silveroxides/LTX-2.3-Quants": "2.3",
    "tsolful/LTX_2.5_INT4_W4A8_ConvRot": "2.5",
    "vonkaiser/LTX-2.5-FP8-NVFP4": "2.5",
}

# What backs a file of checkpoints.json beside its sources.
COUNTED = ("tensors verified",)
MEASURED = ("bytes verified", "tensors verified")
HASHED = ("model hash verified", "bytes verified", "tensors verified")
EVIDENCE = {
    "ltx-2-19b-distilled-lora-384.safetensors": ("tensors derived",),
    "ltx-2.3-22b-dev.safetensors": COUNTED,
    "ltx-2.3-22b-distilled.safetensors": COUNTED,
    "ltx-2.3-22b-distilled-1.1.safetensors": COUNTED,
    "ltx-2.3-22b-distilled-lora-384.safetensors": ("tensors derived",),
    "ltx-2.3-22b-distilled-lora-384-1.1.safetensors": ("tensors derived",),
    "ltx-2.3-22b-dev-fp8.safetensors": (*COUNTED, "format derived"),
    "ltx-2.3-22b-distilled-fp8.safetensors": (*COUNTED, "format derived"),
    "diffusion_models/ltx-2.5-22b-dev-transformer-bf16.safetensors": HASHED,
    "diffusion_models/ltx-2.5-22b-distilled-transformer-bf16.safetensors": HASHED,
    "diffusion_models/ltx-2.5-22b-dev-transformer-comfy-int8-convrot.safetensors": HASHED,
    "diffusion_models/ltx-2.5-22b-distilled-transformer-comfy-int8-convrot.safetensors": HASHED,
    "diffusion_models/ltx-2.5-22b-distilled-transformer-nvfp4.safetensors": MEASURED,
}

STATED = ("public source",)
FITTED = (*STATED, "format derived")


class File(NamedTuple):
    repository: str
    name: str
    revision: str | None = None
    bytes: int | None = None
    sha256: str | None = None
    format: str | None = None
    contents: str | None = None
    tensors: int | None = None
    release: str | None = None
    note: str | None = None
    evidence: tuple[str, ...] = STATED


# Files that are not in checkpoints.json: later ones of Lightricks', repackages of the transformer by others, and LoRAs.
# Where a source states gigabytes alone, the number of bytes is unknown.
OTHERS = (
    File(
        "Kijai/LTX2.3_comfy",
        "diffusion_models/ltx-2.3-22b-distilled-1.1_transformer_only_fp8_scaled.safetensors",
        bytes=25_226_571_988,
        sha256="0a1d7aac2b338e8ec7e832149f1dcf11c9323272482b1cca0673d229702370f0",
        format="F8_E4M3 + U8 (comfy_quant) + BF16 + F32",
        contents="transformer",
    ),
    File(
        "Kijai/LTX2.3_comfy",
        "diffusion_models/ltx-2.3-22b-distilled-1.1_transformer_only_mxfp8_block32.safetensors",
        bytes=24_052_755_552,
        sha256="b7a945ff24d65ad22c6977787c2e594e74df226e35f1f9dedb64be8fdbd6ffd8",
        format="mxfp8",
        contents="transformer",
    ),
    File(
        "Lightricks/LTX-2.5-Pre-Trained",
        "ltx-2.5-22b-pt-bf16.safetensors",
        revision="290c9c49958def5c68b5acdf45aac55d314b3f61",
        format="bf16",
        contents="single-file",
        note="before fine-tuning; 46.17 GB",
    ),
    *(
        File(
            "elismasilva/ltx2.3-image-comfyui",
            f"ltx-2.3-13b-image-{kind}{suffix}.safetensors",
            format=format,
            note="images alone: without what only video and audio need",
        )
        for kind in ("dev", "distilled")
        for suffix, format in (("", "bf16"), ("-convrot-int8", "int8 ConvRot"))
    ),
    File(
        "DeepBeepMeep/LTX-2",
        "ltx-2.3-22b-dev_diffusion_model_quanto_int8.safetensors",
        bytes=19_447_662_547,
        sha256="5fc8d83656cdabf93b79bfb8799ee1c84c8270c59a49caccd4f8d1a27c77f6ec",
        format="quanto int8",
    ),
    File(
        "rockerBOO/ltx-2.5-nvfp4-convrot",
        "ltx-2.5-22b-distilled-transformer_nvfp4_convrot_int8.safetensors",
        bytes=22_116_870_688,
        format="nvfp4 + int8 ConvRot",
    ),
    File(
        "Winnougan/ltx-2.5-w4a8-convrot-int4-convrot-Winnougan-Blessing",
        "diffusion_models/ltx-2.5-22b-distilled-transformer-w4a8_convrot.safetensors",
        format="W4A8 ConvRot",
        note="11.7 GB",
    ),
    *(
        File(
            "tsolful/LTX_2.5_INT4_W4A8_ConvRot",
            f"ltx-2.5-22b-{kind}-transformer_W4A8_Mixed.safetensors",
            format="W4A8, mixed",
            note="14.4 GB",
        )
        for kind in ("dev", "distilled")
    ),
    File(
        "silveroxides/LTX-2.3-Quants",
        "ltx-2.3-22b-distilled-mxfp8mixed.safetensors",
        format="mxfp8, mixed",
        note="29.7 GB",
    ),
    File(
        "Kijai/LTXV2_comfy",
        "loras/ltx-2-19b-distilled-lora_resized_dynamic_fro09_avg_rank_175_fp8.safetensors",
        format="fp8",
        contents="LoRA",
        note="1.79 GB",
    ),
    File(
        "vonkaiser/LTX-2.5-FP8-NVFP4",
        "ltx-2.5-22b-distilled-fp8.safetensors",
        bytes=21_025_119_068,
        format="fp8, 1,775 F32 _scale",
        contents="transformer + connectors",
        tensors=6124,
        note="no __metadata__; even keyframes_abs_pos_embedding is F8",
        evidence=(*STATED, "contents derived"),
    ),
    File(
        "Comfy-Org/ltx-2.3",
        "split_files/loras/ltx_2.3_22b_distilled_1.1_lora_dynamic_fro09_avg_rank_111_bf16.safetensors",
        bytes=2_741_024_390,
        sha256="31e0c0195fb841bf31af78e8b60858f489e87ddcea4a5239abc80943da65e3ac",
        format="bf16",
        contents="LoRA",
        tensors=4979,
    ),
    File(
        "Lightricks/LTX-2.5-22b-IC-LoRA-Pixel-Spatial-Upscaler",
        "ltx-2.5-22b-ic-lora-pixel-spatial-upscaler-x2-1.0.safetensors",
        revision="5863fdef3eaa8b2d69fa22e259a1d75fede215dd",
        bytes=327_322_640,
        sha256="984851b769ea2bcb4c9e0a239a7676239e42c6a6001ddc69943b41ff0b283c1d",
        format="rank 32",
        contents="LoRA",
        tensors=960,
        note="reference_downscale_factor 2",
        evidence=(*FITTED, "tensors derived"),
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Union-Control",
        "ltx-2.3-22b-ic-lora-union-control-ref0.5.safetensors",
        bytes=654_465_352,
        format="bf16, rank 64",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Pixel-Spatial-Upscaler",
        "ltx-2.3-22b-ic-lora-pixel-spatial-upscaler-x2-0.9.safetensors",
        bytes=654_465_286,
        sha256="0667334e23af9fc0ab3fdff2e059c805ac0d162b1f96f18a462801478027451e",
        format="bf16, rank 64",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Instant-Shave",
        "ltx-2.3-22b-ic-lora-instant-shave-0.9.safetensors",
        bytes=654_465_349,
        format="bf16, rank 64",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-HDR",
        "ltx-2.3-22b-ic-lora-hdr-0.9.safetensors",
        bytes=327_309_312,
        sha256="c56bfa0f2e4461a8b2f318f494c61c5bf97f462f2220e31ece93ea7851ca871e",
        format="bf16, rank 32",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Clean-Plate",
        "ltx-2.3-22b-ic-lora-clean-plate-1.0.safetensors",
        bytes=327_309_305,
        format="bf16, rank 32",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Day-To-Night",
        "ltx-2.3-22b-ic-lora-day-to-night-0.9.safetensors",
        bytes=327_309_305,
        format="bf16, rank 32",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Cross-Eyed",
        "ltx-2.3-22b-ic-lora-cross-eyed-0.9.safetensors",
        bytes=327_309_305,
        format="bf16, rank 32",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Ingredients",
        "ltx-2.3-22b-ic-lora-ingredients-0.9.safetensors",
        bytes=1_308_778_338,
        sha256="515e4e139001ac6282357a5b35372e42e98b3affd5fcc086a52242abeed19559",
        format="bf16, rank 128",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-In-Outpainting",
        "ltx-2.3-22b-ic-lora-in-outpainting-0.9.safetensors",
        bytes=1_308_778_338,
        sha256="73dd0841c0d4f0eb26fb1f017781b841b2752021944ac5ecefe57917f6dae6b5",
        format="bf16, rank 128",
        contents="LoRA",
        evidence=FITTED,
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Colorization",
        "ltx-2.3-22b-ic-lora-colorization-0.9.safetensors",
        bytes=906_071_437,
        contents="LoRA",
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Decompression",
        "ltx-2.3-22b-ic-lora-decompression-0.9.safetensors",
        bytes=906_071_437,
        contents="LoRA",
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Deblur",
        "ltx-2.3-22b-ic-lora-deblur-0.9.safetensors",
        bytes=906_071_437,
        contents="LoRA",
    ),
    File(
        "Lightricks/LTX-2.3-22b-IC-LoRA-Water-Simulation",
        "ltx-2.3-22b-ic-lora-water-simulation-0.9.safetensors",
        bytes=906_071_437,
        contents="LoRA",
    ),
    File(
        "Lightricks/LTX-2.3-22b-LoRA-Cinemagraph",
        "ltx-2.3-22b-lora-cinemagraph-0.9.safetensors",
        bytes=201_453_416,
        format="bf16, rank 32",
        contents="LoRA",
        note="attn1 and attn2 only",
        evidence=FITTED,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    wanted = pretty(manifest()) + "\n"
    if not parser.parse_args(arguments).check:
        PATH.write_text(wanted, encoding="utf-8")
        return 0
    found = PATH.read_text(encoding="utf-8") if PATH.exists() else ""
    sys.stdout.writelines(
        difflib.unified_diff(
            found.splitlines(keepends=True), wanted.splitlines(keepends=True), PATH.name, "what the script writes"
        )
    )
    return int(found != wanted)


def manifest() -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "prefix": PREFIX,
        "releases": {release: describe(release) for release in ALL},
        "files": [file._replace(release=RELEASE_OF[file.repository])._asdict() for file in (*listed(), *OTHERS)],
    }


def listed() -> list[File]:
    """Return the files of checkpoints.json, where revision_note is null or "@commit (note)"."""
    files = []
    for entry in json.loads(CHECKPOINTS.read_text(encoding="utf-8")):
        parts = re.fullmatch(r"(?:@(\w+) \((.+)\))?", entry["revision_note"] or "")
        assert parts, entry
        revision, note = parts.groups()
        sources = entry["independent_sources"]
        evidence = f"{sources} independent source{'s' * (sources > 1)}", *EVIDENCE.get(entry["file"], ())
        facts = {key: entry[key] for key in ("bytes", "sha256", "format", "contents", "tensors")}
        files.append(File(entry["repo"], entry["file"], revision, **facts, note=note, evidence=evidence))
    return files


def describe(release: str) -> dict[str, Any]:
    """Describe a release: blocks, totals, what shares its files, and its tensors; `{i}` in a name counts the blocks."""
    block = {f"transformer_blocks.{{i}}.{name}": shape for name, shape in block_shapes(release).items()}
    outside = outside_shapes(release)
    tensors, parameters = CONNECTORS[release]
    return {
        "blocks": BLOCKS,
        "totals": totals(outside, block),
        "foreign": {"connectors": {"tensors": tensors, "parameters": parameters}},
        "evidence": RELEASE_EVIDENCE[release],
        "tensors": {
            name: {"diffusers": diffusers_name(name), "shape": shape, "dtype": stored_dtype(name)}
            for name, shape in (outside | block).items()
        },
    }


def totals(outside: Shapes, block: Shapes) -> dict[str, int]:
    counted = [(name, math.prod(shape), 1) for name, shape in outside.items()]
    counted += [(name, math.prod(shape), BLOCKS) for name, shape in block.items()]
    return {
        "tensors": sum(times for *_, times in counted),
        "tensors_per_block": len(block),
        "parameters": sum(size * times for _, size, times in counted),
        "bytes": sum(size * times * BYTES[stored_dtype(name)] for name, size, times in counted),
    } | {dtype: sum(times for name, _, times in counted if stored_dtype(name) == dtype) for dtype in BYTES}


def stored_dtype(name: str) -> str:
    """Return the dtype in Lightricks' unquantised files. In diffusers' repositories everything is BF16."""
    return "F32" if "scale_shift_table" in name else "BF16"


def diffusers_name(name: str) -> str:
    return ".".join(DIFFUSERS_PARTS.get(part, part) for part in name.split("."))


def outside_shapes(release: str) -> Shapes:
    shapes: Shapes = {}
    for name, out, width, releases in LINEARS:
        if release in releases:
            shapes |= linear(name, out, width)
    for name, width, rows, releases in ADALNS:
        if release in releases:
            shapes |= linear(f"{name}.emb.timestep_embedder.linear_1", width, SINUSOID)
            shapes |= linear(f"{name}.emb.timestep_embedder.linear_2", width, width)
            shapes |= linear(f"{name}.linear", rows * width, width)
    return shapes | tables(TABLES, release)


def block_shapes(release: str) -> Shapes:
    shapes: Shapes = {}
    for name, width, kv_width, inner in ATTENTIONS:
        shapes |= linear(f"{name}.to_q", inner, width) | linear(f"{name}.to_k", inner, kv_width)
        shapes |= linear(f"{name}.to_v", inner, kv_width) | linear(f"{name}.to_out.0", width, inner)
        shapes |= {f"{name}.q_norm.weight": (inner,), f"{name}.k_norm.weight": (inner,)}
        if release in GATED:
            shapes |= linear(f"{name}.to_gate_logits", HEADS, width)
    for name, width, biased in FEED_FORWARDS:
        shapes |= linear(f"{name}.net.0.proj", 4 * width, width, release in biased)
        shapes |= linear(f"{name}.net.2", width, 4 * width, release in biased)
    return shapes | tables(BLOCK_TABLES, release)


def linear(name: str, out: int, width: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (out, width)}
    return weight | {f"{name}.bias": (out,)} if bias else weight


def tables(entries: Sequence[tuple[str, int, int, Releases]], release: str) -> Shapes:
    return {name: (rows, width) for name, rows, width, releases in entries if release in releases}


def pretty(value: object, indent: str = "") -> str:
    """Return JSON in which an object or a list that holds no object takes one line."""
    values = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []
    if not any(isinstance(v, Mapping) for v in values):
        return json.dumps(value)
    inner = indent + "  "
    keys = [f"{json.dumps(key)}: " for key in value] if isinstance(value, Mapping) else [""] * len(values)
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    items = ",\n".join(f"{inner}{key}{pretty(v, inner)}" for key, v in zip(keys, values, strict=True))
    return f"{opening}\n{items}\n{indent}{closing}"


if __name__ == "__main__":
    sys.exit(main())
