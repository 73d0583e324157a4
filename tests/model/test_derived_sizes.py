"""Sizes that a class derives: of MLPs without a key or with a multiple of one, of scales from the depth."""

import copy

import pytest
import torch
from moe_families import make_moe
from transformers import AutoConfig, AutoModelForCausalLM
from untouched import untouched

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.errors import CheckpointError
from hf_structprune.model.describe import target_of
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_units
from hf_structprune.plan import PruningPlan


_SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
KEYLESS = {
    "bloom": dict(vocab_size=64, hidden_size=32, n_layer=3, n_head=4),
    "mpt": dict(vocab_size=64, d_model=32, n_heads=4, n_layers=3, expansion_ratio=2),
    "gpt_neox_japanese": dict(
        vocab_size=64, hidden_size=32, intermediate_multiple_size=2, num_hidden_layers=4, num_attention_heads=4
    ),
}
LAYERS = {
    "minicpm3": dict(
        _SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, scale_depth=1.4,
    ),
    "gpt_neo": dict(
        vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]],
        window_size=4,
    ),
    "recurrent_gemma": dict(_SIZES, lru_width=32, num_key_value_heads=1, attention_window_size=8),
    "nemotron_h": dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        layers_block_type=["mamba", "attention", "mlp", "mamba", "mlp"], mamba_num_heads=4, mamba_head_dim=16,
        n_groups=2, ssm_state_size=8, chunk_size=8, use_mamba_kernels=False,
    ),
}  # fmt: skip
TOKENS = torch.arange(4, 32).view(2, 14)


def build(family, values):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_IDS, **values)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def close(got, expected):
    return (got - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("family", KEYLESS)
def test_neurons_that_no_key_counts_go_in_the_per_layer_layout_and_again(family, tmp_path):
    model = build(family, KEYLESS[family])
    options = dict(units="mlp_neurons", criterion="l2", compensation=False, round_to=1, layout="per_layer")
    for step, share in enumerate((0.5, 0.25)):
        config = PruningConfig(**options, mlp_ratio=share, allocation="global" if step else "uniform")
        dense, pruner = logits(model), StructuredPruner(copy.deepcopy(model), config)
        small = pruner.prune()
        pruner.save_pretrained(tmp_path / str(step))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(step), dtype=torch.float64)
        kept = {(group.layer, group.kind): torch.tensor(group.kept) for group in pruner.last_plan.groups}
        mask_units(model, ModelStructure.of(model), kept)
        expected = logits(model)
        assert not close(dense, expected)
        assert close(logits(small), expected) and torch.equal(logits(small), logits(loaded))
        model = loaded
    with untouched(model, "Use layout='per_layer'", CheckpointError):
        StructuredPruner(model, PruningConfig(**{**options, "layout": "uniform"}, mlp_ratio=0.5)).prune()


@pytest.mark.parametrize("family", ["recurrent_gemma", "gpt_neo"])
def test_a_key_may_be_twice_the_width(family):
    model = build(family, LAYERS[family])
    structure = ModelStructure.of(model)
    width = structure.layers[0].group("mlp_neurons").size
    counts = {(layer.index, "mlp_neurons"): width // 3 for layer in structure.layers}
    plan = PruningPlan.from_counts(structure, counts, model_type=family, layout="uniform")
    small = target_of(model, structure, plan).skeleton()
    assert {layer.group("mlp_neurons").size for layer in ModelStructure.of(small).layers} == {width // 3}


@pytest.mark.parametrize("family", LAYERS)
def test_layers_go_where_depth_is_in_a_scale_a_pattern_or_a_list_alone(family, tmp_path):
    model = build(family, LAYERS[family])
    number = len(ModelStructure.of(model).layers)
    for gone in range(number):
        pruner = StructuredPruner(
            copy.deepcopy(model), PruningConfig(units="layers", layers=[gone], compensation=False)
        )
        small = pruner.prune()
        masked = copy.deepcopy(model)
        layer = ModelStructure.of(masked).layers[gone].name
        masked.get_submodule(layer).register_forward_hook(_pass_over, with_kwargs=True)
        expected = logits(masked)
        assert not close(logits(model), expected) and close(logits(small), expected)
    pruner.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.num_hidden_layers == number - 1 and torch.equal(logits(loaded), logits(small))


def _pass_over(_, args, kwargs, output):
    states = args[0] if args else kwargs["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states


def test_heads_of_latents_that_differ_by_layer_are_refused():
    """Their projections are neither queries, keys and values nor all in one, whose widths modules could be told."""
    model = make_moe("deepseek_v2")
    structure = ModelStructure.of(model)
    plan = PruningPlan.from_counts(structure, {(1, "kv_groups"): 2}, model_type="deepseek_v2", layout="per_layer")
    with pytest.raises(CheckpointError, match="No DeepseekV2Config describes"):
        target_of(model, structure, plan)
