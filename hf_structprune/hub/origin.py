"""Where a pruned model comes from: recorded in its configuration, and what its licence asks."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import PruningConfig
from ..errors import ConfigurationError
from ..files.reading import can_only_be_a_path
from ..installed import versions
from ..library_errors import is_network_error
from ..masking import masked
from ..plan import PruningPlan
from ..text.calibration import CalibrationConfig


logger = logging.get_logger(__name__)

RECORD = "hf_structprune"  # the key in config.json
TAGS = ["structured-pruning", "pruned", "hf_structprune"]
_HUB_TIMEOUT = 10.0
_SIZE = ("ratio_requested", "ratio", "layout", "parameters_before", "parameters_after")
IN_MEMORY = "in_memory"  # stands for what JSON cannot hold, beside the name of its type
# Options of loading that say where weights are read and put and how they are computed with, not which they are.
_HOW_NOT_WHAT = frozenset({
    "token", "use_auth_token", "cache_dir", "local_files_only", "force_download", "resume_download", "proxies",
    "user_agent", "device_map", "max_memory", "offload_folder", "offload_state_dict", "offload_buffers",
    "low_cpu_mem_usage", "tp_plan", "tp_size", "device_mesh", "distributed_config", "attn_implementation",
    "experts_implementation", "use_kernels", "allow_all_kernels", "kernel_config", "output_loading_info",
    "disable_mmap", "tqdm_class", "use_safetensors", "weights_only", "generation_config",
})  # fmt: skip
# Values that are as good as none.
_NO_OPTION = {"dtype": "auto", "trust_remote_code": False, "ignore_mismatched_sizes": False}


@dataclass(frozen=True)
class Origin:
    """The model that was pruned.

    Attributes:
        name: Hub id, or the name of a folder, never its path: the card is public.
        folder: The folder, while it is known.
        options: What has to be given to `from_pretrained` to load the same weights: `revision` (the commit on the
            Hub), `dtype`, `subfolder`, `gguf_file`, and whatever else was given. What JSON cannot hold is
            `{"in_memory": name of its type}`.
    """

    name: str
    on_hub: bool
    folder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """The name, as a link where it is one of the Hub."""
        return f"[{self.name}](https://huggingface.co/{self.name})" if self.on_hub else self.name

    @classmethod
    def of(cls, name: str | os.PathLike) -> Origin:
        """What was given to `from_pretrained`; a `ConfigurationError` if it is neither a folder nor a Hub id."""
        path = Path(name)
        if path.is_dir():
            return cls(path.absolute().name, False, path)
        try:
            validate_repo_id(str(name))
        except HFValidationError as error:
            raise ConfigurationError(f"`base_model` is {str(name)!r}: neither a folder nor a Hub id.") from error
        return cls(str(name), True)

    def with_options_of(self, recorded: Origin | None) -> Origin:
        """The same model under another name: loaded as recorded, but a commit is one of its own repository only."""
        options = {} if recorded is None else recorded.options
        same = recorded is not None and recorded.name == self.name
        return dataclasses.replace(self, options={k: v for k, v in options.items() if same or k != "revision"})


def origin_of(model: PreTrainedModel, options: Mapping[str, Any] | None = None) -> Origin | None:
    """Where a model was loaded from, with which options; `None` for one that was made in memory.

    The commit of a `revision` is looked up in the cache. Of a model that others have loaded only the dtype is known.
    """
    name = model.config._name_or_path
    if not name:
        return None
    try:
        origin = Origin.of(name)
    except ConfigurationError:  # a folder that is gone
        origin = Origin(Path(name).name, False)
    given = {"dtype": model.dtype} if options is None else options
    kept = {
        key: _written(key, value)
        for key, value in given.items()
        if key not in _HOW_NOT_WHAT and value not in (None, "", _NO_OPTION.get(key))
    }
    if origin.on_hub and options is not None:
        places = {key: options.get(key) for key in ("cache_dir", "revision")}
        file = "/".join(filter(None, [options.get("subfolder"), options.get("gguf_file") or "config.json"]))
        found = try_to_load_from_cache(name, file, **places)
        kept |= {"revision": Path(found).parts[-1 - len(Path(file).parts)]} if isinstance(found, str) else {}
    return dataclasses.replace(origin, options=kept)


def _written(key: str, value: Any) -> Any:
    """An option as JSON holds it; of a path the name only, since cards are public."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, os.PathLike):
        return Path(value).name
    if key != "state_dict" and isinstance(value, dict):
        return {str(name): _written("", part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_written("", part) for part in value]
    return value if isinstance(value, (str, int, float)) else {IN_MEMORY: type(value).__name__}


def public_config(config: PruningConfig) -> PruningConfig:
    """The configuration with the names of local files in place of their paths."""

    def public(given: str | list[str] | None) -> str | list[str] | None:
        if given is None or isinstance(given, str):
            return Path(given).name if given is not None and is_file(given) else given
        return [public(source) for source in given]

    changes = {"calibration": dataclasses.replace(config.calibration, dataset=public(config.calibration.dataset))}
    if isinstance(config, PruningConfig):  # others calibrate, too
        changes["vocabulary_text"] = public(config.vocabulary_text)
    return dataclasses.replace(config, **changes)


def sources_of(calibration: CalibrationConfig) -> list[str]:
    """Data sets and files that were calibrated on; empty for the sample of this package and for texts in memory."""
    dataset = calibration.dataset
    return [dataset] if isinstance(dataset, str) else list(dataset or [])


def is_file(source: str) -> bool:
    """Whether a calibration source is a file or folder here, and no data set of the Hub."""
    endings = (".txt", ".json", ".jsonl", ".parquet", ".csv")
    return source.endswith(endings) or can_only_be_a_path(source) or Path(source).exists()


def record(model: PreTrainedModel, origin: Origin | None, config: PruningConfig, plan: PruningPlan) -> None:
    """Writes into a pruned model what it is: into its configuration and the tags of its future card.

    Transformers saves both itself, so that this also travels with a plain `model.save_pretrained` or
    `model.push_to_hub`, through training and through merging adapters.
    """
    values = {name: getattr(plan, name) for name in _SIZE}
    values |= {"versions": versions(), "pruning_config": public_config(config).to_dict()}
    if origin is not None:
        base = {"base_model": origin.name, "base_model_on_hub": origin.on_hub, "base_model_options": origin.options}
        values = {**base, **values}
    setattr(model.config, RECORD, json.loads(masked(json.dumps(values))))
    model.add_model_tags(list(TAGS))


def read_origin(values: dict[str, Any]) -> Origin | None:
    """Where a checkpoint comes from, out of its record."""
    name = values.get("base_model")
    if name is None:
        return None
    return Origin(name, values.get("base_model_on_hub", False), None, values.get("base_model_options", {}))


def base_metadata(origin: Origin) -> dict[str, Any]:
    """Licence and language from the card of the base model; empty where no card can be read.

    A folder's README.md, or the card in the cache, or else on the Hub, if that answers at once: a download would try
    for long.
    """
    source = origin.name if origin.folder is None else origin.folder / "README.md"
    if not origin.on_hub and (origin.folder is None or not source.is_file()):
        return {}
    try:
        if origin.on_hub and not isinstance(try_to_load_from_cache(source, "README.md"), str):
            HfApi().model_info(source, timeout=_HUB_TIMEOUT)
        metadata = ModelCard.load(source, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and not is_network_error(error):
            raise
        logger.warning_once(f"The card of {origin.name} could not be read, so that its licence is unknown: {error}")
        return {}
    wanted = ("license", "license_name", "license_link", "language")
    return {key: value for key, value in metadata.items() if key in wanted and value}


# By version: family, words to show, and what the name of a derived model has to begin with.
_LLAMA = {
    "2": ("LLAMA 2", None, None),
    "3": ("Meta Llama 3", "Built with Meta Llama 3", "Llama 3"),
    **{version: (f"Llama {version}", "Built with Llama", "Llama") for version in ("3.1", "3.2", "3.3", "4")},
}


def attribution(metadata: dict[str, Any], name: str) -> list[str]:
    """The sentences that a licence wants in the card; Llama licences have a rule for the name of the pruned model."""
    names = " ".join(str(metadata.get(key) or "").lower() for key in ("license", "license_name"))
    if re.search(r"\bgemma", names):
        return [
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "https://ai.google.dev/gemma/terms. The files of this model are modified. Whoever passes it on passes "
            "on the terms and the restrictions of use in them."
        ]
    llama = re.search(r"\bllama-?(\d(?:\.\d)?)", names)
    if not llama or llama[1] not in _LLAMA:
        return []
    family, words, prefix = _LLAMA[llama[1]]
    licensed = f"{family.replace('LLAMA', 'Llama')} is licensed under the {family} Community License, Copyright (c)"
    licensed += " Meta Platforms, Inc. All Rights Reserved."
    if prefix is None:
        return [licensed]
    begins = name.rsplit("/", 1)[-1].replace("-", " ").lower().startswith(prefix.lower())
    rule = f'The licence asks that the name of a derived model begins with "{prefix}"'
    return [f"**{words}**", licensed, f"{rule}." if begins else f"{rule}: rename this one before you publish it."]
