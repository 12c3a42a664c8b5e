"""First wrong, or only passed on? The reference run on the candidate's own taps, in its dtype and in float64.

Each tap is recorded and then replaced by the candidate's, so that every stage of the reference starts from what the
candidate had there: teacher forcing. What is far from the float64 result of that stage originated in it.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..model import LTX2VideoTransformer3DModel
from .cases import Inputs
from .judge import Local, spread
from .run import run
from .trace.taps import Taps
from .truth import doubled, wide

# The residual of one stream through a block: where it enters each sub-layer, and where it leaves.
CHAINS = (
    ("attn1.stream", "attn2.stream", "audio_to_video_attn.stream", "ff.stream", "video"),
    ("audio_attn1.stream", "audio_attn2.stream", "video_to_audio_attn.stream", "audio_ff.stream", "audio"),
)


def isolate(
    model: LTX2VideoTransformer3DModel,
    inputs: Inputs,
    reference_taps: Taps,
    candidate: Mapping[str, Any],
    exactly: bool = False,
) -> Local:
    """Run the reference on the candidate's taps. Those that the candidate lacks, or has in another shape, stay the
    reference's own. `exactly`: under exact arithmetic, where the same operations have the same bits."""
    taps: Taps = {
        name: spread(name, x, reference_taps[name])
        for name, x in candidate.items()
        if isinstance(x, Tensor) and name in reference_taps
    }
    taps = {name: x for name, x in taps.items() if x.shape == reference_taps[name].shape}
    reference, exact = run(model, inputs, taps), run(doubled(model), wide(inputs), taps)
    chains = [
        [name for part in chain if (name := f"transformer_blocks.{i}.{part}") in exact]
        for i in range(len(model.transformer_blocks))
        for chain in CHAINS
    ]
    same_bits = {name: x for name, x in reference.items() if not any(name in names[1:] for names in chains)}
    for names in chains:
        step(reference, exact, taps, names)
    return Local(reference, exact, same_bits if exactly else None)


def step(reference: Taps, exact: Taps, candidate: Taps, names: list[str]) -> None:
    """A residual is what it was before, in the candidate, plus what the sub-layer added, in the reference."""
    plain = {name: exact[name] for name in names}
    for before, name in pairwise(names):
        if before in candidate:
            exact[name] = candidate[before].double() + plain[name] - plain[before]
            reference[name] = exact[name] + reference[name].double() - plain[name]


def repeats(model: LTX2VideoTransformer3DModel, inputs: Inputs, taps: Taps) -> bool:
    return all(torch.equal(x, taps[name]) for name, x in run(model, inputs).items())
