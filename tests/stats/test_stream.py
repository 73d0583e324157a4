"""Hidden states carried layer by layer are those of a full forward pass."""

import copy

import families
import pytest
import torch

from hf_structprune.model.structure import ModelStructure, matrix
from hf_structprune.stats.stream import LayerStream


TOKENS = families.make_tokens(5, 12)  # batches of 2, 2 and 1


def open_stream(model, structure):
    return LayerStream(model, structure, TOKENS, batch_size=2)


def consumers(layer):
    return list(dict.fromkeys((group.reader.module, group.parent) for group in layer.groups if group.reader))


@torch.no_grad()
def full_forward(model, structure, batch):
    """Inputs of all consumers and outputs of all layers in one plain forward pass."""
    inputs, outputs, handles = {}, [], []
    for layer in structure.layers:
        for name, _ in consumers(layer):
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, name=name: inputs.update({name: args[0].reshape(*batch.shape, -1)})
                )
            )
        handles.append(
            model.get_submodule(layer.name).register_forward_hook(
                lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
            )
        )
    logits = model(batch, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return inputs, outputs, logits


@pytest.mark.parametrize("name", families.FAMILIES)
def test_captured_inputs_and_hidden_states_are_those_of_a_full_forward(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    expected = [full_forward(model, structure, batch) for batch in TOKENS.split(2)]
    stream = open_stream(model, structure)
    for layer in structure.layers:
        for consumer, _ in consumers(layer):
            captured = stream.capture(layer.index, consumer)
            assert len(captured) == 3
            for got, (inputs, _, _) in zip(captured, expected, strict=True):
                assert torch.equal(got, inputs[consumer])
        stream.advance(layer.index)
        for got, (_, outputs, _) in zip(stream.hidden, expected, strict=True):
            assert torch.equal(got, outputs[layer.index])


def change(module):
    """Sets every other column of a consumer to 0 and halves the rest."""
    with torch.no_grad():
        weight = matrix(module)
        weight[:, ::2] = 0
        weight *= 0.5


def outputs_of(module, inputs):
    return [torch.nn.functional.linear(x, matrix(module), module.bias) for x in inputs]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_hidden_states_are_those_of_the_changed_model_and_others_stay_those_of_the_original(name):
    model = families.make_model(name, torch.float64)
    structure = ModelStructure.of(model)
    original = copy.deepcopy(model)
    stream = open_stream(model, structure)
    states = stream.copy(stream.hidden)
    for layer in structure.layers:
        dense = stream.carry(layer.index, states, outputs_of=[consumer for consumer, _ in consumers(layer)])
        assert {len(outputs) for outputs in dense.values()} <= {3}
        for consumer, parent in consumers(layer):
            inputs = stream.capture(layer.index, consumer)
            module = model.get_submodule(consumer)
            change(module)
            stream.replace(parent, outputs_of(module, inputs))
        stream.advance(layer.index)
    for got, dense, batch in zip(stream.hidden, states, TOKENS.split(2), strict=True):
        torch.testing.assert_close(got, full_forward(model, structure, batch)[1][-1], rtol=1e-9, atol=1e-9)
        assert torch.equal(dense, full_forward(original, structure, batch)[1][-1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "mixtral", "gpt_neox"])
def test_replaced_modules_are_not_run_again(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    stream = open_stream(model, structure)
    consumer, parent = consumers(structure.layers[0])[0]
    inputs = stream.capture(0, consumer)
    stream.replace(parent, outputs_of(model.get_submodule(consumer), inputs))
    runs = []
    handle = model.get_submodule(consumer).register_forward_hook(lambda *_: runs.append(1))
    stream.advance(0)
    assert runs == []
    stream.advance(1)  # the same layer's module runs normally afterwards
    families.logits(model, TOKENS)
    assert runs == [1]
    handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "gemma2", "mixtral"])
def test_finishing_gives_the_logits_of_the_changed_model(name):
    model = families.make_model(name, torch.float64)
    structure = ModelStructure.of(model)
    stream = open_stream(model, structure)
    consumer, parent = consumers(structure.layers[0])[0]
    inputs = stream.capture(0, consumer)
    change(model.get_submodule(consumer))
    stream.replace(parent, outputs_of(model.get_submodule(consumer), inputs))
    stream.advance(0)
    for number, batch in enumerate(TOKENS.split(2)):
        logits = full_forward(model, structure, batch)[2]
        torch.testing.assert_close(stream.finish(1, number), logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(stream.finish(1, number, every=4), logits[:, ::4], rtol=1e-9, atol=1e-9)


ADDITIVE = dict.fromkeys(families.FAMILIES, True) | dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "granite"), False)


@pytest.mark.parametrize("name", [n for n in families.FAMILIES if n not in ("mixtral", "qwen3_moe")])
def test_layers_that_scale_or_norm_what_they_add_are_told_from_those_that_simply_add(name):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    stream = open_stream(model, structure)
    assert stream.additive == ADDITIVE[name] and stream.sums
    consumers_of = [consumer for consumer, _ in consumers(structure.layers[0])]
    before = stream.copy(stream.hidden)
    outputs = stream.carry(0, stream.hidden, outputs_of=consumers_of)
    for number, after in enumerate(stream.hidden):
        added = sum(stream.addend(consumer)(outputs[consumer][number]) for consumer in consumers_of)
        torch.testing.assert_close(before[number] + added, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_streaming_leaves_no_hook_and_no_changed_forward(name):
    model = families.make_model(name)
    before = families.logits(model, TOKENS)
    structure = ModelStructure.of(model)
    stream = open_stream(model, structure)
    stream.capture(0, structure.layers[0].groups[0].reader.module)
    stream.advance(0)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__
    assert torch.equal(families.logits(model, TOKENS), before)
