"""Models whose parts Accelerate has put on several devices, into the machine's memory or on disk (`device_map`)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


_OFFLOADED = {"cpu": "in the machine's memory", "disk": "on disk"}


def device_map_of(model: PreTrainedModel) -> dict[str, Any]:
    """Where the parts of a model are, by the name of the module; empty for a model that nobody has placed."""
    return dict(getattr(model, "hf_device_map", None) or {})


def is_spread(model: PreTrainedModel) -> bool:
    """Whether the parts of a model are in several places, between which Accelerate moves the hidden states."""
    return len(set(device_map_of(model).values())) > 1


def spread_like(model: PreTrainedModel, like: PreTrainedModel) -> PreTrainedModel:
    """The model with its parts where those of another one are, and with the same hooks."""
    if not is_spread(like):
        return model
    from accelerate import dispatch_model

    return dispatch_model(model, device_map=like.hf_device_map, skip_keys=model._skip_keys_device_placement)


def has_weights(model: PreTrainedModel) -> bool:
    """Whether all weights are in memory (and not on the meta device or offloaded)."""
    return all(parameter.device.type != "meta" for parameter in model.parameters())


def why_no_weights(model: PreTrainedModel) -> str:
    """What a model without all of its weights is refused with: where they are, and the way out."""
    lacking = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    away = {
        part: place
        for part, place in device_map_of(model).items()
        if place in _OFFLOADED and any(not part or f"{name}.".startswith(f"{part}.") for name in lacking)
    }
    if not away:
        return (
            "Some weights are not in memory (meta device): only planning is possible, by sizes. Load the model with "
            "its weights."
        )
    parts = ", ".join(f"`{part}`" if part else "the model" for part in list(away)[:2])
    parts += f" and {len(away) - 2} more parts" if len(away) > 2 else ""
    places = " and ".join(_OFFLOADED[place] for place in sorted(set(away.values())))
    return (
        f"By its `device_map` {parts} of this model are {places} and come to a device only while they are run, so "
        "that they cannot be measured and cut: only planning is possible, by sizes. Leave `device_map` out, and give "
        '`device="cuda"` (`--device cuda --offload`), by which one layer after the other goes to the device, or '
        "`stream=True` (`--stream`), by which they are read from disk."
    )
