"""Write the report of an audit as one web page that needs no network, and can be read without JavaScript.

Names and fingerprints come from foreign files, so none of them is trusted. `tag` escapes attributes and `escape`
escapes text; the details are JSON without a `<`; and the page's policy allows only the style and the script of
report.html.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ..truth import SHARE
from .chart import chart, stage_of
from .markup import number, tag
from .rows import DIVERGED, IDENTICAL, MISSING, ROUNDING, SHAPE, SUSPECT, VERDICTS, Report, TapRow

MEANING = {
    IDENTICAL: "the same bits",
    ROUNDING: "within the budget, or equal after rounding to the coarser of the two dtypes",
    SUSPECT: "beyond rounding, but too small, or too uncertain, to be called a bug",
    DIVERGED: "another computation",
    SHAPE: "the candidate's tensor has another shape",
    MISSING: "the candidate has no such tap",
}
COLUMNS = {  # the table's columns after name and verdict
    "Differs by": "relative",
    "Largest": "max_abs",
    "ULP": "ulp_max",
    "Error": "error",
    "Ref. error": "reference_error",
    "Budget used": "budget",
    "Origin": "origin",
}
DETAILS = {
    "Difference from the reference": {
        "relative (L2)": "relative",
        "largest absolute": "max_abs",
        "largest, in ULP": "ulp_max",
        "99th percentile, in ULP": "ulp_p99",
        "SQNR, dB": "sqnr_db",
        "cosine": "cosine",
        "equal after rounding": "equal_rounded",
        "estimated from sketches": "estimated",
    },
    "Error against float64": {
        "candidate": "error",
        "reference": "reference_error",
        "budget used": "budget",
        "origin": "origin",
        "local error": "local_error",
        "amplification": "amplification",
    },
    "Where it is largest": {"coordinate": "worst", "reference": "worst_reference", "candidate": "worst_candidate"},
    "Tensors": {
        "reference's shape": "shape",
        "candidate's shape": "candidate_shape",
        "reference's dtype": "dtype",
        "candidate's dtype": "candidate_dtype",
    },
}
FULL_DIGITS = {"cosine", "worst_reference", "worst_candidate"}  # fields that are shown with nine digits


def html(report: Report) -> str:
    """Return the whole page.

    It loads nothing, so it can be mailed, attached to an issue, or kept by a CI.
    """
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    content = {
        "policy": policy(template),
        "verdict": escape(report.verdict),
        "sentence": breakable(report.sentence),
        "names": names(report),
        "hints": hints(report),
        "summary": verdict_counts(report.rows),
        "first": first(report),
        "chart": chart(report),
        "checkboxes": checkboxes(report.rows),
        "head": head(),
        "rows": "\n".join(row(i, tap) for i, tap in enumerate(report.rows)),
        "data": details_json(report.rows),
        "fingerprints": fingerprints(report),
        "notes": bullets("Notes", report.notes),
        "legend": legend(),
        "share": number(SHARE),
    }
    # All slots are filled in one pass, so that a foreign text that contains the name of a slot stays text.
    page = re.sub(r"\{\{(\w+)\}\}", lambda slot: content[slot[1]], template)
    return page.encode(errors="replace").decode()  # a lone surrogate cannot be encoded


def policy(template: str) -> str:
    """Return a Content-Security-Policy that loads nothing and allows only the template's own style and script."""

    def source(element: str) -> str:
        text = template.split(f"<{element}>")[1].split(f"</{element}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; style-src {source('style')}; script-src {source('script')}"


def names(report: Report) -> str:
    """Return which candidate was compared with which reference, as markup."""

    def name(side: dict[str, Any], role: str) -> str:
        return tag("b", escape(f"{side.get('implementation') or role} {side.get('version') or ''}".strip()))

    return f"{name(report.candidate, 'a candidate')} against {name(report.reference, 'a reference')}"


def bullets(title: str, texts: Sequence[str]) -> str:
    """Return a section with a list, or nothing if there are no texts."""
    items = [tag("li", escape(text)) for text in texts]
    return tag("section", tag("h2", title), tag("ul", *items), class_="bullets") if items else ""


def breakable(text: str) -> str:
    """Escape a text, and let long names break after a dot or an underscore, for narrow screens."""
    return re.sub(r"(?<=[._])(?=\w)", "<wbr>", escape(text))


def hints(report: Report) -> str:
    """Return those hints on the first divergence that are not in the sentence already."""
    return bullets("Looks like", [hint for hint in report.hints if hint not in report.sentence])


def verdict_counts(rows: list[TapRow]) -> str:
    """Show how many taps have which verdict, as a bar and in words."""
    counts, x = Counter(tap.verdict for tap in rows), 0
    bar, words = [], []
    for verdict in (v for v in VERDICTS if counts[v]):
        bar.append(tag("rect", x=x, y=0, width=counts[verdict], height=1, class_=verdict))
        words.append(tag("li", tag("b", f"{counts[verdict]:,}"), f" {verdict}", class_=verdict))
        x += counts[verdict]
    drawing = tag("svg", *bar, viewBox=f"0 0 {max(x, 1)} 1", preserveAspectRatio="none", aria_hidden="true")
    return drawing + tag("ul", *words, aria_label=f"Verdicts of {x:,} taps")


def first(report: Report) -> str:
    """Show the numbers of the first divergent tap, before any table."""
    for i, tap in enumerate(report.rows):
        if tap.name == report.first:
            title = tag("h2", "First divergence ", tag("a", breakable(tap.name), href=f"#t{i}"))
            return tag("section", title, facts(tap), class_="first")
    return ""


def facts(tap: TapRow) -> str:
    """Show the numbers known about a tap, as lists.

    The page's script builds the same lists from the data.
    """
    groups = []
    for title, fields in DETAILS.items():
        known = [(label, text(tap, name)) for label, name in fields.items()]
        pairs = [tag("div", tag("dt", label), tag("dd", escape(value))) for label, value in known if value is not None]
        groups += [tag("div", tag("h3", title), tag("dl", *pairs))] if pairs else []
    return tag("div", *groups, class_="facts")


def text(tap: TapRow, name: str) -> str | None:
    """Return a field of a tap as text, or None if it has nothing to say."""
    value: Any = getattr(tap, name)
    if value is None or (name == "estimated" and not value):
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value, digits=9 if name in FULL_DIGITS else 4)
    return f"({', '.join(map(str, value))})" if isinstance(value, tuple | list) else str(value)


