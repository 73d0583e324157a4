"""mlx-lm for tests. It has an environment of its own, whose interpreter runs this file as vLLM's does its own:

    MLX_PYTHON tests/export/mlx_runtime.py JOBS RESULTS

JOBS is JSON, a list of `{"model": FOLDER, "tokens": [[...], ...], "new": N}`; into the folder RESULTS goes `I.npz` for
job I: `logprobs` (after each token, those that were generated too) and `greedy`, or `I.txt` with the error.
"""

import json
import sys
import traceback
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def serve(model, tokens, new):
    """The log-probabilities of sequences and of the greedy tokens behind them, which a cache gives one by one."""
    model, _ = load_model(Path(model))
    read, cache, given = mx.array(tokens), make_prompt_cache(model), mx.array(tokens)
    for _ in range(new):
        given = mx.argmax(model(given, cache=cache)[:, -1:], axis=-1)
        read = mx.concatenate([read, given], axis=1)
    logits = np.array(model(read).astype(mx.float32)).astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    return {"logprobs": logprobs, "greedy": np.array(read)[:, -new:]}


def main(jobs, results):
    for number, job in enumerate(json.loads(Path(jobs).read_text())):
        place = Path(results) / str(number)
        try:
            np.savez(place.with_suffix(".npz"), **serve(**job))
        except Exception:  # what another project's code raises is the answer
            place.with_suffix(".txt").write_text(traceback.format_exc())


if __name__ == "__main__":
    main(*sys.argv[1:])
