"""Run the whole model on a small machine: write a checkpoint of full size, and stream a forward from it.

The weights are random, in the layout of the published 2.3 file: 38 GB for 48 layers, removed at the end. A process of
its own streams the model (`ltx2ref.stream`), once as it is and once with a sketch trace. Three things are measured: the
peak resident memory above the idle process, mapped pages included; the time; and the time over its limit, which is the
longer one of reading the file from the disk and of the matmuls and attention calls alone. Linux only.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from floor import Call, CallRecorder, PeakMemory, replay
from torch import Tensor

import ltx2ref
from ltx2ref import LTX_2_3, TransformerConfig
from ltx2ref.checkpoint.manifest import manifest
from ltx2ref.checkpoint.storage import torch_dtype
from ltx2ref.checkpoint.streaming import BLOCKS_PREFIX, StreamedTransformer
from ltx2ref.checkpoint.writer import TensorEntry, header, pieces
from ltx2ref.parity.audit import fingerprint
from ltx2ref.parity.trace.sketch import sketch
from ltx2ref.parity.trace.tracefile import save_trace
from ltx2ref.whole import put

EXAMPLES = """examples:
  python scripts/full_size.py DIR                          48 layers: 38 GB in DIR, 3 GB of memory
  python scripts/full_size.py DIR --layers 2               a quick look
  python scripts/full_size.py DIR --layers 12 --json       the figures as JSON
  python scripts/full_size.py DIR --checkpoint FILE        a file that is there, of any format; DIR is for the trace

