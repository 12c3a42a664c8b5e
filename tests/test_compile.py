"""The forward compiles and exports as one graph for any number of tokens, and that graph computes eager's bits.

    pytest tests/test_compile.py
"""
from typing import Any

import pytest
import torch
from tiny import RELEASES, Inputs, random_inputs, random_model, tiny_config
from torch import Tensor
from torch._dynamo.utils import counters
from torch.export import Dim, export
from torch.utils._pytree import tree_map

from ltx2ref import LTX2VideoTransformer3DModel

# No number occurs twice, and none is a width of the model: a tracer takes equal sizes for the same size.
SIZES: list[dict[str, Any]] = [
    {"grid": (4, 5, 7), "audio_frames": 11, "text_tokens": (6, 9)},
    {"grid": (3, 8, 4), "audio_frames": 13, "text_tokens": (10, 5)},
    {"grid": (5, 4, 3), "audio_frames": 31, "text_tokens": (7, 12)},
]
every_release = pytest.mark.parametrize("release", RELEASES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no effect"),  # of STG in 2.0, of keyframes before 2.5
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


def example(release: str, num_layers: int = 1, **options: Any) -> tuple[LTX2VideoTransformer3DModel, list[Inputs]]:
    """A model, and inputs of three sizes that use nearly every argument."""
    config = tiny_config(release, num_layers=num_layers)
    options |= {"per_token": True, "text_masks": torch.int64, "stg": True, "self_mask": True, "keyframes": True}
    return random_model(config), [random_inputs(config, **options, **size) for size in SIZES]


def dynamic(inputs: list[Inputs]) -> Any:
    """What differs between the sizes: for each tensor its dynamic dimensions, for each number whether it is."""

    def compare(x: Any, y: Any) -> Any:
        if not isinstance(x, Tensor):
            return None if x == y else Dim.DYNAMIC
        return {i: Dim.DYNAMIC for i, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if m != n}

    return tree_map(compare, inputs[0], inputs[1])


def outputs(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return output.sample, output.audio_sample


def graphs() -> int:
    """How many graphs Dynamo has compiled."""
    return counters["stats"]["unique_graphs"]


@every_release
def test_one_compiled_graph_serves_all_sizes_and_equals_eager(release: str) -> None:
    model, inputs = example(release, coords=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tree_map(lambda x, dims: torch._dynamo.mark_dynamic(x, list(dims)) if dims else None, inputs[0], dynamic(inputs))
    before = graphs()
    for size in inputs:
        assert all(map(torch.equal, outputs(compiled, size), outputs(model, size)))
    assert graphs() - before == 1


def test_frame_counts_and_fps_are_no_constants_of_the_compiled_graph() -> None:
    model, inputs = example("2.5")
    inputs = [size | {"fps": fps} for size, fps in zip(inputs, (25.0, 24.0, 50.0), strict=True)]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    before = graphs()
    for size in inputs:
        assert all(map(torch.equal, outputs(compiled, size), outputs(model, size)))
    assert graphs() - before == 1


@every_release
@pytest.mark.parametrize("coords", [None, torch.float32])
def test_one_exported_program_serves_all_sizes_and_equals_eager(release: str, coords: torch.dtype | None) -> None:
    model, inputs = example(release, num_layers=2, coords=coords)
    with torch.no_grad():
        program = export(model, (), inputs[0], dynamic_shapes=dynamic(inputs)).module()
    for size in inputs:
        assert all(map(torch.equal, outputs(program, size), outputs(model, size)))


def test_all_blocks_share_one_compiled_graph() -> None:
    model, inputs = example("2.5", num_layers=3)
    eager = [outputs(model, size) for size in inputs]
    torch._dynamo.reset()
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    before = graphs()
    for size, expected in zip(inputs, eager, strict=True):
        assert all(map(torch.equal, outputs(model, size), expected))
    assert graphs() - before == 2  # one with STG, one without
