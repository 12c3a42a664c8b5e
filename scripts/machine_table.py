"""Count false alarms and bugs found on simulated machines and on this one, by verify, audit and the kit.

A *false alarm* is a verdict on correct code that computes as some machine does: ltx2ref judged by `verify`, diffusers
by `audit` and by the kit (its five models), against references that are computed here or recorded. A *bug found* is a
verdict on diffusers with one of thirty known bugs, in a case that shows it. Results are kept in a file as they come, so
an interrupted run goes on where it stopped. Both dtypes are judged.

    python scripts/machine_table.py                            everything, half an hour on two free cores
    python scripts/machine_table.py --write                    also put the tables into docs/machines.md
    python scripts/machine_table.py --machine 'sums-*' --case 2.3/t2v --only honest
    python scripts/machine_table.py --check                    is the page's table of today's machines, bugs and bounds?

The exit status is 1 if correct code has failed, or if a bug is missed in float32 or under exact arithmetic, except for
the one of `HARDLY_TOLD`.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from fnmatch import fnmatch
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))  # the bugs

import diffusers_mutants  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: E402
import mutants  # type: ignore[import-not-found, import-untyped, unused-ignore]  # noqa: E402

from ltx2ref.kit.cases import MODELS  # noqa: E402
from ltx2ref.kit.check import check_results  # noqa: E402
from ltx2ref.kit.export import export, plain  # noqa: E402
from ltx2ref.kit.verdict import verdicts  # noqa: E402
from ltx2ref.parity import audit, verify  # noqa: E402
from ltx2ref.parity.arithmetic import VERSION  # noqa: E402
from ltx2ref.parity.cases import CASES, Case, Inputs  # noqa: E402
from ltx2ref.parity.exact import exact  # noqa: E402
from ltx2ref.parity.explain.roundings import FAR, ROUND_MORE  # noqa: E402
from ltx2ref.parity.generator import build  # noqa: E402
from ltx2ref.parity.judge import CLEARLY  # noqa: E402
from ltx2ref.parity.machines import MACHINES, machine  # noqa: E402
from ltx2ref.parity.oracles import diffusers  # noqa: E402
from ltx2ref.parity.record import NATIVE_DTYPES  # noqa: E402
from ltx2ref.parity.report.rows import DIVERGED, SHAPE, SUSPECT, Report  # noqa: E402
from ltx2ref.parity.run import cast, run  # noqa: E402
from ltx2ref.parity.trace.probe import processor  # noqa: E402
from ltx2ref.parity.trace.taps import Taps  # noqa: E402
from ltx2ref.parity.truth import ANGLE_ULPS, FLOOR, LUCK, PHASE_ULPS, SHARE, spread  # noqa: E402

PAGE = ROOT / "docs" / "machines.md"
MARKERS = "<!-- machine_table.py: begin -->", "<!-- machine_table.py: end -->"
NATIVE, EXACT = "native", "exact"  # this machine; exact arithmetic, which is none
# Written after the bounds of judge.py and truth.py were chosen, and not looked at until they stood.
HELD_APART = (
    "sums-pairwise",
    "fused-multiply-add",
    "split-sums",
    "blocks-of-8",
    "blocks-of-64",
    "truncated-sums",
    "exp-by-exp2",
    "newton-rsqrt",
    "unshifted-softmax",
    "tanh-by-exp",
)
HARDLY_TOLD = ("one-constant-reduction", "rope-float32-frequencies")  # whose error is hardly larger than the machine's
NOT_FLOAT32 = "tf32"  # whose float32 is another arithmetic, and is to fail
HONEST = ("2.0/121-frames", "2.3/t2v", "2.3/i2v-cross-timestep", "2.3/fractional-self-mask", "2.5/everything")
BY_ID = {case.id: case for case in (*CASES, *MODELS)}
KINDS = {
    "honest": ("verify", "audit"),
    "kit": ("kit",),
    "bug": ("verify", "audit"),
    "kit bug": ("kit",),
    "exact": ("verify", "audit"),
}
PASSED, NOTED, SUSPECTED, FAILED = "passed", "noted", "suspect", "failed"
SAVED_EVERY = 20  # seconds


class Task(NamedTuple):
    kind: str
    machine: str
    dtype: str
    what: str  # a case, or a bug

    @property
    def key(self) -> str:
        return " | ".join(self)


class Found(NamedTuple):
    """Hold one command's verdict, its first tap, and the largest share of a budget, or that tap's."""

    verdict: str
    tap: str | None
    share: float | None


# ---------------------------------------------------------------- one task
class Subject(NamedTuple):
    case: Case
    ours: Any
    inputs: Inputs
    taps: Taps
    theirs: Any


@lru_cache(maxsize=128)
def subject(case_id: str, dtype: str) -> Subject:
    case = BY_ID[case_id]
    ours, inputs = build(case.config, NATIVE_DTYPES[dtype]), cast(case.inputs(), NATIVE_DTYPES[dtype])
    theirs = diffusers.build_diffusers(case.config.to_diffusers(), ours.state_dict(), NATIVE_DTYPES[dtype])
    return Subject(case, ours, inputs, run(ours, inputs), theirs)


def on(name: str) -> Any:
    return nullcontext() if name == NATIVE else exact() if name == EXACT else exact(machine(name))


def done(kit: str, task: Task) -> dict[str, Found]:
    torch.set_num_threads(1)
    work: dict[str, Callable[[Task, str], dict[str, Found]]] = {
        "honest": honest,
        "kit": by_kit,
        "bug": with_bug,
        "kit bug": kit_with_bug,
        "exact": exactly,
    }
    return work[task.kind](task, kit)


def honest(task: Task, kit: str) -> dict[str, Found]:
    s = subject(task.what, task.dtype)
    with on(task.machine):
        ours = run(s.ours, s.inputs)
    with on(task.machine):
        theirs = right(s)
    return {"verify": verified(s.case, task.dtype, ours), "audit": audited(s, theirs, lambda: right(s))}


def with_bug(task: Task, kit: str) -> dict[str, Found]:
    s = subject(diffusers_mutants.SHOWN_IN[task.what], task.dtype)
    with diffusers_mutants.inject(task.what, s.theirs), on(task.machine):  # weights are made before, by no machine
        theirs = right(s)
    spread_out = {name: spread(name, x, s.taps[name]) for name, x in theirs.items() if name in s.taps}
    return {
        "verify": verified(s.case, task.dtype, spread_out),
        "audit": audited(s, theirs, lambda: wrong(s, task.what)),
    }


def right(s: Subject) -> Taps:
    return diffusers.traced(s.theirs, s.inputs)


def wrong(s: Subject, bug: str) -> Taps:
    with diffusers_mutants.inject(bug, s.theirs):
        return diffusers.traced(s.theirs, s.inputs)


def verified(case: Case, dtype: str, taps: Taps) -> Found:
    result = verify.compare_with_record(case, dtype, taps, same_bits=False)
    verdict = FAILED if result.verdict == verify.FAILED else NOTED if result.note else PASSED
    return Found(verdict, result.first if verdict == FAILED else result.note.partition(" ")[0] or None, result.share)


def audited(s: Subject, theirs: Taps, again: Callable[[], Taps]) -> Found:
    """Judge as an audit does: what is suspect is computed again, under exact arithmetic."""
    return reported(audit.cleared(audit.audit_natively(s.ours, s.inputs, theirs), s.ours, s.inputs, again))


def reported(report: Report) -> Found:
    said = verdicts(report)
    shares = {row.name: row.budget for row in report.rows if row.budget is not None}
    most = max(shares, key=lambda name: shares[name], default=None)
    if report.verdict in (DIVERGED, SHAPE, SUSPECT):
        verdict = FAILED if said & {DIVERGED, SHAPE} else SUSPECTED
        return Found(verdict, report.first, shares.get(report.first or ""))
    if most is None or shares[most] <= 1:
        return Found(PASSED, None, shares.get(most or ""))
    return Found(NOTED, most, shares[most])


def by_kit(task: Task, kit: str) -> dict[str, Found]:
    s = subject(task.what, task.dtype)
    with on(task.machine):
        theirs = right(s)
    return {"kit": checked(s, task.dtype, theirs, kit)}


def kit_with_bug(task: Task, kit: str) -> dict[str, Found]:
    """Judge the bug in the first of the kit's models that finds it."""
    found = Found(PASSED, None, None)
    for case in MODELS:
        s = subject(case.id, task.dtype)
        if task.what == "prompt-adaln-unmapped" and not hasattr(s.theirs, "prompt_adaln"):
            continue
        theirs = wrong(s, task.what)
        if any(not torch.equal(s.taps[name], theirs[name]) for name in ("sample", "audio_sample")):
            found = checked(s, task.dtype, theirs, kit)
            if found.verdict == FAILED:
                break
    return {"kit": found}


