"""Stages of a block, made again with one mistake: from the taps before them, the configuration and the inputs."""

import re
from collections.abc import Iterable, Iterator
from itertools import permutations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...attention import attention_bias, text_mask
from ...modulation import EPS, modulate, rms_norm
from ...rope import PLANES, Rope, apply_rope
from .evidence import (
    NONE,
    OTHER,
    SHARE,
    Evidence,
    Guess,
    gap,
    given,
    is_audio,
    kwargs,
    mistaken,
    name_of,
    split,
    unflat,
)

NARROW = torch.bfloat16, torch.float16

# Rotation and attention.

ROTATED = {
    "attn1": ("rope", "rope"),
    "audio_attn1": ("audio_rope", "audio_rope"),  # of queries and of keys
    "audio_to_video_attn": ("cross_attn_rope", "cross_attn_audio_rope"),
    "video_to_audio_attn": ("cross_attn_audio_rope", "cross_attn_rope"),
}


def wrong_rotation(e: Evidence) -> str | None:
    return mistaken(e, rotations)


def rotations(e: Evidence) -> Iterator[Guess]:
    block, layer, part = split(e.name)
    if part not in ("q", "k") or layer not in ROTATED:
        return
    x, table = given(e, f"{block}{layer}.norm_{part}"), ROTATED[layer][part == "k"]
    cos, sin = (given(e, table + end) for end in (".cos", ".sin"))
    if x is None or cos is None or sin is None:
        return
    x = x.unflatten(-1, (cos.shape[2], -1))
    for layout in PLANES:
        yield f"the {layout} rotation", apply_rope(x, (cos, sin), layout)
        yield f"the {layout} rotation the other way", apply_rope(x, (cos, -sin), layout)
        for dtype in NARROW:
            c, s = cos.to(dtype), sin.to(dtype)
            yield f"the {layout} rotation, computed in {name_of(dtype)},", rotate_as_given(x.to(dtype), (c, s), layout)
            yield (
                f"the {layout} rotation with cosines and sines in {name_of(dtype)}",
                apply_rope(x, (c.to(cos), s.to(sin)), layout),
            )


def rotate_as_given(x: Tensor, rope: Rope, layout: str) -> Tensor:
    """`rope.apply_rope` without its float32."""
    (cos, sin), (shape, axis) = rope, PLANES[layout]
    a, b = x.unflatten(-1, shape).unbind(axis)
    if layout == "split":
        rotated = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    else:
        rotated = a * cos - b * sin, b * cos + a * sin
    return torch.stack(rotated, dim=axis).flatten(-2)


def wrong_attention(e: Evidence) -> str | None:
    return mistaken(e, attentions)


def attentions(e: Evidence) -> Iterator[Guess]:
    block, layer, part = split(e.name)
    q, k, v = (given(e, f"{block}{layer}.{name}") for name in ("q", "k", "to_v"))
    if part != "sdpa" or q is None or k is None or v is None:
        return
    heads, own = (q, k, v.unflatten(-1, k.shape[2:])), None
    for what, mask in attention_masks(e, layer):
        own = mask if not what else own
        yield what, attend(heads, mask)
    yield "logits that are not scaled by 1 / sqrt(head_dim)", attend(heads, own, 1.0)
    yield "logits scaled by 1 / head_dim, twice by its root", attend(heads, own, 1 / q.shape[-1])
    for dtype in NARROW:
        if q.dtype != dtype:
            yield f"attention in {name_of(dtype)}", attend([x.to(dtype) for x in heads], own)


def attend(heads: Iterable[Tensor], mask: Tensor | None, scale: float | None = None) -> Tensor:
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in heads)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return rearrange(out, "b h t d -> b t h d")


