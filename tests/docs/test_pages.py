"""The README and the pages in docs/: short, linked with each other, with code that fits and counts that are right.

pytest tests/docs/test_pages.py
"""

import re
from pathlib import Path

import make_counts
import make_site
import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
COLUMN = 88  # also set in docs/ruff.toml and docs/site.css


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_120_lines_and_its_first_commands_are_two() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    first = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0].splitlines()
    assert len(first) == 2 and first[0].endswith("ltx2ref verify") and "pytest" in first[1]


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_a_heading_of_it(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)|srcset=\"([^\"]+)\"", without_code(path.read_text(encoding="utf-8"))):
        address, _, anchor = (link[0] or link[1]).partition("#")
        if re.match(r"https?:", address):
            continue
        to = (path.parent / address).resolve() if address else path
        assert to.exists(), (path.name, address)
        if anchor and to.suffix == ".md":
            assert anchor in anchors(to), (path.name, address, anchor)


def test_the_index_names_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / link) for link in re.findall(r"\]\(([\w/-]+\.md)", text)}
    assert linked >= {*PAGES} - {ROOT / "docs" / "index.md"}


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.name)
def test_code_fits_into_the_column(path: Path) -> None:
    """Commands and output are wrapped on the site, but other code is not."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for language, code in blocks:
        widest = max(map(len, code.splitlines()), default=0)
        assert widest <= COLUMN or language in ("text", "sh", "console"), (path.name, language, widest)


def test_every_block_says_what_it_is() -> None:
    for path in (README, *PAGES):
        fences = re.findall(r"^```(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert "" not in fences[::2], f"{path.name}: a block of code without a language"


def test_figures_follow_the_switch_of_the_site() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    page = make_site.page(text, "")
    assert "<picture>" in text and "<picture>" not in page
    assert 'class="only-light" src="figures/block-light.svg"' in page
    assert 'class="only-dark" src="figures/block-dark.svg"' in page


def test_the_counts_are_the_code_s_and_a_wrong_one_is_corrected() -> None:
    numbers = make_counts.counts()
    texts = [path.read_text(encoding="utf-8") for path in make_counts.TEXTS]
    assert [make_counts.corrected(text, numbers) for text in texts] == texts
    for words, number in numbers.items():
        right, wrong = words.replace("N", f"{number:,}", 1), words.replace("N", f"{number + 1:,}", 1)
        assert make_counts.corrected(f"All {wrong}.", numbers) == f"All {right}.", words
        assert any(right in " ".join(text.split()) for text in texts), f"no text says {right}"
