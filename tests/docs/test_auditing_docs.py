"""docs/auditing.md: its code runs, the commands print what it says they do, and its table of taps has all of them.

pytest tests/docs/test_auditing_docs.py
"""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ltx2ref import cli
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.generator import build
from ltx2ref.parity.report import rows as report
from ltx2ref.parity.run import run
from ltx2ref.parity.trace import taps
from ltx2ref.parity.trace.inputfile import load_inputs
from ltx2ref.parity.truth import FLOOR, SHARE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOC = (ROOT / "docs" / "auditing.md").read_text(encoding="utf-8")
CODE = {
    source.split("\n", 1)[0].removeprefix("# "): source for source in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
}
CONSOLE = [block.splitlines() for block in re.findall(r"```console\n(.*?)```", DOC, re.DOTALL)]
CASE = next(case for case in CASES if case.id == "2.3/t2v")
BUG = "timestep / 1000"


def port(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, repaired: bool = False) -> None:
    """Write the port of the example as a module."""
    source = CODE["my_port.py"]
    assert source.count(BUG) == 1
    (folder / f"{name}.py").write_text(source.replace(BUG, "timestep") if repaired else source, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(importlib.sys.modules, name, raising=False)
    importlib.invalidate_caches()


@pytest.mark.diffusers
@pytest.mark.parametrize(("repaired", "console"), [(False, CONSOLE[0]), (True, CONSOLE[1])])
def test_the_example_prints_what_is_pasted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    repaired: bool,
    console: list[str],
) -> None:
    port(tmp_path, monkeypatch, "my_port", repaired)
    command, pasted, status = console[0], console[1:-2], console[-1]
    assert command.startswith("$ ltx2ref audit my_port:run") and console[-2] == "$ echo $?"
    assert cli.main(command.split()[2:]) == int(status)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == pasted[0]
    # Numbers depend on the machine. The taps that are listed, and their verdicts, do not.
    assert [said(line) for line in printed] == [said(line) for line in pasted]


def said(line: str) -> str:
    return line.partition(", relative")[0].partition(" (")[0]


def test_the_readme_quotes_the_same_sentence() -> None:
    assert CONSOLE[0][1] in " ".join(README.split())


