"""What mkdocs.yml adds to docs/: the README as the first page, and the source files that pages link to by line."""

import html
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).parents[1]
SOURCE = re.compile(r"\[`([^`]+)`\]\((?:\.\./)+(ltx2ref/[\w/]+)\.py#L(\d+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Mkdocs' event: pages that are not files in docs/."""
    pages = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    linked = {match[2] for file in files.documentation_pages() for match in SOURCE.finditer(file.content_string)}
    pages |= {f"source/{path}.md": source_page(path) for path in linked}
    for path, text in pages.items():
        file = File.generated(config, path, content=text)
        file.inclusion = file.inclusion.INCLUDED if path == "index.md" else file.inclusion.NOT_IN_NAV
        files.append(file)
    return files


def source_page(path: str) -> str:
    code = (ROOT / f"{path}.py").read_text(encoding="utf-8")
    return f'# {path}.py\n\n````python linenums="1"\n{code}````\n'


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Mkdocs' event: links that lead out of docs/ in the repository lead to those pages."""
    if page.file.src_uri == "index.md":
        return text.replace("](docs/", "](")
    # As HTML, for mkdocs does not know the anchors of code lines; tests/docs/test_docs_site.py checks them.
    up = "../" * page.file.src_uri.count("/")
    return SOURCE.sub(
        lambda m: f'<a href="{up}source/{m[2]}.html#__codelineno-0-{m[3]}"><code>{html.escape(m[1])}</code></a>', text
    )
