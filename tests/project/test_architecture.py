"""The architecture stays readable: how dense its lines are, how long its functions, and where its imports lead.

pytest tests/project/test_architecture.py
"""

import ast
from pathlib import Path

from density import measure

import ltx2ref

PACKAGE = Path(ltx2ref.__file__).parent
CORE = ("sizes", "rope", "embeddings", "modulation", "attention", "block", "model")  # in reading order
ALLOWED = {"dataclasses", "einops", "math", "torch", "typing"}


def path(name: str) -> Path:
    return PACKAGE / f"{name}.py"


def tree(name: str) -> ast.Module:
    return ast.parse(path(name).read_text(encoding="utf-8"))


def test_a_line_holds_at_most_11_and_a_half_tokens_and_a_fifth_of_the_assignments_unpack_tuples() -> None:
    density = measure([path(name) for name in CORE[1:]])
    assert density.tokens_per_line <= 11.5 and density.tuple_share <= 0.2


def test_no_function_is_longer_than_30_lines() -> None:
    assert measure([path(name) for name in CORE]).longest_function <= 30


def test_each_file_imports_only_from_files_that_were_read_before_it() -> None:
    for i, name in enumerate(CORE):
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in CORE[:i], f"{name}.py imports {node.module}"
            elif isinstance(node, ast.ImportFrom | ast.Import):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names]
                assert {module.split(".")[0] for module in modules} <= ALLOWED


def test_the_core_knows_no_conventions_and_no_check() -> None:
    for name in CORE:
        words = {node.id for node in ast.walk(tree(name)) if isinstance(node, ast.Name)}
        assert not words & {"Conventions", "isinstance", "float64"}, name
        assert not any(isinstance(node, ast.Raise | ast.Assert) for node in ast.walk(tree(name))), name


def test_the_documented_class_imports_the_core_and_its_configuration_alone() -> None:
    imported = {node.module for node in ast.walk(tree("interface")) if isinstance(node, ast.ImportFrom) and node.level}
    assert imported <= {*CORE, "config"}


def test_the_package_imports_no_other_implementation() -> None:
    for file in {*PACKAGE.rglob("*.py")} - {*(PACKAGE / "parity" / "oracles").glob("*.py")}:
        text = file.read_text(encoding="utf-8")
        assert "diffusers import" not in text and "import ltx_core" not in text
