"""Reports as `recovery.json` and `quantization.json` hold them."""

import math

from hf_structprune.quantization.configuration import QuantizationConfig


def make_report(dense=18.4, pruned=32.0, points=((10, 26.0), (20, 24.0)), best=20, **changes):
    """A report with these perplexities."""
    log = math.log
    values = {0: pruned, **dict(points)}
    share = None
    if dense not in (None, pruned) and best in values:
        share = (log(pruned) - log(values[best])) / (log(pruned) - log(dense))
    return {
        "schema_version": 1,
        "curve": {
            "pruned": log(pruned),
            "dense": None if dense is None else log(dense),
            "points": [{"step": step, "log_perplexity": log(p), "seconds": 1.0 * step} for step, p in points],
        },
        "text": {"name": "sample", "source": "s", "windows": 32, "window": 512, "tokens": 16352},
        "stopped": None,
        "best_step": best,
        "recovered": share,
        "configuration": {"method": "lora", "rank": 4, "epochs": 1.0},
        "model": "small",
        "data": {"sources": [{"name": "them/dolly", "sequences": 1234}, {"name": "mine.jsonl", "sequences": 5}]},
        "training": {
            "steps": 20, "seconds": 600.0, "tokens": 5000, "learning_rate": 1e-4, "batch_size": 64, "epochs": 1.0,
            "method": "lora", "trainable_parameters": 1000,
        },
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        **changes,
    }  # fmt: skip


def make_quantisation(method="bitsandbytes", bits=4, group_size=128, **configuration):
    """A report of a quantisation, as `quantization.json` holds it."""
    settings = {"method": method, "bits": bits, "group_size": group_size, **configuration}
    return {
        "schema_version": 1,
        "method": method,
        "bits": bits,
        "group_size": None if method == "bitsandbytes" else group_size,
        "configuration": QuantizationConfig.from_dict(settings).to_dict(),
        "model": "recovered",
        "versions": {"hf_structprune": "0.1", "torch": "2.13.0", "transformers": "5.24.0", method: "0.50"},
        "weights": {"parameters": 1, "bytes": 25_000_000, "bytes_before": 100_000_000},
        "notes": ["Widths of 33 are slow."],
    }
