"""Every command that the documents and the helps show runs, in a folder with the files that they name.

    pytest tests/docs/test_commands.py

Commands of the package run as they are shown, in this process, with words for files of one's own replaced (PORT) and
with fewer cases where they run all. For other commands it is checked that what they name is there.
"""

import importlib
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from shown import ROOT, arguments_of, expected_status, needed_by, runs_elsewhere, shown, small_kit, write_files

from ltx2ref import cli
from ltx2ref.parity import cases, kernels

SHOWN = shown()
OURS = [line for line in SHOWN if line.startswith("ltx2ref ") and not runs_elsewhere(line)]
SCRIPTS = sorted({line.split()[1] for line in SHOWN if re.match(r"python3? scripts/", line)})


def marks_of(script: str) -> list[pytest.MarkDecorator]:
    """Return the marks of what a script imports before it reads its options."""
    source = (ROOT / script).read_text(encoding="utf-8")
    return [
        getattr(pytest.mark, module)
        for module in ("diffusers", "ltx_core", "matplotlib")
        if re.search(rf"^(import|from) .*\b{module}\b", source, re.MULTILINE)
    ]


def test_nothing_is_shown_that_nobody_looks_at() -> None:
    others = [line for line in SHOWN if line not in OURS and not runs_elsewhere(line)]
    assert [line for line in others if not re.search(r"python scripts/|pytest( |$)", line)] == []
    assert len(OURS) >= 30 and len(SCRIPTS) >= 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[getattr(pytest.mark, x) for x in needed_by(line)]) for line in OURS]
)
def test_a_command_of_the_package_runs_as_shown(
    line: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.delitem(sys.modules, "my_port", raising=False)
    importlib.invalidate_caches()
    arguments = arguments_of(line)
    if arguments[0] == "convert":
        shutil.rmtree(here / arguments[2], ignore_errors=True)
    if arguments[:2] == ["kit", "export"] and "--list" not in arguments:
        shutil.rmtree(here / arguments[2])
    if {"--check", "--update", "--save-patch"} & {*arguments}:  # commands on a copy, which an earlier command made
        assert cli.main([*arguments[:4], "--model"]) == 0
        if "--save-patch" in arguments:
            (here / arguments[1] / arguments[3] / "ours.py").touch()
    for name in ("CASES", "RECORDED"):
        monkeypatch.setattr(cases, name, [case for case in getattr(cases, name) if case.name in ("t2v", "i2v")])
    for name in ("KERNELS", "LONG_KERNELS"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name)[-1:])
    with small_kit():
        status = cli.main(arguments)
    out, error = capsys.readouterr()
    assert status == expected_status(arguments), error
    assert out if status != 2 else len(error.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("script", [pytest.param(script, marks=marks_of(script)) for script in SCRIPTS])
def test_a_script_has_the_options_that_are_shown(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a new one for each would import torch again."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for line in SHOWN:
        if f" {script} " in f"{line} ":
            assert set(re.findall(r" (--[\w-]+)", line)) <= set(re.findall(r"(--[\w-]+)", printed)), line


def test_the_tests_that_are_shown_are_there() -> None:
    named = {x for line in SHOWN for x in re.findall(r"pytest (tests/\w+/\w+\.py)", line)}
    assert len(named) >= 5 and all((ROOT / x).exists() for x in named)
