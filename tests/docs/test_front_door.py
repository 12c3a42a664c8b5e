"""Snippets and commands of the README and docs/using.md work for a user: the installed script, nothing on a path.

    pytest tests/docs/test_front_door.py

Each runs in a process of its own, in a folder that has nothing but the files that it names, without PYTHONPATH. The
snippets run from the first on, as a reader does. The lines that install are run by .ci/run.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from shown import DOCUMENTS, ROOT, arguments_of, commands_of, expected_status, needed_by, write_checkpoints, write_files

import ltx2ref

pytestmark = pytest.mark.slow

README, USING = ROOT / "README.md", ROOT / "docs" / "using.md"
SCRIPT = Path(sysconfig.get_path("scripts")) / "ltx2ref"
TEXT = "".join(path.read_text(encoding="utf-8") for path in (USING, README))
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line
    for line in dict.fromkeys(commands_of(README) + commands_of(USING))
    if re.match(r"ltx2ref |python scripts/numpy_port", line)
]
SHORTER = {"verify": ["--case", "2.3/t2v"], "audit": ["--case", "2.3/t2v"]}  # commands that would run all cases

A_PORT = """
from ltx2ref import LTX2VideoTransformer3DModel, TransformerConfig

def MyPort(config, dtype):
    return LTX2VideoTransformer3DModel(TransformerConfig.from_diffusers(config)).to(dtype)

"""
# Makes what the README calls `port` and `inputs`, before the line that compares them.
THEIRS = """
case = next(case for case in ltx2ref.parity.cases.CASES if case.id == "2.3/t2v")
model, inputs = ltx2ref.parity.generator.build(case.config, torch.float32), case.inputs()
port = lambda **inputs: tuple(x * SCALE for x in model(**inputs, return_dict=False))
"""
# Makes what docs/using.md calls a pipeline, before the snippet in which the pipeline gets the model.
PIPELINE = """
import types
pipeline = types.SimpleNamespace()
"""


def as_a_user(*command: str | Path, where: Path, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: x for name, x in os.environ.items() if not name.startswith(("PYTHON", "COVERAGE"))}
    return subprocess.run(
        [str(x) for x in command],
        cwd=where,
        capture_output=True,
        text=True,
        env=kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more,
    )


def python(source: str, where: Path, **more: str) -> subprocess.CompletedProcess[str]:
    (where / "snippet.py").write_text(source, encoding="utf-8")
    return as_a_user(sys.executable, "snippet.py", where=where, **more)


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Require that the installed package is the one that a user gets. Testing any other copy would be useless."""
    done = python("import ltx2ref; print(ltx2ref.__file__)", tmp_path_factory.mktemp("empty"))
    if not SCRIPT.exists() or done.stdout.strip() != ltx2ref.__file__:
        pytest.fail(f"{SCRIPT} is not the script of {Path(ltx2ref.__file__).parent}: pip install -e .")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "numpy_port.py", folder / "scripts")
    return folder


# ---------------------------------------------------------------- commands
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[getattr(pytest.mark, x) for x in needed_by(line)])
        for line in COMMANDS
        if " kit " not in line
    ],
)
def test_a_command_of_the_readme_works_in_a_folder_of_its_own(line: str, files: Path, tmp_path: Path) -> None:
    here = shutil.copytree(files, tmp_path / "here")
    arguments = arguments_of(line)
    if arguments[0] == "convert":
        shutil.rmtree(here / arguments[2])
    if "--case" not in arguments:
        arguments += SHORTER.get(arguments[0], [])
    done = as_a_user(SCRIPT, *arguments, where=here)
    assert done.returncode == expected_status(arguments), done.stdout + done.stderr
    assert done.stdout and "Traceback" not in done.stderr


