"""`units="auto"` against every kind alone, on models that are mostly MLP, mostly attention, mostly vocabulary.

    python benchmarks/kinds.py --text FOLDER            # three small Llamas, trained here for a minute each
    python benchmarks/kinds.py --text FOLDER --model ID --c4 FILE.jsonl  # a model of yours
    python benchmarks/kinds.py --text FOLDER --model ID --c4 FILE.jsonl --predict  # neurons: what is predicted
    python benchmarks/kinds.py --table                  # predicted against measured, of all that was run

FOLDER holds `train.txt`, `valid.txt` and `test.txt` (WikiText-2, raw). Perplexity of `test.txt` (48 windows of 256
tokens), pruned over dense, and what `plan(ratio, estimate=True)` predicted from the calibration text. A given model
is loaded in bfloat16, calibrated and measured as by `core.py quality` (12 windows of 2048 tokens of WikiText-2 and of
C4). Seconds are those of the processor, of pruning alone. Results go to benchmarks/results/kinds.json. What
`--predict` finds is compared with what `core.py quality` measured of the same ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import core
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.errors import StructPruneError


RESULTS = Path(__file__).parent / "results" / "kinds.json"
PREDICTED = "predicted.json"
SHAPES = {
    "mostly MLP": dict(
        vocab_size=256, hidden_size=64, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4,
    ),
    "mostly attention": dict(
        vocab_size=256, hidden_size=64, intermediate_size=48, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32,
    ),
    "mostly vocabulary": dict(
        vocab_size=4096, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4,
    ),
}  # fmt: skip
WAYS = {
    "auto": ("auto",),
    "MLP neurons": ("mlp_neurons",),
    "KV groups": ("kv_groups",),
    "layers": ("layers",),
    "neurons and groups": ("mlp_neurons", "kv_groups"),
}


def tokenizer_of(text: str, size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text.split("\n"), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def trained(shape: dict, tokens: torch.Tensor, seconds: float, seed: int) -> LlamaForCausalLM:
    """A Llama that was trained for a while: AdamW, windows of 128 tokens, 16 at a time."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    draw, begin, step = torch.Generator().manual_seed(seed), time.monotonic(), 0
    while (part := (time.monotonic() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20, 1.1 - part)
        starts = torch.randint(len(tokens) - 128, (16,), generator=draw)
        batch = torch.stack([tokens[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return model.eval()


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    losses = [
        cross_entropy(model(input_ids=one[None]).logits[0, :-1].float(), one[1:], reduction="mean") for one in windows
    ]
    return math.exp(torch.stack(losses).mean())


def spread(tokens: torch.Tensor, length: int, number: int) -> torch.Tensor:
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    return windows[torch.linspace(0, len(windows) - 1, number).long()]


def measured(
    name: str, model, tokenizer, texts: dict[str, str], windows: tuple[int, int], options: argparse.Namespace
) -> list[dict]:
    test = torch.tensor(tokenizer(texts["test"], add_special_tokens=False)["input_ids"])
    held = spread(test, *windows)
    calibration = torch.tensor(tokenizer(texts["valid"], add_special_tokens=False)["input_ids"])
    sequences = min(options.sequences, len(calibration) // 256)
    config = CalibrationConfig(tokens=spread(calibration, 256, sequences), batch_size=16)
    dense, rows = perplexity(model, held), []
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {total:,} parameters, perplexity {dense:.2f}", flush=True)
    for ratio in options.ratios:
        for way, units in ((way, WAYS[way]) for way in options.ways or WAYS):
            settings = PruningConfig(units=units, calibration=config)
            pruner = StructuredPruner(copy.deepcopy(model), settings)
            try:
                predicted = StructuredPruner(model, settings).plan(ratio, estimate=True).predicted_factor
                begin = time.process_time()
                pruned = pruner.prune(ratio)
            except StructPruneError as error:
                print(f"  {ratio:.0%} {way}: {str(error)[:100]}", flush=True)
                continue
            seconds, plan = time.process_time() - begin, pruner.last_plan
            why = next((note for note in plan.reasons if note.startswith("units='auto'")), "")
            row = {
                "model": name, "parameters": total, "dense": dense, "ratio": ratio, "way": way, "got": plan.ratio,
                "perplexity": perplexity(pruned, held), "seconds": seconds, "removed": plan.removed, "why": why,
                "sequences": sequences,
                "predicted_factor": predicted,
            }  # fmt: skip
            rows.append(row)
            print(
                f"  {ratio:.0%} {way}: {row['perplexity'] / dense:.3f} of dense, predicted {predicted:.3f}, "
                f"{plan.ratio:.1%} gone, {seconds:.0f} s {why}", flush=True,
            )  # fmt: skip
    return rows


def of_checkpoint(options: argparse.Namespace) -> list[dict]:
    """A given model, each way in turn, on two texts; perplexities of the dense one first."""
    options.wikitext, rows = options.text, []
    calibration, tests, _ = core.data(options)
    config = CalibrationConfig(dataset=calibration)
    pruner = core.load(options.model)
    total, name = pruner.model.num_parameters(), Path(options.model).name
    dense = {text: core.measure(pruner, content) for text, content in tests.items()}
    print(f"{name}: {total:,} parameters, perplexity {dense}", flush=True)
    for ratio in options.ratios:
        for way in options.ways or WAYS:
            pruner = core.load(options.model)
            pruner.config = PruningConfig(units=WAYS[way], calibration=config)
            begin = time.process_time()
            pruner.prune(ratio)
            seconds, plan = time.process_time() - begin, pruner.last_plan
            perplexity = {text: core.measure(pruner, content) for text, content in tests.items()}
            why = next((note for note in plan.reasons if note.startswith("units='auto'")), "")
            rows.append({
                "model": name, "parameters": total, "dense": dense, "ratio": ratio, "way": way, "got": plan.ratio,
                "perplexity": perplexity, "seconds": seconds, "removed": plan.removed, "why": why,
                "predicted_factor": plan.predicted_factor,
            })  # fmt: skip
            over = {text: round(value / dense[text], 3) for text, value in perplexity.items()}
            print(f"  {ratio:.0%} {way}: {over}, {plan.predicted_factor}, {seconds:.0f} s {why}", flush=True)
            keep(rows[-1:])
    return rows


def predict(options: argparse.Namespace) -> None:
    """What planning predicts of fewer neurons of a model, beside what `core.py quality` measured of them."""
    options.wikitext = options.text
    calibration, _, note = core.data(options)
    pruner = core.load(options.model)
    quality = json.loads((core.RESULTS / "core_quality.json").read_text())["rows"]
    pruner.config = PruningConfig(units=("mlp_neurons",), calibration=CalibrationConfig(dataset=calibration))
    dense, rows = next(row for row in quality if row["name"] == "dense")["perplexity"], []
    for ratio in options.ratios:
        plan = pruner.plan(ratio, estimate=True)
        same = (row for row in quality if row.get("asked", row["ratio"]) == ratio or abs(row["ratio"] - ratio) < 2e-3)
        found = next(row for row in same if row["name"].startswith("default settings"))
        if plan.ratio != found["ratio"]:
            raise SystemExit(f"{found['name']}: {found['ratio']:.4%} went then, and {plan.ratio:.4%} would now.")
        rows.append({
            "model": Path(options.model).name, "ratio": ratio, "way": "MLP neurons", "got": plan.ratio,
            "predicted_factor": plan.predicted_factor,
            "factor": {text: found["perplexity"][text] / dense[text] for text in dense},
        })  # fmt: skip
        print(rows[-1], flush=True)
        core.write(PREDICTED, {"environment": core.environment(), "data": note, "rows": rows})


def show() -> None:
    """All that was predicted and measured, as a table for the documentation."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    path = core.RESULTS / PREDICTED
    rows += json.loads(path.read_text())["rows"] if path.exists() else []
    print("| model, share asked | what goes | predicted | measured |\n| --- | --- | ---: | ---: |")
    for row in (row for row in rows if row["predicted_factor"] is not None):
        got = row.get("factor") or factor_of(row["perplexity"], row["dense"])
        said = " / ".join(f"{value:.3f}" for value in got.values())
        print(f"| {row['model']}, {row['ratio']:.0%} | {row['way']} | {row['predicted_factor']:.3f} | {said} |")


def factor_of(perplexity: float | dict[str, float], dense: float | dict[str, float]) -> dict[str, float]:
    """Pruned over dense, by text."""
    if isinstance(perplexity, dict):
        return {text: value / dense[text] for text, value in perplexity.items()}
    return {"WikiText-2": perplexity / dense}


def keep(rows: list[dict]) -> None:
    """Writes rows in the place of those of the same runs."""
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    new = {(row["model"], row["ratio"], row["way"]) for row in rows}
    RESULTS.write_text(
        json.dumps([row for row in old if (row["model"], row["ratio"], row["way"]) not in new] + rows, indent=1) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--c4", type=Path, help="with --model: C4 documents")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--seconds", type=float, default=60, help="of training for each small model")
    parser.add_argument("--sequences", type=int, default=128, help="of 256 tokens, of calibration text")
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--predict", action="store_true", help="with --model")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        show()
        return
    if options.text is None or (options.predict and not options.model):
        parser.error("give --text, and --model with --predict")
    transformers.utils.logging.disable_progress_bar()
    if options.predict:
        predict(options)
        return
    texts = {name: (options.text / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "valid", "test")}
    rows = []
    if options.model:
        rows += of_checkpoint(options)
    for name, shape in {} if options.model else SHAPES.items():
        tokenizer = tokenizer_of(texts["train"][:3_000_000], shape["vocab_size"])
        tokens = torch.tensor(tokenizer(texts["train"][:3_000_000])["input_ids"])
        model = trained(shape, tokens, options.seconds, options.seed)
        rows += measured(name, model, tokenizer, texts, (256, 48), options)
    keep(rows)


if __name__ == "__main__":
    main()
