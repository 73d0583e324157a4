"""What README and docs/ point to is there, and no kind of unit is missing from the first table."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from hf_structprune.commands.arguments import parse
from hf_structprune.commands.options import TAKES
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


def lines_of_shell(page):
    """The commands of this package in the blocks of a page, as a shell would read them."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r" && |\| ", line):
                words = shlex.split(command, comments=True)
                while words and "=" in words[0]:  # variables of the environment
                    del words[0]
                if words and words[0] == "hf-structprune" and words[1] in TAKES:
                    yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_that_are_told(page, monkeypatch):
    """Every command of a page is read as if it were run: options, and values that are of their types and allowed."""
    monkeypatch.chdir(ROOT)
    for words in lines_of_shell(page):
        parse([word for word in words[1:] if word != "..."], words[0], "", *TAKES[words[0]][1])
        if words[0] == "run" and words[1].endswith(".yaml") and not re.search(r"\$|\.\.\.", words[1]):
            assert Path(words[1]).is_file(), words


def literals():
    """Every text in the code of the package; what an f-string puts in is a gap in it."""
    for path in ROOT.glob("hf_structprune/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = [part.value if isinstance(part, ast.Constant) else "\0" for part in parts]
            if all(isinstance(part, str) for part in text):
                yield "".join(text).replace("`", "")


def test_messages_of_troubleshooting_are_those_of_the_code():
    headings = re.findall(r"(?m)^## (.*`.*)$", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"))
    messages = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(messages) > 15
    known = list(literals())
    for message in messages:
        parts = [re.escape(part.strip("' ")) for part in message.split("...")]
        pattern = re.compile(".*".join(filter(None, parts)), re.DOTALL)
        assert any(map(pattern.search, known)), message
