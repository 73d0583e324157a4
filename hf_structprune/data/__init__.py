"""Samples of text that travel with the package, so that it works without a network."""

from importlib.resources import files
from pathlib import Path


def calibration_sample() -> Path:
    """The default calibration text, a `.jsonl` file: Wikipedia articles and web pages in turns, English."""
    return _path("calibration.jsonl")


def chat_sample() -> Path:
    """Chats of one question and answer, a `.jsonl` file with the column `messages`, English."""
    return _path("chats.jsonl")


def code_sample() -> Path:
    """Pieces of programs, a `.jsonl` file: every other one Python, else TypeScript and C++ in turns."""
    return _path("code.jsonl")


def wikitext2_sample() -> Path:
    """The leading articles of the WikiText-2 raw test split, a `.txt` file with its blank lines."""
    return _path("wikitext2_test_sample.txt")


def _path(name: str) -> Path:
    return Path(str(files(__name__).joinpath(name)))
