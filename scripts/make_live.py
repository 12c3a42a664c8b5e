"""Make docs/live.html, the page that computes the model in the reader's browser, and the table of what its controls do.

    python scripts/make_live.py            exit status 1 if the committed files are not what this makes
    python scripts/make_live.py --write    write docs/live.html and docs/live-controls.md
    python scripts/make_live.py --picture  write docs/live/still-*.webp, the still pictures (needs chromium)

It needs node, and takes some minutes, of which the audits of 25 bugs are most.

The page is made of the files in docs/live/ and of data: the recorded digests of some conformance cases, the arguments
of those cases, shapes at real size, and what `ltx2ref audit` says about each bug. The table compares, for each control,
the taps that change in JavaScript with those that change in Python, both under exact arithmetic.
"""

import argparse
import base64
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ltx2ref import LTX_2_0, LTX_2_3, LTX_2_5, Conventions, LTX2VideoTransformer3DModel, exact, trace
from ltx2ref.describe import blank_inputs, lengths
from ltx2ref.interface import DIFFUSERS
from ltx2ref.parity import record
from ltx2ref.parity.audit import MADE_EXACTLY, Candidate, Setup, audit
from ltx2ref.parity.cases import CASES, LTX_CORE_CASES, Case, Inputs
from ltx2ref.parity.generator import SEED, build, uniform
from ltx2ref.parity.record import EXACT_DTYPES
from ltx2ref.parity.run import cast, run

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "docs" / "live"
PAGE = ROOT / "docs" / "live.html"
TABLE = ROOT / "docs" / "live-controls.md"
SCRIPTS = ("ltx2.js", "bugs.js", "instrument.js", "page.js")
CASE_NAMES = (
    *("2.0/t2v", "2.0/i2v", "2.0/121-frames", "2.3/t2v", "2.3/i2v", "2.3/121-frames", "2.3/text-masks"),
    *("2.3/stg-one-of-batch", "2.3/stg", "2.5/t2v", "2.5/keyframes"),
    *("2.0/ltx-core-everything", "2.3/ltx-core-everything"),
)
BY_NAME = {case.id: case for case in (*CASES, *LTX_CORE_CASES)}
REAL = {"2.0": LTX_2_0, "2.3": LTX_2_3, "2.5": LTX_2_5}


@dataclass(frozen=True)
class Control:
    """Something that a reader can change on the page: a setting in instrument.js, and the same in Python."""

    name: str
    case: str
    dtype: str = "float32"
    bug: str | None = None
    conventions: dict[str, str] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    cross: bool | None = None
    fps: float | None = None

    def setting(self) -> dict[str, Any]:
        """Return the setting as instrument.js takes it."""
        kept = {name: x for name, x in asdict(self).items() if x not in (None, {}) and name != "name"}
        return kept


def text() -> dict[str, Any]:
    """Return the steps, the descriptions of tensors, the bugs and the conventions that the page explains."""
    return tomllib.loads((SOURCES / "text.toml").read_text(encoding="utf-8"))


def controls() -> list[Control]:
    """Return every control of the page."""
    levels = {"timestep": 100.0, "audio_timestep": 100.0, "sigma": 100.0, "audio_sigma": 100.0}
    found = [
        Control(f"`{name}` of the first element to 100", "2.3/t2v", levels={name: x}) for name, x in levels.items()
    ]
    found += [Control(f"`{name}` to 100, image to video", "2.3/i2v", levels={name: 100.0}) for name in levels]
    found += [Control("`use_cross_timestep`", case, cross=True) for case in ("2.3/t2v", "2.3/i2v")]
    found.append(Control("`fps` from 25 to 50", "2.3/t2v", fps=50.0))
    for said in text()["convention"]:
        for value in said["values"]:
            if value["name"] != getattr(BY_NAME[said["case"]].conventions, said["name"]):
                how = {said["name"]: value["name"]}
                found.append(Control(f"`{said['name']}={value['name']}`", said["case"], said["dtype"], conventions=how))
    return found + [Control(f"bug `{bug['name']}`", bug["case"], bug=bug["name"]) for bug in text()["bug"]]


# ---------------------------------------------------------------- in Python
def arguments(control: Control) -> Inputs:
    """Return the arguments of a control's case with what the control changes."""
    inputs = BY_NAME[control.case].inputs()
    sigma = {"timestep": "sigma", "audio_timestep": "audio_sigma"}
    for name, level in control.levels.items():
        x = inputs[name].clone()
        share = x[0] / inputs[sigma[name]][0] if x.ndim > 1 else torch.ones(())
        x[0] = share * level
        inputs[name] = x
    if control.cross is not None:
        inputs["use_cross_timestep"] = control.cross
    if control.fps is not None:
        inputs["fps"] = control.fps
    return inputs


