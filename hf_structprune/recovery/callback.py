"""`LoraRecoveryCallback`: measures the training of a pruned model and keeps the best of it."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import ConfigurationError
from ..evaluation.perplexity import EvaluationText
from ..files.writing import check_folder, write_text
from ..hub.checkpoint import check_card, check_own_files
from ..hub.reports import recovery_section
from ..model.measuring import context_length, measuring
from ..quantization.four_bit import compute_as_stored
from .curve import measuring_steps
from .held_out import HeldOutText
from .save import build_report, describe_training, save_all, source_of
from .session import Session
from .weights import BEST_FOLDER, BestWeights, check_trainable, underneath


logger = logging.get_logger(__name__)

METRIC = "eval_recovery_log_perplexity"
RECOVERED_FOLDER = "recovered"
_FRAMES = 12  # from an event up to the Trainer there are two, and one for each function of ours
_ORIGINAL = "_without_recovery"


class LoraRecoveryCallback(TrainerCallback):
    """Measures how much quality training brings back to a pruned model, stops in time and saves the best.

    For every `Trainer` and TRL trainer, with LoRA or without:

    ```python
    trainer = SFTTrainer(model, args, train_dataset=data, peft_config=LoraConfig(...),
                         callbacks=[LoraRecoveryCallback(dense="HuggingFaceTB/SmolLM2-135M-Instruct")])
    trainer.train()
    ```

    The log-perplexity of a held-out text is measured before the first step, at every evaluation of the Trainer (or
    `evaluations` times, if it does not evaluate) and after the last step, and logged as `recovery/log_perplexity`,
    `recovery/perplexity` and `recovery/recovered`: `(pruned - now) / (pruned - dense)`. The weights with the lowest
    value, those before training among them, are kept in `<args.output_dir>/recovery_best` and put back at the end,
    unless `load_best_model_at_end` has put others there. `metric_for_best_model="eval_recovery_log_perplexity"` is
    known. Measuring does not change the training: random numbers and modes are restored.

    At the end `recovery.json` and `recovery.png` are written into `args.output_dir`, the merged model into
    `output_dir`, and the section "Recovery" into every card that the Trainer writes. Checkpoints carry what is needed
    to resume.

    Args:
        dense: The dense model: a perplexity, a model, a folder or Hub id, a results JSON, or `None`. Measured once.
        text: Held-out text, see `load_text`. It should not be in the training data.
        window: Tokens in a window; at most the model's context.
        max_windows: At most so many windows.
        batch_size: Windows that go through the model at once.
        evaluations: How often to measure if the Trainer does not evaluate; `None` is at the end only.
        target: Stop when this share of the lost log-perplexity is back.
        patience: Stop after so many measurements without a new best; `None` never stops.
        output_dir: Folder of the merged model. Default: `<args.output_dir>/recovered`.
        merge: Merge and save at the end; without it the Trainer has the best weights and nothing else is written.

    Raises:
        ConfigurationError: A value is impossible.
    """

    def __init__(
        self,
        dense: Any = None,
        *,
        text: str | EvaluationText = "sample",
        window: int = 512,
        max_windows: int | None = 32,
        batch_size: int = 4,
        evaluations: int | None = 10,
        target: float | None = None,
        patience: int | None = 3,
        output_dir: str | os.PathLike | None = None,
        merge: bool = True,
    ) -> None:
        for name, value in (("evaluations", evaluations), ("patience", patience)):
            if value is not None and value < 1:
                raise ConfigurationError(f"`{name}` is {value}; it must be at least 1, or None.")
        if target is not None and dense is None:
            raise ConfigurationError("`target` is a share of what the dense model is better by: give `dense` too.")
        if target is not None and not 0 < target <= 1:
            raise ConfigurationError(f"`target` is {target}; it must be above 0 and at most 1.")
        self.dense, self.text, self.target, self.patience = dense, text, target, patience
        self.window, self.windows = window, {"max_windows": max_windows, "batch_size": batch_size}
        self.evaluations, self.output_dir, self.merge = evaluations, output_dir, merge
        self.about: dict[str, Any] = {}  # goes into recovery.json as it is: configuration, data, ...
        self.settings: dict[str, Any] = {}  # goes into the checkpoints: what the training was begun with
        self.session: Session | None = None
        self.report: dict[str, Any] | None = None
        self._trainer, self._tokenizer, self._active = None, None, False
        self._steps: frozenset[int] = frozenset()

    # The events of `TrainerCallback`, with the types that it gives their arguments.

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs) -> None:
        """Measures the pruned and the dense model, or reads them from the checkpoint that is resumed."""
        self._trainer, resumed = calling_trainer(self)
        self._tokenizer = _tokenizer_of(processing_class, self._trainer)
        check_trainable(model)
        compute_as_stored(model)
        if self.merge:
            source = source_of(model)
            if source is not None:
                check_own_files(source)
            check_folder(self._merged(args))
            check_card(self._merged(args))
        _prefer_lower(args)
        first = state.is_world_process_zero
        self.session = session = Session(
            HeldOutText(self._tokenizer, self.text, window=_fitting(self.window, model), **self.windows),
            BestWeights(Path(args.output_dir) / BEST_FOLDER, writes=first),
            target=self.target, patience=self.patience, autocast=mixed_precision(args), speaks=first,
        )  # fmt: skip
        folders = [resumed, f"{args.output_dir}/checkpoint-{state.global_step}", args.resume_from_checkpoint]
        measured = session.begin(model, self.dense, state.global_step, folders, args.device)
        self.report, self._active = None, True
        self._steps = measuring_steps(state.max_steps, self.evaluations)
        if self._trainer is None:
            session.warn("The Trainer of this callback was not found: recovery.json has the curve, its logs have not.")
            return
        keep_in_card(self._trainer, self._card_section)
        if measured:
            _log(self._trainer, session.logs(session.value_at(state.global_step), state.global_step))

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        """Measures when the Trainer evaluates, and adds the value to its metrics."""
        if self._active:
            value = self._measure(state, control, model)
            if metrics is not None:
                metrics[METRIC] = value

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measures from time to time, if the Trainer does not evaluate."""
        if args.eval_strategy == "no" and state.global_step in self._steps:
            self._measure(state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measures after the last step, while reporting callbacks still listen."""
        if control.should_training_stop or state.global_step >= state.max_steps:
            self._measure(state, control, model)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Stops if the training loss is not a number; so does a gradient, but for those that fp16 training skips."""
        if not self._active or self.session.stopped == "nan":
            return
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if isinstance(value, float) and not math.isfinite(value):
                self.session.break_off(state.global_step, f"the training's {name} is {value}")
                control.should_training_stop = True
                return

    def on_save(self, args, state, control, **kwargs) -> None:
        """Puts the curve and the best weights into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._active and state.is_world_process_zero and folder.is_dir():
            self.session.write_state(folder, self.settings)

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Puts the best weights back, merges and saves."""
        from accelerate import PartialState

        self._active, session = False, self.session
        seconds = session.clock.seconds
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            session.accept_choice(model, state)
        else:
            session.put_back_best(model, state.global_step)
        self.report = build_report(session, describe_training(args, state, model, seconds), self.about)
        try:
            if state.is_world_process_zero:
                merged = self._merged(args) if self.merge else None
                save_all(session, model, self._tokenizer, self.report, Path(args.output_dir), merged)
        finally:
            PartialState().wait_for_everyone()

    def _merged(self, args: TrainingArguments) -> Path:
        """Where the merged model goes."""
        return Path(self.output_dir or Path(args.output_dir) / RECOVERED_FOLDER)

    def _measure(self, state: TrainerState, control: TrainerControl, model: Any) -> float:
        """Measures once a step, logs, and stops the training if that is due."""
        session, step = self.session, state.global_step
        if session.stopped == "nan":
            return math.inf
        value = session.value_at(step)
        if value is not None:
            return value
        value = session.measure(model, step)
        if session.stopped:
            control.should_training_stop = True
        if not math.isfinite(value):
            return math.inf
        if self._trainer is not None:
            with session.clock.paused():
                _log(self._trainer, session.logs(value, step))
        return value

    def _card_section(self) -> str:
        return recovery_section(self.report or build_report(self.session, {}, self.about))


def _tokenizer_of(processing_class: Any, trainer: Trainer | None) -> Any:
    """The tokenizer of a training, also out of a processor or a collator."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None and trainer is not None:
        tokenizer = getattr(trainer.data_collator, "tokenizer", None)
    if tokenizer is None:
        raise ConfigurationError("The Trainer has no tokenizer to measure with: give it `processing_class=tokenizer`.")
    return tokenizer


def mixed_precision(args: TrainingArguments) -> torch.dtype | None:
    """The dtype that mixed-precision training computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _prefer_lower(args: TrainingArguments) -> None:
    """Transformers takes any metric for one of which more is better, unless its name ends with `loss`."""
    if args.metric_for_best_model in (METRIC, METRIC.removeprefix("eval_")) and args.greater_is_better:
        logger.warning(f"{METRIC} is better when lower, so `greater_is_better` is set to False.")
        args.greater_is_better = False


def _fitting(window: int, model: nn.Module) -> int:
    """The window, or the model's context where that is shorter."""
    context = context_length(underneath(model))
    if context is None or window <= context:
        return window
    logger.warning(f"`window` is {window}, but the model's context is {context} tokens: {context} are taken.")
    return context


def calling_trainer(callback: TrainerCallback) -> tuple[Trainer | None, str | None]:
    """The Trainer whose event is being handled, and the checkpoint that its training was resumed from.

    Events get arguments, state and model, but not the Trainer, and without it nothing can be logged: reporting
    callbacks stand before those of the user, so what a callback adds to the logs it is handed comes too late for
    them. Only `Trainer.log` reaches all of them. So this looks at the objects that the functions further up the stack
    belong to, and takes the Trainer that has this callback. The folder given to `Trainer.train` is in the arguments of
    the same function and nowhere else.

    Args:
        callback: The callback that handles the event.

    Returns:
        The Trainer and the checkpoint's folder; `None` each where there is none.
    """
    frame = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(one is callback for one in owner.callback_handler.callbacks):
            folder = frame.f_locals.get("resume_from_checkpoint")
            return owner, folder if isinstance(folder, str) else None
        frame = frame.f_back
    return None, None


def _log(trainer: Trainer, values: dict[str, float]) -> None:
    """Logs values through a Trainer without any effect on its own logs.

    `Trainer.log` takes back a wish to log that is still open, and TRL's adds the averages of its training metrics to
    whatever is logged in train mode, and starts them anew.
    """
    wish = trainer.control.should_log
    with measuring(trainer.model):
        trainer.log(dict(values))
    trainer.control.should_log = wish


def keep_in_card(trainer: Trainer, section: Callable[[], str]) -> None:
    """Makes every model card that a Trainer writes from now on end with a section.

    `Trainer.push_to_hub` writes the card anew after all callbacks have been called, so the section is put in by the
    writing itself.

    Args:
        trainer: The Trainer; only this one is changed.
        section: Gives the section when a card has been written.
    """
    original = getattr(trainer.create_model_card, _ORIGINAL, trainer.create_model_card)

    @functools.wraps(original)
    def create_model_card(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        card = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and card.is_file():
            write_text(card, _with_section(card.read_text(encoding="utf-8"), section()))
        return result

    setattr(create_model_card, _ORIGINAL, original)
    trainer.create_model_card = create_model_card


def _with_section(card: str, section: str) -> str:
    """A card with a section once, in the place of an earlier one, found by the comments in its first and last line."""
    lines = section.strip().splitlines()
    before, begin, rest = card.partition(lines[0])
    _, end, after = rest.partition(lines[-1])
    if begin and end:
        return f"{before}{section.strip()}{after}"
    return f"{card.rstrip()}\n\n{section.strip()}\n"
