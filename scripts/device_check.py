"""Check in eight minutes whether a device's kernels compute this model right, and how fast. Prints one table.

The sections run in this order until the time is up; what did not fit is named:

    kernel shapes   one attention or one linear at widths and lengths of real models, against float64
    native          the conformance cases in the device's own arithmetic, with TF32 off
    attention       three of these cases again, with each backend of PyTorch's attention that the device has
    TF32            the same cases in float32 with TF32 on, which is another arithmetic: its cost, without a verdict
    bench           a forward at real widths: ltx2ref, its floor, and diffusers if it is installed
    exact           the conformance cases under exact arithmetic on the device: whether they have the recorded bits

All settings are restored at the end. The exit status is 1 if something failed, 2 if a check does not repeat itself or
was left out, and else 0.
"""

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench
import torch
from floor import PeakMemory, Run, recorded_calls, replay, timed
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltx2ref import LTX2VideoTransformer3DModel
from ltx2ref.parity import kernels, record, verify
from ltx2ref.parity.cases import RECORDED, Case, Inputs
from ltx2ref.parity.generator import build
from ltx2ref.parity.judge import CLEARLY, measure
from ltx2ref.parity.kernels import Kernel
from ltx2ref.parity.report.rows import IDENTICAL
from ltx2ref.parity.run import cast, moved, run
from ltx2ref.parity.trace.probe import processor

EXAMPLES = """examples:
  python scripts/device_check.py                                      the GPU, all of it
  python scripts/device_check.py --json device.json --budget 240      in four minutes, every number into a file
  python scripts/device_check.py --device cpu --case 2.3/t2v          this processor, short
  python scripts/device_check.py --only native --only exact
"""
SECTIONS = ("kernel shapes", "native", "attention", "TF32", "bench", "exact")
BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
TYPICAL = ("2.0/text-masks", "2.3/i2v", "2.5/everything")  # masked, unmasked, both
PASSED, FAILED, INCONCLUSIVE, UNAVAILABLE, MEASURED = "passed", "FAILED", "inconclusive", "not available", "measured"
MARGIN = 1.5  # times the longest of the last steps: the time that must be left for another one
BENCH = {"cuda": (4, (16, 16, 16), "bfloat16", 7, 60.0), "cpu": (1, (4, 4, 4), "float32", 3, 30.0)}
# layers, video latents, dtype, rounds, seconds that it may take


@dataclass(frozen=True)
class Row:
    section: str
    what: str
    dtype: str
    verdict: str
    first: str | None = None  # wrong tap
    share: float | None = None  # the largest share of a budget
    note: str = ""
    seconds: float = 0.0


Step = tuple[str, Callable[[], Row]]


@dataclass
class Clock:
    """Keep account of the time that is left, and of what was left out for want of it."""

    budget: float
    begun: float = field(default_factory=time.monotonic)
    left_out: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.budget - (time.monotonic() - self.begun)

    def steps(self, section: str, work: Sequence[Step], reserve: float = 0.0) -> Iterator[Row]:
        """Take the steps for which there is time, judging by the last ones."""
        last: deque[float] = deque(maxlen=5)  # the first takes longer
        for i, (name, step) in enumerate(work):
            if self.left - reserve < MARGIN * max(last, default=0.0) or self.left <= 0:
                self.left_out.append(f"{section}: {len(work) - i} of {len(work)}, from {name} on")
                return
            start = time.monotonic()
            row = step()
            last.append(time.monotonic() - start)
            yield replace(row, seconds=last[-1])


# ---------------------------------------------------------------- what is checked
def kernel_shapes(device: torch.device) -> list[Step]:
    return [
        (f"{kernel.name} {dtype}", partial(kernel_shape, kernel, dtype, device))
        for kernel in (*kernels.KERNELS, *kernels.LONG_KERNELS)
        for dtype in record.NATIVE_DTYPES
    ]


