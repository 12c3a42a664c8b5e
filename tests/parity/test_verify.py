"""The recordings are what diffusers and ltx-core compute, and `ltx2ref verify` passes and fails for good reasons.

pytest tests/parity/test_verify.py
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import mutants
import pytest
import torch

from ltx2ref import cli
from ltx2ref.parity import generator, record, truth, verify
from ltx2ref.parity.cases import RECORDED, SEED
from ltx2ref.parity.exact import exact
from ltx2ref.parity.kernels import KERNELS
from ltx2ref.parity.record import EXACT_DTYPES, NATIVE_DTYPES, RecordError
from ltx2ref.parity.trace.probe import threads
from ltx2ref.parity.trace.taps import Taps, trace
from ltx2ref.parity.verify import FAILED, IDENTICAL, INCONCLUSIVE, WITHIN

BY_ID = {case.id: case for case in RECORDED}


def taps_of(case_id: str, dtype: str, mutant: str | None = None) -> Taps:
    case = BY_ID[case_id]
    model = verify.build(case.config, EXACT_DTYPES[dtype], case.conventions)
    inputs = verify.cast(case.inputs(), EXACT_DTYPES[dtype])
    if mutant is None:
        return verify.run(model, inputs)
    with mutants.inject(mutant, model):
        return verify.run(model, inputs)


@pytest.mark.slow
def test_every_recorded_case_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["verify", "--json"])
    report = json.loads(capsys.readouterr().out)
    exact, native = ([result[kind] for result in report["results"] if result[kind]] for kind in ("exact", "native"))
    assert status == 0
    runs = len(RECORDED) + len(KERNELS)
    assert (len(exact), len(native)) == (runs * len(EXACT_DTYPES), runs * len(NATIVE_DTYPES))
    assert {result["verdict"] for result in exact} == {IDENTICAL} and sum(result["taps"] for result in exact) > 30_000
    verdicts = {result["verdict"] for result in native}
    assert verdicts <= {IDENTICAL, WITHIN}
    recorded_here = {f"{x['release']}/{x['case']}": x["native"]["verdict"] for x in report["results"] if x["native"]}
    if not report["differing_operations"]:
        assert {recorded_here[case.id] for case in RECORDED if case.native} == {IDENTICAL}


@pytest.mark.slow
@pytest.mark.ltx_core
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("case_id", ["2.0/t2v", "2.3/stg-one-of-batch", "2.5/everything", "2.0/ltx-core-everything"])
def test_the_recordings_are_what_the_implementation_computes(case_id: str, dtype: str) -> None:
    import record_reference

    forward, _ = record_reference.forward_of(BY_ID[case_id], dtype)
    taps, recorded = record_reference.run_exactly(forward), record.load_exact(BY_ID[case_id], dtype)
    assert {name: record.digest(x) for name, x in taps.items()} == recorded.digests
    assert all(torch.equal(taps[name], x) for name, x in recorded.outputs.items())


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "variables",
    [
        {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
        {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_other_arithmetic_is_exactly_identical_and_natively_within_the_budget(variables: dict[str, str]) -> None:
    command = [sys.executable, "-m", "ltx2ref", "verify", "--json", "--case", "2.[35]/[ti]2v"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    results = json.loads(done.stdout)["results"]
    assert done.returncode == 0, done.stdout
    assert len(results) == 9 and {result["exact"]["verdict"] for result in results} == {IDENTICAL}


# For each bug: the case that shows it, and the first tap with a recorded native tensor at which it shows.
SHOWN_BY = {
    "rope-float32-frequencies": ("2.0/121-frames", "cross_attn_rope.cos"),
    "rope-patch-start": ("2.0/t2v", "rope.cos"),
    "rope-right-padding": ("2.0/t2v", "rope.cos"),
    "rope-axis-major": ("2.0/t2v", "rope.cos"),
    "fps-dropped-from-exchange": ("2.0/t2v", "cross_attn_rope.cos"),
    "gate-multiplier-1": ("2.3/t2v", "av_cross_attn_video_a2v_gate.sinusoid"),
    "sigma-ignored": ("2.3/i2v", "prompt_adaln.sinusoid"),
    "mask-as-bool": ("2.3/text-masks", "transformer_blocks.0.video"),
    "gelu-erf": ("2.5/t2v", "transformer_blocks.0.video"),
    "qk-norm-per-head": ("2.0/t2v", "transformer_blocks.0.video"),
    "stg-without-gate": ("2.3/stg-one-of-batch", "transformer_blocks.0.video"),
    "sequential-exchange": ("2.3/t2v", "transformer_blocks.0.audio"),
}
# One bug is smaller than bfloat16's own rounding, so in bfloat16 only exact arithmetic finds it.
BELOW_ROUNDING = {("gelu-erf", "bfloat16")}


@pytest.mark.slow
@pytest.mark.sample(8)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("mutant", SHOWN_BY)
def test_a_porting_bug_is_beyond_the_budget_at_the_tap_where_it_is(mutant: str, dtype: str) -> None:
    case_id, tap = SHOWN_BY[mutant]
    with threads(1):
        result = verify.compare_with_record(BY_ID[case_id], dtype, taps_of(case_id, dtype, mutant), same_bits=False)
    if (mutant, dtype) in BELOW_ROUNDING:
        assert result.verdict == WITHIN
    else:
        assert (result.verdict, result.first) == (FAILED, tap) and result.share > 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("mutant", SHOWN_BY)
def test_exact_arithmetic_finds_a_porting_bug_at_its_first_tap_in_every_dtype(mutant: str, dtype: str) -> None:
    case = BY_ID[SHOWN_BY[mutant][0]]
    with exact():
        taps = taps_of(case.id, dtype, mutant)
    result = verify.compare_exactly(case, dtype, taps)
    places, _ = mutants.FIRST[mutant]
    assert result.verdict == FAILED and result.first is not None and result.first.endswith(places), result
    assert result.distance is not None and 1e-8 < result.distance < 10
    assert 0 < result.differing < result.taps


def test_one_bit_is_a_failure_where_the_bits_have_to_be_the_same_and_rounding_elsewhere() -> None:
    taps = dict(record.load_record(BY_ID["2.3/t2v"], "float32").taps)
    x = taps["sample"] = taps["sample"].clone()
    x.view(torch.int32)[0, 0, 0] ^= 1
    assert verify.compare_with_record(BY_ID["2.3/t2v"], "float32", taps, True).verdict == FAILED
    assert verify.compare_with_record(BY_ID["2.3/t2v"], "float32", taps, True).first == "sample"
    assert verify.compare_with_record(BY_ID["2.3/t2v"], "float32", taps, False).verdict == WITHIN


def test_one_bit_is_a_failure_under_exact_arithmetic_and_its_size_is_told() -> None:
    case = BY_ID["2.3/t2v"]
    with exact():
        taps = taps_of(case.id, "float32")
    x = taps["transformer_blocks.1.attn1.to_v"] = taps["transformer_blocks.1.attn1.to_v"].clone()
    before = x.double()
    x.view(torch.int32)[1, 2, 3] ^= 1
    result = verify.compare_exactly(case, "float32", taps)
    assert (result.verdict, result.first, result.differing) == (FAILED, "transformer_blocks.1.attn1.to_v", 1)
    assert result.distance == pytest.approx(truth.norm(x.double() - before) / truth.norm(x), rel=0.5)
    del taps["audio_sample"]
    assert verify.compare_exactly(case, "float32", taps).differing == 2


def natively(
    case_id: str, dtype: str, taps: Taps | None = None, exact_taps: Taps | None = None, machine: str | None = None
) -> verify.NativeResult:
    """Return the native verdict on a case that is recorded only under exact arithmetic."""
    case = BY_ID[case_id]
    forward = verify.prepared(case, dtype, torch.device("cpu"))
    return verify.compare_with_exact(
        case,
        dtype,
        verify.run_on(machine, forward) if taps is None else taps,
        verify.run_on("exact", forward) if exact_taps is None else exact_taps,
        verify.run_on(verify.WRITTEN_OUT, forward),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case_id", "machine"),
    [("2.0/empty-text-rows", "online-softmax"), ("2.3/soft-self-mask", None), ("2.3/defaults", "faithful")],
)
def test_a_case_without_native_tensors_is_judged_against_the_exact_ones(case_id: str, machine: str | None) -> None:
    """Beside a bias of -10,000, float32 resolves logits only to a thousandth, which is no implementation's fault."""
    result = natively(case_id, "float32", machine=machine)
    assert result.verdict == WITHIN and result.share < 1 and result.against_record < 1e-3


