"""How long a token takes at several sizes of one model on this machine: measured, and interpolated in between."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import RatioError
from ..evaluation.efficiency import time_generation
from ..hardware import cuda_devices
from ..model.target import Target
from ..planner import Planner
from ..progress import tqdm


LEVELS = (0.1, 0.2, 0.3, 0.45, 0.6)  # ratios that are timed
PROMPT, NEW = 16, 17  # tokens; those after the first are timed
TURNS = 5  # after one that does not count


@dataclass(frozen=True)
class LatencyTable:
    """Time of a decoding step at several ratios, over that of the dense model.

    A table of latencies as in ZipLM (https://huggingface.co/papers/2302.04089), of whole models instead of layers: so
    that what is around the layers counts, and any kind of unit.

    Attributes:
        batch: Sequences at once.
        seconds: Of a step of the dense model, the median.
        points: Pairs of the share of the parameters that goes, and the time over the dense one's; ascending.
    """

    batch: int
    seconds: float
    points: tuple[tuple[float, float], ...]

    def at(self, ratio: float) -> float:
        """The time at a ratio over the dense one's, on the line between the neighbouring points."""
        ratios, times = zip(*self.points, strict=True)
        return float(np.interp(ratio, ratios, times))


def measure_latency(model: PreTrainedModel, planner: Planner, batch: int = 1) -> LatencyTable:
    """Times the model and what planning makes of it at `LEVELS`, in turns; all have random weights.

    Models are built one at a time beside the dense one, on its device (the CPU for one without weights) and in its
    dtype. What comes out of a plan depends on shapes alone, and so does its time.

    Raises:
        RatioError: Not even the least level can be reached.
    """
    dense, points, seconds = with_random_weights(target_of_model(model), model), [(0.0, 1.0)], []
    for level in tqdm(LEVELS, desc=f"Timing sizes, batch {batch}"):
        try:
            plan = planner.plan(level)
        except RatioError:
            if len(points) == 1:
                raise
            break
        if plan.ratio <= points[-1][0]:
            continue
        relative, own = in_turns(dense, with_random_weights(planner.after, model), batch)
        points.append((plan.ratio, relative))
        seconds.append(own)
    return LatencyTable(batch, median(seconds), tuple(points))


def in_turns(dense: PreTrainedModel, other: PreTrainedModel, batch: int) -> tuple[float, float]:
    """The median time of a decoding step of a model over that of the dense one beside it, and that one's seconds."""
    vocabulary = min(one.get_input_embeddings().weight.shape[0] for one in (dense, other))
    ids = torch.randint(vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(0)).to(dense.device)
    times = [[time_generation(one, ids, NEW)[1] / (NEW - 1) for one in (dense, other)] for _ in range(TURNS + 1)]
    return median(second / first for first, second in times[1:]), median(first for first, _ in times[1:])


def target_of_model(model: PreTrainedModel) -> Target:
    """What a model is, to build it again when it has been pruned."""
    return Target(type(model), copy.deepcopy(model.config))


def with_random_weights(target: Target, like: PreTrainedModel) -> PreTrainedModel:
    """A model with random weights, on the device and in the dtype of another one; the CPU for one without weights."""
    device = torch.device("cpu") if like.device.type == "meta" else like.device
    with torch.random.fork_rng(cuda_devices({device})), device:
        torch.manual_seed(0)
        return target.model_class._from_config(copy.deepcopy(target.config), dtype=like.dtype).eval()
