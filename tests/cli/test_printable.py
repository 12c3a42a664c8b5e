r"""Names in untrusted files reach a terminal only as printable text, while JSON and `problems` keep them as they are.

pytest tests/cli/test_printable.py
"""

import json
import logging
from pathlib import Path

import pytest
import torch
import writers
from safetensors.torch import save_file
from tiny import random_model, tiny_config

import ltx2ref
from ltx2ref import CheckpointError
from ltx2ref.cli import main
from ltx2ref.printable import printable, printable_lines

# Clears the screen, sets the window's title, reverses the direction of text, deletes, and begins a line of its own.
HOSTILE = "x\x1b[2J\x1b]0;owned\x07\u202e\x7f\x9b\nproblem: forged"


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], config_key: str = "") -> Path:
    """Write a tiny transformer with more tensors and metadata, and perhaps one more key in its config."""
    model = random_model(tiny_config("2.3"))
    state = writers.prefixed({writers.original_name(name): x for name, x in model.state_dict().items()})
    own = writers.lightricks_metadata(model.config)
    if config_key:
        config = json.loads(own["config"])
        config["transformer"][config_key] = 1
        own["config"] = json.dumps(config)
    save_file(state | tensors, path, own | metadata)
    return path


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    tensors = {HOSTILE: torch.ones(2), f"{HOSTILE}.weight": torch.ones(2)}
    return write(tmp_path / "hostile.safetensors", tensors, {HOSTILE: "1"})


def require_harmless(text: str) -> None:
    assert r"\x1b[2J" in text
    assert [c for c in text.replace("\n", "") if not c.isprintable()] == []
    assert not [line for line in text.splitlines() if line.startswith("problem: forged")]


def test_inspect_prints_hostile_names_escaped(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(hostile)]) == 1
    printed = capsys.readouterr().out
    require_harmless(printed)
    assert printable(HOSTILE) in printed


def test_json_and_problems_keep_the_names(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(hostile), "--json"]) == 1
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    found = json.loads(printed)
    assert HOSTILE in found["metadata"]
    assert any(HOSTILE in problem for problem in found["problems"])
    with pytest.raises(CheckpointError) as raised:
        ltx2ref.load(hostile)
    assert any(HOSTILE in problem for problem in raised.value.problems)


def test_errors_quote_hostile_names_escaped(hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError) as raised:
        ltx2ref.load(hostile)
    require_harmless(str(raised.value))
    assert main(["convert", str(hostile), str(tmp_path / "folder"), "--to", "diffusers"]) == 2
    require_harmless(capsys.readouterr().err)


def test_what_convert_leaves_out_is_printed_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "hostile.safetensors", {}, {HOSTILE: "1"})
    assert main(["convert", str(path), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    require_harmless(capsys.readouterr().out)


def test_logged_notes_quote_hostile_keys_escaped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "hostile.safetensors", {}, {}, config_key=HOSTILE)
    with caplog.at_level(logging.WARNING, "ltx2ref"):
        ltx2ref.load(path)
    require_harmless(caplog.text)


def test_printable_text_is_unchanged() -> None:
    assert printable("größe 4 x 4, a\\b") == "größe 4 x 4, a\\b"
    assert printable("a\nb\ttab") == r"a\nb\ttab"
    assert printable_lines("a\nb\x1b") == "a\nb\\x1b"
    assert printable("\udce9") == r"\udce9"  # a byte of a path that is not UTF-8
