"""One of two processes of tests/model/test_sharding.py: the recipes of docs/sharding.md, judged by rank 0.

python tests/support/sharded.py RANK FOLDER    both ranks at a time, an empty folder
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import Inputs, random_inputs, random_model, tiny_config
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ltx2ref import TransformerConfig
from ltx2ref.parity.audit import audit_natively
from ltx2ref.parity.report.rows import IDENTICAL
from ltx2ref.parity.run import run
from ltx2ref.rope import audio_positions, video_positions

DOC = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text(encoding="utf-8")
CODE = {source.removeprefix("# ").split()[0]: source for source in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)}
RECIPES = ("fsdp", "tensor_parallel", "sequence")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Releases and dtypes. Each release and each dtype is there: a release in another dtype goes through the same code.
FULL = os.environ.get("LTX2REF_CORPUS") == "full"
MODELS = [("2.0", "float32"), ("2.3", "bfloat16"), ("2.5", "float32")]
MODELS += [("2.0", "bfloat16"), ("2.3", "float32"), ("2.5", "bfloat16")] if FULL else []
# Bugs: replacements in a recipe, with which it must not pass for 2.5 in float32.
BUGS = {
    "the other's heads": ("tensor_parallel", "[rank] for angles in rope", "[1 - rank] for angles in rope"),
    "own keys only": ("sequence", "return x, all_tokens(kv, mesh), (own, known[name][1]), *rest", "return args"),
    "keys rotated as this process's": (
        "sequence",
        "tuple(all_tokens(angles, mesh) for angles in theirs)",
        "tuple(angles.repeat(1, 2, 1, 1) for angles in theirs)",
    ),
}
GRID, AUDIO_FRAMES = (3, 4, 5), 12


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {
        f"{recipe} {release} {dtype}": judged(CODE[f"{recipe}.py"], release, DTYPES[dtype], mesh)
        for recipe in RECIPES
        for release, dtype in MODELS
    }
    for bug, (recipe, right, wrong) in BUGS.items():
        source = CODE[f"{recipe}.py"]
        assert source.count(right) == 1
        found[bug] = judged(source.replace(right, wrong), "2.5", torch.float32, mesh)
    found |= {f"start.py with {recipe}": started(recipe, folder) for recipe in RECIPES}
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def judged(source: str, release: str, dtype: torch.dtype, mesh: DeviceMesh) -> dict[str, Any]:
    """Compare one model on one process and on two at every stage."""
    names: dict[str, Any] = {}
    exec(source, names)
    config = tiny_config(release)
    inputs = inputs_of(config, dtype)
    alone = run(random_model(config, dtype), inputs)
    sharded = names["shard"](random_model(config, dtype), mesh)
    taps = run(sharded, names.get("own_tokens", lambda inputs, mesh: inputs)(inputs, mesh))
    whole = {name: gathered(x, alone[name]) for name, x in taps.items() if name in alone}
    if mesh.get_local_rank() != 0:
        return {}
    report = audit_natively(random_model(config, dtype), inputs, whole)
    here = [x.to_local() if isinstance(x, DTensor) else x for x in sharded.transformer_blocks.parameters()]
    total = sum(x.numel() for x in random_model(config).transformer_blocks.parameters())
    return {
        "verdict": report.verdict,
        "sentence": report.sentence,
        "taps": len(report.rows),
        "budget": max((row.budget or 0.0 for row in report.rows if row.verdict != IDENTICAL), default=0.0),
        "kept": sum(x.numel() for x in here) / total,
    }


def started(recipe: str, folder: Path) -> dict[str, Any]:
    """Run start.py itself, with a file of this test's, and judge its outputs beside those of one process."""
    config = tiny_config("2.3")
    names: dict[str, Any] = {"inputs": inputs_of(config, torch.bfloat16)}
    source = CODE["start.py"].replace('"cuda"', '"cpu"').replace("ltx-2.3-22b-dev", str(folder / "model"))
    if recipe == "sequence":
        source = source[: source.index("with torch")] + CODE["with"]
    exec(CODE[f"{recipe}.py"] + source, names)
    outputs = {"sample": names["video"], "audio_sample": names["audio"]}
    rows = audit_natively(random_model(config, torch.bfloat16), names["inputs"], outputs).rows
    return {row.name: row.verdict for row in rows if row.name in outputs}


def inputs_of(config: TransformerConfig, dtype: torch.dtype) -> Inputs:
    """Return per-token timesteps, masked text, and coordinates in place of counts, for one batch element."""
    inputs = random_inputs(
        config, dtype, batch=1, grid=GRID, audio_frames=AUDIO_FRAMES, per_token=True, text_masks=torch.int64
    )
    counts = {"num_frames", "height", "width", "audio_num_frames"}
    return {name: x for name, x in inputs.items() if name not in counts} | {
        "video_coords": video_positions(GRID, inputs["fps"], config),
        "audio_coords": audio_positions(AUDIO_FRAMES, config),
    }


def gathered(x: Tensor, like: Tensor) -> Tensor:
    """Join the parts of both processes along the dimension in which each has one."""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    parts = [i for i, (here, there) in enumerate(zip(x.shape, like.shape, strict=True)) if here != there]
    if not parts:
        return x
    both = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2)]
    dist.all_gather(both, x.contiguous())
    return torch.cat(both, parts[0])


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
