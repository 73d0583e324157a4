"""Whole experts cut from a small mixture that was trained to mean something: each criterion, with and without re-fit.

    python benchmarks/experts.py --wikitext FOLDER --minutes 6

No trained mixture of experts is small enough for a laptop, so one is trained here: a Qwen3-MoE of 2M parameters (4
layers, 16 experts of which each byte is sent to 4) on the bytes of the raw WikiText-2 split `train.txt` in FOLDER, or
of the packaged sample without it, for some minutes on a CPU. Then 4 and 8 of the 16 experts of every layer go. Figures
are bits per byte on the test text (`test.txt`, or the packaged one). Results go to benchmarks/results/experts.json, a
table to the terminal. Another machine trains another model in the same minutes: compare rows, not runs.
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
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_structprune
from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.units import RoutedKind, level_criteria


RESULTS = Path(__file__).parent / "results" / "experts.json"
LENGTH, BATCH, TEST_WINDOWS, CALIBRATION = 256, 16, 128, 128
EXPERTS, KEPT = 16, (12, 8)
PACKAGED = Path(hf_structprune.__file__).parent / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, help="folder with `train.txt` and `test.txt`")
    parser.add_argument("--minutes", type=float, default=6, help="of training (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train, test = texts(options.wikitext)
    model, steps = trained(train, options.minutes, options.seed)
    windows = test[: len(test) // LENGTH * LENGTH].view(-1, LENGTH)
    windows = windows[torch.linspace(0, len(windows) - 1, TEST_WINDOWS).long()]
    starts = torch.randint(len(train) - LENGTH, (CALIBRATION,), generator=torch.Generator().manual_seed(1))
    tokens = torch.stack([train[start : start + LENGTH] for start in starts])
    rows = {"dense": {"bits": bits_per_byte(model, windows), "parameters": model.num_parameters()}}
    print(f"dense, after {steps} steps: {rows['dense']['bits']:.3f} bits per byte", flush=True)
    for criterion in level_criteria(RoutedKind):
        for kept in KEPT:
            for compensation in (False, True):
                name = f"{criterion}, {kept} kept, {'re-fitted' if compensation else 'cut'}"
                rows[name] = pruned(model, windows, tokens, criterion, kept, compensation)
                print(name, f"{rows[name]['bits']:.3f}", flush=True)
    RESULTS.write_text(json.dumps({"rows": rows, "settings": settings(options, steps)}, indent=1) + "\n")
    show(rows)


def texts(folder: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and bytes to test on."""
    if folder is None:
        lines = (PACKAGED / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
        pair = (
            "\n".join(json.loads(line)["text"] for line in lines),
            (PACKAGED / "wikitext2_test_sample.txt").read_text(),
        )
    else:
        pair = tuple((folder / f"{split}.txt").read_text(encoding="utf-8") for split in ("train", "test"))
    return tuple(torch.tensor(list(text.encode()), dtype=torch.long) for text in pair)


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
def bits_per_byte(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Mean bits of all but the first byte of each window."""
    losses = [float(model(batch, labels=batch).loss) for batch in windows.split(BATCH)]
    return sum(losses) / len(losses) / math.log(2)


def pruned(model, windows, tokens, criterion: str, kept: int, compensation: bool) -> dict[str, float]:
    config = PruningConfig(
        units="experts", expert_criterion=criterion, keep={"experts": kept}, compensation=compensation,
        calibration={"tokens": tokens, "batch_size": BATCH},
    )  # fmt: skip
    started = time.monotonic()
    small = StructuredPruner(copy.deepcopy(model), config).prune()
    seconds = time.monotonic() - started
    return {"bits": bits_per_byte(small, windows), "parameters": small.num_parameters(), "seconds": seconds}


def settings(options: argparse.Namespace, steps: int) -> dict[str, object]:
    return {
        "text": "WikiText-2" if options.wikitext else "packaged samples", "minutes": options.minutes, "steps": steps,
        "seed": options.seed, "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "calibration": f"{CALIBRATION} x {LENGTH} bytes", "test": f"{TEST_WINDOWS} windows of {LENGTH} bytes",
    }  # fmt: skip


def show(rows: dict[str, dict[str, float]]) -> None:
    table = Table(title=f"bits per byte; dense {rows['dense']['bits']:.3f}")
    for column in ("criterion", *(f"{kept} of {EXPERTS}, {how}" for kept in KEPT for how in ("cut", "re-fitted"))):
        table.add_column(column)
    for criterion in level_criteria(RoutedKind):
        names = (f"{criterion}, {kept} kept, {how}" for kept in KEPT for how in ("cut", "re-fitted"))
        table.add_row(criterion, *(f"{rows[name]['bits']:.3f}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    main()
