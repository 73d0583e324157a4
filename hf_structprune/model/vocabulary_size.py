"""The vocabulary of a model: where the rows of its tokens are, what a model with fewer is, and the cut.

The rows are not traced. The model's class is built on the meta device with another size of the vocabulary: what grows
with it holds the tokens, and has to be the embedding and the LM head, with its bias, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..units import VOCABULARY
from ..vocabulary.tokenizers import named_ids, renumbered
from .groups import Group, Slice, is_linear, matrix_parameters
from .probe import changed_dims, other_shapes
from .rebuild import assemble
from .structure import ModelStructure
from .target import Target, make_target, plain_values


def token_group(model: PreTrainedModel, structure: ModelStructure) -> Group:
    """Finds the rows of tokens in all parameters, tied ones once; works on the meta device.

    Raises:
        UnsupportedModelError: Something else than embedding and LM head has a place for each token, or what does is
            not understood.
    """
    name = f"{type(model).__name__} (model type {model.config.model_type!r})"
    if structure.towers is not None:
        raise UnsupportedModelError(
            f"{name}: the tokens of what stands beside the decoder (images, sound) have their ids among those of its "
            "text, so that its vocabulary is not cut. Leave 'vocabulary' out of `units`."
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = len(embedding.weight)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding) and module is not embedding]
    keys = {key: value for key, value in plain_values(model.config).items() if "vocab" in key and key != _key(model)}
    for key in (key for key, value in keys.items() if value in {len(table.weight) for table in tables}):
        raise UnsupportedModelError(f"{name}: `{key}` tells of another table that is read by the ids of tokens.")
    if model.config.vocab_size != size or not is_linear(head):
        raise UnsupportedModelError(
            f"{name}: the embedding has {size} rows, the configuration says {model.config.vocab_size}, and the LM "
            f"head is a {type(head).__name__}: it is not understood which rows are of tokens."
        )
    other, shapes = other_shapes(
        lambda other: trimmed_target(model, structure, other), (size + 64, size + 1, 2 * size), "vocabulary"
    )
    buffers = {key: buffer.shape for key, buffer in trimmed_target(model, structure, other).skeleton().named_buffers()}
    strange = [key for key, buffer in model.named_buffers() if buffers.get(key, buffer.shape) != buffer.shape]
    slices = []
    for key, parameter in model.named_parameters():
        before, after = parameter.shape, shapes.get(key, parameter.shape)
        if changed := changed_dims(before, after):
            owner = model.get_submodule(key.rpartition(".")[0])
            ours = owner in (embedding, head) or parameter.ndim == 1
            strange += [] if ours and changed == [0] and (before[0], after[0]) == (size, other) else [key]
            slices.append(Slice(key, 0, torch.arange(size)[:, None]))
    weights = [model.get_parameter(part.tensor) for part in slices]
    if strange or not {id(embedding.weight), id(head.weight)} <= set(map(id, weights)):
        raise UnsupportedModelError(
            f"{name}: {', '.join(f'`{key}`' for key in strange) or 'the LM head'} does not follow the size of the "
            "vocabulary as embedding and LM head do, so that tokens cannot be cut. Leave 'vocabulary' out of `units`."
        )
    active = getattr(model.config, "num_experts_per_tok", None)
    matrices = matrix_parameters(model, active, set(map(id, weights))) // size
    cost = sum(weight.numel() // size for weight in weights)
    return Group(VOCABULARY, -1, size, tuple(slices), None, "", cost=cost, matrix_cost=matrices)


def _key(model: PreTrainedModel) -> str:
    return getattr(model.config, "attribute_map", {}).get("vocab_size", "vocab_size")


def trimmed_target(
    model: PreTrainedModel, structure: ModelStructure, keep: int, new: Mapping[int, int] | None = None
) -> Target:
    """Class and configuration of the model with `keep` tokens, whose ids are `new` by the old ones.

    Without `new`, ids in the configuration are any that there are: for shapes.

    Raises:
        CheckpointError: The configuration class does not take them.
    """
    values = plain_values(model.config)
    if new is None:
        new = {number: min(number, keep - 1) for number in named_ids(values)}
    return make_target(model, {**values, _key(model): keep, **renumbered(values, new)})


@torch.no_grad()
def cut_tokens(
    model: PreTrainedModel, structure: ModelStructure, kept: torch.Tensor, group: Group | None = None
) -> PreTrainedModel:
    """The model with the tokens `kept`, ascending, shape (V',); the dense one stays as it is.

    Its logits are the dense model's of these tokens, exactly. Ids in the configuration and in the generation
    configuration are the new ones.

    Raises:
        UnsupportedModelError: See `token_group`.
    """
    group = group or token_group(model, structure)
    new = {old: number for number, old in enumerate(kept.tolist())}
    target, names = trimmed_target(model, structure, len(kept), new), {part.tensor for part in group.slices}
    cut = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    done: dict[int, torch.Tensor] = {}  # tied weights are cut once
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in done:
            old = tensor.detach()
            done[id(tensor)] = old.index_select(0, kept.to(old.device)) if id(tensor) in cut else old.clone()
        state[name] = done[id(tensor)]
    small = assemble(target, state, dict(model.named_buffers()), model)
    for key, value in renumbered(small.generation_config.to_dict(), new).items():
        setattr(small.generation_config, key, value)
    return small
