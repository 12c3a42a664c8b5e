"""Load damaged checkpoints, those of tests/support/corpus.py, with each published loader, and count what happens.

Every loader has a process of its own, with limits of time and memory. It is asked only about layouts that it loads
right while they are undamaged; the table says which these are. diffusers reads folders with `from_pretrained` and
single files with `from_single_file`. The latter does not read the file's own config, so it gets the right config from a
folder beside the file, and damage to nothing but the config inside a single file does not count for it. ltx-core reads
single files with its `SingleGPUModelBuilder`, and float8 ones with its own fp8 operations.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from corpus import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
    BASES,
    CONFIG_KINDS,
    CRASHED,
    EXECUTED,
    FOLDERS,
    FP8,
    HUNG,
    INTACT,
    KINDS,
    MEMORY,
    REJECTED,
    RIGHT,
    SAME,
    SINGLE,
    WRONG,
    Guarded,
    Mutation,
    Report,
    mutation,
    names_of,
)

LOADERS = ("ltx2ref", "diffusers", "ltx-core")
REFUSED, DIED = "refused", "died"
COLUMNS = {
    REJECTED: "raised an error for what it must or may reject",
    RIGHT: "loaded exactly the weights that the files say",
    INTACT: "loaded the original weights from files that must be rejected",
    WRONG: "loaded other weights, or left some uninitialised, and returned a model",
    REFUSED: "raised an error for a good checkpoint",
    DIED: "crashed, hung (30 s), took 1.5 GB, or executed code in the file",
}
EXAMPLES = """examples:
  python scripts/compare_loaders.py                                500 mutations through all three, ~5 minutes
  python scripts/compare_loaders.py --count 5000 --loader ltx2ref
  python scripts/compare_loaders.py --count 5000 --json > loaders.json
"""
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Result:
    """Hold one loader's outcomes."""

    loader: str
    good: list[str]  # layouts that it loads right while they are good
    bad: dict[str, str]  # the others, and what happens
    counts: dict[str, Counter[str]]  # kind: outcome: how many
    cases: list[dict[str, Any]]  # everything but rejections and right loads
    skipped: int
    slow: int  # more than 2 s
    large: int  # more than 200 MB


