"""Transformers models whose layers differ in width. This file travels with per-layer checkpoints and needs nothing
but Transformers: load them with `trust_remote_code=True`, or without it after `import hf_structprune`.

The widths are in the `per_layer_config` of config.json. Every decoder layer is built by its stock class from the
configuration of that layer. Where a configuration class cannot express a number of heads, `module_overrides` names the
modules of the layer that differ: `{"attn": {"num_heads": 6}, "attn.c_proj": {"in_features": 384}}`.

A layer with `"skip": ["attention"]` or `["mlp"]` lacks that sublayer and its norms. `skip_modules` of the model names
what is gone, the module that gives the sublayer's output last: `{"attention": ["input_layernorm", "self_attn"]}`.

Part of hf_structprune, Apache-2.0.
"""

import inspect
import sys
from contextlib import contextmanager
from functools import wraps

import torch
import transformers
from torch import nn


PREFIX = "PerLayer"


def per_layer_class(stock: type) -> type:
    """The class `PerLayer<Stock>`: the stock class, built layer by layer."""
    if issubclass(stock, PerLayerMixin):
        return stock
    name = PREFIX + stock.__name__
    if name not in globals():
        globals()[name] = type(
            name, (PerLayerMixin, stock), {"__module__": __name__, "_auto_class": "AutoModelForCausalLM"}
        )
    return globals()[name]


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and hasattr(transformers, name[len(PREFIX) :]):
        return per_layer_class(getattr(transformers, name[len(PREFIX) :]))
    raise AttributeError(name)


