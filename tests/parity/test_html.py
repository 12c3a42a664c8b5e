"""The HTML report of an audit is complete, safe with foreign text, readable without JavaScript, and works in a browser.

pytest tests/parity/test_html.py
"""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import ltx2ref
from ltx2ref.parity.audit import audit, candidate_named
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.compare import compare
from ltx2ref.parity.report.assemble import assemble
from ltx2ref.parity.report.chart import Scale, first_depth, stage_of
from ltx2ref.parity.report.effects import BAR_WIDTH
from ltx2ref.parity.report.html import COLUMNS, MEANING_OF_COLUMN, html
from ltx2ref.parity.report.lead import MEANING
from ltx2ref.parity.report.markup import number
from ltx2ref.parity.report.rows import (
    BUG,
    CONVENTION,
    DIVERGED,
    IDENTICAL,
    MISSING,
    ORIGINATED,
    PROPAGATED,
    ROUNDING,
    SHAPE,
    SUSPECT,
    VERDICTS,
    Cause,
    Report,
    TapRow,
)
from ltx2ref.parity.truth import FLOOR, SHARE

ENTRANCE = [
    "video_coords",
    "audio_coords",
    *(
        f"{rope}.{part}"
        for rope in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
        for part in ("cos", "sin")
    ),
    "proj_in",
    "audio_proj_in",
    *(
        f"{layer}.{part}"
        for layer in (
            "time_embed",
            "audio_time_embed",
            "prompt_adaln",
            "audio_prompt_adaln",
            "av_cross_attn_video_scale_shift",
            "av_cross_attn_audio_scale_shift",
            "av_cross_attn_video_a2v_gate",
            "av_cross_attn_audio_v2a_gate",
        )
        for part in ("sinusoid", "emb", "linear")
    ),
]
ATTENTION = ("stream", "rows", "input", "context", "norm_q", "norm_k", "to_v", "q", "k", "sdpa", "gate", "to_out")
BLOCK = [
    *(
        f"{name}.{part}"
        for name in ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
        for part in ATTENTION
    ),
    *(
        f"{name}.{part}"
        for name in ("ff", "audio_ff")
        for part in ("stream", "rows", "input", "proj", "activation", "output")
    ),
    "video",
    "audio",
]
EXIT = ["norm_out", "audio_norm_out", "proj_out.input", "audio_proj_out.input", "sample", "audio_sample"]
FINGERPRINT = {
    "implementation": "ltx2ref",
    "version": "0.1.0",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "sdpa": "math",
    "tf32": False,
    "versions": {"torch": "2.8.0", "python": "3.11.9", "einops": "0.8.1"},
}
HINT = "rows 0 and 1 swapped: (scale, shift) is used as (shift, scale)"


def noise(*key: Any) -> float:
    """Return a value near 1 that differs from tap to tap and is the same in each run."""
    return 0.75 + zlib.crc32(repr(key).encode()) / 2**33


def names(layers: int) -> list[str]:
    return [*ENTRANCE, *(f"transformer_blocks.{i}.{part}" for i in range(layers) for part in BLOCK), *EXIT]


def made_up(layers: int, bug: str | None = None) -> Report:
    """Make a report like that of a float32 audit: identical in the first half, then rounding, diverged from `bug`."""
    rows, all_names = [], names(layers)
    at = all_names.index(bug) if bug else len(all_names)
    for i, name in enumerate(all_names):
        depth = i / len(all_names) * layers
        own = 1.3e-7 * noise(name, i) * (1 + depth) ** 0.7
        error = own if depth < layers / 2 else own * (0.9 + 0.3 * noise(i, name))
        if i >= at:
            heard = "audio" in name or i > at + len(BLOCK)
            error = 2e-3 * noise(i) * (1 + depth) ** 0.4 * (1 if "audio" in name else 0.05) if heard else error
        rows.append(tap(name, error, own, bug=i == at))
    first = next((row for row in rows if row.verdict == DIVERGED), None)
    if first is None:
        return Report(
            ROUNDING,
            "Nothing diverges: every tap is identical, or within the budget.",
            None,
            rows,
            FINGERPRINT,
            FINGERPRINT | {"implementation": "diffusers", "version": "0.42.1"},
            ["The truth is conditional."],
        )
    return Report(
        DIVERGED,
        f"First divergence at {first.name}, looks like {HINT}; everything before it is within the budget.",
        first.name,
        rows,
        FINGERPRINT,
        FINGERPRINT
        | {
            "implementation": "port.safetensors",
            "version": None,
            "threads": 8,
            "versions": {"torch": "2.9.1", "mlx": "0.30.0"},
        },
        ["The reference repeats itself.", "2 taps of the candidate are not in the reference: a, b."],
        (HINT,),
    )


