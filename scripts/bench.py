"""Measure time and peak memory of one forward: ltx2ref beside diffusers, ltx-core and the floor, at real widths.

All run in one process on the same weights and inputs. They take turns, in another order each round, so that a busy or
throttling machine disturbs them alike. The floor is what no rewrite in PyTorch can avoid: the `F.linear` and
`F.scaled_dot_product_attention` calls of ltx2ref's own forward, replayed alone on tensors that already exist. On a CPU
the table also has the time of an eager forward over that of the same calls within it. Both come from one run, so this
ratio is much more precise where the speed of the machine varies from run to run.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from typing import Any

import torch
from floor import OwnCalls, PeakMemory, Run, flops, keep_freed_memory, recorded_calls, replay, timed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ltx2ref import LTX_2_0, LTX_2_3, LTX2VideoTransformer3DModel, TransformerConfig

RELEASES = {"2.0": LTX_2_0, "2.3": LTX_2_3}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMESTEPS = ("per-batch", "per-token")
EAGER, COMPILED = "eager", "compiled"
OURS, FLOOR = "ltx2ref", "floor"
OTHERS = ("diffusers", "ltx-core")

FPS = 24.0
TEXT_TOKENS = 128
TABLE_WIDTH = 130  # at least, also where the output is not a terminal
VIDEO_FRAMES_PER_LATENT = 8
AUDIO_LATENTS_PER_SECOND = 25
# What is measured if nothing else is asked for. Video latents FxHxW: 4096, 14,080 and 30,464 tokens on a GPU.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"layers": 2, "dtype": list(DTYPES), "tokens": [(16, 4, 8)], "mode": [EAGER], "repeats": 3},
    "cuda": {
        "layers": 8,
        "dtype": ["bfloat16"],
        "tokens": [(16, 16, 16), (16, 22, 40), (16, 34, 56)],
        "mode": [EAGER, COMPILED],
        "repeats": 10,
    },
}
# Dense bfloat16 TFLOP/s as NVIDIA states them, by the name that the driver gives.
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4, "NVIDIA A100-SXM4-80GB": 312.0}
# Relative, and far above the rounding of bfloat16: beyond it another one does another computation.
MAX_DIFFERENCE = 5e-2
NOTED = 0.005  # share of the time from which an operator is listed

EXAMPLES = """examples:
  python scripts/bench.py                                     2 layers of 2.3 on the CPU, both dtypes
  python scripts/bench.py --dtype float32 --repeats 9         less noise
  python scripts/bench.py --operators                         where the time goes, by operator
  python scripts/bench.py --release 2.0 --layers 1 --tokens 8x4x6 --json > bench.json
  python scripts/bench.py --device cuda                       bfloat16, eager and compiled, 8 layers, 4k to 30k tokens
  python scripts/bench.py --device cuda --tokens 16x16x24 --mode compiled --peak-tflops 165

The default takes about 3 minutes for float32 on 2 cores, and 4 times that for bfloat16 where the CPU only
emulates it.
"""

State = dict[str, Tensor]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Hold what was measured for one dtype, size, shape of the timesteps, and mode."""

    dtype: str
    tokens: str
    timesteps: str
    mode: str
    seconds: dict[str, list[float]]  # name -> one time per round, in the same order for each name
    own_calls: dict[str, list[float]]  # the part of it in matmuls and attention calls; of eager models on a CPU
    peak_bytes: dict[str, int]
    difference: dict[str, float]  # between outputs, relative to ltx2ref's
    floor_calls: int
    flops: int  # in the floor's calls, that is, in matmuls and attention
    peak_flops: float | None  # what the device can do in a second, if known
    operators: dict[str, dict[str, float]]  # name -> operator -> seconds of its own, if they were asked for

    def time_ratio(self, name: str) -> tuple[float, float]:
        """Return ltx2ref's time over another's: the median over rounds, and the noise of the rounds' ratios."""
        pairs = zip(self.seconds[OURS], self.seconds[name], strict=True)
        return centre([ours / other for ours, other in pairs])

    def fastest_ratio(self, name: str) -> float:
        """Return ltx2ref's fastest run over another's, which other work on the machine disturbs least."""
        return min(self.seconds[OURS]) / min(self.seconds[name])

    def over_own_calls(self, name: str) -> tuple[float, float]:
        """Return the time of a forward over that of its own matmuls and attention: the median, and the noise."""
        pairs = zip(self.seconds[name], self.own_calls[name], strict=True)
        return centre([whole / part for whole, part in pairs])

    def utilisation(self, name: str) -> float | None:
        """Return the utilisation at the median time, by the FLOPs of ltx2ref's matmuls and attention."""
        return self.flops / statistics.median(self.seconds[name]) / self.peak_flops if self.peak_flops else None

    def peak_ratio(self, name: str) -> float:
        return self.peak_bytes[OURS] / self.peak_bytes[name]


