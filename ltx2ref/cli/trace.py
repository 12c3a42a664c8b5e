"""`ltx2ref trace`: write every tap that the reference computes, and what a port in any language needs for it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import DONE, DTYPES, add_checkpoint, add_command, add_device, add_list, device_named
from .output import print_json, print_line, print_names

if TYPE_CHECKING:
    import torch

    from ..interface import Conventions, LTX2VideoTransformer3DModel
    from ..parity.cases import Case
    from ..parity.real import RealCase

CONVENTION_NAMES = ("diffusers", "ltx-core-2026-03", "ltx-core-2026-08")
TRACE_EXAMPLES = """examples:
  ltx2ref trace --case 2.3/t2v -o reference.safetensors \\
      --truth float64.safetensors
      every tap of a case, and the same in float64, for `ltx2ref compare`
  ltx2ref trace --case 2.3/t2v --files port/
      the case's weights, inputs and config, for a port in any language
  ltx2ref trace --checkpoint ltx-2.3-22b-dev.safetensors \\
      --inputs call.safetensors --dtype bfloat16 --sketch -o ref.safetensors
      real weights, and the arguments of one call (docs/trace-format.md)
  ltx2ref trace --list
      the names of the cases

An existing file is replaced. A checkpoint that does not fit into memory is
read a block at a time.

exit status:
  0  written
  2  unusable input"""


def add_trace(commands: Any) -> None:
    """Add `trace` to the commands."""
    command = add_command(
        commands,
        "trace",
        run_trace,
        "Write the reference's trace of a case, or of a checkpoint and the arguments of a call, to a file.",
        TRACE_EXAMPLES,
    )
    command.add_argument("--case", metavar="NAME", help="a case, RELEASE/NAME")
    add_checkpoint(command)
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="default: float32; float16 only in exact arithmetic"
    )
    command.add_argument("--arithmetic", choices=["native", "exact"], default="native", help="default: native")
    command.add_argument(
        "--conventions",
        choices=CONVENTION_NAMES,
        default="diffusers",
        metavar="NAME",
        help="diffusers, ltx-core-2026-03 or ltx-core-2026-08; default: diffusers",
    )
    add_device(command)
    command.add_argument("-o", "--output", metavar="FILE", help="the trace")
    command.add_argument("--truth", metavar="FILE", help="another trace, of the same taps in float64")
    command.add_argument("--sketch", action="store_true", help="write 1.3 KB for each tap in place of its tensor")
    command.add_argument("--files", metavar="DIR", help="write weights, inputs and config of the case to this folder")
    add_list(command)


def run_trace(options: argparse.Namespace) -> int:
    """Write the trace, its truth or the files of a case, and say what was written."""
    from ..parity import record
    from ..parity.cases import RECORDED

    if options.list:
        print_names([case.id for case in RECORDED], options.json)
        return DONE
    if not (options.output or options.files):
        options.parser.error("one of the arguments -o/--output and --files is required")
    if options.truth and not options.output:
        options.parser.error("--truth: only with -o/--output, because it depends on the phases of that trace")
    if options.arithmetic == "native" and options.dtype not in record.NATIVE_DTYPES:
        raise ValueError(f"--dtype {options.dtype}: under exact arithmetic only; add --arithmetic exact")
    device = device_named(options.device)
    case = case_of(options)
    for path in (options.output, options.truth):
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {Path(path).parent}")
    written = write_files(case, record.EXACT_DTYPES[options.dtype], options.files) if options.files else []
    if options.output:
        written += write_traces(case, device, options)
    if options.json:
        print_json({"case": case.id, "dtype": options.dtype, "arithmetic": options.arithmetic, "files": written})
    for file in () if options.json else written:
        print_line(f"{file['path']}: {file['what']}")
    return DONE


def case_of(options: argparse.Namespace) -> "Case | RealCase":
    """Return the case that --case names, or that of --checkpoint and --inputs."""
    from ..parity.cases import RECORDED

    given = [x is not None for x in (options.case, options.checkpoint, options.inputs)]
    if given not in ([True, False, False], [False, True, True]):
        options.parser.error("expected --case NAME, or --checkpoint FILE and --inputs FILE")
    if options.checkpoint is not None:
        from ..parity.real import real_case

        return real_case(options.checkpoint, options.inputs)
    found = next((case for case in RECORDED if case.id == options.case), None)
    if found is None:
        raise ValueError(f"--case {options.case}: no such case; `ltx2ref trace --list` names them")
    return found


def write_traces(case: "Case | RealCase", device: "torch.device", options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the reference and write its trace and, if it is asked for, the truth. Returns what was written."""
    from contextlib import nullcontext

    import torch

    from ..parity import record
    from ..parity.audit import MADE_EXACTLY, MADE_NATIVELY, conventions_of, fingerprint
    from ..parity.exact import exact
    from ..parity.real import about_trace
    from ..parity.run import cast, moved
    from ..parity.trace.probe import threads
    from ..parity.trace.sketch import sketch
    from ..parity.trace.tracefile import save_trace
    from ..parity.truth import phases, truth

    dtype = record.EXACT_DTYPES[options.dtype]
    conventions = conventions_of(f"ltx2ref:{options.conventions}")
    model = reference_model(case, dtype, conventions, device, bool(options.truth))
    inputs = moved(cast(case.inputs(), dtype), lambda x: x.to(device))
    exactly = options.arithmetic == "exact"
    keep = sketch if options.sketch else torch.clone
    with threads(1) if exactly else nullcontext(), exact() if exactly else nullcontext():
        taps = recorded_taps(model, inputs, torch.clone if options.truth else keep)
    about = {**about_trace(case, inputs, conventions)}
    made = fingerprint(device, dtype) | {"arithmetic": MADE_EXACTLY if exactly else MADE_NATIVELY}

    def kept(found: dict[str, Any]) -> dict[str, Any]:
        return {name: keep(x) if isinstance(x, torch.Tensor) else x for name, x in found.items()}

    save_trace(options.output, kept(taps), implementation="ltx2ref", fingerprint=made, **about)
    of = f"{len(taps)} taps of {case.id}"
    written = [{"path": options.output, "what": f"{of}, {options.dtype}", "taps": len(taps)}]
    if options.truth:
        true = truth(model, inputs, phases(taps))
        how = {**made, "dtype": "float64", "arithmetic": MADE_NATIVELY, "phases": options.dtype}
        save_trace(options.truth, kept(true), implementation="float64", fingerprint=how, **about)
        written.append({"path": options.truth, "what": f"{of}, float64", "taps": len(true)})
    return written


