"""A cheap way to tell whether two measurements were made on the same model."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel


_SAMPLES = 256  # elements of each parameter
_NOT_THE_MODEL = ("_name_or_path", "_commit_hash", "transformers_version")


@torch.no_grad()
def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits of the configuration and of the names, shapes, dtypes and some elements of all parameters.

    Where a model was loaded from does not count. A change of a single element is likely to be missed; training,
    merging, pruning, rounding and quantising change all of them and are not.

    Args:
        model: A model with its weights in memory; of one on the meta device only shapes count.
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
