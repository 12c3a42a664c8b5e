"""Inject thirty real porting bugs, and count which gates notice them: ltx2ref's, and those that projects use.

Each bug is injected into models of all releases, in float32 and bfloat16. Their sizes, weights and inputs are drawn
afresh at each run. Each gate is implemented in its owners' words, and is given the same tensors.

    detected       at least one case and dtype fails
    localised      the first tap that the gate calls wrong is one at which the bug is made
    false alarm    a change that is no bug fails

    python scripts/score_gates.py                              with fresh seeds, which are printed
    python scripts/score_gates.py --write                      also write the table into docs/mutation-score.md
    python scripts/score_gates.py --seed 1 --ci                with a fixed seed; fail if ltx2ref misses a bug, or
                                                               calls a right model wrong
"""

import argparse
import json
import random
import re
import secrets
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))  # the bugs, the writers of files, the drawn models

import mutants  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: E402
import tiny  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: E402

from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig  # noqa: E402
from ltx2ref.parity.compare import compare, compare_forwards  # noqa: E402
from ltx2ref.parity.explain.hints import HINTS  # noqa: E402
from ltx2ref.parity.report.rows import DIVERGED, SHAPE  # noqa: E402
from ltx2ref.parity.run import cast, run  # noqa: E402
from ltx2ref.parity.truth import truth  # noqa: E402
from ltx2ref.progress import track  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAGE = ROOT / "docs" / "mutation-score.md"
OUTPUTS = ("sample", "audio_sample")
Taps = Mapping[str, Tensor]


# ---------------------------------------------------------------- what is drawn
@dataclass
class Drawn:
    """Hold a model with random weights, its inputs, and what it computes from them."""

    name: str
    dtype: str
    model: LTX2VideoTransformer3DModel
    inputs: dict[str, Any]
    taps: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.taps = run(self.model, self.inputs)


PLANS: dict[str, tuple[str, dict[str, Any]]] = {  # case: release, options of tiny.random_inputs
    "2.0 long": ("2.0", {"grid": "long"}),
    "2.3 text to video": ("2.3", {"text_masks": torch.float32}),
    "2.3 image to video, guided": ("2.3", {"per_token": True, "stg": True}),
    "2.5 keyframes, cross timestep": (
        "2.5",
        {
            "per_token": True,
            "stg": True,
            "keyframes": True,
            "self_mask": True,
            "text_masks": torch.int64,
            "use_cross_timestep": True,
        },
    ),
    "2.0 text to video": ("2.0", {"text_masks": torch.int64}),
    "2.3 long": ("2.3", {"grid": "long"}),
    "2.5 text to video": ("2.5", {}),
}  # the first four show every bug


