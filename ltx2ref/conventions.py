"""Where the published implementations differ, so that one model can be any of them (docs/divergences.md)."""

from dataclasses import dataclass, fields
from typing import Literal, get_args


@dataclass(frozen=True)
class Conventions:
    """The defaults are what diffusers 0.42.1 does, and documents. `ValueError` for values that nobody has."""

    rotation_dtype: Literal["float32", "model"] = "float32"
    """RoPE's tables and products: float32 or wider. ltx-core: the model's. Shows in bfloat16, at rope.cos."""
    positions_dtype: Literal["float32", "model"] = "float32"
    """Video coordinates, if none are given. ltx-core to 2026-05-11: the model's. Shows from video_coords."""
    text_mask_bias: Literal["linear", "lowest"] = "linear"
    """Masked tokens: -10000. ltx-core: the lowest number. Shows if a row keeps no token, from attn2.sdpa."""
    self_mask_bias: Literal["linear", "log"] = "linear"
    """A mask m: (1 - m) * -10000. ltx-core: log(m). Shows where 0 < m < 1, from attn1.sdpa."""
    exchange: Literal["argument", "other", "other_gate"] = "argument"
    """use_cross_timestep. ltx-core: other's sigma; from 2026-05-28 the gate alone. From av_cross_attn_*"""
    guidance: Literal["configured", "always"] = "configured"
    """Ignored without `perturbed_attn`. ltx-core 1.0.0: applied. Shows in the blocks listed, from attn1."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) not in get_args(field.type):
                raise ValueError(f"{field.name}: expected one of {get_args(field.type)}, got {value!r}")


DIFFUSERS = Conventions()
LTX_CORE_2026_03 = Conventions("model", "model", "lowest", "log", "other", "always")  # published as 1.0.0
LTX_CORE_2026_08 = Conventions("model", "float32", "lowest", "log", "other_gate", "always")
BY_OTHER = {"other": (True, True), "other_gate": (False, True)}  # the other's sigma: scale and shift, gate
