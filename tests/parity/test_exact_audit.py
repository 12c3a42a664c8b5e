"""Under exact arithmetic an audit tells different operations from operations in another order, in any dtype.

pytest tests/parity/test_exact_audit.py
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mutants
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ltx2ref.attention
import ltx2ref.block
from ltx2ref import cli
from ltx2ref.parity import audit as audits
from ltx2ref.parity.arithmetic import NotExact
from ltx2ref.parity.audit import Candidate, Setup, assert_parity, audit, conventions_of, ours
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.exact import exact
from ltx2ref.parity.generator import build
from ltx2ref.parity.machines import machine
from ltx2ref.parity.report.rows import DIVERGED, IDENTICAL, MISSING, ORIGINATED, PROPAGATED, ROUNDING, SUSPECT, Report
from ltx2ref.parity.run import run
from ltx2ref.parity.trace.tracefile import save_trace

CASE = next(case for case in CASES if case.id == "2.3/t2v")
CPU = torch.device("cpu")
NARROW, WIDE = torch.bfloat16, torch.float32


def changed(*patches: Callable[[], Any]) -> Candidate:
    """Return this project's model with a part of it replaced."""

    def go(setup: Setup) -> Mapping[str, Tensor]:
        with mutants.patched(make() for make in patches):
            return run(ours(setup, conventions_of("ltx2ref")), setup.inputs)

    return Candidate("a port", None, go)


def exactly(candidate: Candidate, dtype: torch.dtype) -> Report:
    return audit(candidate, CASE, dtype, CPU, arithmetic="exact")


def mutant(name: str) -> Candidate:
    def go(setup: Setup) -> Mapping[str, Tensor]:
        model = ours(setup, conventions_of("ltx2ref"))
        with mutants.inject(name, model):
            return run(model, setup.inputs)

    return Candidate(name, None, go)


def found(report: Report) -> set[str]:
    """Return the verdicts on the taps that were given."""
    return {row.verdict for row in report.rows} - {MISSING}


@pytest.mark.slow
def test_the_same_operations_are_identical() -> None:
    assert exactly(changed(), NARROW).verdict == IDENTICAL


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "first"), [("gelu-erf", "ff.activation"), ("output-norm-bf16", "norm_out")])
def test_what_bfloat16_hides_is_found_in_bfloat16(name: str, first: str) -> None:
    assert audit(mutant(name), CASE, NARROW, CPU).passed  # the native verdict
    report = exactly(mutant(name), NARROW)
    assert report.verdict == DIVERGED and report.first is not None and report.first.endswith(first)
    assert any("times the budget in float32, which bfloat16 hides" in note for note in report.notes)
    assert {row.verdict for row in report.rows if row.origin == PROPAGATED} <= {IDENTICAL, ROUNDING, DIVERGED}


# ---------------------------------------------------------------- order
def functional(**changes: Any) -> Callable[[], Any]:
    return lambda: patch.object(ltx2ref.attention, "F", SimpleNamespace(**vars(F) | changes))


def scaled_before(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q * q.shape[-1] ** -0.5, k, v, attn_mask=attn_mask, scale=1.0)


def scaled_twice(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q * q.shape[-1] ** -0.5, k, v, attn_mask=attn_mask)


def in_chunks(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    assert attn_mask is None
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(5, -2)], -2)


def distributed(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x + x * scale + shift


def bias_apart(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight) + self.bias


ORDERS: dict[str, tuple[Callable[[], Any], str]] = {
    "x + x * scale": (lambda: patch.object(ltx2ref.block, "modulate", distributed), "transformer_blocks.0.attn1.input"),
    "q scaled before the product": (
        functional(scaled_dot_product_attention=scaled_before),
        "transformer_blocks.0.attn1.q",
    ),
    "a bias added after rounding": (lambda: patch.object(nn.Linear, "forward", bias_apart), "proj_in"),
}


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [WIDE, NARROW])
@pytest.mark.parametrize("name", ORDERS)
def test_another_order_is_called_rounding_and_named(name: str, dtype: torch.dtype) -> None:
    change, first = ORDERS[name]
    report = exactly(changed(change), dtype)
    assert (report.verdict, report.first) == (ROUNDING, first) and report.passed
    (said,) = [note for note in report.notes if note.startswith("operations in another order, or rounded in other")]
    assert first.replace("blocks.0", "blocks.*") in said
    assert {row.verdict for row in report.rows} == {IDENTICAL, ROUNDING}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [WIDE, NARROW])