def sizes(rng: random.Random) -> dict[str, Any]:
    """Draw sizes. No width of the video stream divides by 6, so that some RoPE planes are padding."""
    heads = rng.choice([2, 4])
    head_dim = rng.choice([x for x in (10, 14, 16, 20, 22, 26) if heads * x // 2 % 3])
    audio = rng.choice([x for x in (10, 12, 14, 18) if x != head_dim])
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "audio_num_attention_heads": heads,
        "audio_attention_head_dim": audio,
        "audio_cross_attention_dim": heads * audio,
        "in_channels": rng.randint(5, 20),
        "caption_channels": rng.randint(20, 40),
    }


def draw(seed: int, cases: int) -> list[Drawn]:
    rng, found = random.Random(seed), []
    for name, (release, options) in list(PLANS.items())[:cases]:
        config = tiny.tiny_config(release, **sizes(rng))
        long = options.get("grid") == "long"
        grid = (rng.randint(16, 18), 1, 3) if long else tuple(rng.sample([2, 3, 4, 5, 7], 3))
        drawn, audio_frames = rng.randrange(10**6), rng.randint(8, 13)
        for dtype in DTYPES:
            inputs = tiny.random_inputs(config, seed=drawn, **options | {"grid": grid, "audio_frames": audio_frames})
            found.append(case(f"{name} {grid}", config, drawn, dtype, inputs))
    return found


def case(name: str, config: TransformerConfig, seed: int, dtype: str, inputs: dict[str, Any]) -> Drawn:
    return Drawn(name, dtype, tiny.random_model(config, DTYPES[dtype], seed), cast(inputs, DTYPES[dtype]))


# ---------------------------------------------------------------- the gates, in their owners' words
Gate = Callable[[Taps, Taps, str], str | None]  # the first thing that fails, or None


def each(taps: Taps, theirs: Taps, fails: Callable[[Tensor, Tensor], bool], names: Callable[[str], bool]) -> str | None:
    for name, x in taps.items():
        if names(name) and name in theirs:
            y = theirs[name]
            if x.shape != y.shape or not bool(y.isfinite().all()) or fails(x.double(), y.double()):
                return name
    return None


def output(name: str) -> bool:
    return name in OUTPUTS


def block_output(name: str) -> bool:
    return bool(re.fullmatch(r"transformer_blocks\.\d+\.(video|audio)", name))


def pearson(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return float(a @ b / (a.norm() * b.norm()))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.flatten() @ b.flatten() / (a.norm() * b.norm()))


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def abs_mean(a: Tensor, b: Tensor) -> float:
    return abs(float(b.abs().mean() / a.abs().mean()) - 1)


GATES: dict[str, Gate] = {
    "Pearson >= 0.95": lambda a, b, _: each(a, b, lambda x, y: not pearson(x, y) >= 0.95, output),
    "PCC >= 0.99": lambda a, b, _: each(a, b, lambda x, y: not pearson(x, y) >= 0.99, output),
    "cosine >= 0.999": lambda a, b, _: each(a, b, lambda x, y: not cosine(x, y) >= 0.999, output),
    "max_abs <= 5e-2 in bf16": lambda a, b, dtype: (
        None if dtype != "bfloat16" else each(a, b, lambda x, y: not largest(x, y) <= 5e-2, output)
    ),
    "max_diff < 1e-3 in fp32": lambda a, b, dtype: (
        None if dtype != "float32" else each(a, b, lambda x, y: not largest(x, y) < 1e-3, output)
    ),
    "assert_close(rtol=1e-2, atol=1e-2)": lambda a, b, _: each(
        a, b, lambda x, y: not torch.allclose(y, x, rtol=1e-2, atol=1e-2), output
    ),
    "abs-mean within 0.5% per block": lambda a, b, _: each(a, b, lambda x, y: not abs_mean(x, y) <= 5e-3, block_output),
    "cos/sin atol=5e-2": lambda a, b, _: each(
        a, b, lambda x, y: not largest(x, y) <= 5e-2, lambda name: name.endswith((".cos", ".sin"))
    ),
}
OURS = "ltx2ref"


# ---------------------------------------------------------------- scoring
@dataclass
class Score:
    """Count how one gate judged one bug or benign change."""

    failed: dict[str, set[str]] = field(default_factory=lambda: {dtype: set() for dtype in DTYPES})  # cases, by dtype
    right: int = 0  # failures whose first tap is right
    wrong: list[str] = field(default_factory=list)
    hinted: int = 0

    @property
    def detected(self) -> bool:
        return any(self.failed.values())


class Table:
    """Score all gates. ltx2ref is asked in `judged` cases of a dtype in which a bug shows, the others in all."""

    def __init__(self, judged: int) -> None:
        self.judged, self.asked = judged, dict[tuple[str, str], int]()
        self.bugs = {gate: {bug: Score() for bug in mutants.FIRST} for gate in (OURS, *GATES)}
        self.benign: dict[str, dict[str, Score]] = {gate: {} for gate in (OURS, *GATES)}

    def bug(self, bug: str, drawn: Drawn, theirs: Taps) -> None:
        if all(torch.equal(x, theirs[name]) for name, x in drawn.taps.items() if name in theirs and output(name)):
            return  # it does not show in this case
        taps, named = mutants.FIRST[bug]
        failing = {gate: test(drawn.taps, theirs, drawn.dtype) for gate, test in GATES.items()}
        if self.asked.get((bug, drawn.dtype), 0) < self.judged:
            self.asked[bug, drawn.dtype] = self.asked.get((bug, drawn.dtype), 0) + 1
            report = compare_forwards(drawn.model, drawn.inputs, drawn.taps, theirs)
            failing[OURS] = report.first if report.verdict in (DIVERGED, SHAPE) else None
        for gate, first in failing.items():
            if first is not None:
                score = self.bugs[gate][bug]
                score.failed[drawn.dtype].add(drawn.name)
                good = in_any_block(first) in taps
                score.right += good
                score.wrong += [] if good else [f"{drawn.name} {drawn.dtype}: {first}"]
                score.hinted += gate == OURS and good and hinted(report.hints, named)

    def change(self, change: str, drawn: Drawn, theirs: Taps, ours: Taps | None = None) -> None:
        ours = drawn.taps if ours is None else ours
        if set(theirs) == set(OUTPUTS) or ours is not drawn.taps:
            shown = {name: ours[name] for name in theirs if name in ours}
            report = compare(shown, theirs, truth(drawn.model, drawn.inputs, shown))
        else:
            report = compare_forwards(drawn.model, drawn.inputs, drawn.taps, theirs)
        failing = {gate: test(ours, theirs, drawn.dtype) for gate, test in GATES.items()}
        failing[OURS] = report.first if report.verdict in (DIVERGED, SHAPE) else None
        for gate, first in failing.items():
            score = self.benign[gate].setdefault(change, Score())
            if first is not None:
                score.failed[drawn.dtype].add(drawn.name)
                score.wrong.append(f"{drawn.name} {drawn.dtype}: {first}")


def in_any_block(name: str) -> str:
    return re.sub(r"^transformer_blocks\.\d+\.", "", name)


def hinted(said: tuple[str, ...], named: tuple[str, ...]) -> bool:
    """Return whether there is a hint at all where one is due; tests/parity/test_hints.py asks which one."""
    assert set(named) <= {hint.__name__ for hint in HINTS}
    return bool(said) and bool(named)


def score(seed: int, judged: int, cases: int) -> Table:
    table, drawn = Table(judged), draw(seed, cases)
    model_bugs = [bug for bug in mutants.FIRST if bug not in mutants.LOADERS]
    for bug in track(model_bugs, "bugs of models"):
        for one in drawn:
            with mutants.inject(bug, one.model):
                theirs = run(one.model, one.inputs)
            table.bug(bug, one, theirs)
    for bug, load in mutants.LOADERS.items():
        with tempfile.TemporaryDirectory() as folder:
            right, wrong = load(Path(folder), seed)
        for dtype in DTYPES:
            inputs = cast(tiny.random_inputs(right.config, seed=seed), DTYPES[dtype])
            one = Drawn(f"a file of {bug}", dtype, right.to(DTYPES[dtype]), inputs)
            table.bug(bug, one, run(wrong.to(DTYPES[dtype]), inputs))
    for change, context in track([*mutants.BENIGN.items()], "benign changes"):
        for one in drawn:
            with context():
                theirs = run(one.model, one.inputs)
            table.change(change, one, theirs)
    for one in drawn:
        # A mask's fractions are none in bfloat16: with them it is another input, not another rounding.
        if one.dtype == "bfloat16" and "self_mask" not in PLANS[one.name.partition(" (")[0]][1]:
            wide = next(x for x in drawn if x.name == one.name and x.dtype == "float32")
            table.change("bfloat16 against a float32 record", wide, one.taps)
        if (one.name[:8], one.dtype) in (("2.0 long", "float32"), ("2.5 keyf", "bfloat16")):
            table.change("torch.compile", one, compiled(one))
    return table


def compiled(one: Drawn) -> Taps:
    torch._dynamo.reset()
    with torch.no_grad():
        video, audio = torch.compile(one.model)(**one.inputs | {"return_dict": False})
    return {"sample": video, "audio_sample": audio}


# ---------------------------------------------------------------- the table
def summary(table: Table) -> list[dict[str, Any]]:
    rows = []
    for gate, bugs in table.bugs.items():
        failures = [x for x in bugs.values() if x.detected]
        count = sum(len(cases) for x in failures for cases in x.failed.values())
        by_row = merged(bugs)
        rows.append(
            {
                "gate": gate,
                "detected": sum(by_row.values()),
                "of": len(by_row),
                **{
                    dtype: sum(merged({bug: Score({dtype: x.failed[dtype]}) for bug, x in bugs.items()}).values())
                    for dtype in DTYPES
                },
                "localised": sum(x.right for x in failures) / count if count else 0.0,
                "hinted": sum(bool(x.hinted) for x in bugs.values()) if gate == OURS else 0,
                "false_alarms": sum(x.detected for x in table.benign[gate].values()),
                "benign": len(table.benign[gate]),
            }
        )
    return rows


def merged(bugs: Mapping[str, Score]) -> dict[str, bool]:
    """Merge the two halves of one bug into one row, which counts as detected if both are."""
    result: dict[str, bool] = {}
    for bug, found in bugs.items():
        result[mutants.ROWS[bug]] = result.get(mutants.ROWS[bug], True) and found.detected
    return result


HEAD = """# The score of every gate in use

What do the tests that projects use to accept a port find, and what do they reject wrongly? Thirty bugs that public
projects really had are injected, one at a time, into models of the three releases; so are changes that are not bugs.

- *Detected*: the gate fails for at least one case and dtype.
- *Localised*: of all its failures, those whose first wrong tap is one at which the bug is made. A gate on outputs alone
  names none.
- *Hinted*: the report says what the bug looks like. `fps-dropped` and `fps-dropped-from-exchange` are the two halves of
  one bug: they are one in *detected*, and two here.
- *False alarms*: of the changes that are not bugs, those for which the gate fails at least once.

This page is written by `python scripts/score_gates.py --write`, which draws models, weights and inputs afresh at each
run. This run: `--seed {seed} --judged {judged}` ({judged} case of each dtype, of those in which a bug shows, is given
to ltx2ref, and all of them to the other gates), torch {torch}, one thread, CPU.

| | gate | detected | in float32 | in bfloat16 | localised | hinted | false alarms |
|---|---|---|---|---|---|---|---|"""


def page(table: Table, seed: int) -> str:
    rows, ours = summary(table), table.bugs[OURS]
    lines = [HEAD.format(seed=seed, judged=table.judged, torch=torch.__version__)]
    numbers = {gate: str(i) for i, gate in enumerate((OURS, *GATES))}
    for row in rows:
        name = f"**{row['gate']}**" if row["gate"] == OURS else row["gate"]
        lines.append(
            f"| {numbers[row['gate']]} | {name} | {row['detected']}/{row['of']} | {row['float32']} | "
            f"{row['bfloat16']} | {row['localised']:.0%} | {row['hinted'] if row['gate'] == OURS else '-'} | "
            f"{row['false_alarms']}/{row['benign']} |"
        )
    unseen = [bug for bug, x in ours.items() if x.detected and not x.failed["bfloat16"]]
    lines += [
        "",
        "Bugs that cannot be shown in a port that has only bfloat16: " + (", ".join(unseen) or "none") + ".",
        "",
        "## By bug",
        "",
        "The dtypes in which ltx2ref detects it, and the other gates that do, by their numbers in the table above.",
        "",
        "| bug | detected in | first wrong tap | other gates |",
        "|---|---|---|---|",
    ]
    for bug, x in ours.items():
        others = [numbers[gate] for gate in GATES if table.bugs[gate][bug].detected]
        lines.append(
            f"| {bug} | {', '.join(dtype for dtype in DTYPES if x.failed[dtype])} | "
            f"{', '.join(f'`{tap}`' for tap in mutants.FIRST[bug][0])} | "
            f"{' '.join(others) or 'none'} |"
        )
    lines += ["", "## By change that is not a bug", "", "| change | gates that call it a bug |", "|---|---|"]
    lines += [
        f"| {change} | {' '.join(numbers[g] for g in numbers if table.benign[g][change].detected) or 'none'} |"
        for change in table.benign[OURS]
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="default: a fresh one")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument(
        "--ci",
        action="store_true",
        help="exit 1 if ltx2ref misses a bug, localises under 95 %% of its failures, or calls a benign change a bug",
    )
    parser.add_argument(
        "--judged",
        type=int,
        default=3,
        metavar="N",
        help="in how many cases of a dtype, of those in "
        "which a bug shows, ltx2ref is asked; the other gates are in all of them (default: 3)",
    )
    parser.add_argument(
        "--cases",
        type=int,
        default=len(PLANS),
        metavar="N",
        help=f"models that are drawn, of {len(PLANS)}; the first 4 show every bug (default: all)",
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"--seed {seed}", file=sys.stderr)
    table = score(seed, options.judged, options.cases)
    rows = summary(table)
    if options.json:
        print(json.dumps({"seed": seed, "gates": rows}, indent=1))
    else:
        print(page(table, seed))
    for bug, x in table.bugs[OURS].items():
        for wrong in [] if x.detected and not x.wrong else x.wrong or ["not detected"]:
            print(f"{bug}: {wrong}, expected {' or '.join(mutants.FIRST[bug][0])}", file=sys.stderr)
    for change, x in table.benign[OURS].items():
        for wrong in x.wrong:
            print(f"{change}: called a bug: {wrong}", file=sys.stderr)
    if options.write:
        PAGE.write_text(page(table, seed), encoding="utf-8")
    ours = rows[0]
    good = ours["detected"] == ours["of"] and ours["localised"] >= 0.95 and not ours["false_alarms"]
    return 0 if good or not options.ci else 1


if __name__ == "__main__":
    sys.exit(main())
