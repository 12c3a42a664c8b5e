"""One audit names everything that a port does differently, how much each difference matters, and its conventions.

pytest tests/parity/test_causes.py
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import five
import mutants
import pytest
import torch

from ltx2ref import interface
from ltx2ref.parity.audit import (
    MADE_EXACTLY,
    MADE_NATIVELY,
    Candidate,
    Setup,
    audit,
    candidate_named,
    conventions_of,
    ours,
    settled,
)
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.report.rows import BUG, CONVENTION, IDENTICAL, Cause, Report
from ltx2ref.parity.run import run
from ltx2ref.rope import audio_positions

CPU = torch.device("cpu")
BY_ID = {case.id: case for case in CASES}
ALL = frozenset(five.DIFFERENCES)


def computed(setup: Setup, *names: str) -> Any:
    return five.run(setup.config.to_diffusers(), setup.state, setup.inputs, setup.dtype, *names)


@cache
def report(
    *names: str,
    case: str = "2.3/i2v",
    dtype: torch.dtype = torch.float32,
    arithmetic: str = MADE_NATIVELY,
    accept: tuple[str, ...] = (),
) -> Report:
    candidate = Candidate("a synthetic port", None, partial(lambda names, setup: computed(setup, *names), names))
    return audit(candidate, BY_ID[case], dtype, CPU, arithmetic=arithmetic, accept=accept)


def named(cause: Cause) -> str | None:
    """Return which of the five differences a cause is, by its place and its words."""
    return next(
        (
            name
            for name, (place, words) in five.DIFFERENCES.items()
            if cause.place == place and words in (cause.what or "")
        ),
        None,
    )


@pytest.mark.parametrize(
    "case", ["2.3/i2v", *(pytest.param(x, marks=pytest.mark.slow) for x in ("2.3/t2v", "2.0/t2v"))]
)
def test_one_run_lists_five_causes_by_their_effect(case: str) -> None:
    found = report(case=case).causes
    assert sorted(map(str, map(named, found))) == sorted(ALL), [*map(str, found)]
    effects = [cause.effect for cause in found]
    assert all(x is not None and 0 < x < 1 for x in effects) and effects == sorted(effects, reverse=True)
    assert all(cause.verdict == BUG for cause in found)


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", sorted(ALL))
def test_alone_each_is_the_only_cause_and_its_effect_is_what_the_outputs_show(name: str) -> None:
    found = report(name)
    (cause,) = found.causes
    assert named(cause) == name and cause.effect is not None
    moved = max(row.relative or 0.0 for row in found.rows if row.name in ("sample", "audio_sample"))
    assert 0.5 < cause.effect / moved < 2 or moved < 1e-5  # below that the outputs' own rounding counts, too


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", sorted(ALL))
def test_after_one_is_accepted_the_others_stay(name: str) -> None:
    found = report(accept=(five.DIFFERENCES[name][0],))
    assert {named(cause) for cause in found.causes} == ALL - {name}
    assert found.failed and any(note.startswith(f"accepted: {five.DIFFERENCES[name][0]}") for note in found.notes)


@pytest.mark.slow
def test_after_all_are_accepted_nothing_is_left() -> None:
    found = report(accept=tuple(place for place, _ in five.DIFFERENCES.values()))
    assert found.passed and not found.causes, found.details()


def test_a_place_without_a_cause_is_refused_with_the_places_that_have_one() -> None:
    with pytest.raises(ValueError, match=r"^--accept ff\.proj: no cause there; there are causes at .*rope\.cos"):
        report(accept=("ff.proj",))


@pytest.mark.slow
def test_exact_arithmetic_finds_the_same_causes() -> None:
    found = report(arithmetic=MADE_EXACTLY)
    assert {named(cause) for cause in found.causes} == ALL, [*map(str, found.causes)]


@pytest.mark.slow
def test_bfloat16_hides_small_causes_and_finds_the_large_ones() -> None:
    found = {named(cause) for cause in report(dtype=torch.bfloat16).causes}
    assert {"gate", "sigma", "sequential"} <= found <= ALL


# ---------------------------------------------------------------- conventions
def test_the_fingerprint_names_what_the_five_differences_are() -> None:
    told = report(case="2.3/i2v").conventions
    assert told["q/k norm eps"] == "1e-05" and told["RoPE frequencies"] == "float32"
    assert told["noise level"] == "rounded to bfloat16" and told["gate level"] == "* 0.001"
    assert told["exchange"] == "own"


def follows(name: str, case: str, dtype: torch.dtype = torch.float32) -> Report:
    return audit(candidate_named(name), BY_ID[case], dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_identical_candidate_has_a_fingerprint_too(dtype: torch.dtype) -> None:
    found = follows("ltx2ref", "2.3/i2v", dtype)
    assert found.verdict == IDENTICAL and not found.causes
    assert found.conventions["exchange"] == "own" and found.conventions["RoPE frequencies"] == "float64"
    assert ("rotation_dtype" in found.conventions) == (dtype == torch.bfloat16)


def test_other_conventions_are_causes_with_the_name_of_the_switch() -> None:
    found = follows("ltx2ref:ltx-core-2026-08", "2.3/i2v")
    assert [(cause.verdict, cause.place) for cause in found.causes] == [
        (CONVENTION, "av_cross_attn_video_a2v_gate.sinusoid")
    ]
    assert found.causes[0].what == "another convention, exchange = 'other_gate'"
    assert found.conventions["exchange"] == "other_gate"


@pytest.mark.slow
def test_a_level_for_each_token_has_its_convention_and_no_causes_after_it() -> None:
    found = follows("ltx2ref:ltx-core-2026-08", "2.5/pipeline-i2v")
    (cause,) = found.causes
    assert cause.what == "another convention, exchange = 'other_gate'" and cause.effect and cause.effect > 0.01


def test_an_exchange_that_ignores_its_argument_is_told_from_the_levels_of_each_token() -> None:
    def ignored(setup: Setup) -> Any:
        return candidate_named("ltx2ref").run(setup._replace(inputs={**setup.inputs, "use_cross_timestep": False}))

    found = audit(Candidate("own", None, ignored), BY_ID["2.3/i2v-cross-timestep"], torch.float32, CPU)
    (cause,) = found.causes
    moved = max(row.relative or 0.0 for row in found.rows if row.name in ("sample", "audio_sample"))
    assert cause.what == "another convention, exchange = 'own'" and found.conventions["exchange"] == "own"
    assert cause.effect == pytest.approx(moved, rel=1e-3)


def test_another_mask_bias_shows_in_a_row_without_tokens() -> None:
    found = follows("ltx2ref:ltx-core-2026-08", "2.0/empty-text-rows")
    assert found.conventions["text_mask_bias"] == "lowest"
    assert CONVENTION in {cause.verdict for cause in found.causes if "attn2.sdpa" in cause.place}


@pytest.mark.slow
@pytest.mark.sample(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["another order of sums", "math attention", "rounded partial sums"])
def test_honest_rounding_has_no_cause_and_the_same_fingerprint(name: str, dtype: torch.dtype) -> None:
    """Three ports whose arithmetic only rounds otherwise follow what the reference follows."""

    def rounds_otherwise(setup: Setup) -> Any:
        with mutants.BENIGN[name]():
            return candidate_named("ltx2ref").run(setup)

    for case in ("2.3/i2v", "2.0/empty-text-rows"):
        found = audit(Candidate(name, None, rounds_otherwise), BY_ID[case], dtype, CPU)
        assert not found.causes and not found.failed, found.details()
        own = follows("ltx2ref", case, dtype).conventions
        assert all(own[trait] == value for trait, value in found.conventions.items() if trait in own)
        assert {"exchange"} <= found.conventions.keys() <= own.keys()


# ---------------------------------------------------------------- what remains
@pytest.mark.slow
def test_where_two_inputs_are_equal_the_next_case_tells_which_it_is() -> None:
    port = Candidate("its gates", None, lambda setup: computed(setup, "gate"))
    case = BY_ID["2.3/t2v"]
    found = audit(port, case, torch.float32, CPU)
    assert (found.causes[0].what or "").startswith("timestep (= sigma) * 0.001 in place of timestep (= sigma)")
    told = settled(found, port, case, torch.float32, CPU)
    assert told.causes[0].what == (
        "timestep * 0.001 in place of timestep: a timestep multiplier applied twice, or not at all (told by 2.3/i2v)"
    )


@pytest.mark.slow
def test_more_roundings_beside_a_bug_are_a_cause_of_their_own_kind() -> None:
    """bfloat16 products in eighths are rounding, and do not hide the gates, nor look like a bug beside them."""

    def both(setup: Setup) -> Any:
        with patch.object(torch.nn.Linear, "forward", in_eighths):
            return computed(setup, "gate")

    found = audit(Candidate("eighths", None, both), BY_ID["2.3/i2v"], torch.bfloat16, CPU)
    assert [named(cause) for cause in found.causes if cause.verdict == BUG] == ["gate"], found.details()


def in_eighths(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    parts = zip(x.chunk(8, -1), self.weight.chunk(8, -1), strict=True)
    total = sum((a @ b.t() for a, b in parts), torch.zeros((), dtype=x.dtype))
    return total if self.bias is None else total + self.bias


# ---------------------------------------------------------------- a port of the field
@pytest.mark.slow
@pytest.mark.skipif(find_spec("diffsynth") is None, reason="DiffSynth is not installed")
@pytest.mark.parametrize(
    ("case", "exchange"), [("2.0/i2v", "other"), ("2.3/i2v", "other"), ("2.5/keyframes", "other_gate")]
)
def test_diffsynth_follows_its_own_conventions(case: str, exchange: str) -> None:
    """DiffSynth 2.1.12 has one sigma for both streams; whose level drives the exchange depends on the release."""
    for dtype in (torch.float32, torch.bfloat16):
        found = follows(str(Path(__file__).parents[1] / "support" / "diffsynth_port.py:run"), case, dtype)
        told = found.conventions
        assert told["exchange"] == exchange and told["noise levels"] == "one for both streams", told
        assert {cause.verdict for cause in found.causes if cause.place.startswith("av_cross")} == {CONVENTION}


def test_a_convention_is_accepted_as_a_whole() -> None:
    place = "av_cross_attn_video_scale_shift.sinusoid"
    found = audit(
        candidate_named("ltx2ref:ltx-core-2026-03"), BY_ID["2.0/empty-text-rows"], torch.float32, CPU, accept=(place,)
    )
    assert [cause.what for cause in found.causes] == ["another convention, text_mask_bias = 'lowest'"], found.details()


def test_a_block_that_was_never_computed_is_named() -> None:
    def without_last_block(setup: Setup) -> Any:
        taps = candidate_named("ltx2ref").run(setup)
        return {name: x for name, x in taps.items() if not name.startswith("transformer_blocks.1.")}

    found = audit(Candidate("one block", None, without_last_block), BY_ID["2.3/t2v"], torch.float32, CPU)
    (note,) = (note for note in found.notes if "never computed" in note)
    assert note.startswith("transformer_blocks.1: the candidate has none of its ")


def test_outputs_alone_have_no_causes() -> None:
    def outputs(setup: Setup) -> Any:
        taps = computed(setup, "gate")
        return taps["sample"], taps["audio_sample"]

    found = audit(Candidate("outputs", None, outputs), BY_ID["2.3/t2v"], torch.float32, CPU)
    assert found.failed and not found.causes and "only the outputs were given" in found.notes[0]


# ---------------------------------------------------------------- odd ports
def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Candidate:
    """Return this model with something done to one of its taps, and to all that follows."""

    def run_changed(setup: Setup) -> Any:
        model = ours(setup, conventions_of("ltx2ref"))
        module = model.get_submodule(name)
        with torch.no_grad():
            module.register_forward_hook(lambda _, args, out: change(out))
            return run(model, setup.inputs)

    return Candidate(name, None, run_changed)


def test_a_number_that_is_not_finite_is_one_cause_however_far_it_spreads() -> None:
    def spoiled(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., 0] = torch.nan
        return x

    port, case = changed("transformer_blocks.0.attn1.to_v", spoiled), BY_ID["2.3/t2v"]
    (cause,) = audit(port, case, torch.float32, CPU).causes
    assert (cause.place, cause.effect) == ("transformer_blocks.0.attn1.to_v", float("inf"))
    assert (cause.what or "").endswith("an overflow, or a softmax over nothing")
    with pytest.raises(ValueError, match="the reference cannot go on as the candidate does there: its numbers are not"):
        audit(port, case, torch.float32, CPU, accept=(cause.place,))


def test_a_cause_in_one_block_has_the_number_of_that_block() -> None:
    port = changed("transformer_blocks.1.attn2.to_out.0", lambda x: x * 0.5)
    (cause,) = audit(port, BY_ID["2.3/t2v"], torch.float32, CPU).causes
    assert cause.place == "transformer_blocks.1.attn2.to_out" and "0.5" in (cause.what or "")
    assert not audit(port, BY_ID["2.3/t2v"], torch.float32, CPU, accept=(cause.place,)).causes


def test_a_change_of_the_outputs_is_a_cause_that_can_be_accepted() -> None:
    def scaled(setup: Setup) -> Any:
        taps = candidate_named("ltx2ref").run(setup)
        return {**taps, "sample": taps["sample"] * 1.1}

    port, case = Candidate("scaled", None, scaled), BY_ID["2.3/t2v"]
    (cause,) = audit(port, case, torch.float32, CPU).causes
    assert cause.place == "sample" and cause.effect == pytest.approx(0.1, rel=1e-3)
    assert audit(port, case, torch.float32, CPU, accept=("sample",)).passed


def test_wrong_coordinates_act_through_the_tables_made_from_them() -> None:
    def doubled(setup: Setup) -> Any:
        def positions(*given: Any, **more: Any) -> torch.Tensor:
            return audio_positions(*given, **more) * 2

        with patch.object(interface, "audio_positions", positions):
            return candidate_named("ltx2ref").run(setup)

    found = audit(Candidate("twice as late", None, doubled), BY_ID["2.3/t2v"], torch.float32, CPU)
    (cause,) = found.causes
    moved = max(row.relative or 0.0 for row in found.rows if row.name in ("sample", "audio_sample"))
    assert cause.place == "audio_coords" and cause.effect is not None and 0.8 < cause.effect / moved < 1.25


@pytest.mark.slow
def test_a_bias_after_rounding_is_not_suspect_in_bfloat16() -> None:
    def bias_last(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        product = x @ self.weight.t()
        return product if self.bias is None else product + self.bias

    def rounded_first(setup: Setup) -> Any:
        with patch.object(torch.nn.Linear, "forward", bias_last):
            return candidate_named("ltx2ref").run(setup)

    for case in ("2.3/t2v", "2.3/text-masks"):
        found = audit(Candidate("bias last", None, rounded_first), BY_ID[case], torch.bfloat16, CPU)
        assert found.passed and not found.causes, found.details()
