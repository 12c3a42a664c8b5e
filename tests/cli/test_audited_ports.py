"""Whatever a port does, the audit ends with one line for each case, the right exit status, and its own results.

pytest tests/cli/test_audited_ports.py
"""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig, Unsupported, cli
from ltx2ref.parity import audit, cases, guard
from ltx2ref.parity.cases import Case

ONE, TWO = Case("2.3", "one", {"num_layers": 1}), Case("2.3", "two", {"num_layers": 1}, grid=(2, 3, 4))
PORT = SimpleNamespace()  # what the port below does in the second case, and whether it is right in the first


@pytest.fixture(autouse=True)
def two_small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "CASES", [ONE, TWO])
    monkeypatch.setattr(PORT, "second", outputs, raising=False)
    monkeypatch.setattr(PORT, "first", outputs, raising=False)


def outputs(config: Any, state: Any, inputs: Any, dtype: Any) -> tuple[Tensor, Tensor]:
    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(TransformerConfig.from_diffusers(config))
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        video, audio = model.to(dtype)(**inputs)
    return video, audio


def run(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
    """Run the port that the tests audit."""
    return (PORT.second if inputs["height"] == TWO.grid[1] else PORT.first)(config, state, inputs, dtype)


def audited(capsys: Any, *more: str, port: str = "run") -> tuple[int, str, str]:
    status = cli.main(["audit", f"{__name__}:{port}", *more])
    return status, *capsys.readouterr()


# ---------------------------------------------------------------- what a port raises, or returns
class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Meta:
    sample: ClassVar[Tensor] = torch.empty(2, 3, 4, device="meta")
    audio_sample: ClassVar[Tensor] = torch.empty(2, 3, 4, device="meta")


def throws(error: BaseException | type[BaseException]) -> Callable[..., Any]:
    def throw(*_: Any) -> Any:
        raise error

    return throw


def endless(*given: Any) -> Any:
    return endless(*given)


def broken_import(*_: Any) -> Any:
    compile("def f(:\n", "later.py", "exec")


def wrong_checkpoint(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
    torch.nn.Linear(2, 3).load_state_dict(state)


HERE = r"test_audited_ports\.py:\d+"
PAIR = "the returned outputs: expected two floating-point tensors, video and audio, got"
# For each thing that a port does: the line on it, and the exit status if the other case is right.
KINDS: dict[str, tuple[Callable[..., Any], str, int]] = {
    "KeyError": (throws(KeyError("x")), f"the port raised KeyError at {HERE}: 'x'", 3),
    "ValueError": (throws(ValueError("a bug")), f"the port raised ValueError at {HERE}: a bug", 3),
    "RuntimeError": (
        wrong_checkpoint,
        rf"the port raised RuntimeError at {HERE}: Error\(s\) in loading state_dict for Linear: Missing key.* \.\.\.",
        3,
    ),
    "NotImplementedError": (throws(NotImplementedError), f"the port raised NotImplementedError at {HERE}", 3),
    "several lines": (throws(TypeError("one\n\n  two")), f"the port raised TypeError at {HERE}: one two", 3),
    "no text": (throws(Mute()), rf"the port raised Mute at {HERE}: \(its text raised RuntimeError\)", 3),
    "SyntaxError": (broken_import, r"the port raised SyntaxError at later\.py:1: invalid syntax", 3),
    "RecursionError": (endless, f"the port raised RecursionError at {HERE}: maximum recursion depth.*", 3),
    "MemoryError": (throws(MemoryError()), f"the port ran out of memory at {HERE}", 3),
    "a GPU's memory": (throws(torch.OutOfMemoryError("CUDA")), f"the port ran out of memory at {HERE}: CUDA", 3),
    "a processor's memory": (lambda *_: torch.zeros(2**45), f"the port ran out of memory at {HERE}: .*", 3),
    "SystemExit": (throws(SystemExit(0)), f"the port raised SystemExit at {HERE}: 0", 3),
    "GeneratorExit": (throws(GeneratorExit()), f"the port raised GeneratorExit at {HERE}", 3),
    "None": (lambda *_: None, f"{PAIR} None", 3),
    "one tensor": (lambda *_: torch.zeros(2, 3, 4), rf"{PAIR} a tensor of float32 \(2, 3, 4\)", 3),
    "text": (lambda *_: ("a", "b"), rf"{PAIR} tuple \(str, str\)", 3),
    "integers": (
        lambda *_: {"sample": torch.arange(3)},
        "sample: expected a floating-point tensor, got .* int64 .*",
        3,
    ),
    "no numbers": (lambda *_: Meta, "sample: expected a floating-point tensor, got a tensor of float32 .*", 3),
    "complex": (lambda *_: {"sample": torch.zeros(2, dtype=torch.cfloat)}, "sample: expected .* complex64 .*", 3),
    "sparse": (lambda *_: {"sample": torch.eye(2).to_sparse()}, "sample: expected a floating-point tensor.*", 3),
    "a cyclic list": (lambda *_: {"sample": [[1.0], [1.0, 2.0]]}, "sample: expected .*, got list", 3),
    "foreign names": (
        lambda *given: dict(zip(("video", "audio"), outputs(*given), strict=True)),
        "nothing in common: expected taps or outputs by our names, got video, audio; you gave `video`: did you mean "
        r"`sample`\?; you gave `audio`: did you mean `audio_sample`\?",
        2,
    ),
    "nothing": (lambda *_: {}, "nothing in common: expected taps or outputs by our names, got nothing", 2),
}


@pytest.fixture(scope="module")
def all_kinds() -> tuple[int, dict[str, Any], str]:
    """Audit one port that is right in the first case, and then does each of these things in a case of its own."""
    kinds = iter([outputs, *(does for does, _, _ in KINDS.values()), outputs])
    names = ["one", *KINDS, "last"]
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
        patch.setattr(cases, "CASES", [replace(ONE, name=name) for name in names])
        patch.setattr(PORT, "first", lambda *given: next(kinds)(*given), raising=False)
        status = cli.main(["audit", f"{__name__}:run", "--json"])
    return status, json.loads(out.getvalue()), error.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_port_does_in_one_case_is_one_line(kind: str, all_kinds: tuple[int, dict[str, Any], str]) -> None:
    _, line, status = KINDS[kind]
    failure = all_kinds[1]["failures"][f"2.3/{kind}"]
    assert re.fullmatch(line, failure["said"]) and failure["status"] == status and failure["said"].isprintable()
    raised = re.match("the port raised (.*?) at (.*?)(:? |$)", failure["said"])
    if raised:
        assert failure["exception"] == raised[1] and failure["traceback"].startswith(
            "Traceback (most recent call last)"
        )
        assert failure["at"].split(":")[0] in ("later.py", "test_audited_ports.py")


def test_what_a_port_does_in_one_case_takes_nothing_from_the_others(all_kinds: tuple[int, dict[str, Any], str]) -> None:
    status, found, error = all_kinds
    assert (status, error) == (3, "") and found["failures"].keys() == {f"2.3/{kind}" for kind in KINDS}
    assert [(name, x["verdict"]) for name, x in found["reports"].items()] == [
        ("2.3/one", "identical"),
        ("2.3/last", "identical"),
    ]
    assert found["not_expressible"] == {} and found["interrupted"] is None


def test_the_lines_are_printed_in_text_and_keep_the_terminal_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PORT, "second", throws(OSError("\x1b[31m\x07red\u202e")))
    code, out, _ = audited(capsys)
    first, *_, last = out.splitlines()
    assert code == 3 and first.startswith("2.3/one: identical: identical at all of 2 taps")
    assert last.startswith("2.3/two: failed: the port raised OSError at test_audited_ports.py:")
    assert last.endswith(r"\x1b[31m\x07red\u202e")


def test_a_case_that_a_port_cannot_express_is_2_and_with_partial_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PORT, "second", throws(Unsupported("no height of 3")))
    code, out, _ = audited(capsys)
    assert code == 2 and out.splitlines()[-1] == "2.3/two: not compared: no height of 3"
    assert audited(capsys, "--partial")[0] == 0
    code, out, error = audited(capsys, "--case", "2.3/two")
    assert (code, out, error) == (2, "", "ltx2ref: nothing was compared: no height of 3\n")


