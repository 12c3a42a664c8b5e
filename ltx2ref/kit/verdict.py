"""The summary of a check: one result for each case and dtype, and one verdict with its exit status."""

from dataclasses import asdict, dataclass
from typing import Any

from ..parity.report.rows import DIVERGED, IDENTICAL, MISSING, SHAPE, SUSPECT, Report

NATIVE_LEVEL, EXACT_LEVEL = LEVELS = ("native", "exact")


@dataclass(frozen=True)
class Result:
    """The result of one case in one dtype. Its report is None if the port wrote nothing for it."""

    case: str
    dtype: str
    report: Report | None

    @property
    def name(self) -> str:
        """Return the case and the dtype as one name."""
        return f"{self.case} {self.dtype}"

    @property
    def missing(self) -> list[str]:
        """Return the outputs that the port did not write for a case of which it wrote others."""
        return [] if self.report is None else [row.name for row in self.report.rows if row.verdict == MISSING]

    @property
    def wrong(self) -> bool:
        """Return whether a tap diverged or has a wrong shape."""
        return self.report is not None and bool(verdicts(self.report) & {DIVERGED, SHAPE})

    @property
    def suspect(self) -> bool:
        """Return whether a tap is suspect."""
        return self.report is not None and SUSPECT in verdicts(self.report)


@dataclass(frozen=True)
class Verdict:
    """All results on one level. `partial` says that missing results were left out on purpose."""

    results: list[Result]
    level: str = NATIVE_LEVEL
    partial: bool = False

    @property
    def given(self) -> list[Report]:
        """Return the reports of the cases that the port wrote something for."""
        return [result.report for result in self.results if result.report is not None]

    @property
    def missing(self) -> list[str]:
        """Return the cases, and then the outputs of other cases, that the port did not write."""
        return [result.name for result in self.results if result.report is None] + [
            f"{result.name}: {name}" for result in self.results for name in result.missing
        ]

    @property
    def failures(self) -> dict[str, Report]:
        """Return the reports of the cases that do not pass, by case and dtype."""
        return {x.name: x.report for x in self.results if x.report is not None and (x.wrong or x.suspect)}

    @property
    def passed(self) -> int:
        """Return how many cases pass."""
        return len(self.given) - len(self.failures)

    @property
    def suspect(self) -> bool:
        """Return whether any case is suspect."""
        return any(result.suspect for result in self.results)

    @property
    def status(self) -> int:
        """Return 0 for conformant, 1 if something is wrong, 2 if something is suspect or missing."""
        if any(result.wrong for result in self.results):
            return 1
        return 2 if self.suspect or not self.given or (self.missing and not self.partial) else 0

    @property
    def summary(self) -> str:
        """Return one line that sums up the check, short enough for a badge."""
        right = "identical" if self.level == EXACT_LEVEL else "conformant"
        word = (right, f"not {right}", "inconclusive" if self.suspect else "incomplete")[self.status]
        without = len(self.results) - len(self.given)
        lacking = sum(bool(result.missing) for result in self.results)
        counts = [f"{self.passed} of {len(self.results)} cases pass"]
        if self.level == EXACT_LEVEL:
            rows = [row for report in self.given for row in report.rows]
            counts += [f"{sum(row.verdict == IDENTICAL for row in rows):,} of {len(rows):,} taps identical"]
        counts += [f"{without} not given"] if without else []
        counts += [f"{lacking} with outputs missing"] if lacking else []
        return f"ltx2ref kit: {word}, {', '.join(counts)}"

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data, for `--json`."""
        return {
            "summary": self.summary,
            "status": self.status,
            "level": self.level,
            "partial": self.partial,
            "missing": self.missing,
            "results": [asdict(x) for x in self.results],
        }


def verdicts(report: Report) -> set[str]:
    """Return the verdicts on the taps of one case."""
    return {row.verdict for row in report.rows}
