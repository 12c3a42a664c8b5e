"""Make known mistakes on purpose, from what the reference computed, and see whether the candidate made the same one.

There are mistakes in positions, RoPE tables, norms, and the stages of a block. Each is made from the taps before this
one, the configuration and the inputs. Those in noise levels are in levels.py.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import permutations
from math import log, pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...config import TransformerConfig
from ...embeddings import sinusoid
from ...interface import attention_bias, text_attention_mask
from ...modulation import EPS, modulate, rms_norm
from ...rope import apply_rope, audio_positions, rotate_interleaved, rotate_split, rotation, video_positions
from ...sizes import StreamSizes
from ..judge import dtype_name
from ..trace.taps import AUDIO_SUBLAYERS, VIDEO_SUBLAYERS, find_module
from ..truth import norm
from .evidence import NONE, OTHER, Evidence, unflat
from .levels import arguments, gate_factor
from .patterns import UNEXPLAINED, Guess, gap, is_rather, rounding

NARROW_DTYPES = torch.bfloat16, torch.float16
EPSILONS = 0.0, 1e-12, 1e-8, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0  # which ports have in place of 1e-6


def mistaken(e: Evidence, ways: Callable[[Evidence], Iterable[Guess]]) -> str | None:
    """Return a sentence on what the candidate does instead of what the reference does, or None if nothing fits.

    `ways` yields every known way of making this tap, right or wrong, each with a name. The reference's way is found by
    making the tap from the reference's own taps, the candidate's by making it from the candidate's, so that an error
    that the candidate has inherited is not blamed on this stage. The documented way has an empty name.
    """
    alone = e._replace(candidate_taps=NONE)
    own = next((what for what, guess in ways(alone) if is_rather(e, guess, e.reference, e.candidate)), None)
    right = next((guess.reshape(e.reference.shape) for what, guess in ways(e) if what == own), e.reference)
    found = next((what for what, guess in ways(e) if is_rather(e, guess, e.candidate, right)), None)
    if own is None or not found:
        return None
    return None if found == own else f"{found} in place of {own}" if own else found


def given(e: Evidence, name: str) -> Tensor | None:
    """Return an earlier tap, the candidate's if it has one and the reference's if not.

    With the candidate's own numbers, its earlier roundings do not count as mistakes of this stage.
    """
    ours, theirs = e.reference_taps.get(name), e.candidate_taps.get(name)
    if not isinstance(theirs, Tensor) or (ours is not None and theirs.shape != ours.shape):
        return ours
    return theirs if ours is None else theirs.to(ours)


# Sinusoids. Wrong noise levels are in levels.py.


def other_sinusoid(e: Evidence) -> str | None:
    """Recognise a sinusoid with sines before cosines, or with other frequencies.

    Other embedders do so under the options `flip_sin_to_cos` and `downscale_freq_shift`.
    """
    if not e.name.endswith(".sinusoid"):
        return None
    levels = (x * gate_factor(e) for x in arguments(e).values())
    fitting = (x for x in levels if len(x) == len(e.reference) and x.shape[1] in (1, e.reference.shape[1]))
    found = (mistaken(e, partial(sinusoids, level=x)) for x in fitting)
    return next((what for what in found if what), None)


def sinusoids(e: Evidence, level: Tensor) -> Iterator[Guess]:
    """Yield other sinusoids of a noise level."""
    phases = level.double()[..., None] * 10_000 ** -(torch.arange(128, dtype=torch.float64) / 127)
    right = sinusoid(level, torch.float32).to(e.reference.dtype).expand_as(e.reference)
    yield "", right
    yield "sines before cosines", right.roll(128, -1)
    yield "frequencies of i / 127, not i / 128", torch.cat([phases.cos(), phases.sin()], -1).expand_as(e.reference)


# Positions and RoPE tables.

TABLE_STREAMS = {"rope": "video", "audio_rope": "audio", "cross_attn_rope": "video", "cross_attn_audio_rope": "audio"}


class Table(NamedTuple):
    """The arguments of `rope.rotation`."""

    coords: Tensor
    stream: StreamSizes
    config: TransformerConfig

    def make(self, e: Evidence) -> Tensor:
        """Make the cosines or sines of this tap."""
        made = rotation(*self, torch.promote_types(e.reference.dtype, torch.float32))
        return made[e.name.endswith(".sin")].expand_as(e.reference)

    def moved(self, coords: Tensor) -> "Table":
        """Return the same table at other coordinates."""
        return self._replace(coords=coords[:, : len(self.stream.max_position)])


def wrong_positions(e: Evidence) -> str | None:
    """Recognise a mistake in positions, in the tap of coordinates or in a RoPE table."""
    stream = e.name.removesuffix("_coords") if e.name.endswith("_coords") else TABLE_STREAMS.get(e.name[:-4], "")
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
    """Recognise a RoPE table with other frequencies or another range of positions."""
    table = own_table(e)
    if table is None:
        return None
    return mistaken(e, lambda e: ((what, x.make(e)) for what, x in (("", table), *mistuned(table))))


def misplaced(e: Evidence, stream: str, coords: Tensor) -> Iterator[Guess]:
    """Yield coordinates (B, P, T, 2), or positions (B, P, T), with one mistake each."""
    for dtype in NARROW_DTYPES:  # what follows is computed in that dtype, or in float32
        yield f"positions rounded to {dtype_name(dtype)}", coords.to(dtype)
        yield f"positions rounded to {dtype_name(dtype)}", coords.to(dtype).to(coords.dtype)
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
    """Yield coordinates of the grid with one mistake each, if the reference's are made from the grid."""
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
    """Return coordinates of the forward's grid under a configuration and frame rate."""
    assert e.inputs is not None
    x = e.inputs
    if stream == "audio":
        return audio_positions(x["audio_num_frames"], config)
    return video_positions((x["num_frames"], x["height"], x["width"]), fps, config)


