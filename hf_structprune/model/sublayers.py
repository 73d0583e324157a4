"""Which modules are the attention and the MLP of a decoder layer, and which norms go with each."""

from __future__ import annotations

from torch import nn

from .families import NORMS, Family, NormNames
from .groups import Sublayer, is_linear, matrix_parameters


_NORM_NAMES = frozenset(name for row in NORMS for name in row.all)
# What a block of experts may hold; each expert's output, and that of one all tokens share, is `down_proj`'s.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_EXPERTS = ("experts", "shared_expert", "shared_experts")
_PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
# Layers that are not `stream + sublayer(stream)`, although their modules have the usual names.
_SCALED_STREAMS = ("minimax",)


def read_sublayers(
    config, family: Family, name: str, layer: nn.Module, active_experts: int | None
) -> tuple[list[Sublayer], str | None]:
    """The sublayers of a layer that can be skipped.

    Args:
        config: The model's configuration.
        family: Where the layer keeps its projections.
        name: Full name of the layer.
        layer: The layer.
        active_experts: `config.num_experts_per_tok`.

    Returns:
        The sublayers, and a reason if some or all of them are left alone.
    """
    if getattr(config, "num_kv_shared_layers", 0):
        return [], "sublayers: layers share their keys and values, left alone"
    reason = _stream_reason(config)
    norms = _norms(layer)
    if reason or norms is None:
        found = ", ".join(child for child, _ in layer.named_children() if "norm" in child or child in _NORM_NAMES)
        return [], f"sublayers: {reason or f'the norms of the layers ({found}) are not understood'}, left alone"
    parts = {"attention": _attention(family, layer), "mlp": _mlp(family, layer)}
    strangers = _strangers(layer, [*norms.all, *(module for part in parts.values() for module in part)])
    if strangers:
        return [], f"sublayers: parameter `{strangers[0]}` is not understood, left alone"
    sublayers, notes = [], []
    for kind, modules in parts.items():
        consumer = _consumer(family, layer, kind, modules)
        if consumer is None:
            notes += [f"{modules[-1]}: its output is not understood, it is not skipped alone"] if modules else []
            continue
        gone = [layer.get_submodule(part) for part in (*getattr(norms, kind), *modules)]
        sublayers.append(
            Sublayer(
                kind,
                f"{name}.{modules[-1]}",
                tuple(f"{name}.{norm}" for norm in getattr(norms, kind)),
                f"{name}.{consumer}" if consumer else "",
                sum(parameter.numel() for module in gone for parameter in module.parameters()),
                sum(matrix_parameters(module, active_experts) for module in gone),
                tuple(f"{name}.{module}" for module in modules[:-1]),
            )
        )
    return sublayers, notes[0] if notes else None


def _stream_reason(config) -> str | None:
    """Reasons why a layer without a sublayer is more than its residual stream."""
    if getattr(config, "do_layer_norm_before", True) is False:
        return "the norms follow the sum with the residual stream"
    if config.model_type in _SCALED_STREAMS:
        return "the residual stream itself is normalised and scaled in each layer"
    return None


def _norms(layer: nn.Module) -> NormNames | None:
    names = {name for name, _ in layer.named_children() if name in _NORM_NAMES}
    return next((row for row in NORMS if row.all == names), None)


def _attention(family: Family, layer: nn.Module) -> tuple[str, ...]:
    """Name of the attention module."""
    parent = family.attention.parent if family.attention else ""
    return (parent,) if "." not in parent and _has_parameters(layer, parent) else ()


def _mlp(family: Family, layer: nn.Module) -> tuple[str, ...]:
    """Names of the modules of the MLP: its own module, or projections that stand in the layer itself."""
    for names in family.mlps:
        parent = names.parent.partition(".")[0]
        if not names.parent and all(_has_parameters(layer, name) for name in (*names.inputs, names.output)):
            return (*names.inputs, names.output)
        if _has_parameters(layer, parent):
            return (parent,)
    experts = (family.experts or "").partition(".")[0]
    return (experts,) if _has_parameters(layer, experts) else ()


def _has_parameters(layer: nn.Module, name: str) -> bool:
    module = getattr(layer, name, None) if name else None
    return isinstance(module, nn.Module) and any(True for _ in module.parameters())


def _strangers(layer: nn.Module, known: list[str]) -> list[str]:
    """Parameters of the layer outside the modules that are known."""
    return [name for name, _ in layer.named_parameters() if name.partition(".")[0] not in known]


def _consumer(family: Family, layer: nn.Module, kind: str, modules: tuple[str, ...]) -> str | None:
    """The last linear map of a sublayer, `""` for a block of experts, `None` if neither is there."""
    if not modules:
        return None
    outputs = [family.attention.output] if kind == "attention" else [names.output for names in family.mlps]
    outputs = [output for output in outputs if output.rpartition(".")[0] in (modules[-1], "")]
    for output in outputs:
        try:
            if is_linear(layer.get_submodule(output)):
                return output
        except AttributeError:
            continue
    return "" if kind == "mlp" and _is_experts(layer.get_submodule(modules[-1])) else None


def _is_experts(block: nn.Module) -> bool:
    """Whether all parameters of a block are those of routers and experts whose outputs are added up."""
    names = [name.split(".") for name, _ in block.named_parameters()]
    return any(name[0] == "experts" for name in names) and all(
        name[0] in _ROUTERS or (name[0] in _EXPERTS and _projection(name) in _PROJECTIONS) for name in names
    )


def _projection(name: list[str]) -> str:
    """`down_proj` of `experts.down_proj`, `experts.down_proj_bias` and `shared_expert.down_proj.weight`."""
    return next((part.removesuffix("_bias") for part in name[1:] if not part.isdigit()), "")


def expert_outputs(block: nn.Module) -> list[nn.Parameter]:
    """The parameters of a block of experts that give its output: zeroed, the output is zero."""
    return [p for name, p in block.named_parameters() if _projection(name.split(".")) == "down_proj"]