def attention_masks(e: Evidence, layer: str) -> Iterator[tuple[str, Tensor | None]]:
    """Of this attention, (B, 1, 1|T, S), and what ports make of them."""
    x, dtype = e.inputs or {}, e.reference.dtype
    masks = {
        "attn1": kwargs(e).get("video_self_attention_mask"),
        "attn2": x.get("encoder_attention_mask"),
        "audio_attn2": x.get("audio_encoder_attention_mask"),
    }
    mask, other = masks.get(layer), masks.get({"attn2": "audio_attn2", "audio_attn2": "attn2"}.get(layer, ""))
    if mask is None:
        yield "", None
        return
    yield "", attention_bias(mask, dtype)[:, None] if layer == "attn1" else text_mask(mask, dtype)
    yield "a mask that is ignored", None
    if mask.ndim == 2 or layer == "attn1" or mask.dtype == torch.bool:  # not a bias
        keep = rearrange(mask.to(dtype), "b s -> b 1 1 s" if mask.ndim == 2 else "b t s -> b 1 t s")
        yield "a mask whose ones and zeros are added to the logits", keep
        yield "a mask that keeps what it should mask", attention_bias(1 - keep, dtype)
    if other is not None and other.ndim == 2 and other.shape[1] == mask.shape[-1]:
        yield "the mask of the other stream's text", text_mask(other, dtype)


def wrong_projection(e: Evidence) -> str | None:
    """The weights of `to_out` are inferred from what the reference gave it, and what it made of that."""
    ours, theirs = joined(e._replace(candidate_taps=NONE)), joined(e)
    out = e.reference.flatten(0, 1).double()
    # With as many unknowns as tokens, any output is a linear function of any input.
    fits = ((own, torch.linalg.lstsq(x, out).solution) for own, x in ours.items() if len(x) >= 2 * x.shape[1])
    far = SHARE * gap(e.reference, e.candidate)
    own, weights = next(((own, w) for own, w in fits if gap(ours[own] @ w, out) < far), ("", None))
    if weights is None:
        return None
    guesses, given_out = {what: x @ weights for what, x in theirs.items()}, e.candidate.flatten(0, 1)
    return next(
        (
            f"{what} in place of {own}"
            for what, x in guesses.items()
            if gap(x, given_out) < SHARE * gap(guesses[own], given_out)
        ),
        None,
    )


def joined(e: Evidence) -> dict[str, Tensor]:
    """What an attention's last layer can be given, (B * T, H * d), and a one for its bias."""
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
    """Of a modulated input: which rows are its scale and shift, and how they are applied."""
    found = mistaken(e, modulations)
    pairs = re.findall(r"(\S+)\[(\d), (\d)\]", found or "")
    swapped = len(pairs) == 2 and pairs[0] == (pairs[1][0], pairs[1][2], pairs[1][1])
    return f"scale and shift swapped: {found}" if swapped else found


def modulations(e: Evidence) -> Iterator[Guess]:
    x, h = modulated(e)
    if x is None or h is None:
        return
    pairs = row_pairs(e, x)
    for which, (scale, shift) in pairs.items():
        yield f"scale, shift = {which}", modulate(h, scale, shift)
    yield "no modulation", h
    for which, (scale, shift) in pairs.items():
        yield f"x * scale, without 1 + scale, of scale, shift = {which}", h * scale + shift
        yield f"no norm before scale, shift = {which}", modulate(x, scale, shift)
        yield (
            f"LayerNorm before scale, shift = {which}",
            modulate(F.layer_norm(x, x.shape[-1:], eps=EPS), scale, shift),
        )


def modulated(e: Evidence) -> tuple[Tensor | None, Tensor | None]:
    """What a sub-layer's input or context was before its norm, if it has one, and after it."""
    block, layer, part = split(e.name)
    if layer.endswith("attn2") and part == "context":
        prefix = "audio_" if is_audio(e.name) else ""
        text = given(e, prefix + "caption_projection")
        text = (e.inputs or {}).get(prefix + "encoder_hidden_states") if text is None else text
        return text, text
    source = layer if part == "input" else OTHER.get(layer, "") if part == "context" else ""
    x = given(e, f"{block}{source}.stream")
    return x, None if x is None else rms_norm(x)


