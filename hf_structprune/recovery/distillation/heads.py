"""Finds out how a model turns its last hidden states into logits, by trying."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ...model.language_head import PROBE_LENGTH, has_plain_head
from ...model.measuring import measuring
from .blocks import LogitTransform
from .predictions import project


logger = logging.get_logger(__name__)

# Configuration keys of a factor of the logits, and whether it multiplies them. Granite divides by the last one and
# HyperCLOVA X multiplies by it: both are tried.
_SCALES = (("logit_scale", True), ("output_multiplier", True), ("lm_head_multiplier", True),
           ("logits_scaling", False), ("logits_scaling", True))  # fmt: skip


@torch.no_grad()
def find_transform(model: PreTrainedModel) -> LogitTransform | None:
    """How a model's logits follow from its hidden states and the weight of its head.

    The candidates come from the configuration; the one that gives the model's own logits on a few tokens is right.

    Returns:
        The transform, or `None` if none of them does (a quantised head, or one that does more): then only the model
        itself can compute its logits. A warning says so, because that costs memory.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is not None and weight.is_floating_point() and weight.shape[0] == model.config.vocab_size:
        ids = torch.linspace(0, weight.shape[0] - 1, PROBE_LENGTH).long()[None].to(model.device)
        with measuring(model):
            if has_plain_head(model, ids):
                return LogitTransform()
            for transform in _candidates(model.config.get_text_config()):
                if _agrees(model, ids, transform):
                    return transform
    logger.warning(
        f"{type(model).__name__} computes its logits in a way of its own, so that those of a whole sequence are in "
        "memory at once during distillation."
    )
    return None


def _candidates(config) -> list[LogitTransform]:
    scales = [1.0]
    for key, multiplies in _SCALES:
        value = getattr(config, key, None)
        if value:
            scales.append(float(value) if multiplies else 1.0 / value)
    softcap = getattr(config, "final_logit_softcapping", None)
    return [LogitTransform(scale, cap) for scale in scales for cap in ([softcap, None] if softcap else [None])]


def _agrees(model: PreTrainedModel, ids: torch.Tensor, transform: LogitTransform) -> bool:
    base, head = model.base_model, model.get_output_embeddings()
    if base is model:
        return False
    hidden = getattr(base(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
        return False
    own = model(input_ids=ids, use_cache=False).logits[0]
    products = project(hidden[0].to(head.weight.dtype), head.weight, getattr(head, "bias", None), None)
    mine = transform.apply_(products.float())
    tolerance = 4 * torch.finfo(own.dtype).eps * mine.abs().max()  # a rounding or two of the largest logit
    return bool((own.float() - mine).abs().max() <= tolerance)
