"""Write ltx2ref/selftest.json: inputs of three conformance cases, and digests of what diffusers returned for them.

    python scripts/make_selftest.py            write it
    python scripts/make_selftest.py --check    exit with 1 if it is not what the recordings say

The digests are those of the recordings under exact arithmetic (ltx2ref/parity/reference/exact): nothing of this package
is run. Between them the three cases have most of what a model can be asked for, so that little of it can change unseen.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx2ref.parity.arithmetic import VERSION
from ltx2ref.parity.cases import CASES, Case
from ltx2ref.parity.record import NATIVE_DTYPES, load_exact
from ltx2ref.parity.run import cast

PATH = Path(__file__).parent.parent / "ltx2ref" / "selftest.json"
CHOSEN = ("2.0/text-masks", "2.3/no-prompt-adaln", "2.5/everything")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args(arguments).check:
        same = PATH.is_file() and PATH.read_text(encoding="utf-8") == document()
        print(f"{PATH.name}: {'as recorded' if same else 'not what the recordings say: run scripts/make_selftest.py'}")
        return 0 if same else 1
    PATH.write_text(document(), encoding="utf-8")
    return 0


def document() -> str:
    """Return the JSON text, with one line for each input and each digest."""
    cases = [case for case in CASES if case.id in CHOSEN]
    records = {case.id: {dtype: load_exact(case, dtype) for dtype in NATIVE_DTYPES} for case in cases}
    (implementation,) = {record.implementation for found in records.values() for record in found.values()}
    written = {
        "implementation": implementation,
        "arithmetic": VERSION,
        "cases": {
            case.id: {
                "config": case.config.to_diffusers(),
                "inputs": inputs(case),
                "digests": {
                    dtype: {name: record.digests[name].hex() for name in case.outputs}
                    for dtype, record in records[case.id].items()
                },
            }
            for case in cases
        },
    }
    return "\n".join(lines(written, 4)) + "\n"


def inputs(case: Case) -> dict[str, Any]:
    given, narrow = case.inputs(), cast(case.inputs(), torch.bfloat16)
    return {name: described(case, name, x, narrow[name]) for name, x in given.items()}


def described(case: Case, name: str, x: Any, narrow: Any) -> Any:
    """Say what an input is: a tensor by its name if it is generated from that, else by its elements."""
    if isinstance(x, dict):
        return {key: described(case, key, value, narrow[key]) for key, value in x.items()}
    if not isinstance(x, Tensor):
        return x
    dtype = str(x.dtype).removeprefix("torch.") if narrow.dtype == x.dtype else "the model's"
    is_drawn = torch.equal(x.double(), case.draw(name, *x.shape).double())
    numbers = {"name": f"{case.id}/{name}", "seed": case.seed} if is_drawn else {"elements": elements(x)}
    return {"dtype": dtype, "shape": list(x.shape), **numbers}


def elements(x: Tensor) -> list[Any]:
    """Return the elements in the fewest digits that tell them from their neighbours in float32."""
    numbers = [json.loads(str(n)) for n in x.flatten().numpy()]
    assert torch.equal(torch.tensor(numbers, dtype=x.dtype), x.flatten())
    return numbers


def lines(value: Any, depth: int, indent: str = "") -> list[str]:
    """Write dicts down to a depth with one line for each key, and what is in them on that line."""
    if not isinstance(value, dict) or depth == 0 or "shape" in value:
        return [json.dumps(value)]
    found = ["{"]
    for key, x in value.items():
        first, *rest = lines(x, 0 if key == "config" else depth - 1, indent + " ")
        found += [f"{indent} {json.dumps(key)}: {first}", *rest]
        found[-1] += ","
    found[-1] = found[-1][:-1]
    return [*found, f"{indent}}}"]


if __name__ == "__main__":
    sys.exit(main())
