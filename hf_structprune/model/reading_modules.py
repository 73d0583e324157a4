"""The description of a model type that neither the table nor a tensor-parallel plan gives, read from its modules."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .families import Family, Projections
from .groups import is_linear, matrix, submodule


# Names of projections below one module: what computes the units, what reads them, how a fused one is laid out.
_ATTENTIONS = (
    *((("q_proj", "k_proj", "v_proj"), output, None)
      for output in ("o_proj", "out_proj", "dense", "c_proj", "output_proj", "Wo")),
    *(((q, "kv_b_proj"), "o_proj", None) for q in ("q_b_proj", "q_proj", "q_gate_proj")),
    (("query", "key", "value"), "output", None),
    (("Wq", "Wk", "Wv"), "dense", None),
    (("project_q", "project_k", "project_v"), "attention_out", None),
    (("qkv_proj",), "o_proj", "concat"),
    (("c_attn",), "c_proj", "concat"),
    (("Wqkv",), "out_proj", "concat"),
    (("q_proj.linear", "k_proj.linear", "v_proj.linear"), "o_proj.linear", None),
    (("query_key_value",), "dense", "grouped"),
)  # fmt: skip
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("input_linear",), "output_linear"),
    (("Wi",), "Wo"),
    (("w_in.w_0", "w_in.w_1"), "w_out"),
    (("ffn.0",), "ffn.2"),
    (("intermediate.dense",), "output.dense"),
)
# BERT and its like: the projections of the attention are in two modules.
_SPLIT = Projections(
    ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
    holder="attention.self",
)  # fmt: skip
# What attributes of attention modules hold, by their names; see `Projections.attributes`.
_COUNTS = {
    "num_heads": "heads", "num_attention_heads": "heads", "n_head": "heads", "n_heads": "heads",
    "num_key_value_heads": "kv_heads", "num_kv_heads": "kv_heads", "num_key_value_groups": "rep",
    "all_head_size": "query_width", "split_size": "query_width", "embed_dim": "query_width",
    "hidden_size": "query_width",
}  # fmt: skip
_WIDTH_KEYS = (
    "decoder_ffn_dim", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp", "d_ff",
    "shared_intermediate_size", "dff", "dim_ff",
)  # fmt: skip
_KV_KEYS = ("num_key_value_heads", "num_kv_heads")
_DECODER = {"layers_key": "decoder_layers", "heads_key": "decoder_attention_heads"}


def family_from_modules(model: PreTrainedModel) -> Family | None:
    """Reads where the decoder layers are and what is in them; `None` where no list of layers is found.

    What is read is a guess by names and shapes until `proof` has shown that cutting equals zeroing.
    """
    base, values = model.base_model, model.config.to_dict()
    keys = {name: key for name, key in _DECODER.items() if key in values}
    text = model.config.get_text_config()
    number = values.get(keys.get("layers_key"), getattr(text, "num_hidden_layers", None))
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    path, layers = next(((name, module) for name, module in lists if len(module) == number), (None, None))
    if path is None or path.endswith("attentions"):  # XLM has a list for each part of its layers
        return None
    attention, mlps, widths = None, [], []
    for layer in layers:
        for name, module in layer.named_modules():
            dotted = f"{name}." if name else ""
            if "experts" in name.split("."):
                continue
            found = _attention(layer, dotted, module)
            attention = attention or found
            pair = next((names for names in _MLPS if _has(module, *names)), None)
            if pair is not None:
                inputs, output = pair
                names = Projections(tuple(dotted + one for one in inputs), dotted + output)
                if names not in mlps:
                    mlps.append(names)
                    widths.append(matrix(module.get_submodule(output)).shape[1])
    there = [key for key in _WIDTH_KEYS if values.get(key) in widths[:1]]
    there += [key for key in _WIDTH_KEYS if key in values and values[key] is None]  # by default, a multiple
    width = there[0] if there else "intermediate_size"
    kv = next((key for key in _KV_KEYS if key in values), None)
    return Family(attention, tuple(mlps), path, width, kv, _block_of_experts(layers), **keys)


def _attention(layer: nn.Module, prefix: str, module: nn.Module) -> Projections | None:
    """The projections of a module, if it is an attention."""
    if not prefix and _has(layer, _SPLIT.inputs, _SPLIT.output):
        counts = counts_in(layer.get_submodule(_SPLIT.holder))
        return Projections(_SPLIT.inputs, _SPLIT.output, None, counts, _SPLIT.holder)
    for inputs, output, fused in _ATTENTIONS:
        if _has(module, inputs, output):
            holder = prefix.removesuffix(".") if "." in output else ""
            inputs = tuple(prefix + one for one in inputs)
            return Projections(inputs, prefix + output, fused, counts_in(module), holder)
    return None


def counts_in(module: nn.Module) -> dict[str, str]:
    """What the attributes of an attention module hold that follow the numbers of its heads."""
    return {name: meaning for name, meaning in _COUNTS.items() if isinstance(vars(module).get(name), int)}


def _has(module: nn.Module, inputs: tuple[str, ...], output: str) -> bool:
    """Whether linear maps of these names are below a module."""
    return all(is_linear(submodule(module, name)) for name in (*inputs, output))


def _block_of_experts(layers: nn.ModuleList) -> str | None:
    """Name of the module that holds `experts`, in the layers that have some."""
    for layer in layers:
        for name, _ in layer.named_modules():
            if name.rpartition(".")[2] == "experts":
                return name.rpartition(".")[0] or None
    return None
