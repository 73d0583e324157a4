"""Checkpoints hold what programs older than Transformers 5 look for, and Transformers 5 reads what it read without.

`OLDER_PYTHON=.../bin/python pytest tests/hub/test_older.py` runs them in an environment that has such a Transformers.
"""

import json
import os
import subprocess
from pathlib import Path

import families
import moe_families
import numpy as np
import pytest
import torch
from tiny_tokenizers import build_tokenizer
from transformers import AutoConfig, AutoTokenizer

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.hub.older import write_for_older


PYTHON = os.environ.get("OLDER_PYTHON", "")
THETA = 777.0  # no type's default
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
BASE = {"rope_theta": THETA}
EXPERTS = {**BASE, "num_experts": 4}
EXPECTED = {
    "llama": BASE, "gemma2": BASE, "falcon": BASE, "phi3": {**BASE, "partial_rotary_factor": 1.0},
    "stablelm": {**BASE, "partial_rotary_factor": 0.25}, "gemma3_text": {**BASE, "rope_local_base_freq": THETA},
    "gpt_neox": {"rotary_emb_base": THETA, "rotary_pct": 0.25}, "gpt2": {}, "qwen2_moe": BASE,
    "qwen3_moe": EXPERTS, "mixtral": EXPERTS, "granitemoe": EXPERTS,
    "glm4_moe": {**BASE, "partial_rotary_factor": 0.5}, "deepseek_v3": BASE,
}  # fmt: skip


def with_theta(name):
    """A model whose angles are of another base than its type's default."""

    def change(values):
        if "rope_theta" in values:
            values["rope_theta"] = THETA
        for one in filter(lambda one: isinstance(one, dict), values.values()):
            change(one)

    model = (moe_families.make_moe if name in moe_families.CONFIGS else families.make_model)(name)
    change(model.config.rope_parameters if hasattr(model.config, "rope_parameters") else {})
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


@pytest.mark.parametrize("name", EXPECTED)
def test_older_names_stand_beside_the_new_ones(name, tmp_path):
    config = with_theta(name).config
    config.save_pretrained(tmp_path)
    before, read = json.loads((tmp_path / "config.json").read_text()), AutoConfig.from_pretrained(tmp_path).to_dict()
    write_for_older(tmp_path, config)
    after = json.loads((tmp_path / "config.json").read_text())
    added = {key: value for key, value in after.items() if key not in before}
    assert added == EXPECTED[name] | ({"rope_scaling": None} if EXPECTED[name] else {})
    assert before.items() <= after.items()
    now = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {key: now[key] for key, value in read.items() if value is not None}.items() <= read.items()


def test_scaled_angles_and_tokenizers_of_what_was_pruned(tmp_path):
    model = families.make_model("llama", rope_parameters={"rope_type": "llama3", "rope_theta": THETA, **LLAMA3})
    config = PruningConfig(keep={"layers": 2}, depth_criterion="magnitude", compensation=False)
    pruner = StructuredPruner(model, config, build_tokenizer())
    pruner.prune(output_dir=tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["rope_scaling"] == {"rope_type": "llama3", **LLAMA3} and values["rope_theta"] == THETA
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == pruner.model.config.rope_parameters
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoTokenizer.from_pretrained(tmp_path)("a b").input_ids == pruner.tokenizer("a b").input_ids


def test_nothing_is_added_that_would_be_read_otherwise(tmp_path, monkeypatch):
    config = with_theta("llama").config
    config.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    monkeypatch.setattr("hf_structprune.hub.older._older_names", lambda values: {"hidden_size": 8})
    write_for_older(tmp_path, config)
    assert (tmp_path / "config.json").read_bytes() == before


_RUN = """
import sys, numpy, torch, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        numpy.save(folder + "/logits.npy", model(torch.tensor(numpy.load(folder + "/tokens.npy"))).logits.numpy())
print(transformers.__version__)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path(PYTHON).is_file(), reason="needs an older Transformers in its own environment")
def test_an_older_transformers_gives_the_same_logits(tmp_path):
    tokens, expected = families.make_tokens(2, 12), {}
    for name in (name for name in EXPECTED if name != "gemma2"):  # differs there, dense or pruned
        model = with_theta(name)
        keep = {"layers": model.config.num_hidden_layers - 1}
        config = PruningConfig(round_to=1, keep=keep, depth_criterion="magnitude", compensation=False)
        pruner = StructuredPruner(model, config)
        pruner.prune(output_dir=tmp_path / name)
        np.save(tmp_path / name / "tokens.npy", tokens.numpy())
        with torch.no_grad():
            expected[str(tmp_path / name)] = pruner.model(tokens).logits.numpy()
    ended = subprocess.run([PYTHON, "-c", _RUN, *expected], capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.startswith("4."), ended.stderr[-3000:]
    for folder, logits in expected.items():
        np.testing.assert_allclose(np.load(folder + "/logits.npy"), logits, rtol=0, atol=1e-5, err_msg=folder)
