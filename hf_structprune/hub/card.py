"""The model card of a checkpoint folder: every figure comes from the plan or from what was measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from ..configuration import CONFIG_NAME, PruningConfig
from ..errors import HubError
from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..evaluation.table import ResultTable
from ..files import write_text
from ..plan import PLAN_NAME, PruningPlan
from .benchmarks import EVAL_RESULTS, WRITTEN_BY_US, eval_results
from .citations import citations
from .hand_text import SECTIONS, generated_for, generated_mark, is_ours, read_sections, section
from .licences import attribution
from .metadata import make_metadata, text_in_words
from .metadata_rules import violations
from .origin import Origin, public_config, read_origin, read_record
from .snippets import (
    full_configuration,
    loading,
    making_in_python,
    making_on_the_command_line,
    quantising,
    recovering,
)
from .table import check_results, protocols, sides


logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
DENSE_RESULTS_NAME = "evaluation_results_dense.json"
_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"


def make_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    base_model: str | os.PathLike | None = None,
    previous: str | None = None,
    recorded: Origin | None = None,
) -> ModelCard:
    """The model card of a checkpoint that this package made.

    Reads `config.json`, `pruning_config.json`, `pruning_plan.json`, and if they are there
    `evaluation_results.json`, `evaluation_results_dense.json`, `pruned_widths.png` and `pictures/*.png`. A figure that
    is in none of them is not in the card.

    Args:
        folder: The checkpoint.
        name: Hub id under which it will be found, for the lines that load it. Default: that of the card in the folder,
            or the name of the folder.
        base_model: Hub id or folder of the model that was pruned. Default: what the card in the folder says, or what
            was recorded when it was pruned.
        previous: Text of the card this one replaces: its marked sections and metadata that are not ours are kept.
            Default: the `README.md` of the folder.
        recorded: Where the checkpoint comes from. Default: what was recorded in its `config.json`.

    Raises:
        HubError: The folder is no checkpoint of ours, or the metadata would be refused by the Hub.
        ConfigurationError: The results are those of another model.
    """
    folder = Path(folder)
    for needed in ("config.json", CONFIG_NAME, PLAN_NAME):
        if not (folder / needed).is_file():
            raise HubError(f"There is no {needed} in {folder}: it is no checkpoint that hf_structprune has pruned.")
    if previous is None:
        previous = _read(folder / CARD_NAME)
    config, plan, record = PruningConfig.load(folder), PruningPlan.load(folder), read_record(folder)
    result, dense = _results(folder / RESULTS_NAME), _results(folder / DENSE_RESULTS_NAME)
    check_results(plan, dense, result)
    known = _read_metadata(previous)
    name = name or _name(folder, previous)
    origin = _origin(base_model, known, recorded or read_origin(record))
    data = make_metadata(name, config, origin, result, known, base_first=base_model is not None)
    problems = violations(data.to_dict())
    if problems:
        raise HubError(f"The metadata of the card of {folder} is not valid: {'; '.join(problems)}.")
    values = _values(folder, name, config, plan, record, origin, result, dense, previous, data)
    card = ModelCard.from_template(data, template_path=str(_TEMPLATE), **values)
    card.text = "\n".join(line.rstrip() for line in card.text.strip().splitlines()) + "\n"
    return card


def write_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    base_model: str | os.PathLike | None = None,
    previous: str | None = None,
    recorded: Origin | None = None,
    overwrite: bool = False,
) -> Path | None:
    """Writes `README.md` and `.eval_results/*.yaml` into a checkpoint folder.

    A README.md that is not ours (neither generated here nor with marked sections) stays as it is, with a warning.

    Args:
        folder: The checkpoint.
        name: See `make_card`.
        base_model: See `make_card`.
        previous: See `make_card`.
        recorded: See `make_card`.
        overwrite: Replace a README.md that is not ours.

    Returns:
        The file, or `None` if it was left alone.
    """
    folder = Path(folder)
    previous = _read(folder / CARD_NAME) if previous is None else previous
    ours = not previous.strip() or is_ours(previous)
    card = make_card(folder, name=name, base_model=base_model, previous=previous if ours else "", recorded=recorded)
    _write_eval_results(folder)
    if not ours and not overwrite:
        logger.warning(f"The README.md of {folder.name} was not written by hf_structprune and stays as it is.")
        return None
    write_text(folder / CARD_NAME, str(card))
    return folder / CARD_NAME


def _read_metadata(card: str) -> dict[str, Any]:
    """The metadata of a card, empty if it has none."""
    if not card.lstrip().startswith("---"):
        return {}
    try:
        return ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # YAML errors are of many kinds
        raise HubError(f"The metadata at the top of the README.md cannot be read: {error}") from error


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _results(path: Path) -> EvaluationResult | None:
    return EvaluationResult.load(path) if path.is_file() else None


def _name(folder: Path, previous: str) -> str:
    earlier = generated_for(previous) or ""
    return earlier if "/" in earlier else folder.absolute().name


def _origin(base_model: Any, known: dict[str, Any], recorded: Origin | None) -> Origin | None:
    """What was pruned: as given, as the card says (where it may have been corrected by hand), or as recorded."""
    if base_model is not None:
        return Origin.of(base_model)
    stated = known.get("base_model")
    if isinstance(stated, str) and (recorded is None or stated != recorded.name):
        return Origin(stated, True)
    return recorded


def _values(
    folder: Path,
    name: str,
    config: PruningConfig,
    plan: PruningPlan,
    record: dict[str, Any],
    origin: Origin | None,
    result: EvaluationResult | None,
    dense: EvaluationResult | None,
    previous: str,
    data: ModelCardData,
) -> dict[str, Any]:
    """What the template says, apart from the metadata."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    per_layer = "per_layer_config" in content
    columns = sides(plan, dense, result)
    base = origin.name if origin is not None else "the base model"
    link = f"[{base}](https://huggingface.co/{base})" if origin is not None and origin.on_hub else base
    revision = origin.revision if origin is not None else None
    texts = read_sections(previous)
    libraries = record.get("versions", {})
    argument, public = origin.name if origin is not None else "BASE_MODEL", public_config(config)
    return {
        "mark": generated_mark(name),
        "title": name.rsplit("/", 1)[-1],
        "name": name,
        "summary": (
            f"A smaller version of {link}: structured pruning took {plan.ratio:.1%} of all its parameters "
            f"({plan.parameters_before:,} before, {plan.parameters_after:,} now). What is left is dense: no masks, no "
            "zeros."
        ),
        "introduction": section(SECTIONS[0], texts),
        "sections": [
            section(other, texts) for other in dict.fromkeys([*SECTIONS[1:], *texts]) if other != SECTIONS[0]
        ],
        "attribution": attribution(data.to_dict(), name),
        "table": ResultTable(columns).to_markdown().rstrip(),
        "files": [file for file, side in ((RESULTS_NAME, result), (DENSE_RESULTS_NAME, dense)) if side is not None],
        "protocols": protocols(*columns),
        "environment": _environment(dense, result),
        "pictures": [
            {"alt": p.stem.replace("_", " "), "path": p.relative_to(folder).as_posix()} for p in _pictures(folder)
        ],
        "loading": loading(name, per_layer),
        "per_layer": per_layer,
        "model_type": content.get("model_type"),
        "recovering": recovering(name, per_layer),
        "quantising": quantising(name, per_layer),
        "base_link": link,
        "base_name": base,
        "revision": revision,
        "asked": None if plan.ratio_requested is None else f"{plan.ratio_requested:.2%}",
        "got": f"{plan.ratio:.2%}",
        "layout": "per layer: widths differ between layers" if per_layer else "uniform: the same widths in all layers",
        "config": config,
        "calibration": text_in_words(config),
        "versions": ", ".join(f"{library} {number}" for library, number in libraries.items()),
        "notes": plan.notes,
        "in_python": making_in_python(argument, public, plan.ratio_requested, revision),
        "on_the_command_line": making_on_the_command_line(argument, public, plan.ratio_requested, revision),
        "configuration": full_configuration(public),
        "licence": _licence(data.to_dict(), link),
        "package_version": libraries.get("hf_structprune", ""),
        "citations": citations(config, _has_tasks(dense, result)),
    }


