"""Loading: a checkpoint becomes a whole model, or raises `CheckpointError` with all its problems."""

import inspect
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import interface
from ..config import TransformerConfig
from ..interface import DIFFUSERS, Conventions
from ..printable import printable
from ..progress import track
from .hub import local_folder
from .keywords import LOADING, SAVING, Device, one_device, refuse_keywords
from .lora import Lora, merged, read_lora, require_strengths
from .match import Plan, make_plan
from .quantised import Nibbles, ScaleOrder
from .save import save
from .settle import ReadingOptions
from .shell import fill, without_values
from .storage import TORCH_NAMES, require_unchanged, torch_dtype
from .streams import StreamName

log = logging.getLogger("ltx2ref")


class LTX2VideoTransformer3DModel(interface.LTX2VideoTransformer3DModel):
    """The documented class (interface.py) with `from_pretrained` and `save_pretrained`: what `load` returns."""

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: Device | None = None,
        device_map: Device | Mapping[str, Device] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool | None = None,
        streams: StreamName | None = None,
        conventions: Conventions = DIFFUSERS,
        **others: Any,
    ) -> "LTX2VideoTransformer3DModel":
        """Load a model from a local file or folder, or from a repository on the Hugging Face hub.

        This is `load` under the name that diffusers documents. Without a dtype the file's own dtype is kept, whereas
        diffusers converts to float32. `variant` chooses among several weights in one folder: "fp16" means the file
        diffusion_pytorch_model.fp16.safetensors, or the index of shards with "fp16" in its name. `revision` is a
        branch, a tag or a commit on the hub. `streams` is that of `load`. The other keywords of diffusers (`others`)
        are refused where they ask for anything that is not done.

        Raises `CheckpointError` as `load` does and for a repository that cannot be fetched, and `ValueError` for a
        refused keyword, for a `device_map` that is not one device, and if `torch_dtype` and `dtype`, or `device` and
        `device_map`, differ, because they mean the same. Raises `TypeError` for an unknown keyword.
        """
        taken = inspect.signature(cls.from_pretrained).parameters
        refuse_keywords(others, LOADING, [name for name in taken if name != "others"])
        if None not in (torch_dtype, dtype) and torch_dtype != dtype:
            raise ValueError(f"torch_dtype = {torch_dtype} and dtype = {dtype} mean the same: expected one of them")
        device = one_device(device, device_map)
        folder = local_folder(path, subfolder or "", variant, revision, cache_dir, bool(local_files_only))
        dtype = dtype or torch_dtype
        return load(folder, dtype=dtype, device=device, variant=variant, streams=streams, conventions=conventions)

    def save_pretrained(
        self, save_directory: str | Path, *, max_shard_size: int | str | None = "10GB", **others: Any
    ) -> None:
        """Write a new folder, as diffusers reads it. `ltx2ref.save` says what is checked, and how it is written.

        Raises `CheckpointError` if the folder exists, which diffusers would write into, `ValueError` for keywords of
        diffusers (`others`) that ask for what is not done, and `TypeError` for unknown ones.
        """
        refuse_keywords(others, SAVING, ["save_directory", "max_shard_size"])
        save(self, save_directory, max_shard_size=max_shard_size)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: TransformerConfig | None = None,
    nibbles: Nibbles | None = None,
    scales: ScaleOrder | None = None,
    prefix: str | None = None,
    variant: str | None = None,
    streams: StreamName | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    conventions: Conventions = DIFFUSERS,
) -> LTX2VideoTransformer3DModel:
    """Load the model from a checkpoint of any published dialect and format, strictly, in evaluation mode.

    - `path`: a .safetensors or .gguf file, or a folder that holds one such file or an index of shards.
    - `dtype`: that of the result. None keeps the dtype of the Linear layers' weights; tables are converted to it, too.
    - `device`: where the parameters are placed.
    - `config`: replaces what the file says of itself.
    - `nibbles`: which of two codes in a byte comes first, the "high" or the "low" one, for files that do not say so.
    - `scales`: whether scales of blocks are "tiled" for cuBLAS or "flat", for files that do not say so.
    - `prefix`: what all names in the file begin with, where that is none of the usual prefixes ("module." and so on).
    - `variant`: which of several checkpoints in a folder, by the part of its name in front of the last dot: "fp16".
    - `streams`: "video" or "audio" reads what that stream needs when it is alone, and nothing else. None reads all.
    - `lora`: pairs of a file and a strength. LoRAs are added to each weight in float32, and the sum is rounded once.
    - `conventions`: diffusers' by default; `ltx2ref.LTX_CORE_2026_08` makes the model compute as ltx-core does.

    On the CPU, tensors that are stored in `dtype` stay memory-mapped, so the file must not shrink while the model
    lives. All others are decoded one at a time. Assumptions about the file are logged as warnings by "ltx2ref".

    A file that holds one stream alone makes a model of that stream: all calls have to leave the other one out.

    Raises `CheckpointError`, with all problems, unless the file holds exactly one whole model, or all of one of its
    streams, and each LoRA fits it.
    """
    options = ReadingOptions(config, nibbles, scales, prefix, variant, streams)
    recipe = prepare(path, dtype, options, lora, conventions)
    state = read_state(recipe, torch.device(device))
    result = without_values(LTX2VideoTransformer3DModel, recipe.plan.config, conventions, recipe.plan.streams)
    fill(result, state)
    return result.eval()


