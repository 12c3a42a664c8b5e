"""The port in plain JavaScript has diffusers' bits: in the whole kit, and at every tap of every case in three dtypes.

    pytest tests/kit/test_js_port.py

It runs under Node.js, and is skipped where there is none.
"""

import json
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

from ltx2ref.kit.cases import MASKED, MODELS
from ltx2ref.kit.check import check_results
from ltx2ref.kit.export import export
from ltx2ref.kit.verdict import EXACT_LEVEL
from ltx2ref.parity import record
from ltx2ref.parity.cases import CASES, LTX_CORE_CASES, Case
from ltx2ref.parity.generator import build
from ltx2ref.parity.record import EXACT_DTYPES
from ltx2ref.parity.run import cast

ROOT = Path(__file__).parents[2]
RUNNER = ROOT / "scripts" / "js_port.js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node on this machine: apt-get install -y nodejs")
FAST = [next(case for case in CASES if case.id == name) for name in ("2.5/everything", "2.3/text-masks")]
ALL = (*CASES, *LTX_CORE_CASES, *MODELS, MASKED)
# Prints the taps of a model whose digest is not the recorded one, for each case and dtype.
DIFFERING = """
const { load, compute, digest, tapDtype } = require(process.argv[1]);
const said = {};
for (const entry of JSON.parse(require('fs').readFileSync(0, 'utf8'))) {
  const taps = compute(entry, load(entry.file), entry.dtype);
  said[entry.id] = Object.keys(entry.digests).filter(
    (name) => !taps.has(name)
      || digest(taps.get(name), tapDtype(name, entry.dtype, entry.conventions)) !== entry.digests[name]);
}
console.log(JSON.stringify(said));
"""


def node(*arguments: str | Path, said: str = "") -> str:
    assert NODE
    done = subprocess.run([NODE, *map(str, arguments)], input=said, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def entry(case: Case, dtype: str, folder: Path) -> dict[str, Any]:
    """Write the weights and inputs of a case as the kit does, and return what the kit would say about it."""
    inputs = cast(case.inputs(), EXACT_DTYPES[dtype])
    inputs |= inputs.pop("attention_kwargs", None) or {}
    tensors = {f"{dtype}/inputs/{name}": x for name, x in inputs.items() if isinstance(x, Tensor)}
    state = build(case.config, EXACT_DTYPES[dtype], scales=case.scales).state_dict()
    tensors |= {f"{dtype}/weights/{name}": x for name, x in state.items()}
    file = folder / f"{case.release}-{case.name}-{dtype}.safetensors"
    wide = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()}
    save_file({name: x.contiguous().clone() for name, x in wide.items()}, file)
    return {
        "id": f"{case.id} {dtype}",
        "operation": "model",
        "config": case.config.to_diffusers(),
        "conventions": vars(case.conventions),
        "arguments": {name: x for name, x in inputs.items() if x is not None and not isinstance(x, Tensor)},
        "file": str(file),
        "dtype": dtype,
        "digests": {name: x.hex() for name, x in record.load_exact(case, dtype).digests.items()},
    }


def differing(cases: Sequence[Case], folder: Path, dtypes: Iterable[str] = EXACT_DTYPES) -> dict[str, list[str]]:
    entries = [entry(case, dtype, folder) for case in cases for dtype in dtypes]
    said: dict[str, list[str]] = json.loads(node("-e", DIFFERING, RUNNER, said=json.dumps(entries)))
    assert len(said) == len(entries)
    return said


def test_the_port_has_the_recorded_bits_in_three_dtypes(tmp_path: Path) -> None:
    found = differing(FAST, tmp_path)
    assert {name for name, taps in found.items() if taps} == set() and len(found) == 6


def test_a_rounding_that_is_left_out_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "this.each(add, x, this.each(mul, gate, y))"
    source = (ROOT / "docs" / "live" / "ltx2.js").read_text(encoding="utf-8")
    assert source.count(whole) == 1
    (tmp_path / "docs" / "live").mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    changed = source.replace(whole, "this.each((a, b, c) => a + b * c, x, gate, y)")
    (tmp_path / "docs" / "live" / "ltx2.js").write_text(changed, encoding="utf-8")
    monkeypatch.setattr("test_js_port.RUNNER", shutil.copy(RUNNER, tmp_path / "scripts"))
    found = differing(FAST[1:], tmp_path)
    assert found["2.3/text-masks float32"][0] == "transformer_blocks.0.attn2.stream"


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_it_has_them_in_every_recorded_case(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also print how many taps these are."""
    found = differing(ALL, tmp_path, [dtype])
    taps = sum(len(record.load_exact(case, dtype).digests) for case in ALL)
    with capsys.disabled():
        print(f"{taps - sum(map(len, found.values())):,} of {taps:,} taps of {len(found)} runs ", end="")
    assert {name: taps for name, taps in found.items() if taps} == {}


@pytest.mark.slow
def test_it_passes_the_kit_at_the_exact_level(tmp_path: Path) -> None:
    export(tmp_path / "kit")
    node(RUNNER, tmp_path / "kit", tmp_path / "results")
    checked = check_results(tmp_path / "results", tmp_path / "kit", EXACT_LEVEL)
    assert (checked.status, checked.failures) == (0, {}), checked.summary


def test_it_says_how_it_is_run() -> None:
    assert NODE
    done = subprocess.run([NODE, str(RUNNER)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "usage: node scripts/js_port.js KIT RESULTS\n"
