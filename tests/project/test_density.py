"""The density script counts what it says: tokens without docstrings, unpacking, lengths of functions, arguments.

pytest tests/project/test_density.py
"""

import ast
from collections import Counter
from pathlib import Path

import pytest
from density import Density, lines_of_tokens, main, measure

SOURCE = '''"""A docstring is no token."""

import math  # 2 tokens; a comment is none


class Model:
    """Nor is this one."""

    def forward(self, x, *rest, scale=1, **others):
        """Nor this."""
        a, b = x, "a string is one"
        a += f"{a!r} and {f'{b}'}: one token"
        total: int = 0

        (c, d), e = (a, b), [
            total,
        ]
        return c


async def shorter(x): return x
'''


TOKENS = {
    "import math": 2,
    "class Model:": 3,
    "def forward(": 18,
    "a, b = ": 7,
    "a += f": 3,
    "total: int": 5,
    "(c, d), e": 15,
    "total,": 2,
    "]": 1,
    "return c": 2,
    "async def": 9,
}


def test_tokens_are_counted_on_the_lines_where_they_begin(tmp_path: Path) -> None:
    counts = Counter(lines_of_tokens(SOURCE, ast.parse(SOURCE)))
    lines = SOURCE.splitlines()
    counted = {start: counts[n] for start in TOKENS for n in counts if lines[n - 1].lstrip().startswith(start)}
    assert counted == TOKENS
    found = measure([write(tmp_path, SOURCE)])
    assert (found.tokens, found.lines_with_tokens) == (sum(TOKENS.values()), len(TOKENS))
    assert found.tokens_per_line == sum(TOKENS.values()) / len(TOKENS)


def test_assignments_functions_and_arguments_are_counted(tmp_path: Path) -> None:
    found = measure([write(tmp_path, SOURCE)])
    assert (found.assignments, found.tuple_assignments, found.tuple_share) == (2, 2, 1.0)
    assert found.functions == (1, 10) or found.functions == (10, 1)
    assert (found.median_function, found.longest_function) == (5.5, 10)
    assert found.forward_arguments == 4
    assert found.lines == SOURCE.count("\n")


def test_files_and_folders_are_counted_as_one_set(tmp_path: Path) -> None:
    one = measure([write(tmp_path / "one", SOURCE)])
    write(tmp_path / "two" / "deeper", "x = 1\n")
    both = measure([tmp_path / "one" / "code.py", tmp_path / "two"])
    assert (both.tokens, both.lines_with_tokens) == (one.tokens + 3, one.lines_with_tokens + 1)
    assert (both.assignments, both.tuple_assignments) == (3, 2)


def test_what_is_empty_has_no_density(tmp_path: Path) -> None:
    found = measure([write(tmp_path, "# nothing\n")])
    assert found == Density(1, 0, 0, 0, 0, (), 0)
    assert (found.tokens_per_line, found.tuple_share, found.median_function, found.longest_function) == (0, 0, 0, 0)


@pytest.mark.parametrize(("path", "message"), [("missing.py", "expected a Python file"), ("bad.py", "expected Python")])
def test_what_is_no_python_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, message: str
) -> None:
    (tmp_path / "bad.py").write_text("def :", encoding="utf-8")
    assert main([str(tmp_path / path)]) == 2
    error = capsys.readouterr().err
    assert path in error and message in error and error.count("\n") == 1


def test_each_set_is_a_row_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, SOURCE)
    assert main([f"mine={file},{file}", str(file)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| mine | 6.1 | 100% | 5.5 | 10 | 4 |") and rows[3].startswith(f"| {file} | 6.1 |")


def test_without_arguments_the_core_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "| rope to model | " in capsys.readouterr().out


def write(folder: Path, source: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.py").write_text(source, encoding="utf-8")
    return folder / "code.py"
