"""A reproducer holds one stage of a port that is wrong; its script fails, and passes once the cause is mended.

pytest tests/parity/test_reproduce.py
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import five
import pytest
import torch
from safetensors.torch import load_file

from ltx2ref import cli
from ltx2ref.parity.audit import audit, candidate_named
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.generator import build
from ltx2ref.parity.report.rows import Report
from ltx2ref.parity.reproduce import Again, Reproducer, check, leaf, reproduce, stage_reads, stage_value, tap_at
from ltx2ref.parity.run import run
from ltx2ref.parity.trace.taps import Taps
from ltx2ref.parity.truth import doubled, isolate, wide

CPU = torch.device("cpu")
BY_ID = {case.id: case for case in CASES}
CASE = BY_ID["2.3/i2v"]
PORT = "five_port.py:run"
FILES = {
    "README.md",
    "inputs.safetensors",
    "reproduce.json",
    "reproduce.py",
    "results.safetensors",
    "weights.safetensors",
}


def write_port(folder: Path, names: list[str]) -> None:
    """Write a port that has these of the five differences, and forget that it was imported."""
    (folder / "five_port.py").write_text(
        f"import five\n\ndef run(config, state, inputs, dtype):\n"
        f"    return five.run(config, state, inputs, dtype, *{names})\n"
    )
    sys.modules.pop("five_port", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("port")
    write_port(found, [*five.DIFFERENCES])
    return found


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return audit(candidate_named(f"{folder}/{PORT}"), CASE, torch.float32, CPU)


def written(name: str, folder: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> tuple[Reproducer, Path]:
    """Write the reproducer of one of the five differences, from a port that has them all."""
    write_port(folder, [*five.DIFFERENCES])
    monkeypatch.chdir(folder)
    there = folder / name
    if there.exists():
        return Reproducer("", 0.0, {x.name: x.stat().st_size for x in there.iterdir()}, ()), there
    again = Again(CASE.id, "float32", "cpu", "ltx2ref", PORT)
    return reproduce(report, five.DIFFERENCES[name][0], Path(name), again), there


def result_of(there: Path) -> tuple[int, str]:
    """Run the script as a user does, from another folder; return its exit status and what it printed."""
    env = os.environ | {"PYTHONPATH": str(Path(five.__file__).parent)}
    done = subprocess.run(
        [sys.executable, str(there / "reproduce.py")], capture_output=True, text=True, cwd="/", env=env
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "share", "taps", "arguments", "weights"),
    [
        (
            "sequential",
            1e5,
            ["av_cross_attn_video_scale_shift.linear", "transformer_blocks.0.audio_to_video_attn.stream"],
            [],
            ["transformer_blocks.0.video_a2v_cross_attn_scale_shift_table"],
        ),
        (
            "epsilon",
            2.0,
            ["transformer_blocks.0.attn1.input"],
            [],
            [f"transformer_blocks.0.attn1.{x}" for x in ("to_q.weight", "to_q.bias", "norm_q.weight")],
        ),
        ("frequencies", 1.0, [], ["video_coords"], []),
    ],
)
def test_the_script_fails_and_passes_once_the_cause_is_mended_while_the_others_are_not(
    name: str,
    share: float,
    taps: list[str],
    arguments: list[str],
    weights: list[str],
    folder: Path,
    report: Report,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, there = written(name, folder, report, monkeypatch)
    assert found.files.keys() == FILES and sum(found.files.values()) < 250_000, found.files
    about = json.loads((there / "reproduce.json").read_text())
    assert about["reads"] == {"taps": taps, "arguments": arguments, "weights": weights}
    assert [*load_file(there / "inputs.safetensors")] == sorted(taps + arguments)
    assert [*load_file(there / "weights.safetensors")] == sorted(weights)
    assert len((there / "reproduce.py").read_text().splitlines()) <= 13
    assert about["share"] > share

    status, said = result_of(there)
    assert (status, said) == (1, f"{about['place']}: {about['share']:.3g} times the budget\n")
    write_port(folder, [x for x in five.DIFFERENCES if x != name])
    status, said = result_of(there)
    assert status == 0 and re.fullmatch(rf"{re.escape(about['place'])}: [\d.e-]+ times the budget\n", said), said


def test_the_stage_alone_is_judged_from_the_files(
    folder: Path, report: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, there = written("epsilon", folder, report, monkeypatch)
    script = str(there / "reproduce.py")
    at = "transformer_blocks.0.attn1."

    def norm_q(inputs: Taps, weights: Taps, eps: float) -> torch.Tensor:
        q = torch.nn.functional.linear(inputs[f"{at}input"], weights[f"{at}to_q.weight"], weights[f"{at}to_q.bias"])
        return torch.nn.functional.rms_norm(q, q.shape[-1:], weights[f"{at}norm_q.weight"], eps)

    assert check(script, lambda inputs, weights: norm_q(inputs, weights, 1e-6)) == 0
    assert check(script, lambda inputs, weights: norm_q(inputs, weights, 1e-5).numpy()) == 1
    share = json.loads((there / "reproduce.json").read_text())["share"]
    assert capsys.readouterr().out.splitlines()[1] == f"{at}norm_q: {share:.3g} times the budget"
    assert check(script, lambda inputs, weights: norm_q(inputs, weights, 1e-6)[:1]) == 1
    assert capsys.readouterr().out == f"{at}norm_q: expected the shape (2, 105, 28), got (1, 105, 28)\n"
    assert check(script, lambda inputs, weights: norm_q(inputs, weights, float("nan"))) == 1


def test_a_port_that_raises_or_is_not_there_is_told_from_one_that_is_wrong(
    folder: Path, report: Report, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, there = written("epsilon", folder, report, monkeypatch)
    file, script = folder / "five_port.py", str(there / "reproduce.py")
    for source, status, said in (
        ("def run(config, state, inputs, dtype):\n    return state['nothing']\n", 3, "the port raised KeyError at "),
        ("def other():\n    pass\n", 2, "has no run"),
    ):
        file.write_text(source)
        sys.modules.pop("five_port", None)
        assert check(script, lambda inputs, weights: None) == status
        assert re.fullmatch(f"transformer_blocks.0.attn1.norm_q: .*{said}.*\n", capsys.readouterr().out)


def test_a_place_is_that_of_a_cause_or_a_tap_of_one(report: Report) -> None:
    gate = five.DIFFERENCES["gate"][0]
    (of_gate,) = (cause for cause in report.causes if cause.place == gate)
    assert tap_at(report, gate) == (gate, of_gate)  # although the noise level is wrong there, too
    assert tap_at(report, "transformer_blocks.*.attn1.norm_q")[0] == "transformer_blocks.0.attn1.norm_q"
    assert tap_at(report, "transformer_blocks.1.attn1.norm_k")[0] == "transformer_blocks.1.attn1.norm_k"
    with pytest.raises(ValueError, match=r"^--reproduce ff\.proj: no cause there; there are causes at .*rope\.cos"):
        tap_at(report, "ff.proj")
    with pytest.raises(ValueError, match="no cause there; there are none"):
        tap_at(Report("identical", "", None, []), "rope.cos")


# ---------------------------------------------------------------- what a stage reads
def case_taps(name: str) -> tuple[Any, dict[str, Any], Taps]:
    case = BY_ID[name]
    model, inputs = build(case.config, torch.float32), case.inputs()
    return model, inputs, run(model, inputs)


def test_the_value_of_a_stage_is_that_of_teacher_forcing() -> None:
    model, inputs, ours = case_taps("2.3/i2v")
    given = {name: x * 1.25 for name, x in ours.items()}
    local = isolate(model, inputs, ours, given)
    taps = {name: leaf(x) for name, x in given.items()}
    for name in (
        "rope.cos",
        "time_embed.emb",
        "transformer_blocks.0.attn1.input",
        "transformer_blocks.1.attn2.stream",
        "transformer_blocks.1.ff.stream",
        "transformer_blocks.0.audio",
        "proj_out.input",
        "sample",
    ):
        others = {x: y for x, y in taps.items() if x != name}
        value = stage_value(doubled(model), wide(inputs), others, name)
        assert torch.equal(value.detach().reshape(local.truth[name].shape), local.truth[name]), name


@pytest.mark.parametrize(
    ("case", "name", "taps", "arguments"),
    [
        ("2.3/i2v", "transformer_blocks.0.attn2.stream", ["time_embed.linear", "attn1.stream", "attn1.to_out"], []),
        ("2.3/i2v", "time_embed.sinusoid", [], ["timestep"]),
        ("2.3/cross-timestep", "av_cross_attn_video_a2v_gate.sinusoid", [], ["audio_sigma"]),
        (
            "2.3/text-masks-3d",
            "transformer_blocks.0.audio_attn2.sdpa",
            ["q", "k", "to_v"],
            ["audio_encoder_attention_mask"],
        ),
        ("2.3/text-masks-3d", "transformer_blocks.0.attn2.sdpa", ["q", "k", "to_v"], ["encoder_attention_mask"]),
        ("2.3/i2v", "video_coords", [], []),
    ],
)
def test_a_stage_reads_the_nearest_taps_and_arguments(
    case: str, name: str, taps: list[str], arguments: list[str]
) -> None:
    model, inputs, ours = case_taps(case)
    found = stage_reads(model, inputs, ours, name)
    assert {x.removeprefix("transformer_blocks.0.") for x in found.taps} == {
        x if "." in x else f"{name.split('.')[2]}.{x}" for x in taps
    }
    assert [*found.arguments] == arguments


def test_what_a_port_does_not_show_becomes_a_part_of_the_stage() -> None:
    model, inputs, ours = case_taps("2.3/i2v")
    at = "transformer_blocks.0.attn1."
    given = {name: x for name, x in ours.items() if name not in (f"{at}input", f"{at}norm_q")}
    found = stage_reads(model, inputs, given, f"{at}q")
    assert {*found.taps} == {"rope.cos", "rope.sin", "time_embed.linear", f"{at}stream"}
    assert {*found.weights} == {
        "transformer_blocks.0.scale_shift_table",
        *(f"{at}{x}" for x in ("to_q.weight", "to_q.bias", "norm_q.weight")),
    }


# ---------------------------------------------------------------- refused
def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["audit", *words]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_reproduced_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, there = str(tmp_path / "new"), str(tmp_path)
    one = ("ltx2ref:diffusers", "--case", "2.3/i2v")
    assert "expected one case, got " in refused(capsys, "ltx2ref:diffusers", "--reproduce", "rope.cos", new)
    assert f"expected a new folder, got {there}" in refused(capsys, *one, "--reproduce", "rope.cos", there)
    exactly = refused(capsys, *one, "--arithmetic", "exact", "--reproduce", "rope.cos", new)
    assert "expected --arithmetic native" in exactly


def test_outputs_alone_are_refused_with_the_taps_that_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair_port.py").write_text(
        "import five\n\ndef run(config, state, inputs, dtype):\n"
        "    taps = five.run(config, state, inputs, dtype, 'sequential')\n"
        "    return taps['sample'], taps['audio_sample']\n"
    )
    words = ("pair_port:run", "--case", "2.3/i2v", "--reproduce")
    said = refused(capsys, *words, "sample", "new")
    assert "shows its outputs alone" in said and "transformer_blocks.0.video" in said
    assert "shows its outputs alone" in refused(capsys, *words, "rope.cos", "new")
    assert not (tmp_path / "new").exists()


def test_the_command_writes_the_folder_and_says_how_large_it_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_port(folder, ["frequencies"])
    monkeypatch.chdir(folder)
    new = tmp_path / "deep" / "er"
    assert cli.main(["audit", PORT, "--case", "2.3/i2v", "--reproduce", "rope.cos", str(new)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"{re.escape(str(new))}: rope\.cos, [\d.]+ times the budget: 6 files, [\d,]+ bytes", last), (
        last
    )
    assert result_of(new)[0] == 1
