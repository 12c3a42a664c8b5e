"""Honest rewrites of diffusers' LTX-2 transformer: the same function, computed in another way.

`REWRITES[name](model)` is a context in which diffusers' model computes in that way. None is a bug: a verdict of
"diverged" or "suspect" on one is a false alarm.
"""

import ast
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from ast_mutants import definition, edited
from diffusers.models import activations, embeddings, normalization
from diffusers.models.transformers import transformer_ltx2
from mutants import split_matmul
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Context = AbstractContextManager[Any]
Rewrite = Callable[[nn.Module], Context]
REWRITES: dict[str, Rewrite] = {}
BLOCK, MODEL = "LTX2VideoTransformerBlock.forward", "LTX2VideoTransformer3DModel.forward"
PROCESSORS = "LTX2PerturbedAttnProcessor.__call__", "LTX2AudioVideoAttnProcessor.__call__"


def rewrite(name: str) -> Callable[[Rewrite], None]:
    return lambda make: REWRITES.__setitem__(name, make)


def together(contexts: Iterable[Context]) -> Context:
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


class Replacing(TorchFunctionMode):
    """Calls other functions in place of torch's own, and lets a trace see the call."""

    def __init__(self, replaced: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.replaced = replaced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.replaced.get(func, func)(*args, **(kwargs or {}))


def replace(name: str, function: Any, by: Callable[..., Any]) -> None:
    REWRITES[name] = lambda model: Replacing({function: by})


def patch_all(name: str, *changes: tuple[Any, str, Any]) -> None:
    REWRITES[name] = lambda model: together(patch.object(*change) for change in changes)


# ---------------------------------------------------------------- over the syntax tree
Rule = Callable[[ast.AST], ast.AST | None]


class Ruled(ast.NodeTransformer):
    """Applies a rule to every node, innermost first."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.count = rule, 0

    def visit(self, node: ast.AST) -> Any:
        """Return the rewritten node, or the node."""
        node = self.generic_visit(node)
        new = self.rule(node)
        self.count += new is not None
        return node if new is None else new


def by_rule(name: str, rule: Rule, *functions: str) -> None:
    def make(model: nn.Module) -> Context:
        stack, count = ExitStack(), 0
        for function in functions:
            ruled = Ruled(rule)
            tree = ruled.visit(deepcopy(definition(function)))
            count += ruled.count
            stack.enter_context(edited(function, tree))
        assert count, f"{name}: nothing in diffusers has this form"
        return stack

    REWRITES[name] = make


def applied(text: str, *values: ast.AST) -> ast.AST:
    """Return the call of a lambda on expressions."""
    function = ast.parse(f"(lambda {', '.join('abcd'[: len(values)])}: {text})", mode="eval").body
    return ast.Call(func=function, args=[deepcopy(x) for x in values], keywords=[])


def binary(node: ast.AST, op: type[ast.operator]) -> tuple[ast.expr, ast.expr] | None:
    return (node.left, node.right) if isinstance(node, ast.BinOp) and isinstance(node.op, op) else None


def is_one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == 1 and not isinstance(node.value, bool)


def scaled(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    """Return x and s of x * (1 + s)."""
    product = binary(node, ast.Mult)
    plus = binary(product[1], ast.Add) if product else None
    return (product[0], plus[1]) if product and plus and is_one(plus[0]) else None


def modulated(node: ast.AST) -> tuple[ast.expr, ast.expr, ast.expr] | None:
    """Return x, s and b of x * (1 + s) + b."""
    total = binary(node, ast.Add)
    found = scaled(total[0]) if total else None
    return (*found, total[1]) if total and found else None


def gated(node: ast.AST) -> tuple[ast.expr, ast.expr, ast.expr] | None:
    """Return x, a and b of x + a * b, where x is a name."""
    total = binary(node, ast.Add)
    product = binary(total[1], ast.Mult) if total and isinstance(total[0], ast.Name) else None
    return (total[0], *product) if total and product else None


def rule(find: Callable[[ast.AST], tuple[ast.expr, ...] | None], text: str) -> Rule:
    return lambda node: applied(text, *found) if (found := find(node)) else None


WHOLE = BLOCK, MODEL
by_rule("modulation: x + x * s", rule(scaled, "a + a * b"), *WHOLE)
by_rule("modulation: x * s + x", rule(scaled, "a * b + a"), *WHOLE)
by_rule("modulation by addcmul", rule(modulated, "torch.addcmul(c, a, 1 + b)"), *WHOLE)
by_rule("modulation in float32", rule(modulated, "(a.float() * (1 + b.float()) + c.float()).to(a.dtype)"), *WHOLE)
by_rule("modulation: shift + x + x * s", rule(modulated, "c + a + a * b"), *WHOLE)
by_rule("modulation: shift first", rule(modulated, "c + (b + 1) * a"), *WHOLE)
by_rule("modulation by lerp", rule(scaled, "torch.lerp(a, a + a, b)"), *WHOLE)
by_rule("residual by addcmul", rule(gated, "torch.addcmul(a, b, c)"), BLOCK)
by_rule("residual in float32", rule(gated, "(a.float() + b.float() * c.float()).to(a.dtype)"), BLOCK)
by_rule("residual: product first", rule(gated, "c * b + a"), BLOCK)
by_rule("residual in float64", rule(gated, "(a.double() + b.double() * c.double()).to(a.dtype)"), BLOCK)


def gate_rule(text: str) -> Rule:
    def find(node: ast.AST) -> tuple[ast.expr, ...] | None:
        product = binary(node, ast.Mult)
        call = product[1] if product and isinstance(product[0], ast.Constant) else None
        return (call.args[0],) if isinstance(call, ast.Call) and "sigmoid" in ast.dump(call.func) else None

    return rule(find, text)


by_rule("gate: 1 + tanh(x / 2)", gate_rule("1 + torch.tanh(a / 2)"), *PROCESSORS)
by_rule("gate: sigmoid + sigmoid", gate_rule("torch.sigmoid(a) + torch.sigmoid(a)"), *PROCESSORS)
by_rule("gate in float32", gate_rule("(2.0 * torch.sigmoid(a.float())).to(a.dtype)"), *PROCESSORS)
by_rule("gate: 2 / (1 + exp(-x))", gate_rule("2.0 / (1.0 + torch.exp(-a))"), *PROCESSORS)
by_rule(
    "rows: offsets first",
    lambda node: (
        ast.BinOp(left=node.right, op=ast.Add(), right=node.left)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
        else None
    ),
    "LTX2VideoTransformerBlock.get_mod_params",
)
by_rule(
    "rows in float32",
    lambda node: (
        applied("(a.float() + b.float()).to(b.dtype)", node.left, node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
        else None
    ),
    "LTX2VideoTransformerBlock.get_mod_params",
)


# ---------------------------------------------------------------- linear layers
def linear(name: str, by: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return by(x, self.weight, self.bias)

    patch_all(name, (nn.Linear, "forward", forward))


def plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def addmm(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ w.t() if b is None else torch.addmm(b, rows, w.t())).unflatten(0, x.shape[:-1])


def wide(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda x, w, b: F.linear(x.to(dtype), w.to(dtype), None if b is None else b.to(dtype)).to(x.dtype)


def token_chunks(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.cat([F.linear(part, w, b) for part in x.split(4, dim=-2)], dim=-2)


def columns(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    halves = (None, None) if b is None else b.chunk(2)
    return torch.cat([F.linear(x, part, half) for part, half in zip(w.chunk(2), halves, strict=False)], dim=-1)


def with_a_one(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if b is None:
        return F.linear(x, w)
    return F.linear(torch.cat([x, torch.ones_like(x[..., :1])], -1), torch.cat([w, b[:, None]], 1))


linear("linear: matmul, then the bias", lambda x, w, b: plus(x @ w.t(), b))
linear("linear by einsum", lambda x, w, b: plus(torch.einsum("...i,oi->...o", x, w), b))
linear("linear by addmm over all rows", addmm)
linear("linear in float32", wide(torch.float32))
linear("linear in float64", wide(torch.float64))
linear("linear: four tokens at a time", token_chunks)
linear("linear: outputs in two halves", columns)
linear("linear: the bias as a weight of one", with_a_one)
linear("linear: inputs in another order", lambda x, w, b: F.linear(x.flip(-1), w.flip(-1), b))
linear("linear: a row of the batch at a time", lambda x, w, b: torch.cat([F.linear(r, w, b) for r in x.split(1)]))
linear("linear: the batch twice", lambda x, w, b: F.linear(torch.cat([x, x]), w, b)[: len(x)])
linear("linear: weights stored transposed", lambda x, w, b: F.linear(x, w.t().contiguous().t(), b))
linear(
    "linear by bmm",
    lambda x, w, b: plus(torch.bmm(x.reshape(1, -1, x.shape[-1]), w.t()[None])[0], b).unflatten(0, x.shape[:-1]),
)
patch_all("linear: a sum of two halves", (nn.Linear, "forward", split_matmul))


def fused(model: nn.Module, names: tuple[str, ...]) -> Context:
    """Multiply by several weights of each self-attention at once, and let each layer take its part."""

    def part(layer: Any, name: str) -> Callable[[Tensor], Tensor]:
        layers = [getattr(layer, x) for x in names]
        weight, bias = torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers])
        sizes = [x.out_features for x in layers]
        return lambda x: F.linear(x, weight, bias).split(sizes, dim=-1)[names.index(name)]

    return together(
        patch.object(getattr(layer, name), "forward", part(layer, name))
        for layer in model.modules()
        if isinstance(layer, transformer_ltx2.LTX2Attention)
        if layer.to_q.in_features == layer.to_k.in_features or "to_q" not in names
        for name in names
    )


REWRITES["attention: queries, keys and values of one product"] = lambda model: fused(model, ("to_q", "to_k", "to_v"))
REWRITES["attention: keys and values of one product"] = lambda model: fused(model, ("to_k", "to_v"))


# ---------------------------------------------------------------- attention
SDPA = F.scaled_dot_product_attention
Softmax = Callable[[Tensor], Tensor]


def logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    x = q @ k.transpose(-1, -2) * scale
    if mask is None:
        return x
    return x.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else x + mask


def attention(
    dtype: torch.dtype | None = torch.float32,
    softmax: Softmax = lambda x: x.softmax(-1),
    made: Callable[[Tensor, Tensor, Tensor | None, float], Tensor] = logits,
) -> Callable[..., Tensor]:
    def by_hand(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        into = q.dtype if dtype is None else dtype
        mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(into)
        scale = more.get("scale") or q.shape[-1] ** -0.5
        p = softmax(made(q.to(into), k.to(into), mask, scale))
        return (p.to(into) @ v.to(into)).to(q.dtype)

    return by_hand


def parts_of(mask: Tensor | None, dim: int, size: int, count: int) -> list[Tensor | None]:
    """Split a mask as queries, heads or rows of the batch are split; a dimension of one stays."""
    if mask is None or mask.shape[dim] == 1:
        return [mask] * count
    return [*mask.split(size, dim)]


def split_attention(dim: int, size: int, keys_too: bool) -> Callable[..., Tensor]:
    def by_parts(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        queries = q.split(size, dim)
        keys, values = ((x.split(size, dim) if keys_too else [x] * len(queries)) for x in (k, v))
        mask = attn_mask if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.shape[-2])
        masks = parts_of(mask, dim, size, len(queries))
        found = [SDPA(a, b, c, attn_mask=m, **more) for a, b, c, m in zip(queries, keys, values, masks, strict=True)]
        return torch.cat(found, dim)

    return by_parts


def online(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
    """Take four keys at a time, with the largest logit so far, as flash attention does."""
    mask = None if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.shape[-2])
    if mask is not None and mask.dtype == torch.bool:
        return SDPA(q, k, v, attn_mask=attn_mask, **more)
    largest = torch.full_like(q[..., :1], -1e30, dtype=torch.float32)
    total, out = torch.zeros_like(largest), torch.zeros_like(q, dtype=torch.float32)
    for i in range(0, k.shape[-2], 4):
        part = None if mask is None else mask[..., i : i + 4].float()
        x = logits(q.float(), k[..., i : i + 4, :].float(), part, q.shape[-1] ** -0.5)
        now = torch.maximum(largest, x.amax(-1, keepdim=True))
        p, shrink = (x - now).exp(), (largest - now).exp()
        total, out = total * shrink + p.sum(-1, keepdim=True), out * shrink + p @ v[..., i : i + 4, :].float()
        largest = now
    return (out / total).to(q.dtype)


def exp2_softmax(x: Tensor) -> Tensor:
    p = ((x - x.amax(-1, keepdim=True)) * (1 / math.log(2))).exp2()
    return p / p.sum(-1, keepdim=True)


def unshifted(x: Tensor) -> Tensor:
    p = x.exp()
    return p / p.sum(-1, keepdim=True)


def scaled_before(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return logits(q * scale, k, mask, 1.0)


def scaled_both(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return logits(q * scale**0.5, k * scale**0.5, mask, 1.0)


def by_einsum(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    x = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    return x if mask is None else x.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else x + mask


def filled(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Leave masked keys out altogether, where they are given a bias of -10000."""
    if mask is None or mask.dtype == torch.bool or mask.ndim < 4 or not bool(((mask == 0) | (mask == -10000)).all()):
        return logits(q, k, mask, scale)
    return logits(q, k, mask == 0, scale)


replace("attention written out", SDPA, attention())
replace("attention written out, in the model's dtype", SDPA, attention(None, lambda x: x.float().softmax(-1)))
replace("attention in float64", SDPA, attention(torch.float64))
replace("attention: queries scaled before", SDPA, attention(made=scaled_before))
replace("attention: both scaled by a root", SDPA, attention(made=scaled_both))
replace("attention by einsum", SDPA, attention(made=by_einsum))
replace("attention: softmax in base 2", SDPA, attention(softmax=exp2_softmax))
replace("attention: softmax without the largest", SDPA, attention(softmax=unshifted))
replace("attention: masked keys left out", SDPA, attention(made=filled))
replace("attention: four queries at a time", SDPA, split_attention(2, 4, False))
replace("attention: a head at a time", SDPA, split_attention(1, 1, True))
replace("attention: a row of the batch at a time", SDPA, split_attention(0, 1, True))
replace("attention: four keys at a time", SDPA, online)
REWRITES["attention by torch's math kernel"] = lambda model: sdpa_kernel(SDPBackend.MATH)


# ---------------------------------------------------------------- norms
def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


Normed = Callable[[Tensor, float], Tensor]


def rms(name: str, by: Normed, dtype: torch.dtype = torch.float32) -> None:
    """Rewrite the weightless norms of streams, and those of queries and keys."""

    def stream(self: Any, x: Tensor) -> Tensor:
        return by(x.to(dtype), self.eps).to(x.dtype)

    def query(self: nn.RMSNorm, x: Tensor) -> Tensor:
        return weighted(by(x.to(dtype), self.eps or 0.0), self.weight.to(dtype)).to(x.dtype)

    patch_all(name, (normalization.RMSNorm, "forward", stream), (nn.RMSNorm, "forward", query))


def mean_square(x: Tensor) -> Tensor:
    return (x * x).mean(-1, keepdim=True)


rms("rms norm: times rsqrt", lambda x, eps: x * torch.rsqrt(mean_square(x) + eps))
rms("rms norm: divided by a root", lambda x, eps: x / torch.sqrt(mean_square(x) + eps))
rms("rms norm in float64", lambda x, eps: x * torch.rsqrt(mean_square(x) + eps), torch.float64)
rms(
    "rms norm: of the L2 norm",
    lambda x, eps: x / torch.sqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps),
)
rms("rms norm: of the sum", lambda x, eps: x * torch.rsqrt(x.square().sum(-1, keepdim=True) * (1 / x.shape[-1]) + eps))
rms(
    "rms norm by einsum",
    lambda x, eps: x * torch.rsqrt(torch.einsum("...d,...d->...", x, x)[..., None] / x.shape[-1] + eps),
)
rms("rms norm of torch", lambda x, eps: F.rms_norm(x, x.shape[-1:], eps=eps))


