"""The model card of a checkpoint folder: every figure comes from the plan or from what was measured."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import logging

from ..evaluation.results import RESULTS_NAME, EvaluationResult
from ..evaluation.table import ResultTable
from ..files.writing import write_text
from .contents import CARD_NAME, Contents, protocols, read_metadata, read_own, read_text
from .metadata import EVAL_RESULTS, WRITTEN_BY_US, eval_results, make_metadata
from .origin import Origin, attribution, licence_in_words, public_config, read_origin
from .words import (
    calibration_in_words,
    citations,
    libraries,
    loading_value,
    making_in_python,
    making_on_the_command_line,
    quantisation_section,
    quantisation_summary,
    recovery_section,
    recovery_summary,
    render,
    uses_text,
    what_went,
)


logger = logging.get_logger(__name__)


def make_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    base_model: str | os.PathLike | None = None,
    previous: str | None = None,
    recorded: Origin | None = None,
) -> ModelCard:
    """The model card of a checkpoint that this package made.

    Reads `config.json`, `pruning_config.json`, `pruning_plan.json`, and if they are there `evaluation_results.json`,
    `evaluation_results_dense.json`, `pruned_widths.png` and `pictures/*.png`, of a recovered model `recovery.json`,
    `recovery.png` and `evaluation_results_pruned.json`, and of a quantised one `quantization.json` and the results of
    the states before. A figure that is in none of them is not in the card.

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
        HubError: The folder is no checkpoint of ours.
        CheckpointError: A file of this package in it is damaged.
        ConfigurationError: The results are those of another model.
    """
    contents = Contents.read(Path(folder))
    if previous is None:
        previous = read_text(contents.folder / CARD_NAME)
    known = read_metadata(previous)
    name = name or card_name(contents.folder, previous)
    origin = _origin(base_model, known, recorded or read_origin(contents.record))
    data = make_metadata(name, contents, origin, known, base_first=base_model is not None)
    link = "the base model" if origin is None else origin.link
    first, *others = dict.fromkeys([*SECTIONS, *read_sections(previous)])
    values = {
        **_about(name, contents, link, data.to_dict()),
        **_making(contents, origin, link),
        **_measured(contents),
        "introduction": section(first, read_sections(previous)),
        "sections": [section(name, read_sections(previous)) for name in others],
    }
    return ModelCard(render("model_card", card_data=data.to_yaml(), **values) + "\n")


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
        name, base_model, previous, recorded: See `make_card`.
        overwrite: Replace a README.md that is not ours.

    Returns:
        The file, or `None` if it was left alone.
    """
    folder = Path(folder)
    previous = read_text(folder / CARD_NAME) if previous is None else previous
    ours = not previous.strip() or is_ours(previous)
    card = make_card(folder, name=name, base_model=base_model, previous=previous if ours else "", recorded=recorded)
    _write_eval_results(folder)
    if not ours and not overwrite:
        logger.warning(f"The README.md of {folder.name} was not written by hf_structprune and stays as it is.")
        return None
    write_text(folder / CARD_NAME, str(card))
    return folder / CARD_NAME


def card_name(folder: Path, previous: str) -> str:
    """The Hub id that the card in a folder was written for, or else the folder's name."""
    earlier = generated_for(previous) or ""
    return earlier if "/" in earlier else folder.absolute().name


def _origin(base_model: Any, known: dict[str, Any], recorded: Origin | None) -> Origin | None:
    """What was pruned: as given, as the card says (where it may have been corrected by hand), or as recorded."""
    if base_model is not None:
        return Origin.of(base_model).with_options_of(recorded)
    stated = known.get("base_model")
    if isinstance(stated, str) and (recorded is None or stated != recorded.name):
        return Origin(stated, True).with_options_of(recorded)
    return recorded


