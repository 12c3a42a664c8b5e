"""A stream may be absent: the other one is what isolation makes it, to the bit, and nothing is computed for both.

pytest tests/model/test_one_stream.py
"""

import contextlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutants import ABSENT, patched
from tiny import Inputs, random_inputs, random_model, tiny_config, without
from torch import Tensor, nn

from ltx2ref import LTX_CORE_2026_03, exact, trace
from ltx2ref.interface import LEFT_OUT
from ltx2ref.interface import LTX2VideoTransformer3DModel as Bare

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER = {"video": "audio", "audio": "video"}
INDEX = {"video": 0, "audio": 1}  # of the outputs
EXCHANGE = ("av_cross_attn_", "cross_attn_", "audio_to_video_attn", "video_to_audio_attn")
# Options of `random_inputs`, in which every argument of a stream that the other one could hear is there.
CASES: dict[str, dict[str, Any]] = {
    "text-to-video": {},
    "image-to-video": {"per_token": True, "text_masks": torch.int64, "batch": 3},
    "cross-timestep": {"per_token": True, "use_cross_timestep": True},
    "coordinates": {"coords": torch.float32, "stg": True, "self_mask": True, "keyframes": True},
}
releases = pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
streams = pytest.mark.parametrize("stream", ["video", "audio"])  # the one that is there
arithmetics = pytest.mark.parametrize("arithmetic", [contextlib.nullcontext, exact], ids=["native", "exact"])


def outputs(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model(**inputs, return_dict=False)


def assert_isolated(model: Any, stream: str, inputs: Inputs, arithmetic: Any = contextlib.nullcontext) -> None:
    with arithmetic():
        isolated, alone = outputs(model, inputs | {"isolate_modalities": True}), outputs(model, only(stream, inputs))
    there, other = INDEX[stream], INDEX[OTHER[stream]]
    assert alone[there].dtype == isolated[there].dtype and torch.equal(alone[there], isolated[there])
    assert alone[other].shape == (len(alone[there]), 0, isolated[other].shape[2])


def only(stream: str, inputs: Inputs) -> Inputs:
    return without(OTHER[stream], inputs)


@releases
@streams
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:.*no effect on a model")
def test_a_stream_alone_has_the_bits_of_an_isolated_one(release: str, stream: str, case: str, dtype: str) -> None:
    model = random_model(tiny_config(release), DTYPES[dtype])
    assert_isolated(model, stream, random_inputs(model.config, DTYPES[dtype], **CASES[case]))


@pytest.mark.slow
@releases
@streams
@pytest.mark.parametrize("dtype", DTYPES)
@arithmetics
def test_a_stream_alone_has_the_bits_of_an_isolated_one_in_every_arithmetic(
    release: str, stream: str, dtype: str, arithmetic: Any
) -> None:
    if (dtype, arithmetic) == ("float64", exact):
        pytest.skip("exact arithmetic rounds to float32 and narrower dtypes")
    model = random_model(tiny_config(release), DTYPES[dtype])
    for options in ({"per_token": True, "use_cross_timestep": True}, {"text_masks": torch.int64, "grid": (1, 2, 3)}):
        assert_isolated(model, stream, random_inputs(model.config, DTYPES[dtype], **options), arithmetic)


@pytest.mark.ltx_core
@pytest.mark.parametrize("release", ["2.0", "2.3"])
@streams
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@arithmetics
def test_a_stream_alone_has_the_bits_of_ltx_core_without_the_other(
    release: str, stream: str, dtype: str, arithmetic: Any
) -> None:
    from ltx2ref.parity.oracles.ltx_core import build_ltx_core, run_ltx_core

    model = random_model(tiny_config(release), DTYPES[dtype])
    ours = Bare(model.config, conventions=LTX_CORE_2026_03)
    ours.load_state_dict(model.state_dict(), assign=True)
    port = build_ltx_core(model.config.to_diffusers(), model.state_dict(), DTYPES[dtype])
    for options in ({}, {"per_token": True, "text_masks": torch.int64, "stg": True}):
        inputs = only(stream, random_inputs(model.config, DTYPES[dtype], **options) | {"use_cross_timestep": True})
        with torch.no_grad(), arithmetic():
            theirs = run_ltx_core(port, inputs)
            assert torch.equal(ours(**inputs)[INDEX[stream]], theirs[INDEX[stream]])


# ---------------------------------------------------------------- no work
def called(model: nn.Module, inputs: Inputs) -> list[str]:
    """Return the names of all layers that a forward calls."""
    names: list[str] = []
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.RMSNorm)]
    hooks = [layer.register_forward_hook(lambda *_, name=name: names.append(name)) for name, layer in layers if name]
    outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    return names


