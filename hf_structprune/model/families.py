"""Where a decoder layer keeps its coupled matrices, for families that a tensor-parallel plan does not describe fully.

Names are relative to the decoder layer. Most models need no entry: their `base_model_tp_plan` is read instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Projections:
    """The projections of an attention module or of a feed-forward network.

    Attributes:
        inputs: `(q, k, v)`, `(gate, up)`, or one fused projection.
        output: The projection that consumes the units.
        fused: How a fused `qkv` is laid out: `"concat"` is `[q | k | v]`, `"grouped"` is, for each KV head,
            `[its query heads | k | v]`. A fused `gate_up` is known by being twice as wide as the consumer.
        attributes: Attributes of the attention module that hold head counts, for families whose configuration
            cannot express a head count of its own, or not one for each layer; empty if the module holds none, `None`
            if not known. Values name properties of `structure.AttentionShape`; `config.` names an attribute of the
            module's configuration.
        holder: The module that holds these attributes, where it is not the one that holds `output`.
    """

    inputs: tuple[str, ...]
    output: str
    fused: str | None = None
    attributes: dict[str, str] | None = None
    holder: str = ""

    @property
    def parent(self) -> str:
        return self.holder or self.output.rpartition(".")[0]


@dataclass(frozen=True)
class Family:
    """How to find the coupled groups of a model type.

    Attributes:
        attention: The attention projections, or `None` where they cannot be cut.
        mlps: Feed-forward networks a layer may have; a layer is searched for each.
        layers: Path of the list of decoder layers below the base model.
        width_key: Configuration key of the MLP width.
        kv_heads_key: Configuration key of the number of KV heads, `None` where there is none.
        heads_key, layers_key: Those of the numbers of heads and of layers.
        experts: Name of the module that holds experts, in the layers that have some.
        notes: What is left alone, and why.
    """

    attention: Projections | None
    mlps: tuple[Projections, ...]
    layers: str = "layers"
    width_key: str = "intermediate_size"
    kv_heads_key: str | None = "num_key_value_heads"
    experts: str | None = None
    notes: tuple[str, ...] = ()
    heads_key: str = "num_attention_heads"
    layers_key: str = "num_hidden_layers"

    def key(self, name: str, config: PreTrainedConfig) -> str:
        """What this configuration calls the key `heads_key` or `layers_key`."""
        return getattr(config, "attribute_map", {}).get(getattr(self, name), getattr(self, name))

    def completed(self, other: Family | None) -> Family:
        """This description with the attention or the MLPs of another one where it has none."""
        if other is None:
            return self
        return replace(self, attention=self.attention or other.attention, mlps=self.mlps or other.mlps)


@dataclass(frozen=True)
class NormNames:
    """The norms of a decoder layer: which belong to the attention alone, to the MLP alone, to both.

    Norms before a sublayer and norms of its output are not told apart; both are gone when it is skipped.
    """

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    shared: tuple[str, ...] = ()

    @property
    def all(self) -> frozenset[str]:
        return frozenset((*self.attention, *self.mlp, *self.shared))


# A layer is read by the row with exactly the norms it has: `post_attention_layernorm` is a norm of the MLP's input in
# Llama, of the attention's output in Gemma 2 and OLMo 2.
NORMS = (
    NormNames(("input_layernorm",), ("post_attention_layernorm",)),
    NormNames(("input_layernorm", "post_attention_layernorm"),
              ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    NormNames(("post_attention_layernorm",), ("post_feedforward_layernorm",)),
    NormNames(("input_layernorm", "post_self_attn_layernorm"), ("post_attention_layernorm", "post_mlp_layernorm")),
    NormNames(("self_attn_layer_norm",), ("final_layer_norm",)),
    NormNames(("ln_attn",), ("ln_mlp",)),
    NormNames(("ln_1",), ("ln_2",)),
    NormNames(("input_layernorm",), ("pre_feedforward_layernorm",)),
    NormNames(("attention_layernorm",), ("feedforward_layernorm",)),
    NormNames(("input_layernorm", "post_norm1"), ("post_attention_layernorm", "post_norm2")),
    NormNames(("input_layernorm", "post_attention_layernorm"), ("pre_mlp_layernorm", "post_mlp_layernorm")),
    NormNames(("input_layernorm",), ("pre_ff_layernorm",)),
    NormNames(("operator_norm",), ("ffn_norm",)),
    NormNames(("operator_norm", "post_operator_norm"), ("ffn_norm", "post_ffn_norm")),
    NormNames(("temporal_pre_norm",), ("channel_pre_norm",)),
    NormNames(("norm_1",), ("norm_2",)),
    NormNames(("attn_norm",), ("mlp_norm",)),
    NormNames((), (), ("input_layernorm",)),
    NormNames((), (), ("ln_1",)),
)  # fmt: skip

# Model types for which the test-suite proves that cutting units is the same as zeroing them; `proof` tries all others.
PROVEN = frozenset(
    {
        "cohere2", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral",
        "olmo2", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_HEADS = {"num_heads": "heads"}
_REP = {"num_key_value_groups": "rep"}

FAMILIES: dict[str, Family] = {
    "phi3": Family(
        Projections(("self_attn.qkv_proj",), "self_attn.o_proj", "concat",
                    {**_REP, "num_key_value_heads": "kv_heads", "config.num_attention_heads": "heads"}),
        (Projections(("mlp.gate_up_proj",), "mlp.down_proj"),),
    ),
    "stablelm": Family(
        Projections(_QKV, "self_attn.o_proj", attributes={
            **_HEADS, **_REP, "num_key_value_heads": "kv_heads", "hidden_size": "query_width",
        }),
        (Projections(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),),
    ),
    "gpt_neox": Family(
        Projections(("attention.query_key_value",), "attention.dense", "grouped", {}),
        (Projections(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),),
        kv_heads_key=None,
    ),
    "falcon": Family(
        Projections(("self_attention.query_key_value",), "self_attention.dense", "grouped",
                    {**_HEADS, "num_kv_heads": "kv_heads"}),
        (Projections(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),),
        layers="h", width_key="ffn_hidden_size", kv_heads_key="num_kv_heads",
    ),
    "opt": Family(
        Projections(_QKV, "self_attn.out_proj", attributes=_HEADS),
        (Projections(("fc1",), "fc2"),),
        layers="decoder.layers", width_key="ffn_dim", kv_heads_key=None,
    ),
    "gpt2": Family(
        Projections(("attn.c_attn",), "attn.c_proj", "concat", {**_HEADS, "split_size": "query_width"}),
        (Projections(("mlp.c_fc",), "mlp.c_proj"),),
        layers="h", width_key="n_inner", kv_heads_key=None,
    ),
}  # fmt: skip


def family_of(model_type: str, tp_plan: dict[str, str] | None) -> Family | None:
    """The description of a model type: its entry in the table, else one read from its tensor-parallel plan, if any.

    `tp_plan` is `config.base_model_tp_plan`, for example `{"layers.*.mlp.up_proj": "colwise", ...}`.
    """
    return FAMILIES.get(model_type) or _from_tp_plan(tp_plan or {})


def _from_tp_plan(tp_plan: dict[str, str]) -> Family | None:
    producers: dict[str, list[str]] = {}
    consumers: dict[str, str] = {}
    notes: list[str] = []
    experts = None
    for pattern, style in tp_plan.items():
        prefix, _, name = pattern.partition(".*.")
        parent = name.rpartition(".")[0]
        if prefix != "layers" or not parent:
            continue
        if "experts" in name.split("."):
            experts = name.partition(".experts")[0]
        elif style.startswith("colwise"):
            producers.setdefault(parent, []).append(name)
        elif style.startswith("rowwise"):
            consumers[parent] = name
    attention, mlps = None, []
    for parent, output in consumers.items():
        inputs = tuple(producers.get(parent, ()))
        leaves = tuple(name.rpartition(".")[2] for name in inputs)
        if leaves == ("q_proj", "k_proj", "v_proj"):
            attention = Projections(inputs, output, attributes=_REP)
        elif inputs and not any(word in parent for word in ("attn", "attention")):
            mlps.append(Projections(inputs, output))
    if not (attention or mlps or experts):
        return None
    return Family(attention, tuple(mlps), experts=experts, notes=tuple(dict.fromkeys(notes)))
