"""Measures a pruned checkpoint beside its dense model, writes the card, and pushes both.

    python examples/push.py smaller me/smaller --dense HuggingFaceTB/SmolLM2-135M-Instruct

Without a repository nothing is pushed: look at the card in the folder first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_structprune.evaluation import EvaluationConfig, ResultTable, evaluate
from hf_structprune.hub import push_folder, write_card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the checkpoint")
    parser.add_argument("repository", nargs="?", help="such as me/smaller")
    parser.add_argument("--dense", required=True, help="the model that it was made from")
    parser.add_argument("--window", type=int, help="tokens in a window of the perplexity; default: 2048")
    parser.add_argument("--max-windows", type=int, default=12)
    parser.add_argument("--private", action="store_true")
    options = parser.parse_args()
    config = EvaluationConfig(window=options.window, max_windows=options.max_windows, efficiency=False)
    folder, results = Path(options.folder), []
    for state, model, file in (
        ("dense", options.dense, "evaluation_results_dense.json"),
        ("pruned", options.folder, "evaluation_results.json"),
    ):
        loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        name, base = (options.dense, None) if state == "dense" else (folder.name, options.dense)
        results.append(
            evaluate(loaded, tokenizer, config, name=name, state=state, base_model=base, output=folder / file)
        )
    print(ResultTable(results).to_markdown())
    print(f"The card is {write_card(folder)}")
    if options.repository:
        print(push_folder(folder, options.repository, private=options.private or None).commit_url)


if __name__ == "__main__":
    main()
