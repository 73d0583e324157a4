"""Norms of the residual stream: what kind they are, and what makes up for the channels they no longer see."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from .structure import is_linear, matrix


@dataclass(frozen=True)
class NormKind:
    """How a norm computes.

    Attributes:
        centred: Whether it subtracts the mean (LayerNorm).
        offset: What is added to its weight: 1 for Gemma, whose weights are stored as `w - 1`, else 0.
    """

    centred: bool
    offset: float


@torch.no_grad()
def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of a module with a weight for each channel, found by trying it; `None` if it is no norm."""
    weight = getattr(module, "weight", None)
    if is_linear(module) or isinstance(module, nn.Embedding) or weight is None or weight.ndim != 1:
        return None
    twin = copy.deepcopy(module).to_empty(device="cpu").float()
    for parameter in twin.parameters():
        parameter.zero_()
    numbers = torch.linspace(-1, 2, weight.numel() * 2, dtype=torch.float32, device="cpu")
    x = 1e4 * (numbers.cos().view(2, -1) + 0.5)  # no epsilon matters beside it
    offset = float(twin(x).abs().max() > 1e-6)
    twin.weight.fill_(1 - offset)
    y = twin(x)
    if not torch.allclose(twin(2 * x), y, atol=1e-3) or torch.allclose(y, x):
        return None
    return NormKind(centred=torch.allclose(twin(x + 1e4), y, atol=1e-3), offset=offset)


def stream_norms(model: PreTrainedModel, names: set[str]) -> dict[str, NormKind]:
    """Norms whose weights are among these parameters, in the order of the model, by the full name of the module."""
    found: dict[str, NormKind] = {}
    kinds: dict[type, NormKind | None] = {}
    for name, module in model.named_modules():
        if f"{name}.weight" in names and getattr(module.weight, "ndim", 0) == 1:
            if type(module) not in kinds:
                kinds[type(module)] = norm_kind(module)
            if kinds[type(module)] is not None:
                found[name] = kinds[type(module)]
    return found


def scale_(weight: torch.Tensor, kind: NormKind, factor: torch.Tensor | float) -> None:
    """Multiplies what a norm gives by a factor, in place.

    An RMS norm over `H` channels of which only those in `K` are not 0 gives `w x / sqrt(S / H + eps)` with
    `S = sum_K x^2`. Over the `H'` channels of `K` alone it gives `w' x / sqrt(S / H' + eps')`; with
    `eps' = eps H / H'` and `w' = w sqrt(H / H')` that is the same.
    """
    weight.add_(kind.offset).mul_(factor).sub_(kind.offset)


def epsilon(module: nn.Module) -> float | None:
    """The epsilon of a norm, `None` where it has none of its own."""
    return next((v for k, v in vars(module).items() if "eps" in k and isinstance(v, float)), None)


def eps_changes(model: PreTrainedModel, small: PreTrainedModel) -> dict[str, float]:
    """Values of the configuration that let the epsilon of RMS norms over the hidden size grow, see `scale_`.

    `small` is the model with fewer channels, still with the epsilon of the dense one.
    """
    changes = {}
    for name, factor in _stream_rms_norms(model, small).items():
        eps = epsilon(model.get_submodule(name))
        values = model.config.to_dict().items()
        changes |= {k: eps * factor for k, v in values if "eps" in k and isinstance(v, float) and v == eps}
    return changes


def row_scales(model: PreTrainedModel, small: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What makes up for an epsilon that grows with those of the residual stream, in norms that are not over it.

    One key of the configuration holds the epsilon of all norms. A norm over a head or a latent (`q_norm`,
    `kv_a_layernorm`) gives the same with an epsilon `c^2` times as large if its input is `c` times as large; the map
    in front of it is scaled. `small` is the model with fewer channels; the meta device will do.

    Returns:
        Factors of the rows, shape (rows,), float64, by the full name of the linear map.

    Raises:
        UnsupportedModelError: A norm has no linear map right in front of it, the epsilon of the stream's own norms
            is not in the configuration, or another number in a module follows the hidden size.
    """
    stream, scales = _stream_rms_norms(model, small), {}
    for name, module in model.named_modules():
        before, after = epsilon(module), epsilon(small.get_submodule(name))
        if name in stream and before is not None and not math.isclose(after, before * stream[name], rel_tol=1e-6):
            raise UnsupportedModelError(
                f"`{name}` has an epsilon of {before:g}, which would have to be {before * stream[name]:g} with fewer "
                f"channels; no key of {type(model.config).__name__} holds it. {WAY_OUT}"
            )
        if name not in stream and before is not None and before != after:
            scales |= _in_front(model, name, math.sqrt(after / before))
        for key, value in vars(module).items() if module is not model.get_input_embeddings() else ():
            other = getattr(small.get_submodule(name), key, None)
            if isinstance(value, float) and "eps" not in key and other != value:
                raise UnsupportedModelError(
                    f"`{name}.{key}` is {value:g} and would be {other} with fewer channels: "
                    f"{type(model).__name__} derives it from the hidden size. {WAY_OUT}"
                )
    return scales


WAY_OUT = "Cut 'mlp_neurons', 'kv_groups' or 'layers' of this model instead of 'hidden'."


def _stream_rms_norms(model: PreTrainedModel, small: PreTrainedModel) -> dict[str, float]:
    """RMS norms over the hidden size, and by how much a mean over fewer channels is larger."""
    after = dict(small.named_parameters())
    grown = {
        n: p.shape[0] / len(after[n]) for n, p in model.named_parameters() if p.ndim == 1 and p.shape != after[n].shape
    }
    norms = stream_norms(model, set(grown))
    return {name: grown[f"{name}.weight"] for name, kind in norms.items() if not kind.centred}


def _in_front(model: PreTrainedModel, norm: str, factor: float) -> dict[str, torch.Tensor]:
    """The linear map whose output a norm reads, by its name: `q_proj` for `q_norm`."""
    parent, _, leaf = norm.rpartition(".")
    stem = leaf.removesuffix("_layernorm").removesuffix("_norm")
    weight = getattr(model.get_submodule(norm), "weight", None)
    for name in (f"{stem}_proj", f"{stem}_proj_with_mqa"):
        producer = getattr(model.get_submodule(parent), name, None)
        if not is_linear(producer):
            continue
        rows = matrix(producer).shape[0]
        factors = torch.ones(rows, dtype=torch.float64)
        factors[: rows if name == f"{stem}_proj" else len(weight)] = factor
        if weight is None or rows % len(weight) == 0 or name != f"{stem}_proj":
            return {f"{parent}.{name}": factors}
    raise UnsupportedModelError(
        f"`{norm}` does not normalise over the hidden size, but shares the epsilon of the norms that do, which grows "
        f"when channels go; no linear map in front of it is known that could make up for that. {WAY_OUT}"
    )
