"""Sinusoids and RoPE tables, made again with one mistake: from noise levels, coordinates and the configuration."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import TransformerConfig
from ...embeddings import sinusoid
from ...rope import audio_positions, rotation, video_positions
from ..judge import norm
from .evidence import Evidence, Guess, gap, mistaken, name_of, rounding

# Noise levels: the sinusoid of another one.


def scaled_timestep(e: Evidence) -> str | None:
    config = e.config or TransformerConfig()
    multipliers = {1000.0, config.timestep_scale_multiplier, config.cross_attn_timestep_scale_multiplier}
    factors = sorted({y for x in (*multipliers, gate_factor(e)) for y in (x, 1 / x)})
    found = by_level(e, lambda name, x: ((name, x), *((f"{name} * {factor:g}", x * factor) for factor in factors)))
    return None if found is None else f"{found}: a timestep multiplier applied twice, or not at all"


def rounded_timestep(e: Evidence) -> str | None:
    return by_level(
        e,
        lambda name, x: (
            (name, x),
            (f"{name} in bfloat16", x.bfloat16()),
            (f"{name} in float16", x.half()),
            (f"{name} as the nearest integer", x.round()),
            (f"{name} as an integer, cut,", x.floor()),
        ),
    )


def other_noise_level(e: Evidence) -> str | None:
    """Or one for all tokens."""
    levels = noise_levels(e)
    reduced = (guess for name, x in levels.items() for guess in reductions(name, x))
    ways = [(name, x) for name, x in (*levels.items(), *reduced) if fits(e, x)]
    found = mistaken(e, lambda e: ((name, sines(e, x)) for name, x in ways))
    return None if found is None else f"the noise level {found}"


def other_sinusoid(e: Evidence) -> str | None:
    """Other embedders have the options `flip_sin_to_cos` and `downscale_freq_shift`."""

    def ways(level: Tensor) -> Iterator[Guess]:
        phases = level.double()[..., None] * 10_000 ** -(torch.arange(128, dtype=torch.float64) / 127)
        yield "", sines(e, level)
        yield "sines before cosines", sines(e, level).roll(128, -1)
        yield "frequencies of i / 127, not i / 128", torch.cat([phases.cos(), phases.sin()], -1).expand_as(e.reference)

    found = (mistaken(e, lambda e, x=x: ways(x)) for x in noise_levels(e).values() if fits(e, x))  # type: ignore[misc]
    return next((what for what in found if what), None)


def by_level(e: Evidence, ways: Callable[[str, Tensor], Iterable[Guess]]) -> str | None:
    """The first mistake that has the right noise level, changed."""
    found = (
        mistaken(
            e,
            lambda e, name=name, x=x: (  # type: ignore[misc]
                (what, sines(e, level)) for what, level in ways(name, x)
            ),
        )
        for name, x in noise_levels(e).items()
        if fits(e, x)
    )
    return next((what for what in found if what), None)


def noise_levels(e: Evidence) -> dict[str, Tensor]:
    """(B, 1|T) each, as the embedder of this tap takes them; equal ones have both names."""
    if not e.inputs or not e.name.endswith(".sinusoid"):
        return {}
    levels: dict[str, Tensor] = {}
    for name in ("timestep", "audio_timestep", "sigma", "audio_sigma"):
        if e.inputs.get(name) is not None:
            x = e.inputs[name].reshape(len(e.inputs[name]), -1) * gate_factor(e)
            same = next((other for other, y in levels.items() if torch.equal(x, y)), None)
            levels[name if same is None else f"{same} (= {name})"] = x if same is None else levels.pop(same)
    return levels


def reductions(name: str, levels: Tensor) -> Iterator[Guess]:
    if levels.shape[1] > 1:
        yield f"mean of {name}", levels.mean(1, keepdim=True)
        yield f"maximum of {name}", levels.amax(1, keepdim=True)
        yield f"minimum of {name}", levels.amin(1, keepdim=True)
        yield f"{name} of the first token", levels[:, :1]
        yield f"{name} of the last token", levels[:, -1:]


def fits(e: Evidence, level: Tensor) -> bool:
    return len(level) == len(e.reference) and level.shape[1] in (1, e.reference.shape[1])


def gate_factor(e: Evidence) -> float:
    if e.config is None or "gate" not in e.name:
        return 1.0
    return e.config.cross_attn_timestep_scale_multiplier / e.config.timestep_scale_multiplier


def sines(e: Evidence, level: Tensor) -> Tensor:
    return sinusoid(level, torch.float32).to(e.reference.dtype).expand_as(e.reference)


# Positions and RoPE tables.

STREAMS = {"rope": "video", "audio_rope": "audio", "cross_attn_rope": "video", "cross_attn_audio_rope": "audio"}


class Table(NamedTuple):
    """The arguments of `rope.rotation`."""

    coords: Tensor
    max_position: tuple[int, ...]
    dim: int
    config: TransformerConfig

    def make(self, e: Evidence) -> Tensor:
        made = rotation(*self, torch.promote_types(e.reference.dtype, torch.float32))
        return made[e.name.endswith(".sin")].expand_as(e.reference)

    def moved(self, coords: Tensor) -> "Table":
        return self._replace(coords=coords[:, : len(self.max_position)])


def wrong_positions(e: Evidence) -> str | None:
    stream = e.name.removesuffix("_coords") if e.name.endswith("_coords") else STREAMS.get(e.name[:-4], "")
    coords, table = coordinates(e, stream), own_table(e)
    if coords is None:
        return None
    changed = [("", coords), *misplaced(e, stream, coords)]
    if table is not None:
        return mistaken(e, lambda e: ((what, table.moved(x).make(e)) for what, x in changed))
    return mistaken(
        e, lambda e: ((what, x.movedim(2, 1).expand_as(e.reference)) for what, x in changed if x.ndim == coords.ndim)
    )


def wrong_frequencies(e: Evidence) -> str | None:
    table = own_table(e)
    return (
        None
        if table is None
        else mistaken(e, lambda e: ((what, x.make(e)) for what, x in (("", table), *mistuned(table))))
    )


def misplaced(e: Evidence, stream: str, coords: Tensor) -> Iterator[Guess]:
    """Coordinates (B, P, T, 2), or positions (B, P, T), with one mistake each."""
    for dtype in (torch.bfloat16, torch.float16):  # later arithmetic in that dtype, too, or in float32
        yield f"positions rounded to {name_of(dtype)}", coords.to(dtype)
        yield f"positions rounded to {name_of(dtype)}", coords.to(dtype).to(coords.dtype)
    if coords.ndim == 4:
        yield "the start of each patch in place of its middle", coords[..., 0]
        yield "the end of each patch in place of its middle", coords[..., 1]
    if stream == "video":
        fps = (e.inputs or {}).get("fps", 24.0)
        yield "height and width swapped", coords[:, [0, 2, 1]]
        yield f"24 frames per second in place of {fps:g}", in_time(coords, fps / 24)
        yield "time in frames in place of seconds", in_time(coords, fps)
        if e.config is not None:
            frames = e.config.vae_scale_factors[0]
            yield "a largest position of 20 latent frames in place of 20 seconds", in_time(coords, fps / frames)
    yield from regridded(e, stream)


def regridded(e: Evidence, stream: str) -> Iterator[Guess]:
    """Those that are not computed from other coordinates."""
    if not e.inputs or e.config is None or e.inputs.get(stream + "_coords") is not None:
        return
    scale = e.config.vae_scale_factors
    per_latent = scale[0] if stream == "video" else e.config.audio_scale_factor
    yield (
        "time in latent frames in place of seconds",
        gridded(
            e,
            stream,
            replace(
                e.config,
                vae_scale_factors=(1, *scale[1:]),
                audio_scale_factor=1,
                audio_hop_length=1,
                audio_sampling_rate=1,
                causal_offset=1,
            ),
            1.0,
        ),
    )
    for offset, what in ((0, "no causal offset"), (per_latent, "a first latent frame as long as all others")):
        yield what, gridded(e, stream, replace(e.config, causal_offset=offset), e.inputs.get("fps", 24.0))


def gridded(e: Evidence, stream: str, config: TransformerConfig, fps: float) -> Tensor:
    assert e.inputs is not None
    like, x = torch.empty(0), e.inputs
    if stream == "audio":
        return audio_positions((x["audio_num_frames"],), config, like)
    return video_positions((x["num_frames"], x["height"], x["width"]), fps, config, like)


def mistuned(table: Table) -> Iterator[tuple[str, Table]]:
    config, coords = table.config, table.coords
    middle = coords.mean(-1) if coords.ndim == 4 else coords
    largest = torch.tensor(table.max_position, dtype=middle.dtype)[:, None]
    made_in = "float32" if config.rope_double_precision else "float64"
    yield (
        f"frequencies computed in {made_in}",
        table._replace(config=replace(config, rope_double_precision=not config.rope_double_precision)),
    )
    yield "positions from 0 to 1 in place of -1 to 1", table._replace(coords=(middle + largest) / 2)
    yield (
        "frequencies without the factor pi / 2",
        table._replace(coords=((middle / largest * 2 - 1) * 2 / pi + 1) / 2 * largest),
    )


def own_table(e: Evidence) -> Table | None:
    kind = e.name.rpartition(".")[0]
    coords = coordinates(e, STREAMS.get(kind, ""))
    if e.config is None or coords is None or kind not in STREAMS:
        return None
    stream = e.config.video if kind == "rope" else e.config.audio  # the exchange is as wide as audio
    return Table(coords, stream.max_position, stream.dim, e.config).moved(coords)


def coordinates(e: Evidence, stream: str) -> Tensor | None:
    """The reference's."""
    name = stream + "_coords"
    if e.name == name:
        return e.reference.movedim(1, 2)
    if name in e.reference_taps or not stream:
        return e.reference_taps.get(name)
    if not e.inputs or e.inputs.get(name) is not None or e.config is None:
        return (e.inputs or {}).get(name)
    return gridded(e, stream, e.config, e.inputs.get("fps", 24.0))


