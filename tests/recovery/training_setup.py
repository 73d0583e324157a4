"""A tiny training: text it can learn, a model that has lost something, and a callback to watch it."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_tokenizers import build_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_structprune.evaluation.perplexity import EvaluationText
from hf_structprune.recovery import save
from hf_structprune.recovery.callback import LoraRecoveryCallback
from hf_structprune.recovery.measuring import HeldOutText


LETTERS = "the cat sat on the mat and the dog ran to the cat, then on. "
TEXT = EvaluationText("held-out", LETTERS * 12, "made up")


@pytest.fixture(autouse=True)
def quick_picture(monkeypatch):
    """Drawing a curve takes longer than training a tiny model: modules that import this leave it out."""
    monkeypatch.setattr(save, "draw_curve", lambda curve, path, best_step=None: path.write_bytes(b"a curve"))


def make_tiny(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        attention_dropout=dropout,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def make_lora(dropout=0.0, seed=0, **options):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", **options)
    return get_peft_model(make_tiny(seed=seed), config)


def tokenizer():
    made = build_tokenizer()
    made.pad_token = "</s>"
    return made


HELD_OUT = HeldOutText(tokenizer(), TEXT, window=32, max_windows=4)


def rows(count=32):
    made = tokenizer()
    texts = [(LETTERS * 2)[start : start + 32] for start in range(count)]
    return Dataset.from_list([{"input_ids": made(text)["input_ids"]} for text in texts])


def arguments(folder, **options):
    options = {
        "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3, **options,
    }  # fmt: skip
    return TrainingArguments(str(folder), **options)


def make_callback(**options):
    options = {"text": TEXT, "window": 32, "max_windows": 4, "merge": False, "evaluations": 4, **options}
    return LoraRecoveryCallback(**options)


def make_trainer(folder, callback=None, model=None, callbacks=(), trainer_class=Trainer, **options):
    made = tokenizer()
    return trainer_class(
        make_lora() if model is None else model,
        arguments(folder, **options),
        train_dataset=rows(),
        eval_dataset=rows(8),
        processing_class=made,
        data_collator=DataCollatorForLanguageModeling(made, mlm=False),
        callbacks=[*callbacks, *([callback] if callback else [])],
    )


SAVING = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "max_steps": 8}


def build(folder, callbacks=(), **options):
    """A training that saves checkpoints and goes through dropout, and its callback."""
    model = make_lora(dropout=0.2)
    callback = make_callback(dense=20.0, merge=True, patience=None, evaluations=8)
    return make_trainer(folder, callback, model=model, callbacks=callbacks, **{**SAVING, **options}), callback


class Listener(TrainerCallback):
    """What a reporting callback sees."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


class Spoil(TrainerCallback):
    """Makes the model worse at a step, or turns it into nonsense."""

    def __init__(self, step, factor):
        self.step, self.factor = step, factor

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.step:
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(self.factor).add_(0.3 * (self.factor != 1))


def losses(trainer):
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
