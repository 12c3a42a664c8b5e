"""Write weights_manifest.json: every tensor of the three released transformers, under both of its names.

    python scripts/make_manifest.py            writes the file, at the top of the repository
    python scripts/make_manifest.py --check    prints how the file differs, with exit status 1 if it does

The literal tables below are the source. Nothing comes from the model's code, so the manifest can judge it.
tests/test_full_size.py proves them by published md5 sums of all names and shapes, and by a file's size.
"""

import argparse
import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "weights_manifest.json"
SCHEMA_VERSION = 1
PREFIX = "model.diffusion_model."  # of the published names, in Lightricks' own files

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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write weights_manifest.json.")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    wanted = pretty(manifest()) + "\n"
    if not parser.parse_args(arguments).check:
        PATH.write_text(wanted, encoding="utf-8")
        return 0
    found = PATH.read_text(encoding="utf-8") if PATH.exists() else ""
    sys.stdout.writelines(
        difflib.unified_diff(
            found.splitlines(keepends=True),
            wanted.splitlines(keepends=True),
            PATH.name,
            "what the script writes",
        )
    )
    return int(found != wanted)


def manifest() -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "prefix": PREFIX,
        "releases": {release: describe(release) for release in ALL},
    }


def describe(release: str) -> dict[str, Any]:
    """One release: how many blocks, totals, and its tensors; `{i}` in a name counts the blocks."""
    block = {f"transformer_blocks.{{i}}.{name}": shape for name, shape in block_shapes(release).items()}
    outside = outside_shapes(release)
    return {
        "blocks": BLOCKS,
        "totals": totals(outside, block),
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
    """In Lightricks' unquantised files. In diffusers' repositories everything is BF16."""
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
    """JSON in which an object that holds no other object takes one line."""
    if not isinstance(value, Mapping) or not any(isinstance(v, Mapping) for v in value.values()):
        return json.dumps(value)
    inner = indent + "  "
    items = ",\n".join(f"{inner}{json.dumps(key)}: {pretty(v, inner)}" for key, v in value.items())
    return f"{{\n{items}\n{indent}}}"


if __name__ == "__main__":
    sys.exit(main())
