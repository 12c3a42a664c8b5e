"""Record what pinned diffusers and ltx-core compute for the conformance cases, on the CPU, into the package.

    python scripts/record_reference.py                  all cases
    python scripts/record_reference.py --case '2.3/*'   some of them

Some 30 taps of the cases that `verify` runs, every tap of those from which the conformance kit is made.
Nothing in a recording comes from this project's model but the norms of the float64 truth.
"""
import argparse
import json
import platform
import sys
from fnmatch import fnmatch
from importlib.metadata import version
from typing import Any

import diffusers  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import nn

from ltx2ref.conventions import DIFFUSERS
from ltx2ref.kit.cases import MODELS as KIT
from ltx2ref.parity import generator, record
from ltx2ref.parity.cases import RECORDED, SEED, Case, Inputs
from ltx2ref.parity.oracles.diffusers import LAYOUT, build_diffusers, run_diffusers
from ltx2ref.parity.oracles.ltx_core import LAYOUT as LTX_CORE_LAYOUT
from ltx2ref.parity.oracles.ltx_core import LTXCore, build_ltx_core, run_ltx_core
from ltx2ref.parity.probe import probe
from ltx2ref.parity.taps import ADALN_LAYERS, ROPES, Taps, trace
from ltx2ref.parity.verify import cast, norm, truth

TAPS = [f"{name}{part}" for name in ROPES for part in (".cos", ".sin")] + [
    f"{name}{part}" for name in ADALN_LAYERS for part in (".sinusoid", ".emb")]
THREADS = 1  # the most reproducible number, and for tensors this small the fastest


def run(model: Any, case: Case, inputs: Inputs) -> Taps:
    if isinstance(model, LTXCore):
        with torch.no_grad(), trace(model.model, LTX_CORE_LAYOUT) as taps:
            run_ltx_core(model, inputs | {"use_cross_timestep": True})
    else:
        with torch.no_grad(), trace(model, LAYOUT) as taps:
            run_diffusers(model, inputs)
    return taps if case in KIT else {name: taps[name] for name in TAPS if name in taps} | {
        name: x for name, x in taps.items() if name.endswith((".video", ".audio"))} | {
        name: taps[name] for name in ("sample", "audio_sample")}


def oracle(case: Case, dtype: str) -> tuple[nn.Module, Inputs]:
    """The recorded implementation's model with the generated weights, and the case's inputs."""
    config = case.config.to_diffusers()
    with torch.device("meta"):
        empty: Any = diffusers.LTX2VideoTransformer3DModel(**config)
    shapes = {name: tuple(x.shape) for name, x in empty.state_dict().items()}
    build = build_diffusers if case.conventions == DIFFUSERS else build_ltx_core
    model = build(config, generator.weights(shapes, SEED), record.DTYPES[dtype])
    return model, cast(case.inputs(), record.DTYPES[dtype])


def record_case(case: Case, dtype: str) -> None:
    model, inputs = oracle(case, dtype)
    taps, again = run(model, case, inputs), run(model, case, inputs)
    if any(not torch.equal(taps[name], again[name]) for name in taps):
        sys.exit(f"{case.id} {dtype}: the implementation does not repeat itself")
    norms = {name: norm(x) for name, x in truth(case, record.DTYPES[dtype], taps).items()}
    record.save(case, dtype, taps, inputs, norms, SEED)


def environment() -> dict[str, object]:
    return {
        "implementation": "diffusers.LTX2VideoTransformer3DModel", "diffusers": diffusers.__version__,
        "ltx-core": version("ltx-core"),
        "torch": torch.__version__, "python": platform.python_version(), "threads": THREADS,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "mkl": torch.backends.mkl.is_available(),
        "probe": probe(torch.device("cpu"), tuple(record.DTYPES.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="*", metavar="GLOB")
    pattern = parser.parse_args().case
    torch.set_num_threads(THREADS)
    record.DIRECTORY.mkdir(exist_ok=True)
    (record.DIRECTORY / "recording.json").write_text(json.dumps(environment(), indent=1) + "\n")
    chosen = [(case, dtype) for case in (*RECORDED, *KIT) for dtype in record.DTYPES if fnmatch(case.id, pattern)]
    for i, (case, dtype) in enumerate(chosen):
        print(f"\r{i + 1}/{len(chosen)} {case.id} {dtype}\033[K", end="", file=sys.stderr)
        record_case(case, dtype)
    size = sum(file.stat().st_size for file in record.DIRECTORY.iterdir())
    print(f"\n{len(chosen)} recordings; {size / 1e6:.2f} MB in {record.DIRECTORY.name}/", file=sys.stderr)


if __name__ == "__main__":
    main()
