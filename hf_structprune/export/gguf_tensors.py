"""The tensors of a GGUF file: their names, the order of their rows, and the type each is stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import ExportError
from .gguf_layout import DUMMY_WIDTH, LAYER, Layout
from .gguf_metadata import rope_factors


if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


@dataclass
class StoredTensor:
    """One tensor of the file.

    Args:
        name: Its name there.
        shape: Rows first, as in PyTorch.
        kind: The type it is stored in.
        read: Gives its values, so that one is in memory at a time.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size

    def encode(self) -> np.ndarray:
        """The bytes of the file.

        Raises:
            ExportError: A value is too large for half precision.
        """
        from gguf.quants import quantize

        values = self.read().detach().to("cpu", torch.float32).contiguous()
        if self.kind.name == "F16" and values.abs().max() > torch.finfo(torch.float16).max:
            raise ExportError(f"{self.name} holds {values.abs().max():.4g}, too large for f16. Say --quant bf16.")
        return quantize(values.numpy(), self.kind)


def stored_tensors(model: PreTrainedModel, layout: Layout, kind: GGMLQuantizationType) -> list[StoredTensor]:
    """All tensors of the file.

    Matrices are stored in the type that is asked for, or in half precision where rows do not divide into its blocks;
    vectors in float32, as llama.cpp wants them.

    Raises:
        ExportError: The model has a tensor that the architecture has no name for.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == layout.architecture)
    names = get_tensor_name_map(MODEL_ARCH(arch), len(layout.widths))
    result = []
    for name, shape, read in _tensors(model, layout):
        stored = name if name == "rope_freqs.weight" else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ExportError(f"llama.cpp's {layout.architecture} has no tensor for `{name}`.")
        result.append(StoredTensor(stored, shape, _kind(shape, kind), read))
    return result


def _kind(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _tensors(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name in Transformers, shape, and what reads the values, as llama.cpp wants them."""
    factors = rope_factors(model.config)
    if factors is not None:
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    state = model.state_dict()
    head = state.get("lm_head.weight")
    tied = head is not None and head.data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    for name, tensor in state.items():
        if not (tied and name == "lm_head.weight"):
            yield name, tuple(tensor.shape), _reader(name, tensor, layout)
    for name, shape in _silent(layout, state, model.config.hidden_size):
        yield name, shape, lambda shape=shape: torch.zeros(shape)


def _reader(name: str, tensor: torch.Tensor, layout: Layout) -> Callable[[], torch.Tensor]:
    rotated = name.rpartition(".")[0].endswith(("self_attn.q_proj", "self_attn.k_proj"))
    if rotated and layout.interleaved:
        return lambda: interleave(tensor, layout.head_dim)
    return lambda: tensor


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of rotation by neighbours.

    Transformers rotates row `i` of a head with row `i + head_dim / 2`; in the result these two are neighbours.

    Args:
        rows: `(heads * head_dim, ...)`, a weight or a bias.
        head_dim: Size of a head.

    Returns:
        The same rows in another order.
    """
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _silent(layout: Layout, state: dict, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Sublayers that the model lacks and the file has: of zeros, so that they add nothing."""
    rows = layout.head_dim
    attention = {
        "self_attn.q_proj": (rows, hidden), "self_attn.k_proj": (rows, hidden), "self_attn.v_proj": (rows, hidden),
        "self_attn.o_proj": (hidden, rows), "input_layernorm": (hidden,),
    }  # fmt: skip
    mlp = {
        "mlp.gate_proj": (DUMMY_WIDTH, hidden), "mlp.up_proj": (DUMMY_WIDTH, hidden),
        "mlp.down_proj": (hidden, DUMMY_WIDTH), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for i, heads in enumerate(layout.heads):
        for sublayer, present in ((attention, heads), (mlp, True)):
            names = {f"{LAYER.format(i)}{name}.weight": shape for name, shape in sublayer.items()}
            if present and not names.keys() & state.keys():
                yield from names.items()
