"""What it is worth to calibrate on text like what the model is for: code, of which the packaged text has none.

    python benchmarks/calibration.py --model MODEL --wikitext2 FOLDER [--ratio 0.2] [--sequences 128]

Prunes as `shrink` does, without training, on the packaged text, on half of it and half Python files, and on Python
files alone: a hundred modules of the standard library of the Python that runs this, drawn by a seed. Measured are
windows of 2048 tokens of its other modules and of WikiText-2 test. Results go to benchmarks/results/calibration.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from core import commit

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.evaluation import perplexity
from hf_structprune.files.writing import write_text
from hf_structprune.installed import versions


RESULTS = Path(__file__).parent / "results" / "calibration.json"
MODULES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--wikitext2", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(0).shuffle(files)
    modules = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    held_out = {
        "Python": "\n\n".join(modules[MODULES:]),
        "WikiText-2": (arguments.wikitext2 / "test.txt").read_text(encoding="utf-8"),
    }
    own = Path(tempfile.mkdtemp()) / "modules.jsonl"
    own.write_text("".join(json.dumps({"text": text}) + "\n" for text in modules[:MODULES]), encoding="utf-8")
    results = {
        "versions": {**versions(), "python": platform.python_version()}, "commit": commit(), "ratio": arguments.ratio,
        "sequences": arguments.sequences, "windows": arguments.windows,
    }  # fmt: skip
    print(f"| calibrated on | {' | '.join(held_out)} |\n| --- |{' ---: |' * len(held_out)}")
    for name, dataset in (
        ("dense", None), ("packaged", None), ("packaged and Python", [str(own), "packaged"]), ("Python", str(own)),
    ):  # fmt: skip
        text = CalibrationConfig(dataset=dataset, num_samples=arguments.sequences)
        pruner = StructuredPruner.from_pretrained(
            arguments.model, PruningConfig(reconstruct=False, calibration=text), dtype=torch.bfloat16
        )
        begun = time.process_time()
        if name != "dense":
            pruner.prune(arguments.ratio)
        found = {"cpu_minutes": round((time.process_time() - begun) / 60, 2)}
        for about, held in held_out.items():
            found[about] = perplexity(
                pruner.model, pruner.tokenizer, held, max_windows=arguments.windows, window=2048
            ).perplexity
        results[name] = found
        write_text(arguments.output, json.dumps(results, indent=1) + "\n")
        cells = [f"{found[about]:.2f} ({found[about] / results['dense'][about]:.2f})" for about in held_out]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
