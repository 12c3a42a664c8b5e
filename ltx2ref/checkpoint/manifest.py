"""weights_manifest.json, read: what the published files hold, how large they are, and which one a file may be.

It stands at the top of the repository, written by scripts/make_manifest.py; the build copies it into the package.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE_FOLDER = Path(__file__).parents[1]
NAME = "weights_manifest.json"


class ManifestFile(NamedTuple):
    """One published file. None where a fact is not known; `evidence` says what backs the others."""

    repository: str
    name: str
    revision: str | None
    bytes: int | None
    sha256: str | None
    format: str | None
    contents: str | None
    tensors: int | None
    release: str
    note: str | None
    evidence: list[str]


@functools.cache
def manifest() -> dict[str, Any]:
    """The whole manifest, from the package or the checkout; empty where only the package's source was copied."""
    paths = [path for path in (PACKAGE_FOLDER / NAME, PACKAGE_FOLDER.parent / NAME) if path.is_file()]
    found: dict[str, Any] = json.loads(paths[0].read_text(encoding="utf-8")) if paths else {}
    return found


def files() -> list[ManifestFile]:
    return [ManifestFile(**entry) for entry in manifest().get("files", [])]


def find(size: int, tensors: int | None = None, sha256: str | None = None) -> list[ManifestFile]:
    """The published files of exactly `size` bytes that agree in each other fact known to both.

    Several may: dev and distilled of 2.5 differ in nothing but the sha256.
    """
    return [
        file for file in files() if file.bytes == size and agree(file.tensors, tensors) and agree(file.sha256, sha256)
    ]


def agree(known: int | str | None, given: int | str | None) -> bool:
    return known is None or given is None or known == given
