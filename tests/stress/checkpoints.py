"""Tiny pruned models, and whether a folder holds one of them whole."""

from pathlib import Path

import families
import vocabularies

from hf_structprune import PruningConfig, StructuredPruner


NOTES = "notes.txt"


def make_pruners() -> list[StructuredPruner]:
    """Two models of different sizes that have been pruned."""
    pruners = []
    for ratio in (0.1, 0.2):
        model = families.make_model("llama", vocab_size=400)
        config = PruningConfig(criterion="l1", compensation=False, round_to=1)
        pruners.append(StructuredPruner(model, config, vocabularies.byte_level()))
        pruners[-1].prune(ratio)
    return pruners


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a checkpoint but those that are the user's, or tell its name or the time."""
    names = {NOTES, "README.md"}
    found = (path for path in folder.rglob("*") if path.is_file() and path.name not in names)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def leftovers(folder: Path) -> list[str]:
    """What is hidden in a folder or beside it."""
    return [path.name for path in (*folder.parent.glob(".*"), *folder.glob(".*"))]