def tap(name: str, error: float, own: float, bug: bool = False) -> TapRow:
    budget = error / (SHARE * own + FLOOR)
    verdict = IDENTICAL if error == own else ROUNDING if budget <= 1 else SUSPECT if budget < 20 else DIVERGED
    gap = 0.0 if error == own else error
    return TapRow(
        name,
        verdict,
        (2, 105, 128),
        "float32",
        (2, 105, 128),
        "float32",
        max_abs=gap * 7,
        relative=gap,
        ulp_max=round(gap * 2**26),
        ulp_p99=round(gap * 2**24),
        sqnr_db=-20 * math.log10(gap) if gap else None,
        cosine=1 - gap**2 / 2,
        worst=(1, 17, 93),
        worst_reference=-1.2345678,
        worst_candidate=-1.2345678 + gap,
        equal_rounded=not gap,
        error=error,
        reference_error=own,
        budget=budget,
        origin=None if not gap else ORIGINATED if bug else PROPAGATED,
        local_error=own if not bug else error,
        amplification=None if bug else error / own,
        hints=(HINT,) if bug else (),
    )


# ---- without a browser


class Page(HTMLParser):
    """The elements of a page as (name, attributes, inner text), with a check that each one is closed."""

    VOID = ("meta", "input", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, [self.elements[i][0] for i in self.open]

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes), []))
        if name not in self.VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes), []))

    def handle_endtag(self, name: str) -> None:
        assert self.elements[self.open[-1]][0] == name, (self.getpos(), name)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.elements[i][2].append(data)

    def all(self, name: str, **attributes: str) -> list[tuple[str, dict[str, str | None], list[str]]]:
        return [
            element
            for element in self.elements
            if element[0] == name and all(element[1].get(key.rstrip("_")) == value for key, value in attributes.items())
        ]

    def text(self, name: str, **attributes: str) -> list[str]:
        return ["".join(element[2]) for element in self.all(name, **attributes)]


FIRST = "transformer_blocks.3.audio_attn1.rows"
EVIL = """<script>document.body.dataset.hacked=1</script></script><img src=x onerror="document.body.dataset.hacked=1">
<!--<script>{{rows}}" onclick='document.body.dataset.hacked=1' \u2028\ud800&amp;"""
DISPLAYED = EVIL.replace("\ud800", "?")


def hostile() -> Report:
    foreign: dict[str, Any] = {"implementation": EVIL, EVIL: EVIL, "versions": {EVIL: [EVIL]}}
    rows = [
        TapRow(EVIL, DIVERGED, dtype=EVIL, candidate_dtype=EVIL, origin=EVIL, hints=(EVIL,), relative=1.0),
        TapRow("proj_in", MISSING),
        TapRow("audio_proj_in", EVIL),
    ]
    causes = (
        Cause(
            EVIL,
            EVIL,
            EVIL,
            (EVIL, *(f"{EVIL}{i}" for i in range(5))),
            2,
            math.nan,
            math.inf,
            math.nan,
            (EVIL, EVIL + "3"),
        ),
        Cause("proj_in", BUG, None, (EVIL,), 0, None, None, math.inf),
    )
    return Report(
        DIVERGED, EVIL, EVIL, rows, foreign, foreign, [EVIL], (EVIL, "another"), causes, {EVIL: EVIL}, case=EVIL
    )