def test_the_readme_s_port_needs_no_more_than_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the README's code with a model that is right and with one that is wrong."""
    (source,) = re.findall(r"```python\n(# my_port.py\n.*?)```", README, re.DOTALL)
    (tmp_path / "readme_port.py").write_text(
        "from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig\n\n"
        "def MyPort(config, dtype):\n"
        "    return LTX2VideoTransformer3DModel(TransformerConfig.from_diffusers(config)).to(dtype)\n\n" + source
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert cli.main(["audit", "readme_port:run", "--case", "2.3/t2v"]) == 0
    assert "identical at all of 2 taps" in capsys.readouterr().out
    import readme_port  # type: ignore[import-not-found]

    right = readme_port.run
    monkeypatch.setattr(
        readme_port,
        "run",
        lambda config, state, inputs, dtype: right(
            config, state, inputs | {"timestep": inputs["timestep"] / 1000}, dtype
        ),
    )
    assert cli.main(["audit", "readme_port:run", "--case", "2.3/t2v"]) == 1


@pytest.mark.parametrize(("names", "status"), [(("proj_in", "sample", "audio_sample"), 0), (("proj_in", "sample"), 2)])
def test_a_file_of_some_taps_is_at_best_inconclusive_without_an_output(
    names: tuple[str, ...], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(build(CASE.config, torch.float32), CASE.inputs())
    file = str(tmp_path / "port.safetensors")
    save_file({name: found[name].contiguous() for name in names}, file)
    assert cli.main(["audit", file, "--case", CASE.id]) == status
    assert f"identical at all of {len(names)} taps" in capsys.readouterr().out


def test_the_truth_of_the_docs_gives_compare_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (command,) = [line for line in DOC.splitlines() if line.startswith("ltx2ref trace") and "--truth" in line]
    assert cli.main(command.split()[1:]) == 0
    port = load_file("reference.safetensors")
    port["sample"] = port["sample"] * 1.0001
    save_file(port, "port.safetensors")
    assert cli.main(["compare", "reference.safetensors", "port.safetensors"]) == 2
    assert cli.main(["compare", "reference.safetensors", "port.safetensors", "--truth", "float64.safetensors"]) == 1
    assert "first divergence at sample (diverged)" in capsys.readouterr().out


def test_the_layout_of_the_docs_renames_a_ready_one() -> None:
    names: dict[str, Any] = {}
    exec(CODE["my_layout.py"], names)
    layers = nn.ModuleDict({"self_attn": nn.ModuleDict({"o_proj": nn.Linear(1, 1)}), "input_norm": nn.Identity()})
    module = nn.ModuleDict({"layers": nn.ModuleList([layers])})
    for ours, theirs in {"attn1.to_out.0": "self_attn.o_proj", "attn1.stream": "input_norm"}.items():
        found = names["LAYOUT"].find(module, f"transformer_blocks.0.{ours}")
        assert found is not None and found.value is layers.get_submodule(theirs)


def test_the_hook_of_the_docs_writes_a_call_that_an_audit_reads(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(CODE["dump.py"], names)
    model = build(CASE.config, torch.float32)
    hook = names["dump"](model, tmp_path / "call.safetensors")
    with torch.no_grad():
        model(**CASE.inputs(), attention_kwargs=None, return_dict=False)
    hook.remove()
    found = load_inputs(tmp_path / "call.safetensors")
    assert found.keys() == CASE.inputs().keys() and torch.equal(found["sigma"], CASE.inputs()["sigma"])


@pytest.mark.diffusers
def test_the_example_in_a_test_fails_with_the_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port(tmp_path, monkeypatch, "my_port")
    names: dict[str, object] = {}
    exec(CODE["test_port.py"], names)
    with pytest.raises(AssertionError, match=re.escape(CONSOLE[0][1].removeprefix("2.3/t2v: diverged: "))):
        names["test_my_port"]()  # type: ignore[operator]


def test_the_table_has_the_taps_that_the_tracer_has_and_its_docstring_names() -> None:
    section = DOC.partition("\n## Taps\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)} - {"transformer_blocks.0."}
    real = {
        part
        for case in CASES
        if case.name in ("t2v", "no-prompt-adaln")
        for name in run(build(case.config, torch.float32), case.inputs())
        for part in parts(name)
    }
    assert listed == real
    layers = set(taps.ADALN_LAYERS)  # "X" in the docstring
    spoken = taps.__doc__ or ""
    for name in listed - layers:
        assert re.search(rf"(\bX|(?<!\w)){re.escape(name)}(?!\w)", spoken), name


def parts(tap: str) -> list[str]:
    """Split a name as the table does, into a place and the quantity at that place."""
    if tap.endswith("_out.input") or "." not in tap:
        return [tap]
    place, _, what = tap.rpartition(".")
    block = re.fullmatch(r"transformer_blocks\.\d+(?:\.(\w+))?", place)
    if block and block[1] is None:
        return [what]
    return [block[1] if block else place, f".{what}"]


def test_the_verdicts_and_their_numbers_are_the_code_s() -> None:
    table = DOC.partition("\n## Verdicts\n")[2]
    assert set(re.findall(r"^\| (\w+) \| ", table, re.MULTILINE)) >= set(report.VERDICTS)
    assert f"budget = {SHARE} * |reference - truth| + 4 * 2^-23 * |truth|" in DOC
    assert FLOOR == 4 * 2**-23
    for name, bound in (("float32", "3.5e-4"), ("bfloat16", "0.088")):
        assert float(bound) == pytest.approx(torch.finfo(getattr(torch, name)).eps ** 0.5, rel=0.02)
        assert f"{name}{'' if name == 'bfloat16' else ':'}" in DOC and bound in DOC
