"""Copies of this package, or of the model alone, in other projects: made, replaced, and compared with this one.

A copy may have any name and lie in any package, for all imports here are relative. It holds the licence, and a record
of the version and of each file's sha256, by which later changes are told apart: theirs from ours.
"""

import ast
import hashlib
import json
import secrets
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import __version__

PACKAGE = Path(__file__).parent
RECORD = "VENDORED.json"
BESIDE = ("LICENSE", "weights_manifest.json")  # at the top of a checkout, inside an installed package
MODEL = '''"""The LTX-2 transformer of ltx2ref {version}, the model alone."""
from .config import LTX_2_0, LTX_2_3, LTX_2_5, TransformerConfig
from .formats import ConfigError
from .model import AudioVisualModelOutput, LTX2VideoTransformer3DModel

__all__ = ["LTX_2_0", "LTX_2_3", "LTX_2_5", "AudioVisualModelOutput", "ConfigError", "LTX2VideoTransformer3DModel",
           "TransformerConfig"]
__version__ = "{version}"
'''


@dataclass(frozen=True)
class Copy:
    """A copy in another project, and how it differs from its record and from this package."""

    folder: str
    version: str
    commit: str | None
    model_only: bool
    files: int
    changed: list[str]  # there since, or removed there
    outdated: list[str]  # here since: another version of ltx2ref

    @property
    def current(self) -> bool:
        return not self.changed and not self.outdated


def vendor(parent: str | Path, name: str, *, model_only: bool = False) -> Copy:
    """Copy the package to `parent`/`name`; an unchanged older copy there is replaced.

    `model_only`: the architecture files and nothing else, which need torch and einops alone. Raises `ValueError` for
    a name that is no identifier, and if anything stands there that is not an unchanged copy.
    """
    if not name.isidentifier():
        raise ValueError(f"--as {name}: expected a Python identifier")
    target = Path(parent) / name
    if target.exists() and (changed := check(target).changed):
        raise ValueError(f"{target}: not replaced, for it was changed after it was made: {some(changed)}")
    contents = model_contents() if model_only else package_contents()
    record = {
        "package": "ltx2ref",
        "version": __version__,
        "commit": commit(),
        "model_only": model_only,
        "files": {path: sha256(data) for path, data in sorted(contents.items())},
    }
    contents[RECORD] = (json.dumps(record, indent=1) + "\n").encode()
    write(target, contents)
    return check(target)


def check(target: str | Path) -> Copy:
    """Compare a copy with its record, and its record with this package. Raises `ValueError` if it has none."""
    target = Path(target)
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        recorded, model_only = dict(record["files"]), bool(record["model_only"])
        version, made_from = str(record["version"]), record["commit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{target}: expected a copy of ltx2ref with a {RECORD}: {error}") from None
    there = {path: sha256(file.read_bytes()) for path, file in walk(target) if path != RECORD}
    contents = model_contents() if model_only else package_contents()
    here = {path: sha256(data) for path, data in contents.items()}
    return Copy(
        str(target), version, made_from, model_only, len(there), differing(recorded, there), differing(recorded, here)
    )


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))


def package_contents() -> dict[str, bytes]:
    """Every file of the package by its path, with those that stand beside it in a checkout."""
    return {path: file.read_bytes() for path, file in walk(PACKAGE) if path != RECORD} | beside()


def model_contents() -> dict[str, bytes]:
    """model.py, what it imports, a short __init__.py, and the licence."""
    names = {"model"}
    while new := {found for name in names for found in imported(name)} - names:
        names |= new
    files = {path: (PACKAGE / path).read_bytes() for path in ["py.typed", *(f"{name}.py" for name in names)]}
    return files | {"__init__.py": MODEL.format(version=__version__).encode(), "LICENSE": beside()["LICENSE"]}


def imported(name: str) -> Iterable[str]:
    """The modules beside it that a module imports."""
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


def beside() -> dict[str, bytes]:
    checkout = [PACKAGE.parent] if (PACKAGE.parent / "pyproject.toml").is_file() else []
    found = {
        name: (folder / name).read_bytes()
        for name in BESIDE
        for folder in [*checkout, PACKAGE]
        if (folder / name).is_file()
    }
    if "LICENSE" not in found:
        raise ValueError(f"{PACKAGE}: its LICENSE is missing, without which it may not be copied")
    return found


def walk(folder: Path) -> Iterable[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in path.parts):
            yield path.as_posix(), file


def commit() -> str | None:
    """Of the checkout, if this is one, with a mark if something was changed since."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            check=True,
            cwd=PACKAGE.parent,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def write(target: Path, contents: dict[str, bytes]) -> None:
    """All files or none, in place of what was there."""
    token = secrets.token_hex(4)
    partial, old = (target.with_name(f".{target.name}-{token}.{what}") for what in ("partial", "old"))
    try:
        for path, data in contents.items():
            file = partial / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        if target.exists():
            target.rename(old)
        partial.rename(target)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written: {error}") from None
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