def checked(s: Subject, dtype: str, theirs: Taps, kit: str) -> Found:
    about = next(x for x in kit_cases(kit) if x["id"] == s.case.id)
    with tempfile.TemporaryDirectory() as results:
        save_file(
            {name: plain(theirs[name]) for name in about["outputs"] if name in theirs},  # but gates left out
            f"{results}/{about['results'][dtype]}",
        )
        return reported(check_results(results, kit).given[0])


@lru_cache
def kit_cases(kit: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads(Path(kit, "kit.json").read_text(encoding="utf-8"))["cases"]
    return cases


def exactly(task: Task, kit: str) -> dict[str, Found]:
    """Judge diffusers, with a bug or as it is, by its digests, and in bfloat16 by an audit, too."""
    bug = task.what if task.what in diffusers_mutants.SHOWN_IN else None
    s = subject(task.what if bug is None else diffusers_mutants.SHOWN_IN[bug], task.dtype)
    with nullcontext() if bug is None else diffusers_mutants.inject(bug, s.theirs), on(EXACT):
        taps = right(s)
    result = verify.compare_exactly(s.case, task.dtype, taps)
    found = {"verify": Found(FAILED if result.differing else PASSED, result.first, None)}
    if task.dtype != "float32":
        found["audit"] = reported(
            audit.audit(candidate(bug), s.case, NATIVE_DTYPES[task.dtype], torch.device("cpu"), arithmetic="exact")
        )
    return found


def candidate(bug: str | None) -> audit.Candidate:
    def taps(setup: audit.Setup) -> Taps:
        model = diffusers.build_diffusers(setup.config.to_diffusers(), setup.state, setup.dtype)
        with nullcontext() if bug is None else diffusers_mutants.inject(bug, model):
            return diffusers.traced(model, setup.inputs)

    return audit.Candidate("diffusers", None, taps)


# ---------------------------------------------------------------- all of them
def all_tasks(machines: Sequence[str], cases: Sequence[str], only: Sequence[str], every_bug: bool) -> list[Task]:
    bugs, kit = [*mutants.FIRST], [case.id for case in MODELS]
    found = []
    for dtype in NATIVE_DTYPES:
        for name in machines:
            found += [Task("honest", name, dtype, case) for case in cases]
            found += [Task("kit", name, dtype, case) for case in kit]
    for dtype in NATIVE_DTYPES if NATIVE in machines else ():
        found += [Task("exact", EXACT, dtype, what) for what in (*cases, *bugs)]
        found += [Task("kit bug", NATIVE, dtype, bug) for bug in bugs]
    for name in sorted(machines, key=lambda name: (name != NATIVE, name not in HELD_APART)):
        found += [
            Task("bug", name, dtype, bug)
            for dtype in NATIVE_DTYPES
            for bug in bugs
            if (name, dtype) != (NOT_FLOAT32, "float32") and (dtype == "float32" or name == NATIVE or every_bug)
        ]
    return [task for task in found if task.kind in only]


Results = dict[str, dict[str, Found]]


def work_off(tasks: list[Task], path: Path, jobs: int) -> Results:
    results = load(path)
    left = [task for task in tasks if task.key not in results]
    if not left:
        return results
    begun = saved = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kit = f"{folder}/kit"
        if any("kit" in task.kind for task in left):
            export(kit)
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(partial(done, kit), task): task for task in left}
            for count, future in enumerate(as_completed(waiting), start=1):
                if (error := future.exception()) is not None:
                    progress(f"{waiting[future].key}: {type(error).__name__}: {error}")
                else:
                    results[waiting[future].key] = future.result()
                now = time.monotonic()
                if now - saved > SAVED_EVERY or count == len(left):
                    saved = now
                    save(path, results)
                    progress(
                        f"{count} of {len(left)}, {(now - begun) / 60:.1f} min, about "
                        f"{(now - begun) / 60 * (len(left) / count - 1):.1f} left"
                    )
    return results


