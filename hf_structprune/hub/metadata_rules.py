"""The rules that the Hub has for the metadata of a model card, as far as they can be checked without it.

The Hub checks a README.md when it is pushed (`POST /api/validate-yaml`, also `ModelCard.validate`). Its specification
is https://github.com/huggingface/hub-docs/blob/main/modelcard.md and
https://huggingface.co/docs/hub/model-cards. What is checked here: types of the fields, ids of models and data sets,
language codes, licence identifiers (form only; `other` needs a name and a link), values of `base_model_relation`, and
the required parts of `model-index`. Fields of other names are allowed, as on the Hub.
"""

from __future__ import annotations

import os
import re
from typing import Any

from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import get_session, validate_repo_id

from ..errors import HubError
from .network import is_network_error


PROBE_SECONDS = 10.0
RELATIONS = ("finetune", "quantized", "merge", "adapter")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")
_TEXTS = ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")


def violations(metadata: dict[str, Any]) -> list[str]:
    """What the Hub would refuse in the metadata of a model card, one sentence each; empty if it is valid."""
    found = [f"`{k}` must be text, not {metadata[k]!r}" for k in _TEXTS if not isinstance(metadata.get(k, ""), str)]
    for key in ("tags", "datasets", "base_model", "language", "license"):
        found += [f"`{key}` has an entry that is not text: {v!r}" for v in _items(metadata, key) if type(v) is not str]
    if found:
        return found
    for key in ("datasets", "base_model"):
        found += [
            f"`{key}` names {value!r}, which is no id of the Hub"
            for value in _items(metadata, key)
            if not _is_id(value)
        ]
    found += [
        f"`language` is {value!r}; it must be an ISO 639 code such as en"
        for value in _items(metadata, "language")
        if not _LANGUAGE.fullmatch(value)
    ]
    for value in _items(metadata, "license"):
        if not _LICENCE.fullmatch(value):
            found.append(f"`license` is {value!r}; it must be an identifier such as apache-2.0")
        if value == "other" and not ("license_name" in metadata and "license_link" in metadata):
            found.append("`license` is other: `license_name` and `license_link` must say which")
    if metadata.get("base_model_relation", RELATIONS[0]) not in RELATIONS:
        found.append(f"`base_model_relation` is {metadata['base_model_relation']!r}; it must be one of {RELATIONS}")
    if not re.fullmatch(r"[a-z0-9\-]+", metadata.get("pipeline_tag", "text-generation")):
        found.append(f"`pipeline_tag` is {metadata['pipeline_tag']!r}; it must be a task such as text-generation")
    return found + _model_index(metadata.get("model-index", []))


def _items(metadata: dict[str, Any], key: str) -> list[Any]:
    value = metadata.get(key) or []
    return value if isinstance(value, list) else [value]


def _is_id(value: str) -> bool:
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def _model_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ["`model-index` must be a list"]
    found = []
    for model in index:
        if not isinstance(model, dict) or not model.get("name") or not isinstance(model.get("results"), list):
            return ["every entry of `model-index` needs `name` and a list of `results`"]
        for number, result in enumerate(model["results"]):
            where = f"result {number} of `model-index`"
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                lacking = [key for key in keys if not (result.get(part) or {}).get(key)]
                found += [f"{where} lacks `{part}.{key}`" for key in lacking]
            metrics = result.get("metrics") or []
            if not metrics or any("type" not in metric or metric.get("value") is None for metric in metrics):
                found.append(f"{where} needs metrics with `type` and `value`")
    return found


def validate_card(path: str | os.PathLike) -> bool:
    """Checks the metadata of a card: here, and by the Hub (`ModelCard.validate`) if one answers.

    Args:
        path: The README.md.

    Returns:
        Whether the Hub was asked; `False` when offline (`HF_HUB_OFFLINE`) and where it cannot be reached.

    Raises:
        HubError: Says what is wrong.
    """
    card = ModelCard.load(path)
    problems = violations(card.data.to_dict())
    if problems:
        raise HubError(f"The metadata of {path} is not valid: {'; '.join(problems)}.")
    try:
        get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS)  # `validate` has no time limit of its own
        card.validate()
    except ValueError as error:
        raise HubError(f"The Hub refuses the metadata of {path}: {error}") from error
    except Exception as error:
        if not is_network_error(error):
            raise
        return False
    return True
