"""What a port gives is read as it is: arrays of any library, its own names, tokens and levels counted otherwise.

pytest tests/parity/test_given.py
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ltx2ref import assert_parity, compare
from ltx2ref.parity.arithmetic import NotExact
from ltx2ref.parity.cases import Case
from ltx2ref.parity.generator import build
from ltx2ref.parity.report.rows import DIVERGED, IDENTICAL, SHAPE, SUSPECT
from ltx2ref.parity.run import run
from ltx2ref.parity.trace.given import as_taps, fitted, likely, renamed_taps, require_common
from ltx2ref.parity.trace.taps import OutputError

SMALL = Case("2.3", "small", {"num_layers": 1})
MODEL, INPUTS = build(SMALL.config, torch.float32), SMALL.inputs()
TAPS = run(MODEL, INPUTS)
B, TV, TA = len(TAPS["sample"]), TAPS["sample"].shape[1], TAPS["audio_sample"].shape[1]


class DLPack:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __dlpack__(self, **given: Any) -> Any:
        return self.x.__dlpack__(**given)

    def __dlpack_device__(self) -> Any:
        return self.x.__dlpack_device__()


class Array:
    def __init__(self, x: Tensor) -> None:
        self.x = x.numpy()

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.x


def read_only(x: Tensor) -> Any:
    array = x.numpy().copy()
    array.flags.writeable = False
    return array


ARRAYS = {
    "NumPy": lambda x: x.numpy(),
    "read-only": read_only,
    "big-endian": lambda x: x.numpy().astype(">f4"),
    "backwards": lambda x: x.flip(1).numpy()[:, ::-1],
    "a list": lambda x: x.tolist(),
    "DLPack": DLPack,
    "an array": Array,
    "with a history": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_any_library_are_tensors(kind: str) -> None:
    video, audio = (ARRAYS[kind](TAPS[name]) for name in ("sample", "audio_sample"))
    for given in ((video, audio), [video, audio], SimpleNamespace(sample=video, audio_sample=audio)):
        found = as_taps(given)
        assert all(torch.equal(found[name], TAPS[name]) and not found[name].requires_grad for name in found)
    assert torch.equal(as_taps({"proj_in": ARRAYS[kind](TAPS["proj_in"])})["proj_in"], TAPS["proj_in"])


def test_bfloat16_of_numpys_extensions_keeps_its_bits() -> None:
    x = torch.randn(3, 4).bfloat16()
    types = pytest.importorskip("ml_dtypes")
    assert torch.equal(as_taps({"a": x.view(torch.int16).numpy().view(types.bfloat16)})["a"], x)


@pytest.mark.parametrize("value", [None, "text", 3, ["a"], [[1.0], [1.0, 2.0]], np.arange(3), np.array(["a"]), {1.0}])
def test_what_is_no_array_of_numbers_is_refused_by_name(value: Any) -> None:
    with pytest.raises(OutputError, match=r"^proj_in: expected a floating-point tensor, got "):
        as_taps({"proj_in": value})


def test_exact_arithmetic_takes_only_what_torch_computed() -> None:
    with pytest.raises(NotExact, match="outside of torch: sample is returned as ndarray"):
        as_taps((TAPS["sample"].numpy(), TAPS["audio_sample"]), exactly=True)


# ---------------------------------------------------------------- names
def test_names_are_translated_with_stars_and_without() -> None:
    given = {"blocks.0.q": 1, "blocks.11.q": 2, "out": 3, "other": 4}
    names = {"blocks.*.q": "transformer_blocks.*.attn1.q", "out": "sample", "unused": "proj_in"}
    assert renamed_taps(given, names) == {
        "transformer_blocks.0.attn1.q": 1,
        "transformer_blocks.11.attn1.q": 2,
        "sample": 3,
        "other": 4,
    }
    assert renamed_taps((1, 2), names) == (1, 2)
    with pytest.raises(OutputError, match="names: both out and other would be sample"):
        renamed_taps(given, {"out": "sample", "other": "sample"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("video", "sample"),
        ("audio", "audio_sample"),
        ("model.transformer_blocks.0.attn1.to_v", "transformer_blocks.0.attn1.to_v"),
        ("transformer_blocks.0.attn1.v", "transformer_blocks.0.attn1.to_v"),
        ("projin", "proj_in"),
        ("completely.different", None),
    ],
)
def test_a_near_miss_is_suggested(name: str, meant: str | None) -> None:
    assert likely(name, [x for x in TAPS if not x.endswith((".q", ".k"))]) == meant


def test_nothing_in_common_is_an_error_everywhere() -> None:
    video, audio = TAPS["sample"], TAPS["audio_sample"]
    said = r"nothing in common: .* got video, audio; you gave `video`: did you mean `sample`\?"
    for theirs in ({"video": video, "audio": audio}, {}):
        with pytest.raises(ValueError, match=said if theirs else "got nothing"):
            compare(TAPS, theirs)
        with pytest.raises(ValueError, match=said if theirs else "got nothing"):
            assert_parity(MODEL, lambda theirs=theirs, **_: theirs, INPUTS)
    require_common(TAPS, {"proj_in": None})


# ---------------------------------------------------------------- shapes
def padded(x: Tensor, tokens: int, at_end: bool = True) -> Tensor:
    shape = [*x.shape]
    shape[tokens] = 5
    more = torch.full(shape, 7.0)
    return torch.cat([x, more] if at_end else [more, x], tokens)


AUDIO = [
    name
    for name in TAPS
    if name.startswith(("audio_", "transformer_blocks.0.audio", "transformer_blocks.0.video_to_audio"))
    and name != "audio_sample"
    and TA in TAPS[name].shape[1:3]
]


def test_audio_padded_at_the_end_is_compared_without_the_padding() -> None:
    tokens = {name: list(TAPS[name].shape).index(TA, 1) for name in AUDIO}
    assert len(AUDIO) > 20 and {*tokens.values()} == {1, 2}
    theirs = TAPS | {name: padded(TAPS[name], tokens[name]) for name in AUDIO}
    found, notes = fitted(TAPS, theirs)
    assert all(torch.equal(x, TAPS[name]) for name, x in found.items())
    said = "more tokens than the reference has, at the end: compared without them"
    assert notes == [f"{said} ({len(AUDIO)} taps, the first is {AUDIO[0]})"]
    report = assert_parity(MODEL, lambda **_: theirs, INPUTS)
    assert report.verdict == IDENTICAL and notes[0] in report.notes


def test_what_is_added_elsewhere_or_to_an_output_stays_another_shape() -> None:
    name = "audio_proj_in"
    inner = torch.cat([TAPS[name][:, :3], torch.full((B, 5, TAPS[name].shape[2]), 7.0), TAPS[name][:, 3:]], 1)
    for given in ({name: padded(TAPS[name], 1, at_end=False)}, {name: inner}, {"sample": padded(TAPS["sample"], 1)}):
        found, notes = fitted(TAPS, given)
        assert found == given and notes == []
    with pytest.raises(AssertionError, match=r"first divergence at sample \(shape\)"):
        assert_parity(MODEL, lambda **_: TAPS | {"sample": padded(TAPS["sample"], 1)}, INPUTS)


def test_a_level_for_each_token_is_compared_at_the_worst_one() -> None:
    name = "audio_time_embed.linear"
    assert len(TAPS[name]) == B
    each = TAPS[name].repeat_interleave(TA, 0)
    found, (note,) = fitted(TAPS, {name: each})
    assert torch.equal(found[name], TAPS[name]) and "a noise level for each token" in note
    each[TA + 3] += 2.0**-16
    assert torch.equal(fitted(TAPS, {name: each})[0][name], TAPS[name] + torch.tensor([[0.0], [2.0**-16]]))
    each[TA + 3] += 1
    assert fitted(TAPS, {name: each})[0][name] is each, "tokens with levels of their own are another shape"
    each[TA + 3] = torch.nan
    assert fitted(TAPS, {name: each})[0][name][1].isnan().all()
    more = padded(TAPS[name].repeat_interleave(TA, 0).unflatten(0, (B, TA)), 1).flatten(0, 1)
    assert torch.equal(fitted(TAPS, {name: more})[0][name], TAPS[name]), "padding is not a token"


def test_padded_levels_by_token_are_cut_where_the_reference_has_tokens() -> None:
    case = Case("2.3", "i2v", {"num_layers": 1})
    like = {"sample": TAPS["sample"], "time_embed.emb": torch.randn(B * TV, 8)}
    more = padded(like["time_embed.emb"].unflatten(0, (B, TV)), 1).flatten(0, 1)
    assert case.id and torch.equal(fitted(like, {"time_embed.emb": more})[0]["time_embed.emb"], like["time_embed.emb"])


def test_one_table_serves_a_whole_batch() -> None:
    one = {name: x[:1] for name, x in TAPS.items() if name.startswith("rope.")}
    found, notes = fitted(TAPS, one)
    assert all(torch.equal(x, TAPS[name]) for name, x in found.items()) and not notes
    assert fitted(TAPS, {"proj_in": TAPS["proj_in"][:1]})[0]["proj_in"].shape[0] == 1


# ---------------------------------------------------------------- verdicts
def test_outputs_alone_are_an_answer_and_what_follows_from_others_is_not_missing() -> None:
    outputs = {name: TAPS[name] for name in ("sample", "audio_sample")}
    report = assert_parity(MODEL, lambda **_: outputs, INPUTS)
    assert report.verdict == IDENTICAL and any(note.startswith("only the outputs were given") for note in report.notes)
    derived = (".stream", "_coords", ".rows", ".context_rows", ".gate")
    report = assert_parity(MODEL, lambda **_: {n: x for n, x in TAPS.items() if not n.endswith(derived)}, INPUTS)
    assert (report.verdict, report.sentence) == (IDENTICAL, "identical at every tap")
    with pytest.raises(AssertionError, match=r"^first divergence at sample \(diverged\)"):
        assert_parity(MODEL, lambda **_: outputs | {"sample": outputs["sample"] * 1.01}, INPUTS)
    assert (
        compare(TAPS, outputs).verdict == IDENTICAL and compare(TAPS, {"sample": TAPS["sample"]}).verdict == "missing"
    )


def test_one_unit_in_the_last_place_without_a_truth_is_called_undecided_and_not_more_than_rounding() -> None:
    x = torch.randn(20, 50)
    report = compare({"x": x}, {"x": x.nextafter(torch.tensor(torch.inf))})
    assert report.verdict == SUSPECT and "more than rounding" not in report.sentence
    assert "off by 1 in the last place, which may be rounding or not: without a float64 truth" in report.sentence
    narrow = compare({"x": x}, {"x": (x * 1.01).bfloat16()}, {"x": x.double()})
    assert narrow.verdict == SUSPECT and "a coarser dtype than the reference's has no budget" in narrow.sentence
    assert compare({"x": x}, {"x": 2 * x}).verdict == DIVERGED and compare({"x": x}, {"x": x[1:]}).verdict == SHAPE
