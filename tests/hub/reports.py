"""Reports of recoveries, as `recovery.json` holds them."""

import math


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
