"""Rotary positions: which dimensions of a head are pairs, their frequencies, and a configuration with some of them.

A head of which some pairs are gone has frequencies that no base gives. Rope type `longrope` holds a factor for each:
with equal factors for short and long texts, `factor` 1 and `attention_factor` 1 it is a plain list of frequencies
(checked in Transformers, vLLM's `get_rope` and llama.cpp, which all divide the default frequency by the factor).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import CheckpointError, UnsupportedModelError


# Types whose frequencies do not depend on the text, but for the two lists of longrope.
_FIXED = ("default", "linear", "llama3", "yarn", "longrope")
_PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True)
class Frequencies:
    """The frequencies of one kind of layer.

    Attributes:
        key: Name of the kind in `rope_parameters`; `None` where there is one list for all layers.
        short, long: Radians a token of each pair, shape (pairs,), float32; `long` is for texts beyond `limit`.
        scaling: What cosines and sines are multiplied by.
        limit: Length up to which `short` is for; `None` where both are the same.
    """

    key: str | None
    short: torch.Tensor
    long: torch.Tensor
    scaling: float
    limit: int | None


@dataclass(frozen=True)
class Rotation:
    """How the heads of a model are rotated.

    Attributes:
        module: Full name of the module that gives cosines and sines.
        lists: Its frequencies.
        size: Dimensions that are rotated, the first ones of each head.
        interleaved: Whether a pair is `(2 i, 2 i + 1)` and not `(i, i + size / 2)`.
    """

    module: str
    lists: tuple[Frequencies, ...]
    size: int
    interleaved: bool

    def units(self, head_dim: int) -> list[torch.Tensor]:
        """Dimensions that go together: the pairs in the order of their frequencies, then every other one alone."""
        half = torch.arange(self.size // 2)
        pairs = torch.stack([2 * half, 2 * half + 1] if self.interleaved else [half, half + len(half)], 1)
        return [*pairs, *torch.arange(self.size, head_dim)[:, None]]


def rotation_of(model: PreTrainedModel) -> Rotation:
    """How the heads of a model are rotated, as its class computes it from its configuration; on the meta device too.

    Raises:
        UnsupportedModelError: They are not, or in a way that no list of factors describes.
    """
    names = [
        name
        for name, module in model.named_modules()
        if any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False))
    ]
    if len(names) != 1:
        raise UnsupportedModelError(f"{len(names)} modules of {type(model).__name__} rotate positions, and not one.")
    parameters = getattr(model.config, "rope_parameters", None) or {}
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    lists = []
    for key, own in (nested or {None: parameters}).items():
        kind = own.get("rope_type", "default")
        if kind not in _FIXED or "mrope_section" in own:
            raise UnsupportedModelError(
                f"The rope type of this model is {'mrope' if kind in _FIXED else kind!r}, whose frequencies are no "
                f"fixed list; those of {', '.join(_FIXED)} are."
            )
        lists.append(key)
    module = on_cpu(model.get_submodule(names[0]), model.config)
    found = tuple(_frequencies(module, model.config, key) for key in lists if _buffer(module, key) is not None)
    if not found or len({len(one.short) for one in found}) > 1 or any((one.short <= 0).any() for one in found):
        raise UnsupportedModelError(f"`{names[0]}` has frequencies that are not understood.")
    return Rotation(names[0], found, 2 * len(found[0].short), _interleaved(module, found[0].key))


def on_cpu(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """The module that rotates positions, made anew from a configuration."""
    with torch.device("cpu"):
        return type(module)(config=copy.deepcopy(config))


def _buffer(module: nn.Module, key: str | None) -> torch.Tensor | None:
    return getattr(module, f"{key}_inv_freq" if key else "inv_freq", None)


def _frequencies(module: nn.Module, config: PreTrainedConfig, key: str | None) -> Frequencies:
    parameters = config.rope_parameters[key] if key else config.rope_parameters
    short, limit = _buffer(module, key).float(), None
    scaling = getattr(module, f"{key}_attention_scaling" if key else "attention_scaling", 1.0)
    long = short
    if parameters.get("rope_type") == "longrope":
        start = parameters["original_max_position_embeddings"]
        kwargs = {"layer_type": key} if key else {}
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        long, _ = compute(copy.deepcopy(config), torch.device("cpu"), seq_len=start + 1, **kwargs)
        limit = None if torch.equal(short, long) else start
    return Frequencies(key, short, long, float(scaling), limit)


def _interleaved(module: nn.Module, key: str | None) -> bool:
    """Whether neighbours have the same cosine; what its class does with it is a matter of proof."""
    kwargs = {"layer_type": key} if key else {}
    try:
        cosine = module(torch.zeros(1, 1, 1), torch.arange(3)[None], **kwargs)[0]
    except (IndexError, TypeError, ValueError):  # of another form
        return False
    pairs = cosine[0, :, : cosine.shape[-1] // 2 * 2].unflatten(-1, (-1, 2))
    return bool(torch.equal(pairs[..., 0], pairs[..., 1]))


def with_pairs(model: PreTrainedModel, rotation: Rotation, head_dim: int, pairs: torch.Tensor | None) -> Any:
    """`rope_parameters` of heads of another size that keep some of the pairs.

    Args:
        head_dim: Size of a head.
        pairs: Numbers of the pairs that stay, ascending; `None` for the first ones, where only shapes matter.

    Raises:
        CheckpointError: So many dimensions cannot be rotated.
    """
    parameters = copy.deepcopy(model.config.rope_parameters)
    for one in rotation.lists:
        own = parameters[one.key] if one.key else parameters
        size = rotated(own, head_dim)
        kept = torch.arange(size // 2) if pairs is None else pairs
        new = {key: own[key] for key in ("rope_theta", _PARTIAL) if own.get(key) is not None}
        short, long = (factors(part[kept], own["rope_theta"], size) for part in (one.short, one.long))
        new |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        new |= {"factor": 1.0, "attention_factor": 1.0}
        new["original_max_position_embeddings"] = one.limit or model.config.max_position_embeddings
        if one.key:
            parameters[one.key] = new
        else:
            parameters = new
    return parameters


def rotated(parameters: dict[str, Any], head_dim: int) -> int:
    """How many dimensions of a head are rotated."""
    size = int(head_dim * (parameters.get(_PARTIAL) or 1.0))
    if size % 2 or not size:
        raise CheckpointError(
            f"Of heads of {head_dim} dimensions {size} would be rotated, which is no number of pairs: choose another "
            "size."
        )
    return size


def factors(frequencies: torch.Tensor, base: float, size: int) -> list[float]:
    """What longrope divides its default frequencies `base^(-2 i / size)` by to get these, shape (size / 2,).

    `f_i = base^(-2 i / size) / w_i`, moved by a few units in the last place where float32 arithmetic, as in
    Transformers, then comes nearer to `w_i`.
    """
    powers = base ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    factor = (1 / (frequencies.double() * powers.double())).float()
    tried = [factor]
    for direction in (torch.inf, -torch.inf):
        near = factor
        for _ in range(3):
            near = torch.nextafter(near, torch.full_like(near, direction))
            tried.append(near)
    candidates = torch.stack(tried)
    error = (1.0 / (candidates * powers) - frequencies).abs()
    return candidates.gather(0, error.argmin(0, keepdim=True))[0].tolist()
