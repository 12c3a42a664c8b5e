"""The documented class: its 23 arguments, their checks, and all in which the published implementations differ.

The architecture is in model.py and the files that it imports. What is here turns the documented arguments into the two
`Stream`s that it takes.
"""

import math
import warnings
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import rearrange
from torch import LongTensor, Tensor, nn

from .config import TransformerConfig
from .model import LTX2Transformer, Stream
from .rope import audio_positions, video_positions
from .sizes import StreamSizes


@dataclass(frozen=True)
class Conventions:
    """Where the published implementations differ, so that one model can be any of them (docs/divergences.md).

    The defaults are what diffusers 0.42.1 does and documents. Raises `ValueError` for a value that nobody has. Each
    difference names the tap at which it shows first: taps are the intermediate results that `ltx2ref.trace` reads.
    """

    rotation_dtype: Literal["float32", "model"] = "float32"
    """The dtype of RoPE's tables and of the rotation: float32 or wider, or the model's, as in ltx-core. Shows in models
    narrower than float32, at `rope.cos`."""
    positions_dtype: Literal["float32", "model"] = "float32"
    """The dtype to which video's computed coordinates are rounded: float32 or wider, or the model's, as in ltx-core
    until 2026-05-11. Shows in models narrower than float32, at `video_coords`."""
    text_mask_bias: Literal["linear", "lowest"] = "linear"
    """What is added to the logits of masked text tokens: -10000, which keeps their order, or the dtype's lowest number,
    as in ltx-core, which makes them equal. Shows where a row masks all its tokens, at `attn2.sdpa`."""
    self_mask_bias: Literal["linear", "log"] = "linear"
    """What a self-attention mask m adds to the logits: (1 - m) * -10000, or log(m), as in ltx-core. Shows where m is
    neither 0 nor 1, at `attn1.sdpa`."""
    exchange: Literal["argument", "other", "other_gate"] = "argument"
    """Whose noise level drives the exchange:

        value         of                          scale and shift            gate
        "argument"    use_cross_timestep=False    the stream's own timestep  the stream's own timestep
                      use_cross_timestep=True     the other stream's sigma   the other stream's sigma
        "other"       ltx-core from 2026-03       the other stream's sigma   the other stream's sigma
        "other_gate"  ltx-core from 2026-05-28    the stream's own timestep  the other stream's sigma

    Shows where the two noise levels differ, at `av_cross_attn_video_scale_shift.sinusoid` or
    `av_cross_attn_video_a2v_gate.sinusoid`."""
    guidance: Literal["configured", "always"] = "configured"
    """Spatio-temporal guidance is ignored by models without `perturbed_attn`, or never, as in ltx-core 1.0.0. Shows in
    the blocks that are listed, at `attn1.to_out`."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) not in get_args(field.type):
                raise ValueError(f"{field.name}: expected one of {get_args(field.type)}, got {value!r}")


DIFFUSERS = Conventions()
LTX_CORE_2026_03 = Conventions(  # published as ltx-core 1.0.0
    rotation_dtype="model",
    positions_dtype="model",
    text_mask_bias="lowest",
    self_mask_bias="log",
    exchange="other",
    guidance="always",
)
LTX_CORE_2026_08 = Conventions(
    rotation_dtype="model",
    positions_dtype="float32",
    text_mask_bias="lowest",
    self_mask_bias="log",
    exchange="other_gate",
    guidance="always",
)


LEFT_OUT = "to leave a stream out, give latents (B, 0, C), and 0 or None as its number of frames"


class AudioVisualModelOutput(NamedTuple):
    """The velocities of both streams, (B, T, C) each, by attribute, by key or by index.

    It is a tuple, which `video, audio = output` unpacks, and it answers like a dict of its two names.
    """

    sample: Tensor
    audio_sample: Tensor

    def __getitem__(self, key: Any) -> Any:
        return self._asdict()[key] if isinstance(key, str) else tuple.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._fields if isinstance(key, str) else tuple.__contains__(self, key)

    def keys(self) -> KeysView[str]:
        return self._asdict().keys()

    def values(self) -> ValuesView[Tensor]:
        return self._asdict().values()

    def items(self) -> ItemsView[str, Tensor]:
        return self._asdict().items()

    def to_tuple(self) -> tuple[Tensor, Tensor]:
        return self.sample, self.audio_sample


class LTX2VideoTransformer3DModel(LTX2Transformer):
    """The LTX-2 audio-video diffusion transformer, releases 2.0, 2.3 and 2.5, under diffusers' names."""

    config: TransformerConfig

    def __init__(
        self, config: TransformerConfig | None = None, conventions: Conventions = DIFFUSERS, **sizes: Any
    ) -> None:
        """Make a model with random weights, of a config or of a config's fields by keyword, as diffusers takes them.

        Fields that are left out have the defaults of `TransformerConfig`: 48 layers, for example. Raises `TypeError`
        for a config of another type, a config and fields, or a field that does not exist, and `ConfigError` for what
        is not supported.
        """
        super().__init__(chosen_config(config, sizes))
        self.conventions = conventions

    @property
    def device(self) -> torch.device:
        """The device of the weights, or of those that are always there, if the model is streamed."""
        return self.first_layer.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.first_layer.weight.dtype

    @property
    def first_layer(self) -> nn.Linear:
        """The layer that the tokens of video enter, or those of audio in a model that has only audio's weights."""
        return self.proj_in if "video" in self.streams else self.audio_proj_in

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams of which the model has the weights: both, or the one that `load` was asked for."""
        layers = {"video": self.proj_in, "audio": self.audio_proj_in}
        return tuple(stream for stream, layer in layers.items() if layer._parameters["weight"] is not None)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Count the elements of all parameters, or of those that require gradients."""
        return sum(x.numel() for x in self.parameters() if x.requires_grad or not only_trainable)

    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        audio_encoder_hidden_states: Tensor,
        timestep: LongTensor,
        audio_timestep: LongTensor | None = None,
        sigma: Tensor | None = None,
        audio_sigma: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        audio_encoder_attention_mask: Tensor | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        fps: float = 24.0,
        audio_num_frames: int | None = None,
        video_coords: Tensor | None = None,
        audio_coords: Tensor | None = None,
        isolate_modalities: bool = False,
        spatio_temporal_guidance_blocks: list[int] | None = None,
        perturbation_mask: Tensor | None = None,
        use_cross_timestep: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> AudioVisualModelOutput | tuple[Tensor, Tensor]:
        """Predict the velocities of both streams from the documented arguments. For their shapes see `StreamArguments`.

        Timesteps and sigmas are already multiplied by `timestep_scale_multiplier`. They may be floating-point, in spite
        of their documented type. Audio's default to video's. `perturbation_mask`, (B,) or (B, 1, 1), is 0 where the
        blocks of spatio-temporal guidance are perturbed, and 1 where they are not; without it, all are.

        A stream is left out by giving it no tokens: latents (B, 0, C), and 0 or nothing for its grid and coordinates.
        All its other arguments are ignored and may be None; video's timestep and sigma remain the defaults of audio's.
        Its velocities are (B, 0, C), and those of the other stream are the same as with `isolate_modalities=True`.

        Raises `ValueError`, or `TypeError` for a wrong type, that names the argument, what was expected and what came.
        """
        config = self.config
        video = StreamArguments(
            prefix="",
            latent=hidden_states,
            text=encoder_hidden_states,
            timestep=timestep,
            sigma=sigma,
            text_mask=encoder_attention_mask,
            coords=video_coords,
            grid=(num_frames, height, width),
            **attention_masks(attention_kwargs),
        )
        audio = StreamArguments(
            prefix="audio_",
            latent=audio_hidden_states,
            text=audio_encoder_hidden_states,
            timestep=timestep if audio_timestep is None else audio_timestep,
            sigma=sigma if audio_sigma is None else audio_sigma,
            text_mask=audio_encoder_attention_mask,
            coords=audio_coords,
            grid=(audio_num_frames,),
            defaults=tuple(name for name, x in (("timestep", audio_timestep), ("sigma", audio_sigma)) if x is None),
        )
        check_presence(video, audio, self.streams)
        present, other = (audio, video) if video.absent else (video, audio)  # the other one may be absent
        check_stream(present, config, "B", self.dtype)
        check_stream(other, config, len(present.latent), self.dtype)
        guided = config.perturbed_attn or self.conventions.guidance == "always"
        check_options(config, video, fps, spatio_temporal_guidance_blocks, perturbation_mask, guided)
        exchange = exchange_mode(self.conventions, use_cross_timestep)
        if present.sigma is None and (self.prompt_adaln is not None or (exchange != "own" and not other.absent)):
            raise ValueError(f"{present.level('sigma')}: expected a tensor, for prompt_adaln or the exchange; got None")
        dtype = present.latent.dtype  # the model's, or under autocast perhaps autocast's
        keep = hidden_states.new_zeros(1) if perturbation_mask is None else perturbation_mask
        # It weighs results of attention, and autocast does not cast it to their dtype.
        keep = keep.to(dtype_of_linears(self.dtype, self.device))
        velocities = self.velocities(
            *prepared_streams(video, audio, fps, exchange, config, self.conventions, dtype),
            keep=keep.reshape(-1, 1, 1),
            perturbed_blocks=set(spatio_temporal_guidance_blocks or ()) if guided else set(),
            isolated=isolate_modalities,
        )
        return AudioVisualModelOutput(*velocities) if return_dict else velocities


