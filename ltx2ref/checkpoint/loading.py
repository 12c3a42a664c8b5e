"""A checkpoint becomes a model: the whole of it, or a `CheckpointError` and nothing."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import interface
from ..config import TransformerConfig
from ..interface import DIFFUSERS, Conventions
from ..progress import track
from .hub import local_folder
from .lora import Lora, merged, read_lora, require_strengths
from .match import Plan, make_plan
from .quantised import Nibbles
from .storage import TORCH

log = logging.getLogger("ltx2ref")


class LTX2VideoTransformer3DModel(interface.LTX2VideoTransformer3DModel):
    """The LTX-2 audio-video diffusion transformer, releases 2.0, 2.3 and 2.5, under diffusers' names."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        subfolder: str = "",
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        conventions: Conventions = DIFFUSERS,
    ) -> "LTX2VideoTransformer3DModel":
        """`load` under the documented name, for a local file or folder or a repository on the Hugging Face hub.

        Without a dtype the file's own is kept, where diffusers converts to float32. Raises `ValueError` if
        `torch_dtype` and `dtype`, which mean the same, differ, and for a hub id without the extra `hub`.
        """
        if None not in (torch_dtype, dtype) and torch_dtype != dtype:
            raise ValueError(f"torch_dtype = {torch_dtype} and dtype = {dtype} mean the same: expected one of them")
        folder = local_folder(path, subfolder, revision, cache_dir, local_files_only)
        return load(folder, dtype=dtype or torch_dtype, device=device, conventions=conventions)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: TransformerConfig | None = None,
    nibbles: Nibbles | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    conventions: Conventions = DIFFUSERS,
) -> LTX2VideoTransformer3DModel:
    """The model in a checkpoint of any published dialect and format, strictly, in evaluation mode.

    `path` is a .safetensors or .gguf file, or a folder with one, or with an index of shards. `dtype` None is that
    of the Linear layers' weights; then tables are converted to it, too. Tensors that are stored in `dtype` stay
    memory-mapped on the CPU: the file must not shrink while the model lives. All others are decoded one by one.
    `config` replaces what the file says of itself. `nibbles`, "high" or "low": the NVFP4 code of a byte that comes
    first, for files that do not say it. Facts that were assumed are logged as warnings of the logger "ltx2ref".
    `lora` are files and strengths: each weight gets its LoRAs added in float32, and is rounded once.
    `conventions` are diffusers' unless the model is to compute as ltx-core does (`ltx2ref.LTX_CORE_2026_08`).
    Raises `CheckpointError`, with all problems, for anything that is not one whole model, or a LoRA for another one.
    """
    recipe = prepare(path, dtype, config, nibbles, lora, conventions)
    state = read_state(recipe, torch.device(device))
    with torch.device("meta"):
        result = LTX2VideoTransformer3DModel(recipe.plan.config, conventions)
    result.load_state_dict(state, strict=True, assign=True)
    return result.eval()


class Recipe(NamedTuple):
    """How a checkpoint's parameters are read."""

    plan: Plan
    loras: list[tuple[Lora, float]]
    dtype: torch.dtype


def prepare(
    path: str | Path,
    dtype: torch.dtype | None,
    config: TransformerConfig | None,
    nibbles: Nibbles | None,
    lora: Sequence[tuple[str | Path, float]],
    conventions: Conventions,
) -> Recipe:
    """The arguments of `load`, checked against the headers."""
    if not isinstance(conventions, Conventions):
        raise ValueError(f"conventions: expected ltx2ref.Conventions, got {conventions!r}")
    if dtype is not None and dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
    require_strengths(lora)
    plan = make_plan(path, config, nibbles)
    plan.check()
    for note in plan.notes:
        log.warning("%s: %s", plan.source.path, note)
    loras = [(read_lora(file, plan), strength) for file, strength in lora]
    for change, strength in loras:
        log.info("%s, strength %g", change, strength)
    return Recipe(plan, loras, dtype or linear_dtype(plan))


def read_state(recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    """All parameters, one at a time."""
    plan, loras, dtype = recipe
    state = {
        name: merged(name, plan.weights[name], loras, dtype).to(device)
        for name in track(list(plan.weights), f"loading {plan.source.path.name}")
    }
    for file in plan.source.files:
        file.open().close()  # raises if it changed: then mapped tensors are not what they were
    return state


def linear_dtype(plan: Plan) -> torch.dtype:
    """The commonest dtype of the Linear layers' weights by elements, if few are quantised; else bfloat16.

    Quantisers leave some small layers as they were, in bfloat16, and GGUF files widen them to float32.
    """
    elements: Counter[str] = Counter()
    for name, weight in plan.weights.items():
        if name.endswith(".weight") and len(weight.shape) == 2:
            elements[plan.formats[name]] += torch.Size(weight.shape).numel()
    return TORCH.get(elements.most_common(1)[0][0], torch.bfloat16)