def mistuned(table: Table) -> Iterator[tuple[str, Table]]:
    """Yield tables with one mistake in their frequencies each."""
    config, coords = table.config, table.coords
    middle = coords.mean(-1) if coords.ndim == 4 else coords
    largest = torch.tensor(table.stream.max_position, dtype=middle.dtype)[:, None]
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
    """Return the RoPE table that this tap belongs to, or None."""
    kind = e.name.rpartition(".")[0]
    coords = coordinates(e, TABLE_STREAMS.get(kind, ""))
    if e.config is None or coords is None or kind not in TABLE_STREAMS:
        return None
    stream = e.config.video if kind == "rope" else e.config.audio  # an exchange's heads are as wide as audio's
    return Table(coords, stream, e.config).moved(coords)


def coordinates(e: Evidence, stream: str) -> Tensor | None:
    """Return the reference's coordinates of a stream, or None if they are not known."""
    name = stream + "_coords"
    if e.name == name:
        return e.reference.movedim(1, 2)
    if name in e.reference_taps or not stream:
        return e.reference_taps.get(name)
    if not e.inputs or e.inputs.get(name) is not None or e.config is None:
        return (e.inputs or {}).get(name)
    return gridded(e, stream, e.config, e.inputs.get("fps", 24.0))


def inherited_tables(stages: Mapping[str, Evidence]) -> set[str]:
    """Return which RoPE tables are right for the candidate's own coordinates, which are the cause."""
    found = set()
    for name, e in stages.items():
        table, coords = own_table(e), e.candidate_taps.get(f"{'audio' if 'audio' in name else 'video'}_coords")
        if table is not None and isinstance(coords, Tensor):
            made = table.moved(coords.to(table.coords.dtype)).make(e)
            if gap(made, e.candidate) < UNEXPLAINED * gap(e.candidate, e.reference):
                found.add(name)
    return found


def in_time(coords: Tensor, factor: float) -> Tensor:
    """Multiply the time axis by a factor."""
    factors = torch.tensor([factor, 1, 1], dtype=coords.dtype)[: coords.shape[1]]
    return coords * factors.reshape(-1, *[1] * (coords.ndim - 2))


# Rounding of angles.


def float32_angles(e: Evidence) -> str | None:
    """Recognise angles that were computed in float32.

    A relative error of the angles changes each column of a RoPE table in proportion to that column's angles.
    """
    table = own_table(e)
    if table is None or (e.truth is not None and gap(e.candidate, e.truth) < gap(e.reference, e.truth)):
        return None  # positions in float64, or by a reciprocal that happens to be exact
    # theta ** x multiplies the rounding error of x by ln(theta); the product with the position rounds once more.
    error = (1 + log(table.config.rope_theta)) * 2.0**-23
    middle = table.coords.double().mean(-1) if table.coords.ndim == 4 else table.coords.double()
    center = torch.tensor(table.stream.max_position, dtype=torch.float64)[:, None] / 2
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


