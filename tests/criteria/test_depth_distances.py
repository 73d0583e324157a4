"""Distances between positions of the residual stream, against plain forward passes with hooks."""

import csv
import math

import families
import pytest
import torch

from hf_structprune.criteria.depth import LayerSimilarities, layer_similarities
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.model.structure import ModelStructure


TOKENS = families.make_tokens(5, 12)


def cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def angle(a, b):
    return float(cosine(a[:, -1], b[:, -1]).clamp(-1, 1).arccos().mean()) / math.pi


def influence(a, b):
    return 1 - float(cosine(a, b).mean())


@torch.no_grad()
def positions(model, structure):
    """What enters layer 0 and what leaves every layer, in float64, and the model's own hidden states."""
    seen, handles = [], []
    for layer in structure.layers:
        module = model.get_submodule(layer.name)
        if not handles:
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                )
            )
        handles.append(
            module.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        )
    own = model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return [state.double() for state in seen], [state.double() for state in own]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral", "falcon", "opt"])
def test_distances_and_influences_are_those_of_plain_hidden_states(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    found = layer_similarities(model, structure, TOKENS, batch_size=2)
    states, own = positions(model, structure)
    assert found.num_layers == families.LAYERS and found.angular.shape == (4, 4)
    for i in range(4):
        for j in range(4):
            expected = 0.0 if i == j else angle(states[i], states[j])
            assert float(found.angular[i, j]) == pytest.approx(expected, abs=2e-6)
            if max(i, j) < families.LAYERS:  # the last of the model's own stands behind the final norm
                assert angle(own[i], own[j]) == pytest.approx(expected, abs=2e-6)
    for layer in range(families.LAYERS):
        assert found.distances[layer, "layers"] == pytest.approx(float(found.angular[layer, layer + 1]), abs=1e-9)
        expected = influence(states[layer], states[layer + 1])
        assert found.influences[layer, "layers"] == pytest.approx(expected, abs=2e-6)
    assert all(kind == "layers" for _, kind in found.distances)


# Where the attention's share of the residual stream can be read off, and what it is multiplied by.
ATTENTION_ENDS = {
    "llama": ("self_attn.o_proj", 1.0),
    "gemma2": ("post_attention_layernorm", 1.0),
    "olmo2": ("post_attention_layernorm", 1.0),
    "granite": ("self_attn.o_proj", 0.7),
    "gpt_neox": ("attention.dense", 1.0),
    "falcon": ("self_attention.dense", 1.0),
    "cohere2": ("self_attn.o_proj", 1.0),
    "opt": ("self_attn.out_proj", 1.0),
    "mixtral": ("self_attn.o_proj", 1.0),
    "gpt2": ("attn.c_proj", 1.0),
}


@pytest.mark.parametrize("name", ATTENTION_ENDS)
def test_sublayers_are_measured_between_the_stream_before_and_after_them(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    end, factor = ATTENTION_ENDS[name]
    added, handles = [], []
    for layer in structure.layers:
        module = model.get_submodule(f"{layer.name}.{end}")
        handles.append(module.register_forward_hook(lambda _, __, out: added.append(factor * out.double())))
    states, _ = positions(model, structure)
    for handle in handles:
        handle.remove()
    found = layer_similarities(model, structure, TOKENS, batch_size=2, sublayers=True)
    assert len(found.distances) == len(found.influences) == 3 * families.LAYERS
    for i in range(families.LAYERS):
        middle = states[i] + added[i]
        for kind, ends in {"attention": (states[i], middle), "mlp": (middle, states[i + 1])}.items():
            assert found.distances[i, kind] == pytest.approx(angle(*ends), abs=2e-6)
            assert found.influences[i, kind] == pytest.approx(influence(*ends), abs=2e-6)


def test_where_only_the_attention_is_understood_the_layer_without_it_is_compared():
    model = families.make_model("llama", torch.float64)
    structure = ModelStructure.of(model)
    for layer in structure.layers:
        layer.sublayers = [layer.sublayer("attention")]
    found = layer_similarities(model, structure, TOKENS, sublayers=True)
    states, _ = positions(model, structure)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
    without, _ = positions(model, structure)
    assert found.distances[2, "attention"] == pytest.approx(angle(without[3], states[3]), abs=1e-9)
    assert (2, "mlp") not in found.distances


def test_bfloat16_states_are_compared_in_higher_precision():
    model = families.make_model("llama", torch.bfloat16)
    structure = ModelStructure.of(model)
    found = layer_similarities(model, structure, TOKENS, batch_size=2)
    states, _ = positions(model, structure)
    for i in range(3):
        assert float(found.angular[i, i + 1]) == pytest.approx(angle(states[i], states[i + 1]), abs=1e-4)
        assert found.influences[i, "layers"] == pytest.approx(influence(states[i], states[i + 1]), abs=1e-4)


def test_layers_that_change_nothing_are_at_no_distance():
    """Cosines that round beyond 1 must not become NaN."""
    model = families.make_model("llama", torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    found = layer_similarities(model, ModelStructure.of(model), TOKENS, sublayers=True)
    assert float(found.angular.abs().max()) < 1e-6
    assert all(
        value == pytest.approx(0, abs=1e-6) for value in [*found.distances.values(), *found.influences.values()]
    )


def test_every_layer_runs_once_for_each_sequence_and_the_model_is_left_as_it_was():
    model = families.make_model("llama")
    structure = ModelStructure.of(model)
    before, runs = families.logits(model, TOKENS), []
    handle = model.model.layers[1].register_forward_hook(lambda _, args, __: runs.append(len(args[0])))
    found = layer_similarities(model, structure, TOKENS, batch_size=1)
    handle.remove()
    assert sum(runs) == len(TOKENS) + 1  # one sequence shows the arguments of the layers
    again = layer_similarities(model, structure, TOKENS, batch_size=1)
    assert torch.equal(found.angular, again.angular) and found.influences == again.influences
    assert torch.equal(families.logits(model, TOKENS), before)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


def example(layers=5):
    """Distances `|i - j| / 100`, but the block of layers 2 and 3 and that of layer 3 are nearer."""
    places = torch.arange(layers + 1, dtype=torch.float64)
    angular = (places[:, None] - places).abs() / 100
    for i, j, value in ((2, 4, 0.0125), (3, 4, 0.005)):
        angular[i, j] = angular[j, i] = value
    return LayerSimilarities(angular, {}, {})


def test_blocks_begin_behind_layer_0_and_end_at_the_last():
    assert example().blocks(3) == [(1, 4, 0.03), (2, 5, 0.03)]
    assert example().blocks(4) == [(1, 5, 0.04)] and example().blocks(5) == []
    assert example().best_block(2) == (2, 4, 0.0125)
    assert example().best_block(3) == (1, 4, 0.03)  # the lower of equal ones
    assert example().best_block(2, allowed=[0, 1, 2, 4]) == (1, 3, 0.02)


def test_a_block_that_does_not_fit_is_refused_with_the_longest_that_does():
    with pytest.raises(RatioError, match="5 neighbouring layers are to go, but at most 4 can"):
        example().best_block(5)
    with pytest.raises(RatioError, match="at most 2 can"):
        example().best_block(3, allowed=[0, 1, 2, 4])
    with pytest.raises(ConfigurationError, match="block size is 0"):
        example().blocks(0)


def test_csv_is_in_the_format_of_pruneme(tmp_path):
    path = tmp_path / "layer_distances.csv"
    example().to_csv(path, 2)
    assert path.read_bytes() == (b"block_start,block_end,average_distance\r\n1,3,0.02\r\n2,4,0.0125\r\n3,5,0.02\r\n")
    example().to_csv(path)
    with open(path, newline="") as file:
        rows = [
            (int(r["block_start"]), int(r["block_end"]), float(r["average_distance"])) for r in csv.DictReader(file)
        ]
    assert rows == [block for size in (1, 2, 3, 4) for block in example().blocks(size)]
    assert len(rows) == 4 + 3 + 2 + 1
