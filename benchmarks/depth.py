"""Depth, hidden size and joint budgets on SmolLM2-135M-Instruct: perplexity, and speed beside width pruning.

    python benchmarks/depth.py quality --wikitext FOLDER/test.txt --c4 FILE.jsonl --checkpoints FOLDER
    python benchmarks/depth.py speed --checkpoints FOLDER
    python benchmarks/depth.py picture

`quality` prunes with every setting below and measures 12 evenly spaced windows of 2048 tokens of each text (the
packaged sample without them). Rows that benchmarks/results/depth.json holds already are not measured again. The
first n removals of one greedy run are those of a shorter one, from which exchanges start. `speed` times decoding of
the checkpoints that `quality` left behind, in turns with the dense model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.axes import Axes

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.allocation.depth import LossSearch, choose_depth
from hf_structprune.allocation.removal import Amount, Removal, depth_candidates
from hf_structprune.commands.measure import take_turns
from hf_structprune.commands.models import DEMO_MODEL, find_model, find_subject, load_pruner
from hf_structprune.evaluation import perplexity, read_text
from hf_structprune.evaluation.efficiency import EfficiencyConfig
from hf_structprune.evaluation.pictures import COLOURS, GREY, legend_below, make_panels, save
from hf_structprune.stats.losses import TextLoss
from hf_structprune.units import DepthKind, kinds_of


RESULTS = Path(__file__).parent / "results" / "depth.json"
LAYERS = (4, 8, 11)
BARE = {"compensation": False}
# What the first tools of the field leave of the same model, measured once with the same windows (WikiText-2, C4).
PEERS = {
    "PruneMe, 4 layers": (0.105, 39.67, 55.27), "Shortened-LLM, 4 layers": (0.105, 45.62, 65.39),
    "Shortened-LLM, 8 layers": (0.211, 81.69, 114.5),
}  # fmt: skip


def settings() -> dict[str, tuple[float | None, dict[str, Any]]]:
    """Rows: name, ratio and options.

    `chosen` stands for so many layers as the default criterion chooses, `same_as` for what another row has cut, whose
    checkpoint must be there.
    """
    rows: dict[str, tuple[float | None, dict[str, Any]]] = {}
    for percent in (10, 20, 30):
        rows[f"width {percent} %"] = percent / 100, {"units": "mlp_neurons"}
    for number in LAYERS:
        rows[f"{number} layers"] = None, {"chosen": number}
        rows[f"{number} layers, no re-fit"] = None, {"chosen": number, **BARE}
    for kind, units in {"sublayers": ("attention", "mlp"), "layers and sublayers": kinds_of(DepthKind)}.items():
        values = {"units": units, "layout": "per_layer"}
        rows[f"{kind} 10.5 %, no re-fit"] = 0.105, {**values, **BARE}
        rows[f"{kind} 10.5 %"] = None, {**values, "same_as": f"{kind} 10.5 %, no re-fit"}
    for percent in (20, 30):
        rows[f"joint {percent} %, half layers, half neurons"] = (
            percent / 100, {"split": {"layers": 0.5, "mlp_neurons": 0.5}},
        )  # fmt: skip
    for size in (512, 448):
        rows[f"hidden {size}"] = None, {"hidden_size": size}
        rows[f"hidden {size}, no re-fit"] = None, {"hidden_size": size, **BARE}
    rows["4 layers, angular, no re-fit"] = None, {"num_layers": 4, "depth_criterion": "angular", **BARE}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality", "speed", "picture"))
    parser.add_argument("--model", default=DEMO_MODEL, help="Hub id or folder; the demo's model if it is left out")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--c4", type=Path)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--checkpoints", type=Path, help="folder for the pruned checkpoints")
    parser.add_argument("--only", nargs="*", help="names of rows, instead of all")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    {"quality": quality, "speed": speed, "picture": picture}[options.what](options)


def load(options: argparse.Namespace) -> StructuredPruner:
    arguments = find_model(options.model)
    arguments.dtype = options.dtype
    return load_pruner(arguments)


def folder_of(options: argparse.Namespace, name: str) -> Path:
    return (options.checkpoints or Path()) / name.replace(" ", "_").replace("%", "percent")


def stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": {}}


def store(content: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    content["environment"] = {
        "torch": torch.__version__, "transformers": transformers.__version__, "processor": platform.machine(),
        "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def quality(options: argparse.Namespace) -> None:
    texts = {"sample": None}
    if options.wikitext and options.c4:
        texts = {"WikiText-2": read_text(options.wikitext), "C4": read_text(options.c4)}
    content = stored()
    if "dense" not in content["rows"]:
        pruner = load(options)
        content["rows"]["dense"] = {"ratio": 0.0, "perplexity": measure(pruner, texts)}
        store(content)
    if "chosen" not in content:
        content["chosen"] = choose_layers(load(options))
        store(content)
    for name, (ratio, values) in settings().items():
        if name in content["rows"] or (options.only and name not in options.only):
            continue
        if "chosen" in values:
            values = {**values, "units": "layers", "layers": content["chosen"][str(values["chosen"])]["layers"]}
            del values["chosen"]
        pruner, start = load(options), time.perf_counter()
        values = dict(values)
        same_as = values.pop("same_as", None)
        pruner.config = PruningConfig(**values)
        pruner.prune(ratio if same_as is None else PruningPlan.load(folder_of(options, same_as)))
        plan, seconds = pruner.last_plan, time.perf_counter() - start
        if options.checkpoints:
            pruner.save_pretrained(folder_of(options, name))
        content["rows"][name] = {
            "ratio": plan.ratio, "parameters": plan.parameters_after, "removed": plan.removed, "dropped": plan.dropped,
            "settings": values, "seconds": round(seconds, 1), "perplexity": measure(pruner, texts),
        }  # fmt: skip
        print(name, content["rows"][name], flush=True)
        store(content)


def choose_layers(pruner: StructuredPruner) -> dict[str, Any]:
    """What `depth_criterion="exchange"` chooses for each number of layers, with one greedy run for all of them."""
    start, units = time.perf_counter(), ("layers",)
    config = PruningConfig(num_layers=max(LAYERS), depth_criterion="greedy")
    greedy = choose_depth(
        pruner.model, pruner.structure, config, units, count=max(LAYERS), tokens=pruner.calibration_tokens
    )
    chosen: dict[str, Any] = {"greedy": [layer for layer, _ in greedy.order], "losses": greedy.losses}
    chosen |= {"dense_loss": greedy.baseline, "seconds": round(time.perf_counter() - start, 1)}
    print(chosen, flush=True)
    candidates = depth_candidates(pruner.structure, config, units)
    text = TextLoss(pruner.model, pruner.structure, pruner.calibration_tokens())
    for number in LAYERS:
        start, removal = time.perf_counter(), Removal(pruner.structure, greedy.order[:number])
        search = LossSearch(lambda: text, candidates, Amount(number), removal, losses=greedy.losses[:number])
        search.exchange()
        chosen[str(number)] = {
            "layers": sorted(layer for layer, _ in removal.units), "losses": search.losses[number - 1 :],
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
        print(number, chosen[str(number)], flush=True)
    return chosen


def measure(pruner: StructuredPruner, texts: dict[str, str | None]) -> dict[str, float]:
    return {
        name: perplexity(pruner.model, pruner.tokenizer, text, max_windows=12).perplexity
        for name, text in texts.items()
    }


def speed(options: argparse.Namespace) -> None:
    """Decoding and prefill of the checkpoints over those of the dense model."""
    content = stored()
    arguments = find_model(options.model)
    arguments.dtype = options.dtype
    for name, row in content["rows"].items():
        folder = folder_of(options, name)
        if name == "dense" or "speed" in row or not folder.is_dir() or (options.only and name not in options.only):
            continue
        subjects = [find_subject(dataclasses.replace(arguments, model=str(folder))), find_subject(arguments)]
        small, dense = take_turns(subjects, EfficiencyConfig(), 3)
        row["speed"] = {
            figure: small.figures[f"efficiency/{figure}"].value / dense.figures[f"efficiency/{figure}"].value
            for figure in ("prefill_throughput", "decode_throughput")
        }
        print(name, row["speed"], flush=True)
        store(content)


def picture(options: argparse.Namespace) -> None:
    """Perplexity (left out where it was not measured) and speed of decoding against the share that is gone."""
    content = stored()
    rows = content["rows"]
    text = next(iter(rows["dense"]["perplexity"]))
    title = "SmolLM2-135M-Instruct without training: what depth and width cost and bring"
    figure, (quality_axis, speed_axis) = make_panels(2, 3.2, title)
    with_refit = [label for label in SERIES if "no re-fit" not in label]
    for label, chosen in SERIES.items():
        colour = COLOURS[with_refit.index(label.removesuffix(", no re-fit"))]
        names = [name for name in rows if chosen(name)]
        style = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.6, "label": label}
        style |= {"linestyle": "--", "markerfacecolor": "white"} if "no re-fit" in label else {}
        draw(quality_axis, [(rows[name]["ratio"], rows[name]["perplexity"][text]) for name in names], style)
        speeds = [(rows[n]["ratio"], rows[n]["speed"]["decode_throughput"]) for n in names if "speed" in rows[n]]
        draw(speed_axis, [] if "no re-fit" in label else speeds, style)
    if text == "WikiText-2":
        points = [(100 * ratio, value) for ratio, value, _ in PEERS.values()]
        peers = {"color": GREY, "marker": "x", "label": "PruneMe, Shortened-LLM", "zorder": 3}
        quality_axis.scatter(*zip(*points, strict=True), **peers)
    quality_axis.set_yscale("log")
    quality_axis.set_ylabel(f"perplexity, {text}")
    quality_axis.axhline(rows["dense"]["perplexity"][text], color=GREY, linewidth=0.8)
    speed_axis.axhline(1.0, color=GREY, linewidth=0.8)
    speed_axis.set_ylabel("speed of decoding, dense = 1")
    speed_axis.set_xlabel("share of all parameters that is gone, %")
    legend_below(quality_axis)
    save(figure, RESULTS.with_suffix(".png"))


# Lines of the picture: which rows belong to each.
SERIES = {
    "width (neurons)": lambda name: name.startswith("width"),
    "depth (layers)": lambda name: name.endswith("layers"),
    "depth (layers), no re-fit": lambda name: name.endswith("layers, no re-fit"),
    "layers and sublayers": lambda name: name.startswith("layers and") and "no re-fit" not in name,
    "layers and sublayers, no re-fit": lambda name: name.startswith("layers and") and "no re-fit" in name,
    "half layers, half neurons": lambda name: "half layers" in name,
    "hidden size": lambda name: name.startswith("hidden") and "no re-fit" not in name,
}


def draw(axis: Axes, points: list[tuple[float, float]], style: dict[str, Any]) -> None:
    if points:
        shares, values = zip(*sorted(points), strict=True)
        axis.plot([100 * share for share in shares], values, **style)


if __name__ == "__main__":
    main()