def sequential_exchange(e: Evidence) -> str | None:
    return mistaken(e, heard)


def heard(e: Evidence) -> Iterator[Guess]:
    """The keys and values of an exchange: the other stream before it, or after it has itself listened."""
    block, layer, part = split(e.name)
    other = block + OTHER.get(layer, "")
    x, out, gates = (given(e, f"{other}.{name}") for name in ("stream", "to_out", "rows"))
    rows = given(e, f"{block}{layer}.context_rows")
    if part != "context" or x is None or out is None or gates is None or rows is None:
        return
    after = x + unflat(gates, len(x))[:, :, 2] * out
    scale, shift = unflat(rows, len(x)).unbind(2)
    yield "the other stream before the exchange", modulate(rms_norm(x), scale, shift)
    yield "the other stream after it has listened itself", modulate(rms_norm(after), scale, shift)


def wrong_residual(e: Evidence) -> str | None:
    return mistaken(e, residuals)


def residuals(e: Evidence) -> Iterator[Guess]:
    """x + gate * out, of the sub-layer before."""
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
    """Two rows (B, T|1, D) of one tap each."""
    return {
        f"{name}[{i}, {j}]": (rows[:, :, i], rows[:, :, j])
        for name, rows in tables(e, x).items()
        for i, j in permutations(range(rows.shape[2]), 2)
    }


def tables(e: Evidence, x: Tensor) -> dict[str, Tensor]:
    """All rows (B, T|1, K, D) that this block has for a stream like x; those of this sub-layer first."""
    block, layer, part = split(e.name)
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
    """The name of the one whose result this residual is; '' for other taps."""
    block, layer, part = split(e.name)
    if part in ("video", "audio"):
        return f"{block}{layer}.{'ff' if part == 'video' else 'audio_ff'}"
    chain = VIDEO_CHAIN if layer in VIDEO_CHAIN else AUDIO_CHAIN if layer in AUDIO_CHAIN else (layer,)
    there = [name for name in chain[: chain.index(layer)] if given(e, f"{block}{name}.stream") is not None]
    return block + there[-1] if there and part == "stream" else ""


VIDEO_CHAIN = ("attn1", "attn2", "audio_to_video_attn", "ff")
AUDIO_CHAIN = ("audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff")


# Activations and norms.


def other_activation(e: Evidence) -> str | None:
    return mistaken(e, activations)


def activations(e: Evidence) -> Iterator[Guess]:
    x = given(e, e.name.replace(".activation", ".proj"))
    if x is not None and e.name.endswith(".activation"):
        yield "the GELU by tanh", F.gelu(x, approximate="tanh")
        yield "the exact GELU (erf)", F.gelu(x)
        yield "x * sigmoid(1.702 * x)", x * (1.702 * x).sigmoid()
        yield "SiLU", F.silu(x)
        yield "ReLU", F.relu(x)


def wrong_norm(e: Evidence) -> str | None:
    return mistaken(e, last_norms)


def last_norms(e: Evidence) -> Iterator[Guess]:
    """Of the output: LayerNorm without weights, of what the last block made."""
    end = {"norm_out": ".video", "audio_norm_out": ".audio"}.get(e.name)
    blocks = [name for name in e.reference_taps if end and name.endswith(end)]
    x = given(e, blocks[-1]) if blocks else None
    if x is None:
        return
    yield "LayerNorm", F.layer_norm(x, x.shape[-1:], eps=EPS)
    yield "RMSNorm", rms_norm(x)
    for dtype in NARROW:
        yield f"LayerNorm computed in {name_of(dtype)}", stepwise_norm(x.to(dtype))


def stepwise_norm(x: Tensor) -> Tensor:
    """LayerNorm with every step rounded to the dtype of x."""
    x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
