"""Changes of diffusers that no conformance case noticed, and the case and tap at which each shows now.

A change is made at run time, of a model's arguments, attributes or layers: `changed(change, model)` is a context.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from mutants import patched
from torch import Tensor, nn

Given = dict[str, Any]
Change = Callable[[Any], list[Any]]


class Mutant(NamedTuple):
    change: Change
    case: str
    tap: str
    dtype: str = "float32"


MUTANTS: dict[str, Mutant] = {}


def mutant(name: str, case: str, tap: str, dtype: str = "float32") -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        MUTANTS[name] = Mutant(change, case, tap, dtype)
        return change

    return add


def changed(change: Change, model: nn.Module) -> AbstractContextManager[None]:
    return patched(change(model))


def arguments(change: Callable[[Given], Given]) -> Change:
    """Change the arguments with which the model is called."""

    def patches(model: Any) -> list[Any]:
        forward = model.forward
        return [patch.object(model, "forward", wraps(forward)(lambda **given: forward(**given | change(given))))]

    return patches


def attributes(*at: str, **values: Any) -> Change:
    def patches(model: Any) -> list[Any]:
        return [patch.object(model.get_submodule(name), key, value) for name in at for key, value in values.items()]

    return patches


def outputs(change: Callable[[Given, Tensor, str], Tensor]) -> Change:
    """Change what the model returns, given its arguments."""

    def patches(model: Any) -> list[Any]:
        forward = model.forward

        @wraps(forward)
        def other(**given: Any) -> tuple[Tensor, ...]:
            names = ("hidden_states", "audio_hidden_states")
            return tuple(change(given, x, name) for x, name in zip(forward(**given), names, strict=True))

        return [patch.object(model, "forward", other)]

    return patches


def add(name: str, case: str, tap: str, change: Change, dtype: str = "float32") -> None:
    mutant(name, case, tap, dtype)(change)


# ---------------------------------------------------------------- as a pipeline calls it
def with_residual(given: Given, x: Tensor, name: str) -> Tensor:
    return x + given[name] if x.shape == given[name].shape else x


def rows_by_latents(given: Given) -> Given:
    """Compute rows with equal latents only once, although their text differs."""
    same = all(
        torch.equal(given[name][:1].expand_as(given[name]), given[name])
        for name in ("hidden_states", "audio_hidden_states")
    )
    return (
        {
            name: given[name][:1].expand_as(given[name])
            for name in ("encoder_hidden_states", "audio_encoder_hidden_states")
        }
        if same
        else {}
    )


def audio_level_of_tokens(given: Given) -> Given:
    """Give the audio the first token's timestep where the video has one for each token and the audio does not."""
    timestep, audio = given["timestep"], given.get("audio_timestep")
    return {"audio_timestep": timestep[:, 0]} if audio is not None and audio.ndim < timestep.ndim else {}


for release in ("2.0", "2.3", "2.5"):
    add(f"residual-where-channels-fit-{release}", f"{release}/pipeline-t2v", "sample", outputs(with_residual))
    add(
        f"rows-cached-by-latents-{release}",
        f"{release}/pipeline-t2v",
        "caption_projection" if release == "2.0" else "transformer_blocks.0.attn2.context",
        arguments(rows_by_latents),
    )
    add(
        f"audio-level-of-a-token-{release}",
        f"{release}/pipeline-i2v",
        "audio_time_embed.sinusoid",
        arguments(audio_level_of_tokens),
    )


# ---------------------------------------------------------------- arguments that are absent
def default(**values: Callable[[Given], Any]) -> Change:
    return arguments(lambda given: {name: value(given) for name, value in values.items() if given.get(name) is None})


add("fps-default-25", "2.3/defaults", "video_coords", default(fps=lambda given: 25.0))
add(
    "audio-timestep-default-sigma",
    "2.3/defaults",
    "audio_time_embed.sinusoid",
    default(audio_timestep=lambda given: given.get("sigma")),
)
add(
    "audio-sigma-default-timestep",
    "2.3/defaults",
    "audio_prompt_adaln.sinusoid",
    default(audio_sigma=lambda given: given["timestep"]),
)
add(
    "audio-mask-default-video's",
    "2.3/defaults",
    "transformer_blocks.0.audio_attn2.sdpa",
    default(audio_encoder_attention_mask=lambda given: given.get("encoder_attention_mask")),
)
add(
    "video-mask-default-audio's",
    "2.5/batch-3",
    "transformer_blocks.0.attn2.sdpa",
    default(encoder_attention_mask=lambda given: given.get("audio_encoder_attention_mask")),
)
add(
    "audio-mask-only-with-video's",
    "2.5/batch-3",
    "transformer_blocks.0.audio_attn2.sdpa",
    arguments(
        lambda given: {} if given.get("encoder_attention_mask") is not None else {"audio_encoder_attention_mask": None}
    ),
)


# ---------------------------------------------------------------- other batches
def squeezed_mask(given: Given) -> Given:
    """Drop the dimension of a mask whose batch is one, which makes it a bias that fits all rows."""
    mask = given.get("encoder_attention_mask")
    if mask is None or mask.squeeze().ndim != 1:
        return {}
    return {"encoder_attention_mask": mask.squeeze()[None, None].to(given["hidden_states"].dtype)}