# ---------------------------------------------------------------- command
def main() -> None:
    args = parse_arguments()
    config = replace(RELEASES[args.release], num_layers=args.layers)
    kept = not args.return_memory and args.device == "cpu" and keep_freed_memory()
    with torch.no_grad():
        results = [result for dtype in args.dtype for result in measure(config, dtype, args)]
    facts = environment(args, kept)
    if args.json:
        print(json.dumps({"environment": facts, "results": [asdict(r) for r in results]}, indent=1))
    else:
        report(results, facts)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=positive, help="transformer blocks (default: 2, on a GPU 8)")
    add("--release", choices=RELEASES, default="2.3", help="which config (default: 2.3)")
    add("--dtype", choices=DTYPES, nargs="+", help="one or more (default: both, on a GPU bfloat16)")
    add(
        "--tokens",
        type=latent_size,
        nargs="+",
        metavar="FxHxW",
        help="video latents (default: 16x4x8, on a GPU 16x16x16 16x22x40 16x34x56)",
    )
    add(
        "--mode",
        choices=(EAGER, COMPILED),
        nargs="+",
        help="one or more; compiled: each block by torch.compile (default: eager, on a GPU both)",
    )
    add("--batch", type=positive, default=1, help="batch size (default: 1)")
    add("--repeats", type=positive, help="rounds, one run of each in each (default: 3, on a GPU 10)")
    add("--peak-tflops", type=float, help="of the device, for the utilisation (default: known GPUs', in bfloat16)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add(
        "--return-memory",
        action="store_true",
        help="CPU: let the C library give freed memory back to the system, its "
        "default, so that large tensors are paged in each time (default: it keeps it, if it is glibc)",
    )
    add("--operators", action="store_true", help="profile one run of each, and print the time of each operator, too")
    add("--json", action="store_true", help="print every measured number as JSON instead of the tables")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "bench.py: no GPU that this torch can use\n")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def latent_size(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(f"expected frames x height x width, as in 16x4x8, got {text!r}")
    frames, height, width = (positive(part) for part in parts)
    return frames, height, width


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- measuring
def measure(config: TransformerConfig, dtype: str, args: argparse.Namespace) -> Iterator[Result]:
    """Measure all sizes, both shapes of timesteps and all modes, on the same weights."""
    progress(f"{dtype}: random weights")
    state = random_state(config, DTYPES[dtype], args.device)
    forwards = {mode: build_forwards(config, state, DTYPES[dtype], mode) for mode in {EAGER, *args.mode}}
    for tokens, timesteps, mode in product(args.tokens, TIMESTEPS, args.mode):
        label = f"{dtype}, {'x'.join(map(str, tokens))}, {timesteps}, {mode}"
        inputs = random_inputs(config, DTYPES[dtype], timesteps, tokens, args)
        runs: dict[str, Run] = {name: bind(forward, inputs) for name, forward in forwards[mode].items()}
        progress(f"{label}: outputs and peak memory")
        if mode == COMPILED:
            torch.compiler.reset()  # each size has graphs of its own, and no run has another one's limits
            for run in runs.values():
                run()
        outputs, peak = outputs_and_peaks(runs, args.device)  # warms each up, too
        calls = recorded_calls(bind(forwards[EAGER][OURS], inputs))
        runs[FLOOR] = bind(replay, calls)
        seconds, own_calls = time_in_turns(runs, args.repeats, args.device, mode, label)
        yield Result(
            dtype,
            "x".join(map(str, tokens)),
            timesteps,
            mode,
            seconds,
            own_calls,
            peak,
            differences(outputs),
            len(calls),
            sum(map(flops, calls)),
            peak_flops(dtype, args),
            {name: operators(run, args.device) for name, run in runs.items() if args.operators},
        )


def peak_flops(dtype: str, args: argparse.Namespace) -> float | None:
    if args.peak_tflops is None and args.device == "cuda" and dtype == "bfloat16":
        tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name())
    else:
        tflops = args.peak_tflops
    return tflops and tflops * 1e12


