"""The model in the place where diffusers' pipelines expect their own: a thin shell that does not import diffusers.

    pipeline = LTX2Pipeline.from_pretrained("Lightricks/LTX-2", transformer=None)
    pipeline.transformer = for_diffusers(ltx2ref.load("ltx-2-19b-dev.safetensors"))

The model is set afterwards because `from_pretrained` accepts only diffusers' own classes as its argument.

LoRAs are loaded by `load`, not by the pipeline. What diffusers adds to its own models is missing: caches, offloading of
single layers, quantisation and context parallelism. `enable_model_cpu_offload` works as for any module.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .checkpoint.shell import without_values
from .config import TransformerConfig
from .interface import DIFFUSERS, Conventions, LTX2VideoTransformer3DModel
from .rope import audio_positions, video_positions


class Coordinates:
    """The part of diffusers' RoPE modules that pipelines call.

    It returns patch bounds in float32, equal over the batch.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self.config = config

    def prepare_video_coords(
        self,
        batch_size: int,
        num_frames: int,
        height: int,
        width: int,
        device: torch.device | None = None,
        fps: float = 24.0,
    ) -> Tensor:
        """Return the bounds of video patches (B, 3, T, 2) in seconds, pixels and pixels."""
        grid = num_frames, height, width
        coords = video_positions(grid, fps, self.config, device=device)
        return coords.repeat(batch_size, 1, 1, 1)

    def prepare_audio_coords(
        self, batch_size: int, num_frames: int, device: torch.device | None = None, shift: int = 0
    ) -> Tensor:
        """Return the bounds (B, 1, T, 2), in seconds, of `num_frames` latent frames, starting with number `shift`."""
        coords = audio_positions(num_frames, self.config, device=device, first=shift)
        return coords.repeat(batch_size, 1, 1, 1)


class PipelineTransformer(LTX2VideoTransformer3DModel):
    """The model with what diffusers' pipelines ask of a transformer beyond the documented `forward`."""

    def __init__(self, config: TransformerConfig, conventions: Conventions = DIFFUSERS) -> None:
        super().__init__(config, conventions)
        self.rope = self.audio_rope = Coordinates(config)

    def cache_context(self, name: str, **state: Any) -> AbstractContextManager[None]:
        """Return a context that does nothing, since there are no caches."""
        return nullcontext()

    def forward(
        self,
        *args: Any,
        video_self_attention_mask: Tensor | None = None,
        video_keyframes_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model with the documented arguments and the masks that newer versions of diffusers pass by name.

        The masks are moved to `attention_kwargs`, where the documented signature has them.
        """
        masks = {"video_self_attention_mask": video_self_attention_mask, "video_keyframes_mask": video_keyframes_mask}
        given = {name: mask for name, mask in masks.items() if mask is not None}
        if given:
            kwargs["attention_kwargs"] = (kwargs.get("attention_kwargs") or {}) | given
        return super().forward(*args, **kwargs)


def for_diffusers(model: LTX2VideoTransformer3DModel) -> PipelineTransformer:
    """Return the model for a diffusers pipeline. Parameters are shared, not copied."""
    shell = without_values(PipelineTransformer, model.config, model.conventions, model.streams)
    shell.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return shell.train(model.training)
