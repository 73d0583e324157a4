"""`LoraRecoveryCallback`: measures the training of a pruned model and keeps the best of it."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..checks import Count, Limits, checked
from ..errors import CheckpointError, ConfigurationError
from ..evaluation.perplexity import EvaluationText, bos_for
from ..files.reading import read_json_object
from ..files.writing import write_text
from ..hardware import process_state
from ..hub.words import SCHEMA_VERSION, recovery_section
from ..installed import versions
from ..model.measuring import context_length, measuring
from ..quantization.four_bit import compute_as_stored
from .measuring import HeldOutText, Point, RecoveryCurve, dense_log_perplexity, exp, measuring_steps
from .save import check_place, describe_training, folder_of, save_all
from .time_limit import TimeLimit
from .weights import BEST_FOLDER, BestWeights, agreed, check_trainable, copy_file, underneath


logger = logging.get_logger(__name__)
logger.addFilter(lambda record: process_state().is_main_process)

METRIC = "eval_recovery_log_perplexity"
RECOVERED_FOLDER = "recovered"
LOWERED, WORSE = 1 / 3, 0.01  # of the learning rate, see `back_off`; nats by which a measurement is worse
MEASURING, LEAST_WINDOWS = 0.1, 4  # of the minutes of a training one measurement takes at most, unless of these few
STATE_NAME, BEST_NAME = "recovery_state.json", "recovery_best.safetensors"  # in every checkpoint of a training
REASONS = {
    "target": "the target is reached",
    "worse": "there was no new best for too many measurements",
    "nan": "the loss is not a number",
    "time": "the time is up",
}


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
    unless `load_best_model_at_end` has put others there; `metric_for_best_model="eval_recovery_log_perplexity"` is
    known. Measuring does not change the training: random numbers and modes are restored.

    At the end `recovery.json` and `recovery.png` are written into `args.output_dir`, the merged model into
    `output_dir`, and the section "Recovery" into every card that the Trainer writes. Checkpoints carry what is needed
    to resume.

    Args:
        dense: The dense model: a perplexity, a model, a folder or Hub id, a results JSON, or `None`. Measured once.
        text: Held-out text, see `load_text`. It should not be in the training data.
        window: Tokens in a window; at most the model's context.
        max_windows: At most so many windows; with `minutes` fewer, but four, where all take more than a tenth of them.
        batch_size: Windows that go through the model at once.
        evaluations: How often to measure if the Trainer does not evaluate; `None` is at the end only.
        target: Stop when this share of the lost log-perplexity is back.
        patience: Stop after so many measurements without a new best; `None` never stops.
        back_off: After a measurement whose perplexity is over 1 % worse than before training, go on from the best
            weights at a third of the learning rate. Not where DeepSpeed has the weights, or the Trainer evaluates.
        minutes: Stop after so many, and let the learning rate fall by time instead of steps; `evaluations` are then
            spread over them. `args.max_steps` or the epochs must be enough for that.
        until: With `minutes`: when they have to be over, by `time.monotonic`, however late the training begins.
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
        back_off: bool = False,
        minutes: float | None = None,
        until: float | None = None,
        output_dir: str | os.PathLike | None = None,
        merge: bool = True,
    ) -> None:
        self.evaluations = checked("evaluations", evaluations, Count | None)
        self.patience = checked("patience", patience, Count | None)
        self.target = checked("target", target, Annotated[float, Limits(0, 1, open="least")] | None)
        minutes = checked("minutes", minutes, Annotated[float, Limits(0, open="least")] | None)
        self.limit = None if minutes is None else TimeLimit(minutes, evaluations or 1, until)
        if target is not None and dense is None:
            raise ConfigurationError("`target` is a share of what the dense model is better by: give `dense` too.")
        self.dense, self.text, self.output_dir, self.merge = dense, text, output_dir, merge
        self.back_off, self.lowered = checked("back_off", back_off, bool), []  # steps after which the rate was lowered
        self.window, self.windows = window, {"max_windows": max_windows, "batch_size": batch_size}
        self.about: dict[str, Any] = {}  # goes into recovery.json as it is: configuration, data, ...
        self.settings: dict[str, Any] = {}  # goes into the checkpoints: what the training was begun with
        self.report: dict[str, Any] | None = None
        self.curve, self.kept = RecoveryCurve(math.inf), Point(0, math.inf)  # what was measured; what is kept
        self.stopped: str | None = None  # why training stops: a key of `REASONS`
        self._trainer, self._tokenizer, self._active, self._first = None, None, False, True
        self._steps: frozenset[int] = frozenset()
        self._start = 0.0  # when the training would have begun if it had not been interrupted or measured

    # The events of `TrainerCallback`, with the types that it gives their arguments.

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **kwargs) -> None:
        """Measures the pruned and the dense model, or reads them from the checkpoint that is resumed."""
        self._trainer, resumed = calling_trainer(self)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)  # or out of a processor or a collator
        self._tokenizer = tokenizer or getattr(getattr(self._trainer, "data_collator", None), "tokenizer", None)
        if self._tokenizer is None:
            raise ConfigurationError(
                "The Trainer has no tokenizer to measure with: give it `processing_class=tokenizer`."
            )
        check_trainable(model)
        compute_as_stored(model)
        if self.merge:
            check_place(self._merged(args), folder_of(model))
        if args.metric_for_best_model in (METRIC, METRIC.removeprefix("eval_")) and args.greater_is_better:
            # Transformers takes any metric for one of which more is better, unless its name ends with `loss`.
            logger.warning(f"{METRIC} is better when lower, so `greater_is_better` is set to False.")
            args.greater_is_better = False
        self._first = state.is_world_process_zero
        self._autocast = mixed_precision(args)
        window, context = self.window, context_length(underneath(model))
        if context is not None and window > context:
            logger.warning(f"`window` is {window}, but the model's context is {context} tokens: {context} are taken.")
            window = context
        bos = bos_for(underneath(model), self._tokenizer)
        self._text = HeldOutText(self._tokenizer, self.text, window=window, bos=bos, **self.windows)
        self._best = BestWeights(Path(args.output_dir) / BEST_FOLDER, writes=self._first)
        self.report, self.stopped, self.lowered, self._active = None, None, [], True
        self._steps = measuring_steps(state.max_steps, self.evaluations)
        places = [resumed, f"{args.output_dir}/checkpoint-{state.global_step}", args.resume_from_checkpoint]
        there = (Path(place) for place in places if place and (Path(place) / STATE_NAME).is_file())
        folder = agreed(next(there, None)) if state.global_step else None
        elapsed = 0.0
        if folder is None:
            self._begin(args, state, model)
        else:
            elapsed = self._go_on(folder, state.global_step)
        if self.limit is not None:
            self.limit.begin(kwargs.get("lr_scheduler"), state.max_steps, elapsed)
        if self._trainer is None:
            logger.warning("The Trainer of this callback was not found: recovery.json has the curve, the logs not.")
            return
        keep_in_card(self._trainer, lambda: recovery_section(self.report or self._make_report({})))
        if folder is None:
            self._log(state.global_step, self.curve.all_points[-1].log_perplexity)
        if 0 < state.max_steps <= state.global_step:  # nothing is left to do, and the Trainer would take one more step
            self._trainer.get_batch_samples = lambda *args, **kwargs: ([], None)

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs) -> None:
        """Measures when the Trainer evaluates, and adds the value to its metrics."""
        if self._active:
            value = self._measure(state, control, model)
            if metrics is not None:
                metrics[METRIC] = value

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measures from time to time, if the Trainer does not evaluate."""
        due = state.global_step in self._steps
        if self.limit is not None and self.limit.next_part():
            due = control.should_save = True
            if self.limit.progress >= 1.0 and self.stopped is None:
                self.stopped, control.should_training_stop = "time", True
        if args.eval_strategy == "no" and due:
            self._measure(state, control, model)
            worse = self.curve.all_points[-1].log_perplexity > self.curve.pruned + WORSE
            deepspeed = getattr(self._trainer, "is_deepspeed_enabled", False)
            if self.back_off and worse and not (deepspeed or control.should_training_stop):
                self._lower(state, model, kwargs["optimizer"], kwargs["lr_scheduler"])

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        """Ends a training in the middle of a step of many sequences when the time is up: that step is not taken."""
        if self.limit is None or self.stopped is not None or not self.limit.overrun:
            return
        self.stopped, control.should_training_stop = "time", True
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        logger.warning(
            f"The time is up in the middle of step {state.global_step + 1}, which is not taken: {sequences} sequences "
            f"a step take long here; give more `minutes` or a smaller `batch_size`. So far {self._kept_in_words()}."
        )

    def on_epoch_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measures after the last step, while reporting callbacks still listen."""
        if control.should_training_stop or state.global_step >= state.max_steps:
            self._measure(state, control, model)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Stops if the training loss is not a number; so does a gradient, but for those that fp16 training skips."""
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if self._active and self.stopped != "nan" and isinstance(value, float) and not math.isfinite(value):
                self._break_off(state, control, f"the training's {name} is {value}")

    def on_save(self, args, state, control, **kwargs) -> None:
        """Puts the best weights and the curve into the checkpoint; the curve comes last and makes it whole."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not (self._active and self._first and folder.is_dir()):
            return
        copy_file(self._best.path, folder / BEST_NAME)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        content = {
            "schema_version": 1, "curve": asdict(self.curve), "kept": asdict(self.kept), "text": self._text.describe(),
            "seconds": round(time.perf_counter() - self._start, 3), "settings": self.settings, "files": files,
            "lowered": self.lowered, "elapsed": 0.0 if self.limit is None else round(self.limit.elapsed, 3),
        }  # fmt: skip
        write_text(folder / STATE_NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        """Puts the best weights back, merges and saves."""
        self._active, seconds = False, time.perf_counter() - self._start
        if self._trainer is not None:
            vars(self._trainer).pop("get_batch_samples", None)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:  # the Trainer's choice stands
            self.kept = Point(state.best_global_step, self._value(model))
            self._warn_if_worse(self.kept, "the Trainer has loaded that checkpoint")
        else:
            self._best.restore(model)
        self.report = self._make_report(describe_training(args, state, model, seconds) | {"lowered": self.lowered})
        try:
            if self._first:
                merged = self._merged(args) if self.merge else None
                save_all(self.curve, model, self._tokenizer, self.report, Path(args.output_dir), merged)
        finally:
            process_state().wait_for_everyone()

    def _begin(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Measures the pruned and the dense model, and keeps the weights as they are."""
        self._shorten(model)
        step, dtype = state.global_step, self._autocast or getattr(underneath(model).config, "dtype", None) or "auto"
        pruned, dense = self._value(model, pruned=True), None
        if not math.isfinite(pruned):
            raise ConfigurationError(
                f"The log-perplexity of the pruned model is {pruned}: it is broken before training, or needs another "
                "dtype."
            )
        if self._first:
            dense = dense_log_perplexity(
                self.dense,
                self._text,
                device=args.device,
                autocast=self._autocast,
                dtype=dtype,
                vocab_size=underneath(model).config.get_text_config().vocab_size,
            )
        self.curve = RecoveryCurve(pruned, agreed(dense))
        self.kept = Point(step, self._value(model) if step else pruned)
        if step:
            self.curve.points.append(self.kept)
            logger.warning(f"The checkpoint of step {step} has no {STATE_NAME}: the curve begins there.")
        self._best.keep(model)
        if self.curve.dense is None:
            logger.info(
                f"Before training: log-perplexity {pruned:.4f}; what share of the loss comes back cannot be told "
                "without a dense model of the same tokens (`dense`)."
            )
        else:
            logger.info(f"Before training: log-perplexity {pruned:.4f}; the dense model {self.curve.dense:.4f}.")
            if self.curve.recovered(pruned) is None:
                logger.warning(
                    f"The pruned model is no worse than the dense one on {self._text.text.name!r}, so there is no "
                    "share to bring back; is `dense` the right model?"
                )
        self._start = time.perf_counter()

    def _shorten(self, model: nn.Module) -> None:
        """Takes fewer windows where all of them would take too much of the training's time, each time."""
        known = isinstance(self.dense, (int, float)) or str(self.dense).endswith(".json")  # of all windows
        if self.limit is None or known:
            return
        each, there = agreed(self._text.seconds_of_a_window(model, self._autocast)), len(self._text.ids)
        windows = max(LEAST_WINDOWS, int(MEASURING * self.limit.seconds / each))
        if windows < there:
            logger.info(
                f"{windows} of {there} windows are measured: all of them would take {there * each:,.0f} s, which is "
                f"more than a tenth of {self.limit.seconds / 60:g} minutes."
            )
            self._text.shorten(windows)

    def _go_on(self, folder: Path, step: int) -> float:
        """Goes back to where a checkpoint was saved, so many seconds after the first step; the first process reads."""
        path = folder / STATE_NAME
        content = agreed(read_json_object(path) if self._first else {})
        if not all(key in content for key in ("curve", "kept", "seconds", "text")):
            raise CheckpointError(f"{path} is incomplete: remove it to measure anew.")
        windows = content["text"].get("windows")
        if self.limit is not None and isinstance(windows, int) and 0 < windows < len(self._text.ids):
            self._text.shorten(windows)
        text = self._text.describe()
        differing = [key for key in text if key != "source" and content["text"].get(key) != text[key]]
        if differing:
            raise ConfigurationError(
                f"{path} is of another text or other windows ({', '.join(differing)}): give the callback the same "
                "ones, or remove the file to measure anew."
            )
        points = [Point(**point) for point in content["curve"]["points"]]
        self.curve, self.kept = RecoveryCurve(**{**content["curve"], "points": points}), Point(**content["kept"])
        if self._first:
            copy_file(folder / BEST_NAME, self._best.path)
        self.lowered, self._start = content.get("lowered", []), time.perf_counter() - content["seconds"]
        logger.info(f"The curve goes on after step {step}; {self._kept_in_words()}.")
        return float(content.get("elapsed", 0.0))

    def _measure(self, state: TrainerState, control: TrainerControl, model: Any) -> float:
        """Measures once a step, keeps the weights if they are the best, logs, and stops training if that is due."""
        step, start = state.global_step, time.perf_counter()
        known = next((point.log_perplexity for point in self.curve.all_points if point.step == step), None)
        if self.stopped == "nan" or known is not None:
            return math.inf if self.stopped == "nan" else known
        value = self._value(model)
        if not math.isfinite(value):
            self._break_off(state, control, f"the log-perplexity of {self._text.text.name!r} is {value}")
            return math.inf
        was_worse, point = self.curve.is_worse, Point(step, value, round(start - self._start, 3))
        self.curve.points.append(point)
        if value < self.kept.log_perplexity:
            self._best.keep(model)
            self.kept = point
        share = self.curve.recovered(value)
        logger.info(
            f"Step {step}: log-perplexity {value:.4f}{'' if share is None else f', {100 * share:.1f} % back'}."
        )
        if not was_worse:
            self._warn_if_worse(point, self._kept_in_words())
        self.stopped = self.stopped or self.curve.verdict(target=self.target, patience=self.patience)
        if self.stopped:
            say = logger.info if self.stopped == "time" else logger.warning
            say(f"Recovery stops after step {step}: {REASONS[self.stopped]}; {self._kept_in_words()}.")
            control.should_training_stop = True
        self._log(step, value)
        self._start += time.perf_counter() - start
        return value

    def _lower(self, state: TrainerState, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Puts the best weights back and lowers the learning rate. Adam forgets its way, not how steep it was."""
        self._best.restore(model)
        scheduler = getattr(scheduler, "scheduler", scheduler)
        scheduler.base_lrs = [LOWERED * rate for rate in scheduler.base_lrs]
        for group in optimizer.param_groups:
            group["lr"] *= LOWERED
        for moments in optimizer.state.values():
            if "exp_avg" in moments:
                moments["exp_avg"].zero_()
        self.lowered.append(state.global_step)
        logger.warning(f"The learning rate may be too high: from here on a third of it, {self._kept_in_words()}.")

    def _value(self, model: nn.Module, pruned: bool = False) -> float:
        return agreed(self._text.measure(model, autocast=self._autocast, pruned=pruned))

    def _break_off(self, state: TrainerState, control: TrainerControl, what: str) -> None:
        """Stops a training that has no future."""
        self.stopped, control.should_training_stop = "nan", True
        logger.warning(
            f"Recovery stops after step {state.global_step}: {what}; {self._kept_in_words()}. Lower the learning "
            "rate, or train in bf16 or fp32."
        )

    def _warn_if_worse(self, point: Point, kept: str) -> None:
        if point.log_perplexity > self.curve.pruned:
            logger.warning(
                f"The model is worse than before training: log-perplexity {point.log_perplexity:.4f} after step "
                f"{point.step}, {self.curve.pruned:.4f} before; {kept}."
            )

    def _kept_in_words(self) -> str:
        if self.kept.step == 0:
            return "keeping the pruned model"
        return f"keeping the best of step {self.kept.step} (log-perplexity {self.kept.log_perplexity:.4f})"

    def _log(self, step: int, value: float) -> None:
        """Logs a measurement through the Trainer without any effect on its own logs.

        `Trainer.log` takes back a wish to log that is still open, and TRL's adds the averages of its training metrics
        to whatever is logged in train mode, and starts them anew.
        """
        if self._trainer is None:
            return
        more = {"recovered": self.curve.recovered(value), "dense_log_perplexity": None if step else self.curve.dense}
        logs = {
            "log_perplexity": value, "perplexity": exp(value), "best_log_perplexity": self.curve.best.log_perplexity,
            **{name: number for name, number in more.items() if number is not None},
        }  # fmt: skip
        wish = self._trainer.control.should_log
        with measuring(self._trainer.model):
            self._trainer.log({f"recovery/{name}": number for name, number in logs.items()})
        self._trainer.control.should_log = wish

    def _make_report(self, training: dict[str, Any]) -> dict[str, Any]:
        """The content of `recovery.json`: what was trained, how much came back, and how that was measured."""
        return {
            "schema_version": SCHEMA_VERSION, "curve": asdict(self.curve), "text": self._text.describe(),
            "stopped": self.stopped, "best_step": self.kept.step,
            "recovered": self.curve.recovered(self.kept.log_perplexity), "configuration": {}, "training": training,
            "versions": versions("accelerate", "datasets", "lm_eval", "peft", "trl"), **self.about,
        }  # fmt: skip

    def _merged(self, args: TrainingArguments) -> Path:
        return Path(self.output_dir or Path(args.output_dir) / RECOVERED_FOLDER)


def mixed_precision(args: TrainingArguments) -> torch.dtype | None:
    """The dtype that mixed-precision training computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def calling_trainer(callback: TrainerCallback) -> tuple[Trainer | None, str | None]:
    """The Trainer whose event is being handled, and the checkpoint that its training was resumed from, if there are.

    Events are given neither, and only `Trainer.log` reaches all reporting callbacks. So this looks at the objects that
    the functions further up the stack belong to, and takes the Trainer that has this callback.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(one is callback for one in owner.callback_handler.callbacks):
            folder = frame.f_locals.get("resume_from_checkpoint")
            return owner, folder if isinstance(folder, str) else None
        frame = frame.f_back
    return None, None


def keep_in_card(trainer: Trainer, section: Callable[[], str]) -> None:
    """Makes every model card that a Trainer writes from now on end with the section that is made then.

    `Trainer.push_to_hub` writes the card anew after all callbacks have been called, so the section is put in by the
    writing itself.
    """

    def create_model_card(*args: Any, **kwargs: Any) -> None:
        type(trainer).create_model_card(trainer, *args, **kwargs)
        card = Path(trainer.args.output_dir) / "README.md"
        if trainer.is_world_process_zero() and card.is_file():
            write_text(card, _with_section(card.read_text(encoding="utf-8"), section()))

    trainer.create_model_card = create_model_card


def _with_section(card: str, section: str) -> str:
    """A card with a section once, in the place of an earlier one, found by the comments in its first and last line."""
    lines = section.strip().splitlines()
    before, begin, rest = card.partition(lines[0])
    _, end, after = rest.partition(lines[-1])
    if begin and end:
        return f"{before}{section.strip()}{after}"
    return f"{card.rstrip()}\n\n{section.strip()}\n"
