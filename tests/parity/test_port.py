"""A port is found by module or by file, together with the files beside it, and its faults are reported in one line.

pytest tests/parity/test_port.py
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltx2ref import cli
from ltx2ref.parity.audit import candidate_named
from ltx2ref.parity.guard import PortFailed
from ltx2ref.parity.trace.port import PARAMETERS, port_named

GIVEN = dict.fromkeys(PARAMETERS, 1)
PORT = """
import beside_door

def run(config, state, inputs, dtype):
    import later_door
    return {"sum": config + state + inputs + dtype, "from": (beside_door.WHERE, later_door.WHERE)}
"""
FILES = {
    "port_door.py": PORT,
    "beside_door.py": "WHERE = 'here'",
    "later_door.py": "WHERE = 'here'",
    "sub/port_door.py": PORT,
    "sub/beside_door.py": "WHERE = 'sub'",
    "sub/later_door.py": "WHERE = 'sub'",
    "needs_door.py": "\nimport missing_door\n",
    "passes_on_door.py": "import needs_door",
    "raises_door.py": "import torch\n\ntorch.zeros(2).view(3)\n",
    "syntax_door.py": "x = 1\ndef f(:\n",
    "exits_door.py": "import sys\nsys.exit('usage: exits')\n",
    "silent_door.py": "raise KeyError",
    "other_door.py": "run = 3\ndef forward(x): pass\n",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change into a folder that is not on the import path, as for a console script."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x not in ("", str(tmp_path))])
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_door")]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("port_door:run", "here"),
        ("port_door.py:run", "here"),
        ("sub/port_door.py:run", "sub"),
        ("{}/sub/port_door.py:run", "sub"),
    ],
)
def test_a_port_is_found_and_finds_what_stands_beside_it_at_once_and_later(name: str, where: str, here: Path) -> None:
    before = [*sys.path]
    run = port_named(name.format(here))
    assert run(**GIVEN) == {"sum": 4, "from": (where, where)}
    assert sys.path == before


def test_a_file_with_a_colon_in_its_path_is_a_file(here: Path) -> None:
    r"""Split at the last colon, as in C:\ports\port.py:run."""
    (here / "C:").mkdir()
    (here / "C:" / "drive_door.py").write_text("def run(**given):\n    return len(given)\n")
    assert port_named("C:/drive_door.py:run")(**GIVEN) == 4


def test_a_file_that_is_imported_already_is_that_module() -> None:
    assert port_named("port_door.py:run")(**GIVEN) == port_named("port_door:run")(**GIVEN)
    assert candidate_named("port_door.py:run").name == "port_door.py:run"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none_door:run", "there is no module none_door in {}, nor is one installed"),
        ("torch.none_door:run", "there is no module torch.none_door in {}, nor is one installed"),
        ("sub/none_door.py:run", "there is no file {}/sub/none_door.py"),
        ("needs_door:run", "needs_door imports missing_door, which is not installed (needs_door.py:2)"),
        ("needs_door.py:run", "needs_door.py imports missing_door, which is not installed (needs_door.py:2)"),
        ("passes_on_door:run", "passes_on_door imports missing_door, which is not installed (needs_door.py:2)"),
        (
            "raises_door:run",
            "importing raises_door raised RuntimeError at raises_door.py:3: shape '[3]' is invalid for input of size 2",
        ),
        ("syntax_door:run", "importing syntax_door raised SyntaxError at syntax_door.py:2: invalid syntax"),
        ("syntax_door.py:run", "importing syntax_door.py raised SyntaxError at syntax_door.py:2: invalid syntax"),
        ("exits_door:run", "importing exits_door raised SystemExit at exits_door.py:2: usage: exits"),
        ("silent_door.py:run", "importing silent_door.py raised KeyError at silent_door.py:1"),
        ("other_door:run", "expected a function, got run of type int"),
        ("other_door:missing", "other_door has no missing; its functions are forward"),
        ("other_door.py:forward", "expected a function of config, state, inputs, dtype, got forward(x)"),
        ("other_door.py", "expected the file and a function in it, other_door.py:FUNCTION"),
        ("sub/port_door:run", "sub/port_door is not the name of a module; for a file it would be sub/port_door.py:run"),
        (".port_door:run", ".port_door is not the name of a module"),
        ("port_door", "no such file; expected diffusers, ltx-core, ltx2ref:CONVENTIONS, a trace file"),
        ("port_door:", "no such file; expected"),
        (":run", "no such file; expected"),
    ],
)
def test_what_is_no_port_is_said_in_one_line_and_exits_2_or_3_if_it_raises(
    name: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raises = "raised" in said or "which is not installed" in said
    assert cli.main(["audit", name, "--case", "2.3/t2v"]) == (3 if raises else 2)
    out, error = capsys.readouterr()
    assert error.startswith(f"ltx2ref: {name}: {said.format(here)}") and error.count("\n") == 1 and not out


def test_a_file_that_would_take_the_name_of_another_module_is_refused(here: Path) -> None:
    (here / "torch.py").write_text("def run(**given): pass\n")
    with pytest.raises(ValueError, match=r"torch\.py:run: another module torch is imported already, from .*__init__"):
        port_named("torch.py:run")
    import torch

    assert torch.zeros(1) == 0


def test_a_port_that_fails_once_can_be_repaired_and_named_again(here: Path) -> None:
    for name in ("silent_door.py:run", "silent_door:run"):
        with pytest.raises(PortFailed, match="KeyError"):
            port_named(name)
    (here / "silent_door.py").write_text("def run(**given):\n    return 'repaired'\n")
    assert port_named("silent_door.py:run")(**GIVEN) == "repaired"
