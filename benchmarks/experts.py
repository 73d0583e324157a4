"""Whole experts cut from a mixture that means something: each criterion, cut alone, merged, and re-fitted.

    python benchmarks/experts.py --upcycle MODEL --wikitext FOLDER --minutes 5
    python benchmarks/experts.py --wikitext FOLDER --minutes 6

No trained mixture of experts is small enough for a laptop. The first command makes one out of a dense Llama (an id or
a folder; `--gguf-file` names a file in it), each MLP becoming 8 experts of which 2 are chosen, see `upcycling.py`. The
second trains one: a Qwen3-MoE of 2M parameters on bytes (4 layers, 16 experts of which each byte is sent to 4). The
text is the raw WikiText-2 split `train.txt` in FOLDER, or the packaged sample without it. Then a quarter and a half of
the experts of every layer go, by every criterion; merging is measured with `reap` alone. Figures are perplexity of a
token, or of a byte, on the test text (`test.txt`, or the packaged one). Results go to benchmarks/results/experts.json
(experts_upcycled.json), a table to the terminal. Another machine trains another model in the same minutes: compare
rows, not runs, or say `--steps`. `--mixture FOLDER` keeps the model that was made, or takes the one that is there, so
that a run that was stopped goes on: rows that the file has of the same settings are passed over.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
import upcycling
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_structprune
from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.units import RoutedKind, level_criteria


RESULTS = Path(__file__).parent / "results"
LENGTH, BATCH, EXPERTS, UPCYCLED = 256, 16, 16, 8
WAYS = {
    "cut": {"compensation": False}, "merged": {"compensation": False, "merge_experts": True}, "re-fitted": {},
    "merged, re-fitted": {"merge_experts": True},
}  # fmt: skip
PACKAGED = Path(hf_structprune.__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upcycle", help="dense Llama model to make a mixture of")
    parser.add_argument("--gguf-file", help="file in it")
    parser.add_argument("--wikitext", type=Path, help="folder with `train.txt` and `test.txt`")
    parser.add_argument("--minutes", type=float, default=6, help="of training (default: 6)")
    parser.add_argument("--steps", type=int, help="of training instead, with --upcycle: the same model anywhere")
    parser.add_argument("--mixture", type=Path, help="folder of the mixture of --upcycle, kept for another run")
    parser.add_argument("--test-windows", type=int, default=32, help="of 256 tokens (default: 32)")
    parser.add_argument("--calibration", type=int, default=32, help="sequences of 256 tokens (default: 32)")
    parser.add_argument("--criteria", nargs="+", default=level_criteria(RoutedKind))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train, test = texts(options.wikitext)
    rows, number = {}, UPCYCLED if options.upcycle else EXPERTS
    if options.upcycle:
        tokenizer = AutoTokenizer.from_pretrained(options.upcycle, gguf_file=options.gguf_file)
        dense = AutoModelForCausalLM.from_pretrained(
            options.upcycle, gguf_file=options.gguf_file, dtype=torch.float32
        ).eval()
        train, test = (torch.tensor(tokenizer(text, verbose=False).input_ids) for text in (train, test))
    else:
        train, test = (torch.tensor(list(text.encode()), dtype=torch.long) for text in (train, test))
    windows = test[: len(test) // LENGTH * LENGTH].view(-1, LENGTH)
    windows = windows[torch.linspace(0, len(windows) - 1, options.test_windows).long()]
    starts = torch.randint(len(train) - LENGTH, (options.calibration,), generator=torch.Generator().manual_seed(1))
    tokens = torch.stack([train[start : start + LENGTH] for start in starts])
    if options.upcycle:
        model, rows, steps = mixture(dense, train, tokens, windows, options)
    else:
        model, steps = trained(train, options.minutes, options.seed)
    rows["mixture"] = measured(model, windows)
    print(f"mixture, after {steps} steps: perplexity {rows['mixture']['perplexity']:.2f}", flush=True)
    kept, path = (number * 3 // 4, number // 2), RESULTS / f"experts{'_upcycled' if options.upcycle else ''}.json"
    if options.mixture and path.exists():
        earlier = json.loads(path.read_text())
        if earlier["settings"] == settings(options, steps) and earlier["rows"]["mixture"] == rows["mixture"]:
            rows = earlier["rows"]
    for criterion in options.criteria:
        for keep in kept:
            for way, changes in ways(criterion).items():
                name = f"{criterion}, {keep} of {number}, {way}"
                if name in rows:
                    continue
                rows[name] = pruned(model, windows, tokens, criterion, keep, changes)
                print(name, f"{rows[name]['perplexity']:.2f}", f"{rows[name]['seconds']:.0f} s", flush=True)
                path.write_text(json.dumps({"rows": rows, "settings": settings(options, steps)}, indent=1) + "\n")
    show(rows, options.criteria, number, kept)


def mixture(dense, train, tokens, windows, options: argparse.Namespace) -> tuple[MixtralForCausalLM, dict, int]:
    """The mixture, made of a dense model or of an earlier run, rows of what it was made of, and steps of training."""
    if options.mixture and (options.mixture / "rows.json").exists():
        kept = json.loads((options.mixture / "rows.json").read_text())
        return MixtralForCausalLM.from_pretrained(options.mixture, dtype=torch.float32).eval(), *kept
    rows = {"dense model": measured(dense, windows)}
    model = upcycling.upcycled(dense, tokens, UPCYCLED, 2)
    rows["mixture, untrained"] = measured(model, windows)
    print({name: row["perplexity"] for name, row in rows.items()}, flush=True)
    steps = upcycling.trained(model, train, LENGTH, options.minutes, options.seed, options.steps)
    if options.mixture:
        model.save_pretrained(options.mixture)
        (options.mixture / "rows.json").write_text(json.dumps([rows, steps]))
    return model, rows, steps


def ways(criterion: str) -> dict[str, dict[str, bool]]:
    """What is done about the experts that go, and the options of it."""
    return {way: changes for way, changes in WAYS.items() if criterion == "reap" or "merge_experts" not in changes}


def texts(folder: Path | None) -> tuple[str, str]:
    """What to train on and what to test on."""
    if folder is not None:
        return tuple((folder / f"{split}.txt").read_text(encoding="utf-8") for split in ("train", "test"))
    lines = (PACKAGED / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines), (PACKAGED / "wikitext2_test_sample.txt").read_text()


def trained(text: torch.Tensor, minutes: float, seed: int) -> tuple[Qwen3MoeForCausalLM, int]:
    """A mixture of experts after some minutes of training, and the steps that these were enough for."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, num_experts=EXPERTS, num_experts_per_tok=4, moe_intermediate_size=64, norm_topk_prob=True,
        router_aux_loss_coef=0.01, output_router_logits=True, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95))
    started, steps = time.monotonic(), 0
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (steps + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * share))
        starts = torch.randint(len(text) - LENGTH, (BATCH,)).tolist()
        batch = torch.stack([text[start : start + LENGTH] for start in starts])
        optimizer.zero_grad(set_to_none=True)
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    model.config.output_router_logits = False
    return model.eval(), steps


