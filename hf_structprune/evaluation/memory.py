"""What a model occupies: weights, key-value cache, peak memory."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ..hardware import cuda_devices
from ..model.measuring import measuring


_PAGE = 4096
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of everything that is saved with a model, by dtype (`"bfloat16"`); tied tensors count once.

    Quantised weights count as they are stored, with their scales and zero points.
    """
    sizes: dict[tuple, tuple[str, int]] = {}
    for value in model.state_dict().values():
        for tensor in _plain_tensors(value):
            size = tensor.numel() * tensor.element_size()
            sizes[tensor.device, tensor.data_ptr(), size] = (str(tensor.dtype).removeprefix("torch."), size)
    total: Counter[str] = Counter()
    for dtype, size in sizes.values():
        total[dtype] += size
    return dict(total)


def _plain_tensors(value: object) -> Iterator[torch.Tensor]:
    """A tensor, or those inside one of a wrapper class, which knows only the dtype it stands for."""
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value


def read_weights(model: nn.Module) -> None:
    """Reads a byte of every page of the weights: files mapped into memory are read only when they are used."""
    for value in model.state_dict().values():
        for tensor in _plain_tensors(value):
            tensor.contiguous().view(-1).view(torch.uint8)[::_PAGE].sum()


@dataclass(frozen=True)
class CacheGrowth:
    """Bytes that one more token of one sequence adds to the key-value cache.

    Attributes:
        layers: Bytes of each layer.
        windows: Length of each layer's sliding window, `None` where it attends to everything. A layer stops growing
            when its window is full.
    """

    layers: list[int]
    windows: list[int | None]

    @property
    def total(self) -> int:
        """Bytes of a token while no window is full."""
        return sum(self.layers)

    @property
    def without_windows(self) -> int:
        """Bytes of a token when all windows are full."""
        return sum(size for size, window in zip(self.layers, self.windows, strict=True) if window is None)


@torch.no_grad()
def cache_growth(model: PreTrainedModel) -> CacheGrowth | None:
    """Compares the model's own cache after one token and after two; `None` if it has none with keys and values."""
    with measuring(model):
        first, second = (_cache_layers(model, tokens) for tokens in (1, 2))
    if not second or not any(size for size, _ in second):
        return None
    layers = [after - before for (before, _), (after, _) in zip(first, second, strict=True)]
    return CacheGrowth(layers, [window for _, window in second])


def _cache_layers(model: PreTrainedModel, tokens: int) -> list[tuple[int, int | None]]:
    ids = torch.zeros((1, tokens), dtype=torch.long, device=model.device)
    cache = getattr(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True), "past_key_values", None)
    result = []
    for layer in getattr(cache, "layers", ()):
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        size = sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
        result.append((size, getattr(layer, "sliding_window", None)))
    return result


@dataclass
class PeakMemory:
    """Peak memory of a block of code.

    Attributes:
        value: Bytes at the peak, everything that was there before included; `None` where it cannot be known.
        before: Bytes in use when the block began.
        method: How they were read.
    """

    value: int | None = None
    before: int | None = None
    method: str = ""


@contextmanager
def peak_memory(devices: set[torch.device]) -> Iterator[PeakMemory]:
    """Measures the peak of the CUDA allocator over the CUDA devices, or else of the process's resident memory."""
    cuda = cuda_devices(devices)
    peak = PeakMemory()
    if cuda:
        for device in cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        peak.before = memory_in_use(devices)
        yield peak
        peak.value = sum(map(torch.cuda.max_memory_allocated, cuda))
        peak.method = "peak of the CUDA allocator (max_memory_allocated, reset before)"
        return
    peak.before = memory_in_use(devices)
    reset = _reset_resident_peak()
    yield peak
    peak.value = _status("VmHWM") if reset else _peak_since_start()
    how = "VmHWM, reset before" if reset else "ru_maxrss, since the process started"
    peak.method = f"peak resident memory of the process ({how})"


def memory_in_use(devices: set[torch.device]) -> int:
    """Bytes that the CUDA allocator has given out on the CUDA devices, or else the resident memory of the process."""
    cuda = cuda_devices(devices)
    if cuda:
        return sum(map(torch.cuda.memory_allocated, cuda))
    import psutil

    return psutil.Process().memory_info().rss


def _reset_resident_peak() -> bool:
    """Makes the kernel forget the peak so far (Linux)."""
    try:
        _CLEAR.write_text("5")
        return _status("VmHWM") is not None
    except OSError:
        return False


def _status(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _peak_since_start() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
