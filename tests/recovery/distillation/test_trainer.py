"""The trainer against a loss computed by hand, and what it must not touch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_distillation import LORA, assert_equal_states, make_llama, make_rows, make_trainer, peft, state, trl

from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery.configuration import DistillationConfig


def expected_loss(student, teacher, rows, config):
    """Row by row, without padding, with all logits."""
    kl, followed, label_loss, labelled = 0.0, 0, 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        mine = student(ids).logits[0, :-1]
        with torch.no_grad():
            theirs = teacher(ids).logits[0, :-1]
        here = torch.ones_like(labels, dtype=torch.bool) if config.on_prompts else labels != -100
        both = [F.log_softmax(x / config.temperature, -1) for x in (mine, theirs)]
        kl = kl + F.kl_div(*both, log_target=True, reduction="none").sum(-1)[here].sum()
        label_loss = label_loss + F.cross_entropy(mine, labels, ignore_index=-100, reduction="sum")
        followed, labelled = followed + int(here.sum()), labelled + int((labels != -100).sum())
    weight = config.label_weight
    loss = (1 - weight) * config.temperature**2 * kl / followed + weight * label_loss / labelled
    return loss, kl / followed, label_loss / labelled


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("on_prompts", [True, False])
@pytest.mark.parametrize(("temperature", "label_weight"), [(1.0, 0.0), (2.0, 0.3)])
def test_one_step_is_that_of_plain_autograd(tmp_path, tiny_tokenizer, tied, on_prompts, temperature, label_weight):
    config = DistillationConfig(temperature=temperature, label_weight=label_weight, on_prompts=on_prompts)
    student, teacher = make_llama(24, 0, tied), make_llama(48, 1, tied)
    twin = copy.deepcopy(student)
    loss, kl, label_loss = expected_loss(twin, teacher, make_rows(), config)
    loss.backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()

    trainer = make_trainer(tmp_path, tiny_tokenizer, student, teacher, config=config)
    trainer.train()

    assert_equal_states(state(trainer.model), state(twin), 2e-6)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert log["distillation/kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert log.get("distillation/label_loss", label_loss.item()) == pytest.approx(label_loss.item(), rel=1e-5)
    assert ("distillation/label_loss" in log) == (temperature == 1.0 or label_weight > 0)
    assert log["num_tokens"] == sum(len(row["input_ids"]) for row in make_rows())


@pytest.mark.parametrize("use_peft", [False, True])
def test_gradient_accumulation_is_exact(tmp_path, tiny_tokenizer, use_peft):
    results = []
    for batch_size in (4, 1):
        student = make_llama(24, 0)
        trainer = make_trainer(
            tmp_path, tiny_tokenizer, student, make_llama(48, 1), per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size, peft_config=peft.LoraConfig(**LORA) if use_peft else None,
        )  # fmt: skip
        before = state(trainer.model)
        trainer.train()
        after = state(trainer.model)
        assert any((before[name] != after[name]).any() for name in before)
        results.append((after, trainer.state.log_history[0]))
    assert_equal_states(results[0][0], results[1][0], 1e-6)
    for name in ("loss", "distillation/kl", "distillation/label_loss", "num_tokens"):
        assert results[0][1][name] == pytest.approx(results[1][1][name], rel=1e-5)


@pytest.mark.parametrize("use_peft", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, tiny_tokenizer, use_peft):
    results = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path, tiny_tokenizer, make_llama(24, 0), make_llama(48, 1), gradient_checkpointing=checkpointing,
            peft_config=peft.LoraConfig(**LORA) if use_peft else None,
        )  # fmt: skip
        trainer.train()
        results.append(state(trainer.model))
    assert_equal_states(*results, 1e-7)


def test_the_teacher_is_left_alone(tmp_path, tiny_tokenizer):
    student, teacher = make_llama(24, 0), make_llama(48, 1)
    teacher.model.layers[0].train()  # a mode of its own, which stays
    modes = [module.training for module in teacher.modules()]
    before, owned = state(teacher), {id(p) for p in teacher.parameters()}
    trainer = make_trainer(
        tmp_path, tiny_tokenizer, student, teacher, save_strategy="steps", save_steps=1, max_steps=2
    )
    called = []
    teacher.model.register_forward_hook(lambda module, *_: called.append(module.training))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))

    assert called == [False, False]
    assert [module.training for module in teacher.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert_equal_states(before, state(teacher), 0.0)
    assert not owned & {id(p) for p in trainer.model.parameters()}
    assert not owned & {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    saved = load_file(tmp_path / "final" / "model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in student.parameters())


def test_evaluation_reports_the_loss_of_a_batch(tmp_path, tiny_tokenizer):
    student, teacher = make_llama(24, 0), make_llama(48, 1)
    config = DistillationConfig(label_weight=0.3)
    loss, kl, label_loss = expected_loss(student, teacher, make_rows(), config)
    trainer = make_trainer(tmp_path, tiny_tokenizer, student, teacher, config=config)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["eval_distillation/kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert metrics["eval_distillation/label_loss"] == pytest.approx(label_loss.item(), rel=1e-5)
    batch = trainer.data_collator(list(make_rows()))
    _, logits, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert logits.shape == (*batch["input_ids"].shape, 128) and torch.equal(labels, batch["labels"])


@pytest.mark.parametrize(
    "changes", [dict(final_logit_softcapping=1.0), dict(quirk=True)], ids=["capped", "unknown head"]
)
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_heads_that_do_more_are_followed_exactly(tmp_path, tiny_tokenizer, changes, who):
    def strange(model):
        plain = model.forward

        def forward(*args, **kwargs):
            output = plain(*args, **kwargs)
            output.logits = torch.tanh(output.logits) if "final_logit_softcapping" in changes else output.logits.sin()
            return output

        for name in changes:
            setattr(model.config, name, changes[name])
        model.forward = forward
        return model

    student, teacher = make_llama(24, 0), make_llama(48, 1)
    twin = copy.deepcopy(student)
    if who != "teacher":
        student, twin = strange(student), strange(twin)
    if who != "student":
        teacher = strange(teacher)
    config = DistillationConfig(label_weight=0.3)
    expected_loss(twin, teacher, make_rows(), config)[0].backward()
    trainer = make_trainer(tmp_path, tiny_tokenizer, student, teacher, config=config)
    batch = trainer.data_collator(list(make_rows()))
    trainer.compute_loss(trainer.model, batch).backward()
    for (name, mine), (_, theirs) in zip(student.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_head_that_only_the_model_knows_is_named(caplog, tmp_path, tiny_tokenizer):
    from hf_structprune.recovery.distillation.teacher import find_transform

    model = make_llama(24, 0)
    plain = model.forward
    assert find_transform(model).scale == 1.0

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits / 3.0
        return output

    model.forward = forward
    assert find_transform(model) is None
    model.config.logits_scaling = 3.0
    assert find_transform(model).scale == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(loss_type="dft"), "loss_type"),
        (dict(label_smoothing_factor=0.1), "label_smoothing"),
        (dict(peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "prompt"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_does_not_go_together_is_refused(tmp_path, tiny_tokenizer, options, named):
    with pytest.raises(ConfigurationError, match=named):
        make_trainer(tmp_path, tiny_tokenizer, make_llama(24, 0), make_llama(48, 1), **options)


def test_padding_free_batches_predict_the_same(tmp_path, tiny_tokenizer):
    """Examples side by side in one row: no prediction crosses from one into the next."""
    from hf_structprune.recovery.distillation.losses import batch_targets

    collator = trl.trainer.sft_trainer.DataCollatorForLanguageModeling
    rows = list(make_rows())
    padded = collator(pad_token_id=0)(rows)
    flat = collator(pad_token_id=0, padding_free=True)(rows)
    for on_prompts in (True, False):
        a, b = batch_targets(padded, on_prompts), batch_targets(flat, on_prompts)
        assert a.followed.sum() == b.followed.sum()
        assert torch.equal(a.labels[a.followed], b.labels[b.followed])
        assert torch.equal(padded["input_ids"][a.followed], flat["input_ids"][b.followed])
