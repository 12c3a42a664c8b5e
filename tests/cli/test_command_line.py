"""What all commands have in common: help without torch, tables that cut nothing, exit statuses, lists of names.

pytest tests/cli/test_command_line.py
"""

import ast
import errno
import json
import os
import pydoc
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from safetensors.torch import load_file, save_file
from tiny import random_model, tiny_config

import ltx2ref
from ltx2ref import cli, save
from ltx2ref.checkpoint.resolve_config import RELEASES
from ltx2ref.cli import command, output
from ltx2ref.cli.output import Column, table_lines
from ltx2ref.kit import cases as kit_cases
from ltx2ref.kit.verdict import LEVELS
from ltx2ref.lazy import LazyModule
from ltx2ref.parity import cases, kernels, record
from ltx2ref.parity.machines import MACHINES
from ltx2ref.parity.report.rows import DIVERGED, MISSING, ROUNDING, SUSPECT, Report
from ltx2ref.parity.verify import FAILED, CaseResult, ExactResult, NativeResult

COMMANDS = [
    "verify",
    "audit",
    "compare",
    "trace",
    "kit export",
    "kit check",
    "inspect",
    "convert",
    "describe",
    "vendor",
]
ROOT = Path(ltx2ref.__file__).parents[1]


def python(code: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | more,
    )


