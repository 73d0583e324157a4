"""LoRA recovery of a pruned checkpoint with the plain `Trainer`: every option of `TrainingArguments` works.

python train_with_trainer.py --model PRUNED --data ROWS --dense DENSE --output_dir OUT --learning_rate 1e-4
"""

from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from hf_structprune.recovery import LoraRecoveryCallback
from hf_structprune.recovery.data import load_rows, prepare


@dataclass
class Script:
    model: str  # folder or Hub id of the pruned checkpoint
    data: str  # chats, instructions or text: a file, a folder or a Hub id
    dense: str | None = None  # the model before pruning, to tell how much is back
    max_length: int = 512


def main():
    script, args = HfArgumentParser((Script, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    rows, report = prepare(load_rows(script.data), tokenizer, max_length=script.max_length)
    print(*report.lines(), sep="\n")
    model = AutoModelForCausalLM.from_pretrained(script.model, dtype="bfloat16" if args.bf16 else "float32")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = Trainer(
        model,
        args,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[LoraRecoveryCallback(script.dense)],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