def kernel_shape(kernel: Kernel, dtype: str, device: torch.device) -> Row:
    """Judge by the budget that the CPU's own error gives."""
    x = kernel.inputs(record.NATIVE_DTYPES[dtype])
    wide = moved(x, lambda y: y.double() if y.is_floating_point() else y)
    with torch.no_grad():
        true, here = kernels.compute(kernel, wide), kernels.compute(kernel, x)
        there = kernels.compute(kernel, placed(x, device)).cpu()
    share = measure(there, here, true, true).share
    return Row("kernel shapes", kernel.name, dtype, PASSED if share <= CLEARLY else FAILED, share=share)


def placed(x: Inputs, device: torch.device) -> Inputs:
    """Move tensors, and leave expanded what is: keys of stride 0."""

    def move(y: torch.Tensor) -> torch.Tensor:
        some = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in y.stride())
        return y[some].to(device).expand(y.shape)

    return moved(x, move)


def native(case: Case, dtype: str, device: torch.device) -> Row:
    result = verify.verify(case, dtype, device, False, "native").native
    assert result is not None
    return row("native", case.id, dtype, result)


def row(section: str, what: str, dtype: str, result: verify.NativeResult) -> Row:
    verdict = {verify.FAILED: FAILED, verify.INCONCLUSIVE: INCONCLUSIVE}.get(result.verdict, PASSED)
    return Row(section, what, dtype, verdict, result.first if verdict == FAILED else None, result.share, result.note)


def with_setting(
    section: str, what: str, case: Case, dtype: str, device: torch.device, setting: AbstractContextManager[Any]
) -> Row:
    """Judge a case with a setting that holds for nothing but the forward that is judged."""
    model = build(case.config, record.NATIVE_DTYPES[dtype], case.conventions, case.scales).to(device)
    inputs = moved(cast(case.inputs(), record.NATIVE_DTYPES[dtype]), lambda x: x.to(device))
    try:
        with setting:
            taps, again = run(model, inputs), run(model, inputs)
    except RuntimeError as error:
        return Row(section, what, dtype, UNAVAILABLE, note=reason(error))
    if any(not torch.equal(x, again[name]) for name, x in taps.items()):
        return Row(section, what, dtype, INCONCLUSIVE, note="does not repeat itself")
    return row(section, what, dtype, verify.compare_with_record(case, dtype, taps, same_bits=False))


def exactly(case: Case, dtype: str, device: torch.device) -> Row:
    result = verify.verify(case, dtype, device, False, "exact").exact
    assert result is not None
    identical = result.verdict == IDENTICAL
    return Row(
        "exact",
        case.id,
        dtype,
        PASSED if identical else FAILED,
        result.first,
        note=result.note if identical else f"{result.differing} of {result.taps} taps differ",
    )


