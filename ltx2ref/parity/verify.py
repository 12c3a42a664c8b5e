"""Runs the conformance cases on this machine and judges every tap against the recorded one, in two ways.

*exact*: under exact arithmetic (exact.py) the bits are the same on every machine. Each tap is identical, or the case
has failed; there is no tolerance. This shows that the model computes what the recorded implementation computes,
operation by operation.

*native*: in this machine's own arithmetic, whose last bits are its own. Where it computes with the bits of the
recording machine (see probe.py), anything but identical is a failure. Elsewhere a tap may be as far from its float64
truth as 1.5 times the recorded tensor is from its own, plus a floor of 4 float32 units in the last place of its norm:
without the floor, the recorded implementation fails against itself on another CPU.

The truth is the double model given weights and inputs rounded to the dtype, and the phases (RoPE cosines and sines,
timestep sinusoids) of the side that is judged: its own for the candidate, its own for the record. RoPE angles reach
15,708 rad, so that one unit in the last place of a float32 angle moves everything that follows by 1e-5, on each machine
another way, and is no error of what follows. The phases themselves are judged against pure float64: RoPE by the budget,
sinusoids by what a float32 phase may lose, whoever computes it.
"""
import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TransformerConfig
from ..conventions import DIFFUSERS, Conventions
from ..model import LTX2VideoTransformer3DModel
from . import generator, record
from .cases import SEED, Case, Inputs
from .exact import exact
from .machines import machine as machine_named
from .record import DTYPES, EXACT_DTYPES, OUTPUTS, ExactRecord, Record, RecordError
from .taps import ADALN_LAYERS, PHASES, Taps, returned, trace

SHARE, FLOOR = 1.5, 4 * 2.0**-23  # of the record's own error; of the truth's norm
PHASE_ULPS = 2.5  # of a float32 phase: an exp that is off by two units at most, and the product's own rounding
# Up to so many budgets a tap is within, with a note: there are honest ways of computing that round more often than the
# record's. RoPE angles reduced by one float32 constant take 1.9. In a narrow dtype a matrix product of eight parts is
# rounded 15 times and not once, and its error grows by the root of that.
NOTED = {torch.float32: 2.0, torch.bfloat16: 4.0}
DRIFT = 1e-10  # relative; float64 sums of this size differ by 1e-14 between machines
IDENTICAL, WITHIN, FAILED, INCONCLUSIVE = "identical", "within budget", "FAILED", "inconclusive"


@dataclass(frozen=True)
class TapResult:
    name: str
    verdict: str
    against_record: float  # relative L2
    error: float           # against the candidate's truth, relative L2
    record_error: float    # the recorded tensor's own, against its own truth
    share: float           # of the budget that the error takes


@dataclass(frozen=True)
class ExactResult:
    """One case in one dtype under exact arithmetic."""
    verdict: str
    taps: int                # compared
    differing: int           # or missing
    first: str | None        # differing tap
    distance: float | None   # of the first from the record, relative L2, estimated
    note: str = ""


@dataclass(frozen=True)
class NativeResult:
    """One case in one dtype in this machine's arithmetic."""
    verdict: str
    first: str | None        # divergent tap
    share: float             # of the budget that an error takes, the largest of all taps
    against_record: float    # relative L2, the largest of all taps
    error: float             # of the outputs against the truth, relative L2, the larger one
    record_error: float      # the recorded outputs' own
    note: str = ""


@dataclass(frozen=True)
class CaseResult:
    """Both verdicts on a case in one dtype. None: not asked for, or nothing is recorded in this dtype."""
    release: str
    case: str
    dtype: str
    exact: ExactResult | None
    native: NativeResult | None

    @property
    def verdicts(self) -> set[str]:
        return {result.verdict for result in (self.exact, self.native) if result is not None}


def build(config: TransformerConfig, dtype: torch.dtype,
          conventions: Conventions = DIFFUSERS) -> LTX2VideoTransformer3DModel:
    """A model with the generated weights, rounded to `dtype`."""
    return deepcopy(generated(config, conventions)).to(dtype)


