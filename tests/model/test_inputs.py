"""The documented forward refuses bad input at the door, by argument and value, and takes all that is good.

pytest tests/model/test_inputs.py
"""

import ast
import functools
import inspect
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Inputs, random_inputs, random_model, tiny_config
from torch import LongTensor, Tensor

from ltx2ref import AudioVisualModelOutput, LTX2VideoTransformer3DModel
from ltx2ref.interface import LEFT_OUT

BATCH, GRID, AUDIO_FRAMES, TEXT, AUDIO_TEXT = 2, (3, 2, 5), 4, 6, 7
TOKENS = 30
MASKS = ("video_self_attention_mask", "video_keyframes_mask")  # these travel in `attention_kwargs`

# Annotations of the documentation, as types.
ANNOTATIONS: dict[str, Any] = {
    "Tensor": Tensor,
    "LongTensor": LongTensor,
    "torch.Tensor | None": Tensor | None,
    "torch.LongTensor | None": LongTensor | None,
    "int | None": int | None,
    "float": float,
    "bool": bool,
    "list[int] | None": list[int] | None,
    "dict[str, typing.Any] | None": dict[str, Any] | None,
}


@functools.cache
def model(release: str, **changes: Any) -> LTX2VideoTransformer3DModel:
    sizes = {"in_channels": 5, "audio_in_channels": 6, "caption_channels": 11, "num_layers": 2}
    return random_model(tiny_config(release, **sizes | changes))


def inputs(release: str = "2.5") -> Inputs:
    """Return complete and valid inputs, with all optional tensors except coordinates and masks."""
    return random_inputs(
        model(release).config, batch=BATCH, grid=GRID, audio_frames=AUDIO_FRAMES, text_tokens=(TEXT, AUDIO_TEXT)
    )


def with_changes(given: Inputs, changes: Inputs) -> Inputs:
    """Return `given` with some arguments changed. Masks in `attention_kwargs` may be named like arguments."""
    masks = {name: changes[name] for name in MASKS if name in changes}
    changes = {name: value for name, value in changes.items() if name not in MASKS}
    return given | changes | ({"attention_kwargs": masks} if masks else {})