def help_of(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as done:
        cli.main([*words.split(), "--help"])
    assert done.value.code == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------- without torch
def test_help_version_and_errors_of_usage_import_no_torch() -> None:
    code = f"""
import sys, contextlib
import ltx2ref
from ltx2ref import cli
for words in ["--version", "--help", "audit --nonsense", "verify --dtype int8", *[f"{{x}} --help" for x in {COMMANDS}]]:
    with contextlib.suppress(SystemExit):
        cli.main(words.split())
assert cli.main([]) == 2
print([x for x in ("torch", "numpy", "einops", "rich") if x in sys.modules])
"""
    done = python(code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout[-200:] + done.stderr[-500:]


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a folder and a marked float8 file with all that a header can say, a GGUF file and a LoRA with alphas."""
    folder, model = tmp_path_factory.mktemp("inspected"), random_model(tiny_config("2.3"))
    state, fp8, lora = model.state_dict(), folder / "fp8.safetensors", folder / "lora.safetensors"
    save(model, folder / "model")
    writers.write_fp8_new_comfy(fp8, state, model.config)
    layer, (out, channels) = "diffusion_model.proj_out", state["proj_out.weight"].shape
    alpha = torch.tensor(2.0, dtype=torch.bfloat16)
    pair = {f"{layer}.lora_A.weight": torch.ones(4, channels), f"{layer}.lora_B.weight": torch.ones(out, 4)}
    save_file(pair | {f"{layer}.alpha": alpha}, lora)
    if find_spec("gguf"):
        writers.write_gguf(folder / "q.gguf", state, model.config, reshaped="")
    return [folder / "model", *sorted(folder.glob("*.*"))]


def test_checkpoints_are_inspected_without_torch(inspected: list[Path]) -> None:
    code = """
import sys
from ltx2ref import cli
for path in sys.argv[1:]:
    assert cli.main(["inspect", path]) == 0
print([x for x in ("torch", "safetensors") if x in sys.modules])
"""
    done = python(code, *map(str, inspected))
    kinds = [line for line in done.stdout.splitlines() if line.startswith(str(inspected[0].parent))]
    assert [": LoRA" in line for line in kinds] == ["lora" in path.name for path in inspected], done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_thread_waits_for_a_module_that_another_one_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "takes_a_while.py").write_text("import time; begun = 1; time.sleep(0.5); done = 2")
    monkeypatch.syspath_prepend(tmp_path)
    module = LazyModule("takes_a_while")
    with ThreadPoolExecutor() as threads:
        first = threads.submit(lambda: module.done)
        while "takes_a_while" not in sys.modules:
            time.sleep(0.01)
        assert (module.done, first.result()) == (2, 2)


def test_statistics_are_read_without_torch_s_compiler(inspected: list[Path]) -> None:
    code = "import sys; from ltx2ref import cli; cli.main(['inspect', sys.argv[1], '--stats'])"
    done = python(f"{code}; print('torch' in sys.modules, 'sympy' in sys.modules)", str(inspected[0]))
    assert "release 2.3" in done.stdout and done.stdout.endswith("True False\n"), done.stderr


def test_the_literal_names_in_the_helps_are_those_of_the_package() -> None:
    assert (*RELEASES,) == command.RELEASE_NAMES and [*command.DTYPES] == [*record.EXACT_DTYPES]
    assert command.KIT_LEVELS == LEVELS and {case.release for case in cases.CASES} == {*RELEASES}


# ---------------------------------------------------------------- the package's names
def test_each_public_name_is_where_the_table_says_and_where_type_checkers_look() -> None:
    tree = ast.parse(Path(ltx2ref.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom) and node.module]
    seen = {alias.name: f".{node.module}" for node in imports for alias in node.names}
    assert seen == ltx2ref.HOMES and sorted(seen) == sorted(ltx2ref.__all__)
    assert all(getattr(ltx2ref, name) is not None for name in ltx2ref.__all__)


@pytest.mark.parametrize(
    "name",
    ["load", "interop.for_diffusers", "kit.export", "parity.audit.audit", "parity.trace.taps.trace", "vendor.vendor"],
)
def test_a_name_is_reached_from_a_bare_import(name: str) -> None:
    assert python(f"import ltx2ref; ltx2ref.{name}").stderr == ""


def test_unknown_names_are_attribute_errors_and_known_ones_are_listed() -> None:
    with pytest.raises(AttributeError, match="module 'ltx2ref' has no attribute 'nonsense'"):
        ltx2ref.nonsense  # noqa: B018
    assert {*ltx2ref.__all__, "interop", "kit", "__version__"} <= {*dir(ltx2ref)}
    assert "__main__" not in dir(ltx2ref)
    text = pydoc.plain(pydoc.render_doc(ltx2ref))
    assert [name for name in ltx2ref.__all__ if name not in text] == []


# ---------------------------------------------------------------- help
@pytest.mark.parametrize("words", ["", "kit", *COMMANDS])
def test_a_help_has_examples_and_fits_80_columns(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(words, monkeypatch, capsys)
    assert re.search(rf"examples:\n  ltx2ref {words}", text)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert words in ("", "kit") or ("--json" in text and "exit status:" in text)


def test_no_command_prints_help_to_standard_error_and_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["kit"]):
        assert cli.main(words) == 2
        out, error = capsys.readouterr()
        assert not out and "usage: ltx2ref" in error and "examples:" in error


def test_the_version_has_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"ltx2ref {ltx2ref.__version__}\n"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("verify --list", [case.id for case in (*cases.RECORDED, *kernels.KERNELS)]),
        ("verify --list machines", [*MACHINES]),
        ("audit --list", [case.id for case in cases.CASES]),
        ("audit --list --release 2.5", [case.id for case in cases.CASES if case.release == "2.5"]),
        ("trace --list", [case.id for case in cases.RECORDED]),
        ("kit export --list", [case.id for case in (*kit_cases.COMPONENTS, *kit_cases.MODELS)]),
        ("kit check --list", [case.id for case in (*kit_cases.COMPONENTS, *kit_cases.MODELS)]),
    ],
)
def test_list_prints_the_names(words: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 0
    assert capsys.readouterr().out.splitlines() == names and names
    assert cli.main([*words.split(), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == names


@pytest.mark.parametrize("words", ["audit", "kit export", "kit check"])
def test_only_a_list_does_without_the_positional_argument(words: str) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(words.split())
    assert done.value.code == 2


# ---------------------------------------------------------------- tables
NUMBERS = ["18,988,838,144", "1,234,567", "0.00"]


@pytest.mark.parametrize("width", [40, 60, 80, 1000])
def test_a_table_has_every_number_whole_at_any_width(width: int) -> None:
    columns = [Column(f"column {i}", NUMBERS) for i in range(9)]
    lines = table_lines([Column("name", ["a-long-name-of-several-parts", "b", "c"]), *columns], width)
    assert max(map(len, lines)) <= width
    assert sum(line.count(number) for line in lines for number in NUMBERS) == 9 * len(NUMBERS)


def test_a_table_wraps_text_before_it_is_split_and_begins_each_part_with_the_key() -> None:
    columns = [Column("case", ["word " * 9]), Column("n", ["1"]), Column("m", ["2" * 20])]
    columns.append(Column("beside", ["3"], joined=True))
    whole = table_lines(columns, 65)
    assert whole[0].split() == ["case", "n", "m", "beside"] and len(whole) == 3 and max(map(len, whole)) <= 65
    parts = "\n".join(table_lines(columns, 45)).split("\n\n")
    assert [part.splitlines()[0].split() for part in parts] == [["case", "n"], ["case", "m", "beside"]]


def results(name: str) -> list[CaseResult]:
    exact = ExactResult(FAILED, 1234, 12, "sample", 0.1)
    native = NativeResult("within budget", None, 0.12345, 0.0, 0.0, 0.0)
    return [CaseResult("2.3", name, dtype, exact, native) for dtype in command.DTYPES]


@pytest.mark.parametrize("width", [60, 80])
def test_no_command_s_table_cuts_a_cell(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands that print tables are describe, verify, and inspect of a file and of a folder."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.chdir(tmp_path)
    tables: list[list[Column]] = []

    lines: list[str] = []

    def seen(columns: list[Column], *rest: Any) -> list[str]:
        tables.append(columns)
        lines.extend(found := table_lines(columns, *rest))
        return found

    monkeypatch.setattr(output, "table_lines", seen)
    Path("several").mkdir()
    save(random_model(tiny_config("2.3")), "several/a.safetensors", dialect="lightricks")
    shutil.copy("several/a.safetensors", "several/another-one-with-a-long-name.safetensors")
    cli.verify.print_results(results("a-case-with-a-name-that-is-rather-long"))
    for words in ("describe 2.3", "inspect several/a.safetensors", "inspect several"):
        assert cli.main(words.split()) == 0
    printed = capsys.readouterr().out
    assert len(tables) == 5 and "…" not in printed
    for cell in (cell for columns in tables for column in columns for cell in column.cells):
        assert all(word in printed for word in re.split(r"[ -]", cell)), cell
    assert max(map(len, lines)) <= width


# ---------------------------------------------------------------- exit statuses
def test_the_page_has_every_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    documented = {int(x) for x in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert documented == {command.DONE, command.WRONG, command.UNCLEAR, command.RAISED, 129, 130, 141, 143}
    assert (command.HUNG_UP, command.INTERRUPTED, command.BROKEN_PIPE, command.TERMINATED) == (
        128 + signal.SIGHUP,
        128 + signal.SIGINT,
        128 + signal.SIGPIPE,
        128 + signal.SIGTERM,
    )
    text = help_of("", monkeypatch, capsys)
    assert all(re.search(rf"^  {status} +\w", text, re.MULTILINE) for status in documented)


@pytest.mark.parametrize("words", ["--help", "verify --help", "verify --list", "verify --list machines --json"])
def test_a_closed_pipe_is_141_without_a_traceback(words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "ltx2ref", *words.split()],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "there"), "there: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("of a library"), "of a library"),
    ],
)
def test_a_file_that_cannot_be_read_or_written_is_2_in_one_line(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(options: object) -> None:
        raise error

    monkeypatch.setattr(cli.verify, "chosen", refused)
    assert cli.main(["verify", "--list"]) == 2
    assert capsys.readouterr().err == f"ltx2ref: {said}\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full, as Linux has")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_2_in_one_line(unbuffered: str) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ltx2ref", "verify", "--list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
        )
    assert (done.returncode, done.stderr) == (2, "ltx2ref: No space left on device\n")


def test_ctrl_c_is_130_without_a_traceback() -> None:
    code = """
import os, signal, sys
from ltx2ref import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with the signal ignored
cli.verify.chosen = lambda options: os.kill(os.getpid(), signal.SIGINT) or []
sys.exit(cli.main(["verify", "--list"]))
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("verdicts", "impossible", "strict", "partial"),
    [
        ([ROUNDING], {}, 0, 0),
        ([ROUNDING, MISSING], {}, 2, 0),
        ([ROUNDING], {"2.3/t2v": "no"}, 2, 0),
        ([SUSPECT, MISSING], {}, 2, 2),
        ([SUSPECT, DIVERGED], {"2.3/t2v": "no"}, 1, 1),
    ],
)
def test_something_missing_is_2_unless_it_was_left_out_on_purpose(
    verdicts: list[str], impossible: dict[str, str], strict: int, partial: int
) -> None:
    reports = [Report(verdict, "", None, []) for verdict in verdicts]
    assert cli.audit.audit_status(reports, impossible, False) == strict
    assert cli.audit.audit_status(reports, impossible, True) == partial


def test_something_wrong_outweighs_what_is_not_decided() -> None:
    assert [command.worst(x) for x in ([], [0, 0], [0, 2], [2, 1, 0])] == [0, 0, 2, 1]
    assert [command.worst(x) for x in ([3, 0], [2, 3], [3, 1])] == [3, 3, 1], "what is wrong stays wrong"


@pytest.mark.parametrize(
    ("factor", "status", "damaged", "outliers"),
    [(1.0, 0, 0, 0), (float("nan"), 1, 1, 0), (0.0, 2, 1, 0), (100.0, 0, 0, 1), (0.01, 0, 0, 1)],
)
def test_values_that_are_not_finite_are_1_zeros_2_and_outliers_only_a_note(
    factor: float, status: int, damaged: int, outliers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.safetensors"
    model = random_model(tiny_config("2.3", num_layers=3))
    with torch.no_grad():
        model.transformer_blocks[1].attn1.to_q.weight.mul_(factor)
    save(model, file, dialect="lightricks")
    assert cli.main(["inspect", str(file)]) == 0
    assert cli.main(["inspect", str(file), "--stats"]) == status
    printed = capsys.readouterr().out
    assert f"damaged tensors: {damaged}\n" in printed
    assert ("note: outliers, of which healthy checkpoints have some: 1\n" in printed) == bool(outliers)
    assert ("  transformer_blocks.1.attn1.to_q.weight: " in printed) == (damaged + outliers > 0)


def test_a_folder_with_several_checkpoints_has_a_line_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards count as one checkpoint. Files that cannot be read or would not load are named with the reason."""
    folder = tmp_path / "transformer"
    save(random_model(tiny_config("2.3")), folder, max_shard_size=200_000)
    save(random_model(tiny_config("2.0")), folder / "b.safetensors", dialect="lightricks")
    (index,) = [path.name for path in folder.glob("*.index.json")]
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(Path(x["path"]).name, x["kind"]) for x in found] == [
        (index, "transformer"),
        ("b.safetensors", "transformer"),
    ]
    assert found[0]["release"] == "2.3" and found[0]["files"] > 2

    (folder / "cut.safetensors").write_bytes(b"0" * 7)
    assert cli.main(["inspect", str(folder)]) == 2
    assert "cut.safetensors: header: not a safetensors file" in capsys.readouterr().out
    state = load_file(folder / "b.safetensors")
    save_file(dict([*state.items()][1:]), folder / "less.safetensors")
    assert cli.main(["inspect", str(folder)]) == 1
    assert "less.safetensors: " in capsys.readouterr().out


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"x/page\.html: No such file or directory"):
        output.write_page(str(tmp_path / "x" / "page.html"), Report(ROUNDING, "", None, []))
