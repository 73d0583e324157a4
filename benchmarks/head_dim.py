"""Heads of fewer dimensions on SmolLM2-135M-Instruct: sizes, criteria, re-fit, and fewer KV heads for comparison.

    python benchmarks/head_dim.py --wikitext FOLDER --c4 FILE.jsonl

FOLDER and FILE.jsonl are those of `core.py quality`. Perplexity over evenly spaced windows (`--windows`) of 2048
tokens of both test texts, pruned over dense; float32. Rows in benchmarks/results/head_dim.json of as many windows are
not run again. KV cache: keys and values of one token in 16 bits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import transformers
from core import RESULTS, data, environment, measure, write
from rich.console import Console
from rich.table import Table

from hf_structprune import CalibrationConfig, PruningConfig
from hf_structprune.commands.models import DEMO_MODEL, find_model, load_pruner


NAME = "head_dim.json"
ROWS = {
    "dense": {},
    "head size 32": {"keep": {"head_dim": 32}},
    "2 of 3 KV groups": {"keep": {"kv_groups": 2}},
    "head size 42": {"keep": {"head_dim": 42}},
    "head size 48": {"keep": {"head_dim": 48}},
    "head size 32, no re-fit": {"keep": {"head_dim": 32}, "compensation": False},
    **{f"head size 32, {name}": {"keep": {"head_dim": 32}, "head_dim_criterion": name}
       for name in ("energy", "magnitude", "taylor")},
    "1 of 3 KV groups": {"keep": {"kv_groups": 1}},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--c4", type=Path)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--calibration", type=int, default=128, help="sequences of 256 tokens")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    calibration, texts, note = data(options)
    note = f"{options.calibration} x 256 tokens, {note}"
    path = RESULTS / NAME
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    for name in options.rows:
        if rows.get(name, {}).get("windows") == options.windows:
            continue
        arguments = find_model(options.model)
        arguments.dtype = "fp32"
        pruner, row = load_pruner(arguments), {"name": name, "settings": ROWS[name], "windows": options.windows}
        if ROWS[name]:
            pruner.config = PruningConfig(calibration=calibrating(options, calibration), **ROWS[name])
            pruner.prune()
            row |= {"calibration": options.calibration, "ratio": pruner.last_plan.ratio}
            row |= {"kept": [one.kept for one in pruner.last_plan.shared]}
        config = pruner.model.config
        row["kv_cache_bytes"] = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        row["perplexity"] = {text: measure(pruner, content, options.windows) for text, content in texts.items()}
        rows[name] = row
        print(row, flush=True)
        found = [rows[one] for one in ROWS if one in rows]
        write(NAME, {"environment": environment(), "data": note, "rows": found})
    show(rows)


def calibrating(options: argparse.Namespace, dataset: list[str] | None) -> CalibrationConfig:
    return CalibrationConfig(dataset=dataset, num_samples=options.calibration)


def show(rows: dict[str, dict]) -> None:
    """The table."""
    dense = rows["dense"]["perplexity"]
    table = Table(title=f"Pruned over dense ({', '.join(f'{n} {p:.2f}' for n, p in dense.items())} dense)")
    for column in ("settings", "removed", "KV cache, bytes a token", *dense):
        table.add_column(column)
    for name, row in rows.items():
        ratios = [f"{row['perplexity'][text] / dense[text]:.2f}" for text in dense]
        table.add_row(name, f"{row.get('ratio', 0):.1%}", f"{row['kv_cache_bytes']:,}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
