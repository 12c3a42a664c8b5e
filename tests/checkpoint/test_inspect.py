"""`ltx2ref inspect` names every published file from its header, and says what it cannot tell.

pytest tests/checkpoint/test_inspect.py
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sparse
import torch
import writers
from safetensors.torch import load_file, save_file
from tiny import random_model, tiny_config

import ltx2ref
from ltx2ref.checkpoint import manifest
from ltx2ref.checkpoint.inspection import inspect, inspect_all, ranges
from ltx2ref.checkpoint.lora import read_lora
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
        (["diffusion_model.transformer_blocks.0.attn1.to_q.diff"], "LoRA, lightricks"),
        (["lora_unet_transformer_blocks_0_attn1_to_q.diff_b"], "LoRA, kohya"),
        (["audio_vae.encoder.x", "vocoder.y"], "audio VAE + vocoder"),
        (["decoder.x", "encoder.y"], "VAE"),
    ],
)
def test_a_file_without_a_transformer_is_named_too(names: list[str], kind: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "other.safetensors")
    found = inspect(tmp_path / "other.safetensors")
    assert (found.kind, found.release, found.problems) == (kind, None, [])


# Changes of a LoRA that `load` refuses whatever the model is, with what is said of each. None removes a tensor.
LAYER, RAW = "transformer_blocks.0.attn1.to_q", "base_model.model.transformer_blocks.0.attn1.to_q"
A, B, ALPHA = (f"diffusion_model.{LAYER}{ending}" for ending in (".lora_A.weight", ".lora_B.weight", ".alpha"))
LORAS: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "A without B": ({B: None}, f"{A} F32 [2, 8]: the layer has A; expected "),
    "two ranks": ({B: torch.ones(6, 3)}, f"{B} F32 [6, 3]: expected [6, 2]"),
    "an alpha of two": ({ALPHA: torch.ones(2)}, f"{ALPHA} F32 [2]: expected [] or [1]"),
    "an alpha of integers": ({ALPHA: torch.ones((), dtype=torch.int64)}, f"{ALPHA} I64 []: expected BF16, "),
    "an alpha of NaN": ({ALPHA: torch.tensor(float("nan"))}, f"{ALPHA} F32 []: not finite"),
    "integers": ({A: torch.ones(2, 8, dtype=torch.int8)}, f"{A} I8 [2, 8]: expected BF16, "),
    "twice": (
        {f"transformer.{LAYER}.lora_down.weight": torch.ones(2, 8)},
        f"{LAYER}.lora_down.weight F32 [2, 8]: the ",
    ),
    "twice, in two dialects": (
        {"transformer.proj_in.diff": torch.ones(2, 2), "diffusion_model.patchify_proj.diff": torch.ones(2, 2)},
        "transformer.proj_in.diff F32 [2, 2]: the same as diffusion_model.patchify_proj.diff",
    ),
    "DoRA": ({f"diffusion_model.{LAYER}.dora_scale": torch.ones(6, 1)}, "dora_scale F32 [6, 1]: not supported"),
    "a bias": ({f"diffusion_model.{LAYER}.lora_B.bias": torch.ones(6)}, "lora_B.bias F32 [6]: not supported"),
    "a side twice": (
        {f"diffusion_model.proj_out.lokr_{part}": torch.ones(1, 1) for part in ("w1", "w1_a", "w2")},
        "proj_out.lokr_w1 F32 [1, 1]: the layer has w1 and w1_a and w2; expected ",
    ),
    "LoKr of two ranks": (
        {f"diffusion_model.proj_out.lokr_{part}": torch.ones(2, 2) for part in ("w1_a", "w1_b", "w2_a")}
        | {"diffusion_model.proj_out.lokr_w2_b": torch.ones(3, 2)},
        "proj_out.lokr_w2_b F32 [3, 2]: expected [2, 2]",
    ),
    "several formats": (
        {"lora_unet_proj_out.diff": torch.ones(2, 2)},
        "names of several formats: kohya and lightricks",
    ),
    "PEFT without a config": (
        {A: None, B: None, f"{RAW}.lora_A.weight": torch.ones(2, 8), f"{RAW}.lora_B.weight": torch.ones(6, 2)},
        "its names are PEFT's, whose alpha is in adapter_config.json, and that is not beside it",
    ),
}


@pytest.mark.parametrize("case", LORAS)
def test_what_a_lora_alone_shows_to_be_wrong_is_a_problem(tmp_path: Path, case: str) -> None:
    change, problem = LORAS[case]
    tensors, path = {A: torch.ones(2, 8), B: torch.ones(6, 2)}, tmp_path / "lora.safetensors"
    save_file(tensors, path)
    assert inspect(path).problems == [] and main(["inspect", str(path)]) == 0
    save_file({name: tensor for name, tensor in (tensors | change).items() if tensor is not None}, path)
    found = inspect(path)
    assert found.kind.startswith("LoRA, ") and any(problem in line for line in found.problems), found.problems
    assert main(["inspect", str(path)]) == 1


@pytest.mark.parametrize("names", [(A, B), ("vae.decoder.weight",), ("something",)])
def test_stats_of_what_is_no_transformer_are_said_to_be_missing(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({name: torch.full((2, 2), float("nan")) for name in names}, path)
    said = "the numbers were not read: --stats looks at those of a transformer"
    assert said in inspect(path, stats=True).notes and said not in inspect(path).notes


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (None, "a folder of PEFT has adapter_model.safetensors and adapter_config.json: no adapter_config.json in it"),
        ('{"lora_alpha": 4, "peft_type": "LOHA"}', "adapter_config.json: peft_type = 'LOHA' is not supported"),
        ('{"lora_alpha": NaN}', "not JSON: NaN"),
        ('{"num_layers": 48}', "adapter_config.json: not a config of PEFT's for a LoRA: it has no lora_alpha"),
        ('{"lora_alpha": 4, "r": 8}', "its rank is 2, but 8 by adapter_config.json"),
        ('{"lora_alpha": 4, "r": 2}', None),
    ],
)
def test_a_folder_of_pefts_is_inspected_with_its_config(
    tmp_path: Path, config: str | None, problem: str | None
) -> None:
    tensors = {f"{RAW}.lora_A.weight": torch.ones(2, 8), f"{RAW}.lora_B.weight": torch.ones(6, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(config)
    found = inspect(tmp_path)
    assert found.kind == "LoRA, peft" and len(found.problems) == (problem is not None)
    assert all(problem and problem in line for line in found.problems), found.problems


def test_notes_on_the_alphas_of_a_lora_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({A: torch.ones(2, 8), B: torch.ones(6, 2)}, path, {"lora_alpha": "1"})
    assert "lora_alpha = 1.0 in the metadata is not used" in inspect(path).notes[0]


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("layer", ["proj_in", "patchify_proj"])
def test_a_lora_whose_layers_only_a_transformer_has_is_no_transformer(tmp_path: Path, prefix: str, layer: str) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(
        {f"{prefix}{layer}.lora_A.weight": torch.ones(2, 8), f"{prefix}{layer}.lora_B.weight": torch.ones(6, 2)}, path
    )
    found = inspect(path)
    assert found.kind.startswith("LoRA, ") and not found.problems


def test_ranges_join_neighbours() -> None:
    assert (ranges([3, 1, 2, 7, 9, 10]), ranges([4]), ranges([])) == ("1-3, 7, 9-10", "4", "")


@pytest.mark.parametrize(
    "read",
    [
        ltx2ref.load,
        ltx2ref.stream,
        ltx2ref.LTX2VideoTransformer3DModel.from_pretrained,
        inspect,
        inspect_all,
        read_lora,
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[str], object]
) -> None:
    tiny_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="path: expected a file or a folder, got an empty text"):
        read("")
    assert main(["inspect", ""]) == 2
