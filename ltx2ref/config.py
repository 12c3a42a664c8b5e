"""The configuration of a transformer as files say it: checked, and read and written in both published formats."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from . import formats
from .sizes import RELEASE_2_0, RELEASE_2_3, RELEASE_2_5, Sizes

ALSO_ALLOWED = {"out_channels": None, "audio_out_channels": None, "causal_offset": 0}  # beside positive numbers


@dataclass(frozen=True)
class TransformerConfig(Sizes, Mapping[str, Any]):
    """What distinguishes one LTX-2 transformer from another, by the names of diffusers' `config.json`.

    The defaults are those of diffusers' class, which shipped 2.0 files rely on. They are those of release 2.0 with one
    exception, `rope_type`: every checkpoint says "split" there. Raises `ConfigError` for a value of a wrong type, and
    for sizes that the published implementations refuse or compute nonsense with.

    By key and by attribute it answers for all 46 fields of a `config.json`, also for those that are the same in every
    model, such as `patch_size`. It is a mapping: `config.get("num_layers")`, `dict(config)`, `**config`.
    """

    rope_type: str = "interleaved"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            good = of_kind(value, field.default) or (field.type is float and of_kind(value, 1.0))
            if type(value) is type(also := ALSO_ALLOWED.get(field.name, ...)):
                good |= value == also
            formats.require_supported(good, field.name, value, f"one like {field.default!r}")
        for name, holds, expected in (
            ("audio_num_attention_heads", self.audio.num_heads == self.video.num_heads, self.video.num_heads),
            ("cross_attention_dim", self.cross_attention_dim == self.video.dim, self.video.dim),
            ("audio_cross_attention_dim", self.audio_cross_attention_dim == self.audio.dim, self.audio.dim),
            ("attention_head_dim", self.attention_head_dim % 2 == 0, "an even number"),
            ("audio_attention_head_dim", self.audio_attention_head_dim % 2 == 0, "an even number"),
            ("rope_type", self.rope_type in ("split", "interleaved"), "'split' or 'interleaved'"),
        ):
            formats.require_supported(holds, name, getattr(self, name), expected)

    def __getitem__(self, key: str) -> Any:
        return (formats.DIFFUSERS_FIXED | vars(self))[key]

    def __iter__(self) -> Iterator[str]:
        return iter(formats.DIFFUSERS_FIXED | vars(self))

    def __len__(self) -> int:
        return len(formats.DIFFUSERS_FIXED | vars(self))

    if not TYPE_CHECKING:  # a type checker would take every attribute for one that exists

        def __getattr__(self, name: str) -> Any:
            """Return a field that is the same in every model."""
            if name not in formats.DIFFUSERS_FIXED:
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            return formats.DIFFUSERS_FIXED[name]

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read a diffusers `config.json`: absent keys take the defaults, unknown ones are errors."""
        return cls(**formats.read_diffusers(config, {field.name for field in fields(cls)}))

    def to_diffusers(self) -> dict[str, Any]:
        """Return all 46 fields of a diffusers `config.json`."""
        return formats.DIFFUSERS_FIXED | asdict(self) | {"vae_scale_factors": list(self.vae_scale_factors)}

    @classmethod
    def from_lightricks(cls, config: Mapping[str, Any]) -> "TransformerConfig":
        """Read `config["transformer"]` of the metadata of a Lightricks file: unknown keys are warnings."""
        return cls(**formats.read_lightricks(config))

    def to_lightricks(self) -> dict[str, Any]:
        """Return what `from_lightricks` reads. Raises `ConfigError` for what that format cannot say."""
        return formats.write_lightricks(asdict(self))


def of_kind(value: Any, example: Any) -> bool:
    """Return whether `value` has the type of `example` and, if it is a number, is positive."""
    if isinstance(example, tuple):
        return isinstance(value, tuple) and len(value) == len(example) and all(map(of_kind, value, example))
    if isinstance(example, bool | str):
        return type(value) is type(example)
    return type(value) in (int, type(example)) and 0 < value < math.inf


LTX_2_0 = TransformerConfig(**asdict(RELEASE_2_0))
LTX_2_3 = TransformerConfig(**asdict(RELEASE_2_3))
LTX_2_5 = TransformerConfig(**asdict(RELEASE_2_5))