def with_causes() -> Report:
    """Make a report with three causes, like that of an audit."""
    norms = tuple(
        f"transformer_blocks.{i}.{part}.norm_{x}"
        for i in range(6)
        for part in ("attn1", "audio_attn1", "attn2")
        for x in "qk"
    )
    causes = (
        Cause(
            "av_cross_attn_video_a2v_gate.sinusoid",
            CONVENTION,
            "another convention, exchange = 'other_gate'",
            ("av_cross_attn_video_a2v_gate.sinusoid", "av_cross_attn_audio_v2a_gate.sinusoid"),
            6,
            1.1,
            21583.0,
            0.1,
            ("another convention, exchange = 'other_gate'", "audio_sigma in place of timestep", "nothing of the kind"),
        ),
        Cause("transformer_blocks.*.attn1.norm_q", BUG, "an epsilon of 1e-05", norms, 6, 7e-6, 11.0, 1e-5, ("x",)),
        Cause("transformer_blocks.*.ff.proj", BUG, None, ("transformer_blocks.0.ff.proj",), 6, None, None, None),
    )
    rows = [replace(row, hints=(HINT, "another hint") if row.hints else ()) for row in made_up(6, FIRST).rows]
    return replace(
        assemble(rows, ["accepted: rope.cos: frequencies computed in float32"]),
        reference=FINGERPRINT,
        candidate=FINGERPRINT | {"implementation": "my_port:run", "version": None, "dtype": "bfloat16"},
        causes=causes,
        conventions={"exchange": "other_gate", "q/k norm eps": "1e-05"},
        case="2.3/i2v",
    )


@pytest.mark.parametrize(
    "report",
    [made_up(6, FIRST), made_up(6), with_causes(), hostile(), Report(IDENTICAL, "Identical.", None, [])],
    ids=["diverged", "rounding", "causes", "hostile", "empty"],
)
def test_the_page_is_balanced_and_loads_nothing(report: Report) -> None:
    page = Page(html(report))
    assert not {name for name, _, _ in page.elements} & {"link", "img", "iframe", "object", "base", "embed"}
    for _, attributes, _ in page.elements:
        assert not {"src", "srcset", "style", "action", "xmlns"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
    style = "".join(page.text("style"))
    assert "url(" not in style and "@import" not in style
    assert "{{" not in html(made_up(1))


def test_the_policy_admits_exactly_the_page_s_own_style_and_script() -> None:
    page = Page(html(made_up(1)))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0][1]["content"]
    style, (_, script) = page.text("style")[0], page.text("script")
    hashes = [base64.b64encode(hashlib.sha256(x.encode()).digest()).decode() for x in (style, script)]
    assert policy == f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"


def test_foreign_text_is_text() -> None:
    page = Page(html(hostile()))
    assert len(page.all("script")) == 2 and len(page.all("tr", id="t0")) == 1
    assert page.text("th", scope="row")[0].startswith(DISPLAYED)
    assert page.text("p", class_="sentence") == [DISPLAYED]
    items = page.text("ul", class_="")  # no list has a class
    assert not items and sum(text == DISPLAYED for text in page.text("li")) == 1  # the note alone: the sentence has it
    assert page.text("title")[0].count(DISPLAYED) == 2
    for kind in ("about", "follows"):
        assert DISPLAYED in page.text("dl", class_=kind)[0]
    effects = page.text("div", class_="effect")
    assert effects == ["NaN", "∞"] and page.text("p", class_="what") == [DISPLAYED, "Looks like nothing known."]
    others, further = page.text("details")
    assert f"{DISPLAYED}4" in others and f"{DISPLAYED}3" in further and page.all("a", href="#t0")
    assert f"versions.{DISPLAYED}" in page.text("th", scope="row")
    island = json.loads(page.text("script", id="data")[0])
    assert island["taps"][0][1] == [DISPLAYED]


def table_lines(page: Page) -> list[tuple[str, dict[str, str | None], list[str]]]:
    return [element for element in page.all("tr") if re.fullmatch(r"t\d+", element[1].get("id") or "")]


def test_every_tap_is_a_line_that_reads_without_javascript() -> None:
    report = made_up(6, FIRST)
    page = Page(html(report))
    lines = table_lines(page)
    lines.sort(key=lambda line: int((line[1]["id"] or "")[1:]))
    assert [line[1]["class"] for line in lines] == [row.verdict for row in report.rows]
    for line, row in zip(lines, report.rows, strict=True):
        assert line[2][0].startswith(row.name.split(".")[0].split("_")[0]) and row.verdict in line[2]
        assert number(row.error) in line[2] and number(row.budget) in line[2]
    stages = [row.name for line, row in zip(lines, report.rows, strict=True) if "data-stage" in line[1]]
    assert len(stages) == 2 * (1 + 6 + 1) and stages[0] == "proj_in" and stages[-1] == "audio_sample"
    assert "hidden" in page.all("form")[0][1]  # filters do not work without the script
    heads = page.all("th", scope="col")
    assert len(heads) == 9 + 2
    assert page.text("h1") == [DIVERGED] and HINT in page.text("p", class_="sentence")[0]


