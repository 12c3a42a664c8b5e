"""The hooks in docs/using.md do what only ltx-core's arguments can say, with its bits.

pytest tests/model/test_guidance_by_hand.py
"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_inputs, random_model, tiny_config
from torch import Tensor

import ltx2ref
from ltx2ref import LTX_CORE_2026_03
from ltx2ref.interface import LTX2VideoTransformer3DModel

pytestmark = pytest.mark.ltx_core
USING = Path(ltx2ref.__file__).parents[1] / "docs" / "using.md"
SUBLAYERS = {
    "audio": ("audio_attn1", "audio_attn2", "video_to_audio_attn", "audio_ff"),
    "video": ("attn1", "attn2", "audio_to_video_attn", "ff"),
}
Hooked = tuple[str, Callable[[Any], Any], Sequence[int] | None]
# The samples of three whose exchange or self-attention is skipped, by the name of ltx-core's perturbation; and blocks.
Skips = dict[str, tuple[Sequence[int], Sequence[int] | None]]


def from_the_page() -> dict[str, Any]:
    """Return the functions of the page's block of code."""
    section = USING.read_text(encoding="utf-8").split("## Guidance of ltx-core's pipelines", 1)[1]
    found = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names


PAGE = from_the_page()


def kept(skipped: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0.0 if i in skipped else 1.0 for i in range(3)], dtype=dtype)[:, None, None]


def hooks(skips: Skips, frozen: str | None, dtype: torch.dtype) -> list[Hooked]:
    layers = {
        "A2V_CROSS_ATTN": ("audio_to_video_attn", PAGE["times"]),
        "V2A_CROSS_ATTN": ("video_to_audio_attn", PAGE["times"]),
        "VIDEO_SELF_ATTN": ("attn1", PAGE["keeping"]),
        "AUDIO_SELF_ATTN": ("audio_attn1", PAGE["keeping"]),
    }
    found: list[Hooked] = []
    for name, (samples, blocks) in skips.items():
        layer, make = layers[name]
        found.append((layer, make(kept(samples, dtype)), blocks))
    return found + [(layer, PAGE["times"](0), None) for layer in SUBLAYERS.get(frozen or "", ())]


def of_ltx_core(port: Any, inputs: Any, skips: Skips, frozen: str | None) -> tuple[Tensor, Tensor]:
    from ltx2ref.parity.oracles import ltx_core as oracle

    modalities = [oracle._modality(inputs, port.config, side, None) for side in ("", "audio_")]
    video, audio = (
        replace(x, enabled=False) if name == frozen else x
        for name, x in zip(("video", "audio"), modalities, strict=True)
    )
    skipped = [
        [
            oracle.Perturbation(oracle.PerturbationType[f"SKIP_{name}"], blocks)
            for name, (samples, blocks) in skips.items()
            if i in samples
        ]
        for i in range(3)
    ]
    perturbations = oracle.BatchedPerturbationConfig([oracle.PerturbationConfig(x) for x in skipped])
    found: tuple[Tensor, Tensor] = port.model(video, audio, perturbations)
    return found


CASES: dict[str, tuple[Skips, str | None]] = {
    "nothing": ({}, None),
    "one direction for one sample": ({"A2V_CROSS_ATTN": ([1], None)}, None),
    "the other in one block": ({"V2A_CROSS_ATTN": ([0, 2], [0])}, None),
    "both, in other blocks": ({"A2V_CROSS_ATTN": ([0], [1]), "V2A_CROSS_ATTN": ([1], None)}, None),
    "guidance by stream and block": ({"VIDEO_SELF_ATTN": ([1], [1]), "AUDIO_SELF_ATTN": ([0], [0])}, None),
    "frozen audio": ({}, "audio"),
    "frozen video": ({}, "video"),
    "frozen audio, unheard by one": ({"A2V_CROSS_ATTN": ([2], None)}, "audio"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("release", ["2.0", "2.3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_only_ltx_core_can_say_is_a_hook_with_its_bits(release: str, case: str, dtype: torch.dtype) -> None:
    from ltx2ref.parity.oracles.ltx_core import build_ltx_core

    skips, frozen = CASES[case]
    weights = random_model(tiny_config(release), dtype)
    model = LTX2VideoTransformer3DModel(weights.config, conventions=LTX_CORE_2026_03)
    model.load_state_dict(weights.state_dict(), assign=True)
    port = build_ltx_core(weights.config.to_diffusers(), weights.state_dict(), dtype)
    inputs = random_inputs(weights.config, dtype, batch=3, per_token=True) | {"use_cross_timestep": True}
    with torch.no_grad(), ExitStack() as stack:
        plain = model(**inputs)
        for hook in hooks(skips, frozen, dtype):
            stack.enter_context(PAGE["hooked"](model, *hook))
        ours, theirs = model(**inputs), of_ltx_core(port, inputs, skips, frozen)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert case == "nothing" or not torch.equal(plain.sample, ours.sample)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
