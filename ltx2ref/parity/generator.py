"""Generate numbers that any language can rebuild bit for bit, so that weights and inputs need not be stored.

Element `index` (row-major, from 0) of the tensor `name` is, in unsigned 32-bit arithmetic that wraps around:

    x = index * 0x9E3779B9 + fnv1a(f"{seed}/{name}")        FNV-1a over the UTF-8 bytes, 32 bits
    x ^= x >> 16;  x *= 0x85EBCA6B;  x ^= x >> 13;  x *= 0xC2B2AE35;  x ^= x >> 16
    value = float32((x >> 8) - 2**23) * 2**-23 * float32(scale)

The first two factors are exact in float32 and make a uniform number in [-1, 1). Only the last multiplication rounds.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from fnmatch import fnmatch
from functools import lru_cache

import torch
from torch import Tensor

from ..config import TransformerConfig
from ..interface import DIFFUSERS, Conventions, LTX2VideoTransformer3DModel

SEED = 20261122  # for the cases' weights and inputs
LOW_32_BITS = 2**32 - 1
Scales = tuple[tuple[str, float], ...]  # (pattern of parameter names, power of two that multiplies these weights)
UNIT = math.sqrt(3)  # the scale at which a uniform number has variance 1


def fnv1a(text: str) -> int:
    """Return the 32-bit FNV-1a hash of a text in UTF-8."""
    digest = 0x811C9DC5
    for byte in text.encode():
        digest = (digest ^ byte) * 0x01000193 % 2**32
    return digest


def uniform(name: str, shape: tuple[int, ...], scale: float = UNIT, seed: int = 0) -> Tensor:
    """Return a float32 tensor of `shape`, uniform in [-scale, scale), that depends on its name and the seed."""
    x = torch.arange(math.prod(shape), device="cpu") * 0x9E3779B9 + fnv1a(f"{seed}/{name}") & LOW_32_BITS
    # An int64 product that overflows wraps around, so its lower 32 bits are right.
    x = (x ^ x >> 16) * 0x85EBCA6B & LOW_32_BITS
    x = (x ^ x >> 13) * 0xC2B2AE35 & LOW_32_BITS
    x = x ^ x >> 16
    unit = ((x >> 8) - 2**23).float() * 2**-23
    return (unit * torch.tensor(scale, dtype=torch.float32, device="cpu")).reshape(shape)


def weight_scale(name: str, shape: tuple[int, ...]) -> float:
    """Return the scale of a generated parameter.

    Nothing is zero, and activations are so large that both kinds of GELU differ. Linear layers keep the scale of
    their inputs, and the first layer of a feed-forward doubles it; norm weights reach 1.5, tables 0.5, biases 0.25.
    """
    if name.endswith("norm_q.weight") or name.endswith("norm_k.weight"):
        return 1.5
    if name.endswith("net.0.proj.weight"):
        return 2 * UNIT / math.sqrt(shape[-1])
    if name.endswith(".weight"):
        return UNIT / math.sqrt(shape[-1])
    return 0.25 if name.endswith(".bias") else 0.5


def weights(shapes: Mapping[str, tuple[int, ...]], seed: int, scales: Scales = ()) -> dict[str, Tensor]:
    """Return float32 parameters for `shapes`, under the same names, which are diffusers'."""
    return {
        name: uniform(name, shape, weight_scale(name, shape), seed)
        * math.prod(factor for pattern, factor in scales if fnmatch(name, pattern))
        for name, shape in shapes.items()
    }


def build(
    config: TransformerConfig, dtype: torch.dtype, conventions: Conventions = DIFFUSERS, scales: Scales = ()
) -> LTX2VideoTransformer3DModel:
    """Build a model with generated weights, rounded to `dtype`, on the CPU in evaluation mode."""
    return deepcopy(generated(config, conventions, scales)).to(dtype)


@lru_cache(maxsize=2)
def generated(config: TransformerConfig, conventions: Conventions, scales: Scales) -> LTX2VideoTransformer3DModel:
    """Build the model with float32 weights; the last two are kept, because cases often repeat a configuration."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(config, conventions)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    model.load_state_dict(weights(shapes, SEED, scales), assign=True)
    return model.eval()
