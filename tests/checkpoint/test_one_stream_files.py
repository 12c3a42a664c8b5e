"""One stream is loaded alone: from a whole file or from a file of its own, and nothing else of the file is read.

pytest tests/checkpoint/test_one_stream_files.py
"""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from mutants import ABSENT, patched
from tiny import Inputs, random_inputs, random_model, tiny_config, without
from torch import Tensor

import ltx2ref
from ltx2ref import CheckpointError, cli
from ltx2ref.checkpoint.inspection import inspect
from ltx2ref.checkpoint.match import make_plan
from ltx2ref.checkpoint.quantised import Weight
from ltx2ref.checkpoint.shapes import parameter_shapes
from ltx2ref.checkpoint.streams import is_needed, needs
from ltx2ref.interop import for_diffusers

PARAMETERS = {
    ("2.0", "audio"): 3_265_980_544,
    ("2.3", "audio"): 3_286_408_320,
    ("2.5", "audio"): 3_286_408_320,
    ("2.0", "video"): 13_041_520_768,
    ("2.3", "video"): 13_124_316_288,
    ("2.5", "video"): 13_123_337_344,
}
OTHER = {"video": "audio", "audio": "video"}
INDEX = {"video": 0, "audio": 1}
PRESETS = {"2.0": ltx2ref.LTX_2_0, "2.3": ltx2ref.LTX_2_3, "2.5": ltx2ref.LTX_2_5}
releases = pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
streams = pytest.mark.parametrize("stream", ["video", "audio"])


def whole_file(folder: Path, release: str) -> Path:
    model = random_model(tiny_config(release))
    ltx2ref.save(model, folder / "whole.safetensors", dialect="lightricks")
    return folder / "whole.safetensors"


def outputs(model: Any, stream: str, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**without(OTHER[stream], inputs))[INDEX[stream]]
    return found


# ---------------------------------------------------------------- which parameters
@pytest.mark.parametrize(("release", "stream"), PARAMETERS)
def test_a_stream_alone_has_the_parameters_that_are_published_as_its_own(release: str, stream: str) -> None:
    shapes = parameter_shapes(PRESETS[release], (stream,))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == PARAMETERS[release, stream]


def test_audio_alone_is_1457_of_the_4186_tensors_of_2_3() -> None:
    shapes = parameter_shapes(ltx2ref.LTX_2_3)
    alone = {stream: sum(is_needed(name, [stream]) for name in shapes) for stream in ("video", "audio")}
    exchange = [name for name in shapes if len(needs(name)) == 2]
    assert (len(shapes), alone["audio"]) == (4186, 1457)
    assert sum(alone.values()) + len(exchange) == 4186
    assert not any(name.startswith("proj_") for name in exchange)


# ---------------------------------------------------------------- of a whole file
@releases
@streams
@pytest.mark.parametrize("how", [ltx2ref.load, ltx2ref.stream], ids=["load", "stream"])
def test_one_stream_of_a_whole_file_has_the_bits_of_the_whole_model(
    release: str, stream: str, how: Any, tmp_path: Path
) -> None:
    path = whole_file(tmp_path, release)
    model, whole = how(path, streams=stream), ltx2ref.load(path)
    assert model.streams == (stream,) and whole.streams == ("video", "audio")
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    inputs = random_inputs(whole.config, per_token=True)
    assert torch.equal(outputs(model, stream, inputs), outputs(whole, stream, inputs))
    wide = random_inputs(whole.config, torch.float64)
    assert torch.equal(outputs(model.double(), stream, wide), outputs(whole.double(), stream, wide))


def read_by(monkeypatch: pytest.MonkeyPatch, read: Any) -> set[str]:
    """Return the names of the tensors that are read meanwhile."""
    names: set[str] = set()
    for method in ("read", "into"):
        before = getattr(Weight, method)

        def noted(self: Weight, *given: Any, before: Any = before) -> Any:
            names.add(self.tensor.name)
            return before(self, *given)

        monkeypatch.setattr(Weight, method, noted)
    read()
    return names