def test_what_diverges_in_one_case_is_1_whatever_another_one_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PORT, "first", lambda *given: tuple(2 * x for x in outputs(*given)))
    monkeypatch.setattr(PORT, "second", throws(KeyError("x")))
    code, out, _ = audited(capsys)
    assert code == 1 and "2.3/one: diverged" in out and "2.3/two: failed: the port raised KeyError" in out
    monkeypatch.setattr(PORT, "first", throws(KeyError("x")))
    assert audited(capsys)[0] == 3


def test_an_interruption_keeps_what_was_compared_and_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "CASES", [ONE, TWO, Case("2.3", "three", {"num_layers": 1})])
    monkeypatch.setattr(PORT, "second", throws(KeyboardInterrupt()))
    code, out, _ = audited(capsys, "--json")
    found = json.loads(out)
    assert code == 130 and found["interrupted"] == "2.3/two" and [*found["reports"]] == ["2.3/one"]
    code, out, _ = audited(capsys)
    assert code == 130 and out.splitlines()[-1].startswith("2.3/two: interrupted")


def test_a_mistake_of_the_audit_itself_is_said_to_be_one_and_takes_no_other_case_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = audit.compared

    def judge(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        if inputs["height"] == TWO.grid[1]:
            raise IndexError("of a judge")
        return compared(model, inputs, *rest, **more)

    monkeypatch.setattr(audit, "compared", judge)
    code, out, _ = audited(capsys)
    assert code == 2 and "2.3/two: not compared: ltx2ref itself raised IndexError at test_audited_ports.py:" in out
    assert out.startswith("2.3/one: identical")


# ---------------------------------------------------------------- what a port prints, changes, or leaves behind
def chatty(*given: Any) -> Any:
    print("by print")
    os.write(1, b"by a descriptor\n")
    subprocess.run([sys.executable, "-c", "print('by a process')"], check=True)
    return outputs(*given)


def test_what_a_port_prints_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PORT, "second", chatty)
    code, out, error = audited(capfd, "--json", "--case", "2.3/two")
    assert code == 0 and json.loads(out)["reports"]["2.3/two"]["verdict"] == "identical"
    assert all(f"by {how}\n" in error for how in ("print", "a descriptor", "a process"))


