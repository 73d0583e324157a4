"""Loading a teacher: which are refused, and what a lesson holds."""

import copy

import pytest
import torch
from families import FAMILIES, make_model, make_tokens
from forced_hardware import FOUR_BIT_CPUS, force_four_bit_cpu
from tiny_distillation import make_llama, make_trainer, peft, state

from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.recovery.configuration import DistillationConfig
from hf_structprune.recovery.distillation.teacher import ModelTeacher, load_teacher


def logits_of(predictions):
    return predictions.head.logits(predictions.hidden)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_lesson_holds_the_logits_of_the_model(name):
    model = make_model(name)
    tokens = make_tokens(2, 6)
    positions = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    teacher = ModelTeacher(model)
    predictions = teacher.lesson({"input_ids": tokens, "labels": tokens}, positions).predictions
    with torch.no_grad():
        expected = model(tokens).logits[positions]
    torch.testing.assert_close(logits_of(predictions), expected.float(), atol=1e-5, rtol=1e-5)
    assert predictions.head.weight is not None and not teacher.by_sequence


def test_autocast_and_gradients_stop_at_the_teacher():
    model = make_llama(48, 1)
    inputs, positions = {"input_ids": torch.tensor([[5, 6, 7]])}, torch.ones(1, 3, dtype=torch.bool)
    plain = ModelTeacher(model).lesson(inputs, positions).predictions
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same = ModelTeacher(model).lesson(inputs, positions).predictions
    assert torch.equal(plain.hidden, same.hidden) and not plain.hidden.requires_grad


def test_logits_of_a_head_that_is_not_known_are_those_of_the_model():
    model = make_llama(48, 1)
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits.sin()
        return output

    model.forward = forward
    teacher = ModelTeacher(model)
    positions = torch.tensor([[True, False, True]])
    predictions = teacher.lesson({"input_ids": torch.tensor([[5, 6, 7]])}, positions).predictions
    assert teacher.by_sequence and predictions.head.weight is None
    assert torch.equal(predictions.hidden, model(torch.tensor([[5, 6, 7]])).logits[positions])


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("fp32", torch.float32)])
def test_folders_are_loaded_in_the_dtype_asked_for(tmp_path, tiny_tokenizer, dtype, expected):
    make_llama(48, 1).bfloat16().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = DistillationConfig(teacher_dtype=dtype)
    teacher = load_teacher(tmp_path, make_llama(24, 0), config, tokenizer=tiny_tokenizer)
    assert teacher.model.dtype == expected and not teacher.model.training


def test_a_teacher_that_is_not_there_is_not_said_to_lack_a_tokenizer(tiny_llama, tiny_tokenizer):
    with pytest.raises(CheckpointError, match="The teacher cannot be used: cannot load 'some/model'"):
        load_teacher("some/model", tiny_llama, DistillationConfig(), tokenizer=tiny_tokenizer)


def test_other_vocabularies_are_refused(tmp_path, tiny_tokenizer, make_tokenizer):
    student, config = make_llama(24, 0), DistillationConfig()
    larger = make_llama(48, 1)
    larger.resize_token_embeddings(130)
    with pytest.raises(ConfigurationError, match="130 tokens and the student 128.*distill_cross_tokenizer"):
        load_teacher(larger, student, config)
    make_llama(48, 1).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="has no tokenizer"):
        load_teacher(tmp_path, student, config, tokenizer=tiny_tokenizer)
    tiny_tokenizer.save_pretrained(tmp_path)
    other = make_tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(ConfigurationError, match="'zebra' is unknown in .* in the student's.*distill_cross_tokenizer"):
        load_teacher(tmp_path, student, config, tokenizer=other)


def test_a_teacher_that_would_learn_is_refused():
    student = make_llama(24, 0)
    for same in (student, copy.copy(student)):
        with pytest.raises(ConfigurationError, match="shares weights"):
            load_teacher(same, student, DistillationConfig())
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ConfigurationError, match="shares weights"):
        load_teacher(student, adapted, DistillationConfig())


def test_a_model_in_another_dtype_is_refused():
    with pytest.raises(ConfigurationError, match="'bf16', but the model given is in torch.float32"):
        load_teacher(make_llama(48, 1), make_llama(24, 0), DistillationConfig(teacher_dtype="bf16"))


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    make_llama(48, 1).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="up_proj"):
        load_teacher(tmp_path, make_llama(24, 0), DistillationConfig())


def test_an_int8_teacher_is_near(tmp_path, tiny_tokenizer):
    pytest.importorskip("bitsandbytes")
    dense = make_llama(48, 1)
    dense.save_pretrained(tmp_path / "dense")
    student = make_llama(24, 0)
    teacher = load_teacher(tmp_path / "dense", student, DistillationConfig(teacher_dtype="int8"))
    assert teacher.model.is_loaded_in_8bit
    trainer = make_trainer(
        tmp_path / "out", tiny_tokenizer, student, teacher, config=DistillationConfig(teacher_dtype="int8")
    )
    mine = trainer.evaluate()["eval_loss"]
    full = make_trainer(tmp_path / "out", tiny_tokenizer, make_llama(24, 0), dense, config=DistillationConfig())
    assert mine == pytest.approx(full.evaluate()["eval_loss"], rel=0.1)


@pytest.mark.parametrize("cpu", FOUR_BIT_CPUS)
def test_a_quantised_base_learns_through_its_adapters(cpu, tmp_path, tiny_tokenizer, monkeypatch):
    """Also after an evaluation, in which bitsandbytes would repack the weights and lose their gradients."""
    pytest.importorskip("bitsandbytes")
    force_four_bit_cpu(monkeypatch, cpu)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_llama(64, 0).save_pretrained(tmp_path / "pruned")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"}, dtype=torch.float32,
    )  # fmt: skip
    student = peft.prepare_model_for_kbit_training(quantised, use_gradient_checkpointing=False)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(
        tmp_path / "out", tiny_tokenizer, student, make_llama(48, 1), peft_config=lora, max_steps=4,
        learning_rate=1e-2, optim="adamw_torch",
    )  # fmt: skip
    before = state(trainer.model)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all("lora_" in name for name in changed)
