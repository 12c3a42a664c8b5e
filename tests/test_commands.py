"""Every command that the documents and the helps show runs, in a folder with the files that they name.

    pytest tests/test_commands.py

Commands of the package run as they are shown, in this process, with words for files of one's own replaced (PORT) and
with fewer cases where they run all. For other commands it is checked that what they name is there.
"""
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy_port
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_model
from writers import quantisable_config, write_diffusers, write_fp8_scaled, write_single_file

from ltx2ref import cli
from ltx2ref.kit import cases as kit_cases
from ltx2ref.kit import export

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "ltx2ref" / "kit" / "README.md"]
SOURCES = [*(ROOT / "ltx2ref").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
OWN = {"PORT": "my_port:run", "PATH": "model.safetensors", "SRC": "model.safetensors", "DST": "written",
       "REFERENCE": "reference.safetensors", "CANDIDATE": "port.safetensors", "RESULTS": "results",
       "diffusers|lightricks": "diffusers", "DTYPE": "float32"}
# Commands of the package that run elsewhere, and where.
ELSEWHERE = {r"ltx2ref verify$": ".ci/run", r"python -m (myproject\.)?ltx2": "tests/test_vendor.py",
             r"pip install": ".ci/run", r"mkdocs build --strict$": ".ci/run"}


def shown() -> dict[str, str]:
    """Each command without what is said about it, and the file that shows it."""
    found: dict[str, str] = {}
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)
        lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
        inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found |= dict.fromkeys((command(x) for x in (*lines, *inline)), path.name)
    for path in SOURCES:
        lines = re.findall(r"^ {2,4}(\S.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found |= dict.fromkeys(map(command, lines), path.name)
    del found[""]
    return found


def command(line: str) -> str:
    """Empty for a line that is none, or that only names one."""
    line = re.split(r" {2,}| #", re.sub(r"\s*\n\s*", " ", line))[0].strip()
    is_one = re.match(r"(\w+=\S+ )?(ltx2ref|python3?|pytest|pip|mkdocs) [-\w./'*{<]", line)
    return line if is_one and not re.fullmatch("ltx2ref (audit|compare|inspect)", line) else ""


SHOWN = shown()
OURS = [line for line in SHOWN if line.startswith("ltx2ref ") and not any(re.match(x, line) for x in ELSEWHERE)]
SCRIPTS = sorted({line.split()[1] for line in SHOWN if re.match(r"python3? scripts/", line)})


def test_nothing_is_shown_that_nobody_looks_at() -> None:
    others = [line for line in SHOWN if line not in OURS and not any(re.match(x, line) for x in ELSEWHERE)]
    assert [line for line in others if not re.search(r"python scripts/|pytest( |$)", line)] == []
    assert len(OURS) >= 30 and len(SCRIPTS) >= 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands name: a port, checkpoints, traces, a kit and results for it."""
    folder = tmp_path_factory.mktemp("files")
    auditing = (ROOT / "docs" / "auditing.md").read_text(encoding="utf-8")
    code = {x.split("\n", 1)[0]: x for x in re.findall(r"```python\n(.*?)```", auditing, re.DOTALL)}
    (folder / "my_port.py").write_text(code["# my_port.py"], encoding="utf-8")
    config = quantisable_config("2.3")
    state = dict(random_model(config).state_dict())
    write_single_file(folder / "model.safetensors", state, config)
    write_single_file(folder / "ltx-2.3-22b-dev.safetensors", state, config)
    write_fp8_scaled(folder / "ltx-2.3-22b-dev-fp8.safetensors", state, config)
    (folder / "transformer").mkdir()
    write_diffusers(folder / "transformer", state, config)
    (folder / "myproject").mkdir()
    with pytest.MonkeyPatch.context() as here, small():
        here.chdir(folder)
        exec(code["# truth.py"], {})
        save_file(load_file("reference.safetensors"), "port.safetensors")
        export.export("kit")
        here.setattr(sys, "argv", ["numpy_port.py", "kit", "results"])
        numpy_port.main()
    return folder


def small() -> patch.multiple:  # type: ignore[type-arg]
    return patch.multiple(export, COMPONENTS=kit_cases.COMPONENTS[:3], MODELS=(kit_cases.LONG,))


@pytest.mark.parametrize("line", OURS)
def test_a_command_of_the_package_runs_as_shown(
    line: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if re.search(r"\baudit .*(PORT|my_port|diffusers|ltx-core)", line):
        pytest.importorskip("diffusers")
    if re.search(r"\baudit .*ltx-core( |$)", line):
        pytest.importorskip("ltx_core")
    here = shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "my_port", raising=False)
    importlib.invalidate_caches()
    arguments = [OWN.get(x, x) for x in shlex.split(line.replace("[", "").replace("]", "").partition(" > ")[0])[1:]]
    if arguments[0] == "convert":
        shutil.rmtree(here / arguments[2], ignore_errors=True)
    if arguments[:2] == ["kit", "export"]:
        shutil.rmtree(here / arguments[2])
    if "--check" in arguments:  # of a copy, which an earlier command made
        assert cli.main(arguments[:-1]) == 0
    monkeypatch.setattr(cli, "CASES", [case for case in cli.CASES if case.name in ("t2v", "i2v")])
    with small():
        status = cli.main(arguments)
    out, error = capsys.readouterr()
    assert status == expected(arguments), error
    assert out if status != 2 else len(error.splitlines()) == 1


def expected(arguments: list[str]) -> int:
    """The port of the example has a bug; ltx-core has conventions of its own; and there may be no GPU."""
    if "cuda" in arguments and not torch.cuda.is_available():
        return 2
    candidates = [x for x in arguments if x in ("my_port:run", "ltx-core")]
    return int(arguments[0] == "audit" and bool(candidates) and "ltx2ref:ltx-core-2026-03" not in arguments)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_options_that_are_shown(script: str) -> None:
    if script == "scripts/make_figures.py":
        pytest.importorskip("matplotlib")
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT, env={
        "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    for line in SHOWN:
        if f" {script} " in f"{line} ":
            assert set(re.findall(r" (--[\w-]+)", line)) <= set(re.findall(r"(--[\w-]+)", done.stdout)), line


def test_the_tests_that_are_shown_are_there() -> None:
    named = {x for line in SHOWN for x in re.findall(r"pytest (tests/\w+\.py)", line)}
    assert len(named) >= 5 and all((ROOT / x).exists() for x in named)