# Rotation and attention.

# Attention: the RoPE tables of its queries and of its keys.
ROTATED = {
    "attn1": ("rope", "rope"),
    "audio_attn1": ("audio_rope", "audio_rope"),
    "audio_to_video_attn": ("cross_attn_rope", "cross_attn_audio_rope"),
    "video_to_audio_attn": ("cross_attn_audio_rope", "cross_attn_rope"),
}


def wrong_rotation(e: Evidence) -> str | None:
    """Recognise queries or keys that were rotated in another way."""
    return mistaken(e, rotations)


def rotations(e: Evidence) -> Iterator[Guess]:
    """Yield rotated queries or keys: both layouts, both directions, and narrow dtypes."""
    block, layer, part = e.block, e.layer, e.part
    if part not in ("q", "k") or layer not in ROTATED:
        return
    x, table = given(e, f"{block}{layer}.norm_{part}"), ROTATED[layer][part == "k"]
    cos, sin = (given(e, table + end) for end in (".cos", ".sin"))
    if x is None or cos is None or sin is None:
        return
    x = x.unflatten(-1, (cos.shape[2], -1))
    for layout, rotate in (("split", rotate_split), ("interleaved", rotate_interleaved)):
        yield f"the {layout} rotation", apply_rope(x, (cos, sin), layout)
        yield f"the {layout} rotation the other way", apply_rope(x, (cos, -sin), layout)
        for dtype in NARROW_DTYPES:
            c, s = cos.to(dtype), sin.to(dtype)
            yield f"the {layout} rotation, computed in {dtype_name(dtype)},", rotate(x.to(dtype), c, s)
            yield (
                f"the {layout} rotation with cosines and sines in {dtype_name(dtype)}",
                apply_rope(x, (c.to(cos), s.to(sin)), layout),
            )


def wrong_attention(e: Evidence) -> str | None:
    """Recognise attention with another mask, scale or dtype."""
    return mistaken(e, attentions)


def attentions(e: Evidence) -> Iterator[Guess]:
    """Yield the result of attention with each mask, scale and dtype that ports use."""
    block, layer, part = e.block, e.layer, e.part
    q, k, v = (given(e, f"{block}{layer}.{name}") for name in ("q", "k", "to_v"))
    if part != "sdpa" or q is None or k is None or v is None:
        return
    heads, own = (q, k, v.unflatten(-1, k.shape[2:])), None
    for what, mask in guessed_masks(e, layer):
        own = mask if not what else own
        yield what, attended(heads, mask)
    yield "logits that are not scaled by 1 / sqrt(head_dim)", attended(heads, own, 1.0)
    yield "logits scaled by 1 / head_dim: 1 / sqrt(head_dim) applied twice", attended(heads, own, 1 / q.shape[-1])
    for dtype in NARROW_DTYPES:
        if q.dtype != dtype:
            yield f"attention in {dtype_name(dtype)}", attended([x.to(dtype) for x in heads], own)


