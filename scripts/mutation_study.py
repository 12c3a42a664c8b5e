"""Change every part of diffusers' transformer a little, and ask `ltx2ref audit` what it sees.

Mutants are made from the syntax tree of the installed diffusers when they are needed (tests/support/ast_mutants.py);
none of its source is stored. A mutant is *live* if it changes the outputs of some case. Each live one is audited in the
first case that it changes, and in the next one if the first finds nothing. Honest rewrites (tests/support/rewrites.py)
compute the same function in another way, and must pass.

    detected       the verdict is "diverged", "suspect" or "shape"
    localised      the first tap that the audit names, or a tap of a cause, is the first that the mutant changes. Which
                   one that is, is found without the audit, by the bits of diffusers' taps with and without the mutation
    hinted         there is a hint; it is right or wrong by the table of tests/support/hint_labels.py
    false alarm    the verdict on an honest rewrite is "diverged", "suspect" or "shape"

Results are kept, a line of JSON each, in the file that is named; a run goes on where the last one stopped.

    python scripts/mutation_study.py found.jsonl                          everything, an hour on two free cores
    python scripts/mutation_study.py found.jsonl --dtype float32 --limit 60
    python scripts/mutation_study.py found.jsonl --operators constant,sign --functions LTX2VideoTransformerBlock.forward
    python scripts/mutation_study.py found.jsonl --dtype exact            under exact arithmetic, in float32
    python scripts/mutation_study.py second.jsonl --part 2/3              a third of it; put the lines into one file
    python scripts/mutation_study.py found.jsonl --table --write          write the table into docs/mutation-study.md
    python scripts/mutation_study.py other.jsonl --seed 23                other mutants, for --held-out other.jsonl
    python scripts/mutation_study.py found.jsonl --table --json           the same numbers as JSON
    python scripts/mutation_study.py found.jsonl --table --misses         what was not found, and hints to be read
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.utils import logging  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))  # the mutants, the rewrites, and what hints may say of them

import ast_mutants  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: E402
import hint_labels  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: E402
import rewrites  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: E402
from ast_mutants import Mutant  # noqa: E402

from ltx2ref.parity.arithmetic import NotExact  # noqa: E402
from ltx2ref.parity.audit import Candidate, Setup, audit  # noqa: E402
from ltx2ref.parity.cases import CASES, Case  # noqa: E402
from ltx2ref.parity.exact import exact  # noqa: E402
from ltx2ref.parity.generator import build  # noqa: E402
from ltx2ref.parity.oracles import diffusers  # noqa: E402
from ltx2ref.parity.report.rows import DIVERGED, SHAPE, SUSPECT, Report  # noqa: E402
from ltx2ref.parity.run import cast  # noqa: E402
from ltx2ref.parity.truth import Truth  # noqa: E402

PAGE = ROOT / "docs" / "mutation-study.md"
BY_ID = {case.id: case for case in CASES}
LOOKED_AT = (  # the cases in which mutants may live, in this order
    "2.3/t2v",
    "2.3/i2v",
    "2.0/t2v",
    "2.3/text-masks",
    "2.5/everything",
    "2.3/stg-one-of-batch",
    "2.3/stg",
    "2.3/defaults",
    "2.3/pipeline-i2v",
    "2.3/gates-without-guidance",
    "2.0/interleaved",
    "2.3/self-mask",
    "2.5/keyframes",
    "2.0/121-frames",
    "2.3/no-prompt-adaln",
    "2.3/isolated",
    "2.5/t2v",
)
REWRITTEN_IN = ("2.3/text-masks", "2.5/everything", "2.0/t2v")
EXACT = "exact"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, EXACT: torch.float32}
BEYOND = (DIVERGED, SUSPECT, SHAPE)
LARGE_EFFECT = 1e-5
SECONDS = 240  # that one audit may take
CPU = torch.device("cpu")
Found = dict[str, Any]


class Task(NamedTuple):
    kind: str  # "probe", "mutant", "rewrite"
    name: str
    dtype: str = "float32"
    cases: tuple[str, ...] = LOOKED_AT

    @property
    def key(self) -> str:
        """Return the name of the result in the file."""
        return f"{self.kind} | {self.name} | {self.dtype}" + f" | {self.cases[0]}" * (self.kind == "rewrite")


# ---------------------------------------------------------------- diffusers, with and without a change
class Subject(NamedTuple):
    case: Case
    state: dict[str, Tensor]
    dtype: torch.dtype

    def model(self) -> nn.Module:
        """Build diffusers' model."""
        return diffusers.build_diffusers(self.case.config.to_diffusers(), self.state, self.dtype)

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the case."""
        return cast(self.case.inputs(), self.dtype)

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the outputs of one forward."""
        with torch.no_grad():
            found = diffusers.run_diffusers(model, self.inputs())
        return dict(zip(("sample", "audio_sample"), found, strict=True))


