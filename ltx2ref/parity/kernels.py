"""Define kernel shapes: one attention or one linear layer, at head widths and lengths of real models, with each mask.

The conformance cases are small models whose heads are 14 and 10 wide. Attention kernels choose their code by width,
length, mask and layout, so the code that they choose for a real model is tested here only.
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
    """One operation on generated tensors.

    Queries, keys and values are (B, T, H, width), as the model has them.
    """

    operation: str  # "attention", or "linear" from 4 * width to width
    width: int
    length: int  # how many queries and keys, or tokens, each element of the batch has
    kind: str = ""  # which mask or keys; for a linear layer "no-bias" or nothing
    batch: int = 2
    seed: int = SEED
    release: str = field(default="kernel", init=False)

    @property
    def name(self) -> str:
        """Return the name of the shape, such as attention-64-33-bool."""
        return "-".join(map(str, filter(None, (self.operation, self.width, self.length, self.kind))))

    @property
    def id(self) -> str:
        """Return the name with its release, as for a case."""
        return f"{self.release}/{self.name}"

    def about(self) -> dict[str, Any]:
        """Return what a recording holds of the shape besides its inputs."""
        return {"kernel": asdict(self)}

    @property
    def outputs(self) -> tuple[str, ...]:
        """Return the names of the taps that a recording stores as tensors and not just as digests."""
        return (OUTPUT,) if (self.width, self.length) == (64, 33) else ()

    def draw(self, name: str, *shape: int) -> Tensor:
        """Return a generated tensor that depends on the shape, the name and the seed."""
        return uniform(f"{self.id}/{name}", shape, seed=self.seed)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """Return the inputs of the operation; floating-point tensors are in `dtype`."""
        b, t, w = self.batch, self.length, self.width
        if self.operation == "linear":
            found = {"x": self.draw("x", b, t, 4 * w), "weight": self.draw("weight", w, 4 * w) * (4 * w) ** -0.5}
            found |= {} if self.kind == "no-bias" else {"bias": self.draw("bias", w)}
        else:
            found = {name: self.draw(name, b, t, HEADS, w) for name in "qkv"}
            if self.kind == "expanded":  # all rows share one sample's keys and values, with stride 0
                found |= {name: found[name][:1].expand(b, -1, -1, -1) for name in "kv"}
            found |= {"mask": MASKS[self.kind](self)} if self.kind in MASKS else {}
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in found.items()}


def keep(kernel: Kernel, rows: int) -> Tensor:
    """Return a mask (B, 1, rows, S), False in a quarter of its elements, and True at least once in each row."""
    mask = kernel.draw("mask", kernel.batch, 1, rows, kernel.length) > -0.866
    mask[..., 0] = True
    return mask


def without_row(kernel: Kernel) -> Tensor:
    """Return a mask in which one query has nothing to attend to."""
    mask = keep(kernel, kernel.length)
    mask[0, :, 5] = False
    return mask


def without_text(kernel: Kernel) -> Tensor:
    """Return a bias that masks every key of the second sample."""
    mask = keep(kernel, 1)
    mask[1] = False
    return (1 - mask.float()) * -10_000.0


MASKS: dict[str, Callable[[Kernel], Tensor]] = {
    "bool": lambda kernel: keep(kernel, kernel.length),
    "bool-row": lambda kernel: keep(kernel, 1),
    "bool-empty-row": without_row,  # one query has nothing to attend to, and its result is 0
    "bias": lambda kernel: kernel.draw("mask", kernel.batch, 1, kernel.length, kernel.length),
    "bias-row": lambda kernel: (1 - keep(kernel, 1).float()) * -10_000.0,
    "bias-empty": without_text,  # every key of one sample has the same large bias
}
LONGEST = 1025
# Lengths are one more than a tile of 32 or 128, a multiple of 64, and with --all one more than 1024. Each mask occurs
# at both widths.
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
    """Return the result of the operation on the CPU, as a tap."""
    with torch.no_grad():
        return {OUTPUT: compute(kernel, x).cpu()}


class KernelTruth:
    """The operation in float64, in the form of `truth.Truth`."""

    def __init__(self, kernel: Kernel, x: Inputs) -> None:
        wide = {name: y.double() if y.is_floating_point() else y for name, y in x.items()}
        self.bounds: Taps = {}
        self.least: dict[str, float] = {}
        self.pure = run_kernel(kernel, wide)

    def of(self, taps: Taps) -> Taps:
        """Return the float64 result; it does not depend on phases."""
        return self.pure
