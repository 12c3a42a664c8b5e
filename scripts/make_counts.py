"""Check the counts in the README and the documentation against the code. The unit is always a case in one dtype.

    python scripts/make_counts.py            print the counts; exit status 1 if a text says otherwise
    python scripts/make_counts.py --write    correct the texts

Nothing is run: how many there are is counted here, what comes of them is printed by the commands that the texts name.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

from ltx2ref.kit.cases import COMPONENTS, MODELS
from ltx2ref.parity.cases import RECORDED, Case
from ltx2ref.parity.kernels import KERNELS, Kernel
from ltx2ref.parity.machines import MACHINES
from ltx2ref.parity.record import EXACT_DTYPES, NATIVE_DTYPES, load_exact

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def counts() -> dict[str, int]:
    """Return each count by the words around it, in which N stands for the number."""
    there: list[Case | Kernel] = [*RECORDED, *KERNELS]
    whole, single = len(RECORDED) * len(EXACT_DTYPES), len(KERNELS) * len(EXACT_DTYPES)
    native = sum(case.native for case in RECORDED) * len(NATIVE_DTYPES)
    return {
        "N recorded cases": whole + single,
        "N cases of whole models": whole,
        "N cases of single operations": single,
        "exact arithmetic, N taps": sum(
            len(load_exact(case, dtype).digests) for case in there for dtype in EXACT_DTYPES
        ),
        "N of the first, float32 and bfloat16": native,
        "N of the others, float32 and bfloat16": (len(RECORDED) + len(KERNELS)) * len(NATIVE_DTYPES) - native,
        "N live cases": live_cases(),
        "N cases of the conformance kit": (len(COMPONENTS) + len(MODELS)) * len(NATIVE_DTYPES),
        "N simulated machines": len(MACHINES),
    }


def live_cases() -> int:
    """Return how many comparisons with diffusers tests/**/test_parity.py makes: 3 releases, 2 dtypes, all its cases."""
    (path,) = (ROOT / "tests").rglob("test_parity.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CASES":
            assert isinstance(node.value, ast.Dict)
            return len(node.value.keys) * 3 * len(NATIVE_DTYPES)
    raise ValueError(f"{path}: expected a dictionary CASES, found none")


def corrected(text: str, numbers: dict[str, int]) -> str:
    """Return the text with each count as the code has it."""
    for words, number in numbers.items():
        before, after = (re.escape(part).replace(r"\ ", r"\s+") for part in words.split("N", 1))
        text = re.sub(rf"({before})(?<![\d,])\d[\d,]*({after})", rf"\g<1>{number:,}\g<2>", text)
    return text


def main() -> int:
    """Print the counts, and compare or correct the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="correct the texts")
    write = parser.parse_args().write
    numbers, status = counts(), 0
    for words, number in numbers.items():
        print(words.replace("N", f"{number:,}", 1))
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        if (new := corrected(text, numbers)) != text:
            if write:
                path.write_text(new, encoding="utf-8")
            else:
                status = 1
                for old, line in zip(text.splitlines(), new.splitlines(), strict=True):
                    if old != line:
                        print(f"{path.relative_to(ROOT)}: {old}\n  should be: {line}")
    return status


if __name__ == "__main__":
    sys.exit(main())