# ---------------------------------------------------------------- what it leads with
def test_the_page_leads_with_what_was_compared_the_verdict_and_the_causes() -> None:
    text = html(with_causes())
    page = Page(text)
    facts = dict(zip(page.text("dt")[:7], page.text("dd")[:7], strict=True))
    assert facts["case"] == "2.3/i2v" and facts["candidate"] == "my_port:run" and facts["reference"] == "ltx2ref 0.1.0"
    assert facts["dtype"] == "bfloat16 against float32" and facts["torch"] == "2.8.0" and facts["python"] == "3.11.9"
    assert page.text("title")[:1] == ["Audit: diverged, 2.3/i2v, my_port:run"]
    marks = [
        'class="about"',
        "<h1>",
        'class="story"',
        'class="causes"',
        'class="follows"',
        ">Notes<",
        "<figure>",
        "<tr",
    ]
    found = [text.index(mark) for mark in marks]
    assert found == sorted(found)


def test_without_a_case_none_is_named() -> None:
    assert "case" not in Page(html(made_up(6, FIRST))).text("dt")


def test_an_audit_puts_its_case_and_this_version_into_the_report() -> None:
    case = next(case for case in CASES if case.id == "2.3/t2v")
    report = audit(candidate_named("ltx2ref"), case, torch.float32, torch.device("cpu"))
    assert report.case == report.to_json()["case"] == "2.3/t2v"
    assert report.reference["version"] == ltx2ref.__version__
    page = Page(html(report))
    assert "2.3/t2v" in page.text("dl", class_="about")[0] and "order of the exchange" in page.text("dt")
    assert not page.all("figure")  # there is nothing to draw where all is identical
    x = {"sample": torch.zeros(2)}
    assert compare(x, x).case is None


def test_causes_are_listed_by_effect_with_what_they_look_like_and_where() -> None:
    report = with_causes()
    page = Page(html(report))
    assert page.text("p", class_="sentence") == ["3 causes: 1 convention and 2 bugs"]
    assert page.text("div", class_="effect") == ["0.1", "1.0e-05", "unknown"]
    assert page.text("p", class_="what") == [cause.what or "Looks like nothing known." for cause in report.causes]
    places = page.text("p", class_="at")
    assert places[0].startswith(
        "convention at av_cross_attn_video_a2v_gate.sinusoid, which differs by up to 1.1, 21583"
    )
    assert places[2] == "bug at transformer_blocks.*.ff.proj"
    assert page.text("p", class_="also") == ["Also at av_cross_attn_audio_v2a_gate.sinusoid"]
    folded = page.text("details")[1:]  # after the one on the first divergence
    assert folded[0] == "2 further explanations fitaudio_sigma in place of timestepnothing of the kind"
    norms = [f"{part}.norm_{x}" for part in ("attn1", "audio_attn1", "attn2") for x in "qk"][1:]
    assert folded[1] == "Also at 5 other taps" + ", ".join(f"transformer_blocks.*.{norm}" for norm in norms)
    names = [row.name for row in report.rows]
    assert page.text("a", href=f"#t{names.index('transformer_blocks.0.attn1.norm_q')}") == [
        "transformer_blocks.*.attn1.norm_q"
    ]


def test_bars_are_logarithmic() -> None:
    report = with_causes()
    errors = {"sample": 1e-7, "audio_sample": 1e-6}
    rows = [replace(row, reference_error=errors.get(row.name, row.reference_error)) for row in report.rows]
    page = Page(html(replace(report, rows=rows)))
    bars = [float(bar[1]["width"] or "") for bar in page.all("rect", class_="bar")]
    assert bars == [round(BAR_WIDTH * 5 / 6, 1), round(BAR_WIDTH / 6, 1)]  # 1e-1 and 1e-5, between 1e-6 and 1
    own = [line for line in page.all("path", class_="own") if line[1]["d"] == "M0.0,0V12"]
    assert len(own) == 3  # the reference's own error, in each bar
    assert "from 10⁻⁶ to 1. The dashed line, 1.0e-06," in page.text("dl", class_="meanings")[0]


