"""What users of diffusers reach for on a model, its config and its output, answers as it does there.

pytest tests/model/test_at_home.py
"""

import copy
import pickle
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from tiny import random_model, tiny_config
from torch import Tensor, nn

from ltx2ref import (
    DIFFUSERS,
    LTX_2_3,
    LTX_2_5,
    LTX_CORE_2026_08,
    AudioVisualModelOutput,
    ConfigError,
    LTX2VideoTransformer3DModel,
    TransformerConfig,
    interface,
)

releases = pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])


def theirs(config: TransformerConfig) -> Any:
    with torch.device("meta"):
        return diffusers.LTX2VideoTransformer3DModel(**config.to_diffusers())


# ---------------------------------------------------------------- the config
@releases
def test_the_config_answers_for_every_field_of_diffusers(release: str) -> None:
    ours = tiny_config(release)
    reference = theirs(ours).config
    fields = [name for name in reference if not name.startswith("_")]
    assert len(fields) == 46 and sorted(ours) == sorted(fields) and len(ours) == 46
    for name in fields:
        expected = as_tuple(reference[name])
        assert ours[name] == getattr(ours, name) == ours.get(name) == ours.get(name, 3) == expected, name
        assert name in ours and type(ours[name]) is type(expected), name


def as_tuple(value: Any) -> Any:
    """Turn a list, which JSON has, into a tuple, which a config has."""
    return tuple(value) if isinstance(value, list) else value


def test_the_config_is_a_mapping() -> None:
    as_dict = dict(LTX_2_5)
    assert isinstance(LTX_2_5, Mapping) and as_dict == {**LTX_2_5} == dict(LTX_2_5.items())
    assert as_dict | {"vae_scale_factors": [8, 32, 32]} == LTX_2_5.to_diffusers()
    assert [*LTX_2_5.keys()] == [*LTX_2_5] and [*LTX_2_5.values()] == [*as_dict.values()]
    assert TransformerConfig.from_diffusers(LTX_2_5) == LTX_2_5


def test_a_field_that_does_not_exist_is_an_error_or_the_default() -> None:
    assert LTX_2_5.get("use_tread") is None and LTX_2_5.get("use_tread", 3) == 3 and "use_tread" not in LTX_2_5
    with pytest.raises(KeyError, match="use_tread"):
        LTX_2_5["use_tread"]
    with pytest.raises(AttributeError, match="TransformerConfig has no attribute 'use_tread'"):
        LTX_2_5.use_tread  # type: ignore[attr-defined]  # noqa: B018


def test_configs_are_compared_and_hashed_by_their_fields_and_are_no_dicts() -> None:
    same = TransformerConfig(**asdict(LTX_2_3))
    assert same == LTX_2_3 and hash(same) == hash(LTX_2_3) and {same: 1}[LTX_2_3] == 1
    assert LTX_2_3 != LTX_2_5 and replace(LTX_2_3, num_layers=1) != LTX_2_3
    assert dict(LTX_2_3) != LTX_2_3
    for again in (copy.deepcopy(LTX_2_3), copy.copy(LTX_2_3), pickle.loads(pickle.dumps(LTX_2_3))):
        assert again == LTX_2_3 and again["patch_size"] == again.patch_size == 1


# ---------------------------------------------------------------- a model by keyword
@pytest.mark.parametrize(
    "keywords",
    [
        {"num_layers": 2},
        {"num_layers": 1, "gated_attn": True, "vae_scale_factors": [4, 16, 8], "patch_size": 1},
        {**tiny_config("2.5")},
        tiny_config("2.0").to_diffusers() | {"_class_name": "LTX2VideoTransformer3DModel"},
    ],
    ids=["a-field", "fields", "a-config", "a-config-json"],
)
def test_fields_by_keyword_make_the_model_that_they_make_in_diffusers(keywords: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(**keywords)
        public = {name: value for name, value in keywords.items() if not name.startswith("_")}
        reference = diffusers.LTX2VideoTransformer3DModel(**public)
    assert shapes(model) == shapes(reference)
    assert all(model.config[name] == as_tuple(value) for name, value in public.items())
    assert model.config["rope_type"] == reference.config["rope_type"]


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in model.state_dict().items()}


def test_without_arguments_the_model_has_the_defaults_of_the_config() -> None:
    with torch.device("meta"):
        assert LTX2VideoTransformer3DModel().config == TransformerConfig()


