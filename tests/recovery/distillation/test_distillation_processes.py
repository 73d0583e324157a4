"""Two processes take the step of one: DDP on CPU."""

import json

import pytest
import torch
from processes import forked
from tiny_distillation import LORA, assert_equal_states, make_llama, make_trainer, peft, state
from tiny_tokenizers import build_tokenizer

from hf_structprune.recovery.configuration import DistillationConfig


CASES = ("lora", "full, cached")


def train(folder, processes):
    """One optimiser step of distillation on four rows, by as many processes; writes what came out."""
    for case in CASES:
        lora = case == "lora"
        followed = {"hidden_weight": 0.5} if lora else {"cache": str(folder / "cache"), "top_k": 128}
        config = DistillationConfig(label_weight=0.3, temperature=2.0, **followed)
        trainer = make_trainer(
            folder / "out", build_tokenizer(), make_llama(24, 0), make_llama(48, 1), config=config,
            per_device_train_batch_size=4 // processes, peft_config=peft.LoraConfig(**LORA) if lora else None,
        )  # fmt: skip
        assert trainer.accelerator.num_processes == processes
        trainer.train()
        if trainer.accelerator.is_main_process:
            torch.save(state(trainer.accelerator.unwrap_model(trainer.model)), folder / f"{case}.pt")
            (folder / f"{case}.json").write_text(json.dumps(trainer.state.log_history[0]))


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    train(one, 1)
    assert forked(train, two, 2, count=2) == [0, 0]
    for case in CASES:
        assert_equal_states(*(torch.load(folder / f"{case}.pt") for folder in (one, two)), 1e-6)
        log, other = (json.loads((folder / f"{case}.json").read_text()) for folder in (one, two))
        for name in ("loss", "distillation/kl", "distillation/label_loss", "num_tokens"):
            assert other[name] == pytest.approx(log[name], rel=1e-5)
