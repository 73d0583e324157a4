"""Time and memory of the distillation loss, forward and backward, beside two other ways to compute it.

    python benchmarks/distillation.py

At the size of SmolLM2-135M's head (hidden 576, vocabulary 49152) with 2048 tokens and a teacher with the same head:
`chunked` is this package's loss, `chunked top-64` the same with a cached teacher, `trl` the per-token divergence of
`trl.kernels.chunked_divergence`, and `naive` is `kl_div` of the logits of the whole batch. Each runs in a process of
its own on one thread; seconds are the best of some repetitions, memory is the peak of the resident memory above that
before the first one. Results go to benchmarks/results/distillation.json, with the load average of the machine: other
work slows all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_structprune.evaluation.efficiency import peak_memory
from hf_structprune.files.writing import write_text
from hf_structprune.recovery.distillation.losses import (
    Head,
    HeadPredictions,
    Targets,
    distillation_loss,
    top_predictions,
)


RESULTS = Path(__file__).parent / "results" / "distillation.json"
HIDDEN, VOCAB, TOKENS, TOP_K = 576, 49152, 2048, 64
VARIANTS = ("chunked", "chunked top-64", "trl", "naive")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", choices=VARIANTS, help="measure one variant in this process and print JSON")
    parser.add_argument("--train-head", action="store_true", help="with --one: the head gets a gradient too")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.train_head, DTYPES[args.dtype], args.repeats)))
        return
    rows = []
    for train_head in (False, True):
        for variant in VARIANTS:
            rows.append({"variant": variant, "head_trained": train_head, **_in_a_process(variant, train_head, args)})
            print(rows[-1], file=sys.stderr)
    setting = {"hidden": HIDDEN, "vocab": VOCAB, "tokens": TOKENS, "dtype": args.dtype, "threads": 1}
    setting["load_average_of_15_minutes"] = round(os.getloadavg()[2], 2)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cpu": _cpu()}
    write_text(RESULTS, json.dumps({"setting": setting, "versions": versions, "rows": rows}, indent=2) + "\n")
    _show(rows)


def _in_a_process(variant: str, train_head: bool, args: argparse.Namespace) -> dict:
    command = [sys.executable, __file__, "--one", variant, "--dtype", args.dtype, "--repeats", str(args.repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command + ["--train-head"] * train_head, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(variant: str, train_head: bool, dtype: torch.dtype, repeats: int) -> dict:
    """Best seconds and peak memory of forward and backward, and the loss, to see that all compute the same."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    hidden, weight = draw(TOKENS, HIDDEN, scale=1.0), draw(VOCAB, HIDDEN, scale=0.1)
    other = (hidden + draw(TOKENS, HIDDEN, scale=0.3)).detach()
    hidden.requires_grad_()
    head = weight.clone().requires_grad_(train_head)
    run = prepare(variant, hidden, head, other, weight)
    seconds = []
    with peak_memory({torch.device("cpu")}) as memory:
        for _ in range(repeats):
            hidden.grad = head.grad = None
            start = time.perf_counter()
            loss = run()
            loss.backward()
            seconds.append(time.perf_counter() - start)
            norm = hidden.grad.float().norm().item()
    return {
        "seconds": round(min(seconds), 3), "peak_mb": round((memory.value - memory.before) / 1e6), "loss": loss.item(),
        "gradient_norm": norm,
    }  # fmt: skip


def prepare(variant: str, hidden: Tensor, head: Tensor, other: Tensor, weight: Tensor):
    """A function that computes the mean forward KL."""
    if variant == "naive":
        return lambda: F.kl_div(
            F.log_softmax(hidden @ head.T, -1, dtype=torch.float32),
            F.log_softmax(other @ weight.T, -1, dtype=torch.float32),
            log_target=True, reduction="batchmean",
        )  # fmt: skip
    if variant == "trl":
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return lambda: ChunkedDivergenceFunction.apply(hidden, head, None, other, weight, None, 0.0)[0].mean()
    targets = Targets(torch.ones(TOKENS, dtype=torch.bool), torch.full((TOKENS,), -100))
    teacher = HeadPredictions(other, Head(weight))
    if variant != "chunked":
        parts = [top_predictions(part @ weight.T, TOP_K, 1.0) for part in other.split(256)]
        teacher = type(parts[0])(torch.cat([p.log_probs for p in parts]), torch.cat([p.ids for p in parts]))
    return lambda: distillation_loss(hidden, Head(head), teacher, targets)["loss"]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _show(rows: list[dict]) -> None:
    table = Table(title="Distillation loss, forward and backward", title_justify="left")
    for name in ("variant", "head", "seconds", "peak MB", "loss"):
        table.add_column(name, justify="left" if name in ("variant", "head") else "right")
    for row in rows:
        head = "trained" if row["head_trained"] else "frozen"
        table.add_row(row["variant"], head, f"{row['seconds']:.2f}", f"{row['peak_mb']}", f"{row['loss']:.5f}")
    Console().print(table)


if __name__ == "__main__":
    main()
