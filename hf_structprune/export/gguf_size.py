"""How large a GGUF file of a model will be, by its shapes alone: llama.cpp's choice of a type for each tensor.

The rules are those of `llama_tensor_get_type` (llama.cpp, src/llama-quant.cpp) for models without experts and without
an importance matrix.
"""

from __future__ import annotations

import math
import re

from transformers import PreTrainedModel

from ..errors import ConfigurationError, ExportError
from .common import class_name, llama_layers
from .gguf import ARCHITECTURES, QUANTISED, WRITTEN


# Values of a block, and its bytes (ggml-common.h).
_BLOCKS = {
    "f32": (1, 4), "f16": (1, 2), "bf16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18), "q4_1": (32, 20),
    "q5_0": (32, 22), "q5_1": (32, 24), "iq4_nl": (32, 18), "iq4_xs": (256, 136), "q2_k": (256, 84),
    "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
}  # fmt: skip
# What a tensor gets whose rows do not divide into blocks of 256 values.
_INSTEAD = {"q2_k": "q4_0", "q3_k": "q4_0", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_PER_TOKEN = 36  # bytes of a token's text, score, type and merge: 36.3 in SmolLM2's file
_PROJECTION = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight")


def gguf_bytes(model: PreTrainedModel, quant: str) -> int:
    """Bytes of the GGUF file of a model; the meta device will do.

    Tensors are counted to the byte, the vocabulary as 36 bytes a token.

    Args:
        model: Of an architecture that `export_gguf` writes.
        quant: `f16`, `q8_0`, `q4_k_m` ...: what `export_gguf` takes.

    Raises:
        ConfigurationError: There is no such type.
        ExportError: The model cannot be written as GGUF here.
    """
    if quant not in WRITTEN + QUANTISED:
        raise ConfigurationError(f"The GGUF type is {quant!r}; there are {', '.join(WRITTEN + QUANTISED)}.")
    if class_name(model.config) not in ARCHITECTURES:
        raise ExportError(
            f"What a GGUF file takes is known for {', '.join(ARCHITECTURES)}, and this is a "
            f"{class_name(model.config)}: give the size without a GGUF type."
        )
    state, blocks, _ = llama_layers(model)
    tied, number = "lm_head.weight" not in state, len(blocks)
    shared = max((block.group for block in blocks), default=1)
    total = _PER_TOKEN * state["model.embed_tokens.weight"].shape[0]
    for name, tensor in state.items():
        kind = quant
        if tensor.ndim == 1:
            kind = "f32"
        elif quant not in WRITTEN:
            kind = _type_of(name, quant, number, shared, tied, tensor.shape[-1])
        elif tensor.shape[-1] % _BLOCKS[quant][0]:
            kind = "f16"
        values, size = _BLOCKS[kind]
        total += 32 * math.ceil(tensor.numel() // values * size / 32)
    return total


def _type_of(name: str, quant: str, layers: int, shared: int, tied: bool, row: int) -> str:
    """The type of one matrix whose rows hold `row` values; `shared` query heads read each KV head."""
    base = quant.removesuffix("_m").removesuffix("_s").removesuffix("_l") if "_k" in quant else quant
    if name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight"):
        return "q8_0" if row % _BLOCKS[base][0] or row % 256 else "q6_k"
    kind, found = base, _PROJECTION.fullmatch(name)
    if found is not None:
        kind = _of_projection(found[2], int(found[1]), quant, layers, shared) or base
    return _INSTEAD[kind] if row % _BLOCKS[kind][0] else kind


def _of_projection(part: str, layer: int, quant: str, layers: int, shared: int) -> str | None:
    """The type of the matrices of a layer that get another one than most; `None` for those that do not."""
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if part == "v":
        return {
            "q2_k": "q4_k" if shared >= 4 else "q3_k", "q3_k_m": "q5_k" if layer < 2 else "q4_k", "q3_k_l": "q5_k",
            "iq4_nl": "q5_k" if shared >= 4 else None, "iq4_xs": "q5_k" if shared >= 4 else None,
            "q4_k_m": "q6_k" if more else None, "q5_k_m": "q6_k" if more else None,
            "q4_k_s": "q5_k" if layer < 4 else None,
        }.get(quant)  # fmt: skip
    if part == "down":
        first = "q5_k" if layer < layers // 8 else None
        return {
            "q2_k": "q3_k", "q3_k_m": "q5_k" if layer < layers // 16 else "q4_k", "q3_k_l": "q5_k", "iq4_nl": first,
            "iq4_xs": first, "q4_k_s": first, "q4_k_m": "q6_k" if more else None, "q5_k_m": "q6_k" if more else None,
        }.get(quant)  # fmt: skip
    return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(quant) if part == "o" else None
