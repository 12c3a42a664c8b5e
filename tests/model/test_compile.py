"""The forward compiles and exports as one graph for any number of tokens, which computes eager's bits.

pytest tests/model/test_compile.py
LTX2REF_CORPUS=full pytest tests/model/test_compile.py    # also what differs least from what else is here
"""

import os
from typing import Any

import pytest
import torch
from tiny import Inputs, random_inputs, random_model, tiny_config
from torch import Tensor
from torch._dynamo.utils import counters
from torch.export import Dim, export
from torch.utils._pytree import tree_leaves, tree_map

from ltx2ref import LTX2VideoTransformer3DModel

# In the first size no number occurs twice or is a size of the model: tracers take equal numbers for the same.
SIZES: list[dict[str, Any]] = [
    {"grid": (4, 5, 7), "audio_frames": 11, "text_tokens": (8, 10)},
    {"grid": (3, 8, 4), "audio_frames": 13, "text_tokens": (9, 12)},
    {"grid": (5, 4, 3), "audio_frames": 31, "text_tokens": (6, 3)},
]
COUNTS = "num_frames", "height", "width", "audio_num_frames"
# Releases, and the dtype of coordinates, or None for COUNTS in their place. Compiling takes long. So 2.5, which has the
# most code, is compiled with COUNTS and exported with coordinates, and 2.0, whose text is projected, is exported.
# 2.3 is 2.5 with one more bias and without keyframes.
FULL = os.environ.get("LTX2REF_CORPUS") == "full"
COMPILED = [("2.5", None, "aot_eager"), *([("2.0", torch.float32, "eager")] if FULL else [])]
EXPORTED = [("2.0", None), ("2.5", torch.float32), *([("2.3", torch.float32)] if FULL else [])]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*no effect"),  # 2.0 has no STG, and releases before 2.5 have no keyframes
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


def example(
    release: str, num_layers: int = 1, coords: torch.dtype | None = None, stg: bool = True
) -> tuple[LTX2VideoTransformer3DModel, list[Inputs]]:
    """Return a model, and inputs of three sizes that use nearly every argument."""
    config = tiny_config(release, num_layers=num_layers)
    flags: dict[str, Any] = {"per_token": True, "stg": stg, "self_mask": True, "keyframes": True}
    return random_model(config), [
        random_inputs(config, text_masks=torch.int64, coords=coords, **flags, **size) for size in SIZES
    ]


def outputs(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return output.sample, output.audio_sample


def dynamic(x: Any, y: Any) -> dict[int, Any] | Any:
    """Return the dimensions in which two tensors' sizes differ; for another argument, whether it differs."""
    if not isinstance(x, Tensor):
        return None if x == y else Dim.DYNAMIC
    return {i: Dim.DYNAMIC for i, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if m != n}


def graphs() -> int:
    """Return how many graphs Dynamo has compiled."""
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("release", "coords", "backend"), COMPILED)
def test_one_compiled_graph_serves_all_sizes(release: str, coords: torch.dtype | None, backend: str) -> None:
    model, inputs = example(release, coords=coords)
    torch._dynamo.reset()
    compiled, before = torch.compile(model, fullgraph=True, backend=backend), graphs()
    for x, y in zip(*map(tree_leaves, inputs[:2]), strict=True):
        if isinstance(x, Tensor):
            torch._dynamo.mark_dynamic(x, [*dynamic(x, y)])
    with torch.compiler.config.patch(dynamic_sources=",".join(f"L['{name}']" for name in COUNTS)):
        for size in inputs:
            assert all(map(torch.equal, outputs(compiled, size), outputs(model, size)))
    assert graphs() - before == 1


def test_all_blocks_share_one_compiled_graph() -> None:
    model, (inputs, *_) = example("2.5", num_layers=3, stg=False)
    expected = outputs(model, inputs)
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    before = graphs()
    assert all(map(torch.equal, outputs(model, inputs), expected))
    assert graphs() - before == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize(("release", "coords"), EXPORTED)
def test_one_exported_program_serves_all_sizes(release: str, coords: torch.dtype | None) -> None:
    model, inputs = example(release, coords=coords)
    with torch.no_grad():
        program = export(model, (), inputs[0], dynamic_shapes=tree_map(dynamic, *inputs[:2])).module()
    for size in inputs:
        assert all(map(torch.equal, outputs(program, size), outputs(model, size)))
