"""What llama.cpp's architecture `gemma3` takes for granted, and how positions are rotated."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..errors import ExportError


ARCHITECTURE = "gemma3"
_RHYTHM = 6  # every sixth layer looks at the whole text, the others at a window
_LOCAL_THETA = 10_000.0  # of the rotation in a window
_LARGEST = 62  # layers of the 27B, whose scores llama.cpp scales by another size


def check_gemma3(config: PreTrainedConfig) -> None:
    """Refuses a Gemma 3 that llama.cpp would compute otherwise: much of it is not in the file, but known by heart.

    Raises:
        ExportError: Its layers, rotary positions, activation or scores are not those of the published models.
    """
    layers = config.num_hidden_layers
    kinds = [f"{'sliding' if (number + 1) % _RHYTHM else 'full'}_attention" for number in range(layers)]
    if list(config.layer_types) != kinds:
        raise ExportError(
            f"llama.cpp lets every {_RHYTHM}th layer of a Gemma 3 look at the whole text, but here those that do are "
            f"{[number for number, kind in enumerate(config.layer_types) if kind == 'full_attention']} of {layers}: "
            f"drop no layers, or {_RHYTHM} neighbouring ones at a time."
        )
    local = config.rope_parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default" or local["rope_theta"] != _LOCAL_THETA:
        raise ExportError(
            f"llama.cpp rotates within windows of a Gemma 3 by theta {_LOCAL_THETA:.0f} alone; here: {local}."
        )
    scale = config.hidden_size / config.num_attention_heads if layers == _LARGEST else config.head_dim
    for name, value, wanted in (
        ("hidden_activation", config.hidden_activation, "gelu_pytorch_tanh"),
        ("query_pre_attn_scalar", config.query_pre_attn_scalar, scale),
        ("attn_logit_softcapping", config.attn_logit_softcapping, None),
        ("final_logit_softcapping", config.final_logit_softcapping, None),
        ("use_bidirectional_attention", config.use_bidirectional_attention or None, None),
    ):
        if value != wanted:
            raise ExportError(f"llama.cpp computes a Gemma 3 with `{name}` {wanted}; this model's is {value!r}.")


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """How positions are rotated; of a Gemma 3 in the layers that look at the whole text."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)
