"""What models compute on the way: read, sketched, kept in files, and how ports are found."""

from types import ModuleType
from typing import TYPE_CHECKING

from ...lazy import submodule

if not TYPE_CHECKING:

    def __getattr__(name: str) -> ModuleType:
        return submodule(__name__, name)
