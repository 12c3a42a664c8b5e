"""The LTX-2 audio-video diffusion transformer as a reference, bit-identical to the published implementations."""

__version__ = "0.1.0"

from . import describe as describe  # modules: `ltx2ref.interop.for_diffusers` needs no import of its own
from . import interop as interop
from . import kit as kit
from . import vendor as vendor
from .checkpoint import CheckpointError, LTX2VideoTransformer3DModel, load, save, stream
from .config import LTX_2_0, LTX_2_3, LTX_2_5, TransformerConfig
from .conventions import DIFFUSERS, LTX_CORE_2026_03, LTX_CORE_2026_08, Conventions
from .formats import ConfigError
from .model import AudioVisualModelOutput
from .parity.audit import assert_parity
from .parity.compare import compare
from .parity.exact import exact
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
    "TransformerConfig",
    "assert_parity",
    "compare",
    "exact",
    "load",
    "save",
    "stream",
    "trace",
]
