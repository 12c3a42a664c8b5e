"""Write one stage of a port that is wrong to a folder, with a script that fails until the port is mended.

A stage is everything between one tap and the taps before it. It starts from the port's own numbers, so that no other
cause is in the way. What it reads is found by derivatives, and not in a table: those taps, arguments and weights on
which its result in float64 depends.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import __version__
from ..interface import LTX2VideoTransformer3DModel
from ..printable import printable
from ..whole import make_parents, staged
from . import record
from .audit import Setup, candidate_named, conventions_of
from .cases import CASES, Inputs
from .compare import Judged, judge_forwards
from .generator import build
from .guard import PortFailed, called, copied_inputs
from .judge import measure, most_of, ratio
from .report.rows import Cause, Report, joined_names
from .run import cast, moved, run
from .trace.given import OUTPUTS_ALONE, as_tensor, renamed_taps, taps_to_compare
from .trace.taps import PROJECTED, OutputError, Taps, brief, returned, trace
from .truth import CHAINS, doubled, norm, spread, teacher_forced, wide

SCHEMA = 1
SCRIPT, DESCRIPTION, README = "reproduce.py", "reproduce.json", "README.md"
INPUTS, WEIGHTS, RESULTS = "inputs.safetensors", "weights.safetensors", "results.safetensors"
UNCHANGED = 1e-9  # a relative difference that rounding in float64 explains
COORDINATES = ("video_coords", "audio_coords")
Stage = Callable[[Taps, Taps], Any]
NEEDED = (
    "the port shows its outputs alone, so that the stage would be the whole model; it has to return at least the "
    "streams after each block, transformer_blocks.0.video and .audio and so on, and then the taps in the first block "
    "that is wrong"
)


@dataclass(frozen=True)
class Again:
    """Everything that is needed to run the port again, by the names that the command line has."""

    case: str
    dtype: str
    device: str
    reference: str
    port: str
    names: Mapping[str, str] = field(default_factory=dict)  # {"their name": "our name"}


class Forwards(NamedTuple):
    """One case in both implementations."""

    model: LTX2VideoTransformer3DModel
    inputs: Inputs
    ours: Taps
    theirs: Mapping[str, Any]
    judged: Judged


@dataclass(frozen=True)
class Reads:
    """The names of everything that a stage is computed from."""

    taps: tuple[str, ...]
    arguments: tuple[str, ...]  # tensors among the arguments of the forward; coordinates in place of a grid
    weights: tuple[str, ...]


@dataclass(frozen=True)
class Reproducer:
    """What was written: the tap, how far its stage is off, and the files with their sizes in bytes."""

    place: str
    share: float  # of the budget
    files: dict[str, int]
    notes: tuple[str, ...]


def reproduce(report: Report, place: str, folder: Path, again: Again) -> Reproducer:
    """Write the stage at `place`, a tap or the place of a cause in the report, to a new folder.

    The script in that folder runs the port again by its name, from what is the current folder now.

    Raises `ValueError` if the folder exists or cannot be written, if no cause is at `place`, or if the port does not
    show the tap, or no tap at all before its outputs; and what running the port raises.
    """
    require_new_folder(folder)
    name, cause = tap_at(report, place)
    both = forwards(again)
    theirs = shown_tap(both.theirs, name)
    forced = teacher_forced(both.ours, both.theirs)
    reads = stage_reads(both.model, both.inputs, forced, name)
    smaller = stage_reads(both.model, both.inputs, both.ours, name)
    absent = [x for x in smaller.taps if x not in forced]
    own, expected = both.judged.local.reference[name], both.judged.local.truth[name]
    budget, share = measured(both.judged, name, theirs)
    given = record.tensors(both.inputs) | {x: both.ours[x] for x in COORDINATES if both.inputs.get(x) is None}
    parameters = dict(both.model.named_parameters())
    said = notes(report, name, cause, absent)
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "ltx2ref": __version__,
        "place": name,
        "run": asdict(replace(again, names=dict(again.names))),
        "folder": os.path.relpath(Path.cwd(), folder),
        "cause": asdict(cause),
        "shape": list(expected.shape),
        "budget": budget,
        "most": most_of(name),
        "share": share,
        "reads": asdict(reads),
        "call": {x: y for x, y in both.inputs.items() if y is None or isinstance(y, bool | int | float | list)},
        "notes": said,
    }
    tensors = {
        INPUTS: {x: forced[x] for x in reads.taps} | {x: given[x] for x in reads.arguments},
        WEIGHTS: {x: parameters[x].detach() for x in reads.weights},
        RESULTS: {"expected": expected, "reference": own, "port": theirs},
    }
    texts = {
        DESCRIPTION: json.dumps(json_value(about), indent=1, allow_nan=False),
        SCRIPT: script(about),
        README: readme(about),
    }
    try:
        write_folder(folder, tensors, texts)
    except OSError as error:
        raise ValueError(f"--reproduce {folder}: {error.strerror or error}") from None
    return Reproducer(name, share, {x.name: x.stat().st_size for x in sorted(folder.iterdir())}, tuple(said))


def write_folder(folder: Path, tensors: Mapping[str, Taps], texts: Mapping[str, str]) -> None:
    """Write files of tensors and of text to a new folder."""
    make_parents(folder)
    with staged(folder, "") as unfinished:
        for file, some in tensors.items():
            save_file(
                {x: y.cpu().clone(memory_format=torch.contiguous_format) for x, y in some.items()}, unfinished / file
            )
        for file, text in texts.items():
            (unfinished / file).write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def require_new_folder(folder: Path) -> None:
    """Raise `ValueError` if the folder exists already."""
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"--reproduce: expected a new folder, got {folder}, which exists")


def tap_at(report: Report, place: str) -> tuple[str, Cause]:
    """Return the first tap of a cause that `place` names, with or without the number of its block, and the cause."""
    by_place = [cause for cause in report.causes if cause.place == place]
    for cause in by_place or report.causes:
        if tap := next((tap for tap in cause.taps if tap == place or fnmatchcase(tap, place)), None):
            return tap, cause
    if OUTPUTS_ALONE in report.notes:
        raise ValueError(f"--reproduce {place}: {NEEDED}")
    places = ", ".join(cause.place for cause in report.causes)
    raise ValueError(
        f"--reproduce {place}: no cause there; " + (f"there are causes at {places}" if places else "there are none")
    )


def shown_tap(theirs: Mapping[str, Any], name: str) -> Tensor:
    """Return a tap of a port, or raise `ValueError` with the taps that are needed to tell its stages apart."""
    if not theirs.keys() - PROJECTED.keys() - {*PROJECTED.values()}:
        raise ValueError(f"{name}: {NEEDED}")
    if not isinstance(theirs.get(name), Tensor):
        raise ValueError(f"{name}: expected a tensor from the port, got {brief(theirs.get(name))}")
    found: Tensor = theirs[name]
    return found


def forwards(again: Again) -> Forwards:
    """Run a case in both implementations, and judge every stage from the candidate's own numbers."""
    case = next((case for case in CASES if case.id == again.case), None)
    if case is None:
        raise ValueError(f"ltx2ref {__version__} has no case {again.case}")
    dtype, device = record.EXACT_DTYPES[again.dtype], torch.device(again.device)
    candidate = candidate_named(again.port)
    model = build(case.config, dtype, conventions_of(again.reference), case.scales).to(device)
    inputs = moved(cast(case.inputs(), dtype), lambda x: x.to(device))
    ours = run(model, inputs)
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    coords = {name: ours[name].to(device, copy=True) for name in COORDINATES}
    given = called(candidate.run, Setup(case.config, state, copied_inputs(inputs), dtype, device, coords))
    compared, theirs, _ = taps_to_compare(ours, renamed_taps(given, again.names), inputs)
    judged = judge_forwards(model, inputs, compared, theirs, exactly=False)
    return Forwards(model, inputs, ours, {**theirs, **judged.queries}, judged)


