"""What distillation brings back at equal tokens, one setting changed at a time: the table of docs/recover.md.

    python benchmarks/recovery_data.py --dolly FOLDER --c4 FILE.jsonl --tokenizer MODEL --output-dir data
    python benchmarks/recovery_settings.py --dense MODEL --pruned FOLDER --data data --wikitext2 FOLDER [NAME ...]

Every run trains `recover` on the same packed sequences (chats, web pages and Wikipedia, a third of the tokens each),
whatever it does with them, and is measured on what it was not trained on: perplexity, and KL divergence from the dense
model. "% back" is `(log pruned - log now) / (log pruned - log dense)`. NAME picks runs of `RUNS`. Results are added to
benchmarks/results/recovery_settings.json; runs that are there already are not done again.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from hf_structprune.files.writing import write_text
from hf_structprune.installed import versions
from hf_structprune.model.loading import load_model
from hf_structprune.recovery import DistillationConfig, RecoveryConfig, recover


RESULTS = Path(__file__).parent / "results" / "recovery_settings.json"
WINDOW, WINDOWS = 512, 6
FIXED = {
    "max_length": 512, "packing": True, "prompt_loss": True, "dropout": 0.0, "epochs": 1.0, "batch_size": 1,
    "micro_batch_size": 1, "evaluations": 1, "max_windows": 4, "precision": "bf16", "warmup": 0.1,
    "save_steps": 10_000,
}  # fmt: skip
LORA = {"rank": 64, "alpha": 128}
FULL = {"method": "distill", "weights": "full", "learning_rate": 2e-4, "train_embeddings": True}
# The changes of a run, of `RecoveryConfig` and of `DistillationConfig`.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "labels, LoRA, 1e-3": ({"method": "lora", "learning_rate": 1e-3, **LORA}, {}),
    "KL, all weights, 2e-4": (FULL, {}),
    "KL, LoRA, 1e-3": ({"method": "distill", "learning_rate": 1e-3, **LORA}, {}),
    "KL and labels, LoRA, 1e-3": ({"method": "distill", "learning_rate": 1e-3, **LORA}, {"label_weight": 0.5}),
    "KL, all weights, 5e-4": ({**FULL, "learning_rate": 5e-4}, {}),
    "KL and labels, all weights, 2e-4": (FULL, {"label_weight": 0.5}),
    "KL, all weights, 2e-4, batches of 4": ({**FULL, "batch_size": 4}, {}),
    "KL, all weights but embeddings, 2e-4, batches of 4": (
        {**FULL, "batch_size": 4, "micro_batch_size": 4, "train_embeddings": False},
        {},
    ),
    "KL, all weights, 2e-4, batches of 4 at once": ({**FULL, "batch_size": 4, "micro_batch_size": 4}, {}),
    "KL, all weights, 2e-4, answers alone": ({**FULL, "prompt_loss": False}, {"on_prompts": False}),
    "KL, all weights, 2e-4, top 64": (FULL, {"cache": "cache", "top_k": 64}),
    "KL, all weights, 2e-4, T 2": (FULL, {"temperature": 2.0}),
    "KL, LoRA, 3e-3": ({"method": "distill", "learning_rate": 3e-3, **LORA}, {}),
    "labels, all weights, 2e-4": ({"method": "full", "learning_rate": 2e-4}, {}),
}


def windows(tokenizer: Any, text: str) -> torch.Tensor:
    """The first windows of a text, `(WINDOWS, WINDOW)`."""
    ids = tokenizer(text[: WINDOWS * WINDOW * 12], return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: WINDOWS * WINDOW].view(WINDOWS, WINDOW)


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of every next token of a window, `(1, WINDOW - 1, vocabulary)`, in float32."""
    return F.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), -1)


