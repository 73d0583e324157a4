"""TRL's SFT trainer with the loss of distillation, which is computed inside the student's own (wrapped) forward.

DDP and FSDP act when their forward is called and gather the weights of the head only there. So the model gets a
forward that returns the loss when it is given a `Request`, and is as before without one.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from trl import SFTTrainer

from ...errors import ConfigurationError
from ...quantization.four_bit import compute_as_stored
from ..configuration import DistillationConfig
from .cache import AnyTeacher, cached_teacher
from .losses import Head, LogitTransform, Targets, batch_targets, distillation_loss
from .teacher import KINDS, LayerTerms, ModelTeacher, find_transform, head_of, record_outputs


@dataclass(frozen=True)
class Request:
    """What a student's forward needs to compute its loss.

    Attributes:
        teacher: Who is followed.
        targets: What counts, `(batch, sequence)`.
        counts: What the sums over followed and labelled tokens are divided by.
        temperature: `T`.
        label_weight: `w`.
    """

    teacher: AnyTeacher
    targets: Targets
    counts: tuple[Tensor, Tensor]
    temperature: float
    label_weight: float


def add_distillation(model: PreTrainedModel, transform: LogitTransform | None) -> None:
    """Lets `model(**inputs, distillation=Request(...))` return `{"loss", "kl_sum", "label_sum", ...}`.

    Args:
        model: The student, below PEFT.
        transform: What it does to the products of its head, see `find_transform`; `None` if only the model knows.
    """
    original = model.forward

    @functools.wraps(original)  # `generate` and `Trainer` read the signature
    def forward(self, *args: Any, distillation: Request | None = None, **kwargs: Any) -> Any:
        if distillation is None:
            return original(*args, **kwargs)
        if args:
            raise TypeError("With `distillation`, give all inputs by name.")
        targets, parts = distillation.targets, [(kwargs, distillation.targets)]
        if transform is None or distillation.teacher.by_sequence:  # all logits of one sequence at a time
            shape, rows = targets.followed.shape, range(len(targets.followed))
            parts = [({k: _row(v, i, shape) for k, v in kwargs.items()}, targets[i : i + 1]) for i in rows]
        total: dict[str, Tensor] = {}
        for inputs, part in parts:
            for name, value in _losses(self, original, transform, distillation, inputs, part).items():
                total[name] = total[name] + value if name in total else value
        return total

    model.forward = types.MethodType(forward, model)


def _row(value: Any, row: int, shape: torch.Size) -> Any:
    return value[row : row + 1] if isinstance(value, Tensor) and value.shape[:2] == shape else value


def _losses(model, original, transform, request: Request, inputs: dict, targets: Targets) -> dict[str, Tensor]:
    used, terms = targets.used, request.teacher.terms
    lesson = request.teacher.lesson(inputs, used)
    with record_outputs(terms.modules(model, 0) if terms else {}) as states:
        outputs = original(**inputs).logits if transform is None else model.base_model(**inputs).last_hidden_state
    if outputs.shape[:2] != used.shape:
        raise ConfigurationError(
            f"The model returned {outputs.shape[1]} positions for {used.shape[1]} tokens. Adapters that add virtual "
            "tokens (prompt tuning, prefix tuning) cannot be distilled: use LoRA."
        )
    outputs, head = outputs[used], Head()
    if transform is not None:
        head = head_of(model, transform)
        head = Head(_whole(head.weight), _whole(head.bias), transform)
        outputs = outputs.to(head.weight.device)
    losses = distillation_loss(
        outputs, head, lesson.predictions, targets[used], counts=request.counts, temperature=request.temperature,
        label_weight=request.label_weight,
    )  # fmt: skip
    if terms:
        followed = targets.followed[used]
        own = {name: state[targets.followed.to(state.device)] for name, state in states.items()}
        other = {name: state[followed.to(state.device)] for name, state in lesson.states.items()}
        for kind, error in terms.errors(own, other).items():
            error = error.to(losses["loss"].device)
            losses["loss"] = losses["loss"] + terms.weights[kind] * error / request.counts[0].clamp(min=1)
            losses[f"{kind}_sum"] = error.detach()
    return losses


def _whole(weight: Tensor | None) -> Tensor | None:
    """FSDP2 shows its shards as DTensors."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class DistillationSFTTrainer(SFTTrainer):
    """Trains a pruned model to predict what its dense teacher does.

    Data, collation, masking, packing, PEFT and everything else are TRL's. The loss is that of
    `losses.distillation_loss`; each of its terms is divided by the number of its tokens in the whole optimiser step,
    over micro-batches and devices, so that neither changes what is learned. Logs, averages over tokens:
    `distillation/kl` (at temperature `T`, without the factor `T^2`), `distillation/label_loss`, where followed
    `distillation/hidden` and `distillation/attention`, all without their weights, and TRL's `num_tokens`. The
    load-balancing loss of mixture-of-experts models is not added: their router follows the teacher with everything
    else.

    Args:
        args: Arguments of `trl.SFTTrainer`.
        teacher: Who is followed, see `load_teacher`. It is no part of the model that is trained and saved.
        distillation: What is minimised.
        kwargs: Arguments of `trl.SFTTrainer`.

    Raises:
        ConfigurationError: Something of TRL's is on that this loss does not support.
    """

    _tag_names = ["trl", "sft", "distillation"]
    # Losses are divided by counts of the whole optimiser step.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, teacher: AnyTeacher, distillation: DistillationConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compute_as_stored(self.model)
        _check_supported(self, teacher.terms, distillation)
        self.distillation = distillation
        self.teacher = self._with_cache(teacher.to(self.accelerator.device))
        self._step_counts: Tensor | None = None
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if hasattr(student, "get_base_model") else student
        add_distillation(student, find_transform(student))

    def _with_cache(self, teacher: AnyTeacher) -> AnyTeacher:
        """The teacher, or what it says about the data if that is kept on disk; the first process makes the files."""
        if self.distillation.cache is None or not isinstance(teacher, ModelTeacher):
            return teacher
        given = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        datasets = [dataset for dataset in (self.train_dataset, *given) if dataset is not None]
        with self.accelerator.main_process_first():
            return cached_teacher(teacher, datasets, self.distillation, self.distillation.cache)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of an optimiser step; counts what they have in common on the way."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [batch_targets(batch, self.distillation.on_prompts).counts for batch in batches]
        total = torch.tensor([[int(n) for n in pair] for pair in counts] or [[0, 0]]).sum(0)
        self._step_counts = self.accelerator.reduce(total.to(self.accelerator.device), "sum")
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, as its share of the loss of the optimiser step."""
        in_step = self.model.training and self._step_counts is not None
        targets = batch_targets(inputs, self.distillation.on_prompts)
        counts = tuple(self._step_counts) if in_step else targets.counts
        request = Request(self.teacher, targets, counts, self.distillation.temperature, self.distillation.label_weight)
        given = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        losses = model(**given, distillation=request)
        self._note(losses, targets, inputs)
        loss = losses["loss"]
        if in_step:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**given)

    @torch.no_grad()
    def _note(self, losses: dict[str, Tensor], targets: Targets, inputs: dict[str, Any]) -> None:
        """Adds a batch to what the next log reports."""
        mode, (followed, labelled) = "train" if self.model.training else "eval", targets.counts
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        values = {name.removesuffix("_sum"): value for name, value in losses.items() if name != "loss"}
        values |= {"followed": followed, "labelled": labelled, "tokens": torch.as_tensor(tokens)}
        stacked = torch.stack([value.to(self.accelerator.device, torch.float64) for value in values.values()])
        total = dict(zip(values, self.accelerator.reduce(stacked, "sum").tolist(), strict=True))
        for name, value in total.items():
            self._sums[mode][name] += value
        if mode == "train":
            self._total_train_tokens += int(total["tokens"])
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages since the last log."""
        mode = "train" if self.model.training else "eval"
        sums = self._sums[mode]
        for name, word in (("kl", "kl"), ("label", "label_loss"), *((kind, kind) for kind in KINDS)):
            count = sums["labelled" if name == "label" else "followed"]
            if name in sums and count:
                self._metrics[mode][f"distillation/{word}"] = [sums[name] / count]
        sums.clear()
        super().log(logs, start_time)


