"""Checkpoints: every published dialect and quantised format read, described, merged with LoRAs, and written."""
from .files import CheckpointError
from .load import LTX2VideoTransformer3DModel, load

__all__ = ["CheckpointError", "LTX2VideoTransformer3DModel", "load"]
