"""Runs the conformance cases on this machine and judges every tap against the recorded one.

Where this machine computes with the bits of the recording one (see probe.py), anything but identical is a failure.
Elsewhere a tap may be as far from the float64 truth as 1.5 times the recorded tensor is, plus a floor of 4 float32
units in the last place of its norm: without the floor, the recorded implementation fails against itself on another CPU.

The truth is the double model fed the record's own phases (RoPE cosines and sines, timestep sinusoids) and weights and
inputs rounded to the record's dtype: RoPE angles reach 15,708 rad, so the float32 phases alone are 1e-5 away from
pure float64, and budgets would be 70 times too loose. The phases themselves are judged against pure float64.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import TransformerConfig
from ..conventions import DIFFUSERS, Conventions
from ..model import LTX2VideoTransformer3DModel
from . import generator, record
from .cases import SEED, Case, Inputs
from .record import DTYPES, Record, RecordError
from .taps import PHASES, Taps, returned, trace

SHARE, FLOOR = 1.5, 4 * 2.0**-23  # of the record's own error; of the truth's norm
DRIFT = 1e-10  # relative; float64 sums of this size differ by 1e-14 between machines
IDENTICAL, WITHIN, FAILED, INCONCLUSIVE = "identical", "within budget", "FAILED", "inconclusive"


@dataclass(frozen=True)
class TapResult:
    name: str
    verdict: str
    against_record: float  # relative L2
    error: float           # against the truth, relative L2
    record_error: float    # the recorded tensor's own


@dataclass(frozen=True)
class CaseResult:
    release: str
    case: str
    dtype: str
    verdict: str
    first: str | None        # divergent tap
    against_record: float    # relative L2, the largest of all taps
    error: float             # of the outputs against the truth, relative L2, the larger one
    record_error: float      # the recorded outputs' own
    note: str = ""


def build(config: TransformerConfig, dtype: torch.dtype,
          conventions: Conventions = DIFFUSERS) -> LTX2VideoTransformer3DModel:
    """A model with the generated weights, rounded to `dtype`."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(config, conventions)
    weights = generator.weights({name: tuple(x.shape) for name, x in model.state_dict().items()}, SEED)
    model.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, assign=True)
    return model.eval()


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Inputs as a model of `dtype` takes them: noise levels, coordinates and multiplicative masks keep their own."""
    main = ("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states")
    masks = ("encoder_attention_mask", "audio_encoder_attention_mask")
    biases = [name for name in masks if name in inputs and inputs[name].ndim == 3 and inputs[name].is_floating_point()]
    return inputs | {name: inputs[name].to(dtype) for name in (*main, *biases, "perturbation_mask") if name in inputs}


def moved(inputs: Inputs, move: Callable[[Tensor], Tensor]) -> Inputs:
    def walk(x: Any) -> Any:
        return move(x) if isinstance(x, Tensor) else {k: walk(v) for k, v in x.items()} if isinstance(x, dict) else x

    return {name: walk(x) for name, x in inputs.items()}


def run(model: LTX2VideoTransformer3DModel, inputs: Inputs, inject: Taps | None = None) -> Taps:
    """All taps, and what the call returned; those in `inject` are replaced after they were recorded."""
    with torch.no_grad(), trace(model, inject=inject) as taps:
        output = model(**inputs)
    return {name: x.cpu() for name, x in (taps | returned(output)).items()}


def truth(case: Case, dtype: torch.dtype, recorded: Taps) -> Taps:
    """Each tap in float64, given what was rounded before it."""
    model = build(case.config, dtype, case.conventions).double()
    inputs = moved(cast(case.inputs(), dtype), lambda x: x.double() if x.is_floating_point() else x)
    pure = run(model, inputs)
    conditional = run(model, inputs, phases(recorded))
    return {name: (pure if name.endswith(PHASES) else conditional)[name] for name in recorded}


def phases(taps: Taps) -> Taps:
    return {name: x for name, x in taps.items() if name.endswith(PHASES)}


def norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def judge(name: str, candidate: Tensor, recorded: Tensor, true: Tensor) -> TapResult:
    if not candidate.shape == recorded.shape == true.shape:
        return TapResult(name, FAILED, math.inf, math.inf, math.inf)
    error, record_error, scale = norm(candidate.double() - true), norm(recorded.double() - true), norm(true)
    if candidate.dtype == recorded.dtype and torch.equal(candidate, recorded):
        verdict = IDENTICAL
    else:
        within = error <= SHARE * record_error + FLOOR * scale  # a NaN is not
        verdict = WITHIN if within else FAILED
    difference = norm(candidate.double() - recorded.double())
    return TapResult(name, verdict, difference / scale, error / scale, record_error / scale)


def verify(case: Case, dtype: str, device: torch.device, same_bits: bool) -> CaseResult:
    """Run one case and compare all its taps; `same_bits`: nothing but identical will do.

    Raises `RecordError` if there is no usable recording of it.
    """
    model = build(case.config, DTYPES[dtype], case.conventions).to(device)
    inputs = moved(cast(case.inputs(), DTYPES[dtype]), lambda x: x.to(device))
    taps, again = run(model, inputs), run(model, inputs)
    if any(not torch.equal(taps[name], again[name]) for name in taps):
        return CaseResult(case.release, case.name, dtype, INCONCLUSIVE, None, 0.0, 0.0, 0.0, "does not repeat itself")
    return compare(case, dtype, taps, same_bits)


def compare(case: Case, dtype: str, taps: Taps, same_bits: bool) -> CaseResult:
    """The verdict on these taps of a case."""
    recorded = record.load(case, dtype)
    if recorded.input_digests != record.digests(cast(case.inputs(), DTYPES[dtype])):
        raise RecordError(f"{case.id} {dtype}: recorded from other inputs than this version makes")
    true = truth(case, DTYPES[dtype], recorded.taps)
    results = [judge(name, taps[name], x, true[name]) for name, x in recorded.taps.items()]
    return summary(case, dtype, results, same_bits, drifted(true, recorded))


def drifted(true: Taps, recorded: Record) -> str | None:
    """The first tap whose truth is not what it was when the case was recorded."""
    norms = recorded.truth_norms
    return next((name for name, x in true.items() if not abs(norm(x) - norms[name]) <= DRIFT * norms[name]), None)


def summary(case: Case, dtype: str, results: list[TapResult], same_bits: bool, drift: str | None) -> CaseResult:
    first = next((r.name for r in results if r.verdict != IDENTICAL), None)
    if first is None and drift is None:
        verdict = IDENTICAL
    elif drift is not None or same_bits or any(r.verdict == FAILED for r in results):
        verdict = FAILED
        first = next((r.name for r in results if r.verdict == FAILED), first)
    else:
        verdict = WITHIN
    note = "" if drift is None else f"the float64 truth of {drift} has changed since the recording"
    outputs = [r for r in results if r.name in ("sample", "audio_sample")]
    return CaseResult(case.release, case.name, dtype, verdict, first, max(r.against_record for r in results),
                      max(r.error for r in outputs), max(r.record_error for r in outputs), note)
