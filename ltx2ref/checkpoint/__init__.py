"""Read, describe, convert and write checkpoints in every published dialect and quantised format."""

from types import ModuleType
from typing import TYPE_CHECKING

from ..lazy import submodule

if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        return submodule(__name__, name)
