"""What a longer recovery brings back, on the whole protocol: 12 windows of 2048 tokens, and answers to questions.

    python benchmarks/recovery_data.py --dolly FOLDER --c4 FILE.jsonl --tokenizer MODEL --output-dir data [--answers N]
    python benchmarks/recovered.py --dense MODEL --pruned FOLDER --data data --wikitext2 FOLDER --name NAME

Trains on `--tokens` tokens, a third each of chats, web pages and Wikipedia (`recovery_settings.py`), with `--answers`
beside short questions and the dense model's own answers, by distillation of all weights. Measured are the dense, the
pruned and the recovered model: perplexity of text that was not trained on over that of the dense model, and the
packaged closed questions, of which every fifth is counted by itself, and once more after four examples
(`short_answers`), for answers of a few words. Results are added to benchmarks/results/recovered.json under `--name`;
what was measured there already is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from recovery_settings import read_data
from transformers import AutoTokenizer

from hf_structprune.evaluation import perplexity
from hf_structprune.evaluation.answers import QUESTION_TOKENS, answer_all, is_right, words_of
from hf_structprune.evaluation.questions import closed_questions
from hf_structprune.files.writing import write_text
from hf_structprune.installed import versions
from hf_structprune.model.loading import load_model
from hf_structprune.recovery import DistillationConfig, RecoveryConfig, recover
from hf_structprune.recovery.own_answers import Answers
from hf_structprune.recovery.own_questions import SHOTS


RESULTS = Path(__file__).parent / "results" / "recovered.json"
WINDOWS, EVERY = 12, 5
EXAMPLES, SHORT_TOKENS = 4, 16
SETTINGS = {
    "method": "distill", "weights": "full", "learning_rate": 2e-4, "warmup": 0.1, "batch_size": 6,
    "micro_batch_size": 3, "max_length": 512, "packing": True, "prompt_loss": True, "epochs": 1.0, "evaluations": 2,
    "max_windows": 8, "precision": "bf16",
}  # fmt: skip


def measure(folder: str | Path, tokenizer: Any, texts: dict[str, str]) -> dict[str, Any]:
    """Perplexity of each text, and what the model answers."""
    model = load_model(folder, dtype=torch.bfloat16)
    found: dict[str, Any] = {
        name: perplexity(model, tokenizer, text, max_windows=WINDOWS).perplexity for name, text in texts.items()
    }
    asked = closed_questions()
    said = answer_all(model, tokenizer, [one.text for one in asked], QUESTION_TOKENS)
    found["answers"] = [one.text for one in said]
    found["right"] = [is_right(one.text, about.answers) for one, about in zip(said, asked, strict=True)]
    found["short"] = short_answers(model, tokenizer, [one.text for one in asked])
    found["short right"] = [is_right(one, about.answers) for one, about in zip(found["short"], asked, strict=True)]
    del model
    gc.collect()
    return found


def short_answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """What the model says to each question after four examples, up to the end of the line: a few words."""
    examples = "\n\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in SHOTS[:EXAMPLES])
    asked = [tokenizer(f"{examples}\n\nQuestion: {question}\nAnswer:")["input_ids"] for question in questions]
    answers, texts = Answers(model, tokenizer, asked, SHORT_TOKENS, len(asked)), {}
    for number, places in enumerate(answers.batches):
        for place, (ids, _) in zip(places, answers.said(number), strict=True):
            texts[place] = tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip()
    return [texts[place] for place in range(len(questions))]


def row(name: str, found: dict[str, Any], dense: dict[str, Any], texts: list[str]) -> str:
    """A line of the table, in Markdown."""
    over = [f"{found[text]:.2f} ({found[text] / dense[text]:.3f})" for text in texts]
    same = [words_of(a) == words_of(b) for a, b in zip(found["answers"], dense["answers"], strict=True)]
    right = found["right"]
    return (
        f"| {name} | {' | '.join(over)} | {sum(right)} | {sum(right[::EVERY])} | {sum(same)} | {sum(same[::EVERY])} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dense", "pruned", "name"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "wikitext2"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=368_000)
    parser.add_argument("--label-weight", type=float, default=0.0)
    parser.add_argument("--answers", action="store_true", help="train on the dense model's own answers too")
    parser.add_argument("--output-dir", type=Path, help="keeps the recovered model; default: beside the pruned one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.pruned)
    rows, texts = read_data(arguments, tokenizer, arguments.answers)
    results = json.loads(arguments.output.read_text(encoding="utf-8")) if arguments.output.is_file() else {}
    results.setdefault("versions", versions("trl", "peft"))
    results.setdefault("dense", {}) or results["dense"].update(measure(arguments.dense, tokenizer, texts))
    run = results.setdefault(arguments.name, {})
    run |= {"label_weight": arguments.label_weight, "answers": arguments.answers, "settings": SETTINGS}

    def keep() -> None:
        write_text(arguments.output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    keep()
    if "pruned" not in run:
        run["pruned"] = measure(arguments.pruned, tokenizer, texts)
        keep()
    if "recovered" not in run:
        folder = arguments.output_dir or Path(f"{arguments.pruned}-recovered")
        made = recover(
            arguments.pruned, rows, folder, RecoveryConfig(**SETTINGS), teacher=arguments.dense,
            distillation=DistillationConfig(label_weight=arguments.label_weight), resume=folder.with_name(
                folder.name + "-training"
            ).is_dir(),
        )  # fmt: skip
        training = made.report["training"]
        run |= {"tokens": training["tokens"], "steps": training["steps"], "seconds": round(training["seconds"])}
        run["recovered"] = measure(folder, tokenizer, texts)
        keep()
    names = list(texts)
    print(f"| | {' | '.join(names)} | right of 100 | of each fifth | as the dense model | of each fifth |")
    print(f"| --- |{' ---: |' * (len(names) + 4)}")
    print(row("dense", results["dense"], results["dense"], names))
    for step in ("pruned", "recovered"):
        print(row(f"{arguments.name}, {step}", run[step], results["dense"], names))


if __name__ == "__main__":
    main()
