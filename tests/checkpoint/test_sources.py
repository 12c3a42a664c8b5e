"""A prefix that no known publisher uses is named and accepted, and a checkpoint of a folder is chosen by its variant.

pytest tests/checkpoint/test_sources.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from safetensors.torch import save_file
from tiny import random_model, tiny_config
from torch import Tensor

import ltx2ref
from ltx2ref import CheckpointError
from ltx2ref.checkpoint.convert import convert
from ltx2ref.checkpoint.inspection import inspect, inspect_all
from ltx2ref.checkpoint.settle import ReadingOptions
from ltx2ref.cli import main

State = dict[str, Tensor]
CONFIG = tiny_config("2.3")
STATE = {name: x.detach() for name, x in random_model(CONFIG).state_dict().items()}
LIGHTRICKS = {writers.original_name(name): x for name, x in STATE.items()}
FOREIGN = {f"{where}.weight": torch.ones(2) for where in ("vae.decoder", "text_embedding_projection.aggregate_embed")}
CONNECTOR = {"video_embeddings_connector.learnable_registers": torch.ones(2)}


def after(prefix: str, state: State) -> State:
    return {prefix + name: x.clone() for name, x in state.items()}


def written(path: Path, state: State) -> Path:
    save_file(state, path)
    return path


def holds(model: torch.nn.Module, state: State = STATE) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], x) for name, x in state.items())


# ---------------------------------------------------------------- prefixes
# The prefix of all names, and the names after it.
FILES: dict[str, tuple[str, State]] = {
    "Lightricks' names": ("velocity_model.", LIGHTRICKS),
    "diffusers' names": ("module.", STATE),
    "in front of the usual prefix": ("module.", after("model.diffusion_model.", LIGHTRICKS | CONNECTOR)),
    "several segments": ("pipe.dit.", LIGHTRICKS | CONNECTOR),
    "a word that ends with the usual prefix": ("my_transformer.", STATE),
    "with other models after it": ("model.", LIGHTRICKS | FOREIGN),
    "half of a usual prefix": ("model.", LIGHTRICKS),
}


@pytest.mark.parametrize("case", FILES)
def test_a_common_prefix_is_named_and_then_accepted(tmp_path: Path, case: str) -> None:
    prefix, state = FILES[case]
    path = written(tmp_path / "x.safetensors", after(prefix, state) | FOREIGN)
    with pytest.raises(CheckpointError) as caught:
        ltx2ref.load(path, config=CONFIG)
    assert caught.value.problems[0].endswith(
        f"All its names fit after {prefix}: to read it, give prefix={prefix!r} (--prefix {prefix})"
    )
    assert holds(ltx2ref.load(path, config=CONFIG, prefix=prefix))
    assert ltx2ref.stream(path, config=CONFIG, prefix=prefix).config == CONFIG
    d = inspect(path, ReadingOptions(prefix=prefix))
    assert (d.kind, d.problems) == ("transformer", []) and f"prefix {prefix}" in str(d.dialect)
    report = convert(path, tmp_path / "out", dialect="diffusers", options=ReadingOptions(prefix=prefix))
    assert report.tensors == len(STATE)
    assert holds(ltx2ref.load(tmp_path / "out"))


def test_the_command_line_takes_a_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "x.safetensors", after("velocity_model.", LIGHTRICKS))
    assert main(["inspect", str(path)]) == 1
    assert "give prefix='velocity_model.' (--prefix velocity_model.)" in capsys.readouterr().out
    assert main(["inspect", str(path), "--prefix", "velocity_model."]) == 0
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "diffusers", "--prefix", "velocity_model."]) == 0
    assert holds(ltx2ref.load(tmp_path / "out"))


# Files for which no single prefix makes all names fit.
NO_PREFIX: dict[str, State] = {
    "two models": after("a.", LIGHTRICKS) | after("ema.", LIGHTRICKS),
    "a tensor without it": after("a.", LIGHTRICKS) | {"step": torch.ones(1)},
    "another architecture": {"module.blocks.0.weight": torch.ones(2)},
    "nothing": {},
}


@pytest.mark.parametrize("case", NO_PREFIX)
def test_no_prefix_is_suggested_unless_all_names_fit_it(tmp_path: Path, case: str) -> None:
    path = written(tmp_path / "x.safetensors", NO_PREFIX[case])
    with pytest.raises(CheckpointError) as caught:
        ltx2ref.load(path, config=CONFIG)
    assert "no LTX-2 transformer in it" in str(caught.value) and "prefix=" not in str(caught.value)


def test_a_given_prefix_leaves_loading_strict(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", after("a.", LIGHTRICKS) | after("ema.", LIGHTRICKS))
    with pytest.raises(CheckpointError) as caught:
        ltx2ref.load(path, config=CONFIG, prefix="a.")
    assert len(caught.value.problems) == len(STATE)
    assert all(problem.startswith("ema.") and "not expected" in problem for problem in caught.value.problems)


@pytest.mark.parametrize("prefix", ["b.", "a", "a.b.", "model.diffusion_model."])
def test_a_prefix_that_does_not_fit_is_an_error_with_the_one_that_does(tmp_path: Path, prefix: str) -> None:
    path = written(tmp_path / "x.safetensors", after("a.", LIGHTRICKS))
    with pytest.raises(CheckpointError, match=rf"all after the given prefix '{prefix}'.* give prefix='a\.'"):
        ltx2ref.load(path, config=CONFIG, prefix=prefix)


# ---------------------------------------------------------------- variants
def folder(path: Path, *names: str) -> Path:
    """Write a checkpoint for each name, which differ in one value, and an index for each name of an index."""
    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({"_class_name": "LTX2VideoTransformer3DModel"} | CONFIG.to_diffusers())
    )
    for i, name in enumerate(names):
        state = STATE | {"proj_in.bias": torch.full_like(STATE["proj_in.bias"], i)}
        if not name.endswith(".json"):
            written(path / name, state)
            continue
        parts = [dict([*state.items()][:9]), dict([*state.items()][9:])]
        shards = {f"{name.split('.')[-2]}-0000{k}-of-00002.safetensors": part for k, part in enumerate(parts)}
        for shard, part in shards.items():
            written(path / shard, part)
        weight_map = {tensor: shard for shard, part in shards.items() for tensor in part}
        (path / name).write_text(json.dumps({"weight_map": weight_map}))
    return path


def which(path: Path, variant: str | None = None) -> int:
    """Return the place of the checkpoint that `load` chooses among those of `folder`."""
    return int(ltx2ref.load(path, variant=variant).state_dict()["proj_in.bias"][0])


PLAIN, FP16 = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
INDEX, BF16 = f"{PLAIN}.index.json", f"{PLAIN}.index.bf16.json"

# Names in a folder, the variant that is asked for, and the place of the one that is read.
CHOSEN: dict[str, tuple[tuple[str, ...], str | None, int]] = {
    "the only one, a variant": ((FP16,), None, 0),
    "the only one, a variant's index": ((BF16,), None, 0),
    "a file beside a plain one": ((PLAIN, FP16), "fp16", 1),
    "an index beside a plain one": ((INDEX, BF16), "bf16", 1),
    "one of two, a file": ((FP16, BF16), "fp16", 0),
    "one of two, an index": ((FP16, BF16), "bf16", 1),
    "the plain file": ((FP16, PLAIN), None, 1),
    "the plain index": ((FP16, BF16, INDEX), None, 2),
    "other names": (("ltx-2.3-dev.fp8.safetensors", "ltx-2.3-dev.bf16.safetensors"), "bf16", 1),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_of_several_checkpoints_the_variant_is_read(tmp_path: Path, case: str) -> None:
    names, variant, place = CHOSEN[case]
    path = folder(tmp_path / "x", *names)
    assert which(path, variant) == place
    assert ltx2ref.stream(path, variant=variant).proj_in.bias[0] == place
    assert [d.problems for d in [inspect(path, ReadingOptions(variant=variant))]] == [[]]
    convert(path, tmp_path / "out", dialect="diffusers", options=ReadingOptions(variant=variant))
    assert which(tmp_path / "out") == place
    if variant:
        assert len(inspect_all(path, ReadingOptions(variant=variant))) == 1
        assert main(["convert", str(path), str(tmp_path / "o"), "--to", "diffusers", "--variant", variant]) == 0
        assert main(["inspect", str(path), "--variant", variant]) == 0
        assert which(tmp_path / "o") == place


# Names in a folder, the variant that is asked for, and what the error says.
UNCLEAR: dict[str, tuple[tuple[str, ...], str | None, str]] = {
    "two variants": ((FP16, BF16), None, "several checkpoints: give the path of one, or the variant in its name"),
    "plain as a file and shards": ((PLAIN, INDEX), None, "expected one .safetensors file, or one index of shards"),
    "no such variant": ((PLAIN, FP16), "bf16", r"variant = 'bf16': expected one \*\.bf16\.safetensors or "),
    "a variant twice": ((FP16, f"{PLAIN}.index.fp16.json"), "fp16", "variant = 'fp16': expected one "),
    "no variant's name": ((INDEX,), "index", "variant = 'index': expected one "),
    "nothing": ((), None, "expected one .safetensors file, or one index of shards; found none"),
    "nothing, with a variant": ((), "fp16", "variant = 'fp16': expected one .* found none"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_one_checkpoint_is_an_error_that_lists_all(tmp_path: Path, case: str) -> None:
    names, variant, message = UNCLEAR[case]
    path = folder(tmp_path / "x", *names)
    with pytest.raises(CheckpointError, match=message) as caught:
        ltx2ref.load(path, variant=variant)
    assert all(name in str(caught.value) for name in names)


def test_a_variant_of_a_file_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", STATE)
    with pytest.raises(CheckpointError, match="variant = 'fp16' chooses in a folder, and this is a file"):
        ltx2ref.load(path, config=CONFIG, variant="fp16")


def test_a_folder_of_variants_is_described_line_by_line(tmp_path: Path) -> None:
    found = inspect_all(folder(tmp_path / "x", PLAIN, FP16, BF16))
    assert sorted(Path(d.path).name for d in found) == sorted([PLAIN, FP16, BF16])
    assert [d.problems for d in found] == [[]] * 3


@pytest.mark.diffusers
@pytest.mark.parametrize("size", ["10GB", "40KB"])
def test_variants_are_read_as_diffusers_writes_them(tmp_path: Path, size: str) -> None:
    from ltx2ref.parity.oracles.diffusers import build_diffusers

    values = {name: random_model(CONFIG, seed=seed).state_dict() for seed, name in enumerate(("", "fp16", "bf16"))}
    for variant, state in values.items():
        model: Any = build_diffusers(CONFIG.to_diffusers(), state, torch.float32)
        model.save_pretrained(tmp_path, variant=variant or None, max_shard_size=size)
    indices = [path.name for path in tmp_path.glob("*.index*")]
    assert sorted(indices) == ([] if size == "10GB" else sorted([INDEX, BF16, f"{PLAIN}.index.fp16.json"]))
    for variant, state in values.items():
        assert holds(ltx2ref.load(tmp_path, variant=variant or None), state)
