"""Print the path of one `audit` through the package: files in the order in which their functions are first called.

    python scripts/audit_path.py                              a port with one wrong weight: all rooms are entered
    python scripts/audit_path.py --candidate diffusers        diffusers, or anything else that `ltx2ref audit` takes
    python scripts/audit_path.py --functions                  and the functions that are first called in each place
    python scripts/audit_path.py --json

A place is a file that is entered: consecutive functions of one file are one place. The room explain/ is one place,
because its files ask one another. Comprehensions and lambdas belong to the function in which they are written. What the
README lists as the model's own files is left out.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import ltx2ref
from ltx2ref.parity.audit import Candidate, Setup, audit, candidate_named, conventions_of, ours
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.run import run
from ltx2ref.parity.trace.probe import threads

PACKAGE = Path(ltx2ref.__file__).parent
# The model: nothing in these files is the audit's.
CORE = {
    f"{name}.py"
    for name in (
        *("config", "sizes", "rope", "embeddings", "modulation", "attention", "block", "model"),
        *("conventions", "inputs", "interface"),
    )
}
WRONG = "transformer_blocks.0.attn1.to_out.0.weight"
ROOM = "parity/explain/"
INNER = re.compile(r"<(lambda|listcomp|dictcomp|setcomp|genexpr)>$")


@dataclass
class Place:
    """A file, and the functions that are first called while the audit is in it."""

    file: str
    functions: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="\n".join((__doc__ or "").split("\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--candidate", metavar="NAME", help="as in `ltx2ref audit`; default: a port with a wrong weight"
    )
    parser.add_argument("--case", default="2.3/t2v", metavar="RELEASE/NAME", help="default: 2.3/t2v")
    parser.add_argument("--functions", action="store_true", help="name the functions of each place")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    candidate = candidate_named(options.candidate) if options.candidate else Candidate("a wrong weight", None, wrong)
    places, sentence = path(candidate, options.case)
    if options.json:
        print(json.dumps({"places": [asdict(place) for place in places], "count": len(places), "report": sentence}))
        return 0
    for i, place in enumerate(places, 1):
        print(f"{i:3}  {place.file}")
        if options.functions:
            print("".join(f"       {name}\n" for name in place.functions), end="")
    print(f"\n{len(places)} places in {len({place.file for place in places})} files\n{options.case}: {sentence}")
    return 0


def wrong(setup: Setup) -> Mapping[str, Any]:
    """Run this model with one weight that is off by a tenth."""
    state = {name: x * 1.1 if name == WRONG else x for name, x in setup.state.items()}
    return run(ours(setup._replace(state=state), conventions_of("ltx2ref")), setup.inputs)


def path(candidate: Candidate, case: str) -> tuple[list[Place], str]:
    """Audit a candidate in a case, and return the places and what the report says."""
    found = next((x for x in CASES if x.id == case), None)
    if found is None:
        raise SystemExit(f"--case {case}: no such case; `ltx2ref verify --list` names them")
    places: list[Place] = []
    with threads(1), watched(lambda file, name: enter(places, file, name)):
        report = audit(candidate, found, torch.float32, torch.device("cpu"))
    return places, report.sentence


def enter(places: list[Place], file: str, function: str) -> None:
    """Note the first call of a function."""
    if file.startswith(ROOM):
        file, function = ROOM, f"{file.removeprefix(ROOM)}: {function}"
    if not places or places[-1].file != file:
        places.append(Place(file))
    places[-1].functions.append(function)


@contextmanager
def watched(first_call: Callable[[str, str], None]) -> Iterator[None]:
    """Call `first_call` with the file and the name of each function of the package outside the model."""
    seen = set()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code in seen:
            return
        seen.add(code)
        file = Path(code.co_filename)
        if file.is_relative_to(PACKAGE) and not INNER.search(code.co_qualname):
            name = file.relative_to(PACKAGE).as_posix()
            if name not in CORE:
                first_call(name, code.co_qualname)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


if __name__ == "__main__":
    sys.exit(main())
