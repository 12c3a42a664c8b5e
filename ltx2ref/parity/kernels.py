"""Kernel shapes: one attention, or one linear layer, at head widths and lengths of real models and with each mask.

The cases are small models, whose heads are 14 and 10 wide. Attention kernels choose their code by width, length, mask
and layout; what they choose at these shapes shows here alone.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Inputs
from .generator import SEED, uniform
from .trace.taps import Taps

HEADS, OUTPUT = 2, "output"


@dataclass(frozen=True)
class Kernel:
    """One operation on generated tensors. Queries, keys and values are (B, T, H, width), as the model has them."""

    operation: str  # "attention", "linear": from 4 * width to width
    width: int
    length: int  # of queries and keys, or rows in a batch
    kind: str = ""  # of mask, or of keys; of a linear layer "no-bias"
    batch: int = 2
    seed: int = SEED
    release: str = field(default="kernel", init=False)

    @property
    def name(self) -> str:
        return "-".join(map(str, filter(None, (self.operation, self.width, self.length, self.kind))))

    @property
    def id(self) -> str:
        return f"{self.release}/{self.name}"

    def about(self) -> dict[str, Any]:
        return {"kernel": asdict(self)}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return what is stored as a tensor, and not as a digest alone."""
        return (OUTPUT,) if (self.width, self.length) == (64, 33) else ()

    def draw(self, name: str, *shape: int) -> Tensor:
        return uniform(f"{self.id}/{name}", shape, seed=self.seed)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        b, t, w = self.batch, self.length, self.width
        if self.operation == "linear":
            found = {"x": self.draw("x", b, t, 4 * w), "weight": self.draw("weight", w, 4 * w) * (4 * w) ** -0.5}
            found |= {} if self.kind == "no-bias" else {"bias": self.draw("bias", w)}
        else:
            found = {name: self.draw(name, b, t, HEADS, w) for name in "qkv"}
            if self.kind == "expanded":  # one sample's keys and values for all: of stride 0
                found |= {name: found[name][:1].expand(b, -1, -1, -1) for name in "kv"}
            found |= {"mask": MASKS[self.kind](self)} if self.kind in MASKS else {}
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in found.items()}


def keep(kernel: Kernel, rows: int) -> Tensor:
    """Return (B, 1, rows, S), of which a quarter is False, and of each row something is True."""
    mask = kernel.draw("mask", kernel.batch, 1, rows, kernel.length) > -0.866
    mask[..., 0] = True
    return mask


def without_row(kernel: Kernel) -> Tensor:
    mask = keep(kernel, kernel.length)
    mask[0, :, 5] = False
    return mask


def without_text(kernel: Kernel) -> Tensor:
    mask = keep(kernel, 1)
    mask[1] = False
    return (1 - mask.float()) * -10_000.0


MASKS: dict[str, Callable[[Kernel], Tensor]] = {
    "bool": lambda kernel: keep(kernel, kernel.length),
    "bool-row": lambda kernel: keep(kernel, 1),
    "bool-empty-row": without_row,  # a query with nothing to attend to, whose result is 0
    "bias": lambda kernel: kernel.draw("mask", kernel.batch, 1, kernel.length, kernel.length),
    "bias-row": lambda kernel: (1 - keep(kernel, 1).float()) * -10_000.0,
    "bias-empty": without_text,  # of one sample every key is masked, by as much
}
LONGEST = 1025
# One more than a tile of 32 or 128, a multiple of 64, and with --all one more than 1024. Each mask is at both widths.
ATTENTION_SHAPES = (
    (64, 33, ("", "bool", "bias-empty", "bias-row")),
    (64, 129, ("", "bool-row", "bias")),
    (64, 192, ("bool-empty-row", "expanded")),
    (128, 33, ("", "bias-row", "bool-empty-row", "expanded")),
    (128, 129, ("bool", "bias-empty", "bias")),
    (128, 192, ("bool-row",)),
)
KERNELS = (
    *(Kernel("attention", width, length, kind) for width, length, kinds in ATTENTION_SHAPES for kind in kinds),
    *(
        Kernel("linear", width, length, kind)
        for width, length, kind in (
            (64, 33, ""),
            (64, 129, "no-bias"),
            (64, 192, ""),
            (128, 33, "no-bias"),
            (128, 129, ""),
            (128, 192, ""),
        )
    ),
)
LONG_KERNELS = (
    *(
        Kernel("attention", width, LONGEST, kind, batch=1)
        for width, kind in ((64, ""), (64, "bool"), (128, "bias-row"))
    ),
    Kernel("linear", 64, LONGEST),
)


def compute(kernel: Kernel, x: Inputs) -> Tensor:
    """Call the operation as the model does."""
    if kernel.operation == "linear":
        return F.linear(x["x"], x["weight"], x.get("bias"))
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=x.get("mask")).transpose(1, 2)


def run_kernel(kernel: Kernel, x: Inputs) -> Taps:
    with torch.no_grad():
        return {OUTPUT: compute(kernel, x).cpu()}


class KernelTruth:
    """The operation in float64; see `truth.Truth`."""

    def __init__(self, kernel: Kernel, x: Inputs) -> None:
        wide = {name: y.double() if y.is_floating_point() else y for name, y in x.items()}
        self.bounds: Taps = {}
        self.least: dict[str, float] = {}
        self.pure = run_kernel(kernel, wide)

    def of(self, taps: Taps) -> Taps:
        return self.pure