def reason(error: RuntimeError) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:160]


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def unavailable(backend: SDPBackend, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the device has no such attention even for the plainest call, or None if it has."""
    q = torch.ones(1, 2, 64, 64, device=device, dtype=dtype)
    try:
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
    except RuntimeError as error:
        return reason(error)
    return None


def with_backend(name: str, case: Case, dtype: str, device: torch.device) -> Row:
    why = unavailable(BACKENDS[name], device, record.NATIVE_DTYPES[dtype])
    what = f"{name}: {case.id}"
    if why is not None:
        return Row("attention", what, dtype, UNAVAILABLE, note=why)
    return with_setting("attention", what, case, dtype, device, sdpa_kernel(BACKENDS[name]))


def with_tf32(case: Case, dtype: str, device: torch.device) -> Row:
    return replace(with_setting("TF32", case.id, case, dtype, device, tf32(True)), verdict=MEASURED)


# ---------------------------------------------------------------- speed
def measured(device: torch.device) -> Row:
    """Time a forward of release 2.3 at real widths, in turns with its floor, and with diffusers'."""
    layers, tokens, dtype, rounds, _ = BENCH[device.type]
    config = replace(bench.RELEASES["2.3"], num_layers=layers)
    state = bench.random_state(config, record.NATIVE_DTYPES[dtype], device.type)
    inputs = bench.random_inputs(
        config, record.NATIVE_DTYPES[dtype], bench.TIMESTEPS[0], tokens, argparse.Namespace(device=device.type, batch=1)
    )
    with torch.no_grad():
        runs = forwards(config, state, dtype, inputs)
        peaks = {}
        for name, forward in runs.items():
            with PeakMemory(device.type) as memory:
                forward()
            peaks[name] = memory.peak_bytes / 2**20
        calls = recorded_calls(runs["ltx2ref"])
        runs["floor"] = lambda: replay(calls)
        runs["floor"]()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds):
            names = [*runs]
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(timed(runs[name], device.type))
    middle = {name: statistics.median(x) for name, x in times.items()}
    said = ", ".join(
        f"{name} {x * 1e3:.1f} ms" + (f" and {peaks[name]:.0f} MiB" if name in peaks else "")
        for name, x in middle.items()
    )
    ratios = ", ".join(
        f"{middle['ltx2ref'] / x:.3f} of {name}'s time" for name, x in middle.items() if name != "ltx2ref"
    )
    what = f"2.3, {layers} layers, {tokens[0] * tokens[1] * tokens[2]} video tokens"
    return Row("bench", what, dtype, MEASURED, note=f"{said}; ltx2ref takes {ratios}; medians of {rounds}")


def forwards(config: Any, state: bench.State, dtype: str, inputs: bench.Inputs) -> dict[str, Run]:
    with torch.device("meta"):
        ours = LTX2VideoTransformer3DModel(config)
    ours.load_state_dict(state, assign=True)
    ours.requires_grad_(False).eval()
    found: dict[str, Run] = {"ltx2ref": lambda: ours(**inputs, return_dict=False)}
    try:
        from ltx2ref.parity.oracles.diffusers import build_diffusers, run_diffusers
    except ImportError:
        return found
    theirs = build_diffusers(config.to_diffusers(), state, record.NATIVE_DTYPES[dtype])
    return found | {"diffusers": lambda: run_diffusers(theirs, inputs)}


# ---------------------------------------------------------------- all of it
def check(device: torch.device, cases: Sequence[Case], sections: Sequence[str], clock: Clock) -> Iterator[Row]:
    def each(step: Callable[..., Row], cases: Sequence[Case], dtypes: Sequence[str]) -> list[Step]:
        return [(f"{case.id} {dtype}", partial(step, case, dtype, device)) for case in cases for dtype in dtypes]

    reserve = BENCH[device.type][-1] if "bench" in sections else 0.0
    typical = [case for case in cases if case.id in TYPICAL] or [case for case in cases if case.native][:1]
    if "kernel shapes" in sections:
        yield from clock.steps("kernel shapes", kernel_shapes(device), reserve)
    if "native" in sections:
        yield from clock.steps("native", each(native, cases, [*record.NATIVE_DTYPES]), reserve)
    if "attention" in sections:
        for name in BACKENDS:
            yield from clock.steps(
                f"attention, {name}", each(partial(with_backend, name), typical, [*record.NATIVE_DTYPES]), reserve
            )
    if "TF32" in sections and device.type == "cuda":
        yield from clock.steps("TF32", each(with_tf32, typical, ["float32"]), reserve)
    elif "TF32" in sections:
        yield Row("TF32", "on", "float32", UNAVAILABLE, note="it is a GPU's")
    if "bench" in sections:
        if clock.left < reserve:
            clock.left_out.append("bench")
        else:
            start = time.monotonic()
            yield replace(measured(device), seconds=time.monotonic() - start)
    if "exact" in sections:
        yield from clock.steps("exact", each(exactly, cases, [*record.EXACT_DTYPES]))


