"""What other programs read otherwise than Transformers in a plain checkpoint: facts about their released versions."""

from __future__ import annotations

from transformers import PreTrainedConfig


# Types whose class takes the hidden size over the number of heads for the size of a head, whatever `head_dim` says: as
# the source of these versions has it; which of them were seen to fail when they were run, docs/export.md says.
_DERIVES_HEAD_SIZE = {
    "vLLM 0.32": (
        "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "jamba", "lfm2", "lfm2_moe",
        "olmo_hybrid", "olmoe", "qwen2", "qwen2_moe",
    ),
    "SGLang 0.5.23": (
        "cohere", "cohere2", "granitemoe", "granitemoehybrid", "lfm2_moe", "mixtral", "olmo2", "olmo3", "olmoe",
        "qwen2_moe", "starcoder2",
    ),
    "mlx-lm 0.32": (
        "apertus", "cohere", "granite", "granitemoe", "granitemoehybrid", "helium", "internlm3", "jamba", "lfm2",
        "lfm2_moe", "minicpm", "mixtral", "olmo", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "starcoder2",
    ),
}  # fmt: skip
# Types whose class computes the decay of a layer from its number and that of all layers, where Transformers reads it.
_DERIVES_DECAY = {"vLLM up to 0.23 (later ones do not serve it)": ("minimax",)}
_ANOTHER_WAY = {"qwen2": "`export --format deci` writes it for vLLM, `--format gguf` for llama.cpp"}


def misread(dense: PreTrainedConfig, pruned: PreTrainedConfig) -> list[str]:
    """One line for each value of a pruned model's configuration that a runtime is known to ignore for its type.

    Checkpoints with a `per_layer_config` have none: no other program takes them as they are.
    """
    if pruned.is_heterogeneous:
        return []
    model_type, lines = pruned.model_type, []
    size, hidden = getattr(pruned, "head_dim", None), getattr(pruned, "hidden_size", 0)
    heads = getattr(pruned, "num_attention_heads", 0)
    runtimes = _knows(model_type, _DERIVES_HEAD_SIZE)
    if runtimes and isinstance(size, int) and isinstance(heads, int) and size * heads != hidden:
        line = (
            f"this {model_type} will not load in {runtimes}, where the size of a head is the hidden size over the "
            f"number of heads ({hidden} / {heads}), not `head_dim` ({size})"
        )
        lines.append("; ".join(filter(None, (line, _ANOTHER_WAY.get(model_type)))))
    runtimes = _knows(model_type, _DERIVES_DECAY)
    if runtimes and pruned.num_hidden_layers != dense.num_hidden_layers:
        lines.append(
            f"{runtimes} computes the decays of a {model_type} from the numbers of its layers, and would give those "
            "that stay others than the checkpoint holds"
        )
    return lines


def _knows(model_type: str, facts: dict[str, tuple[str, ...]]) -> str:
    return ", ".join(runtime for runtime, types in facts.items() if model_type in types)
