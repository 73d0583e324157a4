"""The figures of README: measured from this commit, written as JSON, and printed as README has them.

    python benchmarks/readme_figures.py --wikitext FOLDER --c4 FILE.jsonl --dolly FOLDER   # 1.5 hours of a core
    python benchmarks/readme_figures.py --print     # nothing is measured: table and picture, from the JSON there is
    python benchmarks/readme_figures.py --small     # a tiny random model and two columns; writes nothing here

`make readme-figures` is the first: `core.py quality`, then `shrunk.py` on data of `recovery_data.py`, all of one
commit. Those with fewer tokens (`NEARER`) are of a run of `shrunk.py` by itself: its commit is in the JSON, its
line in docs/recover.md. The numbers of types are those of `docs/models.md`, which `hf-structprune models` computes.
`tests/test_readme.py` compares README with all of it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
CORE, RESULTS = ROOT / "benchmarks" / "core.py", ROOT / "benchmarks" / "results" / "core_quality.json"
PRUNED = ROOT / "model_cards" / "smollm2-135m-instruct-20-pruned"
RECOVERED = ROOT / "benchmarks" / "results" / "shrunk.json"
RATIO, MINUTES = 0.2, 30
RUN = f"{RATIO:.0%} in {MINUTES} minutes"  # of it
NEARER = f"{RUN}, per-layer, 28672 tokens"
# The columns of the table, and the rows of `core.py quality` that they are.
COLUMNS = {
    "dense": "dense", "10 %": "default settings, 10 %", "20 %": "default settings, 20 %",
    "30 %": "default settings, 30 %", "20 %, per-layer": "per-layer, 20 %",
}  # fmt: skip
PICTURE = ROOT / "docs" / "images" / "quality.svg"
# What the picture compares with 20 % of ours: the criteria of others, by our code, and nothing re-fitted.
OTHERS = {
    "wifv, no compensation, 20 %": "as FLAP ranks", "wanda, no compensation, 20 %": "as Wanda-sp ranks",
    "taylor second, no compensation, 20 %": "as LLM-Pruner ranks",
}  # fmt: skip
# Kinds of units that README counts together, by their columns in docs/models.md.
COUNTED = {
    "MLP neurons or experts": ("MLP neurons", "experts"), "attention heads": ("KV groups", "query heads"),
    "layers": ("decoder layers",),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", help="folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--c4", help="C4, .jsonl")
    parser.add_argument("--dolly", help="folder with train and held-out rows of Dolly, .jsonl")
    parser.add_argument("--jobs", type=int, default=1, help="rows of the table at once")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    parser.add_argument("--small", action="store_true", help="a tiny random model")
    options = parser.parse_args()
    if options.small:
        print(small())
        return
    if not options.print:
        if not (options.wikitext and options.c4 and options.dolly):
            parser.error("--wikitext, --c4 and --dolly are the texts of the published figures.")
        measure(options)
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    draw(rows, dense_parameters(), PICTURE)
    print(quality_table(rows, dense_parameters()))
    print(recovery_words())
    print(nearer_words())
    print(type_words())


def measure(options: argparse.Namespace) -> None:
    """The rows of the table and of the picture, and what one command makes of the model in so many minutes."""
    from hf_structprune.commands.models import find_model
    from hf_structprune.commands.options import DEMO_MODEL

    command = [sys.executable, CORE, "quality", "--wikitext", options.wikitext, "--c4", options.c4]
    command += [
        "--jobs",
        str(options.jobs),
        "--only",
        *(name for name in COLUMNS.values() if name != "dense"),
        *OTHERS,
    ]
    subprocess.run(command, check=True)
    model = str(find_model(DEMO_MODEL).model)
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        command = [sys.executable, CORE.with_name("recovery_data.py"), "--dolly", options.dolly, "--c4", options.c4]
        subprocess.run([*command, "--tokenizer", model, "--output-dir", data], check=True)
        command = [sys.executable, CORE.with_name("shrunk.py"), "--dense", model, "--data", data]
        command += ["--wikitext2", options.wikitext, "--ratio", str(RATIO), "--minutes", str(MINUTES), "--anew"]
        subprocess.run([*command, "--output-dir", f"{folder}/out"], check=True)


def quality_table(rows: list[dict[str, Any]], parameters: int) -> str:
    """The first table of README, of the columns that were measured."""
    found = {row["name"]: row for row in rows}
    columns = {head: found[name] for head, name in COLUMNS.items() if name in found}
    lines = [
        ["SmolLM2-135M-Instruct, no training", *columns],
        ["---"] * (len(columns) + 1),
        ["parameters", *(f"{parameters * (1 - row['ratio']) / 1e6:.1f} M" for row in columns.values())],
    ]
    for text in next(iter(columns.values()))["perplexity"]:
        lines.append([f"perplexity, {text}", *(f"{row['perplexity'][text]:.1f}" for row in columns.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(rows: list[dict[str, Any]], parameters: int) -> dict[str, list[tuple[float, float]]]:
    """The picture's lines and points: millions of parameters and perplexity of WikiText-2."""
    found = {row["name"]: (parameters * (1 - row["ratio"]) / 1e6, row["perplexity"]["WikiText-2"]) for row in rows}
    run = json.loads(RECOVERED.read_text(encoding="utf-8"))[RUN]
    size = parameters * (1 - run["got"]) / 1e6
    return {
        "neurons, all layers alike": [found[COLUMNS[name]] for name in ("dense", "10 %", "20 %", "30 %")],
        "widths by layer, search": [found[COLUMNS["20 %, per-layer"]]],
        f"shrink: {MINUTES} minutes on a core": [
            (size, run["pruned"]["WikiText-2"]), (size, run["recovered"]["WikiText-2"])
        ],
        **{f"{words}, nothing re-fitted": [found[name]] for name, words in OTHERS.items()},
    }  # fmt: skip


