"""The files that describe the repository agree with it: versions, paths, pins, and a line on bits for each release.

pytest tests/project/test_repository.py
"""

import re
import tomllib
from pathlib import Path

import pytest

import ltx2ref

ROOT = Path(ltx2ref.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PATH = re.compile(r"(?<![\w/.])(?:\.ci|\.github|docs|ltx2ref|scripts|tests)/[\w./-]*\w")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", ".github/workflows/ci.yml", ".ci/run"])
def test_every_path_in_it_exists(name: str) -> None:
    paths = set(PATH.findall(read(name)))
    assert paths
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_the_workflow_has_the_lowest_and_the_pinned_torch_and_the_lowest_python() -> None:
    workflow = read(".github/workflows/ci.yml")
    (pinned,) = re.findall(r"^torch==(.+)$", read("constraints.txt"), re.MULTILINE)
    (lowest,) = (x.removeprefix("torch>=") for x in PROJECT["dependencies"] if x.startswith("torch>="))
    versions = re.findall(r"^ +torch: .*?([\d.]+)", workflow, re.MULTILINE)
    assert sorted(versions) == sorted([pinned, f"{lowest}.0"])
    (pythons,) = re.findall(r"^ +python: \[(.+)\]", workflow, re.MULTILINE)
    assert pythons.split(", ")[0] == f'"{PROJECT["requires-python"].removeprefix(">=")}"'


def test_the_citation_and_the_changelog_know_this_version() -> None:
    assert f"\nversion: {ltx2ref.__version__}\n" in read("CITATION.cff")
    assert f"\n## {ltx2ref.__version__} (" in read("CHANGELOG.md")


def test_every_release_in_the_changelog_says_what_changed_in_bits() -> None:
    _, *releases = re.split(r"^## ", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert releases[0].startswith("Unreleased\n") and len(releases) > 1
    for release in releases:
        said = release.partition("\n### In bits\n")[2].partition("\n### ")[0].strip()
        assert said, release.partition("\n")[0]


def test_pinned_versions_satisfy_what_pyproject_asks_for() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", read("constraints.txt"), re.MULTILINE))
    asked = [*PROJECT["dependencies"], *(x for extra in PROJECT["optional-dependencies"].values() for x in extra)]
    for requirement in asked:
        name, lowest = re.fullmatch(r"([\w-]+)(?:\[\w+\])?(?:[>=]=(.+))?", requirement).groups()  # type: ignore[union-attr]
        assert name in pins, requirement
        assert not lowest or numbers(pins[name]) >= numbers(lowest), requirement


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]
