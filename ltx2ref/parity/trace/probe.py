"""Tell whether this machine computes with the same bits as another, from a few fixed operations.

Bits depend on the processor's vector units, the BLAS library, the number of threads, the device and torch's version.
For one operation they also depend on its sizes, so each is probed at several of the sizes that the conformance cases
have.
"""

import hashlib
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..generator import uniform

PROBED_ROWS = (1, 2, 3, 9, 11, 18, 22, 48, 96, 210)  # batch sizes, tokens, or products of both
WIDTHS = (
    (256, 28),
    (28, 28),
    (28, 112),
    (112, 28),
    (28, 20),
    (20, 28),
    (20, 80),
    (80, 20),
    (28, 252),
    (12, 20),
    (7, 20),
)


def draw(*shape: int, scale: float = 2.0) -> Tensor:
    """Return a generated float32 tensor."""
    return uniform(f"probe/{shape}", shape, scale)


def probed_linear(to: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Run linear layers of all probed sizes, on tensors that `to` converts."""
    return [
        F.linear(to(draw(rows, n)), to(draw(m, n, scale=0.25)), to(draw(m))) for rows in PROBED_ROWS for n, m in WIDTHS
    ]


def probed_attention(to: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Run attention with and without a mask, on tensors that `to` converts."""

    def heads(tokens: int, head_dim: int) -> Tensor:
        return to(draw(2, tokens, 2, head_dim)).transpose(1, 2)

    sizes = ((105, 105, 14), (105, 9, 14), (48, 48, 14), (11, 11, 10), (11, 9, 10), (105, 11, 10), (11, 105, 10))
    plain = [F.scaled_dot_product_attention(heads(t, d), heads(s, d), heads(s, d)) for t, s, d in sizes]
    masks = [
        F.scaled_dot_product_attention(heads(t, d), heads(s, d), heads(s, d), attn_mask=to(draw(2, 1, t, s)))
        for t, s, d in sizes
    ]
    return plain + masks


def pointwise(function: Callable[[Tensor], Tensor], scale: float = 2.0) -> Callable[..., list[Tensor]]:
    """Return a probe that applies `function` to tensors of all probed sizes."""
    return lambda to: [
        function(to(draw(rows, width, scale=scale))) for rows in PROBED_ROWS for width in (7, 20, 28, 112, 256)
    ]


OPERATIONS: dict[str, Callable[[Callable[[Tensor], Tensor]], list[Tensor]]] = {
    "linear": probed_linear,
    "attention": probed_attention,
    "cos": pointwise(torch.cos, 16_000),
    "sin": pointwise(torch.sin, 16_000),
    "exp": pointwise(torch.exp, 10),
    "tanh GELU": pointwise(lambda x: F.gelu(x, approximate="tanh")),
    "SiLU": pointwise(F.silu),
    "sigmoid": pointwise(torch.sigmoid),
    "RMSNorm": pointwise(lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6)),
    "LayerNorm": pointwise(lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)),
    "addcmul": pointwise(lambda x: torch.addcmul(x * x, x, x.cos(), value=-1)),
    "lerp": pointwise(lambda x: torch.lerp(x, x * x, x.cos())),
    "modulation": pointwise(lambda x: x * (1 + x) + x),
}


def processor() -> str:
    """Return the processor's name, or at least its architecture."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def element_bytes(x: Tensor) -> bytes:
    """Return the bytes of all elements, row-major."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def sha256_of_tensors(*tensors: Tensor) -> str:
    """Return the sha256 of the elements' bytes, row-major."""
    return hashlib.sha256(b"".join(map(element_bytes, tensors))).hexdigest()


def probe(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, str]:
    """Return the sha256 of the results of each operation, under "operation dtype"."""
    found = {}
    for dtype in dtypes:
        for name, operation in OPERATIONS.items():
            results = operation(lambda x, to=dtype: x.to(device, to))  # type: ignore[misc]
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = sha256_of_tensors(*results)
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` CPU threads; the bits of a matrix product depend on this number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
