"""Find out which operand of a stage is wrong: scaled, negated, shifted, rounded, left out, or another token's.

Every stage of the model is a short formula. Here it is computed again from the taps before it, each time with one
operand, or one step on the way, changed in one way. Factors and added numbers are fitted.
"""

from collections.abc import Callable, Iterator, Mapping
from math import isnan, log
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...embeddings import sinusoid
from ...interface import attention_bias, text_attention_mask
from ...modulation import rms_norm
from ...rope import apply_rope
from ..trace.taps import ROW_RECIPES, find_module
from .evidence import OTHER, Evidence, unflat
from .levels import arguments, gate_factor
from .mistakes import ROTATED, attended, given, mask_of, modulated, own_rows, own_table, sublayer_before
from .patterns import explains, reproduces, slope

Operands = Mapping[str, Tensor]
Step = Callable[[Tensor], Tensor]
ITERATIONS = 6  # of Gauss and Newton, for a factor or a number; a formula that is affine in its operand needs one
SMALL = 1e-4  # the difference from which a derivative is made


class Formula(NamedTuple):
    """One stage: its operands by what they are called in a sentence, and how the tap is computed from them."""

    operands: Operands
    compute: Callable[[Operands], Tensor]
    others: Mapping[str, Operands] = MappingProxyType({})  # other operands than the right ones, in words


def wrong_operand(e: Evidence) -> str | None:
    """Recognise one operand of this stage that is changed in one way."""
    if not e.candidate.isfinite().all():
        return None
    return next((said for formula in formulas(e) if (said := change_of(e, formula)) is not None), None)


def change_of(e: Evidence, formula: Formula) -> str | None:
    """Return which operand of a formula is changed, and how, or None if no change fits."""
    operands = {name: x.double() for name, x in formula.operands.items()}
    right = formula.compute(operands)
    if right.numel() != e.reference.numel() or not reproduces(e, right):
        return None
    for name, x in operands.items():

        def made(changed: Tensor, name: str = name) -> Tensor:
            return formula.compute({**operands, name: changed})

        for what, changed in (*fits_of(e.candidate.double().reshape(right.shape), x, made), *displaced(x)):
            if explains(e, made(changed)):
                return f"{name} {what}"
    for what, other in formula.others.items():
        if explains(e, formula.compute({name: x.double() for name, x in other.items()})):
            return what
    return None


def fits_of(wanted: Tensor, x: Tensor, made: Step) -> Iterator[tuple[str, Tensor]]:
    """Yield an operand times the factor, and plus the number, that fit the candidate best."""
    for start in (1.0, -1.0):
        factor = start
        for _ in range(ITERATIONS):
            now = made(x * factor)
            factor += slope(made(x * (factor + SMALL)) - now, wanted - now).item() * SMALL
        if not isnan(factor) and abs(factor - 1) > 1e-7:
            exact = next((y for y in (0.0, -1.0, 0.5, 2.0) if abs(factor - y) < 1e-4), factor)
            yield {0.0: "left out", -1.0: "negated"}.get(exact, f"times {exact:.4g}"), x * exact
    number = 0.0
    for _ in range(ITERATIONS):
        now = made(x + number)
        number += slope(made(x + (number + SMALL)) - now, wanted - now).item() * SMALL
    if not isnan(number) and number != 0:
        yield f"plus {number:.4g}", x + number


