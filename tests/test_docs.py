"""What README and docs/ point to is there, and no kind of unit is missing from the first table."""

import re
from pathlib import Path

import pytest

from hf_structprune.units import KINDS


ROOT = Path(__file__).parents[1]
PAGES = [page for pattern in ("*.md", "docs/*.md", "recipes/*.md", "model_cards/*.md") for page in ROOT.glob(pattern)]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def text_of(page):
    """The text of a page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page):
    """The names that headings get."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in (target, *target.parents), link
        assert not anchor or anchor in anchors(target), link


def test_readme_names_every_kind_of_unit():
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What can be cut")[2].partition("```")[0]
    assert {name for name in KINDS if f"`{name}`" in table} == set(KINDS)
