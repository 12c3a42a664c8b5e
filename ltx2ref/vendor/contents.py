"""The contents of a copy: all files of the package, or those that the model and its self-test import."""

import ast
from collections.abc import Iterator
from pathlib import Path

from .. import __version__
from .record import PATCHES, RECORD

PACKAGE = Path(__file__).parents[1]
BESIDE = ("LICENSE", "weights_manifest.json")  # inside an installed package, and beside the package in a checkout
PUBLIC = (  # the names that a copy of the model exports
    "LTX_2_0",
    "LTX_2_3",
    "LTX_2_5",
    "AudioVisualModelOutput",
    "ConfigError",
    "LTX2VideoTransformer3DModel",
    "TransformerConfig",
)
SELFTEST = "selftest.py"
HEADER = "# SPDX-License-Identifier: Apache-2.0\n"
ORIGIN = f"# Copied from ltx2ref: {RECORD} says which version.\n"
PATCHED = f"# Copied from ltx2ref, and changed by {PATCHES}/: {RECORD} says which version.\n"


def package_contents() -> dict[str, bytes]:
    """Return every file of the package by path, including the licence."""
    files = {path: file.read_bytes() for path, file in visible(PACKAGE) if path not in BESIDE}
    return with_headers(files | beside())


def model_contents() -> dict[str, bytes]:
    """Return the files of the model, of its config and of its self-test, and all that these import."""
    public = {name: defined_in(name) for name in PUBLIC}
    modules = imported_by([*public.values(), SELFTEST])
    folders = {parent.as_posix() for path in modules for parent in Path(path).parents} - {"."}
    written = {f"{folder}/__init__.py": f'"""Part of {folder} of ltx2ref."""\n' for folder in folders}
    written["__init__.py"] = model_package(public)
    taken = [*modules, "selftest.json", "py.typed"]
    files = {path: (PACKAGE / path).read_bytes() for path in taken if path not in written}
    licence = {"LICENSE": beside()["LICENSE"]}
    return with_headers(files | {path: text.encode() for path, text in written.items()} | licence)


def model_package(public: dict[str, str]) -> str:
    """Return the `__init__.py` for a copy of the model. It imports each public name from the file that defines it."""
    lines = [f'"""The LTX-2 transformer of ltx2ref {__version__}, the model alone."""', ""]
    for path in sorted(set(public.values())):
        names = ", ".join(name for name in public if public[name] == path)
        lines.append(f"from .{Path(path).stem} import {names}")
    lines += ["", "__all__ = [", *(f'    "{name}",' for name in public), "]", f'__version__ = "{__version__}"']
    return "\n".join(lines) + "\n"


def defined_in(name: str) -> str:
    """Return the file at the top of the package that defines a name."""
    found = [file.name for file in sorted(PACKAGE.glob("*.py")) if name in definitions(file)]
    if len(found) != 1:
        raise ValueError(f"{PACKAGE}: expected one file that defines {name}, found {found}")
    return found[0]


def definitions(file: Path) -> set[str]:
    """Return the names of the classes and variables that a module defines."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def imported_by(paths: list[str]) -> list[str]:
    """Return these modules together with all modules of the package that importing them requires."""
    found, queue = set[str](), list(paths)
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += imports(path)
    return sorted(found)


def imports(path: str) -> Iterator[str]:
    """Yield the files of the package's modules that a module imports at its top.

    A package's `__init__.py` is left out, because the copy has short ones of its own. Imports inside functions are left
    out as well: they belong to the part of the documented class that reads and writes files, which a copy lacks.
    """
    for node in ast.parse((PACKAGE / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = Path(path).parents[node.level - 1] / (node.module or "").replace(".", "/")
            for candidate in (base, *(base / alias.name for alias in node.names)):
                if (PACKAGE / candidate).with_suffix(".py").is_file() and candidate.name:
                    yield candidate.with_suffix(".py").as_posix()


def with_headers(files: dict[str, bytes]) -> dict[str, bytes]:
    """Put the licence's identifier and the origin at the top of each Python file that does not have them."""
    top = HEADER.encode()
    return {
        path: top + ORIGIN.encode() + data if path.endswith(".py") and not data.startswith(top) else data
        for path, data in files.items()
    }


def without_notice(data: bytes) -> bytes:
    """Return a file without the notice in its header that patches changed it."""
    return data.replace(PATCHED.encode(), ORIGIN.encode(), 1)


def with_notice(data: bytes) -> bytes:
    """Return a file with a notice in its header that patches changed it, as the licence requires."""
    return data.replace(ORIGIN.encode(), PATCHED.encode(), 1)


def beside() -> dict[str, bytes]:
    """Return the licence, and the manifest of published files if there is one.

    Raises `ValueError` without a licence.
    """
    folders = [PACKAGE, *([PACKAGE.parent] if is_checkout() else [])]
    found: dict[str, bytes] = {}
    for name in BESIDE:
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is not None:
            found[name] = file.read_bytes()
    if "LICENSE" not in found:
        raise ValueError(f"{PACKAGE}: the LICENSE is missing, without which the package may not be copied")
    return found


def is_checkout() -> bool:
    """Return whether this is the package in its own repository, rather than an installed package or a copy."""
    return (PACKAGE.parent / "pyproject.toml").is_file() and not (PACKAGE / RECORD).exists()


def visible(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the path and the location of each file, without hidden and compiled ones, the record and the patches."""
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        ours = path.as_posix() == RECORD or path.parts[0] == PATCHES
        if file.is_file() and not ours and not any(part == "__pycache__" or part[0] == "." for part in path.parts):
            yield path.as_posix(), file
