"""The judge of results under exact arithmetic: a tap has diffusers' digest, or it differs. There is no tolerance.

A digest does not tell how large a difference is. For that, a tap is compared with a tensor that has the digest: for a
component the expected one in the kit, for a model the one that this package's own forward computes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from ..parity.judge import Against, judge_tap
from ..parity.record import NATIVE_DTYPES, digest
from ..parity.report.rows import DIVERGED, IDENTICAL, MISSING, SHAPE, Report, TapRow
from ..parity.trace.taps import Taps
from ..parity.truth import spread


def identity(digests: Mapping[str, str], outputs: list[str], given: Taps, expected: Callable[[], Taps]) -> Report:
    """Compare each given tap with its digest.

    Taps that are no `outputs` may be left out. `expected` is called only if something differs.
    """
    other = [name for name, x in given.items() if not has(x, digests[name])]
    tensors = {name: x for name, x in expected().items() if has(x, digests[name])} if other else {}
    rows = []
    for name, wanted in digests.items():
        if name in other:
            rows.append(differing_row(name, given[name], tensors.get(name), wanted))
        elif name in given:
            rows.append(TapRow(name, IDENTICAL))
        elif name in outputs:
            rows.append(TapRow(name, MISSING))
    return verdict(rows)


def has(x: Tensor, expected: str) -> bool:
    """Return whether a tensor has a digest, in its own dtype or in another dtype of the kit with the same numbers."""
    same = (y for y in map(x.to, NATIVE_DTYPES.values()) if ((y.double() == x.double()) | x.isnan()).all())
    return any(digest(y).hex() == expected for y in same)


def differing_row(name: str, given: Tensor, expected: Tensor | None, wanted: str) -> TapRow:
    """Return the row of a tap that lacks its digest.

    A tap that has it once it is spread over the tokens is identical.
    """
    if expected is None:
        return TapRow(name, DIVERGED, candidate_shape=tuple(given.shape))
    if has(spread(name, given, expected), wanted):
        return TapRow(name, IDENTICAL)
    found = judge_tap(name, expected, given, None, Against())
    return found if found.verdict == SHAPE else replace(found, verdict=DIVERGED)


def verdict(rows: list[TapRow]) -> Report:
    """Return the report on these rows."""
    missing = sum(row.verdict == MISSING for row in rows)
    lacking = f"; {missing} of {len(rows)} taps are missing" if missing else ""
    first = next((row for row in rows if row.verdict in (DIVERGED, SHAPE)), None)
    if first is None:
        said = f"identical at {'every tap' if not missing else f'all of {len(rows) - missing} taps'}{lacking}"
        return Report(MISSING if missing else IDENTICAL, said, None, rows)
    before = sum(row.verdict == IDENTICAL for row in rows[: rows.index(first)])
    said = f"first difference at {first.name} ({distance(first)}); {before} taps before it are identical{lacking}"
    return Report(first.verdict, said, first.name, rows)


def distance(row: TapRow) -> str:
    """Return in words how far a tap is from the expected one."""
    if row.verdict == SHAPE:
        return f"{row.candidate_shape} in place of {row.shape}"
    if row.relative is None:
        return "by how much is not known"
    if not row.max_abs:
        return "in the sign of zeros"
    return f"relative L2 {row.relative:.2g}; 99 % of it within {row.ulp_p99:,.0f} units in the last place"
