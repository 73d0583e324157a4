"""`recover`: trains a pruned model with TRL and PEFT, watches itself while it does, and saves a plain checkpoint."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import logging

from ..errors import ConfigurationError
from ..files.writing import check_folder
from ..hub.checkpoint import check_card, check_own_files
from ..installed import need
from ..model.loading import load_config, load_tokenizer
from ..model.measuring import context_length
from .callback import LoraRecoveryCallback
from .configuration import DistillationConfig, RecoveryConfig
from .data import load_rows, prepare, public_sources
from .resume import (
    KeepNewest,
    fingerprint_of_rows,
    fingerprint_of_weights,
    in_order,
    newest_whole,
    refuse_other_settings,
    settings_of,
    step_of,
)
from .save import source_of
from .training import adapter_config, choose_precision, load_student, training_arguments, widen
from .weights import BEST_FOLDER


if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)

# Beside the recovered checkpoint: checkpoints to resume from and the best adapter.
TRAINING_SUFFIX = "-training"


@dataclass(frozen=True)
class RecoveryResult:
    """What `recover` did.

    Attributes:
        folder: The recovered checkpoint.
        report: What `recovery.json` in it says: the curve, the settings, what was trained on.
    """

    folder: Path
    report: dict[str, Any]

    @property
    def recovered(self) -> float | None:
        """The share of the lost log-perplexity that is back; `None` if the dense model is not known."""
        return self.report["recovered"]


def recover(
    model: str | os.PathLike | PreTrainedModel,
    dataset: Any,
    output_dir: str | os.PathLike,
    config: RecoveryConfig | None = None,
    *,
    tokenizer: Any = None,
    split: str = "train",
    dense: Any = None,
    teacher: Any = None,
    distillation: DistillationConfig | None = None,
    teacher_name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> RecoveryResult:
    """Trains a pruned checkpoint on some data and saves the recovered one: weights, tokenizer, curve and card.

    The perplexity of text that is not trained on is measured before, during and after training; the best weights are
    kept, also if these are the ones from before.

    Args:
        model: Folder or Hub id of the pruned checkpoint; or the model in memory, which is changed by the training.
        dataset: Rows of chats, instructions or plain text: see `data.load_rows`; a list mixes several sources.
        output_dir: Folder of the recovered checkpoint. Checkpoints of the training go to `<output_dir>-training`.
        config: How to train. Default: LoRA on the labels.
        tokenizer: Its tokenizer. Default: that of the checkpoint.
        split: Split of data sets that have several.
        dense: The model before pruning, to tell which share of the loss is back: a folder, a Hub id, a model, its
            perplexity on `config.text`, or a JSON with that perplexity. Default: the teacher, if there is one.
        teacher: What `method="distill"` learns from. Default: the model that the checkpoint records as its origin.
        distillation: How to distil.
        teacher_name: What the report calls the teacher. Default: its id, or the name of its folder.
        resume: Go on from the newest whole checkpoint of an interrupted training, which must have been begun with the
            same model, data and settings.
        overwrite: Replace what is in `output_dir`, and start a training that was interrupted anew.
        trust_remote_code: Run modelling code that comes with the models.

    Raises:
        ConfigurationError: The settings, the data and the model do not fit each other or those that the training was
            begun with, or there is something in the folders already.
        CheckpointError: A file of this package beside the pruned model is damaged.
        StructPruneError: A model or a data set cannot be read, or an extra is not installed.
    """
    config, distillation = config or RecoveryConfig(), distillation or DistillationConfig()
    named = isinstance(model, (str, os.PathLike))
    if not named and tokenizer is None:
        raise ConfigurationError("`model` is a model in memory: give its `tokenizer` too.")
    if not named and config.trained == "qlora":
        raise ConfigurationError("QLoRA loads the model in 4 or 8 bits: save it, and give the folder as `model`.")
    need("trl", "peft", extra="recover")
    from trl import SFTTrainer

    check_folder(output_dir)
    folder, training = Path(output_dir), training_folder(output_dir)
    check_folder(training)
    source = Path(model) if named else source_of(model)
    if source is not None:
        check_own_files(source)
    check_card(folder)
    checkpoint = _check_folders(folder, training, resume, overwrite)
    distilled = config.method == "distill"
    settings = settings_of(
        config, distillation if distilled else None, model=_name(model), dataset=public_sources(dataset), split=split,
        dense=dense if isinstance(dense, (int, float)) else _name(dense),
        teacher=_name(teacher) if distilled else None,
    )  # fmt: skip
    if checkpoint is not None:
        refuse_other_settings(checkpoint, settings)
    teacher = _find_teacher(model, teacher) if distilled else None
    rows = load_rows(dataset, split=split, max_samples=config.max_samples, seed=config.seed)
    tokenizer = tokenizer or load_tokenizer(model, trust_remote_code=trust_remote_code)
    student = load_student(model, config, trust_remote_code)
    prepared, data = prepare(
        rows, tokenizer, max_length=config.max_length, context=context_length(student),
        prompt_loss=config.prompt_loss, packing=config.packing, seed=config.seed,
        stops=_stopping_tokens(student),
    )  # fmt: skip
    settings |= {"training_rows": fingerprint_of_rows(prepared), "model_weights": fingerprint_of_weights(student)}
    if checkpoint is not None:
        refuse_other_settings(checkpoint, settings)
    about = {
        "configuration": config.to_public_dict(),
        "model": _name(model),
        "dataset": public_sources(dataset),
        "data": data.to_dict(),
    }
    trainer_class, more = SFTTrainer, {}
    if teacher is not None:
        from .distillation.teacher import load_teacher
        from .distillation.trainer import DistillationSFTTrainer

        about |= {"teacher": teacher_name or _name(teacher), "distillation": distillation.to_public_dict()}
        computed = distillation
        if distillation.teacher_dtype == "auto" and not isinstance(teacher, nn.Module):  # as the student
            computed = dataclasses.replace(distillation, teacher_dtype=choose_precision(config.precision))
        loaded = load_teacher(teacher, student, computed, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
        dense = loaded.model if dense is None or _same(dense, teacher) else dense
        trainer_class, more = DistillationSFTTrainer, {"teacher": loaded, "distillation": distillation}
    callback = LoraRecoveryCallback(
        dense, text=config.text, window=config.window, max_windows=config.max_windows,
        batch_size=config.micro_batch_size, evaluations=config.evaluations, target=config.target,
        patience=config.patience, output_dir=folder,
    )  # fmt: skip
    callback.about, callback.settings = about, settings
    trainer = trainer_class(
        student, training_arguments(config, training), train_dataset=prepared, processing_class=tokenizer,
        peft_config=adapter_config(config, student), callbacks=[callback, KeepNewest()], **more,
    )  # fmt: skip
    widen(trainer.model)
    _remove_steps(training, after=checkpoint)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        _say_how_to_go_on(training)
        raise
    return RecoveryResult(folder, callback.report)


def _stopping_tokens(model: PreTrainedModel) -> list[int]:
    given = getattr(model.generation_config, "eos_token_id", None)
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def training_folder(output_dir: str | os.PathLike) -> Path:
    """Where the checkpoints of the training go."""
    return Path(os.path.abspath(output_dir) + TRAINING_SUFFIX)


def _check_folders(folder: Path, training: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, if there is one; says which ones are passed over.

    Raises:
        ConfigurationError: There is something in the way, or nothing to resume.
    """
    if folder.is_dir() and any(folder.iterdir()) and not overwrite and not resume:
        raise ConfigurationError(f"{folder} is not empty; choose another `output_dir` or say `overwrite`.")
    whole, flaws = newest_whole(training)
    words = "; ".join(f"{checkpoint.name} is not whole: {what}" for checkpoint, what in flaws.items())
    if whole is None and resume:
        found = f" ({words})" if words else ""
        raise ConfigurationError(
            f"There is no checkpoint in {training} to resume from{found}; leave out `resume` to start anew."
        )
    if whole is not None and not resume and not overwrite:
        raise ConfigurationError(
            f"{training} holds a training that was interrupted; say `resume` to go on, or `overwrite` to start anew."
        )
    if words:
        logger.warning(f"{words}. " + (f"Going on from {whole.name}." if resume else "The training starts anew."))
    return whole if resume else None