def test_a_config_is_taken_by_position_or_by_name_with_conventions() -> None:
    config = tiny_config("2.5", num_layers=1)
    with torch.device("meta"):
        assert LTX2VideoTransformer3DModel(config).config is LTX2VideoTransformer3DModel(config=config).config is config
        assert LTX2VideoTransformer3DModel(config, LTX_CORE_2026_08).conventions == LTX_CORE_2026_08
        by_keyword = LTX2VideoTransformer3DModel(conventions=LTX_CORE_2026_08, **config)
    assert by_keyword.config == config and by_keyword.conventions == LTX_CORE_2026_08 != DIFFUSERS


def test_what_makes_no_model_is_refused_by_name() -> None:
    make = LTX2VideoTransformer3DModel
    with pytest.raises(TypeError, match=r"^config: expected a config or its fields, got both: num_layers$"):
        make(tiny_config("2.0"), num_layers=2)
    with pytest.raises(TypeError, match=r"^num_layer: no such field of a config; there are .*num_layers, .*patch_size"):
        make(num_layer=2)
    with pytest.raises(TypeError, match=r"^config: expected a TransformerConfig, .* got dict$"):
        make(dict(tiny_config("2.0")))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^patch_size = 2 "):
        make(patch_size=2)
    with pytest.raises(ConfigError, match=r"^num_layers = 0 "):
        make(num_layers=0)


# ---------------------------------------------------------------- the model
@releases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_device_dtype_and_number_of_parameters_are_those_of_diffusers(release: str, dtype: torch.dtype) -> None:
    model = random_model(tiny_config(release)).to(dtype)
    reference = theirs(model.config).to(dtype)
    assert model.dtype == reference.dtype == dtype and model.device == torch.device("cpu")
    assert model.num_parameters() == reference.num_parameters() == sum(x.numel() for x in model.parameters())
    for x in (model, reference):
        x.requires_grad_(False)
        x.transformer_blocks[1].requires_grad_(True)
    trained = model.num_parameters(only_trainable=True)
    assert 0 < trained == reference.num_parameters(only_trainable=True) < model.num_parameters()
    model.to("meta")
    assert model.device == reference.device == torch.device("meta") and model.num_parameters() > trained


# ---------------------------------------------------------------- the output
def test_the_output_answers_like_that_of_diffusers() -> None:
    video, audio = torch.zeros(1), torch.ones(1)
    ours = AudioVisualModelOutput(video, audio)
    reference = theirs_of_two(video, audio)
    for output in (ours, reference):
        assert [*output.keys()] == ["sample", "audio_sample"] and len(output) == 2
        assert [*map(id, output.values())] == [id(video), id(audio)]
        assert [(name, id(x)) for name, x in output.items()] == [("sample", id(video)), ("audio_sample", id(audio))]
        assert "sample" in output and "audio_sample" in output and "count" not in output
        assert output["sample"] is output[0] is output.sample is dict(output)["sample"] is {**output}["sample"]
        assert output[:2] == output.to_tuple() == (video, audio)
        for missing in ("count", "video"):  # `count` is an attribute of every tuple
            with pytest.raises(KeyError, match=missing):
                output[missing]


def theirs_of_two(video: Tensor, audio: Tensor) -> Any:
    kind: Any = diffusers.models.transformers.transformer_ltx2.AudioVisualModelOutput
    assert issubclass(kind, type(Transformer2DModelOutput(sample=video)).__mro__[1])
    return kind(sample=video, audio_sample=audio)


def test_the_output_is_a_tuple_that_unpacks() -> None:
    video, audio = torch.zeros(1), torch.ones(1)
    first, second = AudioVisualModelOutput(video, audio)
    assert first is video and second is audio


# ---------------------------------------------------------------- where it lives
def test_the_documented_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "using.md").read_text(encoding="utf-8")
    block = text.partition("## What you know from diffusers")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"LTX2VideoTransformer3DModel": LTX2VideoTransformer3DModel, "torch": torch}
    exec(block, names)
    assert isinstance(model := names["model"], LTX2VideoTransformer3DModel)
    assert model.config == TransformerConfig(**names["sizes"]) and model.dtype == torch.bfloat16


def test_the_model_without_the_checkpoint_layer_has_all_of_this_but_files() -> None:
    alone = {*dir(interface.LTX2VideoTransformer3DModel)}
    assert {"device", "dtype", "num_parameters"} <= alone
    assert {*dir(LTX2VideoTransformer3DModel)} - alone == {"from_pretrained", "save_pretrained"}