def conventions(control: Control) -> Conventions:
    """Return the conventions of a control's case, with those that the control changes."""
    return replace(BY_NAME[control.case].conventions, **control.conventions)  # type: ignore[arg-type]


def digests(control: Control) -> dict[str, str]:
    """Return the digest of each tap under exact arithmetic."""
    import mutants  # type: ignore[import-not-found]  # in tests/support

    case, dtype = BY_NAME[control.case], EXACT_DTYPES[control.dtype]
    model = build(case.config, dtype, conventions(control), case.scales)
    with mutants.patched(mutants.MUTANTS[control.bug](model) if control.bug else ()), exact():
        taps = run(model, cast(arguments(control), dtype))
    return {name: record.digest(x).hex() for name, x in taps.items()}


def sentence(bug: Mapping[str, str]) -> str:
    """Return what `ltx2ref audit --arithmetic exact` says about a port that has a bug."""
    import mutants

    def port(setup: Setup) -> dict[str, Tensor]:
        model = LTX2VideoTransformer3DModel(setup.config).to(setup.dtype)
        model.load_state_dict(setup.state)
        with mutants.patched(mutants.MUTANTS[bug["name"]](model)):
            return run(model, setup.inputs)

    candidate, case, cpu = Candidate(bug["name"], None, port), BY_NAME[bug["case"]], torch.device("cpu")
    return audit(candidate, case, torch.float32, cpu, arithmetic=MADE_EXACTLY).sentence


# ---------------------------------------------------------------- in JavaScript
def in_javascript(data: dict[str, Any], given: list[Control]) -> list[dict[str, str]]:
    """Return the digest of each tap of each control as node computes it."""
    script = """
      const { computed, digestsOf } = require(process.argv[1]);
      const { data, settings } = JSON.parse(require('fs').readFileSync(0, 'utf8'));
      console.log(JSON.stringify(settings.map((setting) => {
        const conventions = { ...data.diffusers, ...data.cases[setting.case].conventions, ...setting.conventions };
        return Object.fromEntries(digestsOf(computed(data, setting), setting.dtype, conventions));
      })));
    """
    said = json.dumps({"data": data, "settings": [control.setting() for control in given]})
    command = ["node", "-e", script, str(SOURCES / "instrument.js")]
    done = subprocess.run(command, input=said, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"node: {done.stderr}")
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


# ---------------------------------------------------------------- the data of the page
def data_of_the_page() -> dict[str, Any]:
    """Return what the page is given but for what audits say."""
    said = text()
    check_quotes(said["tensor"])
    return {
        "seed": SEED,
        "diffusers": asdict(DIFFUSERS),
        "configs": {release: plain(BY_NAME[f"{release}/t2v"].config) for release in REAL},
        "real": {release: real_shapes(release) for release in REAL},
        "cases": {name: case_data(BY_NAME[name]) for name in CASE_NAMES},
        **said,
    }


def plain(config: Any) -> dict[str, Any]:
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(config).items()}


def case_data(case: Case) -> dict[str, Any]:
    """Return the arguments of a case, and what was recorded of it."""
    recorded = {dtype: record.load_exact(case, dtype) for dtype in EXACT_DTYPES}
    inputs = case.inputs()
    inputs |= inputs.pop("attention_kwargs", None) or {}
    return {
        "release": case.release,
        "change": case.change,
        "conventions": asdict(case.conventions),
        "implementation": recorded["float32"].implementation,
        "inputs": {name: argument(case, name, x) for name, x in inputs.items() if x is not None},
        "taps": list(recorded["float32"].digests),
        "digests": {
            dtype: base64.b64encode(b"".join(found.digests.values())).decode() for dtype, found in recorded.items()
        },
    }


def argument(case: Case, name: str, x: Any) -> Any:
    """Return an argument as JSON: tensors are drawn by the generator where that gives the same numbers."""
    if not isinstance(x, Tensor):
        return x
    about: dict[str, Any] = {"shape": list(x.shape)}
    if x.dtype == torch.bool:
        about["bool"] = True
    drawn = f"{case.id}/{name}"
    if torch.equal(uniform(drawn, tuple(x.shape), seed=case.seed), x):
        return about | {"draw": drawn}
    if name == "video_self_attention_mask":
        halved = (uniform(f"{case.id}/mask", tuple(x.shape), seed=case.seed) * 0.5 + 0.5).clamp(0, 1)
        if torch.equal(halved, x):
            return about | {"draw": f"{case.id}/mask", "halved": True}
    return about | {"values": [number(value) for value in x.flatten().tolist()]}