def own(stream: str, name: str) -> bool:
    """Tell whether a layer or a tap is the stream's own, and not one for the exchange."""
    layer = re.sub(r"^transformer_blocks\.\d+\.", "", name)
    return not layer.startswith(EXCHANGE) and layer.startswith("audio") == (stream == "audio")


def assert_only_own_layers(model: Any, stream: str, inputs: Inputs) -> None:
    alone = called(model, only(stream, inputs))
    assert alone and all(own(stream, name) for name in alone)
    isolated = called(model, inputs | {"isolate_modalities": True})
    assert sorted(alone) == sorted(name for name in isolated if own(stream, name))


@releases
@streams
def test_only_the_streams_own_layers_are_called(release: str, stream: str) -> None:
    model = random_model(tiny_config(release))
    assert_only_own_layers(model, stream, random_inputs(model.config, per_token=True, use_cross_timestep=True))


@streams
@pytest.mark.parametrize(("mutant", "check"), [("exchanged", assert_isolated), ("embedded", assert_only_own_layers)])
def test_a_stream_that_is_exchanged_with_nothing_or_given_the_absent_ones_noise_level_is_noticed(
    mutant: str, check: Callable[..., None], stream: str
) -> None:
    model = random_model(tiny_config("2.3"))
    inputs = random_inputs(model.config)
    check(model, stream, inputs)
    with patched(ABSENT[mutant]()), pytest.raises(AssertionError):
        check(model, stream, inputs)


@releases
@streams
def test_the_taps_are_those_of_the_isolated_run_that_are_the_streams_own(release: str, stream: str) -> None:
    model = random_model(tiny_config(release))
    inputs = random_inputs(model.config, per_token=True)
    with torch.no_grad(), trace(model) as isolated:
        model(**inputs, isolate_modalities=True)
    with torch.no_grad(), trace(model) as alone:
        model(**only(stream, inputs))
    expected = {name: x for name, x in isolated.items() if own(stream, name)}
    assert alone.keys() == expected.keys() and len(alone) > 50
    assert all(torch.equal(alone[name], x) for name, x in expected.items())


# ---------------------------------------------------------------- gradients, compilation, export
@releases
@streams
def test_only_the_streams_own_parameters_have_gradients_and_they_are_those_of_the_isolated_run(
    release: str, stream: str
) -> None:
    gradients = []
    for arguments in ({"isolate_modalities": True}, None):
        model = random_model(tiny_config(release)).requires_grad_(True)
        inputs = random_inputs(model.config, per_token=True)
        found = model(**(only(stream, inputs) if arguments is None else inputs | arguments))
        found[INDEX[stream]].square().sum().backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    isolated, alone = gradients
    assert alone.keys() == {name for name, x in isolated.items() if x.any()} and len(alone) > 10
    assert all(torch.equal(isolated[name], x) for name, x in alone.items())


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.filterwarnings("ignore")
@streams
def test_it_compiles_whole_and_exports_with_the_stream_that_is_fixed_as_absent(stream: str) -> None:
    model = random_model(tiny_config("2.3"))
    inputs = only(stream, random_inputs(model.config, per_token=True))
    eager = outputs(model, inputs)
    compiled = outputs(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs | {"return_dict": False}).module()(**inputs, return_dict=False)
    for found in (compiled, exported):
        assert all(x.shape == y.shape for x, y in zip(found, eager, strict=True))
        torch.testing.assert_close(found[INDEX[stream]], eager[INDEX[stream]])


