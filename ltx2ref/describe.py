"""The architecture in numbers: parameters, FLOPs and activation memory of each sub-layer, for given lengths.

All numbers follow from the parameters' shapes and from a run of one block on the meta device, where tensors have shapes
but no data. So a model of any size is described in seconds.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .checkpoint.shapes import Shapes, parameter_shapes
from .checkpoint.streams import BOTH_STREAMS, StreamName, require_streams
from .config import TransformerConfig
from .interface import LTX2VideoTransformer3DModel

BLOCKS = "transformer_blocks."
# For each step, the modules and tables of video and those of audio. `IN_BLOCKS` says which steps are inside a block.
STEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "input": (("proj_in", "keyframes_abs_pos_embedding"), ("audio_proj_in",)),
    "noise levels": (
        ("time_embed", "prompt_adaln", "av_cross_attn_video_scale_shift", "av_cross_attn_video_a2v_gate"),
        ("audio_time_embed", "audio_prompt_adaln", "av_cross_attn_audio_scale_shift", "av_cross_attn_audio_v2a_gate"),
    ),
    "text projection": (("caption_projection",), ("audio_caption_projection",)),
    "self-attention": (("attn1",), ("audio_attn1",)),
    "text attention": (("attn2",), ("audio_attn2",)),
    "exchange": (("audio_to_video_attn",), ("video_to_audio_attn",)),  # listed by the stream that receives
    "feed-forward": (("ff",), ("audio_ff",)),
    "modulation tables": (
        ("scale_shift_table", "prompt_scale_shift_table", "video_a2v_cross_attn_scale_shift_table"),
        ("audio_scale_shift_table", "audio_prompt_scale_shift_table", "audio_a2v_cross_attn_scale_shift_table"),
    ),
    "output": (("scale_shift_table", "proj_out"), ("audio_scale_shift_table", "audio_proj_out")),
}
IN_BLOCKS = ("self-attention", "text attention", "exchange", "feed-forward", "modulation tables")
ATTENTIONS = {"self-attention": ("video", "audio"), "text attention": ("text", "text"), "exchange": ("audio", "video")}


class Lengths(NamedTuple):
    """The number of tokens of each kind in one element of the batch."""

    video: int
    audio: int
    text: int
    batch: int = 1


@dataclass(frozen=True)
class Row:
    """One stream's share of a step, summed over all blocks."""

    step: str
    stream: str  # in the exchange, the stream that receives
    modules: list[str]
    matrices: list[str]  # sizes of the modules' matrices, in x out, each size once
    parameters: int
    flops: int  # in one forward; only matrix products count, with 2 for each multiplication and addition


@dataclass(frozen=True)
class Architecture:
    """The result of `describe`. Memory is in bytes, and activations come on top of weights and inputs."""

    config: TransformerConfig
    streams: list[str]  # both, or the one that is alone
    lengths: Lengths
    dtype: str
    rows: list[Row]
    parameters: int
    flops: int
    weight_bytes: int
    activation_bytes: int  # the peak of a forward
    activation_bytes_in: dict[str, int]  # the peak of each step