def test_a_port_that_writes_to_its_inputs_and_weights_is_told_so_and_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def careless(config: Any, state: Any, inputs: Any, dtype: Any) -> Any:
        found = outputs(config, state, inputs, dtype)
        for x in (inputs["hidden_states"], inputs["timestep"], *state.values()):
            x.zero_()
        inputs.clear()
        config.clear()
        return found

    monkeypatch.setattr(PORT, "second", careless)
    code, out, _ = audited(capsys, "--case", "2.3/two")
    assert code == 0 and out.startswith("2.3/two: identical: ")
    for name in ("hidden_states", "timestep"):
        assert f"  the port changed its input `{name}` in place\n" in out


def unruly(*given: Any) -> Any:
    """Change what is global in torch, and leave it so."""
    found = outputs(*given)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.set_autocast_enabled("cpu", True)
    torch.backends.cuda.enable_flash_sdp(False)
    return found


@pytest.mark.parametrize("arithmetic", ["native", "exact"])
def test_settings_of_torch_are_put_back(
    arithmetic: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = guard.settings()
    monkeypatch.setattr(PORT, "first", unruly)
    code, out, _ = audited(capsys, "--json", "--arithmetic", arithmetic)
    assert code == 0 and {x["verdict"] for x in json.loads(out)["reports"].values()} == {"identical"}
    assert guard.settings() == before


def test_settings_that_a_port_makes_when_it_is_imported_are_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = guard.settings()
    (tmp_path / "wide_port.py").write_text(
        f"import torch\nfrom {__name__} import outputs\ntorch.set_default_dtype(torch.float64)\n"
        "def run(config, state, inputs, dtype):\n"
        "    assert torch.zeros(1).dtype == torch.float64\n    return outputs(config, state, inputs, dtype)\n"
    )
    assert cli.main(["audit", f"{tmp_path}/wide_port.py:run"]) == 0
    del sys.modules["wide_port"]
    assert guard.settings() == before and "identical" in capsys.readouterr().out


def test_a_port_that_changes_the_reference_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def patching(*given: Any) -> Any:
        found = outputs(*given)
        gelu = torch.nn.functional.gelu
        monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, **more: gelu(x, **more) + 1)
        return found

    monkeypatch.setattr(PORT, "second", patching)
    code, out, _ = audited(capsys, "--case", "2.3/two")
    assert code == 2 and "inconclusive: the candidate changed the reference's results" in out


