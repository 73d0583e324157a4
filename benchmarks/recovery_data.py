"""Files for the recovery recipes from local copies of Dolly and C4: what is trained on and what is held out.

    python benchmarks/recovery_data.py --dolly FOLDER --c4 FILE.jsonl --tokenizer MODEL --output-dir data

`dolly` holds instruction, input and output rows (`*train*.jsonl` and `heldout.jsonl`), `c4` rows `{"text": ...}`, of
which the last 300 are held out. Held-out instructions are rendered with the chat template of the tokenizer. `watched`
is a little of both, in turns, which is neither trained on nor held out: what is measured during training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from transformers import AutoTokenizer


HELD_OUT = 300
WATCHED = 80  # rows of each source


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dolly", "c4", "output-dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
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


if __name__ == "__main__":
    main()
