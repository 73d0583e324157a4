"""What a layer adds to the hidden states of what its modules put out: the sum itself, or a norm or a multiple of it.

Layers of Gemma 2 and 3, OLMo 2, GLM-4 and others normalise what attention and MLP put out before they add it, those of
Granite and MiniCPM multiply it by a constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from ..model.hidden_size import norm_kind


_LEAST_GAIN = 1e-3  # of the root mean square of a norm's weights: what counts as no weight
_SMALL = 0.1  # `c`: times the mean square of a norm's weights, those that are too small to correct an error with
_EXACT = 0.01  # a factor so near to 1 is 1
_ROUNDING = 0.1  # of a sum: what low precision may make of it


@dataclass
class Addend:
    """`z = a N(y)` for the output `y` of a module: what the layer adds to its hidden states.

    With the gain `v` of the norm `N` (1 without one) and its scale `r` of a token (the reciprocal of the root mean
    square of `y`), a small change of `y` in a direction other than its own changes `z` by `a r v` times as much.

    Attributes:
        norm: The norm, if there is one.
        factor: `a`.
    """

    norm: nn.Module | None = None
    factor: float = 1.0

    @cached_property
    def _offset(self) -> float:
        return norm_kind(self.norm).offset

    @property
    def plain(self) -> bool:
        """Whether the output itself is added."""
        return self.norm is None and self.factor == 1

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """What is added, float32 if there is anything to compute."""
        if self.norm is None:
            return y if self.factor == 1 else y.float() * self.factor
        weight = self.norm.weight
        return self.norm(y.to(weight.device, weight.dtype)).float().to(y.device) * self.factor

    def gain(self) -> torch.Tensor | None:
        """`v`, shape (d,), float32: the weights of the norm, none of them nearly 0; `None` without a norm."""
        if self.norm is None:
            return None
        weight = self.norm.weight.detach().float() + self._offset
        least = _LEAST_GAIN * weight.square().mean().sqrt().clamp_min(1e-30)
        return torch.where(weight < 0, -1.0, 1.0) * weight.abs().clamp_min(least)

    def scale(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """`a r` of each token, shape (..., 1), float32, where `z` is what is made of `y`."""
        if self.norm is None:
            return torch.full_like(y[..., :1], self.factor, dtype=torch.float32)
        alike = y.float() * self.gain().to(y.device)
        return (alike * z).sum(-1, keepdim=True) / alike.square().sum(-1, keepdim=True).clamp_min(1e-30)

    def correction(self, lacking: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The change of `v y` that adds to `z` most of what it lacks, float32.

        That is `lacking / (a r)`, times `v^2 / (v^2 + c mean(v^2))`: in a channel of small weight, `y` would have to
        change by so much that the norm took it back from all others.

        Args:
            lacking: Of `z`, shape (..., d).
            scale: `a r`, shape (..., 1); where it is 0, no change of `y` would do anything, and it is 0.
        """
        change = torch.where(scale == 0, 0.0, lacking / torch.where(scale == 0, 1.0, scale))
        if self.norm is None:
            return change
        squares = self.gain().to(change.device).square()
        return change * (squares / (squares + _SMALL * squares.mean()))


def norms_of(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of layers that divide by the size of what they get, and multiply by a weight for each channel."""
    found = [module for layer in layers for module in layer.children() if hasattr(module, "weight")]
    kinds = {cls: norm_kind(module) for cls, module in {type(m): m for m in found}.items()}
    return [module for module in found if kinds[type(module)] is not None]


def factors_of_sum(total: torch.Tensor, terms: list[torch.Tensor]) -> list[float] | None:
    """Factors `a` with `total = terms[0] + sum a_i terms[i]`, wherever they are; `None` if there are none.

    All of them are 1 where that is right within the rounding of additions in low precision.
    """
    terms = [term.to(total.device) for term in terms]
    if len({term.numel() for term in (total, *terms)}) > 1:  # outputs go into several residual streams
        return None
    first, *parts = (term.reshape(-1, total.shape[-1]).double() for term in terms)
    if not parts:
        return None
    wanted = total.reshape(first.shape).double() - first
    plain = [1.0] * len(parts)
    if _adds_up(wanted, parts, plain):
        return plain
    # Tokens with large hidden states (the first one) would decide alone.
    weights = wanted.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    matrix = torch.stack([(part / weights).flatten() for part in parts], 1)
    found = torch.linalg.lstsq(matrix.cpu(), (wanted / weights).flatten()[:, None].cpu()).solution.flatten().tolist()
    found = [1.0 if abs(factor - 1) < _EXACT else factor for factor in found]
    return found if _adds_up(wanted, parts, found) else None


def _adds_up(wanted: torch.Tensor, parts: list[torch.Tensor], factors: list[float]) -> bool:
    made = sum(part * factor for part, factor in zip(parts, factors, strict=True))
    rest = (wanted - made).norm(dim=-1)
    return float((rest / made.norm(dim=-1).clamp_min(1e-30)).median()) < _ROUNDING