def forward(changes: Inputs, release: str = "2.5", **config: Any) -> AudioVisualModelOutput:
    """Run the model on the valid inputs with some arguments changed. It may not warn."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        return model(release, **config)(**with_changes(inputs(release), changes))


def equal(a: AudioVisualModelOutput, b: AudioVisualModelOutput) -> bool:
    assert all(x.isfinite().all() for x in (*a, *b))
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(
    error: type[Exception] | tuple[type[Exception], ...],
    argument: str,
    given: str,
    changes: Inputs,
    release: str = "2.5",
) -> None:
    """Require that the model raises `error`, with a message that begins with `argument` and says what was `given`."""
    with pytest.raises(error) as raised:
        forward(changes, release)
    message = str(raised.value)
    assert re.match(rf"{argument}(?!\w)", message), message
    assert re.search(rf"(?<![\w.-]){re.escape(given)}(?![\w.]\w)", message[len(argument) :]), message


# ---------------------------------------------------------------- shapes
# The right shapes for this model of release 2.5: latents (2, 30, 5) and (2, 4, 6), text (2, 6, 52) and (2, 7, 28).
OUT, AUDIO_OUT = tiny_config("2.5").out_channels, tiny_config("2.5").audio_out_channels
WRONG_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "hidden_states": [(2, 30, 6), (30, 5), (2, 1, 30, 5)],
    "audio_hidden_states": [(2, 4, 5), (4, 6), (2, 1, 4, 6), (3, 4, 6), (1, 4, 6)],
    "encoder_hidden_states": [(2, 6, 12), (6, 52), (2, 1, 6, 52), (3, 6, 52), (1, 6, 52)],
    "audio_encoder_hidden_states": [(2, 7, 52), (7, 28), (2, 1, 7, 28), (3, 7, 28), (1, 7, 28)],
    "timestep": [(), (1,), (3,), (2, 2), (2, 29), (3, 30), (2, 30, 1)],
    "audio_timestep": [(), (1,), (3,), (2, 2), (2, 30), (3, 4), (2, 4, 1)],
    "sigma": [(), (1,), (3,), (2, 2), (2, 30), (2, 1, 1)],
    "audio_sigma": [(), (1,), (3,), (2, 2), (2, 4), (2, 1, 1)],
    "encoder_attention_mask": [(6,), (3, 6), (1, 6), (2, 7), (2, 30, 7), (2, 4, 6), (3, 1, 6), (2, 1, 1, 6)],
    "audio_encoder_attention_mask": [(7,), (3, 7), (1, 7), (2, 6), (2, 4, 6), (2, 30, 7), (3, 1, 7), (2, 1, 1, 7)],
    "video_coords": [
        (3, 30, 2),
        (2, 1, 30, 2),
        (2, 3, 29, 2),
        (3, 3, 30, 2),
        (1, 3, 30),
        (2, 3, 30, 3),
        (2, 1, 30),
        (2, 30),
    ],
    "audio_coords": [(1, 4, 2), (2, 3, 4, 2), (2, 1, 5, 2), (3, 1, 4, 2), (1, 1, 4), (2, 1, 4, 3), (2, 3, 4), (2, 4)],
    "perturbation_mask": [(), (1,), (3,), (2, 1), (1, 2), (3, 1, 1), (2, 30, 1), (2, 1, 1, 1)],
    "video_self_attention_mask": [(30, 30), (1, 30, 30), (2, 1, 30), (2, 30, 29), (2, 1, 30, 30)],
    "video_keyframes_mask": [(2, 30), (2, 29, 1), (2, 30, 2), (1, 30, 1), (3, 30, 1)],
}


@pytest.mark.parametrize(
    ("argument", "shape"), [(name, shape) for name, shapes in WRONG_SHAPES.items() for shape in shapes]
)
def test_a_tensor_of_a_wrong_shape_is_refused(argument: str, shape: tuple[int, ...]) -> None:
    refused(ValueError, argument, str(shape), {argument: torch.ones(shape)})


@pytest.mark.parametrize(
    ("argument", "shape"), [("encoder_hidden_states", (2, 6, 26)), ("audio_encoder_hidden_states", (2, 7, 26))]
)
def test_text_of_another_width_than_caption_channels_is_refused_in_release_2_0(
    argument: str, shape: tuple[int, ...]
) -> None:
    refused(ValueError, argument, str(shape), {argument: torch.ones(shape)}, "2.0")


def test_another_batch_of_video_than_of_everything_else_is_refused() -> None:
    refused(ValueError, "encoder_hidden_states", "(2, 6, 52)", {"hidden_states": torch.ones(3, 30, 5)})


@pytest.mark.parametrize("coords", [False, True])
@pytest.mark.parametrize(
    ("argument", "expected", "given"),
    [
        ("encoder_hidden_states", "(2, S, 52)", (2, 0, 52)),
        ("audio_encoder_hidden_states", "(2, S, 28)", (2, 0, 28)),
        ("hidden_states", "(B, T, 5)", (0, 30, 5)),
    ],
)
def test_an_empty_text_or_batch_is_refused_with_coordinates_and_without(
    argument: str, expected: str, given: tuple[int, ...], coords: bool
) -> None:
    changes: Inputs = {argument: torch.ones(given)}
    if coords:
        coordinates = {"video_coords": torch.ones(2, 3, TOKENS, 2), "audio_coords": torch.ones(2, 1, AUDIO_FRAMES, 2)}
        changes |= coordinates | NO_GRID
    with pytest.raises(ValueError) as raised:
        forward(changes)
    hint = f" ({LEFT_OUT})" if given[0] else ""  # without a batch there is no stream to leave out
    assert str(raised.value) == f"{argument}: expected shape {expected}, not empty{hint}, got {given}"


def test_an_empty_batch_of_everything_is_refused() -> None:
    """Here, no argument contradicts another."""
    everything = {name: x[:0] for name, x in inputs().items() if isinstance(x, Tensor)}
    expected = "hidden_states: expected shape (B, T, 5), not empty, got (0, 30, 5)"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        forward(everything)


@pytest.mark.parametrize(
    "argument", ["hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_another_dtype_than_the_models_is_refused(argument: str, dtype: torch.dtype) -> None:
    refused(ValueError, argument, str(dtype), {argument: inputs()[argument].to(dtype)})


@pytest.mark.parametrize("argument", WRONG_SHAPES)
@pytest.mark.parametrize("value", [[1.0, 2.0], 0.5, "ones"])
def test_what_is_no_tensor_is_a_type_error(argument: str, value: object) -> None:
    refused(TypeError, argument, type(value).__name__, {argument: value})


@pytest.mark.parametrize(
    "argument",
    ["hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states", "timestep"],
)
def test_none_in_place_of_a_required_tensor_is_a_type_error(argument: str) -> None:
    refused(TypeError, argument, "NoneType", {argument: None})


@pytest.mark.parametrize("shape", [(2, 1, 6), (2, 30, 6)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_a_text_mask_of_three_dimensions_is_neither_integer_nor_multiplicative(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    audio_shape = (2, 1 if shape[1] == 1 else AUDIO_FRAMES, AUDIO_TEXT)
    for argument, ones in (
        ("encoder_attention_mask", torch.ones(shape, dtype=dtype)),
        ("audio_encoder_attention_mask", torch.ones(audio_shape, dtype=dtype)),
    ):
        refused(ValueError, argument, str(dtype), {argument: ones})


# ---------------------------------------------------------------- tokens and positions
@pytest.mark.parametrize(
    ("argument", "changes", "expected", "given"),
    [
        ("hidden_states", {"num_frames": 4}, 40, 30),
        ("hidden_states", {"height": 1}, 15, 30),
        ("hidden_states", {"width": 6}, 36, 30),
        ("audio_hidden_states", {"audio_num_frames": 5}, 5, 4),
        ("hidden_states", {"hidden_states": torch.ones(2, 29, 5)}, 30, 29),
        ("audio_hidden_states", {"audio_hidden_states": torch.ones(2, 3, 6)}, 4, 3),
    ],
)
def test_tokens_that_are_not_the_grid_are_refused(argument: str, changes: Inputs, expected: int, given: int) -> None:
    refused(ValueError, argument, str(given), changes)
    refused(ValueError, argument, str(expected), changes)


@pytest.mark.parametrize("argument", ["num_frames", "height", "width", "audio_num_frames"])
@pytest.mark.parametrize("value", [None, 0, -3])
def test_a_size_of_the_grid_that_is_missing_or_not_positive_is_refused(argument: str, value: int | None) -> None:
    refused(ValueError, argument, str(value), {argument: value})
    coords = "audio_coords" if argument.startswith("audio") else "video_coords"
    refused(ValueError, argument, coords, {argument: value})


@pytest.mark.parametrize("argument", ["num_frames", "height", "width", "audio_num_frames"])
@pytest.mark.parametrize("value", ["3", [3], 2.5])
def test_a_size_of_the_grid_that_is_no_integer_is_refused(argument: str, value: Any) -> None:
    refused((ValueError, TypeError), argument, repr(value), {argument: value})


@pytest.mark.parametrize("value", [0, 0.0, -24.0, math.inf, -math.inf, math.nan])
def test_frames_per_second_that_are_not_positive_and_finite_are_refused(value: float) -> None:
    refused(ValueError, "fps", str(value), {"fps": value})


@pytest.mark.parametrize("value", ["24", None, [24.0], torch.tensor(24.0)])
def test_frames_per_second_that_are_no_number_are_a_type_error(value: object) -> None:
    refused(TypeError, "fps", type(value).__name__, {"fps": value})


# ---------------------------------------------------------------- timesteps
def test_a_timestep_per_video_token_does_not_fit_the_audio_stream() -> None:
    changes = {"timestep": torch.ones(2, 30), "audio_timestep": None}
    refused(ValueError, "timestep, to which audio_timestep defaults", "(2, 30)", changes)


@pytest.mark.parametrize(
    ("release", "changes"),
    [("2.0", {"use_cross_timestep": True}), ("2.3", {}), ("2.5", {}), ("2.5", {"use_cross_timestep": True})],
)
@pytest.mark.parametrize("audio", [False, True])
def test_sigma_may_not_be_missing_where_something_needs_it(release: str, changes: Inputs, audio: bool) -> None:
    given = inputs(release)["audio_sigma"] if audio else None
    refused(ValueError, "sigma", "None", changes | {"sigma": None, "audio_sigma": given}, release)


# ---------------------------------------------------------------- guidance and attention_kwargs
@pytest.mark.parametrize("blocks", [[2], [-1], [0, 7], [0.5], ["1"], [None]])
@pytest.mark.parametrize("release", ["2.0", "2.5"])  # includes 2.0, in which it has no effect
def test_a_guidance_block_that_the_model_does_not_have_is_refused(blocks: list[Any], release: str) -> None:
    refused(
        ValueError,
        "spatio_temporal_guidance_blocks",
        repr(blocks[-1]),
        {"spatio_temporal_guidance_blocks": blocks},
        release,
    )


def test_an_unknown_attention_argument_is_refused_and_the_known_ones_are_named() -> None:
    for said in ("ip_adapter", *MASKS):
        refused(ValueError, "attention_kwargs", said, {"attention_kwargs": {"ip_adapter": 1}})


def test_the_scale_of_a_lora_is_refused_with_a_pointer_to_loading_it() -> None:
    for said in ("scale", "LoRA", "load"):
        refused(ValueError, "attention_kwargs", said, {"attention_kwargs": {"scale": 0.5}})


# ---------------------------------------------------------------- what must be accepted
def zeros_and_ones(*shape: int) -> Tensor:
    """Return zeros and ones of which each row keeps and masks something."""
    return (torch.arange(math.prod(shape)).reshape(shape) % 3 != 1).float()


def bounds(axes: int, tokens: int) -> Tensor:
    return torch.rand(2, axes, tokens, 2, generator=torch.Generator().manual_seed(1)).cumsum(-1)


STEPS, KEEP = torch.tensor([3.0, 700.0]), torch.tensor([0.0, 1.0])
STG = {"spatio_temporal_guidance_blocks": [1]}
TEXT_MASKS = {
    "encoder_attention_mask": zeros_and_ones(2, TEXT),
    "audio_encoder_attention_mask": zeros_and_ones(2, AUDIO_TEXT),
}
TEXT_TOKENS = {"encoder_attention_mask": TOKENS, "audio_encoder_attention_mask": AUDIO_FRAMES}  # that ask
VIDEO_BOUNDS, AUDIO_BOUNDS = bounds(3, TOKENS), bounds(1, AUDIO_FRAMES)
SELF_MASK, KEYFRAMES = zeros_and_ones(2, TOKENS, TOKENS), zeros_and_ones(2, TOKENS, 1)
NO_GRID = {"num_frames": None, "height": None, "width": None, "audio_num_frames": None}
BOUNDS = {"video_coords": VIDEO_BOUNDS, "audio_coords": AUDIO_BOUNDS}

# Arguments, and other arguments that mean the same.
SAME: dict[str, tuple[Inputs, Inputs]] = {
    **{
        f"integer-{name}": ({name: STEPS.long()}, {name: STEPS})
        for name in ("timestep", "audio_timestep", "sigma", "audio_sigma")
    },
    **{
        f"column-{name}": ({name: STEPS[:, None]}, {name: STEPS})
        for name in ("timestep", "audio_timestep", "sigma", "audio_sigma")
    },
    **{
        f"{name}-of-both": ({name: STEPS, f"audio_{name}": None}, {name: STEPS, f"audio_{name}": STEPS})
        for name in ("timestep", "sigma")
    },
    **{
        f"{name}-{dtype}": ({name: mask.to(dtype)}, {name: mask})
        for name, mask in TEXT_MASKS.items()
        for dtype in (torch.bool, torch.int32, torch.int64, torch.uint8, torch.bfloat16, torch.float64)
    },
    **{f"{name}-bias": ({name: (1 - mask[:, None]) * -10_000}, {name: mask}) for name, mask in TEXT_MASKS.items()},
    **{
        f"{name}-bias-per-query": (
            {name: ((1 - mask[:, None]) * -10_000).repeat(1, TEXT_TOKENS[name], 1)},
            {name: mask},
        )
        for name, mask in TEXT_MASKS.items()
    },
    **{
        f"{name}-keep-per-query": (
            {name: mask[:, None].bool().repeat(1, TEXT_TOKENS[name], 1)},
            {name: mask[:, None].bool()},
        )
        for name, mask in TEXT_MASKS.items()
    },
    "middles": ({"video_coords": VIDEO_BOUNDS.sum(-1) / 2, "audio_coords": AUDIO_BOUNDS.sum(-1) / 2}, BOUNDS),
    "no-grid-but-coords": (NO_GRID | BOUNDS, BOUNDS),
    "a-wrong-grid-but-coords": ({"num_frames": 7, "height": -1, "audio_num_frames": 0} | BOUNDS, BOUNDS),
    "integer-fps": ({"fps": 30}, {"fps": 30.0}),
    **{
        f"perturbation-mask-{dtype}": (
            STG | {"perturbation_mask": KEEP[:, None, None].to(dtype)},
            STG | {"perturbation_mask": KEEP},
        )
        for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float64)
    },
    "no-perturbation-mask": (STG, STG | {"perturbation_mask": torch.zeros(2)}),
    "no-guidance-blocks": ({"perturbation_mask": KEEP, "spatio_temporal_guidance_blocks": []}, {}),
    "guidance-blocks-in-a-tuple": (
        {"spatio_temporal_guidance_blocks": (1, 0, 1)},
        {"spatio_temporal_guidance_blocks": [0, 1]},
    ),
    **{
        f"self-mask-{dtype}": ({MASKS[0]: SELF_MASK.to(dtype)}, {MASKS[0]: SELF_MASK})
        for dtype in (torch.bool, torch.int64, torch.float64)
    },
    **{
        f"keyframes-mask-{dtype}": ({MASKS[1]: KEYFRAMES.to(dtype)}, {MASKS[1]: KEYFRAMES})
        for dtype in (torch.bool, torch.int64, torch.float64)
    },
    "no-masks": ({MASKS[0]: None, MASKS[1]: None, "encoder_attention_mask": None}, {}),
    "no-attention-kwargs": ({"attention_kwargs": None}, {"attention_kwargs": {}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SAME)
def test_other_forms_of_an_argument_are_accepted_and_mean_the_same(case: str) -> None:
    changes, others = SAME[case]
    assert equal(forward(changes), forward(others))


@pytest.mark.parametrize(
    "argument", ["timestep", "audio_timestep", "sigma", "audio_sigma", "fps", *TEXT_MASKS, *BOUNDS, *MASKS]
)
def test_each_of_these_arguments_changes_the_output(argument: str) -> None:
    """Otherwise the test before this one would prove nothing."""
    values = TEXT_MASKS | BOUNDS | {MASKS[0]: SELF_MASK, MASKS[1]: KEYFRAMES, "fps": 30.0}
    assert not equal(forward({argument: values.get(argument, STEPS)}), forward({}))


@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
@pytest.mark.parametrize("per_token", [False, True])
def test_sigma_may_be_missing_where_nothing_needs_it(release: str, per_token: bool) -> None:
    changes: Inputs = {"sigma": None, "audio_sigma": None}
    if per_token:
        changes |= {"timestep": torch.ones(2, TOKENS), "audio_timestep": torch.ones(2, AUDIO_FRAMES)}
    output = forward(changes, release, **({} if release == "2.0" else {"use_prompt_adaln_single": False}))
    assert output.sample.isfinite().all() and output.audio_sample.isfinite().all()


@pytest.mark.slow
def test_no_check_reads_data() -> None:
    """Tensors on the meta device have no data."""
    changes = TEXT_MASKS | STG | BOUNDS | {MASKS[0]: SELF_MASK, MASKS[1]: KEYFRAMES}
    changes |= {"perturbation_mask": KEEP, "timestep": torch.ones(2, TOKENS)}
    for grid in (NO_GRID, {"video_coords": None, "audio_coords": None}):
        given = with_changes(inputs(), changes | grid)
        masks = {name: x.to("meta") for name, x in given["attention_kwargs"].items()}
        given = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in given.items()}
        with torch.device("meta"):
            on_meta = LTX2VideoTransformer3DModel(model("2.5").config)
        video, audio = on_meta(**given | {"attention_kwargs": masks})
        assert (video.shape, audio.shape) == ((2, TOKENS, OUT), (2, AUDIO_FRAMES, AUDIO_OUT))
        assert video.is_meta and audio.is_meta


# ---------------------------------------------------------------- what has no effect
def test_guidance_without_perturbed_attn_is_a_warning_and_changes_nothing() -> None:
    guided = with_changes(inputs("2.0"), STG | {"perturbation_mask": KEEP})
    with torch.no_grad(), pytest.warns(UserWarning, match=r"^spatio_temporal_guidance_blocks\b"):
        output = model("2.0")(**guided)
    assert equal(output, forward({}, "2.0"))
    with_effect = model("2.0", perturbed_attn=True)
    with torch.no_grad():
        assert not equal(with_effect(**guided), with_effect(**inputs("2.0")))


@pytest.mark.parametrize("release", ["2.0", "2.3"])
def test_a_keyframes_mask_without_the_embedding_is_a_warning_and_changes_nothing(release: str) -> None:
    given = with_changes(inputs(release), {MASKS[1]: KEYFRAMES})
    with torch.no_grad(), pytest.warns(UserWarning, match=r"^video_keyframes_mask\b"):
        output = model(release)(**given)
    assert equal(output, forward({}, release))


@pytest.mark.parametrize(("release", "changes"), [("2.0", STG), ("2.3", {MASKS[1]: KEYFRAMES})])
def test_a_warning_points_at_the_call(release: str, changes: Inputs) -> None:
    with torch.no_grad(), pytest.warns(UserWarning) as caught:
        model(release)(**with_changes(inputs(release), changes))
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


# ---------------------------------------------------------------- signature and output
def documented(name: str, text: str) -> inspect.Parameter:
    """Parse a parameter of the documentation, such as `fps` and `: float = 24.0`."""
    annotation, _, default = text.removeprefix(": ").partition(" = ")
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=ANNOTATIONS[annotation],
        default=ast.literal_eval(default) if default else inspect.Parameter.empty,
    )


def test_forward_has_the_documented_parameters_in_order_with_their_defaults_and_annotations() -> None:
    entries = json.loads((Path(__file__).parent / "documented_forward.json").read_text(encoding="utf-8"))
    expected = [documented(entry["name"], entry["val"]) for entry in entries]
    signature = inspect.signature(LTX2VideoTransformer3DModel.forward, eval_str=True)
    assert len(expected) == 23
    assert list(signature.parameters.values())[1:] == expected
    assert signature.return_annotation == AudioVisualModelOutput | tuple[Tensor, Tensor]


def test_the_output_is_read_by_attribute_by_key_by_index_and_as_a_tuple() -> None:
    output = forward({})
    assert isinstance(output, AudioVisualModelOutput)
    video, audio = output
    assert (video.shape, audio.shape) == ((2, TOKENS, OUT), (2, AUDIO_FRAMES, AUDIO_OUT))
    assert output.sample is output["sample"] is output[0] is video
    assert output.audio_sample is output["audio_sample"] is output[1] is audio
    assert type(output.to_tuple()) is tuple
    assert output.to_tuple()[0] is video and output.to_tuple()[1] is audio


def test_an_unknown_key_of_the_output_is_an_error() -> None:
    with pytest.raises((KeyError, AttributeError)):
        forward({})["video"]


def test_without_return_dict_the_output_is_a_tuple_of_the_same() -> None:
    output = forward({"return_dict": False})
    assert type(output) is tuple and len(output) == 2
    assert all(torch.equal(x, y) for x, y in zip(output, forward({}), strict=True))
