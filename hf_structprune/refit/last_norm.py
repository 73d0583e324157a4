"""The norm in front of the head, after all cuts: it is scaled until predictions are as sure as they can afford to be.

What the cuts left of error in the last hidden states acts like noise on the logits, which makes a model surer of
itself than it should be. One factor `s` of what the norm gives makes the least of `KL(dense || pruned)` on calibration
text: the temperature `1 / s` of Guo et al. (On Calibration of Modern Neural Networks, 2017,
https://huggingface.co/papers/1706.04599, sec. 4.2), with the dense model's predictions in the place of labels.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from ..hooks import hooked
from ..model.hidden_size import NormKind, norm_kind
from ..model.measuring import positions_at_once
from ..stats.processes import Processes
from ..stats.stream import LayerStream
from ..stats.survey import kl_divergence


_TOKENS = 2048  # at about so many positions predictions are compared
_FIRST = (0.0, -0.1, -0.2)  # logarithms of factors
_LIMITS = (-0.7, 0.2)
_REFINED = 2  # how often the lowest point of a parabola through the three best is tried


@torch.no_grad()
def soften(stream: LayerStream, dense: list[torch.Tensor], processes: Processes) -> dict[str, float] | None:
    """Scales the last norm, in place; no factor that does not bring predictions nearer to the dense model's is taken.

    What is outside of the layers has to be in memory.

    Args:
        stream: Its hidden states are those that leave the last layer.
        dense: The same of the dense model.
        processes: Those that divide the text among them.

    Returns:
        The `factor`, and `KL(dense || pruned)` in nats a token `before` and `after`; `None` where there is no norm
        with weights in front of the head.
    """
    norm = last_norm(stream, dense)
    if norm is None:
        return None
    scale = _Scale(norm)
    tokens = torch.tensor(float(sum(batch.numel() for batch in stream.batches)))
    processes.add(tokens)
    every = max(1, int(tokens) // _TOKENS)
    device, at_once = norm.weight.device, positions_at_once(stream.model.get_input_embeddings().weight.shape[0])

    def nats(factors: list[float]) -> list[float]:
        """Nats a token at each factor, given by its logarithm."""
        totals = torch.zeros(len(factors) + 1, dtype=torch.float64)
        for number, batch in enumerate(stream.batches):
            places = torch.arange(batch.shape[1])[stream.positions(number, every)]
            for chosen in places.split(max(1, at_once // len(batch))):
                ids = batch[:, chosen]
                scale.to(1.0)
                wanted = stream.head(dense[number][:, chosen].to(device), ids)
                for place, factor in enumerate(factors):
                    scale.to(math.exp(factor))
                    found = stream.head(stream.hidden[number][:, chosen].to(device), ids)
                    totals[place] += kl_divergence(wanted, found)
                totals[-1] += ids.numel()
        processes.add(totals)
        return (totals[:-1] / totals[-1]).tolist()

    try:
        known = dict(zip(_FIRST, nats(list(_FIRST)), strict=True))
        for _ in range(_REFINED):
            lowest = lowest_of_parabola(sorted(known.items(), key=lambda point: point[1])[:3])
            if lowest is None:
                break
            lowest = min(max(lowest, _LIMITS[0]), _LIMITS[1])
            if lowest in known:
                break
            known[lowest] = nats([lowest])[0]
        best = min(known, key=known.__getitem__)
    except BaseException:
        scale.to(1.0)
        raise
    scale.to(math.exp(best))
    return {"factor": math.exp(best), "before": known[0.0], "after": known[best]}


def in_words(softened: dict[str, float] | None) -> list[str]:
    """What it came to, from the report in a plan; nothing where the norm is as it was."""
    if softened is None or softened["factor"] == 1:
        return []
    factor, before, after = (softened[name] for name in ("factor", "before", "after"))
    return [
        f"the norm in front of the head gives {factor:.3f} times as much, which brings predictions nearest to the "
        f"dense model's: {before:.3f} -> {after:.3f} nats a token on calibration text"
    ]


def last_norm(stream: LayerStream, states: list[torch.Tensor]) -> nn.Module | None:
    """The norm that hidden states pass last on their way from the last layer to the head, if it has weights."""
    inside = {id(module) for layer in stream.layers for module in layer.modules()}
    outside = [module for module in stream.model.modules() if id(module) not in inside]
    candidates = [module for module in outside if not list(module.children()) and hasattr(module, "weight")]
    passed: list[nn.Module] = []
    handles = [m.register_forward_hook(lambda module, *_: passed.append(module)) for m in candidates]
    with hooked(handles):
        first = stream.batches[0][:1, :1]
        device = stream.model.get_input_embeddings().weight.device
        stream.head(states[0][:1, :1].to(device), first)
    return next((module for module in reversed(passed) if norm_kind(module) is not None), None)


def lowest_of_parabola(points: list[tuple[float, float]]) -> float | None:
    """Where a parabola through three points is lowest; `None` if it opens downwards or is a line."""
    (a, fa), (b, fb), (c, fc) = points
    first, second = (fb - fa) / (b - a), (fc - fb) / (c - b)
    bend = (second - first) / (c - a)
    return (a + b) / 2 - first / (2 * bend) if bend > 0 else None


class _Scale:
    """A norm whose output is multiplied, always from where it was."""

    def __init__(self, norm: nn.Module) -> None:
        self._kind: NormKind = norm_kind(norm)
        self._tensors = [getattr(norm, name) for name in ("weight", "bias") if getattr(norm, name, None) is not None]
        self._before = [tensor.detach().clone() for tensor in self._tensors]

    def to(self, factor: float) -> None:
        offsets = [self._kind.offset, 0.0]
        for tensor, before, offset in zip(self._tensors, self._before, offsets, strict=False):
            tensor.copy_(before if factor == 1 else (before.float() + offset) * factor - offset)
