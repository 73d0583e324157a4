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

from ..errors import CheckpointError, ConfigurationError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..files.folders import write_folder
from ..files.writing import write_text
from ..hub.card import CARD_NAME
from ..hub.carrying import STILL_TRUE, card_name, copy_files, is_pruned, or_say, read, write_card_from
from ..hub.contents import PRUNED_RESULTS_NAME
from ..hub.hand_text import generated_mark, is_ours
from ..hub.origin import TAGS
from ..hub.recovery import PICTURE_NAME, RECOVERY_NAME, card_section
from ..hub.snippets import loading


__all__ = ["PICTURE_NAME", "RECOVERY_NAME", "card_section", "save_recovered"]


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
    source = Path(source) if source is not None and is_pruned(Path(source)) else None
    _check(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = {"parameters": sum(p.numel() for p in model.parameters()), "bytes": size}
    previous = read(folder / CARD_NAME)

    def write(path: Path) -> None:
        model.save_pretrained(path)
        _restore_cache(path / "config.json", source)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        write_text(path / RECOVERY_NAME, json.dumps(_finite({**report, "weights": weights}), indent=1) + "\n")
        if picture is not None:
            or_say(lambda: picture(path / PICTURE_NAME), "The picture of the curve", folder)
        if source is None:
            _write_plain_card(path, card_name(folder, previous), previous, report)
            return
        _carry_over(source, path)
        write_card_from(source, path, folder, previous)

    write_folder(folder, write, size=size)


def _check(model: PreTrainedModel) -> None:
    from .dequantise import quantisation_of

    if quantisation_of(model) is not None or hasattr(model, "peft_config"):
        raise CheckpointError("The model is quantised or has adapters: save what `merge_adapter` makes of it.")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise CheckpointError(f"`{name}` has values that are not finite; the model was not saved to be used.")


def _carry_over(source: Path, path: Path) -> None:
    copy_files(source, path, STILL_TRUE)
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
    before = json.loads(read(source / "config.json") or "{}") if source is not None else {}
    config["use_cache"] = before.get("use_cache", True)
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _finite(value: Any) -> Any:
    """The value with `None` for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_plain_card(path: Path, name: str, previous: str, report: dict[str, Any]) -> None:
    """A card for a model that this package has not pruned: how to load it, and the report."""
    if previous.strip() and not is_ours(previous):
        return
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=[TAGS[-1]])
    picture = PICTURE_NAME if (path / PICTURE_NAME).is_file() else None
    per_layer = "per_layer_config" in json.loads(read(path / "config.json"))
    parts = [f"---\n{data.to_yaml()}\n---", generated_mark(name), f"# {name}", card_section(report, picture=picture)]
    parts.append("## How to load it")
    for sentence, code in loading(name, per_layer):
        parts += [sentence, f"```python\n{code}\n```"]
    write_text(path / CARD_NAME, "\n\n".join(parts) + "\n")
