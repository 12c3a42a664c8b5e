"""Making, checking, updating and patching a copy. A folder is changed as a whole or not at all."""

import keyword
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..whole import hidden, make_parents, place, temporary_folder
from .contents import (
    ORIGIN,
    PACKAGE,
    PATCHED,
    is_checkout,
    model_contents,
    package_contents,
    visible,
    with_notice,
    without_notice,
)
from .patches import KEPT, PatchConflict, apply_patch, read_patch, write_patch
from .record import PATCHES, RECORD, Origin, file_digest, read_record, write_record

Files = dict[str, bytes]
STAGES = {"dev": -4, "a": -3, "b": -2, "rc": -1, "": 0, "post": 1}  # stages of a version, in their order


@dataclass(frozen=True)
class Copy:
    """A copy in another project, and how it differs from its record, from its patches and from this package."""

    folder: str
    version: str
    commit: str | None
    model_only: bool
    files: int
    size: int  # in bytes
    changed: list[str]  # files that were changed, added or removed there after the copy was written
    outdated: list[str]  # files that differ in this package, if the package is not older than the copy
    patches: list[str]  # patches that the copy was written with, in the order of their application
    patched: list[str]  # files that these patches changed
    unapplied: list[str]  # patches that were changed, added or removed after the copy was written
    installed: str  # the version of this package
    offered: str | None = None  # the newest version in the package index, if the index was asked and answered

    @property
    def newest(self) -> str:
        """Return the newest known version among those of the copy, this package and the index."""
        return max((x for x in (self.version, self.installed, self.offered) if x is not None), key=precedence)

    @property
    def current(self) -> bool:
        """Return whether the copy is unchanged and no newer version is known."""
        newer = precedence(self.newest) > precedence(self.version)
        return not (self.changed or self.outdated or self.unapplied or newer)


@dataclass(frozen=True)
class Written:
    """A copy as it was written, or would be written in a dry run, and the files that changed."""

    copy: Copy
    before: str | None  # the version of the copy that was replaced
    added: list[str]
    replaced: list[str]
    removed: list[str]