@lru_cache(maxsize=2)
def generated(config: TransformerConfig, conventions: Conventions) -> LTX2VideoTransformer3DModel:
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(config, conventions)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    model.load_state_dict(generator.weights(shapes, SEED), assign=True)
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


class Truth:
    """One case in float64, with the values that weights and inputs have in `dtype`."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.dtype, self.model = dtype, build(case.config, dtype, case.conventions).double()
        self.inputs = moved(cast(case.inputs(), dtype), lambda x: x.double() if x.is_floating_point() else x)
        self.bounds: Taps = {}  # of the sinusoids, from the timesteps that the model's layers are given
        layers = {name: layer for name in ADALN_LAYERS if (layer := getattr(self.model, name)) is not None}
        hooks = [layer.register_forward_pre_hook(partial(self.bound, name)) for name, layer in layers.items()]
        self.pure = run(self.model, self.inputs)
        for hook in hooks:
            hook.remove()

    def bound(self, name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        """What each element may be off: float32 units in the last place of its phase, and one of its own.

        A bound and not a budget, so that it does not depend on how lucky the recorded sinusoid is.
        """
        phase = given[0].reshape(-1, 1).abs() * torch.exp(-math.log(10_000) * torch.arange(128).double() / 128)
        phase, value = torch.cat([phase, phase], -1), torch.cat([phase.cos(), phase.sin()], -1).abs()
        self.bounds[f"{name}.sinusoid"] = PHASE_ULPS * 2.0**-23 * phase + torch.finfo(self.dtype).eps * value

    def of(self, taps: Taps) -> Taps:
        """Each of these taps in float64, given the phases that are among them; the phases in pure float64."""
        conditional = run(self.model, self.inputs, phases(taps))
        return {name: (self.pure if name.endswith(PHASES) else conditional)[name] for name in taps}


def phases(taps: Taps) -> Taps:
    return {name: x for name, x in taps.items() if name.endswith(PHASES)}


def norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double()).item()


def judge(candidate: Tensor, recorded: Tensor, truths: tuple[Tensor, Tensor], name: str = "",
          bound: Tensor | None = None) -> TapResult:
    """Judge one tap. `truths` are the candidate's and the record's; `bound` takes the budget's place."""
    true, record_true = truths
    if not candidate.shape == recorded.shape == true.shape:
        return TapResult(name, FAILED, math.inf, math.inf, math.inf, math.inf)
    error, record_error, scale = norm(candidate.double() - true), norm(recorded.double() - record_true), norm(true)
    budget, most = SHARE * record_error + FLOOR * scale, NOTED[recorded.dtype]
    if bound is not None:
        budget, most = norm(bound), 1.0
    if candidate.dtype == recorded.dtype and torch.equal(candidate, recorded):
        verdict = IDENTICAL
    else:
        verdict = WITHIN if error <= most * budget else FAILED  # a NaN is not within
    difference = norm(candidate.double() - recorded.double())
    return TapResult(name, verdict, difference / scale, error / scale, record_error / scale, error / budget)


def verify(case: Case, dtype: str, device: torch.device, same_bits: bool, arithmetic: str | None = None,
           machine: str | None = None) -> CaseResult:
    """Run one case, exactly, natively or both, and compare all its taps. `same_bits`: natively, nothing but identical
    will do. `machine`: natively, as this simulated machine computes.

    Raises `RecordError` if there is no usable recording of it.
    """
    model = build(case.config, EXACT_DTYPES[dtype], case.conventions).to(device)
    inputs = moved(cast(case.inputs(), EXACT_DTYPES[dtype]), lambda x: x.to(device))
    exactly = compare_exactly(case, dtype, run_exactly(model, inputs)) if arithmetic != "native" else None
    natively = None
    if arithmetic != "exact" and dtype in DTYPES:
        taps, again = run_on(machine, model, inputs), run_on(machine, model, inputs)
        if any(not torch.equal(taps[name], again[name]) for name in taps):
            natively = NativeResult(INCONCLUSIVE, None, 0.0, 0.0, 0.0, 0.0, "does not repeat itself")
        else:
            natively = compare(case, dtype, taps, same_bits)
    return CaseResult(case.release, case.name, dtype, exactly, natively)


