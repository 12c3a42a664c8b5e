"""Measure what a trace costs: its time beside an untraced forward, and the size of a sketch trace of all 48 layers.

The model has real widths, few tokens and random weights. All blocks share the tensors of one, which alone are far
larger than any cache: 48 layers fit in memory, and still read their weights as they would. Each block is a module of
its own, because hooks on one block that stands 48 times in a list would fire 48 times in each of its runs, under all 48
names.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx2ref import LTX_2_0, LTX_2_3, LTX_2_5, LTX2VideoTransformer3DModel, TransformerConfig, compare, trace
from ltx2ref.parity.audit import fingerprint
from ltx2ref.parity.trace.sketch import Sketch, sketch
from ltx2ref.parity.trace.tracefile import load_trace, save_trace

RELEASES = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNTRACED, FULL, SKETCH = "untraced", "full trace", "sketch trace"
KEEP: dict[str, Callable[[Tensor], Any]] = {FULL: torch.clone, SKETCH: sketch}
FPS, TEXT_TOKENS, VIDEO_FRAMES_PER_LATENT, AUDIO_LATENTS_PER_SECOND = 24.0, 32, 8, 25

EXAMPLES = """examples:
  python scripts/bench_trace.py                                   6 layers of 2.3 in float32, then the file of 48
  python scripts/bench_trace.py --dtype bfloat16 --rounds 3       slow where the CPU emulates it
  python scripts/bench_trace.py --threads 1                       on a busy machine: see the processor time
  python scripts/bench_trace.py --tokens 8x8x8 --layers 2 --file-layers 0        more tokens, no file
  python scripts/bench_trace.py --rounds 0 --json                 the file alone

