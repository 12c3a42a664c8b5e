"""The LTX-2 audio-video diffusion transformer as a reference, bit-identical to the published implementations.

A name is imported when it is first used, so that `ltx2ref --help` does without torch.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from .lazy import submodule

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors
    from . import checkpoint as checkpoint
    from . import describe as describe
    from . import interop as interop
    from . import kit as kit
    from . import parity as parity
    from . import vendor as vendor
    from .checkpoint.loading import LTX2VideoTransformer3DModel, load
    from .checkpoint.save import save
    from .checkpoint.storage import CheckpointError
    from .checkpoint.streaming import stream
    from .config import LTX_2_0, LTX_2_3, LTX_2_5, TransformerConfig
    from .formats import ConfigError
    from .interface import DIFFUSERS, LTX_CORE_2026_03, LTX_CORE_2026_08, AudioVisualModelOutput, Conventions
    from .parity.audit import assert_parity
    from .parity.compare import compare
    from .parity.exact import exact
    from .parity.guard import Unsupported
    from .parity.trace.layouts import Layout
    from .parity.trace.taps import trace

__all__ = [
    "DIFFUSERS",
    "LTX_2_0",
    "LTX_2_3",
    "LTX_2_5",
    "LTX_CORE_2026_03",
    "LTX_CORE_2026_08",
    "AudioVisualModelOutput",
    "CheckpointError",
    "ConfigError",
    "Conventions",
    "LTX2VideoTransformer3DModel",
    "Layout",
    "TransformerConfig",
    "Unsupported",
    "assert_parity",
    "compare",
    "exact",
    "load",
    "save",
    "stream",
    "trace",
]

# The module that defines each of these names, as in the imports above.
HOMES = {
    "DIFFUSERS": ".interface",
    "LTX_2_0": ".config",
    "LTX_2_3": ".config",
    "LTX_2_5": ".config",
    "LTX_CORE_2026_03": ".interface",
    "LTX_CORE_2026_08": ".interface",
    "AudioVisualModelOutput": ".interface",
    "CheckpointError": ".checkpoint.storage",
    "ConfigError": ".formats",
    "Conventions": ".interface",
    "LTX2VideoTransformer3DModel": ".checkpoint.loading",
    "Layout": ".parity.trace.layouts",
    "TransformerConfig": ".config",
    "assert_parity": ".parity.audit",
    "compare": ".parity.compare",
    "exact": ".parity.exact",
    "Unsupported": ".parity.guard",
    "load": ".checkpoint.loading",
    "save": ".checkpoint.save",
    "stream": ".checkpoint.streaming",
    "trace": ".parity.trace.taps",
}

if not TYPE_CHECKING:  # with this function, type checkers would accept any name, also a misspelt one

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first used, or a module, such as `interop` in `ltx2ref.interop`."""
        home = HOMES.get(name)
        value = submodule(__name__, name) if home is None else getattr(import_module(home, __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    special = {name for name in globals() if name.startswith("__")}
    modules = {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}
    return sorted(special | {*__all__} | modules)
