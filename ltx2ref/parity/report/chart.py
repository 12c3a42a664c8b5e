"""Draw error against depth, one drawing for each stream, as SVG in the page's colours."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import groupby

from ..trace.taps import PROJECTED
from ..truth import FLOOR, SHARE
from .markup import breakable, number, power_of_ten, tag
from .rows import DIVERGED, IDENTICAL, MISSING, ROUNDING, SUSPECT, Report, TapRow, joined_names

STREAMS = ("video", "audio")
ENTRANCE = -1.0  # the depth before the first block; a block's depth is its number
EXIT = math.inf
ENDS = {
    "proj_in": ("video", ENTRANCE),
    "audio_proj_in": ("audio", ENTRANCE),
    "sample": ("video", EXIT),
    "audio_sample": ("audio", EXIT),
}
BLOCK_TAP = re.compile(r"transformer_blocks\.([0-9]{1,4})\.(.+)")
WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 34, 52  # margins
MOST_DECADES = 18
MARKERS = {  # the shapes differ, so that nobody depends on colours
    IDENTICAL: "M-3,0a3,3 0 1 0 6,0a3,3 0 1 0 -6,0z",
    ROUNDING: "M-3,0a3,3 0 1 0 6,0a3,3 0 1 0 -6,0z",
    SUSPECT: "M-3.5,-3.5h7v7h-7z",
    DIVERGED: "M0,-5.5L5.5,0L0,5.5L-5.5,0z",
}
CROSS = "M-4,-4L4,4M-4,4L4,-4"


@dataclass(frozen=True)
class Point:
    """One stage of a stream in the drawing."""

    depth: float
    line: int  # of the report's table
    tap: TapRow
    value: float | None  # the candidate's error, or without a truth its difference from the reference
    reference: float | None  # the reference's own error

    @property
    def inside(self) -> bool:
        """Tell whether the point was compared, and is not just the output."""
        return self.depth != EXIT and self.tap.verdict != MISSING

    @property
    def allowed(self) -> float | None:
        """Return the budget relative to the truth, or None without a truth."""
        return None if self.reference is None else SHARE * self.reference + FLOOR

    @property
    def title(self) -> str:
        """Return the text that is shown when the mouse rests on the point."""
        where = {ENTRANCE: "entrance", EXIT: "output"}.get(self.depth) or f"block {self.depth:.0f}"
        own = "" if self.reference is None else f", reference's {number(self.reference)}"
        return f"{where}: {number(self.value)}{own}, {self.tap.verdict}"


@dataclass(frozen=True)
class Scale:
    """The mapping from depth and error to the drawing.

    Both streams share one, so that they can be compared.
    """

    layers: int
    low: int  # the power of ten at the bottom
    high: int  # the power of ten at the top
    zeros: bool  # there is room below for zeros, which have no logarithm

    def x(self, depth: float) -> float:
        """Return the horizontal position of a depth."""
        return round(LEFT + (min(depth, self.layers) + 1) / (self.layers + 1) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float | None) -> float:
        """Return the vertical position of a value.

        NaN and infinity are at the upper edge, zero and None at the lower one.
        """
        bottom = self.low - self.zeros
        level = bottom if not value else math.log10(abs(value)) if math.isfinite(value) else self.high
        height = (min(max(level, bottom), self.high) - bottom) / (self.high - bottom)
        return round(HEIGHT - BOTTOM - height * (HEIGHT - TOP - BOTTOM), 1)


def stage_of(name: str) -> tuple[str, float] | None:
    """Return the stream and the depth of a tap at the end of a stage, or None for taps within a stage."""
    block = BLOCK_TAP.fullmatch(name)
    if block:
        return (block[2], float(block[1])) if block[2] in STREAMS else None
    return ENDS.get(name)


def chart(report: Report) -> str:
    """Return the section with the drawings of both streams, or a sentence on what was not recorded.

    A report in which every stage is identical has nothing to draw.
    """
    truth = any(tap.error is not None for tap in report.rows)
    streams: dict[str, list[Point]] = {stream: [] for stream in STREAMS}
    for line, tap in enumerate(report.rows):
        if where := stage_of(tap.name):
            point = Point(where[1], line, tap, tap.error if truth else tap.relative, tap.reference_error)
            streams[where[0]].append(point)
    drawn = {stream: points for stream, points in streams.items() if any(p.inside for p in points)}
    every = [p for points in drawn.values() for p in points]
    if every and all(p.value == 0 for p in every):
        return ""
    scale, mark = scale_of(every), first_depth(report)
    subject = "error against float64" if truth else "difference from the reference"
    figures = [
        figure(stream, sorted(points, key=lambda p: p.depth), scale, mark, subject) for stream, points in drawn.items()
    ]
    title = f"{subject.capitalize()} (relative, L2), by depth" if drawn else "What could not be localised"
    parts = [tag("div", *figures, class_="chart"), key(truth)] if drawn else []
    if len(drawn) < len(STREAMS):
        parts.append(tag("p", undrawn(report, [*drawn])))
    return tag("section", tag("h2", title, id="depth"), *parts, aria_labelledby="depth")


def key(truth: bool) -> str:
    """Return what the lines and marks of the drawings mean."""

    def swatch(kind: str, path: str, text: str) -> str:
        return tag("span", tag("svg", tag("path", d=path, class_=kind), viewBox="0 0 28 12"), text)

    lines = [swatch("candidate", "M0,6H28", "candidate")]
    if truth:
        lines.append(swatch("own", "M0,6H28", "the reference's own error, in the same dtype"))
        lines.append(swatch("band", "M0,0H28V12H0z", "budget: what rounding explains"))
    marks = ("● identical or rounding", "■ suspect", "◆ diverged", "\N{MULTIPLICATION SIGN} nothing to compare")
    return tag("p", *lines, *(tag("span", mark) for mark in marks), class_="key muted", aria_hidden="true")


def outputs_alone(report: Report) -> bool:
    """Tell whether only outputs were compared."""
    given = {tap.name for tap in report.rows if tap.verdict != MISSING}
    return bool(given) and given <= {*PROJECTED, *PROJECTED.values()}


def undrawn(report: Report, drawn: list[str]) -> str:
    """Return a sentence on the streams that are not drawn: what was not recorded, and so cannot be localised."""
    if drawn:
        (other,) = {*STREAMS} - {*drawn}
        return f"The {other} stream is not drawn: no block's {other} output was compared."
    if outputs_alone(report):
        taps = " and ".join(tag("code", breakable(f"transformer_blocks.0.{stream}")) for stream in STREAMS)
        return (
            "Only the outputs were given. They show whether something differs, but not in which block, stream or stage "
            f"it begins. For that, let the port return taps as well, such as {taps}."
        )
    given = [tap.name for tap in report.rows if tap.verdict != MISSING]
    if not given:
        return "Nothing was compared."
    names = breakable(joined_names(given, 0, 6))
    return f"No block's output was compared, so nothing is drawn by depth. What was given: {names}."


def scale_of(points: list[Point]) -> Scale:
    """Return a scale that fits all points."""
    drawn = [x for p in points for x in (p.value, p.reference, p.allowed)]
    decades = [math.log10(abs(x)) for x in drawn if x and math.isfinite(x)] or [-8, 0]
    high = math.ceil(max(decades))
    low = max(min(math.floor(min(decades)), high - 2), high - MOST_DECADES)
    layers = 1 + max([0, *(int(p.depth) for p in points if p.depth != EXIT)])
    return Scale(layers, low, high, zeros=any(not p.value for p in points))


def first_depth(report: Report) -> float | None:
    """Return the depth at which the first divergence is marked, or None if there is none.

    A tap within a block lies between two blocks' outputs.
    """
    names = [tap.name for tap in report.rows]
    if report.first not in names:
        return None
    if block := BLOCK_TAP.fullmatch(report.first):
        return float(block[1]) - (0 if block[2] in STREAMS else 0.5)
    before = names[: names.index(report.first)]
    return EXIT if any(BLOCK_TAP.fullmatch(name) for name in before) else ENTRANCE


def figure(stream: str, points: list[Point], scale: Scale, mark: float | None, subject: str) -> str:
    """Return the drawing of one stream, with its caption."""
    drawing = [
        band(points, scale),
        *axes(scale),
        line("own", points, [p.reference for p in points], scale),
        line("candidate", points, [p.value for p in points], scale),
        *first_mark(mark, scale),
        *(marker(p, scale) for p in points),
    ]
    worst = max(points, key=lambda p: p.value or 0)
    about = f"The candidate's {subject}, {stream} stream, against depth; largest at {worst.title}."
    svg = tag("svg", *drawing, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=about)
    caption = tag("figcaption", tag("b", stream.capitalize()), f" stream: {subject}")
    return tag("figure", caption, svg)


def axes(scale: Scale) -> list[str]:
    """Draw a line for each power of ten, and label the depths."""
    out = []
    for decade in range(scale.low, scale.high + 1, math.ceil((scale.high - scale.low) / 6)):
        out += level(scale.y(10.0**decade), power_of_ten(decade))
    if scale.zeros:
        out += level(scale.y(0), "0")
    step = 2 ** max(0, math.ceil(math.log2(scale.layers / 8)))
    depths = [d for d in range(0, scale.layers, step) if min(d + 1, scale.layers - d) >= step / 2]
    labels = [(ENTRANCE, "in"), *((d, str(d)) for d in depths), (EXIT, "out")]
    out += [tag("text", label, x=scale.x(d), y=HEIGHT - BOTTOM + 20, class_="depth") for d, label in labels]
    return [*out, tag("text", "after block", x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_="depth")]


def level(y: float, label: str) -> list[str]:
    """Draw a horizontal line with its label."""
    return [
        tag("path", d=f"M{LEFT},{y}H{WIDTH - RIGHT}", class_="grid"),
        tag("text", label, x=LEFT - 8, y=y + 4, class_="decade"),
    ]


def band(points: list[Point], scale: Scale) -> str:
    """Draw the budget at each depth."""
    known = [p for p in points if p.allowed is not None]
    if not known:
        return ""
    edge = "L".join(f"{scale.x(p.depth)},{scale.y(p.allowed)}" for p in known)
    floor = HEIGHT - BOTTOM
    return tag("path", d=f"M{scale.x(known[0].depth)},{floor}L{edge}V{floor}z", class_="band")


def line(kind: str, points: list[Point], values: Iterable[float | None], scale: Scale) -> str:
    """Draw a line that is interrupted where a value is not known."""
    runs = groupby(zip(points, values, strict=True), lambda pair: pair[1] is not None)
    paths = ["M" + "L".join(f"{scale.x(p.depth)},{scale.y(x)}" for p, x in run) for known, run in runs if known]
    return tag("path", d="".join(paths), class_=kind) if paths else ""


def marker(p: Point, scale: Scale) -> str:
    """Draw a stage as a link to its line of the table.

    It is not reached by the tab key: for keyboards the table itself is the way there.
    """
    symbol = tag("path", d=MARKERS.get(p.tap.verdict, CROSS), class_=p.tap.verdict)
    hit = tag("circle", r=8, class_="hit")
    at = f"translate({scale.x(p.depth)},{scale.y(p.value)})"
    moved = tag("g", tag("title", escape(p.title)), hit, symbol, transform=at)
    return tag("a", moved, href=f"#t{p.line}", tabindex=-1)


def first_mark(mark: float | None, scale: Scale) -> list[str]:
    """Draw the mark of the first divergence, or nothing."""
    if mark is None:
        return []
    x = scale.x(mark)
    side = "after" if x < (LEFT + WIDTH) / 2 else "before"
    label = tag("text", "first divergence", x=x, y=TOP - 14, class_=f"first {side}")
    return [tag("path", d=f"M{x},{TOP - 10}V{HEIGHT - BOTTOM}", class_="first"), label]
