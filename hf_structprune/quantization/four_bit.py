"""Keeps 4-bit layers of bitsandbytes right on every CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def compute_as_stored(model: nn.Module) -> list[nn.Module]:
    """Makes 4-bit layers compute with their stored weights on a CPU, whose instructions bitsandbytes would ask for.

    On other devices nothing changes.

    Returns:
        The layers that computed otherwise before.
    """
    layers = [module for module in model.modules() if _is_bitsandbytes(type(module))]
    if layers:
        from .stored_weights import StoredLinear4bit

        for layer in layers:
            layer.__class__ = StoredLinear4bit
    return layers


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """The same for a while; afterwards the layers are bitsandbytes' own again, and their weights as they were."""
    layers = compute_as_stored(model)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = type(layer).__base__


def _is_bitsandbytes(kind: type) -> bool:
    """PEFT's layer around one of bitsandbytes has the same name."""
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")
