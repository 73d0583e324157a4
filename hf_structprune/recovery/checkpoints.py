"""Checkpoints of a training: which are whole, so that it can go on from there; older ones go when a newer one is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..files.damage import damage, damaged_weights, first_damage, those_there
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
    return damaged_weights(checkpoint, _WEIGHTS)


def _optimizer(checkpoint: Path) -> str | None:
    if any(checkpoint.glob("global_step*/*")):  # DeepSpeed keeps weights, optimizer and learning rate together
        return None
    there = those_there(checkpoint, ("optimizer.pt", "optimizer.bin", "optimizer_*"))
    if not there:
        return "it has no state of the optimizer"
    return first_damage([*there, checkpoint / "scheduler.pt", *checkpoint.glob("scaler.pt")])


def _random_numbers(checkpoint: Path) -> str | None:
    there = those_there(checkpoint, ("rng_state*.pth",))
    return first_damage(there) if there else "it has no state of the random numbers"


def _trainer_state(checkpoint: Path) -> str | None:
    path = checkpoint / "trainer_state.json"
    if damage(path) is not None:
        return damage(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    step = content.get("global_step") if isinstance(content, dict) else None
    return None if step == step_of(checkpoint) else f"{path.name} is of step {step}"


def _own(checkpoint: Path) -> str | None:
    """What `LoraRecoveryCallback` adds."""
    found = first_damage([checkpoint / BEST_NAME, checkpoint / STATE_NAME])
    if found is not None:
        return found
    content = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not content.get("settings"):
        return f"{STATE_NAME} does not say what the training was begun with"
    return None
