"""Letting modules run something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]):
    """Modules run these functions instead of their own `forward` as long as this is open.

    A `forward` that was set on a module before (as Accelerate does where it moves weights) is put back.

    Args:
        replacements: Modules and what they run.
    """
    originals: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for module, forward in replacements:
            originals.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, forward in reversed(originals):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def as_output(value: Any, others: int | None) -> Any:
    """A value in the form that a module returns it.

    Args:
        value: The first or only output.
        others: How many others there are in a tuple; `None` where the module returns no tuple.
    """
    return value if others is None else (value, *[None] * others)


def others_of(output: Any) -> int | None:
    """How many other outputs a module returned in a tuple with the first, see `as_output`."""
    return len(output) - 1 if isinstance(output, tuple) else None
