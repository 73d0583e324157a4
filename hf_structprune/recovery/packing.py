"""Several examples in a sequence: how they lie in a batch, and whether the model keeps them apart.

TRL puts the packed sequences of a batch into one long row. Attention that skips what its mask hides, as on
accelerators, loses nothing by that; on a CPU it takes the square of the whole length. Rows side by side,
`(batch, length)`, let Transformers see from the positions, which begin anew in every example, what a token may look
at, and every weight goes through the products once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import hardware
from ..model.measuring import measuring
from .data import IGNORED


logger = logging.get_logger(__name__)

_LENGTHS = ([5, 4], [6])  # of examples in the sequences that are tried; the shorter one is filled up
_LEAK = 0.1  # of what the first example does to the second one where both are one
_ROUNDING = 1e-5


@dataclass
class PackedRows(DataCollatorForLanguageModeling):
    """TRL's collator of rows with `seq_lengths`, which gives `input_ids`, `labels` and `position_ids` alone.

    A mask would hide the padding, and the examples from each other it would not: Transformers looks at the positions
    only where there is none. Those of padding are 0, an example of its own at each place, of which nothing is learned.
    No first token is learned either, which nothing comes before.
    """

    return_position_ids: bool = True

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().torch_call(examples)
        del batch["attention_mask"]
        batch["labels"][batch["position_ids"] == 0] = IGNORED
        return batch


def collator_of(model: PreTrainedModel, pad_token_id: int) -> DataCollatorForLanguageModeling | None:
    """How packed sequences become a batch: the first way in which a token sees its own example alone, as is tried.

    On a CPU that is rows side by side, before one behind the other; on an accelerator the latter alone. `None` if the
    model mixes examples in either, as one does that counts positions by a mask of its own (OPT) or whose states are
    not told where an example begins: then they must not be packed.
    """
    in_a_row = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=True)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):  # ZeRO-3: not there but in training
        return in_a_row
    rows = [] if hardware.has_accelerator() else [PackedRows(pad_token_id=pad_token_id)]
    ways, state = [*rows, in_a_row], hardware.process_state()
    found = None
    if state.is_main_process:  # with FSDP the others may have no weights yet
        found = next((number for number, way in enumerate(ways) if keeps_apart(model, way)), None)
    if state.num_processes > 1:
        [found] = broadcast_object_list([found])
    if found is not None:
        return ways[found]
    logger.warning(
        f"Examples are not packed into sequences: in {type(model).__name__} a token would see the examples before its "
        "own."
    )
    return None


def keeps_apart(model: PreTrainedModel, collator: DataCollatorForLanguageModeling) -> bool:
    """Whether every example of a batch has the logits that it has alone.

    Differences are held against what the first example changes where both are read as one text, so that neither the
    precision nor the scale of the logits matters.
    """
    count = sum(map(sum, _LENGTHS))
    size = model.get_input_embeddings().num_embeddings
    ids = torch.linspace(0.1 * size, size - 1, count).long().clamp(max=size - 1).tolist()
    rows, taken = [], 0
    for lengths in _LENGTHS:
        own = ids[taken : taken + sum(lengths)]
        rows.append({"input_ids": own, "labels": own, "seq_lengths": lengths})
        taken += len(own)

    def logits(**inputs: Any) -> Tensor:
        there = {n: value.to(model.device) if isinstance(value, Tensor) else value for n, value in inputs.items()}
        found = model(**there, use_cache=False).logits.double()
        return found - found.mean(-1, keepdim=True)

    with measuring(model):
        batch = collator(rows)
        del batch["labels"]
        together = logits(**batch)
        first, second = rows[0]["seq_lengths"]
        joined = logits(input_ids=torch.tensor([rows[0]["input_ids"]]))[0, first:]
        alone, start = [], 0
        for length in (n for lengths in _LENGTHS for n in lengths):
            alone.append(logits(input_ids=torch.tensor([ids[start : start + length]]))[0])
            start += length
    flat = together[0] if len(together) == 1 else torch.cat([together[0], together[1, : sum(_LENGTHS[1])]])
    error = torch.stack([(a - b).norm() for a, b in zip(alone, flat.split([len(a) for a in alone]), strict=True)])
    size = torch.stack([one.norm() for one in alone])
    leak = (joined - alone[1]).norm() * size / size[1]
    return bool((error <= _LEAK * leak + _ROUNDING * size).all())