def test_one_kind_of_cause_is_said_in_words() -> None:
    report = with_causes()
    for causes, said in (
        (report.causes[:1], "1 cause: a convention"),
        (report.causes[1:], "2 causes, all of them bugs"),
    ):
        assert Page(html(replace(report, causes=causes))).text("p", class_="sentence") == [said]


def test_the_sentence_is_split_into_place_cause_and_what_came_before() -> None:
    page = Page(html(with_causes()))
    story = page.text("dl", class_="story")[0]
    assert story.startswith(
        f"First divergence{FIRST} divergedLooks like{HINT}1 moreanother hintBefore itonly rounding, from "
    )
    assert page.all("a", href="#t0") or page.all("details")


@pytest.mark.parametrize("verdict", [ROUNDING, SUSPECT])
def test_the_story_of_a_small_difference_says_how_small(verdict: str) -> None:
    rows = [
        TapRow("proj_in", IDENTICAL),
        TapRow("norm_out", verdict, relative=1e-6, budget=1.5),
        TapRow("sample", MISSING),
    ]
    page = Page(html(assemble(rows, [])))
    said = {
        ROUNDING: "First roundingnorm_out rounding",
        SUSPECT: "First divergencenorm_out more than rounding explains",
    }
    lead = {ROUNDING: "nothing but rounding", SUSPECT: MEANING[SUSPECT]}
    assert page.text("p", class_="sentence") == [lead[verdict]]
    story = page.text("dl", class_="story")[0]
    assert story.startswith(said[verdict]) and story.endswith("every tap is identicalMissing1 of 3 taps: sample")


def test_a_sentence_that_says_something_else_stays_whole() -> None:
    report = replace(with_causes(), sentence="inconclusive: the reference does not repeat itself")
    page = Page(html(report))
    assert page.text("p", class_="sentence") == [report.sentence] and not page.all("dl", class_="story")


def test_conventions_and_notes_are_there_to_be_read() -> None:
    page = Page(html(with_causes()))
    assert page.text("dl", class_="follows") == ["exchangeother_gateq/k norm eps1e-05"]
    notes = [text for text in page.text("section", class_="bullets") if text.startswith("Notes")]
    assert notes == ["Notesaccepted: rope.cos: frequencies computed in float32"]
    assert not Page(html(made_up(6))).all("dl", class_="follows")


def test_numbers_are_explained_beside_them() -> None:
    page = Page(html(with_causes()))
    effects, columns = page.text("dl", class_="meanings")
    for word in ("effect", "budget", BUG, CONVENTION):
        assert re.search(rf"{word}[A-Z]", effects)
    heads = [text for text in page.text("th", scope="col") if text not in ("Reference", "Candidate", "Tap", "Verdict")]
    assert heads == [name + said for name, (_, said) in COLUMNS.items()]
    assert all(f"{name}{said}" in columns for name, said in MEANING_OF_COLUMN.items())
    assert {*COLUMNS} - {*MEANING_OF_COLUMN} == {"Ref. error"} and "of the reference" in MEANING_OF_COLUMN["Error"]


# ---------------------------------------------------------------- the rest
def outputs_only() -> Report:
    """Make the report on a port that returned nothing but its outputs."""
    rows = [
        row if row.name in ("sample", "audio_sample") else TapRow(row.name, MISSING, row.shape, row.dtype)
        for row in made_up(6, FIRST).rows
    ]
    return assemble(rows, [])


def test_outputs_alone_have_no_chart_but_a_sentence_on_what_cannot_be_localised() -> None:
    report = outputs_only()
    text = html(report)
    page = Page(text)
    assert not page.all("figure") and not page.all("p", class_="key muted")
    assert "nothing before it was compared" in report.sentence
    assert "Before itnothing was comparedMissing556 of 558 taps: video_coords" in page.text("dl", class_="story")[0]
    assert page.text("p", class_="sentence") == ["another computation; only the outputs were given"]
    sections = page.text("section", **{"aria-labelledby": "depth"})
    assert len(sections) == 1 and sections[0].startswith("What could not be localised")
    assert "not in which block, stream or stage it begins" in sections[0]


