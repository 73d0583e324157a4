"""Every method of quantisation that runs here, on one pruned model: bytes, perplexity and speed of decoding.

    python benchmarks/quantization.py FOLDER --checkpoints OUT

Quantises the model with each method below into a folder of OUT (one that is there is taken as it is, without seconds),
and measures the packaged WikiText-2 sample in the checkpoint's dtype or that of `--dtype`, and with `--speed` decoding
in turns with the model before. A method whose package is not installed is left out, and named. Writes
benchmarks/results/quantization.json after each row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from hf_structprune import CalibrationConfig, QuantizationConfig, StructPruneError, quantize
from hf_structprune.commands.measure import take_turns
from hf_structprune.commands.models import ModelArguments, find_subject, load_for_measuring
from hf_structprune.data import wikitext2_sample
from hf_structprune.evaluation import perplexity, read_text
from hf_structprune.evaluation.efficiency import EfficiencyConfig
from hf_structprune.evaluation.results import describe_environment


RESULTS = Path(__file__).parent / "results" / "quantization.json"
METHODS = {
    "bitsandbytes nf4": {"method": "bitsandbytes", "bits": 4},
    "bitsandbytes int8": {"method": "bitsandbytes", "bits": 8},
    "torchao int8": {"method": "torchao", "bits": 8},
    "gptq 4 bits": {"method": "gptq", "bits": 4},
    "awq 4 bits": {"method": "awq", "bits": 4},
    "auto-round 4 bits": {"method": "auto-round", "bits": 4},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the pruned model")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for the quantised models")
    parser.add_argument("--dtype", default="auto", help="what all are measured in: bf16, fp32, or the checkpoint's")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=50, help="of auto-round")
    parser.add_argument("--samples", type=int, default=32, help="sequences of 256 tokens to calibrate on")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--speed", action="store_true", help="time decoding too, which wants a machine of its own")
    parser.add_argument("--only", nargs="*", help="names of rows")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: str) -> float:
    model, tokenizer = load_for_measuring(ModelArguments(folder, dtype=options.dtype))
    text = read_text(wikitext2_sample())
    return perplexity(model, tokenizer, text, window=options.window, max_windows=options.windows).perplexity


def speed(options: argparse.Namespace, folder: str) -> float:
    """Decoding over that of the model before, in turns."""
    arguments = ModelArguments(options.model, dtype=options.dtype)
    subjects = [find_subject(dataclasses.replace(arguments, model=folder)), find_subject(arguments)]
    sides = take_turns(subjects, EfficiencyConfig(length=32, new_tokens=16, warmup=1, repeats=3), 1)
    after, before = (side.figures["efficiency/decode_throughput"].value for side in sides)
    return after / before


def row(options: argparse.Namespace, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    folder, seconds = options.checkpoints / name.replace(" ", "-"), None
    if not folder.is_dir():
        config = QuantizationConfig(
            **settings, group_size=options.group_size, iterations=options.iterations,
            calibration=CalibrationConfig(num_samples=options.samples, batch_size=4),
        )  # fmt: skip
        started = time.monotonic()
        quantize(options.model, folder, config)
        seconds = round(time.monotonic() - started, 1)
    report = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    return {
        **{key: report[key] for key in ("method", "bits", "group_size", "weights", "versions")},
        "seconds": seconds,
        "perplexity": measure(options, str(folder)),
        "decode": speed(options, str(folder)) if options.speed else None,
    }


def main() -> None:
    options = parse()
    settings = {
        key: getattr(options, key) for key in ("dtype", "group_size", "iterations", "samples", "window", "windows")
    }
    content: dict[str, Any] = {
        "model": Path(options.model).name,
        "settings": settings,
        "environment": describe_environment("cpu"),
        "rows": {},
    }
    content["rows"]["before"] = {"perplexity": measure(options, options.model)}
    for name, method in METHODS.items():
        if options.only and name not in options.only:
            continue
        try:
            content["rows"][name] = row(options, name, method)
        except StructPruneError as error:
            content["rows"][name] = {"left_out": str(error)}
        print(name, content["rows"][name], flush=True)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
