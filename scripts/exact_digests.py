"""Count the taps with the recorded digest under exact arithmetic, in each mode, layout and number of threads.

    python scripts/exact_digests.py                          every recorded case
    python scripts/exact_digests.py --case '2.5/*'           some cases
    ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE python scripts/exact_digests.py
    scripts/on_torch.sh 2.8.0 python "$PWD/scripts/exact_digests.py"

The exit status is 1 if a digest differs.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

import ltx2ref
from ltx2ref.kit.cases import MASKED
from ltx2ref.kit.cases import MODELS as KIT
from ltx2ref.parity import record
from ltx2ref.parity.cases import RECORDED, Case, Inputs
from ltx2ref.parity.generator import build
from ltx2ref.parity.run import cast, moved
from ltx2ref.parity.trace.probe import threads
from ltx2ref.parity.trace.taps import trace
from ltx2ref.progress import track

Mode = Callable[[], AbstractContextManager[Any]]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x


def plain(x: Tensor) -> Tensor:
    return x


# mode, layout of the inputs, threads
VARIATIONS: dict[str, tuple[Mode, Callable[[Tensor], Tensor], int]] = {
    "no_grad, contiguous, 1 thread": (torch.no_grad, plain, 1),
    "no_grad, contiguous, 2 threads": (torch.no_grad, plain, 2),
    "no_grad, transposed, 1 thread": (torch.no_grad, transposed, 1),
    "grad, contiguous, 1 thread": (torch.enable_grad, plain, 1),
    "inference_mode, contiguous, 1 thread": (torch.inference_mode, plain, 1),
    "inference_mode, transposed, 2 threads": (torch.inference_mode, transposed, 2),
}


def differing(case: Case, dtype: str, mode: Mode, layout: Callable[[Tensor], Tensor], count: int) -> tuple[int, int]:
    """Return how many taps are recorded, and how many of them differ here."""
    model = build(case.config, record.EXACT_DTYPES[dtype], case.conventions, case.scales)
    inputs: Inputs = moved(cast(case.inputs(), record.EXACT_DTYPES[dtype]), layout)
    with threads(count), mode(), ltx2ref.exact(), trace(model) as taps:
        model(**inputs)
    recorded = record.load_exact(case, dtype).digests
    return len(recorded), sum(name not in taps or record.digest(taps[name]) != x for name, x in recorded.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="*", metavar="GLOB", help="default: all")
    pattern = parser.parse_args().case
    cases = [case for case in (*RECORDED, *KIT, MASKED) if fnmatch(case.id, pattern)]
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"Python {platform.python_version()}"
    )
    failed = False
    for name, variation in VARIATIONS.items():
        runs = [(case, dtype) for case in cases for dtype in record.EXACT_DTYPES]
        found = [differing(case, dtype, *variation) for case, dtype in track(runs, name)]
        taps, other = (sum(x) for x in zip(*found, strict=True))
        failed |= other > 0
        print(f"{name}: {taps - other:,} of {taps:,} taps have the recorded bits, in {len(runs)} runs", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
