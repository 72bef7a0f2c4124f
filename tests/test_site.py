"""The site has every page, its links lead to pages, and the pages on Python name what there is to import."""

from __future__ import annotations

import importlib
import posixpath
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import splitquant_plugins

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
yaml = pytest.importorskip("yaml")
SITE = runpy.run_path(str(DOCS / "site_pages.py"))
PAGES = {of_site: file for file, of_site in SITE["PAGES"].items() if file.endswith(".md")}
FILES = {**{path.relative_to(DOCS).as_posix(): path for path in DOCS.rglob("*.md")}}
FILES.update({page: ROOT / file for page, file in PAGES.items()})


def settings() -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    return settings


def pages_of(entry: Any) -> Iterator[str]:
    for one in entry if isinstance(entry, list) else entry.values():
        if isinstance(one, str):
            yield one
        else:
            yield from pages_of(one)


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(pages_of(settings()["nav"])) == sorted(FILES)


@pytest.mark.parametrize("page", sorted(FILES))
def test_links_between_files_become_links_between_pages(page: str) -> None:
    before = FILES[page].read_text("utf-8")
    after = SITE["links_of_the_site"](before, page)
    links, turned = (re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", text) for text in (before, after))
    assert len(links) == len(turned)
    for (link, anchor), (target, anchor_of_site) in zip(links, turned, strict=True):
        assert anchor == anchor_of_site
        if (FILES[page].parent / link).exists():
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            assert target in FILES or (DOCS / target).is_file(), f"{page} links to {link}, which is no page"


def test_code_that_looks_like_a_link_stays_as_it_is() -> None:
    code = "part = parts[0](inputs) and [a](https://arxiv.org/abs/2501.12428) and [b](#here)"
    assert SITE["links_of_the_site"](code, "index.md") == code
    assert SITE["links_of_the_site"]("[c](../README.md#plugins)", "plugins.md") == "[c](index.md#plugins)"


def test_nothing_of_the_site_comes_from_elsewhere() -> None:
    assert settings()["theme"]["font"] is False
    assert not {"extra_css", "extra_javascript", "extra", "repo_url"} & set(settings())


def test_pages_on_python_name_every_public_name() -> None:
    texts = [path.read_text("utf-8") for path in (DOCS / "api").glob("*.md")]
    named = {path for text in texts for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    for module in (
        splitquant_plugins,
        *map(importlib.import_module, ("splitquant_quanto", "splitquant_inc", "splitquant_pt2e")),
    ):
        for name in set(module.__all__) - {"SplitQuantError", "hookimpl"}:  # with all errors; in the text
            home = f"{module.__name__}.{module._HOME[name]}.{name}"
            assert home in named, f"docs/api/ has no ::: {home}"
    assert "splitquant_plugins.errors" in named
