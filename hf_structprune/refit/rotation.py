"""Turns the residual stream into the basis of its principal components, so that the last channels carry least.

SliceGPT (Ashkboos et al., 2024, https://huggingface.co/papers/2401.15024) with one orthogonal `Q` for all layers: no
matrix has to be added between layers, and the result is a plain checkpoint.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from ..config import PruningConfig
from ..errors import ConfigurationError, UnsupportedModelError
from ..hooks import hooked
from ..model.groups import Group
from ..model.hidden_size import NormKind, stream_norms
from ..model.rebuild import assemble
from ..model.target import Target
from ..stats.gradients import on_device, run_hooked


def in_components(
    model: PreTrainedModel, group: Group, config: PruningConfig, tokens: torch.Tensor | None
) -> PreTrainedModel:
    """The same function with its stream in the basis of its principal components, see `rotated`.

    Raises:
        ConfigurationError: There are no tokens.
        UnsupportedModelError: The LM head is tied, a norm of the stream subtracts the mean, or see `rotated`.
    """
    head, vocabulary = model.get_output_embeddings(), len(model.get_input_embeddings().weight)
    if head is None or head.weight is model.get_input_embeddings().weight:
        raise UnsupportedModelError(
            "hidden_criterion='pca' needs an LM head of its own: the weights of the final norm go into the head and "
            "not into the embeddings it is tied to, so that it would have to be untied, which adds vocabulary x "
            f"hidden size = {group.size * vocabulary:,} parameters. Use 'activation'."
        )
    for name, kind in stream_norms(model, set(group.dims())).items():
        if kind.centred:
            raise UnsupportedModelError(
                f"hidden_criterion='pca' needs RMS norms: `{name}` subtracts the mean over the channels, which "
                "depends on their basis. Use 'activation'."
            )
    if tokens is None:
        raise ConfigurationError("The hidden criterion 'pca' looks at calibration text, and there is none.")
    return rotated(model, group, principal_components(model, group, config, tokens))


@torch.no_grad()
def principal_components(
    model: PreTrainedModel, group: Group, config: PruningConfig, tokens: torch.Tensor
) -> torch.Tensor:
    """Eigenvectors `Q` (H, H), float64, of the second moment of what the norms of the stream receive, largest first.

    Every token counts by its direction only (`x / rms(x)`), as the norms see it, and all norms count alike.
    """
    gram = torch.zeros(group.size, group.size, dtype=torch.float64)

    def add(_, args):
        x = args[0].flatten(0, -2).float()
        x = x / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
        gram.add_((x.T @ x).double().cpu())

    norms = stream_norms(model, set(group.dims()))
    run_hooked(model, tokens, config, (model.get_submodule(name).register_forward_pre_hook(add) for name in norms))
    return torch.linalg.eigh(gram).eigenvectors.flip(1)


@torch.no_grad()
def rotated(model: PreTrainedModel, group: Group, rotation: torch.Tensor) -> PreTrainedModel:
    """The same function with its stream `x` written as `Q^T x`: exact, but for rounding.

    The weights of every norm go into the matrices that read it, after which the norm commutes with `Q`; then readers,
    writers, embeddings and head are multiplied by `Q` along their channels. The model, which has RMS norms and an
    untied head, stays as it is.

    Raises:
        UnsupportedModelError: Not all norms and readers belong together one to one (norms behind the writers, as in
            Gemma 2, or readers without a norm).
    """
    norms = stream_norms(model, set(group.dims()))
    scales = _reader_scales(model, group, norms)
    state = dict(model.state_dict())
    for name, dim in group.dims().items():
        owner = name.rpartition(".")[0]
        if owner in norms:
            state[name] = torch.full_like(state[name], 1 - norms[owner].offset)
            continue
        tensor = state[name].movedim(dim, -1).double()
        tensor = tensor * scales[name].to(tensor) if name in scales else tensor
        tensor = tensor @ rotation.to(tensor)
        state[name] = tensor.movedim(-1, dim).to(state[name].dtype).contiguous()
    target = Target(type(model), copy.deepcopy(model.config))
    return assemble(target, state, dict(model.named_buffers()), model)


def _reader_scales(model: PreTrainedModel, group: Group, norms: dict[str, NormKind]) -> dict[str, torch.Tensor]:
    """What every reader gets from its norm's weights, shape (H,), by the name of the reader's parameter."""
    readers: dict[str, list[str]] = {}  # parameters whose last dimension reads channels, by module
    for name, dim in group.dims().items():
        module = name.rpartition(".")[0]
        embeds = isinstance(model.get_submodule(module), torch.nn.Embedding)
        if dim == model.get_parameter(name).ndim - 1 > 0 and not embeds:
            readers.setdefault(module, []).append(name)
    read = _norms_read(model, list(norms), list(readers))
    for name in (*norms, *readers):
        if name not in read and name not in read.values():
            raise UnsupportedModelError(
                f"hidden_criterion='pca' needs every norm of the stream in front of linear maps that read it, and "
                f"nothing else: `{name}` is not in such a pair. Use 'activation'."
            )
    return {
        parameter: model.get_submodule(norm).weight.double() + norms[norm].offset
        for reader, norm in read.items()
        for parameter in readers[reader]
    }


def _norms_read(model: PreTrainedModel, norms: list[str], readers: list[str]) -> dict[str, str]:
    """The norm whose output each reader gets, found by running two tokens."""
    given: list[tuple[str, torch.Tensor]] = []  # all of them, so that no other tensor can have the same address
    modules = {name: model.get_submodule(name) for name in (*norms, *readers)}
    handles = [modules[n].register_forward_hook(lambda _, __, out, n=n: given.append((n, out))) for n in norms]
    handles += [modules[n].register_forward_pre_hook(lambda _, x, n=n: given.append((n, x[0]))) for n in readers]
    with hooked(handles):
        model(input_ids=on_device(model, torch.tensor([[0, 1]])), use_cache=False)
    normed = {tensor.data_ptr(): name for name, tensor in given if name in norms}
    return {name: normed[x.data_ptr()] for name, x in given if name not in norms and x.data_ptr() in normed}