@pytest.mark.slow
def test_a_bug_in_a_case_without_native_tensors_is_beyond_the_budget() -> None:
    result = natively("2.3/other-sigma", "float32", taps_of("2.3/other-sigma", "float32", "sigma-ignored"))
    assert result.verdict == FAILED and result.first == "prompt_adaln.sinusoid"


@pytest.mark.slow
def test_a_tap_that_is_not_the_recorded_one_exactly_cannot_be_judged_natively() -> None:
    forward = verify.prepared(BY_ID["2.3/defaults"], "float32", torch.device("cpu"))
    taps = verify.run_on("exact", forward)
    other = taps | {"sample": taps["sample"] + 1}
    result = natively("2.3/defaults", "float32", exact_taps=other)
    assert result.verdict == INCONCLUSIVE and result.note.startswith("1 of 232 taps, the first is sample, are not")
    wrong = verify.run_on(None, forward)
    wrong["transformer_blocks.0.attn1.norm_q"] = wrong["transformer_blocks.0.attn1.norm_q"] * 1.01
    result = natively("2.3/defaults", "float32", wrong, other)
    assert (result.verdict, result.first) == (FAILED, "transformer_blocks.0.attn1.norm_q")


@pytest.mark.slow
def test_a_case_without_native_tensors_need_not_be_identical_where_all_others_have_to() -> None:
    result = verify.verify(BY_ID["2.3/defaults"], "float32", torch.device("cpu"), True, "native")
    assert result.exact is None and result.verdicts == {WITHIN}


