"""TRL's own SFT script with one line more: the callback. Every option of `trl sft` works.

python sft_with_callback.py --model_name_or_path PRUNED --dataset_name ROWS --dense DENSE --use_peft --output_dir OUT
"""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from hf_structprune.recovery import LoraRecoveryCallback


@dataclass
class Script(ScriptArguments):
    dense: str | None = None  # the model before pruning, to tell how much is back


def main():
    script, args, options = TrlParser((Script, SFTConfig, ModelConfig)).parse_args_and_config()
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(options.model_name_or_path, dtype=options.dtype),
        args,
        train_dataset=load_dataset(script.dataset_name, script.dataset_config)[script.dataset_train_split],
        processing_class=AutoTokenizer.from_pretrained(options.model_name_or_path),
        peft_config=get_peft_config(options),
        callbacks=[LoraRecoveryCallback(script.dense)],
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
