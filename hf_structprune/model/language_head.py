"""Applying a large LM head to a few positions at once, where that gives the model's own logits."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


# Float32 logits that exist at once when the head is applied in chunks: 64 MiB.
MAX_LOGITS = 2**24
# Tokens on which the model's own logits are compared with those of the bare head.
PROBE_LENGTH = 16


@torch.no_grad()
def has_plain_head(model: PreTrainedModel, ids: torch.LongTensor) -> bool:
    """Whether the model's logits are those of its output embedding, bit for bit, on a few tokens.

    Some families scale or cap their logits afterwards (Gemma 2, Granite, Cohere). Trying it covers families that
    nobody has listed, and a wrong "no" only costs memory.
    """
    ids = ids[:, :PROBE_LENGTH]
    head, base = model.get_output_embeddings(), getattr(model, "base_model", model)
    if head is None or base is model:
        return False
    hidden = getattr(base(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
        return False
    own = model(input_ids=ids, use_cache=False).logits
    return torch.equal(own.float(), head(hidden).float())


def positions_at_once(vocab_size: int) -> int:
    """Positions whose float32 logits fit in `MAX_LOGITS`."""
    return max(1, MAX_LOGITS // vocab_size)