def number(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


def real_shapes(release: str) -> dict[str, list[int]]:
    """Return the shape of each tap of the real model, for 121 frames of 768 x 512."""
    config = replace(REAL[release], num_layers=1)
    with torch.device("meta"), torch.no_grad():
        model = LTX2VideoTransformer3DModel(config)
        with trace(model) as taps:
            model(**blank_inputs(config, lengths(config, 121, 512, 768), torch.float32))
    return {name: list(x.shape) for name, x in taps.items()}


def check_quotes(tensors: list[dict[str, str]]) -> None:
    """Raise `ValueError` unless each line that is quoted is in one place of the file that is named."""
    for said in tensors:
        lines = (ROOT / "ltx2ref" / said["file"]).read_text(encoding="utf-8").splitlines()
        if (count := sum(said["code"] in line for line in lines)) != 1:
            raise ValueError(f"{said['name']}: expected `{said['code']}` in one line of {said['file']}, found {count}")


# ---------------------------------------------------------------- the page and the table
def page(data: dict[str, Any]) -> str:
    """Return the page, with its styles, scripts and data in it."""
    scripts = [(SOURCES / name).read_text(encoding="utf-8").replace("'use strict';\n", "") for name in SCRIPTS]
    embedded = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    result = (SOURCES / "page.html").read_text(encoding="utf-8")
    for name, value in (
        ("STYLE", (SOURCES / "page.css").read_text(encoding="utf-8")),
        ("DATA", embedded),
        ("SCRIPT", "'use strict';\n" + "\n".join(scripts)),
    ):
        result = result.replace(f"/*{name}*/", value)
    return result


def with_sentences(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data with what an audit says about each bug."""
    return data | {"bug": [bug | {"sentence": sentence(bug)} for bug in data["bug"]]}


class Row(NamedTuple):
    """A control, the taps that it changes in Python, those of its case, and whether JavaScript has the same digests."""

    control: Control
    changed: list[str]
    taps: list[str]
    same: bool


def rows(data: dict[str, Any]) -> list[Row]:
    """Compute each control in both languages."""
    found = []
    given = controls()
    for control, theirs in zip(given, in_javascript(data, given), strict=True):
        recorded = record.load_exact(BY_NAME[control.case], control.dtype).digests
        ours = digests(control)
        changed = [name for name, x in recorded.items() if ours.get(name) != x.hex()]
        found.append(Row(control, changed, list(recorded), ours == {name: theirs.get(name) for name in ours}))
    return found


def table(found: list[Row]) -> str:
    """Return the page with the table of controls."""
    lines = [
        f"| {x.control.name} | {x.control.case}, {x.control.dtype} | `{x.changed[0]}` "
        f"| {len(x.changed)} of {len(x.taps)} | {'equal' if x.same else 'NOT EQUAL'} |"
        for x in found
    ]
    return HEAD.format(equal=sum(x.same for x in found), count=len(found)) + "\n".join(lines) + "\n"


HEAD = """# What the controls of the live page change

*Written by `python scripts/make_live.py --write`; edit the script.*

[The live page](live.html) computes the model in the browser. This table has everything that a reader can change there:
the conformance case in which it is shown, the first tensor that changes, and how many do. Each row was computed twice,
in JavaScript by `docs/live/ltx2.js` under Node.js, and in Python by this package under
[exact arithmetic](arithmetic.md). *Equal* means that all tensors have the same digests: {equal} of {count} rows.

| control | case | first tensor that changes | tensors | JavaScript and Python |
|---|---|---|---|---|
"""


def differing(path: Path, made: str) -> bool:
    """Report whether a committed file is not what this makes, in one line."""
    same = path.exists() and path.read_text(encoding="utf-8") == made
    if not same:
        print(f"{path.relative_to(ROOT)} is not what this makes: python scripts/make_live.py --write")
    return not same


def draw() -> int:
    """Write what the committed page looks like at one of its steps, light and dark."""
    from browser import Browser  # type: ignore[import-not-found]  # in tests/support

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Browser(Path(folder)) as browser:
        browser.size(1280, 720)
        for theme in ("light", "dark"):
            browser.theme(theme)
            browser.open(f"{PAGE.as_uri()}#step=exchange")
            browser.picture(SOURCES / f"still-{theme}.webp", kind="webp", quality=80)
    return 0


def main() -> int:
    """Make both files, and write them or compare them with the committed ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--picture", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    if options.picture:
        return draw()
    torch.set_num_threads(1)
    data = data_of_the_page()
    made = {TABLE: table(rows(data)), PAGE: page(with_sentences(data))}
    if options.write:
        for path, what in made.items():
            path.write_text(what, encoding="utf-8")
        return 0
    return int(sum(differing(path, what) for path, what in made.items()) > 0)


if __name__ == "__main__":
    sys.exit(main())