def reference_model(
    case: "Case | RealCase", dtype: "torch.dtype", conventions: "Conventions", device: "torch.device", truth: bool
) -> "LTX2VideoTransformer3DModel":
    """Build the model of a case, or load that of a checkpoint; `truth` says whether it will be copied in float64."""
    from ..parity.generator import build
    from ..parity.real import RealCase

    if isinstance(case, RealCase):
        return case.model(dtype, conventions, device, truth)
    return build(case.config, dtype, conventions, case.scales).to(device)


def recorded_taps(model: "LTX2VideoTransformer3DModel", inputs: dict[str, Any], keep: Any) -> dict[str, Any]:
    """Return every tap of one forward on the CPU, or the sketch of it if that is what `keep` makes."""
    import torch

    from ..parity.trace.taps import returned, trace

    with torch.no_grad(), trace(model, keep=keep) as taps:
        output = model(**inputs)
    taps.update({name: keep(x) for name, x in returned(output).items()})
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in taps.items()}


def write_files(case: "Case | RealCase", dtype: "torch.dtype", folder: str) -> list[dict[str, Any]]:
    """Write the weights of a case, under diffusers' names, its inputs and its config, for a port in any language."""
    import json
    import os

    import torch
    from safetensors.torch import save_file

    from ..interface import DIFFUSERS
    from ..parity.run import cast
    from ..parity.trace.inputfile import save_inputs
    from ..whole import temporary_folder

    inside = Path(folder)
    try:
        inside.mkdir(parents=True, exist_ok=True)
        with temporary_folder(inside) as partial:
            state = reference_model(case, dtype, DIFFUSERS, torch.device("cpu"), False).state_dict()
            save_file(dict(state), partial / "weights.safetensors", {"format": "pt"})
            save_inputs(partial / "inputs.safetensors", cast(case.inputs(), dtype))
            config = json.dumps(case.config.to_diffusers(), indent=1) + "\n"
            (partial / "config.json").write_text(config, encoding="utf-8")
            for file in sorted(partial.iterdir()):
                os.replace(file, inside / file.name)
    except OSError as error:
        raise ValueError(f"--files {folder}: {error.strerror or error}") from None
    what = {
        "weights.safetensors": f"{len(state)} parameters, {str(dtype).removeprefix('torch.')}, under diffusers' names",
        "inputs.safetensors": "the arguments of the forward",
        "config.json": "the config, in diffusers' format",
    }
    return [{"path": str(inside / name), "what": said} for name, said in what.items()]