def in_time(coords: Tensor, factor: float) -> Tensor:
    factors = torch.tensor([factor, 1, 1], dtype=coords.dtype)[: coords.shape[1]]
    return coords * factors.reshape(-1, *[1] * (coords.ndim - 2))


# Rounding of angles.


def float32_angles(e: Evidence) -> str | None:
    """What a relative error of the angles makes of the table: large in every column as the angles are large."""
    table = own_table(e)
    if table is None:
        return None
    # theta ** x magnifies the rounding of x by ln(theta); a second rounding is that of the product.
    error = (1 + log(table.config.rope_theta)) * 2.0**-23
    middle = table.coords.double().mean(-1) if table.coords.ndim == 4 else table.coords.double()
    center = torch.tensor(table.max_position, dtype=torch.float64)[:, None] / 2
    exact, off = (
        rotation(center + (middle - center) * factor, *table[1:], torch.float64)[e.name.endswith(".sin")]
        for factor in (1.0, 1 + error)
    )
    columns = [
        torch.linalg.vector_norm(x, dim=(0, 1))
        for x in (e.candidate.double() - e.reference.double(), (off - exact).expand_as(e.reference))
    ]
    own = rounding(e._replace(name="", truth=None)) * norm(e.reference)
    if gap(e.candidate, e.reference) <= own or not (columns[0] <= columns[1] + own / columns[0].numel()).all():
        return None
    return f"angles or frequencies computed in float32: off by up to {error:.1e} of the angle"