# ---------------------------------------------------------------- what is refused
@streams
@pytest.mark.parametrize("how", ["coordinates", "nothing"])
def test_an_absent_stream_may_have_coordinates_of_no_tokens_and_any_other_argument(stream: str, how: str) -> None:
    """With such coordinates an empty stream once passed as one that is there, and was heard."""
    model = random_model(tiny_config("2.3"))
    inputs = random_inputs(model.config, per_token=True, text_masks=torch.int64, coords=torch.float32)
    prefix, axes = ("", 3) if stream == "audio" else ("audio_", 1)
    nothing = {prefix + "hidden_states": inputs[prefix + "hidden_states"][:, :0]}
    given = torch.ones(2, axes, 0, 2) if how == "coordinates" else None
    changes = nothing | {f"{prefix or 'video_'}coords": given}
    alone = outputs(model, inputs | changes)
    assert torch.equal(alone[INDEX[stream]], outputs(model, inputs | {"isolate_modalities": True})[INDEX[stream]])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both absent": (
        {"hidden_states": (2, 0, 17), "audio_hidden_states": (2, 0, 18)},
        "hidden_states and audio_hidden_states: expected tokens in one of them, got none in both",
    ),
    "frames of no tokens": (
        {"audio_hidden_states": (2, 0, 18)},
        f"audio_hidden_states: 0 tokens, expected 11, (11,) ({LEFT_OUT})",
    ),
    "coordinates of no tokens": (
        {"audio_hidden_states": (2, 0, 18), "audio_coords": (2, 1, 11, 2), "audio_num_frames": None},
        "audio_coords: expected shape (2, 1, 0, 2) or (2, 1, 0), got (2, 1, 11, 2)",
    ),
    "another width": (
        {"audio_hidden_states": (2, 0, 17), "audio_num_frames": 0},
        "audio_hidden_states: expected shape (2, 0, 18), got (2, 0, 17)",
    ),
    "an empty text": (
        {"encoder_hidden_states": (2, 0, 56)},
        f"encoder_hidden_states: expected shape (2, S, 56), not empty ({LEFT_OUT}), got (2, 0, 56)",
    ),
    "empty coordinates": (
        {"audio_coords": (2, 1, 0, 2)},
        f"audio_coords: expected shape (2, 1, 11, 2) or (2, 1, 11), not empty ({LEFT_OUT}), got (2, 1, 0, 2)",
    ),
    "frames alone": (
        {"audio_num_frames": 0},
        f"audio_num_frames: expected a positive integer or audio_coords, got 0 ({LEFT_OUT})",
    ),
    "empty noise levels": (
        {"audio_timestep": (2, 0)},
        f"audio_timestep: expected shape (2) or (2, 1) or (2, 11), not empty ({LEFT_OUT}), got (2, 0)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_empty_elsewhere_is_refused_with_how_a_stream_is_left_out(case: str) -> None:
    changes, said = REFUSED[case]
    model = random_model(tiny_config("2.3"))
    changes = {name: torch.ones(x) if isinstance(x, tuple) else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        outputs(model, random_inputs(model.config) | changes)


@streams
def test_a_stream_alone_needs_no_sigma_where_only_the_exchange_would(stream: str) -> None:
    model = random_model(tiny_config("2.0"))
    inputs = only(stream, random_inputs(model.config)) | {"use_cross_timestep": True}
    without_sigmas = outputs(model, inputs | {"sigma": None, "audio_sigma": None})
    assert torch.equal(without_sigmas[INDEX[stream]], outputs(model, inputs)[INDEX[stream]])


def test_the_sigma_that_is_missing_is_called_by_its_argument() -> None:
    model = random_model(tiny_config("2.3"))
    said = "sigma, to which audio_sigma defaults: expected a tensor, for prompt_adaln or the exchange; got None"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        outputs(model, only("audio", random_inputs(model.config)) | {"sigma": None, "audio_sigma": None})


def test_no_mask_of_an_absent_stream_is_warned_of() -> None:
    model = random_model(tiny_config("2.3"))
    inputs = random_inputs(model.config) | {"attention_kwargs": {"video_keyframes_mask": torch.ones(2, 105, 1)}}
    with pytest.warns(UserWarning, match="video_keyframes_mask: no effect"):
        outputs(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs(model, inputs | {"hidden_states": inputs["hidden_states"][:, :0], "num_frames": 0})


@pytest.mark.parametrize("stream", ["hidden_states", "audio_hidden_states"])
def test_a_stream_that_is_none_is_refused(stream: str) -> None:
    model = random_model(tiny_config("2.3"))
    with pytest.raises(TypeError, match=f"^{stream}: expected a tensor, got NoneType$"):
        outputs(model, random_inputs(model.config) | {stream: None})


@pytest.mark.parametrize("frames", [False, 0.0, -1, "x", []])
def test_the_frames_of_an_absent_stream_are_zero_or_nothing(frames: Any) -> None:
    model = random_model(tiny_config("2.3"))
    said = f"audio_num_frames: expected a whole number or None, got {frames!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        outputs(model, only("video", random_inputs(model.config)) | {"audio_num_frames": frames})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_states": (3, 0, 17)}, "hidden_states: expected shape (2, 0, 17), got (3, 0, 17)"),
        (
            {"timestep": None, "audio_timestep": None},
            "timestep, to which audio_timestep defaults: expected a tensor, got NoneType",
        ),
        (
            {"sigma": (3,), "audio_sigma": None},
            "sigma, to which audio_sigma defaults: expected shape (2) or (2, 1), got (3,)",
        ),
        (
            {"audio_hidden_states": (0, 11, 18)},
            "audio_hidden_states: expected shape (B, T, 18), not empty, got (0, 11, 18)",
        ),
        ({"audio_hidden_states": (2, 0)}, "audio_hidden_states: expected shape (B, T, 18), not empty, got (2, 0)"),
    ],
)
def test_an_error_names_the_argument_that_is_wrong(changes: dict[str, Any], said: str) -> None:
    model = random_model(tiny_config("2.3"))
    changes = {name: torch.ones(x) if isinstance(x, tuple) else x for name, x in changes.items()}
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(said)}$"):
        outputs(model, only("audio", random_inputs(model.config)) | changes)