def attended(heads: Iterable[Tensor], mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Return attention (B, T, H, d) of queries, keys and values in this shape."""
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in heads)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return rearrange(out, "b h t d -> b t h d")


def mask_of(e: Evidence, layer: str) -> Tensor | None:
    """Return the mask that the forward was given for this attention, or None."""
    x = e.inputs or {}
    return {
        "attn1": e.kwargs.get("video_self_attention_mask"),
        "attn2": x.get("encoder_attention_mask"),
        "audio_attn2": x.get("audio_encoder_attention_mask"),
    }.get(layer)


def guessed_masks(e: Evidence, layer: str) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the mask of this attention, (B, 1, 1|T, S), and what ports make of it."""
    dtype = e.reference.dtype
    mask, other = mask_of(e, layer), mask_of(e, {"attn2": "audio_attn2", "audio_attn2": "attn2"}.get(layer, ""))
    if mask is None:
        yield "", None
        return
    yield "", attention_bias(mask, dtype)[:, None] if layer == "attn1" else text_attention_mask(mask, dtype)
    yield "a mask that is ignored", None
    if mask.ndim == 2 or layer == "attn1" or mask.dtype == torch.bool:  # not a bias
        keep = rearrange(mask.to(dtype), "b s -> b 1 1 s" if mask.ndim == 2 else "b t s -> b 1 t s")
        yield "a mask whose ones and zeros are added to the logits", keep
        yield "a mask that keeps what it should mask", attention_bias(1 - keep, dtype)
    if other is not None and other.ndim == 2 and other.shape[1] == mask.shape[-1]:
        yield "the mask of the other stream's text", text_attention_mask(other, dtype)


def wrong_projection(e: Evidence) -> str | None:
    """Recognise the output projection of an attention applied to another input.

    The weights of `to_out` are not known here. They are fitted to what the reference gave the layer and what came out.
    """
    ours, theirs = joined(e._replace(candidate_taps=NONE)), joined(e)
    if not all(x.isfinite().all() for x in (e.candidate, *ours.values(), *theirs.values())):
        return None
    out = e.reference.flatten(0, 1).double()
    # With as many unknowns as tokens, any output is a linear function of any input.
    fits = ((own, torch.linalg.lstsq(x, out).solution) for own, x in ours.items() if len(x) >= 2 * x.shape[1])
    far = UNEXPLAINED * gap(e.reference, e.candidate)
    own, weights = next(((own, w) for own, w in fits if gap(ours[own] @ w, out) < far), ("", None))
    if weights is None:
        return None
    guesses, given_out = {what: x @ weights for what, x in theirs.items()}, e.candidate.flatten(0, 1)
    return next(
        (
            f"{what} in place of {own}"
            for what, x in guesses.items()
            if gap(x, given_out) < UNEXPLAINED * gap(guesses[own], given_out)
        ),
        None,
    )


def joined(e: Evidence) -> dict[str, Tensor]:
    """Return the inputs that an attention's last layer could have, (B * T, H * d), with a one for its bias."""
    layer, _, part = e.name.rpartition(".")
    out, v, gate = (given(e, f"{layer}.{name}") for name in ("sdpa", "to_v", "gate"))
    keep = (e.inputs or {}).get("perturbation_mask")
    if part != "to_out" or out is None or v is None:
        return {}
    sums = {"attention": out}
    if layer.endswith("attn1"):
        sums["values"] = v.unflatten(-1, out.shape[2:])
    if layer.endswith("attn1") and keep is not None:
        sums["blended values"] = torch.lerp(sums["values"], out, keep.reshape(-1, 1, 1, 1).to(out.dtype))
    gates: dict[str, Tensor | float] = (
        {"without a gate": 1.0}
        if gate is None
        else {"with the gate": gate[..., None], "without the gate": 1.0, "with half the gate": gate[..., None] / 2}
    )
    forms = {f"{what} {how}": x * g for how, g in gates.items() for what, x in sums.items()}
    dealt = {f"{what}, heads joined as (d h),": rearrange(x, "b t h d -> b t (d h)") for what, x in forms.items()}
    forms = {what: x.flatten(2) for what, x in forms.items()} | dealt
    return {what: F.pad(x.flatten(0, 1).double(), (0, 1), value=1.0) for what, x in forms.items()}


# Modulation, residuals and the exchange.


def wrong_rows(e: Evidence) -> str | None:
    """Recognise a modulated input made with other rows as scale and shift, or applied in another way."""
    found = mistaken(e, modulations)
    pairs = re.findall(r"(\S+)\[(\d), (\d)\]", found or "")
    swapped = len(pairs) == 2 and pairs[0] == (pairs[1][0], pairs[1][2], pairs[1][1])
    return f"scale and shift swapped: {found}" if swapped else found


def modulations(e: Evidence) -> Iterator[Guess]:
    """Yield the modulated input for each pair of rows, and for each way of applying them."""
    x, h = modulated(e)
    if x is None or h is None:
        return
    pairs = row_pairs(e, x)
    for which, (scale, shift) in pairs.items():
        yield f"scale, shift = {which}", modulate(h, shift, scale)
    yield "no modulation", h
    for which, (scale, shift) in pairs.items():
        yield f"x * scale, not x * (1 + scale), with scale, shift = {which}", h * scale + shift
        yield f"no norm before scale, shift = {which}", modulate(x, shift, scale)
        yield (
            f"LayerNorm before scale, shift = {which}",
            modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), shift, scale),
        )


