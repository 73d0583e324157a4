"""The route for a teacher with another tokenizer: TRL's GOLD trainer on two tiny models, offline."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_distillation import make_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


SCRIPT = Path(__file__).parents[3] / "recipes" / "scripts" / "distill_cross_tokenizer.py"
TEXTS = [
    "the quick brown fox jumps over the dog",
    "a small model learns from a large model",
    "what is it? a test",
]
ROWS = [{"prompt": "what is it? ", "completion": "a small model"}, {"prompt": "the quick ", "completion": "brown fox"}]


def train_tokenizer(vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=128
    )


def save_pair(folder):
    """A student, and a teacher with longer tokens."""
    for name, size, width, seed in (("student", 270, 24, 0), ("teacher", 300, 48, 1)):
        tokenizer = train_tokenizer(size)
        model = make_llama(width, seed)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student, a teacher with longer tokens and rows."""
    folder = tmp_path_factory.mktemp("gold")
    save_pair(folder)
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    return folder


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("distill_cross_tokenizer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, folders, output_dir, monkeypatch, *options):
    command = ["--model", folders / "student", "--teacher", folders / "teacher", "--data", folders / "rows"]
    command += ["--output_dir", output_dir, "--use_cpu", "True", "--bf16", "False", "--report_to", "none"]
    command += [
        "--logging_steps",
        "1",
        "--gradient_checkpointing",
        "False",
        "--max_length",
        "64",
        "--max_completion_length",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", ["script", *map(str, command), *options])
    return script.main()


@pytest.mark.slow
def test_the_student_comes_nearer(script, folders, tmp_path, monkeypatch):
    sizes = [len(train_tokenizer(size)("the quick brown fox")["input_ids"]) for size in (270, 300)]
    assert sizes[0] > sizes[1]  # the tokenizers do differ on this text
    trainer = run(
        script, folders, tmp_path, monkeypatch, "--max_steps", "12", "--per_device_train_batch_size", "4",
        "--learning_rate", "3e-3", "--lora", "False", "--lr_scheduler_type", "constant",
    )  # fmt: skip
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < 0.8 * losses[0]
    saved = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in trainer.model.parameters())


@pytest.mark.slow
def test_the_student_may_write_its_own_answers(script, folders, tmp_path, monkeypatch):
    trainer = run(
        script, folders, tmp_path, monkeypatch, "--max_steps", "2", "--per_device_train_batch_size", "2",
        "--lmbda", "1.0",
    )  # fmt: skip
    assert "on_policy_loss" in trainer.state.log_history[0]
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_accumulation_averages(script, folders, tmp_path, monkeypatch):
    """Fails when TRL's own scaling of GOLD comes right, so that the mending can go."""
    steps = []
    for micro, accumulated in ((4, 1), (1, 4)):
        trainer = run(
            script, folders, tmp_path / str(micro), monkeypatch, "--max_steps", "1", "--optim", "sgd",
            "--per_device_train_batch_size", str(micro), "--gradient_accumulation_steps", str(accumulated),
            "--learning_rate", "0.1", "--lora", "False", "--max_grad_norm", "0", "--lr_scheduler_type", "constant",
        )  # fmt: skip
        steps.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*steps, atol=1e-6, rtol=0)