def lengths(
    config: TransformerConfig,
    frames: int,
    height: int,
    width: int,
    seconds: float | None = None,
    fps: float = 24.0,
    text: int = 1024,
    batch: int = 1,
    streams: StreamName | None = None,
) -> Lengths:
    """Return the number of tokens of a video whose size is in pixels.

    The audio lasts as long as the video if `seconds` is None. With `streams="audio"`, the video may have any size.
    Raises `ValueError` for sizes that are not whole numbers of latent frames, rows and columns, and unless `fps` and
    `seconds` are positive and finite.
    """
    (t, y, x), offset = config.vae_scale_factors, config.causal_offset
    for name, size, scale, first in (("frames", frames, t, offset), ("height", height, y, 0), ("width", width, x, 0)):
        if streams != "audio" and (size < 1 or (size - first) % scale):
            raise ValueError(f"{name}: expected a multiple of {scale}{f' and {first} more' * bool(first)}, got {size}")
    for name, value in (("seconds", seconds), ("fps", fps)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {value}")
    per_second = config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor
    audio = round((frames / fps if seconds is None else seconds) * per_second)
    return Lengths(math.ceil(frames / t) * (height // y) * (width // x), audio, text, batch)


def describe(
    config: TransformerConfig, lengths: Lengths, dtype: torch.dtype = torch.bfloat16, streams: StreamName | None = None
) -> Architecture:
    """Describe a forward with one noise level for each element of the batch, as in text-to-video.

    With `streams`, it is that of one stream alone, and the length of the other one does not count. Raises `ValueError`
    unless all other lengths are positive.
    """
    require_streams(streams)
    present = BOTH_STREAMS if streams is None else (streams,)
    absent = {stream: 0 for stream in BOTH_STREAMS if stream not in present}
    for name, n in lengths._asdict().items():
        if n < 1 and name not in absent:
            raise ValueError(f"{name}: expected a positive number, got {n}")
    lengths = lengths._replace(**absent)
    shapes = parameter_shapes(config, present)
    rows = [
        row
        for step in STEPS
        for i, stream in enumerate(("video", "audio"))
        if (row := make_row(config, shapes, step, i, stream, lengths)) is not None
    ]
    parameters, memory = sum(map(math.prod, shapes.values())), activation_memory(config, lengths, dtype)
    assert parameters == sum(row.parameters for row in rows)
    return Architecture(
        config=config,
        streams=[*present],
        lengths=lengths,
        dtype=str(dtype).removeprefix("torch."),
        rows=rows,
        parameters=parameters,
        flops=sum(row.flops for row in rows),
        weight_bytes=parameters * dtype.itemsize,
        activation_bytes=max(memory.values()),
        activation_bytes_in=memory,
    )


def make_row(config: TransformerConfig, shapes: Shapes, step: str, i: int, stream: str, n: Lengths) -> Row | None:
    """Return one stream's row of a step, or None where the release has no such module."""
    prefix, times = (f"{BLOCKS}0.", config.num_layers) if step in IN_BLOCKS else ("", 1)
    own = {module: found for module in STEPS[step][i] if (found := tensors_of(prefix + module, shapes))}
    if not own:
        return None
    tensors = {name: shape for found in own.values() for name, shape in found.items()}
    matrices = {name: shape for name, shape in tensors.items() if name.endswith(".weight") and len(shape) == 2}
    flops = sum(
        2 * math.prod(shape) * getattr(n, passing(name, step, i, stream), 1) for name, shape in matrices.items()
    )
    if step in ATTENTIONS:  # two products: queries with keys, and probabilities with values
        (inner, _), keys = matrices[f"{prefix}{STEPS[step][i][0]}.to_q.weight"], getattr(n, ATTENTIONS[step][i])
        flops += 2 * 2 * getattr(n, stream) * keys * inner
    widths = dict.fromkeys(f"{fan_in} x {fan_out}" for fan_out, fan_in in matrices.values())
    return Row(
        step, stream, list(own), list(widths), times * sum(map(math.prod, tensors.values())), times * n.batch * flops
    )


def tensors_of(module: str, shapes: Shapes) -> Shapes:
    """Return the parameters of a module, or a parameter itself, by name."""
    return {name: shape for name, shape in shapes.items() if name == module or name.startswith(f"{module}.")}


def passing(name: str, step: str, i: int, stream: str) -> str:
    """Return which tokens a matrix is applied to. Noise levels count as a single token."""
    if ".to_k." in name or ".to_v." in name:
        return ATTENTIONS[step][i]
    return {"noise levels": "one", "text projection": "text"}.get(step, stream)


class Live(TorchDispatchMode):
    """A mode that counts the bytes of live tensors and keeps the peak of each `step`.

    Tensors that were `known` before do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no annotations
        self.step, self.now = "input", 0
        self.peaks: dict[str, int] = {}
        self.held = {x.untyped_storage()._cdata for x in known}  # views of these take no memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == "meta":
                self.hold(x.untyped_storage())
        self.peaks[self.step] = max(self.peaks.get(self.step, 0), self.now)
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.held:
            self.held.add(key)
            self.now += size
            weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        """Stop counting a storage."""
        self.held.discard(key)
        self.now -= size


class Fused(TorchFunctionMode):
    """A mode in which attention and RMSNorm need no memory but for their result, like the kernels that run on GPUs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.scaled_dot_product_attention, F.rms_norm):
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def activation_memory(config: TransformerConfig, n: Lengths, dtype: torch.dtype) -> dict[str, int]:
    """Return the peak memory of each step in bytes.

    One block is enough: without gradients, all blocks need the same.
    """
    with torch.device("meta"), torch.no_grad():
        model = LTX2VideoTransformer3DModel(replace(config, num_layers=1)).to(dtype)
        inputs = blank_inputs(config, n, dtype)
        live = Live([*model.parameters(), *(x for x in inputs.values() if isinstance(x, Tensor))])
        with steps(model, live), Fused(), live:
            model(**inputs)
    return live.peaks


def blank_inputs(config: TransformerConfig, n: Lengths, dtype: torch.dtype) -> dict[str, Any]:
    """Return inputs of the right shapes for `forward`."""
    v, a, level = config.video, config.audio, torch.empty(n.batch)
    return {
        "hidden_states": torch.empty(n.batch, n.video, v.in_channels, dtype=dtype),
        "audio_hidden_states": torch.empty(n.batch, n.audio, a.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.empty(n.batch, n.text, v.text_dim, dtype=dtype),
        "audio_encoder_hidden_states": torch.empty(n.batch, n.text, a.text_dim, dtype=dtype),
        "timestep": level,
        "sigma": level,
        "num_frames": n.video,
        "height": 1,
        "width": 1,
        "audio_num_frames": n.audio,
    }


@contextmanager
def steps(model: LTX2VideoTransformer3DModel, live: Live) -> Iterator[None]:
    """Make `live.step` follow the model: a step begins where its first module does, of either stream."""
    block: Any = model.transformer_blocks[0]
    firsts = [(step, getattr(block, own[0])) for step in IN_BLOCKS[:4] for own in STEPS[step]]
    firsts += [("output", model.proj_out), ("output", model.audio_proj_out)]

    def begins(step: str) -> Any:
        return lambda *_: setattr(live, "step", step)

    hooks = [module.register_forward_pre_hook(begins(step)) for step, module in firsts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
