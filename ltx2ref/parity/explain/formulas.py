"""Write each stage of the model as a short formula of its operands, for operands.py to change one of them.

A formula is computed in float64 from the taps before its stage. A stage has several where there are several ways to
look at it: a norm has a result, and a mean square on the way to it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import log, pi
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...embeddings import sinusoid
from ...interface import attention_bias, text_attention_mask
from ...modulation import EPS, rms_norm
from ...rope import frequencies
from ..trace.taps import ROW_RECIPES, find_module
from .evidence import OTHER, Evidence, unflat
from .levels import arguments, gate_factor
from .mistakes import ROTATED, Table, attended, given, gridded, mask_of, modulated, own_rows, own_table, sublayer_before
from .patterns import explains

Operands = Mapping[str, Tensor]
Step = Callable[[Tensor], Tensor]


NORMS = {"norm_q": "queries", "norm_k": "keys"}
SNAP = 1e-4  # a fitted factor this near to a multiple of one half is taken for it


class Formula(NamedTuple):
    """One stage: its operands by what they are called in a sentence, and how the tap is computed from them."""

    operands: Operands
    compute: Callable[[Operands], Tensor]
    others: Mapping[str, Operands] = MappingProxyType({})  # other operands than the right ones, in words
    law: Callable[[Tensor], str | None] | None = None  # what the candidate's numbers follow instead, in words


def formulas(e: Evidence) -> Iterator[Formula]:
    """Yield the formulas of a tap, one for each step on the way to it; none if it needs a tap that is not there."""
    for kind in (
        modulated_stage,
        residual,
        projected_attention,
        rotated,
        attention,
        activation,
        linear_layer,
        normalised_heads,
        embedding,
        noise_sinusoid,
        coordinates_of_patches,
        table_of_rope,
    ):
        yield from kind(e)


# ---------------------------------------------------------------- the stages
class Modulation(NamedTuple):
    """What a modulated stage is made of."""

    before: Tensor | None  # the stream before its norm; None if there is no norm, or if it is a stage of its own
    normalised: Tensor
    rows: Tensor  # (B, T|1, 2, D): scale and shift
    table: Tensor | None  # (2, D): the learned part of them


def modulation_of(e: Evidence) -> Modulation | None:
    """Return what a modulated stage is made of, in float64, or None for other stages."""
    if e.part not in ("input", "context"):
        return None
    if e.name in ("proj_out.input", "audio_proj_out.input"):
        prefix = "audio_" if e.audio else ""
        h, emb = given(e, f"{prefix}norm_out"), given(e, f"{prefix}time_embed.emb")
        table: Any = None if e.model is None else find_module(e.model, f"{prefix}scale_shift_table")
        if h is None or emb is None or table is None:
            return None
        learned = table.double().flip(0)
        return Modulation(None, h.double(), learned + unflat(emb, len(h)).double()[:, :, None], learned)
    x, h = modulated(e)
    rows = None if x is None else own_rows(e, x)
    if x is None or h is None or rows is None:
        return None
    normalised = h if h is x else rms_norm(x.double())
    return Modulation(None if h is x else x.double(), normalised.double(), torch.stack(rows, 2).double(), table_rows(e))


def modulated_stage(e: Evidence) -> Iterator[Formula]:
    """Yield a normalised stream, or the text, times one plus the scale, plus the shift."""
    it = modulation_of(e)
    if it is None:
        return
    h, scale, shift = it.normalised, it.rows[:, :, 0], it.rows[:, :, 1]
    stream = "the text" if e.layer.endswith("attn2") and e.part == "context" else "the normalised stream"

    def compute(o: Operands) -> Tensor:
        return o[stream] * (1 + o["the scale"]) + o["the shift"]

    def with_rows(rows: Tensor) -> Tensor:
        return compute({stream: h, "the scale": rows[:, :, 0], "the shift": rows[:, :, 1]})

    yield Formula({"the scale": scale, "the shift": shift, stream: h}, compute)
    yield Formula({"scale and shift": it.rows}, lambda o: with_rows(o["scale and shift"]))
    if it.table is not None:
        levels = "the noise level's part of scale and shift"
        table, offsets = it.table, it.rows - it.table
        yield Formula(
            {levels: offsets},
            lambda o: with_rows(o["rows"] if "rows" in o else table + o[levels]),
            {
                "rows of the table alone, without the noise level": {"rows": table.expand_as(offsets)},
                "rows of the noise level alone, without the table": {"rows": offsets},
                "rows of the table minus those of the noise level": {"rows": table - offsets},
                "rows of the noise level minus those of the table": {"rows": offsets - table},
                "rows of the table times those of the noise level": {"rows": table * offsets},
            },
        )
    if it.before is not None:
        yield from norm_of(
            "the stream", it.before, lambda h: compute({stream: h, "the scale": scale, "the shift": shift})
        )


def norm_of(what: str, x: Tensor, after: Step, heads: int = 1) -> Iterator[Formula]:
    """Yield what is made of a tensor that is divided by its root mean square, over all its heads."""
    squares = x.square()
    mean = squares.mean(-1, keepdim=True)
    before = f"{what} before its norm"
    yield Formula({before: x}, lambda o: after(rms_norm(o[before])))
    means = {
        "the square of each channel in place of the mean square": squares,
        "the sum of the squares in place of their mean": squares.sum(-1, keepdim=True),
        "the mean square over the batch, not over the channels": squares.mean(0, keepdim=True),
        "the mean square over the tokens, not over the channels": squares.mean(1, keepdim=True),
    }
    if heads > 1:
        each = squares.unflatten(-1, (heads, -1))
        means["the mean square of each head, not of all heads"] = (
            each.mean(-1, keepdim=True).expand_as(each).flatten(-2)
        )
    results = {
        f"{what} divided by its mean square, not by the root of it": x / (mean + EPS),
        f"{what} times its root mean square, not divided by it": x * (mean + EPS).sqrt(),
        f"one over the root mean square alone, without {what}": (mean + EPS).rsqrt().expand_as(x),
        f"one over the root mean square added to {what}": x + (mean + EPS).rsqrt(),
        f"{what} without its norm": x,
    }
    others: dict[str, Operands] = {which: {"the mean square": y} for which, y in means.items()}
    others |= {which: {"the result": y} for which, y in results.items()}

    def compute(o: Operands) -> Tensor:
        return after(o["the result"] if "the result" in o else x * (o["the mean square"] + EPS).rsqrt())

    yield Formula({"the mean square": mean}, compute, others)


def table_rows(e: Evidence) -> Tensor | None:
    """Return the scale and the shift (2, D) of this stage in the learned table, without the noise level."""
    recipe = ROW_RECIPES.get(f"{e.layer}.{'context_' if e.part == 'context' else ''}rows")
    table: Any = None if recipe is None or e.model is None else find_module(e.model, e.block + recipe[0][0])
    if recipe is None or table is None:
        return None
    rows: Tensor = table[recipe[0][1]].double()[:2]
    return rows if e.layer in OTHER else rows.flip(0)  # rows of the exchange are (scale, shift)


def residual(e: Evidence) -> Iterator[Formula]:
    """Yield a residual plus the gate times the result of the sub-layer."""
    before = sublayer_before(e)
    if not before:
        return
    x, out = given(e, before + ".stream"), given(e, before + (".output" if before.endswith("ff") else ".to_out"))
    rows = e.reference_taps.get(before + ".rows")
    if x is None or out is None:
        return
    result = f"the result of {before.rpartition('.')[2]}"
    if rows is None or rows.shape[1] < 3:
        yield Formula({result: out, "the residual": x}, lambda o: o["the residual"] + o[result])
        return
    gate = unflat(rows, len(x))[:, :, 2].double()
    entered = given(e, before + ".input")
    unprocessed = {} if entered is None else {f"{result} is its input: nothing was computed": {"both": entered * gate}}
    either = f"{result}, or its gate,"  # a factor of the one is a factor of the other
    yield Formula({either: out * gate, "the residual": x}, lambda o: o["the residual"] + o[either])
    yield Formula(
        {result: out, "its gate": gate},
        lambda o: x + (o["both"] if "both" in o else o[result] * o["its gate"]),
        {f"{result} plus its gate, not times": {"both": out + gate}} | unprocessed,
    )


def projected_attention(e: Evidence) -> Iterator[Formula]:
    """Yield the last layer of an attention, of its heads times their gates."""
    out, gate, logits = (given(e, f"{e.block}{e.layer}.{name}") for name in ("sdpa", "gate", "to_gate_logits"))
    layer: Any = None if e.model is None else find_module(e.model, f"{e.block}{e.layer}.to_out.0")
    if e.part != "to_out" or out is None or layer is None or layer.weight.is_meta or perturbed(e):
        return
    weight, heads = layer.weight.double(), "attention, or the weight after it,"
    operands = {heads: out, "the bias": layer.bias.double()}
    others: dict[str, Operands] = {}
    if gate is not None:
        operands["the gate"] = gate
    if gate is not None and logits is not None:
        x = logits.double()
        functions = {
            "tanh of its logit": x.tanh(),
            "2 * tanh of its logit": 2 * x.tanh(),
            "1 + tanh of its logit": 1 + x.tanh(),
            "the sigmoid of its logit": x.sigmoid(),
            "1 + the sigmoid of its logit": 1 + x.sigmoid(),
            "2 plus the sigmoid of its logit": 2 + x.sigmoid(),
            "2 * exp of its logit": 2 * x.exp(),
            "its logit": x,
            "1 / (2 * sigmoid)": 1 / (2 * x.sigmoid()),
            "softmax of the logits": 2 * x.softmax(-1),
        }
        others = {f"the gate as {what}": {**operands, "the gate": y} for what, y in functions.items()}
        others["attention plus the gate, not times"] = {heads: out + gate[..., None], "the bias": layer.bias}

    def compute(o: Operands) -> Tensor:
        x = o[heads] * o["the gate"][..., None] if "the gate" in o else o[heads]
        return F.linear(x.flatten(2), weight) + o["the bias"]

    yield Formula(operands, compute, others)


def perturbed(e: Evidence) -> bool:
    """Tell whether spatio-temporal guidance changes this self-attention."""
    number = e.block.split(".")[1] if e.block else ""
    blocks = (e.inputs or {}).get("spatio_temporal_guidance_blocks") or ()
    return e.layer.endswith("attn1") and number.isdigit() and int(number) in blocks


def rotated(e: Evidence) -> Iterator[Formula]:
    """Yield queries or keys, rotated by cosines and sines."""
    if e.part not in ("q", "k") or e.layer not in ROTATED or e.config is None:
        return
    x, table = given(e, f"{e.block}{e.layer}.norm_{e.part}"), ROTATED[e.layer][e.part == "k"]
    cos, sin = (given(e, table + end) for end in (".cos", ".sin"))
    if x is None or cos is None or sin is None:
        return
    kind = e.config.rope_type
    first, second = "the sines for the first of two numbers", "the sines for the second of two numbers"
    name = "queries before the rotation" if e.part == "q" else "keys before the rotation"

    def compute(o: Operands) -> Tensor:
        x1, x2 = pairs(o[name], kind)
        cos = o["the cosines"]
        return joined_pairs(x1 * cos - x2 * o[first], x2 * cos + x1 * o[second], kind)

    heads = x.unflatten(-1, (cos.shape[2], -1)).double()
    right = {first: sin.double(), second: sin.double(), "the cosines": cos.double(), name: heads}
    half = ((1 + cos.double()) / 2).clamp(min=0).sqrt()
    yield Formula(
        right,
        compute,
        {
            "cosines and sines exchanged": {**right, first: cos, second: cos, "the cosines": sin},
            "cosines and sines, half of the angle": {**right, "the cosines": half},
        },
    )
    after = f"the rotated {name.partition(' ')[0]}"
    yield Formula(
        {after: compute(right).flatten(2)},
        lambda o: o[after].unflatten(-1, heads.shape[2:]),
        law=lambda wanted: other_terms(e, heads, wanted, right["the cosines"], right[first]),
    )


def pairs(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return the first and the second number of each plane of heads (..., 2R)."""
    first, second = (x.chunk(2, -1)) if kind == "split" else (x[..., 0::2], x[..., 1::2])
    return first, second