def vendor(
    parent: str | Path, name: str, *, model_only: bool = False, parents: bool = False, dry_run: bool = False
) -> Written:
    """Copy the package to `parent`/`name`, or with `model_only` just the model, which needs only torch and einops.

    Raises `ValueError` for a name that cannot be imported and if anything exists at that place. Raises `ValueError` if
    `parent` is not a folder, unless `parents` asks for it to be made. With `dry_run` nothing is written.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(
            f"--as {name}: expected a Python identifier that is no keyword, by which the copy can be imported"
        )
    target = Path(parent) / name
    if (target / RECORD).is_file():
        there = read_record(target)
        raise ValueError(f"{target}: already holds a copy of ltx2ref {there.version}; --update replaces it")
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target}: already exists and is not a copy of ltx2ref: it has no {RECORD}")
    if Path(parent).exists() and not Path(parent).is_dir():
        raise ValueError(f"{parent}: expected a folder in which to put the copy, got a file")
    if not Path(parent).is_dir() and not parents:
        raise ValueError(f"{parent}: expected an existing folder in which to put the copy; --parents makes it")
    if not dry_run:
        make_parents(target)
    return put_copy(target, model_only, contents_of(model_only), {}, None, {}, dry_run)


def update_copy(target: str | Path, *, dry_run: bool = False) -> Written:
    """Replace a copy by this version of the package, and apply its patches again.

    Raises `ValueError` if there is no copy, if it was changed after it was written, or if its version is newer than
    this one. Raises `PatchConflict` if a patch does not fit. In these cases, and with `dry_run`, nothing is written.
    """
    target = Path(target)
    origin, there = read_record(target), files_in(target)
    if changed := differing(origin.files, digests_of(there)):
        raise ValueError(
            f"{target}: not replaced, because it was changed after it was written: {listed(changed)}; "
            "--save-patch WHY keeps the changes as a patch"
        )
    if precedence(origin.version) > precedence(__version__):
        raise ValueError(f"{target}: is a copy of ltx2ref {origin.version}, which is newer than this {__version__}")
    upstream = contents_of(origin.model_only)
    return put_copy(target, origin.model_only, upstream, patches_in(target), origin.version, there, dry_run)


def save_patch(target: str | Path, why: str, *, dry_run: bool = False) -> Written:
    """Save the changes made in a copy as its next patch, patches/NUMBER-`why`.patch, which updates apply again.

    Raises `ValueError` if nothing was changed, and if this package is not the one that the copy was made from.
    """
    target = Path(target)
    origin, there, patches = read_record(target), files_in(target), patches_in(target)
    if not re.fullmatch(r"\w[\w.-]*", why):
        raise ValueError(f"--save-patch {why}: expected letters, digits, '-', '.' and '_', because a file is named so")
    upstream = contents_of(origin.model_only)
    if digests_of(upstream) != origin.upstream:
        raise ValueError(
            f"{target}: was made from ltx2ref {origin.version} at {origin.commit or 'an unknown commit'}, which is "
            f"not this one, {__version__}: install that one to save a patch"
        )
    if digests_of(patches) != origin.patches:
        raise ValueError(f"{target / PATCHES}: was changed after the copy was written: restore it to save a patch")
    before, after = without_notices(apply_all(target, upstream, patches)), without_notices(there)
    if kept := [path for path in KEPT if before.get(path) != after.get(path)]:
        raise ValueError(f"{target / kept[0]}: was changed, but no patch may change this file")
    if not (text := write_patch(before, after)):
        raise ValueError(f"{target}: has no changes to save")
    number = 1 + max((int(found[0]) for x in patches if (found := re.match(r"\d+", x))), default=0)
    patches = {**patches, f"{number:04}-{why.removesuffix('.patch')}.patch": text.encode()}
    return put_copy(target, origin.model_only, upstream, patches, origin.version, there, dry_run)


def check_copy(target: str | Path, *, ask_index: bool = False) -> Copy:
    """Compare a copy with its record and with this package. Raises `ValueError` if there is no copy.

    With `ask_index`, the newest version in the package index counts as well, unless the index cannot be reached.
    """
    target = Path(target)
    return survey(
        target, read_record(target), files_in(target), patches_in(target), newest_offered() if ask_index else None
    )


def survey(target: Path, origin: Origin, files: Files, patches: Files, offered: str | None = None) -> Copy:
    """Return what the record and the files of a copy say about it."""
    here = {} if precedence(origin.version) > precedence(__version__) else digests_here(origin.model_only)
    return Copy(
        folder=str(target),
        version=origin.version,
        commit=origin.commit,
        model_only=origin.model_only,
        files=len(files),
        size=sum(map(len, files.values())),
        changed=differing(origin.files, digests_of(files)),
        outdated=differing(origin.upstream, here) if here else [],
        patches=list(origin.patches),
        patched=differing(origin.files, origin.upstream),
        unapplied=differing(origin.patches, digests_of(patches)),
        installed=__version__,
        offered=offered,
    )


# ---------------------------------------------------------------- what is here and there
def contents_of(model_only: bool) -> Files:
    """Return the files of a new copy of this package, or of its model."""
    if (PACKAGE / RECORD).is_file() and read_record(PACKAGE).patches:
        raise ValueError(
            f"{PACKAGE}: is itself a copy with patches, of which no copies are made: use an installed ltx2ref"
        )
    return model_contents() if model_only else package_contents()


def digests_here(model_only: bool) -> dict[str, str]:
    """Return the digests that the files of a new copy would have."""
    if (PACKAGE / RECORD).is_file() and not model_only:  # this is a copy, and its record has ltx2ref's own digests
        return read_record(PACKAGE).upstream
    return digests_of(contents_of(model_only))


def files_in(target: Path) -> Files:
    """Return the files of a copy by path."""
    return {path: file.read_bytes() for path, file in visible(target)}


def patches_in(target: Path) -> Files:
    """Return the patches of a copy by name. They are applied in the order of their names."""
    return {file.name: file.read_bytes() for file in sorted((target / PATCHES).glob("*.patch"))}


def others_in(target: Path) -> Files:
    """Return the files in a copy's folder that do not belong to it: hidden files and the folder of patches."""
    files = {file.relative_to(target).as_posix(): file for file in target.rglob("*") if file.is_file()}
    ours = {RECORD, *(path for path, _ in visible(target))}
    return {
        path: file.read_bytes() for path, file in files.items() if path not in ours and "__pycache__" not in file.parts
    }