Takes 5 GB of memory in float32, half of that in bfloat16, and the taps of the full trace.
"""

Inputs = dict[str, Any]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    found: dict[str, Any] = {
        "machine": fingerprint(torch.device(args.device), DTYPES[args.dtype]),
        "options": vars(args),
    }
    with torch.no_grad():
        state = one_block(RELEASES[args.release], DTYPES[args.dtype], args.device)
        if args.rounds:
            found["overhead"] = overhead(state, args)
        if args.file_layers:
            found["file"] = sketch_file(state, args)
    print(json.dumps(found, indent=1) if args.json else said(found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--release", choices=RELEASES, default="2.3", help="which config (default: 2.3)")
    add("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    add("--tokens", type=latent_size, default="2x4x4", help="video latent FxHxW (default: %(default)s)")
    add("--layers", type=int, default=6, help="transformer blocks whose tracing is timed (default: 6)")
    add("--rounds", type=int, default=5, help="one run of each in each; 0: no timing (default: 5)")
    add("--file-layers", type=int, default=48, help="blocks of the sketch trace; 0: no file (default: 48)")
    add("--threads", type=int, help="(default: torch's)")
    add("--device", default="cpu", help="(default: cpu)")
    add("--json", action="store_true", help="print every number as JSON")
    return parser.parse_args()


def latent_size(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"expected frames x height x width, as in 2x4x4, got {text!r}")
    return tuple(map(int, parts))


# ---------------------------------------------------------------- time
def overhead(state: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each, and the ratios of the rounds; every round starts with another one."""
    model, inputs = build(state, args.layers, args), random_inputs(args)
    names = [UNTRACED, *KEEP]
    plain = forward(model, inputs)
    held = {name: taps_of(model, inputs, name, plain) for name in KEEP}  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(args.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            wall, used = timed(model, inputs, name, args.device)
            seconds[name].append(wall)
            cpu[name].append(used)
        progress(f"round {turn + 1}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()))
    taps, elements, size = held[FULL]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "taps": taps,
        "elements": elements,
        "full_bytes": size,
        "ratios": {name: ratios(seconds[name], seconds[UNTRACED]) for name in KEEP},
        "cpu_ratios": {name: ratios(cpu[name], cpu[UNTRACED]) for name in KEEP},
    }


def taps_of(model: Any, inputs: Inputs, name: str, plain: tuple[Tensor, Tensor]) -> tuple[int, int, int]:
    """Return the number of taps, elements and bytes. Raise `RuntimeError` if tracing changes the outputs."""
    with trace(model, keep=KEEP[name]) as taps:
        traced = forward(model, inputs)
    if not all(map(torch.equal, plain, traced)):
        raise RuntimeError(f"{name}: other outputs than without it")
    elements = {name: torch.Size(x.shape).numel() for name, x in taps.items()}
    return len(taps), sum(elements.values()), sum(n * taps[name].dtype.itemsize for name, n in elements.items())


def timed(model: Any, inputs: Inputs, name: str, device: str) -> tuple[float, float]:
    """Return the elapsed seconds and the processor's, which tell more with `--threads 1` on a busy machine."""
    synchronize(device)
    start, used = time.perf_counter(), time.process_time()
    if name == UNTRACED:
        forward(model, inputs)
    else:
        with trace(model, keep=KEEP[name]):
            forward(model, inputs)
    synchronize(device)
    return time.perf_counter() - start, time.process_time() - used


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def ratios(these: list[float], those: list[float]) -> dict[str, float]:
    """Return the median of the rounds' ratios, their range, and the ratio of the fastest runs."""
    each = [a / b for a, b in zip(these, those, strict=True)]
    return {
        "median": statistics.median(each),
        "least": min(each),
        "most": max(each),
        "fastest": min(these) / min(those),
    }


# ---------------------------------------------------------------- the file
def sketch_file(state: dict[str, Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Write three traces of a model: as it is, again, and with the feed-forward of its middle block counted twice."""
    model, inputs, middle = build(state, args.file_layers, args), random_inputs(args), args.file_layers // 2
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.safetensors" for name in ("reference", "again", "bug")]
        for path in paths:
            progress(f"sketch trace of {args.file_layers} layers: {path.stem}")
            with twice(model.transformer_blocks[middle].ff if path.stem == "bug" else None):
                save(path, model, inputs, args)
        reference, again, bug = (load_trace(path).taps for path in paths)
        start = time.perf_counter()
        report = compare(reference, bug)
        return {
            "layers": args.file_layers,
            "taps": len(reference),
            "sizes": [path.stat().st_size for path in paths],
            "all_sketches": all(isinstance(x, Sketch) for x in reference.values()),
            "distinct_blocks": len(
                {x.checksum for name, x in reference.items() if name.endswith(".video") and isinstance(x, Sketch)}
            ),
            "again": compare(reference, again).sentence,
            "bug": report.sentence,
            "bug_at": f"block {middle}, ff",
            "compare_seconds": time.perf_counter() - start,
        }


@contextmanager
def twice(layer: Any) -> Iterator[None]:
    """Double what the last Linear of a feed-forward returns, as long as the context lasts."""
    hook = layer.net["2"].register_forward_hook(lambda _, args, out: 2 * out) if layer is not None else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def save(path: Path, model: Any, inputs: Inputs, args: argparse.Namespace) -> None:
    with trace(model, keep=sketch) as taps:
        forward(model, inputs)
    save_trace(
        path,
        taps,
        implementation="ltx2ref",
        config=model.config.to_diffusers(),
        fingerprint=fingerprint(torch.device(args.device), DTYPES[args.dtype]),
    )


# ---------------------------------------------------------------- model and inputs
def one_block(config: TransformerConfig, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return random parameters of a model of one block, at scales that keep activations near 1."""
    with torch.device("meta"):
        shapes = {
            name: x.shape for name, x in LTX2VideoTransformer3DModel(replace(config, num_layers=1)).state_dict().items()
        }
    generator = torch.Generator(device).manual_seed(0)

    def draw(name: str, shape: torch.Size) -> Tensor:
        mean = 1.0 if ".norm_" in name else 0.0
        scale = 0.1 if "table" in name or len(shape) == 1 else shape[-1] ** -0.5
        return torch.empty(shape, dtype=dtype, device=device).normal_(mean, scale, generator=generator)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def build(state: dict[str, Tensor], layers: int, args: argparse.Namespace) -> LTX2VideoTransformer3DModel:
    """Return a model of `layers` blocks, which all share the tensors of the one in `state`."""
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(replace(RELEASES[args.release], num_layers=layers))
    first = "transformer_blocks.0."
    shared = {
        name: state[f"{first}{name.split('.', 2)[2]}" if name.startswith("transformer_blocks.") else name]
        for name in model.state_dict()
    }
    model.load_state_dict(shared, assign=True)
    return model.requires_grad_(False).eval()


def random_inputs(args: argparse.Namespace) -> Inputs:
    """Return the inputs of a text-to-video call."""
    config, (frames, height, width) = RELEASES[args.release], args.tokens
    audio_frames = round(((frames - 1) * VIDEO_FRAMES_PER_LATENT + 1) / FPS * AUDIO_LATENTS_PER_SECOND)
    generator = torch.Generator(args.device).manual_seed(1)

    def noise(tokens: int, channels: int) -> Tensor:
        return torch.randn(1, tokens, channels, generator=generator, device=args.device).to(DTYPES[args.dtype])

    sigma = torch.tensor([700.0], device=args.device)
    return {
        "hidden_states": noise(frames * height * width, config.video.in_channels),
        "audio_hidden_states": noise(audio_frames, config.audio.in_channels),
        "encoder_hidden_states": noise(TEXT_TOKENS, config.video.text_dim),
        "audio_encoder_hidden_states": noise(TEXT_TOKENS, config.audio.text_dim),
        "timestep": sigma,
        "audio_timestep": sigma,
        "sigma": sigma,
        "audio_sigma": sigma,
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": audio_frames,
        "fps": FPS,
    }


def forward(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    video, audio = model(**inputs, return_dict=False)
    return video, audio


# ---------------------------------------------------------------- report
def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def said(found: dict[str, Any]) -> str:
    lines = [", ".join(f"{key} {value}" for key, value in (found["options"] | found["machine"]).items())]
    if "overhead" in found:
        x = found["overhead"]
        lines.append(
            f"untraced forward: {statistics.median(x['seconds'][UNTRACED]):.2f} s; {x['taps']} taps of "
            f"{x['elements']:,} elements, {x['full_bytes'] / 1e6:.0f} MB as tensors"
        )
        lines += [
            f"{name}: {r['median']:.3f} times the untraced forward ({r['least']:.3f} to {r['most']:.3f}; "
            f"fastest runs {r['fastest']:.3f}); of processor time {x['cpu_ratios'][name]['median']:.3f}"
            for name, r in x["ratios"].items()
        ]
    if "file" in found:
        x = found["file"]
        lines += [
            f"sketch trace of {x['layers']} layers: {x['taps']} taps, {max(x['sizes']) / 1e6:.2f} MB; "
            f"{x['distinct_blocks']} different video streams",
            f"the same run again: {x['again']}",
            f"feed-forward doubled in {x['bug_at']}: {x['bug']} ({x['compare_seconds']:.1f} s)",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
