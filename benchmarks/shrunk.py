"""What `hf-structprune shrink` makes of a model in so many minutes of one processor core, on the whole protocol.

    python benchmarks/recovery_data.py --dolly FOLDER --c4 FILE.jsonl --tokenizer MODEL --output-dir data
    python benchmarks/shrunk.py --dense MODEL --data data --wikitext2 FOLDER --ratio 0.2 --minutes 30 --output-dir OUT

Runs the command as it is, on one thread and by the clock of the processor: a minute is one in which this process
computes, so that what else the machine does takes nothing away. It is given a file of chats, web pages and Wikipedia,
a third of the tokens each or by `--shares`, none of which is measured (`recovery_settings.py`); with `--no-data` it is
given none. Measured are 12 windows of 2048 tokens of each text that was held out, pruned and recovered over dense, and
right answers to the packaged closed questions (`recovered.py`), in all and of those that the dense model answers
right, and answers in its words, asked as chats and after four examples. With `--threads N` it takes so many threads
and the clock on the wall: nothing else may run then. With `--vocabulary-size N --vocabulary-text FILE ...` tokens go,
too; perplexity is of the dense model's tokens (`vocabulary.py`). Results are added to `--output`, by default
benchmarks/results/shrunk.json, under `--name`; with `--anew` what was there under this name, and of the dense model,
is measured anew. Answers are compared with what the dense model said on the same machine: another one rounds in
another way, and some answers differ. What lies in OUT is measured as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


_wall = time.monotonic
if not any(argument.startswith("--threads") for argument in sys.argv):
    time.monotonic = time.perf_counter = time.process_time  # before anything remembers the others

import torch  # noqa: E402
from core import commit  # noqa: E402
from recovered import WINDOWS, measure  # noqa: E402
from recovery_settings import read_data  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from vocabulary import measure as measure_windows  # noqa: E402
from vocabulary import windows  # noqa: E402

from hf_structprune import StructuredPruner  # noqa: E402
from hf_structprune.commands.cli import main as command  # noqa: E402
from hf_structprune.evaluation.answers import words_of  # noqa: E402
from hf_structprune.files.writing import write_text  # noqa: E402
from hf_structprune.installed import versions  # noqa: E402


RESULTS = Path(__file__).parent / "results" / "shrunk.json"
TOKENS = 370_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dense", "output-dir"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "wikitext2"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--ratio", type=float, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--layout", default="uniform", help="as of `shrink`")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the data; default: %(default)s")
    parser.add_argument("--shares", type=float, nargs=3, help="of chats, web pages and Wikipedia; default: the same")
    parser.add_argument("--vocabulary-size", type=int, help="as of `shrink`")
    parser.add_argument("--vocabulary-text", nargs="+", help="as of `shrink`")
    parser.add_argument("--dense-questions", type=int, help="as of `shrink`")
    parser.add_argument("--threads", type=int, default=1, help="by the clock on the wall; default: one, by its own")
    parser.add_argument("--no-data", action="store_true", help="without a data set")
    parser.add_argument("--anew", action="store_true", help="also what is in the file already")
    parser.add_argument("--name", help="default: of ratio, minutes and layout")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, texts = read_data(arguments, AutoTokenizer.from_pretrained(arguments.dense))
    texts = {name: texts[name] for name in ("WikiText-2", "C4", "Dolly")}
    out, line = Path(arguments.output_dir), ["shrink", arguments.dense]
    line += ["--ratio", str(arguments.ratio), "--minutes", str(arguments.minutes), "--output-dir", str(out)]
    line += ["--layout", arguments.layout]
    if arguments.vocabulary_size:
        line += ["--vocabulary-size", str(arguments.vocabulary_size), "--vocabulary-text", *arguments.vocabulary_text]
    if arguments.dense_questions is not None:
        line += ["--dense-questions", str(arguments.dense_questions)]
    if not arguments.no_data:
        file = arguments.data / "shrunk_train.jsonl"
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        line += ["--dataset", str(file)]
    there = arguments.output.is_file()
    results = json.loads(arguments.output.read_text(encoding="utf-8")) if there else {}
    results |= {"versions": versions("trl", "peft"), "windows": WINDOWS}
    name = arguments.name or f"{arguments.ratio:.0%} in {arguments.minutes:g} minutes"
    name += "" if arguments.name or arguments.layout == "uniform" else ", per-layer"
    name += f", {arguments.vocabulary_size} tokens" if arguments.vocabulary_size and not arguments.name else ""
    name += f", {arguments.threads} threads" if arguments.threads > 1 and not arguments.name else ""
    name += f", {arguments.dense_questions} questions" if arguments.dense_questions and not arguments.name else ""
    if arguments.anew:
        results = {key: found for key, found in results.items() if key not in (name, "dense")}
    run = results.setdefault(name, {"ratio": arguments.ratio, "minutes": arguments.minutes})
    run["commit"] = commit()
    run |= {"data_tokens": arguments.tokens} if arguments.tokens != TOKENS else {}
    run |= {"threads": arguments.threads} if arguments.threads > 1 else {}
    run |= {"shares": arguments.shares} if arguments.shares else {}
    if not out.is_dir():
        begun, wall = time.process_time(), _wall()
        if code := command(line):
            raise SystemExit(code)
        run["processor_minutes"] = round((time.process_time() - begun) / 60, 2)
        run["wall_minutes"] = round((_wall() - wall) / 60, 2)
    report = json.loads((out / "recovery.json").read_text(encoding="utf-8"))
    run["got"] = json.loads(Path(f"{out}-pruned", "pruning_plan.json").read_text(encoding="utf-8"))["ratio"]
    run |= {key: report["training"][key] for key in ("tokens", "steps", "seconds")}
    run["configuration"] = {key: report[key] for key in ("configuration", "distillation")}
    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    for state, folder in (("dense", arguments.dense), ("recovered", out), ("pruned", f"{out}-pruned")):
        kept = results if state == "dense" else run
        if state not in kept:
            kept[state] = measure(folder, AutoTokenizer.from_pretrained(folder), texts)
            if arguments.vocabulary_size and state != "dense":
                kept[state] |= of_dense_tokens(folder, tokenizer, texts)
            write_text(arguments.output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    dense = results["dense"]
    columns = [*texts, "right", "of the dense model's", "in its words", "in its words after examples"]
    print(f"| | {' | '.join(columns)} |\n| --- |{' ---: |' * len(columns)}")
    for title, found in (("dense", dense), (f"{name}, pruned", run["pruned"]), (name, run["recovered"])):
        cells = [f"{found[text]:.1f} ({found[text] / dense[text]:.3f})" for text in texts]
        cells += [str(sum(found["right"])), str(sum(map(min, found["right"], dense["right"])))]
        for answers in ("answers", "short"):  # of older results there are no short ones
            both = answers in found and answers in dense
            cells.append(str(sum(map(same_words, found[answers], dense[answers]))) if both else "")
        print(f"| {title} | {' | '.join(cells)} |")


def same_words(answer: str, dense: str) -> bool:
    """Whether two answers are the same but for case and punctuation."""
    return words_of(answer) == words_of(dense)


def of_dense_tokens(folder: str | Path, tokenizer: Any, texts: dict[str, str]) -> dict[str, float]:
    """Perplexity of the same windows, per token of the dense model, whatever tokens the model has."""
    small, found = StructuredPruner.from_pretrained(str(folder), dtype=torch.bfloat16), {}
    for name, text in texts.items():
        spans = windows(SimpleNamespace(tokenizer=tokenizer), text, WINDOWS)
        found[name] = measure_windows(small, spans)["perplexity"]
    return found


if __name__ == "__main__":
    main()
