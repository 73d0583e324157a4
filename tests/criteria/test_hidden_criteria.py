"""Scores of hidden channels against a plain computation of the same formula."""

import families
import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.criteria.channels import channel_importance
from hf_structprune.errors import ConfigurationError
from hf_structprune.model.hidden_size import hidden_group
from hf_structprune.model.structure import ModelStructure


TOKENS = families.make_tokens(4, 12)


def scores(model, criterion, tokens=TOKENS, batch_size=4, **options):
    calibration = families.CalibrationConfig(tokens=TOKENS, batch_size=batch_size)
    config = PruningConfig(units="hidden", hidden_criterion=criterion, calibration=calibration, **options)
    return channel_importance(model, hidden_group(model, ModelStructure.of(model)), config, tokens)


def slices(model, values):
    """Sums over the channels of every tensor of the group; `values` by the name of the parameter."""
    for name, dim in hidden_group(model, ModelStructure.of(model)).dims().items():
        yield torch.stack([values[name].select(dim, i).double().sum() for i in range(families.HIDDEN)])


@pytest.mark.parametrize("name", ["llama", "llama_bias", "mixtral"])
def test_magnitude_sums_tensors_relative_to_their_mean_channel(name):
    model = families.make_model(name)
    squares = {n: p.detach().double().square() for n, p in model.named_parameters()}
    expected = sum(total / total.mean() for total in slices(model, squares))
    torch.testing.assert_close(scores(model, "magnitude", None), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "starcoder2"])
def test_taylor_is_weight_times_gradient_over_all_tensors(name, tied):
    model = families.make_model(name, tie_word_embeddings=tied)
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    products = {n: (p.grad * p).abs().detach() for n, p in model.named_parameters()}
    expected = sum(slices(model, products))
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(scores(model, "taylor"), expected, rtol=1e-3, atol=0)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    checkpointed = scores(model, "taylor", gradient_checkpointing=True)
    torch.testing.assert_close(checkpointed, expected, rtol=1e-3, atol=0)


def test_taylor_of_several_batches_is_their_mean():
    model = families.make_model("llama")
    apart = [scores(model, "taylor", part, 1) for part in TOKENS.split(1)]
    torch.testing.assert_close(scores(model, "taylor", batch_size=1), sum(apart) / len(apart), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "cohere2"])
def test_activation_is_the_l2_over_sequences_of_mean_norm_outputs(name):
    model = families.make_model(name)
    outputs, handles = {}, []
    for module_name, module in model.named_modules():
        if "Norm" in type(module).__name__ and module.weight.numel() == families.HIDDEN:
            handles.append(
                module.register_forward_hook(
                    lambda _, __, out, name=module_name: outputs.setdefault(name, []).append(out.detach().double())
                )
            )
    families.logits(model, TOKENS)
    for handle in handles:
        handle.remove()
    expected = sum(torch.cat(parts).abs().mean(1).square().sum(0).sqrt() for parts in outputs.values())
    for batch_size in (4, 3):
        torch.testing.assert_close(scores(model, "activation", batch_size=batch_size), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("criterion", ["taylor", "activation"])
def test_criteria_that_look_at_text_say_so_without_any(criterion):
    with pytest.raises(ConfigurationError, match=f"{criterion}.*calibration text"):
        scores(families.make_model("llama"), criterion, None)
