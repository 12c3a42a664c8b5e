"""The two kinds of layer that a block is made of."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .modulation import EPS
from .rope import Rope, apply_rope


def attention_bias(mask: Tensor, dtype: torch.dtype, kind: str = "linear") -> Tensor:
    """A multiplicative mask, 1 keeps and 0 masks, as a bias of the logits: finite, so no row is empty."""
    lowest, tiny = torch.finfo(dtype).min, torch.finfo(dtype).tiny
    if kind == "log":  # a factor of the attention's weights; in the mask's dtype, if that is floating
        return (mask * 1.0).clamp(min=tiny).log().to(dtype).where(mask > 0, lowest)
    return (1 - mask.to(dtype)) * (lowest if kind == "lowest" else -10_000.0)


def text_mask(mask: Tensor, dtype: torch.dtype, kind: str = "linear") -> Tensor:
    """(B, S) is multiplicative, (B, 1|T, S) a bias already or, if bool, True to keep; to (B, 1, 1|T, S)."""
    if mask.ndim == 2:
        return rearrange(attention_bias(mask, dtype, kind), "b s -> b 1 1 s")
    return rearrange(mask if mask.dtype == torch.bool else mask.to(dtype), "b t s -> b 1 t s")


class Attention(nn.Module):
    """Queries from x (B, T, D), keys and values from kv (B, S, D'), result (B, T, D).

    q and k are normalised over the whole inner width, before the heads are split. `keep` (B, 1, 1) is the
    share of attention in the result; the rest is the values as they are (spatio-temporal guidance).
    """

    def __init__(self, dim: int, kv_dim: int, num_heads: int, head_dim: int, gated: bool, layout: str):
        super().__init__()
        inner, self.num_heads, self.layout = num_heads * head_dim, num_heads, layout
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, inner) for d in (dim, kv_dim, kv_dim))
        self.norm_q, self.norm_k = nn.RMSNorm(inner, eps=EPS), nn.RMSNorm(inner, eps=EPS)
        self.to_gate_logits = nn.Linear(dim, num_heads) if gated else None
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def forward(
        self,
        x: Tensor,
        kv: Tensor,
        ropes: tuple[Rope, Rope] | None = None,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(kv)), self.to_v(kv)
        q, k, v = (rearrange(t, "b t (h d) -> b t h d", h=self.num_heads) for t in (q, k, v))
        if ropes is not None:
            q, k = apply_rope(q, ropes[0], self.layout), apply_rope(k, ropes[1], self.layout)
        # In memory this stays (B, T, H, d): in float32 the kernel's bits depend on the strides.
        q, k, v = (rearrange(t, "b t h d -> b h t d") for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if keep is not None:
            out = torch.lerp(v, out, keep[..., None])
        if self.to_gate_logits is not None:
            out = out * rearrange(2 * self.to_gate_logits(x).sigmoid(), "b t h -> b h t 1")
        return self.to_out[0](rearrange(out, "b h t d -> b t (h d)"))


class FeedForward(nn.Module):
    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        proj, out = nn.Linear(dim, 4 * dim, bias), nn.Linear(4 * dim, dim, bias)
        self.net = nn.ModuleDict({"0": nn.ModuleDict({"proj": proj}), "2": out})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](F.gelu(self.net["0"]["proj"](x), approximate="tanh"))  # type: ignore[index]
