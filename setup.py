"""What `pyproject.toml` cannot say: README as PyPI shows it, where links have to be whole addresses.

Where the repository is, `HF_STRUCTPRUNE_REPOSITORY` says, which the workflow that publishes sets. Without it links
become plain text and pictures go, so that none leads nowhere.
"""

import os
import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def readme(repository: str | None, version: str) -> str:
    """README.md with links to the files of this version in the repository."""
    tag = "main" if "dev" in version else f"v{version}"

    def whole(found: re.Match) -> str:
        picture, words, path = found.groups()
        if repository is None:
            return "" if picture else words
        return f"{picture}[{words}]({repository}/{'raw' if picture else 'blob'}/{tag}/{path})"

    return LINK.sub(whole, (ROOT / "README.md").read_text(encoding="utf-8"))


def main() -> None:
    repository = os.environ.get("HF_STRUCTPRUNE_REPOSITORY") or None
    code = (ROOT / "hf_structprune" / "installed.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', code, re.MULTILINE)[1]
    setup(
        long_description=readme(repository, version),
        long_description_content_type="text/markdown",
        project_urls={"Repository": repository} if repository else {},
    )


if __name__ == "__main__":
    main()
