"""Tensor names: the two dialects, the prefixes in front of them, and what shares a file with the transformer.

One dialect is that of Lightricks' own files, and of those by ComfyUI, Kijai, DiffSynth, FastVideo and in GGUF. The
other is that of diffusers. The names come from the published files of all three releases, which weights_manifest.json
lists.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

LIGHTRICKS_DIALECT, DIFFUSERS_DIALECT = "lightricks", "diffusers"

# Segments of a name between dots, Lightricks' to diffusers'. All other segments are the same in both dialects.
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
TO_LIGHTRICKS = {theirs: ours for ours, theirs in SEGMENTS.items()}
# First segments that occur in one of the dialects only.
OPENINGS = {LIGHTRICKS_DIALECT: [*SEGMENTS][:10], DIFFUSERS_DIALECT: [*SEGMENTS.values()][:10]}
SCALE = "_scale"  # suffix of a tensor that is the scale of another one
PREFIXES = ("model.diffusion_model.", "transformer.", "")

# Other models that share a file with the transformer: by the beginning of the whole name,
FOREIGN = ("vae.", "audio_vae.", "vocoder.", "text_embedding_projection.", "duration_head.")
# and by what follows the transformer's prefix. Early files call the video connector by the last of these.
FOREIGN_INSIDE = ("video_embeddings_connector.", "audio_embeddings_connector.", "embeddings_connector.")


class Dialect(NamedTuple):
    """The naming of the transformer's tensors in a file: `prefix` and then a name in the dialect `names`."""

    names: str
    prefix: str
    outer: str = ""  # the part of the prefix that other models' tensors in the file have as well

    def __str__(self) -> str:
        return f"{self.names} names, {f'prefix {self.prefix}' if self.prefix else 'no prefix'}"

    def ours(self, stored: str) -> str:
        """Return the parameter's name in the model, which is diffusers', for a name in the file with its prefix."""
        name = stored.removeprefix(self.prefix)
        return to_diffusers(name) if self.names == LIGHTRICKS_DIALECT else name

    def stored(self, ours: str) -> str:
        """Return the name in the file of a parameter of the model."""
        return self.prefix + (to_lightricks(ours) if self.names == LIGHTRICKS_DIALECT else ours)

    def foreign(self, stored: str) -> str | None:
        """Return the prefix that shows that a tensor belongs to another model, or None."""
        outside = (self.outer + part for part in FOREIGN) if self.outer else ()
        inside = (self.prefix + part for part in FOREIGN_INSIDE)
        return next((part for part in (*FOREIGN, *outside, *inside) if stored.startswith(part)), None)


def to_diffusers(name: str) -> str:
    """Translate a name from Lightricks' dialect to diffusers'."""
    return with_segments(name, SEGMENTS)


def to_lightricks(name: str) -> str:
    """Translate a name from diffusers' dialect to Lightricks'."""
    return with_segments(name, TO_LIGHTRICKS)


def with_segments(name: str, segments: Mapping[str, str]) -> str:
    """Replace each segment of a name that is in the table, or that is there without the suffix of a scale."""
    stems = [(part.removesuffix(SCALE), part) for part in name.split(".")]
    return ".".join(segments.get(part, segments.get(stem, stem) + part[len(stem) :]) for stem, part in stems)


def dialects(stored: Iterable[str], outer: str = "") -> set[Dialect]:
    """Return all dialects that names in a file belong to: one for a file with one transformer, none without one.

    `outer` is what all names begin with in front of the usual prefixes.
    """
    opening = {
        (name.removeprefix(prefix).split(".")[0], prefix)
        for name in stored
        for prefix in (outer + usual for usual in PREFIXES)
        if name.startswith(prefix)
    }
    return {
        Dialect(names, outer + usual, outer)
        for names, segments in OPENINGS.items()
        for usual in PREFIXES
        if any((segment, outer + usual) in opening for segment in segments)
    }


def common_prefixes(stored: Iterable[str]) -> list[str]:
    """Return what may stand in front of all names, by the tensors that only a transformer has.

    A usual prefix behind it is no part of it. Tensors of other models need not have it.
    """
    names = [name for name in stored if not name.startswith(FOREIGN)]
    known = {segment for segments in OPENINGS.values() for segment in segments}
    candidates = set()
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part in known:
                before = ".".join([*parts[:i], ""])
                candidates.add(
                    next(before.removesuffix(usual) for usual in PREFIXES if f".{before}".endswith(f".{usual}"))
                )
    return sorted(prefix for prefix in candidates if prefix and all(name.startswith(prefix) for name in names))
