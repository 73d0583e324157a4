"""How likely a model finds the tokens of windows, with the logits of a few positions in memory at a time."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..model.language_head import has_plain_head, positions_at_once
from ..model.measuring import measuring


def window_losses(
    model: PreTrainedModel,
    ids: torch.LongTensor,
    counts: list[int],
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """Summed negative log-likelihood of the last tokens of each window, in nats.

    Args:
        model: The model, on the device it is to run on; it is in eval mode meanwhile and gets its modes back.
        ids: Token ids of shape `(windows, window)`.
        counts: How many tokens of each window count, at most `window - 1`.
        batch_size: Windows that go through the model at once.
        autocast: Compute in this dtype, see `measuring`.

    Returns:
        The sums, of shape `(windows,)`, in float64.
    """
    ids, sums = ids.to(model.device), []
    with measuring(model, autocast=autocast):
        score = _plain_losses if has_plain_head(model, ids[:1]) else _own_losses
        batches = list(zip(ids.split(batch_size), torch.tensor(counts).split(batch_size), strict=True))
        for rows, last in tqdm(batches, desc="Perplexity", disable=not logging.is_progress_bar_enabled()):
            sums += [part.sum().item() for part in score(model, rows, last).split(last.tolist())]
    return np.array(sums)


def _plain_losses(model: PreTrainedModel, ids: torch.LongTensor, counts: torch.LongTensor) -> torch.Tensor:
    """Losses of the tokens that count, one window after the other, with the head applied to chunks of them."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    scored = torch.arange(ids.shape[1]) >= ids.shape[1] - counts[:, None]
    rows, columns = (index.to(hidden.device) for index in scored.nonzero(as_tuple=True))
    hidden, targets = hidden[rows, columns - 1], ids.to(hidden.device)[rows, columns]
    head = model.get_output_embeddings()
    chunk = positions_at_once(head.weight.shape[0])
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([_token_losses(head(part), target) for part, target in pairs])


def _own_losses(model: PreTrainedModel, ids: torch.LongTensor, counts: torch.LongTensor) -> torch.Tensor:
    """The same from the model's own logits, one window at a time."""
    losses = []
    for row, count in zip(ids, counts.tolist(), strict=True):
        logits = model(input_ids=row[None], use_cache=False).logits[0, -count - 1 : -1]
        chunk = positions_at_once(logits.shape[-1])
        pairs = zip(logits.split(chunk), row[-count:].split(chunk), strict=True)
        losses += [_token_losses(part, target) for part, target in pairs]
    return torch.cat(losses)


def _token_losses(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    loss = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    return loss.cpu().double()  # not every accelerator knows float64
