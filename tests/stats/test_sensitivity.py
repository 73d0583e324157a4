import copy

import families
import pytest
import torch

from hf_structprune.config import PruningConfig
from hf_structprune.criteria import make_criterion
from hf_structprune.model.structure import ModelStructure, matrix
from hf_structprune.stats.moments import is_held_out
from hf_structprune.stats.survey import _EVERY, PROBES, measure_sensitivity


def tokens(count=16, length=16):
    return torch.randint(3, 60, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "falcon"])
def test_sensitivity_is_the_divergence_of_a_model_with_one_group_cut(name):
    """Against masking the least units by hand and comparing full forward passes; l2, so that nothing is re-fitted."""
    model = families.make_model(name, torch.float64)
    before = copy.deepcopy(model.state_dict())
    structure, config = ModelStructure.of(model), PruningConfig(criterion="l2", compensation=False)
    groups = [group for group in structure.groups if group.kind == "mlp_neurons"]
    ids = tokens()
    got = measure_sensitivity(model, structure, make_criterion(config), config, ids, groups)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(got) == {(group.layer, "mlp_neurons") for group in groups}

    test = ids[is_held_out(torch.arange(len(ids)))]
    group = groups[1]
    with torch.no_grad():
        dense = model(test).logits[:, ::_EVERY].float().log_softmax(-1)
        weights = [model.get_parameter(part.tensor).double().movedim(part.dim, 0) for part in group.slices]
        score = sum(w.square().sum(1) for w in weights if w.ndim > 1)
        costs = []
        for share in PROBES:
            drop = round(share * group.size)
            cut = copy.deepcopy(model)
            matrix(cut.get_submodule(group.reader.module))[:, score.argsort()[:drop]] = 0
            other = cut(test).logits[:, ::_EVERY].float().log_softmax(-1)
            divergence = (dense.exp() * (dense - other)).sum(-1).mean()
            costs.append(float(divergence) / (drop / group.size) ** 2)
    assert got[group.layer, "mlp_neurons"] == pytest.approx((costs[0] * costs[1]) ** 0.5, rel=1e-3)


def test_search_allocation_spares_the_layer_that_matters():
    """A layer whose neurons feed nothing is cut first, to the cap of two thirds."""
    from hf_structprune import CalibrationConfig, StructuredPruner

    model = families.make_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)
    calibration = CalibrationConfig(tokens=tokens(), batch_size=4)
    config = PruningConfig(allocation="search", layout="per_layer", round_to=1, calibration=calibration)
    plan = StructuredPruner.from_pretrained(model, config).plan(0.05)
    kept = {group.layer: group.keep for group in plan.groups}
    assert kept[1] == min(kept.values()) and kept[1] < 48
    assert all(48 - kept.get(layer, 48) <= 1 for layer in (0, 2))
