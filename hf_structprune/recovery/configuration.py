"""`RecoveryConfig` and `DistillationConfig`: how a pruned model is trained to get its quality back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..checks import Count, Limits, Number, OneOf, check_fields, check_keys
from ..errors import ConfigurationError


# Those of PEFT that need no data. The last ones change the base weights as well.
INITIALISATIONS = re.compile(r"gaussian|orthogonal|mica|pissa|pissa_niter_\d+|olora")
# What is taken where nothing is given: on labels that of published recipes with thousands of steps, in distillation
# what gives a few hundred steps on little text.
_DEFAULTS = {
    "labels": {"rank": 8, "alpha": 16, "dropout": 0.05, "packing": False, "warmup": 0.03, "batch_size": 64},
    "distill": {"rank": 64, "alpha": 128, "dropout": 0.0, "packing": True, "warmup": 0.1, "batch_size": 4},
}
_Length = Annotated[int, Limits(8)]  # tokens
_Weight = Annotated[float, Limits(0, 1e6)]


@dataclass
class RecoveryConfig:
    """How a pruned model is trained.

    On labels `batch_size`, `epochs`, `rank` and `alpha` are those of published recipes with thousands of steps.
    Where a default depends on `method`, the second value is that of `"distill"`.

    Args:
        method (`str`): `"lora"` trains adapters on the labels of the data, `"qlora"` the same over a 4-bit base,
            `"full"` all weights, and `"distill"` makes the model predict what the dense one does.
        weights (`str`): What `"distill"` trains: `"lora"`, `"qlora"` or `"full"`.
        bits (`int`): Of the frozen base under `"qlora"`: 4 (nf4) or 8.
        rank (`int`, *optional*): Rank of the adapters. Default: 8, or 64.
        alpha (`int`, *optional*): Their scale: updates are multiplied by `alpha / rank`. Default: 16, or 128.
        dropout (`float`, *optional*): Dropout on the inputs of the adapters. Default: 0.05, or 0.
        target_modules (list of `str`, *optional*): Names of the modules that get an adapter, for example `q_proj`, or
            `all-linear` for every Linear but the head, which is the default.
        modules_to_save (list of `str`, *optional*): Names of the modules that are trained whole beside the adapters,
            for example `lm_head`. Default: none.
        train_embeddings (`bool`, *optional*): Where all weights are trained, the input embeddings and the head too.
            Default: yes, but not in distillation from a model with the same tokens, where steps without them take a
            fifth less time on a CPU and give back as much.
        init_lora_weights (`str`, *optional*): How PEFT starts adapters: `gaussian`, `orthogonal`, `mica`, `pissa`,
            `pissa_niter_16` (or another number) or `olora`. Default: PEFT's, zero for the second matrix.
        use_dora (`bool`): Train magnitude and direction apart (DoRA).
        use_rslora (`bool`): Scale by `alpha / sqrt(rank)` (rsLoRA).
        max_length (`int`): Tokens in a training sequence.
        packing (`bool`, *optional*): Put several short examples into one sequence, which saves padding; a token sees
            only its own example. Default: no, or yes.
        prompt_loss (`bool`): Learn prompts too, not only the answers.
        max_samples (`int`, *optional*): At most so many examples, drawn at random. Default: all.
        learning_rate (`float`, *optional*): Peak learning rate. Default: half a percent of the typical size of the
            model's weights for adapters, a tenth of one for all weights, see `learning_rate`. Of weights of 0.02, the
            usual `initializer_range`, these are the 1e-4 and 2e-5 of published recipes.
        scheduler (`str`): `"cosine"`, `"linear"`, `"constant"` or `"constant_with_warmup"`.
        warmup (`float`, *optional*): Share of the steps over which the learning rate rises. Default: 0.03, or 0.1.
        weight_decay (`float`): Weight decay of AdamW.
        epochs (`float`): Passes over the data.
        max_steps (`int`, *optional*): Optimiser steps, instead of `epochs`.
        minutes (`float`, *optional*): Train for so long instead, measuring in between included, with as many passes as
            fit (or `max_steps`, whichever is first). The learning rate falls with the time, so that the result depends
            on the machine.
        batch_size (`int`, *optional*): Sequences in an optimiser step, over all devices. Default: 64, or 4 (or as many
            as `micro_batch_size`).
        micro_batch_size (`int`): Sequences that go through a device at once; the rest is gradient accumulation.
        gradient_checkpointing (`bool`): Compute activations again in the backward pass, which saves memory.
        precision (`str`): Of the computation: `"bf16"`, `"fp16"`, `"fp32"`, or `"auto"`: bf16 where the hardware
            multiplies in it, else fp32. Weights that are trained are float32 throughout.
        save_steps (`int`, *optional*): Steps between checkpoints to resume from. Default: a tenth of the training.
        report_to (list of `str`, *optional*): Where the curves go besides the logs: `tensorboard`, `trackio`, `wandb`.
        evaluations (`int`): How often the perplexity of held-out text is measured during training.
        text (`str`, *optional*): That text: `sample`, `wikitext2`, `c4`, a file, a folder or a data set id of the Hub.
            Default: half rows of the data set that are not trained on, one of 20 at most, and half `sample`; that
            alone without a data set, where rows are too few, and beside a `dense` perplexity, which is of a text.
        max_windows (`int`): At most so many windows of it; with `minutes` fewer (but four) where all take more than a
            tenth of them.
        window (`int`): Tokens in a window.
        target (`float`, *optional*): Stop when this share of the lost log-perplexity is back: 0.5 is half of it.
        patience (`int`, *optional*): Stop after so many measurements without a new best; `None` never stops.
        seed (`int`): Seed of everything random.

    Raises:
        ConfigurationError: A value is impossible.
    """

    method: Annotated[str, OneOf(("lora", "qlora", "full", "distill"))] = "lora"
    weights: Annotated[str, OneOf(("lora", "qlora", "full"))] = "lora"
    bits: Annotated[int, OneOf((4, 8))] = 4
    rank: Count | None = None
    alpha: Count | None = None
    dropout: Annotated[float, Limits(0, 0.99)] | None = None
    target_modules: Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    train_embeddings: bool | None = None
    init_lora_weights: str | None = None
    use_dora: bool = False
    use_rslora: bool = False
    max_length: _Length = 512
    packing: bool | None = None
    prompt_loss: bool = False
    max_samples: Count | None = None
    learning_rate: Annotated[float, Limits(1e-12, 10)] | None = None
    scheduler: Annotated[str, OneOf(("cosine", "linear", "constant", "constant_with_warmup"))] = "cosine"
    warmup: Annotated[float, Limits(0, 0.99)] | None = None
    weight_decay: Annotated[float, Limits(0, 10)] = 0.0
    epochs: Annotated[float, Limits(1e-6, 1e6)] = 2.0
    max_steps: Count | None = None
    minutes: Annotated[float, Limits(0, open="least")] | None = None
    batch_size: Count | None = None
    micro_batch_size: Count = 4
    gradient_checkpointing: bool = False
    precision: Annotated[str, OneOf(("auto", "bf16", "fp16", "fp32"))] = "auto"
    save_steps: Count | None = None
    report_to: Sequence[str] | None = None
    evaluations: Count = 10
    text: str | None = None
    max_windows: Count = 32
    window: _Length = 512
    target: Annotated[float, Limits(1e-6, 1)] | None = None
    patience: Count | None = 3
    seed: Number = 42

    def __post_init__(self) -> None:
        check_fields(self)
        defaults = dict(_DEFAULTS["distill" if self.method == "distill" else "labels"])
        if self.method == "distill":
            defaults["batch_size"] = max(defaults["batch_size"], self.micro_batch_size)
        if self.trained != "full" and self.train_embeddings is not None:
            raise ConfigurationError(
                f"`train_embeddings` is {self.train_embeddings}, and {self.trained!r} trains adapters beside frozen "
                "weights: name the modules to be trained whole in `modules_to_save`, or train 'full'."
            )
        if self.method == "full":
            defaults["train_embeddings"] = True
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.init_lora_weights is not None and not INITIALISATIONS.fullmatch(self.init_lora_weights):
            raise ConfigurationError(
                f"`init_lora_weights` is {self.init_lora_weights!r}; allowed values are gaussian, orthogonal, mica, "
                "pissa, pissa_niter_NUMBER and olora."
            )
        if self.trained == "qlora" and (self.init_lora_weights or "").startswith(("pissa", "olora")):
            raise ConfigurationError(
                f"`init_lora_weights` is {self.init_lora_weights!r}, which changes the base weights and cannot be "
                "used over a quantised base; train 'lora', or choose another initialisation."
            )
        if self.batch_size % self.micro_batch_size:
            raise ConfigurationError(
                f"`batch_size` is {self.batch_size}, which is no multiple of `micro_batch_size` "
                f"{self.micro_batch_size}: change one of them."
            )

    @property
    def trained(self) -> str:
        """What is trained: `"lora"`, `"qlora"` or `"full"`."""
        return self.weights if self.method == "distill" else self.method

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_public_dict(self) -> dict[str, Any]:
        """The same with the names of local files in place of their paths: reports are published."""
        local = None if self.text is None else Path(self.text)
        return {**self.to_dict(), "text": local.name if local and local.expanduser().exists() else self.text}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RecoveryConfig:
        check_keys(cls, values)
        return cls(**values)


@dataclass
class DistillationConfig:
    """How the pruned model learns from the dense one. `(1 - label_weight) T^2 KL(dense || pruned) + label_weight CE`.

    Args:
        temperature (`float`): `T`: both sides' logits are divided by it.
        label_weight (`float`): Weight of the loss on the labels of the data; 0 learns from the dense model alone.
        on_prompts (`bool`): Follow the dense model on every token, prompts included, not only on answers.
        hidden_weight (`float`): Weight of the hidden states' error in layers that still match.
        attention_weight (`float`): The same of the attention outputs.
        dual_space (`bool`): Learn from a teacher with another tokenizer (DSKD): both models' hidden states are
            projected into the space of the other, by maps that are learned as well and are not saved with the model.
        layer_map (`list` of `int`, *optional*): The dense model's layer, from 0, of each layer of the pruned one, for
            these two. Default: the one of the same number, or only the last layer if layers were dropped.
        teacher_dtype (`str`): Of the dense model: `"bf16"`, `"fp16"`, `"fp32"`, `"int8"` (bitsandbytes), or `"auto"`
            for the precision of the computation.
        cache (`str`, *optional*): Folder for the dense model's predictions, so that it runs once over the data.
        top_k (`int`): Predictions kept for a token in the cache; the rest counts as one more class.
        generated_tokens (`int`): Where there is no data set: tokens that the dense model writes to be distilled on,
            beside the text that the pruning was calibrated on. 0 takes that text alone.
        dense_answers (`int`): Where there is a data set: so many of its prompts are answered by the dense model too,
            greedily, and the answers that it ends are learned beside those of the data. See `own_answers`.
        dense_questions (`int`): So many short questions, in English, at most are made up by the dense model, and
            learned with its answers beside all else: facts go first. See `own_questions`.

    Raises:
        ConfigurationError: A value is impossible.
    """

    temperature: Annotated[float, Limits(0.05, 100)] = 1.0
    label_weight: Annotated[float, Limits(0, 1)] = 0.0
    on_prompts: bool = True
    hidden_weight: _Weight = 0.0
    attention_weight: _Weight = 0.0
    dual_space: bool = False
    layer_map: Sequence[Number] | None = None
    teacher_dtype: Annotated[str, OneOf(("bf16", "fp16", "fp32", "int8", "auto"))] = "auto"
    cache: str | None = None
    top_k: Count = 64
    generated_tokens: Number = 65_536
    dense_answers: Number = 0
    dense_questions: Number = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.cache is not None and (self.hidden_weight or self.attention_weight):
            raise ConfigurationError(
                "`cache` keeps the dense model's predictions only, not its hidden states: leave it out, or set "
                "`hidden_weight` and `attention_weight` to 0."
            )
        for name in ("dense_answers", "dense_questions"):
            if self.dual_space and getattr(self, name):
                raise ConfigurationError(
                    f"`{name}` is {getattr(self, name)}, but the teacher of `dual_space` has another tokenizer and "
                    "chat template: leave one of them out."
                )
        others = {"cache": self.cache, "hidden_weight": self.hidden_weight, "attention_weight": self.attention_weight}
        others |= {"on_prompts=False": not self.on_prompts}
        for name in (name for name, value in others.items() if self.dual_space and value):
            raise ConfigurationError(
                f"`dual_space` follows a teacher with other tokens over whole texts, and `{name}` is given: leave "
                "it out."
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_public_dict(self) -> dict[str, Any]:
        """The same with the name of the cache in place of its path."""
        return {**self.to_dict(), "cache": None if self.cache is None else Path(self.cache).name}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DistillationConfig:
        check_keys(cls, values)
        return cls(**values)
