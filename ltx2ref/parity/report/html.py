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
from html import escape
from importlib.resources import files
from typing import Any

from ..truth import SHARE
from .chart import chart, stage_of
from .effects import cause_list
from .lead import MEANING, about, bullets, conventions, flat, page_title, story
from .markup import breakable, explained, number, tag
from .rows import DIVERGED, IDENTICAL, MISSING, PROPAGATED, ROUNDING, SHAPE, SUSPECT, VERDICTS, Report, TapRow

COLUMNS = {  # the table's columns after name and verdict, each with a few words below it
    "Differs by": ("relative", "relative, L2"),
    "Largest": ("max_abs", "absolute"),
    "ULP": ("ulp_max", "largest, in steps"),
    "Error": ("error", "against float64"),
    "Ref. error": ("reference_error", "against float64"),
    "Budget used": ("budget", "up to 1: rounding"),
    "Origin": ("origin", "of the error"),
}
MEANING_OF_COLUMN = {
    "Differs by": "the relative difference: the norm (L2) of candidate minus reference, divided by the reference's",
    "Largest": "the largest difference of one element",
    "ULP": "the same in units in the last place: how many steps between neighbouring numbers of the coarser dtype",
    "Error": "how far the candidate is from the same computation in float64, relative as above; beside it, the same of "
    "the reference",
    "Budget used": f"the candidate's error divided by its budget, which is {number(SHARE)} times the reference's error "
    "and a little more, and what rounded sinusoids and RoPE tables can do where they were not given: up to 1, rounding "
    "explains it",
    "Origin": "whether the error begins in this stage, given the candidate's own inputs, or only came in with them",
}
SEVERITY = {DIVERGED: 0, SHAPE: 0, SUSPECT: 2, ROUNDING: 3, IDENTICAL: 4, MISSING: 5}  # in the order of the table
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
    order = failures_first(report.rows)
    content = {
        "policy": policy(template),
        "title": escape(page_title(report)),
        "verdict": escape(report.verdict),
        "about": about(report),
        "story": story(report),
        "summary": verdict_counts(report.rows),
        "causes": cause_list(report),
        "conventions": conventions(report),
        "notes": bullets("Notes", report.notes),
        "chart": chart(report),
        "first": first(report),
        "order": "Taps" if report.passed else "Taps, failures first",
        "columns": explained(MEANING_OF_COLUMN),
        "checkboxes": checkboxes(report.rows),
        "head": head(),
        "rows": "\n".join(row(i, report.rows[i]) for i in order),
        "data": details_json(report.rows),
        "fingerprints": fingerprints(report),
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
            heading = tag("h2", "First difference in numbers: ", tag("a", breakable(tap.name), href=f"#t{i}"))
            return tag("section", heading, facts(tap), class_="first")
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


def failures_first(rows: list[TapRow]) -> list[int]:
    """Return the numbers of all taps: failures first, those that originate there before others, missing ones last.

    Otherwise they are in the order of the computation.
    """

    def severity(i: int) -> int:
        failed = rows[i].verdict in (DIVERGED, SHAPE)
        return SEVERITY.get(rows[i].verdict, 0) + (failed and rows[i].origin == PROPAGATED)

    return sorted(range(len(rows)), key=severity)


def checkboxes(rows: list[TapRow]) -> str:
    """Return a checkbox for each verdict that occurs, to filter the table. Missing taps are shown only on demand."""
    found = [verdict for verdict in VERDICTS if any(tap.verdict == verdict for tap in rows)]
    return "".join(
        tag(
            "label",
            tag(
                "input", type="checkbox", value=verdict, **({} if verdict == MISSING and found[1:] else {"checked": ""})
            ),
            f" {verdict}",
            class_=verdict,
        )
        for verdict in found
    )


def head() -> str:
    """Return the header cells of the table."""
    columns = {"Tap": "", "Verdict": ""} | {name: said for name, (_, said) in COLUMNS.items()}
    return "".join(
        tag("th", name, *([tag("small", said)] if said else []), scope="col", title=MEANING_OF_COLUMN.get(name, ""))
        for name, said in columns.items()
    )


def row(i: int, tap: TapRow) -> str:
    """Return a line of the table.

    The page's script reads the verdict from the line's class, and the details from the same line of the data.
    """
    looks = [tag("small", escape("; ".join(tap.hints)))] if tap.hints else []
    title = tag("th", tag("span", breakable(tap.name)), *looks, scope="row")
    cells = [tag("td", cell(tap, name)) for name, _ in COLUMNS.values()]
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


def legend() -> str:
    """Return each verdict with its meaning."""
    return "".join(tag("dt", verdict, class_=verdict) + tag("dd", MEANING[verdict]) for verdict in VERDICTS)
