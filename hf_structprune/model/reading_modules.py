"""The description of a model type that neither the table nor a tensor-parallel plan gives, read from its modules."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .families import Family, Projections
from .groups import is_linear, matrix


# Names of projections beside each other in one module: what computes the units, what reads them.
_ATTENTIONS = tuple(
    (("q_proj", "k_proj", "v_proj"), output) for output in ("o_proj", "out_proj", "dense", "c_proj", "output_proj")
)
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
)
_HEADS_PER_GROUP = {"num_key_value_groups": "rep"}


def family_from_modules(model: PreTrainedModel) -> Family | None:
    """Reads where the decoder layers are and what is in them; `None` where no list of layers is found.

    What is read is a guess by names and shapes until `proof` has shown that cutting equals zeroing.
    """
    base, number = model.base_model, model.config.get_text_config().num_hidden_layers
    lists = ((name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList))
    path, layers = next(((name, module) for name, module in lists if len(module) == number), (None, None))
    if path is None:
        return None
    attention, mlps, widths = None, [], []
    for layer in layers:
        for name, module in layer.named_modules():
            dotted = f"{name}." if name else ""
            if "experts" in name.split("."):
                continue
            found = next((names for names in _ATTENTIONS if _has(module, names)), None)
            if found is not None and attention is None:
                inputs, output = found
                rep = _HEADS_PER_GROUP if hasattr(module, "num_key_value_groups") else None
                attention = Projections(tuple(dotted + one for one in inputs), dotted + output, attributes=rep)
            found = None if found else next((names for names in _MLPS if _has(module, names)), None)
            if found is not None:
                inputs, output = found
                names = Projections(tuple(dotted + one for one in inputs), dotted + output)
                if names not in mlps:
                    mlps.append(names)
                    widths.append(matrix(getattr(module, output)).shape[1])
    values = model.config.to_dict()
    keys = [key for key in _WIDTH_KEYS if values.get(key) in widths[:1]]
    return Family(
        attention, tuple(mlps), path, keys[0] if keys else "intermediate_size",
        next((key for key in _KV_KEYS if key in values), None), _block_of_experts(layers),
    )  # fmt: skip


_WIDTH_KEYS = (
    "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp", "d_ff",
    "shared_intermediate_size",
)  # fmt: skip
_KV_KEYS = ("num_key_value_heads", "num_kv_heads")


def _has(module: nn.Module, names: tuple[tuple[str, ...], str]) -> bool:
    """Whether a module holds linear maps of these names."""
    inputs, output = names
    return all(is_linear(getattr(module, name, None)) for name in (*inputs, output))


def _block_of_experts(layers: nn.ModuleList) -> str | None:
    """Name of the module that holds `experts`, in the layers that have some."""
    for layer in layers:
        for name, _ in layer.named_modules():
            if name.rpartition(".")[2] == "experts":
                return name.rpartition(".")[0] or None
    return None
