"""The writers of LoRAs in the table of scripts/writer_matrix.py, and what compares their files with what is read here.

Each writer changes the layers of a small model by random numbers, saves its file, and computes the changed weights
itself. ltx2ref loads the same model with that file, in float32, with strength 1.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ltx2ref
from ltx2ref.checkpoint.lora import read_lora
from ltx2ref.checkpoint.shapes import parameter_shapes
from ltx2ref.parity.cases import SMALL_RELEASES
from ltx2ref.parity.generator import weights
from ltx2ref.parity.oracles.diffusers import build_diffusers

State = Mapping[str, Tensor]
Writer = Callable[[Any, Path], State]  # changes a model of diffusers', saves to a path, returns the weights it means
CONFIG = replace(SMALL_RELEASES["2.3"], num_layers=2)
LAYERS = ["to_q", "to_out.0", "ff.net.2", "proj_in", "to_gate_logits"]


def peft(**options: Any) -> Writer:
    """Return a writer of PEFT's folders."""

    def write(model: Any, path: Path) -> State:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, lora_alpha=7, init_lora_weights=False, target_modules=LAYERS, **options)
        wrapped = get_peft_model(model, config)
        wrapped.save_pretrained(str(path))
        merged: State = wrapped.merge_and_unload().state_dict()
        return merged

    return write


def diffusers(**options: Any) -> Writer:
    """Return a writer of diffusers' `save_lora_weights`."""

    def write(model: Any, path: Path) -> State:
        from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        config = LoraConfig(r=4, lora_alpha=7, init_lora_weights=False, target_modules=LAYERS, **options)
        model.add_adapter(config)
        LTX2LoraLoaderMixin.save_lora_weights(
            path.parent,
            get_peft_model_state_dict(model),
            weight_name=path.name,
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
        model.fuse_lora()
        model.unload_lora()
        merged: State = model.state_dict()
        return merged

    return write


def lycoris(algorithm: str, **options: Any) -> Writer:
    """Return a writer of LyCORIS' files.

    The weights are those that its layers compute with. LyCORIS 4.1.3 merges a LoKr with the square of its factor.
    """

    def write(model: Any, path: Path) -> State:
        from lycoris import LycorisNetwork, create_lycoris  # type: ignore[import-not-found]

        LycorisNetwork.apply_preset({"target_module": ["Linear"], "target_name": [], "enable_conv": False})
        state = {name: x.detach().clone() for name, x in model.state_dict().items()}
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=7, algo=algorithm, **options)
        network.apply_to()  # only then its layers are in what it saves
        generator = torch.Generator().manual_seed(3)
        for module in network.loras:
            for x in module.parameters():
                x.data = torch.randn(x.shape, generator=generator) * 0.3
            name = next(name for name, layer in model.named_modules() if layer is module.org_module[0])
            changed = state[f"{name}.weight"]
            if algorithm == "full":
                state[f"{name}.weight"] = changed + (module.weight.data - module._org_weight[0])
                if module.bias is not None:
                    state[f"{name}.bias"] = state[f"{name}.bias"] + (module.bias.data - module.org_bias[0])
            else:
                delta = module.get_weight(changed.shape) if algorithm == "lokr" else module.get_diff_weight(1)[0]
                state[f"{name}.weight"] = changed + delta.detach()
        network.save_weights(str(path), torch.float32, {"ss_network_alpha": "7"})
        return state

    return write


LORA_WRITERS: dict[tuple[str, str], Writer] = {
    ("peft", "a folder"): peft(),
    ("peft", "a folder, ranks and alphas by patterns"): peft(
        rank_pattern={"proj_in": 3}, alpha_pattern={"attn2.to_q": 2, "^proj_in": 5}
    ),
    ("peft", "a folder, rank-stabilised"): peft(use_rslora=True),
    ("diffusers", "save_lora_weights"): diffusers(),
    ("diffusers", "save_lora_weights, rank-stabilised"): diffusers(use_rslora=True),
    ("lycoris-lora", "LoCon of Linear layers"): lycoris("locon"),
    ("lycoris-lora", "LoKr"): lycoris("lokr"),
    ("lycoris-lora", "LoKr, both sides in two"): lycoris("lokr", decompose_both=True, factor=4),
    ("lycoris-lora", "LoKr, both sides whole"): lycoris("lokr", full_matrix=True),
    ("lycoris-lora", "LoKr, rank-stabilised"): lycoris("lokr", rs_lora=True),
    ("lycoris-lora", "full differences"): lycoris("full"),
}


class Compared(NamedTuple):
    """How the weights that a writer means compare with those that ltx2ref loads from its file."""

    read_as: str
    changed: int  # weights
    differing: int
    error: float  # the largest difference of the differing ones, as a part of the weight's largest number


def compare(write: Writer) -> Compared:
    """Run a writer, load its file, and compare the weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        torch.manual_seed(1)
        reference: Any = build_diffusers(CONFIG.to_diffusers(), weights(parameter_shapes(CONFIG), 1), torch.float32)
        reference.save_pretrained(path)
        plain = {name: x.clone() for name, x in reference.state_dict().items()}
        saved = Path(folder) / "lora.safetensors"
        theirs = write(reference, saved)
        ours = ltx2ref.load(path, lora=[(saved, 1.0)]).state_dict()
        file = read_lora(saved)
    changed = sum(not torch.equal(theirs[name], x) for name, x in plain.items())
    same = sum(torch.equal(theirs[name], x) for name, x in ours.items())
    error = max(float((theirs[name] - x).abs().max() / theirs[name].abs().max()) for name, x in ours.items())
    return Compared(f"{file.format} LoRA, factors by {file.alphas}", changed, len(ours) - same, error)
