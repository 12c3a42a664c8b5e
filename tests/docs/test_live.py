"""The live page is what its script makes, and in a browser it computes diffusers' bits and what its controls say.

    pytest tests/docs/test_live.py

The tests in a browser are skipped where there is no Chromium, the others that need it where there is no Node.js.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import make_live
import pytest
import torch
from browser import CHROMIUM, MISSING, Browser
from make_live import CASE_NAMES, PAGE, TABLE, Control
from torch import Tensor

from ltx2ref import exact
from ltx2ref.parity.cases import CASES
from ltx2ref.parity.generator import build
from ltx2ref.parity.record import EXACT_DTYPES
from ltx2ref.parity.run import cast, run

TEXT = PAGE.read_text(encoding="utf-8")
DATA = json.loads(re.findall(r'id="data">(.*?)</script>', TEXT, re.DOTALL)[0])
SENTENCES = {bug["name"]: bug["sentence"] for bug in DATA["bug"]}
CONTROLS = {control.name: control for control in make_live.controls()}
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
with_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine: apt-get install nodejs")
STEPS = [step["id"] for step in DATA["step"]]
PANELS = ("words", "releases", "noise", "clock", "rotation", "bugs", "conventions", "depth")


# ---------------------------------------------------------------- the files
def test_the_committed_page_is_what_the_script_makes_of_its_sources() -> None:
    """The sentences are those in it; the tests below, and the script without --write, compute them again."""
    data = make_live.data_of_the_page()
    data["bug"] = [bug | {"sentence": SENTENCES[bug["name"]]} for bug in data["bug"]]
    assert make_live.page(data) == TEXT, "python scripts/make_live.py --write"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequential-exchange", "rope-float32-frequencies", "gelu-erf"])
def test_a_bug_has_the_sentence_of_an_audit(name: str) -> None:
    bug = next(bug for bug in DATA["bug"] if bug["name"] == name)
    assert make_live.sentence(bug) == bug["sentence"] and bug["sentence"].startswith("first divergence at ")


@pytest.mark.slow
@with_node
def test_javascript_and_python_change_the_same_tensors_to_the_same_bits() -> None:
    rows = make_live.rows(make_live.data_of_the_page())
    assert [row.control.name for row in rows if not row.same] == [] and len(rows) == len(make_live.controls()) >= 40
    assert make_live.table(rows) == TABLE.read_text(encoding="utf-8")


def test_it_is_small_and_loads_nothing() -> None:
    assert len(TEXT.encode()) < 1e6
    assert "default-src 'none'" in TEXT
    assert not re.findall(
        r"""(?:src|srcset)=|url\(|@import|fetch\(|XMLHttp|(?:href="|["'])https?://(?!www\.w3)""", TEXT
    )
    assert set(re.findall(r'<link[^>]*href="([^"]*)"', TEXT)) == {"data:,"}


def test_it_links_to_no_file_which_a_saved_page_would_not_have() -> None:
    links = re.findall(r"""(?:<|\\u003c)a href=\\?["']([^"'\\]*)""", TEXT.replace('class="skip" ', ""))
    assert len(links) == 2 and {link[0] for link in links} == {"#"}
    assert re.findall('data-page="([^"]*)"', TEXT) != []  # links on the site: tests/docs/test_docs_site.py


def test_every_step_names_its_tensor_and_every_bug_a_place() -> None:
    places = [bug["place"] for bug in DATA["bug"]]
    assert [place for place, _ in groupby(places)] == list(dict.fromkeys(places)) and len(set(places)) <= 8
    taps = DATA["cases"]["2.3/t2v"]["taps"]
    assert [step["id"] for step in DATA["step"] if step["tap"] not in taps] == []


@pytest.mark.parametrize("release", ["2.0", "2.3", "2.5"])
@pytest.mark.parametrize("direction", ["audio_to_video", "video_to_audio"])
def test_the_exchange_attends_in_audio_s_width_as_its_picture_says(release: str, direction: str) -> None:
    shapes = DATA["real"][release]
    inside = {shapes[f"transformer_blocks.0.{direction}_attn.{part}"][-1] for part in ("norm_q", "norm_k", "to_v")} | {
        math.prod(shapes[f"transformer_blocks.0.{direction}_attn.sdpa"][-2:])
    }
    assert inside == {2048} == {shapes["audio_proj_in"][-1]} and "2,048 wide" in TEXT
    receiver = "proj_in" if direction == "audio_to_video" else "audio_proj_in"
    assert shapes[f"transformer_blocks.0.{direction}_attn.to_out"][-1] == shapes[receiver][-1]


def test_every_tensor_has_a_title_a_formula_and_a_line_of_the_code() -> None:
    named = {said["name"] for said in DATA["tensor"]}
    for case in DATA["cases"].values():
        for tap in case["taps"]:
            assert roles(tap) & named, tap
    make_live.check_quotes(DATA["tensor"])
    wrong = [DATA["tensor"][0] | {"code": "return frames"}]
    with pytest.raises(ValueError, match=r"expected `return frames` in one line of rope\.py, found 0"):
        make_live.check_quotes(wrong)


def roles(tap: str) -> set[str]:
    """Return the names under which text.toml may describe a tap."""
    if (name := re.sub(r"transformer_blocks\.\d+\.", "", tap)) in ("video", "audio"):
        return {"block"}
    name = re.sub(r"^(video_to_audio|audio_to_video)_attn", "exchange", name)
    name = re.sub(r"^(time_embed|prompt_adaln|av_cross_attn_\w+)\.", "adaln.", re.sub(r"^audio_(?!coords)", "", name))
    name = name.replace("cross_attn_audio_rope", "cross_attn_rope")
    return {name, re.sub(r"^(attn1|attn2|exchange)\.", "attention.", name)}


# ---------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        found.size(1280, 900)
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    browser.size(1280, 900)
    browser.theme("light")
    browser.open(PAGE.as_uri())
    yield browser
    assert browser.problems == []
    assert {address.partition("#")[0] for address in browser.requests if address != "data:,"} == {PAGE.as_uri()}


def seal(page: Browser) -> tuple[str, str]:
    said: list[str] = page.evaluate("[$('seal').dataset.is, $('seal').textContent]")
    return said[0], said[1]


def changed(page: Browser) -> list[str]:
    found: list[str] = page.evaluate("[...run.changed.keys()]")
    return found


@pytest.mark.slow
@in_a_browser
def test_every_tensor_of_every_case_has_the_recorded_bits(page: Browser) -> None:
    for case in CASE_NAMES:
        release, scene = case.split("/")
        for dtype in EXACT_DTYPES:
            page.evaluate(f"set({{...pristine(), release: '{release}', scene: '{scene}', dtype: '{dtype}'}})")
            n, whose = len(DATA["cases"][case]["taps"]), "ltx-core's" if "ltx-core" in case else "diffusers'"
            assert seal(page) == ("good", f"{n} of {n} tensors have {whose} bits"), (case, dtype)


@pytest.mark.slow
@in_a_browser
def test_a_wrong_bit_breaks_the_seal(page: Browser) -> None:
    page.evaluate(
        "LTX2.prototype.middle = (a, b, round) => round(round(a + b) * (0.5 + 2 ** -23)); set({dtype: 'float32'})"
    )
    kind, said = seal(page)
    assert kind == "bad" and int(said.split()[0]) < 232


# How a reader works each kind of control: with the event that the browser sends.
WORK = {
    "levels": "for (const [name, value] of Object.entries(VALUE)) slide(`level-${name}`, value)",
    "cross": "$('cross').click()",
    "fps": "set({panel: 'clock'}); slide('fps', VALUE)",
    "conventions": "set({panel: 'conventions'}); Object.entries(VALUE).forEach(([a, b]) => $(`${a}-${b}`).click())",
    "bug": "set({panel: 'bugs'}); document.querySelector('[data-pick=\"bug-' + VALUE + '\"]').click()",
}
SLIDE = """
    const slide = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event('input')); };
    set({...pristine(), release: RELEASE, scene: SCENE, dtype: 'float32', panel: 'noise'});
    WORK;
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    return [[...run.changed.keys()], Object.fromEntries(run.digests), caseName(), state.dtype];
"""


def worked(page: Browser, control: Control) -> Any:
    """Work a control as a reader does, and return the changed taps, all digests, the case and the dtype."""
    release, scene = control.case.split("/")
    setting = control.setting()
    kind = next(kind for kind in WORK if kind in setting)
    script = SLIDE.replace("WORK", WORK[kind].replace("VALUE", json.dumps(setting[kind])))
    script = script.replace("RELEASE", repr(release)).replace("SCENE", repr(scene))
    return page.evaluate(f"(async () => {{ {script} }})()")


SOME = (
    *("`audio_sigma` of the first element to 100", "`timestep` to 100, image to video", "`fps` from 25 to 50"),
    *("`exchange=other_gate`", "`positions_dtype=model`", "`self_mask_bias=linear`", "bug `sequential-exchange`"),
)


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("name", SOME)
def test_a_control_gives_every_tensor_python_s_bits(page: Browser, name: str) -> None:
    control = CONTROLS[name]
    found, there, case, dtype = worked(page, control)
    here = make_live.digests(control)
    assert (case, dtype) == (control.case, control.dtype)
    assert here == {name: there.get(name) for name in here} and 0 < len(found) < len(here)
    assert seal(page)[0] == ("bad" if control.bug else "own")


@pytest.mark.slow
@in_a_browser
def test_every_control_changes_the_tensors_that_the_table_names(page: Browser) -> None:
    table = re.findall(
        r"^\| (.+) \| (\S+), \w+ \| `(.+)` \| (\d+) of \d+ \| equal \|$", TABLE.read_text(), re.MULTILINE
    )
    assert len(table) == len(make_live.controls())
    for control, (name, case, first, count) in zip(make_live.controls(), table, strict=True):
        found = worked(page, control)[0]
        assert (control.name, control.case) == (name, case)
        assert (found[0], len(found)) == (first, int(count)), name


@pytest.mark.slow
@in_a_browser
def test_a_bug_shows_where_it_begins_and_beside_it_what_an_audit_says(page: Browser) -> None:
    page.open(f"{PAGE.as_uri()}#step=exchange&bug=sequential-exchange&panel=bugs")
    first = "transformer_blocks.0.video_to_audio_attn.context"
    assert page.evaluate("[...document.querySelectorAll('[data-first]')].map((x) => x.dataset.tap)") == [first]
    assert SENTENCES["sequential-exchange"] in page.evaluate("document.querySelector('.said').textContent")
    assert seal(page) == ("bad", "163 of 232 tensors have diffusers' bits")
    assert "Shown: the difference from the right tensor" in page.evaluate("$('inspector').textContent")
    page.evaluate("document.querySelector('[data-pick=\"try\"]').click()")
    assert seal(page)[0] == "good" and changed(page) == []


@pytest.mark.slow
@in_a_browser
def test_a_tensor_that_a_bug_leaves_out_or_gives_another_shape_says_so(page: Browser) -> None:
    page.evaluate("putIn(DATA.bug.find(({ name }) => name === 'stg-without-gate'))")
    first = "transformer_blocks.0.attn1.to_out"
    assert page.evaluate("[...document.querySelectorAll('[data-first]')].map((x) => x.dataset.tap)") == [first]
    assert f"(4 are missing), first {first}" in page.evaluate("$('status').textContent")
    assert SENTENCES["stg-without-gate"].startswith(f"first divergence at {first} ")
    said = page.evaluate("(openTensor('transformer_blocks.0.attn1.to_gate_logits'), $('inspector').textContent)")
    assert "One number for each head" in said and "missing: the bug leaves it out" in said
    page.evaluate("putIn(DATA.bug.find(({ name }) => name === 'per-token-timestep-averaged'))")
    said = page.evaluate("document.querySelector('[data-tap=\"time_embed.linear\"]').title")
    assert said.endswith("; another shape: (2, 252) in place of (210, 252)")
    said = page.evaluate("document.body.innerText + [...document.querySelectorAll('.chip')].map((x) => x.title)")
    assert "(210, 252)" in said and "Infinity" not in said


@pytest.mark.slow
@in_a_browser
def test_the_page_says_why_it_moves_and_goes_back_when_a_change_is_taken_out(page: Browser) -> None:
    def press(what: str) -> tuple[str, str]:
        said: list[str] = page.evaluate(f"({what}, [caseName(), $('status').textContent])")
        return said[0], said[1]

    bug = "document.querySelector('[data-pick=\"bug-gelu-erf\"]').click()"
    case, said = press(f"set({{panel: 'bugs'}}), {bug}")
    assert case == "2.5/t2v" and "Shown in 2.5/t2v, where the audit was recorded." in said
    case, said = press(bug)
    assert case == "2.3/t2v" and "The bug is out." in said and "undone" not in said
    case, said = press(f"{bug}, document.querySelector('[data-pick=\"release-2.0\"]').click()")
    assert case == "2.0/t2v" and "The bug is out: it is shown in 2.5/t2v alone." in said
    case, said = press("goTo(8)")
    assert case == "2.3/i2v" and "This step is shown in 2.3/i2v." in said
    case, said = press("document.querySelector('[data-pick=\"release-2.5\"]').click()")
    assert case == "2.5/t2v" and "There is no case “image to video” of 2.5 here." in said
    case, said = press("set({...pristine(), release: '2.3', scene: 'stg'})")
    assert case == "2.3/stg" and page.evaluate("state.block") == 1
    assert "Left out here: norm_q, norm_k, q, k, sdpa." in page.evaluate("$('band-self').textContent")


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize(
    "setting,tap,said",
    [
        ("release: '2.3'", "transformer_blocks.0.video_to_audio_attn.context", "context=video.for_exchange(vh, vc,"),
        ("release: '2.3'", "transformer_blocks.0.audio_to_video_attn.context", "context=audio.for_exchange(ah, ac,"),
        ("release: '2.0'", "transformer_blocks.0.attn2.context", "return c.text"),
        ("scene: 'stg', block: 1", "transformer_blocks.1.audio_attn1.sdpa", "takes its own v"),
        ("scene: 'i2v'", "time_embed.linear", "(6,144, 36,864)"),
        ("scene: 't2v'", "video_coords", "axis t, token 0, start, seconds"),
    ],
)
def test_what_is_said_of_a_tensor_is_so_in_the_release_and_case_shown(
    page: Browser, setting: str, tap: str, said: str
) -> None:
    assert said in page.evaluate(
        f"(set({{...pristine(), {setting}}}), openTensor('{tap}'), $('inspector').textContent)"
    )


@pytest.mark.slow
@in_a_browser
def test_a_convention_that_a_case_has_anyway_is_compared_with_diffusers_choice(page: Browser) -> None:
    for name, value in (("text_mask_bias", "lowest"), ("self_mask_bias", "log"), ("guidance", "always")):
        page.evaluate(f"set({{panel: 'conventions'}}); $('{name}-{value}').click()")
        assert len(changed(page)) > 50 and " choice, first" in page.evaluate("$('status').textContent")
        assert seal(page)[0] == "good"
    page.evaluate("set({...pristine(), release: '2.3', scene: 't2v'}); $('exchange-argument').click()")
    assert "exchange=argument is what 2.3/t2v has; choose another." in page.evaluate("$('status').textContent")


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("release,lit", [("2.0", "caption_projection"), ("2.3", "attn2.context"), ("2.5", "ff.proj")])
def test_a_release_lights_what_it_changed(page: Browser, release: str, lit: str) -> None:
    page.open(f"{PAGE.as_uri()}#step=text&release={release}")
    found = page.evaluate("[...document.querySelectorAll('[data-lit]')].map((x) => x.dataset.tap)")
    assert any(tap.endswith(lit) for tap in found) and seal(page)[0] == "good"
    assert not any(tap.endswith("norm_q") for tap in found)


def taps_of(layers: int, dtype: torch.dtype, nudged: bool) -> dict[str, Tensor]:
    """Return all taps of a deep model, of one element whose first latent is moved by one bit or not."""
    case = next(case for case in CASES if case.id == "2.3/t2v")
    model = build(replace(case.config, num_layers=layers), dtype)
    inputs = {name: x[:1].clone() if isinstance(x, Tensor) else x for name, x in cast(case.inputs(), dtype).items()}
    if nudged:
        bits = inputs["hidden_states"].view({4: torch.int32, 2: torch.int16}[dtype.itemsize])
        bits[0, 0, 0] += 1
    with exact():
        return run(model, inputs)


@pytest.mark.slow
@in_a_browser
def test_an_error_of_one_bit_grows_over_48_blocks_as_in_python(page: Browser) -> None:
    page.evaluate("globalThis.grown = ['float32', 'bfloat16'].map((dtype) => [...growth(dtype)])")
    for i, dtype in enumerate((torch.float32, torch.bfloat16)):
        right, moved = (taps_of(48, dtype, nudged) for nudged in (False, True))
        for layer in (0, 47):
            names = [f"transformer_blocks.{layer}.{stream}" for stream in ("video", "audio")]
            pairs = [(right[name].double(), moved[name].double()) for name in names]
            here = [float((x - y).norm() / y.norm()) for y, x in pairs]
            assert page.evaluate(f"grown[{i}][{layer}]") == pytest.approx(here, rel=1e-9), (dtype, layer)
    ends = page.evaluate("grown.map((x) => x[47])")
    assert max(ends[0]) < 1e-5 and min(ends[1]) > 1e-3


@pytest.mark.slow
@in_a_browser
def test_the_keyboard_reaches_the_path_the_controls_and_every_cell(page: Browser) -> None:
    def focus() -> str:
        found: str = page.evaluate("document.activeElement.dataset.pick || document.activeElement.id || ''")
        return found

    page.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    seen = set()
    for _ in range(40):
        page.press("Tab")
        seen.add(focus())
    assert {"seal", "step-0", "next", "tab-words", "release-2.3", "pick-case"} <= seen
    page.evaluate("document.querySelector('[data-pick=\"next\"]').focus()")
    page.press("Enter")
    assert page.evaluate("state.step") == STEPS[1] and focus() == "step"
    page.evaluate("$('tab-noise').focus()")
    page.press("ArrowRight")
    assert page.evaluate("state.panel") == "clock" and focus() == "tab-clock"
    page.evaluate("document.querySelector('.chip[aria-pressed=\"true\"]').focus()")
    page.press("ArrowDown")
    page.press("ArrowRight")
    page.press("Enter")
    assert page.evaluate("state.tap") == "transformer_blocks.0.attn1.rows"
    page.press("Tab")
    assert page.evaluate("$('inspector').contains(document.activeElement)")
    page.evaluate("$('heat').focus()")
    page.press("ArrowDown")
    page.press("ArrowRight", 2)
    assert page.evaluate("state.cell") == [1, 2] and focus() == "heat"
    page.evaluate("$('fps').focus()")
    page.press("ArrowRight")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("state.fps") == 26 and focus() == "fps" and changed(page)[0] == "video_coords"


@pytest.mark.slow
@in_a_browser
def test_a_tensor_opens_as_a_sheet_on_a_phone_and_escape_closes_it(page: Browser) -> None:
    page.size(390, 844)
    page.open(f"{PAGE.as_uri()}#step=self")
    assert page.evaluate("getComputedStyle($('inspector')).display") == "none"
    page.evaluate("document.querySelector('[data-tap=\"transformer_blocks.0.attn1.q\"]').click()")
    assert page.evaluate("getComputedStyle($('inspector')).display") == "block"
    assert "apply_rope(q, ropes[0], self.layout)" in page.evaluate("$('inspector').textContent")
    page.press("Escape")
    assert page.evaluate("getComputedStyle($('inspector')).display") == "none"
    assert page.evaluate("document.activeElement.dataset.tap") == "transformer_blocks.0.attn1.q"


@pytest.mark.slow
@in_a_browser
def test_on_a_tablet_the_tensor_stands_beside_the_model_and_the_panel_can_be_folded(page: Browser) -> None:
    page.size(820, 1100)
    page.open(f"{PAGE.as_uri()}#step=exchange")
    boxes = page.evaluate("['inspector', 'band-exchange'].map((id) => $(id).getBoundingClientRect().toJSON())")
    assert boxes[0]["left"] > boxes[1]["right"] and 0 < boxes[0]["top"] < boxes[1]["top"] < 700
    seen = "[$('panel').checkVisibility(), $('tab-noise').getAttribute('aria-expanded')]"
    assert page.evaluate(seen) == [False, "false"]
    page.evaluate("$('tab-noise').click()")
    assert page.evaluate(seen) == [True, "true"]
    page.evaluate("goTo(8); $('tab-noise').click(); goTo(3)")
    assert page.evaluate("$('panel').checkVisibility()")  # the clock is what that step is about


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("width", [820, 390])
def test_no_step_is_wider_than_a_small_screen(page: Browser, width: int) -> None:
    page.size(width, 844)
    for i, step in enumerate(STEPS):
        assert page.evaluate(f"(goTo({i}), document.documentElement.scrollWidth)") <= width, step


@pytest.mark.slow
@in_a_browser
def test_the_parts_of_the_model_say_how_much_of_each_has_changed_and_lead_to_it(page: Browser) -> None:
    page.open(f"{PAGE.as_uri()}#bug=sequential-exchange")
    said = page.evaluate("[...document.querySelectorAll('#map .part')].map((x) => x.textContent)")
    counts = [re.findall(r"(\d+) of (\d+)", text) for text in said]
    assert sum(int(found[0][0]) for found in counts if found) == 69 == len(changed(page))
    assert [text for text, found in zip(said, counts, strict=True) if not found] == ["In"]
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    page.evaluate("document.querySelector('[data-pick=\"part-leave\"]').click()")
    assert 0 < page.evaluate("$('band-leave').getBoundingClientRect().top") < 844


@pytest.mark.slow
@in_a_browser
def test_an_audit_s_sentence_stands_once(page: Browser) -> None:
    page.open(f"{PAGE.as_uri()}#bug=gelu-erf&panel=bugs")
    assert page.evaluate("document.body.innerText").count(SENTENCES["gelu-erf"]) == 1
    names = page.evaluate("[...document.querySelectorAll('.bug code')].map((x) => x.textContent)")
    assert names == [bug["name"] for bug in DATA["bug"]]


# Returns the texts of a drawing that overlap, or that its line of time crosses.
OVERLAPS = """(() => {
  const box = (node) => [node.textContent || 'now', node.getBoundingClientRect()];
  const all = (what) => [...document.querySelectorAll(`#panel svg ${what}`)].map(box);
  const [texts, now] = [all('text'), all('line').slice(-2)];
  const cross = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  return texts.flatMap(([text, a], i) =>
    [...texts.slice(i + 1), ...now].filter(([, b]) => cross(a, b)).map(([other]) => [text, other]));
})()"""


@pytest.mark.slow
@in_a_browser
def test_on_a_phone_no_two_labels_of_the_clock_overlap(page: Browser) -> None:
    page.size(390, 844)
    page.open(f"{PAGE.as_uri()}#step=clock")
    for setting in ("fps: 8", "fps: 12", "fps: 18", "fps: 25", "fps: 60", "fps: 0, scene: '121-frames'"):
        page.evaluate(f"set({{{setting}}})")
        for time in (0, 0.2, 0.4):
            assert page.evaluate(f"(set({{time: {time}}}), {OVERLAPS})") == [], (setting, time)


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("width", [1280, 820, 390])
def test_a_bug_is_seen_where_it_begins_with_its_case_and_its_sentence(page: Browser, width: int) -> None:
    page.size(width, 844)
    page.open(f"{PAGE.as_uri()}#step=exchange")
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    top = page.evaluate("$(innerWidth > 1100 ? 'band-exchange' : 'step').getBoundingClientRect().top")
    assert 0 < top < 300
    page.evaluate("document.querySelector('[data-pick=\"try\"]').click()")
    status, said, first = (
        page.evaluate(
            f"(({{ top, bottom }}) => [top, bottom])(document.querySelector('{what}').getBoundingClientRect())"
        )
        for what in (".status", ".status .said", "[data-first]")
    )
    assert 0 < status[0] < said[0] < said[1] <= status[1] <= first[0] < first[1] < 844
    assert page.evaluate("$('status').textContent").startswith("2.3/t2v, float32: 69 of 232 tensors are wrong")


# Returns the texts whose contrast with what is behind them is below AA, with the ratio.
CONTRAST = """(() => {
  const rgb = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => [r, g, b].map((x) => linear(x / 255))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const low = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let checked = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node);
    const said = walker.currentNode.textContent.trim();
    if (!said || !node.checkVisibility() || /SCRIPT|STYLE|OPTION/.test(node.tagName)) continue;
    const colour = rgb(node instanceof SVGElement ? style.fill : style.color), back = behind(node);
    const [a, b] = [luminance(colour), luminance(back)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 600);
    checked++;
    if (ratio < (large ? 3 : 4.5)) low.push(`${ratio.toFixed(2)} ${node.tagName} ${said.slice(0, 40)}`);
  }
  return { low, checked };
})()"""


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_all_text_has_contrast_and_nothing_is_wider_than_the_page(page: Browser, theme: str, width: int) -> None:
    page.size(width, 900)
    page.theme(theme)
    page.open(f"{PAGE.as_uri()}#bug=gelu-erf&panel=bugs")
    for panel in PANELS:
        page.evaluate(f"set({{panel: '{panel}'}})")
        found = page.evaluate(CONTRAST)
        assert found["low"] == [] and found["checked"] > 150, panel
        assert page.evaluate("document.documentElement.scrollWidth") <= width, panel


@pytest.mark.slow
@in_a_browser
def test_every_step_works_and_its_address_leads_back_to_it(page: Browser) -> None:
    for step in STEPS:
        page.open(f"{PAGE.as_uri()}#step={step}")
        assert page.evaluate("state.step") == step and seal(page)[0] == "good"
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280, step
        assert page.evaluate("run.taps.has(state.tap)")
        assert f"step={step}" in page.evaluate("(set({}), location.hash)")


@pytest.mark.slow
@in_a_browser
def test_an_address_that_names_nothing_known_is_harmless(page: Browser) -> None:
    hostile = "step=none&release=9&scene=x&dtype=int8&bug=moth&tap=<img src=x>&exchange=y&block=7&fps=-1&sigma=no"
    for address in (
        hostile,
        "release=constructor&panel=constructor&dtype=toString&bug=__proto__&fps=Infinity&sigma=1e9",
    ):
        page.open(f"{PAGE.as_uri()}#{address}")
        assert seal(page)[0] == "good" and page.evaluate("[state.release, state.bug, state.block]") == ["2.3", "", 0]
