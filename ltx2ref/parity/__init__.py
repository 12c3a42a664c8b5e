"""Compare implementations: the cases, recordings of other implementations, and the judge of every tap."""

from types import ModuleType
from typing import TYPE_CHECKING

from ..lazy import submodule

if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        return submodule(__name__, name)
