"""Files for the recovery recipes from local copies of Dolly and C4: what is trained on and what is held out.

    python benchmarks/recovery_data.py --dolly FOLDER --c4 FILE.jsonl --tokenizer MODEL --output-dir data [--answers N]

`dolly` holds instruction, input and output rows (`*train*.jsonl` and `heldout.jsonl`), `c4` rows `{"text": ...}`, of
which the last 300 are held out. Held-out instructions are rendered with the chat template of the tokenizer. `watched`
is a little of both, in turns, which is neither trained on nor held out: what is measured during training. `--answers`
has the dense model (`--tokenizer`) answer so many short questions of Dolly, and keeps the answers that it ends within
48 tokens: what distillation of sequences trains on (Kim and Rush, arXiv:1606.07947).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_structprune.evaluation.answers import answer_all
from hf_structprune.evaluation.questions import closed_questions
from hf_structprune.model.loading import load_model


HELD_OUT = 300
WATCHED = 80  # rows of each source
SHORT, ANSWER_TOKENS = 100, 48  # characters of a short question, tokens of an answer


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a `.jsonl` file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes rows as `.jsonl`."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def as_chat(row: dict[str, str], tokenizer) -> dict[str, str]:
    """An instruction and its answer as one text."""
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    return {"text": tokenizer.apply_chat_template(chat, tokenize=False)}


def own_answers(model_id: str, tokenizer, rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """The dense model's greedy answers to the first short questions that nobody is measured by."""
    measured = {one.text.lower() for one in closed_questions()}
    asked = [row["instruction"].strip() for row in rows if row["category"] == "open_qa" and not row["input"]]
    asked = [text for text in dict.fromkeys(asked) if len(text) <= SHORT and text.lower() not in measured][:count]
    said = answer_all(load_model(model_id, dtype=torch.bfloat16), tokenizer, asked, ANSWER_TOKENS)
    return [
        {"instruction": question, "input": "", "output": one.text}
        for question, one in zip(asked, said, strict=True)
        if one.ended and one.text
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dolly", "c4", "output-dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--answers", type=int, default=0)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    train = [row for path in sorted(arguments.dolly.glob("*train*.jsonl")) for row in read(path)]
    write(folder / "dolly_train.jsonl", train[:-WATCHED])
    write(folder / "dolly.jsonl", [as_chat(row, tokenizer) for row in read(arguments.dolly / "heldout.jsonl")])
    pages = read(arguments.c4)
    write(folder / "c4_train.jsonl", pages[: -HELD_OUT - WATCHED])
    write(folder / "c4.jsonl", pages[-HELD_OUT:])
    watched = zip(train[-WATCHED:], pages[-HELD_OUT - WATCHED : -HELD_OUT], strict=True)
    write(folder / "watched.jsonl", [row for chat, page in watched for row in (as_chat(chat, tokenizer), page)])
    if arguments.answers:
        write(
            folder / "answers.jsonl", own_answers(arguments.tokenizer, tokenizer, train[:-WATCHED], arguments.answers)
        )


if __name__ == "__main__":
    main()
