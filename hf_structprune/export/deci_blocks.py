"""What the layers of a model are like in the DeciLM format, and what has to be padded to fit into it.

The format as vLLM 0.33.0 (model_executor/models/nemotron_nas.py) and SGLang 0.5.23 (srt/models/nemotron_nas.py) read
it:

* All layers have `num_attention_heads` query heads; `n_heads_in_group` of a layer says how many share a KV head.
* The width of an MLP is `2 * ffn_mult * hidden_size / 3`, rounded up to a multiple of 256. Where `ffn_mult` is not
  there, vLLM reads the width itself from `intermediate_size`; SGLang does not.
* Attention and MLP of a layer may be `no_op`, and have no norm then. The first sublayer of all must be an attention:
  the norm in front of an MLP adds to a residual stream that is only there after one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import ExportError


WIDTH_MULTIPLE = 256  # of widths that `ffn_mult` can say


@dataclass(frozen=True)
class Block:
    """The sizes of one layer; 0 where it has no attention or no MLP.

    Attributes:
        kv_heads: KV heads.
        group: Query heads of each.
        width: Neurons of the MLP.
    """

    kv_heads: int
    group: int
    width: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group


def fit(blocks: list[Block], pad: bool) -> list[Block]:
    """The sizes that are written for the layers of a model.

    Args:
        blocks: The sizes that they have.
        pad: Allow larger ones, whose additional heads and neurons will be zeros: as many query heads in all layers,
            MLP widths that `ffn_mult` can say, and an attention before the first MLP.

    Raises:
        ExportError: A layer has sizes that the format cannot say; names it and the way out.
    """
    if not any(block.heads for block in blocks):
        raise ExportError("No layer has attention, but a DeciLM model begins with one.")
    if pad:
        blocks = [replace(block, width=-(-block.width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE) for block in blocks]
        return _with_first_attention(_with_equal_heads(blocks))
    heads = max(block.heads for block in blocks)
    for number, block in enumerate(blocks):
        if block.heads not in (0, heads):
            raise ExportError(
                f"Layer {number} has {block.heads} query heads and another one {heads}, but in the DeciLM format all "
                "layers have as many (only their KV heads may differ). Pad it with heads of zeros (`pad`), prune "
                "heads in the uniform layout, or prune 'mlp_neurons' and leave heads alone."
            )
    first = _first(blocks)
    if not blocks[first].heads:
        raise ExportError(
            f"Layer {first} has an MLP but no attention, and none before it: in the DeciLM format the first sublayer "
            "is an attention. Pad it with one of zeros (`pad`), or keep that attention (`protect_first`)."
        )
    return blocks


def _first(blocks: list[Block]) -> int:
    """Number of the first layer that does anything."""
    return next(number for number, block in enumerate(blocks) if block.heads or block.width)


def _with_equal_heads(blocks: list[Block]) -> list[Block]:
    """The least number of query heads that all layers can be padded to, whole groups in each."""
    there = [block for block in blocks if block.heads]
    most = max(block.kv_heads for block in there) * max(block.group for block in there)
    for heads in range(max(block.heads for block in there), most + 1):
        # As few KV heads as hold those of the layer: the smallest groups that hold its own have the most room.
        padded = [_padded_heads(block, heads) for block in blocks]
        if all(padded):
            return padded
    raise AssertionError("one group size and one number of KV heads always hold all layers")


def _padded_heads(block: Block, heads: int) -> Block | None:
    """A layer with so many query heads and as few KV heads as possible, `None` if none holds it."""
    if not block.heads:
        return block
    groups = [group for group in range(heads, block.group - 1, -1) if heads % group == 0]
    return next((replace(block, kv_heads=heads // g, group=g) for g in groups if heads // g >= block.kv_heads), None)


def _with_first_attention(blocks: list[Block]) -> list[Block]:
    """An attention, with one KV head, in the first layer that does anything."""
    first = _first(blocks)
    if blocks[first].heads:
        return blocks
    heads = max(block.heads for block in blocks)
    return [replace(b, kv_heads=1, group=heads) if number == first else b for number, b in enumerate(blocks)]


def block_configs(blocks: list[Block], hidden_size: int) -> list[dict[str, dict[str, Any]]]:
    """The layers as the configuration describes them.

    Args:
        blocks: Sizes that fit the format.
        hidden_size: Size of the residual stream.
    """
    return [
        {
            "attention": {
                "no_op": not block.heads, "n_heads_in_group": block.group or None, "replace_with_linear": False,
            },
            "ffn": {"no_op": not block.width, **_width(block.width, hidden_size), "replace_with_linear": False},
        }
        for block in blocks
    ]  # fmt: skip


def _width(width: int, hidden_size: int) -> dict[str, Any]:
    """The width of an MLP: as a multiple of the hidden size where the format can say it so."""
    if width % WIDTH_MULTIPLE:
        return {"intermediate_size": width}
    return {"ffn_mult": 3 * width / (2 * hidden_size) if width else None}