def measured(judged: Judged, name: str, theirs: Tensor) -> tuple[float, float]:
    """Return the budget of a stage, an L2 norm, and the share of it that the candidate's result uses."""
    own, true = judged.local.reference[name], judged.local.truth[name]
    against = judged.standard.of(name)
    result = spread(name, theirs, true).cpu()
    same = result.shape == true.shape
    found = measure(result if same else own, own, true, true, against.bound, against.slack, against.least)
    return found.allowed, found.share if same else math.inf


# ---------------------------------------------------------------- what a stage reads
class Caught:
    """Stands for the replacement of a tap: keeps the model's own tensor, with its history, and lets it pass.

    If there is a real replacement, the model goes on with that.
    """

    def __init__(self, instead: Tensor | None = None) -> None:
        self.instead = instead
        self.own: Tensor | None = None

    def to(self, x: Tensor) -> Tensor:
        """Return what the model goes on with in place of `x`."""
        self.own = x
        return x if self.instead is None else self.instead.to(x).reshape(x.shape)


def stage_reads(model: LTX2VideoTransformer3DModel, inputs: Inputs, given: Taps, name: str) -> Reads:
    """Return what the value of a tap depends on if every tap in `given` is replaced.

    Its derivative in float64 tells. Bool masks, and a mask of keyframes, have none: each of these is changed instead.
    """
    double = doubled(model).requires_grad_(True)
    arguments = wide(inputs)
    if name not in COORDINATES:  # they are all that the model makes of its grid and its frame rate
        with_coords = run(double, arguments)
        arguments |= {x: with_coords[x] for x in COORDINATES if arguments.get(x) is None}
    arguments = moved(arguments, leaf)
    floats = {x: y for x, y in record.tensors(arguments).items() if y.requires_grad}
    taps = {x: leaf(y) for x, y in given.items() if x not in (name, *COORDINATES)}
    parameters = dict(double.named_parameters())
    value = stage_value(double, arguments, taps, name)
    everything = [*taps.values(), *floats.values(), *parameters.values()]
    noise = torch.rand(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0)).to(value.device)
    slopes = (
        torch.autograd.grad((value * (1 + noise)).sum(), everything, allow_unused=True)
        if value.requires_grad
        else [None] * len(everything)
    )
    used = [x is not None and bool(x.any()) for x in slopes]
    names = [*taps, *floats, *parameters]
    found = {x for x, is_used in zip(names, used, strict=True) if is_used}
    for x, mask in record.tensors(arguments).items():
        if mask.dtype == torch.bool or x == "video_keyframes_mask":
            other = stage_value(double, moved(arguments, partial(opposite, mask)), taps, name)
            if (other - value).abs().max() > UNCHANGED * value.abs().max():
                found.add(x)
    return Reads(
        tuple(x for x in taps if x in found),
        tuple(x for x in record.tensors(arguments) if x in found),
        tuple(x for x in parameters if x in found),
    )