@lru_cache(maxsize=64)
def subject(case: str, dtype: str) -> Subject:
    ours = build(BY_ID[case].config, DTYPES[dtype], scales=BY_ID[case].scales)
    return Subject(BY_ID[case], dict(ours.state_dict()), DTYPES[dtype])


@lru_cache(maxsize=64)
def built(case: str, dtype: str) -> nn.Module:
    return subject(case, dtype).model()


@lru_cache(maxsize=64)
def outputs(case: str, dtype: str) -> dict[str, Tensor]:
    return subject(case, dtype).outputs(built(case, dtype))


class Unchanged(NamedTuple):
    """What the unchanged models compute in a case: their taps, in the order of ours, and float64's outputs."""

    order: tuple[str, ...]
    taps: dict[str, Tensor]
    true: dict[str, Tensor]
    error: float


@lru_cache(maxsize=32)
def unchanged(case: str, dtype: str) -> Unchanged:
    it = subject(case, dtype)
    ours = build(it.case.config, it.dtype, scales=it.case.scales)
    true = Truth(ours, it.inputs()).pure
    with exact(random=True) if dtype == EXACT else nullcontext():
        theirs = diffusers.traced(it.model(), it.inputs())
    return Unchanged(tuple(true), theirs, true, farthest(theirs, true))


def farthest(theirs: Mapping[str, Tensor], from_these: Mapping[str, Tensor]) -> float:
    """Return the larger relative difference of the two outputs."""
    return max(relative(from_these[name], theirs[name]) for name in ("sample", "audio_sample"))


def mutant_named(name: str) -> Mutant:
    """Return the mutant of a name, which begins with its function."""
    return mutants_of(name.partition(":")[0])[name]


@lru_cache
def mutants_of(function: str) -> dict[str, Mutant]:
    return {mutant.id: mutant for mutant, _ in ast_mutants.candidates([function])}


# ---------------------------------------------------------------- one task
class TooSlowError(Exception):
    """A task takes longer than it may."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def done(task: Task) -> Found:
    """Do a task, and return what was found; whatever a mutant raises is a result."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    started = time.monotonic()
    work = {"probe": probed, "mutant": audited, "rewrite": rewritten}[task.kind]
    try:
        with at_most(SECONDS * len(task.cases)):
            found = work(task)
    except NotExact as error:
        found = {"not exact": str(error)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:200]}
    return task._asdict() | {"key": task.key, "seconds": round(time.monotonic() - started, 2)} | found


def probed(task: Task) -> Found:
    """Find the cases whose outputs a mutant changes: up to two in float32, or one in bfloat16 if there are none.

    A mutant that raises in one of the cases does not run, and is not looked at any further.
    """
    mutant, lives, effects, digest = mutant_named(task.name), [], {}, ""
    for dtype in ("float32", "bfloat16"):
        for case in task.cases if dtype == "float32" else task.cases[:2]:
            it = subject(case, dtype)
            with ast_mutants.mutated(mutant):
                model = it.model() if mutant.function.endswith("__init__") else built(case, dtype)
                theirs = it.outputs(model)
            ours = outputs(case, dtype)
            if any(ours[name].shape != x.shape or not torch.equal(ours[name], x) for name, x in theirs.items()):
                lives.append(case)
                effects[case] = max(relative(ours[name], x) for name, x in theirs.items())
                digest = digest or hashlib.sha256("".join(map(digested, theirs.values())).encode()).hexdigest()[:16]
            if len(lives) == (2 if dtype == "float32" else 1):
                break
        if lives:
            return {"lives": lives, "in": dtype, "effects": effects, "digest": f"{lives[0]} {dtype} {digest}"}
    return {"lives": []}


