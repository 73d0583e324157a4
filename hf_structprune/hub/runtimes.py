"""The lines that run a checkpoint elsewhere, for what was run: facts about tests of this package, by type and kind."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from .contents import Contents


_NEURONS = {"mlp_neurons", "layers"}
_WIDTHS = {*_NEURONS, "kv_groups"}
_LLAMA = {*_WIDTHS, "query_heads", "hidden", "head_dim"}
_EXPERTS = {"experts", "expert_neurons"}
# Model types, each with the kinds of units without which it was compared with Transformers: `make test-vllm`, ...
VLLM: dict[str, set[str]] = {
    "llama": {*_LLAMA, "vocabulary"}, "minicpm3": {"q_ranks", "kv_ranks"},
    **dict.fromkeys(("mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "smollm3"), _WIDTHS),
    **dict.fromkeys(("qwen2", "starcoder2", "stablelm", "gpt_neox", "opt", "gpt2"), _NEURONS),
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "glm4_moe", "gpt_oss", "mixtral", "olmoe", "granitemoe"), _EXPERTS
    ),
    **dict.fromkeys(("falcon_h1", "nemotron_h", "mamba2", "zamba2", "granitemoehybrid"), {"mamba_heads"}),
}  # fmt: skip
# ... `make test-mlx`, ...
MLX: dict[str, set[str]] = {
    "llama": _LLAMA, "qwen3": {*_WIDTHS, "hidden"},
    **dict.fromkeys(("olmo2", "smollm3"), _WIDTHS),
    **dict.fromkeys(("qwen2", "granite", "stablelm"), _NEURONS),
    **dict.fromkeys(("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe"), _EXPERTS),
}  # fmt: skip
# ... tests/export/test_gguf_llama_cpp.py, test_onnx.py and test_vllm.py, and docs/export.md.
_HEADS = {*_WIDTHS, "query_heads"}
LLAMA_CPP: dict[str, set[str]] = {
    "llama": _LLAMA, "qwen2": _LLAMA, "qwen3": {*_HEADS, "hidden"}, "granite": {*_HEADS, "head_dim"},
    "mistral": _HEADS, "smollm3": _HEADS,
}  # fmt: skip
OPENVINO: dict[str, set[str]] = {"llama": _LLAMA - {"kv_groups"}}
_UNEVEN = {*_HEADS, "attention", "mlp"}
LLAMA_CPP_UNEVEN = dict.fromkeys(("llama", "mistral", "qwen2"), _UNEVEN)
DECI = dict.fromkeys(("llama", "qwen2"), {"mlp_neurons", "kv_groups", "attention", "mlp"})
ONNX: dict[str, set[str]] = {"llama": _UNEVEN, "gemma2": {"layers"}}


def other_runtimes(contents: Contents, name: str) -> list[str]:
    """Commands for a shell, each with the runtime as a comment; none where nothing like it was run, or if quantised.

    Args:
        contents: The checkpoint.
        name: Its folder or Hub id.
    """
    if contents.state == "quantised":
        return []
    uneven, kinds = "per_layer_config" in contents.model_config, set(contents.plan.removed)
    model_type, model = contents.model_config.get("model_type", ""), shlex.quote(name)
    export = f"hf-structprune export {model} --format"
    deci = f"{export} deci --output deci && vllm serve deci --trust-remote-code"
    known = [
        (DECI if uneven else VLLM, "vLLM", deci if uneven else f"vllm serve {model}"),
        (LLAMA_CPP_UNEVEN if uneven else LLAMA_CPP, "llama.cpp", f"{export} gguf --output model.gguf"),
        (ONNX, "ONNX Runtime", f"{export} onnx --output onnx"),
    ]
    if not uneven:
        openvino = f"optimum-cli export openvino --model {model} --task text-generation-with-past openvino"
        known += [
            (OPENVINO, "OpenVINO, in an environment of its own with optimum-intel[openvino]", openvino),
            (MLX, "MLX", f'mlx_lm.generate --model {model} --prompt "Hello"'),
        ]
    refused = " ".join(line.partition(", where")[0] for line in contents.plan.warnings if "will not load in" in line)
    return [
        f"{line}  # {runtime}"
        for facts, runtime, line in known
        if _was_run(facts, model_type, kinds) and f" {runtime}" not in refused
    ]


def _was_run(facts: dict[str, set[str]], model_type: str, kinds: Collection[str]) -> bool:
    return model_type in facts and set(kinds) <= facts[model_type]