def build_forwards(config: TransformerConfig, state: State, dtype: torch.dtype, mode: str) -> dict[str, Any]:
    """Return for each name a function of the inputs; the models share the tensors of `state`."""
    from ltx2ref.parity.oracles.diffusers import build_diffusers, run_diffusers
    from ltx2ref.parity.oracles.ltx_core import build_ltx_core, run_ltx_core

    with torch.device("meta"):
        ours = LTX2VideoTransformer3DModel(config)
    ours.load_state_dict(state, assign=True)
    ours.requires_grad_(False).eval()
    diffusers = build_diffusers(config.to_diffusers(), state, dtype)
    ltx_core = build_ltx_core(config.to_diffusers(), state, dtype)
    for blocks in (ours.transformer_blocks, diffusers.transformer_blocks, ltx_core.model.transformer_blocks):
        for block in blocks if mode == COMPILED else ():  # type: ignore[union-attr]
            block.compile(dynamic=False)
    return {
        OURS: lambda inputs: ours(**inputs, return_dict=False),
        "diffusers": lambda inputs: run_diffusers(diffusers, inputs),
        "ltx-core": lambda inputs: run_ltx_core(ltx_core, inputs),
    }


def bind(function: Callable[[Any], object], argument: object) -> Run:
    return lambda: function(argument)


def outputs_and_peaks(runs: Mapping[str, Run], device: str) -> tuple[dict[str, Any], dict[str, int]]:
    outputs, peaks = {}, {}
    for name, run in runs.items():
        with PeakMemory(device) as memory:
            outputs[name] = run()
        peaks[name] = memory.peak_bytes
    return outputs, peaks


def differences(outputs: Mapping[str, Any]) -> dict[str, float]:
    """Return the relative difference of the others' outputs from ltx2ref's.

    Raises `RuntimeError` if it is large: a benchmark of another computation says nothing.
    """
    result = {}
    for name in OTHERS:
        pairs = zip(outputs[OURS], outputs[name], strict=True)
        result[name] = max(float((a - b).float().norm() / a.float().norm()) for a, b in pairs)
        if not result[name] <= MAX_DIFFERENCE:
            raise RuntimeError(f"{name} differs from {OURS} by {result[name]:.1e} > {MAX_DIFFERENCE}")
    return result