def _about(name: str, contents: Contents, link: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """What it is and how to use it."""
    recovery, quantization = contents.recovery, contents.quantization
    trained = " It was trained afterwards." if contents.was_recovered else ""
    if recovery is not None:
        trained = f" {recovery_summary(recovery)}"
    trained += "" if quantization is None else f" {quantisation_summary(quantization)}"
    return {
        "mark": generated_mark(name),
        "title": name.rsplit("/", 1)[-1],
        "name": name,
        "summary": f"{_size(contents, link)} What is left is dense: no masks, no zeros.{trained}",
        "attribution": attribution(metadata, name),
        "libraries": [] if quantization is None else libraries(quantization),
        "per_layer": contents.per_layer,
        "sees": contents.sees,
        "model_type": contents.model_config.get("model_type"),
        "state": contents.state,
        "recovery": "" if recovery is None else recovery_section(recovery, picture=contents.recovery_picture),
        "quantisation": "" if quantization is None else quantisation_section(quantization),
        "licence": licence_in_words(metadata, link),
    }


def _size(contents: Contents, link: str) -> str:
    """What it is a version of, and how large it is by now: training may have made it larger again."""
    plan, now = contents.plan, contents.weights_of(contents.state)[0]
    before, pruned = plan.parameters_before, plan.parameters_after
    kind = "A smaller" if now < before else "A larger" if now > before else "A"
    took = f"{kind} version of {link}: structured pruning took {plan.ratio:.1%} of all its parameters"
    if now == pruned:
        return f"{took} ({before:,} before, {now:,} now)."
    more = f"{abs(now / before - 1):.1%} {'more' if now > before else 'fewer'} than"
    change = "as many as" if now == before else more
    return f"{took} ({before:,} before, {pruned:,} after it). It has {now:,} now, {change} before pruning."


def _making(contents: Contents, origin: Origin | None, link: str) -> dict[str, Any]:
    """How it was made."""
    config, plan = contents.config, contents.plan
    tasks = any(name.startswith("tasks/") for side in contents.results for name in side.figures)
    used_text = uses_text(config, plan)
    public, options = public_config(config), origin.options if origin is not None else {}
    code = (origin.name if origin is not None else "BASE_MODEL", public, plan, options)
    return {
        "base_name": origin.name if origin is not None else link,
        "base_link": link,
        "loaded": {name: loading_value(value).strip('"') for name, value in options.items()},
        "plan": plan,
        "config": config,
        "what": what_went(config, plan),
        "calibration": calibration_in_words(config.calibration) if used_text else "none",
        "refitted": config.compensation and used_text and bool(plan.groups or plan.hidden or config.error_correction),
        "versions": contents.record.get("versions", {}),
        "in_python": making_in_python(*code),
        "on_the_command_line": making_on_the_command_line(*code),
        "configuration": json.dumps(public.to_dict(), indent=2),
        "citations": citations(config, plan, tasks),
    }


def _measured(contents: Contents) -> dict[str, Any]:
    """The table and what belongs to it."""
    columns = contents.columns()
    return {
        "table": ResultTable(columns).to_markdown().rstrip(),
        "files": contents.results_files,
        "protocols": protocols(columns),
        "environment": _environment(contents.results),
        "pictures": [{"alt": path.stem.replace("_", " "), "path": path.as_posix()} for path in contents.pictures],
        "samples": contents.samples,
    }


def _environment(results: list[EvaluationResult]) -> list[str]:
    """Where each side was measured, such as `"AMD EPYC, 2 threads, torch 2.13.0, 2026-01-31"`: equal ones once."""
    lines: dict[str, list[str]] = {}
    for result in results:
        about, hardware = result.environment, result.environment.get("hardware", {})
        words = [hardware.get("device"), f"{hardware['threads']} threads" if hardware.get("threads") else None]
        words += [f"{name} {number}" for name, number in about.get("versions", {}).items()]
        line = ", ".join(filter(None, [*words, (about.get("date") or "").partition("T")[0]]))
        if line:
            lines.setdefault(line, []).append(result.state)
    return [f"Measured on the {' and the '.join(states)} model with {line}." for line, states in lines.items()]


def _write_eval_results(folder: Path) -> None:
    result = read_own(folder / RESULTS_NAME)
    files = eval_results(result) if result is not None else {}
    for path in (folder / EVAL_RESULTS).glob("*.yaml"):
        if path.name not in files and path.read_text(encoding="utf-8").startswith(WRITTEN_BY_US):
            path.unlink()
    for name, content in files.items():
        write_text(folder / EVAL_RESULTS / name, content)


# Text that people put into a generated card stands between markers and survives the next generation.
SECTIONS = ("introduction", "notes")
_SECTION = re.compile(r"<!-- your text: ([\w-]+) -->\n?(.*?)\n?<!-- end of your text: \1 -->", re.DOTALL)
_GENERATED = re.compile(r"<!-- Generated by hf_structprune for (.+?)\. ")


def generated_mark(name: str) -> str:
    """The comment that says that a card is ours, and what to do with it."""
    return (
        f'<!-- Generated by hf_structprune for {name}. Write between the lines marked "your text": what stands there '
        "is kept, all else is written anew. -->"
    )


def generated_for(card: str) -> str | None:
    """The name that a card of ours was written for; `None` if it is not ours."""
    found = _GENERATED.search(card)
    return found and found[1]


def is_ours(card: str) -> bool:
    """Whether a card may be written anew: it was generated, or has marked sections that will be kept."""
    return generated_for(card) is not None or bool(read_sections(card))


def read_sections(card: str) -> dict[str, str]:
    """The marked texts of a card by name."""
    return {name: text for name, text in _SECTION.findall(card)}


def section(name: str, texts: dict[str, str]) -> str:
    """A marked section with its text."""
    text = texts.get(name, "")
    return f"<!-- your text: {name} -->\n{text}{chr(10) if text else ''}<!-- end of your text: {name} -->"