def _check_supported(trainer: SFTTrainer, terms: LayerTerms | None, config: DistillationConfig) -> None:
    args = trainer.args
    for kind in KINDS:
        weight = getattr(config, f"{kind}_weight")
        if weight != (terms.weights.get(kind, 0.0) if terms else 0.0):
            raise ConfigurationError(
                f"`{kind}_weight` is {weight:g}, but the teacher was prepared for another one: give the same "
                "configuration to `load_teacher`."
            )
    prompts = any(config.is_prompt_learning for config in getattr(trainer.model, "peft_config", {}).values())
    for wrong, what in (
        (args.loss_type != "nll", f"`loss_type={args.loss_type!r}`"),
        (args.label_smoothing_factor > 0, "`label_smoothing_factor`"),
        (trainer.compute_loss_func is not None, "`compute_loss_func`"),
        (prompts, "prompt and prefix tuning"),
        (getattr(trainer.accelerator, "parallelism_config", None) is not None, "`parallelism_config`"),
    ):
        if wrong:
            raise ConfigurationError(f"Distillation has a loss of its own and does not support {what}: leave it out.")
    reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if terms and reentrant:
        raise ConfigurationError(
            "Reentrant gradient checkpointing gives outputs of layers no gradient, so that `hidden_weight` and "
            "`attention_weight` would do nothing: leave `use_reentrant` out of `gradient_checkpointing_kwargs`."
        )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise ConfigurationError("Distillation does not run with DeepSpeed ZeRO-3: use ZeRO-2 or FSDP2.")