def test_attention_in_chunks_of_queries_is_identical(dtype: torch.dtype) -> None:
    assert exactly(changed(functional(scaled_dot_product_attention=in_chunks)), dtype).verdict == IDENTICAL


@pytest.mark.slow
def test_a_scale_that_is_applied_twice_is_no_order() -> None:
    report = exactly(changed(functional(scaled_dot_product_attention=scaled_twice)), WIDE)
    assert report.verdict == DIVERGED and not any("divided out" in note for note in report.notes)


@pytest.mark.slow
def test_an_operation_tells_its_origin_by_its_bits() -> None:
    report = exactly(changed(ORDERS["a bias added after rounding"][0]), WIDE)
    origins = {row.name: row.origin for row in report.rows}
    assert origins["proj_in"] == ORIGINATED and origins["transformer_blocks.0.attn1.input"] == PROPAGATED


# ---------------------------------------------------------------- what it cannot see
def port(function: Callable[[Setup], Any]) -> Candidate:
    return Candidate("a port", None, lambda setup: audits.as_taps(function(setup)))


def outputs(setup: Setup) -> tuple[Tensor, Tensor]:
    video, audio = ours(setup, conventions_of("ltx2ref"))(**setup.inputs, return_dict=False)
    return video, audio


REFUSED: dict[str, tuple[Callable[[Setup], Any], str]] = {
    "NumPy": (lambda s: tuple(torch.from_numpy(x.numpy()) for x in outputs(s)), r"Tensor\.numpy\(\)"),
    "another process": (lambda s: tuple(torch.tensor(x.tolist()) for x in outputs(s)), r"Tensor\.tolist\(\)"),
    "random numbers": (lambda s: tuple(x + torch.rand(()) for x in outputs(s)), "does not repeat itself .* at sample"),
    "an operation without a formula": (lambda s: tuple(x.erfinv() for x in outputs(s)), "the operation aten.erfinv"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_seen_is_refused_by_name(name: str) -> None:
    function, said = REFUSED[name]
    with pytest.raises(NotExact, match=said):
        exactly(port(function), WIDE)


@pytest.mark.slow
def test_layers_may_be_built_within() -> None:
    """Their initial weights are random and then replaced."""

    def go(setup: Setup) -> tuple[Tensor, Tensor]:
        model = ltx2ref.LTX2VideoTransformer3DModel(setup.config).to(setup.dtype)
        model.load_state_dict(setup.state)
        with torch.no_grad():
            video, audio = model(**setup.inputs, return_dict=False)
        return video, audio

    assert found(exactly(port(go), NARROW)) == {IDENTICAL}


@pytest.mark.slow
def test_a_refusal_is_one_line_and_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "numpy_runner.py").write_text(
        "def run(config, state, inputs, dtype):\n    return inputs['hidden_states'].numpy(), None\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["audit", "numpy_runner:run", "--case", CASE.id, "--arithmetic", "exact"]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and "nothing was compared: exact arithmetic cannot see" in error
    assert cli.main(["audit", "diffusers", "--case", CASE.id, "--dtype", "float16"]) == 2
    assert "add --arithmetic exact" in capsys.readouterr().err


# ---------------------------------------------------------------- trace files
@pytest.mark.slow
def test_a_trace_file_says_in_which_arithmetic_it_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = build(CASE.config, WIDE), str(tmp_path / "port.safetensors")
    with exact():
        taps = run(model, CASE.inputs())
    command = ["audit", path, "--case", CASE.id, "--arithmetic", "exact", "--json"]
    save_trace(path, taps, implementation="a port", fingerprint={})
    assert cli.main(command) == 2 and "computed in native arithmetic, expected exact 1" in capsys.readouterr().err
    save_trace(path, taps, implementation="a port", fingerprint={"arithmetic": "exact 1"})
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["reports"][CASE.id]["verdict"] == IDENTICAL


# ---------------------------------------------------------------- suspects
def on_a_machine(name: str) -> Candidate:
    """Make a candidate that natively computes as a machine. Within exact arithmetic it computes as defined."""

    def go(setup: Setup) -> Mapping[str, Tensor]:
        model = ours(setup, conventions_of("ltx2ref"))
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            return run(model, setup.inputs)
        with exact(machine(name)):
            return run(model, setup.inputs)

    return Candidate(name, None, go)


@pytest.mark.slow
def test_a_suspect_that_computes_the_same_operations_is_cleared() -> None:
    report = audit(on_a_machine("halves"), CASE, NARROW, CPU)
    assert report.verdict == ROUNDING and "under exact arithmetic: identical at every tap" in report.sentence
    assert any(row.verdict == SUSPECT for row in report.rows)


@pytest.mark.slow
def test_a_suspect_that_cannot_be_seen_stays_one() -> None:
    def hidden(setup: Setup) -> Mapping[str, Tensor]:
        return {
            name: torch.from_numpy(x.float().numpy()).to(x.dtype) if x.dtype.is_floating_point else x
            for name, x in on_a_machine("halves").run(setup).items()
        }

    report = audit(Candidate("hidden", None, hidden), CASE, NARROW, CPU)
    assert report.verdict == SUSPECT and any("could not settle it" in note for note in report.notes)


@pytest.mark.slow
def test_a_test_can_ask_for_exact_arithmetic() -> None:
    model, inputs = build(CASE.config, WIDE), CASE.inputs()
    assert found(
        assert_parity(model, lambda **given: model(**given, return_dict=False), inputs, arithmetic="exact")
    ) == {IDENTICAL}
    with pytest.raises(AssertionError, match=r"first divergence at (audio_)?sample"):
        assert_parity(
            model,
            lambda **given: tuple(x * 1.01 for x in model(**given, return_dict=False)),
            inputs,
            arithmetic="exact",
        )
    with pytest.raises(ValueError, match="arithmetic: expected 'native' or 'exact', got 'exakt'"):
        assert_parity(model, model, inputs, arithmetic="exakt")


# ---------------------------------------------------------------- what only the bits tell, and what rounding explains
@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("case_id", ["2.3/coords", "2.0/121-frames"])
def test_frequencies_made_in_float32_are_told_by_their_bits(case_id: str) -> None:
    """In the first case they are natively within the budget."""
    case = next(case for case in CASES if case.id == case_id)
    report = audit(mutant("rope-float32-frequencies"), case, WIDE, CPU, arithmetic="exact")
    assert (report.verdict, report.first) == (DIVERGED, "rope.cos")
    assert report.hints[0] == "frequencies computed in float32"


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize(("name", "case_id"), [("eighths", "2.3/t2v"), ("rounded-logits", "2.0/empty-text-rows")])
def test_what_rounds_more_often_is_explained_by_a_machine_that_does(name: str, case_id: str) -> None:
    case = next(case for case in CASES if case.id == case_id)
    report = audit(on_a_machine(name), case, NARROW, CPU)
    explained = [row for row in report.rows if row.machine is not None]
    assert report.verdict == ROUNDING and explained and any(name in note for note in report.notes)
    assert {row.verdict for row in explained} == {SUSPECT} and all((row.budget or 0) > 2 for row in explained)


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["qk-norm-per-head", "ff-bias-dropped", "mask-ignored"])
def test_no_machine_explains_a_bug(name: str) -> None:
    """These bugs are the smallest in bfloat16."""
    case = next(case for case in CASES if case.id == "2.3/text-masks")
    report = audit(mutant(name), case, NARROW, CPU)
    assert report.verdict == DIVERGED and all(row.machine is None for row in report.rows)
