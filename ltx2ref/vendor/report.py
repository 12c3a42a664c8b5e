"""Lines in which the command line reports on a copy."""

from .copies import Copy, Written, listed, precedence


def copy_report(copy: Copy, asked: bool = False) -> list[str]:
    """Return lines that tell what a copy is and how it differs.

    `asked` says whether the package index was asked for the newest version.
    """
    is_newer = precedence(copy.version) > precedence(copy.installed)
    lines = [headline(copy)]
    if copy.changed:
        lines.append(f"changed there: {listed(copy.changed)}; --save-patch WHY keeps this as a patch")
    if copy.unapplied:
        lines.append(f"patches that were changed there: {listed(copy.unapplied)}; --update applies them")
    if precedence(copy.newest) > precedence(copy.version):
        if copy.installed == copy.newest:
            lines.append(f"newer version {copy.newest} is installed and differs in: {listed(copy.outdated)}")
        else:
            lines.append(f"newer version {copy.newest} is available: install it, then --update")
    elif copy.outdated:
        lines.append(f"another state of ltx2ref {copy.installed} is installed and differs in: {listed(copy.outdated)}")
    if is_newer:
        lines.append(f"newer than the installed ltx2ref {copy.installed}, so it was not compared with that")
    if copy.current:
        lines.append("unchanged" if is_newer else f"unchanged, and the same as the installed ltx2ref {copy.installed}")
    if asked:
        lines.append(
            "the package index could not be reached or has no ltx2ref: only the installed version was compared"
            if copy.offered is None
            else f"the package index has ltx2ref {copy.offered}"
        )
    return lines


def written_report(written: Written, dry_run: bool) -> list[str]:
    """Return lines that tell what was written, or would be in a dry run."""
    lines = ["nothing is written in this dry run"] if dry_run else []
    lines.append(headline(written.copy))
    if written.before is not None:
        lines[-1] += f"; from {written.before}" if written.before != written.copy.version else ""
        for what in ("added", "replaced", "removed"):
            if names := getattr(written, what):
                lines.append(f"{what}: {listed(names)}")
    if written.copy.patches:
        lines.append(f"patches: {listed(written.copy.patches)}; changed by them: {listed(written.copy.patched)}")
    return lines


def headline(copy: Copy) -> str:
    """Return one line about the origin and the size of a copy."""
    origin = f"ltx2ref {copy.version}{f', commit {copy.commit}' if copy.commit else ''}"
    return (
        f"{copy.folder}: {'the model' if copy.model_only else 'all'} of {origin}; {copy.files} files, {size(copy.size)}"
    )


def size(count: int) -> str:
    """Return a size in bytes as text."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
