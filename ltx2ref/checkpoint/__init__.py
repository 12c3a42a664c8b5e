"""Checkpoints: reading, describing, converting and writing every published dialect and quantised format."""

from . import convert, inspection
from .loading import LTX2VideoTransformer3DModel, load
from .save import save
from .storage import CheckpointError
from .streaming import stream

__all__ = ["CheckpointError", "LTX2VideoTransformer3DModel", "convert", "inspection", "load", "save", "stream"]
