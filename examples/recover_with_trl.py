"""Trains a pruned checkpoint with TRL's own trainer; a callback watches held-out text and keeps the best.

    python examples/recover_with_trl.py smaller --dataset chats.jsonl

`hf_structprune.recover` does the same and more in one line. This is for those who have a training script.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from hf_structprune import LoraRecoveryCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the pruned checkpoint")
    parser.add_argument("--dataset", required=True, help=".jsonl of chats, of prompts and completions, or of texts")
    parser.add_argument("--dense", help="the model before pruning: how much of the loss is back")
    parser.add_argument("--output-dir", default="recovered")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--window", type=int, default=512, help="tokens in a window of the text that is watched")
    parser.add_argument("--max-windows", type=int, default=32)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    callback = LoraRecoveryCallback(
        options.dense, window=options.window, max_windows=options.max_windows, evaluations=4,
        output_dir=options.output_dir,
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=f"{options.output_dir}-training", max_steps=options.max_steps, learning_rate=1e-4,
            max_length=min(512, model.config.max_position_embeddings), per_device_train_batch_size=4,
            save_strategy="no", report_to="none", bf16=False, use_cpu=not model.device.type.startswith("cuda"),
        ),
        train_dataset=load_dataset("json", data_files=options.dataset, split="train"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    print(f"The best is in {options.output_dir}: step {callback.report['best_step']}")


if __name__ == "__main__":
    main()
