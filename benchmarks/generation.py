"""How well a model still answers after pruning: closed questions, endings, repetition, agreement with the dense model.

    python benchmarks/generation.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Prunes by each of `--ratios` with the default settings (calibrated on the packaged text), or with `--as-shrink` on half
of the text and without reconstruction, as `shrink` and `demo` do before they train, and measures what
`evaluate --generation` measures, in the model's own dtype, and the perplexity of the packaged text (6 windows). Every
ratio is kept as soon as it is there: a call with the same output goes on. Results go to
benchmarks/results/generation.json, a table to the terminal.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_structprune import PruningConfig
from hf_structprune.commands.models import DEMO_MODEL, find_model, load_pruner
from hf_structprune.commands.shrink import CALIBRATION
from hf_structprune.evaluation import EvaluationConfig, EvaluationResult, ResultTable, evaluate


RESULTS = Path(__file__).parent / "results" / "generation.json"


def measure(model: str, ratio: float, settings: dict[str, Any]) -> tuple[EvaluationResult, float]:
    """One ratio, and the seconds that generation takes with the perplexity."""
    pruner = load_pruner(find_model(model))
    pruner.config = PruningConfig(**settings)
    if ratio:
        pruner.prune(ratio)
    start = time.perf_counter()
    config = EvaluationConfig(max_windows=6, efficiency=False, samples=False, generation=True)
    state = "pruned" if ratio else "dense"
    result = evaluate(pruner.model, pruner.tokenizer, config, name=f"{ratio:.1%}", state=state)
    return result, round(time.perf_counter() - start, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="Hub id or folder; the demo's model if it is left out")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2])
    parser.add_argument("--units", nargs="+", help="as of PruningConfig; default: its own")
    parser.add_argument("--as-shrink", action="store_true", help="as `shrink` prunes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings: dict[str, Any] = {"units": options.units}
    if options.as_shrink:
        settings |= {"reconstruct": False, "calibration": CALIBRATION}
    saved = json.loads(options.output.read_text()) if options.output.exists() else {"seconds": {}, "results": {}}
    for ratio in [0.0, *options.ratios]:
        if f"{ratio:g}" in saved["results"]:
            continue
        result, saved["seconds"][f"{ratio:g}"] = measure(options.model, ratio, settings)
        saved["results"][f"{ratio:g}"] = result.to_dict()
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(saved, indent=1) + "\n")
    results = [EvaluationResult.from_dict(saved["results"][f"{ratio:g}"]) for ratio in [0.0, *options.ratios]]
    Console(width=200).print(ResultTable(results).to_rich())


if __name__ == "__main__":
    main()
