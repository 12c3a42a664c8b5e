"""Read and write recorded tensors: a safetensors file for each case and dtype, and a JSON file on how they were made.

The metadata key "record" of such a file holds JSON: the case, dtype, configuration, seed, and conventions (if they are
not diffusers'); the names of the taps in the order of the computation; the taps that equal an earlier one ("same"); the
sha256 of every input; and the norm of each tap's float64 truth. If slices along the first dimension of a tap are equal,
only one of them is stored, under the tap's name. "NAME.index" then says which stored slice stands at each place.

Recordings under exact arithmetic need no tolerance, so a digest of each tap is enough. There is one file for each case
or kernel, in the folder `exact`. It holds DTYPE/digests (16 bytes for each tap), DTYPE/buckets (four float64 numbers
for each tap, from which the size of a difference can be estimated), and, as tensors, the outputs that the case names.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..interface import DIFFUSERS
from .arithmetic import VERSION
from .cases import Case, Inputs
from .kernels import Kernel
from .trace.probe import sha256_of_tensors
from .trace.sketch import sketch
from .trace.taps import Taps

DIRECTORY = Path(__file__).parent / "reference"
NATIVE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # dtypes of native recordings
EXACT_DTYPES = NATIVE_DTYPES | {"float16": torch.float16}
RECORD_SCHEMA = 1


class RecordError(ValueError):
    """A recording cannot be used: it is missing, has another schema, or was made from other inputs."""


@dataclass(frozen=True)
class Record:
    """The taps of one case in one dtype as another implementation computed them, in native arithmetic."""

    taps: Taps
    input_digests: dict[str, str]
    truth_norms: dict[str, float]


def path(case: Case, dtype: str) -> Path:
    """Return the path of a native recording."""
    return DIRECTORY / f"{case.release}-{case.name}-{dtype}.safetensors"


def environment() -> dict[str, Any]:
    """Return the versions, CPU, number of threads and probe of the machine that made the recordings.

    Raises `RecordError` if there are no recordings.
    """
    try:
        said: dict[str, Any] = json.loads((DIRECTORY / "recording.json").read_text())
    except FileNotFoundError as error:
        raise RecordError(f"no recorded tensors: {error.filename} is missing") from None
    return said


def tensors(inputs: Inputs) -> Taps:
    """Return all tensors among the arguments of a forward, including those in `attention_kwargs`."""
    flat = inputs | (inputs.get("attention_kwargs") or {})
    return {name: x for name, x in flat.items() if isinstance(x, torch.Tensor)}


def digests(inputs: Inputs) -> dict[str, str]:
    """Return the sha256 of every tensor among the arguments of a forward."""
    return {name: sha256_of_tensors(x) for name, x in tensors(inputs).items()}


def save_record(case: Case, dtype: str, taps: Taps, inputs: Inputs, truth_norms: dict[str, float], seed: int) -> None:
    """Write the native recording of a case in one dtype."""
    first: dict[str, str] = {}  # digest: the first tap with these bits
    same = {}
    for name, x in taps.items():
        digest = f"{x.dtype} {tuple(x.shape)} {sha256_of_tensors(x)}"
        if first.setdefault(digest, name) != name:
            same[name] = first[digest]
    record = {
        "schema": RECORD_SCHEMA,
        "case": case.id,
        "dtype": dtype,
        "seed": seed,
        "config": case.config.to_diffusers(),
        "conventions": asdict(case.conventions),
        "taps": list(taps),
        "same": same,
        "inputs": digests(inputs),
        "truth_norms": truth_norms,
    }
    stored: Taps = {}
    for name in taps.keys() - same.keys():
        stored[name], stored[f"{name}.index"] = distinct(taps[name])
    save_file(stored, path(case, dtype), metadata={"record": json.dumps(record)})
    path(case, dtype).chmod(0o644)


def distinct(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct slices along the first dimension, and for each slice its index among them.

    Slices are compared by their bits.
    """
    bits = x.contiguous().flatten(1).view({2: torch.int16, 4: torch.int32}[x.element_size()])
    slices, index = bits.unique(dim=0, return_inverse=True)
    return slices.view(x.dtype).reshape(-1, *x.shape[1:]), index.to(torch.int16)


