"""Where a stream is absent, its taps are not missing: traces, audits and verdicts are those of the other one.

pytest tests/parity/test_one_stream_audit.py
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Inputs, random_inputs, random_model, tiny_config, without
from torch import Tensor

from ltx2ref import LTX2VideoTransformer3DModel, assert_parity, cli, save
from ltx2ref.parity.cases import ONE_STREAM_CASES
from ltx2ref.parity.report.rows import IDENTICAL
from ltx2ref.parity.trace.inputfile import save_inputs

OTHER = {"video": "audio", "audio": "video"}
streams = pytest.mark.parametrize("stream", ["video", "audio"])  # the one that is there


def model_and_inputs(stream: str) -> tuple[LTX2VideoTransformer3DModel, Inputs]:
    model = random_model(tiny_config("2.3"))
    return model, without(OTHER[stream], random_inputs(model.config, per_token=True))


@streams
def test_a_port_that_leaves_the_stream_out_is_identical_and_lacks_nothing(stream: str) -> None:
    model, inputs = model_and_inputs(stream)
    assert assert_parity(model, deepcopy(model), inputs).sentence == "identical at every tap"


@streams
@pytest.mark.parametrize("absent", ["empty", "none"])
def test_a_port_may_return_nothing_or_an_empty_tensor_for_it(stream: str, absent: str) -> None:
    model, inputs = model_and_inputs(stream)

    def port(**given: Any) -> tuple[Tensor | None, Tensor | None]:
        with torch.no_grad():
            video, audio = (x if absent == "empty" or x.numel() else None for x in model(**given, return_dict=False))
        return video, audio

    report = assert_parity(model, port, inputs)
    assert report.verdict == IDENTICAL and report.sentence.startswith("identical at all of 1 taps")


@streams
def test_a_port_that_computes_the_stream_wrongly_diverges_there(stream: str) -> None:
    model, inputs = model_and_inputs(stream)
    wrong, layer = deepcopy(model), "audio_ff" if stream == "audio" else "ff"
    with torch.no_grad():
        getattr(wrong.transformer_blocks[1], layer).net["2"].weight.mul_(1.1)
    with pytest.raises(
        AssertionError, match=rf"^first divergence at transformer_blocks\.1\.{layer}\.output \(diverged\)"
    ):
        assert_parity(model, wrong, inputs)


@streams
def test_a_port_that_returns_tokens_of_the_absent_stream_has_another_shape(stream: str) -> None:
    model, inputs = model_and_inputs(stream)

    def port(**given: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = model(**given, return_dict=False)
        return tuple(x if x.numel() else x.new_zeros(len(x), 4, x.shape[2]) for x in found)

    absent = "sample" if stream == "audio" else "audio_sample"
    with pytest.raises(AssertionError, match=rf"^first divergence at {absent} \(shape\)"):
        assert_parity(model, port, inputs)


@streams
def test_a_call_that_lacks_what_the_forward_ignores_is_traced_and_audited(
    stream: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs = model_and_inputs(stream)
    save(model, tmp_path / "model.safetensors", dialect="lightricks")
    save_inputs(tmp_path / "call.safetensors", inputs)
    real = ["--checkpoint", f"{tmp_path}/model.safetensors", "--inputs", f"{tmp_path}/call.safetensors"]
    trace = f"{tmp_path}/trace.safetensors"
    assert cli.main(["trace", *real, "-o", trace, "--truth", f"{tmp_path}/truth.safetensors"]) == 0
    assert cli.main(["audit", trace, *real]) == 0
    assert "identical: identical at every tap\n" in capsys.readouterr().out


@pytest.mark.ltx_core
@pytest.mark.parametrize("case", [case.id for case in ONE_STREAM_CASES if case.release != "2.5"])
def test_ltx_core_without_the_stream_has_our_taps(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["audit", "ltx-core", "--case", case, "--dtype", "float32"])
    said = capsys.readouterr().out
    assert "missing" not in said and "not traced" not in said, said
    if case != "2.3/video-alone":  # whose self-mask is another convention's
        assert status == 0 and said.startswith(f"{case}: identical: identical at every tap\n"), said


def test_a_case_without_a_stream_is_traced_compared_and_judged_by_its_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, truth = str(tmp_path / "trace.safetensors"), str(tmp_path / "truth.safetensors")
    assert cli.main(["trace", "--case", "2.3/audio-alone", "-o", trace, "--truth", truth]) == 0
    assert cli.main(["compare", trace, trace, "--truth", truth]) == 0
    assert capsys.readouterr().out.endswith("identical: identical at every tap\n")
