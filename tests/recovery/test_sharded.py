"""Weights that are spread over processes (FSDP): one process with gloo is enough to have sharded parameters."""

import pytest
import torch
from training_setup import HELD_OUT, make_lora, make_tiny

from hf_structprune.recovery.weights import BestWeights, agreed, as_before_training, is_sharded


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    layers = (model.get_base_model() if hasattr(model, "peft_config") else model).model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("make", [make_lora, make_tiny])
def test_sharded_weights_are_measured_kept_and_put_back(group, tmp_path, make):
    plain = HELD_OUT.measure(make())
    model = shard(make())
    assert is_sharded(model) and not is_sharded(make())
    assert HELD_OUT.measure(model) == pytest.approx(plain, abs=1e-5)
    best = BestWeights(tmp_path)
    best.keep(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    assert abs(HELD_OUT.measure(model) - plain) > 1e-3
    if make is make_lora:
        with as_before_training(model):
            assert HELD_OUT.measure(model) == pytest.approx(plain, abs=1e-5)
    best.restore(model)
    assert HELD_OUT.measure(model) == pytest.approx(plain, abs=1e-5)


def test_one_value_for_all(group):
    assert agreed({"a": 1.5}) == {"a": 1.5}
