"""`save_recovered`: the recovered checkpoint, with what of the pruned one is still true, written all at once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel
from transformers.utils import logging

from ..checkpoint import write_folder
from ..configuration import CONFIG_NAME
from ..errors import CheckpointError, ConfigurationError, StructPruneError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..files import write_text
from ..hub.card import CARD_NAME, write_card
from ..hub.contents import DENSE_RESULTS_NAME, PRUNED_RESULTS_NAME, WIDTHS_NAME
from ..hub.hand_text import generated_for, generated_mark, is_ours
from ..hub.origin import TAGS
from ..hub.recovery import PICTURE_NAME, RECOVERY_NAME, card_section
from ..hub.snippets import loading
from ..plan import PLAN_NAME


logger = logging.get_logger(__name__)

__all__ = ["PICTURE_NAME", "RECOVERY_NAME", "card_section", "save_recovered"]

# What training does not change: how it was pruned, how wide it is, what the dense model could do.
_STILL_TRUE = (CONFIG_NAME, PLAN_NAME, DENSE_RESULTS_NAME, WIDTHS_NAME)


def save_recovered(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    *,
    source: Path | None,
    report: dict[str, Any],
    picture: Callable[[Path], None] | None = None,
) -> None:
    """Writes a recovered model as a plain checkpoint, all at once or not at all.

    From the folder of the pruned model come its configuration of pruning, plan and picture of the widths, the results
    of the dense model, and its own results under `evaluation_results_pruned.json`. Nothing that was measured on other
    weights is passed off as measured on these. The card keeps the marked texts and the metadata of the card that it
    replaces, or else of the pruned model's.

    Args:
        model: A plain model, see `merge_adapter`.
        tokenizer: Its tokenizer; `None` if there is none.
        folder: Where the files go; other files in it stay, an earlier checkpoint in it goes.
        source: Folder of the pruned checkpoint; `None`, or a folder that this package has not made, gives a card that
            says no more than the report does.
        report: The content of `recovery.json`. Parameters and bytes of the model are added under `weights`.
        picture: Draws the curve into the file that it is given.

    Raises:
        CheckpointError: The model is quantised or has adapters, its weights are not finite, or writing failed.
    """
    folder = Path(folder)
    source = Path(source) if source is not None and _is_ours(Path(source)) else None
    _check(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": size}
    previous = _read(folder / CARD_NAME)

    def write(path: Path) -> None:
        model.save_pretrained(path)
        _restore_cache(path / "config.json", source)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_text(path / RECOVERY_NAME, json.dumps(_finite({**report, "weights": weights}), indent=1) + "\n")
        if picture is not None:
            _or_say(lambda: picture(path / PICTURE_NAME), "The picture of the curve", folder)
        if source is None:
            _write_plain_card(path, _name(folder, previous), previous, report)
            return
        _carry_over(source, path)
        theirs = _read(source / CARD_NAME)
        replaced = previous or (theirs if is_ours(theirs) else "")
        _or_say(lambda: write_card(path, name=_name(folder, previous), previous=replaced), "The card", folder)

    write_folder(folder, write, size=size)


def _or_say(write: Callable[[], Any], what: str, folder: Path) -> None:
    """Writes what can be made again later; if that fails, the weights of a long training are saved all the same."""
    try:
        write()
    except StructPruneError as error:
        logger.warning(f"{what} was not written: {error} `hf-structprune card {folder.name}` makes the card again.")


def _check(model: PreTrainedModel) -> None:
    from .dequantise import quantisation_of

    if quantisation_of(model) is not None or hasattr(model, "peft_config"):
        raise CheckpointError("The model is quantised or has adapters: save what `merge_adapter` makes of it.")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"`{name}` has values that are not finite; the model was not saved to be used.")


def _is_ours(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (CONFIG_NAME, PLAN_NAME))


def _carry_over(source: Path, path: Path) -> None:
    for name in _STILL_TRUE:
        if (source / name).is_file():
            shutil.copyfile(source / name, path / name)
    # A model that was recovered once has the results of its pruned state under their second name already.
    for name in (PRUNED_RESULTS_NAME, RESULTS_NAME):
        if (source / name).is_file() and _state(source / name) == "pruned":
            shutil.copyfile(source / name, path / PRUNED_RESULTS_NAME)
            return


def _state(results: Path) -> str | None:
    try:
        return EvaluationResult.load(results).state
    except ConfigurationError:
        return None


def _restore_cache(path: Path, source: Path | None) -> None:
    """Trainer switches the cache off in the configuration, where it would stay off and make generation slow."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("use_cache") is not False:
        return
    before = json.loads(_read(source / "config.json") or "{}") if source is not None else {}
    config["use_cache"] = before.get("use_cache", True)
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _finite(value: Any) -> Any:
    """The value with `None` for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name(folder: Path, previous: str) -> str:
    """The Hub id that the card in the folder was written for, or the folder's name; never that of the pruned model."""
    earlier = generated_for(previous) or ""
    return earlier if "/" in earlier else folder.absolute().name


def _write_plain_card(path: Path, name: str, previous: str, report: dict[str, Any]) -> None:
    """A card for a model that this package has not pruned: how to load it, and the report."""
    if previous.strip() and not is_ours(previous):
        return
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=[TAGS[-1]])
    picture = PICTURE_NAME if (path / PICTURE_NAME).is_file() else None
    per_layer = "per_layer_config" in json.loads(_read(path / "config.json"))
    parts = [f"---\n{data.to_yaml()}\n---", generated_mark(name), f"# {name}", card_section(report, picture=picture)]
    parts.append("## How to load it")
    for sentence, code in loading(name, per_layer):
        parts += [sentence, f"```python\n{code}\n```"]
    write_text(path / CARD_NAME, "\n\n".join(parts) + "\n")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