@torch.no_grad()
def measured(model: torch.nn.Module, windows: torch.Tensor) -> dict[str, float]:
    """Perplexity of all but the first token of each window."""
    losses = [float(model(batch, labels=batch, use_cache=False).loss) for batch in windows.split(4)]
    return {"perplexity": math.exp(sum(losses) / len(losses)), "parameters": model.num_parameters()}


def pruned(model, windows, tokens, criterion: str, keep: int, changes: dict[str, bool]) -> dict[str, float]:
    config = PruningConfig(
        units="experts", expert_criterion=criterion, keep={"experts": keep}, **changes,
        calibration={"tokens": tokens, "batch_size": BATCH},
    )  # fmt: skip
    started = time.monotonic()
    small = StructuredPruner(copy.deepcopy(model), config).prune()
    return {"seconds": time.monotonic() - started, **measured(small, windows)}


def settings(options: argparse.Namespace, steps: int) -> dict[str, object]:
    return {
        "model": options.gguf_file or options.upcycle or "trained here", "minutes": options.minutes, "steps": steps,
        "text": "WikiText-2" if options.wikitext else "packaged samples",
        "seed": options.seed, "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "calibration": f"{options.calibration} x {LENGTH}", "test": f"{options.test_windows} x {LENGTH}",
    }  # fmt: skip


def show(rows: dict[str, dict[str, float]], criteria: list[str], number: int, kept: tuple[int, int]) -> None:
    table = Table(
        title="perplexity: " + ", ".join(f"{n} {r['perplexity']:.2f}" for n, r in rows.items() if "," not in n)
    )
    for column in ("criterion", *(f"{keep} of {number}, {way}" for keep in kept for way in WAYS)):
        table.add_column(column)
    for criterion in criteria:
        names = (f"{criterion}, {keep} of {number}, {way}" for keep in kept for way in WAYS)
        table.add_row(criterion, *(f"{rows[name]['perplexity']:.2f}" if name in rows else "" for name in names))
    Console().print(table)


if __name__ == "__main__":
    main()
