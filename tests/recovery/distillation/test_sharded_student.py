"""A student whose weights FSDP2 has spread: one process with gloo is enough to have sharded parameters."""

import pytest
import torch
from tiny_distillation import LORA, make_llama, make_rows, peft, trl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_structprune.recovery.configuration import DistillationConfig
from hf_structprune.recovery.distillation.losses import batch_targets
from hf_structprune.recovery.distillation.teacher import find_transform, load_teacher
from hf_structprune.recovery.distillation.trainer import Request, add_distillation


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def gradients(model, teacher, wrap):
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    add_distillation(base, find_transform(base))
    model = wrap(model, base)
    batch = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0)(list(make_rows()))
    targets = batch_targets(batch, True)
    counts = targets.followed.sum(), (targets.labels != -100).sum()
    request = Request(teacher, targets, counts, 2.0, 0.3)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model(**inputs, use_cache=False, distillation=request)["loss"].backward()
    whole = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in whole}


@pytest.mark.parametrize("own_head", [False, True], ids=["head with the root", "head of its own"])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_the_whole_model(mesh, lora, own_head):
    def make():
        torch.manual_seed(0)
        model = make_llama(24, 0, tied=False)
        return peft.get_peft_model(model, peft.LoraConfig(**LORA)) if lora else model

    def shard(model, base):
        for module in [*base.model.layers, *([base.lm_head] if own_head else [])]:
            fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    config = DistillationConfig(hidden_weight=0.5)
    teacher = load_teacher(make_llama(48, 1), make(), config)
    expected = gradients(make(), teacher, lambda model, base: model)
    mine = gradients(make(), teacher, shard)
    assert mine.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
