"""Record what pinned diffusers and ltx-core compute for the conformance cases, on the CPU, into the package.

    python scripts/record_reference.py exact                   a digest of every tap, the same on every machine
    python scripts/record_reference.py exact --case '2.3/*'    some cases; kernel shapes are called kernel/*
    python scripts/record_reference.py native                  tensors as this machine's arithmetic makes them

Under exact arithmetic each case and each kernel shape runs four times: three times with every result of the float64
library's functions moved by up to a unit in the last place. If that changes a digest, the case is not recorded: give it
another seed.

In native arithmetic the script records some 30 taps of the cases that `verify` runs, and every tap of those from which
the conformance kit is made. Nothing in a recording comes from this project's model, except the norms of the float64
truth.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from importlib.metadata import version
from typing import Any

import diffusers  # type: ignore[import-untyped, unused-ignore]
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn  # type: ignore[import-untyped, unused-ignore]
from torch import nn

from ltx2ref.interface import DIFFUSERS
from ltx2ref.kit.cases import MASKED
from ltx2ref.kit.cases import MODELS as KIT
from ltx2ref.parity import generator, record
from ltx2ref.parity.arithmetic import AS_DEFINED, Arithmetic, Nudged
from ltx2ref.parity.cases import OUTPUTS, RECORDED, Case, Inputs
from ltx2ref.parity.exact import exact
from ltx2ref.parity.kernels import HEADS, KERNELS, LONG_KERNELS, Kernel
from ltx2ref.parity.kernels import OUTPUT as KERNEL_OUTPUT
from ltx2ref.parity.oracles.diffusers import build_diffusers, traced
from ltx2ref.parity.oracles.ltx_core import LAYOUT as LTX_CORE_LAYOUT
from ltx2ref.parity.oracles.ltx_core import LTXCore, build_ltx_core, run_ltx_core
from ltx2ref.parity.run import cast
from ltx2ref.parity.trace.layouts import ROPES
from ltx2ref.parity.trace.probe import probe
from ltx2ref.parity.trace.taps import ADALN_LAYERS, Taps, returned, trace
from ltx2ref.parity.truth import norm
from ltx2ref.parity.verify import truth_of
from ltx2ref.progress import track

TAPS = [f"{name}{part}" for name in ROPES for part in (".cos", ".sin")] + [
    f"{name}{part}" for name in ADALN_LAYERS for part in (".sinusoid", ".emb")
]
EXCHANGE = ("av_cross_attn_", "cross_attn_", "audio_to_video_attn", "video_to_audio_attn")  # how its taps begin
THREADS = 1  # the most reproducible number, and for tensors this small the fastest


SEEDS = (1, 2, 3)  # for the moves by a unit in the last place


def run(model: Any, inputs: Inputs) -> Taps:
    """Return every tap, and the outputs as the call returned them."""
    if isinstance(model, LTXCore):
        with torch.no_grad(), trace(model.model, LTX_CORE_LAYOUT) as taps:
            outputs = run_ltx_core(model, inputs | {"use_cross_timestep": True})
        return taps | returned(outputs)
    return traced(model, inputs)


def some(taps: Taps, case: Case) -> Taps:
    """Return the taps whose tensors are worth storing."""
    return (
        taps
        if case in KIT
        else {name: taps[name] for name in TAPS if name in taps}
        | {name: x for name, x in taps.items() if name.endswith((".video", ".audio"))}
        | {name: taps[name] for name in OUTPUTS}
    )


def forward_of(case: Case | Kernel, dtype: str) -> tuple[Callable[[], Taps], Inputs]:
    """Return a function that computes a case in the recorded implementation, and the inputs."""
    if isinstance(case, Kernel):
        given = case.inputs(record.EXACT_DTYPES[dtype])
        operation = kernel(case, given)
        return lambda: {KERNEL_OUTPUT: operation()}, given
    model, inputs = oracle(case, dtype)
    if case.alone is not None:  # diffusers cannot leave a stream out, but it can isolate both
        isolated = cast(replace(case, alone=None).inputs() | {"isolate_modalities": True}, record.EXACT_DTYPES[dtype])
        return lambda: taps_of(str(case.alone), run(model, isolated)), inputs
    return lambda: run(model, inputs), inputs


def taps_of(stream: str, taps: Taps) -> Taps:
    """Return the taps of a forward that are one stream's own, and not the exchange's."""
    inside = {name: name.split(".", 2)[2] if name.startswith("transformer_blocks.") else name for name in taps}
    own = [name for name, layer in inside.items() if layer.startswith("audio") == (stream == "audio")]
    return {name: taps[name] for name in own if not inside[name].startswith(EXCHANGE)}


def kernel(case: Kernel, x: Inputs) -> Callable[[], torch.Tensor]:
    """Return the operation as diffusers calls it, with a mask for each head."""
    if case.operation == "linear":
        columns, rows = x["weight"].shape
        layer = nn.Linear(rows, columns, bias="bias" in x).requires_grad_(False)
        layer.load_state_dict({name: x[name] for name in ("weight", "bias") if name in x}, assign=True)
        return lambda: layer(x["x"])
    mask = x["mask"].repeat(1, HEADS, 1, 1) if "mask" in x else None
    return lambda: dispatch_attention_fn(x["q"], x["k"], x["v"], attn_mask=mask)


def oracle(case: Case, dtype: str) -> tuple[nn.Module, Inputs]:
    """Return the recorded implementation's model with the generated weights, and the case's inputs."""
    config = case.config.to_diffusers()
    with torch.device("meta"):
        empty: Any = diffusers.LTX2VideoTransformer3DModel(**config)
    shapes = {name: tuple(x.shape) for name, x in empty.state_dict().items()}
    build = build_diffusers if case.conventions == DIFFUSERS else build_ltx_core
    model = build(config, generator.weights(shapes, generator.SEED, case.scales), record.EXACT_DTYPES[dtype])
    return model, cast(case.inputs(), record.EXACT_DTYPES[dtype])


def record_exactly(case: Case | Kernel) -> None:
    """Record a case under exact arithmetic, or exit if a digest depends on the last bit of a float64 function."""
    taps: dict[str, Taps] = {}
    given: dict[str, Inputs] = {}
    for dtype in record.EXACT_DTYPES:
        forward, given[dtype] = forward_of(case, dtype)
        taps[dtype] = run_exactly(forward)
        for seed in SEEDS:
            moved = run_exactly(forward, Nudged(seed))
            changed = [name for name, x in taps[dtype].items() if record.digest(x) != record.digest(moved[name])]
            if changed:
                sys.exit(
                    f"{case.id} {dtype}: {len(changed)} taps depend on the last bit of a float64 function (seed "
                    f"{seed}), the first is {changed[0]}; give the case another seed"
                )
    package = "ltx-core" if isinstance(case, Case) and case.conventions != DIFFUSERS else "diffusers"
    record.save_exact(case, taps, given, f"{package} {version(package)}")


def run_exactly(forward: Callable[[], Taps], arithmetic: Arithmetic = AS_DEFINED) -> Taps:
    with exact(arithmetic):
        return forward()


def record_natively(case: Case, dtype: str) -> None:
    model, inputs = oracle(case, dtype)
    taps, again = some(run(model, inputs), case), run(model, inputs)
    if any(not torch.equal(taps[name], again[name]) for name in taps):
        sys.exit(f"{case.id} {dtype}: the implementation does not repeat itself")
    norms = {name: norm(x) for name, x in truth_of(case, record.NATIVE_DTYPES[dtype]).of(taps).items() if name in taps}
    record.save_record(case, dtype, taps, inputs, norms, generator.SEED)


def environment() -> dict[str, object]:
    return {
        "implementation": "diffusers.LTX2VideoTransformer3DModel",
        "diffusers": diffusers.__version__,
        "ltx-core": version("ltx-core"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": THREADS,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": torch.backends.mkl.is_available(),
        "probe": probe(torch.device("cpu"), tuple(record.NATIVE_DTYPES.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arithmetic", choices=["exact", "native"])
    parser.add_argument("--case", default="*", metavar="GLOB")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    record.DIRECTORY.mkdir(exist_ok=True)
    if options.arithmetic == "exact":
        everything: list[Case | Kernel] = [*RECORDED, *KIT, MASKED, *KERNELS, *LONG_KERNELS]
        for case in track([x for x in everything if fnmatch(x.id, options.case)], "recording"):
            record_exactly(case)
    else:
        (record.DIRECTORY / "recording.json").write_text(json.dumps(environment(), indent=1) + "\n")
        chosen = [case for case in (*RECORDED, *KIT) if case.native and fnmatch(case.id, options.case)]
        for case, dtype in track([(case, dtype) for case in chosen for dtype in record.NATIVE_DTYPES], "recording"):
            record_natively(case, dtype)
    size = sum(file.stat().st_size for file in record.DIRECTORY.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in {record.DIRECTORY.name}/", file=sys.stderr)


if __name__ == "__main__":
    main()
