"""Models that have been taken apart: marked, so that nobody prunes, measures, saves or pushes them by mistake."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import nn

from ..errors import StructPruneError


_MARK = "_structprune_not_whole"


def check_whole(model: nn.Module) -> None:
    """Refuses a model that was marked.

    Raises:
        StructPruneError: Says what happened to it.
    """
    reason = getattr(model, _MARK, None)
    if reason is not None:
        raise StructPruneError(reason)


def mark(model: nn.Module, reason: str) -> None:
    """Marks a model as not whole; its own `save_pretrained` and `push_to_hub` raise the reason from now on."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise StructPruneError(reason)

    setattr(model, _MARK, reason)
    model.save_pretrained = model.push_to_hub = refuse


def interrupted(error: BaseException) -> str:
    """The reason for a mark, where an error or an interrupt has ended the pruning of a model."""
    return (
        f"This model is half-pruned: its weights were being changed when {type(error).__name__}"
        f"{f' ({error})' if str(error) else ''} ended it. It is neither the dense model nor the planned one; load the "
        "dense one again."
    )


@contextmanager
def marked_if_changed(*models: nn.Module | None) -> Iterator[None]:
    """Marks those of these models whose tensors have been changed or taken out when the block ends, however it ends.

    Whether they have is asked of the tensors: an error before the first write leaves no mark.
    """
    before = [(weakref.ref(model), _versions(model)) for model in models if model is not None]
    del models
    try:
        yield
    except BaseException as error:
        _mark_changed(before, interrupted(error))
        raise
    _mark_changed(
        before,
        "This model has been pruned, which has taken its layers apart: use the model that `prune` has returned, or "
        "load the dense one again.",
    )


def _mark_changed(before: list[tuple[weakref.ref, dict[str, tuple]]], reason: str) -> None:
    for reference, versions in before:
        model = reference()
        if model is not None and _versions(model) != versions:
            mark(model, reason)


def _versions(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and how often it has been written to, by name."""
    return {name: (p._version, *p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
