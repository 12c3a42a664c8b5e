"""Measure time and peak memory of loading a checkpoint: ltx2ref beside diffusers and torch's own cast, at real widths.

The script writes random weights as a diffusers folder, as Lightricks' single file and as its fp8 file. Each is loaded
in a process of its own, in turns. A load that maps the file has read nothing yet, so each load is measured twice: until
the model is there, and until every page of its weights has been read once. Seconds are the processor's, of all threads.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import ltx2ref
from ltx2ref import LTX_2_3
from ltx2ref.checkpoint.names import to_lightricks
from ltx2ref.checkpoint.shapes import parameter_shapes

EXAMPLES = """examples:
  python scripts/bench_loading.py                          6 layers of 2.3, 14 GB in a temporary folder
  python scripts/bench_loading.py --layers 2 --repeats 1   a quick look
  python scripts/bench_loading.py --folder DIR --json      where the files go, and JSON
"""
PREFIX = "model.diffusion_model."
DIFFUSERS, CAST, START = "diffusers, bf16", "torch's cast of the fp8 file's tensors to bf16", "import torch"
COMMANDS = {"python": ["-c", "pass"], "import": ["-c", "import torch"], "inspect": ["-m", "ltx2ref", "inspect"]}
# What is loaded, by whom, and what it is compared with. Nothing but torch's cast reads what diffusers cannot.
RUNS = {
    DIFFUSERS: ("diffusers", "transformer", DIFFUSERS),
    "ltx2ref, bf16, diffusers' folder": ("ltx2ref", "transformer", DIFFUSERS),
    "ltx2ref, bf16, Lightricks' file": ("ltx2ref", "bf16.safetensors", DIFFUSERS),
    CAST: ("torch", "fp8.safetensors", CAST),
    "ltx2ref, fp8 scaled to bf16": ("ltx2ref", "fp8.safetensors", CAST),
    START: ("import", "", START),
    "Python's own start": ("python", "", START),
    "ltx2ref inspect, of the bf16 file": ("inspect", "bf16.safetensors", START),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6, help="default: 6")
    parser.add_argument("--repeats", type=int, default=3, help="loads of each kind; default: 3")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--measure", nargs=2, metavar=("WHO", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write(Path(folder), options.layers)
        results = run(Path(folder), options.repeats)
    print(json.dumps(results, indent=1) if options.json else table(results))
    return 0


def write(folder: Path, layers: int) -> None:
    config = replace(LTX_2_3, num_layers=layers)
    print(f"writing {layers} layers of random weights", file=sys.stderr)
    with torch.device("meta"):
        model = ltx2ref.LTX2VideoTransformer3DModel(config)
    noise = torch.randn(2**24 + 1).mul_(0.02).bfloat16()  # repeated: what the numbers are does not matter here
    state = {name: repeated(noise, shape) for name, shape in parameter_shapes(config).items()}
    model.load_state_dict(state, assign=True)
    ltx2ref.save(model, folder / "transformer")
    ltx2ref.save(model, folder / "bf16.safetensors", dialect="lightricks")
    del model, state
    mapped = ltx2ref.load(folder / "bf16.safetensors")
    write_fp8(folder / "fp8.safetensors", dict(mapped.state_dict()), config)


def repeated(noise: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    size = torch.Size(shape).numel()
    return noise.repeat(-(-size // len(noise)))[:size].reshape(shape)


def write_fp8(path: Path, state: dict[str, torch.Tensor], config: ltx2ref.TransformerConfig) -> None:
    """Write a file like the published fp8 ones: the blocks' Linear layers in e4m3, with a scale each."""
    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        module, _, leaf = (PREFIX + to_lightricks(name)).rpartition(".")
        quantised = leaf == "weight" and tensor.ndim == 2 and name.startswith("transformer_blocks.")
        stored[f"{module}.{leaf}"] = tensor.to(torch.float8_e4m3fn) if quantised else tensor
        if quantised:
            stored |= {f"{module}.weight_scale": torch.tensor(0.5), f"{module}.input_scale": torch.tensor(1.0)}
    save_file(stored, path, {"config": json.dumps({"transformer": config.to_lightricks()})})


def run(folder: Path, repeats: int) -> dict[str, Any]:
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for turn in range(repeats + 1):  # the first one warms the cache of the disk
        for name, (who, path, _) in RUNS.items():
            command = [sys.executable, __file__, "--measure", who, str(folder / path)]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"round {turn}: {name}: {result}", file=sys.stderr)
            if turn:
                rows[name].append(result)
    medians = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]} for name, found in rows.items()
    }
    return {
        name: {"median": row, "over": RUNS[name][2], "ratio": ratios(rows[name], rows[RUNS[name][2]])}
        for name, row in medians.items()
    }


def ratios(found: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of the rounds' ratios, in which both sides ran one after the other."""
    return {
        key: statistics.median(one[key] / max(other[key], 1e-9) for one, other in zip(found, others, strict=True))
        for key in found[0]
    }


def measure(who: str, path: str) -> dict[str, float]:
    """Return processor seconds and the peak in MiB above the process before, until loaded and until all is read.

    Commands, which have a process of their own, have seconds alone.
    """
    before = peak()
    if who in COMMANDS:
        subprocess.run([sys.executable, *COMMANDS[who], *filter(None, [path])], check=True, stdout=subprocess.DEVNULL)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {"seconds": children.ru_utime + children.ru_stime}
    if who == "diffusers":
        from diffusers import LTX2VideoTransformer3DModel as Theirs

        load: Any = Theirs.from_pretrained
    elif who == "torch":
        load = cast_all
    else:
        load = ltx2ref.LTX2VideoTransformer3DModel.from_pretrained
    start = time.process_time()
    model = load(path, torch_dtype=torch.bfloat16)
    loaded = time.process_time()
    at_load = peak()
    for parameter in model.parameters():
        parameter.detach().flatten().view(torch.uint8)[::4096].sum()  # a byte of each page
    read = time.process_time()
    return {
        "seconds": loaded - start,
        "seconds, all read": read - start,
        "peak MiB": (at_load - before) / 1024,
        "peak MiB, all read": (peak() - before) / 1024,
    }


def cast_all(path: str, torch_dtype: torch.dtype) -> torch.nn.Module:
    """Return a module that holds the tensors of a file, those of float8 cast by torch and without their scales."""
    from safetensors.torch import load_file

    module = torch.nn.Module()
    for i, x in enumerate(load_file(path).values()):
        module.register_parameter(str(i), torch.nn.Parameter(x.to(torch_dtype), requires_grad=False))
    return module


def peak() -> int:
    """Return this process's peak resident memory in KiB, which ru_maxrss would inherit from its parent."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def table(results: dict[str, Any]) -> str:
    """Return the medians as a table, each with its ratio in brackets."""
    keys = [*next(iter(results.values()))["median"]]
    lines = [f"{'':48}" + "".join(f"{key:>22}" for key in keys)]
    for name, row in results.items():
        cells = [f"{row['median'][key]:.2f} ({row['ratio'][key]:.2f})" if key in row["median"] else "" for key in keys]
        lines.append(f"{name:48}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join([*lines, f"in brackets: over {DIFFUSERS}; over {CAST}; over {START}"])


if __name__ == "__main__":
    sys.exit(main())
