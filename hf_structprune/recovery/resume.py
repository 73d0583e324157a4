"""Going on with a training: which of its checkpoints is whole, and whether it was begun in the same way."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigurationError
from ..files.reading import damage, damaged_weights, first_damage, those_there
from .configuration import DistillationConfig, RecoveryConfig
from .session import BEST_NAME, STATE_NAME
from .training import choose_precision


_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model_fsdp*",
)  # fmt: skip
# What may change on the way: it is no part of what is learned.
_FREE = ("report_to", "save_steps", "gradient_checkpointing")
_VALUES = 64  # so many of every tensor are looked at


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
    return (
        damaged_weights(checkpoint, _WEIGHTS)
        or _optimizer(checkpoint)
        or _state_of(checkpoint, "random numbers", "rng_state*.pth")
        or _trainer_state(checkpoint)
        or first_damage([checkpoint / BEST_NAME, checkpoint / STATE_NAME])
        or _settings(checkpoint)
    )


def _optimizer(checkpoint: Path) -> str | None:
    if any(checkpoint.glob("global_step*/*")):  # DeepSpeed keeps weights, optimizer and learning rate together
        return None
    found = _state_of(checkpoint, "optimizer", "optimizer.pt", "optimizer.bin", "optimizer_*")
    return found or first_damage([checkpoint / "scheduler.pt", *checkpoint.glob("scaler.pt")])


def _state_of(checkpoint: Path, what: str, *patterns: str) -> str | None:
    there = those_there(checkpoint, patterns)
    return first_damage(there) if there else f"it has no state of the {what}"


def _trainer_state(checkpoint: Path) -> str | None:
    path = checkpoint / "trainer_state.json"
    if damage(path) is not None:
        return damage(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    step = content.get("global_step") if isinstance(content, dict) else None
    return None if step == step_of(checkpoint) else f"{path.name} is of step {step}"


def _settings(checkpoint: Path) -> str | None:
    content = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    known = isinstance(content, dict) and content.get("settings")
    return None if known else f"{STATE_NAME} does not say what the training was begun with"


class KeepNewest(TrainerCallback):
    """Removes older checkpoints once a newer one has everything; has to stand after the callbacks that add to it.

    `save_total_limit` of the Trainer would remove them before those callbacks are called.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for checkpoint in in_order(Path(args.output_dir)):
                if step_of(checkpoint) != state.global_step:
                    shutil.rmtree(checkpoint, ignore_errors=True)


def settings_of(
    config: RecoveryConfig, distillation: DistillationConfig | None, **about: str | list[str] | None
) -> dict[str, Any]:
    """Everything that a training is begun with, by the names of the options; no names of folders.

    Args:
        config: How it is trained.
        distillation: How it is distilled; `None` where it is not.
        about: Names of the model, the data and the like.
    """
    values = {name: value for name, value in config.to_public_dict().items() if name not in _FREE}
    chosen = {"learning_rate": config.peak_learning_rate, "precision": choose_precision(config.precision)}
    more = {} if distillation is None else distillation.to_public_dict()
    return json.loads(json.dumps({**about, **values, **chosen, **more}, default=str))


def refuse_other_settings(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Refuses to go on from a whole checkpoint in another way than its training was begun.

    Args:
        checkpoint: Where it would go on.
        now: What is given now; what is not in it is not compared.

    Raises:
        ConfigurationError: Names every setting that differs, with both values.
    """
    begun = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))["settings"]
    other = [f"`{name}` is {now[name]!r}, it was {begun.get(name)!r}" for name in now if begun.get(name) != now[name]]
    if other:
        raise ConfigurationError(
            f"The training in {checkpoint.parent.name} was begun in another way: {'; '.join(other)}. Give the same to "
            "go on, or say `overwrite` to start anew."
        )


def fingerprint_of_rows(rows: Any) -> str:
    """Tokenised rows in words: how many, and 16 hexadecimal digits of their ids and labels."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["input_ids", "labels"]).iter(1000):
        digest.update(json.dumps(batch).encode())
    return f"{len(rows):,} sequences, {digest.hexdigest()[:16]}"


@torch.no_grad()
def fingerprint_of_weights(model: nn.Module) -> str:
    """Weights in words: how many, and 16 hexadecimal digits of names, shapes and some values of every tensor."""
    digest, count = hashlib.sha256(), 0
    for name, tensor in model.named_parameters():
        count += tensor.numel()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.data.reshape(-1)
        digest.update(flat[:: max(1, len(flat) // _VALUES)].cpu().double().numpy().tobytes())
    return f"{count:,} parameters, {digest.hexdigest()[:16]}"
