"""Show the causes of a report: how far each one alone moves the outputs, as a number and a bar, and what it is."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from ..trace.taps import PROJECTED
from .markup import breakable, explained, folded, number, power_of_ten, tag
from .rows import BUG, CONVENTION, ROUNDING, Cause, Report, without_block

MEANING_OF_CAUSE = {
    BUG: "another computation: no convention that the reference knows, and no rounding, explains it",
    CONVENTION: "another choice of a known implementation, for which the reference has a switch",
    ROUNDING: "the same operations, rounded more often",
}
BAR_WIDTH, BAR_HEIGHT = 160, 12  # of a bar
DECADES = 12  # smaller effects have no bar
FEW = 3  # taps that are not folded away


def causes_counted(causes: Sequence[Cause]) -> str:
    """Return how many causes there are, by verdict: "3 causes: 2 bugs and 1 convention"."""
    counts = Counter(cause.verdict for cause in causes)
    parts = [f"{n} {kind}{'s' if n > 1 and kind != ROUNDING else ''}" for kind, n in counts.items()]
    if not parts[1:]:
        (kind,) = counts
        if len(causes) == 1:
            return f"1 cause: {kind if kind == ROUNDING else f'a {kind}'}"
        return f"{len(causes)} causes, all of them {kind if kind == ROUNDING else f'{kind}s'}"
    return f"{len(causes)} causes: {', '.join(parts[:-1])} and {parts[-1]}"


def cause_list(report: Report) -> str:
    """Return the section with all causes, or nothing if there are none."""
    if not report.causes:
        return ""
    own = own_error(report)
    low, high = decades([*(cause.effect for cause in report.causes), own])
    lines = {tap.name: i for i, tap in enumerate(report.rows)}
    items = [item(cause, lines, own, low, high) for cause in report.causes]
    words = {
        "effect": "How far the outputs move if the reference is given this one difference and no other: the norm (L2) "
        "of the change, divided by that of the outputs. At 1 the change is as large as the outputs. Bars are "
        f"logarithmic, from {power_of_ten(low)} to {power_of_ten(high)}."
        + ("" if own is None else f" The dashed line, {number(own, 2)}, is the reference's own rounding error."),
        "budget": "What rounding explains at one stage, given the candidate's own inputs.",
    } | {word: f"{said[0].upper()}{said[1:]}." for word, said in MEANING_OF_CAUSE.items() if word in kinds(report)}
    title = tag("h2", "Causes, by their effect on the outputs", id="causes")
    return tag("section", title, tag("ol", *items, class_="causes"), explained(words), aria_labelledby="causes")


def kinds(report: Report) -> set[str]:
    """Return the verdicts that the causes have."""
    return {cause.verdict for cause in report.causes}


def own_error(report: Report) -> float | None:
    """Return the reference's own error in the outputs, or None if it is not known."""
    errors = [tap.reference_error for tap in report.rows if tap.name in PROJECTED and tap.reference_error]
    return max(errors, default=None)


def decades(values: Sequence[float | None]) -> tuple[int, int]:
    """Return the powers of ten between which all values lie, as far as they can be drawn; at least up to 1."""
    logs = [math.log10(x) for x in values if x and math.isfinite(x)]
    high = math.ceil(max([0.0, *logs]))
    return max(math.floor(min([-1.0, *logs])), high - DECADES), high


def item(cause: Cause, lines: Mapping[str, int], own: float | None, low: int, high: int) -> str:
    """Show one cause: its effect, what it looks like, its verdict and place, its other taps and further hints."""
    shown = "unknown" if cause.effect is None else number(cause.effect, 2)
    effect = tag("div", tag("b", shown), bar(cause, own, low, high), class_="effect")
    what = tag("p", breakable(cause.what or "Looks like nothing known."), class_="what")
    verdict = tag("span", escape(cause.verdict), class_="kind", title=MEANING_OF_CAUSE.get(cause.verdict, ""))
    parts = [what, tag("p", verdict, " at ", link(cause.place, cause.taps[:1], lines), extent(cause), class_="at")]
    return tag("li", effect, tag("div", *parts, others(cause, lines), further(cause)), class_=cause.verdict)


def bar(cause: Cause, own: float | None, low: int, high: int) -> str:
    """Draw an effect as a bar on a logarithmic scale, with a line for each power of ten."""

    def x(value: float) -> float:
        level = math.log10(value) if math.isfinite(value) else high
        return round((min(max(level, low), high) - low) / (high - low) * BAR_WIDTH, 1)

    grid = "".join(f"M{x(10.0**decade)},0V{BAR_HEIGHT}" for decade in range(low + 1, high))
    drawing = [tag("rect", width=BAR_WIDTH, height=BAR_HEIGHT, class_="track"), tag("path", d=grid, class_="grid")]
    if cause.effect:
        drawing.append(tag("rect", width=max(x(cause.effect), 1.5), y=2, height=BAR_HEIGHT - 4, class_="bar"))
    if own is not None:
        drawing.append(tag("path", d=f"M{x(own)},0V{BAR_HEIGHT}", class_="own"))
    return tag("svg", *drawing, viewBox=f"0 0 {BAR_WIDTH} {BAR_HEIGHT}", preserveAspectRatio="none", aria_hidden="true")


def extent(cause: Cause) -> str:
    """Return how large the difference is at its place, or nothing if that is not known."""
    if cause.size is None:
        return ""
    most = "up to " if cause.taps[1:] else ""
    budget = "" if cause.budget is None else f", {number(cause.budget)} times the budget"
    return tag("small", f", which differs by {most}{number(cause.size, 2)}{budget}")


def others(cause: Cause, lines: Mapping[str, int]) -> str:
    """Return the other taps at which a cause originates, folded away if they are many."""
    links = [link(name, taps, lines) for name, taps in grouped(cause).items() if name != cause.place]
    if not links:
        return ""
    if len(links) <= FEW:
        return tag("p", f"Also at {', '.join(links)}", class_="also")
    return folded(f"Also at {len(links)} other taps", tag("p", ", ".join(links)))


def grouped(cause: Cause) -> dict[str, list[str]]:
    """Return the taps of a cause by name, those that are in every block under one name with a star."""
    groups: dict[str, list[str]] = {}
    for name in cause.taps:
        groups.setdefault(without_block(name), []).append(name)
    found: dict[str, list[str]] = {}
    for group, taps in groups.items():
        whole = group == cause.place or len(taps) == cause.blocks > 1
        found |= {group: taps} if whole else {name: [name] for name in taps}
    return found


def further(cause: Cause) -> str:
    """Return what else a cause looks like, folded away."""
    hints = [hint for hint in cause.hints if hint != cause.what]
    title = "1 further explanation fits" if len(hints) == 1 else f"{len(hints)} further explanations fit"
    return folded(title, tag("ul", *(tag("li", escape(hint)) for hint in hints))) if hints else ""


def link(name: str, taps: Sequence[str], lines: Mapping[str, int]) -> str:
    """Return a name as a link to the line of the first of these taps."""
    at = next((lines[tap] for tap in taps if tap in lines), None)
    text = breakable(name)
    return tag("code", text if at is None else tag("a", text, href=f"#t{at}"))
