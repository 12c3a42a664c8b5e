"""An audit judges what a port returns, not only what its last layers compute, and ignores no parameter of a new model.

pytest tests/parity/test_returned_outputs.py
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel as Diffusers
from tiny import RELEASES, random_inputs, tiny_config
from torch import Tensor, nn

import ltx2ref
from ltx2ref import AudioVisualModelOutput, LTX2VideoTransformer3DModel, assert_parity, cli, compare, trace
from ltx2ref.kit.cases import MODELS
from ltx2ref.kit.export import case_tensors
from ltx2ref.kit.recorded import RecordedModel
from ltx2ref.parity import verify
from ltx2ref.parity.audit import audit, candidate_named
from ltx2ref.parity.cases import RECORDED, Case
from ltx2ref.parity.oracles import diffusers
from ltx2ref.parity.record import NATIVE_DTYPES
from ltx2ref.parity.report.rows import DIVERGED, IDENTICAL, ORIGINATED, PROPAGATED, ROUNDING, SHAPE, Report
from ltx2ref.parity.trace.sketch import sketch
from ltx2ref.parity.trace.taps import PROJECTED, OutputError
from ltx2ref.parity.trace.tracefile import save_trace

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# Two cases of one block. In the first the outputs have different shapes, as always. In the second the shapes are equal,
# so a swap keeps them.
SMALL = Case("2.3", "small", {"num_layers": 1})
ALIKE = Case("2.3", "alike", {"num_layers": 1, "out_channels": 4}, grid=(1, 1, 11))
Change = Callable[[Tensor, Tensor], Any]
# For each change that a port makes to its outputs: the first wrong tap, and its verdict in SMALL and in ALIKE.
WRONG: dict[str, tuple[Change, str, str, str]] = {
    "doubled": (lambda video, audio: (2 * video, audio), "sample", DIVERGED, DIVERGED),
    "swapped": (lambda video, audio: (audio, video), "sample", SHAPE, DIVERGED),
    "reversed": (lambda video, audio: (video.flip(1), audio), "sample", DIVERGED, DIVERGED),
    "cut": (lambda video, audio: (video[:, :-1], audio), "sample", SHAPE, SHAPE),
    "doubled in place": (lambda video, audio: (video.mul_(2), audio), "sample", DIVERGED, DIVERGED),
    "audio reversed": (lambda video, audio: (video, audio.flip(1)), "audio_sample", DIVERGED, DIVERGED),
    "audio cut": (lambda video, audio: (video, audio[..., :-1]), "audio_sample", SHAPE, SHAPE),
}
FOUR = ("doubled", "swapped", "reversed", "cut")


def unchanged(video: Tensor, audio: Tensor) -> Any:
    return video, audio


CHANGE = SimpleNamespace(now=unchanged)  # the change that the ports below make to their outputs


@pytest.fixture
def change(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the ports apply the change of this name to their outputs."""
    monkeypatch.setattr(CHANGE, "now", WRONG[request.param][0])
    return request.param


every_change = pytest.mark.parametrize("change", WRONG, indirect=True)
four_changes = pytest.mark.parametrize("change", FOUR, indirect=True)
both_cases = pytest.mark.parametrize("case", [SMALL, ALIKE], ids=lambda case: case.name)


# ---------------------------------------------------------------- ports, all of them right but for the change
class Port(Diffusers):
    """A model like a user's, with diffusers' names and its own forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return CHANGE.now(*super().forward(*args, **kwargs | {"return_dict": False}))


class Called(Diffusers):
    """A model whose change no hook can see."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return CHANGE.now(*super().__call__(*args, **kwargs))


