"""Where a cut unit is not quite a zeroed one, the plan says so."""

import families
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.model.describe import approximations
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import Decision, PruningPlan


HEADS = "queries and keys are normalised over all heads"
CHANNELS = "LayerNorms take mean and variance over the channels that are left"
SIZE = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, pad_token_id=0
)


def lines(model, keep=None, hidden=None):
    structure = ModelStructure.of(model)
    keep = {(group.layer, group.kind): 1 for group in structure.groups if group.kind == keep}
    plan = PruningPlan.from_counts(
        structure, keep, model_type=model.config.model_type, layout="per_layer", hidden=hidden
    )
    return approximations(model, structure, plan)


@pytest.mark.parametrize("name", ["Olmo2Config", "Olmo3Config", "FlexOlmoConfig", "MiniMaxM2Config"])
def test_norms_over_all_heads_are_named_when_heads_go(name):
    config = getattr(transformers, name)(**SIZE, **({"head_dim": 8} if name == "MiniMaxM2Config" else {}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (line,) = lines(model, "kv_groups")
    assert line.startswith(HEADS)
    assert lines(model, "mlp_neurons") == lines(model) == []


def test_norms_of_each_head_are_not_named():
    assert lines(families.make_model("qwen3"), "kv_groups") == []


@pytest.mark.parametrize("name, named", [("cohere2", True), ("starcoder2", True), ("llama", False), ("gemma2", False)])
def test_layer_norms_are_named_when_channels_go(name, named):
    found = lines(families.make_model(name), hidden=Decision("hidden", None, families.HIDDEN, 24))
    assert [line.startswith(CHANNELS) for line in found] == [True] * named
    assert lines(families.make_model(name), "mlp_neurons") == []


def test_the_plan_carries_them():
    pruner = StructuredPruner(families.make_model("starcoder2"), PruningConfig(hidden_size=24))
    assert any(line.startswith(CHANNELS) for line in pruner.plan().warnings)
