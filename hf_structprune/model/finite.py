"""Weights and what is measured with them have to be numbers: NaN and Inf rank nothing and spoil every fit."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import UnsupportedModelError


def check_finite(model: nn.Module) -> None:
    """Refuses weights that are no numbers; one pass over all of them, without a copy.

    Raises:
        UnsupportedModelError: Names the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not _all_finite(parameter.detach()):
            raise UnsupportedModelError(
                f"`{name}` has values that are not finite (NaN or Inf), so that nothing can be said about what is "
                "important in this model. The checkpoint is damaged, or its training has diverged."
            )


def check_numbers(values: torch.Tensor, what: str) -> None:
    """Refuses what was computed with finite weights and is not finite itself.

    Args:
        values: What was computed.
        what: What it is, as the beginning of a sentence.

    Raises:
        UnsupportedModelError: A value is NaN or Inf.
    """
    if not _all_finite(values):
        kind = str(values.dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{what} are not finite (NaN or Inf): the model cannot be run on the calibration text in {kind}. Load it "
            "in another dtype, bfloat16 or float32."
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor Inf; least and largest of a tensor show it in one pass without a mask."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
