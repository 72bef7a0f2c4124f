"""What the site needs beyond docs/: pages made of the files at the root, and links that lead to pages.

The documents link to one another as GitHub reads them, by paths in the repository. mkdocs.yml names this file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What is a page of the site, though it does not lie in docs/.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "splitquant_plugins/backends.py": "api/plugins.md",
    "examples/bert_in_ten_lines.py": "examples.md",
    "examples/convolutional_net_for_an_npu.py": "examples.md",
    "examples/language_model_and_back_from_disk.py": "examples.md",
}
LINK = re.compile(r"\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def page_of(path: str) -> str | None:
    """Return the page, or the picture, of the site that a path of the repository is; None where there is none."""
    if path in PAGES:
        return PAGES[path]
    if not path.startswith("docs/") or not (ROOT / path).exists():
        return None
    return path.removeprefix("docs/") + ("/README.md" if (ROOT / path).is_dir() else "")


def links_of_the_site(text: str, page: str) -> str:
    """Turn the links of a page from paths in the repository to pages of the site; what is no file stays as it is."""
    file = next((file for file, of_site in PAGES.items() if of_site == page and file.endswith(".md")), f"docs/{page}")

    def turned(link: re.Match[str]) -> str:
        target = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(file), link["path"])))
        if target is None:
            return link[0]
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{link['anchor'] or ''})"

    return LINK.sub(turned, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that do not lie in docs/, for MkDocs."""
    from mkdocs.structure.files import File

    for file, page in PAGES.items():
        if file.endswith(".md"):
            files.append(File.generated(config, page, content=(ROOT / file).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the links of a page, for MkDocs."""
    return links_of_the_site(markdown, page.file.src_uri)
