"""Fewer tokens on SmolLM2-135M-Instruct: perplexity per token of the dense tokenizer, bits per byte, what it saves.

    python benchmarks/vocabulary.py --wikitext FOLDER --c4 FILE.jsonl --dolly FOLDER [--keep 40000 ...] \\
        [--criteria frequency taylor ...] [--recover 24000] [--ratio 0.1]

`share` among the criteria is the order of `frequency` before it looks at what spells a token: the least frequent goes.
`counts` is the order of a few lines of one's own: how often a token is in all sources together, then its id.

`--recover TOKENS` trains what `frequency` leaves on so many tokens of the text that was counted, a third each of C4,
Dolly and WikiText-2, all weights (`--methods`): by distillation from the dense model, on the labels (`full`), and by
distillation with labels (`mix`, `label_weight=0.3`), and the same of the embedding alone (`embedding`, at 1e-3).
`--ratio` removes a share of all parameters: neurons alone, and neurons and tokens by `split="measured"`.

FOLDER holds the raw WikiText-2 splits; tokens are counted in `train.txt` and `valid.txt`, in all C4 documents but the
last 300, which are the test text, and in the training part of Dolly (`train-*.jsonl`: instruction, input, output).
Results go to benchmarks/results/vocabulary.json, of another model than the demo's to vocabulary-NAME.json; sizes that
are in it already, of the same settings, are not measured again.

The text is that of evenly spaced windows (12, or `--windows`) of 2048 tokens of the dense tokenizer, all but the first
token of each. The small model reads the same text as its own tokenizer splits it; its whole loss is divided by the
dense tokens, so that perplexities are of the same thing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from core import RESULTS, environment, split_texts, write
from rich.console import Console
from rich.table import Table

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.commands.models import DEMO_MODEL, find_model, load_pruner
from hf_structprune.recovery import DistillationConfig, RecoveryConfig, recover, recovering
from hf_structprune.recovery.recovering import load_student
from hf_structprune.text.reading import beginning_of, read_rows
from hf_structprune.vocabulary import choosing
from hf_structprune.vocabulary.aligning import Reader
from hf_structprune.vocabulary.counting import Counted
from hf_structprune.vocabulary.relating import related
from hf_structprune.vocabulary.trimming import Vocabulary


LENGTH = 2048
SHARE, COUNTS = "share", "counts"
NEURONS = "mlp_neurons"
SPLITS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "neurons": lambda sources: {"units": NEURONS},
    "tokens and neurons": lambda sources: {
        "units": ("vocabulary", NEURONS), "split": "measured", "vocabulary_text": sources,
    },
}  # fmt: skip
METHODS: dict[str, tuple[dict[str, Any], DistillationConfig | None]] = {
    "distill": ({"method": "distill", "weights": "full"}, None),
    "full": ({"method": "full"}, None),
    "mix": ({"method": "distill", "weights": "full"}, DistillationConfig(label_weight=0.3)),
    "embedding": (
        {"method": "distill", "weights": "full", "learning_rate": 1e-3},
        DistillationConfig(label_weight=0.3),
    ),
}
TRAINING = {
    "learning_rate": 2e-4, "warmup": 0.1, "batch_size": 4, "micro_batch_size": 2, "max_length": 512, "packing": True,
    "prompt_loss": True, "epochs": 1.0, "evaluations": 1, "max_windows": 4, "precision": "bf16", "save_steps": 10_000,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="Hub id or folder")
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--c4", type=Path, required=True)
    parser.add_argument("--dolly", type=Path, required=True)
    parser.add_argument("--keep", type=int, nargs="*", default=[40000, 32768, 24576, 16384])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--criteria", nargs="*", default=["frequency"])
    parser.add_argument("--recover", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["distill", "full", "mix"])
    parser.add_argument("--ratio", type=float, default=0.0)
    parser.add_argument("--dtype", default="bf16")
    options = parser.parse_args()
    counted, texts = split_texts(options.wikitext, options.c4)
    dolly = counted.with_name("dolly.jsonl")
    dolly.write_text("".join(map(as_text, sorted(options.dolly.glob("train-*.jsonl")))), encoding="utf-8")
    sources = [*(str(options.wikitext / f"{split}.txt") for split in ("train", "valid")), str(counted), str(dolly)]
    dense = load(options.model, options.dtype)
    spans = {name: windows(dense, text, options.windows) for name, text in texts.items()}
    about = {
        "environment": environment(),
        "dtype": options.dtype,
        "windows": options.windows,
        "sources": [Path(s).name for s in sources],
    }
    output = "vocabulary.json" if options.model == DEMO_MODEL else f"vocabulary-{Path(options.model).name}.json"
    rows = measured(about, output)
    cases: list[tuple[str, int | None]] = [("dense", len(dense.tokenizer)), *product(options.criteria, options.keep)]
    if options.recover:
        names = [f"frequency, {method} on {options.recover:,} tokens" for method in options.methods]
        cases += product(names, options.keep)
    cases += [(f"{name} by {options.ratio:.0%}", None) for name in SPLITS if options.ratio]
    for criterion, keep in cases:
        if any(row["criterion"] == criterion and keep in (None, row["keep"]) for row in rows):
            continue
        start, pruner = time.perf_counter(), dense if criterion == "dense" else load(options.model, options.dtype)
        name, _, how = criterion.partition(", ")
        if criterion == "dense":
            row = {"ratio": 0.0}
        elif keep is None:
            row = cut_by(pruner, criterion.partition(" by ")[0], options.ratio, sources)
        else:
            row = cut(pruner, name, keep, sources)
        if how:
            pruner, training = trained(pruner, how.split()[0], options, sources)
            row["training"] = training
        row = {"criterion": criterion, "keep": len(pruner.tokenizer), **row}
        row["seconds"] = round(time.perf_counter() - start, 1)
        row["texts"] = {name: measure(pruner, found) for name, found in spans.items()}
        if how:
            for name, found in spans.items():
                row["texts"][name]["followed"] = followed(pruner.tokenizer, dense.tokenizer, found)
        rows.append(row)
        print(row, flush=True)
        rows.sort(key=lambda row: (-row["keep"], row["criterion"]))
        write(output, {**about, "rows": rows})
    table = Table(title="Perplexity per token of the dense tokenizer, over dense")
    for column in (
        "criterion",
        "tokens",
        "removed",
        *(f"{name}{what}" for name in texts for what in ("", ", bits per byte", " longer")),
    ):
        table.add_column(column)
    for row in rows:
        cells = [
            cell
            for name, found in row["texts"].items()
            for cell in (
                f"{found['perplexity'] / rows[0]['texts'][name]['perplexity']:.3f}",
                f"{found['bits_per_byte']:.4f}",
                f"{found['tokens'] / rows[0]['texts'][name]['tokens'] - 1:.2%}",
            )
        ]
        table.add_row(row["criterion"], f"{row['keep']:,}", f"{row['ratio']:.2%}", *cells)
    Console(width=140).print(table)


def cut(pruner: StructuredPruner, criterion: str, keep: int, sources: list[str]) -> dict[str, Any]:
    """Leaves so many tokens."""
    pruner.config = PruningConfig(
        keep={"vocabulary": keep}, vocabulary_text=sources, calibration=CalibrationConfig(),
        vocabulary_criterion="frequency" if criterion in (SHARE, COUNTS) else criterion,
    )  # fmt: skip
    order = by_share if criterion in (SHARE, COUNTS) else choosing.least_longer
    shares = summed if criterion == COUNTS else choosing.frequencies
    with patch.object(choosing, "least_longer", order), patch.object(choosing, "frequencies", shares):
        pruner.prune()
    return {"ratio": pruner.last_plan.ratio, "report": pruner.last_plan.vocabulary_report}


def cut_by(pruner: StructuredPruner, name: str, ratio: float, sources: list[str]) -> dict[str, Any]:
    """Removes a share of all parameters; the calibration text is C4."""
    calibration = CalibrationConfig(dataset=next(path for path in sources if path.endswith("c4.jsonl")))
    pruner.config = PruningConfig(calibration=calibration, **SPLITS[name](sources))
    pruner.prune(ratio)
    return {"ratio": pruner.last_plan.ratio, "plan": str(pruner.last_plan)}


def trained(
    pruner: StructuredPruner, method: str, options: argparse.Namespace, sources: list[str]
) -> tuple[StructuredPruner, dict[str, Any]]:
    """What training makes of a pruned model."""
    folder, rows = Path(tempfile.mkdtemp()), []
    for source in ("c4.jsonl", "dolly.jsonl", "train.txt"):
        texts = [
            text for text in read_rows(next(path for path in sources if path.endswith(source))) if len(text) > 500
        ]
        left = options.recover / 3
        for text in random.Random(0).sample(texts, len(texts)):
            tokens = pruner.tokenizer(text, add_special_tokens=False, truncation=True, max_length=511)["input_ids"]
            rows.append({"prompt": "", "completion": text})
            left -= len(tokens) + 1
            if left <= 0:
                break
    pruner.save_pretrained(folder / "pruned")
    how, distillation = METHODS[method]
    with patch.object(recovering, "load_student", embedding_of if method == "embedding" else recovering.load_student):
        made = recover(
            folder / "pruned", rows, folder / "trained", RecoveryConfig(**{**TRAINING, **how}),
            distillation=distillation, teacher=folder_of(options.model),
        )  # fmt: skip
    training = {name: made.report["training"][name] for name in ("tokens", "steps", "seconds")}
    made = load(str(folder / "trained"), options.dtype)
    shutil.rmtree(folder)
    return made, training


def embedding_of(*arguments: Any) -> Any:
    """A student of which the (tied) embedding is trained alone."""
    model = load_student(*arguments).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


def followed(small: Any, dense: Any, spans: list[tuple[str, int, int]]) -> float:
    """The share of the small model's tokens of which the dense model says what comes next, in distillation."""
    relation = related(small, dense, len(small), len(dense))
    reader, known = Reader(relation, small, dense), []
    for text, _, _ in spans:
        known += reader.read(tuple(small(text, add_special_tokens=False, verbose=False)["input_ids"])).known
    return sum(known) / len(known)