def environment(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    try:
        diffusers: str | None = version("diffusers")
    except PackageNotFoundError:
        diffusers = None
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "capability": (torch.cuda.get_device_capability(device) if cuda else torch.backends.cpu.get_cpu_capability()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "diffusers": diffusers,
    }


def table(rows: Sequence[Row], facts: dict[str, Any], clock: Clock) -> str:
    lines = [
        f"{facts['device']}, torch {facts['torch']}"
        + (f", CUDA {facts['cuda']}" if facts["cuda"] else "")
        + f"; {clock.budget - clock.left:.0f} s",
        "",
        "| check | dtype | passed | failed | not available | largest share of a budget | seconds |",
        "|---" * 7 + "|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        group = row.section + (f", {row.what.partition(':')[0]}" if row.section == "attention" else "")
        groups.setdefault((group, row.dtype), []).append(row)
    for (group, dtype), found in groups.items():
        count = {verdict: sum(row.verdict == verdict for row in found) for verdict in (PASSED, FAILED, UNAVAILABLE)}
        worst = max((row.share for row in found if row.share is not None), default=None)
        passed = "measured" if found[0].verdict == MEASURED else f"{count[PASSED]} of {len(found)}"
        lines.append(
            f"| {group} | {dtype} | {passed} | {count[FAILED]} | {count[UNAVAILABLE]} | "
            f"{'-' if worst is None else f'{worst:.2f}'} | {sum(row.seconds for row in found):.0f} |"
        )
    lines.append("")
    lines += [
        f"- {row.section}, {row.what}, {row.dtype}: {row.verdict}"
        + (f" at {row.first}" if row.first else "")
        + (f": {row.note}" if row.note else "")
        for row in rows
        if row.verdict in (FAILED, INCONCLUSIVE, MEASURED)
    ]
    gone = {(row.what.partition(":")[0], row.note) for row in rows if row.verdict == UNAVAILABLE}
    lines += [f"- not available: {what}: {note}" for what, note in sorted(gone)]
    lines += [f"- left out, for want of time or of a part: {what}" for what in clock.left_out]
    return "\n".join(lines)


def status(rows: Sequence[Row], clock: Clock) -> int:
    verdicts = {row.verdict for row in rows}
    incomplete = INCONCLUSIVE in verdicts or any(not what.startswith("bench") for what in clock.left_out)
    return 1 if FAILED in verdicts else 2 if incomplete else 0


def main() -> int:
    options = parse_arguments()
    device = torch.device(options.device)
    clock = Clock(options.budget)
    cases = [case for case in RECORDED if options.case is None or case.id in options.case]
    facts = environment(device)
    print(f"{facts['device']}: {', '.join(options.only)}, {len(cases)} cases, {options.budget:.0f} s", file=sys.stderr)
    rows: list[Row] = []
    with tf32(False):
        for row in check(device, cases, options.only, clock):
            rows.append(row)
            print(
                f"{clock.budget - clock.left:5.0f} s  {row.section}, {row.what}, {row.dtype}: {row.verdict}",
                file=sys.stderr,
                flush=True,
            )
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "environment": facts,
                    "status": status(rows, clock),
                    "rows": [asdict(row) for row in rows],
                    "left_out": clock.left_out,
                },
                indent=1,
            )
            + "\n",
            encoding="utf-8",
        )
    print(table(rows, facts, clock))
    return status(rows, clock)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda", choices=[*BENCH], help="(default: %(default)s)")
    add("--budget", type=float, default=440.0, metavar="SECONDS", help="(default: %(default)s)")
    add("--case", action="append", metavar="ID", help="a conformance case, for native and exact (default: all)")
    add("--only", action="append", choices=SECTIONS, help="a section (default: all)")
    add("--json", type=Path, metavar="FILE", help="write every number, too")
    options = parser.parse_args()
    options.only = options.only or [*SECTIONS]
    unknown = sorted({*(options.case or ())} - {case.id for case in RECORDED})
    if unknown:
        parser.error(f"--case {unknown[0]}: no such case; there are {', '.join(case.id for case in RECORDED)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU that this torch can use; there is --device cpu")
    return options


if __name__ == "__main__":
    sys.exit(main())
