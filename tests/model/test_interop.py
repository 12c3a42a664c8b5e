"""diffusers' own pipelines compute the same latents, bit for bit, with our transformer as with theirs.

pytest tests/model/test_interop.py
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from tiny import random_model, tiny_config
from torch import Tensor

from ltx2ref import TransformerConfig
from ltx2ref.interop import PipelineTransformer, for_diffusers
from ltx2ref.parity.oracles.diffusers import build_diffusers

pytestmark = pytest.mark.slow

CHANNELS = 16  # channels of both streams; those of audio are 8 in 2 bins
CAPTION, LAYERS = 16, 3  # features of the text encoder, and the number of its layers
HEIGHT, WIDTH, FRAMES = 64, 96, 17  # 3 x 2 x 3 latent tokens


def config(release: str, **changes: Any) -> TransformerConfig:
    sizes: dict[str, Any] = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "audio_in_channels": 16,
        "audio_out_channels": 16,
        "num_attention_heads": 2,
        "attention_head_dim": 26,
        "cross_attention_dim": 52,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 14,
        "audio_cross_attention_dim": 28,
        "caption_channels": CAPTION,
        "num_layers": 3,
    }
    return tiny_config(release, **sizes | changes)


def seeded(make: Any, **sizes: Any) -> torch.nn.Module:
    torch.manual_seed(7)
    module: torch.nn.Module = make(**sizes).eval().requires_grad_(False)
    return module


def components(release: str) -> dict[str, Any]:
    """Return everything but the transformer, made from diffusers' own classes, tiny and random."""
    c = config(release)
    dims = (
        {}
        if c.use_prompt_embeddings
        else {
            "per_modality_projections": True,
            "video_hidden_dim": c.video.dim,
            "audio_hidden_dim": c.audio.dim,
            "proj_bias": True,
            "video_gated_attn": True,
            "audio_gated_attn": True,
        }
    )
    width = (CAPTION, CAPTION) if c.use_prompt_embeddings else (c.video.dim, c.audio.dim)
    vae: Any = seeded(
        diffusers.AutoencoderKLLTX2Video,
        latent_channels=CHANNELS,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio_vae: Any = seeded(
        diffusers.AutoencoderKLLTX2Audio,
        base_channels=16,
        num_res_blocks=1,
        ch_mult=(1, 1, 1),
        latent_channels=8,
        mel_bins=8,
    )
    for x in (vae, audio_vae):  # statistics other than 0 and 1
        x.latents_mean.copy_(torch.linspace(-1, 1, len(x.latents_mean)))
        x.latents_std.copy_(torch.linspace(0.5, 2, len(x.latents_std)))
    return {
        "vae": vae,
        "audio_vae": audio_vae,
        "text_encoder": None,
        "tokenizer": None,
        "connectors": seeded(
            LTX2TextConnectors,
            caption_channels=CAPTION,
            text_proj_in_factor=LAYERS,
            rope_type="split",
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=width[0] // 2,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=width[1] // 2,
            video_connector_num_layers=1,
            audio_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_learnable_registers=None,
            **dims,
        ),
        "vocoder": seeded(
            LTX2Vocoder,
            in_channels=16,
            hidden_channels=32,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1]],
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def frames(number: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(number, 3, HEIGHT, WIDTH, generator=generator)


def arguments(dtype: torch.dtype, **extra: Any) -> dict[str, Any]:
    """Return arguments that need no download: random text features, two steps and all three kinds of guidance."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(2, 1, 8, CAPTION * LAYERS, generator=generator).to(dtype)
    mask = torch.ones(1, 8, dtype=torch.long)
    short = torch.cat([torch.zeros(1, 3, dtype=torch.long), mask[:, 3:]], dim=1)
    return {
        "prompt_embeds": features[0],
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": features[1],
        "negative_prompt_attention_mask": short,
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "frame_rate": 25.0,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "stg_scale": 1.0,
        "modality_scale": 3.0,
        "guidance_rescale": 0.7,
        "audio_guidance_scale": 7.0,
        "audio_stg_scale": 0.5,
        "audio_modality_scale": 2.0,
        "audio_guidance_rescale": 0.5,
        "spatio_temporal_guidance_blocks": [1],
        "generator": torch.Generator().manual_seed(11),
        "output_type": "latent",
        "return_dict": False,
    } | extra


PIPELINES: dict[str, dict[str, Any]] = {
    "LTX2Pipeline": {},
    "LTX2ImageToVideoPipeline": {"image": frames(1, 1), "image_crf": 0},
    "LTX2ConditionPipeline": {
        "conditions": [
            LTX2VideoCondition(frames=frames(1, 1), index=0, crf=0),
            LTX2VideoCondition(frames=frames(9, 2), index=1, strength=0.75, crf=0),
        ]
    },
    "LTX2InContextPipeline": {
        "reference_conditions": [LTX2ReferenceCondition(frames=frames(9, 4), strength=0.9)],
        "conditioning_attention_strength": 0.5,
    },
}


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def latents(
    pipeline: str, release: str, transformer: torch.nn.Module, dtype: torch.dtype, **extra: Any
) -> tuple[tuple[Tensor, Tensor], int]:
    pipe = getattr(diffusers, pipeline)(transformer=transformer, **components(release))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype)
    with counted(transformer) as calls:
        video, audio = pipe(**arguments(dtype, **PIPELINES[pipeline] | extra))
    return (video, audio), len(calls)


@pytest.mark.parametrize("cross", [False, True], ids=["own-timestep", "cross-timestep"])
@pytest.mark.parametrize("release", ["2.0", "2.3"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pipelines_compute_the_same_latents(pipeline: str, release: str, cross: bool) -> None:
    model = random_model(config(release))
    theirs = build_diffusers(model.config.to_diffusers(), model.state_dict(), torch.float32)
    expected, calls = latents(pipeline, release, theirs, torch.float32, use_cross_timestep=cross)
    got, same_calls = latents(pipeline, release, for_diffusers(model), torch.float32, use_cross_timestep=cross)
    assert (
        calls == same_calls == 2 * 3
    )  # for each step: one for both parts of CFG, one for STG, one for isolated modalities
    for mine, reference in zip(got, expected, strict=True):
        assert reference.isfinite().all() and reference.std() > 0.1
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pipelines_compute_the_same_latents_in_bfloat16(pipeline: str) -> None:
    model = random_model(config("2.3"), torch.bfloat16)
    theirs = build_diffusers(model.config.to_diffusers(), model.state_dict(), torch.bfloat16)
    expected, _ = latents(pipeline, "2.3", theirs, torch.bfloat16)
    got, _ = latents(pipeline, "2.3", for_diffusers(model), torch.bfloat16)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(
    "off",
    [
        {"guidance_scale": 1.0, "audio_guidance_scale": 1.0},
        {"modality_scale": 1.0},
        {"stg_scale": 0.0, "audio_stg_scale": 0.0},
        {"use_cross_timestep": True},
    ],
)
def test_each_guidance_changes_the_latents(off: dict[str, Any]) -> None:
    shell = for_diffusers(random_model(config("2.3")))
    (video, _), _ = latents("LTX2ImageToVideoPipeline", "2.3", shell, torch.float32, use_cross_timestep=False)
    (other, _), _ = latents(
        "LTX2ImageToVideoPipeline", "2.3", shell, torch.float32, **{"use_cross_timestep": False} | off
    )
    assert not torch.equal(video, other)


def test_a_self_attention_mask_of_the_pipeline_reaches_the_model() -> None:
    shell, seen = for_diffusers(random_model(config("2.3"))), []
    with shell.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True):
        latents("LTX2InContextPipeline", "2.3", shell, torch.float32)
        masks = [kwargs["video_self_attention_mask"] for kwargs in seen]
    assert len(masks) == 6 and all(0 < mask.min() < mask.max() == 1 for mask in masks)


def test_a_changed_weight_changes_the_latents() -> None:
    model = random_model(config("2.3"))
    (video, audio), _ = latents("LTX2Pipeline", "2.3", for_diffusers(model), torch.float32)
    with torch.no_grad():
        model.transformer_blocks[2].attn1.to_q.bias[0] += 0.1
    (other_video, other_audio), _ = latents("LTX2Pipeline", "2.3", for_diffusers(model), torch.float32)
    assert not torch.equal(video, other_video) and not torch.equal(audio, other_audio)


def test_the_recipe_of_the_docstring_works(tmp_path: Path) -> None:
    model = random_model(config("2.3"))
    theirs = build_diffusers(model.config.to_diffusers(), model.state_dict(), torch.float32)
    diffusers.LTX2Pipeline(transformer=theirs, **components("2.3")).save_pretrained(tmp_path)
    pipeline = diffusers.LTX2Pipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None, transformer=None)
    pipeline.transformer = for_diffusers(model)
    pipeline.set_progress_bar_config(disable=True)
    expected, _ = latents("LTX2Pipeline", "2.3", theirs, torch.float32)
    assert all(map(torch.equal, pipeline(**arguments(torch.float32)), expected))
    assert pipeline.to(torch.bfloat16).transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{}, {"causal_offset": 0}, {"vae_scale_factors": (4, 16, 8)}])
def test_coordinates_are_those_of_diffusers(changes: dict[str, Any]) -> None:
    model = random_model(config("2.3", **changes), torch.bfloat16)
    theirs: Any = build_diffusers(model.config.to_diffusers(), model.state_dict(), torch.bfloat16)
    ours = for_diffusers(model)
    for fps in (24.0, 30, 23.976):
        video = theirs.rope.prepare_video_coords(3, 16, 5, 7, torch.device("cpu"), fps=fps)
        assert torch.equal(ours.rope.prepare_video_coords(3, 16, 5, 7, torch.device("cpu"), fps=fps), video)
    for shift in (0, 1, 5):
        audio = theirs.audio_rope.prepare_audio_coords(2, 126, torch.device("cpu"), shift=shift)
        assert torch.equal(ours.audio_rope.prepare_audio_coords(2, 126, torch.device("cpu"), shift=shift), audio)


def test_the_shell_shares_the_parameters_and_their_names() -> None:
    model = random_model(config("2.5"))
    shell = for_diffusers(model)
    assert isinstance(shell, PipelineTransformer) and shell.training == model.training
    assert [*shell.state_dict()] == [*model.state_dict()]
    assert all(p is q for p, q in zip(shell.parameters(), model.parameters(), strict=True))
    assert shell.device == torch.device("cpu") and shell.dtype == torch.float32


def test_interop_imports_no_diffusers() -> None:
    code = "import sys, ltx2ref.interop; sys.exit('diffusers' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