def leaf(x: Tensor) -> Tensor:
    """Return a tensor in float64 by which can be derived; bool stays bool."""
    return x if x.dtype == torch.bool else x.detach().double().clone().requires_grad_(True)


def opposite(mask: Tensor, x: Tensor) -> Tensor:
    """Return the opposite of `x` if it is the mask, and any other tensor as it is."""
    return x if x is not mask else ~x if x.dtype == torch.bool else 1 - x


def stage_value(double: LTX2VideoTransformer3DModel, arguments: Inputs, taps: Taps, name: str) -> Tensor:
    """Return the value of a tap, with its history, if `taps` are replaced: what `Local.truth` holds."""
    before = residual_before(name)
    here, there = Caught(), Caught(taps.get(before))
    inject: Any = taps | {name: here, before: there}
    with torch.enable_grad(), trace(double, inject=inject):
        output = double(**arguments)
    value = returned(output)[name] if name in PROJECTED else here.own
    if value is None:
        raise ValueError(f"{name}: the reference has no such tap in this case")
    if before in taps and there.own is not None:
        value = taps[before].to(value).reshape(value.shape) + value - there.own
    return value


def residual_before(name: str) -> str:
    """Return the tap of the same residual before this one in a block, or an empty string."""
    block, _, rest = name.removeprefix("transformer_blocks.").partition(".")
    earlier = {later: before for chain in CHAINS for before, later in pairwise(chain)}
    return f"transformer_blocks.{block}.{earlier[rest]}" if rest in earlier else ""


# ---------------------------------------------------------------- the files
def notes(report: Report, name: str, cause: Cause, absent: list[str]) -> list[str]:
    """Return what a reader has to know about a stage: other causes at it, and why it is so large."""
    said = [
        f"Another cause at this tap has to be mended, too: {other.what or other.place}."
        for other in report.causes
        if other is not cause and name in other.taps
    ]
    if len(cause.taps) > 1:
        said.append(f"The same cause is at {joined_names([*cause.taps], cause.blocks, 6)}.")
    if absent:
        said.append(f"The stage would be smaller if the port showed {', '.join(absent[:6])}.")
    return said


