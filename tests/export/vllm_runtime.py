"""vLLM for tests. It wants other versions than this package, so an interpreter of its own runs this file:

    VLLM_PYTHON tests/export/vllm_runtime.py JOBS RESULTS

JOBS is JSON, a list of `{"model": FOLDER, "tokens": [[...], ...], "new": N}`; into the folder RESULTS goes `I.npz` for
job I: `prompt` (all log-probabilities after each token but the last), `greedy` (the tokens generated) and `generated`
(all log-probabilities at each of them), or `I.txt` with what vLLM said instead. Only vLLM's own code runs here.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path


os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR", TOKENIZERS_PARALLELISM="false",
)  # fmt: skip
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def serve(model, tokens, new, dtype="float32"):
    """Log-probabilities of a model for sequences of the same length, and those of `new` greedy tokens behind them."""
    import numpy as np
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, dtype=dtype, max_model_len=len(tokens[0]) + new + 1, enforce_eager=True, max_logprobs=-1,
        skip_tokenizer_init=True, trust_remote_code=True, seed=0, max_num_seqs=4, enable_prefix_caching=False,
    )  # fmt: skip
    options = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=-1, detokenize=False,
                             prompt_logprobs=-1)  # fmt: skip
    results = llm.generate([{"prompt_token_ids": row} for row in tokens], options, use_tqdm=False)
    size = llm.llm_engine.model_config.get_vocab_size()

    def matrix(rows):
        return np.array([[row[token].logprob for token in range(size)] for row in rows])

    return {
        "prompt": np.stack([matrix(result.prompt_logprobs[1:]) for result in results]),
        "greedy": np.array([result.outputs[0].token_ids for result in results]),
        "generated": np.stack([matrix(result.outputs[0].logprobs) for result in results]),
    }


def main(jobs, results):
    import numpy as np
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    gc.freeze()  # vLLM collects several times a model, each time through all modules that have been imported
    for number, job in enumerate(json.loads(Path(jobs).read_text())):
        place = Path(results) / str(number)
        try:
            np.savez(place.with_suffix(".npz"), **serve(**job))
        except Exception:  # what another project's code raises is the answer
            place.with_suffix(".txt").write_text(traceback.format_exc())
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
