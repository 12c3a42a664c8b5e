"""One audit goes through few places, in the order of its functions' first calls; explain/ is one of them.

pytest tests/project/test_audit_path.py
"""

import json
import re
from pathlib import Path

import audit_path
import pytest

from ltx2ref.parity import audit, truth

ROOT = Path(__file__).parents[2]
MOST = 28


def places_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert audit_path.main(["--json", *arguments]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["count"] == len(printed["places"])
    return printed["places"]


def test_an_audit_that_finds_a_mistake_enters_few_places(capsys: pytest.CaptureFixture[str]) -> None:
    files = [place["file"] for place in places_of(capsys)]
    assert len(files) <= MOST, files
    rooms = ["parity/compare.py", "parity/truth.py", "parity/judge.py", "parity/explain/", "parity/report/assemble.py"]
    assert sorted(rooms, key=files.index) == rooms
    assert not audit_path.CORE & set(files)


def test_an_identical_candidate_needs_no_truth_and_no_causes(capsys: pytest.CaptureFixture[str]) -> None:
    called = {str(x) for place in places_of(capsys, "--candidate", "ltx2ref") for x in place["functions"]}
    assert "fingerprint.py: followed_conventions" in called
    assert not called & {"Truth.__init__", "causes.py: origins"}


def test_a_helper_in_another_room_is_one_place_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(places_of(capsys))
    given = audit.taps_to_compare
    monkeypatch.setattr(audit, "taps_to_compare", lambda *x: (truth.norm(next(iter(x[0].values()))), given(*x))[1])
    assert len(places_of(capsys)) > before


def test_a_place_names_the_functions_first_called_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit_path.main(["--functions"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["1", "parity/audit.py"] and lines[1].strip() == "audit"
    assert any(line.endswith("places in 14 files") for line in lines)


def test_another_case_is_refused_in_one_line() -> None:
    with pytest.raises(SystemExit, match=r"--case 9\.9/none: no such case"):
        audit_path.main(["--case", "9.9/none"])


DEVELOPING = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")


def test_the_documents_show_the_path_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit_path.main([]) == 0
    assert capsys.readouterr().out.split("\n\n")[0] in DEVELOPING


@pytest.mark.parametrize("room", ["checkpoint", "parity"])
def test_the_map_names_every_file_of_a_room(room: str) -> None:
    paths = [path for path in (audit_path.PACKAGE / room).rglob("*.py") if path.name != "__init__.py"]
    tree = DEVELOPING.split("```")[1]
    assert [path.name for path in paths if path.name not in tree] == []


def test_every_file_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`?((?:ltx2ref|scripts|tests)/[\w/.]+\.(?:py|md))", DEVELOPING))
    assert len(named) > 20 and [name for name in sorted(named) if not (ROOT / name).is_file()] == []