# ---------------------------------------------------------------- options
def test_a_page_is_refused_before_anything_runs_where_there_is_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PORT, "first", lambda *_: pytest.fail("it ran"))
    for page, said in (
        (tmp_path / "none" / "a.html", f"there is no folder {tmp_path}/none"),
        (tmp_path, "this is a folder"),
    ):
        code, out, error = audited(capsys, "--html", str(page))
        assert (code, out, error) == (2, "", f"ltx2ref: --html {page}: {said}\n")


def test_results_are_printed_though_a_page_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page stands in the folder where the command was called, wherever the port goes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(PORT, "second", lambda *given: (os.chdir("/"), outputs(*given))[1])
    assert audited(capsys, "--html", "page.html")[0] == 0 and (tmp_path / "page.html").is_file()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PORT, "second", lambda *given: ((tmp_path / "gone").rmdir(), outputs(*given))[1])
    code, out, error = audited(capsys, "--html", "gone/page.html")
    assert code == 2 and out.count("identical") == 4 and error.startswith("ltx2ref: --html ") and error.count("\n") == 1


def test_a_list_of_no_cases_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--list"], ["diffusers"]):
        assert cli.main(["audit", *words, "--case", "9.9/*", "--release", "2.3"]) == 2
        out, error = capsys.readouterr()
        assert not out and error.startswith("ltx2ref: --case 9.9/*: no such case of release 2.3")


def test_names_are_translated_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def foreign(*given: Any) -> Any:
        video, audio = outputs(*given)
        return {"velocity.video": video, "velocity.audio": audio, "layers.0.x": video}

    monkeypatch.setattr(PORT, "first", foreign)
    monkeypatch.setattr(PORT, "second", foreign)
    names = tmp_path / "names.json"
    names.write_text('{"velocity.video": "sample", "velocity.*": "*_sample", "never": "proj_in"}')
    code, out, _ = audited(capsys, "--names", str(names))
    assert code == 0 and "the candidate has 1 taps that the reference lacks: layers.0.x" in out
    names.write_text('{"velocity.video": "sample", "velocity.aud*": "samp*"}')
    assert "names: both" not in audited(capsys, "--names", str(names))[1]
    names.write_text('{"velocity.video": "sample", "velocity.audio": "sample"}')
    code, out, error = audited(capsys, "--names", str(names))
    assert code == 2 and not out and error.endswith("names.json: several names would become sample\n")
    for text, said in (("[1]", "expected a JSON object"), ('{"a": 1}', "expected a JSON object"), ("{", "not JSON")):
        names.write_text(text)
        code, out, error = audited(capsys, "--names", str(names))
        assert (
            code == 2 and not out and error.startswith(f"ltx2ref: --names {names}: {said}") and error.count("\n") == 1
        )
    assert "No such file" in audited(capsys, "--names", str(tmp_path / "none.json"))[2]