_NUMBERS_OF_EXPERTS = {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"}


class PerLayerMixin:
    """Builds every decoder layer from its own configuration and refuses to load weights that do not fit."""

    def __init__(self, config, *args, **kwargs):
        before = config.allow_global_per_layer_attribute_access
        own = {key for values in (config.to_dict().get("per_layer_config") or {}).values() for key in values}
        # A model with experts keeps their number of the whole model too, for a loss that balances them.
        config.allow_global_per_layer_attribute_access = before or bool(own & _NUMBERS_OF_EXPERTS)
        try:
            with _layers_from_their_own_config(type(self)):
                super().__init__(config, *args, **kwargs)
        finally:
            config.allow_global_per_layer_attribute_access = before

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = [*info["missing_keys"], *info["mismatched_keys"]]
        for keys, problem in (
            (missing, "lacks weights that config.json describes; they would be random"),
            (info["unexpected_keys"], "has weights that config.json does not describe; they would be lost"),
        ):
            names = sorted(map(str, keys))
            if names:
                names[5:] = ["..."] if len(names) > 5 else []
                raise RuntimeError(f"{pretrained_model_name_or_path} {problem}: {', '.join(names)}.")
        return (model, info) if output_loading_info else model

    def initialize_weights(self):
        # Of a class outside of Transformers not all modules are initialised after loading, which for some is where
        # buffers come from that no checkpoint holds (`mup_vector` of Falcon-H1). What is built here are stock modules.
        self.is_custom_code = lambda: False
        try:
            super().initialize_weights()
        finally:
            del self.is_custom_code

    def set_attn_implementation(self, *args, **kwargs):
        super().set_attn_implementation(*args, **kwargs)
        self._hand_on("_attn_implementation")

    def set_experts_implementation(self, *args, **kwargs):
        super().set_experts_implementation(*args, **kwargs)
        self._hand_on("_experts_implementation")

    def _hand_on(self, name: str) -> None:
        """Gives a value of the model's configuration to those of its layers."""
        for module in self.modules():
            config = getattr(module, "config", None)
            if config is not None and config is not self.config:
                setattr(config, name, getattr(self.config, name))


@contextmanager
def _layers_from_their_own_config(model_class: type):
    """While it is open, decoder layers of the model class receive `config.per_layer_config[layer_idx]`."""
    stock = next(base for base in model_class.__mro__ if not issubclass(base, PerLayerMixin) and base is not object)
    module = sys.modules[stock.__module__]
    named = [name for name in stock._no_split_modules or () if hasattr(module, name)]
    suffixes = ("Layer", "Block")
    # Some classes name other modules beside their layers, or none.
    for names in (
        [n for n in named if n.endswith(suffixes)],
        [n for n in vars(module) if n.endswith(suffixes)],
        named,
    ):
        layers = [getattr(module, name) for name in names]
        originals = {layer: layer.__init__ for layer in layers if isinstance(layer, type) and _number_in(layer)}
        if originals:
            break
    for layer, original in originals.items():
        layer.__init__ = _with_own_config(original, _number_in(layer))
    try:
        yield
    finally:
        for layer, original in originals.items():
            layer.__init__ = original


def _number_in(layer: type) -> str | None:
    """The parameter of a layer's `__init__` that is its number, if it gets one and a configuration."""
    parameters = inspect.signature(layer.__init__).parameters
    found = (name for name in ("layer_idx", "layer_id", "layer_number") if {name, "config"} <= parameters.keys())
    return next(found, None)


def _with_own_config(original, number):
    signature = inspect.signature(original)

    @wraps(original)
    def init(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        config = bound.arguments["config"]
        if config.is_heterogeneous:
            config = config.per_layer_config[bound.arguments[number]]
        bound.arguments["config"] = config
        original(*bound.args, **bound.kwargs)
        for path, values in (getattr(config, "module_overrides", None) or {}).items():
            _override(self.get_submodule(path), values)
        for kind in getattr(config, "skip", None) or ():
            _skip(self, kind, getattr(config, "skip_modules", None) or {}, bound.arguments[number])

    return init


def _skip(layer: nn.Module, kind: str, modules: dict, layer_idx: int) -> None:
    """Puts modules without parameters in the place of a sublayer and its norms."""
    if kind not in modules or kind not in ("attention", "mlp"):
        raise ValueError(f"Layer {layer_idx} skips {kind!r}, but `skip_modules` of config.json does not name it.")
    *others, output = modules[kind]
    for name in others:
        layer.set_submodule(name, nn.Identity())
    layer.set_submodule(output, NoAttn(layer_idx) if kind == "attention" else NoMlp())


class NoMlp(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states)


class NoAttn(nn.Module):  # by another name, Transformers would take this file for one that defines attention
    """Adds nothing to the residual stream, and keeps count of the tokens in the cache.

    Transformers reads the length of the past from the first layer of each type, so one that skipped the cache would
    make generation silently wrong.
    """

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, **kwargs):
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, transformers.Cache)), None)
        if cache is not None:
            self._count(getattr(cache, "self_attention_cache", cache), hidden_states)
        return torch.zeros_like(hidden_states), None

    def _count(self, cache, hidden_states):
        layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
        batch, length = hidden_states.shape[:2]

        def tokens(filled):  # a static cache may have its shape already; else one number for each token is enough
            heads, size = (1, 1) if filled is None else (filled.shape[1], filled.shape[-1])
            return hidden_states.new_zeros((batch, heads, length, size))

        filled = (layer.keys, layer.values) if getattr(layer, "is_initialized", False) else (None, None)
        cache.update(*map(tokens, filled), self.layer_idx)


def _override(module: nn.Module, values: dict) -> None:
    """Sets attributes of a module; `in_features` and `out_features` give a linear map another shape."""
    for name, value in values.items():
        if name.startswith("config."):
            setattr(module.config, name[len("config.") :], value)  # the layer's own copy
        elif name not in ("in_features", "out_features"):
            setattr(module, name, value)
    if not {"in_features", "out_features"} & set(values):
        return
    if module.weight.dim() == 1:  # a norm over all units
        module.weight = nn.Parameter(module.weight.new_ones(values["out_features"]))
        return
    linear = isinstance(module, nn.Linear)
    rows, columns = module.weight.shape if linear else module.weight.shape[::-1]
    rows, columns = values.get("out_features", rows), values.get("in_features", columns)
    like = dict(dtype=module.weight.dtype, device=module.weight.device)
    module.weight = nn.Parameter(torch.zeros((rows, columns) if linear else (columns, rows), **like))
    if module.bias is not None:
        module.bias = nn.Parameter(torch.zeros(rows, **like))
    for name, value in {"in_features": columns, "out_features": rows, "nx": columns, "nf": rows}.items():
        if hasattr(module, name):
            setattr(module, name, value)
