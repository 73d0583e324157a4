"""What a training was begun with: kept in its checkpoints, so that it goes on in the same way or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from .configuration import DistillationConfig, RecoveryConfig
from .precision import choose_precision
from .travelling import STATE_NAME


# What may change on the way: it is no part of what is learned.
_FREE = ("report_to", "save_steps", "gradient_checkpointing")
_VALUES = 64  # so many of every tensor are looked at


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


def read_settings(checkpoint: Path) -> dict[str, Any]:
    """What the training of a checkpoint was begun with, see `checkpoints.flaw`."""
    return json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))["settings"]


def refuse_others(begun: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses to go on in another way.

    Args:
        begun: What the training was begun with.
        now: What is given now; what is not in it is not compared.
        checkpoint: Where it would go on.

    Raises:
        ConfigurationError: Names every setting that differs, with both values.
    """
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