def load(path: Path) -> Results:
    if not path.exists():
        return {}
    said = json.loads(path.read_text(encoding="utf-8"))
    if said["facts"] != facts():
        raise ValueError(f"{path}: results of other bounds, machines, bugs or versions: remove it, or name another one")
    return {key: {command: Found(*x) for command, x in found.items()} for key, found in said["results"].items()}


def save(path: Path, results: Results) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"facts": facts(), "results": results}), encoding="utf-8")
    temporary.replace(path)


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def facts() -> dict[str, str]:
    """Return the facts on which a result depends."""
    return {
        "judged": digest(),
        "torch": torch.__version__,
        "cpu": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def digest() -> str:
    """Return letters that change with the bounds, the machines, the bugs or the cases: then the page's table is old."""
    what = [
        SHARE,
        FLOOR,
        CLEARLY,
        PHASE_ULPS,
        ANGLE_ULPS,
        LUCK,
        ROUND_MORE,
        FAR,
        VERSION,
        [*MACHINES],
        HELD_APART,
        HONEST,
        diffusers_mutants.SHOWN_IN,
        [case.id for case in MODELS],
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- the tables
class Cell(NamedTuple):
    """Count results of correct code, and those of them that did not simply pass."""

    of: int
    failed: int
    suspect: int
    noted: int
    share: float  # the largest

    def __str__(self) -> str:
        more = [f"{n} {word}" for n, word in ((self.suspect, "suspect"), (self.noted, "noted")) if n]
        return f"{self.failed}" + (f" ({', '.join(more)})" if more else "") if self.of else "-"


def cell(results: Results, command: str, name: str, dtype: str) -> Cell:
    found = [
        result[command]
        for kind in ("honest", "kit")
        if command in KINDS[kind]
        for key, result in results.items()
        if key.startswith(f"{kind} | {name} | {dtype} | ")
    ]
    failed, suspect, noted = (sum(x.verdict == verdict for x in found) for verdict in (FAILED, SUSPECTED, NOTED))
    return Cell(len(found), failed, suspect, noted, max((x.share or 0.0 for x in found), default=0.0))


def bugs_found(results: Results, kind: str, command: str, name: str, dtype: str) -> tuple[list[str], int]:
    """Return which of the thirty were missed, and how many were looked for.

    A bug in two halves counts once, and as found if both halves are.
    """
    missed, asked = set(), set()
    for bug, row in mutants.ROWS.items():
        result = results.get(Task(kind, name, dtype, bug).key)
        if result is None or command not in result:
            continue
        asked.add(row)
        found = result[command]
        if found.verdict != FAILED:
            missed.add(row + " (suspect)" * (found.verdict == SUSPECTED))
    return sorted(missed), len(asked)


def count_found(results: Results, kind: str, command: str, name: str, dtype: str) -> str:
    missed, of = bugs_found(results, kind, command, name, dtype)
    return f"{of - len(missed)}" if of else "-"


COMMANDS = ("verify", "audit", "kit")
COLUMNS = [(command, dtype) for command in COMMANDS for dtype in NATIVE_DTYPES]


def tables(results: Results, machines: Sequence[str], command: str) -> str:
    known = [name for name in machines if name not in HELD_APART]
    apart = [name for name in machines if name in HELD_APART]
    lines = [f"By `{command}`: torch {torch.__version__}, {processor()}, judged {digest()}.", ""]
    head = "| machine | " + " | ".join(f"{command}, {dtype}" for command, dtype in COLUMNS) + " | largest share |"
    of = {name: next((cell(results, name, m, "float32").of for m in machines), 0) for name in COMMANDS}
    lines += [
        f"**False alarms**, of {of['verify']} cases by verify and audit, and of {of['kit']} models by the kit. "
        "The largest share of a budget is of float32 and bfloat16.",
        "",
    ]
    for title, names in (("the bounds were chosen on these", known), ("held apart", apart)):
        lines += [head.replace("machine", title), "|---" * (len(COLUMNS) + 2) + "|"]
        lines += [alarms_row(results, name) for name in names]
        if len(names) > 1:
            lines.append(sum_row(results, [name for name in names if name != NOT_FLOAT32]))
        lines.append("")
    lines += [
        "**Bugs found**, of 30.",
        "",
        "| machine | verify, float32 | verify, bfloat16 | audit, float32 | audit, bfloat16 |",
        "|---" * 5 + "|",
    ]
    for name in (*known, *apart):
        lines.append(
            f"| {name} | "
            + " | ".join(
                count_found(results, "bug", command, name, dtype)
                for command in ("verify", "audit")
                for dtype in NATIVE_DTYPES
            )
            + " |"
        )
    lines += ["", *beside(results)]
    return "\n".join([*lines, "", *details(results, machines)])


def alarms_row(results: Results, name: str) -> str:
    cells = [cell(results, command, name, dtype) for command, dtype in COLUMNS]
    most = [
        max((x.share for x, (_, of) in zip(cells, COLUMNS, strict=True) if of == dtype and x.of), default=None)
        for dtype in NATIVE_DTYPES
    ]
    shares = " and ".join("-" if x is None else f"{x:.2f}" for x in most)
    mark = " (its float32 is another arithmetic)" if name == NOT_FLOAT32 else ""
    return f"| {name}{mark} | {' | '.join(map(str, cells))} | {shares} |"


def sum_row(results: Results, names: list[str]) -> str:
    sums = []
    for command, dtype in COLUMNS:
        cells = [cell(results, command, name, dtype) for name in names]
        total = Cell(
            sum(x.of for x in cells),
            sum(x.failed for x in cells),
            sum(x.suspect for x in cells),
            sum(x.noted for x in cells),
            max(x.share for x in cells),
        )
        sums.append(f"**{total}** of {total.of}")
    return f"| all of them{' but tf32' if names[0] not in HELD_APART else ''} | {' | '.join(sums)} | |"


def beside(results: Results) -> list[str]:
    lines = []
    for dtype in NATIVE_DTYPES:
        for command, way in (("verify", "digests"), ("audit", "`audit --arithmetic exact`")):
            missed, of = bugs_found(results, "exact", command, EXACT, dtype)
            right = [
                x[command]
                for key, x in results.items()
                if key.startswith(f"exact | {EXACT} | {dtype} | ")
                and key.rpartition(" | ")[2] in HONEST
                and command in x
            ]
            if of:
                lines.append(
                    f"- under exact arithmetic, by {way}, {dtype}: {of - len(missed)} of {of} bugs found"
                    f"{said(missed)}; diffusers as it is passes in "
                    f"{sum(x.verdict == PASSED for x in right)} of {len(right)} cases"
                )
        missed, of = bugs_found(results, "kit bug", "kit", NATIVE, dtype)
        if of:
            lines.append(
                f"- by the kit's models, natively, {dtype}: {of - len(missed)} of {of} bugs found{said(missed)}"
            )
    named = [
        (key.split(" | ")[3], found["audit"].tap or "")
        for key, found in results.items()
        if key.startswith("bug | ") and found["audit"].verdict == FAILED
    ]
    places = [re.sub(r"^transformer_blocks\.\d+\.", "", tap) in mutants.FIRST[bug][0] for bug, tap in named]
    if places:
        lines.append(
            f"- the audit found a bug {len(places)} times, on all machines, and named a tap where it is made "
            f"{sum(places)} times"
        )
    missed_on: dict[str, list[str]] = {}
    for key, found in results.items():
        kind, name, dtype, bug = key.split(" | ")
        for command, x in found.items() if kind == "bug" else ():
            if x.verdict != FAILED:
                missed_on.setdefault(f"{bug} by {command} in {dtype}", []).append(name)
    return lines + [f"- missed: {what} ({', '.join(names)})" for what, names in sorted(missed_on.items())]


def said(missed: list[str]) -> str:
    return f" (not {', '.join(missed)})" if missed else ""


def details(results: Results, machines: Sequence[str]) -> list[str]:
    """List every false alarm, suspect and note, with those of one machine, command and dtype on one line."""
    groups: dict[tuple[int, str, str, str, str], list[tuple[float, str, str]]] = {}
    for key, found in results.items():
        kind, name, dtype, case = key.split(" | ")
        for command, x in found.items() if kind in ("honest", "kit") and name in machines else ():
            if x.verdict != PASSED and (name, dtype) != (NOT_FLOAT32, "float32"):
                groups.setdefault((machines.index(name), name, command, dtype, x.verdict), []).append(
                    (x.share or 0.0, x.tap or "", case)
                )
    lines = []
    for (_, name, command, dtype, verdict), cases in sorted(groups.items()):
        share, tap, case = max(cases)
        lines.append(
            f"- {name}, {command}, {dtype}: {verdict} in {len(cases)}, most in {case} at `{tap}`, {share:.2f} "
            "of its budget"
        )
    return ["Everything that did not simply pass, but tf32 in float32:", "", *lines] if lines else []


def wrong_results(results: Results) -> int:
    """Count false alarms, and bugs that are missed in float32 or under exact arithmetic."""
    count = 0
    for key, found in results.items():
        kind, name, dtype, what = key.split(" | ")
        for x in found.values():
            if kind in ("honest", "kit") or (kind == EXACT and what in BY_ID):
                count += x.verdict == FAILED and (name, dtype) != (NOT_FLOAT32, "float32")
            elif (name, what) != HARDLY_TOLD:
                count += x.verdict != FAILED and (dtype == "float32" or kind == EXACT)
    return count


def write(text: str) -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    PAGE.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}", encoding="utf-8")


def is_current() -> bool:
    return f"judged {digest()}." in PAGE.read_text(encoding="utf-8")


def chosen(patterns: Iterable[str] | None, there: Sequence[str], option: str) -> list[str]:
    if patterns is None:
        return [*there]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in there):
            raise ValueError(f"{option} {pattern}: no such one; there are {', '.join(there)}")
    return [name for name in there if any(fnmatch(name, pattern) for pattern in patterns)]