def weight_first(self: nn.RMSNorm, x: Tensor) -> Tensor:
    wide_x = x.float()
    return (wide_x * self.weight.float() * torch.rsqrt(mean_square(wide_x) + (self.eps or 0.0))).to(x.dtype)


patch_all("q and k norm: the weight first", (nn.RMSNorm, "forward", weight_first))


def layer_norm(name: str, by: Normed, dtype: torch.dtype = torch.float32) -> None:
    def forward(self: nn.LayerNorm, x: Tensor) -> Tensor:
        return by(x.to(dtype), self.eps).to(x.dtype)

    patch_all(name, (nn.LayerNorm, "forward", forward))


def centred(x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(mean_square(x) + eps)


def one_pass(x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(mean_square(x) - mean * mean + eps)


layer_norm("layer norm written out", centred)
layer_norm("layer norm in float64", centred, torch.float64)
layer_norm("layer norm: variance in one pass", one_pass)
layer_norm(
    "layer norm: divided by a root",
    lambda x, eps: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps),
)


# ---------------------------------------------------------------- activations
def gelu(name: str, by: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
    patch_all(name, (activations.GELU, "gelu", lambda self, x: by(x.to(dtype)).to(x.dtype)))


def inner(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


gelu("gelu written out", lambda x: 0.5 * x * (1 + torch.tanh(inner(x))))
gelu("gelu by a sigmoid", lambda x: x * torch.sigmoid(2 * inner(x)))
gelu("gelu in float64", lambda x: F.gelu(x, approximate="tanh"), torch.float64)
gelu(
    "gelu: x * (1 + 0.044715 * x * x)",
    lambda x: x * (0.5 + 0.5 * torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))),
)

replace("silu: x * sigmoid(x)", F.silu, lambda x, inplace=False: (x.float() * torch.sigmoid(x.float())).to(x.dtype))
replace(
    "silu: x / (1 + exp(-x))", F.silu, lambda x, inplace=False: (x.float() / (1 + torch.exp(-x.float()))).to(x.dtype)
)


# ---------------------------------------------------------------- rotation
Rope = tuple[Tensor, Tensor]


def rotated(
    name: str,
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Rotate pairs (a, b), (B, T, H, R) each, in both layouts."""

    def split(x: Tensor, freqs: Rope) -> Tensor:
        cos, sin = (t.transpose(1, 2).to(dtype) for t in freqs)
        pairs = x.unflatten(-1, (cos.shape[2], 2, -1)).to(dtype)
        return torch.stack(rotate(pairs[..., 0, :], pairs[..., 1, :], cos, sin), -2).flatten(2).to(x.dtype)

    def interleaved(x: Tensor, freqs: Rope) -> Tensor:
        cos, sin = (t[..., ::2].to(dtype) for t in freqs)
        pairs = x.unflatten(-1, (-1, 2)).to(dtype)
        return torch.stack(rotate(pairs[..., 0], pairs[..., 1], cos, sin), -1).flatten(2).to(x.dtype)

    patch_all(
        name,
        (transformer_ltx2, "apply_split_rotary_emb", split),
        (transformer_ltx2, "apply_interleaved_rotary_emb", interleaved),
    )


def complex_product(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    product = torch.complex(a, b) * torch.complex(cos, sin)
    return product.real, product.imag


def fewer_products(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply three times in place of four."""
    k = cos * (a + b)
    return k - b * (cos + sin), k + a * (sin - cos)


def matrices(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    made = (turn @ torch.stack([a, b], -1)[..., None])[..., 0]
    return made[..., 0], made[..., 1]


def plain(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return a * cos - b * sin, b * cos + a * sin


rotated("rotation: four products", plain)
rotated("rotation of complex numbers", complex_product)
rotated("rotation by 2 x 2 matrices", matrices)
rotated("rotation in float64", plain, torch.float64)
rotated("rotation: sines first", lambda a, b, c, s: (-(b * s) + a * c, a * s + b * c))


# ---------------------------------------------------------------- phases and positions
def rope_tables(
    self: Any,
    coords: Tensor,
    device: Any = None,
    middle: Callable[[Tensor], Tensor] = lambda x: x.mean(-1),
    power: Callable[[float, Tensor], Tensor] = torch.pow,
    dtype: torch.dtype = torch.float64,
) -> Rope:
    """Make RoPE tables, with angles in `dtype`, and the layout that diffusers' modules return."""
    largest = (self.base_num_frames, self.base_height, self.base_width)[: coords.shape[1]]
    x = coords.to(dtype)
    x = middle(x) if coords.ndim == 4 else x
    share = x / torch.tensor(largest, dtype=dtype)[:, None] * 2 - 1
    count = self.dim // (2 * coords.shape[1])
    steps = torch.linspace(0, 1, count, dtype=torch.float64)
    frequencies = (power(self.theta, steps) * math.pi / 2).to(dtype)
    angles = (share.transpose(1, 2)[:, :, None, :] * frequencies[:, None]).flatten(2)
    pad = self.dim // 2 - angles.shape[-1]
    tables = (F.pad(angles.cos(), (pad, 0), value=1.0).float(), F.pad(angles.sin(), (pad, 0)).float())
    if self.rope_type == "split":
        first, second = (t.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2) for t in tables)
    else:
        first, second = (t.repeat_interleave(2, -1) for t in tables)
    return first, second


def ropes(name: str, **how: Any) -> None:
    def forward(self: Any, coords: Tensor, device: Any = None) -> Rope:
        return rope_tables(self, coords, device, **how)

    patch_all(name, (transformer_ltx2.LTX2AudioVideoRotaryPosEmbed, "forward", forward))


def stepped(x: Tensor) -> Tensor:
    return x[..., 0] + (x[..., 1] - x[..., 0]) / 2


ropes("phases in float64")
ropes("phases in float32", dtype=torch.float32)
ropes("phases: the middle as start + half the size", middle=stepped, dtype=torch.float32)
ropes("phases: powers by exp and log", power=lambda theta, x: torch.exp(x * math.log(theta)), dtype=torch.float32)


def sinusoids(name: str, made: Callable[[Tensor, int], Tensor]) -> None:
    """Make the sinusoids of noise levels, cosines first."""
    patch_all(name, (embeddings, "get_timestep_embedding", lambda t, size, **more: made(t, size // 2)))


def both(phases: Tensor) -> Tensor:
    return torch.cat([phases.cos(), phases.sin()], -1).float()


sinusoids("sinusoids in float64", lambda t, n: both(t.double()[:, None] * 10_000.0 ** -(torch.arange(n).double() / n)))
sinusoids(
    "sinusoids: powers of 10000", lambda t, n: both(t.float()[:, None] * 10_000.0 ** -(torch.arange(n).float() / n))
)
sinusoids(
    "sinusoids: exp in one product",
    lambda t, n: both(t.float()[:, None] * torch.exp(torch.arange(n).float() * (-math.log(10_000) / n))),
)


# ---------------------------------------------------------------- what a caller may do
def arguments(name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    def make(model: Any) -> Context:
        forward = model.forward
        return patch.object(model, "forward", lambda **given: forward(**given | change(given)))

    REWRITES[name] = make


def masks_as(make: Callable[[Tensor, torch.dtype], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    names = "encoder_attention_mask", "audio_encoder_attention_mask"
    return lambda given: {
        name: make(given[name], given["hidden_states"].dtype)[:, None]
        for name in names
        if given.get(name) is not None and given[name].ndim == 2
    }


def every_token(given: dict[str, Any]) -> dict[str, Any]:
    """Give each token the noise level of its row."""
    found = {}
    for name, stream in (("timestep", "hidden_states"), ("audio_timestep", "audio_hidden_states")):
        if given.get(name) is not None and given[name].ndim == 1:
            found[name] = given[name][:, None].expand(-1, given[stream].shape[1]).contiguous()
    return found


arguments("a noise level for each token", every_token)
arguments("text masks of the lowest number", masks_as(lambda m, dtype: (1 - m.to(dtype)) * torch.finfo(dtype).min))
arguments(
    "text masks of minus infinity",
    masks_as(lambda m, dtype: torch.zeros_like(m, dtype=dtype).masked_fill(m == 0, -math.inf)),
)
