"""The record in each copy: a software bill of materials in CycloneDX 1.6, as JSON.

One component is the copy, with its version, commit and licence, and with the patches in its pedigree. Inside it is a
component for each file, with the SHA-256 of the file in the copy. If patches changed a file, its pedigree has an
ancestor with the SHA-256 of the file in ltx2ref, or none if ltx2ref has no such file. A file that patches removed is
"excluded".

There is no purl, because a scanner would take a package of the same name in any index for this one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = "VENDORED.cdx.json"
PATCHES = "patches"
KIND = "ltx2ref:copy-of"


@dataclass(frozen=True)
class Origin:
    """What a copy was made from: a version of ltx2ref, and the SHA-256 of every file there and here."""

    version: str
    commit: str | None
    model_only: bool
    files: dict[str, str]  # digests of the files in the copy, by path
    upstream: dict[str, str]  # digests of the files of ltx2ref from which they were made
    patches: dict[str, str]  # digests of the patches, in the order in which they are applied


def write_record(origin: Origin) -> bytes:
    """Return the record as text, with one line for each file."""
    files = [file_component(path, origin) for path in sorted(origin.files.keys() | origin.upstream.keys())]
    files += [component(f"{PATCHES}/{name}", digest) for name, digest in origin.patches.items()]
    pedigree: dict[str, Any] = {}
    if origin.commit is not None:
        pedigree["commits"] = [{"uid": origin.commit}]
    if origin.patches:
        kind = {"type": "unofficial"}
        pedigree["patches"] = [kind | {"diff": {"url": f"{PATCHES}/{name}"}} for name in origin.patches]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": [
            {
                "type": "library",
                "name": "ltx2ref",
                "version": origin.version,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                **({"pedigree": pedigree} if pedigree else {}),
                "properties": [{"name": KIND, "value": "model" if origin.model_only else "package"}],
                "components": [],
            }
        ],
    }
    lines = ",\n    ".join(map(json.dumps, files))
    text = json.dumps(document, indent=1).replace('"components": []', f'"components": [\n    {lines}\n   ]')
    return (text + "\n").encode()


def file_component(path: str, origin: Origin) -> dict[str, Any]:
    """Return the component of a file, with an ancestor if patches changed it."""
    here, there = origin.files.get(path), origin.upstream.get(path)
    if here is None:
        return component(path, str(there)) | {"scope": "excluded"}
    if here == there:
        return component(path, here)
    ancestors = [] if there is None else [component(path, there)]
    return component(path, here) | {"pedigree": {"ancestors": ancestors}}


def component(path: str, digest: str) -> dict[str, Any]:
    """Return the component of a file with this digest."""
    return {"type": "file", "name": path, "hashes": [{"alg": "SHA-256", "content": digest}]}


def read_record(folder: Path) -> Origin:
    """Read what `write_record` wrote. Raises `ValueError` if there is no such record."""
    try:
        (library,) = json.loads((folder / RECORD).read_text(encoding="utf-8"))["components"]
        (kind,) = (x["value"] for x in library["properties"] if x["name"] == KIND)
        pedigree = library.get("pedigree", {})
        commits = [str(x["uid"]) for x in pedigree.get("commits", [])]
        files: dict[str, str] = {}
        upstream: dict[str, str] = {}
        for x in library["components"]:
            digest = {str(x["name"]): recorded_digest(x)}
            files |= {} if x.get("scope") == "excluded" else digest
            if "pedigree" in x:
                upstream |= {str(y["name"]): recorded_digest(y) for y in x["pedigree"]["ancestors"]}
            else:
                upstream |= digest
        names = [str(x["diff"]["url"]).removeprefix(f"{PATCHES}/") for x in pedigree.get("patches", [])]
        patches = {name: files.pop(f"{PATCHES}/{name}") for name in names}
        for name in names:
            del upstream[f"{PATCHES}/{name}"]
        commit = commits[0] if commits else None
        return Origin(str(library["version"]), commit, kind == "model", files, upstream, patches)
    except FileNotFoundError:
        raise ValueError(f"{folder}: expected a copy of ltx2ref, with its {RECORD}, and found none there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: expected a copy of ltx2ref, with its {RECORD}: {said}") from None


def recorded_digest(x: dict[str, Any]) -> str:
    """Return the digest in a file's component."""
    return str(x["hashes"][0]["content"])


def file_digest(data: bytes) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(data).hexdigest()
