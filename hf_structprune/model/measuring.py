"""How models are looked at: in one state, whatever state the caller is in, and the LM head a few positions at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..quantization.four_bit import as_stored
from .rebuild import check_whole


# Float32 logits that exist at once when the head is applied in chunks: 64 MiB.
MAX_LOGITS = 2**24
# Tokens on which the model's own logits are compared with those of the bare head.
PROBE_LENGTH = 16


@contextmanager
def measuring(model: nn.Module, *, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Puts model and torch into the state for measuring; afterwards both are as they were, also after an error.

    Every module is in evaluation mode (no dropout), nothing asks for gradients (`torch.enable_grad` inside does), and
    what the caller has switched on is off: `torch.autocast`, `torch.inference_mode`, another default dtype or device.
    With `autocast`, the model computes in this dtype as training with mixed precision does.

    Raises:
        StructPruneError: The model is half-pruned.
    """
    check_whole(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        own = {parameter.device.type for parameter in model.parameters()}
        for kind in filter(torch.amp.is_autocast_available, {"cpu", *own}):
            mixed = autocast is not None and kind in own
            stack.enter_context(torch.autocast(kind, dtype=autocast if mixed else None, enabled=mixed))
        # New tensors are float32 and on the CPU unless they are told otherwise.
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        stack.enter_context(as_stored(model))  # else bitsandbytes may repack 4-bit weights in place in this mode
        yield


def measures(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a function, whose first argument is a model, while that is `measuring`."""

    @wraps(function)
    def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with measuring(model):
            return function(model, *args, **kwargs)

    return run


def check_finite(model: nn.Module, among: Collection[str] | None = None) -> None:
    """Refuses weights that are no numbers, by the name of the first; one pass over all of them, without a copy.

    With `among` only parameters of these names are looked at; what is not in memory is passed by.
    """
    for name, parameter in model.named_parameters():
        if among is not None and name not in among:
            continue
        if parameter.device.type != "meta" and not _all_finite(parameter.detach()):
            raise UnsupportedModelError(
                f"`{name}` has values that are not finite (NaN or Inf), so that nothing can be said about what is "
                "important in this model. The checkpoint is damaged, or its training has diverged."
            )


def check_numbers(values: torch.Tensor, what: str) -> None:
    """Refuses what was computed with finite weights and is NaN or Inf itself; `what` it is begins the message."""
    if not _all_finite(values):
        kind = str(values.dtype).removeprefix("torch.")
        raise UnsupportedModelError(
            f"{what} are not finite (NaN or Inf): the model cannot be run on the calibration text in {kind}. Load it "
            "in another dtype, bfloat16 or float32."
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor Inf; least and largest of a tensor show it in one pass without a mask."""
    return not tensor.numel() or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def context_length(model: Any) -> int | None:
    """The longest sequence the model was made for, if its configuration says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def has_plain_head(model: PreTrainedModel, ids: torch.LongTensor) -> bool:
    """Whether the model's logits are those of its output embedding, bit for bit, on a few tokens.

    Some families scale or cap their logits afterwards (Gemma 2, Granite, Cohere); a wrong "no" only costs memory.
    """
    ids = ids[:, :PROBE_LENGTH]
    head, base = model.get_output_embeddings(), getattr(model, "base_model", model)
    if head is None or base is model:
        return False
    hidden = getattr(base(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != head.weight.shape[-1]:
        return False
    own = model(input_ids=ids, use_cache=False).logits.float()
    return torch.equal(own, head(hidden).float().to(own.device))


def positions_at_once(vocab_size: int) -> int:
    """Positions whose float32 logits fit in `MAX_LOGITS`."""
    return max(1, MAX_LOGITS // vocab_size)
