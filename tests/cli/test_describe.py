"""`ltx2ref describe`: totals are the published ones, FLOPs are the counter's, memory is what a run holds.

pytest tests/cli/test_describe.py
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import floor
import pytest
import torch
from safetensors.torch import save_file
from tiny import RELEASES, random_inputs, random_model, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from ltx2ref import LTX_2_3, TransformerConfig, save
from ltx2ref.cli import main
from ltx2ref.describe import STEPS, Lengths, blank_inputs, describe, lengths
from ltx2ref.interface import LTX2VideoTransformer3DModel

PUBLISHED = {"2.0": 18_876_174_592, "2.3": 18_988_838_144, "2.5": 18_987_859_200}
SIZES = {"default": Lengths(6144, 126, 1024), "odd": Lengths(315, 11, 7, batch=3)}


@pytest.mark.parametrize("release", RELEASES)
def test_totals_are_the_published_ones(release: str) -> None:
    found = describe(RELEASES[release], SIZES["default"])
    assert found.parameters == sum(row.parameters for row in found.rows) == PUBLISHED[release]
    assert found.weight_bytes == 2 * PUBLISHED[release]
    assert found.flops == sum(row.flops for row in found.rows)


def counted(config: TransformerConfig, n: Lengths) -> dict[str, int]:
    with torch.device("meta"), torch.no_grad():
        model = LTX2VideoTransformer3DModel(config)
        with FlopCounterMode(display=False) as counter:
            model(**blank_inputs(config, n, torch.float32))
    return {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "layers", "n"),
    [("2.3", 48, SIZES["default"]), *((release, 2, n) for release in RELEASES for n in SIZES.values())],
)
def test_flops_are_those_of_the_counter(release: str, layers: int, n: Lengths) -> None:
    config = replace(RELEASES[release], num_layers=layers)
    found, counts = describe(config, n), counted(config, n)
    assert found.flops == pytest.approx(counts["Global"], rel=1e-3)
    root = LTX2VideoTransformer3DModel.__name__
    for row in found.rows:
        parts = [
            name
            for name in counts
            for module in row.modules
            if name == f"{root}.{module}" or (name.count(".") == 3 and name.endswith(f".{module}"))
        ]
        assert row.flops == pytest.approx(sum(counts[name] for name in parts), rel=1e-3), row


@pytest.mark.parametrize("release", RELEASES)
def test_every_parameter_belongs_to_one_row(release: str) -> None:
    config = tiny_config(release)
    with torch.device("meta"):
        names = [name for name, _ in LTX2VideoTransformer3DModel(config).named_parameters()]
    stems = {name.removeprefix("transformer_blocks.0.") for name in names if ".1." not in name[:21]}
    modules = [module for step in STEPS.values() for stream in step for module in stream]
    for stem in stems:
        assert sum(stem == module or stem.startswith(f"{module}.") for module in set(modules)) == 1, stem


@pytest.mark.slow
@pytest.mark.parametrize("release", ["2.0", "2.3"])
def test_the_memory_is_what_a_run_on_the_cpu_holds(release: str) -> None:
    config = replace(
        tiny_config(release),
        num_attention_heads=4,
        attention_head_dim=128,
        cross_attention_dim=512,
        audio_num_attention_heads=4,
        audio_attention_head_dim=64,
        audio_cross_attention_dim=256,
        caption_channels=384,
    )
    inputs = random_inputs(config, batch=1, grid=(20, 10, 10), audio_frames=50, text_tokens=(100, 100))
    model = random_model(config)
    with torch.no_grad(), floor.PeakMemory("cpu") as memory:
        model(**inputs)
    described = describe(config, Lengths(2000, 50, 100), torch.float32).activation_bytes
    assert described == pytest.approx(memory.peak_bytes, rel=0.01)  # in bfloat16, CPU kernels hold a fifth more


def test_sizes_are_pixels_frames_and_seconds() -> None:
    assert lengths(LTX_2_3, 121, 704, 1280) == Lengths(16 * 22 * 40, 126, 1024)
    assert lengths(LTX_2_3, 1, 32, 64, seconds=2, text=5, batch=2) == Lengths(2, 50, 5, 2)
    assert lengths(replace(LTX_2_3, causal_offset=0), 8, 32, 32).video == 1
    for wrong in ({"frames": 120}, {"height": 700}, {"width": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected a multiple of"):
            lengths(LTX_2_3, **{"frames": 121, "height": 704, "width": 1280} | wrong)
    for name, number in (("fps", 0.0), ("fps", math.nan), ("seconds", -1.0), ("seconds", 0.0), ("seconds", math.inf)):
        with pytest.raises(ValueError, match=f"{name}: expected a positive finite number, got {number}"):
            lengths(LTX_2_3, 121, 704, 1280, **{name: number})
    with pytest.raises(ValueError, match="audio: expected a positive number, got 0"):
        describe(LTX_2_3, Lengths(6, 0, 1))


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "2.5"]) == 0
    printed = capsys.readouterr().out
    assert "18,987,859,200 parameters" in printed and "6,144 video, 126 audio and 1,024 text tokens" in printed
    assert "feed-forward" in printed and "4096 x 16384, 16384 x 4096" in printed


@pytest.mark.slow
def test_the_command_reads_configs_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config("2.3")
    save(random_model(config), tmp_path / "model")
    found = []
    for path in (tmp_path / "model", tmp_path / "model" / "config.json"):
        assert main(["describe", str(path), "--tokens", "30", "7", "5", "--dtype", "float32", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["lengths"] == {"video": 30, "audio": 7, "text": 5, "batch": 1}
    assert found[0]["parameters"] == describe(config, Lengths(30, 7, 5)).parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2.4"], "expected one of the releases 2.0, 2.3, 2.5, or a file or folder"),
        (["--frames", "120"], "frames: expected a multiple of 8 and 1 more, got 120"),
        (["--fps", "0"], "fps: expected a positive finite number, got 0.0"),
        (["--seconds", "inf"], "seconds: expected a positive finite number, got inf"),
        (["lora.safetensors"], "no LTX-2 transformer in it"),
        (["broken.json"], "broken.json: not JSON: Expecting value at byte 0"),
        (["folder.json"], "folder.json: not a regular file, but a folder"),
        (["--tokens", "0", "1", "1"], "video: expected a positive number, got 0"),
    ],
)
def test_unusable_input_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.zeros(1)}, "lora.safetensors")
    Path("broken.json").write_text("nothing", encoding="utf-8")
    Path("folder.json").mkdir()
    assert main(["describe", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("ltx2ref: ")
