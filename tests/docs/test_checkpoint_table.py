"""Every line of the first table in docs/checkpoints.md loads a small file of that kind, and `inspect` says its words.

pytest tests/docs/test_checkpoint_table.py
"""

import ast
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import writers
from safetensors.torch import save_file
from tiny import random_model
from torch import Tensor

import ltx2ref
from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig
from ltx2ref.checkpoint.inspection import inspect
from ltx2ref.checkpoint.settle import ReadingOptions
from ltx2ref.checkpoint.streaming import StreamedTransformer

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
State = dict[str, Tensor]
Make = Callable[[Path, State, TransformerConfig], Any]
LORA_LAYER, RANK = "transformer_blocks.0.attn1.to_q", 2


def rows() -> list[list[str]]:
    """Return the cells of the table below the first heading."""
    text = PAGE.read_text(encoding="utf-8").partition("## Which line loads it")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def lines() -> dict[str, str]:
    """Return what a row says, by the line of code in it."""
    return {code[1]: " ".join(row) for row in rows() if (code := re.fullmatch(r"`(ltx2ref\..*)`", row[2]))}


@cache
def small(release: str) -> tuple[TransformerConfig, Mapping[str, Tensor]]:
    config = writers.quantisable_config(release, num_layers=1)
    return config, {name: x.detach() for name, x in random_model(config).state_dict().items()}


def encoded(encode: writers.Encoder, **options: Any) -> Make:
    """Return a writer of files whose quantised layers an encoder makes."""
    return lambda path, state, config: writers.write_layers(path, state, config, encode=encode, **options)


def wrapped(path: Path, state: State, config: TransformerConfig) -> None:
    named = {f"velocity_model.{writers.original_name(name)}": x for name, x in state.items()}
    writers.save(path, named, writers.lightricks_metadata(config))


def variants(path: Path, state: State, config: TransformerConfig) -> None:
    other = {name: x + 1 for name, x in state.items()}
    writers.write_diffusers(path, state, config)
    plain = path / "diffusion_pytorch_model.safetensors"
    plain.rename(path / "diffusion_pytorch_model.fp16.safetensors")
    save_file(other, path / "diffusion_pytorch_model.bf16.safetensors")


def factors(state: State) -> tuple[Tensor, Tensor]:
    out, columns = state[f"{LORA_LAYER}.weight"].shape
    return torch.full((RANK, columns), 0.1), torch.full((out, RANK), 0.1)


def lightricks_lora(path: Path, state: State, config: TransformerConfig) -> None:
    a, b = factors(state)
    save_file({f"diffusion_model.{LORA_LAYER}.lora_{part}.weight": x for part, x in (("A", a), ("B", b))}, path)


def kohya_lora(path: Path, state: State, config: TransformerConfig) -> None:
    a, b = factors(state)
    name = f"lora_unet_{LORA_LAYER.replace('.', '_')}"
    save_file({f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(2.0)}, path)


def peft_folder(path: Path, state: State, config: TransformerConfig) -> None:
    a, b = factors(state)
    path.mkdir()
    named = {f"base_model.model.{LORA_LAYER}.lora_{part}.weight": x for part, x in (("A", a), ("B", b))}
    save_file(named, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2}))


