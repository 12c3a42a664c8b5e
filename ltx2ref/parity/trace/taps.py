"""Read a model's intermediate tensors (taps) through hooks, which are always removed again.

Taps are named after diffusers' parameters. This is the order of the computation; B batch, T tokens, S keys:

    video_coords, audio_coords                              (B, P, T, 2)     seconds and pixels of each patch
    rope, audio_rope, cross_attn_rope, cross_attn_audio_rope + .cos, .sin    (B, T, H, R)
    proj_in, audio_proj_in                                  (B, T, D)        tokens
    X.sinusoid, X.emb, X.linear                             (B * T|1, ...)   for each of the eight AdaLN layers X: the
                                                            input of linear_1, the embedding, the rows' offsets
    caption_projection, audio_caption_projection            (B, S, D)        projected text (2.0)
    transformer_blocks.0. + attn1, audio_attn1 (self-attention), attn2, audio_attn2 (text attention),
    audio_to_video_attn, video_to_audio_attn (exchange), and ff, audio_ff (feed-forward):
        .stream                                             (B, T, D)        the residual as it enters the sub-layer
        .rows, .context_rows                                (B * T|1, K, D)  table + offsets, as modulation.py has them
        .input, .context                                    (B, T|S, D)      modulated: for queries, for keys and values
        .norm_q, .norm_k, .to_v                             (B, T|S, H * d)
        .q, .k                                              (B, T|S, H, d)   after RoPE
        .sdpa                                               (B, T, H, d)     attention, before the gate
        .to_gate_logits, .gate                              (B, T, H)        logits, and 2 * sigmoid of them
        .to_out                                             (B, T, D)
        .proj, .activation, .output                         (B, T, 4D|D)     feed-forward: before and after GELU, result
    transformer_blocks.0.video, .audio                      (B, T, D)        after that block
    norm_out, audio_norm_out                                (B, T, D)        before the modulation
    proj_out.input, audio_proj_out.input                    (B, T, D)        after it
    proj_out, audio_proj_out                                (B, T, C)        outputs of the last projections
    sample, audio_sample                                    (B, T, C)        what the forward returned

The tracer computes this model's coordinates, the rows and the gates itself, from the model's arguments and its layers'
outputs. Everything else is a tensor that passed through the model. `sample` and `audio_sample` are read from the return
value of the traced module, not from a layer, so that a change between the last layer and the caller is seen.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...block import AUDIO_TO_VIDEO, EXCHANGE_GATE, VIDEO_TO_AUDIO
from ...interface import LTX2VideoTransformer3DModel
from ...modulation import rows
from ..arithmetic import NotExact
from .flow import Flow
from .layouts import KNOWN_PLACES, Layout, Place, heads, layout_of, root_of

Taps = dict[str, Tensor]
On = Callable[[Any], None]
Before = Callable[[tuple[Any, ...], dict[str, Any]], Any]  # given arguments; returns others as (args, kwargs), or None
After = Callable[[Any], Any]  # given a result; returns another one, or None
ADALN_LAYERS = (
    "time_embed",
    "audio_time_embed",
    "prompt_adaln",
    "audio_prompt_adaln",
    "av_cross_attn_video_scale_shift",
    "av_cross_attn_audio_scale_shift",
    "av_cross_attn_video_a2v_gate",
    "av_cross_attn_audio_v2a_gate",
)
PHASES = (".cos", ".sin", ".sinusoid")  # taps that are judged against pure float64
# The returned outputs, and the outputs of the last projections. They are equal unless something changes them in
# between. A candidate need not have the projections' taps: they only help to tell where an output went wrong.
PROJECTED = {"sample": "proj_out", "audio_sample": "audio_proj_out"}
ATTENTION_LAYERS = ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
FEED_FORWARDS = ("ff", "audio_ff")
EXCHANGES = ATTENTION_LAYERS[4:]
SUBLAYERS = (*ATTENTION_LAYERS, *FEED_FORWARDS)  # in the order of the block, which normalises the residual for each
VIDEO_SUBLAYERS = ("attn1", "attn2", "audio_to_video_attn", "ff")
AUDIO_SUBLAYERS = ("audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff")
# The layers of an attention whose outputs are taps.
ATTENTION_OUTPUTS = ("norm_q", "norm_k", "to_v", "to_gate_logits", "to_out")
# How the rows of each sub-layer are put together, for its queries (rows) and for its keys and values (context_rows):
# parts of (learned table, rows of it, AdaLN layer, rows of its offsets), one after the other.
RowRecipe = tuple[tuple[str, slice, str, slice], ...]
CROSS_V, CROSS_A = "video_a2v_cross_attn_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table"
SHIFT_V, SHIFT_A = "av_cross_attn_video_scale_shift", "av_cross_attn_audio_scale_shift"
ONE, ALL = slice(0, 1), slice(0, 2)
ROW_RECIPES: dict[str, RowRecipe] = {
    "attn1.rows": (("scale_shift_table", slice(0, 3), "time_embed", slice(0, 3)),),
    "audio_attn1.rows": (("audio_scale_shift_table", slice(0, 3), "audio_time_embed", slice(0, 3)),),
    "attn2.rows": (("scale_shift_table", slice(6, 9), "time_embed", slice(6, 9)),),
    "attn2.context_rows": (("prompt_scale_shift_table", ALL, "prompt_adaln", ALL),),
    "audio_attn2.rows": (("audio_scale_shift_table", slice(6, 9), "audio_time_embed", slice(6, 9)),),
    "audio_attn2.context_rows": (("audio_prompt_scale_shift_table", ALL, "audio_prompt_adaln", ALL),),
    "audio_to_video_attn.rows": (
        (CROSS_V, AUDIO_TO_VIDEO, SHIFT_V, AUDIO_TO_VIDEO),
        (CROSS_V, EXCHANGE_GATE, "av_cross_attn_video_a2v_gate", ONE),
    ),
    "audio_to_video_attn.context_rows": ((CROSS_A, AUDIO_TO_VIDEO, SHIFT_A, AUDIO_TO_VIDEO),),
    "video_to_audio_attn.rows": (
        (CROSS_A, VIDEO_TO_AUDIO, SHIFT_A, VIDEO_TO_AUDIO),
        (CROSS_A, EXCHANGE_GATE, "av_cross_attn_audio_v2a_gate", ONE),
    ),
    "video_to_audio_attn.context_rows": ((CROSS_V, VIDEO_TO_AUDIO, SHIFT_V, VIDEO_TO_AUDIO),),
    "ff.rows": (("scale_shift_table", slice(3, 6), "time_embed", slice(3, 6)),),
    "audio_ff.rows": (("audio_scale_shift_table", slice(3, 6), "audio_time_embed", slice(3, 6)),),
}


LISTENERS: ContextVar[tuple[list[str], ...]] = ContextVar("LISTENERS", default=())


def note(said: str) -> None:
    """Add a sentence to the notes that are being listened to."""
    for heard in LISTENERS.get():
        if said not in heard:
            heard.append(said)


class Traced(dict[str, Any]):
    """Taps by name, and notes on what could not be read."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, said: str) -> None:
        """Note what could not be read, once."""
        if said not in self.notes:
            self.notes.append(said)
            note(said)


