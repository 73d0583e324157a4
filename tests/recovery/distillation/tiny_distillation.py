"""Tiny models, rows and trainers of the distillation tests."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_structprune.recovery.configuration import DistillationConfig
from hf_structprune.recovery.distillation.teacher import load_teacher


trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from hf_structprune.recovery.distillation.trainer import DistillationSFTTrainer  # noqa: E402


LORA = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")


def make_llama(width, seed, tied=True, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        initializer_range=0.3, max_position_embeddings=128, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_rows(lengths=((3, 2), (7, 1), (2, 9), (5, 4)), seed=0):
    """Tokenised rows: (prompt length, answer length) each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, answer in lengths:
        ids = torch.randint(4, 90, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def make_trainer(tmp_path, tokenizer, student, teacher, rows=None, *, config=None, peft_config=None, **options):
    config = config or DistillationConfig(label_weight=0.3)
    if isinstance(teacher, LlamaForCausalLM):
        teacher = load_teacher(teacher, student, config)
    defaults = dict(
        use_cpu=True, bf16=False, max_steps=1, logging_steps=1, per_device_train_batch_size=4, report_to=[],
        gradient_checkpointing=False, save_strategy="no", optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=0.0, disable_tqdm=True,
    )  # fmt: skip
    rows = make_rows() if rows is None else rows
    return DistillationSFTTrainer(
        student, trl.SFTConfig(str(tmp_path), **{**defaults, **options}), train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, peft_config=peft_config, teacher=teacher, distillation=config,
    )  # fmt: skip


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(a, b, tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
