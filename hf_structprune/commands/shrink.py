"""`hf-structprune shrink`: a smaller model within a time that is given, by one recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigurationError
from ..hardware import cpu_has_bf16, has_accelerator, memory_in_all
from ..hub.words import RECOVERY_NAME
from ..model.loading import load_config, load_tokenizer
from ..recovery.configuration import RecoveryConfig
from ..recovery.data import without_shares
from ..recovery.recovering import newest_whole, training_folder
from ..text.calibration import PACKAGED
from .arguments import parse
from .cli import check_output
from .models import find_model, load_shapes
from .options import ModelArguments, ShrinkArguments
from .recipe import Recipe
from .run import run_recipe


MAX_WINDOWS = 6  # of the packaged text
LABEL_WEIGHT = 0.3  # see docs/recover.md
CALIBRATION = {"num_samples": 128}  # half of the default: the time is better spent on the training
QUESTIONS = 200  # that it is calibrated on, where some are asked for
A_MINUTE = 25  # questions for each, where nothing says what a model that chats is for
# Measuring in between must not take the time away: 3 times 4,096 tokens.
TRAINING = {"prompt_loss": True, "evaluations": 3, "max_windows": 8}
TRAINED_BYTES = 18  # of a parameter: 4 of weight, gradient and each moment, and 2 of the dense model


def shrink_command(argv: Sequence[str]) -> None:
    """Prune MODEL, train it to predict what the dense model does, measure all and write the card, within a time."""
    (options,) = parse(argv, "shrink", shrink_command.__doc__, ShrinkArguments)
    folder = Path(options.output_dir)
    if not (folder / RECOVERY_NAME).is_file() and newest_whole(training_folder(folder))[0] is None:
        check_output(options.output_dir, options.overwrite)
    known = context_of(options.model), has_room(options.model), is_asked(options.model)
    content = recipe_of(options, *known)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if options.dry_run:
        print(text)
    run_recipe(Recipe.from_dict(content, text), again=options.overwrite, dry_run=options.dry_run)


def recipe_of(
    options: ShrinkArguments, context: int | None = None, full: bool = False, chats: bool = False
) -> dict[str, Any]:
    """The recipe that does it, as a file of `hf-structprune run` would say it, for a model of this context.

    With `full` all weights are trained. Labels count where there is a data set: what the dense model writes has none
    that it does not say better itself. A model that `chats` makes up questions where there is none: answers go before
    perplexity does, and little text asks for them.
    """
    recover = {"output_dir": options.output_dir, **distilling(context), **TRAINING}
    if full:
        recover["weights"] = "full"
    distillation = {"label_weight": LABEL_WEIGHT} if options.dataset else {}
    questions = options.dense_questions
    if questions is None:
        questions = 0 if options.dataset or not chats else round(A_MINUTE * options.minutes)
    if questions:
        distillation["dense_questions"] = questions
    if options.dataset:
        recover["dataset"] = list(options.dataset)
    if distillation:
        recover["distillation"] = distillation
    # Training all layers together brings back more than one after the other.
    prune = {"ratio": options.ratio, "reconstruct": False, "calibration": dict(CALIBRATION)}
    if questions:  # of the seed of the training, which finds them there
        prune["calibration"] |= {"dense_questions": min(questions, QUESTIONS), "seed": RecoveryConfig().seed}
    if options.dataset:  # half of it is text of the kinds that the model is for
        prune["calibration"]["dataset"] = [*without_shares(list(options.dataset)), PACKAGED]
    if options.layout == "per_layer":
        prune |= {"layout": "per_layer", "allocation": "global"}
    if (options.vocabulary_size is None) != (options.vocabulary_text is None):
        raise ConfigurationError(
            "`--vocabulary-size` says how many tokens stay, `--vocabulary-text` in what text they are counted: give "
            "both."
        )
    if options.vocabulary_size is not None:
        prune |= {"units": "auto", "keep": {"vocabulary": options.vocabulary_size}}
        prune["vocabulary_text"] = list(options.vocabulary_text)
    return {
        "model": loading(options.model),
        "output_dir": f"{options.output_dir.rstrip('/')}-pruned",
        "minutes": options.minutes,
        "prune": prune,
        "recover": recover,
        "evaluate": {"max_windows": MAX_WINDOWS, "efficiency": False},
    }


def has_room(model: str) -> bool:
    """Whether half of the memory is enough to train all weights: float32, gradient, two moments, the dense model."""
    return TRAINED_BYTES * load_shapes(ModelArguments(model)).model.num_parameters() < memory_in_all() / 2


def context_of(model: str) -> int | None:
    """Tokens that a model of the Hub or of a folder has positions for, if it says so."""
    config = load_config(find_model(model).model).get_text_config()
    return getattr(config, "max_position_embeddings", None)


def is_asked(model: str) -> bool:
    """Whether a model of the Hub or of a folder chats: its tokenizer has a template."""
    return bool(getattr(load_tokenizer(find_model(model).model), "chat_template", None))


def loading(model: str) -> dict[str, str]:
    """The section `model`: in bfloat16 a CPU without instructions for it is five times slower."""
    return {"model": model, "dtype": "auto" if has_accelerator() or cpu_has_bf16() else "fp32"}


def distilling(context: int | None) -> dict[str, Any]:
    """The section `recover`: distillation without a data set, of sequences that a model of this context takes."""
    short = context is not None and context < RecoveryConfig().max_length
    return {"method": "distill", **({"max_length": context} if short else {})}
