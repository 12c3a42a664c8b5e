"""A checkpoint and the arguments of one call in place of a conformance case, and traces that belong to one case."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.loading import load
from ..checkpoint.match import make_plan
from ..checkpoint.streaming import StreamedTransformer, stream
from ..config import TransformerConfig
from ..interface import Conventions, LTX2VideoTransformer3DModel
from . import record
from .cases import Case, Inputs
from .run import cast, moved
from .trace.inputfile import load_inputs
from .trace.tracefile import Trace, TraceError

DOUBLE = 8  # bytes of a parameter in the float64 truth
SHARE_OF_MEMORY = 0.8  # that a model and its truth may take


@dataclass(frozen=True)
class RealCase:
    """What `audit` needs of a case, from a checkpoint and a file of inputs."""

    checkpoint: str
    file: str
    config: TransformerConfig
    parameters: int
    given: Inputs = field(compare=False)
    small: bool = False

    @property
    def id(self) -> str:
        """Return a name for reports."""
        return f"{Path(self.checkpoint).name} on {Path(self.file).name}"

    def inputs(self) -> Inputs:
        """Return the arguments of the call, copied."""
        return moved(self.given, torch.clone)

    def model(
        self, dtype: torch.dtype, conventions: Conventions, device: torch.device, with_truth: bool = True
    ) -> LTX2VideoTransformer3DModel:
        """Load the model, a block at a time if it and its truth do not fit into memory together."""
        needed = self.parameters * (dtype.itemsize + DOUBLE * with_truth)
        read = load if needed < SHARE_OF_MEMORY * memory(device) else stream
        return read(self.checkpoint, dtype=dtype, device=device, conventions=conventions)

    def stored(self, model: LTX2VideoTransformer3DModel) -> LTX2VideoTransformer3DModel:
        """Return a model with all parameters in memory, or mapped, where this one reads a block at a time."""
        streamed = isinstance(model, StreamedTransformer)
        return load(self.checkpoint, dtype=model.dtype, device=model.device) if streamed else model


def memory(device: torch.device) -> int:
    """Return how many bytes of memory a device has, as far as that can be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**34


def real_case(checkpoint: str, file: str) -> RealCase:
    """Return the case of a checkpoint and a file of inputs.

    Raises `CheckpointError` and `TraceError` for files that cannot be used, and for inputs of another model.
    """
    plan = make_plan(checkpoint)
    plan.check()
    count = sum(math.prod(weight.shape) for weight in plan.weights.values())
    given = load_inputs(file)
    config = plan.config
    for name, x in given.items():
        if name.endswith("hidden_states") and x is not None:
            side = config.audio if name.startswith("audio_") else config.video
            width = side.text_dim if "encoder" in name else side.in_channels
            if x.ndim != 3 or x.shape[-1] != width:
                expected = f"(B, T, {width}), as {checkpoint} takes it"
                raise TraceError(f"{file}: {name}: expected {expected}, got {tuple(x.shape)}")
    return RealCase(checkpoint, file, config, count, given)


# ---------------------------------------------------------------- which cases are audited
def cases_to_audit(
    chosen: Sequence[Case], trace: tuple[str, Trace] | None, checkpoint: str | None, inputs: str | None
) -> "list[Case | RealCase]":
    """Return the cases that a candidate is audited in.

    `chosen` are those that --case and --release select; `trace` is the candidate, if it is a trace file, by its
    path; `checkpoint` and `inputs` are files.

    Raises `ValueError` unless a trace is of one case, and one that was asked for.
    """
    if (checkpoint is None) != (inputs is None):
        missing, there = ("--inputs", "--checkpoint") if inputs is None else ("--checkpoint", "--inputs")
        raise ValueError(f"{there}: only with {missing} FILE")
    if checkpoint is not None and inputs is not None:
        real = real_case(checkpoint, inputs)
        if trace is not None and trace[1].case is not None:
            raise TraceError(f"{trace[0]}: the trace is of {trace[1].case}, not of {real.id}")
        return [real]
    return [*chosen] if trace is None else [case_of_trace(trace[0], trace[1].case, chosen)]


def case_of_trace(path: str, case: str | None, chosen: Sequence[Case]) -> Case:
    """Return the one case, among those that are asked for, that a trace is of.

    Raises `TraceError` if it is of another one, or if it does not say of which and several are asked for.
    """
    asked = {x.id: x for x in chosen}
    if case is None and len(asked) != 1:
        asked_for = f"{len(asked)} cases are asked for"
        raise TraceError(f"{path}: the trace does not name its case, and {asked_for}; name the one with --case")
    if case is not None and case not in asked:
        others = f"not of {next(iter(asked))}" if len(asked) == 1 else f"none of the {len(asked)} that are asked for"
        raise TraceError(f"{path}: the trace is of {case}, {others}")
    return next(iter(asked.values())) if case is None else asked[case]


def require_same_inputs(path: str, trace: Trace, inputs: Inputs, config: TransformerConfig, dtype: torch.dtype) -> None:
    """Raise `TraceError` if a trace says that it was computed from other inputs, or with another model.

    A trace of another dtype had some inputs in that dtype, whose sha256 cannot be compared.
    """
    ours, wide = record.digests(inputs), record.tensors(cast(inputs, torch.float64))
    same_dtype = trace.fingerprint.get("dtype") in (None, str(dtype).removeprefix("torch."))
    for name, digest in trace.inputs.items():
        if name not in ours:
            raise TraceError(f"{path}: the trace was computed with {name}, which is not among the inputs")
        comparable = same_dtype or wide[name].dtype == record.tensors(inputs)[name].dtype
        if comparable and digest != ours[name]:
            raise TraceError(f"{path}: the trace was computed from another {name} (its sha256 differs)")
    for key, x in (trace.config or {}).items():
        if key in config and config_value(config[key]) != config_value(x):
            raise TraceError(f"{path}: the trace is of a model with {key} = {x}, expected {config[key]}")


def config_value(x: Any) -> Any:
    """Return a value of a config as JSON has it."""
    return [*x] if isinstance(x, list | tuple) else x


def about_trace(case: Case | RealCase, inputs: Inputs, conventions: Conventions) -> Mapping[str, Any]:
    """Return what a trace says of itself, for `save_trace`."""
    return {
        "config": case.config.to_diffusers(),
        "inputs": record.digests(inputs),
        "conventions": asdict(conventions),
        "case": case.id if isinstance(case, Case) else None,
    }