def sigma_by_halves(given: Given) -> Given:
    """Use one sigma for each half of the batch, as if there were two rows."""
    sigma = given.get("sigma")
    return (
        {}
        if sigma is None or len(sigma) < 2
        else {"sigma": sigma[[0, -1]].repeat_interleave(-(-len(sigma) // 2), 0)[: len(sigma)]}
    )


add("mask-of-one-row-squeezed", "2.3/defaults", "transformer_blocks.0.attn2.sdpa", arguments(squeezed_mask))
add("sigma-by-halves-of-the-batch", "2.5/batch-3", "prompt_adaln.sinusoid", arguments(sigma_by_halves))


# ---------------------------------------------------------------- noise levels, rates
def highest(timestep: Tensor) -> Tensor:
    return timestep.reshape(len(timestep), -1).amax(1)


add(
    "sigma-from-highest-timestep",
    "2.3/other-sigma",
    "prompt_adaln.sinusoid",
    arguments(lambda given: {"sigma": highest(given["timestep"])}),
)
add(
    "audio-sigma-from-highest-timestep",
    "2.3/other-sigma",
    "audio_prompt_adaln.sinusoid",
    arguments(
        lambda given: (
            {
                "audio_sigma": highest(
                    given["audio_timestep"] if given.get("audio_timestep") is not None else given["timestep"]
                )
            }
            if given.get("audio_sigma") is not None
            else {}
        )
    ),
)
add(
    "fps-rounded",
    "2.0/other-rates",
    "video_coords",
    arguments(lambda given: {"fps": round(given["fps"])} if "fps" in given else {}),
)
for name, tap, change in (
    ("hop-length-160", "audio_coords", attributes("audio_rope", hop_length=160)),
    ("sampling-rate-16000", "audio_coords", attributes("audio_rope", sampling_rate=16000)),
    ("audio-scale-4", "audio_coords", attributes("audio_rope", scale_factors=[4])),
    ("vae-scales-8-32-32", "video_coords", attributes("rope", scale_factors=(8, 32, 32))),
    (
        "theta-10000",
        "rope.cos",
        attributes("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope", theta=10000.0),
    ),
):
    add(name, "2.0/other-rates", tap, change)


# ---------------------------------------------------------------- guidance
def perturbation(change: Callable[[Tensor], Tensor]) -> Change:
    return arguments(
        lambda given: (
            {} if given.get("perturbation_mask") is None else {"perturbation_mask": change(given["perturbation_mask"])}
        )
    )


def without_gates(model: Any) -> list[Any]:
    attentions = [x for x in model.modules() if getattr(x, "to_gate_logits", None) is not None]
    return [] if model.config.perturbed_attn else [patch.object(x, "to_gate_logits", None) for x in attentions]


SHARES = ("2.3/stg-shares", "transformer_blocks.0.attn1.to_out")
add("perturbation-rounded", *SHARES, perturbation(torch.round))
add("perturbation-as-bool", *SHARES, perturbation(lambda x: (x != 0).to(x.dtype)))
for name, some in (("first", slice(0, 1)), ("last", slice(-1, None))):
    add(
        f"{name}-guidance-block-alone",
        "2.3/stg-shares",
        f"transformer_blocks.{0 if name == 'first' else 1}.attn1.to_out",
        arguments(
            lambda given, some=some: {
                "spatio_temporal_guidance_blocks": (given.get("spatio_temporal_guidance_blocks") or [])[some]
            }
        ),
    )
add(
    "gates-with-guidance-alone",
    "2.3/gates-without-guidance",
    "transformer_blocks.0.attn1.to_gate_logits",
    without_gates,
)


# ---------------------------------------------------------------- masks
def text_bias(fill: Callable[[Tensor, torch.dtype], Tensor]) -> Change:
    """Turn masks (B, S) into a bias (B, 1, S) by another rule, or into True for what is kept."""
    names = ("encoder_attention_mask", "audio_encoder_attention_mask")
    return arguments(
        lambda given: {
            name: fill(given[name], given["hidden_states"].dtype)[:, None]
            for name in names
            if given.get(name) is not None and given[name].ndim == 2
        }
    )


def self_mask(change: Callable[[Tensor], Tensor]) -> Change:
    return arguments(
        lambda given: (
            {}
            if given.get("video_self_attention_mask") is None
            else {
                "video_self_attention_mask": change(given["video_self_attention_mask"].to(given["hidden_states"].dtype))
            }
        )
    )


EMPTY = ("2.0/empty-text-rows", "transformer_blocks.0.attn2.sdpa")
add("masked-text-lowest", *EMPTY, text_bias(lambda x, dtype: (1 - x.to(dtype)) * torch.finfo(dtype).min))
add("masked-text-not-attended", *EMPTY, text_bias(lambda x, dtype: x.bool()))
SOFT = ("2.3/soft-self-mask", "transformer_blocks.0.attn1.sdpa")
add("self-mask-at-one-half", *SOFT, self_mask(lambda x: (x > 0.5).to(x.dtype)), "bfloat16")
add("self-mask-rounded-down", *SOFT, self_mask(torch.floor), "bfloat16")


# ---------------------------------------------------------------- sizes
LARGE = "2.3/small-stream-large-outputs"
add("outputs-clamped-to-4", LARGE, "sample", outputs(lambda given, x, name: x.clamp(-4, 4)))
add(
    "output-norm-epsilon-float32",
    LARGE,
    "norm_out",
    attributes("norm_out", "audio_norm_out", eps=float(np.float32(1e-6))),
)

# Exact arithmetic sees these epsilons in each case. Natively, bfloat16 hides them where streams have unit size.
NORMS = (
    "norm1",
    "audio_norm1",
    "norm2",
    "audio_norm2",
    "audio_to_video_norm",
    "video_to_audio_norm",
    "norm3",
    "audio_norm3",
)


def without_epsilons(model: Any) -> list[Any]:
    norms = [getattr(block, name) for block in model.transformer_blocks for name in NORMS]
    norms += [x for name, x in model.named_modules() if name.endswith((".norm_q", ".norm_k"))]
    return [patch.object(x, "eps", 0.0) for x in norms]
