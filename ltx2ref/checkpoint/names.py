"""Tensor names: the two dialects, the prefixes in front of them, and what shares a file with the transformer.

Lightricks' own files (and those of ComfyUI, Kijai, DiffSynth, FastVideo, GGUF) use one dialect, diffusers the other.
Source: the names and shapes published for all three releases; weights_manifest.json has every one of them.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

LIGHTRICKS_DIALECT, DIFFUSERS_DIALECT = "lightricks", "diffusers"

# Lightricks: diffusers. Whole dotted segments of a name; every other segment is the same in both.
SEGMENTS = {
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
# The segments with which a name of exactly one dialect begins.
OPENINGS = {LIGHTRICKS_DIALECT: [*SEGMENTS][:10], DIFFUSERS_DIALECT: [*SEGMENTS.values()][:10]}
PREFIXES = ("model.diffusion_model.", "transformer.", "")

# Not the transformer, although in its file. By the whole name:
FOREIGN = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.", "duration_head.")
# and after the transformer's prefix. The last is what early files called the video connector.
FOREIGN_INSIDE = ("video_embeddings_connector.", "audio_embeddings_connector.", "embeddings_connector.")


class Dialect(NamedTuple):
    """How a file names the transformer's tensors: `prefix` + a name in the dialect `names`."""

    names: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.names} names, {f'prefix {self.prefix}' if self.prefix else 'no prefix'}"

    def ours(self, stored: str) -> str:
        """The name of a parameter, which is diffusers', from that in the file. The prefix must be there."""
        name = stored.removeprefix(self.prefix)
        return to_diffusers(name) if self.names == LIGHTRICKS_DIALECT else name

    def stored(self, ours: str) -> str:
        return self.prefix + (to_lightricks(ours) if self.names == LIGHTRICKS_DIALECT else ours)

    def foreign(self, stored: str) -> str | None:
        """The literal prefix that says a tensor is not the transformer's, or None."""
        inside = (self.prefix + part for part in FOREIGN_INSIDE)
        return next((part for part in (*FOREIGN, *inside) if stored.startswith(part)), None)


def to_diffusers(name: str) -> str:
    return with_segments(name, SEGMENTS)


def to_lightricks(name: str) -> str:
    return with_segments(name, {theirs: ours for ours, theirs in SEGMENTS.items()})


def with_segments(name: str, segments: Mapping[str, str]) -> str:
    return ".".join(segments.get(segment, segment) for segment in name.split("."))


def dialects(stored: Iterable[str]) -> set[Dialect]:
    """Every dialect that some name in a file speaks: one for a file with one transformer, and none without one."""
    opening = {
        (name.removeprefix(prefix).split(".")[0], prefix)
        for name in stored
        for prefix in PREFIXES
        if name.startswith(prefix)
    }
    return {
        Dialect(names, prefix)
        for names, segments in OPENINGS.items()
        for prefix in PREFIXES
        if any((segment, prefix) in opening for segment in segments)
    }