def chosen_config(config: TransformerConfig | None, sizes: Mapping[str, Any]) -> TransformerConfig:
    """Return the config of a model from the arguments of its class: from `config`, or from fields by keyword."""
    if "streams" in sizes:
        raise TypeError("streams: a model of one stream is loaded: load, stream or from_pretrained(..., streams=...)")
    if config is not None:
        if not isinstance(config, TransformerConfig):
            expected = "a TransformerConfig, or its fields by keyword"
            raise TypeError(f"config: expected {expected}, got {type(config).__name__}")
        if sizes:
            raise TypeError(f"config: expected a config or its fields, got both: {', '.join(sizes)}")
        return config
    fields_of_diffusers = TransformerConfig()
    for name in sizes:
        if name not in fields_of_diffusers and not name.startswith("_"):
            raise TypeError(f"{name}: no such field of a config; there are {', '.join(sorted(fields_of_diffusers))}")
    return TransformerConfig.from_diffusers(sizes)


class StreamArguments(NamedTuple):
    """The documented arguments of one stream, whose names begin with `prefix`."""

    prefix: str
    latent: Tensor  # (B, T, C)
    text: Tensor  # (B, S, E)
    timestep: Tensor  # (B,), (B, 1) or (B, T)
    sigma: Any  # (B,) or (B, 1); None where nothing needs it
    text_mask: Tensor | None  # (B, S), 1 keeps; or (B, 1|T, S), added to the logits, or bool, True where one is seen
    coords: Any  # (B, P, T, 2) patch bounds, or (B, P, T) positions; None: those of the grid
    grid: tuple[Any, ...]  # token frames, for video also rows and columns
    self_mask: Tensor | None = None  # (B, T, T), 1 keeps
    keyframes: Tensor | None = None  # (B, T, 1), positive for the tokens of keyframes
    defaults: tuple[str, ...] = ()  # those of "timestep" and "sigma" that are video's, because audio's are not given

    def level(self, name: str) -> str:
        """Return what an error calls the stream's timestep or sigma: by the argument that was given."""
        return f"{name}, to which {self.prefix}{name} defaults" if name in self.defaults else self.prefix + name

    @property
    def absent(self) -> bool:
        """Whether the stream is left out: it has no tokens, and its other arguments are ignored."""
        return isinstance(self.latent, Tensor) and self.latent.ndim == 3 and self.latent.shape[1] == 0


