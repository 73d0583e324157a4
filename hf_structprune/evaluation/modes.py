"""Evaluation mode for the time of a measurement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..four_bit import as_stored


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode; afterwards every module has the mode it had, also after an error.

    In that mode, and only there, bitsandbytes repacks 4-bit weights in place on some CPUs: see `four_bit`.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with as_stored(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
