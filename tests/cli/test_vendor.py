"""Copies in other projects work under another name, with nothing else importable, and say how they differ.

pytest tests/cli/test_vendor.py
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_inputs, random_model, tiny_config

import ltx2ref
from ltx2ref import vendor
from ltx2ref.cli import main

pytestmark = pytest.mark.slow

PACKAGE = Path(ltx2ref.__file__).parent
NAME = "the_copy"


def closure(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """Installed distributions with all that they need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    queue = list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for other platforms
            continue
        queue += [
            re.split(r"[^\w.-]", needed, maxsplit=1)[0]
            for needed in found[name].requires or ()
            if "extra ==" not in needed
        ]
    return found


def importable(folder: Path, *names: str) -> Path:
    """A folder to import these distributions from, what they need, and nothing else."""
    folder.mkdir()
    for distribution in closure(names).values():
        for top in {file.parts[0] for file in distribution.files or () if ".." not in file.parts}:
            if top != "__pycache__" and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def run(project: Path, site: Path, code: str, *arguments: str) -> str:
    """Python without site-packages and without this package: the project, and what `site` has."""
    opening = f"import sys; sys.path[:0] = [{str(project)!r}, {str(site)!r}]; import torch; torch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", opening + code, *arguments],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder_copied_by_hand_verifies_under_another_name(tmp_path: Path) -> None:
    """As in docs/vendoring.md without the command: a plain copy, into a package of an empty project."""
    project, site = tmp_path / "project", importable(tmp_path / "site", "torch", "einops", "safetensors", "numpy")
    for path, file in vendor.walk(PACKAGE):
        target = project / "parts" / NAME / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    code = f"from parts.{NAME}.cli import main; sys.exit(main(sys.argv[1:]))"
    found = json.loads(run(project, site, code, "verify", "--case", "*/t2v", "--json"))
    assert len(found["results"]) == 9  # three releases in three dtypes; the exit status was 0
    for absent in ("ltx2ref", "diffusers", "rich"):
        assert run(project, site, f"import importlib.util as u; print(u.find_spec({absent!r}))") == "None\n"


def test_the_model_alone_runs_with_torch_and_einops(tmp_path: Path) -> None:
    assert main(["vendor", str(tmp_path / "project"), "--as", NAME, "--model"]) == 0
    site = importable(tmp_path / "site", "torch", "einops")
    config = tiny_config("2.5")
    model, inputs = random_model(config), random_inputs(config, per_token=True, stg=True, keyframes=True)
    torch.save({"state": model.state_dict(), "config": config.to_diffusers(), "inputs": inputs}, tmp_path / "in.pt")
    run(
        tmp_path / "project",
        site,
        f"""
import {NAME} as copy
given = torch.load("../in.pt")
config = copy.TransformerConfig.from_diffusers(given["config"])
model = copy.LTX2VideoTransformer3DModel(config).eval()
model.load_state_dict(given["state"])
with torch.no_grad():
    torch.save(model(**given["inputs"]).to_tuple(), "../out.pt")
""",
    )
    with torch.no_grad():
        expected = model(**inputs)
    assert all(map(torch.equal, torch.load(tmp_path / "out.pt"), expected))
    for absent in ("ltx2ref", "safetensors", "numpy"):
        assert run(tmp_path, site, f"import importlib.util as u; print(u.find_spec({absent!r}))") == "None\n"