def folder_of(model: str) -> str:
    """Where the dense model is."""
    return str(find_model(model).model)


def by_share(vocabulary: Vocabulary, shares: Mapping[int, float], stay: Collection[int]) -> list[int]:
    """The most frequent first, whatever spells the others."""
    return sorted(vocabulary.tokens, key=lambda number: (-shares[number], vocabulary.order(number)))


def summed(counted: Sequence[Counted], ids: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How often each token was counted."""
    return sum(one.counts[ids] for one in counted)


def as_text(path: Path) -> str:
    """The rows of a file of Dolly, each as one text."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    texts = ("\n\n".join(filter(None, (row["instruction"], row["input"], row["output"]))) for row in rows)
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def measured(about: dict[str, object], output: str) -> list[dict]:
    """Rows that were measured with the same settings, the versions and the processor too."""
    path = RESULTS / output
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    now = {**about, "environment": {**about["environment"], "date": there.get("environment", {}).get("date")}}
    return there["rows"] if {name: there.get(name) for name in now} == now else []


def load(model: str, dtype: str) -> StructuredPruner:
    """The model in a dtype."""
    arguments = find_model(model)
    arguments.dtype = dtype
    return load_pruner(arguments)


def windows(pruner: StructuredPruner, text: str, count: int) -> list[tuple[str, int, int]]:
    """Texts of evenly spaced windows, the character at which each one's first token ends, how many tokens follow."""
    found = pruner.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets, result = found["offset_mapping"], []
    whole = len(offsets) // LENGTH
    for number in range(count):
        start = number * whole // count * LENGTH
        begin, end = offsets[start][0], offsets[start + LENGTH - 1][1]
        result.append((text[begin:end], offsets[start][1] - begin, LENGTH - 1))
    return result


@torch.no_grad()
def measure(pruner: StructuredPruner, spans: list[tuple[str, int, int]]) -> dict[str, float]:
    """Perplexity per token of the dense tokenizer and bits per byte; tokens that the model's own tokenizer makes."""
    loss, original, size, tokens = 0.0, 0, 0, 0
    for text, first, count in spans:
        found = pruner.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins = beginning_of(pruner.tokenizer)
        ids = torch.tensor([[*begins, *found["input_ids"]]])
        counts = torch.tensor([*[False] * len(begins), *(end > first for _, end in found["offset_mapping"])])[1:]
        hidden = pruner.model.base_model(ids, use_cache=False).last_hidden_state[0, :-1][counts]
        labels = ids[0, 1:][counts]
        for states, wanted in zip(hidden.split(512), labels.split(512), strict=True):
            logits = pruner.model.lm_head(states).float()
            loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        original, tokens, size = original + count, tokens + len(labels), size + len(text[first:].encode())
    return {
        "perplexity": math.exp(loss / original), "bits_per_byte": loss / size / math.log(2), "tokens": tokens,
    }  # fmt: skip


if __name__ == "__main__":
    main()
