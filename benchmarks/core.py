"""Speed, memory and perplexity of the core on SmolLM2-135M-Instruct, side by side from one run.

    python benchmarks/core.py speed
    python benchmarks/core.py quality --wikitext FOLDER --c4 FILE.jsonl

FOLDER holds the raw WikiText-2 splits `valid.txt` and `test.txt`; FILE.jsonl holds C4 documents (`{"text": ...}`), of
which the last 300 are the test text and the others are calibrated on. Without them the packaged samples are used, and
the JSON says so. Results go to benchmarks/results/*.json, tables to the terminal.

Speed: the time of pruning 20 % over the time of ONE plain forward pass of the same 256 x 256 tokens through the body
of the model, each measured in a process of its own, and the peak of the resident memory, over that of the process with
the model loaded and over the weights alone (so with the interpreter and its libraries, about 0.4 GB).
Quality: perplexity over 12 evenly spaced windows of 2048 tokens, pruned over dense. Another model goes with another
`--output`: `quality --model FOLDER --only "default settings, 20 %" --output core_NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

import hf_structprune
from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.commands.models import find_model, load_pruner
from hf_structprune.commands.options import DEMO_MODEL
from hf_structprune.evaluation import perplexity, read_text
from hf_structprune.evaluation.efficiency import peak_memory
from hf_structprune.text.calibration import load_tokens


RESULTS = Path(__file__).parent / "results"
C4_TEST_DOCUMENTS = 300
NEURONS = {"units": "mlp_neurons"}
PER_LAYER = {"layout": "per_layer", "allocation": "global"}
DATA_FREE = {"random": {}, "l1": {}, "l2": {}}
INPUTS = {"wanda": {}, "wifv": {}, "activation": {}, "obs": {}}
GRADIENTS = {f"taylor {v}": {"criterion": "taylor", "taylor": v} for v in ("vectorize", "first", "second", "mix")}
GRADIENTS["kfac"] = {"criterion": "kfac"}
CRITERIA = {name: {"criterion": name, **options} for name, options in (DATA_FREE | INPUTS | GRADIENTS).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "quality", "one-speed", "one-quality"))
    parser.add_argument("--model", default=DEMO_MODEL, help="Hub id or folder; the demo's model if it is left out")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--c4", type=Path)
    parser.add_argument("--settings", help="one-speed: JSON of the settings")
    parser.add_argument("--row", help="one-quality: name of the row")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="quality: these rows and the dense model")
    parser.add_argument("--output", default="core_quality.json", help="quality: name of the file of results")
    parser.add_argument("--full", action="store_true", help="one-quality: on the whole test text too")
    parser.add_argument("--jobs", type=int, default=2, help="quality: rows at once")
    parser.add_argument("--levels", help="quality: folder of levels that rows of evolution share, see PruningConfig")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    runs = {"speed": speed, "quality": quality, "one-speed": one_speed, "one-quality": one_quality}
    runs[options.what](options)


def environment(threads: int | None = None) -> dict[str, str | int]:
    return {
        "hf_structprune": hf_structprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": threads or torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def commit() -> str:
    """Of the sources that are measured; empty where they are not those of a checkout."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def load(model: str) -> StructuredPruner:
    """The model in bfloat16; the demo's model comes from PyPI where the Hub cannot be reached."""
    arguments = find_model(model)
    arguments.dtype = "bf16"
    return load_pruner(arguments)


