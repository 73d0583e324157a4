"""What can be cut from each type of causal language model that Transformers knows: a table that is computed.

The default configuration of a type is built on the meta device and its structure read; every kind of unit found is
then tried on a small random twin, as planning does (see `proof`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROVEN, WORKS = "proven", "works"
# What default configurations lack to build a model, or to have a layer of each kind.
_MIXED = ["linear_attention", "full_attention"]
VALUES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[9, 18, 27]),
    "cohere_compass_text": dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "dbrx": dict(attn_config=dict(kv_n_heads=8, rope_theta=1e4)),
    "deepseek_v2": dict(num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1),
    "dots1": dict(n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1),
    "gemma4_assistant": dict(
        text_config=dict(
            model_type="gemma4_text",
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=0,
            enable_moe_block=False,
        )
    ),
    "granitemoehybrid": dict(layer_types=_MIXED * 16),
    "hunyuan_v1_dense": dict(head_dim=128, num_key_value_heads=8),
    "hunyuan_v1_moe": dict(head_dim=128, num_key_value_heads=8, num_experts=16, moe_topk=2),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 16),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 16),
    "ministral": dict(head_dim=128),
    "nemotron": dict(num_key_value_heads=8, head_dim=128),
    "reformer": dict(is_decoder=True),
}


def build(model_type: str) -> PreTrainedModel:
    """A model of a type on the meta device."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**VALUES.get(model_type, {})))


def found(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Kinds of which a model has units, and what is left alone, and why."""
    from ..errors import StructPruneError
    from ..model.structure import ModelStructure
    from ..proof.guarantee import has_units
    from ..units import KINDS

    try:
        structure = ModelStructure.of(model)
    except StructPruneError as error:
        return [], [f"{error}"]
    return [kind for kind in KINDS if has_units(structure, kind)], structure.notes
