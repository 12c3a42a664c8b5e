"""Compute in float64 what both sides of a comparison are measured against, for the whole model and each stage.

The truth is the model in float64, given the same weights and inputs as the model in its own dtype. It is also given the
*phases* (RoPE cosines and sines, timestep sinusoids) of the side that is judged. RoPE angles reach 15,708 rad, where
one unit in the last place of a float32 angle moves everything after it by 1e-5, differently on each machine. That is no
error of what comes after. The phases themselves are judged against pure float64.

`isolate` runs the reference on the candidate's own taps. This tells the stage that went wrong first from the stages
that only passed the error on.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TransformerConfig
from ..interface import LTX2VideoTransformer3DModel
from ..rope import rotation
from .cases import Inputs
from .run import moved, run
from .trace.taps import ADALN_LAYERS, AUDIO_SUBLAYERS, PHASES, PROJECTED, VIDEO_SUBLAYERS, Taps

# A candidate's error may be SHARE times the reference's own error plus FLOOR times the truth's norm. See judge.py.
SHARE, FLOOR = 1.5, 4 * 2.0**-23
# How many units in the last place the float32 phase of a timestep may be off: two come from the exp, and half a unit
# from rounding the product.
PHASE_ULPS = 2.5
# How many units in the last place an angle made from a float32 frequency may be off. The linspace is off by
# one, which becomes log(10,000) = 9.2 in the power of 10,000, and the power itself is off by two. One each comes from
# pi, the middle of the patch, the fraction of the largest position, the shift to [-1, 1], and the product.
ANGLE_ULPS = math.log(10_000) + 2 + 5
ROUNDED = 0.42 * 2.0**-24  # the root mean square of a float32 rounding, relative to the rounded number
# A table's budget assumes that its reference loses at least this share of what these roundings lose on average.
LUCK = 0.6

DRAWS = 3  # how many times the phases that a candidate does not show are drawn
EMBEDDER_TAPS = (".sinusoid", ".emb", ".linear")
PER_TOKEN = (".sinusoid", ".emb", ".linear", ".rows", ".context_rows")  # taps whose first dimension is B or B * T
# The taps of each stream's residual in a block, in order: as it enters each sub-layer, and as it leaves the block.
CHAINS = tuple(
    (*(f"{layer}.stream" for layer in layers), end)
    for layers, end in ((VIDEO_SUBLAYERS, "video"), (AUDIO_SUBLAYERS, "audio"))
)


def norm(x: Tensor) -> float:
    """Return the L2 norm, computed in float64."""
    result: float = torch.linalg.vector_norm(x.double()).item()
    return result


def spread(name: str, x: Tensor, like: Any) -> Tensor:
    """Return a tap in the shape of `like`, repeating noise levels per batch element for each token.

    One implementation may have (B, ...) where the other has (B * T, ...). Other taps are returned as they are.
    """
    if name.endswith(PER_TOKEN) and tuple(x.shape[1:]) == tuple(like.shape[1:]) and like.shape[0] % len(x) == 0:
        return x.repeat_interleave(like.shape[0] // len(x), 0)
    return x


def doubled(model: LTX2VideoTransformer3DModel) -> LTX2VideoTransformer3DModel:
    """Return a copy of the model in float64."""
    return deepcopy(model).double()


def wide(inputs: Inputs) -> Inputs:
    """Return the inputs with all floating-point tensors in float64."""
    return moved(inputs, lambda x: x.double() if x.is_floating_point() else x)


def phases(taps: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the taps that are RoPE cosines and sines or timestep sinusoids."""
    return {name: x for name, x in taps.items() if name.endswith(PHASES)}


