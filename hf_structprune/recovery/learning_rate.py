"""The peak learning rate where none is given: by the size of the weights."""

from __future__ import annotations

import math
import statistics

import torch
from torch import nn

from ..errors import ConfigurationError
from .configuration import RecoveryConfig
from .weights import dequantised, is_quantised


# Of the typical size of a weight, by what is trained. Measured on two models whose weights differ by a factor of five.
RELATIVE = {"lora": 5e-3, "qlora": 5e-3, "full": 1e-3}
SEQUENCES = 4  # of 512 tokens: one at a time, adapters bring back more by a quarter of the rate, all weights do not
_MOST = 64  # matrices that are looked at, evenly spaced


def peak_learning_rate(config: RecoveryConfig, model: nn.Module) -> float:
    """The learning rate given, or `RELATIVE` times `typical_size`.

    That of adapters is for steps of `SEQUENCES` sequences, of fewer it is smaller in proportion.

    A step of Adam changes a weight by about the learning rate, whatever the gradient, so that a rate does to a model
    what it is large against its weights: of two models of a size, one may have five times the other's. Adafactor's
    `alpha = RMS(X) rho` (Shazeer and Stern, arXiv:1804.04235, section 8), with one size for all matrices.

    Args:
        config: What is trained, and how.
        model: The pruned model, before adapters.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    few = 1.0 if config.trained == "full" else min(1.0, config.batch_size / SEQUENCES)
    return float(f"{few * RELATIVE[config.trained] * typical_size(model):.2g}")


@torch.no_grad()
def typical_size(model: nn.Module) -> float:
    """The median over the matrices between embeddings and head of the root of a weight's mean square.

    Matrices of bitsandbytes are read as they compute; experts that are kept in one tensor count as one matrix.

    Raises:
        ConfigurationError: All of them are zero, or not finite.
    """
    sides = (model.get_input_embeddings(), model.get_output_embeddings())
    theirs = {id(side.weight) for side in sides if getattr(side, "weight", None) is not None}
    quantised = [module for module in model.modules() if is_quantised(module)]
    matrices: list[nn.Module | nn.Parameter] = [*quantised]
    matrices += [
        parameter for parameter in model.parameters()
        if parameter.ndim > 1 and parameter.is_floating_point() and id(parameter) not in theirs
    ]  # fmt: skip
    step = max(1, math.ceil(len(matrices) / _MOST))
    sizes = []
    for matrix in matrices[::step]:
        weight = dequantised(matrix).weight if isinstance(matrix, nn.Module) else matrix
        sizes.append(float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / math.sqrt(weight.numel()))
    if not (known := [size for size in sizes if 0 < size < math.inf]):
        raise ConfigurationError(
            "All matrices of the model are zero or not finite, by which no `learning_rate` can be told: give one, or "
            "a model that works."
        )
    return statistics.median(known)
