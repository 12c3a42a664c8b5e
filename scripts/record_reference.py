"""Record what pinned diffusers computes for the conformance cases, on the CPU, into the package.

    python scripts/record_reference.py                  all cases
    python scripts/record_reference.py --case '2.3/*'   some of them

Nothing in a recording comes from this project's model but the norms of the float64 truth.
"""
import argparse
import json
import platform
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import diffusers  # type: ignore[import-untyped, unused-ignore]
import torch
from einops import rearrange
from oracles import build_diffusers, run_diffusers
from torch import Tensor, nn

from ltx2ref.parity import generator, record
from ltx2ref.parity.cases import CASES, SEED, Case, Inputs
from ltx2ref.parity.probe import probe
from ltx2ref.parity.taps import Taps, hooks, put_pair, record_embeddings
from ltx2ref.parity.verify import cast, norm, truth

THREADS = 1  # the most reproducible number, and for tensors this small the fastest


def rope_taps(model: Any, taps: Taps, on: Callable[[Any], None]) -> None:
    heads = model.config.num_attention_heads

    def planes(x: Tensor) -> Tensor:
        """To (B, T, H, R): diffusers' split layout is (B, H, T, R), its interleaved one (B, T, 2HR) in pairs."""
        if x.ndim == 4:
            return rearrange(x, "b h t r -> b t h r")
        return rearrange(x, "b t (h r two) -> two b t h r", h=heads, two=2)[0]

    for name in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope"):
        on(getattr(model, name).register_forward_hook(lambda _, args, out, name=name: put_pair(
            taps, (f"{name}.cos", f"{name}.sin"), (planes(out[0]), planes(out[1])))))


def run(model: Any, inputs: Inputs) -> Taps:
    taps: Taps = {}
    with torch.no_grad(), hooks() as on:
        rope_taps(model, taps, on)
        record_embeddings(model, taps, on)
        for i, block in enumerate(model.transformer_blocks):
            names = (f"transformer_blocks.{i}.video", f"transformer_blocks.{i}.audio")
            on(block.register_forward_hook(lambda _, args, out, names=names: put_pair(taps, names, out)))
        put_pair(taps, ("sample", "audio_sample"), run_diffusers(model, inputs))
    return taps


def oracle(case: Case, dtype: str) -> tuple[nn.Module, Inputs]:
    """diffusers' model with the generated weights, and the case's inputs."""
    config = case.config.to_diffusers()
    with torch.device("meta"):
        empty: Any = diffusers.LTX2VideoTransformer3DModel(**config)
    shapes = {name: tuple(x.shape) for name, x in empty.state_dict().items()}
    model = build_diffusers(config, generator.weights(shapes, SEED), record.DTYPES[dtype])
    return model, cast(case.inputs(), record.DTYPES[dtype])


def record_case(case: Case, dtype: str) -> None:
    model, inputs = oracle(case, dtype)
    taps, again = run(model, inputs), run(model, inputs)
    if any(not torch.equal(taps[name], again[name]) for name in taps):
        sys.exit(f"{case.id} {dtype}: diffusers does not repeat itself")
    norms = {name: norm(x) for name, x in truth(case, record.DTYPES[dtype], taps).items()}
    record.save(case, dtype, taps, inputs, norms, SEED)


def environment() -> dict[str, object]:
    return {
        "implementation": "diffusers.LTX2VideoTransformer3DModel", "diffusers": diffusers.__version__,
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
    chosen = [(case, dtype) for case in CASES for dtype in record.DTYPES if fnmatch(case.id, pattern)]
    for i, (case, dtype) in enumerate(chosen):
        print(f"\r{i + 1}/{len(chosen)} {case.id} {dtype}\033[K", end="", file=sys.stderr)
        record_case(case, dtype)
    size = sum(file.stat().st_size for file in record.DIRECTORY.iterdir())
    print(f"\n{len(chosen)} recordings; {size / 1e6:.2f} MB in {record.DIRECTORY.name}/", file=sys.stderr)


if __name__ == "__main__":
    main()
