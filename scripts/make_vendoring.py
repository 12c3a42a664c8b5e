"""Check what docs/vendoring.md shows against what its commands print, or bring it up to date.

    python scripts/make_vendoring.py            exit status 1, with a diff, if a command prints anything else
    python scripts/make_vendoring.py --write    write what the commands print

All shell blocks run in order, in an empty folder with `myproject` in it. A text block after one is what it prints,
without the commit that a copy from a checkout names.
"""

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "vendoring.md"
BLOCK = re.compile(r"```sh\n(.*?)```\n(\n```text\n.*?```\n)?", re.DOTALL)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args(arguments).write
    text = PATH.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        found = refreshed(text, Path(folder))
    if write:
        PATH.write_text(found, encoding="utf-8")
        return 0
    name = PATH.name
    sys.stdout.writelines(difflib.unified_diff(text.splitlines(True), found.splitlines(True), name, f"{name}, run"))
    return 0 if found == text else 1


def refreshed(text: str, folder: Path) -> str:
    """Return the document with what its commands print when they run in a folder."""
    (folder / "myproject").mkdir()
    (folder / "bin").mkdir()
    for name, module in (("python", ""), ("ltx2ref", "-m ltx2ref ")):
        launcher = folder / "bin" / name
        launcher.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}:." exec "{sys.executable}" {module}"$@"\n')
        launcher.chmod(0o755)
    return BLOCK.sub(lambda found: with_printed(found, folder), text)


def with_printed(found: re.Match[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-c", found[1]], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    printed = re.sub(r", commit \w+(-dirty)?", "", done.stdout)
    shown = f"\n```text\n{printed}```\n" if found[2] else ""
    return f"```sh\n{found[1]}```\n{shown}"


if __name__ == "__main__":
    sys.exit(main())