class Ours(LTX2VideoTransformer3DModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return CHANGE.now(*super().forward(*args, **kwargs))


class OursCalled(LTX2VideoTransformer3DModel):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return CHANGE.now(*super().__call__(*args, **kwargs))


def built(port: type[nn.Module], config: Any, state: Any, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model = port(**config)
    return diffusers.adopt(model, state, dtype)


def outputs(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
    """Run a port that returns both outputs, as docs/auditing.md has it."""
    with torch.no_grad():
        return diffusers.run_diffusers(built(Port, config, state, dtype), inputs)


def traced(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
    """Run a port that returns a trace, as docs/auditing.md has it."""
    model = built(Port, config, state, dtype)
    with torch.no_grad(), trace(model, diffusers.LAYOUT) as taps:
        diffusers.run_diffusers(model, inputs)
    return taps


def model_of(case: Case) -> LTX2VideoTransformer3DModel:
    return verify.build(case.config, torch.float32)


def ours(
    model: LTX2VideoTransformer3DModel, kind: type[LTX2VideoTransformer3DModel] = Ours
) -> LTX2VideoTransformer3DModel:
    with torch.device("meta"):
        port = kind(model.config)
    port.load_state_dict(model.state_dict(), assign=True)
    return port


def assert_found(report: Report, change: str, case: Case, located: bool) -> None:
    """Require this verdict and this tap, and correct projections if the port shows them."""
    _, tap, small, alike = WRONG[change]
    verdict = small if case is SMALL else alike
    assert (report.verdict, report.first) == (verdict, tap)
    wrong = {row.name: row for row in report.rows if row.verdict in (DIVERGED, SHAPE)}
    assert wrong.keys() <= PROJECTED.keys()
    assert all(row.origin == (ORIGINATED if row.verdict == DIVERGED else None) for row in wrong.values())
    said = f"looks like a change after {PROJECTED[tap]}: its output is right, and what is returned is not"
    before = "everything before it is identical" if located else "nothing before it was compared"
    assert (said in report.sentence) == located and f"; {before}" in report.sentence


# ---------------------------------------------------------------- each entry point
@both_cases
@every_change
def test_audit_judges_what_a_module_returned_that_a_port_only_traces(change: str, case: Case) -> None:
    report = audit(candidate_named(f"{__name__}:traced"), case, torch.float32, CPU)
    assert_found(report, change, case, located=True)
    assert change != "doubled" or report.hints[1:] == ("a constant factor of 2",)


@both_cases
@four_changes
def test_audit_judges_what_a_callable_returns(change: str, case: Case) -> None:
    report = audit(candidate_named(f"{__name__}:outputs"), case, torch.float32, CPU)
    assert_found(report, change, case, located=False)


@four_changes
def test_audit_judges_what_diffusers_returns(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusers, "LTX2VideoTransformer3DModel", Called)
    assert_found(audit(candidate_named("diffusers"), SMALL, torch.float32, CPU), change, SMALL, located=True)


@pytest.mark.ltx_core
@four_changes
def test_audit_judges_what_ltx_core_returns(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ltx2ref.parity.oracles import ltx_core

    forward = ltx_core.LTXModel.forward
    monkeypatch.setattr(ltx_core.LTXModel, "forward", lambda *given: CHANGE.now(*forward(*given)))
    report = audit(candidate_named("ltx-core"), SMALL, torch.float32, CPU, "ltx2ref:ltx-core-2026-03")
    assert_found(report, change, SMALL, located=True)


@pytest.mark.parametrize("port", [Port, Called])
@four_changes
def test_assert_parity_judges_what_a_module_returns(change: str, port: type[nn.Module]) -> None:
    model = model_of(SMALL)
    candidate = built(port, SMALL.config.to_diffusers(), model.state_dict(), torch.float32)
    said = (
        f"first divergence at sample ({WRONG[change][2]}), looks like a change after proj_out: its output is "
        "right, and what is returned is not; everything before it is identical"
    )
    with pytest.raises(AssertionError, match=f"^{re.escape(said)}"):
        assert_parity(model, candidate, SMALL.inputs())


@pytest.mark.parametrize(("kind", "case"), [(Ours, SMALL), (Ours, ALIKE), (OursCalled, SMALL)])
@four_changes
def test_assert_parity_judges_what_a_subclass_of_this_model_returns(
    change: str, kind: type[LTX2VideoTransformer3DModel], case: Case
) -> None:
    model = model_of(case)
    with pytest.raises(AssertionError, match=r"^first divergence at sample .* after proj_out: its output is right"):
        assert_parity(model, ours(model, kind), case.inputs())


@both_cases
@four_changes
def test_assert_parity_judges_what_a_callable_returns(change: str, case: Case) -> None:
    model = model_of(case)

    def port(**inputs: Any) -> Any:
        with torch.no_grad():
            return CHANGE.now(*model(**inputs))

    with pytest.raises(AssertionError, match=r"^first divergence at sample"):
        assert_parity(model, port, case.inputs())


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", [Ours, OursCalled])
@four_changes
def test_verify_judges_what_the_model_returns(change: str, kind: type[LTX2VideoTransformer3DModel]) -> None:
    """It is judged by its budget in a dtype in which no machine exceeds it, so that only the change can fail."""
    case = next(case for case in RECORDED if case.id == "2.3/t2v")
    inputs = verify.cast(case.inputs(), torch.bfloat16)
    model = ours(verify.build(case.config, torch.bfloat16), kind)
    result = verify.compare_with_record(case, "bfloat16", verify.run(model, inputs), False)
    assert (result.verdict, result.first) == (verify.FAILED, "sample")


def test_the_ports_are_right_without_a_change() -> None:
    """Otherwise the tests above would find something else."""
    model, config = model_of(SMALL), SMALL.config.to_diffusers()
    for name in (f"{__name__}:traced", "diffusers"):
        assert audit(candidate_named(name), SMALL, torch.float32, CPU).verdict == IDENTICAL
    for candidate in (
        built(Port, config, model.state_dict(), torch.float32),
        ours(model),
        built(Called, config, model.state_dict(), torch.float32),
    ):
        report = assert_parity(model, candidate, SMALL.inputs())
        assert report.verdict == IDENTICAL and report.rows[-1].name == "audio_sample"
    case = next(case for case in RECORDED if case.id == "2.3/t2v")
    taps = verify.run(ours(verify.build(case.config, torch.bfloat16)), verify.cast(case.inputs(), torch.bfloat16))
    assert verify.compare_with_record(case, "bfloat16", taps, False).verdict in (verify.IDENTICAL, verify.WITHIN)


@pytest.mark.parametrize("change", ["swapped", "cut"], indirect=True)
def test_a_wrong_shape_in_the_model_is_a_failure_of_verify_and_no_traceback(
    change: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model that serves as truth is then wrong as well."""
    forward = ltx2ref.interface.LTX2VideoTransformer3DModel.forward
    monkeypatch.setattr(
        ltx2ref.interface.LTX2VideoTransformer3DModel,
        "forward",
        lambda self, *args, **kwargs: AudioVisualModelOutput(*CHANGE.now(*forward(self, *args, **kwargs))),
    )
    assert cli.main(["verify", "--case", "2.3/t2v", "--dtype", "bfloat16"]) == 1


@four_changes
def test_the_port_of_the_docs_cannot_hide_what_it_returns(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run its code, repaired, with a forward that does more."""
    doc = (ROOT / "docs" / "auditing.md").read_text(encoding="utf-8")
    source = doc.split("```python\n# my_port.py\n")[1].split("```")[0].replace("timestep / 1000", "timestep")
    names: dict[str, Any] = {"__name__": "my_port"}
    exec(source, names)
    monkeypatch.setitem(names, "MyPort", type("MyPort", (Port, names["MyPort"]), {}))
    monkeypatch.setitem(globals(), "documented", names["run"])
    report = audit(candidate_named(f"{__name__}:documented"), SMALL, torch.float32, CPU)
    assert_found(report, change, SMALL, located=True)


@pytest.mark.parametrize("change", ["reversed", "cut"], indirect=True)
@pytest.mark.parametrize("candidate", ["traced", "outputs"])
def test_the_command_exits_1(change: str, candidate: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{__name__}:{candidate}", "--case", "2.3/t2v"]) == 1
    assert f": {WRONG[change][2]}: first divergence at sample" in capsys.readouterr().out


# ---------------------------------------------------------------- where an output went wrong
def test_a_wrong_projection_is_told_from_a_change_after_it() -> None:
    model = model_of(SMALL)
    port = copy.deepcopy(model)
    with torch.no_grad():
        port.proj_out.bias.add_(1)
    with pytest.raises(AssertionError, match=r"^first divergence at proj_out \(diverged\)") as failure:
        assert_parity(model, port, SMALL.inputs())
    assert "sample: diverged (propagated)" in str(failure.value) and "after proj_out" not in str(failure.value)


def test_a_projection_that_only_rounds_is_no_change_after_it() -> None:
    model = model_of(SMALL)
    taps = verify.run(model, SMALL.inputs())
    other = {name: x * (1 + 2.0**-23) if name in ("sample", "proj_out") else x for name, x in taps.items()}
    report = assert_parity(model, lambda **_: other, SMALL.inputs())
    assert {row.name: row.verdict for row in report.rows if row.verdict != IDENTICAL} == dict.fromkeys(
        ("proj_out", "sample"), ROUNDING
    )
    assert "after proj_out" not in report.sentence and PROPAGATED in {row.origin for row in report.rows}


@pytest.mark.parametrize("kept", [torch.clone, sketch], ids=["tensors", "sketches"])
def test_files_tell_it_too_and_those_without_the_projections_lack_nothing(
    kept: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """These are traces from before these taps existed, and traces of ports that have no modules."""
    taps = verify.run(model_of(SMALL), SMALL.inputs())
    wrong = taps | {"sample": 2 * taps["sample"]}
    traces = {
        "new": taps,
        "old": {name: x for name, x in taps.items() if name not in PROJECTED.values()},
        "wrong": wrong,
        "old-wrong": {name: x for name, x in wrong.items() if name not in PROJECTED.values()},
    }
    for name, found in traces.items():
        save_trace(tmp_path / name, {at: kept(x) for at, x in found.items()}, implementation=name, fingerprint={})
    for reference, candidate in (("new", "old"), ("old", "new"), ("old", "old")):
        assert cli.main(["compare", str(tmp_path / reference), str(tmp_path / candidate)]) == 0
        said = capsys.readouterr().out
        assert said.splitlines() == [f"{candidate}: identical: identical at every tap"]
    for candidate, located in (("wrong", True), ("old-wrong", False)):
        assert cli.main(["compare", str(tmp_path / "new"), str(tmp_path / candidate)]) == 1
        said = capsys.readouterr().out
        assert "first divergence at sample (diverged)" in said and ("after proj_out" in said) == located
        assert "missing" not in said


def test_a_kit_asks_for_each_output_once_whatever_was_recorded() -> None:
    source = RecordedModel(MODELS[0], "float32")
    source.taps |= {projected: source.taps[name] for name, projected in PROJECTED.items()}
    expected = case_tensors(source, MODELS[0])["expected"]
    assert PROJECTED.keys() <= expected.keys() and not expected.keys() & {*PROJECTED.values()}


def test_an_audit_of_a_trace_without_the_projections_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It also needs no float64 model, because everything is identical."""
    monkeypatch.setattr("ltx2ref.parity.compare.Truth", lambda *_: pytest.fail("the truth was computed"))
    model = model_of(SMALL)
    taps = verify.run(model, SMALL.inputs())
    report = assert_parity(
        model, lambda **_: {name: x for name, x in taps.items() if name not in PROJECTED.values()}, SMALL.inputs()
    )
    assert (report.verdict, report.sentence) == (IDENTICAL, "identical at every tap")
    assert len(report.rows) == len(taps) - 2


def test_a_trace_has_what_the_forward_returned_and_what_its_projections_put_out() -> None:
    model = ours(model_of(SMALL))
    CHANGE.now, before = WRONG["doubled in place"][0], CHANGE.now
    try:
        with torch.no_grad(), trace(model) as taps:
            video, audio = model(**SMALL.inputs())
    finally:
        CHANGE.now = before
    assert torch.equal(taps["sample"], video) and torch.equal(taps["audio_sample"], audio)
    assert torch.equal(taps["sample"], 2 * taps["proj_out"]) and torch.equal(taps["audio_proj_out"], audio)
    assert not model._forward_hooks and list(taps)[-2:] == ["sample", "audio_sample"]


def test_what_is_in_place_of_a_projection_is_returned_and_nothing_is_in_place_of_what_is_returned() -> None:
    model, inputs = model_of(SMALL), SMALL.inputs()
    plain = verify.run(model, inputs)
    other = {name: torch.ones_like(plain[name]) for name in ("proj_out", "sample", "audio_sample")}
    with torch.no_grad(), trace(model, inject=other) as taps:
        video, audio = model(**inputs)
    assert torch.equal(video, other["proj_out"]) and torch.equal(audio, plain["audio_sample"])
    assert torch.equal(taps["sample"], video) and torch.equal(taps["audio_sample"], audio)
    assert torch.equal(taps["proj_out"], plain["proj_out"])


def test_a_forward_that_no_hook_sees_leaves_the_outputs_missing() -> None:
    """The result is then inconclusive, not identical."""

    def port(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
        model = built(Port, config, state, dtype)
        with torch.no_grad(), trace(model, diffusers.LAYOUT) as taps:
            model.forward(**inputs)
        return taps

    model = model_of(SMALL)
    taps = port(SMALL.config.to_diffusers(), model.state_dict(), SMALL.inputs(), torch.float32)
    assert {*verify.run(model, SMALL.inputs())} - {*taps} == {"sample", "audio_sample"}
    with pytest.raises(AssertionError, match=r"2 of \d+ taps are missing from the candidate"):
        assert_parity(model, lambda **_: taps, SMALL.inputs())


# ---------------------------------------------------------------- forms of outputs
class Pair(NamedTuple):
    video: Tensor
    audio: Tensor


@dataclass
class Output:
    sample: Tensor
    audio_sample: Tensor


FORMS: dict[str, Change] = {
    "a tuple": lambda video, audio: (video, audio),
    "a list": lambda video, audio: [video, audio],
    "a named tuple": Pair,
    "a dataclass": Output,
    "this package's": AudioVisualModelOutput,
    "a dict": lambda video, audio: {"audio_sample": audio, "sample": video},
    "an ordered dict": lambda video, audio: OrderedDict(sample=video, audio_sample=audio),
    "attributes": lambda video, audio: SimpleNamespace(sample=video, audio_sample=audio),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_in_any_usual_form_are_read_from_a_module_and_from_a_callable(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = model_of(SMALL), SMALL.inputs()
    monkeypatch.setattr(CHANGE, "now", FORMS[form])
    port = built(Port, SMALL.config.to_diffusers(), model.state_dict(), torch.float32)
    assert assert_parity(model, port, inputs).sentence == "identical at every tap"

    def function(**inputs: Any) -> Any:
        with torch.no_grad():
            return FORMS[form](*model(**inputs))

    assert assert_parity(model, function, inputs).sentence.startswith("identical at all of 2 taps")


VIDEO, AUDIO = "a tensor of float32 (2, 105, 5)", "a tensor of float32 (2, 11, 4)"
# For each thing that a port returns, the text of the error.
NO_OUTPUTS: dict[str, tuple[Change, str]] = {
    "one tensor": (lambda video, audio: video, VIDEO),  # a tensor of two batch elements, which would unpack
    "a tuple of one": (lambda video, audio: (video,), f"tuple ({VIDEO})"),
    "three": (lambda video, audio: (video, audio, audio), f"tuple ({VIDEO}, {AUDIO}, {AUDIO})"),
    "none": (lambda video, audio: None, "None"),
    "no audio": (lambda video, audio: (video, None), f"tuple ({VIDEO}, None)"),
    "no tensor": (lambda video, audio: (video, "audio"), f"tuple ({VIDEO}, str)"),
    "integers": (lambda video, audio: (video, audio.int()), f"tuple ({VIDEO}, a tensor of int32 (2, 11, 4))"),
    "attributes": (lambda video, audio: SimpleNamespace(sample=video), "SimpleNamespace"),
}


@pytest.mark.parametrize("given", NO_OUTPUTS)
def test_what_is_no_pair_of_tensors_is_one_clear_error_everywhere(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change, described = NO_OUTPUTS[given]
    expected = "the returned outputs: expected two floating-point tensors, video and audio, got " + described
    model, inputs = model_of(SMALL), SMALL.inputs()
    monkeypatch.setattr(CHANGE, "now", change)

    def function(**inputs: Any) -> Any:
        with torch.no_grad():
            return change(*model(**inputs))

    for candidate in (
        built(Port, SMALL.config.to_diffusers(), model.state_dict(), torch.float32),
        built(Called, SMALL.config.to_diffusers(), model.state_dict(), torch.float32),
        ours(model),
        function,
    ):
        with pytest.raises(OutputError, match=f"^{re.escape(expected)}$") as raised:
            assert_parity(model, candidate, inputs)
        assert isinstance(raised.value, ValueError)
    for candidate in ("traced", "outputs"):
        assert cli.main(["audit", f"{__name__}:{candidate}", "--case", "2.3/t2v"]) == 3
        said = capsys.readouterr()
        assert said.out == f"2.3/t2v: failed: {expected}\n" and not said.err


def test_a_dict_without_the_audio_is_an_error_of_a_module() -> None:
    """From a callable, such a dict would be a choice of taps."""
    model, inputs = model_of(SMALL), SMALL.inputs()
    CHANGE.now, before = (lambda video, audio: {"sample": video}), CHANGE.now
    try:
        with pytest.raises(OutputError, match=r"got dict \(sample: a tensor of float32 \(2, 105, 5\)\)$"):
            assert_parity(model, ours(model), inputs)
    finally:
        CHANGE.now = before
    with pytest.raises(OutputError, match=r"^sample: expected a floating-point tensor, got a tensor of int64 \(3,\)$"):
        assert_parity(model, lambda **_: {"sample": torch.arange(3)}, inputs)


def test_an_answer_that_is_none_is_not_a_case_that_a_port_cannot_express(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`Unsupported` skips a case. A third output in one of many cases must not."""

    def port(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
        video, audio = outputs(config, state, inputs, dtype)
        return (
            (video, audio, audio)
            if inputs.get("perturbation_mask") is not None
            else traced(config, state, inputs, dtype)
        )

    monkeypatch.setitem(globals(), "outputs_of_one_case", port)
    assert cli.main(["audit", f"{__name__}:outputs_of_one_case", "--case", "2.3/t2v"]) == 0
    capsys.readouterr()
    assert cli.main(["audit", f"{__name__}:outputs_of_one_case", "--case", "2.3/*stg-one-of-batch"]) == 3
    assert cli.main(["audit", f"{__name__}:outputs_of_one_case", "--case", "2.3/stg*"]) == 3
    assert "2.3/stg-one-of-batch: failed: the returned outputs: expected" in capsys.readouterr().out


# ---------------------------------------------------------------- a new model hides nothing
@pytest.mark.parametrize("release", RELEASES)
def test_no_parameter_of_a_new_model_is_all_zero(release: str) -> None:
    for config in (tiny_config(release), tiny_config(release, gated_attn=False, perturbed_attn=True)):
        model = LTX2VideoTransformer3DModel(config)
        assert not [name for name, x in model.named_parameters() if not x.any()]
        tables = {name: x for name, x in model.named_parameters() if name.endswith(("_table", "_embedding"))}
        assert len(tables) == 2 + 2 * (6 if release != "2.0" else 4) + (release == "2.5")
        for name, x in tables.items():  # each row has it, in the documented size
            assert x.any(1).all(), name
            assert 0.5 < x.std().item() * x.shape[1] ** 0.5 < 1.5, name


def test_a_new_model_depends_on_the_seed_alone_and_has_no_tables_on_the_meta_device() -> None:
    def new(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return LTX2VideoTransformer3DModel(tiny_config("2.5")).state_dict()

    first, again, other = new(1), new(1), new(2)
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert {name for name, x in first.items() if torch.equal(x, other[name])} == {
        name for name in first if ".norm_" in name
    }
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(tiny_config("2.5"))
    assert all(x.is_meta for x in model.parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: x for name, x in first.items() if name != "scale_shift_table"}, assign=True)


def readmes() -> dict[str, Any]:
    """Return the model and the inputs of the first example in docs/using.md."""
    source = (ROOT / "docs" / "using.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(
        source.replace("= model(", "= given(").replace(
            "with torch.no_grad",
            (
                "def given(**arguments):\n    inputs.update(arguments)\n    return model(**arguments)\n"
                "inputs = {}\nwith torch.no_grad"
            ),
            1,
        ),
        names,
    )
    assert isinstance(names["model"], LTX2VideoTransformer3DModel)
    return {
        "model": names["model"],
        "inputs": {name: x for name, x in names["inputs"].items() if name != "return_dict"},
    }


def without(names: list[str], model: LTX2VideoTransformer3DModel) -> LTX2VideoTransformer3DModel:
    """Return a copy of the model in which the parameters of these names are zero."""
    port = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            port.get_parameter(name).zero_()
    return port


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_a_port_without_tables_fails_with_the_readmes_own_model(dtype: str) -> None:
    """It fails even if it shows nothing but its outputs."""
    given = readmes()
    model, inputs = given["model"].to(NATIVE_DTYPES[dtype]), verify.cast(given["inputs"], NATIVE_DTYPES[dtype])
    port = without([name for name, _ in model.named_parameters() if name.endswith("_table")], model)
    with pytest.raises(AssertionError, match=r"^first divergence at transformer_blocks\.0\.attn1\.rows \(diverged\)"):
        assert_parity(model, port, inputs)

    def function(**inputs: Any) -> Any:
        with torch.no_grad():
            return port(**inputs)

    with pytest.raises(AssertionError, match=r"^first divergence at sample \(diverged\)"):
        assert_parity(model, function, inputs)


def test_each_table_of_the_readmes_own_model_is_seen() -> None:
    given = readmes()
    model, taps = given["model"], verify.run(given["model"], given["inputs"])
    names = [name for name, _ in model.named_parameters() if name.endswith("_table")]
    assert len(names) == 2 + 2 * 6
    for name in names:
        report = compare(taps, verify.run(without([name], model), given["inputs"]))
        assert report.verdict == DIVERGED and str(report.first).endswith(("rows", "proj_out.input")), name


def tables_of_zeros(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
    return traced(config, {name: 0 * x if name.endswith("_table") else x for name, x in state.items()}, inputs, dtype)


def test_a_port_without_tables_fails_in_audit_and_in_verify(capsys: pytest.CaptureFixture[str]) -> None:
    report = audit(candidate_named(f"{__name__}:tables_of_zeros"), SMALL, torch.float32, CPU)
    assert (report.verdict, report.first) == (DIVERGED, "transformer_blocks.0.attn1.rows") and not report.notes
    case = next(case for case in RECORDED if case.id == "2.3/t2v")
    model = verify.build(case.config, torch.bfloat16)
    port = without([name for name, _ in model.named_parameters() if name.endswith("_table")], model)
    taps = verify.run(port, verify.cast(case.inputs(), torch.bfloat16))
    assert verify.compare_with_record(case, "bfloat16", taps, False).verdict == verify.FAILED


def test_keyframes_that_a_port_ignores_are_seen_in_a_new_model() -> None:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(tiny_config("2.5", num_layers=1))
    port = without(["keyframes_abs_pos_embedding"], model)
    inputs = random_inputs(model.config, keyframes=True)
    with pytest.raises(AssertionError, match=r"^first divergence at transformer_blocks.0.attn1.stream \(diverged\)"):
        assert_parity(model, port, inputs)


def test_parameters_without_effect_are_named_in_the_report() -> None:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(tiny_config("2.5"))
    inputs = random_inputs(model.config)
    (ones,) = assert_parity(model, model, inputs).notes
    assert ones.startswith("norm weights that are all one, and without effect: transformer_blocks.*.attn1.norm_q.")
    with torch.no_grad():
        for name, x in model.named_parameters():
            if ".norm_" in name:
                x[0] = 2
        model.scale_shift_table.zero_()
        for block in model.transformer_blocks:
            block.audio_scale_shift_table.zero_()
        model.get_parameter("transformer_blocks.1.ff.net.2.weight").zero_()
    (zeros,) = assert_parity(model, model, inputs).notes
    assert zeros == (
        "parameters that are all zero, so that a port passes without them: scale_shift_table, "
        "transformer_blocks.*.audio_scale_shift_table, transformer_blocks.1.ff.net.2.weight"
    )
    with torch.no_grad():
        model.transformer_blocks[0].attn1.norm_k.weight.fill_(1)
    only_outputs, *notes = assert_parity(model, lambda **x: torch.no_grad()(model)(**x), inputs).notes
    assert only_outputs.startswith("only the outputs were given")
    assert notes == [
        zeros,
        "norm weights that are all one, and without effect: transformer_blocks.0.attn1.norm_k.weight",
    ]


def test_the_weights_of_the_cases_have_an_effect_and_need_no_note() -> None:
    assert not audit(candidate_named(f"{__name__}:traced"), SMALL, torch.float32, CPU).notes
    model = model_of(SMALL)
    taps = verify.run(model, SMALL.inputs())
    assert not compare(taps, taps).notes
