"""The audit names the first wrong tap of each bug, calls rounding rounding, and says so in one line and one number.

pytest tests/parity/test_audit.py
"""

import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mutants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltx2ref import DIFFUSERS, LTX2VideoTransformer3DModel, assert_parity, cli
from ltx2ref.parity import verify
from ltx2ref.parity.audit import audit, audit_natively, candidate_named
from ltx2ref.parity.cases import CASES, Inputs
from ltx2ref.parity.compare import compare
from ltx2ref.parity.explain.conventions import switched
from ltx2ref.parity.judge import Against, coarser, judge_tap, ulps
from ltx2ref.parity.oracles import diffusers
from ltx2ref.parity.record import NATIVE_DTYPES
from ltx2ref.parity.report.rows import (
    DIVERGED,
    IDENTICAL,
    MISSING,
    ORIGINATED,
    PROPAGATED,
    ROUNDING,
    SHAPE,
    SUSPECT,
    Report,
    TapRow,
)
from ltx2ref.parity.trace.sketch import sketch
from ltx2ref.parity.trace.taps import PHASES, Taps
from ltx2ref.parity.trace.tracefile import save_trace
from ltx2ref.parity.truth import isolate, truth

CPU = torch.device("cpu")
BY_ID = {case.id: case for case in CASES}
needs_ltx_core = pytest.mark.ltx_core  # skipped where it is not installed: conftest.py

GATES = ("av_cross_attn_video_a2v_gate.sinusoid", "av_cross_attn_audio_v2a_gate.sinusoid")
SCALE_SHIFTS = ("av_cross_attn_video_scale_shift.sinusoid", "av_cross_attn_audio_scale_shift.sinusoid")
ROPE = ("rope.cos", "rope.sin")
CROSS_ROPE = ("cross_attn_rope.cos", "cross_attn_rope.sin")
ALL_ROPES = tuple(
    f"{name}.{part}"
    for name in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
    for part in ("cos", "sin")
)
EXCHANGE = tuple(
    f"{name}.{part}" for name in ("audio_to_video_attn", "video_to_audio_attn") for part in ("input", "context")
)
NORMS = tuple(
    f"{name}.norm_{part}"
    for name in ("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    for part in "qk"
)
BLOCK = "transformer_blocks.0."
# For each bug: a case that shows it, the tap where it first shows, and all taps, in any block, where the error is made
# rather than passed on.
SHOWN_BY: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gate-multiplier-1": ("2.3/t2v", "av_cross_attn_video_a2v_gate.sinusoid", GATES),
    "swapped-modality-sigma": ("2.3/t2v", "av_cross_attn_video_scale_shift.sinusoid", SCALE_SHIFTS + GATES),
    "unscaled-gate-timestep": ("2.3/t2v", "av_cross_attn_video_a2v_gate.sinusoid", GATES),
    "sigma-ignored": ("2.3/i2v", "prompt_adaln.sinusoid", ("prompt_adaln.sinusoid", "audio_prompt_adaln.sinusoid")),
    "rope-float32-frequencies": (  # sines of small angles survive it
        "2.0/121-frames",
        "rope.cos",
        (*ROPE, "audio_rope.cos", "cross_attn_rope.cos", "cross_attn_audio_rope.cos"),
    ),
    "rope-bf16-positions": ("2.0/121-frames", "rope.cos", ALL_ROPES),
    "rope-axis-major": ("2.0/121-frames", "rope.cos", ROPE),
    "rope-patch-start": ("2.0/121-frames", "rope.cos", ALL_ROPES),
    "rope-right-padding": ("2.0/121-frames", "rope.cos", ROPE),
    "rope-shared-heads": ("2.0/121-frames", "rope.cos", ALL_ROPES),
    "fps-dropped": ("2.0/121-frames", "rope.cos", ROPE),
    "fps-dropped-from-exchange": ("2.0/121-frames", "cross_attn_rope.cos", CROSS_ROPE),
    "max-pos-frames": ("2.3/t2v", "rope.cos", ROPE),
    "mask-as-bool": ("2.3/text-masks", f"{BLOCK}attn2.sdpa", ("attn2.sdpa", "audio_attn2.sdpa")),
    "mask-ignored": ("2.3/text-masks", f"{BLOCK}attn2.sdpa", ("attn2.sdpa", "audio_attn2.sdpa")),
    "stg-4d-mask": ("2.3/stg-one-of-batch", f"{BLOCK}attn1.to_out", ("attn1.to_out", "audio_attn1.to_out")),
    "stg-wrong-block": ("2.3/stg", f"{BLOCK}attn1.to_out", ("attn1.to_out", "audio_attn1.to_out")),
    "stg-without-gate": ("2.3/stg-one-of-batch", f"{BLOCK}attn1.to_out", ("attn1.to_out", "audio_attn1.to_out")),
    "keyframes-unapplied": ("2.5/everything", f"{BLOCK}attn1.stream", ("attn1.stream",)),
    "ff-bias-dropped": ("2.5/t2v", f"{BLOCK}audio_ff.proj", ("audio_ff.proj", "audio_ff.output")),
    "gelu-erf": ("2.5/t2v", f"{BLOCK}ff.activation", ("ff.activation", "audio_ff.activation")),
    "qk-norm-per-head": ("2.0/t2v", f"{BLOCK}attn1.norm_q", NORMS),
    "output-norm-bf16": ("2.3/t2v", "norm_out", ("norm_out", "audio_norm_out")),
    "scale-shift-swapped": ("2.3/t2v", f"{BLOCK}audio_to_video_attn.input", EXCHANGE),
    "a2v-v2a-swapped": ("2.3/t2v", f"{BLOCK}audio_to_video_attn.input", EXCHANGE),
    "sequential-exchange": ("2.3/t2v", f"{BLOCK}video_to_audio_attn.context", ("video_to_audio_attn.context",)),
    "per-token-timestep-averaged": (
        "2.3/i2v",
        "time_embed.sinusoid",
        ("time_embed.sinusoid", "audio_time_embed.sinusoid", *SCALE_SHIFTS, *GATES),
    ),
}
BELOW_ROUNDING = {("gelu-erf", "bfloat16"), ("output-norm-bf16", "bfloat16")}  # smaller than bfloat16's own rounding