def test_a_stream_without_blocks_is_not_drawn() -> None:
    rows = [row for row in made_up(6, FIRST).rows if "audio" not in row.name or row.name == "audio_sample"]
    page = Page(html(assemble(rows, [])))
    assert page.text("figcaption") == ["Video stream: error against float64"]
    assert "The audio stream is not drawn: no block's audio output was compared." in page.text("p")


def test_taps_without_a_block_s_output_are_named() -> None:
    report = assemble([TapRow("proj_in.x", IDENTICAL), TapRow("norm_out", ROUNDING)], [])
    said = "No block's output was compared, so nothing is drawn by depth. What was given: proj_in.x, norm_out."
    assert said in Page(html(report)).text("p")
    assert "Nothing was compared." in Page(html(assemble([TapRow("proj_in", MISSING)], []))).text("p")


def test_failures_come_first_and_missing_taps_last() -> None:
    rows = [
        TapRow("a", MISSING),
        TapRow("b", IDENTICAL),
        TapRow("c", ROUNDING),
        TapRow("d", SUSPECT),
        TapRow("e", DIVERGED, origin=PROPAGATED),
        TapRow("f", DIVERGED, origin=ORIGINATED),
        TapRow("g", SHAPE),
        TapRow("h", DIVERGED),
        TapRow("i", IDENTICAL),
    ]
    page = Page(html(assemble(rows, [])))
    assert [rows[int((line[1]["id"] or "")[1:])].name for line in table_lines(page)] == list("fghedcbia")
    assert page.text("h2", id="all") == ["Taps, failures first"]
    boxes = {box[1]["value"]: "checked" in box[1] for box in page.all("input", type="checkbox")}
    assert boxes.pop(MISSING) is False and all(boxes.values())
    assert Page(html(made_up(6))).text("h2", id="all") == ["Taps"]


def test_a_hint_that_the_sentence_lacks_is_listed() -> None:
    assert (
        Page(html(replace(made_up(1), hints=("a factor of 2",)))).text("section", class_="bullets")[0]
        == "Looks likea factor of 2"
    )


def test_the_band_is_the_budget() -> None:
    report = made_up(6, FIRST)
    scale = Scale(6, -7, -2, zeros=False)
    bands = Page(html(report)).all("path", class_="band")
    assert len(bands) == 3  # those of two streams, and that of the key
    video = [row for row in report.rows if (stage_of(row.name) or ("",))[0] == "video"]
    edge = [(scale.x(i - 1), scale.y(SHARE * (row.reference_error or 0) + FLOOR)) for i, row in enumerate(video)]
    assert "L".join(f"{x},{y}" for x, y in edge) in (bands[0][1]["d"] or "")


def test_without_a_truth_the_chart_shows_the_difference() -> None:
    rows = [replace(row, error=None, reference_error=None, budget=None) for row in made_up(6, FIRST).rows]
    text = html(replace(made_up(6, FIRST), rows=rows))
    assert "stream: difference from the reference" in text
    assert not Page(text).all("path", class_="band")


def test_the_first_divergence_is_marked_where_it_is() -> None:
    def depth(name: str) -> float | None:
        return first_depth(made_up(6, name))

    assert depth("transformer_blocks.3.audio_attn1.rows") == 2.5  # between the outputs of blocks 2 and 3
    assert depth("transformer_blocks.3.audio") == 3
    assert depth("audio_time_embed.emb") == -1 and depth("audio_norm_out") == math.inf
    assert first_depth(made_up(6)) is None
    assert Page(html(made_up(6, FIRST))).text("text", class_="first after") == ["first divergence"] * 2
    assert not Page(html(made_up(6))).all("path", class_="first")


def test_strange_numbers_stay_in_the_drawing() -> None:
    values: list[float | None] = [None, 0.0, math.nan, math.inf, 1e-300, 1e30]
    rows = [
        TapRow(
            f"transformer_blocks.{i}.video", SHAPE if x is None else DIVERGED, relative=x, error=x, reference_error=x
        )
        for i, x in enumerate(values)
    ]
    text = html(Report(DIVERGED, "", rows[2].name, rows))
    moved = [tuple(map(float, xy)) for xy in re.findall(r"translate\(([-\d.]+),([-\d.]+)\)", text)]
    assert len(moved) == len(values) and all(0 <= x <= 560 and 0 <= y <= 330 for x, y in moved)
    assert "NaN" in text and "∞" in text and "nan" not in text