def prepared_streams(
    video: StreamArguments,
    audio: StreamArguments,
    fps: float,
    exchange: str,
    config: TransformerConfig,
    conventions: Conventions,
    dtype: torch.dtype,
) -> tuple[Stream, Stream]:
    """Return what the model takes: noise levels are chosen, masks are made, coordinates computed if none are given."""
    if dtype == torch.float64:  # the truth that others are measured against: nothing may pass through float32
        video, audio = in_double(video), in_double(audio)
    wide = torch.promote_types(dtype, torch.float32)
    if video.coords is None and not video.absent:
        video_coords = video_positions(video.grid, fps, config, wide, video.latent.device)
        video_coords = video_coords.to(dtype if conventions.positions_dtype == "model" else wide)
        video = video._replace(coords=video_coords)
    if audio.coords is None and not audio.absent:
        audio = audio._replace(coords=audio_positions(audio.grid[0], config, wide, audio.latent.device))
    return (
        prepared_stream(video, audio, exchange, conventions, dtype),
        prepared_stream(audio, video, exchange, conventions, dtype),
    )


def prepared_stream(
    own: StreamArguments, other: StreamArguments, exchange: str, conventions: Conventions, dtype: torch.dtype
) -> Stream:
    if own.absent:
        return Stream._make((own.latent, *[None] * (len(Stream._fields) - 1)))  # the model reads nothing else
    text_mask = self_mask = None
    if own.text_mask is not None:
        text_mask = text_attention_mask(own.text_mask, dtype, conventions.text_mask_bias)
    if own.self_mask is not None:
        self_mask = attention_bias(own.self_mask, dtype, conventions.self_mask_bias)[:, None]
    exchange_timestep, exchange_gate_timestep = exchange_levels(own, other, exchange)
    return Stream(
        latent=own.latent,
        text=own.text,
        coords=own.coords,
        timestep=token_levels(own.timestep),
        sigma=None if own.sigma is None else token_levels(own.sigma),
        exchange_timestep=exchange_timestep,
        exchange_gate_timestep=exchange_gate_timestep,
        text_mask=text_mask,
        self_mask=self_mask,
        keyframes=None if own.keyframes is None else own.keyframes > 0,
        tables_dtype=dtype if conventions.rotation_dtype == "model" else None,
    )


