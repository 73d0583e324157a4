import copy

import families
import moe_families
import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.model.structure import ModelStructure
from hf_structprune.planner import Planner
from hf_structprune.prune import Execution
from hf_structprune.refit import layer_by_layer
from hf_structprune.refit.price import Prices, untouched


CASES = [
    ("llama", {"units": ("mlp_neurons",)}),
    ("qwen3", {"units": ("mlp_neurons", "kv_groups"), "keep": {"kv_groups": 1}}),
    ("gemma2", {"units": ("mlp_neurons", "kv_groups")}),
    ("gpt2", {"units": ("mlp_neurons", "layers"), "keep": {"layers": 2}, "depth_criterion": "block_influence"}),
    ("falcon", {"units": ("layers",), "depth_criterion": "block_influence"}),
    ("olmo2", {"units": ("mlp_neurons",), "layers": [0], "layout": "per_layer"}),
]
EXPERTS = [("mixtral", ("experts",), 3), ("qwen3_moe", ("expert_neurons",), 8), ("gpt_oss", ("experts",), 3)]


def state(model):
    """Every tensor of a model, and every number that a module keeps."""
    numbers = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, str))
    }
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, numbers


def check(model, options, ratio=None):
    tokens = torch.randint(3, 60, (16, 16), generator=torch.Generator().manual_seed(1))
    config = PruningConfig(round_to=1, calibration=CalibrationConfig(tokens=tokens, batch_size=4), **options)
    structure = ModelStructure.of(model)
    tensors, numbers = state(model)
    plan = Planner(model, structure, config, lambda: tokens[:11]).plan(ratio)
    price = Prices(model, structure, tokens, config.calibration).of(plan, config)

    after, numbers_after = state(model)
    assert numbers_after == numbers
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items()) and len(after) == len(tensors)

    twin, config.damping = copy.deepcopy(model), 0.1
    config.criterion = "wifv" if "mlp_neurons" in config.units or "experts" not in config.units else config.criterion
    run = Execution(twin, ModelStructure.of(twin), config, lambda: tokens[:11])
    run.carry_out(copy.deepcopy(plan))
    with torch.no_grad():
        dense, cut = (one(tokens).logits[:, ::4].log_softmax(-1) for one in (model, run.model))
    nats = (dense.exp() * (dense - cut)).sum(-1).mean(-1)
    weight = (1 + 11 / 16) / 2
    expected = weight * float(nats[11:].mean()) + (1 - weight) * float(nats[6:11].mean())
    assert expected > 1e-6
    assert price == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def as_it_was(monkeypatch):
    """The norm in front of the head stays as it is: prices leave it alone."""
    monkeypatch.setattr(layer_by_layer, "soften", lambda *_: None)


@pytest.mark.parametrize(("name", "options"), CASES, ids=[name for name, _ in CASES])
def test_the_price_of_a_plan_is_what_the_pruned_model_predicts_otherwise_and_the_model_stays(name, options, as_it_was):
    keep = options.get("keep", {})
    ratio = 0.4 if "layers" in options["units"] else 0.15
    check(families.make_model(name, torch.float32), options, ratio if set(options["units"]) - set(keep) else None)


@pytest.mark.parametrize(("name", "units", "keep"), EXPERTS, ids=[name for name, *_ in EXPERTS])
def test_experts_are_priced_with_their_refit(name, units, keep, as_it_was):
    check(moe_families.make_moe(name), {"units": units, "keep": {units[0]: keep}})


def test_what_happens_inside_is_undone_after_an_error():
    model = families.make_model("llama")
    layer = model.model.layers[0]
    tensors, numbers = state(model)
    with pytest.raises(ZeroDivisionError), untouched(layer):
        layer.mlp.down_proj.weight.data.zero_()
        layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
        layer.self_attn.head_dim = 5
        layer.new = 3
        raise ZeroDivisionError
    after, numbers_after = state(model)
    assert numbers_after == numbers and all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def test_weights_that_are_one_stay_one():
    model = StructuredPruner.from_pretrained(families.make_model("gpt2")).model
    block = model.transformer.h[0]
    block.mlp.c_fc.weight = block.mlp.c_proj.weight  # shapes do not matter here
    with untouched(block):
        assert block.mlp.c_fc.weight is block.mlp.c_proj.weight
