"""Modules with any names are traced by a map of names; what cannot be known is missing, and nothing has a wrong name.

pytest tests/parity/test_layouts.py
"""

from collections.abc import Callable
from typing import Any

import foreign
import pytest
import torch
import torch.nn.functional as F
from foreign import LAYOUT, Foreign
from torch import Tensor, nn

from ltx2ref import Layout, LTX2VideoTransformer3DModel, assert_parity, trace
from ltx2ref.checkpoint.names import to_lightricks
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.generator import build
from ltx2ref.parity.run import run
from ltx2ref.parity.trace.layouts import DIFFUSERS_LIKE, LIGHTRICKS_LIKE
from ltx2ref.parity.trace.modules import taps_of_module
from ltx2ref.parity.trace.taps import SUBLAYERS, Taps

CASE = next(case for case in CASES if case.id == "2.3/t2v")
INPUTS = CASE.inputs()
STREAMS = [f"transformer_blocks.{i}.{name}.stream" for i in range(2) for name in SUBLAYERS]


@pytest.fixture(scope="module")
def model() -> LTX2VideoTransformer3DModel:
    return build(CASE.config, torch.float32)


@pytest.fixture(scope="module")
def ours(model: LTX2VideoTransformer3DModel) -> Taps:
    return run(model, INPUTS)


@pytest.fixture
def port(model: LTX2VideoTransformer3DModel) -> Foreign:
    return Foreign(model)


def near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_port_under_other_names_with_pairs_lists_functions_and_its_own_norms_has_every_tap(
    port: Foreign, ours: Taps
) -> None:
    found = taps_of_module(port, INPUTS, LAYOUT)
    assert found.keys() == ours.keys()
    assert [name for name, x in ours.items() if not near(x, found[name])] == []


def test_a_trace_leaves_functions_and_outputs_as_they_were(port: Foreign) -> None:
    with torch.no_grad():
        before = port(**INPUTS)
        kept = [dict(vars(module)) for layer in port.layers for module in layer.modules()]
        with trace(port, LAYOUT):
            during = port(**INPUTS)
        after = [dict(vars(module)) for layer in port.layers for module in layer.modules()]
    assert all(torch.equal(x, y) for x, y in zip(before, during, strict=True))
    assert [{key: id(x) for key, x in names.items()} for names in kept] == [
        {key: id(x) for key, x in names.items()} for names in after
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in port.modules())


class Inside(nn.Module):
    """What a project wraps around its transformer."""

    def __init__(self, port: nn.Module) -> None:
        super().__init__()
        self.engine = nn.ModuleDict({"transformer": port})

    def forward(self, **inputs: Any) -> Any:
        return self.engine["transformer"](**inputs)


def test_a_module_is_found_inside_others(port: Foreign, ours: Taps) -> None:
    assert taps_of_module(Inside(port), INPUTS, LAYOUT).keys() == ours.keys()


def test_a_module_under_unknown_names_is_called_and_the_report_says_so(
    port: Foreign, model: LTX2VideoTransformer3DModel
) -> None:
    report = assert_parity(model, port, INPUTS)
    (note,) = [note for note in report.notes if "ltx2ref.Layout" in note]
    assert note.startswith("Foreign has no layers under known names, so only its outputs were read")
    with pytest.raises(AssertionError, match="sample"):
        assert_parity(model, Broken(port), INPUTS)


class Broken(Inside):
    def forward(self, **inputs: Any) -> Any:
        video, audio = super().forward(**inputs)
        return video * 1.01, audio


def test_a_layer_that_is_not_where_the_map_says_is_named(port: Foreign, ours: Taps) -> None:
    with trace(port, LAYOUT.renamed({"attn1": "self_vidoe", "proj_in": ("in_video", "embed")})) as taps:
        port(**INPUTS)
    assert taps.notes == ["Foreign has no proj_in, transformer_blocks.0.attn1, so their taps are missing"]  # type: ignore[attr-defined]
    missing = ours.keys() - taps.keys()
    assert missing and all(name == "proj_in" or ".attn1." in name for name in missing)


def test_what_cannot_be_read_is_noted_and_the_forward_goes_on(port: Foreign, ours: Taps) -> None:
    wrong = LAYOUT.renamed({"scale_shift_table": "table_audio"})  # another width
    with torch.no_grad(), trace(port, wrong) as taps:
        video, _ = port(**INPUTS)
    assert near(video, ours["sample"])
    assert any(note.startswith("transformer_blocks.0.attn1: not traced: ") for note in taps.notes)  # type: ignore[attr-defined]
    assert "transformer_blocks.0.audio_attn1.rows" in taps and "transformer_blocks.0.attn1.rows" not in taps


