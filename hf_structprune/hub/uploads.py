"""Which files of a checkpoint folder go to the Hub, and which never do."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from ..errors import HubError
from ..files.damage import damaged_weights
from .benchmarks import EVAL_RESULTS, TASKS
from .contents import check_is_ours


# Hidden files may hold secrets (.env, .netrc, .git); pickles run code when they are read; the others are of training.
_HIDDEN_THAT_GO = (".gitattributes", EVAL_RESULTS)
_NEVER = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.pickle",
    "*.ckpt",
    "*.joblib",
    "*.npy",
    "*.npz",
    "*.pyc",
    "*.pem",
    "*.key",
)
_FOLDERS = ("__pycache__", "checkpoint-*", "runs", "wandb")
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT = 10_000_000
# Files of an earlier checkpoint on the Hub that would be taken for part of this one.
_STALE = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "modeling_structprune.py",
    "evaluation_results.json", "evaluation_results_dense.json", "evaluation_results_pruned.json",
    "evaluation_results_recovered.json", "recovery.json", "recovery.png", "quantization.json",
    *(f"{EVAL_RESULTS}/{task}.yaml" for task in TASKS),
)  # fmt: skip


def check_checkpoint(folder: Path) -> None:
    """Refuses a folder that is no complete checkpoint of this package.

    Raises:
        HubError: Says which file is missing or damaged.
    """
    check_is_ours(folder)
    found = damaged_weights(folder, ("model.safetensors", "model.safetensors.index.json"))
    if found is not None:
        raise HubError(f"{folder} is no whole checkpoint: {found}.")


def choose_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files that go to the Hub and those that stay, relative to the folder, each in order.

    Hidden files (but `.gitattributes` and `.eval_results/`), pickles and other files that run code when they are
    loaded, keys, and what training leaves (`checkpoint-*`, `runs`) stay.

    Raises:
        HubError: A file that would go has what looks like a token of the Hub in it.
    """
    go: list[Path] = []
    stay: list[Path] = []
    for root, folders, files in os.walk(folder):
        here = Path(root).relative_to(folder)
        for name in sorted(folders):
            if not _goes(here / name, _FOLDERS):
                stay.append(here / name)
        folders[:] = sorted(name for name in folders if here / name not in stay)
        for name in sorted(files):
            (go if _goes(here / name, _NEVER) else stay).append(here / name)
    for path in go:
        if (folder / path).stat().st_size < _LARGEST_TEXT and _TOKEN.search((folder / path).read_bytes()):
            raise HubError(f"{folder / path} has what looks like a token of the Hub in it; nothing was uploaded.")
    return go, stay


def stale_files(remote: list[str], going: list[Path]) -> list[str]:
    """Files of an earlier push that this one does not replace and that would be taken for part of it."""
    new = {path.as_posix() for path in going}
    return [name for name in remote if name not in new and any(fnmatch(name, pattern) for pattern in _STALE)]


def _goes(path: Path, never: tuple[str, ...]) -> bool:
    hidden = path.name.startswith(".") and str(path) not in _HIDDEN_THAT_GO
    return not hidden and not any(fnmatch(path.name, pattern) for pattern in never)