def exchange_levels(own: StreamArguments, other: StreamArguments, exchange: str) -> tuple[Tensor, Tensor]:
    """Return the noise levels of the exchange, of scale and shift and of the gate: none if the other one is absent."""
    if other.absent:
        nothing = own.latent.new_empty(len(own.latent), 0)
        return nothing, nothing
    return (
        token_levels(other.sigma if exchange == "other" else own.timestep),
        token_levels(own.timestep if exchange == "own" else other.sigma),
    )


def exchange_mode(conventions: Conventions, use_cross_timestep: bool) -> str:
    """Return "own", "other" or "other_gate": see `Conventions.exchange`."""
    if conventions.exchange != "argument":
        return conventions.exchange
    return "other" if use_cross_timestep else "own"


def token_levels(timestep: Tensor) -> Tensor:
    """Return noise levels (B,), (B, 1) or (B, T) as (B, T|1)."""
    return timestep.reshape(len(timestep), -1)


def in_double(arguments: StreamArguments) -> StreamArguments:
    """Return the same in float64, but for bool masks."""
    wide: dict[str, Any] = {
        name: x.double() for name, x in arguments._asdict().items() if isinstance(x, Tensor) and x.dtype != torch.bool
    }
    return arguments._replace(**wide)


def text_attention_mask(mask: Tensor, dtype: torch.dtype, kind: str = "linear") -> Tensor:
    """Return (B, 1, 1|T, S) for attention, from a text mask as documented: (B, S), or (B, 1|T, S)."""
    if mask.ndim == 2:
        return rearrange(attention_bias(mask, dtype, kind), "b s -> b 1 1 s")
    return rearrange(mask if mask.dtype == torch.bool else mask.to(dtype), "b t s -> b 1 t s")


