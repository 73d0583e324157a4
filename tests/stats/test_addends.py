import families
import pytest
import torch
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from hf_structprune.config import PruningConfig
from hf_structprune.criteria import Scoring
from hf_structprune.criteria.widths import OBS
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit.closed_form import obs_scores
from hf_structprune.stats.addends import Addend, factors_of_sum
from hf_structprune.stats.stream import LayerStream
from hf_structprune.stats.survey import _score_inputs, statistics_of, survey


def norm(cls, width=24):
    torch.manual_seed(0)
    module = cls(width).requires_grad_(False)
    module.weight.copy_(torch.randn(width) - float(cls is Gemma3RMSNorm))
    module.weight[3] = -1.0 if cls is Gemma3RMSNorm else 0.0  # a channel that is switched off
    return module


@pytest.mark.parametrize("cls", [Gemma3RMSNorm, Olmo2RMSNorm])
def test_a_change_across_the_output_is_scaled_as_is_said(cls):
    module = norm(cls)
    addend, y = Addend(module, 0.5), torch.randn(5, 24) * torch.logspace(-2, 2, 5)[:, None]
    z, gain = addend(y), addend.gain()
    scale = addend.scale(y, z)
    torch.testing.assert_close(scale, 0.5 / y.square().mean(-1, keepdim=True).sqrt(), rtol=1e-2, atol=0)
    across = torch.randn(5, 24) * y.norm(dim=-1, keepdim=True) * 1e-3
    across -= (across * y).sum(-1, keepdim=True) / y.square().sum(-1, keepdim=True) * y
    torch.testing.assert_close(addend(y + across) - z, scale * gain * across, rtol=0.05, atol=1e-4)
    assert (gain[3].abs() < 0.01) and (gain != 0).all()


@pytest.mark.parametrize("cls", [Gemma3RMSNorm, Olmo2RMSNorm])
def test_a_correction_brings_nearer_and_small_weights_are_left_alone(cls):
    addend, y = Addend(norm(cls)), torch.randn(64, 24)
    z = addend(y)
    lacking = 0.2 * torch.randn(64, 24)
    change = addend.correction(lacking, addend.scale(y, z)) / addend.gain()
    better, whole = y + change, y + lacking / addend.scale(y, z) / addend.gain()
    wanted = z + lacking
    assert (addend(better) - wanted).norm() < 0.6 * lacking.norm()
    assert (addend(whole) - wanted).norm() > 2 * (addend(better) - wanted).norm()  # the norm takes it back
    assert torch.equal(addend.correction(lacking, torch.zeros(64, 1)), torch.zeros(64, 24))


def test_factors_of_sums():
    torch.manual_seed(0)
    first, one, two = torch.randn(3, 2, 7, 12)
    assert factors_of_sum(first + one + two, [first, one, two]) == [1.0, 1.0]
    assert factors_of_sum(first + 0.22 * one - 3 * two, [first, one, two]) == pytest.approx([0.22, -3], rel=1e-5)
    assert factors_of_sum(first + one * two, [first, one, two]) is None
    assert factors_of_sum(torch.randn(2, 7, 4, 12), [first, one]) is None and factors_of_sum(first, [first]) is None
    assert Addend().plain and Addend().gain() is None and not Addend(None, 0.5).plain


@pytest.mark.parametrize("name", ["Glm4", "Exaone4"])
def test_norms_behind_sublayers_are_found_in_other_families(name):
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{name}Config")(**sizes, num_key_value_heads=2, head_dim=8, pad_token_id=None)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    structure = ModelStructure.of(model)
    stream = LayerStream(model, structure, torch.randint(3, 60, (2, 8)), 2)
    readers = {group.reader.module for group in structure.layers[0].groups}
    before = stream.copy(stream.hidden)
    outputs = stream.carry(0, stream.hidden, outputs_of=readers)
    assert stream.sums and not stream.additive and all(stream.addend(reader).norm is not None for reader in readers)
    added = sum(stream.addend(reader)(outputs[reader][0]) for reader in readers)
    torch.testing.assert_close(before[0] + added, stream.hidden[0], rtol=1e-4, atol=1e-5)


def test_what_is_small_before_a_norm_counts_as_what_it_becomes():
    """The moments that units are ranked by: tokens weighted by what the norm makes of them, rows by its weights."""
    model = families.make_model("gemma3_text", torch.float32)
    structure = ModelStructure.of(model)
    layer = structure.layers[1]
    group = next(group for group in layer.groups if group.kind == "mlp_neurons")
    tokens = torch.randint(3, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    stream = LayerStream(model, structure, tokens, 4)
    stream.advance(0)
    name, criterion = group.reader.module, OBS(PruningConfig())
    statistics = statistics_of(stream, group, criterion, gram=True)
    inputs = torch.cat(stream.capture(1, name)).flatten(0, 1)
    weight, after = model.get_submodule(name).weight, model.model.layers[1].post_feedforward_layernorm
    y = inputs @ weight.T
    scales = 1 / (y.square().mean(-1) + after.eps)
    expected = (inputs * (scales / scales.view(4, 4, 8)[0].mean())[:, None]).T @ inputs / len(inputs)
    torch.testing.assert_close(statistics.gram, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(statistics.gain, 1 + after.weight.float())
    scoring = Scoring(group, model, statistics)
    torch.testing.assert_close(criterion.weight(scoring), weight * (1 + after.weight)[:, None])


@pytest.mark.parametrize("weighted", [True, False])
def test_units_of_all_layers_are_scored_with_the_tokens_weights_of_the_re_fit(weighted):
    model = families.make_model("llama", torch.float32)
    structure = ModelStructure.of(model)
    config = PruningConfig(criterion="obs", units="mlp_neurons", token_weighting=weighted)
    groups = [layer.group("mlp_neurons") for layer in structure.layers]
    tokens = torch.randint(3, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    found = _score_inputs(structure, OBS(config), LayerStream(model, structure, tokens, 4), groups, None)
    inputs, outputs = [], []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.no_grad():
        model(tokens)
    for group, x, output in zip(groups, inputs, outputs, strict=True):
        weights = 1 / output.norm(dim=-1)
        weights = (weights / weights[:4].mean()).flatten() if weighted else torch.ones(tokens.numel())
        x = x.flatten(0, 1)
        gram = (x * weights[:, None]).T @ x / len(x)
        expected = obs_scores(model.get_submodule(group.reader.module).weight.detach(), gram, group.reader.index)
        torch.testing.assert_close(found[group.key], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighted", [True, False])
def test_what_the_loss_rises_by_does_not_depend_on_the_size_that_a_norm_divides_by(weighted):
    """A map in front of a norm may be ten times as large: the model is the same, and so are the costs of its units."""
    options = dict(allocation="global", layout="per_layer", token_weighting=weighted)
    config = PruningConfig(criterion="kfac", units="mlp_neurons", **options)
    tokens = torch.randint(3, 60, (32, 8), generator=torch.Generator().manual_seed(0))
    model = families.make_model("gemma3_text", torch.float32)
    structure = ModelStructure.of(model)
    before = survey(model, structure, config, lambda: tokens).rises
    model.model.layers[1].mlp.down_proj.weight.data.mul_(10)
    after = survey(model, structure, config, lambda: tokens).rises
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0.02, atol=0)
