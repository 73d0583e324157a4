"""The metadata of a model card, and what of a configuration may be public."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from ..config import PruningConfig
from ..evaluation.results import EvaluationResult
from ..files.writing import can_only_be_a_path
from ..plan import PruningPlan
from ..text.calibration_config import CalibrationConfig
from ..units.kinds import WIDTH_UNITS
from .benchmarks import model_index
from .origin import TAGS, Origin, base_metadata, is_file
from .recovery import dataset_names


# Of the Hub's values (finetune, quantized, merge, adapter), of which a card can have one: the one for weights derived
# from others in full precision, and the one that the Hub itself infers where weights are quantised.
RELATION, QUANTISED_RELATION = "finetune", "quantized"
QUANTISED_TAG = "quantized"
_SAMPLE = ["Salesforce/wikitext", "allenai/c4"]
# Metadata that is made anew each time; whatever else a card has is kept.
_MADE_ANEW = ("model-index", "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "datasets")


def make_metadata(
    name: str,
    config: PruningConfig,
    origin: Origin | None,
    result: EvaluationResult | None,
    known: dict[str, Any],
    *,
    base_first: bool = False,
    recovery: dict[str, Any] | None = None,
    uses_text: bool = True,
    quantised: bool = False,
    quantised_on: CalibrationConfig | None = None,
) -> ModelCardData:
    """The metadata of a card.

    Args:
        name: Hub id or folder of the pruned model.
        config: What it was pruned with.
        origin: What it was pruned from.
        result: What was measured on it, for `model-index`.
        known: Metadata of the card that this one replaces; what is not made anew here is kept, such as a licence or a
            language set by hand.
        base_first: Take licence and language from the base model even if the replaced card has others.
        recovery: The report of its recovery, whose data sets are named.
        uses_text: Whether calibration text was looked at, see `uses_text`.
        quantised: Whether its weights are quantised.
        quantised_on: The text that they were quantised with, if it took one.
    """
    kept = {key: value for key, value in known.items() if key not in _MADE_ANEW}
    base = base_metadata(origin) if origin is not None else {}
    used = [*(_datasets(config.calibration) if uses_text else ()), *_trained_on(recovery)]
    used += [] if quantised_on is None else _datasets(quantised_on)
    tags = [*TAGS, *([QUANTISED_TAG] if quantised else [])]
    fields: dict[str, Any] = {
        **({**kept, **base} if base_first else {**base, **kept}),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*tags, *(known.get("tags") or [])])),
        "datasets": list(dict.fromkeys([*used, *(known.get("datasets") or [])])) or None,
    }
    if origin is not None and origin.on_hub:
        fields |= {"base_model": origin.name, "base_model_relation": QUANTISED_RELATION if quantised else RELATION}
    entries = model_index(result) if result is not None else []
    if entries:
        fields |= {"model_name": name.rsplit("/", 1)[-1], "eval_results": entries}
    order = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "base_model")
    return ModelCardData(**{key: fields[key] for key in (*order, *fields) if key in fields})


def uses_text(config: PruningConfig, plan: PruningPlan) -> bool:
    """Whether calibration text was looked at: as recorded, or else as the configuration asks for."""
    from ..criteria import make_criterion

    if plan.calibrated is not None:
        return plan.calibrated
    criterion = make_criterion(config)
    by_text = config.compensation or config.allocation == "search"
    if config.kinds(WIDTH_UNITS):
        by_text |= criterion.needs_inputs or criterion.needs_gradients
    if config.chooses_depth(plan.ratio_requested):
        by_text |= config.depth_criterion != "magnitude"
    return by_text or ("hidden" in config.units and config.hidden_criterion != "magnitude")


def _sources(calibration: CalibrationConfig) -> list[str]:
    dataset = calibration.dataset
    return [dataset] if isinstance(dataset, str) else list(dataset or [])


def _datasets(calibration: CalibrationConfig) -> list[str]:
    """Data sets of the Hub that were calibrated on."""
    if calibration.fingerprint is not None:
        return []
    sources = _sources(calibration)
    hub = [source for source in sources if not is_file(source) and not can_only_be_a_path(source)]
    return hub if sources else list(_SAMPLE)


def _trained_on(recovery: dict[str, Any] | None) -> list[str]:
    """Data sets of the Hub that were trained on; the report names files without their folders, so without a slash."""
    names = [] if recovery is None else dataset_names(recovery)
    return [name for name in names if name.count("/") == 1 and not is_file(name)]


def calibration_in_words(calibration: CalibrationConfig) -> str:
    """A calibration text; of local files the name only, since the card is public."""
    size, sources = f"{calibration.num_samples} x {calibration.length} tokens", _sources(calibration)
    if calibration.fingerprint is not None:
        return f"{size}, given in memory (SHA-256 begins with `{calibration.fingerprint}`)"
    if not sources:
        return f"{size} of the sample of hf_structprune: half WikiText-2 (validation), half C4, English"
    hub = _datasets(calibration)
    names = [f"[{s}](https://huggingface.co/datasets/{s})" if s in hub else f"`{Path(s).name}`" for s in sources]
    which = "".join(
        f", {k} `{v}`" for k, v in (("configuration", calibration.name), ("split", calibration.split)) if v
    )
    return f"{size} of {', '.join(names)}{which if hub else ''}"
