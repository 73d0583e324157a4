"""Where a pruned model comes from: recorded in its configuration, and what the card of its base model says."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import logging

from ..configuration import PruningConfig
from ..errors import ConfigurationError
from ..plan import PruningPlan
from .network import is_network_error


logger = logging.get_logger(__name__)

# The key in config.json that holds the record.
RECORD = "hf_structprune"
TAGS = ["structured-pruning", "pruned", "hf_structprune"]
_HUB_TIMEOUT = 10.0
LIBRARIES = ("torch", "transformers")
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Origin:
    """The model that was pruned.

    Attributes:
        name: Hub id, or the name of a folder, never its path: the card is public.
        on_hub: Whether the name is a Hub id.
        folder: The folder, while it is known.
        options: What has to be given to `from_pretrained` to load the same weights: `revision` (the commit on the
            Hub), `dtype`, `gguf_file`, `trust_remote_code`.
    """

    name: str
    on_hub: bool
    folder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str | os.PathLike) -> Origin:
        """The model behind what was given to `from_pretrained`.

        Raises:
            ConfigurationError: It is neither a folder nor a Hub id.
        """
        path = Path(name)
        if path.is_dir():
            return cls(path.absolute().name, False, path)
        try:
            validate_repo_id(str(name))
        except HFValidationError as error:
            raise ConfigurationError(f"`base_model` is {str(name)!r}: neither a folder nor a Hub id.") from error
        return cls(str(name), True)


def origin_of(model: PreTrainedModel, **kwargs: Any) -> Origin | None:
    """Where a model was loaded from; `None` for one that was made in memory.

    Args:
        model: The model.
        kwargs: The options it was loaded with; the commit behind a `revision` is looked up in the cache.
    """
    name = model.config._name_or_path
    if not name:
        return None
    try:
        origin = Origin.of(name)
    except ConfigurationError:  # a folder that is gone
        origin = Origin(Path(name).name, False)
    options = {key: kwargs[key] for key in ("gguf_file", "trust_remote_code") if kwargs.get(key)}
    if kwargs.get("dtype", "auto") != "auto":
        options["dtype"] = str(kwargs["dtype"]).removeprefix("torch.")
    if origin.on_hub:
        places = {key: kwargs.get(key) for key in ("cache_dir", "revision")}
        file = try_to_load_from_cache(name, options.get("gguf_file", "config.json"), **places)
        options |= {"revision": Path(file).parent.name} if isinstance(file, str) else {}
    return dataclasses.replace(origin, options=options)


def public_config(config: PruningConfig) -> PruningConfig:
    """The configuration with the names of local files in place of their paths."""
    dataset = config.calibration.dataset
    names = [Path(s).name if is_file(s) else s for s in ([dataset] if isinstance(dataset, str) else dataset or [])]
    if not names:
        return config
    public = names if isinstance(dataset, list) else names[0]
    return dataclasses.replace(config, calibration=dataclasses.replace(config.calibration, dataset=public))


def is_file(source: str) -> bool:
    """Whether a calibration source is a file or folder here, and no data set of the Hub."""
    return Path(source).suffix in (".txt", ".json", ".jsonl", ".parquet", ".csv") or Path(source).exists()


def record(model: PreTrainedModel, origin: Origin | None, config: PruningConfig, plan: PruningPlan) -> None:
    """Writes into a pruned model what it is: into its configuration and the tags of its future card.

    Transformers saves both itself, so that this also travels with a plain `model.save_pretrained` or
    `model.push_to_hub`, through training and through merging adapters.
    """
    base: dict[str, Any] = {}
    if origin is not None:
        base = {"base_model": origin.name, "base_model_on_hub": origin.on_hub, "base_model_options": origin.options}
    size = ("ratio_requested", "ratio", "layout", "parameters_before", "parameters_after")
    values = {
        **base,
        **{name: getattr(plan, name) for name in size},
        "versions": versions(),
        "pruning_config": public_config(config).to_dict(),
    }
    setattr(model.config, RECORD, values)
    model.add_model_tags(list(TAGS))


def read_origin(values: dict[str, Any]) -> Origin | None:
    """Where a checkpoint comes from, out of its record."""
    name = values.get("base_model")
    if name is None:
        return None
    return Origin(name, values.get("base_model_on_hub", False), None, values.get("base_model_options", {}))


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that matter for what it computes."""
    from .. import __version__

    found = {"hf_structprune": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def base_metadata(origin: Origin) -> dict[str, Any]:
    """Licence and language from the card of the base model; empty where no card can be read.

    A folder's README.md, or the card on the Hub (in the cache when offline).
    """
    try:
        if origin.folder is not None:
            readme = origin.folder / "README.md"
            metadata = metadata_load(readme) if readme.is_file() else None
        else:
            metadata = _metadata_on_hub(origin.name) if origin.on_hub else None
    except (OSError, ValueError) as error:
        metadata = None
        logger.warning(f"The card of {origin.name} could not be read, so that its licence is unknown: {error}")
    except Exception as error:
        if not is_network_error(error):
            raise
        metadata = None
        logger.warning(f"The card of {origin.name} could not be read, so that its licence is unknown: {error}")
    return {key: value for key, value in (metadata or {}).items() if key in (*_LICENCE_KEYS, "language") and value}


def _metadata_on_hub(name: str) -> dict[str, Any]:
    """Metadata of a card in the cache, or else on the Hub, if that answers at once: a download would try for long."""
    if not isinstance(try_to_load_from_cache(name, "README.md"), str):
        HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    return ModelCard.load(name, ignore_metadata_errors=True).data.to_dict()
