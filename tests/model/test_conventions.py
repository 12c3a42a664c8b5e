"""With the right conventions this model has the bits of ltx-core, and every single one of them is needed for that.

pytest tests/model/test_conventions.py
LTX2REF_EXTRA_CASES=FOLDER pytest tests/model/test_conventions.py    also tensors of an ltx-core that is not installable
"""

import json
import os
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import make_divergences
import pytest
import torch
from safetensors import safe_open
from tiny import Inputs, random_inputs, random_model, tiny_config
from torch import Tensor

import ltx2ref
from ltx2ref import DIFFUSERS, LTX_CORE_2026_03, LTX_CORE_2026_08, Conventions, LTX2VideoTransformer3DModel
from ltx2ref.config import TransformerConfig
from ltx2ref.parity import record, verify
from ltx2ref.parity.cases import LTX_CORE_CASES
from ltx2ref.parity.trace.probe import probe, threads
from ltx2ref.parity.truth import FLOOR, SHARE, norm, phases

needs_ltx_core = pytest.mark.ltx_core  # skipped where it is not installed: conftest.py
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Pair = tuple[Tensor, Tensor]

# For each name, changes of the config and options of `random_inputs`. Sigmas and timesteps of both streams differ.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text-to-video": ({}, {}),
    "batch-of-one": ({}, {"batch": 1, "grid": (2, 3, 4)}),
    "image-to-video": ({}, {"per_token": True, "batch": 3}),
    "integer-text-masks": ({}, {"text_masks": torch.int64, "batch": 3}),
    "text-masks-of-nothing": ({}, {"text_masks": torch.int64, "encoder_attention_mask": torch.zeros(2, 6)}),
    "self-mask": ({}, {"self_mask": True}),
    "binary-self-mask": ({}, {"self_mask": torch.float32}),
    "guidance-one-of-batch": ({}, {"stg": True}),
    "guidance-all": ({}, {"spatio_temporal_guidance_blocks": [0, 1]}),
    "isolated": ({}, {"isolate_modalities": True}),
    "given-coordinates": ({}, {"coords": torch.float32}),
    "bfloat16-coordinates": ({}, {"coords": torch.bfloat16}),
    "float64-coordinates": ({}, {"coords": torch.float64}),
    "473-frames": ({}, {"grid": (60, 1, 3), "fps": 30}),
    "interleaved": ({"rope_type": "interleaved"}, {}),
    "interleaved-everything": (
        {"rope_type": "interleaved"},
        {"per_token": True, "text_masks": torch.int64, "self_mask": True, "stg": True},
    ),
    "float32-frequencies": ({"rope_double_precision": False}, {"grid": (16, 2, 3)}),
    "other-multipliers": ({"timestep_scale_multiplier": 300.0, "cross_attn_timestep_scale_multiplier": 700.0}, {}),
    "multiplier-1": ({"cross_attn_timestep_scale_multiplier": 1.0}, {"per_token": True}),
}


def inputs_for(config: TransformerConfig, dtype: torch.dtype, options: dict[str, Any], seed: int) -> Inputs:
    inputs = random_inputs(config, dtype, seed, **options)
    masks = inputs.get("attention_kwargs") or {}
    if options.get("self_mask"):  # values from [0, 1], of which a fifth are 0, or only 0 and 1
        mask = ((masks["video_self_attention_mask"] - 0.9995) * 2000).clamp(0, 1)
        masks["video_self_attention_mask"] = mask.round() if options["self_mask"] is torch.float32 else mask
    return inputs


def like(model: LTX2VideoTransformer3DModel, conventions: Conventions) -> Any:
    """Return a model with the same weights and other conventions."""
    other = ltx2ref.interface.LTX2VideoTransformer3DModel(model.config, conventions=conventions)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def outputs(model: Any, inputs: Inputs) -> Pair:
    with torch.no_grad():
        return model(**inputs, return_dict=False)


