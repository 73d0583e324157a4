"""`genai_config.json`: what ONNX Runtime GenAI has to know to generate with an exported model."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedConfig


GENAI_CONFIG_NAME = "genai_config.json"


def genai_config(
    config: PreTrainedConfig, generation: GenerationConfig, shapes: dict[int, tuple[int, int]], filename: str
) -> dict[str, Any] | str:
    """The configuration of ONNX Runtime GenAI, or why there is none.

    Args:
        config: The model's configuration.
        generation: How it generates.
        shapes: KV heads and head size of each layer that has attention.
        filename: The graph.

    Returns:
        The content of `genai_config.json`, or a sentence.
    """
    end = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    context = getattr(config, "max_position_embeddings", None)
    if end is None or context is None:
        missing = "token that ends a text" if end is None else "longest context"
        return f"ONNX Runtime GenAI has to know the {missing}, which the configuration does not say."
    heads, size = next(iter(shapes.values()))  # layers that differ, or have no cache, it finds in the graph
    ends = end if isinstance(end, list) else [end]
    return {
        "model": {
            "type": "decoder",  # any decoder; the names below say the rest
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else ends[0],
            "eos_token_id": end,
            "pad_token_id": config.pad_token_id if config.pad_token_id is not None else ends[0],
            "vocab_size": config.vocab_size,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": filename,
                "hidden_size": config.hidden_size,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": heads,
                "head_size": size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The graph gives back a longer past and does not write into the one it was given.
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
    }
