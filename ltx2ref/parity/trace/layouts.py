"""Say where a module keeps the tensors that taps show, whatever its layers are called.

    from ltx2ref import Layout, trace
    from ltx2ref.parity.trace.layouts import DIFFUSERS_LIKE

    layout = DIFFUSERS_LIKE.renamed({"transformer_blocks": "layers", "attn1": "self_attn", "to_out.0": "o_proj"})
    with trace(port, layout) as taps:
        port(...)

Nothing here imports another implementation.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from einops import rearrange
from torch import Tensor, nn

from ...checkpoint.names import SEGMENTS

if TYPE_CHECKING:
    from .taps import TapHooks

ROPES = ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
Names = Mapping[str, str | tuple[str, ...]]
Door = Callable[["TapHooks"], None]


class Place(NamedTuple):
    """A layer or a parameter, and where it is: `parent.key`, or `parent[key]` in a list."""

    parent: Any
    key: str
    value: Any


@dataclass(frozen=True)
class Layout:
    """Where a module keeps the tensors that taps show.

    `names` maps our names of layers and parameters, which are diffusers', to the module's own. A key is one part of a
    path or several, {"attn1": "self_attn", "to_out.0": "o_proj"}, and holds wherever it occurs; the longest one wins.
    Its value is a path as well: "" if the module lacks that level, or a tuple of paths of which the first one that is
    there counts. A part that is no key is called as ours. A layer may be a module or any other callable, may return
    `(output, bias)`, and may be left out: its taps are then missing.

    Some keys are names of taps instead of layers:

    - "attn1.stream", and so on for each sub-layer: the layer of a block that normalises the residual for it. Residuals
      that a function normalises are found without a name.
    - "sdpa": the layer of an attention that is called with queries, keys and values, each (B, T, H, d), (B, H, T, d) or
      (B, T, H * d), if it does not use `F.scaled_dot_product_attention`.
    - "rope", "audio_rope", "cross_attn_rope" and "cross_attn_audio_rope": layers that are given coordinates and return
      RoPE's tables, (cos, sin).

    `doors` reads coordinates and tables where they are not made by such layers.
    """

    names: Names = field(default_factory=dict)
    doors: Door = lambda hooks: rope_layers(hooks)
    ours: bool = False  # this model, whose order of norms is known, and of which everything has to be found

    def renamed(self, names: Names) -> "Layout":
        """Return the same layout with other names for some layers."""
        return replace(self, names={**self.names, **names})

    def find(self, model: Any, path: str) -> Place | None:
        """Return the place of a layer or a parameter by our name of it, or None if the module has none there."""
        return self.descend(Place(None, "", model), path.split("."))

    def descend(self, at: Place, parts: list[str]) -> Place | None:
        """Return the place that the rest of a path leads to, or None."""
        if not parts:
            return at
        for count in range(len(parts), 0, -1):
            ours = ".".join(parts[:count])
            theirs = self.names.get(ours, parts[0] if count == 1 else ())
            for path in (theirs,) if isinstance(theirs, str) else theirs:
                there = child(at, path)
                if there is not None and (found := self.descend(there, parts[count:])) is not None:
                    return found
            if ours in self.names and count == 1:
                return None
        return None


def child(at: Place, path: str) -> Place | None:
    """Return what is at a path below a place, or None."""
    for key in path.split(".") if path else ():
        parent = original(at.value)
        if isinstance(parent, list | tuple):
            found = parent[int(key)] if key.isdigit() and int(key) < len(parent) else None
        else:
            found = getattr(parent, key, None)
        if found is None:
            return None
        at = Place(parent, key, original(found))
    return at


def original(module: Any) -> Any:
    """Return the module that `torch.compile` has wrapped, or anything else as it is."""
    return getattr(module, "_orig_mod", module)


# ---------------------------------------------------------------- coordinates and RoPE tables
def heads(model: Any, prefix: str = "") -> int | None:
    """Return how many heads of video, or with the prefix "audio_" of audio, a module says that it has."""
    name = f"{prefix}num_attention_heads"
    said = (getattr(x, name, None) for x in (getattr(model, "config", None), model))
    return next((x for x in said if isinstance(x, int)), None)


def planes(x: Tensor, heads: int | None) -> Tensor | None:
    """Return a RoPE table as (B, T, H, R), or None if it cannot be told how it is arranged.

    The split layout is (B, H, T, R). The interleaved one is (B, T, 2HR), with each number twice in a row.
    """
    if x.ndim == 4:
        return rearrange(x, "b h t r -> b t h r")
    if x.ndim != 3 or heads is None or x.shape[-1] % (2 * heads):
        return None
    return rearrange(x, "b t (h r two) -> two b t h r", h=heads, two=2)[0]


def record_tables(hooks: "TapHooks", name: str, pair: Any) -> None:
    """Record a pair of RoPE tables."""
    for part, x in zip((".cos", ".sin"), pair, strict=True):
        if (table := planes(x, heads(hooks.model))) is not None:
            hooks.tap(name + part, table)


def rope_layers(hooks: "TapHooks") -> None:
    """Record coordinates and RoPE tables from four layers that take coordinates and return tables.

    Those of the exchange take times only.
    """

    def coordinates(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not name.startswith("cross_attn_") and args and isinstance(args[0], Tensor) and args[0].ndim >= 3:
            hooks.tap("audio_coords" if name.startswith("audio_") else "video_coords", args[0])

    for name in ROPES:
        hooks.call(name, partial(coordinates, name), partial(record_tables, hooks, name))


def modality_arguments(hooks: "TapHooks") -> None:
    """Record coordinates from the positions of each modality, and RoPE tables from the arguments of the first block."""

    def coordinates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *(kwargs[name] for name in ("video", "audio") if name in kwargs)]
        for name, modality in zip(("video_coords", "audio_coords"), given, strict=False):
            if isinstance(positions := getattr(modality, "positions", None), Tensor):
                hooks.tap(name, positions)

    def rotations(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        there = [side for side in ("video", "audio") if kwargs[side] is not None]
        for side in there:
            prefix = "audio_" if side == "audio" else ""
            record_tables(hooks, f"{prefix}rope", kwargs[side].positional_embeddings)
            if len(there) == 2:
                record_tables(hooks, f"cross_attn_{prefix}rope", kwargs[side].cross_positional_embeddings)

    hooks.call("", coordinates)
    hooks.call("transformer_blocks.0", rotations)


# ---------------------------------------------------------------- ready layouts
# What implementations under either kind of names call differently.
VARIANTS: Names = {
    "to_out.0": ("to_out.0", "to_out"),
    "norm_q": ("norm_q", "q_norm"),
    "norm_k": ("norm_k", "k_norm"),
    "ff.net.0.proj": ("ff.net.0.proj", "ff.net.0"),
    "audio_ff.net.0.proj": ("audio_ff.net.0.proj", "audio_ff.net.0"),
}
DIFFUSERS_LIKE = Layout(
    {
        **VARIANTS,
        "attn1.stream": "norm1",
        "audio_attn1.stream": "audio_norm1",
        "attn2.stream": "norm2",
        "audio_attn2.stream": "audio_norm2",
        "audio_to_video_attn.stream": "audio_to_video_norm",
        "video_to_audio_attn.stream": "video_to_audio_norm",
        "ff.stream": "norm3",
        "audio_ff.stream": "audio_norm3",
    }
)
LIGHTRICKS_LIKE = Layout({**VARIANTS, **{ours: theirs for theirs, ours in SEGMENTS.items()}}, modality_arguments)
# Places that every implementation of the model has, by which a module is recognised.
KNOWN_PLACES = (
    "proj_in",
    "audio_proj_in",
    "time_embed.linear",
    "audio_time_embed.linear",
    "av_cross_attn_video_scale_shift.linear",
    "av_cross_attn_audio_scale_shift.linear",
    "av_cross_attn_video_a2v_gate.linear",
    "av_cross_attn_audio_v2a_gate.linear",
    "proj_out",
    "audio_proj_out",
)
BLOCK = "transformer_blocks.0"


def layout_of(model: nn.Module) -> tuple[Any, Layout | None]:
    """Return the ready layout that a module has, and the module inside it that has it; None if it has neither."""
    for layout in (DIFFUSERS_LIKE, LIGHTRICKS_LIKE):
        root = root_of(model, layout)
        if root is not None and layout.find(root, "audio_proj_in") is not None:
            return root, layout
    return model, None


def root_of(model: nn.Module, layout: Layout) -> Any:
    """Return the module itself, or the outermost one inside it, that has blocks under a layout's name; or None."""
    return next((x for x in candidates(model) if layout.find(x, "transformer_blocks") is not None), None)


def candidates(model: nn.Module) -> Iterator[Any]:
    """Yield a module and those inside it, the outermost first, each without what `torch.compile` wraps around it."""
    by_depth = sorted(model.named_modules(), key=lambda named: named[0].count(".") + bool(named[0]))
    yield from (original(module) for _, module in by_depth)
