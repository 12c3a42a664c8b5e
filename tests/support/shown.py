"""What the documents and the helps show: commands, snippets, and a folder with the files that they name."""

import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import numpy_port
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_inputs, random_model
from writers import quantisable_config, write_diffusers, write_fp8_scaled, write_single_file

from ltx2ref import cli
from ltx2ref.kit import cases as kit_cases
from ltx2ref.kit import export
from ltx2ref.kit.verdict import LEVELS
from ltx2ref.parity.trace.inputfile import save_inputs

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "ltx2ref" / "kit" / "README.md"]
SOURCES = [*(ROOT / "ltx2ref").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]
# Words that stand for something of the user's own.
OWN = {
    "PORT": "my_port:run",
    "PATH": "model.safetensors",
    "SRC": "model.safetensors",
    "DST": "written",
    "REFERENCE": "reference.safetensors",
    "CANDIDATE": "port.safetensors",
    "RESULTS": "results",
    "path/to/my_port.py:run": "my_port.py:run",
    "diffusers|lightricks": "diffusers",
    "DTYPE": "float32",
}
# Commands that run elsewhere, and where.
ELSEWHERE = {
    r"ltx2ref verify$": ".ci/run",
    r"python -m (myproject\.)?ltx2": "tests/cli/test_vendor.py",
    r"pip install": ".ci/run",
}


def shown() -> dict[str, str]:
    """Yield each command without its explanation, and the file that shows it."""
    found: dict[str, str] = {}
    for path in DOCUMENTS:
        found |= dict.fromkeys(commands_of(path), path.name)
    for path in SOURCES:
        joined = re.sub(r" \\\\\n +", " ", path.read_text(encoding="utf-8"))  # joins lines that a backslash continues
        lines = re.findall(r"^ {2,4}(\S.*)$", joined, re.MULTILINE)
        found |= dict.fromkeys(map(command, lines), path.name)
    del found[""]
    return found


def commands_of(path: Path) -> list[str]:
    """Return what a document shows in its blocks and between backquotes, in that order."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [command(x) for x in (*lines, *inline)]


def command(line: str) -> str:
    """Return the command on a line, or "" for a line that has none or only mentions one."""
    line = re.split(r" {2,}| #", re.sub(r"\s*\n\s*", " ", line))[0].strip()
    is_one = re.match(r"(\w+=\S+ )?(ltx2ref|python3?|pytest|pip) [-\w./'*{<]", line)
    return line if is_one and not re.fullmatch("ltx2ref (audit|compare|inspect|trace)", line) else ""


def runs_elsewhere(line: str) -> bool:
    return any(re.match(x, line) for x in ELSEWHERE)


def needed_by(line: str) -> list[str]:
    """Return the other implementations without which a command cannot run."""
    return [
        module
        for module, pattern in (
            ("diffusers", r"\baudit .*(PORT|my_port|diffusers|ltx-core( |$))"),
            ("ltx_core", r"\baudit .*ltx-core( |$)"),
        )
        if re.search(pattern, line)
    ]


def write_files(folder: Path) -> None:
    """Write everything that the commands name: a port, checkpoints, traces, a kit and results for it."""
    auditing = (ROOT / "docs" / "auditing.md").read_text(encoding="utf-8")
    code = {x.split("\n", 1)[0]: x for x in re.findall(r"```python\n(.*?)```", auditing, re.DOTALL)}
    (folder / "my_port.py").write_text(code["# my_port.py"], encoding="utf-8")
    write_checkpoints(folder)
    (folder / "myproject").mkdir()
    with pytest.MonkeyPatch.context() as here, small_kit():
        here.chdir(folder)
        assert (
            cli.main(["trace", "--case", "2.3/t2v", "-o", "reference.safetensors", "--truth", "float64.safetensors"])
            == 0
        )
        save_file(load_file("reference.safetensors"), "port.safetensors")
        export.export("kit")
        for level in LEVELS:
            here.setattr(sys, "argv", ["numpy_port.py", "kit", "results", "--level", level])
            numpy_port.main()


def write_checkpoints(folder: Path) -> None:
    config = quantisable_config("2.3")
    state = dict(random_model(config).state_dict())
    write_single_file(folder / "model.safetensors", state, config)
    write_single_file(folder / "ltx-2.3-22b-dev.safetensors", state, config)
    write_fp8_scaled(folder / "ltx-2.3-22b-dev-fp8.safetensors", state, config)
    (folder / "transformer").mkdir()
    write_diffusers(folder / "transformer", state, config)
    save_inputs(folder / "call.safetensors", random_inputs(config))
    rows, columns = state["proj_in.weight"].shape
    save_file(
        {
            "diffusion_model.patchify_proj.lora_A.weight": torch.ones(2, columns),
            "diffusion_model.patchify_proj.lora_B.weight": torch.ones(rows, 2),
        },
        folder / "distilled-lora.safetensors",
    )


def small_kit() -> patch.multiple:  # type: ignore[type-arg]
    return patch.multiple(export, COMPONENTS=kit_cases.COMPONENTS[:3], MODELS=(kit_cases.MANY_FRAMES,))


def arguments_of(line: str) -> list[str]:
    """Return the words of a command after the first, without comments, and with files that exist."""
    return [OWN.get(x, x) for x in shlex.split(line.replace("[", "").replace("]", "").partition(" > ")[0])[1:]]


def expected_status(arguments: list[str]) -> int:
    """Return the exit status to expect: 1 for an audit of the buggy example or of ltx-core, 2 without a GPU."""
    if "cuda" in arguments and not torch.cuda.is_available():
        return 2
    candidates = [x for x in arguments if x in ("my_port:run", "my_port.py:run", "ltx-core")]
    return int(arguments[0] == "audit" and bool(candidates) and "ltx2ref:ltx-core-2026-03" not in arguments)