def test_phases_that_round_otherwise_are_no_error_of_what_follows() -> None:
    """The candidate has other last bits in its phases, as it would on any other processor."""
    case, generator_ = BY_ID["2.3/121-frames"], torch.Generator().manual_seed(0)
    model = verify.build(case.config, torch.float32)
    inputs = verify.cast(case.inputs(), torch.float32)
    phases = truth.phases(verify.run(model, inputs))
    for name, x in phases.items():
        up = torch.rand(x.shape, generator=generator_) < 0.5
        phases[name] = torch.where(up, torch.nextafter(x, torch.tensor(2.0)), torch.nextafter(x, torch.tensor(-2.0)))
    result = verify.compare_with_record(case, "float32", verify.run(model, inputs, phases) | phases, same_bits=False)
    assert result.verdict == WITHIN and result.share < 1


def test_a_nan_is_never_within_budget() -> None:
    taps = dict(record.load_record(BY_ID["2.3/t2v"], "float32").taps)
    taps["sample"] = taps["sample"].clone()
    taps["sample"][0, 0, 0] = float("nan")
    assert verify.compare_with_record(BY_ID["2.3/t2v"], "float32", taps, False).verdict == FAILED


def test_a_changed_truth_is_a_failure_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    load = record.load_record

    def changed(case: object, dtype: str) -> record.Record:
        recorded = load(BY_ID["2.3/t2v"], dtype)
        norms = recorded.truth_norms
        return replace(recorded, truth_norms=norms | {"sample": norms["sample"] * (1 + 1e-9)})

    monkeypatch.setattr(record, "load_record", changed)
    result = verify.compare_with_record(BY_ID["2.3/t2v"], "float32", load(BY_ID["2.3/t2v"], "float32").taps, True)
    assert result.verdict == FAILED and "truth of sample" in result.note


def test_a_model_that_does_not_repeat_itself_is_inconclusive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, calls = verify.run, itertools.count()

    def unsteady(*given: object) -> Taps:
        return {name: x + next(calls) * (name == "sample") for name, x in run(*given).items()}

    monkeypatch.setattr(verify, "run", unsteady)
    assert cli.main(["verify", "--case", "2.0/t2v", "--dtype", "float32", "--arithmetic", "native"]) == 2
    assert INCONCLUSIVE in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("arithmetic", ["exact", "native"])
