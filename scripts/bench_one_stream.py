"""Measure what it takes to load one stream of a full-size file and to run it alone, against the whole model.

    python scripts/bench_one_stream.py DIR            writes a sparse copy of the 2.3 file (46 GB, 1 MB on disk) to DIR
    python scripts/bench_one_stream.py DIR --whole    and runs the whole model as well, a block at a time

Each row is a process of its own, with one thread. The weights are zeros from a hole in the file, which take as much
memory and arithmetic as any others. Memory is the peak resident set of the process, which counts mapped weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import ltx2ref
from ltx2ref.describe import Lengths, blank_inputs
from ltx2ref.progress import track

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from sparse import FILES  # type: ignore[import-not-found, unused-ignore]

LENGTHS = Lengths(video=4, audio=4, text=4)  # so few tokens that reading the weights takes most of the time
NAME = "2.3-bf16"
# For each row: how the model is made, the arguments that say so, and the streams that run.
ROWS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "audio alone": ("load", {"streams": "audio"}, ("audio",)),
    "audio alone, streamed": ("stream", {"streams": "audio"}, ("audio",)),
    "whole, streamed": ("stream", {}, ("video", "audio")),
}


def measured(path: str, row: str) -> dict[str, Any]:
    """Load and run one row in this process, and return its figures."""
    torch.set_num_threads(1)
    how, options, streams = ROWS[row]
    begun, cpu = time.perf_counter(), time.process_time()
    model = getattr(ltx2ref, how)(path, **options)
    loaded = time.perf_counter() - begun, time.process_time() - cpu
    begun, cpu = time.perf_counter(), time.process_time()
    n = LENGTHS._replace(**{name: 0 for name in ("video", "audio") if name not in streams})
    inputs = {
        name: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x
        for name, x in blank_inputs(model.config, n, model.dtype).items()
    }
    with torch.no_grad():
        model(**inputs)
    return {
        "row": row,
        "parameters": model.num_parameters(),
        "load": loaded,
        "forward": (time.perf_counter() - begun, time.process_time() - cpu),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--whole", action="store_true", help="run the whole model, too: minutes")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = FILES[NAME]
    path = options.folder / file.path
    if options.row:
        print(json.dumps(measured(str(path), options.row)))
        return 0
    if not path.exists():
        file.write(options.folder)
    print(f"| {file.file} | parameters | load, s (CPU) | forward, s (CPU) | peak GB |\n|---|--:|--:|--:|--:|")
    for row in track([row for row in ROWS if options.whole or not row.startswith("whole")], "measuring"):
        command = [sys.executable, __file__, str(options.folder), "--row", row]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        load, forward = (f"{found[x][0]:.1f} ({found[x][1]:.1f})" for x in ("load", "forward"))
        print(f"| {row} | {found['parameters']:,} | {load} | {forward} | {found['peak'] / 1e9:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
