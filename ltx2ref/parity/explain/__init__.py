"""Explain why a candidate differs: another convention, other roundings, or a mistake that ports make."""

from types import ModuleType
from typing import TYPE_CHECKING

from ...lazy import submodule

if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        return submodule(__name__, name)