def digested(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def relative(a: Tensor, b: Tensor) -> float:
    """Return the change of an output, relative to its norm; infinity for another shape or for a NaN."""
    if a.shape != b.shape:
        return float("inf")
    found = float((b.double() - a.double()).norm() / a.double().norm())
    return found if found == found else float("inf")


def audited(task: Task) -> Found:
    """Audit a mutant in its cases, until one of them finds something."""
    mutant, found = mutant_named(task.name), {}
    arithmetic = EXACT if task.dtype == EXACT else "native"
    for case in task.cases:
        computed: list[Mapping[str, Any]] = []
        candidate = Candidate("a mutant", None, partial(traced, mutant, computed))
        report = audit(candidate, BY_ID[case], DTYPES[task.dtype], CPU, arithmetic=arithmetic)
        same, taps = unchanged(case, task.dtype), computed[0]
        found = {
            "case": case,
            "effect": farthest(taps, same.taps),
            "error": farthest(taps, same.true),
            "own error": same.error,
        } | summary(report, changed(same, taps))
        if report.verdict in BEYOND:
            break
    return found


def traced(mutant: Mutant, computed: list[Mapping[str, Any]], s: Setup) -> Mapping[str, Any]:
    """Return a mutant's taps, and add them to what was computed."""
    with ast_mutants.mutated(mutant):
        computed.append(diffusers.taps(s))
    return computed[-1]


def changed(same: Unchanged, theirs: Mapping[str, Any]) -> list[str]:
    """Return the taps whose bits or shapes a mutant changes, in the order of the computation."""
    there = [name for name in same.order if name in same.taps]
    return [
        name
        for name in there
        if name not in theirs
        or theirs[name].shape != same.taps[name].shape
        or not torch.equal(theirs[name], same.taps[name])
    ]


def summary(report: Report, label: list[str]) -> Found:
    """Return what is kept of a report. `label` lists the taps that really changed."""
    rows, first = {row.name: row for row in report.rows}, label[0] if label else None
    causes: list[Found] = [
        {
            "place": cause.place,
            "verdict": cause.verdict,
            "effect": cause.effect,
            "has label": first in cause.taps,
            "hints": [*cause.hints],
        }
        for cause in report.causes
    ]
    about = next((cause.hints for cause in report.causes if first in cause.taps), ())
    return {
        "verdict": report.verdict,
        "first": report.first,
        "label": first,
        "at label": rows[first].verdict if first in rows else None,
        "causes": causes,
        "hints": [*dict.fromkeys([*report.hints, *about])],
        "sentence": report.sentence,
        "missing": sum(x.verdict == "missing" for x in report.rows),
    }


def rewritten(task: Task) -> Found:
    """Audit an honest rewrite in one case."""

    def theirs(s: Setup) -> Mapping[str, Any]:
        model = diffusers.build_diffusers(s.config.to_diffusers(), s.state, s.dtype)
        with rewrites.REWRITES[task.name](model):
            return diffusers.traced(model, s.inputs)

    arithmetic = EXACT if task.dtype == EXACT else "native"
    report = audit(
        Candidate("a rewrite", None, theirs), BY_ID[task.cases[0]], DTYPES[task.dtype], CPU, arithmetic=arithmetic
    )
    return summary(report, []) | {"case": task.cases[0]}


# ---------------------------------------------------------------- which mutants
PROBED = 5  # cases, of those that reach a mutant


def reaching() -> dict[Mutant, tuple[str, ...]]:
    """Return all mutants of lines that a case executes, with the first cases that do."""
    lines = {}
    for name in LOOKED_AT:
        with ast_mutants.noting_lines() as found:
            it = subject(name, "float32")
            it.outputs(it.model())
        lines[name] = found
    everywhere = {f: set[int]().union(*(found[f] for found in lines.values())) for f in ast_mutants.WHERE}

    def cases(mutant: Mutant, here: set[int]) -> tuple[str, ...]:
        some = [name for name in LOOKED_AT if not here or here & lines[name][mutant.function]]
        return tuple(some[:PROBED])

    return {mutant: cases(mutant, here) for mutant, here in ast_mutants.candidates(reached=everywhere)}


def ordered(mutants: list[Mutant], seed: int) -> list[Mutant]:
    """Draw mutants in turn from each pair of operator and function, so that any first part has all kinds."""
    rng, groups = random.Random(seed), dict[tuple[str, str], list[Mutant]]()
    for mutant in mutants:
        groups.setdefault((mutant.operator, mutant.function), []).append(mutant)
    for group in groups.values():
        rng.shuffle(group)
    turns = [*groups.values()]
    rng.shuffle(turns)
    return [mutant for turn in zip_longest(*turns) for mutant in turn if mutant is not None]


class Results:
    """Results in a file, a line of JSON each, and the workers that add to them."""

    def __init__(self, path: Path, workers: int, minutes: float | None = None) -> None:
        self.path, self.workers = path, workers
        self.until = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.found: dict[str, Found] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                one = json.loads(line)
                self.found[one["key"]] = one
        self.pool: ProcessPoolExecutor | None = None

    def do(self, tasks: list[Task], what: str) -> None:
        """Do those tasks that have no result yet, and show progress."""
        left = [task for task in tasks if task.key not in self.found]
        if not left:
            return
        self.pool = self.pool or ProcessPoolExecutor(self.workers, get_context("spawn"))
        started, shown = time.monotonic(), 0.0
        with self.path.open("a") as file:
            futures = [self.pool.submit(done, task) for task in left]
            for i, future in enumerate(as_completed(futures), 1):
                if time.monotonic() > self.until:
                    stopped = sum(x.cancel() for x in futures)
                    if stopped:
                        print(f"{what}: no time left for {stopped} of {len(left)}", file=sys.stderr, flush=True)
                if future.cancelled():
                    continue
                one = future.result()
                self.found[one["key"]] = one
                file.write(json.dumps(one) + "\n")
                file.flush()
                if (now := time.monotonic()) - shown > 10 or i == len(left):
                    shown, rate = now, (now - started) / i
                    print(
                        f"{what}: {i} of {len(left)}, {rate * (len(left) - i):.0f} s left", file=sys.stderr, flush=True
                    )

    def live(self, mutants: list[Mutant], cases: Mapping[Mutant, tuple[str, ...]], limit: int) -> list[Mutant]:
        """Return the first mutants, up to `limit`, that change an output, each another one; probe as many as needed."""
        window = 48 * self.workers
        for start in range(0, len(mutants), window):
            some = mutants[start : start + window]
            self.do([Task("probe", x.id, cases=cases[x]) for x in some if cases[x]], f"probing from {start}")
            if len(found := [*islice(self.distinct(mutants[: start + window]), limit)]) == limit:
                return found
        return [*islice(self.distinct(mutants), limit)]

    def distinct(self, mutants: Iterable[Mutant]) -> Iterator[Mutant]:
        """Yield the probed mutants that live and change the outputs in a way that none before them did."""
        seen = set()
        for mutant in mutants:
            one = self.found.get(Task("probe", mutant.id).key, {})
            if one.get("lives") and one["digest"] not in seen:
                seen.add(one["digest"])
                yield mutant


# ---------------------------------------------------------------- the table
def near(first: str | None, label: str | None) -> str:
    """Tell where the audit's first tap is: "at" the first that changed, in the same "stage", or "elsewhere"."""
    if first is None or label is None:
        return "elsewhere"
    if first == label:
        return "at"
    return "stage" if stage(first) == stage(label) else "elsewhere"


def where(x: Found) -> str:
    """Tell where the audit points: as `near`, or "cause" if the first tap that changed is one of a cause's."""
    place = near(x["first"], x["label"])
    return "cause" if place != "at" and any(cause["has label"] for cause in x["causes"]) else place


def stage(tap: str) -> str:
    """Return the sub-layer or module that a tap belongs to."""
    found = re.match(r"(transformer_blocks\.\d+\.[a-z_0-9]+)|([a-z_0-9]+)", tap)
    return "" if found is None else found[0].removesuffix("_out")


def counted(results: Results, dtype: str) -> Found:
    """Count what audits in one dtype found."""
    audits = [x for x in results.found.values() if x["kind"] == "mutant" and x["dtype"] == dtype]
    ran = [x for x in audits if "verdict" in x]
    large = [x for x in ran if x["effect"] > LARGE_EFFECT]
    detected = [x for x in ran if x["verdict"] in BEYOND]
    labels = [hint_labels.label(mutant_of(x), x) for x in detected]
    places = [where(x) for x in detected]
    return {
        "audited": len(ran),
        "could not be audited": len(audits) - len(ran),
        "effect above 1e-5": len(large),
        "of these detected": sum(x["verdict"] in BEYOND for x in large),
        "of these not, and no worse than before": sum(undetected(x) and better(x) for x in large),
        "detected": len(detected),
        "localised": places.count("at"),
        "or a cause is there": places.count("cause"),
        "or in the same stage": places.count("stage"),
        "hinted": sum(bool(x["hints"]) for x in detected),
        "hinted right": labels.count("right"),
        "hinted wrong": labels.count("wrong"),
        "hinted unclear": labels.count("unclear"),
    }


def mutant_of(one: Found) -> Mutant:
    return mutant_named(one["name"])


def probes(results: Results) -> Found:
    """Count the mutants that were made."""
    found = [x for x in results.found.values() if x["kind"] == "probe"]
    live = [x for x in found if x.get("lives")]
    return {
        "made": len(found),
        "do not run": sum("error" in x for x in found),
        "change no output": sum(not x.get("lives") and "error" not in x for x in found),
        "live": len(live),
        "distinct": len({x["digest"] for x in live}),
        "live in bfloat16 alone": sum(x["in"] == "bfloat16" for x in live),
    }


def alarms(results: Results, dtype: str) -> Found:
    """Count the verdicts on honest rewrites."""
    found = [x for x in results.found.values() if x["kind"] == "rewrite" and x["dtype"] == dtype]
    ran = [x for x in found if "verdict" in x]
    wrong = [x for x in ran if x["verdict"] in BEYOND]
    return {
        "rewrites": len({x["name"] for x in ran}),
        "audits": len(ran),
        "other bits": sum(x["verdict"] != "identical" for x in ran),
        "could not be audited": len(found) - len(ran),
        "taps missing": len({x["name"] for x in ran if x["verdict"] == "missing"}),
        "false alarms": sorted({f"{x['name']} ({x['verdict']})" for x in wrong}),
    }


def groups(results: Results, dtype: str) -> list[Found]:
    """Count by operator."""
    found = dict[str, list[Found]]()
    for x in results.found.values():
        if x["kind"] == "mutant" and x["dtype"] == dtype and "verdict" in x:
            found.setdefault(mutant_of(x).operator, []).append(x)
    return [
        {
            "operator": name,
            "live": len(some),
            "detected": sum(x["verdict"] in BEYOND for x in some),
            "localised": sum(x["verdict"] in BEYOND and where(x) in ("at", "cause") for x in some),
            "hinted": sum(x["verdict"] in BEYOND and bool(x["hints"]) for x in some),
            "right": sum(x["verdict"] in BEYOND and hint_labels.label(mutant_of(x), x) == "right" for x in some),
            "wrong": sum(x["verdict"] in BEYOND and hint_labels.label(mutant_of(x), x) == "wrong" for x in some),
        }
        for name, some in sorted(found.items())
    ]


def numbers(results: Results) -> Found:
    used = {
        kind: [
            dtype for dtype in DTYPES if any((x["kind"], x["dtype"]) == (kind, dtype) for x in results.found.values())
        ]
        for kind in ("mutant", "rewrite")
    }
    return {
        "mutants": probes(results),
        "audits": {dtype: counted(results, dtype) for dtype in used["mutant"]},
        "rewrites": {dtype: alarms(results, dtype) for dtype in used["rewrite"]},
        "cases of rewrites": sorted({x["cases"][0] for x in results.found.values() if x["kind"] == "rewrite"}),
        "operators": groups(results, "float32"),
        "lists": {dtype: {"missed": missed(results, dtype)} for dtype in used["mutant"]},
    }


def missed(results: Results, dtype: str) -> list[str]:
    """Return the mutants of a large effect that no audit detected, unless they are closer to float64."""
    return [
        x["name"]
        for x in results.found.values()
        if x["kind"] == "mutant"
        and x["dtype"] == dtype
        and undetected(x)
        and x["effect"] > LARGE_EFFECT
        and not better(x)
    ]


def undetected(x: Found) -> bool:
    return "verdict" in x and x["verdict"] not in BEYOND


def better(x: Found) -> bool:
    """Tell whether the outputs are closer to float64 than without the mutation."""
    return bool(x["error"] <= x["own error"])


def misses(results: Results) -> list[str]:
    """List what was not detected, hints that are wrong or unclear, and what has no hint."""
    lines = []
    for x in results.found.values():
        if x["kind"] == "rewrite" and (x.get("verdict") in BEYOND or "error" in x):
            lines.append(f"false alarm | {x['key']} | {x.get('sentence') or x.get('error')}")
        if x["kind"] != "mutant":
            continue
        if "verdict" not in x:
            lines.append(f"not audited | {x['key']} | {x.get('error') or x.get('not exact')}")
            continue
        label = hint_labels.label(mutant_of(x), x)
        what = f"{x['key']} | {x['case']} | effect {x['effect']:.1e} | label {x['label']}, first {x['first']}"
        if x["verdict"] not in BEYOND:
            lines.append(
                f"{'UNDETECTED' if x['effect'] > LARGE_EFFECT else 'undetected, small'} | {what} | {x['verdict']}"
            )
            continue
        if where(x) != "at":
            lines.append(f"elsewhere ({where(x)}) | {what} | {x['at label']} there")
        if label in ("wrong", "unclear", "none"):
            lines.append(f"hint {label} | {what} | {'; '.join(x['hints'])}")
    return sorted(lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("results", type=Path, help="the file that results are kept in, a line of JSON each")
    arguments.add_argument("--limit", type=int, default=400, help="how many live mutants to audit (400)")
    arguments.add_argument("--seed", type=int, default=17, help="which mutants are drawn (17)")
    arguments.add_argument("--dtype", action="append", choices=[*DTYPES], help="may be given more than once; all three")
    arguments.add_argument("--operators", help="only these operators, with commas in between")
    arguments.add_argument("--functions", help="only these functions, with commas in between")
    arguments.add_argument("--only", choices=("probes", "mutants", "rewrites"), help="leave out the other parts")
    arguments.add_argument("--exact-limit", type=int, help="how many live mutants to audit under exact arithmetic")
    arguments.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one for each core)")
    arguments.add_argument("--part", default="1/1", help="audit only this part, such as 2/3, with a file of its own")
    arguments.add_argument("--minutes", type=float, help="start nothing after this time")
    arguments.add_argument("--rewrite-cases", type=int, default=1, help="cases for each rewrite, 1 to 3")
    arguments.add_argument("--table", action="store_true", help="run nothing, and report what the file holds")
    arguments.add_argument("--write", action="store_true", help="also write the table into docs/mutation-study.md")
    arguments.add_argument(
        "--held-out", type=Path, help="results of another seed, for a table of their own on that page"
    )
    arguments.add_argument("--json", action="store_true", help="print the numbers as JSON")
    arguments.add_argument("--misses", action="store_true", help="list what was not found, and hints to be read")
    given = arguments.parse_args()
    results = Results(given.results, given.workers, given.minutes)
    dtypes = given.dtype or [*DTYPES]
    if not given.table:
        part, parts = map(int, given.part.split("/"))
        live = [] if given.only == "rewrites" else drawn(results, given)[part - 1 :: parts]
        for dtype in dtypes if given.only != "probes" else ():
            if given.only != "mutants":
                cases = REWRITTEN_IN[: given.rewrite_cases]
                tasks = [Task("rewrite", name, dtype, (case,)) for case in cases for name in rewrites.REWRITES]
                results.do(tasks[part - 1 :: parts], f"rewrites in {dtype}")
            study(results, live[: given.exact_limit] if dtype == EXACT else live, dtype)
    found = numbers(results)
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        print(shown(found))
    if given.misses:
        print("\n".join(misses(results)))
    if given.write:
        held_out = numbers(Results(given.held_out, 1)) if given.held_out else {"audits": {}}
        PAGE.write_text(page(found, held_out, given.seed))
    return 0


def drawn(results: Results, given: argparse.Namespace) -> list[Mutant]:
    """Probe mutants until there are enough live ones, and return those."""
    cases = reaching()
    wanted = [
        x
        for x in cases
        if (not given.operators or x.operator in given.operators.split(","))
        and (not given.functions or x.function in given.functions.split(","))
    ]
    print(f"{len(wanted)} mutants can be made of the lines that {len(LOOKED_AT)} cases reach", file=sys.stderr)
    return results.live(ordered(wanted, given.seed), cases, given.limit)


def study(results: Results, live: list[Mutant], dtype: str) -> None:
    """Audit mutants. One that lives in bfloat16 alone is left out elsewhere."""
    tasks = []
    for mutant in live:
        one = results.found[Task("probe", mutant.id).key]
        if one["in"] == "float32" or dtype == "bfloat16":
            tasks.append(Task("mutant", mutant.id, dtype, tuple(one["lives"])))
    results.do(tasks, f"mutants in {dtype}")


def shown(found: Found) -> str:
    lines = [", ".join(f"{name} {count}" for name, count in found["mutants"].items())]
    for dtype, counts in found["audits"].items():
        lines.append(f"{dtype}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    for dtype, counts in found["rewrites"].items():
        lines.append(f"rewrites in {dtype}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    return "\n".join(lines)


HEAD = """# A study of small mutations

What does an audit find of what a port can do differently? Every part of diffusers' transformer is changed a little, by
an engine that works on the syntax tree of the installed package: operands swapped, terms dropped, constants changed,
arguments and elements reordered, names confused, dtypes and slices changed, conditions flipped. None of its source is
kept. Each mutant that changes an output is audited as a port would be. So are honest rewrites: the same function,
computed in another way.

Written by `python scripts/mutation_study.py {given} --write`, with torch {torch}, diffusers {diffusers}, on a CPU, seed
{seed}. `tests/support/` has the operators (`ast_mutants.py`), the rewrites (`rewrites.py`) and what a hint may say
(`hint_labels.py`).

- *Effect*: how far the mutant's outputs are from those without the mutation, relative to their L2 norm.
- *Detected*: the verdict is "diverged", "suspect" or "shape", in the first case whose outputs the mutant changes, or in
  the next one.
- *Localised*: the first tap that the audit names is the first that the mutation changes, *or a cause* has it. That tap
  is found without the audit: both versions of diffusers are traced, and the bits of their taps compared.
- *Hinted right*, *wrong*: by the table of what may be said of each operator and place. Some hints cannot be judged so.
- *No worse than before*: not detected, and the outputs are closer to float64 than without the mutation.
"""


def page(found: Found, held_out: Found, seed: int) -> str:
    """Return the page of the documentation. `held_out` are the numbers of another seed."""
    made = found["mutants"]
    parts = [
        HEAD.format(given="FILE", torch=torch.__version__, diffusers=version("diffusers"), seed=seed),
        "## Mutants\n",
        f"{made['made']} mutants were drawn, in turn from each pair of operator and function. {made['do not run']} "
        f"of them raise an error, {made['change no output']} change no output of up to {PROBED} cases that reach them, "
        f"and {made['live']} are live. {made['distinct']} of these differ in their outputs; the first were audited.\n",
        table(("", *found["audits"]), transposed(found["audits"])),
        *(
            (
                "\n## Mutants of another seed\n",
                "Hints, and the table of what they may say, were written while the results above were read. These "
                "mutants were drawn and audited afterwards, and nothing was changed because of them. The table is "
                "strict: it calls a hint wrong that says the same in another way. `--misses` lists these to be read.\n",
                table(("", *held_out["audits"]), transposed(held_out["audits"])),
            )
            if held_out["audits"]
            else ()
        ),
        "\n## Honest rewrites\n",
        f"There are {len(rewrites.REWRITES)}, audited in {', '.join(found['cases of rewrites'])}.\n",
        table(("", *found["rewrites"]), transposed({k: counts_only(v) for k, v in found["rewrites"].items()})),
        *(
            f"\nIn {dtype}: {'; '.join(x['false alarms'])}."
            for dtype, x in found["rewrites"].items()
            if x["false alarms"]
        ),
        "\n## Operators, in float32\n",
        table(tuple(found["operators"][0]), [[*x.values()] for x in found["operators"]]) if found["operators"] else "",
        "\n## Not detected, with an effect above 1e-5\n",
        *(f"- {dtype}: {', '.join(counts['missed']) or 'none'}" for dtype, counts in found["lists"].items()),
    ]
    return "\n".join(parts) + "\n"


def counts_only(counts: Found) -> Found:
    return counts | {"false alarms": len(counts["false alarms"])}


def transposed(columns: Mapping[str, Found]) -> list[list[Any]]:
    """Return a row for each count, with its name first."""
    first = next(iter(columns.values()), {})
    return [[name, *(counts[name] for counts in columns.values())] for name in first]


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [[*head], *([str(x) for x in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
