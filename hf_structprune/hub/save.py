"""Saves a pruned model with everything that belongs to it, and carries over what was measured on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.utils import logging

from ..config import CONFIG_NAME
from ..errors import StructPruneError
from ..files.folders import check_folder, write_folder
from ..model.half_pruned import check_whole
from ..plan import PLAN_NAME
from .card import CARD_NAME, write_card
from .uploads import choose_files


if TYPE_CHECKING:
    from ..pruner import StructuredPruner

logger = logging.get_logger(__name__)


def save_checkpoint(pruner: StructuredPruner, folder: Path, name: str, **kwargs: Any) -> None:
    """Writes the checkpoint of a pruner that has pruned, all at once or not at all.

    Args:
        pruner: Model, tokenizer, configuration and plan.
        folder: Where the files go.
        name: What the card calls the model.
        kwargs: Given to the model's `save_pretrained`.
    """
    check_whole(pruner.model)
    plan = pruner.last_plan
    if plan is None:
        raise StructPruneError("Nothing has been pruned yet: call `prune` before `save_pretrained` or `push_to_hub`.")
    check_folder(folder)
    card = folder / CARD_NAME
    previous = card.read_text(encoding="utf-8") if card.is_file() else ""

    def write(path: Path) -> None:
        pruner.model.save_pretrained(path, **kwargs)
        if pruner.tokenizer is not None:
            pruner.tokenizer.save_pretrained(path)
        pruner.config.save(path / CONFIG_NAME)
        plan.save(path / PLAN_NAME)
        write_card(path, name=name, previous=previous, recorded=pruner.origin)

    write_folder(folder, write, size=plan.bytes_after)


def take_over(source: Path, target: Path) -> None:
    """Copies what stands beside the weights of one checkpoint (results, pictures, recipe, card) to another.

    Only if both have the same weights: what was measured on others is not true of these.
    """
    if not (source / CARD_NAME).is_file():
        return
    if not _same_weights(source, target):
        logger.warning(f"The model has changed since it was saved to {source}: the results there are left out.")
        return
    for path in choose_files(source)[0]:
        weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
        if path.name == CARD_NAME or not (weights or (target / path).exists()):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target / path)


def _same_weights(one: Path, other: Path) -> bool:
    first, second = dict(_tensors(one)), dict(_tensors(other))
    return first.keys() == second.keys() and all(
        torch.equal(_read(path, name), _read(second[name], name)) for name, path in first.items()
    )


def _tensors(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from ((name, path) for name in file.keys())  # noqa: SIM118, a method and no dictionary


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)
