"""`ltx2ref trace` writes what `audit` reads; a trace is refused for another case, and inputs for another model.

pytest tests/cli/test_trace.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_model, tiny_config

from ltx2ref import cli, save
from ltx2ref.cli.trace import CONVENTION_NAMES
from ltx2ref.parity import real
from ltx2ref.parity.audit import NAMED, audit, candidate_named, oracle
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.generator import build
from ltx2ref.parity.real import real_case
from ltx2ref.parity.run import cast, run
from ltx2ref.parity.trace.inputfile import load_inputs, save_inputs
from ltx2ref.parity.trace.tracefile import TraceError, load_trace, save_trace
from ltx2ref.parity.truth import truth

CASE = next(case for case in CASES if case.id == "2.3/t2v")
PORT = """
from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig
from ltx2ref.parity.run import run as traced

def run(config, state, inputs, dtype):
    model = LTX2VideoTransformer3DModel(TransformerConfig.from_diffusers(config)).to(dtype)
    model.load_state_dict({name: x * FACTOR if name == "proj_in.weight" else x for name, x in state.items()})
    return traced(model, inputs)
"""


def done(*words: str) -> int:
    return cli.main([*words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the files of the case, its trace, truth, a trace of another dtype, and one by sketches."""
    path = tmp_path_factory.mktemp("trace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert done("trace", "--case", CASE.id, "-o", "ref.safetensors", "--truth", "f64", "--files", "port") == 0
        assert done("trace", "--case", CASE.id, "-o", "bf16", "--dtype", "bfloat16", "--sketch") == 0
    return path


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


# ---------------------------------------------------------------- what is written
def test_the_trace_and_its_truth_are_the_references(here: Path) -> None:
    model, inputs = build(CASE.config, torch.float32), CASE.inputs()
    ours = run(model, inputs)
    found, exact = load_trace("ref.safetensors"), load_trace("f64")
    assert list(found.taps) == list(ours) and all(torch.equal(x, found.taps[name]) for name, x in ours.items())
    true = truth(model, inputs, ours)
    assert all(torch.equal(x, exact.taps[name]) for name, x in true.items())
    assert (found.case, found.implementation, exact.implementation) == ("2.3/t2v", "ltx2ref", "float64")
    assert found.config == CASE.config.to_diffusers() and found.fingerprint["arithmetic"] == "native"
    assert found.conventions is not None and found.conventions["exchange"] == "argument"
    assert found.inputs.keys() == {name for name, x in inputs.items() if isinstance(x, torch.Tensor)}


def test_a_trace_under_exact_arithmetic_says_so_and_is_accepted_under_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--arithmetic", "exact", "--conventions", "ltx-core-2026-08", "--json")
    assert done("trace", "--case", CASE.id, "-o", "exact", *arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["case"], said["files"][0]["taps"]) == (CASE.id, len(load_trace("exact").taps))
    assert load_trace("exact").fingerprint["arithmetic"] == "exact 1"
    assert load_trace("exact").conventions["exchange"] == "other_gate"  # type: ignore[index]
    assert done("audit", "ltx2ref:ltx-core-2026-08", "exact", "--arithmetic", "exact") == 0
    assert done("audit", "exact", "--arithmetic", "exact") == 1


def test_the_files_of_a_case_are_its_weights_inputs_and_config(here: Path) -> None:
    weights, model = load_file("port/weights.safetensors"), build(CASE.config, torch.float32)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert_same(load_inputs("port/inputs.safetensors"), CASE.inputs())
    assert json.loads(Path("port/config.json").read_text()) == json.loads(json.dumps(CASE.config.to_diffusers()))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        if isinstance(x, dict):
            assert_same(found[name], x)
        elif isinstance(x, torch.Tensor):
            assert found[name].dtype == x.dtype and torch.equal(found[name], x), name
        else:
            assert (type(found[name]), found[name]) == (type(x), x), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "2.3/none", "-o", "x"], "--case 2.3/none: no such case"),
        (["--case", "2.3/t2v", "-o", "none/x"], "none/x: there is no folder none"),
        (["--case", "2.3/t2v", "-o", "x", "--dtype", "float16"], "--dtype float16: under exact arithmetic only"),
        (["--checkpoint", "no.safetensors", "--inputs", "port/inputs.safetensors", "-o", "x"], "no.safetensors: "),
        (["--checkpoint", "port/weights.safetensors", "--inputs", "ref.safetensors", "-o", "x"], "ref.safetensors: "),
    ],
)
def test_unusable_input_is_one_line(
    here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert done("trace", *words) == 2
    error = capsys.readouterr().err
    assert f"ltx2ref: {message}" in error and error.splitlines()[-1].startswith("ltx2ref: ")
    assert not Path("x").exists()


@pytest.mark.parametrize(
    "words", ["-o x", "--case a --checkpoint b --inputs c -o x", "--checkpoint b -o x", "--case a"]
)
def test_a_command_line_without_one_source_and_one_destination_is_refused(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        done("trace", *words.split())
    assert ended.value.code == 2 and "usage: ltx2ref trace" in capsys.readouterr().err


def test_the_names_of_conventions_are_those_of_an_audit() -> None:
    assert {f"ltx2ref:{name}" for name in CONVENTION_NAMES} == NAMED.keys() - {"ltx2ref"}


# ---------------------------------------------------------------- a trace belongs to one case
@pytest.mark.parametrize("words", [[], ["--release", "2.3"], ["--case", "2.3/t2v"], ["--case", "2.*"]])
def test_a_trace_is_compared_with_its_case_alone(
    here: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert done("audit", "ref.safetensors", *words) == 0
    assert capsys.readouterr().out.startswith("2.3/t2v: identical")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--case", "2.0/t2v"], "ref.safetensors: the trace is of 2.3/t2v, not of 2.0/t2v"),
        (["--release", "2.0"], "ref.safetensors: the trace is of 2.3/t2v, none of the 12 that are asked for"),
    ],
)
def test_a_trace_is_refused_for_another_case(
    here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert done("audit", "ref.safetensors", *words) == 2
    assert capsys.readouterr().err.strip() == f"ltx2ref: {message}"


def test_a_trace_that_names_no_case_is_compared_with_one_only(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(load_file("ref.safetensors"), "plain.safetensors")
    assert done("audit", "plain.safetensors", "--case", CASE.id) == 0
    assert done("audit", "plain.safetensors", "--release", "2.5") == 2
    assert "the trace does not name its case, and" in capsys.readouterr().err


def test_a_trace_of_other_inputs_or_another_model_is_refused(here: Path) -> None:
    found = load_trace("ref.safetensors")
    other = next(case for case in CASES if case.id == "2.3/cross-timestep")

    def judged(**changed: Any) -> str:
        made = {"implementation": "port", "fingerprint": {}, "config": found.config, "inputs": found.inputs}
        save_trace("other", found.taps, **{**made, **changed})
        with pytest.raises(ValueError, match="other: the trace") as error:
            audit(candidate_named("other"), other, torch.float32, torch.device("cpu"))
        return str(error.value)

    assert "was computed from another hidden_states" in judged()
    assert "was computed with nothing, which is not among the inputs" in judged(inputs={"nothing": ""})
    assert "num_layers = 3, expected 2" in judged(inputs={}, config={"num_layers": 3})


def test_a_trace_of_another_dtype_is_still_of_its_case(here: Path) -> None:
    assert load_trace("bf16").inputs["hidden_states"] != load_trace("ref.safetensors").inputs["hidden_states"]
    report = audit(candidate_named("bf16"), CASE, torch.float32, torch.device("cpu"))
    assert report.verdict != "identical" and len(report.rows) > 200


# ---------------------------------------------------------------- real weights and real inputs
@pytest.fixture(scope="module")
def real_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("real")
    config = tiny_config("2.3")
    save(random_model(config), path / "model.safetensors", dialect="lightricks")
    sizes = {"in_channels": 17, "out_channels": 19}
    inputs = CASE.inputs()
    for side, stream in (("", config.video), ("audio_", config.audio)):
        tokens = inputs[f"{side}hidden_states"].shape[1]
        inputs[f"{side}hidden_states"] = torch.randn(2, tokens, stream.in_channels)
        inputs[f"{side}encoder_hidden_states"] = torch.randn(2, 9, stream.text_dim)
    assert sizes["in_channels"] == config.video.in_channels
    save_inputs(path / "call.safetensors", inputs | {"return_dict": False, "attention_kwargs": None})
    return str(path / "model.safetensors"), str(path / "call.safetensors")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_port_is_audited_with_a_checkpoint_and_a_call(
    real_files: tuple[str, str],
    streamed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if streamed:
        monkeypatch.setattr(real, "memory", lambda device: 0)
    options = ("--checkpoint", real_files[0], "--inputs", real_files[1])
    for name, factor, status in (("right", "1", 0), ("wrong", "1.5", 1)):
        file = tmp_path / f"{name}_{streamed}.py"
        file.write_text(PORT.replace("FACTOR", factor))
        assert done("audit", f"{file}:run", *options) == status
        said = capsys.readouterr().out
        assert said.startswith("model.safetensors on call.safetensors: ")
    assert "proj_in" in said
    monkeypatch.chdir(tmp_path)
    assert done("trace", *options, "-o", "mine", "--sketch") == 0
    assert load_trace("mine").case is None and done("audit", "mine", *options) == 0


def test_inputs_of_another_model_are_refused(real_files: tuple[str, str], here: Path) -> None:
    with pytest.raises(TraceError, match=r"hidden_states: expected \(B, T, 17\), as .*model.safetensors takes it"):
        real_case(real_files[0], "port/inputs.safetensors")


def test_a_checkpoint_needs_inputs_and_a_trace_of_a_case_is_none_of_a_checkpoint(
    here: Path, real_files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert done("audit", "ref.safetensors", "--checkpoint", real_files[0]) == 2
    assert "--checkpoint: only with --inputs FILE" in capsys.readouterr().err
    assert done("audit", "ref.safetensors", "--checkpoint", real_files[0], "--inputs", real_files[1]) == 2
    assert "the trace is of 2.3/t2v, not of model.safetensors on call.safetensors" in capsys.readouterr().err


# ---------------------------------------------------------------- the arguments of a call
@pytest.mark.parametrize("name", ["2.5/everything", "2.3/stg", "2.3/text-masks-3d", "2.0/isolated", "2.3/self-mask"])
def test_the_arguments_of_every_kind_of_case_pass_through_a_file(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.id == name)
    inputs = cast(case.inputs(), torch.bfloat16)
    save_inputs(tmp_path / "call", inputs)
    assert_same(load_inputs(tmp_path / "call"), {key: x for key, x in inputs.items() if x is not None})


def test_masks_that_newer_implementations_take_by_themselves_are_put_where_they_are_documented(tmp_path: Path) -> None:
    mask = torch.ones(1, 2, 2)
    save_inputs(tmp_path / "call", CASE.inputs() | {"video_self_attention_mask": mask})
    assert load_inputs(tmp_path / "call")["attention_kwargs"].keys() == {"video_self_attention_mask"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"timesteps": torch.ones(2)}, "timesteps: no argument of the forward; did you mean timestep"),
        ({"num_frames": 3.5}, "num_frames: expected a whole number, got 3.5"),
        ({"height": True}, "height: expected a whole number, got True"),
        ({"fps": "24"}, "fps: expected a number, got 24"),
        ({"sigma": 3.0}, "sigma: expected a tensor, got 3.0"),
        ({"spatio_temporal_guidance_blocks": [0.5]}, "spatio_temporal_guidance_blocks: expected a list of whole"),
        ({"attention_kwargs": {"scale": 1.0}}, "attention_kwargs.scale: expected video_self_attention_mask or"),
        ({"attention_kwargs": torch.ones(1)}, "attention_kwargs: expected a dict of masks, got Tensor"),
    ],
)
def test_an_argument_that_the_forward_does_not_take_is_named(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=message) as error:
        save_inputs(tmp_path / "call", CASE.inputs() | changed)
    assert str(error.value).startswith(str(tmp_path / "call: ")) and not (tmp_path / "call").exists()


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"timestep": 1}, {}, "without hidden_states, audio_hidden_states"),
        ({"nonsense": 1}, {}, "nonsense: no argument of the forward"),
        ({"hidden_states.x": 1}, {}, "hidden_states.x: no argument of the forward"),
        ({"fps": 1}, {}, "fps: expected a number"),
        ({"sigma": 1}, {"inputs": '{"schema": 1, "arguments": {"sigma": 2}}'}, "sigma: both a tensor and a value"),
        ({}, {"inputs": '{"schema": 2}'}, "schema 2, expected 1"),
        ({}, {"inputs": '{"schema": 1, "arguments": []}'}, "arguments: expected an object"),
        ({}, {"inputs": "["}, "metadata 'inputs': "),
    ],
)
def test_a_file_of_inputs_that_cannot_be_used_is_refused(
    tensors: dict[str, int], metadata: dict[str, str], message: str, tmp_path: Path
) -> None:
    save_file({name: torch.ones(n) for name, n in tensors.items()}, tmp_path / "call", metadata)
    with pytest.raises(TraceError, match=message) as error:
        load_inputs(tmp_path / "call")
    assert str(error.value).startswith(str(tmp_path / "call"))


# ---------------------------------------------------------------- versions
def test_a_later_ltx_core_is_refused_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltx2ref.parity.audit.version", lambda name: "1.1.0")
    with pytest.raises(ValueError, match=r"^ltx-core: needs ltx-core 1\.0\.0, and 1\.1\.0 is installed$"):
        oracle("ltx-core")


@pytest.mark.parametrize("missing", ["num_frames", "height", "audio_num_frames"])
def test_a_call_without_its_grid_is_refused_with_what_is_missing(
    missing: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The taps once computed coordinates before the model had checked its arguments."""
    inputs = {name: x for name, x in CASE.inputs().items() if name != missing}
    save_inputs(tmp_path / "call.safetensors", inputs)
    assert (
        done("trace", "--checkpoint", "port/weights.safetensors", "--inputs", f"{tmp_path}/call.safetensors", "-o", "x")
        == 2
    )
    coords = "audio_coords" if missing.startswith("audio") else "video_coords"
    said = f"ltx2ref: {missing}: expected a positive integer or {coords}, got None\n"
    assert capsys.readouterr().err == said