def attention_bias(mask: Tensor, dtype: torch.dtype, kind: str = "linear") -> Tensor:
    """Return what a mask, 1 to keep and 0 to mask, adds to the logits: a finite number, so that no row is empty.

    `kind` is "linear", "lowest" or "log": see `Conventions.text_mask_bias` and `Conventions.self_mask_bias`.
    """
    lowest, tiny = torch.finfo(dtype).min, torch.finfo(dtype).tiny
    if kind == "log":  # the mask multiplies the weights; computed in the mask's dtype, if that is floating-point
        return (mask * 1.0).clamp(min=tiny).log().to(dtype).where(mask > 0, lowest)
    return (1 - mask.to(dtype)) * (lowest if kind == "lowest" else -10_000.0)


def attention_masks(given: dict[str, Any] | None) -> dict[str, Any]:
    """Check the documented `attention_kwargs`, and return the masks in it by their names in `StreamArguments`.

    Newer diffusers takes these two as arguments of their own.
    """
    names = {"video_self_attention_mask": "self_mask", "video_keyframes_mask": "keyframes"}
    if given is not None and not isinstance(given, dict):
        raise TypeError(f"attention_kwargs: expected a dict, got {type(given).__name__}")
    for key in [key for key in given or {} if key not in names]:
        hint = "to scale a LoRA, load it at that strength" if key == "scale" else f"expected {sorted(names)}"
        raise ValueError(f"attention_kwargs[{key!r}]: unknown; {hint}")
    return {names[key]: value for key, value in (given or {}).items()}


def check_presence(video: StreamArguments, audio: StreamArguments, weights: tuple[str, ...]) -> None:
    """Refuse a call with neither stream, and one with a stream whose weights the model does not have."""
    if video.absent and audio.absent:
        raise ValueError("hidden_states and audio_hidden_states: expected tokens in one of them, got none in both")
    for name, s in (("video", video), ("audio", audio)):
        if not s.absent and name not in weights:
            got = tuple(s.latent.shape) if isinstance(s.latent, Tensor) else type(s.latent).__name__
            raise ValueError(
                f"{s.prefix}hidden_states: expected (B, 0, C): the model has no weights of {name}; got {got}"
            )


def check_stream(s: StreamArguments, config: TransformerConfig, batch: int | str, dtype: torch.dtype) -> None:
    """Check shapes and types, and no values: compiled graphs stay whole."""
    sizes = config.audio if s.prefix else config.video
    if s.absent:
        check_absent(s, sizes, batch, dtype)
        return
    expect(f"{s.prefix}hidden_states", s.latent, (batch, "T", sizes.in_channels), dtype=dtype)
    expect(f"{s.prefix}encoder_hidden_states", s.text, (len(s.latent), "S", sizes.text_dim), dtype=dtype)
    b, t, _ = s.latent.shape
    n = s.text.shape[1]
    axes = len(sizes.max_position)
    mask = f"{s.prefix}encoder_attention_mask"
    coords = f"{s.prefix or 'video_'}coords"
    expect(s.level("timestep"), s.timestep, (b,), (b, 1), (b, t))
    for name, x, *shapes in (
        (s.level("sigma"), s.sigma, (b,), (b, 1)),
        (mask, s.text_mask, (b, n), (b, 1, n), (b, t, n)),
        (coords, s.coords, (b, axes, t, 2), (b, axes, t)),
        ("video_self_attention_mask", s.self_mask, (b, t, t)),
        ("video_keyframes_mask", s.keyframes, (b, t, 1)),
    ):
        if x is not None:
            expect(name, x, *shapes)
    if s.text_mask is not None and s.text_mask.ndim == 3:
        kind = s.text_mask.dtype
        if not (kind.is_floating_point or kind == torch.bool):
            raise ValueError(f"{mask}: with 3 dimensions, expected floating or bool, got {kind}")
    if s.coords is None:
        check_grid(s, coords)


