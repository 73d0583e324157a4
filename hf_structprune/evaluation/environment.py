"""Where, when and on which model something was measured: versions, hardware, date, fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from ..installed import __version__


# Distributions that figures depend on, besides torch and this package.
_DISTRIBUTIONS = ("transformers", "accelerate", "datasets", "lm-eval")

_SAMPLES = 256  # elements of each parameter
_NOT_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version")


def describe_environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader has to know to judge and to repeat a measurement on a device.

    Returns:
        `dict`: `date` (UTC, ISO 8601), `python`, `platform`, `versions` (by package; those that are not installed are
        left out) and `hardware`: `device` (name of the CPU or GPU), `type` (`"cpu"`, `"cuda"`, ...), `threads` (of
        torch), `cpu`, `memory` and, for a GPU, `device_memory` in bytes.
    """
    device, cpu = torch.device(device), _cpu_name()
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
    versions = {"hf_structprune": __version__, "torch": torch.__version__}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name.replace("-", "_")] = importlib.metadata.version(name)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "hardware": hardware,
    }


def _cpu_name() -> str:
    """The name on the chip; Linux tells it in a file only."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


@torch.no_grad()
def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits of the configuration and of the names, shapes, dtypes and some elements of all parameters.

    Where a model was loaded from does not count. A change of a single element is likely to be missed; training,
    merging, pruning, rounding and quantising change all of them and are not. On the meta device only shapes count.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            step = max(1, parameter.numel() // _SAMPLES) | 1  # odd, so that it does not stay in one column
            some = parameter.detach().reshape(-1)[::step].contiguous().cpu()
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