The exit status is 0 if the peak is within 10 % of the weights outside the blocks, 2 blocks and the activations, 1 if it
is not, and 2 if nothing could be measured.
"""
PREFIX = "model.diffusion_model."
POOL = 2**24 + 1  # normal numbers, of which each tensor takes its own from another place on
PIECE = 2**22  # elements that are written at a time
SPARE = 2**30  # bytes that are left free on the disk
ALLOWED = 1.10  # peak, over what has to be in memory
TEXT_TOKENS, AUDIO_FRAMES = 128, 64


def main() -> int:
    options = arguments()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.tokens)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="ltx2ref-full-size-", dir=options.folder) as folder:
        path = options.checkpoint
        if path is None:
            path = Path(folder, "ltx-2.3-random.safetensors")
            if problem := write(path, replace(LTX_2_3, num_layers=options.layers)):
                print(problem, file=sys.stderr)
                return 2
        command = [sys.executable, __file__, folder, "--measure", str(path), "--tokens", *map(str, options.tokens)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return 2
    found = json.loads(done.stdout)
    print(json.dumps(found, indent=1) if options.json else said(found))
    return 0 if found["peak over what has to be there"] <= ALLOWED else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=folder, metavar="DIR", help="a folder on the disk that is to be measured")
    add("--layers", type=int, default=48, help="transformer blocks (default: 48)")
    add(
        "--tokens",
        type=int,
        nargs=3,
        default=[8, 4, 8],
        metavar=("F", "H", "W"),
        help="video latent (default: 8 4 8, which is 256 tokens)",
    )
    add("--checkpoint", type=Path, help="measure this file, and write none")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got {text}")
    return Path(text)


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the file
def write(path: Path, config: TransformerConfig) -> str | None:
    """Write a file with the published names, shapes, dtypes and order, or return why there is no room for it."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    tensors = {
        name: TensorEntry(dtype, shape, numbers(name, shape, torch_dtype(dtype), pool, place))
        for place, (name, dtype, shape) in enumerate(published(config))
    }
    metadata = {"config": json.dumps({"transformer": config.to_lightricks()})}
    size = len(header(tensors, metadata)) + sum(entry.size for entry in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if size + SPARE > free:
        return f"{path.parent}: needs {size + SPARE:,} bytes, {SPARE:,} of which stay free; the disk has {free:,}"
    progress(f"writing {path.name}, {config.num_layers} layers, {size / 1e9:.1f} GB")
    put(path, pieces(tensors, metadata, "writing random weights"))
    return None


def published(config: TransformerConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Return name, dtype and shape of each tensor, in the order of the safetensors library."""
    names = {}
    for name, row in manifest()["releases"]["2.3"]["tensors"].items():
        for i in range(config.num_layers) if "{i}" in name else (0,):
            names[PREFIX + name.replace("{i}", str(i))] = row["dtype"], tuple(row["shape"])
    for name in sorted(names):
        yield name, *names[name]


def numbers(name: str, shape: tuple[int, ...], dtype: torch.dtype, pool: Tensor, place: int) -> Iterator[memoryview]:
    """Return random numbers at scales that keep activations near 1."""
    scale = shape[-1] ** -0.5 if len(shape) == 2 and "table" not in name else 0.1
    offset = 1.0 if "_norm." in name else 0.0
    left, start = torch.Size(shape).numel(), place * 7919 % POOL
    while left:
        some = pool[start : start + min(left, PIECE)]
        yield (some * scale + offset).to(dtype).view(torch.uint8).numpy().data
        left, start = left - len(some), (start + len(some)) % POOL


# ---------------------------------------------------------------- the run
def measure(path: Path, folder: Path, tokens: list[int]) -> dict[str, Any]:
    """Measure in a process of its own, so that memory is counted above what it has before the model."""
    torch.randn(64, 64, dtype=torch.bfloat16) @ torch.randn(64, 64, dtype=torch.bfloat16)  # libraries' own memory
    idle = resident("VmRSS")
    with torch.no_grad():
        model = ltx2ref.stream(path)
        inputs = random_inputs(model.config, model.proj_in.weight.dtype, tokens)
        uncache(path)
        seconds, output = forward(model, inputs, "streaming a forward")
        peak = resident("VmHWM") - idle
        if not all(bool(x.isfinite().all()) for x in output):
            raise RuntimeError("the outputs are not finite: what was measured means nothing")
        traced, taps, calls = trace(model, inputs, output)
        traced_peak = resident("VmHWM") - idle
        save_trace(
            folder / "trace.safetensors",
            taps,
            implementation="ltx2ref",
            config=model.config.to_diffusers(),
            fingerprint=fingerprint(torch.device("cpu"), model.proj_in.weight.dtype),
        )
        progress("the matmuls and attention calls alone")
        start = time.perf_counter()
        replay(calls)
        matmuls = time.perf_counter() - start
    read, there = read_seconds(path), in_memory(model, inputs)
    return {
        "machine": fingerprint(torch.device("cpu"), model.proj_in.weight.dtype),
        "layers": model.config.num_layers,
        "video tokens": inputs["hidden_states"].shape[1],
        "file": path.stat().st_size,
        "seconds": seconds,
        "seconds, traced": traced,
        "seconds, reading the file": read,
        "seconds, matmuls": matmuls,
        "share of the limit": max(read, matmuls) / seconds,
        "peak": peak,
        "peak, traced": traced_peak,
        "has to be there": there,
        "peak over what has to be there": peak / sum(there.values()),
        "taps": len(taps),
        "trace": (folder / "trace.safetensors").stat().st_size,
    }


def random_inputs(config: TransformerConfig, dtype: torch.dtype, tokens: list[int]) -> dict[str, Any]:
    frames, height, width = tokens
    generator, sigma = torch.Generator().manual_seed(1), torch.tensor([700.0])
    shapes = {
        "hidden_states": (frames * height * width, config.in_channels),
        "audio_hidden_states": (AUDIO_FRAMES, config.audio_in_channels),
        "encoder_hidden_states": (TEXT_TOKENS, config.video.text_dim),
        "audio_encoder_hidden_states": (TEXT_TOKENS, config.audio.text_dim),
    }
    latents = {name: torch.randn(1, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return latents | {
        "timestep": sigma,
        "sigma": sigma,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": AUDIO_FRAMES,
    }


def forward(model: StreamedTransformer, inputs: dict[str, Any], title: str) -> tuple[float, tuple[Tensor, Tensor]]:
    progress(title)
    start = time.perf_counter()
    output = model(**inputs, return_dict=False)
    return time.perf_counter() - start, output


def trace(
    model: StreamedTransformer, inputs: dict[str, Any], expected: tuple[Tensor, Tensor]
) -> tuple[float, dict[str, Any], list[Call]]:
    """Return a forward's seconds, sketches of its taps, and its matmuls and attention calls, if its outputs agree.

    The calls share what memory there is for two blocks: replayed, they take what they took, whatever it holds.
    """
    recorder = CallRecorder()
    with ltx2ref.trace(model, keep=sketch) as taps, recorder:
        seconds, output = forward(model, inputs, "streaming it again, traced")
    if not all(torch.equal(a, b) for a, b in zip(output, expected, strict=True)):
        raise RuntimeError("the traced forward computed something else")
    return seconds, taps, recorder.calls


def in_memory(model: StreamedTransformer, inputs: dict[str, Any]) -> dict[str, int]:
    """Return the bytes that any streamed forward needs. The model is cut to one block, whose activations are all's."""
    size = model.proj_in.weight.element_size()
    outside = sum(x.numel() for name, x in model.named_parameters() if not name.startswith(BLOCKS_PREFIX))
    block = sum(x.numel() for x in model.transformer_blocks[0].parameters())
    del model.transformer_blocks[1:]
    with PeakMemory("cpu") as memory, torch.no_grad():
        forward(model, inputs, "one block again, for its activations")
    return {"outside the blocks": size * outside, "2 blocks": 2 * size * block, "activations": memory.peak_bytes}


def read_seconds(path: Path) -> float:
    """Return the seconds it takes to read the whole file from the disk, in pieces of 64 MiB."""
    progress("reading the file")
    uncache(path)
    buffer = memoryview(bytearray(2**26))
    with open(path, "rb", buffering=0) as file:
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return time.perf_counter() - start


def uncache(path: Path) -> None:
    """Drop a file from the system's cache, so that the next read comes from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(field: str) -> int:
    """Return the bytes that this process has resident (VmRSS), or had at most (VmHWM), mapped pages included."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024


def said(found: dict[str, Any]) -> str:
    def gigabytes(size: float) -> str:
        return f"{size / 1e9:.2f} GB"

    def share(reached: float) -> str:
        return f"{reached:.2f} of it reached" if reached <= 1.02 else "unknown, the machine was busy with other things"

    there = ", ".join(f"{name} {gigabytes(size)}" for name, size in found["has to be there"].items())
    return "\n".join(
        [
            f"{found['layers']} layers, {found['video tokens']} video tokens, file {gigabytes(found['file'])}, "
            f"torch {found['machine']['torch']}, {found['machine']['threads']} threads",
            f"peak resident memory   {gigabytes(found['peak'])} ({found['peak'] / 2**30:.2f} GiB), "
            f"{found['peak over what has to be there']:.3f} times what has to be there",
            f"                       ({there})",
            f"                       {gigabytes(found['peak, traced'])} with the traced forward",
            f"time                   {found['seconds']:.1f} s, traced {found['seconds, traced']:.1f} s",
            f"limit                  {share(found['share of the limit'])}: the file is read in "
            f"{found['seconds, reading the file']:.1f} s, the matmuls take {found['seconds, matmuls']:.1f} s",
            f"sketch trace           {found['taps']} taps, {found['trace'] / 1e6:.1f} MB",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