def check_absent(s: StreamArguments, sizes: StreamSizes, batch: int | str, dtype: torch.dtype) -> None:
    """Check that latents, coordinates and grid agree that there are no tokens."""
    expect(f"{s.prefix}hidden_states", s.latent, (batch, 0, sizes.in_channels), dtype=dtype)
    b, axes = len(s.latent), len(sizes.max_position)
    if s.coords is not None:
        expect(f"{s.prefix or 'video_'}coords", s.coords, (b, axes, 0, 2), (b, axes, 0))
    for name, n in named_grid(s):
        if n is not None and not is_size(n, 0):
            raise ValueError(f"{name}: expected a whole number or None, got {n!r}")
    if None not in s.grid and math.prod(s.grid) != 0:
        raise ValueError(f"{s.prefix}hidden_states: 0 tokens, expected {math.prod(s.grid)}, {s.grid} ({LEFT_OUT})")


def check_grid(s: StreamArguments, coords: str) -> None:
    for name, n in named_grid(s):
        if not is_size(n, 1):
            hint = f" ({LEFT_OUT})" if is_size(n, 0) else ""
            raise ValueError(f"{name}: expected a positive integer or {coords}, got {n!r}{hint}")
    tokens, expected = s.latent.shape[1], math.prod(s.grid)
    if tokens != expected:
        raise ValueError(f"{s.prefix}hidden_states: {tokens} tokens, expected {expected}, {s.grid}")


def named_grid(s: StreamArguments) -> list[tuple[str, Any]]:
    """Return the arguments that say how many tokens a stream has along each axis, by name."""
    return [(s.prefix + name, n) for name, n in zip(("num_frames", "height", "width"), s.grid, strict=False)]


def is_size(n: object, least: int) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= least


def check_options(
    config: TransformerConfig,
    video: StreamArguments,
    fps: float,
    blocks: list[int] | None,
    perturbation_mask: Tensor | None,
    guided: bool,
) -> None:
    if not isinstance(fps, (int, float)):
        raise TypeError(f"fps: expected a number, got {type(fps).__name__}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps: expected a positive, finite number, got {fps}")
    if blocks is not None and not isinstance(blocks, (list, tuple)):
        raise TypeError(f"spatio_temporal_guidance_blocks: expected a list, got {type(blocks).__name__}")
    if not all(isinstance(i, int) and 0 <= i < config.num_layers for i in blocks or ()):
        raise ValueError(f"spatio_temporal_guidance_blocks: {blocks} are not in 0..{config.num_layers - 1}")
    if perturbation_mask is not None:
        expect("perturbation_mask", perturbation_mask, (len(video.latent),), (len(video.latent), 1, 1))
    for name, given, effective in (
        ("spatio_temporal_guidance_blocks", blocks or None, guided),
        ("video_keyframes_mask", video.keyframes, config.use_keyframes_abs_pos_embedding or video.absent),
    ):
        if given is not None and not effective and not torch.compiler.is_compiling():  # a warning breaks graphs
            warnings.warn(f"{name}: no effect on a model with this config", stacklevel=5)


def expect(name: str, x: object, *shapes: tuple[int | str, ...], dtype: torch.dtype | None = None) -> None:
    """Raise unless `x` is a tensor of one of `shapes`, in which a string stands for any size but 0, and of `dtype`.

    Under autocast it may also have the dtype to which autocast would cast it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not any(fits(x, shape) for shape in shapes):
        expected = " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
        empty = ", not empty" if 0 in x.shape and not any(0 in shape for shape in shapes) else ""
        empty += f" ({LEFT_OUT})" if empty and x.shape[0] and any(len(shape) == x.ndim for shape in shapes) else ""
        raise ValueError(f"{name}: expected shape {expected}{empty}, got {tuple(x.shape)}")
    if dtype is not None and x.dtype not in (dtype, dtype_of_linears(dtype, x.device)):
        raise ValueError(f"{name}: expected {dtype}, the model's dtype, got {x.dtype}")


def dtype_of_linears(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which the linear layers of a model compute: its own, or autocast's, which leaves float64."""
    kind = device.type
    if dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return dtype
    return torch.get_autocast_dtype(kind)


def fits(x: Tensor, shape: tuple[int | str, ...]) -> bool:
    return len(shape) == x.ndim and all(
        n > 0 if isinstance(m, str) else m == n for m, n in zip(shape, x.shape, strict=True)
    )
