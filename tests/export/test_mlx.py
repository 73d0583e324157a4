"""mlx-lm computes what Transformers does from plain checkpoints, once `config.json` says `rope_theta` in its words.

`make test-mlx` makes its environment (`mlx[cpu]`, on Linux) and runs this with `MLX_PYTHON`, the interpreter in it.
"""

import json
import os
import subprocess
from pathlib import Path

import families
import numpy as np
import pytest
import test_vllm
import torch


PYTHON = os.environ.get("MLX_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(PYTHON).is_file(), reason="needs mlx-lm in its own environment: `make test-mlx`"),
]
NEW = 8
ALL = {**test_vllm.SHAPE, "kv_groups": 1}
PLAIN = {
    **{f"llama, {unit}": ("llama", {unit: number}) for unit, number in (
        ("mlp_neurons", 170), ("query_heads", 2), ("layers", 2), ("hidden", 96), ("head_dim", 16))},
    **{f"{name}, all": (name, ALL) for name in ("llama", "llama_bias", "qwen3", "olmo2", "smollm3")},
    **{f"{name}, neurons, layers": (name, test_vllm.SHAPE) for name in ("qwen2", "granite", "stablelm")},
    "qwen3, hidden": ("qwen3", {"hidden": 96}),
    **{f"{name}, {unit}": (name, {unit: number})
       for name in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "glm4_moe", "granitemoe")
       for unit, number in (("experts", 3), ("expert_neurons", 32))},
}  # fmt: skip
# For mlx-lm the size of a head of these is the hidden size over the heads.
UNREAD = {
    f"{name}, heads": (name, {"kv_groups": 1}) for name in ("qwen2", "qwen2_moe", "granite", "granitemoe", "phi3")
}
CASES = PLAIN | UNREAD


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    """For each case that is wanted: what Transformers computes, and what mlx-lm does or the error that it raises."""
    names = {item.callspec.params["case"] for item in request.session.items if item.path == request.path}
    folder = tmp_path_factory.mktemp("mlx")
    tokens, jobs, expected = families.make_tokens(3, 20), [], {}
    for number, case in enumerate(sorted(names)):
        name, keep = CASES[case]
        model = test_vllm.pruned(folder / f"model-{number}", name, keep=keep)
        greedy = families.greedy(model, tokens, True, NEW)
        with torch.no_grad():
            expected[case] = greedy, model(greedy, use_cache=False).logits.double().log_softmax(-1).numpy()
        jobs.append({"model": str(folder / f"model-{number}"), "tokens": tokens.tolist(), "new": NEW})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("mlx_runtime.py")
    subprocess.run([PYTHON, script, folder / "jobs.json", folder], check=True)

    def result(number):
        if (folder / f"{number}.npz").exists():
            return dict(np.load(folder / f"{number}.npz"))
        return (folder / f"{number}.txt").read_text()

    return {case: (*expected[case], result(number)) for number, case in enumerate(sorted(names))}


@pytest.mark.parametrize("case", PLAIN)
def test_log_probabilities_are_those_of_transformers(served, case):
    greedy, expected, result = served[case]
    assert isinstance(result, dict), result
    assert expected.std() > 1
    np.testing.assert_array_equal(result["greedy"], greedy[:, -NEW:].numpy())
    np.testing.assert_allclose(result["logprobs"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", UNREAD)
def test_what_mlx_reads_otherwise_is_not_served(served, case):
    """If this fails, mlx-lm has learned it, and `hf_structprune.model.served` need not warn any more."""
    assert "Expected shape" in served[case][2]
