"""`LoraRecoveryCallback`: watches the training of a pruned model and keeps the best of it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigurationError
from ..evaluation.text import EvaluationText
from ..files.folders import check_folder
from ..hub.own_files import check_card, check_own_files
from ..quantization.four_bit import compute_as_stored
from ..recovery import trainer_access
from .beginning import begin
from .best import BEST_FOLDER, BestWeights
from .curve import Point, RecoveryCurve, measuring_steps
from .ending import RECOVERED_FOLDER, measure_chosen, put_back_best, save_all
from .report import build_report, describe_training
from .session import Session
from .setting import METRIC, fitting_window, mixed_precision, prefer_lower, source_of, tokenizer_of
from .travelling import write_state
from .watch import Watch
from .wrappers import check_trainable


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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measures the pruned and the dense model, or reads them from the checkpoint that is resumed."""
        self._trainer, resumed = trainer_access.calling_trainer(self)
        self._tokenizer = tokenizer_of(processing_class, self._trainer)
        check_trainable(model)
        compute_as_stored(model)
        if self.merge:
            source = source_of(model)
            if source is not None:
                check_own_files(source)
            check_folder(self._merged(args))
            check_card(self._merged(args))
        prefer_lower(args)
        watch = Watch(self._tokenizer, self.text, window=fitting_window(self.window, model), **self.windows)
        first = state.is_world_process_zero
        self.session = session = Session(
            watch, RecoveryCurve(math.inf), BestWeights(Path(args.output_dir) / BEST_FOLDER, writes=first),
            Point(0, math.inf), self.target, self.patience, mixed_precision(args), speaks=first,
        )  # fmt: skip
        folders = [resumed, f"{args.output_dir}/checkpoint-{state.global_step}", args.resume_from_checkpoint]
        measured = begin(session, model, self.dense, state.global_step, folders, args.device)
        self.report, self._active = None, True
        self._steps = measuring_steps(state.max_steps, self.evaluations)
        if self._trainer is None:
            session.warn("The Trainer of this callback was not found: recovery.json has the curve, its logs have not.")
            return
        trainer_access.keep_in_card(self._trainer, self._card_section)
        if measured:
            trainer_access.log(self._trainer, session.logs(session.value_at(state.global_step), state.global_step))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measures when the Trainer evaluates, and adds the value to its metrics."""
        if self._active:
            value = self._measure(args, state, control, model)
            if metrics is not None:
                metrics[METRIC] = value

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Measures from time to time, if the Trainer does not evaluate."""
        if args.eval_strategy == "no" and state.global_step in self._steps:
            self._measure(args, state, control, model)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Measures after the last step, while reporting callbacks still listen."""
        if control.should_training_stop or state.global_step >= state.max_steps:
            self._measure(args, state, control, model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Stops if the training loss is not a number; so does a gradient, but for those that fp16 training skips."""
        if not self._active or self.session.stopped == "nan":
            return
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if isinstance(value, float) and not math.isfinite(value):
                self.session.break_off(state.global_step, f"the training's {name} is {value}")
                control.should_training_stop = True
                return

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the curve and the best weights into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._active and state.is_world_process_zero and folder.is_dir():
            write_state(self.session, folder, self.settings)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Puts the best weights back, merges and saves."""
        from accelerate import PartialState

        self._active, session = False, self.session
        seconds, merged = session.clock.seconds, None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            measure_chosen(session, model, state)
        else:
            put_back_best(session, model, state.global_step)
        if self.merge:
            merged = self._merged(args)
        self.report = build_report(session, describe_training(args, state, model, seconds), self.about)
        try:
            if state.is_world_process_zero:
                save_all(session, model, self._tokenizer, self.report, Path(args.output_dir), merged)
        finally:
            PartialState().wait_for_everyone()

    def _merged(self, args: TrainingArguments) -> Path:
        """Where the merged model goes."""
        return Path(self.output_dir or Path(args.output_dir) / RECOVERED_FOLDER)

    def _measure(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> float:
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
        if self._trainer is not None and math.isfinite(value):
            with session.clock.paused():
                trainer_access.log(self._trainer, session.logs(value, step))
        return value if math.isfinite(value) else math.inf

    def _card_section(self) -> str:
        from .save import card_section

        return card_section(self.report or build_report(self.session, {}, self.about))
