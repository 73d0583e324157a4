"""Pruning on an accelerator: nothing that was made on the CPU meets what is there, and the result is the CPU's."""

import families
import moe_families
import pytest
import torch
from other_device import DEVICE, OtherDevice, is_other

from hf_structprune import PruningConfig, StructuredPruner


CASES = {
    "default": ("llama", 0.1, {}),
    "taylor": ("llama", 0.1, {"criterion": "taylor"}),
    "hidden size": ("llama", None, {"hidden_size": 24}),
    "experts": ("qwen3_moe", None, {"keep": {"experts": 3}, "merge_experts": True}),
    "neurons of experts": ("qwen3_moe", None, {"keep": {"expert_neurons": 8}}),
    "matrices that are transposed": ("gpt2", 0.1, {}),
}


def pruned(model, ratio, options):
    config = PruningConfig(round_to=1, calibration=families.calibration(8, 12), **options)
    return StructuredPruner(model, config).prune(ratio)


@pytest.mark.parametrize("case", CASES)
def test_pruning_is_the_same_on_another_device(case):
    name, ratio, options = CASES[case]
    make = moe_families.make_moe if name in moe_families.CONFIGS else families.make_model
    expected = pruned(make(name), ratio, options).state_dict()
    with OtherDevice() as device:
        model = make(name).to("cuda")
        assert model.device == DEVICE
        model = pruned(model, ratio, options)
        model(families.make_tokens(2, 8).to("cuda"))
    assert all(map(is_other, (*model.parameters(), *model.buffers()))) and device.operations > 1000
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_bfloat16_is_multiplied_as_cuda_does():
    with OtherDevice():
        model = pruned(families.make_model("llama", dtype=torch.bfloat16).to("cuda"), 0.1, {})
        assert model(families.make_tokens(2, 8).to("cuda")).logits.isfinite().all()
    assert all(map(is_other, model.parameters()))


def test_the_second_device_refuses_what_cuda_refuses():
    with OtherDevice():
        there, here = torch.ones(3).to("cuda"), torch.ones(3)
        assert (there + 1).device == DEVICE and there.cpu().device.type == "cpu" and float(there.sum()) == 3
        assert torch.zeros(2, device=there.device).device == DEVICE and there[torch.tensor([1])].device == DEVICE
        for mix in (lambda: there + here, lambda: here[there.long()], lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="device|cpu"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
