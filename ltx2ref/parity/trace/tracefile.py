"""Read and write trace files: what a model computed, in any implementation and on any machine.

docs/trace-format.md defines the format, which is a use of safetensors. A tap is stored as a tensor under its own name,
or as a sketch: a row of the tensor "sketches", and an entry in the metadata. The metadata key "trace" holds JSON. The
key is optional, and so is everything in it except the schema:

    {"schema": 1, "implementation": "...", "fingerprint": {}, "config": {}, "inputs": {"NAME": "SHA256"},
     "case": "2.3/t2v", "conventions": {}, "taps": ["NAME"], "sketches": [{"name": "NAME", "shape": [], "dtype": "F32",
     "norm": 0, "min": 0, "max": 0, "nan": 0, "inf": 0, "neg_inf": 0, "exponent": 0, "checksum": "0123456789abcdef"}]}
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checkpoint.header import MAX_HEADER, parse_json, read_header, whole
from ...checkpoint.storage import TORCH_NAMES, CheckpointError, Stored, TensorFile, require
from ...checkpoint.writer import Piece, TensorEntry, header, pieces
from ...whole import put, replacing
from .sketch import BUCKETS, SPELLING, Sketch

TRACE_SCHEMA = 1
KEY, TABLE = "trace", "sketches"
DTYPES_BY_SPELLING = {name: dtype for dtype, name in SPELLING.items()}
TABLE_DTYPES = ("I32", "F32", "F64")  # dtypes that the table of sketches may have
MAX_EXPONENT = 1000
OPTIONAL = ("min", "max", "checksum")  # left out if no element is finite, or by a writer without checksums
HEXADECIMAL = re.compile("[0-9a-f]{16}")
Tap = Tensor | Sketch


class TraceError(ValueError):
    """A trace cannot be read or written; the message names the file and the tap."""


class Trace(NamedTuple):
    """A trace, as read from a file."""

    taps: dict[str, Tap]  # in the order of the computation, if the file states it
    implementation: str
    fingerprint: dict[str, Any]  # versions, device, dtype, threads: whatever its writer chose to record
    config: dict[str, Any] | None  # in diffusers' format
    inputs: dict[str, str]  # sha256 by name
    schema: int | None  # None: the file holds tensors only, without the key "trace"
    case: str | None = None  # the conformance case that was computed, such as "2.3/t2v"
    conventions: dict[str, Any] | None = None  # fields of `Conventions`, if a model of ours was traced


def save_trace(
    path: str | Path,
    taps: Mapping[str, Tap],
    *,
    implementation: str,
    fingerprint: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    inputs: Mapping[str, str] | None = None,
    case: str | None = None,
    conventions: Mapping[str, Any] | None = None,
) -> None:
    """Write a trace; `taps` are in the order of the computation.

    `config` is in diffusers' format, and `inputs` holds the sha256 of each input by its name. `case` names the
    conformance case, if it is one, and `conventions` are those of one of our models. An existing file is replaced only
    when the new one is complete.

    Raises `TraceError` for anything that a file cannot hold, and if the disk is full.
    """
    sketches = {name: x for name, x in taps.items() if isinstance(x, Sketch)}
    with naming_file(path):
        entries = {name: of_tensor(name, x) for name, x in taps.items() if isinstance(x, Tensor)}
        require(not {TABLE, "__metadata__"} & taps.keys(), f"{TABLE} and __metadata__ cannot be names of taps")
        if sketches:
            entries[TABLE] = TensorEntry(
                "I32", (len(sketches), BUCKETS), (tensor_data(quantised(x)[0]) for x in sketches.values())
            )
        metadata = {
            KEY: to_json(
                {
                    "schema": TRACE_SCHEMA,
                    "implementation": implementation,
                    "fingerprint": fingerprint,
                    "config": config,
                    "inputs": inputs or {},
                    **({} if case is None else {"case": case}),
                    **({} if conventions is None else {"conventions": conventions}),
                    "taps": [*taps],
                    "sketches": [sketch_metadata(name, x) for name, x in sketches.items()],
                }
            )
        }
        size = len(header(entries, metadata))
        require(size <= MAX_HEADER, f"a header of {size} bytes, at most {MAX_HEADER}: too many taps for one file")
        with replacing(Path(path)) as partial:
            put(partial, pieces(entries, metadata, "writing the trace"))


def load_trace(path: str | Path) -> Trace:
    """Read a trace.

    Full tensors are memory-mapped, so the file must not shrink while they are in use. Raises `TraceError` if the file
    is not a valid trace.
    """
    with naming_file(path):
        file, stored = read_header(Path(path))
        require(file.container == "safetensors", f"a {file.container} file, expected safetensors")
        said = metadata_of(file)
        taps: dict[str, Tap] = {}
        taps |= sketches_of(optional(said, "sketches", list) or [], stored.pop(TABLE, None))
        both = taps.keys() & stored.keys()
        require(not both, f"{min(both, default='')}: both a tensor and a sketch")
        taps |= {name: read(x) for name, x in stored.items()}
        return Trace(
            in_order(taps, optional(said, "taps", list)),
            optional(said, "implementation", str) or Path(path).stem,
            optional(said, "fingerprint", dict) or {},
            optional(said, "config", dict),
            optional(said, "inputs", dict) or {},
            said.get("schema"),
            optional(said, "case", str),
            optional(said, "conventions", dict),
        )


def renamed(trace: Trace, names: Mapping[str, str] | Callable[[str], str]) -> Trace:
    """Return a trace whose taps have other names.

    `names` is a function or a mapping, {old name: new name}; a tap that a mapping does not mention keeps its name.

    Raises `TraceError` if two taps get the same name.
    """
    taps: dict[str, Tap] = {}
    for name, x in trace.taps.items():
        new = names(name) if callable(names) else names.get(name, name)
        if new in taps:
            raise TraceError(f"{trace.implementation}: {new}: two taps would get this name, the second is {name}")
        taps[new] = x
    return trace._replace(taps=taps)


@contextmanager
def naming_file(path: str | Path) -> Iterator[None]:
    """Turn any error inside the context into a `TraceError` that names the file."""
    try:
        yield
    except CheckpointError as error:  # which names the file already
        raise TraceError(str(error)) from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None
    except ValueError as error:
        raise TraceError(f"{path}: {error}") from None


# ---------------------------------------------------------------- writing
def of_tensor(name: str, x: Tensor) -> TensorEntry:
    """Return the entry under which a tensor is stored, or refuse a dtype that safetensors lacks."""
    require(x.dtype in SPELLING and not x.is_meta, f"{name}: {x.dtype} on {x.device} cannot be stored")
    # A generator, because an expanded tensor should take its full size only while it is written.
    return TensorEntry(SPELLING[x.dtype], tuple(x.shape), (tensor_data(y) for y in [x]))


def tensor_data(x: Tensor) -> Piece:
    """Return the bytes of a tensor, row-major."""
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def quantised(x: Sketch) -> tuple[Tensor, int]:
    """Return the buckets as int32, and the exponent of 2 that scales them.

    Quantising them again changes nothing. float32 buckets would take as much room and round by 2.5e-8 of the norm,
    which is the size of float32's own differences. This rounds by 5e-10.
    """
    exponent = max(math.frexp(x.buckets.abs().max().item())[1] - 31, -MAX_EXPONENT)
    return (x.buckets * 2.0**-exponent).round().clamp(max=2**31 - 1).to(torch.int32), exponent


def sketch_metadata(name: str, x: Sketch) -> dict[str, Any]:
    """Return the metadata of a sketch, in which zeros and None are left out."""
    require(
        x.buckets.shape == (BUCKETS,) and math.isfinite(x.norm) and bool(x.buckets.isfinite().all()),
        f"{name}: expected {BUCKETS} buckets and a norm that are finite, got {list(x.buckets.shape)} and {x.norm}",
    )
    extrema = {} if x.min is None else {"min": x.min, "max": x.max}
    counts = {key: count for key, count in (("nan", x.nan), ("inf", x.inf), ("neg_inf", x.neg_inf)) if count}
    checksum = {} if x.checksum is None else {"checksum": f"{x.checksum:016x}"}
    return {
        "name": name,
        "shape": x.shape,
        "dtype": SPELLING[x.dtype],
        "norm": x.norm,
        **extrema,
        **counts,
        "exponent": quantised(x)[1],
        **checksum,
    }


def to_json(value: dict[str, Any]) -> str:
    """Return compact JSON; raise `ValueError` for anything that JSON cannot express."""
    try:
        # `default=dict` is for mappings that are no dicts.
        return json.dumps(value, allow_nan=False, separators=(",", ":"), default=dict)
    except TypeError as error:
        raise ValueError(f"not JSON: {error}") from None


# ---------------------------------------------------------------- reading
def metadata_of(file: TensorFile) -> dict[str, Any]:
    """Return the JSON of the key "trace", or an empty dict without that key."""
    if KEY not in file.metadata:
        return {}
    try:
        said = parse_json(file.metadata[KEY].encode())
    except ValueError as error:
        raise ValueError(f"metadata {KEY!r}: {error}") from None
    schema = said.get("schema")
    require(type(schema) is int and schema == TRACE_SCHEMA, f"schema {str(schema)[:80]}, expected {TRACE_SCHEMA}")
    return said


def optional(said: dict[str, Any], key: str, kind: type) -> Any:
    """Return a field of the metadata, or None; refuse a value of another type."""
    value = said.get(key)
    require(value is None or isinstance(value, kind), f"{key}: expected a {kind.__name__}, got {str(value)[:80]}")
    return value


def read(x: Stored) -> Tensor:
    """Return a stored tensor, memory-mapped if torch has its dtype."""
    require(
        x.dtype in DTYPES_BY_SPELLING, f"{x.name}: dtype {x.dtype}, expected one of {', '.join(DTYPES_BY_SPELLING)}"
    )
    try:
        if x.start == x.stop:
            return torch.empty(x.shape, dtype=DTYPES_BY_SPELLING[x.dtype])
        if x.dtype in TORCH_NAMES:
            return x.mapped()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{x.name}: {x.dtype} {list(x.shape)}: {error}") from None
    raw = torch.frombuffer(x.bytes(), dtype=torch.uint8)
    return (raw.ne(0) if x.dtype == "BOOL" else raw.view(DTYPES_BY_SPELLING[x.dtype])).reshape(x.shape)


def sketches_of(rows: list[Any], table: Stored | None) -> dict[str, Sketch]:
    """Return the sketches by name, from their metadata and the table of their buckets."""
    if table is None:
        require(not rows, f"{len(rows)} sketches are described, but there is no tensor {TABLE}")
        return {}
    require(
        table.dtype in TABLE_DTYPES and table.shape == (len(rows), BUCKETS),
        f"{table}: expected {' or '.join(TABLE_DTYPES)} {[len(rows), BUCKETS]}, a row for each sketch in the metadata",
    )
    sketches: dict[str, Sketch] = {}
    for i, (said, numbers) in enumerate(zip(rows, read(table), strict=True)):
        name = said.get("name") if isinstance(said, dict) else None
        if not isinstance(name, str) or name in sketches:
            raise ValueError(f"sketch {i}: expected a name that no earlier sketch has, got {str(name)[:80]}")
        try:
            sketches[name] = sketch_of(said, numbers.double())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return sketches


def sketch_of(said: dict[str, Any], numbers: Tensor) -> Sketch:
    """Return one sketch, from its metadata and its row of the table."""
    buckets = numbers * 2.0 ** take(said, "exponent", is_exponent, "a small whole number", 0)
    require(bool(buckets.isfinite().all()), "buckets that are not finite")
    checksum = take(said, "checksum", is_checksum, "16 hexadecimal digits")
    return Sketch(
        shape=tuple(take(said, "shape", whole, "a list of whole numbers")),
        dtype=DTYPES_BY_SPELLING[take(said, "dtype", is_dtype, f"one of {', '.join(DTYPES_BY_SPELLING)}")],
        norm=take(said, "norm", lambda x: is_finite(x) and x >= 0, "a finite number that is not negative"),
        min=take(said, "min", is_finite, "a finite number"),
        max=take(said, "max", is_finite, "a finite number"),
        nan=take(said, "nan", is_count, "a whole number", 0),
        inf=take(said, "inf", is_count, "a whole number", 0),
        neg_inf=take(said, "neg_inf", is_count, "a whole number", 0),
        buckets=buckets,
        checksum=checksum and int(checksum, 16),
    )


def take(said: dict[str, Any], key: str, holds: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
    """Return a field of a sketch's metadata, or its default; refuse a value that does not hold."""
    value = default if said.get(key) is None else said[key]
    if not (holds(value) or (value is None and key in OPTIONAL)):
        raise ValueError(f"{key}: expected {expected}, got {str(value)[:80]}")
    return value