def test_numbers_are_short() -> None:
    shown = {
        None: "—",
        0.0: "0",
        1.2e-7: "1.20e-07",
        0.5: "0.5",
        -0.03456: "-0.0346",
        12: "12",
        48123: "48123",
        3e9: "3.00e+09",
        math.inf: "∞",
        -math.inf: "-∞",
    }
    assert {x: number(x) for x in shown} == shown and number(math.nan) == "NaN"
    assert number(-1.23456789012, digits=9) == "-1.23456789"
    assert "≈ 0.002" in html(Report(SUSPECT, "", None, [TapRow("x", SUSPECT, relative=0.002, estimated=True)]))


def test_a_full_model_s_page_is_small() -> None:
    report = made_up(48, "transformer_blocks.17.audio_to_video_attn.q")
    more = [replace(row, name=f"{row.name}.more") for row in report.rows[:900]]
    text = html(replace(report, rows=report.rows + more))
    assert len(report.rows + more) > 5000 and len(text.encode()) < 5e6
    assert text.count("<dl>") < 10  # details are data


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_verdicts_and_text_can_be_read_on_their_backgrounds(scheme: int) -> None:
    """WCAG AA requires a contrast of at least 4.5."""
    style = Page(html(made_up(1))).text("style")[0]
    colours = dict(re.findall(r"--(\w+): (#\w+)", style.split(":root {")[1 + scheme].split("}")[0]))

    def luminance(name: str) -> float:
        digits = colours[name][1:] if len(colours[name]) == 7 else "".join(2 * c for c in colours[name][1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for name in ("text", "muted", "link", "identical", "rounding", "suspect", "diverged", "convention", "grey"):
        for ground in ("page", "card"):
            low, high = sorted((luminance(name), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


def test_every_verdict_has_a_colour_and_a_meaning() -> None:
    for verdict in VERDICTS:
        page = Page(html(Report(verdict, "", None, [TapRow("proj_in", verdict)])))
        assert f".{verdict}" in page.text("style")[0]
        assert page.text("dt", class_=verdict) == [verdict]


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: apt-get install -y --no-install-recommends chromium"
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
)
NO_POLICY = re.compile(r"<meta http-equiv[^>]*>\n")


def browse(folder: Path, text: str, *flags: str, address: str = "") -> str:
    assert CHROMIUM
    (folder / "page.html").write_text(text, encoding="utf-8")
    url = (folder / "page.html").as_uri() + address
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, url]
    done = subprocess.run(command, capture_output=True, timeout=240, check=True)
    return done.stdout.decode()


@pytest.mark.slow
@in_a_browser
def test_a_tap_s_address_opens_its_details_under_the_policy(tmp_path: Path) -> None:
    report = made_up(6, FIRST)
    at = [row.name for row in report.rows].index(FIRST)
    page = Page(browse(tmp_path, html(report), "--dump-dom", address=f"#t{at}").strip())
    details = page.text("tr", class_="details")
    assert len(details) == 1 and "originated here" in details[0] and HINT in details[0]
    assert "coordinate(1, 17, 93)" in details[0] and "reference-1.2345678" in details[0]
    assert page.text("span", role="status") == ["558 of 558 taps"]


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("policy", [True, False])
def test_foreign_text_does_not_run(tmp_path: Path, policy: bool) -> None:
    text = html(hostile())
    dom = browse(tmp_path, text if policy else NO_POLICY.sub("", text), "--dump-dom", address="#t0")
    assert dom.count("hacked=1") == html(hostile()).count("hacked=1") + dom_more(dom) and "data-hacked" not in dom


def dom_more(dom: str) -> int:
    """Count the details that were opened."""
    return dom[dom.index('<tr class="details">') :].split("</tr>")[0].count("hacked=1")


CHECKS = """<script>addEventListener("load", async () => {
  const seen = () => taps.filter(t => !t.row.hidden).map(t => t.i), pause = () => new Promise(r => setTimeout(r, 50));
  const order = () => [...body.rows].filter(r => r.id && !r.hidden).map(r => Number(r.id.slice(1)));
  const out = {start: seen()}, query = form.querySelector("[type=search]"), heads = table.tHead.rows[0].cells;
  const input = () => form.dispatchEvent(new Event("input", {bubbles: true}));
  form.elements.scope.value = "all"; input(); out.all = seen().length;
  out.more = more.textContent; more.click(); out.whole = seen().length; out.none = more.hidden;
  query.value = "AUDIO_attn1 norm_q"; input(); out.query = seen();
  form.reset(); await pause(); out.reset = seen().length; out.first = order();
  form.elements.order.value = "computed"; form.querySelector("[name=order]").dispatchEvent(
    new Event("input", {bubbles: true})); out.computed = order(); form.reset(); await pause();
  verdicts.forEach(v => v.checked = v.value === "diverged"); input(); out.diverged = seen();
  heads[2].firstChild.click(); out.sorted = order(); out.aria = heads[2].getAttribute("aria-sort");
  heads[2].firstChild.click(); out.reversed = order();
  heads[2].firstChild.click(); out.back = order();
  heads[0].firstChild.click(); out.names = order().map(i => taps[i].name);
  taps[9].button.click(); out.opened = body.querySelectorAll(".details").length;
  out.expanded = taps[9].button.getAttribute("aria-expanded");
  taps[9].button.click(); out.closed = body.querySelectorAll(".details").length;
  out.wide = document.documentElement.scrollWidth <= innerWidth;
  document.body.dataset.out = JSON.stringify(out);
})</script></body>"""


@pytest.mark.slow
@in_a_browser
def test_filters_sorting_and_details_work(tmp_path: Path) -> None:
    report = made_up(6, FIRST)
    text = NO_POLICY.sub("", html(report)).replace("</body>", CHECKS)
    dom = Page(browse(tmp_path, text, "--dump-dom", "--window-size=500,900").strip())
    out = json.loads(dom.all("body")[0][1]["data-out"] or "")
    diverged = [i for i, row in enumerate(report.rows) if row.verdict == DIVERGED]
    failed = [int((line[1]["id"] or "")[1:]) for line in table_lines(Page(html(report)))]
    assert out["start"] == sorted(failed[:500])
    assert out["first"] == failed and out["computed"] == [*range(len(report.rows))]
    assert out["all"] == 500 and out["more"] == "Show 58 more"  # browsers take seconds to lay out 5,000 lines
    assert out["whole"] == out["reset"] == len(report.rows) and out["none"]
    assert [report.rows[i].name for i in out["query"]] == [
        f"transformer_blocks.{i}.audio_attn1.norm_q" for i in range(6)
    ]
    assert out["diverged"] == diverged and sorted(out["back"]) == diverged
    shown = [[float(number(report.rows[i].relative)) for i in out[key]] for key in ("sorted", "reversed")]
    assert shown[0] == sorted(shown[0], reverse=True) and shown[1] == sorted(shown[1]) and out["aria"] == "descending"
    assert out["names"] == sorted(out["names"])
    assert (out["opened"], out["expanded"], out["closed"]) == (1, "true", 0)
    assert out["wide"]  # nothing is wider than the narrow window


@pytest.mark.slow
@in_a_browser
def test_a_long_report_without_failures_begins_with_the_outline_and_missing_taps_open_when_asked_for(
    tmp_path: Path,
) -> None:
    report = made_up(6)
    report = replace(report, rows=[*report.rows, TapRow("transformer_blocks.6.x", MISSING, (1, 2))])
    outline = sum(stage_of(row.name) is not None for row in report.rows)
    for address, shown, opened in (("", outline, 0), ("#t558", 559, 1)):
        page = Page(browse(tmp_path, html(report), "--dump-dom", address=address).strip())
        assert page.text("span", role="status") == [f"{shown} of 559 taps"]
        assert len(page.text("tr", class_="details")) == opened


@pytest.mark.slow
@in_a_browser
def test_it_is_drawn(tmp_path: Path) -> None:
    browse(tmp_path, html(made_up(6, FIRST)), f"--screenshot={tmp_path / 'page.png'}", "--window-size=1300,1500")
    picture = (tmp_path / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000  # an empty page has 9,000 bytes