def assert_only_own_tensors(path: Path, release: str, stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name for name in parameter_shapes(tiny_config(release)) if needs(name) == (stream,)}
    model = ltx2ref.load(path, streams=stream)  # type: ignore[arg-type]
    assert model.state_dict().keys() == own == {name for name, _ in model.named_parameters()}
    assert model.num_parameters() == sum(x.numel() for x in model.state_dict().values())
    read = read_by(monkeypatch, lambda: ltx2ref.load(path, streams=stream, dtype=torch.bfloat16))  # type: ignore[arg-type]
    assert len(read) == len(own)


@releases
@streams
def test_nothing_but_the_streams_own_tensors_is_read_and_kept(
    release: str, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = whole_file(tmp_path, release)
    assert_only_own_tensors(path, release, stream, monkeypatch)
    with patched(ABSENT["exchange-loaded"]()), pytest.raises(AssertionError):
        assert_only_own_tensors(path, release, stream, monkeypatch)


def test_what_a_model_of_one_stream_lacks_is_refused_by_name(tmp_path: Path) -> None:
    model = ltx2ref.load(whole_file(tmp_path, "2.3"), streams="audio")
    inputs = random_inputs(model.config)
    said = f"hidden_states: expected (B, 0, C): the model has no weights of video; got {(2, 105, 17)}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        model(**inputs)
    with pytest.raises(ValueError, match=r'^streams: expected "video" or "audio", or None .*, got 3$'):
        ltx2ref.load(tmp_path / "whole.safetensors", streams=3)  # type: ignore[arg-type]


@streams
def test_the_shell_for_diffusers_of_one_stream_has_its_bits(stream: Any, tmp_path: Path) -> None:
    model = ltx2ref.load(whole_file(tmp_path, "2.3"), streams=stream)
    shell, inputs = for_diffusers(model), random_inputs(model.config)
    assert shell.streams == (stream,) and shell.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(outputs(shell, stream, inputs), outputs(model, stream, inputs))


# ---------------------------------------------------------------- files of one stream
@releases
@streams
@pytest.mark.parametrize("dialect", ["lightricks", "diffusers"])
def test_a_file_of_one_stream_is_written_loaded_inspected_and_described(
    release: str,
    stream: str,
    dialect: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = whole_file(tmp_path, release)
    path = tmp_path / ("alone.safetensors" if dialect == "lightricks" else "alone")
    assert cli.main(["convert", str(whole), str(path), "--to", dialect, "--streams", stream]) == 0
    with caplog.at_level(logging.WARNING, "ltx2ref"):
        model = ltx2ref.load(path)
    assert f"{stream} stream only: every call of the model has to leave the other one out" in caplog.text
    inputs = random_inputs(model.config)
    expected = ltx2ref.load(whole)
    assert torch.equal(outputs(model, stream, inputs), outputs(expected, stream, inputs))
    assert torch.equal(outputs(ltx2ref.stream(path), stream, inputs), outputs(expected, stream, inputs))
    described = inspect(path)
    assert (described.streams, described.problems, described.release) == ([stream], [], release)
    assert cli.main(["inspect", str(path)]) == 0
    assert f": transformer, {stream} stream only, release {release}\n" in capsys.readouterr().out
    assert cli.main(["describe", str(path)]) == 0
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out
    ltx2ref.save(model, tmp_path / "again", dialect="diffusers")
    assert inspect(tmp_path / "again").streams == [stream]
    with pytest.raises(
        CheckpointError, match=f"streams = '{OTHER[stream]}', but it has tensors of the {stream} stream"
    ):
        ltx2ref.load(path, streams=OTHER[stream])  # type: ignore[arg-type]


@streams
def test_a_file_of_one_stream_needs_no_config(stream: str, tmp_path: Path) -> None:
    """What the tensors do not show is as in the release that they look like; the sizes here are the published ones."""
    config = PRESETS["2.3"]
    shapes = parameter_shapes(config, (stream,))
    state = {name: torch.zeros((), dtype=torch.uint8).expand(shape) for name, shape in shapes.items()}
    from ltx2ref.checkpoint.resolve_config import from_shapes

    measured = from_shapes({name: tuple(x.shape) for name, x in state.items()})
    assert all(getattr(config, name) == value for name, value in measured.items())
    assert not any(name.startswith("audio_") != (stream == "audio") for name in measured if "attention" in name)


@streams
def test_an_incomplete_file_of_one_stream_is_refused_with_what_is_missing(stream: str, tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3"))
    prefix = "audio_" if stream == "audio" else ""
    state = {name: x.detach() for name, x in model.state_dict().items() if needs(name) == (stream,)}
    del state[f"transformer_blocks.1.{prefix}attn1.to_q.weight"]
    writers.write_single_file(tmp_path / "x.safetensors", state, model.config)
    with pytest.raises(CheckpointError) as raised:
        ltx2ref.load(tmp_path / "x.safetensors")
    assert len(raised.value.problems) == 1 and f"{prefix}attn1.to_q.weight: missing" in raised.value.problems[0]


def test_a_file_may_hold_the_exchange_beside_one_stream(tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3"))
    state = {name: x.detach() for name, x in model.state_dict().items() if needs(name) != ("video",)}
    writers.write_single_file(tmp_path / "x.safetensors", state, model.config)
    plan = make_plan(tmp_path / "x.safetensors")
    assert (plan.problems, plan.unknown, plan.streams) == ([], [], ("audio",))
    assert all(needs(name) == ("audio",) for name in plan.weights)


@pytest.mark.parametrize("how", [ltx2ref.load, ltx2ref.stream])
def test_both_streams_without_the_exchange_are_refused_with_how_to_read_one(how: Any, tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3"))
    state = {name: x.detach() for name, x in model.state_dict().items() if len(needs(name)) == 1}
    writers.write_single_file(tmp_path / "x.safetensors", state, model.config)
    with pytest.raises(CheckpointError) as raised:
        how(tmp_path / "x.safetensors")
    said = 'both streams and nothing of the exchange: streams="video" or "audio" reads one of them'
    assert raised.value.problems[0] == said and all("missing" in problem for problem in raised.value.problems[1:])
    assert how(tmp_path / "x.safetensors", streams="audio").streams == ("audio",)


def test_a_tensor_of_the_other_stream_outside_the_blocks_says_nothing_of_its_blocks(tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3"))
    own = {name: x.detach() for name, x in model.state_dict().items() if needs(name) == ("audio",)}
    writers.write_single_file(tmp_path / "x.safetensors", own | {"proj_in.weight": model.proj_in.weight}, model.config)
    with pytest.raises(CheckpointError) as raised:
        ltx2ref.load(tmp_path / "x.safetensors")
    assert all(": missing, expected " in problem for problem in raised.value.problems)
    assert ltx2ref.load(tmp_path / "x.safetensors", streams="audio").streams == ("audio",)


def test_a_model_of_one_stream_comes_from_a_file_alone(tmp_path: Path) -> None:
    ltx2ref.save(random_model(tiny_config("2.3")), tmp_path / "whole", dialect="diffusers")
    model = ltx2ref.LTX2VideoTransformer3DModel.from_pretrained(tmp_path / "whole", streams="audio")
    assert model.streams == ("audio",)
    for config in ([], [model.config]):
        with pytest.raises(TypeError, match=r"^streams: a model of one stream is loaded"):
            ltx2ref.LTX2VideoTransformer3DModel(*config, streams="audio")


def test_describe_reads_a_file_as_load_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(tiny_config("2.3"))
    for name, streams in (("audio", [("audio",)]), ("unconnected", [("audio",), ("video",)])):
        state = {key: x.detach() for key, x in model.state_dict().items() if needs(key) in streams}
        writers.write_single_file(tmp_path / f"{name}.safetensors", state, model.config)
    assert cli.main(["describe", f"{tmp_path}/audio.safetensors", "--streams", "video"]) == 2
    assert "streams = 'video', but it has tensors of the audio stream only" in capsys.readouterr().err
    assert cli.main(["describe", f"{tmp_path}/unconnected.safetensors", "--streams", "audio"]) == 0
    count = ltx2ref.load(tmp_path / "unconnected.safetensors", streams="audio").num_parameters()
    assert f"{count:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sizes", "status"),
    [
        ("--streams audio --frames 7 --height 3", 0),
        ("--streams audio --tokens 0 10 20", 0),
        ("--streams video --tokens 10 0 20", 0),
        ("--streams audio --tokens 10 0 20", 2),
        ("--streams audio --frames -7", 2),
        ("--frames 7", 2),
    ],
)
def test_the_sizes_of_a_stream_that_is_not_described_do_not_matter(sizes: str, status: int) -> None:
    assert cli.main(["describe", "2.3", *sizes.split()]) == status
