"""Under `torch.autocast` a float32 model computes what diffusers' computes there, bit for bit, and learns.

pytest tests/parity/test_autocast.py
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_parity import CASES
from tiny import Inputs, random_inputs, random_model, tiny_config

from ltx2ref.parity.oracles.diffusers import build_diffusers, run_diffusers

releases = pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])


def without_keyframes(cases: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    return {
        name: (changes, options | {"keyframes": False})
        for name, (changes, options) in cases.items()
        if name not in ("keyframes", "bfloat16-coordinates")  # torch refuses the latter under float16, for both models
    }


FAST = ("text-to-video", "guidance-one-of-batch", "everything")
AUTOCAST = [
    pytest.param(name, id=name, marks=[] if name in FAST else pytest.mark.slow) for name in without_keyframes(CASES)
]


@pytest.mark.filterwarnings(
    "ignore:Mismatch dtype between input and weight"
)  # a warning of RMSNorm, which diffusers causes as well
@releases
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", AUTOCAST)
def test_under_autocast_a_float32_model_has_the_bits_of_diffusers(case: str, low: torch.dtype, release: str) -> None:
    changes, options = without_keyframes(CASES)[case]
    ours = random_model(tiny_config(release, **changes), seed=3)
    reference = build_diffusers(ours.config.to_diffusers(), ours.state_dict(), torch.float32)
    inputs = random_inputs(ours.config, seed=3, **options)
    for given in (inputs, narrow(inputs, low)):
        with torch.no_grad(), torch.autocast("cpu", low):
            expected = run_diffusers(reference, with_mask(given, low))
            got = tuple(ours(**given))
        assert all(x.dtype == low and x.isfinite().all() for x in expected)
        assert all(map(torch.equal, got, expected))
    assert not torch.equal(got[0].float(), ours(**inputs)[0])


def narrow(inputs: Inputs, low: torch.dtype) -> Inputs:
    """Convert latents and text to autocast's dtype, which is what layers before the model return under autocast."""
    return {name: x.to(low) if name.endswith("hidden_states") else x for name, x in inputs.items()}


def with_mask(inputs: Inputs, low: torch.dtype) -> Inputs:
    """Convert `perturbation_mask` for diffusers, which under autocast accepts it only in autocast's dtype."""
    mask = inputs.get("perturbation_mask")
    return inputs if mask is None else inputs | {"perturbation_mask": mask.to(low)}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_what_the_page_says_is_different_from_diffusers_is() -> None:
    ours = random_model(tiny_config("2.5"))
    reference = build_diffusers(ours.config.to_diffusers(), ours.state_dict(), torch.float32)
    guided = random_inputs(ours.config, stg=True)
    marked = random_inputs(ours.config, keyframes=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="expected dtype"):
            run_diffusers(reference, guided)
        assert ours(**guided).sample.isfinite().all()
        assert not any(map(torch.equal, ours(**marked), run_diffusers(reference, marked)))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_under_autocast_the_model_learns() -> None:
    model = random_model(tiny_config("2.3"))
    with torch.autocast("cpu", torch.bfloat16):
        video, audio = model(**random_inputs(model.config))
        (video.float().square().mean() + audio.float().square().mean()).backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in model.parameters())
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in model.parameters())


def test_another_dtype_than_the_model_s_is_taken_under_autocast_alone_and_only_its_own() -> None:
    model = random_model(tiny_config("2.3"))
    inputs = narrow(random_inputs(model.config), torch.bfloat16)

    def refused(call: Callable[[], Any], has: str) -> None:
        with pytest.raises(ValueError, match=rf"^hidden_states: expected torch.{has}, the model's dtype, got torch.b"):
            call()

    refused(lambda: model(**inputs), "float32")
    with torch.autocast("cpu", torch.float16):
        refused(lambda: model(**inputs), "float32")
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        refused(lambda: model(**inputs), "float32")
    with torch.autocast("cpu", torch.bfloat16):
        refused(lambda: model.double()(**inputs), "float64")


def test_autocast_leaves_a_float64_model_alone() -> None:
    model = random_model(tiny_config("2.3"), torch.float64)
    inputs = random_inputs(model.config, torch.float64, stg=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(**inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, model(**inputs), expected))
