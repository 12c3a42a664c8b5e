"""Check docs/architecture.md against the code, or bring it up to date.

    python scripts/make_tour.py            exit status 1, with a diff, if anything is not as the code has it
    python scripts/make_tour.py --write    write line numbers, shapes and printed output anew

Three things are derived. A link whose text is a line of code, [`code`](../ltx2ref/file.py#L1), leads to the one line of
that file which contains the code. `tap`: 2.3 `(...)`, tiny `(...)` are the shapes of a tap (docs/auditing.md) in a
forward of release 2.3 at full width, on the meta device, and of the conformance case 2.3/t2v. And each python block
is run, in one namespace, and followed by what it prints as a text block.
"""

import argparse
import contextlib
import difflib
import functools
import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ltx2ref import LTX_2_3, LTX2VideoTransformer3DModel, trace
from ltx2ref.describe import blank_inputs, lengths
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.generator import build
from ltx2ref.parity.run import run

TOUR = Path(__file__).parents[1] / "docs" / "architecture.md"
LINK = re.compile(r"\[`([^`]+)`\]\((\.\./ltx2ref/[\w/]+\.py)#L(\d+)\)")
SHAPES = re.compile(r"`([\w.]+)`: 2\.3 `([^`]*)`, tiny `([^`]*)`")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def refreshed(text: str) -> str:
    """Return the text with every derived part as it should be. Raise `ValueError` with all code that is nowhere."""
    if problems := [problem for match in LINK.finditer(text) if (problem := misquoted(match))]:
        raise ValueError("\n".join(problems))
    return BLOCK.sub(functools.partial(with_output, {}), SHAPES.sub(with_shapes, LINK.sub(with_line, text)))


def lines_with(match: re.Match[str]) -> list[int]:
    lines = (TOUR.parent / match[2]).read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, 1) if match[1] in line]


def misquoted(match: re.Match[str]) -> str | None:
    found = lines_with(match)
    return f"{match[2]}: expected `{match[1]}` in one line, found it in {found or 'none'}" if len(found) != 1 else None


def with_line(match: re.Match[str]) -> str:
    return f"[`{match[1]}`]({match[2]}#L{lines_with(match)[0]})"


def with_shapes(match: re.Match[str]) -> str:
    full, tiny = (taps[match[1]] for taps in (shapes_of_2_3(), shapes_of_the_case()))
    return f"`{match[1]}`: 2.3 `{full}`, tiny `{tiny}`"


@functools.cache
def shapes_of_2_3() -> dict[str, tuple[int, ...]]:
    config = replace(LTX_2_3, num_layers=1)
    with torch.device("meta"), torch.no_grad():
        model = LTX2VideoTransformer3DModel(config)
        with trace(model) as taps:
            model(**blank_inputs(config, lengths(config, 121, 512, 768), torch.float32))
    return {name: tuple(x.shape) for name, x in taps.items()}


@functools.cache
def shapes_of_the_case() -> dict[str, tuple[int, ...]]:
    case = next(case for case in CASES if case.id == "2.3/t2v")
    return {name: tuple(x.shape) for name, x in run(build(case.config, torch.float32), case.inputs()).items()}


def with_output(names: dict[str, Any], match: re.Match[str]) -> str:
    code, printed = match[1], io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(TOUR), "exec"), names)
    said = printed.getvalue()
    return f"```python\n{code}```\n" + (f"\n```text\n{said}```\n" if said else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    torch.set_num_threads(1)
    text = TOUR.read_text(encoding="utf-8")
    try:
        new = refreshed(text)
    except ValueError as error:
        sys.exit(f"{error}\nQuote the lines that do this now.")
    if write:
        TOUR.write_text(new, encoding="utf-8")
        return 0
    diff = difflib.unified_diff(text.splitlines(), new.splitlines(), "as it is", "as the code has it", lineterm="")
    print("".join(f"{line}\n" for line in diff), end="")
    return int(new != text)


if __name__ == "__main__":
    sys.exit(main())