def is_exponent(x: Any) -> bool:
    """Tell whether a value is an exponent that a sketch may have."""
    return type(x) is int and abs(x) <= MAX_EXPONENT


def is_checksum(x: Any) -> bool:
    """Tell whether a value is a checksum of 16 hexadecimal digits."""
    return isinstance(x, str) and HEXADECIMAL.fullmatch(x) is not None


def is_dtype(x: Any) -> bool:
    """Tell whether a value is the name of a dtype in safetensors."""
    return isinstance(x, str) and x in DTYPES_BY_SPELLING


def is_count(x: Any) -> bool:
    """Tell whether a value is a whole number that is not negative."""
    return whole([x])


def is_finite(x: Any) -> bool:
    """Tell whether a value is a finite number."""
    return type(x) in (int, float) and abs(x) <= sys.float_info.max


def in_order(taps: dict[str, Tap], order: list[Any] | None) -> dict[str, Tap]:
    """Put taps in the order that the file states.

    Without such an order, sketches come first, by row, and then tensors as in the header.
    """
    if order is None:
        return taps
    require(all(isinstance(name, str) for name in order), "taps: expected names")
    names = set(order)
    require(len(names) == len(order), "taps: a name occurs twice")
    odd = sorted(names ^ taps.keys())
    require(not odd, f"{', '.join(odd[:5])}: in the list of taps or in the file, but not in both ({len(odd)} taps)")
    return {name: taps[name] for name in order}