def _pictures(folder: Path) -> list[Path]:
    widths = folder / "pruned_widths.png"
    return ([widths] if widths.is_file() else []) + sorted((folder / "pictures").glob("*.png"))


def _has_tasks(*results: EvaluationResult | None) -> bool:
    return any(name.startswith("tasks/") for result in results if result for name in result.figures)


def _environment(*results: EvaluationResult | None) -> list[str]:
    """Where each side was measured: one line if both were measured alike."""
    lines: dict[str, list[str]] = {}
    for result in filter(None, results):
        line = _in_words(result.environment)
        if line:
            lines.setdefault(line, []).append(result.state)
    return [f"Measured on the {' and the '.join(states)} model with {line}." for line, states in lines.items()]


def _in_words(environment: dict[str, Any]) -> str:
    """`"AMD EPYC, 2 threads, torch 2.13.0, ..., 2026-01-31"`."""
    hardware = environment.get("hardware", {})
    words = [hardware.get("device"), f"{hardware['threads']} threads" if hardware.get("threads") else None]
    words += [f"{name} {number}" for name, number in environment.get("versions", {}).items()]
    return ", ".join(filter(None, [*words, (environment.get("date") or "").partition("T")[0]]))


def _licence(metadata: dict[str, Any], link: str) -> str:
    licence = metadata.get("license")
    if not licence:
        return (
            f"The licence of {link} could not be read, so that none is set here. This model is derived from it: its "
            "licence applies. Look it up before you use or publish this model."
        )
    words = metadata.get("license_name") or (licence if isinstance(licence, str) else ", ".join(licence))
    where = metadata.get("license_link")
    return (
        f"{f'[{words}]({where})' if where else f'`{words}`'}, the licence of {link}, which this model is derived from."
    )


def _write_eval_results(folder: Path) -> None:
    result = _results(folder / RESULTS_NAME)
    files = eval_results(result) if result is not None else {}
    for path in (folder / EVAL_RESULTS).glob("*.yaml"):
        if path.name not in files and path.read_text(encoding="utf-8").startswith(WRITTEN_BY_US):
            path.unlink()
    for name, content in files.items():
        write_text(folder / EVAL_RESULTS / name, content)
