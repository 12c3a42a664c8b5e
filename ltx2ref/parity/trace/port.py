"""Find a port by its name.

The name is `module:callable`, for a module of the current folder or an installed one, or `path/to/file.py:callable`.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..guard import PortFailed, described, raised_at, separately

PARAMETERS = ("config", "state", "inputs", "dtype")  # the keyword arguments that a port's function is called with


def port_named(name: str) -> Callable[..., Any]:
    """Return the function that `name` names; while it runs, it can import what stands beside it.

    "Beside it" means the current folder for a module, where a console script does not look by itself, and the file's
    own folder for a file.

    Raises `PortError`, in one line, if there is no such function or if it does not take `PARAMETERS`, and `PortFailed`
    if importing it raises an exception. What it changes in torch's settings holds while it runs, and no longer.
    """
    where, _, attribute = name.rpartition(":")  # the last colon: there are two in C:\ports\my_port.py:run
    if not where or not attribute.isidentifier():
        if name.endswith(".py") and Path(name).is_file():
            raise ValueError(f"{name}: expected the file and a function in it, {name}:FUNCTION")
        raise ValueError(
            f"{name}: no such file; expected diffusers, ltx-core, ltx2ref:CONVENTIONS, a trace file, "
            "module:callable or path/to/file.py:callable"
        )
    file = Path(where).absolute() if where.endswith(".py") else None
    folder = Path.cwd() if file is None else file.parent
    settings: dict[str, Any] = {}
    with importable(folder), separately(settings, keep=True), one_line(name, where):
        module = importlib.import_module(checked(where, name)) if file is None else module_of(file, name)
    function = attribute_of(module, attribute, name, where)

    def run(**given: Any) -> Any:
        with importable(folder), separately(settings):
            return function(**given)

    return run


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let modules in `folder` be found before any others, as they are for `python FILE`."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(folder) in sys.path:  # unless the port has removed it
            sys.path.remove(str(folder))


@contextmanager
def one_line(name: str, where: str) -> Iterator[None]:
    """Turn what an import raises into one line: `PortError` for no such port, `PortFailed` for a broken one."""
    try:
        yield
    except (PortError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        if error.name is None:
            raise PortFailed(error, f"{name}: importing {where} {described(error)}") from None
        if not where.endswith(".py") and f"{where}.".startswith(f"{error.name}."):
            raise PortError(f"{name}: there is no module {error.name} in {Path.cwd()}, nor is one installed") from None
        said = f"{name}: {where} imports {error.name}, which is not installed ({raised_at(error)})"
        raise PortFailed(error, said) from None
    except BaseException as error:  # SystemExit comes from a script without a `__main__` guard
        raise PortFailed(error, f"{name}: importing {where} {described(error)}") from None


class PortError(ValueError):
    """A port cannot be called; the message says why."""


def checked(where: str, name: str) -> str:
    """Return the name of a module, or refuse one that cannot be a module's name."""
    if not all(part.isidentifier() for part in where.split(".")):
        raise PortError(
            f"{name}: {where} is not the name of a module; for a file it would be {where}.py{name.removeprefix(where)}"
        )
    return where


def module_of(file: Path, name: str) -> ModuleType:
    """Import a file as a module named after it, as other files beside it import it."""
    if not file.is_file():
        raise PortError(f"{name}: there is no file {file}")
    there = sys.modules.get(file.stem)
    if there is not None:
        if (origin := getattr(there, "__file__", None)) and Path(origin).resolve() == file.resolve():
            return there
        raise PortError(
            f"{name}: another module {file.stem} is imported already, from {origin or 'Python itself'}; "
            "give the file another name"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # always true for a file that ends in .py
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return module


def attribute_of(module: ModuleType, attribute: str, name: str, where: str) -> Callable[..., Any]:
    """Return the port's function from its module, or raise a `PortError` if it is missing or not suitable."""
    if not hasattr(module, attribute):
        own = ", ".join(
            key
            for key, x in vars(module).items()
            if not key.startswith("_") and inspect.isroutine(x) and getattr(x, "__module__", None) == module.__name__
        )
        raise PortError(f"{name}: {where} has no {attribute}{f'; its functions are {own}' if own else ''}")
    found = getattr(module, attribute)
    if not callable(found):
        raise PortError(f"{name}: expected a function, got {attribute} of type {type(found).__name__}")
    function: Callable[..., Any] = found
    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in function has no signature
        return function
    try:
        signature.bind(**dict.fromkeys(PARAMETERS))
    except TypeError:
        raise PortError(f"{name}: expected a function of {', '.join(PARAMETERS)}, got {attribute}{signature}") from None
    return function
