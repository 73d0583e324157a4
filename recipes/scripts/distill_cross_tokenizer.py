"""Distils a pruned model from a teacher with another tokenizer, with TRL's GOLD trainer.

python distill_cross_tokenizer.py --model PRUNED --teacher TEACHER --data ROWS --output_dir OUT

ROWS: a data set of the Hub or a folder or file that `load_dataset` reads, with columns `prompt` and `completion`, or
`messages`. Every option of `GOLDConfig` works; defaults that differ from TRL's stand in `DEFAULTS`.

With one tokenizer on both sides use `hf-structprune recover --method distill` instead: it is exact and cheaper. GOLD
compares where both tokenizations of an answer end at the same byte: of tokens that both vocabularies have it compares
the probabilities, of all others only the sorted ones (ULD, arXiv:2402.12030). Its limits, in TRL 1.16:

* Tokenizers: both fast and byte-level BPE (Llama 3, Qwen, SmolLM, Mistral from v0.3 on). For SentencePiece ones (Llama
  2, TinyLlama, Mistral v0.1) only `--use_extended_uld False` is left, which compares the n-th tokens of both whatever
  they mean: expect little.
* Chats are written in the student's template, also for the teacher, whose own tokens for turns are not used.
* Only answers are followed, never prompts, and packing is refused.
* Memory: the logits of both models for a whole batch, several times over in float32 (softmax, sorting): 2 sequences of
  512 tokens and a vocabulary of 128k are 0.5 GB for every copy. Make batches small and accumulate.
* `--lmbda` is the share of batches that the student writes itself (TRL: 0.5). For these it generates up to
  `max_completion_length` tokens one by one, which costs many times a training step without vLLM. The default here is
  0: answers of the data. 1 follows the student where it errs, which is what GOLD is for, once its text makes sense.
* Gradient accumulation: TRL 1.16 adds the losses of micro-batches up instead of averaging them, so that the gradient
  grows with their number. `loss_is_scaled_for_ga` below mends that. The loss is a mean over answers, not tokens.
* It is experimental: names of options change from one version of TRL to the next.

Tried on CPU, without a network, with two tiny Llamas (tests/recovery/distillation/test_cross_tokenizer.py), and not on
models of real size.
"""

from dataclasses import dataclass

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl.experimental.gold import GOLDConfig, GOLDTrainer


# "bayesian" multiplies the probabilities of the tokens that make up a longer one in the order of the text, and
# compares the distributions that predict a token rather than those that come after it.
DEFAULTS = {
    "use_uld_loss": True,
    "uld_use_hybrid_loss": True,
    "uld_token_merge_strategy": "bayesian",
    "lmbda": 0.0,
    "learning_rate": 1e-4,
    "max_length": 512,
}


@dataclass
class Script:
    model: str  # folder or Hub id of the pruned model, with its tokenizer
    teacher: str  # the same of the teacher
    data: str
    split: str = "train"
    lora: bool = True  # train adapters; False trains all weights
    teacher_dtype: str = "auto"  # or float32, bfloat16, float16


def main():
    parser = HfArgumentParser((Script, GOLDConfig))
    parser.set_defaults(**DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    args.teacher_tokenizer_name_or_path = args.teacher_tokenizer_name_or_path or script.teacher
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = torch.bfloat16 if args.bf16 and script.lora else torch.float32
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GOLDTrainer(
        AutoModelForCausalLM.from_pretrained(script.model, dtype=dtype),
        AutoModelForCausalLM.from_pretrained(script.teacher, dtype=script.teacher_dtype),
        args,
        train_dataset=load_dataset(script.data, split=script.split),
        processing_class=tokenizer,
        peft_config=lora if script.lora else None,
    )
    trainer.loss_is_scaled_for_ga = False
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