@dataclass
class Recorder:
    """Records taps, and passes on the tensors that the model should use instead.

    `keep` makes of each tap what is kept. What `deviations` has for a tap is added to it; then it is recorded, and, if
    it is in `inject`, replaced.
    """

    keep: Callable[[Tensor], Any]
    inject: Mapping[str, Tensor]
    deviations: Mapping[str, Tensor] = field(default_factory=dict)
    taps: Traced = field(default_factory=Traced)
    offsets: Taps = field(default_factory=dict)  # current outputs of the AdaLN layers, not detached
    streams: list[Tensor] = field(default_factory=list)  # residuals normalised since the last sub-layer began
    earlier: list[Tensor] = field(default_factory=list)  # the same for the sub-layer before
    sublayer: str = ""  # the one whose attention is running
    norms: Iterator[str] = field(default_factory=lambda: iter(()))  # residuals that a block has yet to normalise
    chunks: dict[str, list[Tensor]] = field(default_factory=dict)  # chunks of queries that an attention has seen so far
    last_norms: Iterator[str] = field(default_factory=lambda: iter(()))  # the taps of norms that are yet to run
    flow: Flow | None = None  # says whose norm a tensor is, in any model but ours
    normalised: dict[str, tuple[Tensor, int]] = field(default_factory=dict)  # residuals that a layer has normalised

    def __call__(self, name: str, x: Tensor) -> Tensor:
        """Record a tap and return the tensor that the model goes on with: `x`, or its replacement."""
        if x.numel() == 0:  # an absent stream has no taps
            return x
        # In these taps B and T are two dimensions in some implementations, and one in others.
        flat = name.endswith((".sinusoid", ".emb", ".linear"))
        x = self.deviated(name, x)
        self.taps[name] = self.keep(x.detach().flatten(0, -2) if flat else x.detach())
        given = self.inject.get(name)
        if given is not None:  # noise levels for each token may replace one for each batch element
            each = flat and x.ndim == 3 and isinstance(given, Tensor) and given.numel() != x.numel()
            x = given.to(x).reshape((len(x), -1, x.shape[2]) if each else x.shape)
        if name.endswith(".linear"):
            self.offsets[name.removesuffix(".linear")] = x
        if name.endswith(".to_gate_logits"):
            self(name.replace("to_gate_logits", "gate"), 2 * x.sigmoid())
        return x

    @property
    def changes(self) -> bool:
        """Tell whether the model may have to go on with other tensors than its own."""
        return bool(self.inject or self.deviations)

    def deviated(self, name: str, x: Tensor) -> Tensor:
        """Return `x` with its deviation, added in float64, if it has one."""
        added = self.deviations.get(name)
        return x if added is None else (x.double() + added.to(x.device).reshape(x.shape)).to(x.dtype)

    def returned(self, output: Any) -> None:
        """Record the outputs of the forward. That of an absent stream, which is empty or None, is no tap."""
        pair = output if isinstance(output, tuple | list) and len(output) == 2 else ()
        there = {name: x for name, x in zip(PROJECTED, pair, strict=False) if isinstance(x, Tensor)}
        found = there if len(there) == 1 and any(x is None for x in pair) else returned(output)
        self.taps |= {name: self.keep(x.detach()) for name, x in found.items() if x.numel()}

    def entering(self, sublayer: str, x: Tensor | None) -> None:
        """Begin a sub-layer, which is given `x`, and record its residual.

        In this model the residual is the first tensor that was normalised since the previous sub-layer began. The
        exchange normalises both streams before its first direction, so its second direction finds its residual one
        sub-layer earlier. In another module it is what a named layer has normalised for this sub-layer, or what `x` is
        the norm of.
        """
        self.sublayer = sublayer
        self.chunks.clear()
        if self.flow is not None:
            residual = self.residual_of(sublayer, x, self.flow)
            if residual is not None:
                self(f"{sublayer}.stream", residual)
            self.flow.entered += 1
        elif self.streams or self.earlier:
            self(f"{sublayer}.stream", self.streams[0] if self.streams else self.earlier[-1])
        self.earlier, self.streams = self.streams, []

    def left(self) -> None:
        """End a sub-layer: what computes attention from now on is none of it."""
        self.sublayer = ""

    def residual_of(self, sublayer: str, x: Tensor | None, flow: Flow) -> Tensor | None:
        """Return the residual of a sub-layer in another module than ours, or None if it is not known."""
        if (named := self.normalised.pop(sublayer, None)) is not None:
            return named[0] if version_of(named[0]) == named[1] else None
        return None if x is None else flow.residual(x)


