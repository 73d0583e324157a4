"""What this machine has and can do. Every such question is asked here, so that tests can force each answer."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from transformers.utils import is_torch_bf16_gpu_available

from .errors import ConfigurationError


if TYPE_CHECKING:
    from accelerate import PartialState

# The limit of a container, what it uses, and where it says which of that are pages of files: cgroups 2, and 1.
_CGROUP = Path("/sys/fs/cgroup")
_CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
# By the names that options have for them.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ACCELERATORS = ("cuda", "xpu", "npu", "hpu", "mlu", "musa", "sdaa")  # kinds of which a machine may have several


def dtype_of(name: str | torch.dtype) -> torch.dtype | None:
    """One of them, by its short or its long name (`"bf16"`, `"bfloat16"`) or itself; `None` for any other."""
    plain = str(name).removeprefix("torch.")
    return next((dtype for short, dtype in DTYPES.items() if plain in (short, str(dtype)[6:])), None)


def check_device(device: str | torch.device | None) -> None:
    """Refuses a device that is not there; `None` is the CPU."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(f"`device` is {device!r}, which cannot be used: {reason}") from error


def memory_left() -> int:
    """Bytes of memory that can be had: what the machine has free, or what the limit of a container leaves of it."""
    free = psutil.virtual_memory().available
    for limit, used, details, name in _CONTAINERS:
        try:
            most, taken = (int((_CGROUP / file).read_text()) for file in (limit, used))
            lines = (line.split() for line in (_CGROUP / details).read_text().splitlines())
            cached = int(dict(lines)[name])  # files, whose pages are given up when memory is needed
        except (OSError, ValueError, KeyError):  # there is no such file, or "max" in it: no limit
            continue
        free = min(free, max(0, most - taken + cached))
    return free


def memory_in_all() -> int:
    """Bytes of memory that there are: of the CUDA device if there is one, else of the machine or its container."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    total = psutil.virtual_memory().total
    for limit, *_ in _CONTAINERS:
        try:
            total = min(total, int((_CGROUP / limit).read_text()))
        except (OSError, ValueError):
            continue
    return total


def memory_taken() -> int:
    """Bytes of memory that this process has by now: Python, its libraries, and what is in use."""
    return psutil.Process().memory_info().rss


def has_accelerator() -> bool:
    """Whether there is anything but the CPU to compute on: CUDA, XPU, MPS, ..."""
    return torch.accelerator.is_available()


def process_state() -> PartialState:
    """The processes that `accelerate launch` (or torch's launcher) began, on the CPU, too.

    What asks first decides for all: `PartialState()` by itself takes each process on a CPU for the only one.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not has_accelerator())


def default_device() -> str:
    """Where is computed if nobody says where: `"cuda"` if there is such a device, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cuda_devices(devices: Iterable[torch.device] | None = None) -> list[torch.device]:
    """The CUDA devices among some, or all that this machine has."""
    if devices is not None:
        return [device for device in devices if device.type == "cuda"]
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(number)]


def synchronize(devices: Iterable[torch.device]) -> None:
    """Waits until everything that was sent to accelerators is done."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type != "meta":
            getattr(torch, device.type).synchronize()


def device_name(device: torch.device) -> str:
    """What a CUDA device is called by its maker; of others their kind, such as `"cpu"`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def release_memory() -> None:
    """Gives memory that nothing uses any more back to the CUDA device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def trim_memory() -> None:
    """Gives what is free in the heap back to the system, where the C library can (glibc).

    Matrices of up to 32 MB lie in the heap, which does not shrink as long as anything behind them is in use.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device; `None` for others, whose weights are in the memory of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def trains_in_bf16() -> bool:
    """Whether Transformers trains in bfloat16 on the accelerator, emulated or not."""
    return is_torch_bf16_gpu_available()


def accelerator_has_bf16() -> bool:
    """Whether the accelerator computes in bfloat16 itself, without emulation."""
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return trains_in_bf16() and not emulated


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies matrices in bfloat16 (AMX, AVX512-BF16); others do it several times slower."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)
