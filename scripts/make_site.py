"""Build the documentation site from docs/ with Zensical, strictly: a broken link or anchor fails the build.

    python scripts/make_site.py              into site/
    python scripts/make_site.py --out DIR

The pages are those in docs/, and the project's texts beside the README. What the repository's Markdown cannot say is
added to a copy of them before the build: a page for each source file that a page links to by line, figures that follow
the site's light/dark switch, and the repository's address, if pyproject.toml gives one.
"""

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = ("CHANGELOG", "CONTRIBUTING", "SECURITY")
LINE = re.compile(r"\[`([^`]+)`\]\((?:\.\./)+((?:ltx2ref|scripts|tests)/[\w/]+\.py)(?:#L(\d+))?\)")
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img src="([^"]+)" alt="([^"]+)">\s*</picture>'
)
FIGURE = (
    r'<div class="figure"><img class="only-light" src="\2" alt="\3"><img class="only-dark" src="\1" alt="\3"></div>'
)
BLOCK = re.compile(r"^```(sh|console|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COLUMN = 88  # characters of code that fit
DOCUMENT = re.compile(r'<span data-page="([^"]+)">([^<]+)</span>')  # in the live page
INLINE = re.compile(r"<code>([^<]+)</code>")
PARTS = ("page.html", "page.css", "page.js", "text.toml")  # of docs/live.html, which has them in it
LONGEST = 32  # characters of a word in inline code that is never broken


def main() -> None:
    """Stage the pages, build them, and put the site where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", metavar="DIR", help="default: site/")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        stage(Path(temporary))
        build(Path(temporary))
        finish(Path(temporary) / "site")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(Path(temporary) / "site", out)


def stage(folder: Path) -> None:
    """Write the configuration and all pages into `folder`."""
    docs = folder / "docs"
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("ruff.toml", *PARTS))
    (folder / "zensical.toml").write_text(configuration(), encoding="utf-8")
    for name in PROJECT:
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
        (docs / f"{name.lower()}.md").write_text(text.replace("](docs/", "]("), encoding="utf-8")
    linked: set[str] = set()
    for path in sorted(docs.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        linked |= {match[2] for match in LINE.finditer(text)}
        path.write_text(page(text, "../" * (len(path.relative_to(docs).parts) - 1)), encoding="utf-8")
    live = docs / "live.html"
    live.write_text(linked_to_lines(live.read_text(encoding="utf-8"), linked), encoding="utf-8")
    for name in linked:
        source = docs / "source" / f"{name.removesuffix('.py')}.md"
        source.parent.mkdir(parents=True, exist_ok=True)
        code = (ROOT / name).read_text(encoding="utf-8")
        source.write_text(f'# {name}\n\n````python linenums="1"\n{code}````\n', encoding="utf-8")


def linked_to_lines(text: str, linked: set[str]) -> str:
    """Return the live page with links to the site's pages, and to the lines of code that it quotes."""

    def with_lines(match: re.Match[str]) -> str:
        data = json.loads(match[2])
        for said in data["tensor"]:
            path = f"ltx2ref/{said['file']}"
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
            number = next((number for number, line in enumerate(lines, 1) if said["code"] in line), None)
            if number is None:
                sys.exit(f"docs/live.html quotes what {path} does not have: {said['code']}")
            said["href"] = f"source/{path.removesuffix('.py')}.html#__codelineno-0-{number}"
            linked.add(path)
        return match[1] + json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c") + match[3]

    text = DOCUMENT.sub(document_link, text)
    return re.sub(r'(id="data">)(.*?)(</script>)', with_lines, text, flags=re.DOTALL)


def document_link(match: re.Match[str]) -> str:
    """Return a link to a document that the live page only names, because as a file it may be alone."""
    page, said = match.groups()
    return f'<a href="{page if "." in page else f"{page}.html"}">{said}</a>'


def configuration() -> str:
    """Return zensical.toml with the repository's address from pyproject.toml."""
    text = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project.get("urls", {}).get("Repository")
    return text.replace("[project]\n", f'[project]\nrepo_url = "{address}"\n', 1) if address else text


def page(text: str, up: str) -> str:
    """Return a page's Markdown as the site needs it; `up` leads from the page's folder to docs/."""
    text = PICTURE.sub(FIGURE, text)
    text = BLOCK.sub(lambda match: plain(*match.groups()), text)
    text = re.sub(rf"\]\((?:\.\./)*({'|'.join(PROJECT)})\.md", lambda match: f"]({up}{match[1].lower()}.md", text)
    return LINE.sub(lambda match: source_link(up, *match.groups()), text)


def plain(language: str, code: str) -> str:
    """Return a block without colours, which would split `2.3/t2v`. Commands wrap, and output that is too wide."""
    wrap = language != "text" or max(map(len, code.splitlines())) > COLUMN
    return f"``` {{ .text{' .wrap' * wrap} }}\n{code}```"


def source_link(up: str, code: str, path: str, line: str | None) -> str:
    """Return a link to a source page, as HTML: the builder does not know the anchors of code lines."""
    anchor = f"#__codelineno-0-{line}" if line else ""
    return f'<a href="{up}source/{path.removesuffix(".py")}.html{anchor}"><code>{html.escape(code)}</code></a>'


def build(folder: Path) -> None:
    """Run Zensical in `folder`, with this checkout's package for the API pages."""
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    print(done.stdout + done.stderr, end="")
    if done.returncode:
        sys.exit("the site was not built")


def finish(site: Path) -> None:
    """Keep the words of inline code in one piece: a browser would break `2.3/t2v` and `--case` in the middle."""
    for path in {*site.rglob("*.html")} - {site / "live.html"}:
        text = path.read_text(encoding="utf-8")
        path.write_text(INLINE.sub(lambda match: f"<code>{unbroken(match[1])}</code>", text), encoding="utf-8")


def unbroken(code: str) -> str:
    """Return inline code in which the browser breaks lines at spaces alone, or in words that are very long."""
    words = re.split(r"(\s+)", code)
    return "".join(f'<span class="word">{word}</span>' if 0 < len(word.strip()) <= LONGEST else word for word in words)


if __name__ == "__main__":
    main()
