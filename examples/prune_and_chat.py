"""Prunes a model and asks both the same: python examples/prune_and_chat.py [--model ID] [--ratio 0.1]"""

from __future__ import annotations

import argparse

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner


def answer(pruner: StructuredPruner, question: str, new_tokens: int) -> str:
    """What the model says, without sampling."""
    tokenizer = pruner.tokenizer
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(question, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    out = pruner.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of all parameters that goes")
    parser.add_argument("--output-dir", default="smaller")
    parser.add_argument("--samples", type=int, default=128, help="sequences of calibration text")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--ask", nargs="+", default=["What is the capital of France?", "Name three colours."])
    options = parser.parse_args()
    calibration = CalibrationConfig(num_samples=options.samples)
    pruner = StructuredPruner.from_pretrained(options.model, PruningConfig(calibration=calibration))
    before = [answer(pruner, question, options.new_tokens) for question in options.ask]
    pruner.prune(options.ratio)
    print(pruner.last_plan)
    for question, dense in zip(options.ask, before, strict=True):
        print(f"\n{question}\n dense: {dense}\npruned: {answer(pruner, question, options.new_tokens)}")
    pruner.save_pretrained(options.output_dir)
    print(f"\nSaved to {options.output_dir}; `recover` gives quality back: examples/recover_with_trl.py")


if __name__ == "__main__":
    main()
