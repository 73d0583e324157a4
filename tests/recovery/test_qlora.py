"""Quantised training: load, train, merge, save, reload."""

import json

import pytest
import torch
from families import cut, logits, make_model, make_tokens, random_units
from forced_hardware import FOUR_BIT_CPUS, force_four_bit_cpu
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_bnb_weight
from training_setup import quick_picture  # noqa: F401
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_structprune  # noqa: F401, lets the auto class load per-layer checkpoints
from hf_structprune import installed
from hf_structprune.errors import CheckpointError, StructPruneError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.recovery.recovering import load_quantised
from hf_structprune.recovery.weights import merge_adapter


TOKENS = make_tokens(4, 16)
# How near the merged model's logits are; 8 bits also round the activations, which the merged model does not.
NEAR = {4: 1e-4, 8: 0.1}


@pytest.fixture
def checkpoint(tmp_path, request):
    """A folder with a pruned model wide enough to be quantised in blocks; its widths are no multiples of 32."""
    layout = getattr(request, "param", "uniform")
    model = make_model("llama", hidden_size=64, intermediate_size=150, tie_word_embeddings=True)
    structure = ModelStructure.of(model)
    kinds = ("mlp_neurons",) if layout == "uniform" else ("mlp_neurons", "kv_groups")
    cut(model, *random_units(structure, kinds, layout == "uniform"), layout).save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def trained(model, steps=2, **options):
    """The model with an adapter, after a few steps of AdamW; losses go down."""
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options))
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return model.eval()


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(
    ("bits", "cpu", "checkpoint"),
    [*[(4, cpu, "per_layer") for cpu in FOUR_BIT_CPUS], (4, "plain", "uniform"), (8, "plain", "per_layer")],
    indirect=["checkpoint"],
)
def test_train_merge_save_reload(bits, cpu, checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    force_four_bit_cpu(monkeypatch, cpu)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = trained(load_quantised(checkpoint, bits=bits, dtype=torch.float32))
    assert getattr(model.get_base_model(), f"is_loaded_in_{bits}bit")
    before = logits(model, TOKENS)
    merged = merge_adapter(model)
    assert relative(logits(merged, TOKENS), before) < NEAR[bits]
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    stored = dequantize_bnb_weight(layer.base_layer.weight, layer.base_layer.state if bits == 8 else None)
    wanted = stored.float() + layer.get_delta_weight("default")
    assert torch.allclose(merged.model.layers[1].mlp.down_proj.weight, wanted, rtol=0, atol=1e-6)
    assert torch.equal(logits(model, TOKENS), before)
    assert type(merged) is type(dense) and {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not any("bitsandbytes" in type(module).__module__ for module in merged.modules())
    merged.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, TOKENS), logits(merged, TOKENS)) and torch.isfinite(logits(again, TOKENS)).all()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert [p.shape for p in again.parameters()] == [p.shape for p in dense.parameters()]


@pytest.mark.parametrize(
    ("bits", "options"),
    [(4, {"use_dora": True}), (8, {"init_lora_weights": "gaussian", "use_rslora": True})],
)
def test_kinds_of_adapters(bits, options, checkpoint):
    pytest.importorskip("bitsandbytes")
    model = trained(load_quantised(checkpoint, bits=bits, dtype=torch.float32), **options)
    before = logits(model, TOKENS)
    assert relative(logits(merge_adapter(model), TOKENS), before) < NEAR[bits]
    assert torch.equal(logits(model, TOKENS), before)


def test_the_weights_come_back_in_the_dtype_that_was_computed_in(checkpoint):
    pytest.importorskip("bitsandbytes")
    model = load_quantised(checkpoint, gradient_checkpointing=True)
    assert model.is_gradient_checkpointing and not any(p.requires_grad for p in model.parameters())
    merged = merge_adapter(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and merged.config.dtype == torch.bfloat16
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(merged.model.embed_tokens.weight, dense.model.embed_tokens.weight.bfloat16())
    kept = merged.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight
    assert 0.01 < relative(*kept) < 0.15


@pytest.mark.parametrize("double", [True, False])
def test_a_model_that_a_forward_pass_has_repacked(double, tmp_path):
    """As others load it: bitsandbytes repacks its weights in place on a CPU with bfloat16 instructions."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu as repack

    make_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    fresh = merge_adapter(model).model.layers[0].mlp.up_proj.weight
    stored = model.model.layers[0].mlp.up_proj.weight
    stored.data, stored.quant_state = repack(stored.data, stored.quant_state)
    packed = stored.data.clone()
    again = merge_adapter(model).model.layers[0].mlp.up_proj.weight
    assert relative(again, fresh) < 2**-8  # its scales were rounded to bfloat16
    assert stored.quant_state.packing_format_for_cpu and torch.equal(stored.data, packed)


@pytest.mark.parametrize("cpu", FOUR_BIT_CPUS)
def test_the_callback_keeps_a_base_that_others_have_loaded_as_it_is(cpu, tmp_path, monkeypatch):
    """The Trainer's own evaluations would repack it, and training would go on without its gradients."""
    pytest.importorskip("bitsandbytes")
    from training_setup import make_callback, make_trainer

    force_four_bit_cpu(monkeypatch, cpu)
    make_model("llama", hidden_size=64, intermediate_size=128, vocab_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)
    weights = [(p, p.detach().clone()) for p in base.parameters() if type(p).__name__ == "Params4bit"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    trainer = make_trainer(
        tmp_path / "out", make_callback(evaluations=1), model, max_steps=2, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    assert len(weights) == 21
    for now, before in weights:
        assert torch.equal(now, before) and not getattr(now.quant_state, "packing_format_for_cpu", False)


def test_errors(checkpoint, monkeypatch):
    config = checkpoint / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    monkeypatch.setattr(installed, "find_spec", lambda name: object())
    with pytest.raises(CheckpointError, match="quantised already"):
        load_quantised(checkpoint)
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(StructPruneError, match=r'pip install "hf-structprune\[qlora\]"'):
        load_quantised(checkpoint)