# ---------------------------------------------------------------- command
def main() -> None:
    args = parse_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = [compare(loader, args.count, args.seed) for loader in args.loader]
    if args.json:
        print(
            json.dumps(
                {
                    "versions": versions(),
                    "count": args.count,
                    "seed": args.seed,
                    "results": [vars(result) for result in results],
                },
                indent=1,
            )
        )
    else:
        report(results, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--count", type=int, default=500, help="mutations (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the corpus (default: %(default)s)")
    add("--loader", choices=LOADERS, nargs="+", default=list(LOADERS), help="one or more (default: all)")
    add("--json", action="store_true", help="print all counts, and every case that is neither rejected nor right")
    return parser.parse_args()


def versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for package in ("diffusers", "ltx-core", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# ---------------------------------------------------------------- one loader
def compare(loader: str, count: int, seed: int) -> Result:
    with tempfile.TemporaryDirectory() as folder, Guarded(FUNCTIONS[loader], Path(folder), seed) as guarded:
        bad = unreadable(guarded)
        result = Result(loader, [name for name in layouts() if name not in bad], bad, {}, [], 0, 0, 0)
        reports = [guarded.report(index) for index in range(count) if applies(loader, guarded, index, bad)]
    return summed(result, reports, count)


def layouts() -> list[str]:
    """Return those that the first kind of mutation, which leaves a checkpoint as it is, has."""
    return [" ".join(names) for names in BASES if names[1] in KINDS[0][1]]


def unreadable(guarded: Guarded) -> dict[str, str]:
    """Return the layouts whose undamaged checkpoints the loader gets wrong, and why."""
    found: dict[str, str] = {}
    index = 0
    while len(found) < len(layouts()):
        name = base_of(guarded, index).base
        if name not in found:
            outcome = guarded.report(index)
            lines = f"{outcome.outcome}: {outcome.message}".splitlines()
            found[name] = "" if outcome.outcome == RIGHT else lines[0][:150]
        index += len(KINDS)
    return {name: why for name, why in found.items() if why}


def base_of(guarded: Guarded, index: int) -> Mutation:
    mutant = mutation(guarded.directory, index, guarded.seed)
    mutant.remove()
    return mutant


def applies(loader: str, guarded: Guarded, index: int, bad: Iterable[str]) -> bool:
    mutant = base_of(guarded, index)
    outside = loader == "diffusers" and mutant.base.split()[1] in SINGLE and mutant.kind in CONFIG_KINDS
    return mutant.base not in bad and not outside and (loader == "ltx2ref" or not mutant.options)


def summed(result: Result, reports: list[Report], count: int) -> Result:
    for found in reports:
        outcome = column(found)
        result.counts.setdefault(found.mutation.kind, Counter())[outcome] += 1
        if outcome not in (REJECTED, RIGHT):
            mutant = found.mutation
            result.cases.append(
                {
                    "index": mutant.index,
                    "kind": mutant.kind,
                    "base": mutant.base,
                    "detail": mutant.detail,
                    "expected": mutant.expected,
                    "outcome": found.outcome,
                    "error": found.error,
                    "message": found.message[:300],
                }
            )
    slow = sum(found.seconds > 2 for found in reports)
    large = sum(found.megabytes > 200 for found in reports)
    return replace(result, skipped=count - len(reports), slow=slow, large=large)


def column(found: Report) -> str:
    if found.outcome in (CRASHED, HUNG, MEMORY, EXECUTED):
        return DIED
    return REFUSED if found.outcome == REJECTED and found.mutation.expected == SAME else found.outcome


# ---------------------------------------------------------------- loaders
def by_ltx2ref(mutant: Mutation) -> State:
    import ltx2ref

    state: State = ltx2ref.load(mutant.path, **mutant.options).state_dict()
    return state


def by_diffusers(mutant: Mutation) -> State:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from diffusers import LTX2VideoTransformer3DModel

    if mutant.base.split()[1] in FOLDERS and mutant.path.suffix != ".safetensors":
        model = LTX2VideoTransformer3DModel.from_pretrained(mutant.path, local_files_only=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(mutant.original.config.to_diffusers()), encoding="utf-8")
            model = LTX2VideoTransformer3DModel.from_single_file(str(mutant.path), config=folder, local_files_only=True)
    state: State = model.state_dict()
    return state


def by_ltx_core(mutant: Mutation) -> State:
    from ltx_core.loader import SDOps, SingleGPUModelBuilder
    from ltx_core.model.transformer.model_configurator import LTXV_MODEL_COMFY_RENAMING_MAP, LTXModelConfigurator
    from ltx_core.quantization import FP8_PREPARE_MODULE_OPS, FP8_TRANSPOSE_SD_OPS

    release, layout = mutant.base.split()
    if layout in FOLDERS:
        raise NotImplementedError("ltx-core reads single files")
    quantised = layout == FP8
    renaming = LTXV_MODEL_COMFY_RENAMING_MAP
    operations = SDOps("fp8", renaming.mapping + FP8_TRANSPOSE_SD_OPS.mapping) if quantised else renaming
    model = SingleGPUModelBuilder(
        model_class_configurator=LTXModelConfigurator,
        model_path=str(mutant.path),
        model_sd_ops=operations,
        module_ops=(FP8_PREPARE_MODULE_OPS,) if quantised else (),
    ).build(device=torch.device("cpu"))
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith(".weight_scale")]:  # as its matmul uses them
        weight = name.removesuffix("_scale")
        value, scale = state[weight].t(), state.pop(name)
        state[weight] = scale if scale.is_meta or value.is_meta else value.float() * scale
        state.pop(f"{weight.removesuffix('.weight')}.input_scale")
    ours: dict[str, str] = names_of(release)
    return {str(ours.get(name, name)): tensor for name, tensor in state.items()}


FUNCTIONS: dict[str, Callable[[Mutation], State]] = {
    "ltx2ref": by_ltx2ref,
    "diffusers": by_diffusers,
    "ltx-core": by_ltx_core,
}


# ---------------------------------------------------------------- table
def report(results: list[Result], args: argparse.Namespace) -> None:
    print(f"{args.count} mutations, seed {args.seed}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    for name, meaning in COLUMNS.items():
        print(f"  {name:9} {meaning}")
    for result in results:
        print(
            f"\n{result.loader}: {args.count - result.skipped} mutations, {result.skipped} not applicable;"
            f" {result.slow} took more than 2 s, {result.large} more than 200 MB"
        )
        print(f"  loads these layouts while they are good: {', '.join(result.good)}")
        for layout, why in result.bad.items():
            print(f"  does not load {layout}: {why}")
        table(result)


def table(result: Result) -> None:
    print(f"\n  {'kind':30}" + "".join(f"{name:>10}" for name in COLUMNS))
    total: Counter[str] = Counter()
    for kind in dict.fromkeys(name for name, *_ in KINDS):
        counts = result.counts.get(kind, Counter())
        total += counts
        print(f"  {kind:30}" + "".join(f"{counts[name] or '-':>10}" for name in COLUMNS))
    print(f"  {'all':30}" + "".join(f"{total[name] or '-':>10}" for name in COLUMNS))


if __name__ == "__main__":
    main()