class OutputError(ValueError):
    """An implementation returned something other than a video and an audio tensor."""


def returned(output: Any) -> Taps:
    """Return the outputs of a forward under the names of their taps.

    `output` is a pair, or has `sample` and `audio_sample` as keys or as attributes. Raises `OutputError` for anything
    else, including one tensor with two batch elements, which Python would unpack.
    """
    if isinstance(output, Mapping):
        found: list[Any] = [output.get(name) for name in PROJECTED]
    elif isinstance(output, tuple | list):
        found = [*output]
    else:
        found = [getattr(output, name, None) for name in PROJECTED]
    if len(found) != 2 or not all(isinstance(x, Tensor) and x.is_floating_point() for x in found):
        got = described_output(output)
        raise OutputError(f"the returned outputs: expected two floating-point tensors, video and audio, got {got}")
    return dict(zip(PROJECTED, found, strict=True))


def described_output(output: Any) -> str:
    """Describe in an error message what a forward returned."""
    if not isinstance(output, Mapping | tuple | list):
        return brief(output)
    found = [f"{name}: {brief(x)}" for name, x in output.items()] if isinstance(output, Mapping) else map(brief, output)
    return f"{type(output).__name__} ({', '.join(found)})"


def brief(x: Any) -> str:
    """Describe a value in a few words: a tensor by its dtype and shape, anything else by its type."""
    if isinstance(x, Tensor):
        return f"a tensor of {str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    return "None" if x is None else type(x).__name__