# ---------------------------------------------------------------- residuals
def twice(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return RMS(RMS(x), weight)


def of_torch(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def with_one_more(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Normalise something else of the same shape, before and afterwards."""
    of_torch(x * 2)
    normed = of_torch(x, weight)
    of_torch(normed + x)
    return normed


def in_place(x: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x.clone()
    y.mul_(y.pow(2).mean(-1, keepdim=True).add_(1e-6).rsqrt_())
    return y if weight is None else y.mul_(weight)


def by_a_root(x: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y if weight is None else y * weight


def through_numpy(x: Tensor, weight: Tensor | None = None) -> Tensor:
    return torch.from_numpy(RMS(x, weight).numpy())


RMS = foreign.rms


@pytest.mark.parametrize("norm", [of_torch, with_one_more, in_place, by_a_root, twice])
def test_residuals_are_found_whatever_function_normalises_them(
    norm: Callable[..., Tensor], model: LTX2VideoTransformer3DModel, ours: Taps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "rms", norm)
    taps = taps_of_module(Foreign(model), INPUTS, LAYOUT)
    assert all(name in taps for name in STREAMS)
    exact = [name for name in STREAMS if near(ours[name], taps[name])]
    assert exact == STREAMS if norm is not twice else exact[:2] == STREAMS[:2]


def test_a_residual_whose_norm_cannot_be_followed_is_missing(
    model: LTX2VideoTransformer3DModel, ours: Taps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "rms", through_numpy)
    taps = taps_of_module(Foreign(model), INPUTS, LAYOUT)
    assert ours.keys() - taps.keys() == {*STREAMS}


class Reused(nn.Module):
    """A block whose second sub-layer is given what was left of the norm for the first, or a residual that changed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.attn1, self.ff = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        h = of_torch(x)
        y = self.attn1(h * 2 + 1)
        if self.how == "overwritten":
            h = of_torch(y)
            y.add_(x)
            self.ff(h * 2)
        elif self.how == "added":
            y = x + h * 0.5  # a sub-layer left out by a shortcut: the next residual, and no norm of x
            self.ff(y * 2)
        else:
            self.ff(torch.sin(h))
        return y, audio


class OneBlock(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Reused(how)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.transformer_blocks[0](x, x + 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", ["overwritten", "added", "unknown function"])
def test_a_residual_never_has_the_name_of_another(how: str, inference: bool) -> None:
    x, module = torch.randn(1, 3, 8), OneBlock(how)
    with torch.inference_mode(inference), torch.set_grad_enabled(False), trace(module, DIFFUSERS_LIKE) as taps:
        module(x)
    assert torch.equal(taps["transformer_blocks.0.attn1.stream"], x)
    found = taps.get("transformer_blocks.0.ff.stream")
    if how == "overwritten" and inference:  # which is copied, because such tensors do not count their changes
        assert found is not None and torch.equal(found, module.transformer_blocks[0].attn1(of_torch(x) * 2 + 1))  # type: ignore[operator]
    else:
        assert found is None


def test_attention_outside_the_sub_layers_is_no_tap(port: Foreign, ours: Taps) -> None:
    class Connected(Inside):
        def forward(self, **inputs: Any) -> Any:
            text = inputs["encoder_hidden_states"][:, None]
            F.scaled_dot_product_attention(text, text, text)
            return super().forward(**inputs)

    assert taps_of_module(Connected(port), INPUTS, LAYOUT).keys() == ours.keys()


# ---------------------------------------------------------------- compiled modules
def test_a_compiled_module_gives_its_taps_and_the_outputs_of_the_compiled_one(
    model: LTX2VideoTransformer3DModel, ours: Taps
) -> None:
    class Other(nn.Module):  # ours under diffusers' names, but no module of ours
        def __init__(self) -> None:
            super().__init__()
            for name, child in model.named_children():
                setattr(self, name, child)
            self.inner = [model]

        def forward(self, **inputs: Any) -> Any:
            return tuple(self.inner[0](**inputs))

    calls = []

    def backend(graph: Any, _: Any) -> Any:
        def run_graph(*args: Any) -> Any:
            calls.append(1)
            return [x * 1.5 if isinstance(x, Tensor) and x.shape[-1] == 5 else x for x in graph(*args)]

        return run_graph

    compiled = torch.compile(Other(), backend=backend)
    found = taps_of_module(compiled, INPUTS)
    assert calls
    inside = [name for name in ours if name in found and name not in ("sample", "audio_sample")]
    assert len(inside) > 150 and all(torch.equal(ours[name], found[name]) for name in inside)
    assert torch.equal(found["sample"], ours["sample"] * 1.5) and torch.equal(
        found["audio_sample"], ours["audio_sample"]
    )


# ---------------------------------------------------------------- ready layouts
def test_the_ready_layouts_name_what_the_published_dialects_name(model: LTX2VideoTransformer3DModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    assert all(DIFFUSERS_LIKE.find(model, name) is not None for name in names)
    assert LIGHTRICKS_LIKE.find(model, "proj_in") is None
    renamed = Names({to_lightricks(name): name for name in names})
    assert [LIGHTRICKS_LIKE.find(renamed, name).value for name in names] == names  # type: ignore[union-attr]


class Names:
    """An object whose attributes are the names of a dialect."""

    def __init__(self, names: dict[str, str]) -> None:
        for first in {name.partition(".")[0] for name in names}:
            below = {name.partition(".")[2]: x for name, x in names.items() if name.partition(".")[0] == first}
            setattr(self, first, below[""] if "" in below else Names(below))


def test_the_longest_key_wins_and_a_level_can_be_left_out() -> None:
    module = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(1, 1), "y": nn.Linear(1, 2)}), "b": nn.Linear(1, 3)})
    layout = Layout({"one": "a", "one.two": "b", "three": ("z", "y"), "level": "", "gone": "z"})
    for path, there in {
        "one.x": "a.x",
        "one.two": "b",
        "one.three": "a.y",
        "level.b": "b",
        "one.level.x": "a.x",
    }.items():
        found = layout.find(module, path)
        assert found is not None and found.value is module.get_submodule(there), path
    assert layout.find(module, "gone") is None and layout.find(module, "one.gone.x") is None
    assert layout.find(module, "three") is None
