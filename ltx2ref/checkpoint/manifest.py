"""Facts about the published files, from weights_manifest.json: contents, size, and which file a given one may be.

scripts/make_manifest.py writes that file to the top of the repository; the build copies it into the package.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE_FOLDER = Path(__file__).parents[1]
NAME = "weights_manifest.json"


class ManifestFile(NamedTuple):
    """A published file. Unknown facts are None; `evidence` says what supports the others."""

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
    """Return the whole manifest, or an empty dict where only the package's source was copied."""
    paths = [path for path in (PACKAGE_FOLDER / NAME, PACKAGE_FOLDER.parent / NAME) if path.is_file()]
    found: dict[str, Any] = json.loads(paths[0].read_text(encoding="utf-8")) if paths else {}
    return found


def files() -> list[ManifestFile]:
    """Return all published files."""
    return [ManifestFile(**entry) for entry in manifest().get("files", [])]


def find(size: int, tensors: int | None = None, sha256: str | None = None) -> list[ManifestFile]:
    """Return the published files of exactly `size` bytes that agree in every other fact known on both sides.

    There may be several: the dev and distilled files of 2.5 differ in nothing but the sha256.
    """
    return [
        file for file in files() if file.bytes == size and agree(file.tensors, tensors) and agree(file.sha256, sha256)
    ]


def agree(known: int | str | None, given: int | str | None) -> bool:
    """Return whether two facts are equal or one of them is unknown."""
    return known is None or given is None or known == given