def draw(rows: list[dict[str, Any]], parameters: int, path: Path) -> None:
    """Quality against size, as SVG."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "readme", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
        places = [(-20, 5), (5, -12), (5, 2), (5, 0), (-24, -7), (5, -3)]  # of the numbers: they must not overlap
        for marker, place, (label, line) in zip("os^xxx", places, points(rows, parameters).items(), strict=True):
            axes.plot(*zip(*line, strict=True), marker=marker, label=label)
            for x, y in line:
                axes.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=place, fontsize=8)
        axes.set(xlabel="million parameters, SmolLM2-135M-Instruct", ylabel="perplexity, WikiText-2")
        axes.invert_xaxis()
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def dense_parameters() -> int:
    """Of the model of the table."""
    return int(_figures(PRUNED / "evaluation_results_dense.json")["efficiency/parameters"])


def recovery_words() -> str:
    """What a training gives back: perplexities and right answers of the pruned, the recovered and the dense model."""
    results = json.loads(RECOVERED.read_text(encoding="utf-8"))
    run, dense = results[RUN], results["dense"]
    texts = [
        f"{name} {run['pruned'][name]:.1f} -> {run['recovered'][name]:.1f} ({said}{dense[name]:.1f})"
        for name, said in (("WikiText-2", "dense: "), ("C4", ""))
    ]
    right = [sum(one["right"]) for one in (run["pruned"], run["recovered"], dense)]
    answers = f"right answers {right[0]} -> {right[1]} ({right[2]}) of {len(dense['right'])}"
    return f"{MINUTES} minutes on a CPU core: {', '.join([*texts, answers])}"


def nearer_words() -> str:
    """The same with fewer tokens and widths that differ between layers: nearest to the dense model in that time."""
    run = json.loads(RECOVERED.read_text(encoding="utf-8"))[NEARER]["recovered"]
    return f"{run['WikiText-2']:.1f}, {run['C4']:.1f}, {sum(run['right'])}"


def type_words() -> str:
    """In how many types of causal language models the common kinds of units are proven."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").partition("\n## ")[0]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in re.sub(r"\|(?=\s*\|)", "| ", page).splitlines()
        if line.startswith("|")
    ]
    counts = {
        words: sum(any(row[head.index(one)].startswith("proven") for one in kinds) for row in rows)
        for words, kinds in COUNTED.items()
    }
    (first, one), *others = counts.items()
    return f"Of the {len(rows)} types, {first} are proven in {one}, " + ", ".join(f"{a} in {n}" for a, n in others)


def _figures(path: Path) -> dict[str, float]:
    found = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return {one["name"]: one["value"] for one in (found.values() if isinstance(found, dict) else found)}


def small() -> str:
    """The table of a tiny random model: the whole way in half a minute, for tests."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
        rows = []
        for name in (COLUMNS["dense"], COLUMNS["10 %"]):
            command = [sys.executable, CORE, "one-quality", "--model", folder, "--row", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    return quality_table(rows, model.num_parameters())


if __name__ == "__main__":
    main()