class Run(SimpleNamespace):
    model: LTX2VideoTransformer3DModel
    inputs: Inputs
    taps: Taps
    truth: Taps


@cache
def reference(case_id: str, dtype: str) -> Run:
    case = BY_ID[case_id]
    model, inputs = verify.build(case.config, NATIVE_DTYPES[dtype]), verify.cast(case.inputs(), NATIVE_DTYPES[dtype])
    taps = verify.run(model, inputs)
    return Run(model=model, inputs=inputs, taps=taps, truth=truth(model, inputs, taps))


@cache
def mutated(mutant: str, dtype: str) -> Taps:
    run = reference(SHOWN_BY[mutant][0], dtype)
    with mutants.inject(mutant, run.model):
        return verify.run(run.model, run.inputs)


def judged(run: Run, theirs: Taps) -> Report:
    return compare(run.taps, theirs, run.truth, isolate(run.model, run.inputs, run.taps, theirs))


def in_any_block(name: str) -> str:
    return re.sub(r"^transformer_blocks\.\d+\.", "", name)


def before(report: Report) -> list[TapRow]:
    names = [row.name for row in report.rows]
    return report.rows[: names.index(report.first)] if report.first else report.rows


def test_the_table_has_every_bug() -> None:
    assert SHOWN_BY.keys() == mutants.MUTANTS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("mutant", SHOWN_BY)