def measure(model: Any, dense: dict[str, torch.Tensor], texts: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Log-perplexity and KL divergence from what the `dense` model predicts, of every text, in nats a token."""
    found = {}
    for name, rows in texts.items():
        loss = divergence = 0.0
        for row, theirs in zip(rows.split(1), dense[name], strict=True):
            own = log_probabilities(model, row)
            loss += F.nll_loss(own[0], row[0, 1:]).item() / len(rows)
            kl = F.kl_div(own[0], theirs.float(), log_target=True, reduction="sum")
            divergence += kl.item() / own.shape[1] / len(rows)
        found[name] = {"log_perplexity": loss, "kl": divergence}
    return found


def read_data(
    arguments: argparse.Namespace, tokenizer: Any, answers: bool = False
) -> tuple[list[dict], dict[str, str]]:
    """Rows to train on, `tokens` in all, and the texts to measure on.

    A third each of chats, web pages and Wikipedia, or as `arguments.shares` says. With `answers`, a quarter at most
    are questions with the dense model's own answers, of `recovery_data.py --answers`.
    """

    def rows_of(name: str) -> list[dict]:
        text = (arguments.data / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]

    def chats_of(name: str) -> list[dict]:
        return [
            {
                "prompt": tokenizer.apply_chat_template(
                    [{"role": "user", "content": f"{r['instruction']}\n\n{r['input']}".strip()}],
                    tokenize=False, add_generation_prompt=True,
                ),
                "completion": r["output"],
            }
            for r in rows_of(name)
        ]  # fmt: skip

    rows: list[dict] = []

    def take(source: list[dict], tokens: float) -> int:
        """Adds rows of up to so many tokens; how many tokens those have."""
        used = 0
        for row in source:
            length = len(tokenizer(row["prompt"] + row["completion"], verbose=False)["input_ids"]) + 1
            if length <= FIXED["max_length"]:
                rows.append(row)
                used += length
            if used >= tokens:
                break
        return used

    wiki = (arguments.wikitext2 / "train.txt").read_text(encoding="utf-8")
    articles = [{"prompt": "", "completion": line} for line in wiki.split("\n") if len(line) > 500]
    pages = [{"prompt": "", "completion": r["text"]} for r in rows_of("c4_train.jsonl")]
    left = arguments.tokens - (take(chats_of("answers.jsonl"), arguments.tokens / 4) if answers else 0)
    shares = getattr(arguments, "shares", None) or [1, 1, 1]
    for source, share in zip((chats_of("dolly_train.jsonl"), pages, articles), shares, strict=True):
        take(source, left * share / sum(shares))
    texts = {
        "WikiText-2": (arguments.wikitext2 / "test.txt").read_text(encoding="utf-8"),
        "C4": "\n\n".join(row["text"] for row in rows_of("c4.jsonl")),
        "Dolly": "".join(row["text"] for row in rows_of("dolly.jsonl")),
    }
    return rows, texts


def back(now: dict, pruned: dict, dense: dict, name: str) -> float:
    """The share of the lost log-perplexity that is back."""
    end, start = dense[name]["log_perplexity"], pruned[name]["log_perplexity"]
    return (start - now[name]["log_perplexity"]) / (start - end)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| | tokens | s | WikiText-2 | C4 | Dolly | KL |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    dense, pruned = results["dense"], results["pruned"]
    for name, found in [("dense", dense), ("20 %", pruned)]:
        cells = [f"{math.exp(found[text]['log_perplexity']):.1f}" for text in found]
        lines.append(f"| {name} | | | {' | '.join(cells)} | {mean_kl(found):.3f} |")
    for name, run in results["runs"].items():
        now = run["measured"]
        cells = [
            f"{math.exp(now[text]['log_perplexity']):.1f} ({100 * back(now, pruned, dense, text):.0f} %)"
            for text in now
        ]
        cells = [f"{run['tokens']:,}", f"{run['seconds']:.0f}", *cells, f"{mean_kl(now):.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_kl(found: dict[str, dict[str, float]]) -> float:
    return sum(one["kl"] for one in found.values()) / len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="runs of RUNS; all by default")
    for name in ("dense", "pruned"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("data", "wikitext2"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.pruned)
    rows, whole = read_data(arguments, tokenizer)
    texts = {name: windows(tokenizer, text) for name, text in whole.items()}
    model = load_model(arguments.dense, dtype=torch.bfloat16)
    dense = {  # in half precision: 0.9 GB
        name: torch.cat([log_probabilities(model, row).half() for row in rows_of.split(1)])
        for name, rows_of in texts.items()
    }
    if arguments.output.is_file():
        results = json.loads(arguments.output.read_text(encoding="utf-8"))
    else:
        pruned = load_model(arguments.pruned, dtype=torch.bfloat16)
        results = {
            "tokens": arguments.tokens, "window": WINDOW, "windows": WINDOWS, "fixed": FIXED,
            "versions": versions("trl", "peft"), "dense": measure(model, dense, texts),
            "pruned": measure(pruned, dense, texts), "runs": {},
        }  # fmt: skip
        del pruned
    del model
    for name in arguments.names or RUNS:
        if name in results["runs"]:
            continue
        changes, distillation = RUNS[name]
        folder = Path(tempfile.mkdtemp())
        if "cache" in distillation:
            distillation = {**distillation, "cache": str(folder / "cache")}
        config = RecoveryConfig(**{**FIXED, **changes})
        is_distilled = config.method == "distill"
        started = time.perf_counter()
        result = recover(
            arguments.pruned, rows, folder / "out", config, distillation=DistillationConfig(**distillation),
            teacher=arguments.dense if is_distilled else None,
        )  # fmt: skip
        student = load_model(folder / "out", dtype=torch.bfloat16)
        results["runs"][name] = {
            "configuration": {**changes, **RUNS[name][1]},
            "tokens": result.report["training"]["tokens"], "steps": result.report["training"]["steps"],
            "seconds": round(result.report["training"]["seconds"]),
            "seconds_with_all": round(time.perf_counter() - started),
            "measured": measure(student, dense, texts),
        }  # fmt: skip
        del student, result
        gc.collect()
        shutil.rmtree(folder)
        write_text(arguments.output, json.dumps(results, indent=1) + "\n")
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