def displaced(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield an operand with its entries in other places, or rounded."""
    yield "rounded to bfloat16", x.bfloat16().double()
    yield "rounded to float16", x.half().double()
    for dim in (dim for dim in range(x.ndim) if x.shape[dim] > 1):
        what = {0: "batch element", 1: "token"}.get(dim, "channel" if dim == x.ndim - 1 else "row")
        for by, which in ((1, "previous"), (-1, "next")):
            yield f"of the {which} {what}", x.roll(by, dim)
        yield f"with {what}s in reverse order", x.flip(dim)


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
        embedding,
        noise_sinusoid,
        table_of_rope,
    ):
        yield from kind(e)


# ---------------------------------------------------------------- the stages
def modulated_stage(e: Evidence) -> Iterator[Formula]:
    """Yield a normalised stream, or the text, times one plus the scale, plus the shift."""
    if e.part not in ("input", "context"):
        return
    x, h = modulated(e)
    rows = None if x is None else own_rows(e, x)
    if x is None or h is None or rows is None:
        return
    scale, shift = rows
    stream = "the text" if h is x else "the normalised stream"

    def compute(o: Operands) -> Tensor:
        return o[stream] * (1 + o["the scale"]) + o["the shift"]

    learned = table_rows(e)
    others: dict[str, Operands] = {}
    if learned is not None:
        own = {"the scale": learned[0], "the shift": learned[1]}
        offsets = {name: x - own[name] for name, x in (("the scale", scale), ("the shift", shift))}
        ways: dict[str, Callable[[str], Tensor]] = {
            "rows of the table alone, without the noise level": lambda name: own[name].expand_as(offsets[name]),
            "rows of the noise level alone, without the table": lambda name: offsets[name],
            "rows of the table minus those of the noise level": lambda name: own[name] - offsets[name],
            "rows of the noise level minus those of the table": lambda name: offsets[name] - own[name],
            "rows of the table times those of the noise level": lambda name: own[name] * offsets[name],
        }
        others = {what: {stream: h, **{name: way(name) for name in own}} for what, way in ways.items()}
    yield Formula({"the scale": scale, "the shift": shift, stream: h}, compute, others)
    if h is not x:
        both = {"the scale": scale.double(), "the shift": shift.double()}
        name = "the stream before its norm"
        yield Formula({name: x}, lambda o: compute({stream: rms_norm(o[name]), **both}))


def table_rows(e: Evidence) -> tuple[Tensor, Tensor] | None:
    """Return the scale and the shift of this tap in the learned table, without the noise level."""
    recipe = ROW_RECIPES.get(f"{e.layer}.{'context_' if e.part == 'context' else ''}rows")
    table = None if recipe is None or e.model is None else find_module(e.model, e.block + recipe[0][0])
    if recipe is None or table is None:
        return None
    first, second = table[recipe[0][1]].double()[:2]
    return (first, second) if e.layer in OTHER else (second, first)


def residual(e: Evidence) -> Iterator[Formula]:
    """Yield a residual plus the gate times the result of the sub-layer."""
    before = sublayer_before(e)
    if not before:
        return
    x, out = given(e, before + ".stream"), given(e, before + (".output" if before.endswith("ff") else ".to_out"))
    rows = e.reference_taps.get(before + ".rows")
    if x is None or out is None:
        return
    gate: Tensor | float = 1.0
    if rows is not None and rows.shape[1] >= 3:
        gate = unflat(rows, len(x))[:, :, 2].double()
    result = f"the result of {before.rpartition('.')[2]}, or its gate,"
    yield Formula({result: out * gate, "the residual": x}, lambda o: o["the residual"] + o[result])


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
            "its logit": x,
            "1 / (2 * sigmoid)": 1 / (2 * x.sigmoid()),
            "softmax of the logits": 2 * x.softmax(-1),
        }
        others = {f"the gate as {what}": {**operands, "the gate": y} for what, y in functions.items()}

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
        a, b = (apply_rope(o[name], (o["the cosines"], o[sines]), kind) for sines in (first, second))
        if kind == "split":
            half = a.shape[-1] // 2
            return torch.cat([a[..., :half], b[..., half:]], -1)
        return torch.stack([a[..., 0::2], b[..., 1::2]], -1).flatten(-2)

    heads = x.unflatten(-1, (cos.shape[2], -1))
    right = {first: sin, second: sin, "the cosines": cos, name: heads}
    yield Formula(
        right,
        compute,
        {
            "cosines and sines exchanged": {**right, first: cos, second: cos, "the cosines": sin},
            "cosines and sines, half of the angle": {
                **right,
                "the cosines": ((1 + cos.double()) / 2).clamp(min=0).sqrt(),
            },
        },
    )


def attention(e: Evidence) -> Iterator[Formula]:
    """Yield attention of queries, keys, values and a mask."""
    q, k, v = (given(e, f"{e.block}{e.layer}.{name}") for name in ("q", "k", "to_v"))
    if e.part != "sdpa" or q is None or k is None or v is None:
        return
    mask, dtype = mask_of(e, e.layer), e.reference.dtype
    scaled = "queries, keys or the scale of attention"
    operands = {scaled: q, "keys, in relation to values,": k, "values": v.unflatten(-1, k.shape[2:])}
    others: dict[str, Operands] = {}
    if mask is not None:
        bias = attention_bias(mask, dtype)[:, None] if e.layer == "attn1" else text_attention_mask(mask, dtype)
        if bias.dtype == torch.bool:
            return
        operands["the mask's bias"] = bias
    if q.shape[1] == k.shape[1]:
        causal = torch.full((q.shape[1], q.shape[1]), -1e4, dtype=torch.float64).triu(1)
        others["causal attention"] = {**operands, "the mask's bias": causal[None, None]}

    def compute(o: Operands) -> Tensor:
        heads = (o[scaled], o["keys, in relation to values,"], o["values"])
        return attended(heads, o.get("the mask's bias"))

    yield Formula(operands, compute, others)


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
    """Yield the sinusoid of a noise level: its argument, and frequencies that follow another law."""
    if not e.name.endswith(".sinusoid"):
        return
    for name, level in arguments(e).items():
        if len(level) != len(e.reference) or level.shape[1] not in (1, e.reference.shape[1]):
            continue
        level = (level.double() * gate_factor(e)).expand(e.reference.shape[:2])
        others: dict[str, Operands] = {}
        if (law := frequencies_of(e.candidate, level)) is not None:
            start, step = law
            index = torch.arange(128, dtype=torch.float64)
            phases = level[..., None] * torch.exp(start + step * index)
            said = f"frequencies exp({start:.3g} {step:+.5f} i), not exp({-log(10_000) / 128:+.5f} i)"
            others[said] = {"whole": torch.cat([phases.cos(), phases.sin()], -1)}

        def compute(o: Operands, name: str = name) -> Tensor:
            return o["whole"] if "whole" in o else sinusoid(o[name], torch.float64)

        yield Formula({name: level}, compute, others)
        right = sinusoid(level, torch.float64)
        yield Formula({"cosines": right[..., :128], "sines": right[..., 128:]}, lambda o: torch.cat([*o.values()], -1))


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


def table_of_rope(e: Evidence) -> Iterator[Formula]:
    """Yield a RoPE table, made from its positions."""
    table = own_table(e)
    if table is None:
        return
    other = table.make(e._replace(name=e.name[:-3] + ("sin" if e.name.endswith(".cos") else "cos")))
    yield Formula(
        {"the table": table.make(e)}, lambda o: o["the table"], {"cosines and sines exchanged": {"the table": other}}
    )
    coords = table.coords.double()
    middle = coords.mean(-1) if coords.ndim == 4 else coords
    largest = torch.tensor(table.stream.max_position, dtype=torch.float64)[:, None]

    def made(x: Tensor) -> Tensor:
        return table._replace(coords=x).make(e._replace(reference=e.reference.double()))

    yield Formula({"positions": middle}, lambda o: made(o["positions"]))
    yield Formula(
        {"positions as shares of the largest": middle / largest},
        lambda o: made(o["positions as shares of the largest"] * largest),
    )
    relative = "positions between -1 and 1"
    yield Formula({relative: middle / largest * 2 - 1}, lambda o: made((o[relative] + 1) / 2 * largest))


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
