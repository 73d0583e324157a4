"""Peak memory and time of pruning from disk to disk, for random checkpoints of known shapes with more and more layers.

    python benchmarks/streaming.py llama-3-8b --layers 2 16
    python benchmarks/streaming.py qwen3-30b-a3b --layers 2 4

For each number of layers: writes a random bfloat16 checkpoint layer by layer, prunes it with `stream=True` in a
process of its own, and another process carries the same text once through the model (a plain streamed forward). The
peak is the largest resident set of the process, as the system counts it. Little text: it is the memory that is shown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.files.shards import Shards
from hf_structprune.stats.stream import LayerStream


RESULTS = Path(__file__).parent / "results" / "streaming.json"
TEXT = dict(num_samples=8, length=16)
SHAPES = {
    "llama-3-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, rope_theta=500000.0, max_position_embeddings=8192,
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, head_dim=128,
        num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        vocab_size=151936, max_position_embeddings=8192,
    ),
}  # fmt: skip
# Ridge and criterion are chosen for time: what is largest in memory, the re-fit of a whole MLP, is the same for all.
OPTIONS = {
    "llama-3-8b": dict(units=("mlp_neurons",), criterion="wanda", damping=0.1),
    "qwen3-30b-a3b": dict(units=("experts",), expert_criterion="frequency"),
}


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


def config_for(shape: str) -> PruningConfig:
    vocabulary = SHAPES[shape]["vocab_size"]
    size = (TEXT["num_samples"], TEXT["length"])
    tokens = torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(0))
    return PruningConfig(calibration=CalibrationConfig(tokens=tokens), **OPTIONS[shape])


def prune(shape: str, dense: str, output: str) -> dict:
    pruner = StructuredPruner.from_pretrained(dense, config_for(shape), stream=True)
    plan = pruner.plan(0.1)
    stated = pruner._streaming.memory_needed(plan, pruner.config, pruner.structure)
    pruner.prune(0.1, output)
    return {"stated_bytes": stated, "ratio": pruner.last_plan.ratio}


def forward(shape: str, dense: str, output: str) -> dict:
    """Carries the text through every layer once."""
    pruner = StructuredPruner.from_pretrained(dense, config_for(shape), stream=True)
    store, model = pruner._streaming.store, pruner.model
    with torch.no_grad():
        size = pruner.config.calibration.batch_size
        stream = LayerStream(model, pruner.structure, pruner.calibration_tokens(), size, store)
    return {"layers": len(stream.layers)}


def _measured(pipe, what, *args) -> None:
    started = time.monotonic()
    found = what(*args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send({**found, "seconds": round(time.monotonic() - started, 1), "peak_bytes": peak})


def in_own_process(what, *args) -> dict:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, what, *args))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--folder", default=None, help="where checkpoints are written; default: temporary")
    options = parser.parse_args()
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            dense, output = Path(folder, "dense"), Path(folder, "out")
            size = write_checkpoint(dense, options.shape, layers)
            once = in_own_process(forward, options.shape, str(dense), str(output))
            pruned = in_own_process(prune, options.shape, str(dense), str(output))
            rows = [row for row in rows if (row["shape"], row["layers"]) != (options.shape, layers)]
            rows.append({
                "shape": options.shape, "layers": layers, "checkpoint_bytes": size, "text": TEXT,
                "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
                "forward_seconds": once["seconds"], "forward_peak_bytes": once["peak_bytes"], **pruned,
            })  # fmt: skip
            RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
