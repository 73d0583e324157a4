"""Accelerators for a machine that has none: tensors of the CPU that are counted as being on `cuda:0`, `cuda:1`, ...

Inside `OtherDevice()`, `tensor.to("cuda")`, `model.to(...)` and factories with `device=` give tensors that say of
themselves that they are there, and so do all results of theirs. An operation that gets tensors of two devices raises,
as CUDA would: all but 0-dimensional ones, indices (which may be on the CPU) and copies. A gradient goes back to where
its tensor came from. What hooks do in a backward pass is not seen.
"""

from unittest.mock import patch

import torch
from accelerate import dispatch_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_map


DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_COPIES = (_aten.copy_.default, _aten._to_copy.default, _aten.set_.source_Tensor, _aten._local_scalar_dense.default)
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default,
            _aten._unsafe_index.Tensor)  # fmt: skip
_DEVICE_OF, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
_TAKE_NUMBERS = (torch.Tensor.to, torch.device, torch._C._nn._parse_to)


def place(tensor):
    """The number of the accelerator that a tensor is on; `None` for the CPU."""
    return getattr(tensor.untyped_storage(), "accelerator", None)


def is_other(tensor):
    """Whether a tensor is on an accelerator."""
    return place(tensor) is not None


def put(tensor, number=0):
    """Counts what a tensor is stored in as being on an accelerator."""
    if isinstance(tensor, torch.Tensor):
        tensor.untyped_storage().accelerator = number
    return tensor


class _Moved(torch.autograd.Function):
    """A copy elsewhere, whose gradient goes back."""

    @staticmethod
    def forward(ctx, tensor, number):
        ctx.number = place(tensor)
        return _copied(tensor, number)

    @staticmethod
    def backward(ctx, gradient):
        return _copied(gradient, ctx.number), None


def _copied(tensor, number):
    with torch.utils._python_dispatch._disable_current_modes():
        copy = tensor.clone()
    return copy if number is None else put(copy, number)


class OtherDevice:
    """The context; `operations` counts those that the other device did, `pinned` the tensors in pinned memory."""

    def __enter__(self):
        operations = _Operations()
        self._modes = (operations, _Python(operations))
        for mode in self._modes:
            mode.__enter__()
        self._memory = patch.object(torch.cuda, "mem_get_info", lambda device=None: (2**40, 2**40))
        self._memory.start()
        return self

    def __exit__(self, *error):
        self._memory.stop()
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
            return torch.device("cuda", place(args[0])) if is_other(args[0]) else function(*args)
        if function == _IS_CUDA:
            return is_other(args[0])
        if function is torch.Tensor.pin_memory:
            return args[0]
        if kwargs.pop("pin_memory", False):
            self.operations.pinned += 1
        if function is torch.Tensor.numpy and is_other(args[0]):
            raise TypeError("can't convert cuda device type tensor to numpy")
        if function is torch.mm and "out_dtype" in kwargs:  # only CUDA has it
            return torch.mm(args[0].to(kwargs["out_dtype"]), args[1].to(kwargs["out_dtype"]))
        if function is torch.Tensor.cuda:
            args, kwargs, function = (args[0], DEVICE), {}, torch.Tensor.to
        if function in _TAKE_NUMBERS and (function is not torch.device or len(args) == 1):
            args = [_numbered(one) for one in args]
        asked = [one for one in (*args, *kwargs.values()) if _is_device(one)]
        if function is torch.Tensor.cpu:
            asked = [torch.device("cpu")]
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            asked = [torch.device("cuda", place(args[1])) if is_other(args[1]) else args[1].device]
            args = [args[0], asked[0], args[1].dtype, *args[2:]]
        if not asked or function in (torch.device, torch._C._nn._parse_to):
            return self._run(function, args, kwargs)
        device, cpu = torch.device(asked[0]), torch.device("cpu")
        number = (device.index or 0) if device.type == DEVICE.type else None
        args, kwargs = tree_map(lambda one: cpu if number is not None and _is_device(one) else one, (args, kwargs))
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        result = function(*args, **kwargs)
        if tensor is not None and device.type in ("cpu", DEVICE.type) and place(tensor) != number:
            return _Moved.apply(result, number)
        return result if number is None else tree_map(lambda one: put(one, number), result)

    def _run(self, function, args, kwargs):
        """Runs a function of torch, inside which everything is made where its arguments are."""
        outer = self.operations.inside
        tensors = (one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor))
        self.operations.inside = next((place(one) for one in tensors if is_other(one)), None)
        try:
            return function(*args, **kwargs)
        finally:
            self.operations.inside = outer


class _Operations(TorchDispatchMode):
    """What CUDA says of tensors on two devices; results are where their arguments are."""

    operations, inside, pinned = 0, None, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        checked = [one for one in tree_iter((args[0], args[2:])) if isinstance(one, torch.Tensor)]
        checked = checked if function in _INDEXED else tensors
        places = {place(one) for one in checked if one.ndim > 0 and one.device.type != "meta"}
        if len(places) > 1 and function not in _COPIES:
            raise RuntimeError(f"Expected all tensors to be on the same device: {function} got {places} (None: cpu)")
        indices = tree_flatten(args[1])[0] if function in _INDEXED else ()
        if any(place(one) not in (None, place(args[0])) for one in indices if one is not None):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
        result = function(*args, **kwargs)
        if not tensors and self.inside is not None:
            tree_map(lambda one: put(one, self.inside), result)
        number = next((place(one) for one in tensors if is_other(one) and one.ndim > 0), None)
        number = next((place(one) for one in tensors if is_other(one)), None) if number is None else number
        if number is not None and (function not in _COPIES or function is _aten._to_copy.default):
            self.operations += 1
            tree_map(lambda one: put(one, number), result)
        return result


def spread(model):
    """The model on two accelerators, as Accelerate puts it with `device_map="auto"`: no layer is on both."""
    layers = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    parent, number = layers.rpartition(".")[0], len(model.get_submodule(layers))
    device_map = {f"{layers}.{index}": int(index >= number // 2) for index in range(number)}
    parts = [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]
    behind = parts.index(layers)  # mostly the last norm, and what turns positions
    device_map |= {part: int(place > behind) for place, part in enumerate(parts) if part != layers}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    device_map[name] = int(head.weight is not embeddings.weight)
    return dispatch_model(model, device_map, skip_keys=model._skip_keys_device_placement)


def _is_device(value):
    return isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cuda", "cpu"))


def _numbered(value):
    """The accelerator of a number, as `device_map="auto"` has them."""
    return torch.device("cuda", value) if type(value) is int else value
