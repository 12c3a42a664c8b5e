"""The documentation builds without a warning into a site whose links lead somewhere, and which asks no other server.

pytest tests/docs/test_docs_site.py
"""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.zensical]

ROOT = Path(__file__).parents[2]
LIVE = Path("live.html")  # its fragments are states: tests/docs/test_live.py


class Page(HTMLParser):
    """The links of a page, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if "href" in given and (tag == "a" or given.get("rel") in ("canonical", "next", "prev")):
            self.links.append(given["href"])
        else:
            self.loads += [given[name].split(" ")[0] for name in ("href", "src", "srcset") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page | None]:
    out = tmp_path_factory.mktemp("built") / "site"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_site.py", "--out", out], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.relative_to(out): Page(path) for path in out.rglob("*.html")} | {
        path.relative_to(out): None for path in out.rglob("*") if path.is_file() and path.suffix != ".html"
    }


def pages(site: dict[Path, Page | None]) -> dict[Path, Page]:
    return {path: page for path, page in site.items() if page is not None and path.name != "404.html"}


def target(path: Path, link: str) -> Path:
    parts: list[str] = []
    for part in (path.parent / unquote(urlsplit(link).path)).parts if urlsplit(link).path else path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return Path(*parts) if parts else Path("index.html")


def test_every_link_leads_to_a_page_and_an_anchor_of_it(site: dict[Path, Page | None]) -> None:
    checked = 0
    for path, page in pages(site).items():
        for link in page.links + page.loads:
            if urlsplit(link).scheme or link in (".", ""):
                continue
            to, fragment = target(path, link), unquote(urlsplit(link).fragment)
            assert to in site or to / "index.html" in site, (path, link)
            if to == LIVE and fragment.startswith("step="):
                continue
            if fragment and (there := site.get(to)) is not None:
                assert fragment in there.anchors, (path, link)
                checked += 1
    assert checked > 500


def test_the_live_page_leads_to_the_lines_that_it_quotes(site: dict[Path, Page | None]) -> None:
    page = pages(site)[LIVE]
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page.text, re.DOTALL)[0])
    steps = {f"step={step['id']}" for step in data["step"]}
    linked = {
        urlsplit(x).fragment.partition("&")[0] for x in pages(site)[Path("architecture.html")].links if "#step=" in x
    }
    assert len(linked) >= 5 and linked <= steps
    assert {"index.html", "arithmetic.html", "architecture.html", "live-controls.html", "live/ltx2.js"} <= set(
        page.links
    )
    for said in data["tensor"]:
        path, _, anchor = said["href"].partition("#")
        there = site[Path(path)]
        assert there is not None and anchor in there.anchors, said


def test_no_page_loads_anything_from_another_server(site: dict[Path, Page | None]) -> None:
    for path, page in pages(site).items():
        assert not [load for load in page.loads if urlsplit(load).scheme in ("http", "https")], path
        assert "fonts.googleapis" not in page.text and "//cdn" not in page.text


def test_the_tour_s_links_lead_to_the_lines_of_the_source(site: dict[Path, Page | None]) -> None:
    tour = pages(site)[Path("architecture.html")]
    lines = [link for link in tour.links if link.startswith("source/")]
    assert len(lines) > 25 and all("#__codelineno-0-" in link for link in lines)


def test_the_reference_has_every_public_name(site: dict[Path, Page | None]) -> None:
    import ltx2ref

    anchors = {
        anchor.rpartition(".")[2]
        for path, page in pages(site).items()
        if path.parts[0] == "api"
        for anchor in page.anchors
        if anchor.startswith("ltx2ref.")
    }
    assert set(ltx2ref.__all__) <= anchors


def test_every_document_is_in_the_site(site: dict[Path, Page | None]) -> None:
    documents = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert documents | {Path("index.html")} <= site.keys()