def command_line(options: argparse.Namespace) -> str:
    """Return the command that gives these results, without the options that only say how to run it."""
    words = [
        word
        for name in ("machine", "case", "only")
        for value in getattr(options, name) or ()
        for word in (f"--{name}", value)
    ]
    return " ".join(["python", "scripts/machine_table.py", *words, *(["--every-bug"] if options.every_bug else [])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--machine", action="append", metavar="GLOB", help=f"of {NATIVE}, {', '.join(MACHINES)} (default: all)")
    add("--case", action="append", metavar="GLOB", help=f"for false alarms (default: {', '.join(HONEST)})")
    add("--only", action="append", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    add(
        "--every-bug",
        action="store_true",
        help="bugs in bfloat16 on simulated machines, too, which takes half as "
        "long again (default: in float32, and natively in both)",
    )
    add("--results", type=Path, default=Path("machine_table.json"), metavar="FILE", help="(default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    add("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    add("--tabulate", action="store_true", help="run nothing: the table of what is in the file of results")
    add(
        "--check",
        action="store_true",
        help="exit 1 if the page's table is of other machines, bugs or bounds; runs nothing",
    )
    options = parser.parse_args()
    if options.check:
        if not is_current():
            print(
                f"{PAGE.relative_to(ROOT)}: its table was made with other bounds, machines, bugs or cases: run "
                "scripts/machine_table.py --write",
                file=sys.stderr,
            )
        return int(not is_current())
    try:
        machines = chosen(options.machine, [NATIVE, *MACHINES], "--machine")
        cases = [*HONEST] if options.case is None else chosen(options.case, [case.id for case in CASES], "--case")
        tasks = all_tasks(machines, cases, options.only or [*KINDS], options.every_bug)
        results = load(options.results) if options.tabulate else work_off(tasks, options.results, options.jobs)
    except ValueError as error:
        print(f"machine_table.py: {error}", file=sys.stderr)
        return 2
    keys = {task.key for task in tasks}
    results = {key: found for key, found in results.items() if key in keys}
    undone = sorted(key for key in keys if key not in results)
    text = tables(results, machines, command_line(options))
    text += f"\n\n{len(undone)} of {len(keys)} runs were not done, such as {undone[0]}." if undone else ""
    print(text)
    if options.write:
        write(text)
    return int(wrong_results(results) > 0 or bool(undone))


if __name__ == "__main__":
    sys.exit(main())
