"""The re-fit of hidden channels: exact where the lost channels can be told from the others, closed forms elsewhere."""

import dataclasses

import families
import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.errors import ConfigurationError
from hf_structprune.model.hidden_size import hidden_group
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit.channels import cut_hidden, norm_factors


HALF = families.HIDDEN // 2
KEPT = torch.arange(HALF)
TOKENS = families.make_tokens(24, 16)
CALIBRATION = families.calibration(24, 16)


def config(**options):
    return PruningConfig(hidden_size=HALF, calibration=CALIBRATION, **options)


def cut(model, config, kept=KEPT):
    return cut_hidden(model, ModelStructure.of(model), len(kept), config, TOKENS, kept)[0]


@torch.no_grad()
def with_doubled_channels(name, dtype=torch.float64, **changes):
    """A model whose second half of channels always repeats the first: what is lost can be told from what stays."""
    model = families.make_model(name, dtype, **changes)
    group = hidden_group(model, ModelStructure.of(model))
    for parameter_name, dim in group.dims().items():
        parameter = model.get_parameter(parameter_name)
        writes = any(word in parameter_name for word in ("embed", "o_proj", "down_proj", "c_proj"))
        if writes and "lm_head" not in parameter_name:
            channels = parameter.movedim(dim, 0)
            channels[HALF:] = channels[:HALF]
    return model


def divergence(model, other):
    a, b = (families.logits(one, TOKENS).double().log_softmax(-1) for one in (model, other))
    return float((a.exp() * (a - b)).sum(-1).mean())


# Not the tied Starcoder 2: its final norm has a bias, which would need factors of its own.
@pytest.mark.parametrize(
    "name, tied",
    [
        *(("llama", True), ("llama", False), ("qwen3", False), ("granite", True), ("phi3", False)),
        *(("cohere2", True), ("starcoder2", False)),
    ],
)
def test_channels_that_repeat_others_are_cut_without_loss(name, tied):
    changes = {} if name in ("cohere2", "starcoder2") else {"rms_norm_eps": 1e-12}
    model = with_doubled_channels(name, tie_word_embeddings=tied, **changes)
    plain = divergence(model, cut(model, config(compensation=False)))
    refitted = divergence(model, cut(model, config(damping=1e-7)))
    assert refitted < 1e-6 and refitted < 1e-3 * plain


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "mixtral", "phi3", "cohere2", "starcoder2", "granite"])
def test_the_refit_brings_every_family_closer_to_the_dense_model(name):
    model = families.make_model(name)
    mixture = name in ("mixtral", "qwen3_moe")  # whose experts want multiples of 8
    kept = torch.arange(8 if mixture else 4, families.HIDDEN)
    plain = divergence(model, cut(model, config(compensation=False), kept))
    assert divergence(model, cut(model, config(), kept)) < 0.9 * plain


@torch.no_grad()
def test_readers_are_a_ridge_regression_on_the_dense_outputs():
    model = families.make_model("llama", torch.float64)
    plain, small = cut(model, config(compensation=False)), cut(model, config(damping=0.1, error_correction=0.0))

    def inputs(one):
        seen = []
        handle = one.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        families.logits(one, TOKENS)
        handle.remove()
        return seen[0].flatten(0, 1)

    n, x = inputs(model), inputs(plain)
    dense, before = (one.model.layers[0].self_attn.k_proj.weight for one in (model, plain))
    gram = x.T @ x / len(x)
    lam = 0.1 * gram.diagonal().mean()
    change = (n @ dense.T - x @ before.T).T @ x / len(x)
    expected = before + change @ torch.linalg.inv(gram + lam * torch.eye(HALF, dtype=gram.dtype))
    torch.testing.assert_close(small.model.layers[0].self_attn.k_proj.weight, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_error_correction_the_writers_stay():
    model = families.make_model("llama")
    small, corrected = cut(model, config(error_correction=0.0)), cut(model, config(error_correction=0.5))
    for i, layer in enumerate(model.model.layers):
        expected = layer.mlp.down_proj.weight[KEPT]
        assert torch.equal(small.model.layers[i].mlp.down_proj.weight, expected)
        assert not torch.equal(corrected.model.layers[i].mlp.down_proj.weight, expected)


def test_factors_of_the_final_norm_are_a_least_squares_fit_of_centred_logits():
    generator = torch.Generator().manual_seed(0)
    head, n = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((40, 6), (200, 6)))
    kept = torch.tensor([0, 2, 3, 5])
    x = n[:, kept] * 1.5 + 0.3 * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    lacking = n.clone()
    lacking[:, kept] -= x
    centred = head - head.mean(0)
    # Rows: every logit of every token; columns: the channels.
    design = (x[:, None, :] * centred[None, :, kept]).flatten(0, 1)
    expected = torch.linalg.lstsq(design, (n @ centred.T).flatten()[:, None]).solution[:, 0]
    got = norm_factors(head, kept, x.T @ x / 200, lacking.T @ x / 200, 1e-12)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_tied_head_stays_tied_and_only_the_final_norm_changes():
    model = families.make_model("llama", tie_word_embeddings=True)
    small = cut(model, config())
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(small.lm_head.weight, model.lm_head.weight[:, KEPT])
    ratio = small.model.norm.weight / model.model.norm.weight[KEPT]
    assert ratio.std() > 1e-3


def test_the_same_seed_and_text_give_the_same_weights():
    model = families.make_model("mistral")
    first, second = (cut(model, config()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refitting_without_text_is_refused():
    model = families.make_model("llama")
    with pytest.raises(ConfigurationError, match="needs calibration tokens"):
        cut_hidden(model, ModelStructure.of(model), HALF, dataclasses.replace(config()), None, KEPT)
