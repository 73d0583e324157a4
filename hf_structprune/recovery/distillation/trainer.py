"""TRL's SFT trainer with the loss of distillation, which is computed inside the student's own (wrapped) forward.

DDP and FSDP act when their forward is called and gather the weights of the head only there. So the model gets a
forward that returns the loss when it is given a `Request`, and is as before without one.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import SFTTrainer

from ...errors import ConfigurationError
from ...quantization.four_bit import compute_as_stored
from ..configuration import DistillationConfig
from .dual_space import PROJECTION_RATE, DualSpaceTeacher
from .fewer_tokens import known_targets
from .losses import LogitTransform, Targets, batch_targets, distillation_loss
from .teacher import KINDS, CachedTeacher, ModelTeacher, cached_teacher, find_transform, record_outputs, run


class Request(NamedTuple):
    """What a student's forward needs to compute its loss.

    Attributes:
        teacher: Who is followed.
        targets: What counts, `(batch, sequence)`.
        counts: What the sums over followed and labelled tokens are divided by.
        temperature, label_weight: `T` and `w`.
    """

    teacher: ModelTeacher | CachedTeacher | DualSpaceTeacher
    targets: Targets
    counts: tuple[Tensor, Tensor]
    temperature: float
    label_weight: float


DUAL = ("projected", "teacher_kl")  # further terms of a teacher in another space


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
        targets, shape = distillation.targets, distillation.targets.followed.shape
        parts = [(kwargs, targets)]
        if transform is None or distillation.teacher.by_sequence:  # all logits of one sequence at a time
            rows = [slice(i, i + 1) for i in range(shape[0])]
            parts = [({k: v[r] if _is_of(v, shape) else v for k, v in kwargs.items()}, targets[r]) for r in rows]
        total: dict[str, Tensor] = {}
        for inputs, part in parts:
            for name, value in _losses(self, original, transform, distillation, inputs, part).items():
                total[name] = total[name] + value if name in total else value
        return total

    model.forward = types.MethodType(forward, model)


def _is_of(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape[:2] == shape


def _losses(model, original, transform, request: Request, inputs: dict, targets: Targets) -> dict[str, Tensor]:
    if isinstance(request.teacher, DualSpaceTeacher):
        hidden, head = run(model, transform, inputs, original)
        about = request.counts, request.temperature, request.label_weight
        return request.teacher.losses(model, hidden, head, inputs, targets, *about)
    used, terms = targets.used, request.teacher.terms
    lesson = request.teacher.lesson(inputs, used)
    with record_outputs(terms.modules(model, 0) if terms else {}) as states:
        hidden, head = run(model, transform, inputs, original)
    hidden = hidden[used] if head.weight is None else hidden[used].to(head.weight.device)
    losses = distillation_loss(
        hidden, head, lesson.predictions, targets[used], counts=request.counts, temperature=request.temperature,
        label_weight=request.label_weight,
    )  # fmt: skip
    if terms:
        followed = targets.followed[used]
        if lesson.same_place is not None:
            followed = followed & lesson.same_place
        compared = torch.zeros_like(used).masked_scatter(used, followed)
        own = {name: state[compared.to(state.device)] for name, state in states.items()}
        other = {name: state[followed.to(state.device)] for name, state in lesson.states.items()}
        for kind, error in terms.errors(own, other).items():
            error = error.to(losses["loss"].device)
            losses["loss"] = losses["loss"] + terms.weights[kind] * error / request.counts[0].clamp(min=1)
            losses[f"{kind}_sum"] = error.detach()
    return losses


class DistillationSFTTrainer(SFTTrainer):
    """Trains a pruned model to predict what its dense teacher does.

    Data, collation, masking, packing, PEFT and everything else are TRL's. The loss is that of
    `losses.distillation_loss`; each of its terms is divided by the number of its tokens in the whole optimiser step,
    over micro-batches and devices. Logs, averages over tokens: `distillation/kl` (at temperature `T`, without the
    factor `T^2`), `distillation/label_loss`, where followed `distillation/hidden` and `distillation/attention`, all
    without their weights, and TRL's `num_tokens`. The load-balancing loss of mixture-of-experts models is not added:
    their router follows the teacher with everything else.

    Args:
        args, kwargs: Arguments of `trl.SFTTrainer`.
        teacher: Who is followed, see `load_teacher`. It is no part of the model that is trained and saved.
        distillation: What is minimised.

    Raises:
        ConfigurationError: Something of TRL's is on that this loss does not support.
    """

    _tag_names = ["trl", "sft", "distillation"]
    loss_is_scaled_for_ga = True  # losses are divided by counts of the whole optimiser step

    def __init__(
        self, *args: Any, teacher: ModelTeacher | DualSpaceTeacher, distillation: DistillationConfig, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        compute_as_stored(self.model)
        _check_supported(self, teacher, distillation)
        self.distillation, self.teacher = distillation, teacher
        teacher.to(self.accelerator.device)
        if distillation.cache is not None:  # the first process makes the files
            given = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
            datasets = [dataset for dataset in (self.train_dataset, *given) if dataset is not None]
            with self.accelerator.main_process_first():
                self.teacher = cached_teacher(teacher, datasets, distillation, distillation.cache)
        self._step_counts: Tensor | None = None
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if hasattr(student, "get_base_model") else student
        add_distillation(student, find_transform(student))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of an optimiser step; counts what they have in common on the way."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.teacher, DualSpaceTeacher):  # the trainer forgets gradients of the model alone
            self.teacher.projections.zero_grad()
        counts = [self._targets(batch).counts for batch in batches]
        total = torch.tensor([[int(n) for n in pair] for pair in counts] or [[0, 0]]).sum(0)
        self._step_counts = self.accelerator.reduce(total.to(self.accelerator.device), "sum")
        if not self._step_counts[0] and any(batch_targets(b, self.distillation.on_prompts).counts[0] for b in batches):
            raise ConfigurationError(
                "The dense model's tokens are not found again in the student's: its tokenizer makes others of the "
                "text that they write. Train on labels instead, by the method 'full' or 'lora'."
            )
        return batches, items

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimiser of the student and, at a rate of their own, of projections of a teacher in another space."""
        there, optimizer = self.optimizer is not None, super().create_optimizer(*args, **kwargs)
        if isinstance(self.teacher, DualSpaceTeacher) and not there:
            projections = list(self.teacher.projections.parameters())
            optimizer.add_param_group({"params": projections, "lr": PROJECTION_RATE, "weight_decay": 0.0})
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.teacher, DualSpaceTeacher):
            self.teacher.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.teacher, DualSpaceTeacher) and checkpoint is not None:
            self.teacher.load(checkpoint)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, as its share of the loss of the optimiser step."""
        in_step = self.model.training and self._step_counts is not None
        targets = self._targets(inputs)
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

    def _targets(self, inputs: dict[str, Any]) -> Targets:
        targets = batch_targets(inputs, self.distillation.on_prompts)
        if isinstance(self.teacher, DualSpaceTeacher) or self.teacher.tokens is None:
            return targets
        return known_targets(targets, self.teacher.tokens, inputs)

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
        for name, word in (("kl", "kl"), ("label", "label_loss"), *((kind, kind) for kind in (*KINDS, *DUAL))):
            count = sums["labelled" if name == "label" else "followed"]
            if name in sums and count:
                self._metrics[mode][f"distillation/{word}"] = [sums[name] / count]
        sums.clear()
        super().log(logs, start_time)


def _check_supported(trainer: SFTTrainer, teacher: ModelTeacher, config: DistillationConfig) -> None:
    args, prepared = trainer.args, teacher.terms.weights if teacher.terms else {}
    for kind in KINDS:
        weight = getattr(config, f"{kind}_weight")
        if weight != prepared.get(kind, 0.0):
            raise ConfigurationError(
                f"`{kind}_weight` is {weight:g}, but the teacher was prepared for another one: give the same "
                "configuration to `load_teacher`."
            )
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    dual = isinstance(teacher, DualSpaceTeacher)
    if dual != config.dual_space:
        raise ConfigurationError(
            f"`dual_space` is {config.dual_space}, but the teacher was loaded for the other: "
            "`load_dual_space_teacher` loads one for it, `load_teacher` one without."
        )
    unsupported = {
        "several processes with `dual_space`": dual and trainer.accelerator.num_processes > 1,
        f"`loss_type={args.loss_type!r}`": args.loss_type != "nll",
        "`label_smoothing_factor`": args.label_smoothing_factor > 0,
        "`compute_loss_func`": trainer.compute_loss_func is not None,
        "prompt and prefix tuning": any(
            c.is_prompt_learning for c in getattr(trainer.model, "peft_config", {}).values()
        ),
        "`parallelism_config`": getattr(trainer.accelerator, "parallelism_config", None) is not None,
        "DeepSpeed ZeRO-3 (ZeRO-2 and FSDP2 do)": plugin is not None and plugin.zero_stage == 3,
        # It gives outputs of layers no gradient, so that their terms would do nothing.
        "reentrant gradient checkpointing (`use_reentrant`) with `hidden_weight` or `attention_weight`": (
            prepared
            and args.gradient_checkpointing
            and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        ),
    }
    for what, wrong in unsupported.items():
        if wrong:
            raise ConfigurationError(f"Distillation has a loss of its own and does not support {what}: leave it out.")
