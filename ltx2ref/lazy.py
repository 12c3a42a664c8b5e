"""Modules imported on first use: `import ltx2ref` reaches them all, but does not import torch."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def submodule(package: str, name: str) -> ModuleType:
    """Import a module of a package, for the package's `__getattr__`. Raises `AttributeError` if there is none."""
    if name.startswith("_") or find_spec(f"{package}.{name}") is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return import_module(f"{package}.{name}")
