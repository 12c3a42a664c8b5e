"""The two layers of which a block is made: attention and feed-forward."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .modulation import EPS
from .rope import Rope, apply_rope


class Attention(nn.Module):
    """Queries from x (B, T, D), keys and values from context (B, S, D'); the result is (B, T, D).

    Queries and keys are normalised over all heads together, before the heads are split.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, head_dim: int, gated: bool, layout: str) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.layout = layout
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(context_dim, inner)
        self.to_v = nn.Linear(context_dim, inner)
        self.norm_q = nn.RMSNorm(inner, eps=EPS)
        self.norm_k = nn.RMSNorm(inner, eps=EPS)
        self.to_gate_logits = nn.Linear(dim, num_heads) if gated else None
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        ropes: tuple[Rope, Rope] | None = None,  # of the queries, and of the keys
        mask: Tensor | None = None,  # (B, 1, 1|T, S), added to the logits; or bool, True where a key is seen
        keep: Tensor | None = None,  # (B|1, 1, 1), the share of attention in the result
    ) -> Tensor:
        """Attend. Where `keep` is 1 the result is as always; where it is 0, each token gets its own value instead.

        That is spatio-temporal guidance. It is for self-attention, in which each token has one value.
        """
        q = self.heads(self.norm_q(self.to_q(x)))
        k = self.heads(self.norm_k(self.to_k(context)))
        v = self.heads(self.to_v(context))
        if ropes is not None:
            q = apply_rope(q, ropes[0], self.layout)
            k = apply_rope(k, ropes[1], self.layout)
        # These are views, and must not be copied: in float32 the last bits of the kernel depend on their strides.
        q, k, v = (rearrange(y, "b t h d -> b h t d") for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if keep is not None:
            out = torch.lerp(v, out, keep[..., None])
        if self.to_gate_logits is not None:
            gate = 2 * self.to_gate_logits(x).sigmoid()
            out = out * rearrange(gate, "b t h -> b h t 1")
        return self.to_out[0](rearrange(out, "b h t d -> b t (h d)"))

    def heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b t h d", h=self.num_heads)


class FeedForward(nn.Module):
    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        widen = nn.ModuleDict({"proj": nn.Linear(dim, 4 * dim, bias)})
        narrow = nn.Linear(4 * dim, dim, bias)
        self.net = nn.ModuleDict({"0": widen, "2": narrow})

    def forward(self, x: Tensor) -> Tensor:
        x = self.net["0"]["proj"](x)  # type: ignore[index]
        x = F.gelu(x, approximate="tanh")
        return self.net["2"](x)
