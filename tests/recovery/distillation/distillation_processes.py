"""One optimiser step of distillation on four rows, by as many processes as started this; writes what came out.

Not a test: run by test_distillation_processes.py.
"""

import json
import sys
from pathlib import Path

import torch


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from conftest import build_tokenizer  # noqa: E402
from tiny_distillation import LORA, make_llama, make_trainer, peft, state  # noqa: E402

from hf_structprune.recovery.configuration import DistillationConfig  # noqa: E402


CASES = ("lora", "full, cached")


def main(folder: Path, processes: int) -> None:
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