def load_record(case: Case, dtype: str) -> Record:
    """Read the native recording of a case in one dtype.

    Raises `RecordError` if there is no usable one.
    """
    if not path(case, dtype).exists():
        raise RecordError(f"{case.id} {dtype}: no recording at {path(case, dtype)}")
    with safe_open(path(case, dtype), "pt") as file:
        record = json.loads(file.metadata()["record"])
        how = record.get("conventions", asdict(DIFFUSERS))
        if (record["schema"], record["config"], how) != (
            RECORD_SCHEMA,
            case.config.to_diffusers(),
            asdict(case.conventions),
        ):
            raise RecordError(f"{case.id} {dtype}: recorded under another schema, configuration or convention")
        stored = {name: record["same"].get(name, name) for name in record["taps"]}
        taps = {name: file.get_tensor(at)[file.get_tensor(f"{at}.index").long()] for name, at in stored.items()}
    return Record(taps, record["inputs"], record["truth_norms"])


# ---------------------------------------------------------------- under exact arithmetic
@dataclass(frozen=True)
class ExactRecord:
    """What an implementation computed for one case in one dtype under exact arithmetic."""

    digests: dict[str, bytes]  # one for each tap, in the order of the computation
    buckets: dict[str, Tensor]  # one (4,) float64 for each tap: see `buckets`
    outputs: Taps
    input_digests: dict[str, str]
    implementation: str


def exact_path(case: Case | Kernel) -> Path:
    """Return the path of a recording under exact arithmetic."""
    return DIRECTORY / "exact" / f"{case.release}-{case.name}.safetensors"


def digest(x: Tensor) -> bytes:
    """Return 16 bytes that identify a tensor's dtype, shape and bits; docs/arithmetic.md defines them.

    All NaNs count as the same number. Zero and minus zero are different.
    """
    kind, shape = str(x.dtype).removeprefix("torch."), ",".join(map(str, x.shape))
    x = x.detach().cpu().contiguous()
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
    numbers = x.flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{kind} {shape}\n".encode() + numbers).digest()[:16]


def buckets(x: Tensor) -> Tensor:
    """Return four float64 numbers whose squared distance from another tensor's estimates that of the tensors."""
    return sketch(x).buckets.view(-1, 4).sum(0)


def save_exact(case: Case | Kernel, taps: dict[str, Taps], inputs: dict[str, Inputs], implementation: str) -> None:
    """Write the recording of a case under exact arithmetic.

    `taps` and `inputs` have a key for each dtype. `implementation` names what computed them.
    """
    stored: Taps = {}
    for dtype, found in taps.items():
        stored[f"{dtype}/digests"] = torch.tensor([list(digest(x)) for x in found.values()], dtype=torch.uint8)
        stored[f"{dtype}/buckets"] = torch.stack([buckets(x) for x in found.values()])
        stored |= {f"{dtype}/{name}": found[name].contiguous() for name in case.outputs}
    record = {
        "schema": RECORD_SCHEMA,
        "arithmetic": VERSION,
        "implementation": implementation,
        "case": case.id,
        **case.about(),
        "taps": {dtype: list(found) for dtype, found in taps.items()},
        "inputs": {dtype: digests(given) for dtype, given in inputs.items()},
    }
    exact_path(case).parent.mkdir(exist_ok=True)
    save_file(stored, exact_path(case), metadata={"record": json.dumps(record)})
    exact_path(case).chmod(0o644)


def load_exact(case: Case | Kernel, dtype: str) -> ExactRecord:
    """Read what was recorded for a case in one dtype under exact arithmetic.

    Raises `RecordError` if there is no usable recording.
    """
    path = exact_path(case)
    if not path.exists():
        raise RecordError(f"{case.id} {dtype}: no recording under exact arithmetic at {path}")
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["record"])
        require_same(f"{case.id} {dtype}", "version of exact arithmetic", record["arithmetic"], VERSION)
        require_same(f"{case.id} {dtype}", "schema", record["schema"], RECORD_SCHEMA)
        for name, here in case.about().items():
            require_same(f"{case.id} {dtype}", name, record[name], here)
        names = record["taps"][dtype]
        rows = [bytes(row) for row in file.get_tensor(f"{dtype}/digests").tolist()]
        return ExactRecord(
            dict(zip(names, rows, strict=True)),
            dict(zip(names, file.get_tensor(f"{dtype}/buckets"), strict=True)),
            {name: file.get_tensor(f"{dtype}/{name}") for name in case.outputs},
            record["inputs"][dtype],
            record["implementation"],
        )


def require_same(what: str, name: str, recorded: Any, here: Any) -> None:
    """Raise `RecordError` unless a recorded property is the same as the present one."""
    if recorded != here:
        raise RecordError(f"{what}: recorded with another {name}: expected {here}, got {recorded}")
