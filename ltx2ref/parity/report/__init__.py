"""Report a comparison: rows and a verdict, as text, as JSON and as a page."""

from types import ModuleType
from typing import TYPE_CHECKING

from ...lazy import submodule

if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        return submodule(__name__, name)
