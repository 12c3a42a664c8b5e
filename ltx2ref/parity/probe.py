"""Does this machine compute with the same bits as another? A few fixed operations answer before the model is asked.

Bits depend on the processor's vector units, the BLAS library, the number of threads, the device and torch's version.
"""
import hashlib
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .generator import uniform

Operation = Callable[[Tensor, Tensor], Tensor]


def attention(x: Tensor, w: Tensor) -> Tensor:
    q = x[:, :56].reshape(2, 35, 4, 14).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q)


OPERATIONS: dict[str, Operation] = {
    "linear 1 row": lambda x, w: F.linear(x[:1], w),
    "linear 11 rows": lambda x, w: F.linear(x[:11], w),
    "linear 70 rows": lambda x, w: F.linear(x, w),
    "linear 28 columns": lambda x, w: F.linear(x[:, :28], w[:, :28]),
    "attention": attention,
    "cos": lambda x, w: (x * 9000).cos(),
    "sin": lambda x, w: (x * 9000).sin(),
    "exp": lambda x, w: x.exp(),
    "tanh GELU": lambda x, w: F.gelu(x, approximate="tanh"),
    "SiLU": lambda x, w: F.silu(x),
    "sigmoid": lambda x, w: x.sigmoid(),
    "RMSNorm": lambda x, w: F.rms_norm(x, (112,), eps=1e-6),
    "LayerNorm": lambda x, w: F.layer_norm(x, (112,), eps=1e-6),
    "addcmul": lambda x, w: torch.addcmul(x, w[:70], x),
    "lerp": lambda x, w: torch.lerp(x, w[:70], x[:1]),
}


def sha256(x: Tensor) -> str:
    """Of the elements' bytes, row-major."""
    return hashlib.sha256(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def probe(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, str]:
    """sha256 of each operation's result, by "operation dtype"."""
    digests = {}
    for dtype in dtypes:
        x = uniform("probe/x", (70, 112)).to(device, dtype)
        w = uniform("probe/w", (140, 112), 0.25).to(device, dtype)
        for name, operation in OPERATIONS.items():
            digests[f"{name} {str(dtype).removeprefix('torch.')}"] = sha256(operation(x, w))
    return digests


@contextmanager
def threads(count: int):  # type: ignore[no-untyped-def]
    """Run with `count` CPU threads, on which the bits of a matmul depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
