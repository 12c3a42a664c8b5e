"""Live comparison with diffusers: the bits are the same in float32 and bfloat16, and each known porting bug fails it.

    pytest tests/parity/test_parity.py

Seeds, widths and lengths differ from those of the recorded cases, which run in test_verify.py.
"""

from typing import Any

import mutants
import pytest
import torch
from tiny import Inputs, random_inputs, random_model, tiny_config
from torch import Tensor, nn

from ltx2ref import LTX2VideoTransformer3DModel
from ltx2ref.parity.oracles.diffusers import build_diffusers, run_diffusers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EVERYTHING: dict[str, Any] = {
    "per_token": True,
    "text_masks": torch.float32,
    "coords": torch.float32,
    "stg": True,
    "self_mask": True,
    "keyframes": True,
    "use_cross_timestep": True,
    "batch": 3,
}
# For each name, changes of the config and options of `random_inputs`.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text-to-video": ({}, {}),
    "batch-of-one": ({}, {"batch": 1, "grid": (2, 3, 4)}),
    "image-to-video": ({}, {"per_token": True}),
    "cross-timestep": ({}, {"use_cross_timestep": True}),
    "image-to-video-cross-timestep": ({}, {"per_token": True, "use_cross_timestep": True}),
    "integer-text-masks": ({}, {"text_masks": torch.int64, "batch": 3}),
    "floating-text-masks": ({}, {"text_masks": torch.float32}),
    "given-coordinates": ({}, {"coords": torch.float32, "grid": (5, 3, 4)}),
    "bfloat16-coordinates": ({}, {"coords": torch.bfloat16}),
    "float64-coordinates": ({}, {"coords": torch.float64}),
    "isolated": ({}, {"isolate_modalities": True}),
    "guidance-one-of-batch": ({}, {"stg": True, "batch": 3}),
    "guidance-all": ({}, {"spatio_temporal_guidance_blocks": [0, 1]}),
    "self-mask": ({}, {"self_mask": True}),
    "keyframes": ({}, {"keyframes": True, "per_token": True}),
    "121-frames": ({}, {"grid": (16, 2, 3), "fps": 30}),
    "interleaved": ({"rope_type": "interleaved"}, {}),
    "interleaved-everything": ({"rope_type": "interleaved"}, EVERYTHING),
    "float32-frequencies": ({"rope_double_precision": False}, {"grid": (16, 2, 3)}),
    "other-multipliers": ({"timestep_scale_multiplier": 300.0, "cross_attn_timestep_scale_multiplier": 700.0}, {}),
    "multiplier-1": ({"cross_attn_timestep_scale_multiplier": 1.0}, {"per_token": True}),
    "other-rates": (
        {
            "causal_offset": 3,
            "audio_sampling_rate": 48000,
            "audio_hop_length": 512,
            "rope_theta": 500.0,
            "audio_scale_factor": 8,
            "vae_scale_factors": (4, 16, 8),
        },
        {},
    ),
    "no-prompt-adaln": ({"use_prompt_adaln_single": False}, {}),
    "video-flags-alone": ({"audio_gated_attn": False, "audio_cross_attn_mod": False}, {"per_token": True}),
    "audio-flags-alone": ({"gated_attn": False, "cross_attn_mod": False}, {"stg": True}),
    "everything": ({}, EVERYTHING),
}
# Cases and bugs that represent the others, which are `slow`.
FAST = ("text-to-video", "interleaved-everything", "everything", "sigma-ignored", "rope-axis-major", "gelu-erf")
Pair = tuple[Tensor, Tensor]


def pair(release: str, dtype: str, changes: dict[str, Any], seed: int) -> tuple[LTX2VideoTransformer3DModel, nn.Module]:
    """Return our model and diffusers', with the same weights."""
    ours = random_model(tiny_config(release, **changes), DTYPES[dtype], seed)
    return ours, build_diffusers(ours.config.to_diffusers(), ours.state_dict(), DTYPES[dtype])


def inputs_for(ours: LTX2VideoTransformer3DModel, dtype: str, options: dict[str, Any], seed: int) -> Inputs:
    inputs = random_inputs(ours.config, DTYPES[dtype], seed, **options)
    if "perturbation_mask" in inputs:  # diffusers accepts only the model's dtype
        inputs["perturbation_mask"] = inputs["perturbation_mask"].to(DTYPES[dtype])
    return inputs


def outputs(ours: LTX2VideoTransformer3DModel, theirs: nn.Module, inputs: Inputs) -> tuple[Pair, Pair]:
    with torch.no_grad():
        return ours(**inputs, return_dict=False), run_diffusers(theirs, inputs)


def equal(a: Pair, b: Pair) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:.*no effect:UserWarning")  # warnings of a release without guidance or keyframes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
def test_both_outputs_have_the_bits_of_diffusers(release: str, case: str, dtype: str) -> None:
    changes, options = CASES[case]
    seed = sum(map(ord, release + case))
    ours, theirs = pair(release, dtype, changes, seed)
    assert equal(*outputs(ours, theirs, inputs_for(ours, dtype, options, seed)))


# The release and the options of `random_inputs` with which each bug shows.
SHOWN_BY: dict[str, tuple[str, dict[str, Any]]] = {
    "gate-multiplier-1": ("2.0", {}),
    "swapped-modality-sigma": ("2.3", {}),
    "unscaled-gate-timestep": ("2.0", {}),
    "sigma-ignored": ("2.3", {"per_token": True}),
    "rope-float32-frequencies": ("2.0", {"grid": (16, 2, 3)}),
    "rope-bf16-positions": ("2.0", {"grid": (16, 2, 3)}),
    "rope-axis-major": ("2.0", {}),
    "rope-patch-start": ("2.0", {}),
    "rope-right-padding": ("2.0", {}),
    "rope-shared-heads": ("2.0", {}),
    "fps-dropped": ("2.0", {}),
    "fps-dropped-from-exchange": ("2.0", {}),
    "mask-as-bool": ("2.3", {"text_masks": torch.int64}),
    "mask-ignored": ("2.3", {"text_masks": torch.int64}),
    "stg-wrong-block": ("2.3", {"stg": True}),
    "stg-without-gate": ("2.3", {"stg": True}),
    "stg-4d-mask": ("2.3", {"stg": True}),
    "max-pos-frames": ("2.0", {}),
    "output-norm-bf16": ("2.3", {}),
    "keyframes-unapplied": ("2.5", {"keyframes": True}),
    "ff-bias-dropped": ("2.5", {}),
    "gelu-erf": ("2.3", {}),
    "qk-norm-per-head": ("2.0", {}),
    "scale-shift-swapped": ("2.3", {}),
    "a2v-v2a-swapped": ("2.3", {}),
    "sequential-exchange": ("2.0", {}),
    "per-token-timestep-averaged": ("2.3", {"per_token": True}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in mutants.MUTANTS]
)
def test_a_known_porting_bug_turns_the_comparison_red(name: str, dtype: str) -> None:
    release, options = SHOWN_BY[name]
    ours, theirs = pair(release, dtype, {}, seed=5)
    inputs = inputs_for(ours, dtype, options, seed=5)
    with mutants.inject(name, ours):
        assert not equal(*outputs(ours, theirs, inputs))
    assert equal(*outputs(ours, theirs, inputs)), "the bug stayed in the model"
