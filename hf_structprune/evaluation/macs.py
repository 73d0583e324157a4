"""Multiply-accumulates of a forward pass: by the convention of published tables, and with attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..model.measuring import measuring
from ..model.structure import ModelStructure
from ..plan import PruningPlan


def count_macs(model: PreTrainedModel, batch_size: int = 1, length: int = 64) -> int:
    """`batch_size * length * (weights of all linear maps, LM head included + MLP neurons)`, from true shapes.

    The convention of LLM-Pruner's tables, and of `PruningPlan.macs`: one multiply-accumulate for each weight that a
    token passes and one for each activated MLP neuron; products between activations (attention) are not counted. Of
    experts, those count that a token is sent to. Works on the meta device.

    Raises:
        UnsupportedModelError: The structure of the model is not understood.
    """
    structure = ModelStructure.of(model)
    plan = PruningPlan.from_counts(structure, {}, model_type=model.config.model_type, layout="per_layer")
    return plan.macs(batch_size, length)


@torch.no_grad()
def count_macs_with_attention(model: PreTrainedModel, ids: torch.LongTensor) -> int:
    """Multiply-accumulates of all matrix products of a forward pass: half the operations torch's own counter counts.

    For a layer of `h` heads of size `d`, attention adds `2 * batch_size * h * d * length ** 2`: scores and weighted
    values over the full square, whatever the mask leaves out. Norms, activations and other element-wise operations
    are not counted.

    Args:
        model: The model; it runs once.
        ids: Token ids, shape `(batch_size, length)`.
    """
    # Fused attention of the CPU is unknown to the counter; the plain kind consists of products that it knows.
    plain = sdpa_kernel(SDPBackend.MATH)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_grouped_products(), _grouped_flops))
    with measuring(model), _torch_attention(model), plain, counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return counter.get_total_flops() // 2


def _grouped_products() -> list[Any]:
    """Operations that multiply rows by the matrix of their expert, which the counter does not know."""
    names = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))
    found = [getattr(getattr(torch.ops, namespace), name, None) for namespace, name in names]
    return [operation for operation in found if operation is not None]


def _grouped_flops(rows: torch.Size, weights: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Each of the rows, shape `(n, k)`, times one of the matrices, shape `(groups, k, m)`."""
    return 2 * rows[0] * rows[1] * weights[-1]


@contextmanager
def _torch_attention(model: PreTrainedModel) -> Iterator[None]:
    """With attention of torch itself, where the model uses kernels from elsewhere."""
    own = model.config._attn_implementation
    if own in ("eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
