"""Calibration text that is divided among processes: the plan and the weights of one, the same on each."""

import copy

import families
import moe_families
import pytest
import torch
from processes import forked
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.errors import ConfigurationError
from hf_structprune.stats.moments import InputStatistics


# 13 sequences in 7 batches: 6 are read by the first of two processes, and 7, of which another one is held out, by the
# second.
TEXT = {"sequences": 13, "length": 12, "batch_size": 2}
CASES = {
    "heads and neurons": ("llama", 0.2, {"units": ("mlp_neurons", "kv_groups")}),
    "transposed, by size": ("gpt2", 0.1, {"criterion": "wanda"}),
    "layers": ("qwen2", None, {"layers": [1], "units": ("layers",)}),
    "experts, merged": ("qwen3_moe", None, {"keep": {"experts": 3}, "merge_experts": True}),
    "experts, one after the other": ("mixtral", None, {"keep": {"experts": 3}, "expert_criterion": "loss"}),
    "neurons of experts": ("qwen2_moe", None, {"keep": {"expert_neurons": 8}}),
}


def pruner_of(name, seed=0, **options):
    config = PruningConfig(round_to=1, calibration=families.calibration(**TEXT), **options)
    make = moe_families.make_moe if name in moe_families.CONFIGS else families.make_model
    return StructuredPruner(make(name, seed=seed), config, data_parallel=True)


def divided(folder):
    import torch.distributed

    for case, (name, ratio, options) in CASES.items():
        pruner = pruner_of(name, **options)
        pruner.prune(ratio)
        rank = torch.distributed.get_rank()
        assert torch.distributed.get_world_size() == 2
        pruner.last_plan.save(folder / f"{case} {rank}.json")
        pruner.save_pretrained(folder / case)
        assert (folder / case / "model.safetensors").exists()  # on the second one too, when it is back
        weights = {key: tensor.clone() for key, tensor in pruner.model.state_dict().items()}  # some are tied
        save_file(weights, folder / f"{case} {rank}")


def test_two_processes_come_to_what_one_comes_to(tmp_path):
    assert forked(divided, tmp_path, count=2) == [0, 0]
    for case, (name, ratio, options) in CASES.items():
        pruner = pruner_of(name, **options)
        expected = pruner.prune(ratio).state_dict()
        first, second = (load_file(tmp_path / f"{case} {rank}") for rank in range(2))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / case).state_dict()
        for rank in range(2):
            found, alone = (PruningPlan.load(tmp_path / f"{case} {rank}.json"), copy.copy(pruner.last_plan))
            assert (found.softened is None) == (alone.softened is None)
            if found.softened is not None:  # sums are made in another order
                assert found.softened == pytest.approx(alone.softened, rel=1e-3)
                found.softened = alone.softened = None
                found.reasons, alone.reasons = [], []
            assert found.to_dict() == alone.to_dict()
        assert first.keys() == second.keys() == expected.keys() == saved.keys()
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key]) and torch.equal(tensor, saved[key]), key
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-4)


def refused(folder):
    import torch.distributed

    for what, name, options in (
        ("'taylor'", "llama", {"criterion": "taylor"}),
        ("'exchange'", "llama", {"units": ("layers",)}),
        ("hidden size", "llama", {"units": ("hidden",)}),
    ):
        pruner = pruner_of(name, **options)
        before = {key: tensor.clone() for key, tensor in pruner.model.state_dict().items()}
        with pytest.raises(ConfigurationError, match=f"2 processes.*{what}"):
            pruner.prune(0.2)
        assert all(torch.equal(tensor, before[key]) for key, tensor in pruner.model.state_dict().items())
    pruner = pruner_of("llama")
    pruner.model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ConfigurationError, match="2 processes.*`device_map`.*start one process"):
        pruner.prune(0.2)
    rank = torch.distributed.get_rank()
    with pytest.raises(ConfigurationError, match="1 of 2 processes were given another"):
        pruner_of("llama", seed=rank).prune(0.2)
    with pytest.raises(ConfigurationError, match="1 of 2 processes were given another"):
        pruner_of("llama").prune(0.2 + rank / 100)
    pruner = pruner_of("llama")
    pruner.config.calibration.batch_size = 13
    with pytest.raises(ConfigurationError, match="lower `batch_size`"):
        pruner.prune(0.2)


def test_what_cannot_be_divided_is_refused_on_every_process(tmp_path):
    assert forked(refused, tmp_path, count=2) == [0, 0]


def test_a_streamed_model_is_pruned_by_one_process(tmp_path):
    with pytest.raises(ConfigurationError, match="`stream` and `data_parallel`"):
        StructuredPruner.from_pretrained(tmp_path, stream=True, data_parallel=True)


def test_parts_of_the_text_add_up():
    x, targets = torch.randn(13, 5, 6), torch.randn(13, 5, 3)
    whole, *parts = (InputStatistics(6, True, 3, first=first) for first in (0, 0, 6))
    whole.update(x, targets)
    for part, chosen in zip(parts, (slice(6), slice(6, None)), strict=True):
        part.update(x[chosen], targets[chosen])
    for name in ("fit", "held_out"):
        one, two = (getattr(part, name) for part in parts)
        both, expected = one + two, getattr(whole, name)
        assert both.tokens == expected.tokens
        torch.testing.assert_close(both.gram, expected.gram)
        torch.testing.assert_close(both.target, expected.target)