class Recipe(NamedTuple):
    """A plan for reading the parameters of a checkpoint, with the LoRAs to merge and the resulting dtype."""

    plan: Plan
    loras: list[tuple[Lora, float]]
    dtype: torch.dtype


def prepare(
    path: str | Path,
    dtype: torch.dtype | None,
    options: ReadingOptions,
    lora: Sequence[tuple[str | Path, float]],
    conventions: Conventions,
) -> Recipe:
    """Check the arguments of `load` against the headers. Raises `ValueError` and `CheckpointError`."""
    if not isinstance(conventions, Conventions):
        raise ValueError(f"conventions: expected ltx2ref.Conventions, got {conventions!r}")
    if dtype is not None and dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected float64, float32, bfloat16 or float16, got {dtype}")
    require_strengths(lora)
    plan = make_plan(path, options)
    plan.check()
    for note in plan.notes:
        log.warning("%s: %s", plan.source.path, printable(note))
    loras = [(read_lora(file, plan), strength) for file, strength in lora]
    for change, strength in loras:
        log.info("%s, strength %g", change, strength)
        for note in change.notes:
            log.warning("%s: %s", change.path, printable(note))
    return Recipe(plan, loras, dtype or linear_dtype(plan))


def read_state(recipe: Recipe, device: torch.device) -> dict[str, Tensor]:
    """Read all parameters, one at a time, onto a device."""
    plan, loras, dtype = recipe
    state = {
        name: merged(name, plan.weights[name], loras, dtype).to(device)
        for name in track(list(plan.weights), f"loading {plan.source.path.name}")
    }
    require_unchanged(plan.source.files)  # mapped tensors of a file that changed hold other values
    return state


def linear_dtype(plan: Plan) -> torch.dtype:
    """Return the dtype that most elements of the Linear layers have, or bfloat16 if that is a quantised format.

    Tables and biases are not counted, because quantisers leave some small layers in bfloat16 and GGUF files widen them
    to float32.
    """
    elements: Counter[str] = Counter()
    for name, weight in plan.weights.items():
        if name.endswith(".weight") and len(weight.shape) == 2:
            elements[plan.formats[name]] += torch.Size(weight.shape).numel()
    most = elements.most_common(1)[0][0]
    return torch_dtype(most) if most in TORCH_NAMES else torch.bfloat16