@contextmanager
def trace(
    model: nn.Module,
    layout: Layout | None = None,
    inject: Mapping[str, Tensor] | None = None,
    keep: Callable[[Tensor], Any] = torch.clone,
    deviations: Mapping[str, Tensor] | None = None,
) -> Iterator[Taps]:
    """Record the taps of the last forward within the context; the model's output stays the same to the bit.

    Yields a dict that the forward fills. A tap in `inject` is recorded and then replaced: everything after it is
    computed from the replacement. `sample` and `audio_sample` cannot be replaced, because nothing follows them.
    `deviations` are added to taps before they are recorded: the forward of a model that is wrong there by so much.
    `keep` makes of each tap what is kept, by default a copy.

    `layout` says under which names the layers of another implementation are; modules that are much like diffusers' or
    Lightricks' need none. The module may be anywhere inside `model`. What cannot be read is missing, and the dict's
    `notes` say why. Modules from `torch.compile` run without compilation within the context.

    Raises `OutputError` if a forward does not return video and audio.
    """
    ours = layout is None and isinstance(model, LTX2VideoTransformer3DModel)
    root, layout = (model, OURS) if ours else root_and_layout(model, layout)
    recorder = Recorder(keep, inject or {}, deviations or {}, flow=None if layout.ours else Flow())
    with hooks() as on, uncompiled(model):
        tap_hooks = TapHooks(root, layout, recorder, on)
        layout.doors(tap_hooks)
        around(tap_hooks)
        for i in range(tap_hooks.blocks()):
            inside(tap_hooks, f"transformer_blocks.{i}.")
        on(model.register_forward_hook(lambda _, args, out: recorder.returned(out)))
        with Functions(recorder):
            yield recorder.taps


def root_and_layout(model: nn.Module, layout: Layout | None) -> tuple[Any, Layout]:
    """Return the module inside a model whose layers have the names of a layout, and that layout, given or found."""
    if layout is None:
        root, found = layout_of(model)
        return root, found or Layout()
    return root_of(model, layout) or model, layout


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled modules as they were written, because hooks see nothing inside a compiled graph."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it takes seconds
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield


@contextmanager
def hooks() -> Iterator[On]:
    """Yield a function that takes the handles of hooks, and remove all of these hooks at the end."""
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in reversed(handles):
            handle.remove()


class Functions(TorchFunctionMode):
    """Records calls that belong to no module: attention, the weightless norms of residuals, the last norms."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.recorder.sublayer:
            return self.attention(func, *args, **kwargs)
        if self.recorder.flow is not None:
            result = func(*args, **kwargs)
            self.recorder.flow.follow(func, args, kwargs, result)
            return result
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if func is F.rms_norm and weight is None and args[0].ndim == 3:  # a residual, and not single heads
            self.recorder.streams.append(args[0])
            args = (self.residual(args[0]), *args[1:])
        result = func(*args, **kwargs)
        if func is F.layer_norm:
            return self.recorder(next(self.recorder.last_norms, "audio_norm_out"), result)
        return result

    def residual(self, x: Tensor) -> Tensor:
        """Return the tensor to be normalised: the residual, or its replacement.

        Only the norm sees the replacement. The residual itself continues unchanged.
        """
        name = next(self.recorder.norms, "")
        given = self.recorder.inject.get(name)
        return self.recorder.deviated(name, x) if given is None else given.to(x)

    def attention(self, func: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run attention and record it; a sub-layer may call it once per chunk of queries, with the same keys."""
        chunks = self.recorder.chunks
        first = not chunks or chunks["k"][0] is not key
        if first:
            chunks.clear()
            chunks["k"] = [key]

        def tap(name: str, x: Tensor) -> Tensor:  # x is (B, H, T, d), the tap (B, T, H, d)
            parts = chunks.setdefault(name, [])
            parts.append(x.transpose(1, 2))
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            seen = self.recorder(f"{self.recorder.sublayer}.{name}", whole)
            return seen[:, seen.shape[1] - x.shape[2] :].transpose(1, 2)

        query = tap("q", query)
        if first:
            key = self.recorder(f"{self.recorder.sublayer}.k", key.transpose(1, 2)).transpose(1, 2)
        return tap("sdpa", func(query, key, value, *args, **kwargs))


