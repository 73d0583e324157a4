"""Terms on hidden states and attention outputs against hidden states that the models report themselves."""

import copy

import pytest
import torch
from tiny_distillation import make_llama, make_rows, make_trainer

from hf_structprune.errors import ConfigurationError
from hf_structprune.recovery.configuration import DistillationConfig
from hf_structprune.recovery.distillation.teacher import layer_terms, match_layers, record_outputs, relative_error


def brute_force(student, teacher, rows, pairs, kind):
    """Mean of the relative errors over layers and the positions that predict a token, row by row."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        states = []
        for model, side in ((student, 0), (teacher, 1)):
            outputs, handles = {}, []
            for pair in pairs:
                layer = model.model.layers[pair[side]]
                module = layer if kind == "hidden" else layer.self_attn

                def hook(module, args, output, pair=pair, outputs=outputs):
                    outputs[pair] = output[0] if isinstance(output, tuple) else output

                handles.append(module.register_forward_hook(hook))
            model(ids)
            [handle.remove() for handle in handles]
            states.append([outputs[pair][0, :-1] for pair in pairs])
        for mine, theirs in zip(*states, strict=True):
            total = total + ((mine - theirs.detach()).norm(dim=-1) / theirs.detach().norm(dim=-1)).square().sum()
        count += ids.shape[1] - 1
    return total / len(pairs) / count


def test_relative_error():
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert relative_error(student, teacher).tolist() == [13 / 4, 0.0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["hidden", "attention"])
def test_gradients_are_those_of_plain_autograd(tmp_path, tiny_tokenizer, kind, checkpointing):
    student, teacher = make_llama(24, 0), make_llama(48, 1)
    base, only = copy.deepcopy(student), copy.deepcopy(student)
    expected = brute_force(only, teacher, make_rows(), [(0, 0), (1, 1)], kind)
    (0.7 * expected).backward()

    def gradients(model, config):
        trainer = make_trainer(
            tmp_path, tiny_tokenizer, model, teacher, config=config, gradient_checkpointing=checkpointing
        )
        trainer.model.train()
        trainer.compute_loss(trainer.model, trainer.data_collator(list(make_rows()))).backward()
        trainer.log({})
        log = trainer.state.log_history[-1]
        return {name: p.grad for name, p in model.named_parameters()}, log

    with_term, log = gradients(student, DistillationConfig(**{f"{kind}_weight": 0.7}))
    without, _ = gradients(base, DistillationConfig())
    for name, parameter in only.named_parameters():
        mine = with_term[name] - without[name]
        other = torch.zeros_like(mine) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(mine, other, atol=5e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert log[f"distillation/{kind}"] == pytest.approx(expected.item(), rel=1e-5)


def test_layers_that_were_dropped():
    assert match_layers(3, 3, None) == ((0, 0), (1, 1), (2, 2))
    assert match_layers(2, 3, None) == ((1, 2),)
    assert match_layers(2, 3, [0, 2]) == ((0, 0), (1, 2))
    for wrong in ([0], [0, 3]):
        with pytest.raises(ConfigurationError, match="0 to 2 for each of the 2 layers"):
            match_layers(2, 3, wrong)


def test_a_layer_without_attention_is_left_out():
    student, teacher = make_llama(24, 0), make_llama(48, 1)
    del student.model.layers[0].self_attn
    config = DistillationConfig(attention_weight=1.0)
    assert layer_terms(student, teacher, config).pairs == ((1, 1),)
    assert layer_terms(student, teacher, DistillationConfig()) is None


def test_widths_that_differ_are_refused():
    with pytest.raises(ConfigurationError, match="32 dimensions in the student and 64"):
        other = make_llama(48, 1)
        other.config.hidden_size = 64
        layer_terms(make_llama(24, 0), other, DistillationConfig(hidden_weight=1.0))


def test_hooks_go_away_after_an_error():
    model = make_llama(24, 0)
    with pytest.raises(ValueError, match="here"), record_outputs({"a": model.model.layers[0]}):
        raise ValueError("here")
    assert not model.model.layers[0]._forward_hooks


def test_what_would_give_no_gradient_is_refused(tmp_path, tiny_tokenizer):
    with pytest.raises(ConfigurationError, match="use_reentrant"):
        make_trainer(
            tmp_path, tiny_tokenizer, make_llama(24, 0), make_llama(48, 1),
            config=DistillationConfig(hidden_weight=1.0), gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )  # fmt: skip