def equal(a: Pair, b: Pair) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@needs_ltx_core
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("release", ["2.0", "2.3"])
def test_both_outputs_have_the_bits_of_ltx_core(release: str, case: str, dtype: str) -> None:
    from ltx2ref.parity.oracles.ltx_core import build_ltx_core, run_ltx_core

    changes, options = CASES[case]
    seed = sum(map(ord, release + case))
    model = random_model(tiny_config(release, **changes), DTYPES[dtype], seed)
    inputs = inputs_for(model.config, DTYPES[dtype], options, seed)
    port = build_ltx_core(model.config.to_diffusers(), model.state_dict(), DTYPES[dtype])
    with torch.no_grad():
        theirs = run_ltx_core(port, inputs | {"use_cross_timestep": True})
    ours = like(model, LTX_CORE_2026_03)
    assert all(x.isfinite().all() for x in theirs)
    assert equal(outputs(ours, inputs), theirs)
    assert equal(outputs(ours, inputs | {"use_cross_timestep": True}), theirs), "the argument decides"


@pytest.mark.slow
@needs_ltx_core
@pytest.mark.parametrize("release", ["2.0", "2.3"])
def test_a_text_bias_reaches_ltx_core_as_it_is(release: str) -> None:
    from ltx2ref.parity.oracles.ltx_core import build_ltx_core, run_ltx_core

    model = random_model(tiny_config(release), torch.bfloat16)
    inputs = random_inputs(model.config, torch.bfloat16)
    inputs["encoder_attention_mask"] = torch.randn(2, 105, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    port = build_ltx_core(model.config.to_diffusers(), model.state_dict(), torch.bfloat16)
    with torch.no_grad():
        theirs = run_ltx_core(port, inputs | {"use_cross_timestep": True})
    assert equal(outputs(like(model, LTX_CORE_2026_03), inputs), theirs)


# ---------------------------------------------------------------- each convention matters

SHOWS = {  # dtypes of a recorded case, and its first recorded tap
    "rotation_dtype": ("2.3/ltx-core-i2v", {"bfloat16"}, "rope.cos"),
    "positions_dtype": ("2.3/ltx-core-i2v", {"bfloat16"}, "rope.cos"),
    "text_mask_bias": ("2.0/ltx-core-everything", {"float32", "bfloat16"}, "transformer_blocks.0.video"),
    "self_mask_bias": ("2.0/ltx-core-everything", {"float32", "bfloat16"}, "transformer_blocks.0.video"),
    "exchange": ("2.0/ltx-core-t2v", {"float32", "bfloat16"}, "av_cross_attn_video_scale_shift.sinusoid"),
    "guidance": ("2.0/ltx-core-everything", {"float32", "bfloat16"}, "transformer_blocks.0.video"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no effect")
@pytest.mark.parametrize("dtype", record.NATIVE_DTYPES)
@pytest.mark.parametrize("field", SHOWS)
def test_one_convention_switched_back_fails_where_it_is_said_to_show(field: str, dtype: str) -> None:
    case_id, dtypes, first = SHOWS[field]
    case = next(case for case in LTX_CORE_CASES if case.id == case_id)
    model = verify.build(case.config, DTYPES[dtype], replace(case.conventions, **{field: getattr(DIFFUSERS, field)}))
    with threads(record.environment()["threads"]):
        if not probe(torch.device("cpu"), (DTYPES[dtype],)).items() <= record.environment()["probe"].items():
            pytest.skip("this machine's bits differ from the recording one's")
        taps = verify.run(model, verify.cast(case.inputs(), DTYPES[dtype]))
    differing = [name for name, x in record.load_record(case, dtype).taps.items() if not torch.equal(taps[name], x)]
    assert differing[:1] == ([first] if dtype in dtypes else [])


def test_every_convention_is_covered() -> None:
    assert [*SHOWS] == [field.name for field in fields(Conventions)]


# ---------------------------------------------------------------- ltx-core in its state of August 2026

EXTRA = Path(os.environ.get("LTX2REF_EXTRA_CASES", ""), "ltx_core_2026_08.safetensors")
needs_extra = pytest.mark.skipif(
    "LTX2REF_EXTRA_CASES" not in os.environ or not EXTRA.exists(), reason="needs LTX2REF_EXTRA_CASES"
)


def extra_configs() -> dict[str, Any]:
    if "LTX2REF_EXTRA_CASES" not in os.environ or not EXTRA.exists():
        return {}
    with safe_open(EXTRA, "pt") as file:
        return json.loads(file.metadata()["configs"])


def tensors(prefix: str) -> dict[str, Tensor]:
    with safe_open(EXTRA, "pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def extra_case(name: str) -> tuple[LTX2VideoTransformer3DModel, Inputs, Pair]:
    """Return the model with diffusers' conventions, the documented arguments, and what ltx-core computed."""
    release, _, dtype, _ = name.split("-")
    model = ltx2ref.interface.LTX2VideoTransformer3DModel(TransformerConfig.from_diffusers(extra_configs()[name]))
    model.load_state_dict({k: x.to(DTYPES[dtype]) for k, x in tensors(f"weights/{release}/").items()}, assign=True)
    inputs: Inputs = tensors(f"cases/{name}/in/")
    nested = {k: inputs.pop(k) for k in [*inputs] if k.startswith("attention_kwargs.")}
    if nested:
        inputs["attention_kwargs"] = {k.removeprefix("attention_kwargs."): x for k, x in nested.items()}
    out = tensors(f"cases/{name}/out/")
    return model, inputs, (out["video"], out["audio"])


def same_bits(dtype: str) -> bool:
    """Return whether this machine computes the same bits as the one that made the file.

    One of the file's cases decides, run by ltx-core 1.0.0, whose text-to-video is the same as in August.
    """
    from ltx2ref.parity.oracles.ltx_core import build_ltx_core, run_ltx_core

    model, inputs, theirs = extra_case(f"2.0-split-{dtype}-t2v")
    port = build_ltx_core(model.config.to_diffusers(), model.state_dict(), DTYPES[dtype])
    with torch.no_grad():
        return equal(run_ltx_core(port, inputs | {"use_cross_timestep": True}), theirs)


def within(model: Any, inputs: Inputs, ours: Pair, theirs: Pair) -> Iterator[bool]:
    """Yield for each stream whether it is within `verify`'s budget, given the float32 phases that both share."""
    taps = verify.run(model, inputs)
    exact = like(model, model.conventions).double()
    true = verify.run(exact, verify.moved(inputs, lambda x: x.double() if x.is_floating_point() else x), phases(taps))
    for name, x, y in zip(("sample", "audio_sample"), ours, theirs, strict=True):
        budget = SHARE * norm(y.double() - true[name]) + FLOOR * norm(true[name])
        yield norm(x.double() - true[name]) <= budget


@pytest.mark.slow
@needs_extra
@needs_ltx_core
def test_all_cases_of_august_2026_have_the_same_bits() -> None:
    """Where this machine does not have the file's bits, results are within the budget of `verify` instead."""
    exactly = {dtype: same_bits(dtype) for dtype in record.NATIVE_DTYPES}
    wrong, counts = [], dict.fromkeys(("identical", "within budget"), 0)
    for name in extra_configs():
        model, inputs, theirs = extra_case(name)
        model = like(model, LTX_CORE_2026_08)
        ours = outputs(model, inputs)
        if equal(ours, theirs):
            counts["identical"] += 1
        elif not exactly[name.split("-")[2]] and all(within(model, inputs, ours, theirs)):
            counts["within budget"] += 1
        else:
            wrong.append(name)
    print(f"\n{len(extra_configs())} cases: {counts}; this machine has the file's bits: {exactly}")
    assert not wrong and sum(counts.values()) == len(extra_configs()) == 60


@needs_extra
@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("exchange", "argument", "i2v"),
        ("exchange", "other", "i2v"),
        ("exchange", "argument", "sigmas"),
        ("self_mask_bias", "linear", "softmask"),
    ],
)
def test_another_convention_is_beyond_the_budget_of_august_2026(field: str, value: str, kind: str) -> None:
    for release in ("2.0", "2.3", "2.5"):
        model, inputs, theirs = extra_case(f"{release}-split-float32-{kind}")
        ours = outputs(like(model, replace(LTX_CORE_2026_08, **{field: value})), inputs)
        assert not all(within(like(model, LTX_CORE_2026_08), inputs, ours, theirs))


@pytest.mark.slow
@needs_extra
@needs_ltx_core
def test_the_rotation_alone_takes_the_bits_of_august_2026() -> None:
    if not same_bits("bfloat16"):
        pytest.skip("this machine has other bits than the file's")
    for release in ("2.0", "2.3", "2.5"):
        model, inputs, theirs = extra_case(f"{release}-split-bfloat16-t2v")
        for value, same in (("model", True), ("float32", False)):
            assert equal(outputs(like(model, replace(LTX_CORE_2026_08, rotation_dtype=value)), inputs), theirs) == same


# ---------------------------------------------------------------- the object


def test_conventions_are_frozen_and_refuse_what_nobody_does() -> None:
    with pytest.raises(FrozenInstanceError):
        DIFFUSERS.exchange = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"rotation_dtype: expected one of \('float32', 'model'\), got 'bfloat16'"):
        Conventions(rotation_dtype="bfloat16")  # type: ignore[arg-type]


def test_the_default_is_diffusers() -> None:
    config = tiny_config("2.3")
    assert LTX2VideoTransformer3DModel(config).conventions == DIFFUSERS == Conventions()


def test_load_takes_conventions(tmp_path: Path) -> None:
    model = random_model(tiny_config("2.3"))
    ltx2ref.save(model, tmp_path / "transformer")
    loaded = ltx2ref.load(tmp_path / "transformer", conventions=LTX_CORE_2026_08)
    documented = LTX2VideoTransformer3DModel.from_pretrained(tmp_path / "transformer", conventions=LTX_CORE_2026_08)
    assert loaded.conventions == documented.conventions == LTX_CORE_2026_08
    inputs = random_inputs(model.config, per_token=True)
    assert equal(outputs(loaded, inputs), outputs(like(model, LTX_CORE_2026_08), inputs))
    assert not equal(outputs(loaded, inputs), outputs(model, inputs))
    for read in (ltx2ref.load, ltx2ref.stream):
        with pytest.raises(ValueError, match=r"conventions: expected ltx2ref\.Conventions, got 'ltx-core'"):
            read(tmp_path / "transformer", conventions="ltx-core")  # type: ignore[operator]


def test_the_exchange_needs_the_other_streams_sigma() -> None:
    model = random_model(tiny_config("2.0"))
    inputs = random_inputs(model.config)
    del inputs["sigma"], inputs["audio_sigma"]
    outputs(model, inputs)
    for conventions in (LTX_CORE_2026_03, LTX_CORE_2026_08):
        with pytest.raises(ValueError, match="sigma: expected a tensor"):
            outputs(like(model, conventions), inputs)


@pytest.mark.parametrize("conventions", [LTX_CORE_2026_03, LTX_CORE_2026_08])
def test_float64_is_float64_throughout_whatever_the_conventions(conventions: Conventions) -> None:
    """Results are those of diffusers' way in float64, where that has the same meaning."""
    model = random_model(tiny_config("2.3"), torch.float64)
    inputs = random_inputs(model.config, torch.float64, use_cross_timestep=True)
    for stream in ("", "audio_"):
        inputs[f"{stream}timestep"] = inputs[f"{stream}sigma"] = torch.tensor([700.0, 300.0], dtype=torch.float64)
    assert equal(outputs(like(model, conventions), inputs), outputs(model, inputs))


def test_the_ledger_is_what_this_version_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record.environment()
    with threads(recorded["threads"]):
        if probe(torch.device("cpu"), (torch.float32, torch.bfloat16)) != recorded["probe"]:
            pytest.skip("this machine's bits differ from the recording one's")
    monkeypatch.setattr("sys.argv", ["make_divergences.py", "--check"])
    make_divergences.main()
