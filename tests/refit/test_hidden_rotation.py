"""The stream in the basis of its principal components: the same logits before anything is cut."""

import families
import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig
from hf_structprune.errors import UnsupportedModelError
from hf_structprune.model.hidden_size import hidden_group
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit.channels import cut_hidden
from hf_structprune.refit.rotation import principal_components, rotated


TOKENS = families.make_tokens(24, 16)
PRE_NORM = ("llama_bias", "qwen3", "phi3", "granite", "qwen3_moe")


def config(**options):
    config = PruningConfig(units="hidden", calibration=families.calibration(24, 16), **options)
    config.hidden_criterion = "pca"
    return config


def group_of(model):
    return hidden_group(model, ModelStructure.of(model))


def in_float64(model):
    """Transformers computes these norms in float32, whose rounding depends on the basis."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = lambda x, m=module: (
                m.weight * x / (x.square().mean(-1, keepdim=True) + m.variance_epsilon).sqrt()
            )
    return model


@pytest.mark.parametrize("name", PRE_NORM)
def test_without_a_cut_the_logits_are_those_of_the_dense_model(name):
    model = families.make_model(name, torch.float64, tie_word_embeddings=False)
    group = group_of(model)
    rotation = principal_components(model, group, config(), TOKENS)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(group.size, dtype=torch.float64))
    turned = rotated(model, group, rotation)
    assert not torch.allclose(turned.get_input_embeddings().weight, model.get_input_embeddings().weight)
    expected = families.logits(in_float64(model), TOKENS)
    torch.testing.assert_close(families.logits(in_float64(turned), TOKENS), expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_channels_are_ordered_by_their_share_of_what_the_norms_receive():
    model = families.make_model("llama", tie_word_embeddings=False)
    group = group_of(model)
    turned = rotated(model, group, principal_components(model, group, config(), TOKENS))
    total = torch.zeros(group.size)

    def add(_, args):
        x = args[0] / args[0].square().mean(-1, keepdim=True).sqrt()
        total.add_(x.square().mean((0, 1)))

    for module in turned.modules():
        if "RMSNorm" in type(module).__name__:
            module.register_forward_pre_hook(add)
    families.logits(turned, TOKENS)
    assert (total.diff() <= 1e-4).all() and total[0] > 3 * total[-1]


@torch.no_grad()
def test_a_stream_in_fewer_dimensions_is_cut_without_loss(tmp_path):
    model = families.make_model("llama", torch.float64, tie_word_embeddings=False, rms_norm_eps=1e-12)
    group = group_of(model)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(group.size, 24, dtype=torch.float64, generator=generator)).Q
    # Everything that writes stays in 24 dimensions, none of them along a channel.
    for name, dim in group.dims().items():
        if any(word in name for word in ("embed", "o_proj", "down_proj")):
            parameter = model.get_parameter(name)
            parameter.copy_((parameter.movedim(dim, -1) @ basis @ basis.T).movedim(-1, dim))
    small, kept = cut_hidden(model, ModelStructure.of(model), 24, config(compensation=False), TOKENS)
    assert kept is None and small.config.hidden_size == 24
    torch.testing.assert_close(families.logits(small, TOKENS), families.logits(model, TOKENS), rtol=0, atol=1e-4)
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(families.logits(loaded, TOKENS), families.logits(small, TOKENS))


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("llama", {"tie_word_embeddings": True}, "LM head of its own.*untied, which adds.*2,048 parameters"),
        ("starcoder2", {"tie_word_embeddings": False}, "subtracts the mean"),
        ("gemma2", {"tie_word_embeddings": False}, "in front of linear maps"),
        ("olmo2", {"tie_word_embeddings": False}, "in front of linear maps"),
    ],
)
def test_where_a_rotation_is_not_exact_it_is_refused(name, changes, reason):
    model = families.make_model(name, **changes)
    with pytest.raises(UnsupportedModelError, match=reason):
        cut_hidden(model, ModelStructure.of(model), 24, config(), TOKENS)
