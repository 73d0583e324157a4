"""Models whose units depend on each other, whose layers differ, or that have several residual streams."""

import copy

import families
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, StructuredPruner
from hf_structprune.errors import UnsupportedModelError
from hf_structprune.hooks import as_output, hooked, others_of
from hf_structprune.proof.guarantee import logits


_BASE = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
_WIDE, _MIXED = dict(intermediate_size=48), dict(layer_types=["sliding_attention", "full_attention"] * 2)
CONFIGS = {
    "bitnet": lambda: transformers.BitNetConfig(**_BASE, **_WIDE),
    "gemma4_text": lambda: transformers.Gemma4TextConfig(
        **_BASE, **_WIDE, **_MIXED, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0
    ),
    "gemma3n_text": lambda: transformers.Gemma3nTextConfig(
        **_BASE, **_MIXED, intermediate_size=[48, 48, 32, 32], head_dim=8, num_kv_shared_layers=0,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, laurel_rank=4,
        activation_sparsity_pattern=[0.8, 0.8, 0.0, 0.0],
    ),
    "laguna": lambda: transformers.LagunaConfig(
        **_BASE, **_WIDE, **_MIXED, head_dim=8, num_attention_heads_per_layer=[4, 8, 4, 8], num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    ),
    "minimax": lambda: transformers.MiniMaxConfig(
        **_BASE, **_WIDE, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "jamba": lambda: transformers.JambaConfig(
        **_BASE, **_WIDE, num_experts=4, num_experts_per_tok=2, attn_layer_period=3, attn_layer_offset=1,
        mamba_d_state=4,
    ),
}  # fmt: skip


OPTIONS = dict(dtype=torch.float64, attn_implementation="eager", experts_implementation="eager")


def make_model(name):
    torch.manual_seed(0)
    return families.randomise(AutoModelForCausalLM.from_config(CONFIGS[name](), **OPTIONS)).eval()


def inputs_and_outputs(model, name, tokens):
    """What a linear map gets and gives for all tokens, shapes (tokens, in) and (tokens, out)."""
    seen = {}
    hook = model.get_submodule(name).register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out))
    with hooked([hook]):
        families.logits(model, tokens)
    return seen["x"].flatten(0, 1), seen["y"].flatten(0, 1)


@pytest.mark.parametrize("name", ["bitnet", "gemma3n_text"])
def test_what_reads_coupled_neurons_is_refitted_to_what_it_gets_without_the_others(name):
    dense, tokens, down = make_model(name), families.make_tokens(16, 12), "model.layers.0.mlp.down_proj"
    weight, (_, outputs) = dense.get_submodule(down).weight.detach().clone(), inputs_and_outputs(dense, down, tokens)
    pruner = StructuredPruner(dense, PruningConfig(
        keep={"mlp_neurons": 24}, layers=[0], layout="per_layer", round_to=1, damping=0.1, error_correction=0.0,
        token_weighting=False, calibration=families.CalibrationConfig(tokens=tokens, batch_size=8),
    ))  # fmt: skip
    small = pruner.prune()
    kept = torch.tensor(pruner.last_plan.groups[0].kept)
    inputs, got = inputs_and_outputs(small, down, tokens)
    lam = 0.1 * (inputs.square().sum(0) / len(inputs)).mean()
    rows = torch.cat([inputs / len(inputs) ** 0.5, lam.sqrt() * torch.eye(len(kept), dtype=torch.float64)])
    right = torch.cat([outputs / len(inputs) ** 0.5, lam.sqrt() * weight[:, kept].T])
    expected = torch.linalg.lstsq(rows, right).solution.T
    torch.testing.assert_close(small.get_submodule(down).weight, expected, rtol=1e-3, atol=1e-4)
    assert ((got - outputs).square().sum() / outputs.square().sum()) < 1
    assert torch.equal(
        families.greedy(small, tokens[:1, :8], True, 4), families.greedy(small, tokens[:1, :8], False, 4)
    )


@pytest.mark.parametrize(
    ("name", "keep", "heads"),
    [
        ("gemma4_text", {"kv_groups": 1, "mlp_neurons": 24, "layers": 3}, None),
        ("gemma3n_text", {"mlp_neurons": 24}, None),
        ("laguna", {"kv_groups": 1}, [2, 4, 2, 4]),
    ],
)
def test_layers_that_differ_stay_in_a_plain_checkpoint(name, keep, heads, tmp_path):
    dense = make_model(name)
    pruner = StructuredPruner(copy.deepcopy(dense), PruningConfig(
        keep=keep, round_to=1, calibration=families.calibration(8, batch_size=8)
    ))  # fmt: skip
    small = pruner.prune()
    pruner.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **OPTIONS)
    assert families.count(small) == pruner.last_plan.parameters_after < families.count(dense)
    assert type(loaded).__module__.startswith("transformers.models.")
    tokens = families.make_tokens(2, 12)
    torch.testing.assert_close(families.logits(loaded, tokens), families.logits(small, tokens), rtol=1e-9, atol=1e-9)
    assert torch.equal(families.greedy(loaded, tokens, True, 4), families.greedy(loaded, tokens, False, 4))
    assert heads is None or loaded.config.num_attention_heads_per_layer == heads


def test_heads_that_no_checkpoint_can_have_are_refused():
    values = {**_BASE, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.Gemma4TextConfig(
        **values, **_WIDE, **_MIXED, head_dim=8, global_head_dim=16, hidden_size_per_layer_input=0,
        attention_k_eq_v=True, num_global_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, **OPTIONS)
    with pytest.raises(
        UnsupportedModelError, match=r"heads are left alone: its layers can only have \[\(1, 1\), \(2, 1\)\]"
    ):
        StructuredPruner(model, PruningConfig(keep={"kv_groups": 2})).plan()


@pytest.mark.parametrize("name", ["minimax", "jamba"])
def test_layers_that_know_their_number_stay_what_they_are(name, tmp_path):
    dense, tokens = make_model(name), families.make_tokens(2, 12)
    small = families.cut(copy.deepcopy(dense), {}, {}, "uniform", {"layers": [0]})
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **OPTIONS)
    with hooked([dense.model.layers[0].register_forward_hook(pass_over, with_kwargs=True)]):
        expected = logits(dense, tokens)
    for model in (small, loaded):
        torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-7)


def pass_over(_, args, kwargs, output):
    return as_output(args[0] if args else kwargs["hidden_states"], others_of(output))
