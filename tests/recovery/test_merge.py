"""`merge_adapter`: the merged model computes what the adapter model computes, and the adapter model is untouched."""

import copy

import pytest
import torch
from families import cut, kinds_of, logits, make_model, make_tokens, random_units
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hf_structprune  # noqa: F401, lets the auto class load per-layer checkpoints
from hf_structprune.errors import CheckpointError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.recovery.weights import merge_adapter


TOKENS = make_tokens(4, 16)
ALL = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}


def adapted(model, config=None, seed=1, **options):
    """A model with an adapter that changes what it computes."""
    model = get_peft_model(model, config or LoraConfig(task_type="CAUSAL_LM", **{**ALL, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.05 * noise.to(parameter.dtype)
    return model.eval()


def pruned(family="llama", layout="uniform", **changes):
    model = make_model(family, **changes)
    structure = ModelStructure.of(model)
    return cut(model, *random_units(structure, kinds_of(family), layout == "uniform"), layout)


def check(model, tmp_path, tolerance=1e-5):
    """Merges; checks class, logits, the file on disk, and that the adapter model is as it was."""
    before, tensors = logits(model, TOKENS), copy.deepcopy(model.state_dict())
    active = list(model.active_adapters) if hasattr(model, "active_adapters") else None
    merged = merge_adapter(model)
    assert type(merged) is type(model.get_base_model())
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_modules())
    assert not any("peft" in type(module).__module__ for module in merged.modules())
    assert (logits(merged, TOKENS) - before).abs().max() <= tolerance * before.abs().max()
    assert torch.equal(logits(model, TOKENS), before)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in tensors.items())
    assert active is None or list(model.active_adapters) == active
    theirs = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    assert not theirs & {p.untyped_storage().data_ptr() for p in merged.parameters()}
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(again).__name__ == type(merged).__name__
    assert torch.equal(logits(again, TOKENS), logits(merged, TOKENS))
    return merged, again


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_pruned_models(layout, tied, tmp_path):
    model = adapted(pruned("llama", layout, tie_word_embeddings=tied))
    merged, again = check(model, tmp_path)
    for one in (merged, again):
        assert (one.lm_head.weight is one.model.embed_tokens.weight) == tied == one.config.tie_word_embeddings
    assert type(merged).__name__.startswith("PerLayer") == (layout == "per_layer")
    assert all(parameter.requires_grad for parameter in merged.parameters()) and not merged.training


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral"])
def test_families(family, tmp_path):
    check(adapted(pruned(family, "per_layer")), tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
        {"bias": "all"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5}, {"rank_pattern": {"q_proj": 2}},
        {"lora_bias": True},
    ],
    ids=lambda options: "-".join(map(str, next(iter(options.items())))),
)  # fmt: skip
def test_kinds_of_adapters(options, tmp_path):
    check(adapted(pruned("llama_bias", "per_layer", tie_word_embeddings=True), **options), tmp_path)


def test_other_adapters_of_peft(tmp_path):
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    check(adapted(pruned(), config), tmp_path)


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"], "use_dora": True}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, True),
    ],
)
def test_adapters_on_tied_embeddings(options, stays, tmp_path):
    model = adapted(pruned("llama", "per_layer", tie_word_embeddings=True), **options)
    merged, again = check(model, tmp_path)
    for one in (merged, again):
        assert one.config.tie_word_embeddings is stays
        assert (one.lm_head.weight is one.model.embed_tokens.weight) is stays
    assert model.get_base_model().config.tie_word_embeddings is True


def test_adapters_on_experts(tmp_path):
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    check(adapted(make_model("mixtral"), config), tmp_path)


def test_the_dtype_of_merging():
    model = adapted(pruned(dtype=torch.bfloat16))
    merged = merge_adapter(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    wanted = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    weight = merged.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16 and (weight.float() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    exact = merge_adapter(model, dtype=torch.float32).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(exact, wanted)
    assert {p.dtype for p in merge_adapter(model, dtype=torch.float16).parameters()} == {torch.float16}


def test_a_second_adapter_is_not_merged_unless_active(tmp_path):
    model = adapted(pruned())
    model.add_adapter("other", LoraConfig(**ALL, init_lora_weights=False))
    check(model, tmp_path)
    model.base_model.set_adapter(["default", "other"])
    before = logits(model, TOKENS)
    assert (logits(merge_adapter(model), TOKENS) - before).abs().max() <= 1e-5 * before.abs().max()


def test_training_wrappers_and_the_forward_of_trl():
    from trl.trainer.utils import add_fused_lm_head

    base = pruned("llama", "per_layer")
    expected = type(base)
    add_fused_lm_head(base)
    model = adapted(base)
    before, forward = logits(model, TOKENS), base.forward
    merged = merge_adapter(model)
    assert type(merged) is expected and "forward" not in vars(merged)
    assert (logits(merged, TOKENS) - before).abs().max() <= 1e-5 * before.abs().max()
    assert base.forward is forward
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(merge_adapter(compiled), TOKENS), logits(merged, TOKENS))
    plain = pruned()
    assert merge_adapter(plain) is plain
    add_fused_lm_head(plain)
    result = merge_adapter(plain)
    assert "forward" not in vars(result) and result.lm_head.weight.data_ptr() == plain.lm_head.weight.data_ptr()
    assert torch.equal(logits(result, TOKENS), logits(plain, TOKENS))


def test_what_belongs_to_the_model_is_kept():
    base = pruned("llama", "per_layer")
    base.add_model_tags(["pruned"])
    base.config.hf_structprune = {"ratio": 0.25}
    base.generation_config.temperature = 0.5
    merged = merge_adapter(adapted(base))
    assert merged.model_tags == ["pruned"] and merged.config.hf_structprune == {"ratio": 0.25}
    assert merged.generation_config.temperature == 0.5 and merged.config.per_layer_config


def test_a_merged_model_can_be_adapted_and_merged_again(tmp_path):
    check(adapted(merge_adapter(adapted(pruned("llama", "per_layer"))), seed=2), tmp_path)


def test_what_cannot_be_merged_is_refused():
    prompt = get_peft_model(pruned(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(CheckpointError, match="PROMPT_TUNING adapter is learned input"):
        merge_adapter(prompt)
    broken = adapted(pruned())
    with torch.no_grad():
        broken.get_base_model().model.layers[1].mlp.up_proj.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="The adapter cannot be merged: NaN"):
        merge_adapter(broken)
    meta = adapted(pruned())
    meta.get_base_model().lm_head.to("meta")
    with pytest.raises(CheckpointError, match="offloaded"):
        merge_adapter(meta)
    with pytest.raises(CheckpointError, match="no model of Transformers"):
        merge_adapter(torch.nn.Linear(2, 2))