def test_processes_side_by_side_say_what_one_says(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [(BY_ID[case], dtype) for case in ("2.0/t2v", "2.5/everything") for dtype in NATIVE_DTYPES]
    how = verify.How(torch.device("cpu"), False, arithmetic)
    alone = list(verify.verify_all(runs, how))
    monkeypatch.setattr(verify, "MANY", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert list(verify.verify_all(runs, how)) == alone and [r.dtype for r in alone] == [*NATIVE_DTYPES, *NATIVE_DTYPES]


def test_without_other_processes_one_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **more: object) -> None:
        raise OSError("no processes here")

    monkeypatch.setattr(verify, "MANY", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(verify, "ProcessPoolExecutor", broken)
    runs = [(BY_ID["2.0/t2v"], dtype) for dtype in NATIVE_DTYPES]
    found = list(verify.verify_all(runs, verify.How(torch.device("cpu"), False, "exact")))
    assert [x.exact.verdict for x in found if x.exact] == [IDENTICAL] * len(NATIVE_DTYPES)


@pytest.mark.slow
def test_tables_of_float32_frequencies_are_judged_by_a_bound() -> None:
    """One machine's seven roundings may be luckier than another's, but a wrong frequency is not a matter of luck."""
    for case_id in ("2.0/float32-frequencies", "2.3/float32-frequencies"):
        faithful, natively = (
            verify.verify(BY_ID[case_id], "float32", torch.device("cpu"), False, "native", machine)
            for machine in ("faithful", None)
        )
        assert faithful.native and natively.native
        assert {faithful.native.verdict, natively.native.verdict} == {WITHIN}
        case, taps = BY_ID[case_id], taps_of(case_id, "float32", "max-pos-frames")
        assert verify.compare_with_record(case, "float32", taps, False).verdict == FAILED


def test_recordings_of_other_inputs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "digests", lambda inputs: {"hidden_states": "0"})
    with pytest.raises(RecordError, match=r"2\.0/t2v float32: recorded from other inputs"):
        verify.compare_with_record(BY_ID["2.0/t2v"], "float32", {}, True)
    with pytest.raises(RecordError, match=r"2\.0/t2v float32: recorded from other inputs"):
        verify.compare_exactly(BY_ID["2.0/t2v"], "float32", {})


def test_recordings_of_another_version_of_exact_arithmetic_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "VERSION", 2)
    with pytest.raises(RecordError, match="another version of exact arithmetic: expected 2, got 1"):
        record.load_exact(BY_ID["2.0/t2v"], "float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "9.9/*"], "--case 9.9/*: no such case; --list names them"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta"),
        (["--arithmetic", "native", "--dtype", "float16"], "--dtype float16: recorded under exact arithmetic only"),
    ],
)
def test_what_cannot_be_run_is_exit_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_trace_leaves_the_model_as_it_was_and_the_output_bit_identical() -> None:
    case = BY_ID["2.3/t2v"]
    model = verify.build(case.config, torch.float32)
    inputs = verify.cast(case.inputs(), torch.float32)
    with torch.no_grad():
        plain = model(**inputs).sample
        with pytest.raises(ZeroDivisionError), trace(model):
            1 / 0  # noqa: B018
        with trace(model) as taps:
            traced = model(**inputs).sample
        taps.clear()
        model(**inputs)
    assert torch.equal(plain, traced) and not taps
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_recordings_fit_the_package() -> None:
    sizes = {file.name: file.stat().st_size for file in record.DIRECTORY.rglob("*.*")}
    assert sum(sizes.values()) <= 15_000_000  # the size of the wheel, which is half as large


def test_the_generator_is_the_documented_one() -> None:
    def by_hand(name: str, index: int, seed: int) -> float:
        digest = 0x811C9DC5
        for byte in f"{seed}/{name}".encode():
            digest = (digest ^ byte) * 0x01000193 % 2**32
        x = (index * 0x9E3779B9 + digest) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return ((x ^ x >> 16) // 256 - 2**23) / 2**23

    drawn = generator.uniform("proj_in.weight", (7, 11), 0.5, seed=3)
    assert drawn.dtype == torch.float32
    assert drawn.flatten().tolist() == [0.5 * by_hand("proj_in.weight", i, 3) for i in range(77)]
    # Literals, so that the documented rule cannot be changed unnoticed by changing both sides.
    assert generator.uniform("a", (3,), 1.0, seed=0).tolist() == A_OF_SEED_0
    big = generator.uniform("a", (100_000,), 1.0)
    assert abs(big.mean()) < 4 * 3**-0.5 / 100_000**0.5 and big.min() >= -1 and big.max() < 1


A_OF_SEED_0 = [0.6766347885131836, -0.630123496055603, -0.9099793434143066]


@pytest.mark.diffusers
def test_the_recorded_weights_are_those_of_the_documented_generator() -> None:
    """Compare a digest of the numbers themselves, so that a port in any language can check its own."""
    from ltx2ref.parity.oracles.diffusers import build_diffusers

    config = BY_ID["2.5/everything"].config
    state = verify.build(config, torch.float32).state_dict()
    assert build_diffusers(config.to_diffusers(), state, torch.float32).state_dict().keys() == state.keys()
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
    assert SEED == 20261122 and digest == DIGEST


DIGEST = "d2c681cb8a0861a66a2be2d64c62427963024a25baccea9d5243191d0afaf7c5"
