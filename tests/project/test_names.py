"""No name at module level of the package means two things, except where a protocol requires it in several files.

pytest tests/project/test_names.py
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import ltx2ref

PACKAGE = Path(ltx2ref.__file__).parent
PARITY = [f"parity/{room}__init__.py" for room in ("", "explain/", "report/", "trace/")]
LAZY = ["__init__.py", "checkpoint/__init__.py", *PARITY]
ORACLES = ["parity/oracles/diffusers.py", "parity/oracles/ltx_core.py"]
# For each name: the files in which it means the same thing, and the protocol that requires it.
PROTOCOLS: dict[str, tuple[list[str], str]] = {
    "LAYOUT": (ORACLES, "`Layout` says where the taps of an implementation are"),
    "__getattr__": (LAZY, "Python calls it for a name that a package does not have yet"),
    "taps": (ORACLES, "`audit` calls it to run an implementation"),
    "LTX2VideoTransformer3DModel": (
        ["checkpoint/loading.py", "interface.py"],
        "diffusers' name: one adds `from_pretrained`",
    ),
}
# These still mean two things; no other may.
YET_TO_RENAME = ""


def defined(body: Iterable[ast.stmt]) -> Iterator[str]:
    """Yield the functions, classes and variables that a module defines, without what it imports."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (
                    x.id
                    for y in targets
                    for x in ast.walk(y)
                    if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
                )
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If() | ast.Try() | ast.With():
                handlers = [x for handler in getattr(node, "handlers", []) for x in handler.body]
                yield from defined([*node.body, *getattr(node, "orelse", []), *handlers])


def files_by_name(package: Path) -> dict[str, list[str]]:
    files = defaultdict(set)
    for path in package.rglob("*.py"):
        for name in defined(ast.parse(path.read_text(encoding="utf-8")).body):
            files[name].add(path.relative_to(package).as_posix())
    del files["__all__"]
    return {name: sorted(x) for name, x in sorted(files.items())}


@pytest.fixture(scope="module")
def shared() -> dict[str, list[str]]:
    return {name: files for name, files in files_by_name(PACKAGE).items() if len(files) > 1}


def test_a_name_means_one_thing(shared: dict[str, list[str]]) -> None:
    asked_for = {name: files for name, (files, _) in PROTOCOLS.items()}
    twice = {name: files for name, files in shared.items() if files != asked_for.get(name)}
    assert {name: files for name, files in twice.items() if name not in YET_TO_RENAME.split()} == {}


def test_no_exception_is_left_over(shared: dict[str, list[str]]) -> None:
    assert [name for name in PROTOCOLS if name not in shared] == []


def test_what_a_module_defines_is_found_and_what_it_imports_is_not(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        "import a\nfrom b import c\n__all__ = ['d']\n\ndef d(e):\n    f = 0\n\nclass G:\n    h = 0\n\n"
        "i, (j, *k) = [x for x in 'xyz']\nl: int = 0\nif a:\n    m = 0\nelse:\n    n = 0\na.b = a[0] = 0\n"
        "try:\n    o = 0\nexcept OSError:\n    p = 0\nasync def q(): ...\n"
    )
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "three.py").write_text("def d(): ...\nd = 0\nfrom one import G\n")
    found = files_by_name(tmp_path)
    assert "".join(found) == "Gdijklmnopq" and found.pop("d") == ["one.py", "two/three.py"]
    assert {tuple(x) for x in found.values()} == {("one.py",)}
