"""Where and when something was measured: versions, hardware, date."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch


# Distributions that figures depend on, besides torch and this package.
_DISTRIBUTIONS = ("transformers", "accelerate", "datasets", "lm-eval")


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader has to know to judge and to repeat a measurement.

    Args:
        device: The device the model is on.

    Returns:
        `dict`: `date` (UTC, ISO 8601), `python`, `platform`, `versions` (by package; those that are not installed are
        left out) and `hardware`: `device` (name of the CPU or GPU), `type` (`"cpu"`, `"cuda"`, ...), `threads` (of
        torch), `cpu`, `memory` and, for a GPU, `device_memory` in bytes.
    """
    device = torch.device(device)
    cpu = _cpu_name()
    hardware = {
        "device": cpu,
        "type": device.type,
        "threads": torch.get_num_threads(),
        "cpu": cpu,
        "memory": psutil.virtual_memory().total,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"device": properties.name, "device_memory": properties.total_memory}
    elif device.type != "cpu":
        hardware["device"] = f"{device.type} of {cpu}"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": _versions(),
        "hardware": hardware,
    }


def _versions() -> dict[str, str]:
    from .. import __version__

    versions = {"hf_structprune": __version__, "torch": torch.__version__}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name.replace("-", "_")] = importlib.metadata.version(name)
    return versions


def _cpu_name() -> str:
    """The name on the chip; Linux tells it in a file only."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