def modulated(e: Evidence) -> tuple[Tensor | None, Tensor | None]:
    """Return the input or context of a sub-layer before and after its norm.

    The context of text attention has no norm: then both are the same.
    """
    block, layer, part = e.block, e.layer, e.part
    if layer.endswith("attn2") and part == "context":
        prefix = "audio_" if e.audio else ""
        text = given(e, prefix + "caption_projection")
        text = (e.inputs or {}).get(prefix + "encoder_hidden_states") if text is None else text
        return text, text
    source = layer if part == "input" else OTHER.get(layer, "") if part == "context" else ""
    x = given(e, f"{block}{source}.stream")
    return x, None if x is None else rms_norm(x)


def sequential_exchange(e: Evidence) -> str | None:
    """Recognise an exchange whose second direction sees the result of the first."""
    return mistaken(e, heard)


def heard(e: Evidence) -> Iterator[Guess]:
    """Yield the context of an exchange from the other stream before it, and after its own change."""
    block, layer, part = e.block, e.layer, e.part
    other = block + OTHER.get(layer, "")
    x, out, gates = (given(e, f"{other}.{name}") for name in ("stream", "to_out", "rows"))
    rows = given(e, f"{block}{layer}.context_rows")
    if part != "context" or x is None or out is None or gates is None or rows is None:
        return
    after = x + unflat(gates, len(x))[:, :, 2] * out
    scale, shift = unflat(rows, len(x)).unbind(2)
    yield "the other stream before the exchange", modulate(rms_norm(x), shift, scale)
    yield "the other stream after the exchange", modulate(rms_norm(after), shift, scale)


def wrong_residual(e: Evidence) -> str | None:
    """Recognise a residual sum with another gate or none, or without the residual."""
    return mistaken(e, residuals)


def residuals(e: Evidence) -> Iterator[Guess]:
    """Yield x + gate * out of the previous sub-layer, for every row as the gate and for none."""
    before = sublayer_before(e)
    x, out = given(e, before + ".stream"), given(e, before + (".output" if before.endswith("ff") else ".to_out"))
    if x is None or out is None:
        return
    yield "a residual without a gate", x + out
    yield "no residual, and no gate", out
    for name, rows in tables(e, x).items():
        for i, gate in enumerate(rows.unbind(2)):
            yield f"gate = {name}[{i}]", x + gate * out
            yield f"no residual, and gate = {name}[{i}]", gate * out


