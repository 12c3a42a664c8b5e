"""No docstring and no comment begins with "Of ...": it names its subject, or begins with a verb.

pytest tests/project/test_english.py
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import ltx2ref

ROOT = Path(ltx2ref.__file__).parents[1]
GENITIVE = "Of "


def openings(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the first line of text of each docstring, and of each comment or block of comments."""
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text.partition("\n")[0]
    before = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = token.line.lstrip().startswith("#")
            if not (alone and before == token.start[0] - 1):
                yield token.start[0], token.string.lstrip("#: ")
            before = token.start[0] if alone else 0


@pytest.mark.slow
def test_no_docstring_or_comment_opens_with_a_genitive() -> None:
    files = [path for folder in ("ltx2ref", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        for line, text in openings(path.read_text(encoding="utf-8"))
        if text.startswith(GENITIVE)
    ]
    assert not found, "\n" + "\n".join(found)


def test_openings_are_those_of_docstrings_and_of_blocks_of_comments() -> None:
    source = '''"""Of a module."""
# Of a block
# Of its second line
x = 1  # Of a value
# Of another block


class A:
    """Of a class,
    Of its second line."""

    async def f(self):
        """
        Of a method."""
        return "Of a string"  #: Of a result
'''
    assert sorted(openings(source)) == [
        (1, "Of a module."),
        (2, "Of a block"),
        (4, "Of a value"),
        (5, "Of another block"),
        (9, "Of a class,"),
        (13, "Of a method."),
        (15, "Of a result"),
    ]