def sinusoid_bound(timestep: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how far each element of a sinusoid, (B * T, 256), may be off.

    It may be off by a few units in the last place of its float32 phase, and by one of its own. This is a bound, not a
    budget, so that it does not depend on how exact the reference's sinusoid happens to be.
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    phase = timestep.detach().cpu().double().reshape(-1, 1).abs() * frequencies
    value = torch.cat([phase.cos(), phase.sin()], -1).abs()
    return PHASE_ULPS * 2.0**-23 * torch.cat([phase, phase], -1) + torch.finfo(dtype).eps * value


def rope_tables(config: TransformerConfig, coords: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return values, slopes and sizes of each RoPE table, each (B, T, H, R) in float64.

    `coords` holds "video_coords" and "audio_coords", (B, P, T, 2) or (B, P, T), in pixels and seconds; tables whose
    coordinates are missing are left out. The slope is the derivative by the angle, as an absolute value. The size is
    that of the numbers that are rounded on the way to the angle, in radians: the root of the squares of the fraction of
    the largest position, of that fraction shifted to [-1, 1], and of the product.
    """
    video, audio = coords.get("video_coords"), coords.get("audio_coords")
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, x, stream in (
        ("rope", video, config.video),
        ("audio_rope", audio, config.audio),
        ("cross_attn_rope", None if video is None else video[:, :1], config.audio),
        ("cross_attn_audio_rope", audio, config.audio),
    ):
        if x is None:
            continue
        x, most, dim = x.double(), stream.max_position, stream.dim
        cos, sin = rotation(x, stream, config, torch.float64)
        middle = x.mean(-1) if x.ndim == 4 else x
        fraction = 2 * middle.movedim(1, -1)[..., None, :] / torch.tensor(most)  # (B, T, 1, P)
        frequencies = math.pi / 2 * config.rope_theta ** torch.linspace(0, 1, dim // (2 * len(most))).double()
        rounded = (fraction**2 + 2 * (fraction - 1) ** 2).sqrt()
        made_from = (frequencies[:, None] * rounded).flatten(2)  # flattened in the order of the rotation planes
        made_from = F.pad(made_from, (dim // 2 - made_from.shape[-1], 0))
        made_from = made_from.unflatten(-1, (config.num_attention_heads, -1))
        found |= {f"{name}.cos": (cos, sin.abs(), made_from), f"{name}.sin": (sin, cos.abs(), made_from)}
    return found


def least_lost(config: TransformerConfig, coords: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the smallest error, as an L2 norm, that the budget of each RoPE table assumes of its reference.

    A reference can lose less than that by luck, when its positions are exact in float32, and then its own error says
    nothing about what a candidate may lose. Tables of float32 frequencies have a bound instead and are left out.
    """
    tables = rope_tables(config, coords) if config.rope_double_precision else {}
    return {name: LUCK * ROUNDED * norm(slope * made_from) for name, (_, slope, made_from) in tables.items()}


class Truth:
    """A model's forward in float64.

    `pure` holds its taps with float64 phases. `bounds` holds how far phases without a budget may be off:
    sinusoids, and tables made from float32 frequencies. `least` holds the smallest error that the other tables' budgets
    assume. `deviations` are put in, as in `run`.
    """

    def __init__(
        self, model: LTX2VideoTransformer3DModel, inputs: Inputs, deviations: Mapping[str, Tensor] | None = None
    ) -> None:
        self.dtype, self.model, self.inputs = model.dtype, doubled(model), wide(inputs)
        self.deviations = dict(deviations or {})
        self.bounds: Taps = {}
        layers = {name: layer for name in ADALN_LAYERS if (layer := getattr(self.model, name)) is not None}
        hooks = [layer.register_forward_pre_hook(partial(self.bound, name)) for name, layer in layers.items()]
        self.pure = run(self.model, self.inputs, deviations=self.deviations)
        for hook in hooks:
            hook.remove()
        self.least = least_lost(model.config, self.pure)
        if not model.config.rope_double_precision:
            self.bounds |= {
                name: ANGLE_ULPS * 2.0**-23 * made_from + torch.finfo(torch.float32).eps * table.abs()
                for name, (table, _, made_from) in rope_tables(model.config, self.pure).items()
            }

    def bound(self, name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        """Keep the bound of the sinusoid that an AdaLN layer is about to use."""
        self.bounds[f"{name}.sinusoid"] = sinusoid_bound(given[0], self.dtype)

    def of(self, taps: Mapping[str, Any]) -> Taps:
        """Return every tap in float64, computed with the phases in `taps`; phases themselves are in pure float64."""
        given = phases(taps)
        taps = run(self.model, self.inputs, given, self.deviations) if given else self.pure
        return taps | phases(self.pure)

    def effect(self, added: Mapping[str, Tensor]) -> float:
        """Return how far the outputs move, relative to their L2 norms, if more deviations are put in."""
        more = carried(added)
        both = {name: self.deviations[name] + x if name in self.deviations else x for name, x in more.items()}
        return self.far(run(self.model, self.inputs, deviations=self.deviations | both))

    def far(self, moved: Mapping[str, Tensor]) -> float:
        """Return how far other outputs are from these, relative to their L2 norms."""
        outputs = PROJECTED.keys() & self.pure.keys()
        return max(norm(moved[name] - self.pure[name]) / (norm(self.pure[name]) or 1.0) for name in outputs)

    def drawn(self, name: str, reference: Tensor, seed: int) -> Tensor:
        """Draw at random a phase that a candidate could have without being wrong.

        A sinusoid is drawn within its bound, and a RoPE table within twice its budget.
        """
        noise = torch.rand(reference.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
        pure = self.pure[name]
        bound = self.bounds.get(name)
        return pure + noise * (2 * SHARE * (reference.cpu().double() - pure).abs() if bound is None else bound)


def truth(model: LTX2VideoTransformer3DModel, inputs: Inputs, reference: Mapping[str, Any]) -> Taps:
    """Return every tap of the model in float64, given the reference's phases."""
    return Truth(model, inputs).of(reference)


def unseen(truth: Truth, ours: Taps, theirs: Mapping[str, Any]) -> dict[str, float]:
    """Return how far phases that the candidate does not show can move each tap, as L2 norms.

    The figure is the largest of a few random draws within the phases' bounds.
    """
    missing = {name: x for name, x in phases(ours).items() if name not in theirs}
    if not missing:
        return {}
    draws = [
        {name: truth.drawn(name, x, seed=99 * i + j) for j, (name, x) in enumerate(missing.items())}
        for i in range(DRAWS)
    ]
    plain, drawn = truth.of(ours), [truth.of(ours | draw) for draw in draws]
    return {name: max(norm(x[name] - y) for x in drawn) for name, y in plain.items() if not name.endswith(PHASES)}


class Deviations(NamedTuple):
    """What is added to taps of the reference, in its own forward and in that in float64, so that it is wrong, too."""

    reference: Mapping[str, Tensor]
    truth: Mapping[str, Tensor]


NO_DEVIATIONS = Deviations({}, {})


def carried(added: Mapping[str, Tensor]) -> Taps:
    """Return deviations in which those of a residual go on through the rest of its block."""
    found = dict(added)
    for name, x in added.items():
        block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
        for chain in CHAINS:
            for _, later in pairwise(chain[chain.index(rest) :] if rest in chain else ()):
                at = f"transformer_blocks.{block}.{later}"
                found[at] = x + found[at] if at in found else x
    return found


class Local(NamedTuple):
    """The reference run on the candidate's own taps: in its own dtype, and in float64."""

    reference: Taps
    truth: Taps
    # Under exact arithmetic: those taps of `reference` whose bits a candidate with the same operations has, too.
    same_bits: Taps | None = None


def teacher_forced(reference: Taps, candidate: Mapping[str, Any]) -> Taps:
    """Return those taps of the candidate that the reference can go on with, in the reference's shapes."""
    taps: Taps = {
        name: spread(name, x, reference[name]).cpu()
        for name, x in candidate.items()
        if isinstance(x, Tensor) and name in reference
    }
    return {
        name: x for name, x in taps.items() if x.shape == reference[name].shape or for_each_token(name, x, reference)
    }


def for_each_token(name: str, x: Tensor, reference: Mapping[str, Tensor]) -> bool:
    """Tell whether a candidate has a noise level for each token where the reference has one for each batch element."""
    like = reference[name]
    return name.endswith(EMBEDDER_TAPS) and x.shape[1:] == like.shape[1:] and len(x) % len(like) == 0


def isolate(
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    reference_taps: Taps,
    candidate: Mapping[str, Any],
    exactly: bool = False,
    deviations: Deviations = NO_DEVIATIONS,
) -> Local:
    """Run each stage of the reference on the candidate's taps.

    Taps that the candidate lacks, or has in another shape, stay the reference's own. `exactly` says that this runs
    under exact arithmetic, where the same operations give the same bits. `deviations` are put in, as in `run`.
    """
    taps = teacher_forced(reference_taps, candidate)
    reference, true = (
        run(model, inputs, taps, deviations.reference),
        run(doubled(model), wide(inputs), taps, deviations.truth),
    )
    chains = [
        [name for part in chain if (name := f"transformer_blocks.{i}.{part}") in true]
        for i in range(len(model.transformer_blocks))
        for chain in CHAINS
    ]
    same_bits = {name: x for name, x in reference.items() if not any(name in names[1:] for names in chains)}
    for names in chains:
        step(reference, true, taps, names)
    return Local(reference, true, same_bits if exactly else None)


def step(reference: Taps, true: Taps, candidate: Taps, names: list[str]) -> None:
    """Replace each residual in `names` by the candidate's previous residual plus what the reference's sub-layer added.

    Otherwise an error in the residual stream would count against every sub-layer that follows.
    """
    plain = {name: true[name] for name in names}
    for before, name in pairwise(names):
        if before in candidate:
            true[name] = candidate[before].double() + plain[name] - plain[before]
            reference[name] = true[name] + reference[name].double() - plain[name]