def row_pairs(e: Evidence, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each pair of rows, (B, T|1, D) each, that come from one tap."""
    return {
        f"{name}[{i}, {j}]": (rows[:, :, i], rows[:, :, j])
        for name, rows in tables(e, x).items()
        for i, j in permutations(range(rows.shape[2]), 2)
    }


def tables(e: Evidence, x: Tensor) -> dict[str, Tensor]:
    """Return all rows (B, T|1, K, D) that this block has for a stream like x, this sub-layer's own first."""
    block, layer, part = e.block, e.layer, e.part
    block = f"{block}{layer}." if part in ("video", "audio") else block
    mine = f"{block}{layer}.{'context_' if part == 'context' else ''}rows"
    names = [name for name in e.reference_taps if name.startswith(block) and name.endswith("rows")]
    found = {name: unflat(e.reference_taps[name], len(x)) for name in sorted(names, key=lambda name: name != mine)}
    return {
        name.removeprefix(block): rows
        for name, rows in found.items()
        if rows.shape[-1] == x.shape[-1] and rows.shape[1] in (1, x.shape[1])
    }


def sublayer_before(e: Evidence) -> str:
    """Return the path of the sub-layer whose result this residual is, or an empty string for other taps."""
    block, layer, part = e.block, e.layer, e.part
    if part in ("video", "audio"):
        return f"{block}{layer}.{'ff' if part == 'video' else 'audio_ff'}"
    chain = next((x for x in (VIDEO_SUBLAYERS, AUDIO_SUBLAYERS) if layer in x), (layer,))
    there = [name for name in chain[: chain.index(layer)] if given(e, f"{block}{name}.stream") is not None]
    return block + there[-1] if there and part == "stream" else ""


# Activations and norms.


def other_activation(e: Evidence) -> str | None:
    """Recognise another activation function in a feed-forward."""
    return mistaken(e, activations)


def activations(e: Evidence) -> Iterator[Guess]:
    """Yield the activation under each function that ports use."""
    x = given(e, e.name.replace(".activation", ".proj"))
    if x is not None and e.name.endswith(".activation"):
        yield "the tanh GELU", F.gelu(x, approximate="tanh")
        yield "the exact GELU (erf)", F.gelu(x)
        yield "x * sigmoid(1.702 * x)", x * (1.702 * x).sigmoid()
        yield "SiLU", F.silu(x)
        yield "ReLU", F.relu(x)


def other_epsilon(e: Evidence) -> str | None:
    """Recognise another epsilon in a norm, or one that is added outside of the root."""
    return mistaken(e, normed)


def normed(e: Evidence) -> Iterator[Guess]:
    """Yield the result of this tap's norm under each epsilon."""
    x, after = before_norm(e)
    if x is None:
        return
    square = x.double().square().mean(-1, keepdim=True)
    yield "", after(x * (square + EPS).rsqrt())
    for eps in EPSILONS:
        yield f"an epsilon of {eps:g}", after(x * (square + eps).rsqrt())
    yield f"an epsilon of {EPS:g} outside of the root", after(x / (square.sqrt() + EPS))


def before_norm(e: Evidence) -> tuple[Tensor | None, Callable[[Tensor], Tensor]]:
    """Return what this tap's norm is given, in float64, and what makes the tap of the normalised tensor.

    A norm of queries or keys has a weight. A norm of a stream is followed by the modulation.
    """
    attention = None if e.model is None else find_module(e.model, e.block + e.layer)
    if e.part in ("norm_q", "norm_k") and attention is not None:
        keys = e.part == "norm_k"
        x = given(e, f"{e.block}{e.layer}.{'context' if keys else 'input'}")
        x = given(e, f"{e.block}{e.layer}.input") if x is None else x  # keys of a self-attention
        project, norm = getattr(attention, "to_k" if keys else "to_q"), getattr(attention, e.part)
        if x is None or project.weight.is_meta:
            return None, unchanged
        bias = None if project.bias is None else project.bias.double()
        return F.linear(x.double(), project.weight.double(), bias), lambda h: h * norm.weight.double()
    x, h = modulated(e)
    if x is None or h is None or h is x or (own := own_rows(e, x)) is None:
        return None, unchanged
    scale, shift = (row.double() for row in own)
    return x.double(), lambda h: modulate(h, shift, scale)


def own_rows(e: Evidence, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the scale and the shift of this tap, or None if it has no rows."""
    context = "context_" if e.part == "context" else ""
    rows = e.reference_taps.get(f"{e.block}{e.layer}.{context}rows")
    if rows is None:
        return None
    by_token = unflat(rows, len(x))
    first, second = by_token[:, :, 0], by_token[:, :, 1]
    return (first, second) if e.layer in OTHER else (second, first)  # rows of the exchange are (scale, shift)


def unchanged(x: Tensor) -> Tensor:
    return x


def wrong_norm(e: Evidence) -> str | None:
    """Recognise another norm, or a norm in another dtype, after the last block."""
    return mistaken(e, last_norms)


def last_norms(e: Evidence) -> Iterator[Guess]:
    """Yield the weightless norm of the last block's output, in each variant."""
    end = {"norm_out": ".video", "audio_norm_out": ".audio"}.get(e.name)
    blocks = [name for name in e.reference_taps if end and name.endswith(end)]
    x = given(e, blocks[-1]) if blocks else None
    if x is None:
        return
    yield "LayerNorm", F.layer_norm(x, x.shape[-1:], eps=EPS)
    yield "RMSNorm", rms_norm(x)
    for eps in EPSILONS:
        yield f"an epsilon of {eps:g}", F.layer_norm(x.double(), x.shape[-1:], eps=eps)
    for dtype in NARROW_DTYPES:
        yield f"LayerNorm computed in {dtype_name(dtype)}", stepwise_norm(x.to(dtype))


def stepwise_norm(x: Tensor) -> Tensor:
    """Compute LayerNorm with every step rounded to the dtype of x."""
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
