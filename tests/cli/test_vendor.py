"""Copies in other projects work with nothing else importable, say how they differ, and keep their patches in updates.

pytest tests/cli/test_vendor.py
"""

import hashlib
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import make_selftest
import make_vendoring
import pytest
import torch
from tiny import random_inputs, random_model, tiny_config

import ltx2ref
from ltx2ref import vendor
from ltx2ref.cli import main
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.record import digest, load_exact
from ltx2ref.vendor import contents, copies, patches
from ltx2ref.vendor.record import RECORD, read_record

pytestmark = pytest.mark.slow

PACKAGE = Path(ltx2ref.__file__).parent
ROOT = PACKAGE.parent
NAME = "the_copy"
CORE = ("config", "rope", "embeddings", "modulation", "attention", "block", "model")


def closure(names: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """Return these distributions with everything that they need."""
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
    """Make a folder from which only these distributions, and what they need, can be imported."""
    folder.mkdir()
    for distribution in closure(names).values():
        for top in {file.parts[0] for file in distribution.files or () if ".." not in file.parts}:
            if top != "__pycache__" and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def run(project: Path, site: Path, code: str, *arguments: str, status: int = 0) -> str:
    """Run Python without site-packages and without this package, with only the project and `site` on the path."""
    opening = f"import sys; sys.path[:0] = [{str(project)!r}, {str(site)!r}]; import torch; torch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", opening + code, *arguments],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    return done.stdout


def test_the_folder_copied_by_hand_verifies_under_another_name(tmp_path: Path) -> None:
    """The copy is made plainly, as docs/vendoring.md describes it, into a package of an empty project."""
    project, site = tmp_path / "project", importable(tmp_path / "site", "torch", "einops", "safetensors", "numpy")
    for path, file in contents.visible(PACKAGE):
        target = project / "parts" / NAME / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    code = f"from parts.{NAME}.cli import main; sys.exit(main(sys.argv[1:]))"
    found = json.loads(run(project, site, code, "verify", "--case", "*/t2v", "--json"))
    assert len(found["results"]) == 9  # three releases in three dtypes; the exit status was 0
    for absent in ("ltx2ref", "diffusers", "rich"):
        assert run(project, site, f"import importlib.util as u; print(u.find_spec({absent!r}))") == "None\n"


def test_the_model_alone_runs_with_torch_and_einops(tmp_path: Path) -> None:
    assert main(["vendor", str(tmp_path / "project"), "--as", NAME, "--model", "--parents"]) == 0
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


def vendored(project: Path, *arguments: str) -> int:
    return main(["vendor", str(project), "--as", NAME, *arguments])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a project with a copy of the model."""
    vendor.vendor(tmp_path, NAME, model_only=True)
    return tmp_path


def edit(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


def state(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes this package a newer version in which some files differ."""

    def become(version: str, **files: Callable[[str], str]) -> None:
        original = contents.with_headers

        def changed(given: dict[str, bytes]) -> dict[str, bytes]:
            found = original(given)
            for name, change in files.items():
                before = found[f"{name}.py"].decode()
                found[f"{name}.py"] = change(before).encode()
                assert change(before) != before
            return found

        monkeypatch.setattr(contents, "with_headers", changed)
        monkeypatch.setattr(contents, "__version__", version)
        monkeypatch.setattr(copies, "__version__", version)

    return become


