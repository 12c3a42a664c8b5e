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

from ltx2ref import LTX2VideoTransformer3DModel, assert_parity, cli
from ltx2ref.parity.cases import ONE_STREAM_CASES
from ltx2ref.parity.report.rows import IDENTICAL

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