# How each file in the table is made, and the release that it is of.
FILES: dict[str, tuple[Make, str]] = {
    "ltx-2.3-22b-dev.safetensors": (writers.write_single_file, "2.3"),
    "ltx-2.5-22b-dev-transformer-bf16.safetensors": (writers.write_split, "2.5"),
    "ltx-2-19b-dev_transformer_only_bf16.safetensors": (writers.write_transformer_only, "2.0"),
    "transformer.safetensors": (writers.write_transformer_only, "2.3"),
    "ltx-2.3-22b-dev-fp8.safetensors": (writers.write_fp8_scaled, "2.3"),
    "ltx-2.3-22b-dev_transformer_only_fp8_scaled.safetensors": (writers.write_fp8_new_comfy, "2.3"),
    "ltx-2.5-22b-distilled-transformer-fp8_e4m3fn.safetensors": (writers.write_fp8_cast, "2.5"),
    "ltx-2.5-22b-dev-transformer-comfy-int8-convrot.safetensors": (writers.write_int8_convrot, "2.5"),
    "ltx-2.5-22b-distilled-transformer-nvfp4.safetensors": (writers.write_nvfp4, "2.5"),
    "torchao-nvfp4.safetensors": (writers.write_nvfp4_torchao, "2.5"),
    "modelopt-nvfp4.safetensors": (
        encoded(writers.encode_modelopt_nvfp4, metadata={"quantization_config": json.dumps(writers.modelopt_config())}),
        "2.5",
    ),
    "unknown-nvfp4.safetensors": (encoded(writers.encode_modelopt_nvfp4, entry={"format": "nvfp4"}), "2.5"),
    "ltx-2.3-22b-distilled-1.1_transformer_only_mxfp8_block32.safetensors": (
        encoded(writers.encode_mxfp8({}), metadata={}),
        "2.3",
    ),
    "ltx-2.3-22b-dev_diffusion_model_quanto_int8.safetensors": (encoded(writers.encode_quanto, metadata={}), "2.3"),
    "convrot-w4a4.safetensors": (encoded(writers.encode_w4a4, metadata={}), "2.5"),
    "ltx-2.5-22b-distilled-transformer-w4a8_convrot.safetensors": (encoded(writers.encode_w4a8(), metadata={}), "2.5"),
    "bitsandbytes-nf4.safetensors": (encoded(writers.encode_nf4(), metadata={}), "2.5"),
    "mlx-q8.safetensors": (encoded(writers.encode_mlx(8), metadata={}), "2.5"),
    "ltx-2.3-22b-dev-Q8_0.gguf": (writers.write_gguf, "2.3"),
    "transformer/": (writers.write_diffusers, "2.3"),
    "Lightricks/LTX-2": (lambda path, state, config: None, "2.0"),
    "fastvideo/": (writers.write_fastvideo, "2.3"),
    "variants/": (variants, "2.3"),
    "finetuned.safetensors": (wrapped, "2.3"),
    "ltx-2.3-22b-distilled-lora-384.safetensors": (lightricks_lora, "2.3"),
    "kohya.safetensors": (kohya_lora, "2.3"),
    "adapter/": (peft_folder, "2.3"),
}


def paths_in(code: str) -> list[str]:
    """Return the files that a line of code names."""
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    return [text for text in texts if text in FILES]


@pytest.mark.parametrize("code", lines())
def test_the_line_loads_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.chdir(tmp_path)
    names = paths_in(code)
    make, release = FILES[names[0]]
    config, values = small(release)
    truth = make(Path(names[0]), dict(values), config) or dict(values)
    for name in names[1:]:
        FILES[name][0](Path(name), dict(values), config)
    if "from_pretrained" in code:
        writers.write_diffusers(Path("snapshot/transformer"), dict(values), config)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **options: "snapshot")
    model = eval(code, {"ltx2ref": ltx2ref})
    assert isinstance(model, StreamedTransformer if ".stream(" in code else LTX2VideoTransformer3DModel)
    found = dict(model.named_parameters())
    if names[1:]:
        a, b = factors(dict(values))
        truth[f"{LORA_LAYER}.weight"] = truth[f"{LORA_LAYER}.weight"].float() + b @ a
    for name, x in found.items():
        if not x.is_meta:
            wanted = truth[name].float()
            assert (x.float() - wanted).abs().max() <= 2**-7 * wanted.abs().max(), name
    assert "streams" in code or found.keys() == truth.keys()
    if names[0] != "Lightricks/LTX-2":
        options = {k.arg: ast.literal_eval(k.value) for k in ast.parse(code).body[0].value.keywords}  # type: ignore[attr-defined]
        d = inspect(names[0], ReadingOptions(**{key: options[key] for key in ReadingOptions._fields if key in options}))
        assert (d.kind, d.release, d.problems) == ("transformer", release, [])
        said = {row["format"] for row in d.formats}
    for words in re.findall(r'"([^"]+)"', lines()[code].partition("`ltx2ref.")[0]):
        assert words in (said if not names[1:] else {inspect(names[-1]).kind}), words


def test_every_kind_of_file_has_a_line_that_is_run() -> None:
    assert len(lines()) >= 29
    assert {name for code in lines() for name in paths_in(code)} == FILES.keys()
    without = [row for row in rows() if not row[2].startswith("`")]
    assert [row[2][:4] for row in without] == ["none"] * 2