@pytest.mark.parametrize("model_only", [False, True])
def test_a_copy_has_the_licence_and_a_record(
    tmp_path: Path, model_only: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["vendor", str(tmp_path), "--as", NAME]
    assert main([*command, *["--model"] * model_only]) == 0
    assert f"{'the model' if model_only else 'all'} of ltx2ref {ltx2ref.__version__}" in capsys.readouterr().out
    copy = tmp_path / NAME
    assert (copy / "LICENSE").read_bytes() == (PACKAGE.parent / "LICENSE").read_bytes()
    record = json.loads((copy / "VENDORED.json").read_text())
    assert record["version"] == ltx2ref.__version__
    assert {*record["files"], "VENDORED.json"} == {path for path, _ in vendor.walk(copy)}
    assert {"model.py", "LICENSE", "py.typed"} <= record["files"].keys()
    assert ("weights_manifest.json" in record["files"]) == (not model_only)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert main([*command, "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(copy),
        "version": ltx2ref.__version__,
        "commit": record["commit"],
        "model_only": model_only,
        "files": len(record["files"]),
        "changed": [],
        "outdated": [],
    }


def test_a_changed_copy_is_told_and_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["vendor", str(tmp_path), "--as", NAME, "--model"]
    assert main(command) == 0
    (tmp_path / NAME / "rope.py").write_text("changed = True\n")
    (tmp_path / NAME / "more.py").write_text("")
    (tmp_path / NAME / "block.py").unlink()
    assert main([*command[:-1], "--check"]) == 1
    assert "changed there: block.py, more.py, rope.py" in capsys.readouterr().out
    assert main(command) == 2
    assert "not replaced, for it was changed after it was made: block.py, more.py, rope.py" in capsys.readouterr().err
    assert (tmp_path / NAME / "rope.py").read_text() == "changed = True\n"


def test_an_older_copy_is_told_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["vendor", str(tmp_path), "--as", NAME, "--model"]
    monkeypatch.setattr(vendor, "__version__", "0.0.1")
    assert main(command) == 0
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*command[:-1], "--check"]) == 1
    printed = capsys.readouterr().out
    assert "ltx2ref 0.0.1" in printed and "differs in: __init__.py" in printed and "changed there" not in printed
    assert main(command) == 0 and main([*command[:-1], "--check"]) == 0
    assert json.loads((tmp_path / NAME / "VENDORED.json").read_text())["version"] == ltx2ref.__version__


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("a-b", [], "--as a-b: expected a Python identifier"),
        ("other", [], "expected a copy of ltx2ref with a VENDORED.json"),
        ("missing", ["--check"], "expected a copy of ltx2ref with a VENDORED.json"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(
    tmp_path: Path, name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "theirs.py").write_text("")
    assert main(["vendor", str(tmp_path), "--as", name, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["theirs.py"]


def test_without_a_licence_nothing_is_copied(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(vendor, "PACKAGE", tmp_path / "package")
    with pytest.raises(ValueError, match="LICENSE is missing"):
        vendor.vendor(tmp_path, NAME)


def test_the_commands_of_the_docs(tmp_path: Path) -> None:
    """docs/vendoring.md, from a wheel-like folder: each shell block runs, in order, with status 0."""
    doc = (PACKAGE.parent / "docs" / "vendoring.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", doc, re.DOTALL)
    assert len(blocks) >= 4
    (tmp_path / "bin").mkdir()
    launcher = tmp_path / "bin" / "python"
    launcher.write_text(f'#!/bin/sh\nPYTHONPATH="{PACKAGE.parent}:." exec "{sys.executable}" "$@"\n')
    launcher.chmod(0o755)
    (tmp_path / "myproject").mkdir()
    script = "set -e\n" + "".join(blocks)
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in re.findall(r"```text\n(.*?)```", doc, re.DOTALL)[0].splitlines():
        assert re.sub(r", commit \w+(-dirty)?|\d+ files", "", line) in re.sub(
            r", commit \w+(-dirty)?|\d+ files", "", done.stdout
        )


def test_the_python_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doc = (PACKAGE.parent / "docs" / "vendoring.md").read_text(encoding="utf-8")
    vendor.vendor(tmp_path / "myproject", "ltx2_reference")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", doc, re.DOTALL)
    exec(block, {})


def test_the_record_names_the_checkout_s_commit(tmp_path: Path) -> None:
    found = vendor.commit()
    if not (PACKAGE.parent / ".git").exists():
        assert found is None
    else:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PACKAGE.parent, capture_output=True, text=True)
        assert found is not None and found.removesuffix("-dirty") == head.stdout.strip()
