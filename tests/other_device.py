"""A second device for a machine that has none: tensors of the CPU that are counted as being on an accelerator.

Inside `OtherDevice()`, `tensor.to("cuda")`, `model.to(...)` and factories with `device=` give tensors that say of
themselves that they are on `cuda:0`, and so do all results of theirs. An operation that gets tensors of both devices
raises, as CUDA would: all but 0-dimensional ones, indices (which may be on the CPU) and copies. What hooks
do in a backward pass is not seen.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map


DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default, _aten.set_.source_Tensor, _aten._local_scalar_dense.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default,
            _aten._unsafe_index.Tensor)  # fmt: skip
_DEVICE_OF, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
_MOVES = (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.nn.Module.to)


def is_other(tensor):
    """Whether a tensor is on the other device."""
    return getattr(tensor.untyped_storage(), "on_other_device", False)


def put(tensor):
    """Counts what a tensor is stored in as being on the other device."""
    if isinstance(tensor, torch.Tensor):
        tensor.untyped_storage().on_other_device = True
    return tensor


class OtherDevice:
    """The context; `operations` counts those that the other device did, `pinned` the tensors in pinned memory."""

    def __enter__(self):
        operations = _Operations()
        self._modes = (operations, _Python(operations))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        self.operations, self.pinned = self._modes[0].operations, self._modes[0].pinned
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Python(TorchFunctionMode):
    """What Python sees of devices."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function == _DEVICE_OF:
            return DEVICE if is_other(args[0]) else function(*args)
        if function == _IS_CUDA:
            return is_other(args[0])
        if function is torch.Tensor.pin_memory:
            return args[0]
        if kwargs.pop("pin_memory", False):
            self.operations.pinned += 1
        if function is torch.Tensor.numpy and is_other(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is torch.mm and "out_dtype" in kwargs:  # only CUDA has it
            return torch.mm(args[0].to(kwargs["out_dtype"]), args[1].to(kwargs["out_dtype"]))
        if function is torch.Tensor.cuda:
            args, kwargs, function = (args[0], DEVICE), {}, torch.Tensor.to
        asked = [one for one in (*args, *kwargs.values()) if _is_device(one)]
        if function is torch.Tensor.cpu:
            asked = [torch.device("cpu")]
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            asked = [DEVICE if is_other(args[1]) else args[1].device]
        if not asked or function in (torch.device, torch._C._nn._parse_to):
            return self._run(function, args, kwargs)
        other, cpu = torch.device(asked[0]).type == DEVICE.type, torch.device("cpu")
        args, kwargs = tree_map(lambda one: cpu if other and _is_device(one) else one, (args, kwargs))
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None and torch.device(asked[0]).type in ("cpu", DEVICE.type) and is_other(tensor) != other:
            with torch.utils._python_dispatch._disable_current_modes():
                moved = function(tensor.clone(), *args[1:], **kwargs)
            return put(moved) if other else moved
        result = function(*args, **kwargs)
        return tree_map(put, result) if other else result

    def _run(self, function, args, kwargs):
        """Runs a function of torch, inside which everything is made where its arguments are."""
        outer = self.operations.inside
        self.operations.inside = any(
            isinstance(one, torch.Tensor) and is_other(one) for one in tree_iter((args, kwargs))
        )
        try:
            return function(*args, **kwargs)
        finally:
            self.operations.inside = outer


class _Operations(TorchDispatchMode):
    """What CUDA says of tensors on two devices; results are where their arguments are."""

    operations, inside, pinned = 0, False, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        checked = [one for one in tree_iter((args[0], args[2:])) if isinstance(one, torch.Tensor)]
        checked = checked if function in _INDEXED else tensors
        places = {is_other(one) for one in checked if one.ndim > 0 and one.device.type != "meta"}
        if len(places) > 1 and function not in _COPIES:
            raise RuntimeError(f"Expected all tensors to be on the same device: {function} got cuda:0 and cpu")
        indices = tree_flatten(args[1])[0] if function in _INDEXED else ()
        if any(is_other(one) for one in indices if one is not None) and not is_other(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        result = function(*args, **kwargs)
        if not tensors and self.inside:
            tree_map(put, result)
        if any(is_other(one) for one in tensors) and (function not in _COPIES or function is _aten._to_copy.default):
            self.operations += 1
            tree_map(put, result)
        return result


def _is_device(value):
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu"))
