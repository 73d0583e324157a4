"""Hooks of MkDocs: pages of docs/ point to files beside docs/, which the site has to hold, too.

A link such as `../benchmarks/results/depth.json` leads to a copy under `repository/`; a Markdown file there is a page
of the site, whose own links are followed in the same way. Links to folders become plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel


PLACE = "repository"
ROOT = Path(__file__).parents[1]
# Code, or a link, whose text may be code.
_LINK = re.compile(r"```.*?```|(!?)\[((?:`[^`\n]*`|[^\]`])*)\]\(([^)\s#:]+)(#[^)\s]*)?\)|`[^`\n]*`", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds what the pages point to, and what that points to."""
    seen: set[str] = set()
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for _, _, target, _ in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = _resolved(page, target) if target else None
            if path is None or path in seen or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            seen.add(path)
            source = str(ROOT / path)
            one = File.generated(config, f"{PLACE}/{path}", abs_src_path=source, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(one)
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points to the copies."""
    uri = page.file.src_uri
    here = uri.removeprefix(f"{PLACE}/") if uri.startswith(f"{PLACE}/") else f"docs/{uri}"

    def changed(found: re.Match) -> str:
        picture, text, target, anchor = found.groups()
        if target is None:
            return found[0]
        path = _resolved(here, target)
        if path is None or (path.startswith("docs/") and uri == here.removeprefix("docs/")):
            return found[0]  # MkDocs looks whether it is there
        there = path.removeprefix("docs/") if path.startswith("docs/") else f"{PLACE}/{path}"
        if files.get_file_from_path(there) is None:
            return text
        return f"{picture}[{text}]({posixpath.relpath(there, posixpath.dirname(uri))}{anchor or ''})"

    return _LINK.sub(changed, _front_matter_off(markdown))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Types of docstrings, as Hugging Face writes them (`` `int`, *optional* ``), without their marks."""
    return re.sub(r"(<td>\s*<code>)([^<]*)(?=</code>)", lambda found: found[1] + re.sub("[`*]", "", found[2]), html)


def _front_matter_off(markdown: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)


def _resolved(page: str, target: str) -> str | None:
    """A path from the root of the repository; `None` for what is not in it."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return None if path.startswith("..") else path