def test_the_kit_is_written_computed_and_judged_in_an_empty_folder(tmp_path: Path) -> None:
    """All cases on both levels are run by the lines of docs/kit.md in their order, and print what the page quotes."""
    page = (ROOT / "docs" / "kit.md").read_text(encoding="utf-8")
    lines = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0].splitlines()
    lines = [re.split(r" {2,}#", line)[0].strip() for line in lines]
    computed, judged = ["python", "scripts/numpy_port.py", "kit"], ["ltx2ref", "kit", "check"]
    assert [line.split()[:3] for line in lines] == [["ltx2ref", "kit", "export"], computed, judged, computed, judged]
    assert [line for line in COMMANDS if " kit " in line] == lines[:3]  # the README's
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "numpy_port.py", tmp_path / "scripts")
    said = []
    for line in lines:
        program = SCRIPT if line.startswith("ltx2ref") else sys.executable
        done = as_a_user(program, *line.split()[1:], where=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        said += [done.stdout.splitlines()[-1]] if line.split()[:3] == judged else []
    assert re.findall(r"^ltx2ref kit: .*$", page, re.MULTILINE)[:2] == said


def test_all_commands_of_the_readme_are_run_or_known_to_run_elsewhere() -> None:
    names = {line.split()[1] for line in COMMANDS if line.startswith("ltx2ref ")}
    assert names >= {"audit", "convert", "describe", "inspect", "kit", "vendor", "verify"} and len(COMMANDS) >= 9


@pytest.mark.parametrize("name", ["my_port:run", "ports/my_port.py:run"])
def test_a_port_of_ones_own_is_audited_where_it_stands(name: str, tmp_path: Path) -> None:
    """The port is the README's `run`, with a correct model that has two outputs."""
    folder = tmp_path / Path(name).parent
    folder.mkdir(exist_ok=True)
    (source,) = [x for x in BLOCKS if x.startswith("# my_port.py\n")]
    (folder / "my_port.py").write_text(A_PORT.replace("def", "import beside\n\ndef", 1) + source, encoding="utf-8")
    (folder / "beside.py").touch()
    done = as_a_user(SCRIPT, "audit", name, "--case", "2.3/t2v", where=tmp_path)
    assert done.stdout.startswith("2.3/t2v: ") and "identical at all of 2 taps" in done.stdout, done.stderr


def test_the_version_and_a_port_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    done = as_a_user(SCRIPT, "--version", where=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ltx2ref {ltx2ref.__version__}\n", "")
    done = as_a_user(SCRIPT, "audit", "my_port:run", where=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ltx2ref: my_port:run: there is no module my_port in {tmp_path}, nor is one installed\n"


# ---------------------------------------------------------------- Python
SNIPPETS = [block for block in BLOCKS if not block.startswith("# my_port.py\n")]  # those that a reader can run
ASSERTION = re.compile(r"`(ltx2ref\.assert_parity\(model, port, inputs\))`")


def test_there_are_snippets_to_run() -> None:
    assert len(SNIPPETS) >= 3 and len(ASSERTION.findall(TEXT)) == 1


@pytest.mark.diffusers
@pytest.mark.parametrize(("scale", "error"), [("1", ""), ("2", "AssertionError: first divergence at sample")])
def test_the_snippets_of_the_readme_run_in_their_order(scale: str, error: str, tmp_path: Path) -> None:
    """They find files of the names they use. `assert_parity` fails for a port whose outputs are doubled."""
    write_checkpoints(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--Lightricks--LTX-2"  # the state after a download
    shutil.copytree(tmp_path / "transformer", cached / "snapshots" / commit / "transformer")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    snippets = [f"{PIPELINE}\n{block}" if "pipeline.transformer" in block else block for block in SNIPPETS]
    source = "\n".join([*snippets, THEIRS.replace("SCALE", scale), *ASSERTION.findall(TEXT)])
    done = python(source, tmp_path, HF_HUB_CACHE=str(tmp_path / "hub"))
    if error:
        assert done.returncode == 1 and error in done.stderr
    else:
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- names
IMPORT = re.compile(r"from (ltx2ref[\w.]*) import ([\w, ]+)")


def test_a_bare_import_reaches_every_name_that_the_documents_give(tmp_path: Path) -> None:
    text = "\n".join(IMPORT.sub("", path.read_text(encoding="utf-8")) for path in DOCUMENTS)
    names = set(re.findall(r"(?<![\w./-])ltx2ref(?:\.[A-Za-z_]\w*)+", text))
    assert {"ltx2ref.interop.for_diffusers", "ltx2ref.load", "ltx2ref.parity.audit"} <= names and len(names) >= 30
    done = python(
        f"""
import ltx2ref
from operator import attrgetter
for name in {sorted(names)}:
    try:
        attrgetter(name.removeprefix("ltx2ref."))(ltx2ref)
    except AttributeError as error:
        print(f"{{name}}: {{error}}")
""",
        tmp_path,
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_every_import_that_the_documents_show_works() -> None:
    found = {x for path in DOCUMENTS for x in IMPORT.findall(path.read_text(encoding="utf-8"))}
    assert len(found) >= 10
    for module, names in found:
        if module == "ltx2ref.parity.oracles.diffusers" and importlib.util.find_spec("diffusers") is None:
            continue
        for name in re.findall(r"\w+", names):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