# Speed ---------------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace) -> None:
    """Every criterion without compensation, as peers work, then the default compensation on top."""
    rows = []
    folder = tempfile.mkdtemp()  # a plain checkpoint: what reading GGUF leaves in memory is none of ours
    pruner = load(options.model)
    pruner.model.save_pretrained(folder)
    pruner.tokenizer.save_pretrained(folder)
    names = ("l2", "wanda", "wifv", "obs", "taylor mix")
    plain = {name: {**CRITERIA[name], "compensation": False} for name in names}
    for name in GRADIENTS.keys() & plain.keys():
        plain[name] |= {"gradient_checkpointing": True, "calibration": {"batch_size": 4}}
    own = {"wanda, re-fit without error correction": {**CRITERIA["wanda"], "error_correction": 0.0}}
    default = {"neurons by obs": NEURONS, "default settings": {}}
    table = Table(title="Pruning 20 %, 256 x 256 tokens")
    for column in ("settings", "seconds", "x forward", "peak memory over loaded process, MB", "over weights, MB"):
        table.add_column(column)
    for name, settings in {**plain, **own, **default}.items():
        command = [sys.executable, __file__, "one-speed", "--model", folder, "--settings", json.dumps(settings)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row = {"name": name, "settings": settings, **json.loads(output.splitlines()[-1])}
        rows.append(row)
        table.add_row(
            name,
            f"{row['seconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['memory_mb']:.0f}",
            f"{row['over_weights_mb']:.0f}",
        )
        print(name, row, flush=True)
        write("core_speed.json", {"environment": environment(), "model": Path(options.model).name, "rows": rows})
    Console().print(table)


def one_speed(options: argparse.Namespace) -> None:
    """One row of `speed`: forward passes before and after, pruning in between."""
    pruner = load(options.model)
    pruner.config = PruningConfig(**json.loads(options.settings))
    tokens = load_tokens(pruner.config.calibration, pruner.tokenizer)
    batches = tokens.split(pruner.config.calibration.batch_size)
    dense = pruner.model

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                dense.base_model(batch, use_cache=False)
        return time.perf_counter() - start

    with torch.no_grad():
        dense.base_model(batches[0], use_cache=False)
    plain = forward()
    weights = sum(p.numel() * p.element_size() for p in dense.parameters())
    with peak_memory({dense.device}) as peak:
        start = time.perf_counter()
        pruner.prune(0.2)
        seconds = time.perf_counter() - start
    row = {"forward": plain, "seconds": seconds, "ratio": seconds / plain}
    row |= {"memory_mb": (peak.value - peak.before) / 1e6, "over_weights_mb": (peak.value - weights) / 1e6}
    row |= {"method": peak.method}
    print(json.dumps(row))


# Quality -------------------------------------------------------------------------------------------------------------


def quality_runs() -> dict[str, tuple[float, dict]]:
    """Rows of the table: name, ratio and settings."""
    runs = {
        "default settings, 20 %": (0.2, {}),
        "default settings, 30 %": (0.3, {}),
        "default settings, 10 %": (0.1, {}),
        "per-layer, 20 %": (0.2, PER_LAYER),
        "per-layer, 30 %": (0.3, PER_LAYER),
        "per-layer search, 20 %": (0.2, {**PER_LAYER, "allocation": "search"}),
        "per-layer search, 30 %": (0.3, {**PER_LAYER, "allocation": "search"}),
    }
    runs["per-layer with 128 x 256 tokens, 20 %"] = (0.2, {**PER_LAYER, "calibration": {"num_samples": 128}})
    runs["default settings with 128 x 256 tokens, 20 %"] = (0.2, {"calibration": {"num_samples": 128}})
    runs["reconstruction, 20 %"] = (0.2, {"reconstruct": True})
    evolution = {"layout": "per_layer", "allocation": "evolution", "search_evaluations": 220}
    evolution["units"] = ["mlp_neurons", "kv_groups"]
    runs["evolution of neurons and KV groups, 20 %"] = (0.2, evolution)
    runs["evolution of neurons and KV groups, reconstructed, 20 %"] = (0.2, {**evolution, "reconstruct": True})
    runs["evolution of neurons and KV groups, 30 %"] = (0.3, evolution)
    runs["evolution of neurons and KV groups by kfac, 20 %"] = (0.2, {**evolution, "criterion": "kfac"})
    runs["obs, 10 %"] = (0.1, CRITERIA["obs"])
    for name in (*INPUTS, *GRADIENTS, *DATA_FREE):
        runs[f"{name}, no compensation, 20 %"] = (0.2, {**CRITERIA[name], "compensation": False})
        if name != "kfac":  # these are the default settings
            runs[f"{name}, 20 %"] = (0.2, CRITERIA[name])
    return runs


def quality(options: argparse.Namespace) -> None:
    """The table of criteria, and the best settings at several ratios; rows run in processes of one thread each."""
    names = ["dense", *(options.only or quality_runs())]
    rows: dict[str, dict] = {}
    where = environment(threads=1)
    if options.only and (RESULTS / options.output).exists():  # the others stay; what is measured says where and when
        found = json.loads((RESULTS / options.output).read_text("utf-8"))
        rows, where = {row["name"]: row for row in found["rows"]}, found["environment"]
    order = [*dict.fromkeys([*names, *rows])]
    command = [sys.executable, __file__, "one-quality", "--model", options.model]
    if options.wikitext and options.c4:
        command += ["--wikitext", str(options.wikitext), "--c4", str(options.c4)]
    command += ["--levels", options.levels] if options.levels else []

    def run(name: str) -> None:
        full = ["--full"] if name in ("dense", "default settings, 20 %") and not options.only else []
        output = subprocess.run(
            [*command, *full, "--row", name],
            capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        ).stdout  # fmt: skip
        rows[name] = json.loads(output.splitlines()[-1])
        print(name, rows[name], flush=True)
        ordered = [rows[name] for name in order if name in rows]
        write(options.output, {"environment": where, "data": data(options)[2], "rows": ordered})

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, [*names[1:], names[0]]))
    dense = rows["dense"]["perplexity"]
    table = Table(title=f"Perplexity, pruned over dense ({', '.join(f'{n} {p:.2f}' for n, p in dense.items())} dense)")
    for column in ("settings", "removed", *dense):
        table.add_column(column)
    for name in names[1:]:
        ratios = [f"{rows[name]['perplexity'][text] / dense[text]:.2f}" for text in dense]
        table.add_row(name, f"{rows[name]['ratio']:.2%}", *ratios)
    Console().print(table)


