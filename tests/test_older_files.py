"""Checkpoints and plans that version 1 wrote are read as they were."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner


FOLDER = Path(__file__).parent / "fixtures" / "v1"
LOGITS = json.loads((FOLDER / "logits.json").read_text())


def last_logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 33).view(2, 16)).logits[:, -1, :4].flatten()


@pytest.mark.parametrize("name", LOGITS)
def test_a_checkpoint_loads(name):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name)
    torch.testing.assert_close(last_logits(model), torch.tensor(LOGITS[name]), atol=2e-5, rtol=0)
    plan = PruningPlan.load(FOLDER / name)
    assert plan.parameters_after == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", LOGITS)
def test_a_plan_is_carried_out_again(name):
    """On the dense model it gives the same model, and what was written of the plan is what is read of it."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "dense")
    plan, written = PruningPlan.load(FOLDER / name), json.loads((FOLDER / name / "pruning_plan.json").read_text())
    assert {kind: plan.removed[kind] for kind in written["removed"]} == written["removed"]
    assert (plan.ratio, plan.bytes_after, plan.macs_after) == (
        written["ratio"], written["bytes_after"], written["macs_after"],
    )  # fmt: skip
    pruner = StructuredPruner(model, PruningConfig.load(FOLDER / name))
    pruned = pruner.prune(plan)
    torch.testing.assert_close(last_logits(pruned), torch.tensor(LOGITS[name]), atol=2e-5, rtol=0)
    assert pruner.last_plan.removed == plan.removed
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_pruned_checkpoint_is_pruned_again():
    pruner = StructuredPruner.from_pretrained(
        FOLDER / "per_layer", PruningConfig(criterion="l1", compensation=False, layout="per_layer")
    )
    pruner.prune(0.1)
    assert pruner.last_plan.ratio == pytest.approx(0.1, abs=0.02)
