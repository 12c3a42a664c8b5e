"""docs/architecture.md: its code runs and prints what it says, its links lead to the lines that they quote.

pytest tests/docs/test_tour.py
"""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import make_tour
import pytest
from make_tour import LINK, TOUR, refreshed

ROOT = Path(__file__).parents[2]
TEXT = TOUR.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_tour_is_as_the_code_has_it() -> None:
    """If this fails after a change of the code, run `python scripts/make_tour.py --write` and read what changed."""
    assert refreshed(TEXT) == TEXT
    assert len(LINK.findall(TEXT)) > 25 and len(make_tour.SHAPES.findall(TEXT)) > 20


def test_every_block_of_python_computes_something_that_is_checked_or_printed() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 12 and all("print(" in block for block in blocks)
    assert sum(block.count("close(") for block in blocks) > 10


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            "[`def rms_norm(x: Tensor)`](../ltx2ref/modulation.py#L999)",
            r"\[`def rms_norm\(x: Tensor\)`\]\(\.\./ltx2ref/modulation\.py#L\d\d\)",
        ),
        ("`proj_in`: 2.3 `(9)`, tiny `()`", r"`proj_in`: 2\.3 `\(1, 6144, 4096\)`, tiny `\(2, 105, 28\)`"),
        (
            "```python\nprint(6 * 7)\n```\n\n```text\n41\n```\n",
            "```python\nprint\\(6 \\* 7\\)\n```\n\n```text\n42\n```\n",
        ),
    ],
)
def test_what_is_wrong_is_corrected(given: str, expected: str) -> None:
    assert re.fullmatch(expected, refreshed(given)) and "L999" not in refreshed(given)


@pytest.mark.parametrize("code", ["no such line", "import torch"])
def test_code_that_is_nowhere_or_not_unique_is_an_error(code: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"model.py: expected `{code}` in one line, found it in")):
        refreshed(f"[`{code}`](../ltx2ref/model.py#L1)")


def test_a_wrong_formula_fails() -> None:
    wrong = TEXT.replace("* (1 + scale[:, None]) + shift", "* scale[:, None] + shift", 1)
    with pytest.raises(AssertionError, match="not close"):
        refreshed(wrong)


def test_the_figures_are_there_in_light_and_dark() -> None:
    used = set(re.findall(r"figures/[\w-]+\.svg", TEXT))
    assert used == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs/figures").iterdir()}
    assert {name.replace("-light", "-dark") for name in used if "-light" in name} == {
        name for name in used if "-dark" in name
    }


@pytest.mark.slow
@pytest.mark.matplotlib
def test_the_figures_are_those_of_the_script(tmp_path: Path) -> None:
    version = importlib.metadata.version("matplotlib")
    subprocess.run([sys.executable, ROOT / "scripts/make_figures.py", "--out", tmp_path], check=True)
    for path in tmp_path.iterdir():
        recorded = (ROOT / "docs/figures" / path.name).read_text(encoding="utf-8")
        if f"Matplotlib v{version}" not in recorded:
            pytest.skip(f"the figures were made with another matplotlib than {version}")
        assert path.read_text(encoding="utf-8") == recorded, path.name
