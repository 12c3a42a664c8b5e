"""Lead the page with what was compared, what was found, and which conventions the candidate follows."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .assemble import Finding, finding_in
from .chart import outputs_alone
from .effects import causes_counted, link
from .markup import breakable, folded, tag
from .rows import DIVERGED, IDENTICAL, MISSING, ROUNDING, SHAPE, SUSPECT, Report, TapRow, joined_names

MEANING = {
    IDENTICAL: "the same bits",
    ROUNDING: "within the budget, or equal after rounding to the coarser of the two dtypes",
    SUSPECT: "beyond rounding, but too small, or too uncertain, to be called a bug",
    DIVERGED: "another computation",
    SHAPE: "the candidate's tensor has another shape",
    MISSING: "the candidate has no such tap",
}
COMMON_FACTS = ("dtype", "arithmetic", "device", "torch", "python")  # of a fingerprint: what the top of the page says


def page_title(report: Report) -> str:
    """Return what the browser shows as the name of the page."""
    who = str(report.candidate.get("implementation") or "a candidate")
    return ", ".join(filter(None, (f"Audit: {report.verdict}", report.case, who)))


def about(report: Report) -> str:
    """Return what was compared, as markup: the case, both sides, and what both of them have in common or not."""

    def name(side: dict[str, Any], role: str) -> str:
        return f"{side.get('implementation') or role} {side.get('version') or ''}".strip()

    sides = [flat(report.candidate), flat(report.reference)]
    facts = {
        "case": report.case,
        "candidate": name(report.candidate, "a candidate"),
        "reference": name(report.reference, "a reference"),
    }
    for fact in COMMON_FACTS:
        values = [side.get(fact) or side.get(f"versions.{fact}") for side in sides]
        facts[fact] = " against ".join(dict.fromkeys(filter(None, values)))
    pairs = [tag("div", tag("dt", fact), tag("dd", breakable(value))) for fact, value in facts.items() if value]
    return tag("dl", *pairs, class_="about")


def story(report: Report) -> str:
    """Return what was found: how many causes, the place of the first divergence, what it looks like, what came before.

    A report whose sentence says something else keeps its sentence.
    """
    finding = finding_in(report.rows)
    if finding.first is None or str(finding) != report.sentence:
        more = bullets("Looks like", [hint for hint in report.hints if hint not in report.sentence])
        return tag("p", breakable(report.sentence), class_="sentence") + more
    verdict = finding.first.verdict
    kind = "nothing but rounding" if verdict == ROUNDING else MEANING.get(verdict, verdict)
    if outputs_alone(report):
        lead = f"{kind}; only the outputs were given"
    else:
        lead = causes_counted(report.causes) if report.causes else kind
    parts = sentence_parts(finding, finding.first, report.rows)
    pairs = [tag("div", tag("dt", part), tag("dd", said)) for part, said in parts.items()]
    return tag("p", escape(lead), class_="sentence") + tag("dl", *pairs, class_="story")


def sentence_parts(finding: Finding, first: TapRow, rows: list[TapRow]) -> dict[str, str]:
    """Return the parts of a report's sentence as markup: place, cause, what came before, and what is missing."""
    lines = {tap.name: i for i, tap in enumerate(rows)}
    place = "First rounding" if first.verdict == ROUNDING else "First divergence"
    parts = {place: link(first.name, [first.name], lines) + tag("small", f" {finding.kind}")}
    if first.hints:
        rest = tag("ul", *(tag("li", breakable(hint)) for hint in first.hints[1:]))
        more = folded(f"{len(first.hints) - 1} more", rest) if first.hints[1:] else ""
        parts["Looks like"] = breakable(first.hints[0]) + more
    parts["Before it"] = "nothing was compared" if finding.unseen else "every tap is identical"
    if rounded := finding.rounded_from:
        parts["Before it"] = f"only rounding, from {link(rounded, [rounded], lines)} on"
    if finding.missing:
        some = joined_names([tap.name for tap in rows if tap.verdict == MISSING], 0, 3)
        parts["Missing"] = f"{finding.missing:,} of {finding.of:,} taps: {breakable(some)}"
    return parts


def conventions(report: Report) -> str:
    """Return which conventions the candidate follows, or nothing if that does not show."""
    pairs = [
        tag("div", tag("dt", escape(name)), tag("dd", escape(value))) for name, value in report.conventions.items()
    ]
    if not pairs:
        return ""
    said = "As far as this case can tell them apart; each is the one value that makes the candidate's own numbers."
    return tag(
        "section",
        tag("h2", "Conventions that the candidate follows", id="follows"),
        tag("dl", *pairs, class_="follows"),
        tag("p", said, class_="muted"),
        aria_labelledby="follows",
    )


def bullets(title: str, texts: Sequence[str]) -> str:
    """Return a section with a list, or nothing if there are no texts."""
    items = [tag("li", breakable(text)) for text in texts]
    return tag("section", tag("h2", title), tag("ul", *items), class_="bullets") if items else ""


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested dict as one level, with names joined by dots."""
    out: dict[str, str] = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": str(value)}
    return out
