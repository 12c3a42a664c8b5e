"""Modules imported on first use, so that neither `import ltx2ref` nor reading headers imports torch.

Files that read headers as well as data take `torch` from here. Their annotations are not evaluated.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule(ModuleType):
    """A module of another package that is imported when something in it is first used."""

    def __getattr__(self, name: str) -> Any:
        module = sys.modules.get(self.__name__)
        if module is None or getattr(module.__spec__, "_initializing", False):  # perhaps by another thread: wait for it
            module = import_module(self.__name__)
        return getattr(module, name)


if TYPE_CHECKING:
    import numpy as numpy
    import torch as torch
else:
    numpy, torch = LazyModule("numpy"), LazyModule("torch")


def submodule(package: str, name: str) -> ModuleType:
    """Import a module of a package, for the package's `__getattr__`. Raises `AttributeError` if there is none."""
    if name.startswith("_") or find_spec(f"{package}.{name}") is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return import_module(f"{package}.{name}")
