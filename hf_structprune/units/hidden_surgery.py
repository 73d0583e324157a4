"""Takes channels out of the residual stream."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.rebuild import assemble
from ..model.target import Target
from ..refit.norms import row_scales, scale_, stream_norms
from .hidden_group import HiddenGroup


@torch.no_grad()
def cut_channels(model: PreTrainedModel, group: HiddenGroup, kept: torch.Tensor, target: Target) -> PreTrainedModel:
    """A model with the channels `kept`; the dense one stays as it is.

    For RMS norms it equals the dense model with zeros in the other channels of everything that writes to the stream
    (exactly, with the epsilon of `target`): norm weights grow by `sqrt(H / H')`, see `norms.scale_`, and maps in front
    of other norms that share the epsilon by what it costs them, see `norms.row_scales`. A LayerNorm takes mean and
    variance over the channels that are left; zeroed channels would enter both, and no weights make up for that.

    Args:
        model: The dense model.
        group: Its residual stream.
        kept: Numbers of the channels that stay, ascending, shape (H',).
        target: Class and configuration of the result, see `shrunk_target`.

    Returns:
        The smaller model in eval mode, with tensors of its own.
    """
    dims = group.dims()
    by_id = {id(parameter): dims.get(name) for name, parameter in model.named_parameters()}
    done: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in done:
            done[id(tensor)] = _cut(tensor.detach(), by_id.get(id(tensor)), kept)
        state[name] = done[id(tensor)]
    _correct_norms(model, group, state, math.sqrt(group.size / len(kept)))
    for name, factors in row_scales(model, target.skeleton()).items():
        _scale_rows(state, name, model.get_submodule(name), factors)
    buffers = dict(model.named_buffers())
    _correct_embedding(model, group, state, buffers, len(kept))
    result = assemble(target, state, buffers, model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in result.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    return result


def _cut(tensor: torch.Tensor, dim: int | None, kept: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if dim is None else tensor.index_select(dim, kept.to(tensor.device)).contiguous()


def _scale_rows(state: dict[str, torch.Tensor], name: str, module: nn.Module, factors: torch.Tensor) -> None:
    """Multiplies the rows of a linear map, and its bias."""
    weight = state[f"{name}.weight"]
    factors = factors.to(weight.device)
    rows = factors[:, None] if isinstance(module, nn.Linear) else factors
    state[f"{name}.weight"] = (weight * rows).to(weight.dtype)
    if module.bias is not None:
        state[f"{name}.bias"] = (state[f"{name}.bias"] * factors).to(weight.dtype)


def _correct_norms(model: nn.Module, group: HiddenGroup, state: dict[str, torch.Tensor], factor: float) -> None:
    for name, kind in stream_norms(model, set(group.dims())).items():
        if not kind.centred:
            scale_(state[f"{name}.weight"], kind, factor)


def _correct_embedding(
    model: PreTrainedModel,
    group: HiddenGroup,
    state: dict[str, torch.Tensor],
    buffers: dict[str, torch.Tensor],
    keep: int,
) -> None:
    """Makes up for `embed_scale = sqrt(hidden size)` (Gemma), which a smaller model multiplies its embeddings by.

    The embeddings grow by what their scale shrinks by; with a tied head the final norm shrinks by the same.
    """
    embedding = model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    if not isinstance(scale, torch.Tensor) or not math.isclose(float(scale), math.sqrt(group.size), rel_tol=1e-2):
        return
    prefix = next(name for name, module in model.named_modules() if module is embedding)
    factor = math.sqrt(group.size / keep)
    buffers[f"{prefix}.embed_scale"] = torch.full_like(scale, math.sqrt(keep))
    state[f"{prefix}.weight"].mul_(factor)
    head = model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        name = final_norm(model, group)
        scale_(state[f"{name}.weight"], stream_norms(model, {f"{name}.weight"})[name], 1 / factor)


def final_norm(model: PreTrainedModel, group: HiddenGroup) -> str:
    """Full name of the norm in front of the LM head: the last norm of the stream outside the decoder layers."""
    parts = [name.split(".") for name in stream_norms(model, set(group.dims()))]
    return ".".join([part for part in parts if not any(word.isdigit() for word in part)][-1])