# ---------------------------------------------------------------- what a copy consists of
@pytest.mark.parametrize("model_only", [False, True])
def test_a_copy_has_the_licence_and_a_record(
    tmp_path: Path, model_only: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vendored(tmp_path, *["--model"] * model_only) == 0
    assert f"{'the model' if model_only else 'all'} of ltx2ref {ltx2ref.__version__}" in capsys.readouterr().out
    copy = tmp_path / NAME
    assert (copy / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    record = read_record(copy)
    assert record.version == ltx2ref.__version__ and record.commit == copies.commit()
    assert record.files == copies.digests_of(copies.files_in(copy))
    assert {"model.py", "LICENSE", "py.typed"} <= record.files.keys()
    assert ("weights_manifest.json" in record.files) == (not model_only)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert vendored(tmp_path, "--check", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "folder": str(copy),
        "version": ltx2ref.__version__,
        "commit": record.commit,
        "model_only": model_only,
        "files": len(record.files),
        "size": sum(file.stat().st_size for _, file in contents.visible(copy)),
        "changed": [],
        "outdated": [],
        "patches": [],
        "patched": [],
        "unapplied": [],
        "installed": ltx2ref.__version__,
        "offered": None,
    }


def test_every_python_file_of_a_copy_begins_with_its_licence_and_origin(tmp_path: Path) -> None:
    vendor.vendor(tmp_path, NAME)
    files = [*(tmp_path / NAME).rglob("*.py")]
    assert len(files) > 40
    for file in files:
        top = file.read_text(encoding="utf-8").split("\n")[:2]
        assert top == ["# SPDX-License-Identifier: Apache-2.0", f"# Copied from ltx2ref: {RECORD} says which version."]


def test_the_model_s_copy_is_what_the_model_and_its_self_test_import(project: Path) -> None:
    found = {path for path, _ in contents.visible(project / NAME)}
    assert {f"{name}.py" for name in CORE} < found
    assert {path for path in found if "/" in path} == {
        f"parity/{name}.py" for name in ("__init__", "arithmetic", "exact", "generator")
    }
    assert not found & {"cli.py", "describe.py", "interop.py", "progress.py"}


def test_a_class_in_two_files_is_no_copy_s_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.py", "other.py"):
        (tmp_path / name).write_text("class TransformerConfig:\n    pass\n")
    monkeypatch.setattr(contents, "PACKAGE", tmp_path)
    with pytest.raises(ValueError, match=r"one file that defines TransformerConfig, found \['one.py', 'other.py'\]"):
        contents.defined_in("TransformerConfig")


def test_the_record_is_a_bill_of_materials(project: Path) -> None:
    """It uses the names of CycloneDX 1.6, whose schema also accepts it, with a patch and without."""
    document = json.loads((project / NAME / RECORD).read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    (library,) = document["components"]
    assert (library["type"], library["name"], library["version"]) == ("library", "ltx2ref", ltx2ref.__version__)
    assert library["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    for file in library["components"]:
        (digest,) = file["hashes"]
        assert file["type"] == "file" and digest["alg"] == "SHA-256"
        assert digest["content"] == hashlib.sha256((project / NAME / file["name"]).read_bytes()).hexdigest()


# ---------------------------------------------------------------- the self-test
def differences(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what the copy's self-test finds when it is imported as it is now."""
    monkeypatch.syspath_prepend(project)
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]
    importlib.invalidate_caches()
    found: list[str] = importlib.import_module(f"{NAME}.selftest").different_outputs()
    return found


def test_the_self_test_runs_with_torch_and_einops_and_says_what_differs(project: Path, tmp_path: Path) -> None:
    site = importable(tmp_path / "site", "torch", "einops")
    code = f"import runpy; runpy.run_module({NAME + '.selftest'!r}, run_name='__main__')"
    assert (
        run(project, site, code)
        == "identical to diffusers 0.42.1: 2.0/text-masks, 2.3/no-prompt-adaln, 2.5/everything\n"
    )
    edit(project / NAME / "modulation.py", ("EPS = 1e-6", "EPS = 2e-6"))
    said = run(project, site, code, status=1).splitlines()
    assert len(said) == 12 and said[0] == "differs from diffusers 0.42.1: 2.0/text-masks float32 sample"


def changes_of_the_model() -> Iterator[tuple[str, int, str, str]]:
    """Return one change for each place in the architecture's files that has an order of rows or an epsilon."""
    for name in CORE:
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        code = re.sub(r'""".*?"""|#[^\n]*', lambda found: " " * len(found[0]), text, flags=re.DOTALL)
        for old, new in (("shift, scale", "scale, shift"), ("scale, shift", "shift, scale"), ("1e-6", "1e-5")):
            for found in re.finditer(rf"\b{old}\b(?=(, \w+)* = |\s*$)", code, re.MULTILINE):
                yield name, found.start(), old, new


def test_the_self_test_fails_if_the_order_of_rows_or_an_epsilon_changes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*changes_of_the_model()]
    assert len(changes) >= 5 and {"1e-6", "shift, scale", "scale, shift"} == {old for _, _, old, _ in changes}
    assert differences(project, monkeypatch) == []
    unnoticed = []
    for name, start, old, new in changes:
        file = project / NAME / f"{name}.py"
        text = file.read_text(encoding="utf-8")
        header = len(contents.HEADER) + len(contents.ORIGIN)
        at = header + start
        assert text[at : at + len(old)] == old
        file.write_text(text[:at] + new + text[at + len(old) :], encoding="utf-8")
        if not differences(project, monkeypatch):
            unnoticed.append(f"{name}.py: {new} at {start}")
        file.write_text(text, encoding="utf-8")
    assert unnoticed == []


def test_the_digests_of_the_self_test_are_those_recorded_from_diffusers() -> None:
    assert make_selftest.main(["--check"]) == 0
    stored = json.loads(make_selftest.PATH.read_text(encoding="utf-8"))
    for name, case in stored["cases"].items():
        for dtype, digests in case["digests"].items():
            record = load_exact(next(x for x in CASES if x.id == name), dtype)
            assert record.implementation == stored["implementation"] == "diffusers 0.42.1"
            assert {output: digest(x).hex() for output, x in record.outputs.items()} == digests


def test_a_self_test_with_other_digests_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "selftest.json").write_text(make_selftest.PATH.read_text(encoding="utf-8").replace("731.25", "731.5"))
    monkeypatch.setattr(make_selftest, "PATH", tmp_path / "selftest.json")
    assert make_selftest.main(["--check"]) == 1


# ---------------------------------------------------------------- checks
def test_a_changed_copy_is_told_and_not_replaced(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / NAME / "rope.py").write_text("changed = True\n")
    (project / NAME / "more.py").write_text("")
    (project / NAME / "block.py").unlink()
    before = state(project)
    assert vendored(project, "--check") == 1
    assert "changed there: block.py, more.py, rope.py" in capsys.readouterr().out
    assert vendored(project, "--update") == 2
    said = capsys.readouterr().err
    assert "not replaced, because it was changed after it was written: block.py, more.py, rope.py" in said
    assert vendored(project, "--model") == 2 and "--update replaces it" in capsys.readouterr().err
    assert state(project) == before


def test_a_newer_version_is_told_and_taken(
    project: Path, newer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    newer("0.10.0", rope=lambda text: text + "# newer\n")
    assert vendored(project, "--check") == 1
    assert "newer version 0.10.0 is installed and differs in: __init__.py, rope.py\n" in capsys.readouterr().out
    assert vendored(project, "--update", "--dry-run") == 0 and vendored(project, "--check") == 1
    assert "; from 0.1.0\nreplaced: __init__.py, rope.py\n" in capsys.readouterr().out
    assert vendored(project, "--update") == 0 and vendored(project, "--check") == 0
    assert "unchanged, and the same as the installed ltx2ref 0.10.0\n" in capsys.readouterr().out
    assert (project / NAME / "rope.py").read_text().endswith("# newer\n")


def test_a_copy_that_is_newer_than_what_is_installed_is_not_outdated_and_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as later:
        later.setattr(copies, "__version__", "0.2.0rc1")
        later.setattr(contents, "__version__", "0.2.0rc1")
        assert vendored(tmp_path, "--model") == 0
    assert vendored(tmp_path, "--check") == 0
    assert "newer than the installed ltx2ref 0.1.0, so it was not compared with that" in capsys.readouterr().out
    assert vendored(tmp_path, "--update") == 2
    assert "a copy of ltx2ref 0.2.0rc1, which is newer than this 0.1.0" in capsys.readouterr().err


def test_another_state_of_the_same_version_is_told(
    project: Path, newer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    newer(ltx2ref.__version__, rope=lambda text: text + "# newer\n")
    assert vendored(project, "--check") == 1
    assert "another state of ltx2ref 0.1.0 is installed and differs in: rope.py\n" in capsys.readouterr().out


def test_versions_are_ordered_as_python_orders_them() -> None:
    versions = [
        "0.1",
        "0.2.0.dev1",
        "0.2.0a1",
        "0.2.0b1",
        "0.2.0rc1",
        "0.2.0rc2",
        "0.2",
        "0.2.0.post1",
        "0.10.0",
        "1.0",
    ]
    assert sorted(sorted(versions), key=copies.precedence) == versions
    assert copies.precedence("0.2") == copies.precedence("0.2.0") == copies.precedence("0.2.0+local")
    with pytest.raises(ValueError, match="expected a version"):
        copies.precedence("unknown")


def index_with(folder: Path, *versions: str) -> str:
    """Make a package index in a folder."""
    (folder / "ltx2ref").mkdir(parents=True)
    links = "".join(f'<a href="ltx2ref-{x}-py3-none-any.whl">ltx2ref-{x}-py3-none-any.whl</a>' for x in versions)
    (folder / "ltx2ref" / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
    return folder.as_uri()


@pytest.mark.parametrize(
    ("versions", "status", "said"),
    [
        (("0.1.0", "0.9.0"), 1, "newer version 0.9.0 is available: install it, then --update\n"),
        (("0.0.9", "0.1.0"), 0, "the package index has ltx2ref 0.1.0\n"),
        ((), 0, "the package index could not be reached or has no ltx2ref: only the installed version was compared\n"),
    ],
)
def test_the_package_index_counts_if_it_is_asked_and_answers(
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    versions: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_INDEX_URL", index_with(tmp_path / "index", *versions))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    assert vendored(project, "--check", "--ask-index") == status and said in capsys.readouterr().out
    assert vendored(project, "--check") == 0 and "available" not in capsys.readouterr().out


def test_without_a_network_or_pip_a_check_says_so_and_refuses_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # an address at which nothing listens
    assert vendored(project, "--check", "--ask-index") == 0
    assert "the package index could not be reached" in capsys.readouterr().out
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert vendored(project, "--check", "--ask-index") == 0
    assert "the package index could not be reached" in capsys.readouterr().out


# ---------------------------------------------------------------- patches
def patch_of(project: Path) -> Path:
    (file,) = (project / NAME / "patches").glob("*.patch")
    return file


def test_a_change_is_saved_as_a_patch_and_applied_to_the_next_version(
    project: Path, newer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project / NAME / "modulation.py", ("EPS = 1e-6", "EPS = 1e-6  # ours"))
    (project / NAME / "more").mkdir()
    (project / NAME / "more" / "ours.py").write_text("no_newline = True")
    (project / NAME / "py.typed").unlink()
    assert vendored(project, "--save-patch", "why") == 0
    assert "patches: 0001-why.patch; changed by them: modulation.py, more/ours.py, py.typed" in capsys.readouterr().out
    assert vendored(project, "--check") == 0 and "unchanged" in capsys.readouterr().out
    edit(project / NAME / "rope.py", ("import math\n", "import math  # ours, too\n"))
    assert vendored(project, "--save-patch", "why-else") == 0
    assert read_record(project / NAME).patches.keys() == {"0001-why.patch", "0002-why-else.patch"}

    newer("0.2.0", modulation=lambda text: text.replace('"""', '"""Newer.\n\n', 1))
    assert vendored(project, "--check") == 1
    assert vendored(project, "--update") == 0 and vendored(project, "--check") == 0
    text = (project / NAME / "modulation.py").read_text()
    assert text.count("Newer.") == 1 and "EPS = 1e-6  # ours" in text
    assert "import math  # ours, too\n" in (project / NAME / "rope.py").read_text()
    assert (project / NAME / "more" / "ours.py").read_text() == "no_newline = True"
    assert not (project / NAME / "py.typed").exists()


def test_a_patched_file_says_so_and_the_record_has_both_digests(project: Path) -> None:
    there = project / NAME / "modulation.py"
    original = there.read_bytes()
    edit(there, ("EPS = 1e-6", "EPS = 1e-6  # ours"))
    vendor.save_patch(project / NAME, "why")
    assert there.read_text().split("\n")[1].startswith("# Copied from ltx2ref, and changed by patches/: ")
    (library,) = json.loads((project / NAME / RECORD).read_text())["components"]
    assert library["pedigree"]["patches"] == [{"type": "unofficial", "diff": {"url": "patches/0001-why.patch"}}]
    (file,) = (x for x in library["components"] if x["name"] == "modulation.py")
    (ancestor,) = file["pedigree"]["ancestors"]
    assert file["hashes"][0]["content"] == hashlib.sha256(there.read_bytes()).hexdigest()
    assert ancestor["hashes"][0]["content"] == hashlib.sha256(original).hexdigest()
    assert vendor.check_copy(project / NAME).patched == ["modulation.py"]


def test_a_patch_that_does_not_fit_is_a_conflict_and_nothing_is_written(
    project: Path, newer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project / NAME / "modulation.py", ("EPS = 1e-6", "EPS = 1e-6  # ours"))
    edit(project / NAME / "rope.py", ("import math\n", "import math  # ours\n"))
    assert vendored(project, "--save-patch", "why") == 0
    newer("0.2.0", modulation=lambda text: text.replace("EPS = 1e-6", "EPS = 2e-6"))
    before = state(project)
    capsys.readouterr()
    for arguments in (["--update"], ["--update", "--dry-run"]):
        assert vendored(project, *arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "0001-why.patch: does not fit ltx2ref 0.2.0, and nothing was written" in said
        assert re.search(r"modulation.py, line \d+: expected 'EPS = 1e-6 .*', got 'EPS = 2e-6 ", said)
        assert "rope.py" not in said and state(project) == before
    (project / NAME / "patches" / "0001-why.patch").rename(project / "0001-why.patch")  # set aside, as the docs say
    assert vendored(project, "--update") == 0 and vendored(project, "--check") == 0
    assert "EPS = 2e-6" in (project / NAME / "modulation.py").read_text()


def test_a_patch_that_was_written_by_hand_is_told_and_applied(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    git = "diff --git a/modulation.py b/modulation.py\nindex 1..2 100644\n"
    text = (project / NAME / "modulation.py").read_text().split("\n")
    at = next(i for i, line in enumerate(text) if line.startswith("EPS = "))
    hunk = f"@@ -{at},2 +{at},3 @@ anything\n {text[at - 1]}\n-{text[at]}\n+OURS = 1\n+{text[at]}\n"
    (project / NAME / "patches").mkdir()
    (project / NAME / "patches" / "a.patch").write_text(
        f"Why.\n\n{git}--- a/modulation.py\n+++ b/modulation.py\n{hunk}"
    )
    assert vendored(project, "--check") == 1
    assert "patches that were changed there: a.patch; --update applies them" in capsys.readouterr().out
    assert vendored(project, "--update") == 0 and vendored(project, "--check") == 0
    assert "OURS = 1\n" in (project / NAME / "modulation.py").read_text()


def test_hidden_files_and_notes_among_the_patches_outlast_an_update(project: Path) -> None:
    (project / NAME / ".gitattributes").write_text("* -text\n")
    (project / NAME / "patches").mkdir()
    (project / NAME / "patches" / "README.md").write_text("Why.\n")
    (project / NAME / "__pycache__").mkdir()
    (project / NAME / "__pycache__" / "old.pyc").write_bytes(b"")
    assert vendored(project, "--check") == 0 and vendored(project, "--update") == 0
    assert (project / NAME / ".gitattributes").read_text() == "* -text\n"
    assert (project / NAME / "patches" / "README.md").read_text() == "Why.\n"
    assert not (project / NAME / "__pycache__").exists()


@pytest.mark.parametrize("seed", range(20))
def test_a_patch_written_here_gives_back_what_was_changed(seed: int) -> None:
    """`git apply` gives it back as well, where git is installed."""
    random = Random(seed)
    before = {f"{i}.py": "".join(random.choice("ab\n\x0c") for _ in range(60)).encode() for i in range(4)}
    after = dict(before)
    for path in before:
        lines = patches.lines_of(before[path].decode())
        for _ in range(random.randrange(4)):
            lines.insert(random.randrange(len(lines) + 1), random.choice(["new\n", "\n", "a\n"]))
            del lines[random.randrange(len(lines))]
        after[path] = "".join(lines).encode()
    del after["0.py"]
    after["new/4.py"], after["empty.py"] = b"no newline at the end", b""
    text = patches.write_patch(before, after)
    assert patches.apply_patch(before, "p", patches.read_patch("p", text)) == (after, [])


def test_git_applies_what_is_written_here(project: Path, tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = project / NAME
    pristine = tmp_path / "pristine"
    shutil.copytree(folder, pristine)
    edit(folder / "modulation.py", ("EPS = 1e-6", "EPS = 1e-6  # ours"))
    (folder / "ours.py").write_text("no_newline = True")
    (folder / "py.typed").unlink()
    vendor.save_patch(folder, "why")
    subprocess.run(["git", "apply", str(patch_of(project))], cwd=pristine, check=True, capture_output=True)
    plain = copies.without_notices(copies.files_in(folder))
    assert copies.files_in(pristine) == plain


LINES = "".join(f"{i}\n" for i in range(20))
HUNK = "@@ -9,3 +9,3 @@\n 8\n-9\n+nine\n 10\n"


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (LINES, ""),
        ("new\n" * 5 + LINES, ""),  # found elsewhere, at the only place
        (LINES.replace("\n9\n", "\nother\n"), "x.py, line 10: expected '9', got 'other'"),
        ("8\n9\n10\n" + LINES.replace("7\n", ""), "x.py, line 9: the lines to change are at 2 other places"),
        (LINES.replace("\n9\n", "\nnine\n"), "x.py, line 9: already has this change"),
        ("0\n", "x.py, line 9: expected '8', got the end of the file"),
        (None, "x.py does not exist"),
    ],
)
def test_a_hunk_is_applied_where_it_says_or_at_the_only_place(text: str | None, result: str) -> None:
    changes = patches.read_patch("p", f"--- a/x.py\n+++ b/x.py\n{HUNK}")
    files = {} if text is None else {"x.py": text.encode()}
    found, conflicts = patches.apply_patch(files, "p", changes)
    assert [str(x).startswith(result) for x in conflicts] == [True] * bool(result)
    if not result and text is not None:
        assert found == {"x.py": text.replace("\n9\n", "\nnine\n").encode()}
    else:
        assert found == files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing\n", "p: expected a unified diff"),
        (f"--- a/../x.py\n+++ b/../x.py\n{HUNK}", r"p, line 1: ../x.py is not a file of the copy"),
        (f"--- /x.py\n+++ /x.py\n{HUNK}", "p, line 1: /x.py is not a file of the copy"),
        (f"--- a/LICENSE\n+++ b/LICENSE\n{HUNK}", "p, line 1: LICENSE is not a file of the copy"),
        (f"--- a/patches/x\n+++ b/patches/x\n{HUNK}", "p, line 1: patches/x is not a file of the copy"),
        (f"--- a/x.py\n+++ b/y.py\n{HUNK}", "p, line 1: expected one path, got x.py and y.py"),
        ("--- a/x.py\n+++ b/x.py\n", "p: x.py has no hunks"),
        ("--- a/x.py\n+++ b/x.py\n@@ bad\n", "p, line 3: expected '@@ -LINE,COUNT"),
        ("--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\n 1\n", "p, line 3: expected 2 old and 2 new lines, got 1 and 1"),
        ("--- a/x.py\n+++ b/x.py\n@@ -1,1 +1,1 @@\n\\ No newline\n", "p, line 3: expected 1 old and 1 new lines"),
        ("rename from x.py\nrename to y.py\n", "p, line 1: expected edits of text, got 'rename from x.py'"),
        ("GIT binary patch\n", "p, line 1: expected edits of text"),
    ],
)
def test_a_patch_that_cannot_be_read_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        patches.read_patch("p", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda copy: None, "has no changes to save"),
        (
            lambda copy: edit(copy / "LICENSE", ("Apache", "Other")),
            "LICENSE: was changed, but no patch may change this file",
        ),
        (lambda copy: (copy / "rope.py").write_bytes(b"\xff"), "rope.py: expected text"),
    ],
)
def test_what_cannot_be_a_patch_is_not_saved(
    project: Path, change: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(project / NAME)
    before = state(project)
    assert vendored(project, "--save-patch", "why") == 2
    assert message in capsys.readouterr().err and state(project) == before


def test_a_patch_is_saved_with_the_version_that_the_copy_was_made_from(
    project: Path, newer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(project / NAME / "modulation.py", ("EPS = 1e-6", "EPS = 1e-6  # ours"))
    newer("0.2.0")
    assert vendored(project, "--save-patch", "why") == 2
    assert "install that one to save a patch" in capsys.readouterr().err
    assert vendored(project, "--save-patch", "../why") == 2 and "expected letters" in capsys.readouterr().err


# ---------------------------------------------------------------- what is refused
def test_no_folder_is_made_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert vendored(missing, "--model") == 2
    assert "missing: expected an existing folder" in capsys.readouterr().err
    assert vendored(tmp_path, "--model", "--dry-run") == 0 and vendored(missing, "--parents", "--dry-run") == 0
    assert "nothing is written in this dry run\n" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == []
    assert vendored(missing, "--model", "--parents") == 0
    assert [*tmp_path.iterdir()] == [missing] and [*missing.iterdir()] == [missing / NAME]


def test_a_copy_that_cannot_be_written_leaves_the_old_one(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(project)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    assert vendored(project, "--update") == 2 and "cannot be written: disk full" in capsys.readouterr().err
    assert state(project) == before and [path.name for path in project.iterdir()] == [NAME]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("a-b", [], "--as a-b: expected a Python identifier"),
        ("class", [], "--as class: expected a Python identifier"),
        ("other", [], f"already exists and is not a copy of ltx2ref: it has no {RECORD}"),
        ("other", ["--update"], f"expected a copy of ltx2ref, with its {RECORD}"),
        ("missing", ["--check"], f"expected a copy of ltx2ref, with its {RECORD}"),
        ("damaged", ["--check"], f"expected a copy of ltx2ref, with its {RECORD}: KeyError"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(
    tmp_path: Path, name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "theirs.py").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / RECORD).write_text('{"components": [{"name": "ltx2ref"}]}')
    before = state(tmp_path)
    assert main(["vendor", str(tmp_path), "--as", name, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and state(tmp_path) == before


def test_without_a_licence_nothing_is_copied(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(contents, "PACKAGE", tmp_path / "package")
    with pytest.raises(ValueError, match="LICENSE is missing"):
        vendor.vendor(tmp_path, NAME)


def test_the_licence_of_the_project_around_a_copy_is_not_taken_for_its_own(tmp_path: Path, monkeypatch: Any) -> None:
    vendor.vendor(tmp_path, NAME)
    (tmp_path / "LICENSE").write_text("theirs")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".git").mkdir()
    for module in (contents, copies):
        monkeypatch.setattr(module, "PACKAGE", tmp_path / NAME)
    assert contents.beside()["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert copies.commit() == read_record(tmp_path / NAME).commit
    (tmp_path / "more").mkdir()
    assert vendor.vendor(tmp_path / "more", NAME).copy.current  # a copy of a copy
    edit(tmp_path / NAME / "rope.py", ("import math\n", "import math  # ours\n"))
    monkeypatch.undo()
    vendor.save_patch(tmp_path / NAME, "why")
    for module in (contents, copies):
        monkeypatch.setattr(module, "PACKAGE", tmp_path / NAME)
    assert vendor.check_copy(tmp_path / NAME).current  # a copy of itself
    with pytest.raises(ValueError, match="is itself a copy with patches, of which no copies are made"):
        vendor.vendor(tmp_path / "more", "other")


def test_the_docs_show_what_their_commands_print() -> None:
    assert make_vendoring.main([]) == 0


def test_a_document_that_shows_another_count_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vendoring.md").write_text("```sh\nls\n```\n\n```text\nbin\n2 files\nmyproject\n```\n")
    monkeypatch.setattr(make_vendoring, "PATH", tmp_path / "vendoring.md")
    assert make_vendoring.main([]) == 1 and "-2 files" in capsys.readouterr().out
    assert make_vendoring.main(["--write"]) == 0 and make_vendoring.main([]) == 0


def test_the_record_names_the_checkout_s_commit(tmp_path: Path) -> None:
    found = copies.commit()
    if not (PACKAGE.parent / ".git").exists():
        assert found is None
    else:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PACKAGE.parent, capture_output=True, text=True)
        assert found is not None and found.removesuffix("-dirty") == head.stdout.strip()
