"""`from_pretrained` and `save_pretrained` take diffusers' keywords as diffusers does, or say why not.

pytest tests/checkpoint/test_pretrained.py
"""

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from tiny import random_inputs, random_model, tiny_config
from torch import nn

import ltx2ref
from ltx2ref import CheckpointError, LTX2VideoTransformer3DModel
from ltx2ref.checkpoint import keywords
from ltx2ref.parity.oracles.diffusers import build_diffusers

FROM = LTX2VideoTransformer3DModel.from_pretrained
SPLIT = "60KB"  # maximum size of a shard, so small that a tiny model has several


def taken(function: Any) -> set[str]:
    return {*inspect.signature(function).parameters} - {"self", "others"}


def keywords_of_diffusers() -> set[str]:
    """Return the keywords that diffusers' `from_pretrained` takes out of `kwargs`."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(ModelMixin.from_pretrained.__func__)))
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {ast.literal_eval(call.args[0]) for call in calls if ast.unparse(call.func) == "kwargs.pop"}


def same(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.fixture(scope="module")
def model() -> LTX2VideoTransformer3DModel:
    return random_model(tiny_config("2.5"))


@pytest.fixture(scope="module")
def folder(model: LTX2VideoTransformer3DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "transformer"
    model.save_pretrained(path)
    return path


# ---------------------------------------------------------------- the keywords
def test_each_keyword_of_diffusers_is_taken_or_refused_with_a_reason() -> None:
    loading = keywords_of_diffusers()
    assert len(loading) == 23 and keywords.LOADING.keys() == loading - taken(FROM)
    saving = taken(ModelMixin.save_pretrained) - {"kwargs"}
    assert keywords.SAVING.keys() == saving - taken(LTX2VideoTransformer3DModel.save_pretrained)


@pytest.mark.parametrize("name", keywords.LOADING)
def test_a_keyword_that_asks_for_what_is_not_done_is_refused(name: str, folder: Path) -> None:
    unsupported = keywords.LOADING[name]
    for value in (None, *unsupported.harmless):
        assert FROM(folder, **{name: value}).dtype == torch.float32
    for value in (True, False, "x", 1, {"a": 1}):
        if value not in unsupported.harmless:
            with pytest.raises(ValueError, match=rf"^{name} = .* is not supported: ") as error:
                FROM(folder, **{name: value})
            assert repr(value) in str(error.value) and unsupported.reason in str(error.value)


@pytest.mark.parametrize("name", keywords.SAVING)
def test_so_is_one_of_saving(name: str, model: LTX2VideoTransformer3DModel, tmp_path: Path) -> None:
    unsupported = keywords.SAVING[name]
    with pytest.raises(ValueError, match=rf"^{name} = 'x' is not supported: "):
        model.save_pretrained(tmp_path / "x", **{name: "x"})
    assert [*tmp_path.iterdir()] == []
    for i, value in enumerate((None, *unsupported.harmless)):
        model.save_pretrained(tmp_path / str(i), **{name: value})
        assert same(ltx2ref.load(tmp_path / str(i)), model)


def test_an_unknown_keyword_is_refused_with_those_that_exist(
    folder: Path, model: LTX2VideoTransformer3DModel, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=r"^num_layers: unknown keyword; expected one of path, subfolder, variant, "):
        FROM(folder, num_layers=1)
    with pytest.raises(TypeError, match=r"^dialect: unknown keyword; expected one of save_directory, max_shard_size$"):
        model.save_pretrained(tmp_path / "x", dialect="lightricks")


# ---------------------------------------------------------------- devices
@pytest.mark.parametrize(
    "given", ["cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}, "meta", {"": "meta"}]
)
def test_a_device_map_of_one_device_is_that_device(given: Any, folder: Path) -> None:
    expected = torch.device(given[""] if isinstance(given, dict) else given)
    assert FROM(folder, device_map=given).device == expected
    assert FROM(folder, device_map=given, device=expected).device == expected
    with pytest.raises(ValueError, match=r"^device = 'cuda:3' and device_map = .* mean the same"):
        FROM(folder, device="cuda:3", device_map=given)


@pytest.mark.parametrize("given", [*keywords.SHARING_OUT, {"": "cpu", "proj_in": "meta"}, {"proj_in": "cpu"}, {}])
def test_a_device_map_that_shares_the_model_out_is_refused(given: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^device_map = .* is not supported: the whole model goes to one device"):
        FROM(folder, device_map=given)


@pytest.mark.parametrize("name", ["device", "device_map"])
@pytest.mark.parametrize("value", ["gpu", "", -1, 1.5])
def test_what_is_no_device_is_refused(name: str, value: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{name} = {value!r}: expected a device, such as "):
        FROM(folder, **{name: value})


# ---------------------------------------------------------------- saved folders
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["10GB", SPLIT, 60_000, None])
def test_diffusers_loads_what_save_pretrained_writes(size: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3"), dtype)
    model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2 if size in (SPLIT, 60_000) else files == ["diffusion_pytorch_model.safetensors"]
    reference: Any = diffusers.LTX2VideoTransformer3DModel.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    assert same(reference, model) and same(FROM(tmp_path / "saved"), model)
    assert all(reference.config[name] == value for name, value in model.config.to_diffusers().items())


def test_the_size_of_a_file_defaults_to_that_of_diffusers() -> None:
    ours = inspect.signature(LTX2VideoTransformer3DModel.save_pretrained).parameters["max_shard_size"]
    assert ours.default == inspect.signature(ModelMixin.save_pretrained).parameters["max_shard_size"].default


def test_a_folder_that_exists_is_not_touched(model: LTX2VideoTransformer3DModel, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="exists already"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---------------------------------------------------------------- variants
@pytest.mark.parametrize("size", ["10GB", SPLIT])
def test_a_variant_is_read_as_diffusers_writes_it(size: str, tmp_path: Path) -> None:
    plain, other = (random_model(tiny_config("2.5", causal_offset=2), seed=seed) for seed in (1, 2))
    for model, variant in ((plain, None), (other, "fp16")):
        reference: Any = build_diffusers(model.config.to_diffusers(), model.state_dict(), torch.float32)
        reference.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    loaded = FROM(tmp_path, variant="fp16")
    assert same(loaded, other) and not same(loaded, plain) and loaded.config == other.config
    inputs = random_inputs(other.config)
    with torch.no_grad():
        assert all(map(torch.equal, loaded(**inputs), other(**inputs)))


def test_a_variant_that_is_not_there_is_an_error_that_names_its_files(folder: Path) -> None:
    expected = "variant = 'fp16': expected one *.fp16.safetensors or *.safetensors.index.fp16.json; found diffusion_"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        FROM(folder, variant="fp16")


def test_a_revision_and_a_variant_of_a_repository_are_taken_from_the_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--Lightricks--LTX-2"
    commits = {"main": "0" * 40, "other": "1" * 40}
    models = {name: random_model(tiny_config("2.0"), seed=seed) for seed, name in enumerate(commits)}
    (repository / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        (repository / "refs" / name).write_text(commit)
        saved = repository / "snapshots" / commit / "transformer"
        saved.parent.mkdir(parents=True)
        models[name].save_pretrained(saved)
        (saved / "diffusion_pytorch_model.safetensors").rename(saved / "diffusion_pytorch_model.bf16.safetensors")
    given: dict[str, Any] = {"subfolder": "transformer", "cache_dir": tmp_path, "local_files_only": True}
    for revision in (None, *commits, *commits.values()):
        expected = models["other" if revision in ("other", "1" * 40) else "main"]
        assert same(FROM("Lightricks/LTX-2", revision=revision, variant="bf16", **given), expected)


def test_of_a_variant_no_other_weights_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fnmatch import fnmatch

    import huggingface_hub

    patterns: list[str] = []

    def fetched(repository: str, **options: Any) -> str:
        patterns.extend(options["allow_patterns"])
        assert options["revision"] == "v1"
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    with pytest.raises(CheckpointError):
        FROM("a/b", subfolder="transformer", variant="fp16", revision="v1")
    names = [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
    ]
    assert [any(fnmatch(f"transformer/{name}", x) for x in patterns) for name in names] == 4 * [True] + 2 * [False]


def test_an_index_of_shards_can_be_loaded_by_its_path(model: LTX2VideoTransformer3DModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", max_shard_size=SPLIT)
    index = tmp_path / "saved" / "diffusion_pytorch_model.safetensors.index.json"
    variant = index.with_name("diffusion_pytorch_model.safetensors.index.a.json")
    variant.write_text(index.read_text(encoding="utf-8"), encoding="utf-8")
    for path in (index, variant):
        assert same(ltx2ref.load(path, config=model.config), model)
    shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    assert len(shards) > 2
