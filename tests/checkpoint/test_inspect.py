"""`ltx2ref inspect` names every published file from its header, and says what it cannot tell.

pytest tests/checkpoint/test_inspect.py
"""

import hashlib
import json
from pathlib import Path

import pytest
import sparse
import torch
import writers
from safetensors.torch import load_file, save_file
from tiny import random_model, tiny_config

import ltx2ref
from ltx2ref.checkpoint import manifest
from ltx2ref.checkpoint.inspection import inspect, ranges
from ltx2ref.checkpoint.match import make_plan
from ltx2ref.cli import main

pytestmark = pytest.mark.slow

# For each sparse copy, the format of most of its weights, and the blocks that have this format.
QUANTISED = {
    "2.0-fp8": ("fp8 scaled", "3-44"),
    "2.3-dev-fp8": ("fp8 scaled", "2-45"),
    "2.3-distilled-fp8": ("fp8 scaled", "4-46"),
    "2.3-kijai-fp8": ("fp8 scaled", "4-46"),
    "2.5-int8": ("int8 ConvRot", "0-47"),
    "2.5-nvfp4": ("nvfp4", "0-41"),
    "2.5-nvfp4-superseded": ("nvfp4", "0-41"),
    "2.5-vonkaiser-fp8": ("fp8 scaled", "0-47"),
}


@pytest.mark.parametrize("name", sparse.FILES)
def test_a_published_file_is_named_from_its_header(name: str, tmp_path: Path) -> None:
    published = sparse.FILES[name]
    path = published.write(tmp_path)
    found = inspect(path)
    assert (found.kind, found.release, found.problems, found.unknown) == ("transformer", published.release, [], [])
    assert found.dialect == (
        "diffusers names, no prefix" if published.sharded else "lightricks names, prefix model.diffusion_model."
    )
    format, blocks = QUANTISED.get(name, ("BF16", "0-47"))
    (row,) = [row for row in found.formats if (row["layers"], row["format"]) == ("feed-forward", format)]
    assert row["blocks"] == blocks
    assert found.tensors == published.tensors
    assert found.published_shapes == (name != "2.5-nvfp4-superseded")  # this file has no keyframes tensor
    assert any("dev or distilled" in line for line in found.cannot_tell)
    if not published.sharded and name != "2.3-kijai-fp8":  # files whose sizes are not known or not published
        assert found.bytes == published.published_bytes
        assert published.file in [entry.name for entry in found.manifest]
        assert {entry.repository for entry in found.manifest} == {published.repository}
        assert not published.revision or [entry.revision for entry in found.manifest] == [published.revision]


@pytest.mark.parametrize("name", sparse.FILES)
def test_the_header_phase_of_loading_accepts_every_published_file(name: str, tmp_path: Path) -> None:
    plan = make_plan(sparse.FILES[name].write(tmp_path))
    plan.check()
    expected = {"2.0": ltx2ref.LTX_2_0, "2.3": ltx2ref.LTX_2_3, "2.5": ltx2ref.LTX_2_5}[sparse.FILES[name].release]
    assert plan.config.use_keyframes_abs_pos_embedding == (
        expected.use_keyframes_abs_pos_embedding and name != "2.5-nvfp4-superseded"
    )
    changed = {name for name, value in vars(plan.config).items() if value != getattr(expected, name)}
    assert changed <= {"use_keyframes_abs_pos_embedding"}


def test_what_shares_the_file_is_listed_by_prefix(tmp_path: Path) -> None:
    found = inspect(sparse.FILES["2.3-bf16"].write(tmp_path))
    assert found.foreign.keys() == {
        "vae.",
        "audio_vae.",
        "vocoder.",
        "text_embedding_projection.",
        "model.diffusion_model.video_embeddings_connector.",
        "model.diffusion_model.audio_embeddings_connector.",
    }
    connectors = [held for prefix, held in found.foreign.items() if "connector" in prefix]
    assert sum(held["tensors"] for held in connectors) == 258
    assert sum(held["bytes"] for held in connectors) == 2 * 2_016_166_400