@dataclass(frozen=True)
class TapHooks:
    """Registers hooks by our names of layers and parameters. A layer that the model lacks has no taps."""

    model: Any
    layout: Layout
    tap: Recorder
    on: On

    def place(self, path: str) -> Place | None:
        """Return where a layer or a parameter is, or None if the model has none at that path."""
        if self.layout.ours:
            found = find_module(self.model, path) if path else self.model
            return None if found is None else Place(None, "", found)
        return self.layout.find(self.model, path) if path else Place(None, "", self.model)

    def find(self, path: str) -> Any:
        """Return a layer or a parameter, or None if the model has none at that path."""
        place = self.place(path)
        return None if place is None else place.value

    def blocks(self) -> int:
        """Return how many blocks the model has."""
        blocks = self.find("transformer_blocks")
        return len(blocks) if hasattr(blocks, "__len__") else 0

    def call(self, path: str, before: Before | None = None, after: After | None = None) -> bool:
        """Run `before` on the arguments of a layer's calls, and `after` on what they return.

        Both return a replacement or None. Returns whether there is such a layer.
        """
        place = self.place(path)
        if place is None or not callable(place.value):
            return False
        before, after = before and self.safely(path, before), after and self.safely(path, after)
        try:
            if not isinstance(place.value, nn.Module):
                self.on(Patched(place, before, after))
                return True
            if before is not None:
                begun = before
                self.on(place.value.register_forward_pre_hook(lambda _, *given: begun(*given), with_kwargs=True))
            if after is not None:
                ended = after
                self.on(place.value.register_forward_hook(lambda _, args, out: ended(out)))
        except Exception as error:
            self.failed(path, error)
            return False
        return True

    def safely(self, path: str, read: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that reads taps and, in another model than ours, notes an error instead of raising it."""
        if self.layout.ours:
            return read

        def reading(*given: Any) -> Any:
            try:
                return read(*given)
            except NotExact:
                raise
            except Exception as error:
                self.failed(path, error)
                return None

        return reading

    def failed(self, path: str, error: Exception) -> None:
        """Note once that a layer cannot be read, or raise the error if it is one of our own."""
        if self.layout.ours:
            raise error
        said = f"{path}: not traced: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        self.tap.taps.note(said)

    def given(self, path: str, name: str) -> bool:
        """Record the input of a layer as the tap `name`."""

        def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = sole_tensor(args[0]) if args else next((x for x in kwargs.values() if isinstance(x, Tensor)), None)
            if x is None:
                return None
            x = self.tap(name, x)
            return ((x, *args[1:]), kwargs) if args and isinstance(args[0], Tensor) else None

        return self.call(path, before=read)

    def result(self, path: str, name: str) -> bool:
        """Record the output of a layer as the tap `name`, of a pair of output and bias that of adding both."""

        def read(out: Any) -> Any:
            if isinstance(out, Tensor):
                return self.tap(name, out)
            if isinstance(out, tuple) and len(out) == 2 and isinstance(out[0], Tensor):
                if out[1] is None:
                    self.tap(name, out[0])
                elif is_bias(out[1], out[0]):
                    self.tap(name, out[0] + out[1])
            return None

        return self.call(path, after=read)


class Patched:
    """A handle of a callable that is no module, which a wrapper replaces until the handle is removed."""

    def __init__(self, place: Place, before: Before | None, after: After | None) -> None:
        self.parent, self.key = place.parent, place.key
        self.is_item = isinstance(self.parent, list)
        # A method of a class, or one of a module's own attributes: what is not the instance's own is uncovered again.
        self.was_own = self.is_item or self.key in vars(self.parent)
        self.before = self.parent[int(self.key)] if self.is_item else getattr(self.parent, self.key)
        self.put(wrapped(self.before, before, after))

    def put(self, value: Any) -> None:
        """Store a callable in place of the present one."""
        if self.is_item:
            self.parent[int(self.key)] = value
        else:
            setattr(self.parent, self.key, value)

    def remove(self) -> None:
        """Restore the callable that was there."""
        if self.was_own:
            self.put(self.before)
        else:
            delattr(self.parent, self.key)


def wrapped(function: Callable[..., Any], before: Before | None, after: After | None) -> Callable[..., Any]:
    """Return a function that calls `before` on its arguments and `after` on its result."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = (before and before(args, kwargs)) or (args, kwargs)
        out = function(*args, **kwargs)
        changed = after and after(out)
        return out if changed is None else changed

    return call


def is_bias(x: Any, of: Tensor) -> bool:
    """Tell whether `x` is a bias that a linear layer has returned for its caller to add to its result."""
    return isinstance(x, Tensor) and x.shape == of.shape[-1:]


def around(hooks: TapHooks) -> None:
    """Register hooks on everything outside the blocks except coordinates and RoPE tables."""
    found = [hooks.result(name, name) for name in ("proj_in", "audio_proj_in")]
    for name in ("caption_projection", "audio_caption_projection"):
        hooks.result(name, name)
    for name in ADALN_LAYERS:
        hooks.given(f"{name}.emb.timestep_embedder.linear_1", f"{name}.sinusoid")
        hooks.result(f"{name}.emb.timestep_embedder", f"{name}.emb")
        hooks.result(f"{name}.linear", f"{name}.linear")
    for name in PROJECTED.values():
        norm = name.replace("proj", "norm")
        if not hooks.layout.ours and not hooks.result(norm, norm):
            hooks.call(name, before=partial(last_norm, hooks.tap, norm))
        hooks.given(name, f"{name}.input")
        found.append(hooks.result(name, name))
    if not hooks.layout.ours:
        note_missing(hooks)


def last_norm(tap: Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record the last norm of a stream, which the input of its projection was computed from."""
    x = sole_tensor(args[0]) if args else None
    if x is not None and tap.flow is not None and (normed := tap.flow.last_norm(x)) is not None:
        tap(name, normed)


def note_missing(hooks: TapHooks) -> None:
    """Note which layers that every implementation has were not found under the names of the layout."""
    known = [*KNOWN_PLACES, *(f"transformer_blocks.0.{name}" for name in SUBLAYERS)]
    missing = [path for path in known if hooks.find(path) is None]
    kind = type(hooks.model).__name__
    if len(missing) == len(known):
        said = f"{kind} has no layers under known names, so only its outputs were read; ltx2ref.Layout maps names"
    elif missing:
        said = f"{kind} has no {', '.join(missing[:6])}{' and others' * (len(missing) > 6)}, so their taps are missing"
    else:
        return
    hooks.tap.taps.note(said)


def inside(hooks: TapHooks, block: str) -> None:
    """Register hooks on everything in one block.

    A hook on each sub-layer notes that it has begun, so that a call of attention can be attributed to it.
    """
    tap = hooks.tap
    for name in SUBLAYERS:
        if not hooks.layout.ours and f"{name}.stream" in hooks.layout.names:
            hooks.call(f"{block}{name}.stream", before=partial(normalising, tap, block + name))
        hooks.call(block + name, partial(enter, hooks, block, name), lambda _: tap.left())
    for at in (block + name for name in ATTENTION_LAYERS):
        for part in ATTENTION_OUTPUTS:
            hooks.result(f"{at}.{part}" + ".0" * (part == "to_out"), f"{at}.{part}")
        if "sdpa" in hooks.layout.names:
            hooks.call(f"{at}.sdpa", partial(queries, hooks, at), partial(layer_attended, hooks, at))
    for at in (block + name for name in FEED_FORWARDS):
        hooks.result(f"{at}.net.0.proj", f"{at}.proj")
        hooks.given(f"{at}.net.2", f"{at}.activation")
        hooks.result(f"{at}.net.2", f"{at}.output")
    hooks.call(block[:-1], after=partial(put_streams, tap, block))


def sole_tensor(x: Any) -> Any:
    """Return the tensor that a value stands for: itself, its `x`, or the only one in a list; or None."""
    if isinstance(x, list | tuple) and len(x) == 1:
        x = x[0]
    x = x if isinstance(x, Tensor) else getattr(x, "x", None)
    return x if isinstance(x, Tensor) else None


def both_streams(out: Any) -> list[Tensor | None] | None:
    """Return video and audio from what a block returned: a pair, of tensors or of objects that hold them as `x`.

    One of them may be absent, and None.
    """
    found = [sole_tensor(x) for x in out] if isinstance(out, list | tuple) else []
    absent = [x for x, kept in zip(found, out, strict=True) if x is None and kept is not None] if found else []
    return found if len(found) == 2 and any(x is not None for x in found) and not absent else None


def normalising(tap: Recorder, sublayer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the residual that a layer normalises for a sub-layer."""
    x = sole_tensor(args[0]) if args else next((x for x in kwargs.values() if isinstance(x, Tensor)), None)
    if x is not None:
        tap.normalised[sublayer] = (x, version_of(x))


def version_of(x: Tensor) -> int:
    """Return how often a tensor was changed in place; a tensor of inference mode does not count it."""
    return -1 if x.is_inference() else x._version


def enter(hooks: TapHooks, block: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Note that a sub-layer begins, and record its rows and inputs."""
    x, context = sources(name, args, kwargs)
    hooks.tap.entering(block + name, x)
    for part in (f"{name}.rows", f"{name}.context_rows"):
        if (derived := modulation(part, lambda table: hooks.find(block + table), hooks.tap.offsets)) is not None:
            hooks.tap(block + part, derived)
    return inputs(hooks.tap, block + name, x, context, args, kwargs)


def sources(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return the inputs of a sub-layer: x and, in an attention, the input of keys and values, if it is another one.

    They may be positional, or have any implementation's names.
    """
    named = [sole_tensor(kwargs[key]) for key in ("hidden_states", "x") if key in kwargs]
    values = [*map(sole_tensor, args), *named]
    x, context = values[0] if values else None, values[1] if len(values) > 1 else None
    key = next((key for key in ("encoder_hidden_states", "context") if key in kwargs), None)
    context = sole_tensor(kwargs[key]) if key else context
    is_self = name in ("attn1", "audio_attn1")
    usable = context is not None and context is not x and not is_self and context.ndim == 3 and not name.endswith("ff")
    return x, context if usable else None


def inputs(
    tap: Recorder, at: str, x: Tensor | None, context: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any] | None:
    """Record the inputs of a sub-layer, and return its arguments with any replacements."""
    if x is None:
        return None
    used = {id(x): tap(f"{at}.input", x)}
    if context is not None:
        used[id(context)] = tap(f"{at}.context", context)
    if not tap.changes:
        return None
    return tuple(used.get(id(y), y) for y in args), {name: used.get(id(y), y) for name, y in kwargs.items()}


def queries(hooks: TapHooks, at: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record the queries and keys that a layer is given which computes attention by other means than `F`'s."""
    q, k = args[0] if args else kwargs["query"], args[1] if len(args) > 1 else kwargs["key"]
    hooks.tap(f"{at}.q", in_heads(hooks, at, q))
    hooks.tap(f"{at}.k", in_heads(hooks, at, k))
    hooks.tap.sublayer = ""  # what it calls inside is no further attention


def layer_attended(hooks: TapHooks, at: str, out: Any) -> None:
    """Record what such a layer returned."""
    hooks.tap.sublayer = at
    hooks.tap(f"{at}.sdpa", in_heads(hooks, at, out[0] if isinstance(out, tuple | list) else out))


def in_heads(hooks: TapHooks, at: str, x: Tensor) -> Tensor:
    """Return queries, keys or values as (B, T, H, d), from (B, H, T, d) or (B, T, H * d) as well."""
    layer = at.rpartition(".")[2]
    count = heads(hooks.model, "audio_" if "audio" in layer else "")
    if x.ndim == 3 and count is not None:
        return rearrange(x, "b t (h d) -> b t h d", h=count)
    return x.transpose(1, 2) if x.ndim == 4 and x.shape[1] == count != x.shape[2] else x


def put_streams(tap: Recorder, block: str, out: Any) -> Any:
    """Record both streams after a block, and return replacements as the block's output if there are any."""
    tap.streams, tap.earlier = [], []
    tap.normalised.clear()
    if (pair := both_streams(out)) is None:
        return None
    injected = tuple(x if x is None else tap(block + name, x) for name, x in zip(("video", "audio"), pair, strict=True))
    return injected if isinstance(out, tuple) and tap.changes else None


def modulation(part: str, table: Callable[[str], Tensor | None], offsets: Taps) -> Tensor | None:
    """Return a sub-layer's rows of modulation, (B * T|1, K, D): learned rows plus offsets.

    Returns None if this model has no such rows.
    """
    found = []
    for name, chosen, layer, of_layer in ROW_RECIPES.get(part, ()):
        learned = table(name)
        if learned is None or len(learned) <= chosen.start or layer not in offsets:
            return None
        offset = rearrange(offsets[layer].flatten(0, -2), "n (k d) -> n k d", d=learned.shape[-1])[:, of_layer]
        found.append(torch.stack(rows(learned[chosen], offset), 1))
    # An exchange's gate can be per batch element while its other rows are per token.
    size = max(map(len, found), default=0)
    return torch.cat([x.repeat_interleave(size // len(x), 0) for x in found], 1) if found else None


def find_module(model: Any, path: str) -> Any:
    """Return a submodule, or None if the model has none at that path."""
    for part in path.split("."):
        model = getattr(model, part, None)
        if model is None:
            return None
    return model


def our_doors(hooks: TapHooks) -> None:
    """Record coordinates and RoPE tables from what the model, once it has checked its arguments, gives itself."""
    model, tap, on = hooks.model, hooks.tap, hooks.on

    def coordinates(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams = dict(zip(("video_coords", "audio_coords"), args, strict=True))
        present = {name: s for name, s in streams.items() if s.coords is not None}  # an absent stream has no taps
        tap.last_norms = iter(["norm_out"] * ("video_coords" in present) + ["audio_norm_out"])
        for name, s in present.items():
            tap(name, s.coords.expand(len(s.latent), *s.coords.shape[1:]))

    def ropes(_: nn.Module, args: tuple[Any, ...], block: str) -> tuple[Any, ...]:
        vx, ax, vc, ac, perturbation = args
        alone = vc is None or ac is None or perturbation.isolated
        present = [layers for layers, c in ((VIDEO_SUBLAYERS, vc), (AUDIO_SUBLAYERS, ac)) if c is not None]
        running = [x for layers in present for x in layers if x not in EXCHANGES] if alone else SUBLAYERS
        tap.norms = iter([f"{block}.{name}.stream" for name in running])
        if vc is not None:
            vc = with_ropes(vc, "rope", "cross_attn_rope", len(vx), ac is not None)
        if ac is not None:
            ac = with_ropes(ac, "audio_rope", "cross_attn_audio_rope", len(ax), vc is not None)
        return vx, ax, vc, ac, perturbation

    def with_ropes(c: Any, own: str, of_exchange: str, batch: int, exchange: bool) -> Any:
        c = c._replace(rope=pair(own, c.rope, batch))
        return c._replace(exchange_rope=pair(of_exchange, c.exchange_rope, batch)) if exchange else c

    def pair(name: str, rope: tuple[Tensor, Tensor], batch: int) -> tuple[Tensor, Tensor]:
        cos, sin = (
            tap(name + part, x.expand(batch, *x.shape[1:])) for part, x in zip((".cos", ".sin"), rope, strict=True)
        )
        return (cos, sin) if tap.changes else rope

    on(Patched(Place(model, "velocities", model.velocities), coordinates, None))
    for i, block in enumerate(model.transformer_blocks):
        on(block.register_forward_pre_hook(partial(ropes, block=f"transformer_blocks.{i}")))


OURS = Layout(doors=our_doors, ours=True)
