"""A new kind of unit is one class: everything else follows from it."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import ConfigurationError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_units
from hf_structprune.proof.guarantee import verdicts
from hf_structprune.units import KINDS, WidthKind


class SharedExpertNeurons(WidthKind):
    """A neuron of the expert that all tokens share."""

    name, label = "toy_neurons", "shared expert's neurons"
    key, part = "shared_expert_intermediate_size", "shared expert"
    sublayer, activated = "mlp", True


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(KINDS, SharedExpertNeurons.name, SharedExpertNeurons())
    return SharedExpertNeurons.name


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, moe_intermediate_size=16,
        shared_expert_intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, mlp_only_layers=[],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


IDS = torch.arange(1, 33).view(2, 16)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def make_pruner(model, **options):
    calibration = {"tokens": torch.randint(1, 64, (8, 12), generator=torch.Generator().manual_seed(1))}
    return StructuredPruner(model, PruningConfig(calibration=calibration, **options))


def test_the_key_finds_its_units(toy, model):
    group = ModelStructure.of(model).layers[1].group(toy)
    prefix = "model.layers.1.mlp.shared_expert"
    assert [(part.tensor, part.dim) for part in group.slices] == [
        (f"{prefix}.gate_proj.weight", 0), (f"{prefix}.up_proj.weight", 0), (f"{prefix}.down_proj.weight", 1),
    ]  # fmt: skip
    assert (group.size, group.cost, group.reader.module) == (40, 3 * 32, f"{prefix}.down_proj")


@pytest.mark.parametrize("criterion", ["l2", "taylor", "obs"])
def test_cut_equals_zeroed(toy, model, criterion):
    pruner = make_pruner(model, units=toy, criterion=criterion, compensation=False)
    structure = pruner.structure
    kept = {}
    plan = pruner.plan(0.05)
    assert {decision.kind for decision in plan.decisions} == {toy}
    masked = AutoModelForCausalLM.from_config(model.config).eval()
    masked.load_state_dict(model.state_dict())
    small = pruner.prune(plan)
    kept = {(group.layer, toy): torch.tensor(group.kept) for group in pruner.last_plan.groups}
    mask_units(masked, structure, kept)
    assert small.config.shared_expert_intermediate_size == plan.groups[0].keep < 40
    torch.testing.assert_close(logits(small), logits(masked), atol=1e-6, rtol=0)


def test_it_is_proven_before_weights_are_touched(toy, model):
    assert verdicts(model, ModelStructure.of(model), [toy]) == {toy: None}


def test_it_is_an_option_a_row_and_json(toy, model, tmp_path):
    pruner = make_pruner(model, keep={toy: 24, "kv_groups": 1})
    pruner.prune()
    pruner.save_pretrained(tmp_path)
    plan = PruningPlan.load(tmp_path)
    assert "shared expert's neurons" in str(plan) and plan == PruningPlan.from_dict(
        json.loads(json.dumps(plan.to_dict()))
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.shared_expert_intermediate_size == 24 and again.config.num_key_value_heads == 1
    assert torch.equal(logits(again), logits(pruner.model))
    assert "toy_neurons" in (tmp_path / "README.md").read_text()


def test_it_shares_a_budget_with_others_and_may_differ_between_layers(toy, model):
    criteria = {toy: "wanda", "kv_groups": "l1"}
    pruner = make_pruner(model, units=tuple(criteria), criterion=criteria, layout="per_layer", allocation="search")
    pruner.prune(0.1)
    assert pruner.last_plan.ratio == pytest.approx(0.1, abs=0.005)


def test_units_that_no_one_map_reads_are_left_alone(toy, model, monkeypatch):
    monkeypatch.setattr(SharedExpertNeurons, "key", "moe_intermediate_size")  # of stacked experts
    structure = ModelStructure.of(model)
    assert toy not in structure.kinds()
    assert "moe_intermediate_size: 0 linear maps of a layer read its units and not one, left alone" in structure.notes


def test_without_it_there_is_none():
    with pytest.raises(ConfigurationError, match="toy_neurons"):
        PruningConfig(units="toy_neurons")