def run_on(machine: str | None, model: LTX2VideoTransformer3DModel, inputs: Inputs) -> Taps:
    with nullcontext() if machine is None else exact(machine_named(machine)):
        return run(model, inputs)


def run_exactly(model: LTX2VideoTransformer3DModel, inputs: Inputs) -> Taps:
    with exact():
        return run(model, inputs)


def compare_exactly(case: Case, dtype: str, taps: Taps) -> ExactResult:
    """The verdict on what was computed for a case under exact arithmetic: the recorded bits, or not."""
    recorded = record.load_exact(case, dtype)
    require_inputs(case, dtype, recorded)
    missing = [name for name in recorded.digests if name not in taps]
    differing = [name for name, digest in recorded.digests.items()
                 if name in taps and record.digest(taps[name]) != digest]
    first = next(iter([*differing, *missing]), None)
    note = f"the model lacks {len(missing)} taps, the first is {missing[0]}" if missing else ""
    return ExactResult(IDENTICAL if first is None else FAILED, len(recorded.digests), len(differing) + len(missing),
                       first, apart(taps[first], recorded.buckets[first]) if first and differing else None, note)


def apart(x: Tensor, recorded: Tensor) -> float | None:
    """Estimate the relative L2 distance from four numbers of the recorded tensor: right to a factor of two or so."""
    return norm(record.buckets(x) - recorded) / norm(x) if norm(x) else None


def compare(case: Case, dtype: str, taps: Taps, same_bits: bool) -> NativeResult:
    """The verdict on what was computed for a case in native arithmetic."""
    recorded = record.load(case, dtype)
    require_inputs(case, dtype, recorded)
    truth, theirs = Truth(case, DTYPES[dtype]), {name: taps[name] for name in recorded.taps}
    true, record_true = truth.of(theirs), truth.of(recorded.taps)
    results = [judge(theirs[name], x, (true[name], record_true[name]), name, truth.bounds.get(name))
               for name, x in recorded.taps.items()]
    return summary(results, same_bits, drifted(record_true, recorded))


def require_inputs(case: Case, dtype: str, recorded: Record | ExactRecord) -> None:
    if recorded.input_digests != record.digests(cast(case.inputs(), EXACT_DTYPES[dtype])):
        raise RecordError(f"{case.id} {dtype}: recorded from other inputs than this version makes")


def drifted(true: Taps, recorded: Record) -> str | None:
    """The first tap whose truth is not what it was when the case was recorded."""
    norms = recorded.truth_norms
    return next((name for name, x in true.items() if not abs(norm(x) - norms[name]) <= DRIFT * norms[name]), None)


def summary(results: list[TapResult], same_bits: bool, drift: str | None) -> NativeResult:
    first = next((r.name for r in results if r.verdict != IDENTICAL), None)
    if first is None and drift is None:
        verdict = IDENTICAL
    elif drift is not None or same_bits or any(r.verdict == FAILED for r in results):
        verdict = FAILED
        first = next((r.name for r in results if r.verdict == FAILED), first)
    else:
        verdict = WITHIN
    most = max(results, key=lambda r: r.share)
    note = "" if drift is None else f"the float64 truth of {drift} has changed since the recording"
    if verdict == WITHIN and most.share > 1:
        note = f"{most.name} takes {most.share:.2f} of its budget: rounded more often than the record"
    outputs = [r for r in results if r.name in OUTPUTS]
    return NativeResult(verdict, first, most.share, max(r.against_record for r in results),
                        max(r.error for r in outputs), max(r.record_error for r in outputs), note)
