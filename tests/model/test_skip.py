"""Skipped sublayers: what is written, what loads it, what generates with it, what can be done with it again."""

import json

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from hf_structprune.errors import CheckpointError, UnsupportedModelError
from hf_structprune.model.modeling_structprune import NoAttn, NoMlp
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_sublayers


TOKENS = families.make_tokens(2, 12)
SKIPS = {"attention": [0], "mlp": [1]}


def skip(name, dropped, dtype=torch.float32, **changes):
    return families.cut(families.make_model(name, dtype, **changes), {}, {}, "per_layer", dropped)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model whose layers lack sublayers; `test_checkpoint` shows what loads such ones."""
    folder = tmp_path_factory.mktemp("skipped")
    skip("llama", SKIPS).save_pretrained(folder)
    return folder


def test_the_checkpoint_names_what_is_skipped_and_holds_none_of_its_tensors(saved):
    values = json.loads((saved / "config.json").read_text())
    assert {key: entry.get("skip") for key, entry in values["per_layer_config"].items()} == {
        "0": ["attention"], "1": ["mlp"], "2": None,
    }  # fmt: skip
    assert values["skip_modules"] == {
        "attention": ["input_layernorm", "self_attn"], "mlp": ["post_attention_layernorm", "mlp"],
    }  # fmt: skip
    names = load_file(saved / "model.safetensors").keys()
    assert {name.split(".")[3] for name in names if "layers.0." in name} == {"post_attention_layernorm", "mlp"}
    assert {name.split(".")[3] for name in names if "layers.1." in name} == {"input_layernorm", "self_attn"}
    assert AutoConfig.from_pretrained(saved).per_layer_config[1].skip == ["mlp"]


def test_what_is_skipped_without_being_named_is_refused(saved):
    config = AutoConfig.from_pretrained(saved)
    config.skip_modules = {"mlp": ["mlp"]}
    with pytest.raises(ValueError, match="Layer 0 skips 'attention'.*skip_modules"):
        AutoModelForCausalLM.from_config(config)


def test_a_layer_that_should_be_skipped_but_is_whole_is_not_loaded_half(saved, tmp_path):
    values = json.loads((saved / "config.json").read_text())
    del values["per_layer_config"]["0"]["skip"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"layers\.0\.input_layernorm"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_sublayers_need_the_per_layer_layout():
    with pytest.raises(CheckpointError, match="lack a sublayer.*layout='per_layer'"):
        families.cut(families.make_model("llama"), {}, {}, "uniform", {"attention": [1]})


def generate(model, tokens=TOKENS[:1, :10], **options):
    options = {"attention_mask": torch.ones_like(tokens), **options}
    return model.generate(
        tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **options
    )  # fmt: skip


@pytest.mark.parametrize("dropped", [{"attention": [0]}, {"attention": [0, 1]}, {"attention": [1]}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_static_caches_count_what_is_skipped(name, dropped):
    model = skip(name, dropped, torch.float64)
    expected = generate(model, use_cache=False)
    for implementation in ("static", "dynamic"):
        assert torch.equal(generate(model, cache_implementation=implementation), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_padding_on_the_left_changes_nothing(name):
    model = skip(name, {"attention": [0]})  # eager attention of Gemma 2 turns padding into NaN in float64
    tokens = TOKENS.clone()
    mask = torch.ones_like(tokens)
    tokens[1, :4], mask[1, :4] = 0, 0
    both = generate(model, tokens, attention_mask=mask)
    assert torch.equal(both, generate(model, tokens, attention_mask=mask, use_cache=False))
    assert torch.equal(both[1, 4:], generate(model, tokens[1:, 4:])[0])


def test_beam_search_reorders_what_is_skipped():
    model = skip("llama", {"attention": [0], "mlp": [2]}, torch.float64)
    beams = [
        generate(model, TOKENS[:, :10], num_beams=5, num_return_sequences=5, use_cache=use) for use in (True, False)
    ]
    assert torch.equal(*beams)
    assert len({tuple(row) for row in beams[0].tolist()}) == 10


def test_prompt_lookup_takes_tokens_back_from_what_is_skipped():
    model = skip("llama", {"attention": [0]}, torch.float64)
    tokens = TOKENS[:1, :6].repeat(1, 3)
    assert torch.equal(generate(model, tokens, prompt_lookup_num_tokens=3), generate(model, tokens))


AGAIN = [
    ({"attention": [0]}, {"layers": [1]}),
    ({"attention": [0]}, {"mlp": [1]}),
    ({"attention": [1], "mlp": [2]}, {"attention": [2], "mlp": [0]}),
    ({"mlp": [0], "attention": [1]}, {"layers": [0]}),
    ({"layers": [1]}, {"attention": [0]}),
]


@pytest.mark.parametrize("first, second", AGAIN, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe", "falcon_7b"])
def test_what_was_cut_can_be_cut_again(name, first, second):
    model = families.cut(families.make_model(name, torch.float64), {}, {}, "per_layer", first)
    structure = ModelStructure.of(model)
    mask_sublayers(model, structure, second)
    expected = families.logits(model, TOKENS)
    again = families.cut(model, {}, {}, "per_layer", second)
    torch.testing.assert_close(families.logits(again, TOKENS), expected, rtol=0, atol=1e-10)
    prompt = TOKENS[:1, :10]
    assert torch.equal(families.greedy(again, prompt, True), families.greedy(again, prompt, False))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_widths_of_a_model_that_lacks_sublayers_can_be_cut(name):
    model = skip(name, SKIPS, torch.float64)
    structure = ModelStructure.of(model)
    assert structure.layers[0].attention is None and structure.layers[0].group("kv_groups") is None
    assert structure.layers[1].group("mlp_neurons") is None
    assert [sublayer.kind for sublayer in structure.layers[0].sublayers] == ["mlp"]
    kept, counts = families.random_units(structure, ("mlp_neurons", "kv_groups"), uniform=False)
    plan = families.plan_of(model, counts, "per_layer")
    small = families.cut(model, kept, counts, "per_layer")
    assert families.count(small) == plan.parameters_after < plan.parameters_before
    prompt = TOKENS[:1, :10]
    assert torch.equal(families.greedy(small, prompt, True), families.greedy(small, prompt, False))


def test_dropping_the_layers_that_lack_something_gives_a_plain_model(tmp_path):
    for name in ("llama", "mixtral", "qwen3_moe"):
        model = families.cut(skip(name, {"attention": [1]}), {}, {}, "per_layer", {"layers": [1]})
        assert type(model).__module__.startswith("transformers.models")
        assert "skip_modules" not in model.config.to_dict()
        model.save_pretrained(tmp_path / name)
        assert torch.equal(
            families.logits(AutoModelForCausalLM.from_pretrained(tmp_path / name), TOKENS),
            families.logits(model, TOKENS),
        )


def test_a_sublayer_cannot_go_twice():
    model = skip("llama", {"attention": [1]})
    with pytest.raises(UnsupportedModelError, match=r"layers\.1` has no attention"):
        mask_sublayers(model, ModelStructure.of(model), {"attention": [1]})


@pytest.mark.parametrize("dropped", [{"layers": [1]}, SKIPS], ids=str)
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_adapters_train_and_merge(name, dropped):
    layout = "uniform" if "layers" in dropped else "per_layer"
    model = families.cut(families.make_model(name), {}, {}, layout, dropped)
    before = families.logits(model, TOKENS)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = adapted(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
    expected = families.logits(adapted.eval(), TOKENS)
    merged = adapted.merge_and_unload()
    assert (expected - before).abs().max() > 1e-4
    torch.testing.assert_close(families.logits(merged, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = skip(name, SKIPS).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_the_modules_in_place_have_no_parameters():
    model = skip("llama", SKIPS)
    assert isinstance(model.model.layers[0].self_attn, NoAttn) and isinstance(model.model.layers[1].mlp, NoMlp)
    assert isinstance(model, LlamaForCausalLM)
    assert not list(model.model.layers[0].self_attn.parameters())
