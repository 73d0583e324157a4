"""TRL's SFT trainer with the loss of distillation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging
from trl import SFTTrainer

from ...errors import ConfigurationError
from ...quantization.four_bit import compute_as_stored
from ..configuration import DistillationConfig
from .cached_teacher import cached_teacher
from .heads import find_transform
from .hidden import KINDS, LayerTerms
from .student import Request, add_distillation
from .targets import batch_targets, count_targets
from .teacher import ModelTeacher, Teacher


logger = logging.get_logger(__name__)


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

    def __init__(self, *args: Any, teacher: Teacher, distillation: DistillationConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compute_as_stored(self.model)
        _check_supported(self, teacher.terms, distillation)
        self.distillation = distillation
        self.teacher = self._with_cache(teacher.to(self.accelerator.device))
        self._step_counts: Tensor | None = None
        self._sums: dict[str, dict[str, Tensor]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if hasattr(student, "get_base_model") else student
        add_distillation(student, find_transform(student))

    def _with_cache(self, teacher: Teacher) -> Teacher:
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
        counts = count_targets(batches, self.distillation.on_prompts).to(self.accelerator.device)
        self._step_counts = self.accelerator.reduce(counts, "sum")
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, as its share of the loss of the optimiser step."""
        training = self.model.training
        targets = batch_targets(inputs, self.distillation.on_prompts)
        here = torch.stack([targets.followed.sum(), (targets.labels != -100).sum()])
        counts = self._step_counts if training and self._step_counts is not None else here
        request = Request(
            self.teacher, targets, tuple(counts), self.distillation.temperature, self.distillation.label_weight
        )
        given = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
        losses = model(**given, distillation=request)
        self._note("train" if training else "eval", losses, here, inputs)
        loss = losses["loss"]
        if training and self._step_counts is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**given)

    @torch.no_grad()
    def _note(self, mode: str, losses: dict[str, Tensor], counts: Tensor, inputs: dict[str, Any]) -> None:
        """Adds a batch to what the next log reports."""
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        values = {"kl": losses["kl_sum"], "followed": counts[0], "tokens": torch.as_tensor(tokens)}
        if "label_sum" in losses:
            values |= {"label_loss": losses["label_sum"], "labelled": counts[1]}
        values |= {kind: losses[f"{kind}_sum"] for kind in KINDS if f"{kind}_sum" in losses}
        device = self.accelerator.device
        stacked = torch.stack([value.to(device, torch.float64) for value in values.values()])
        total = self.accelerator.reduce(stacked, "sum").tolist()
        for name, value in zip(values, total, strict=True):
            self._sums[mode][name] += value
        if mode == "train":
            self._total_train_tokens += int(total[2])
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the averages since the last log."""
        mode = "train" if self.model.training else "eval"
        sums = self._sums[mode]
        for name, count in (("kl", "followed"), ("label_loss", "labelled"), *((kind, "followed") for kind in KINDS)):
            if name in sums and sums[count]:
                self._metrics[mode][f"distillation/{name}"] = [sums[name] / sums[count]]
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
    for wrong, what in (
        (args.loss_type != "nll", f"`loss_type={args.loss_type!r}`"),
        (args.label_smoothing_factor > 0, "`label_smoothing_factor`"),
        (trainer.compute_loss_func is not None, "`compute_loss_func`"),
        (_is_prompt_learning(trainer.model), "prompt and prefix tuning"),
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


def _is_prompt_learning(model: Any) -> bool:
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
