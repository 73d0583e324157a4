"""What a release consists of says the same everywhere: the version, the lowest dependencies, the files of the site."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.version import Version


ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_version_stands_in_one_place():
    (version,) = re.findall(r'(?m)^__version__ = "(.+)"$', (ROOT / "hf_structprune/installed.py").read_text("utf-8"))
    assert 'dynamic = ["version", ' in PYPROJECT
    others = ["pyproject.toml", "CITATION.cff", "mkdocs.yml", "README.md", ".github/workflows/publish.yml"]
    assert not [name for name in others if version in (ROOT / name).read_text("utf-8")]


def test_the_changelog_begins_with_this_version():
    """What is released has a version and a date there; what is not is under `Unreleased`."""
    version = re.search(r'(?m)^__version__ = "(.+)"$', (ROOT / "hf_structprune/installed.py").read_text("utf-8"))[1]
    first = re.search(r"(?m)^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text("utf-8"))
    if Version(version).is_devrelease:
        assert first.groups() == ("Unreleased", None)
    else:
        assert first[1] == version and first[2]


def test_the_lowest_constraints_are_the_lowest_that_are_allowed():
    listed = PYPROJECT.partition("\ndependencies = [")[2].partition("\n]")[0]
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))
    lines = (ROOT / "constraints-min.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert allowed.keys() <= pinned.keys()
    for name, lowest in allowed.items():
        assert Version(pinned[name]) == Version(lowest), name


@pytest.mark.parametrize("repository", ["", "https://github.com/me/hf_structprune"])
def test_links_of_readme_are_whole_on_pypi(tmp_path, repository):
    pytest.importorskip("setuptools", minversion="77")
    code = "import setuptools.build_meta as b, sys; print(b.prepare_metadata_for_build_wheel(sys.argv[1]))"
    variables = {**os.environ, "HF_STRUCTPRUNE_REPOSITORY": repository}
    command = [sys.executable, "-c", code, str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True)
    metadata = (tmp_path / made.stdout.split()[-1] / "METADATA").read_text(encoding="utf-8")
    assert "Description-Content-Type: text/markdown" in metadata and "## What can be cut" in metadata
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", metadata, flags=re.DOTALL))
    assert bool(links) == bool(repository) == (f"Project-URL: Repository, {repository}\n" in metadata)
    for link in links:
        path = link.removeprefix(f"{repository}/").partition("#")[0]
        assert path != link and (ROOT / re.sub(r"^(blob|raw)/[^/]+/", "", path)).exists(), link


def test_files_for_github_are_read():
    files = sorted(ROOT.glob(".github/**/*.yml"))
    assert len(files) == 6 and all(isinstance(yaml.safe_load(one.read_text("utf-8")), dict) for one in files)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_every_page_of_the_docs_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    named = re.findall(r"[\w/]+\.md", text)
    assert sorted(named) == sorted(page.name for page in ROOT.glob("docs/*.md"))
