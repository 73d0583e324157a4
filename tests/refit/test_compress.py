import copy

import families
import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner


def final_error(name, **options):
    """Squared distance of the pruned model's last hidden states from the dense model's, on the calibration text."""
    model = families.make_model(name, torch.float32)
    tokens = torch.randint(3, 60, (64, 16), generator=torch.Generator().manual_seed(1))
    calibration = CalibrationConfig(tokens=tokens, batch_size=16)
    pruner = StructuredPruner(copy.deepcopy(model), PruningConfig(calibration=calibration, round_to=1, **options))
    pruned = pruner.prune(0.15)
    with torch.no_grad():
        return float((pruned.base_model(tokens)[0] - model.base_model(tokens)[0]).square().mean())


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon", "gemma2", "gemma3_text", "olmo2", "granite"])
def test_correcting_the_error_of_earlier_cuts_brings_the_model_nearer_to_the_dense_one(name):
    own = final_error(name, error_correction=0.0)
    assert final_error(name, error_correction=1.0) < 0.95 * own
    assert own < final_error(name, compensation=False)


def test_correction_refits_the_attention_output_that_is_not_cut():
    model = families.make_model("llama", torch.float32)
    before = [layer.self_attn.o_proj.weight.clone() for layer in model.model.layers]
    tokens = torch.randint(3, 60, (32, 16), generator=torch.Generator().manual_seed(1))
    calibration = CalibrationConfig(tokens=tokens, batch_size=16)
    config = PruningConfig(calibration=calibration, reconstruct=False, round_to=1)
    pruned = StructuredPruner(model, config).prune(0.1)
    changed = [
        not torch.equal(layer.self_attn.o_proj.weight, w) for layer, w in zip(pruned.model.layers, before, strict=True)
    ]
    assert changed == [False, True, True]  # nothing was wrong yet at the first attention