def checkboxes(rows: list[TapRow]) -> str:
    """Return a checkbox for each verdict that occurs, to filter the table."""
    counts = Counter(tap.verdict for tap in rows)
    return "".join(
        tag("label", tag("input", type="checkbox", value=verdict, checked=""), f" {verdict}", class_=verdict)
        for verdict in VERDICTS
        if counts[verdict]
    )


def head() -> str:
    """Return the header cells of the table."""
    return "".join(tag("th", name, scope="col") for name in ("Tap", "Verdict", *COLUMNS))


def row(i: int, tap: TapRow) -> str:
    """Return a line of the table.

    The page's script reads the verdict from the line's class, and the details from the same line of the data.
    """
    looks = [tag("small", escape("; ".join(tap.hints)))] if tap.hints else []
    title = tag("th", tag("span", breakable(tap.name)), *looks, scope="row")
    cells = [tag("td", cell(tap, name)) for name in COLUMNS.values()]
    stage = {"data_stage": ""} if stage_of(tap.name) else {}
    return tag("tr", title, tag("td", escape(tap.verdict)), *cells, id=f"t{i}", class_=tap.verdict, **stage)


def cell(tap: TapRow, name: str) -> str:
    """Return a field of a tap as markup, with ≈ for estimates."""
    value = getattr(tap, name)
    if isinstance(value, str):
        return escape(value)
    return ("≈ " if tap.estimated and name == "relative" and value else "") + number(value)


def details_json(rows: list[TapRow]) -> str:
    """Return as compact JSON the details that a click shows for each tap.

    Up to 5,000 lists in the page itself would make it slow.
    """
    labels = [[title, [*fields]] for title, fields in DETAILS.items()]
    values = [
        [[*(text(tap, name) for fields in DETAILS.values() for name in fields.values())], tap.hints] for tap in rows
    ]
    island = json.dumps({"labels": labels, "taps": values}, ensure_ascii=False, separators=(",", ":"))
    return island.replace("<", r"\u003c")  # so that it contains neither </script> nor <!--


def fingerprints(report: Report) -> str:
    """Return the fingerprints of both sides, a line for each fact, marked where they differ."""
    reference, candidate = flat(report.reference), flat(report.candidate)
    lines = []
    for name in reference | candidate:
        values = [escape(side.get(name, "—")) for side in (reference, candidate)]
        mark = {} if values[0] == values[1] else {"class_": "differs"}
        lines.append(tag("tr", tag("th", escape(name), scope="row"), *(tag("td", value) for value in values), **mark))
    return "".join(lines) or tag("tr", tag("td", "not recorded", colspan=3))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a nested dict as one level, with names joined by dots."""
    out: dict[str, str] = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": str(value)}
    return out


def legend() -> str:
    """Return each verdict with its meaning."""
    return "".join(tag("dt", verdict, class_=verdict) + tag("dd", MEANING[verdict]) for verdict in VERDICTS)
