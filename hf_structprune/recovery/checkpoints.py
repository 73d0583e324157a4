"""Checkpoints of a training: which are whole, so that it can go on from there; older ones go when a newer one is."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .travelling import BEST_NAME, STATE_NAME


_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model_fsdp*",
)  # fmt: skip


def in_order(training: Path) -> list[Path]:
    """The checkpoints of a training, the oldest first."""
    found = [path for path in training.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def newest_whole(training: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that a training can go on from.

    Args:
        training: Folder with the checkpoints.

    Returns:
        The checkpoint, `None` if none is whole; and the newer ones that are not, each with what is wrong with it.
    """
    flaws: dict[Path, str] = {}
    for checkpoint in reversed(in_order(training)):
        found = flaw(checkpoint)
        if found is None:
            return checkpoint, flaws
        flaws[checkpoint] = found
    return None, flaws


def flaw(checkpoint: Path) -> str | None:
    """Why a training of `recover` cannot go on from a checkpoint as if nothing had been; `None` if it can.

    Whole is one that has weights, the state of optimizer, learning rate and random numbers, what the Trainer and the
    measuring know, and of which every file can be read to its end.
    """
    for check in (_weights, _optimizer, _random_numbers, _trainer_state, _own):
        found = check(checkpoint)
        if found is not None:
            return found
    return None


class KeepNewest(TrainerCallback):
    """Removes older checkpoints once a newer one has everything; has to stand after the callbacks that add to it.

    `save_total_limit` of the Trainer would remove them before those callbacks are called.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for checkpoint in in_order(Path(args.output_dir)):
                if step_of(checkpoint) != state.global_step:
                    shutil.rmtree(checkpoint, ignore_errors=True)


def _weights(checkpoint: Path) -> str | None:
    there = _there(checkpoint, _WEIGHTS)
    if not there:
        return "it has no weights"
    indices = [path for path in there if path.name.endswith(".index.json")]
    shards = {}
    for index in indices:
        if damage(index) is not None:
            return damage(index)
        content = json.loads(index.read_text(encoding="utf-8"))
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not names:
            return f"{index.name} names no files"
        shards |= names
    return _first(damage, [*there, *(checkpoint / name for name in sorted(set(shards.values())))])


def _optimizer(checkpoint: Path) -> str | None:
    if any(checkpoint.glob("global_step*/*")):  # DeepSpeed keeps weights, optimizer and learning rate together
        return None
    there = _there(checkpoint, ("optimizer.pt", "optimizer.bin", "optimizer_*"))
    if not there:
        return "it has no state of the optimizer"
    return _first(damage, [*there, checkpoint / "scheduler.pt", *checkpoint.glob("scaler.pt")])


def _random_numbers(checkpoint: Path) -> str | None:
    there = _there(checkpoint, ("rng_state*.pth",))
    return _first(damage, there) if there else "it has no state of the random numbers"


def _trainer_state(checkpoint: Path) -> str | None:
    path = checkpoint / "trainer_state.json"
    if damage(path) is not None:
        return damage(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    step = content.get("global_step") if isinstance(content, dict) else None
    return None if step == step_of(checkpoint) else f"{path.name} is of step {step}"


def _own(checkpoint: Path) -> str | None:
    """What `LoraRecoveryCallback` adds."""
    found = _first(damage, [checkpoint / BEST_NAME, checkpoint / STATE_NAME])
    if found is not None:
        return found
    content = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.get("settings"):
        return f"{STATE_NAME} does not say what the training was begun with"
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a file of a checkpoint, or a folder of such files; `None` if it can be read to its end.

    Files of torch have check sums and are read whole; of safetensors the header says how long the file is.
    """
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return _first(damage, inside) if inside else f"{path.name} is empty"
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as file:
                if file.testzip() is not None:
                    return f"{path.name} is damaged"
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile):
        return f"{path.name} is cut off or damaged"
    return None


def _there(checkpoint: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(checkpoint.glob(pattern))]


def _first(check: Callable[[Path], str | None], paths: list[Path]) -> str | None:
    return next(filter(None, map(check, paths)), None)