def test_a_porting_bug_is_found_where_it_is_made_and_told_from_what_only_passes_it_on(mutant: str, dtype: str) -> None:
    case_id, tap, made_at = SHOWN_BY[mutant]
    report = judged(reference(case_id, dtype), mutated(mutant, dtype))
    assert report.first == tap
    assert {row.verdict for row in before(report)} <= {IDENTICAL, MISSING}
    if (mutant, dtype) in BELOW_ROUNDING:
        assert report.verdict == ROUNDING
        return
    found = {row.name: row for row in report.rows}
    assert (report.verdict, found[tap].verdict, found[tap].origin) == (DIVERGED, DIVERGED, ORIGINATED)
    assert {in_any_block(row.name) for row in report.rows if row.origin == ORIGINATED} == set(made_at)
    passed_on = [row for row in report.rows if row.verdict != IDENTICAL and row.origin == PROPAGATED]
    assert "sample" in [row.name for row in passed_on]
    assert None not in {row.origin for row in report.rows if row.verdict == DIVERGED}
    assert not [row.name for row in report.rows if row.verdict == SHAPE]
    assert all(1 < row.budget <= 2 for row in report.rows if row.verdict == SUSPECT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("mutant", SHOWN_BY)
def test_sketches_name_the_same_first_divergence_as_tensors(mutant: str, dtype: str) -> None:
    run = reference(SHOWN_BY[mutant][0], dtype)
    ours, theirs, true = (
        {name: sketch(x) for name, x in taps.items()} for taps in (run.taps, mutated(mutant, dtype), run.truth)
    )
    report = compare(ours, theirs, true)
    expected = ROUNDING if (mutant, dtype) in BELOW_ROUNDING else DIVERGED
    assert (report.verdict, report.first) == (expected, SHOWN_BY[mutant][1])
    # A sketch per batch element cannot be repeated for each token.
    assert all(row.estimated for row in report.rows if row.verdict not in (MISSING, SHAPE))
    assert mutant == "per-token-timestep-averaged" or SHAPE not in {row.verdict for row in report.rows}


CONDITIONING = "av_cross_attn_video_scale_shift.sinusoid"


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("case_id", ["2.0/i2v", "2.3/stg", "2.5/everything"])
def test_diffusers_is_identical_at_every_tap(case_id: str, dtype: str) -> None:
    report = audit(candidate_named("diffusers"), BY_ID[case_id], NATIVE_DTYPES[dtype], CPU)
    assert report.verdict == IDENTICAL and {row.verdict for row in report.rows} == {IDENTICAL}
    assert (report.sentence, report.first) == ("identical at every tap", None)
    assert report.reference["dtype"] == dtype and report.candidate["implementation"] == "diffusers"


@pytest.mark.slow
@needs_ltx_core
@pytest.mark.parametrize("case_id", ["2.0/cross-timestep", "2.3/cross-timestep", "2.3/i2v-cross-timestep"])
def test_ltx_core_is_identical_where_the_exchange_sees_the_other_streams_sigma(case_id: str) -> None:
    assert audit(candidate_named("ltx-core"), BY_ID[case_id], torch.float32, CPU).verdict == IDENTICAL


@pytest.mark.slow
@needs_ltx_core
@pytest.mark.parametrize("case_id", ["2.0/t2v", "2.3/t2v", "2.3/i2v"])
def test_ltx_core_is_found_to_condition_the_exchange_on_the_other_stream(case_id: str) -> None:
    report = audit(candidate_named("ltx-core"), BY_ID[case_id], torch.float32, CPU)
    assert (report.verdict, report.first) == (DIVERGED, CONDITIONING)
    assert report.sentence.startswith(f"first divergence at {CONDITIONING} (diverged), looks like")
    assert "everything before it is identical" in report.sentence
    assert report.hints[0] == ("another convention, identical to your candidate after switching `exchange` to 'other'")
    assert "audio_sigma" in report.hints[1] or "audio" in report.hints[1]


@pytest.mark.slow
@needs_ltx_core
def test_ltx_core_only_rounds_its_rotation_in_bfloat16() -> None:
    report = audit(candidate_named("ltx-core"), BY_ID["2.3/cross-timestep"], torch.bfloat16, CPU)
    assert (report.verdict, report.first) == (ROUNDING, "rope.cos")
    assert report.sentence.startswith(
        "first divergence at rope.cos (rounding), looks like another convention, "
        "identical to your candidate after switching `rotation_dtype` to 'model'"
    )


@pytest.mark.slow
@needs_ltx_core
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("case_id", ["2.0/t2v", "2.3/i2v", "2.3/stg-one-of-batch", "2.3/fractional-self-mask"])
def test_ltx_core_is_identical_to_its_conventions_at_every_tap(case_id: str, dtype: str) -> None:
    report = audit(candidate_named("ltx-core"), BY_ID[case_id], NATIVE_DTYPES[dtype], CPU, "ltx2ref:ltx-core-2026-03")
    assert report.verdict == IDENTICAL and report.reference["implementation"] == "ltx2ref:ltx-core-2026-03"


@pytest.mark.slow
@needs_ltx_core
def test_all_conventions_of_ltx_core_are_named_together() -> None:
    report = audit(candidate_named("ltx-core"), BY_ID["2.3/fractional-self-mask"], torch.bfloat16, CPU)
    for name, value in (("rotation_dtype", "model"), ("exchange", "other"), ("self_mask_bias", "log")):
        assert f"`{name}` to '{value}'" in report.hints[0]
    assert "up to" not in report.hints[0]


@pytest.mark.slow
def test_conventions_are_implementations(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command("audit", "ltx2ref:ltx-core-2026-08", "--case", "2.5/*", capsys=capsys)
    assert code == 1 and out.count("identical to your candidate after switching `exchange` to 'other_gate'") == 5
    code, out, _ = command(
        "audit", "ltx2ref:ltx-core-2026-08", "ltx2ref:ltx-core-2026-08", "--case", "2.5/t2v", capsys=capsys
    )
    assert code == 0 and "identical at every tap" in out


@pytest.mark.parametrize("names", [["ltx2ref:ltx-core"], ["diffusers", "ltx2ref:diffusers"]])
def test_unknown_conventions_are_refused(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = command("audit", *names, "--case", "2.5/t2v", capsys=capsys)
    assert code == 2 and f"{names[0]}: no such conventions; expected ltx2ref," in error


@pytest.mark.slow
def test_a_bug_is_not_taken_for_a_convention() -> None:
    """Where a switch explains the rounding before a bug, the report mentions it, and the bug keeps its hint."""
    case = BY_ID["2.3/coords"]
    model = verify.build(case.config, torch.bfloat16)
    inputs = verify.cast(case.inputs(), torch.bfloat16)
    other = switched(model, replace(DIFFUSERS, rotation_dtype="model"))
    with mutants.inject("sequential-exchange", other):
        theirs = verify.run(other, inputs)
    report = audit_natively(model, inputs, theirs)
    assert report.verdict == DIVERGED and not any("convention" in hint for hint in report.hints)
    assert any("switching `rotation_dtype` to 'model', up to transformer_blocks.0." in note for note in report.notes)


BOTH = ("float32", "bfloat16")
# For each benign change: a case that has it, and the dtypes in which it is benign.
BENIGN: dict[str, tuple[str, tuple[str, ...]]] = {
    "math attention": ("2.3/text-masks", BOTH),
    "flash attention": ("2.3/t2v", BOTH),
    "rotation in the model's dtype": ("2.3/121-frames", BOTH),
    "another mask fill": ("2.3/text-masks", BOTH),
    "another order of sums": ("2.3/t2v", BOTH),
    "a more exact GELU": ("2.5/t2v", BOTH),
    "nothing": ("2.3/t2v", BOTH),
}


@pytest.mark.slow
@pytest.mark.parametrize("change,dtype", [(change, dtype) for change, x in BENIGN.items() for dtype in x[1]])
def test_a_benign_change_is_never_called_a_divergence(change: str, dtype: str) -> None:
    run = reference(BENIGN[change][0], dtype)
    with mutants.BENIGN[change]():
        theirs = verify.run(run.model, run.inputs)
    report = audit_natively(run.model, run.inputs, theirs)
    wrong = {row.name: (row.verdict, row.budget) for row in report.rows if row.verdict not in (IDENTICAL, ROUNDING)}
    assert report.passed, wrong


@pytest.mark.slow
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("case_id", ["2.0/t2v", "2.3/i2v", "2.3/121-frames", "2.5/everything"])
def test_more_roundings_than_the_references_are_suspect_at_most(case_id: str, dtype: str) -> None:
    run = reference(case_id, dtype)
    with mutants.BENIGN["rounded partial sums"]():
        theirs = verify.run(run.model, run.inputs)
    report = audit_natively(run.model, run.inputs, theirs)
    assert report.verdict in (ROUNDING, SUSPECT)
    assert max(row.budget or 0 for row in report.rows) < 1.75, "too close to what is called a divergence"


@pytest.mark.slow
@pytest.mark.parametrize("shown", [(), ("sample", "audio_sample"), ("proj_in", "sample", "audio_sample")])
def test_phases_that_a_candidate_does_not_show_may_be_rounded_otherwise(shown: tuple[str, ...]) -> None:
    run = reference("2.3/121-frames", "float32")
    phases = {name: x.float() for name, x in run.truth.items() if name.endswith(PHASES)}  # rounded once
    theirs = verify.run(run.model, run.inputs, phases) | phases
    report = audit_natively(run.model, run.inputs, {name: theirs[name] for name in shown or theirs})
    assert not {DIVERGED, SHAPE, SUSPECT} & {row.verdict for row in report.rows}
    wrong = theirs | {"sample": theirs["sample"] * 1.001}
    rows = audit_natively(run.model, run.inputs, {name: wrong[name] for name in shown or wrong}).rows
    assert [row.verdict for row in rows if row.name == "sample"] == [DIVERGED]


@pytest.mark.parametrize("with_truth", [False, True])
def test_a_bfloat16_model_against_a_float32_record_is_not_called_a_divergence(with_truth: bool) -> None:
    run, theirs = reference("2.3/t2v", "float32"), reference("2.3/t2v", "bfloat16").taps
    report = compare(run.taps, theirs, run.truth if with_truth else None)
    assert not [row.name for row in report.rows if row.verdict in (DIVERGED, SHAPE, MISSING)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def only(reference: Tensor, candidate: Tensor | None, true: Tensor | None = None) -> TapRow:
    return judge_tap("x", reference, candidate, None, Against(true))


def test_each_verdict_for_its_reason() -> None:
    true = random(20, 50)
    x = true.float()
    half = x.bfloat16()
    assert only(x, x.clone()).verdict == IDENTICAL
    assert only(x, None).verdict == MISSING
    assert only(x, x[:, 1:]).verdict == SHAPE and only(x, x[:, 1:]).candidate_shape == (20, 49)
    rounded = only(x, half)
    assert (rounded.verdict, rounded.equal_rounded, rounded.candidate_dtype) == (ROUNDING, True, "bfloat16")
    neighbour = half.clone()
    neighbour.view(torch.int16)[3, 7] += 1
    within = only(half, neighbour, true)
    assert (within.verdict, within.equal_rounded, within.ulp_max) == (ROUNDING, False, 1)
    assert within.budget is not None and within.budget < 1
    assert only(half, half * 1.01, true).verdict == DIVERGED
    assert only(half, (true * (1 + 2.0**-8)).bfloat16(), true).verdict == SUSPECT
    assert only(x, x * (1 + 1e-5)).verdict == SUSPECT
    assert only(x, x * (1 + 1e-5), true).verdict == DIVERGED
    assert only(x, x * (1 + 1e-2)).verdict == DIVERGED


@pytest.mark.parametrize("strange", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(strange: float) -> None:
    true = random(20, 50)
    wrong = true.float()
    wrong[4, 5] = strange
    for reference, given in ((true.float(), None), (true.float(), true), (true.bfloat16(), true)):
        row = only(reference, wrong, given)
        assert (row.verdict, row.worst) == (DIVERGED, (4, 5))
    sketched = compare({"x": sketch(true.float())}, {"x": sketch(wrong)}, {"x": sketch(true)})
    assert sketched.verdict == DIVERGED


def test_the_budget_is_what_the_reference_itself_loses_and_half_of_it_again() -> None:
    true = random(20, 50)
    reference, candidate = true.bfloat16(), (true * (1 + 2.0**-9)).bfloat16()

    def error(x: Tensor) -> float:
        return float(np.linalg.norm(x.double().numpy() - true.numpy()) / np.linalg.norm(true.numpy()))

    row = only(reference, candidate, true)
    assert row.error == pytest.approx(error(candidate)) and row.reference_error == pytest.approx(error(reference))
    assert row.budget == pytest.approx(error(candidate) / (1.5 * error(reference) + 4 * 2.0**-23))


def test_a_reference_has_no_budget_for_a_coarser_dtype() -> None:
    true = random(20, 50)
    wrong = (true * 1.01).bfloat16()
    assert only(true.float(), wrong, true).budget is None and only(true.float(), wrong, true).verdict == SUSPECT
    assert only(true.float(), (true * 2).bfloat16(), true).verdict == DIVERGED
    assert only(true.bfloat16(), (true * 1.01).float(), true).budget is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ulps_count_the_numbers_between(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    place = {x: i for i, x in enumerate(sorted(set(every[every.isfinite()].tolist())))}
    a, b = random(500).to(dtype), (random(500) + 0.1 * random(500, seed=1)).to(dtype)
    steps = sorted(abs(place[x] - place[y]) for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert ulps(a, b) == (steps[-1], steps[int(0.99 * (len(steps) - 1))])


def test_ulps_of_float32_and_float64_are_steps_of_nextafter() -> None:
    for dtype, kind in ((torch.float32, np.float32), (torch.float64, np.float64)):
        for start in (1.0, -1.0, 0.0, 1 - 2.0**-20, 1e-40 if dtype is torch.float32 else 5e-324):
            x = y = kind(start)
            for steps in range(9):
                assert ulps(torch.tensor([x], dtype=dtype), torch.tensor([y], dtype=dtype)) == (steps, steps)
                y = np.nextafter(y, kind(np.inf))
    assert ulps(torch.tensor([0.0]), torch.tensor([-0.0])) == (0, 0)
    assert math.nextafter(1.0, 2.0) == torch.tensor(1.0, dtype=torch.float64).nextafter(torch.tensor(2.0).double())


def test_ulps_are_counted_in_the_coarser_dtype() -> None:
    a, b = random(9).float(), random(9).bfloat16()
    assert coarser(a, b) == coarser(b, a) == torch.bfloat16
    assert only(a, b + b.abs() * 2.0**-7).ulp_max == ulps(a.bfloat16(), b + b.abs() * 2.0**-7)[0]


def test_every_number_is_numpys() -> None:
    a, b = random(6, 7, 8).float(), random(6, 7, 8).float() + 0.01 * random(6, 7, 8, seed=1).float()
    row, x, y = only(a, b), a.double().numpy(), b.double().numpy()
    gap = np.abs(y - x)
    worst = tuple(int(i) for i in np.unravel_index(gap.argmax(), gap.shape))
    assert (row.worst, row.max_abs) == (worst, gap[worst])
    assert (row.worst_reference, row.worst_candidate) == (x[worst], y[worst])
    assert row.relative == pytest.approx(np.linalg.norm(gap) / np.linalg.norm(x), rel=1e-12)
    assert row.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert row.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / (gap**2).sum()), rel=1e-5)


# assert_parity in the tests of another project


def port(run: Run) -> nn.Module:
    return diffusers.build_diffusers(run.model.config.to_diffusers(), run.model.state_dict(), torch.float32)


@pytest.mark.slow
def test_assert_parity_passes_for_diffusers_as_a_module_and_as_a_function_of_either_kind() -> None:
    run = reference("2.3/i2v", "float32")
    model = port(run)

    def outputs(**inputs: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return diffusers.run_diffusers(model, inputs)

    assert assert_parity(run.model, model, run.inputs).verdict == IDENTICAL
    assert assert_parity(run.model, lambda **_: run.taps, run.inputs).verdict == IDENTICAL
    renamed = {f"port.{name}": x for name, x in run.taps.items()}
    assert (
        assert_parity(
            run.model, lambda **_: renamed, run.inputs, {name: name.removeprefix("port.") for name in renamed}
        ).verdict
        == IDENTICAL
    )
    report = assert_parity(run.model, outputs, run.inputs)
    assert report.sentence == "identical at all of 2 taps; 174 of 176 taps are missing from the candidate"


@pytest.mark.slow
def test_assert_parity_fails_for_a_candidate_without_outputs() -> None:
    run = reference("2.3/i2v", "float32")
    for lacking in ({"sample"}, {"audio_sample"}):
        theirs = {name: x for name, x in run.taps.items() if name not in lacking}
        with pytest.raises(AssertionError, match="missing from the candidate"):
            assert_parity(run.model, lambda theirs=theirs, **_: theirs, run.inputs)


@pytest.mark.slow
def test_assert_parity_begins_with_the_first_divergence() -> None:
    run = reference("2.3/i2v", "float32")
    model = port(run)
    layer = model.transformer_blocks[1].audio_ff.net[0].proj
    with patch.object(layer, "forward", lambda x: F.linear(x, layer.weight)), pytest.raises(AssertionError) as failure:
        assert_parity(run.model, model, run.inputs)
    said = str(failure.value)
    assert said.startswith("first divergence at transformer_blocks.1.audio_ff.proj (diverged), looks like")
    assert "everything before it is identical" in said.splitlines()[0] and "originated here" in said
    with pytest.raises(AssertionError, match=r"^first divergence at audio_sample \(diverged\)"):
        assert_parity(run.model, lambda **_: (run.taps["sample"], -run.taps["audio_sample"]), run.inputs)
    with pytest.raises(ValueError, match="sample: expected a floating-point tensor, got list"):
        assert_parity(run.model, lambda **_: {"sample": ["one"]}, run.inputs)


# The command line. These two are candidates, by module:callable.


def right(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
    with torch.no_grad():
        return diffusers.run_diffusers(diffusers.build_diffusers(config, state, dtype), inputs)


def taps_with_a_bug(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
    taps = reference("2.3/t2v", "float32").taps
    return taps | {f"{BLOCK}attn1.to_out": -taps[f"{BLOCK}attn1.to_out"]}


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_audit_says_identical_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = command("audit", "diffusers", "--case", "2.3/t2v", "--dtype", "bfloat16", capsys=capsys)
    assert code == 0 and said.startswith("2.3/t2v: identical: identical at every tap")


@pytest.mark.slow
def test_audit_names_the_bug_writes_a_page_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    code, said, _ = command(
        "audit", f"{__name__}:taps_with_a_bug", "--case", "2.3/t2v", "--html", str(page), capsys=capsys
    )
    assert code == 1 and said.startswith(f"2.3/t2v: diverged: first divergence at {BLOCK}attn1.to_out (diverged)")
    written = page.read_text(encoding="utf-8").replace("<wbr>", "")
    assert f"{BLOCK}attn1.to_out" in written
    code, said, _ = command("audit", f"{__name__}:taps_with_a_bug", "--case", "2.3/t2v", "--json", capsys=capsys)
    report = json.loads(said)["reports"]["2.3/t2v"]
    assert (code, report["verdict"], report["first"]) == (1, DIVERGED, f"{BLOCK}attn1.to_out")


def test_compare_judges_by_the_truth_and_its_json_has_no_bare_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true = random(20, 50)
    x, near, wrong = true.bfloat16(), (true * (1 + 2.0**-10)).bfloat16(), true.bfloat16()
    wrong[4, 5] = math.nan
    for name, taps in (("reference", x), ("truth", true), ("near", near), ("wrong", wrong)):
        save_trace(tmp_path / name, {"sample": taps}, implementation=name, fingerprint={})
    paths = {name: str(tmp_path / name) for name in ("reference", "truth", "near", "wrong")}
    assert command("compare", paths["reference"], paths["near"], capsys=capsys)[0] == 2
    assert command("compare", paths["reference"], paths["near"], "--truth", paths["truth"], capsys=capsys)[0] == 0
    code, said, _ = command(
        "compare", paths["reference"], paths["wrong"], "--truth", paths["truth"], "--json", capsys=capsys
    )
    (row,) = json.loads(said, parse_constant=pytest.fail)["reports"]["wrong"]["rows"]
    assert (code, row["relative"], row["worst"]) == (1, "nan", [4, 5])


def test_a_reference_that_does_not_repeat_itself_is_inconclusive() -> None:
    run = reference("2.3/t2v", "float32")
    layer = run.model.proj_in
    noise = iter(range(1, 9))
    with patch.object(layer, "forward", lambda x: F.linear(x, layer.weight, layer.bias + next(noise))):
        report = audit_natively(run.model, run.inputs, run.taps)
    assert (report.verdict, report.sentence) == (SUSPECT, "inconclusive: the reference does not repeat itself")


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["tensors", "sketches"])
def test_a_trace_file_is_a_candidate(kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, make = reference("2.3/t2v", "float32"), sketch if kept == "sketches" else torch.clone
    bug = mutated("sequential-exchange", "float32")
    for name, taps in (("right", run.taps), ("wrong", bug)):
        save_trace(tmp_path / name, {at: make(x) for at, x in taps.items()}, implementation="port", fingerprint={})
    first = SHOWN_BY["sequential-exchange"][1]
    for arguments in (
        ("audit", str(tmp_path / "{}"), "--case", "2.3/t2v"),
        ("compare", str(tmp_path / "right"), str(tmp_path / "{}")),
    ):
        right, wrong = (command(*(x.format(name) for x in arguments), capsys=capsys) for name in ("right", "wrong"))
        assert right[0] == 0 and "identical at every tap" in right[1]
        assert wrong[0] == 1 and f"first divergence at {first}" in wrong[1]


def test_taps_that_are_missing_are_inconclusive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taps = {name: x for name, x in reference("2.3/t2v", "float32").taps.items() if name.startswith("transformer")}
    save_trace(tmp_path / "port", taps, implementation="port", fingerprint={})
    code, said, _ = command("audit", str(tmp_path / "port"), "--case", "2.3/t2v", capsys=capsys)
    assert code == 2 and "taps are missing from the candidate" in said


@pytest.mark.parametrize(
    "arguments,reason",
    [
        (["no-such-thing"], "no such file"),
        (["no_such_module:run"], "there is no module no_such_module"),
        (["math:no_such_callable"], "no_such_callable"),
        (["diffusers", "--case", "9.9/*"], "no such case"),
        (["diffusers", "--device", "no-such-device"], "--device no-such-device"),
        ([__file__], ""),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line_and_exits_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, error = command("audit", *arguments, capsys=capsys)
    assert (code, said) == (2, "") and error.startswith("ltx2ref: ") and reason in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
@needs_ltx_core
def test_what_ltx_core_cannot_express_is_said_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = command("audit", "ltx-core", "--release", "2.5", capsys=capsys)
    assert code == 2 and "nothing was compared" in error and "ltx-core 1.0.0" in error
