"""In float64 the model is the truth: an independent NumPy implementation agrees, and nothing is narrower.

pytest tests/model/test_truth.py
"""

from typing import Any

import numpy as np
import numpy_port
import pytest
import torch
from tiny import RELEASES, Inputs, random_inputs, random_model, tiny_config
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ltx2ref import TransformerConfig

# The allowed distance of two float64 computations, ||a - b|| / ||b||. Phases reach 15,708 rad, where one unit in the
# last place is 1.8e-12 rad, in one of R planes. The rest is some hundred roundings of 1e-16.
ROUNDING = 1e-12
TOKENS = 3 * 5 * 2

CONFIGS: dict[str, dict[str, Any]] = {  # the changes of the config in each case
    "interleaved": {"rope_type": "interleaved"},
    "everything": {"perturbed_attn": True},
    "everything, interleaved": {"perturbed_attn": True, "rope_type": "interleaved"},
    "stg, mixed rows": {"perturbed_attn": True},
    "stg, all rows": {"perturbed_attn": True},
    "two multipliers": {"timestep_scale_multiplier": 500.0, "cross_attn_timestep_scale_multiplier": 70.0},
    "multipliers of 1": {"timestep_scale_multiplier": 1.0, "cross_attn_timestep_scale_multiplier": 1.0},
    "static prompt rows": {"cross_attn_mod": True, "use_prompt_adaln_single": False},
    "video is modulated": {"cross_attn_mod": True, "audio_cross_attn_mod": False},
    "audio is modulated": {"cross_attn_mod": False, "audio_cross_attn_mod": True},
    "video is gated": {"gated_attn": True, "audio_gated_attn": False, "audio_ff_bias": False},
    "audio is gated": {"gated_attn": False, "audio_gated_attn": True, "ff_bias": False},
    "geometry": {
        "vae_scale_factors": (4, 16, 24),
        "causal_offset": 0,
        "rope_theta": 500.0,
        "audio_scale_factor": 3,
        "audio_sampling_rate": 24000,
        "audio_hop_length": 300,
    },
}
EVERYTHING = {
    "batch": 3,
    "per_token": True,
    "text_masks": torch.float64,
    "coords": torch.float64,
    "stg": True,
    "self_mask": True,
    "keyframes": True,
    "use_cross_timestep": True,
}
OPTIONS: dict[str, dict[str, Any]] = {  # the options of `random_inputs` in each case
    "plain": {"grid": (3, 5, 7)},
    "three rows": {"batch": 3},
    "121 frames": {"grid": (16, 3, 1), "audio_frames": 101},
    "per token": {"per_token": True},
    "masks, int": {"batch": 3, "text_masks": torch.int64},
    "masks, bool": {"text_masks": torch.bool},
    "masks, fractions": {"text_masks": torch.float64, "encoder_attention_mask": torch.full((2, 6), 0.9999)},
    "masks, 3d": {
        "encoder_attention_mask": torch.arange(2.0 * 6).reshape(2, 1, 6).sin(),
        "audio_encoder_attention_mask": torch.arange(2 * 11 * 9).reshape(2, 11, 9) % 5 > 1,
    },
    "self mask": {"self_mask": True},
    "coords": {"coords": torch.float64},
    "coords, points": {
        "video_coords": torch.linspace(0, 15, 2 * 3 * TOKENS, dtype=torch.float64).reshape(2, 3, TOKENS),
        "audio_coords": torch.linspace(-2, 15, 2 * 11, dtype=torch.float64).reshape(2, 1, 11),
    },
    "stg, if perturbed_attn": {"stg": True},
    "stg, mixed rows": {"batch": 3, "stg": True},
    "stg, all rows": {"spatio_temporal_guidance_blocks": [0, 1]},
    "isolated": {"isolate_modalities": True},
    "keyframes": {"keyframes": True},
    "cross timestep": {"use_cross_timestep": True},
    "everything": EVERYTHING,
    "everything, interleaved": EVERYTHING,
}
CASES = list(OPTIONS | CONFIGS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no effect"
)  # 2.0 has no STG, and releases before 2.5 have no keyframes


def build(release: str, case: str) -> tuple[TransformerConfig, nn.Module, Inputs]:
    config, seed = tiny_config(release, **CONFIGS.get(case, {})), CASES.index(case)
    inputs = random_inputs(config, torch.float64, seed, **{"grid": (3, 5, 2)} | OPTIONS.get(case, {}))
    return config, random_model(config, torch.float64, seed), inputs


def floats(tree: Any, dtype: torch.dtype) -> Any:
    """Convert the floating-point tensors of `tree` to `dtype`."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def as_numpy(tree: Any) -> Any:
    return tree_map(lambda x: x.detach().numpy() if isinstance(x, Tensor) else x, tree)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("release", RELEASES)
def test_the_double_model_is_the_numpy_oracle_to_rounding(release: str, case: str) -> None:
    config, model, inputs = build(release, case)
    with torch.no_grad():
        ours = model(**inputs, return_dict=False)
    flat = as_numpy(inputs | inputs.get("attention_kwargs", {}))
    truth = numpy_port.forward(config.to_diffusers(), as_numpy(dict(model.state_dict())), flat)
    for name, x, y in zip(("video", "audio"), ours, truth, strict=True):
        error = np.linalg.norm(x.numpy() - y) / np.linalg.norm(y)
        assert error <= ROUNDING, f"{name}: {error:.2e}"


class NothingNarrow(TorchDispatchMode):
    """A mode that fails at the first operation whose result is floating-point, but not float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
                raise AssertionError(f"{function} returned {x.dtype}")
        return result


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "everything", "everything, interleaved"])
@pytest.mark.parametrize("release", RELEASES)
def test_nothing_in_the_double_model_is_narrower_than_float64(release: str, case: str) -> None:
    _, model, inputs = build(release, case)
    with torch.no_grad(), NothingNarrow():
        model(**inputs)


@pytest.mark.parametrize("release", RELEASES)
def test_narrow_arguments_of_a_double_model_are_widened_before_they_are_used(release: str) -> None:
    _, model, inputs = build(release, "everything")
    of_the_model = {name: x for name, x in inputs.items() if name.endswith("hidden_states")}
    inputs = floats(inputs, torch.float32) | of_the_model
    with torch.no_grad(), NothingNarrow():
        model(**inputs)


def test_the_check_for_narrow_numbers_notices_a_float32_model() -> None:
    _, model, inputs = build("2.5", "plain")
    model, inputs = model.float(), floats(inputs, torch.float32)
    with torch.no_grad(), NothingNarrow(), pytest.raises(AssertionError, match=r"returned torch\.float32"):
        model(**inputs)