def joined_pairs(first: Tensor, second: Tensor, kind: str) -> Tensor:
    """Return heads (..., 2R) of the first and the second number of each plane."""
    return torch.cat([first, second], -1) if kind == "split" else torch.stack([first, second], -1).flatten(-2)


def other_terms(e: Evidence, heads: Tensor, wanted: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Return which sums of products the candidate has in place of a rotation, or None if it has no such sums."""
    kind = e.config.rope_type if e.config else ""
    x1, x2 = pairs(heads, kind)
    one = torch.ones_like(cos)
    terms = {
        "x1 cos": x1 * cos,
        "x1 sin": x1 * sin,
        "x2 cos": x2 * cos,
        "x2 sin": x2 * sin,
        "x1": x1,
        "x2": x2,
        "cos": cos,
        "sin": sin,
        "": one,
    }
    basis = torch.stack([term.expand_as(x1).flatten() for term in terms.values()], 1)
    if len(basis) < 10 * len(terms):  # so few numbers are fitted by chance
        return None
    made, said = [], []
    for part in pairs(wanted, kind):
        found = torch.linalg.lstsq(basis, part.reshape(-1, 1)).solution[:, 0]
        found = torch.where((2 * found - (2 * found).round()).abs() < SNAP, (2 * found).round() / 2, found)
        made.append((basis @ found).reshape(x1.shape))
        said.append(summed(dict(zip(terms, found.tolist(), strict=True))))
    if not explains(e, joined_pairs(made[0], made[1], kind)):
        return None
    return f"{said[0]} and {said[1]} in place of x1 cos - x2 sin and x2 cos + x1 sin"


def summed(terms: Mapping[str, float]) -> str:
    """Return a sum of terms with factors in words, such as "x1 cos - 0.5 x2 sin"."""
    parts = [
        ("-" if factor < 0 else "+", term if term and abs(factor) == 1 else f"{abs(factor):.4g} {term}".rstrip())
        for term, factor in terms.items()
        if factor
    ]
    parts.sort(key=lambda part: part[0] == "-")
    return " ".join(f"{sign} {term}" for sign, term in parts).removeprefix("+ ") or "0"


def attention(e: Evidence) -> Iterator[Formula]:
    """Yield attention of queries, keys, values and a mask."""
    q, k, v = (given(e, f"{e.block}{e.layer}.{name}") for name in ("q", "k", "to_v"))
    if e.part != "sdpa" or q is None or k is None or v is None:
        return
    mask, dtype = mask_of(e, e.layer), e.reference.dtype
    scaled, related, bias = "queries, keys or the scale of attention", "keys, in relation to values,", "the mask's bias"
    heads = {scaled: q, related: k, "values": v.unflatten(-1, k.shape[2:])}
    given_bias: Tensor | None = None
    if mask is not None:
        given_bias = attention_bias(mask, dtype)[:, None] if e.layer == "attn1" else text_attention_mask(mask, dtype)
    if given_bias is not None and given_bias.dtype == torch.bool:
        return
    causal = torch.full((q.shape[1], k.shape[1]), -1e4, dtype=torch.float64).triu(1)[None, None]
    square = q.shape[1] == k.shape[1]

    def compute(o: Operands) -> Tensor:
        return attended((o[scaled], o[related], o["values"]), o.get(bias, given_bias))

    yield Formula(heads, compute, {"causal attention": {**heads, bias: causal}} if square else {})
    if given_bias is not None:
        # In the tap's dtype: beside a bias of 10,000, that is what most of the difference is.
        narrow = {name: x.to(dtype) for name, x in heads.items()}
        yield Formula(
            {bias: given_bias},
            lambda o: attended(narrow.values(), o[bias].to(dtype)),
            {"one minus the mask plus -10,000, not times": {bias: given_bias / -1e4 - 1e4}},
        )


def activation(e: Evidence) -> Iterator[Formula]:
    """Yield the activation of a feed-forward."""
    x = given(e, e.name.replace(".activation", ".proj"))
    if e.part == "activation" and x is not None:
        yield from chained({"the activation's input": x}, ("", tanh_gelu), ("the activation's result", None))


def linear_layer(e: Evidence) -> Iterator[Formula]:
    """Yield a linear layer, with the activation before it or the norm after it."""
    found = layer_around(e)
    if found is None or e.model is None:
        return
    x, path, before, after = found
    layer: Any = find_module(e.model, path)
    if layer is None or x is None or layer.weight.is_meta:
        return
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    wide = before(x.double())
    operands = {"the layer's input, or its weight,": wide} | ({} if bias is None else {"the bias": bias})

    def compute(o: Operands) -> Tensor:
        return after(F.linear(o["the layer's input, or its weight,"], weight) + o.get("the bias", 0.0))

    skipped = {"the activation before it left out": {**operands, "the layer's input, or its weight,": x}}
    yield Formula(operands, compute, skipped if before is not same else {})
    if before is not same:
        name = "the input before its activation"
        yield Formula({name: x}, lambda o: compute({**operands, "the layer's input, or its weight,": before(o[name])}))


def normalised_heads(e: Evidence) -> Iterator[Formula]:
    """Yield queries or keys under their norm, which is over all heads and has a weight."""
    found = layer_around(e) if e.part in NORMS and e.config is not None else None
    if found is None or (x := found[0]) is None or e.model is None or e.config is None:
        return
    path = found[1]
    layer: Any = find_module(e.model, path)
    bias = None if layer.bias is None else layer.bias.double()
    heads = F.linear(x.double(), layer.weight.double(), bias)
    modules: dict[str, Any] = {name: find_module(e.model, f"{e.block}{e.layer}.{name}") for name in NORMS}
    weights = {f"the weight of {name}": module.weight.double() for name, module in modules.items()}
    own, other = f"the weight of {e.part}", next(name for name in weights if not name.endswith(e.part))
    yield from norm_of(NORMS[e.part], heads, lambda h: h * weights[own], e.config.num_attention_heads)
    yield Formula(
        {own: weights[own]}, lambda o: rms_norm(heads) * o[own], {f"{other} in place of {own}": {own: weights[other]}}
    )


def embedding(e: Evidence) -> Iterator[Formula]:
    """Yield two linear layers with an activation between them: of a noise level, or of the text of 2.0."""
    between: Step
    if e.name.endswith(".emb"):
        path, x, between = f"{e.name}.timestep_embedder", given(e, e.name.replace(".emb", ".sinusoid")), F.silu
        x = None if x is None else unflat(x, len(e.reference))
    elif e.name.endswith("caption_projection"):
        x, between = (e.inputs or {}).get(f"{'audio_' if e.audio else ''}encoder_hidden_states"), tanh_gelu
        path = e.name
    else:
        return
    layers: Any = None if e.model is None else find_module(e.model, path)
    if layers is None or x is None or layers.linear_1.weight.is_meta:
        return

    def layer(one: Any) -> Step:
        return lambda x: F.linear(x, one.weight.double(), one.bias.double())

    yield from chained(
        {"the input": x},
        ("", layer(layers.linear_1)),
        ("the first layer's result", between),
        ("the activation's result", layer(layers.linear_2)),
    )


def noise_sinusoid(e: Evidence) -> Iterator[Formula]:
    """Yield the sinusoid of a noise level: its argument, its phases, and itself."""
    if not e.name.endswith(".sinusoid"):
        return
    index, fall = torch.arange(128, dtype=torch.float64), log(10_000)
    exponents = {f"i / {n}": index / n for n in (1, 127, 255, 256)} | {"128 i": 128 * index, "-i / 128": -index / 128}
    wrong = {f"exp({-fall:.4g} * {what})": torch.exp(-fall * i) for what, i in exponents.items()}
    wrong["the logarithms of the frequencies"] = -fall * index / 128

    def sinusoid_of(o: Operands) -> Tensor:
        phases = o["the phases"]
        ordered = [phases.sin(), phases.cos()] if "sines first" in o else [phases.cos(), phases.sin()]
        return torch.cat(ordered, -1)

    for name, level in arguments(e).items():
        if len(level) != len(e.reference) or level.shape[1] not in (1, e.reference.shape[1]):
            continue
        level = (level.double() * gate_factor(e)).expand(e.reference.shape[:2])[..., None]
        yield Formula({name: level}, lambda o, name=name: sinusoid(o[name][..., 0], torch.float64))  # type: ignore[misc]
        right = torch.exp(-fall * index / 128)
        others: dict[str, Operands] = {f"{what} as frequencies": {"the phases": level * x} for what, x in wrong.items()}
        others |= {f"{what}, and sines before cosines": {**o, "sines first": index} for what, o in others.items()}
        others["frequencies added to the noise level, not times"] = {"the phases": level + right}
        if (law := frequencies_of(e.candidate, level[..., 0])) is not None:
            start, step = law
            said = f"frequencies exp({start:.3g} {step:+.5f} i), not exp({-fall / 128:+.5f} i)"
            others[said] = {"the phases": level * torch.exp(start + step * index)}
        yield Formula({"the phases": level * right}, sinusoid_of, others)
        whole = sinusoid_of({"the phases": level * right})
        yield Formula({"the sinusoid": whole}, lambda o: o["the sinusoid"])
        yield Formula({"cosines": whole[..., :128], "sines": whole[..., 128:]}, lambda o: torch.cat([*o.values()], -1))


def frequencies_of(x: Tensor, level: Tensor) -> tuple[float, float] | None:
    """Return a and b if the frequencies of a sinusoid are exp(a + b i), as its small phases tell."""
    phases = torch.atan2(x.double()[..., 128:], x.double()[..., :128]) / level[..., None]
    index = torch.arange(128, dtype=torch.float64)
    for part in (slice(112, 128), slice(0, 16)):  # frequencies fall, or rise
        some = phases[..., part].flatten(0, -2)
        some = some[(some > 0).all(-1)]
        if len(some):
            y, i = some.log().mean(0), index[part]
            step = ((y - y.mean()) * (i - i.mean())).sum() / (i - i.mean()).square().sum()
            return (y.mean() - step * i.mean()).item(), step.item()
    return None


def coordinates_of_patches(e: Evidence) -> Iterator[Formula]:
    """Yield the bounds of patches, made from the grid: time begins at 0, and is in seconds."""
    config, x = e.config, e.inputs or {}
    if e.name not in ("video_coords", "audio_coords") or config is None or x.get(e.name) is not None:
        return
    if e.audio:
        offset, unit = (
            config.causal_offset - config.audio_scale_factor,
            config.audio_hop_length / config.audio_sampling_rate,
        )
        raw = replace(config, causal_offset=config.audio_scale_factor, audio_hop_length=1, audio_sampling_rate=1)
    else:
        offset, unit = config.causal_offset - config.vae_scale_factors[0], 1 / x.get("fps", 24.0)
        raw = replace(config, causal_offset=config.vae_scale_factors[0])
    bounds = gridded(e, e.name.removesuffix("_coords"), raw, 1.0).double()
    bounds[:, 0] += offset
    whole, starts, ends, sizes = (
        "the bounds of patches",
        "the starts of patches",
        "the ends of patches",
        "the sizes of patches",
    )

    def compute(bounds: Tensor, clipped: bool = True) -> Tensor:
        time = bounds[:, :1].clamp(min=0) if clipped else bounds[:, :1]
        return torch.cat([time * unit, bounds[:, 1:]], 1).movedim(2, 1).expand(e.reference.shape)

    def of_both(o: Operands) -> Tensor:
        return compute(torch.stack([o[starts], o[ends]], -1), clipped="not clipped" not in o)

    start, end = bounds.unbind(-1)
    yield Formula({whole: bounds}, lambda o: compute(o[whole]))
    right = {starts: start, ends: end}
    yield Formula(right, of_both, {"patches that begin before time 0": {**right, "not clipped": bounds}})
    yield Formula({sizes: end - start}, lambda o: of_both({starts: start, ends: start + o[sizes]}))


def table_of_rope(e: Evidence) -> Iterator[Formula]:
    """Yield a RoPE table: of its positions, and of its frequencies."""
    table = own_table(e)
    if table is None:
        return
    other = table.make(e._replace(name=e.name[:-3] + ("sin" if e.name.endswith(".cos") else "cos")))
    right = table.make(e).double().flatten(2)
    largest = torch.tensor(table.stream.max_position, dtype=torch.float64)[:, None]
    still = right.shape[2] % len(largest)  # planes that do not rotate come first

    def whole(o: Operands) -> Tensor:
        return torch.cat([right[..., :still], o["the table"]], -1).reshape(e.reference.shape)

    exchanged = {"the table": other.flatten(2)[..., still:]}
    yield Formula({"the table": right[..., still:]}, whole, {"cosines and sines exchanged": exchanged})
    coords = table.coords.double()
    middle = coords.mean(-1) if coords.ndim == 4 else coords
    yield from positions_of_table(e, table, middle, largest)
    yield from frequencies_of_table(e, table, middle / largest * 2 - 1, still)


def positions_of_table(e: Evidence, table: Table, middle: Tensor, largest: Tensor) -> Iterator[Formula]:
    """Yield a RoPE table of its positions: as they are, as shares of the largest, and between -1 and 1."""

    def made(x: Tensor) -> Tensor:
        return table._replace(coords=x).make(e._replace(reference=e.reference.double()))

    shares, relative = "positions as shares of the largest", "positions between -1 and 1"
    yield Formula({"positions": middle}, lambda o: made(o["positions"]))
    yield Formula({shares: middle / largest}, lambda o: made(o[shares] * largest))
    yield Formula({relative: middle / largest * 2 - 1}, lambda o: made((o[relative] + 1) / 2 * largest))


def frequencies_of_table(e: Evidence, table: Table, relative: Tensor, still: int) -> Iterator[Formula]:
    """Yield a RoPE table of its frequencies, by which positions between -1 and 1, (B, P, T), are multiplied."""
    n, theta = table.stream.dim // (2 * relative.shape[1]), table.config.rope_theta
    right = frequencies(n, table.config, torch.float64)
    line = torch.linspace(0, 1, n, dtype=torch.float64)

    def made(o: Operands) -> Tensor:
        angles = relative.movedim(1, 2)[..., None, :] * o["frequencies"][:, None]
        angles = F.pad(angles.flatten(2), (still, 0)).reshape(len(relative), *e.reference.shape[1:])
        return (angles.cos() if e.name.endswith(".cos") else angles.sin()).expand_as(e.reference)

    wrong = {
        "one over the frequencies in their place": 1 / right,
        "frequencies on a line, not powers": theta * line * pi / 2,
        "numbers from 0 to 1, to the power of theta, as frequencies": line**theta * pi / 2,
    }
    yield Formula({"frequencies": right}, made, {what: {"frequencies": x} for what, x in wrong.items()})


# ---------------------------------------------------------------- parts of them
def same(x: Tensor) -> Tensor:
    """Return what is given: a step in which nothing happens."""
    return x


def tanh_gelu(x: Tensor) -> Tensor:
    """Return the GELU of the feed-forward."""
    return F.gelu(x, approximate="tanh")


def chained(operand: Operands, *chain: tuple[str, Step | None]) -> Iterator[Formula]:
    """Yield a formula for the operand, and one for each named result on the way, of steps one after the other."""
    ((name, x),) = operand.items()
    todo = [step for _, step in chain if step is not None]
    x = x.double()
    before = x
    for i, (result, _) in enumerate(chain):
        others: dict[str, Operands] = {}
        if result:
            name = result
            made_by = name.removesuffix("'s result")
            others = {f"{made_by} left out": {name: before}} if before.shape == x.shape else {}
        rest = todo[i:]

        def compute(o: Operands, name: str = name, rest: list[Step] = rest) -> Tensor:
            y = o[name]
            for step in rest:
                y = step(y)
            return y

        yield Formula({name: x}, compute, others)
        if i < len(todo):
            before, x = x, todo[i](x)


def layer_around(e: Evidence) -> tuple[Tensor | None, str, Step, Step] | None:
    """Return what a linear layer is given, its path, and what happens before and after it, or None for other taps."""
    at, inputs = f"{e.block}{e.layer}", e.inputs or {}
    if e.part in ("norm_q", "norm_k", "to_v", "to_gate_logits"):
        keys = e.part in ("norm_k", "to_v")
        x = given(e, f"{at}.context") if keys else given(e, f"{at}.input")
        x = given(e, f"{at}.input") if x is None else x
        if not e.part.startswith("norm_"):
            return x, f"{at}.{e.part}", same, same
        norm: Any = None if e.model is None else find_module(e.model, f"{at}.{e.part}")
        if norm is None or norm.weight.is_meta:
            return None
        weight = norm.weight.double()
        return x, f"{at}.to_{e.part[-1]}", same, lambda y: rms_norm(y) * weight
    if e.layer in ("ff", "audio_ff"):
        layers = {"proj": ("input", "net.0.proj"), "output": ("activation", "net.2")}
        if e.part in layers:
            tap, path = layers[e.part]
            return given(e, f"{at}.{tap}"), f"{at}.{path}", same, same
    if e.name in ("proj_in", "audio_proj_in"):
        return inputs.get(e.name.replace("proj_in", "hidden_states")), e.name, same, same
    if e.name in ("proj_out", "audio_proj_out"):
        return given(e, f"{e.name}.input"), e.name, same, same
    if e.name.endswith(".linear") and not e.block:
        x = given(e, e.name.replace(".linear", ".emb"))
        return None if x is None else (unflat(x, len(e.reference)), e.name, F.silu, same)
    return None
