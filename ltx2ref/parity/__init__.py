"""Conformance: cases, recorded tensors of other implementations, and the verdict on this machine."""

from types import ModuleType
from typing import TYPE_CHECKING

from ..lazy import submodule

if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        return submodule(__name__, name)
