"""Peak memory and time of pruning from disk to disk, for random checkpoints of known shapes with more and more layers.

    python benchmarks/streaming.py llama-3-8b --layers 16 --no-refit
    python benchmarks/streaming.py qwen3-30b-a3b --layers 6
    python benchmarks/streaming.py --all

For each number of layers: writes a random bfloat16 checkpoint layer by layer, prunes it with `stream=True` in a
process of its own, which computes in `--dtype` and may take `--limit` GB (`ulimit -d`), and another process carries
the same text once through the model (a plain streamed forward). The peak is the largest resident set of the process,
pages of files that are mapped among it, as the system counts it. Little text: it is the memory that is shown. Of
llama-3.1-405b there is no checkpoint: a plan is made of its configuration by `hf-structprune plan`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.files.shards import Shards
from hf_structprune.hardware import memory_taken
from hf_structprune.stats.stream import LayerStream


RESULTS = Path(__file__).parent / "results" / "streaming.json"
TEXT = dict(num_samples=8, length=16)
_LLAMA = dict(model_type="llama", rope_theta=500000.0)
SHAPES = {
    "llama-3-8b": dict(
        **_LLAMA, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192,
    ),
    "a quarter as wide": dict(
        **_LLAMA, hidden_size=1024, intermediate_size=3584, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=32064, max_position_embeddings=8192,
    ),
    "llama-3.1-405b": dict(
        **_LLAMA, hidden_size=16384, intermediate_size=53248, num_attention_heads=128, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, num_hidden_layers=126,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, head_dim=128,
        num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        vocab_size=151936, max_position_embeddings=8192,
    ),
}  # fmt: skip
# Ridge and criterion are chosen for time: what is largest in memory, the re-fit of a whole MLP, is the same for all.
_NEURONS = dict(units=("mlp_neurons",), criterion="wanda", damping=0.1)
OPTIONS = {
    "llama-3-8b": _NEURONS, "a quarter as wide": _NEURONS,
    "qwen3-30b-a3b": dict(units=("experts",), expert_criterion="frequency"),
}  # fmt: skip
# Shape, numbers of layers, with or without the re-fit, what is computed in, GB that a process may take.
RUNS = [
    ("llama-3.1-405b", (), True, "float32", 10),
    ("a quarter as wide", (4, 12), True, "float32", 10),
    ("llama-3-8b", (16,), False, "float32", 10),
    ("qwen3-30b-a3b", (6,), True, "float32", 10),
    ("llama-3-8b", (2, 6), True, "float32", 10),
    ("llama-3-8b", (2, 6, 14), True, "bfloat16", 10),
]


def write_checkpoint(folder: Path, shape: str, layers: int) -> int:
    """Writes random weights, a layer in memory at a time; returns their bytes."""
    values = {**SHAPES[shape], "num_hidden_layers": layers}
    config = AutoConfig.for_model(values.pop("model_type"), **values, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator, groups = torch.Generator().manual_seed(0), {}
    for name, tensor in model.state_dict().items():
        groups.setdefault(name.split(".")[2] if ".layers." in name else name, {})[name] = tensor
    (folder / "parts").mkdir(parents=True)
    shards = Shards(folder / "parts")
    for group in groups.values():
        tensors = {}
        for name, like in group.items():
            tensors[name] = torch.empty(like.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            tensors[name] += 1 if like.ndim == 1 else 0
        shards.add(revert_weight_conversion(model, tensors))
    model.save_pretrained(folder, state_dict={})
    shards.finish(folder, model.num_parameters())
    shutil.rmtree(folder / "parts")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def load(shape: str, dense: str, refit: bool, dtype: str) -> StructuredPruner:
    vocabulary = SHAPES[shape]["vocab_size"]
    size = (TEXT["num_samples"], TEXT["length"])
    tokens = torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(0))
    config = PruningConfig(calibration=CalibrationConfig(tokens=tokens), compensation=refit, **OPTIONS[shape])
    return StructuredPruner.from_pretrained(dense, config, stream=True, dtype=getattr(torch, dtype))


def prune(shape: str, dense: str, output: str, refit: bool, dtype: str) -> dict:
    pruner = load(shape, dense, refit, dtype)
    plan = pruner.plan(0.1)
    stated = memory_taken() + sum(pruner._streaming.memory_needed(plan, pruner.config, pruner.structure))
    pruner.prune(0.1, output)
    return {"stated_bytes": stated, "ratio": pruner.last_plan.ratio}


def forward(shape: str, dense: str, output: str, refit: bool, dtype: str) -> dict:
    """Carries the text through every layer once."""
    pruner = load(shape, dense, refit, dtype)
    with torch.no_grad():
        size = pruner.config.calibration.batch_size
        stream = LayerStream(
            pruner.model, pruner.structure, pruner.calibration_tokens(), size, pruner._streaming.store
        )
    return {"layers": len(stream.layers)}


def _measured(pipe, limit, what, *args) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9),) * 2)
    started = time.monotonic()
    found = what(*args)
    seconds, status = round(time.monotonic() - started, 1), Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    pipe.send({**found, "seconds": seconds, "peak_bytes": peak})


def in_own_process(limit: float, what, *args) -> dict:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, limit, what, *args))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def plan_only(shape: str) -> dict:
    """Time that the command takes to plan without weights, all of it."""
    with tempfile.TemporaryDirectory() as folder:
        values = dict(SHAPES[shape])
        AutoConfig.for_model(values.pop("model_type"), **values, dtype="bfloat16").save_pretrained(folder)
        command = [sys.executable, "-m", "hf_structprune.commands.cli", "plan", folder, "--ratio", "0.2", "--json"]
        started = time.monotonic()
        plan = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        seconds = round(time.monotonic() - started, 1)
    return {"parameters": plan["parameters_before"], "ratio": plan["ratio"], "plan_seconds": seconds}


def measure(shape: str, layers: int, refit: bool, dtype: str, limit: float, where: str | None) -> dict:
    with tempfile.TemporaryDirectory(dir=where) as folder:
        dense, output = Path(folder, "dense"), Path(folder, "out")
        size = write_checkpoint(dense, shape, layers)
        args = (shape, str(dense), str(output), refit, dtype)
        once = in_own_process(limit, forward, *args)
        pruned = in_own_process(limit, prune, *args)
        written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    return {
        "checkpoint_bytes": size, "result_bytes": written, "text": TEXT, "limit_bytes": int(limit * 1e9),
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "forward_seconds": once["seconds"], "forward_peak_bytes": once["peak_bytes"], **pruned,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES, nargs="?")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--no-refit", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what is computed in")
    parser.add_argument("--limit", type=float, default=10, help="GB of memory that a process may take")
    parser.add_argument("--all", action="store_true", help="every run of the table in docs/streaming.md")
    parser.add_argument("--folder", default=None, help="where checkpoints are written; default: temporary")
    options = parser.parse_args()
    asked = [(options.shape, options.layers, not options.no_refit, options.dtype, options.limit)]
    for shape, counts, refit, dtype, limit in RUNS if options.all else asked:
        for layers in counts if shape in OPTIONS else [SHAPES[shape]["num_hidden_layers"]]:
            key = {"shape": shape, "layers": layers, "refit": refit}
            measured = shape in OPTIONS
            key |= {"dtype": dtype} if measured else {}
            row = measure(shape, layers, refit, dtype, limit, options.folder) if measured else plan_only(shape)
            rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
            rows = [one for one in rows if any(one.get(name) != value for name, value in key.items())]
            RESULTS.write_text(json.dumps([*rows, {**key, **row}], indent=2) + "\n")
            print(json.dumps({**key, **row}), flush=True)


if __name__ == "__main__":
    main()