def time_in_turns(
    runs: Mapping[str, Run], repeats: int, device: str, mode: str, label: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return `repeats` times of each, and of its own calls; every round starts with the next one of them."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    own_calls: dict[str, list[float]] = {}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name != FLOOR and (device, mode) == ("cpu", EAGER):
                with OwnCalls() as own:
                    seconds[name].append(timed(runs[name], device))
                own_calls.setdefault(name, []).append(own.seconds)
            else:
                seconds[name].append(timed(runs[name], device))
        last = "  ".join(f"{name} {times[-1]:.3g} s" for name, times in seconds.items())
        progress(f"{label}: round {turn + 1} of {repeats}: {last}")
    return seconds, own_calls


def operators(run: Run, device: str) -> dict[str, float]:
    """Return the seconds that each operator takes itself, in one run."""
    progress("profiling")
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")) as found:
        run()
    field = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    return {event.key.removeprefix("aten::"): getattr(event, field) / 1e6 for event in found.key_averages()}


# ---------------------------------------------------------------- weights and inputs
def random_state(config: TransformerConfig, dtype: torch.dtype, device: str) -> State:
    """Return random parameters under the model's names, at scales that keep activations near 1."""
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LTX2VideoTransformer3DModel(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(0)

    def draw(name: str, shape: torch.Size) -> Tensor:
        noise = torch.randn(shape, generator=generator, device=device)
        if ".norm_" in name:
            return 1 + 0.1 * noise
        return noise * (0.1 if "table" in name or noise.ndim == 1 else shape[-1] ** -0.5)

    return {name: draw(name, shape).to(dtype) for name, shape in shapes.items()}


def random_inputs(
    config: TransformerConfig,
    dtype: torch.dtype,
    timesteps: str,
    tokens: tuple[int, int, int],
    args: argparse.Namespace,
) -> Inputs:
    """Return the arguments of the documented forward: text-to-video (per-batch) or image-to-video (per-token)."""
    frames, height, width = tokens
    audio_frames = round(((frames - 1) * VIDEO_FRAMES_PER_LATENT + 1) / FPS * AUDIO_LATENTS_PER_SECOND)
    shapes = latent_and_text_shapes(config, frames * height * width, audio_frames)
    generator = torch.Generator(args.device).manual_seed(1)

    def noise(shape: tuple[int, int]) -> Tensor:
        return torch.randn(args.batch, *shape, generator=generator, device=args.device).to(dtype)

    mask = torch.ones(args.batch, TEXT_TOKENS, dtype=torch.long, device=args.device)
    sizes = {"num_frames": frames, "height": height, "width": width, "audio_num_frames": audio_frames}
    return {
        **{name: noise(shape) for name, shape in shapes.items()},
        **{"encoder_attention_mask": mask, "audio_encoder_attention_mask": mask},
        **sizes | {"fps": FPS, "use_cross_timestep": True},
        **noise_levels(timesteps, tokens, args),
    }


def latent_and_text_shapes(config: TransformerConfig, video: int, audio: int) -> dict[str, tuple[int, int]]:
    """Return (tokens, channels) of both latents and both texts; 2.0 takes one text width and projects it itself."""
    sizes = config.to_diffusers()
    widths = sizes["cross_attention_dim"], sizes["audio_cross_attention_dim"]
    if sizes["use_prompt_embeddings"]:
        widths = sizes["caption_channels"], sizes["caption_channels"]
    return {
        "hidden_states": (video, sizes["in_channels"]),
        "audio_hidden_states": (audio, sizes["audio_in_channels"]),
        "encoder_hidden_states": (TEXT_TOKENS, widths[0]),
        "audio_encoder_hidden_states": (TEXT_TOKENS, widths[1]),
    }


def noise_levels(timesteps: str, tokens: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Tensor]:
    """Return timesteps and sigmas; per-token timesteps are zero in the first latent frame, the given image."""
    frames, height, width = tokens
    sigma = torch.linspace(700.0, 500.0, args.batch, device=args.device)
    levels = {"timestep": sigma, "audio_timestep": sigma, "sigma": sigma, "audio_sigma": sigma}
    if timesteps == "per-token":
        levels["timestep"] = sigma[:, None].repeat(1, frames * height * width)
        levels["timestep"][:, : height * width] = 0
    return levels


# ---------------------------------------------------------------- report
def centre(values: list[float]) -> tuple[float, float]:
    """Return the median, and the noise: the interquartile range over the median."""
    middle = statistics.median(values)
    low, _, high = statistics.quantiles(values * 2 if len(values) == 1 else values, n=4, method="inclusive")
    return middle, (high - low) / middle


def environment(args: argparse.Namespace, kept: bool) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", *OTHERS)}
    cpu = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    options = {name: getattr(args, name) for name in ("release", "layers", "batch", "repeats")}
    memory = {"freed memory": "kept" if kept else "returned"} if args.device == "cpu" else {}
    return {"device": device, "threads": torch.get_num_threads(), **packages, **options, **memory}


def report(results: list[Result], facts: Mapping[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    memory = (column for name in OTHERS for column in (name, "ratio"))
    for title, columns, cells in (
        ("Forward: median seconds ± interquartile range", (OURS, *OTHERS, FLOOR), times),
        (f"Time: {OURS} over the other, median of the rounds' ratios ± interquartile range (fastest runs)",
         (*OTHERS, FLOOR, "its calls"), ratios),
        ("Time of an eager forward on a CPU over that of its own matmuls and attention, in the same run",
         (OURS, *OTHERS), own_ratios),
        (f"Peak activation memory: MiB, and {OURS}'s over the other's", (OURS, *memory), peaks),
        ("Model FLOPs utilisation, and TFLOP of a forward", (OURS, *OTHERS, FLOOR, "TFLOP"), utilisations),
        (f"Outputs: relative difference from {OURS}'s", OTHERS, distances),
    ):  # fmt: skip
        rows = [(result.dtype, result.tokens, result.timesteps, result.mode, *cells(result)) for result in results]
        print_table(title, ("dtype", "tokens", "timesteps", "mode", *columns), rows)
    for result in results if any(result.operators for result in results) else ():
        print_table(
            f"Operators that take {NOTED:.1%} or more, seconds of their own: {result.dtype}, {result.tokens}, "
            f"{result.timesteps}, {result.mode}",
            ("operator", *result.operators),
            by_operator(result),
        )


def by_operator(result: Result) -> list[tuple[str, ...]]:
    ours, *others = result.operators.values()
    least = NOTED * sum(ours.values())
    names = sorted(
        {name for found in (ours, *others) for name, seconds in found.items() if seconds >= least},
        key=lambda name: -ours.get(name, 0.0),
    )
    return [(name, *(f"{found.get(name, 0.0):.4f}" for found in result.operators.values())) for name in names]


def times(result: Result) -> Iterator[str]:
    for name in (OURS, *OTHERS, FLOOR):
        middle, noise = centre(result.seconds[name])
        yield f"{middle:.4f} ± {noise:.1%}"


def ratios(result: Result) -> Iterator[str]:
    for name in (*OTHERS, FLOOR):
        middle, noise = result.time_ratio(name)
        yield f"{middle:.3f} ± {noise:.1%} ({result.fastest_ratio(name):.3f})"
    yield str(result.floor_calls)


def own_ratios(result: Result) -> Iterator[str]:
    for name in (OURS, *OTHERS):
        if name not in result.own_calls:
            yield "not measured"
            continue
        middle, noise = result.over_own_calls(name)
        yield f"{middle:.4f} ± {noise:.1%}"


def peaks(result: Result) -> Iterator[str]:
    yield mebibytes(result, OURS)
    for name in OTHERS:
        yield from (mebibytes(result, name), f"{result.peak_ratio(name):.3f}")


def utilisations(result: Result) -> Iterator[str]:
    for name in (OURS, *OTHERS, FLOOR):
        share = result.utilisation(name)
        yield "peak unknown" if share is None else f"{share:.1%}"
    yield f"{result.flops / 1e12:.4g}"


def distances(result: Result) -> Iterator[str]:
    yield from (f"{result.difference[name]:.1e}" for name in OTHERS)


def mebibytes(result: Result, name: str) -> str:
    return f"{result.peak_bytes[name] / 2**20:.1f}"


def print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [header, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        print("", title, *("  ".join(map(str.ljust, line, widths)) for line in lines), sep="\n")
        return
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=max(Console().width, TABLE_WIDTH)).print(table)


if __name__ == "__main__":
    main()
