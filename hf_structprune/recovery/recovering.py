"""`recover`: trains a pruned model with TRL and PEFT, watches itself while it does, and saves a plain checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import LogRecord, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.trainer_utils import sort_checkpoints
from transformers.utils import logging

from .. import hardware
from ..errors import CheckpointError, ConfigurationError
from ..evaluation.comparison import fingerprint
from ..evaluation.perplexity import SAMPLE
from ..evaluation.results import model_fingerprint
from ..files.reading import damage, first_damage, read_json
from ..files.writing import check_folder
from ..hardware import DTYPES
from ..installed import need
from ..model.loading import load_config, load_model, load_tokenizer
from ..model.measuring import context_length
from .bar import TrainingBar
from .callback import STATE_NAME, LoraRecoveryCallback
from .configuration import DistillationConfig, RecoveryConfig
from .data import load_rows, prepare, public_sources
from .hold_out import hold_out
from .learning_rate import peak_learning_rate
from .own_answers import with_answers
from .own_questions import with_questions
from .own_text import own_rows
from .save import check_place, folder_of
from .weights import BEST_FOLDER


if TYPE_CHECKING:
    from peft import LoraConfig
    from trl import SFTConfig

logger = logging.get_logger(__name__)

TRAINING_SUFFIX = "-training"  # beside the recovered checkpoint: checkpoints to resume from, and the best adapter
# Options that may change on the way: they are no part of what is learned.
_FREE = ("report_to", "save_steps", "gradient_checkpointing", "minutes")
WRITING = 0.2  # of `minutes`, before them, in which the dense model writes at most
_NO_END = 10_000  # passes over the data, where time is what ends a training
ALL_LINEAR = "all-linear"  # what PEFT calls every Linear but the head
_SAVED_SHARE = 0.1  # of the training, between checkpoints


@dataclass(frozen=True)
class RecoveryResult:
    """The folder of a recovered checkpoint, and what `recovery.json` in it says: curve, settings, data."""

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
    until: float | None = None,
) -> RecoveryResult:
    """Trains a pruned checkpoint on some data and saves the recovered one: weights, tokenizer, curve and card.

    The perplexity of text that is not trained on is measured before, during and after training; the best weights are
    kept, also if these are the ones from before.

    Args:
        model: Folder or Hub id of the pruned checkpoint; or the model in memory, which is changed by the training.
        dataset: Rows of chats, instructions or plain text: see `data.load_rows`; a list mixes several sources. `None`
            distils on what the pruning was calibrated on and what the dense model writes, see `own_text`.
        output_dir: Folder of the recovered checkpoint. Checkpoints of the training go to `<output_dir>-training`.
        config: How to train. Default: LoRA on the labels.
        tokenizer: Its tokenizer. Default: that of the checkpoint.
        split: Split of data sets that have several.
        dense: The model before pruning, to tell which share of the loss is back: a folder, a Hub id, a model, its
            perplexity on `config.text`, or a JSON with that perplexity. Default: the teacher, if there is one.
        teacher: What `method="distill"` learns from. Default: `dense`, if that is a model, else the one that the
            checkpoint records as its origin.
        distillation: How to distil.
        teacher_name: What the report calls the teacher. Default: its id, or the name of its folder.
        resume: Go on from the newest whole checkpoint of an interrupted training, which must have been begun with the
            same model, data and settings.
        overwrite: Replace what is in `output_dir`, and start a training that was interrupted anew.
        trust_remote_code: Run modelling code that comes with the models.
        until: With `config.minutes`: when they have to be over, by `time.monotonic`. What comes before the first step
            is taken from them then.

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
    if dataset is None and config.method != "distill":
        raise ConfigurationError(
            f"There is no data set to train on, and `method` is {config.method!r}: give one, or choose 'distill', "
            "which can do with what the dense model writes."
        )
    _check_distillation(config, distillation, dataset)
    need("trl", "peft", extra="recover")
    from trl import SFTTrainer

    from .packing import PackedRows, collator_of

    check_folder(output_dir)  # before a path is made of it: an empty name would be the working directory
    folder, training = Path(output_dir), training_folder(output_dir)
    check_place(folder, Path(model) if named else folder_of(model))
    check_folder(training)
    checkpoint = _check_folders(folder, training, resume, overwrite)
    distilled = config.method == "distill"
    settings = settings_of(
        config, distillation if distilled else None, model=_name(model),
        dataset=[] if dataset is None else public_sources(dataset), split=split,
        dense=dense if isinstance(dense, (int, float)) else _name(dense),
        teacher=_name(teacher) if distilled else None,
    )  # fmt: skip
    teacher = _find_teacher(model, teacher, dense) if distilled else None
    drawn = {"split": split, "max_samples": config.max_samples, "seed": config.seed}
    rows = None if dataset is None else load_rows(dataset, **drawn)
    tokenizer = tokenizer or load_tokenizer(model, trust_remote_code=trust_remote_code)
    student = load_student(model, config, trust_remote_code)
    held_out, loaded = None, None
    if rows is not None and tokenizer is not None and config.text is None and not _is_perplexity(dense):
        windows = {"window": config.window, "windows": config.max_windows}
        rows, held_out = hold_out(rows, tokenizer, **windows, seed=config.seed)
    if teacher is not None:
        from .distillation.dual_space import load_dual_space_teacher
        from .distillation.teacher import load_teacher

        computed = distillation
        if distillation.teacher_dtype == "auto" and not isinstance(teacher, nn.Module):  # as the student
            computed = dataclasses.replace(distillation, teacher_dtype=choose_precision(config.precision))
        load = partial(load_dual_space_teacher, seed=config.seed) if distillation.dual_space else load_teacher
        loaded = load(teacher, student, computed, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    given = config
    if config.trained == "full" and config.train_embeddings is None:  # tokens that went are spelled by others now
        config = dataclasses.replace(config, train_embeddings=distillation.dual_space or loaded.tokens is not None)
    config = dataclasses.replace(config, learning_rate=peak_learning_rate(config, student))
    settings["learning_rate"] = config.learning_rate
    if config.train_embeddings is False:
        hold_embeddings(student)
    if loaded is not None and (rows is None or distillation.dense_answers or distillation.dense_questions):
        loaded.to(hardware.process_state().device)
        names = not isinstance(teacher, nn.Module)
        theirs = (load_tokenizer(teacher, trust_remote_code=trust_remote_code) if names else None) or tokenizer
        limits = {  # what is resumed goes on with the text that it was begun with
            "length": config.max_length, "seed": config.seed,
            "seconds": None if config.minutes is None else WRITING * 60 * config.minutes * (checkpoint is None),
        }  # fmt: skip
        if rows is None:
            where = model if named else folder_of(model)
            rows = load_rows(own_rows(loaded.model, theirs, where, distillation.generated_tokens, **limits), **drawn)
        elif distillation.dense_answers:
            rows = with_answers(rows, loaded.model, theirs, distillation.dense_answers, **limits)
        if distillation.dense_questions:
            del limits["length"]
            rows = with_questions(rows, loaded.model, theirs, distillation.dense_questions, **limits)
    stops = getattr(student.generation_config, "eos_token_id", None) or []
    collator = collator_of(student, tokenizer.pad_token_id or 0) if config.packing else None
    config = dataclasses.replace(config, packing=collator is not None)
    in_rows = isinstance(collator, PackedRows)
    prepared, data = prepare(
        rows, tokenizer, max_length=config.max_length, context=context_length(student),
        prompt_loss=config.prompt_loss, packing=config.packing, seed=config.seed,
        stops=[stops] if isinstance(stops, int) else stops,
    )  # fmt: skip
    batches = prepared.select_columns(["input_ids", "labels"]).iter(1000)
    settings["training_rows"] = f"{len(prepared):,} sequences, {fingerprint(map(json.dumps, batches))}"
    settings["model_weights"] = model_fingerprint(student)
    if checkpoint is not None:
        refuse_other_settings(checkpoint, settings)
    about = {
        "configuration": given.to_public_dict(), "model": _name(model), "dataset": settings["dataset"],
        "data": dataclasses.asdict(data),
    }  # fmt: skip
    trainer_class, more = SFTTrainer, {}
    if loaded is not None:
        from .distillation.trainer import DistillationSFTTrainer

        about |= {"teacher": teacher_name or _name(teacher), "distillation": distillation.to_public_dict()}
        if dense in (None, teacher):  # losses of other tokens are not compared
            dense = loaded.model if loaded.tokens is None else None
        trainer_class, more = DistillationSFTTrainer, {"teacher": loaded, "distillation": distillation}
    callback = LoraRecoveryCallback(
        dense, text=held_out or config.text or SAMPLE, window=config.window, max_windows=config.max_windows,
        batch_size=config.micro_batch_size, evaluations=config.evaluations, target=config.target,
        patience=config.patience, back_off=True, minutes=config.minutes, until=until, output_dir=folder,
    )  # fmt: skip
    callback.about, callback.settings = about, settings
    if in_rows:
        more["data_collator"] = collator
    with _without_advice():
        trainer = trainer_class(
            student, training_arguments(config, training, in_rows), train_dataset=prepared, processing_class=tokenizer,
            peft_config=adapter_config(config, student), callbacks=[callback], **more,
        )  # fmt: skip
    TrainingBar.put_into(trainer, callback.limit)
    widen(trainer.model)
    _remove_others(training, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyboardInterrupt:
        whole, _ = newest_whole(training)
        if whole is None:
            logger.warning("Interrupted before the first checkpoint: there is nothing to go on from.")
        else:
            step = whole.name.rpartition("-")[2]
            logger.warning(f"Interrupted: the same again with `resume` (--resume) goes on from step {step}.")
        raise
    logger.info(
        f"Checkpoints of the training are left in {training} ({_megabytes(training)}): only to go on with it "
        "(`resume`) they are needed, and they may be deleted."
    )
    return RecoveryResult(folder, callback.report)


def _is_perplexity(dense: Any) -> bool:
    """Whether the dense model's value is given, of a text that is known."""
    named = isinstance(dense, (str, os.PathLike)) and Path(dense).suffix == ".json"
    return named or isinstance(dense, (int, float))


def _check_distillation(config: RecoveryConfig, distillation: DistillationConfig, dataset: Any) -> None:
    """Refuses options of distillation that nothing would be done with."""
    plain = DistillationConfig()
    given = [f.name for f in dataclasses.fields(plain) if getattr(distillation, f.name) != getattr(plain, f.name)]
    if given and config.method != "distill":
        raise ConfigurationError(
            f"`method` is {config.method!r}, and {', '.join(f'`{name}`' for name in given)} of the distillation "
            "would do nothing: leave them out, or choose 'distill'."
        )
    if dataset is None and distillation.dense_answers:
        raise ConfigurationError(
            f"`dense_answers` is {distillation.dense_answers}, but there is no data set with prompts to answer: give "
            "one, or leave it out; without one the dense model writes the questions itself."
        )


@contextmanager
def _without_advice() -> Iterator[None]:
    """TRL advises against one packed sequence at a time, which is fastest on a CPU: see `sequences_at_once`."""

    def other(record: LogRecord) -> bool:
        return "padding-free training" not in record.getMessage()

    theirs = getLogger("trl.trainer.sft_trainer")
    theirs.addFilter(other)
    try:
        yield
    finally:
        theirs.removeFilter(other)


def training_folder(output_dir: str | os.PathLike) -> Path:
    """Where the checkpoints of the training go."""
    return Path(os.path.abspath(output_dir) + TRAINING_SUFFIX)


def _megabytes(folder: Path) -> str:
    """The size of a folder."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:,.0f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def in_order(training: Path) -> list[Path]:
    """The checkpoints of a training, the oldest first."""
    return [Path(path) for path in sort_checkpoints(str(training))]


def newest_whole(training: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that a training can go on from, and what is wrong with the newer ones."""
    flaws: dict[Path, str] = {}
    for checkpoint in reversed(in_order(training)):
        found = flaw(checkpoint)
        if found is None:
            return checkpoint, flaws
        flaws[checkpoint] = found
    return None, flaws


def flaw(checkpoint: Path) -> str | None:
    """Why a training of `recover` cannot go on from a checkpoint as if nothing had been; `None` if it can.

    The callback writes its state last, with the names of all files that were there. Each must be readable to its end.
    """
    if (found := damage(checkpoint / STATE_NAME)) is not None:
        return found
    content = read_json(checkpoint / STATE_NAME)
    if not isinstance(content, dict) or not content.get("settings"):
        return f"{STATE_NAME} does not say what the training was begun with"
    return first_damage([checkpoint / name for name in content.get("files", ())]) or damage(checkpoint)


def _check_folders(folder: Path, training: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, if there is one; refuses what is in the way, says what is passed over."""
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


def _remove_others(training: Path, checkpoint: Path | None) -> None:
    """Removes all checkpoints but the one that is resumed: a later `resume` must not take one of another training."""
    state = hardware.process_state()
    state.wait_for_everyone()  # all have looked which of them is whole
    if state.is_main_process:
        best = [training / BEST_FOLDER] if checkpoint is None else []
        for folder in [*best, *(path for path in in_order(training) if path != checkpoint)]:
            shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()


def settings_of(config: RecoveryConfig, distillation: DistillationConfig | None, **about: Any) -> dict[str, Any]:
    """Everything that a training is begun with, by the names of the options; no names of folders."""
    values = {name: value for name, value in config.to_public_dict().items() if name not in _FREE}
    chosen = {"precision": choose_precision(config.precision)}
    more = {} if distillation is None else distillation.to_public_dict()
    return json.loads(json.dumps({**about, **values, **chosen, **more}, default=str))


def refuse_other_settings(checkpoint: Path, now: Mapping[str, Any]) -> None:
    """Refuses to go on from a whole checkpoint in another way than its training was begun; names every difference.

    An option that the training does not name has come since then: it had what is its default now.
    """
    defaults = {**RecoveryConfig().to_public_dict(), **DistillationConfig().to_public_dict()}
    begun = json.loads(json.dumps(defaults, default=str)) | read_json(checkpoint / STATE_NAME)["settings"]
    other = [f"`{name}` is {now[name]!r}, it was {begun.get(name)!r}" for name in now if begun.get(name) != now[name]]
    if other:
        raise ConfigurationError(
            f"The training in {checkpoint.parent.name} was begun in another way: {'; '.join(other)}. Give the same to "
            "go on, or say `overwrite` to start anew."
        )


def _find_teacher(model: str | os.PathLike, teacher: Any, dense: Any) -> Any:
    """The teacher given, or the dense model, or else the one that the checkpoint says was pruned, if it is found."""
    if teacher is not None:
        return teacher
    if isinstance(dense, nn.Module) or (isinstance(dense, (str, os.PathLike)) and Path(dense).suffix != ".json"):
        return dense
    from ..hub.origin import RECORD

    config = load_config(model) if isinstance(model, (str, os.PathLike)) else model.config
    recorded = getattr(config, RECORD, None) or {}
    if recorded.get("base_model") and recorded.get("base_model_on_hub"):
        return recorded["base_model"]
    raise ConfigurationError(
        f"`method` is 'distill', which needs the dense model, and {_name(model)} does not say where it is: give "
        "`teacher`."
    )


def _name(model: Any) -> str | None:
    if isinstance(model, (str, os.PathLike)):
        return Path(model).name if Path(model).exists() else str(model)
    return None if model is None else getattr(getattr(model, "config", None), "_name_or_path", None) or "a model"


def choose_precision(precision: str) -> str:
    """`"bf16"`, `"fp16"` or `"fp32"`; `"auto"` is bf16 where the hardware multiplies matrices in it, else fp32.

    A CPU without bfloat16 instructions computes in it too, several times slower than in float32; in float16 gradients
    underflow without an accelerator's scaling, and CPUs are slow.

    Raises:
        ConfigurationError: What is asked for cannot be done here.
    """
    accelerator = hardware.has_accelerator()
    if precision == "fp16" and not accelerator:
        raise ConfigurationError("`precision` is 'fp16', which needs an accelerator; choose 'fp32' or 'bf16'.")
    if precision == "bf16" and accelerator and not hardware.trains_in_bf16():
        raise ConfigurationError("`precision` is 'bf16', which the accelerator cannot do; choose 'fp32' or 'fp16'.")
    if precision != "auto":
        return precision
    return "bf16" if (hardware.accelerator_has_bf16() if accelerator else hardware.cpu_has_bf16()) else "fp32"


def load_student(model: Any, config: RecoveryConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The pruned model; weights that are trained are in float32, a frozen base in the precision of the computation."""
    precision = choose_precision(config.precision)
    if config.trained == "qlora":
        return load_quantised(
            model, config.bits, DTYPES[precision], gradient_checkpointing=config.gradient_checkpointing,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    frozen = config.trained == "lora" and precision != "fp16"
    dtype = DTYPES[precision] if frozen else torch.float32
    if isinstance(model, nn.Module):
        return model.to(dtype)
    return load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)


def hold_embeddings(model: PreTrainedModel) -> None:
    """Leaves input embeddings and head as they are in a training of all weights.

    Their gradient is a matrix of the vocabulary's size whatever the number of tokens, for every pass, and the head's
    costs a third of its products.
    """
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        if side is not None:
            side.requires_grad_(False)


def load_quantised(
    model_id: str | os.PathLike, bits: int = 4, dtype: torch.dtype = torch.bfloat16, *,
    gradient_checkpointing: bool = False, **kwargs: Any,
) -> PreTrainedModel:  # fmt: skip
    """A model whose linear maps are quantised by bitsandbytes: nf4 with quantised scales (QLoRA), or int8.

    Embeddings and the head are not quantised. Everything is frozen, and what is not quantised goes to float32 (PEFT's
    `prepare_model_for_kbit_training`): put an adapter on it. `dtype` is what is computed in, and what `merge_adapter`
    will give. Do not save it: save the adapter, or the merged model.

    Raises:
        CheckpointError: The checkpoint is quantised already, or lacks weights.
    """
    need("bitsandbytes", "peft", extra="qlora")
    from peft import prepare_model_for_kbit_training

    if getattr(load_config(model_id, **kwargs), "quantization_config", None) is not None:  # and would stay so
        raise CheckpointError(f"{model_id} is quantised already: give the checkpoint as it was before.")
    quantisation = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    return prepare_model_for_kbit_training(
        load_model(model_id, **{**kwargs, "dtype": dtype, "quantization_config": quantisation}),
        use_gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def adapter_config(config: RecoveryConfig, model: PreTrainedModel) -> LoraConfig | None:
    """PEFT's configuration of the adapters; `None` where all weights are trained. Names of modules must be right."""
    if config.trained == "full":
        return None
    from peft import LoraConfig

    targets, whole = list(config.target_modules or [ALL_LINEAR]), config.modules_to_save
    named = targets != [ALL_LINEAR]
    _check_modules(targets if named else (), whole or (), model)
    try:
        return LoraConfig(
            task_type="CAUSAL_LM", r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,
            target_modules=targets if named else ALL_LINEAR, modules_to_save=whole,
            init_lora_weights=True if config.init_lora_weights is None else config.init_lora_weights,
            use_dora=config.use_dora, use_rslora=config.use_rslora,
            ensure_weight_tying=_stays_tied(whole or (), model),
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise ConfigurationError(f"PEFT refuses these adapters: {error}") from error


def _stays_tied(whole: Sequence[str], model: PreTrainedModel) -> bool:
    """Whether modules that are trained whole share a weight with another: it is trained as one, and saved as one."""
    sides = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [getattr(side, "weight", None) for side in sides]
    if weights[0] is None or weights[0] is not weights[1]:
        return False
    names = [f".{name}" for name, module in model.named_modules() if any(module is side for side in sides)]
    return any(name.endswith(f".{one}") for name in names for one in whole)


def widen(model: nn.Module) -> None:
    """Makes the modules that are trained whole float32, as PEFT does with adapters but not with these."""
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and parameter.requires_grad and parameter.itemsize < 4:
            parameter.data = parameter.data.float()


def _check_modules(targets: Sequence[str], whole: Sequence[str], model: PreTrainedModel) -> None:
    """PEFT takes the names as ends of module names, and says nothing of one that fits none if others do."""
    modules = dict(model.named_modules())
    for option, given in (("target_modules", targets), ("modules_to_save", whole)):
        for target in given:
            found = [name for name in modules if f".{name}".endswith(f".{target}")]
            if not found:
                leaves = sorted({name.rsplit(".", 1)[-1] for name in modules if name.endswith(("proj", "fc1", "fc2"))})
                raise ConfigurationError(
                    f"`{option}` names {target!r}, of which the model has none; for example {', '.join(leaves)}."
                )
            packed = [name for name in found if not all(p.is_floating_point() for p in modules[name].parameters())]
            if packed and option == "modules_to_save":
                raise ConfigurationError(
                    f"`modules_to_save` names {packed[0]!r}, which is quantised and cannot be trained whole: train "
                    "'lora', or leave it out."
                )


def training_arguments(config: RecoveryConfig, output_dir: str | os.PathLike, in_rows: bool = False) -> SFTConfig:
    """TRL's arguments, with checkpoints in `output_dir`. Rows are tokenised, cut and packed already, see `prepare`.

    The learning rate is the one given: see `peak_learning_rate`.

    `in_rows` says that packed sequences lie side by side, see `packing`, and not behind each other.
    """
    from trl import SFTConfig

    precision = choose_precision(config.precision)
    return SFTConfig(
        output_dir=str(Path(output_dir)), report_to=list(config.report_to or ["none"]),
        learning_rate=config.learning_rate, lr_scheduler_type=config.scheduler, weight_decay=config.weight_decay,
        warmup_steps=config.warmup,  # a share, below 1
        num_train_epochs=config.epochs if config.minutes is None else _NO_END,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        per_device_train_batch_size=sequences_at_once(config, in_rows),
        gradient_accumulation_steps=accumulation_steps(config, hardware.process_state().num_processes, in_rows),
        gradient_checkpointing=config.gradient_checkpointing, bf16=precision == "bf16", fp16=precision == "fp16",
        use_cpu=not hardware.has_accelerator(),  # Transformers trains in bfloat16 on a CPU only if told to be there
        max_length=None, packing=False,
        padding_free=config.packing and not in_rows,  # positions begin anew in every packed example
        save_strategy="steps", save_steps=_SAVED_SHARE if config.save_steps is None else config.save_steps,
        save_total_limit=2,  # the older one is whole while the newer one is written
        eval_strategy="no", seed=config.seed, data_seed=config.seed,
    )  # fmt: skip


def sequences_at_once(config: RecoveryConfig, in_rows: bool = False) -> int:
    """Sequences in a forward pass: `micro_batch_size`, and one of those that are packed behind each other on a CPU.

    Packed sequences that go through together are one long sequence with a mask, and attention, which skips nothing on
    a CPU, takes the square of its length. The loss is a mean over the tokens of the optimiser step, so that the
    gradient is the same.
    """
    alone = config.packing and not in_rows and not hardware.has_accelerator()
    return 1 if alone else config.micro_batch_size


def accumulation_steps(config: RecoveryConfig, processes: int, in_rows: bool = False) -> int:
    """Forward passes of a device in one optimiser step: `batch_size / (sequences_at_once * processes)`."""
    at_once = config.micro_batch_size * processes
    if config.batch_size % at_once:
        raise ConfigurationError(
            f"`batch_size` is {config.batch_size}, which {processes} processes with `micro_batch_size` "
            f"{config.micro_batch_size} cannot share out: make it a multiple of {at_once}."
        )
    return config.batch_size // (sequences_at_once(config, in_rows) * processes)