def digests_of(files: Files) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {path: file_digest(data) for path, data in files.items()}


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """Return the paths that are only in one of the two, or have different digests."""
    return sorted(path for path in a.keys() | b.keys() if a.get(path) != b.get(path))


def without_notices(files: Files) -> Files:
    """Return files without the notices in their headers that patches changed them."""
    return {path: without_notice(data) for path, data in files.items()}


def commit() -> str | None:
    """Return the commit of the checkout, marked if anything was changed since, or None if this is no checkout."""
    if (PACKAGE / RECORD).is_file():
        return read_record(PACKAGE).commit
    if not is_checkout() or not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, check=True, cwd=PACKAGE.parent, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


# ---------------------------------------------------------------- writing
def apply_all(target: Path, upstream: Files, patches: Files) -> Files:
    """Return the files with all patches applied. Raises `PatchConflict` at the first patch that does not fit."""
    files = upstream
    for name, data in patches.items():
        where = target / PATCHES / name
        try:
            text = data.decode().replace(PATCHED, ORIGIN)
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: expected text in UTF-8: {error}") from None
        files, conflicts = apply_patch(files, name, read_patch(str(where), text))
        if conflicts:
            raise PatchConflict(
                f"{where}: does not fit ltx2ref {__version__}, and nothing was written: "
                + "; ".join(map(str, conflicts)),
                conflicts,
            )
    return {path: data if upstream.get(path) == data else with_notice(data) for path, data in files.items()}


def put_copy(
    target: Path, model_only: bool, upstream: Files, patches: Files, before: str | None, there: Files, dry_run: bool
) -> Written:
    """Write a copy in place of the files that are `there`, and return what changed."""
    files = apply_all(target, upstream, patches)
    digests = digests_of(files), digests_of(upstream), digests_of(patches)
    origin = Origin(__version__, commit(), model_only, *digests)
    if not dry_run:
        beside = {f"{PATCHES}/{name}": data for name, data in patches.items()}
        replace_folder(target, others_in(target) | beside | files | {RECORD: write_record(origin)})
    return Written(
        survey(target, origin, files, patches),
        before,
        added=sorted(files.keys() - there.keys()),
        replaced=sorted(path for path in files.keys() & there.keys() if files[path] != there[path]),
        removed=sorted(there.keys() - files.keys()),
    )


def replace_folder(target: Path, contents: Files) -> None:
    """Write all files, or none if that fails, in place of the existing folder. Raises `ValueError` if that fails."""
    target = target.resolve()
    old = hidden(target.parent, "old")
    try:
        with temporary_folder(target.parent) as folder:
            for path, data in contents.items():
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            try:
                if target.exists():
                    target.rename(old)
                place(folder, target)
            except BaseException:  # also Ctrl-C: the only copy of somebody's changes may be what was moved aside
                if old.exists():
                    old.rename(target)
                raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{target}: cannot be written: {error.strerror or error}") from None


# ---------------------------------------------------------------- versions
def precedence(version: str) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return a key by which versions are ordered: 0.2.0.dev1 < 0.2.0rc1 < 0.2.0 = 0.2 < 0.2.0.post1."""
    found = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.?(dev|a|b|rc|post)(\d+))?(?:\+.*)?", version)
    if found is None:
        raise ValueError(f"ltx2ref {version}: expected a version such as 0.1.0")
    numbers = [int(n) for n in found[1].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers), (STAGES[found[2] or ""], int(found[3] or 0))


def newest_offered() -> str | None:
    """Ask pip for the newest release in its package index.

    Return None if there is no pip, no network or no such package.
    """
    command = [sys.executable, "-m", "pip", "index", "versions", "ltx2ref", "--retries", "0", "--timeout", "10"]
    try:
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--no-input"],
            env={**os.environ, "PIP_QUIET": "0"},  # which would keep the answer back
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"ltx2ref \((\S+)\)", done.stdout)
    return found[1] if done.returncode == 0 and found else None


def listed(names: list[str]) -> str:
    """Return the first names, and how many others there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "")
