"""Everything about a model that a check which fails has to leave as it was."""

import contextlib

import pytest
import torch

from hf_structprune.errors import StructPruneError


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")


def facts(model):
    """Weights bit for bit, buffers, configuration, classes, modes, flags and hooks."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {
        "tensors": {name: (id(t), t.dtype, t.shape, bits(t)) for name, t in tensors},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "generation": getattr(model, "generation_config", None) and model.generation_config.to_dict(),
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {n: [list(getattr(m, place)) for place in _HOOKS] for n, m in model.named_modules()},
        "methods": {n: sorted(k for k in vars(m) if callable(vars(m)[k])) for n, m in model.named_modules()},
    }


def bits(tensor):
    tensor = tensor.detach()
    return (
        None if tensor.device.type == "meta" else tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    )


@contextlib.contextmanager
def untouched(model, message=None, error=StructPruneError):
    """What is inside raises an error with this message and leaves the model as it was."""
    before = facts(model)
    with pytest.raises(error, match=message):
        yield
    after = facts(model)
    for name in before:
        assert after[name] == before[name], name