def test_each_value_of_the_config_has_its_origin(tmp_path: Path) -> None:
    single = inspect(sparse.FILES["2.0-bf16"].write(tmp_path)).config
    assert single["rope_type"] == {"value": "split", "origin": "metadata"}
    assert single["ff_bias"] == {"value": True, "origin": "default of the format"}
    bare = inspect(sparse.FILES["2.5-vonkaiser-fp8"].write(tmp_path))
    assert bare.config["rope_type"] == {"value": "split", "origin": "default of the release"}
    assert bare.config["num_layers"] == {"value": 48, "origin": "shapes"}
    assert "rope_type = 'split'" in " ".join(bare.notes)
    folder = inspect(sparse.FILES["2.0-diffusers"].write(tmp_path)).config
    assert folder["rope_type"] == {"value": "split", "origin": "config.json"}
    assert folder["gated_attn"] == {"value": False, "origin": "default of the format"}


def tiny_file(tmp_path: Path, release: str = "2.3") -> Path:
    config = tiny_config(release, num_layers=4)
    state = {name: tensor.detach() for name, tensor in random_model(config).state_dict().items()}
    writers.write_transformer_only(tmp_path / "ltx.safetensors", state, config)
    return tmp_path / "ltx.safetensors"


def test_the_sha256_tells_files_of_one_size_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_file(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    entries = [
        {**manifest.files()[0]._asdict(), "bytes": path.stat().st_size, "name": name, "sha256": sha}
        for name, sha in (("dev", digest), ("distilled", "0" * 64))
    ]
    monkeypatch.setattr(manifest, "manifest", lambda: {"files": entries, "releases": {}})
    assert [entry.name for entry in inspect(path).manifest] == ["dev", "distilled"]
    found = inspect(path, sha256=True)
    assert [entry.name for entry in found.manifest] == ["dev"] and not found.cannot_tell


def test_statistics_find_values_that_are_not_finite_zeros_and_outliers(tmp_path: Path) -> None:
    path = tiny_file(tmp_path)
    assert inspect(path, stats=True).stats == []
    tensors, prefix = load_file(path), writers.PREFIX + "transformer_blocks."
    tensors[prefix + "1.attn1.to_q.weight"][3, 5] = float("inf")
    tensors[prefix + "2.attn1.to_k.bias"].zero_()
    tensors[prefix + "3.ff.net.2.weight"] *= 770
    save_file(tensors, path, {"config": json.dumps({"transformer": tiny_config("2.3", num_layers=4).to_lightricks()})})
    rows = {row["name"]: row for row in inspect(path, stats=True).stats or []}
    assert rows.keys() == {
        "transformer_blocks.1.attn1.to_q.weight",
        "transformer_blocks.2.attn1.to_k.bias",
        "transformer_blocks.3.ff.net.2.weight",
    }
    assert rows["transformer_blocks.1.attn1.to_q.weight"]["nonfinite"] == 1
    assert rows["transformer_blocks.2.attn1.to_k.bias"]["all_zero"]
    assert 500 < rows["transformer_blocks.3.ff.net.2.weight"]["times_the_median"] < 1000


def test_the_command_prints_a_table_or_json_and_its_status_says_whether_it_would_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_file(tmp_path)
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    for part in ("release 2.3", "feed-forward", "0-3", "metadata", "the manifest has no such file"):
        assert part in printed
    assert main(["inspect", str(path), "--json", "--stats"]) == 0
    assert json.loads(capsys.readouterr().out)["release"] == "2.3"
    tensors = load_file(path)
    del tensors[writers.PREFIX + "proj_out.bias"]
    save_file(tensors, path)
    assert main(["inspect", str(path)]) == 1
    assert "proj_out.bias: missing" in capsys.readouterr().out
    path.write_bytes(b"nothing")
    assert main(["inspect", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"], "LoRA, lightricks"),
        (["lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight"], "LoRA, kohya"),
        (["audio_vae.encoder.x", "vocoder.y"], "audio VAE + vocoder"),
        (["decoder.x", "encoder.y"], "VAE"),
    ],
)
def test_a_file_without_a_transformer_is_named_too(names: list[str], kind: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "other.safetensors")
    found = inspect(tmp_path / "other.safetensors")
    assert (found.kind, found.release, found.problems) == (kind, None, [])


def test_ranges_join_neighbours() -> None:
    assert (ranges([3, 1, 2, 7, 9, 10]), ranges([4]), ranges([])) == ("1-3, 7, 9-10", "4", "")
