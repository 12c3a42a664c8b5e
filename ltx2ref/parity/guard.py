"""Run code that others wrote: what it raises becomes a result of one line, and what it changes in torch is put back.

A port is called through `called`. Its exception, of whatever kind, becomes a `PortFailed` that says what was raised and
where in the port's own files. Only `Unsupported` says that a port cannot express a case.
"""

import importlib
import os
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arithmetic import NotExact
from .cases import Inputs
from .run import moved
from .trace.taps import OutputError, Taps

OWN_FILES = f"{Path(__file__).parents[1]}{os.sep}"  # its files are never a port's own
MACHINERY = (OWN_FILES, importlib.__file__, "<frozen ")
MOST_TEXT = 400  # characters of an exception's text that are shown


class Unsupported(ValueError):
    """This implementation has no equivalent of a case, for a reason that the message gives.

    A port raises it for what it was never meant to compute. An audit then lists the case as not compared. Any other
    exception, `ValueError` included, counts as a failure of the port.
    """


class PortFailed(Exception):
    """A port raised an exception; the message says in one line which one, and where, unless it is given as `said`.

    `exception` is the name of its class, `at` the place in the port's own files as "FILE:LINE", if there is one, and
    `traceback` the whole traceback as text.
    """

    def __init__(self, error: BaseException, said: str | None = None) -> None:
        self.exception, self.at = type(error).__name__, raised_at(error)
        self.traceback = "".join(traceback.format_exception(error))
        super().__init__(said or f"the port {described(error)}")


def called(function: Callable[..., Any], *args: Any) -> Any:
    """Call a port's function, and put back what it changes in torch's settings.

    Raises `PortFailed` for anything that it raises, except for what an audit understands: `Unsupported`, `NotExact`,
    `OutputError`, and `KeyboardInterrupt`, which is the user's.
    """
    try:
        with separately({}):
            return function(*args)
    except (Unsupported, NotExact, OutputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit is none of `Exception`
        failure = PortFailed(error)
    # Raised out here, so that the failure does not hold the frames of the port, with all of their tensors.
    raise failure


# ---------------------------------------------------------------- what a port is given
def copied_inputs(inputs: Inputs) -> Inputs:
    """Return a copy of the arguments of a forward that a candidate may change."""
    return moved({name: [*x] if isinstance(x, list) else x for name, x in inputs.items()}, torch.clone)


def called_on_copies(function: Callable[[Inputs], Any], inputs: Inputs) -> tuple[Any, list[str]]:
    """Call a port on a copy of the arguments of a forward, and also return the names of those it changed in place.

    Raises what `called` raises.
    """
    arguments = copied_inputs(inputs)
    handed = flat_inputs(arguments)
    given = called(function, arguments)
    return given, overwritten(flat_inputs(inputs), handed)


def overwritten(inputs: Taps, handed: Taps) -> list[str]:
    """Return the names of arguments that a candidate changed in place in `handed`, its copies."""
    return [name for name, x in inputs.items() if not torch.equal(x, handed[name])]


def flat_inputs(inputs: Inputs) -> Taps:
    """Return the tensors in the arguments of a forward, with those of nested dicts under their own names."""
    found: Taps = {}
    for name, x in inputs.items():
        found |= flat_inputs(x) if isinstance(x, dict) else {name: x} if isinstance(x, Tensor) else {}
    return found


# ---------------------------------------------------------------- exceptions as text
def described(error: BaseException) -> str:
    """Say in one line what an exception is: "raised KeyError at my_port.py:31: 'x'"."""
    at, said = raised_at(error), text_of(error)
    what = "ran out of memory" if out_of_memory(error) else f"raised {type(error).__name__}"
    return f"{what}{f' at {at}' if at else ''}{f': {said}' if said else ''}"


def text_of(error: BaseException) -> str:
    """Return the text of an exception in one line that is not too long; an exception may fail to have one."""
    try:
        said = (error.msg if isinstance(error, SyntaxError) else str(error)) or ""
    except Exception as another:
        return f"(its text raised {type(another).__name__})"
    return textwrap.shorten(" ".join(said.split()), MOST_TEXT, placeholder=" ...")


def raised_at(error: BaseException) -> str:
    """Return "FILE:LINE" for the last line of the port's own files that an error passed through, or an empty string.

    Its own files are in the folder of the first file that an error passed through outside of this package.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(MACHINERY)]
    if not frames:
        return ""
    folder = Path(frames[0].filename).parent
    own = [
        frame
        for frame in frames
        if Path(frame.filename).is_relative_to(folder)
        and "site-packages" not in Path(frame.filename).relative_to(folder).parts
    ]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception says that memory was not enough, of the processor or of a device."""
    said = text_of(error) if type(error) is RuntimeError else ""
    known = ("DefaultCPUAllocator", "out of memory")  # what torch says on processors, and on MPS
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(x in said for x in known)


# ---------------------------------------------------------------- settings of torch
def set_default_device(device: torch.device) -> None:
    """Set torch's default device; the processor is what it is without a setting."""
    torch.set_default_device(None if device.type == "cpu" else device)


def set_autocast(found: list[tuple[str, bool, torch.dtype]]) -> None:
    """Set autocast's state on several kinds of devices."""
    for device, on, dtype in found:
        torch.set_autocast_enabled(device, on)
        torch.set_autocast_dtype(device, dtype)


# Settings of torch that can change results, each with the function that reads it and the one that sets it.
# Autocast is first: while it is on, exact arithmetic refuses to do anything, the other settings included.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "autocast": (
        lambda: [(x, torch.is_autocast_enabled(x), torch.get_autocast_dtype(x)) for x in ("cpu", "cuda")],
        set_autocast,
    ),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, set_default_device),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "oneDNN": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
    "cuDNN": (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    "cuDNN benchmark": (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    "flash attention": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "efficient attention": (
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    "plain attention": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "cuDNN attention": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
}


def settings() -> dict[str, Any]:
    """Return torch's settings that can change results, by name."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


@contextmanager
def separately(theirs: dict[str, Any], keep: bool = False) -> Iterator[None]:
    """Run others' code with its own settings of torch, `theirs`, and put ours back afterwards.

    With `keep`, what that code changes is entered in `theirs`: its import makes settings for all of its runs.
    """
    before = settings()
    for name, value in reversed(theirs.items()):
        SETTINGS[name][1](value)
    try:
        yield
    finally:
        for name, (read, write) in SETTINGS.items():
            if (value := read()) != before[name]:
                write(before[name])
                theirs |= {name: value} if keep else {}