def json_value(x: Any) -> Any:
    """Return a value that JSON has: infinities and NaN become text."""
    if isinstance(x, dict):
        return {key: json_value(y) for key, y in x.items()}
    if isinstance(x, list | tuple):
        return [json_value(y) for y in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def script(about: Mapping[str, Any]) -> str:
    """Return the script that fails until the port is mended. It quotes nothing that the port has named."""
    return f'''"""{about["place"]}, {about["run"]["case"]}: fails until the port is mended. See {README}."""

import sys

from ltx2ref.parity.reproduce import check


def stage(inputs, weights):
    # Call your own function here to run this stage alone. It returns a tensor, {tuple(about["shape"])}.
    return None  # None: the port is run again on the whole case, and this stage of it is judged


sys.exit(check(__file__, stage))
'''


def readme(about: Mapping[str, Any]) -> str:
    """Return the text for whoever mends the port."""
    reads, most, what, ran = about["reads"], about["most"], about["cause"]["what"], about["run"]
    listed = [
        f"- {of}: {', '.join(f'`{x}`' for x in names) or 'none'}"
        for of, names in (
            (f"taps, with the port's own numbers (`{INPUTS}`)", reads["taps"]),
            (f"arguments of the forward (`{INPUTS}`)", reads["arguments"]),
            (f"weights (`{WEIGHTS}`)", reads["weights"]),
        )
    ]
    call = ", ".join(f"{name} = {x}" for name, x in about["call"].items())
    return "\n".join(
        [
            f"# `{about['place']}` of {printable(ran['port'])}",
            "",
            f"- Case {ran['case']} in {ran['dtype']}, called with {call}.",
            f"- From the port's own numbers, this stage is {about['share']:.3g} times the budget away from what",
            f"  {ran['reference']} computes in float64." + (f" It looks like {what}." if what else ""),
            *(f"- {note}" for note in about["notes"]),
            "",
            f"`python {SCRIPT}` runs the port again. It ends with 1 until this stage uses no more than {most:g} times",
            "the budget, whatever else is wrong, and then with 0. To run the stage alone, call your own function in",
            "`stage`.",
            "",
            "The stage reads",
            "",
            *listed,
            "",
            f"`{RESULTS}` holds `expected` (float64), `reference` (what {ran['reference']} computes in",
            f"{ran['dtype']}) and `port`. Without ltx2ref: |yours - expected|, the L2 norm in float64, may be",
            f"{most * about['budget']:.6g}.",
        ]
    )


# ---------------------------------------------------------------- the script
def check(file: str, stage: Stage) -> int:
    """Judge a stage again, print one line, and return the exit status.

    That is 0 if the stage is mended, 1 if it is not, 2 if that cannot be told, and 3 if the port raised an exception.
    `file` is the script beside the files. `stage` is given the stage's inputs and weights, and returns its result, or
    None: then the port is run again.
    """
    folder = Path(file).parent
    about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    name = about["place"]
    found = stage(load_file(folder / INPUTS), load_file(folder / WEIGHTS))
    try:
        share = share_again(folder, about) if found is None else share_of(folder, about, found)
    except (WrongShape, PortFailed, ValueError) as error:
        print(f"{name}: {error}")
        return 1 if isinstance(error, WrongShape) else 3 if isinstance(error, PortFailed | OutputError) else 2
    print(f"{name}: {share:.3g} times the budget")
    return 0 if share <= about["most"] else 1  # a NaN is not


class WrongShape(Exception):
    """The result of a stage has another shape than the reference's."""

    def __init__(self, expected: Tensor, got: Tensor) -> None:
        super().__init__(f"expected the shape {tuple(expected.shape)}, got {tuple(got.shape)}")


def share_of(folder: Path, about: Mapping[str, Any], found: Any) -> float:
    """Return the share of the recorded budget that a result uses. Raises `WrongShape`."""
    expected = load_file(folder / RESULTS)["expected"]
    given = as_tensor(about["place"], found)
    if not isinstance(given, Tensor):
        raise ValueError(f"expected a tensor, got {brief(given)}")
    result = spread(about["place"], given.cpu(), expected)
    if result.shape != expected.shape:
        raise WrongShape(expected, result)
    return ratio(norm(result.double() - expected), float(about["budget"]))


def share_again(folder: Path, about: Mapping[str, Any]) -> float:
    """Run the port again on the whole case, and return the share of the budget that this stage of it uses.

    Raises `WrongShape`, `ValueError` if the port is not found or does not show the tap, and what running it raises.
    """
    name, where = about["place"], folder / about["folder"]
    with chdir(where if where.is_dir() else "."):
        both = forwards(Again(**about["run"]))
    result = shown_tap(both.theirs, name)
    if spread(name, result, both.ours[name]).shape != both.ours[name].shape:
        raise WrongShape(both.ours[name], result)
    return measured(both.judged, name, result)[1]
