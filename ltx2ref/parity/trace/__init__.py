"""Read the taps of a model, sketch them, keep them in files, and find ports by name."""

from types import ModuleType
from typing import TYPE_CHECKING

from ...lazy import submodule

if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        return submodule(__name__, name)