def _remove_steps(training: Path, after: Path | None) -> None:
    """Removes the checkpoints of an earlier training, which must not be resumed as if they were of this one.

    Args:
        training: Where they are.
        after: The checkpoint that this training goes on from: then only what is newer goes.
    """
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()  # all have looked which of them is whole
    if state.is_main_process:
        first = -1 if after is None else step_of(after)
        stale = [path for path in in_order(training) if step_of(path) > first]
        for folder in (*stale, *([training / BEST_FOLDER] if after is None else [])):
            shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()


def _say_how_to_go_on(training: Path) -> None:
    whole, _ = newest_whole(training)
    if whole is None:
        logger.warning("Interrupted before the first checkpoint: there is nothing to go on from.")
    else:
        logger.warning(f"Interrupted: the same again with `resume` (--resume) goes on from step {step_of(whole)}.")


def _find_teacher(model: str | os.PathLike, teacher: Any) -> Any:
    """The teacher given, or else the model that was pruned, if the checkpoint says which and it can be found.

    Raises:
        ConfigurationError: It cannot.
    """
    if teacher is not None:
        return teacher
    from ..hub.origin import RECORD

    config = load_config(model) if isinstance(model, (str, os.PathLike)) else model.config
    recorded = getattr(config, RECORD, None) or {}
    if recorded.get("base_model") and recorded.get("base_model_on_hub"):
        return recorded["base_model"]
    raise ConfigurationError(
        f"`method` is 'distill', which needs the dense model, and {_name(model)} does not say where it is: give "
        "`teacher`."
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two models are the same object, folder or id."""
    named = isinstance(one, (str, os.PathLike)) and isinstance(other, (str, os.PathLike))
    return str(one) == str(other) if named else one is other


def _name(model: Any) -> str | None:
    if isinstance(model, (str, os.PathLike)):
        return Path(model).name if Path(model).exists() else str(model)
    return None if model is None else getattr(getattr(model, "config", None), "_name_or_path", None) or "a model"