def one_quality(options: argparse.Namespace) -> None:
    """One row of `quality`, as JSON."""
    calibration, texts, _ = data(options)
    pruner = load(options.model)
    row: dict = {"name": options.row, "ratio": 0.0}
    if options.row != "dense":
        ratio, settings = quality_runs()[options.row]
        text = CalibrationConfig(dataset=calibration, **settings.get("calibration", {}))
        levels = {"levels": options.levels} if settings.get("allocation") == "evolution" else {}
        pruner.config = PruningConfig(**{**settings, **levels, "calibration": text})
        began = time.process_time()
        pruner.prune(ratio)
        row |= {"asked": ratio, "ratio": pruner.last_plan.ratio, "settings": settings}
        row["calibrated"] = f"{text.num_samples} x {text.length} tokens"
        row["why"] = pruner.last_plan.reasons
        row["cpu_minutes"] = (time.process_time() - began) / 60
        if pruner.last_plan.reconstructed:
            row["reconstructed"] = pruner.last_plan.reconstructed
        row["mlp_widths"] = [group.keep for group in pruner.last_plan.groups if group.kind == "mlp_neurons"]
    row["measured"] = environment(threads=1)
    row["perplexity"] = {name: measure(pruner, text) for name, text in texts.items()}
    if options.full:
        row["perplexity_whole_text"] = {name: measure(pruner, text, None) for name, text in texts.items()}
    print(json.dumps(row))


def measure(pruner: StructuredPruner, text: str, windows: int | None = 12) -> float:
    return perplexity(pruner.model, pruner.tokenizer, text, max_windows=windows).perplexity


def data(options: argparse.Namespace) -> tuple[list[str] | None, dict[str, str | None], str]:
    """Calibration sources, test texts and what they are."""
    if options.wikitext is None or options.c4 is None:
        return None, {"WikiText-2 sample": None}, "packaged samples"
    calibration, texts = split_texts(options.wikitext, options.c4)
    note = f"calibrated on WikiText-2 valid and C4, half each; C4 test: the last {C4_TEST_DOCUMENTS} documents"
    return [str(options.wikitext / "valid.txt"), str(calibration)], texts, note


def split_texts(wikitext: Path, c4: Path) -> tuple[Path, dict[str, str]]:
    """A file of all C4 documents but the last, which are the test text, and both test texts."""
    documents, folder = c4.read_text(encoding="utf-8").splitlines(), Path(tempfile.mkdtemp())
    parts = {"c4": documents[:-C4_TEST_DOCUMENTS], "c4_test": documents[-C4_TEST_DOCUMENTS:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    test = read_text(folder / "c4_test.jsonl")
    return folder / "c4.jsonl", {"WikiText-2": read_text(wikitext / "test.txt"), "C4": test}


def write(name: str, content: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
