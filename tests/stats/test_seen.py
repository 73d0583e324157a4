"""Rows of text and images: a text decoder alone is calibrated on what it gets, and does, in the whole model."""

import pytest
import torch
from seeing_families import IMAGE, SEEING, build_seeing, with_picture

from hf_structprune.allocation.removal import Removal
from hf_structprune.config import PruningConfig
from hf_structprune.criteria.depth import layer_similarities
from hf_structprune.errors import CalibrationError, UnsupportedModelError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.towers import Towers
from hf_structprune.stats.gradients import taylor_salience
from hf_structprune.stats.losses import TextLoss
from hf_structprune.stats.moments import InputStatistics
from hf_structprune.stats.seen import see
from hf_structprune.stats.stream import LayerStream


SHOWN = [name for name, (*_, picture) in SEEING.items() if picture and name not in ("llama4", "blip-2", "glm4v")]


def longer(inputs, number):
    """The same picture with more text behind it."""
    ids = torch.cat([inputs["input_ids"], torch.arange(30, 30 + number)[None]], 1)
    others = {} if "mm_token_type_ids" not in inputs else {"mm_token_type_ids": (ids == IMAGE).int()}
    return {**inputs, "input_ids": ids, **others}


def opened(family):
    """The whole model, its decoder and structure, and rows: a picture, text, a picture with more text."""
    model = build_seeing(family)
    towers = Towers(model)
    decoder = towers.decoder()
    picture = with_picture(family)
    rows = [picture, {"input_ids": torch.arange(4, 30)[None]}, longer(picture, 5)]
    return model, decoder, ModelStructure.of(decoder, towers=towers), rows


@torch.no_grad()
@pytest.mark.parametrize("family", SHOWN)
def test_streamed_states_are_those_of_the_whole_model_with_a_picture(family):
    model, decoder, structure, rows = opened(family)
    consumers = [dict.fromkeys(g.reader.module for g in layer.groups if g.reader) for layer in structure.layers]
    got, entered = [], []
    for row in rows:
        got.append({})
        hooks = [
            model.get_submodule(structure.towers.place(name)).register_forward_pre_hook(
                lambda _, args, name=name, got=got[-1]: got.update({name: args[0].clone()})
            )
            for name in (name for layer in consumers for name in layer)
        ]
        entered.append(model(**row, use_cache=False, output_hidden_states=True))
        for hook in hooks:
            hook.remove()
    seen = see(model, decoder, structure, rows)
    stream = LayerStream(decoder, structure, seen, batch_size=8)
    for number, whole in enumerate(entered):
        logits = stream.finish(0, number)
        assert (logits - whole.logits).abs().max() < 1e-12 * whole.logits.abs().max()
    for layer, names in zip(structure.layers, consumers, strict=True):
        for name in names:
            inputs = stream.capture(layer.index, name)
            assert all(torch.equal(a, b[name]) for a, b in zip(inputs, got, strict=True))
            streamed, by_hand = (InputStatistics(inputs[0].shape[-1], gram=True) for _ in range(2))
            for captured, row in zip(inputs, got, strict=True):
                streamed.update(captured)
                by_hand.update(row[name])
            assert torch.equal(streamed.gram, by_hand.gram) and streamed.tokens == sum(
                r["input_ids"].numel() for r in rows
            )
        stream.advance(layer.index)
    assert [int(row.pictures.sum()) for row in seen.rows] == [SEEING[family][3], 0, SEEING[family][3]]
    assert seen.numel() == sum(row["input_ids"].numel() for row in rows)


def by_hand(model, row):
    """The mean loss of the text of a row, by the whole model."""
    labels = row["input_ids"][0, 1:].clone()
    labels[labels == IMAGE] = -100
    return torch.nn.functional.cross_entropy(model(**row, use_cache=False).logits[0, :-1], labels), labels


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "paligemma"])
def test_losses_are_those_of_the_text_that_follows_pictures(family):
    model, decoder, structure, rows = opened(family)
    text = TextLoss(decoder, structure, see(model, decoder, structure, rows))

    def expected(whole):
        losses = [(float(loss), int((labels >= 0).sum())) for loss, labels in (by_hand(whole, row) for row in rows)]
        return sum(loss * number for loss, number in losses) / sum(number for _, number in losses)

    removal = Removal(structure)
    losses, baseline = text.scan(removal, [(1, "layers")], "")
    assert baseline == pytest.approx(expected(model), rel=1e-5)
    layer = model.get_submodule(structure.towers.place(structure.layers[1].name))
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    assert losses[1, "layers"] == pytest.approx(expected(model), rel=1e-5)
    assert abs(losses[1, "layers"] - baseline) > 1e-4 * baseline


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("variant", ["first", "second"])
def test_gradients_are_those_of_the_whole_model(family, variant):
    model, decoder, structure, rows = opened(family)
    groups = [group for group in structure.groups if group.kind == "mlp_neurons"]
    config = PruningConfig(criterion="taylor", taylor=variant)
    found = taylor_salience(decoder, groups, see(model, decoder, structure, rows), config)
    weight = model.get_parameter(structure.towers.place(groups[0].reader.module) + ".weight")
    expected = torch.zeros(weight.shape[1], dtype=torch.float64)
    for row in rows:
        (gradient,) = torch.autograd.grad(by_hand(model, row)[0], weight)
        change = (weight * gradient).abs() if variant == "first" else (weight * gradient).square()
        expected += change.detach().sum(0) / len(rows)
    got = found[f"{groups[0].reader.module}.weight", 1].double()
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_distances_between_layers_count_every_position_once():
    model, decoder, structure, rows = opened("qwen3_vl")
    found = layer_similarities(decoder, structure, see(model, decoder, structure, rows), sublayers=True)
    cosines = []
    for row in rows:
        seen = []
        handle = model.model.language_model.layers[1].register_forward_hook(
            lambda _, args, out, seen=seen: seen.append((args[0], out))
        )
        with torch.no_grad():
            model(**row, use_cache=False)
        handle.remove()
        cosines.append(torch.cosine_similarity(*seen[0], dim=-1).flatten())
    assert found.influences[1, "layers"] == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-6)


def test_what_cannot_be_carried_is_refused(monkeypatch):
    model, decoder, structure, rows = opened("qwen3_vl")
    structure.towers.deep = False
    with pytest.raises(UnsupportedModelError, match="between the layers"):
        see(model, decoder, structure, rows)
    model, decoder, structure, rows = opened("llava")
    for ids, number in ((rows[0]["input_ids"], 0.0), (rows[1]["input_ids"], 1.0)):
        hidden = {"input_ids": ids, "pixel_values": torch.full((1, 1), number)}
        monkeypatch.setattr(model, "forward", lambda input_ids, use_cache, **_: model.model.language_model(input_ids))
        with pytest.raises(UnsupportedModelError, match="in another way than in the place of tokens"):
            see(model, decoder, structure, [hidden])
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="1 tokens long"):
        see(model, decoder, structure, [{"input_ids": torch.tensor([[5]])}])
    with pytest.raises(CalibrationError, match="takes 2 to 256"):
        see(model, decoder, structure, [{"input_ids": torch.full((1, 257), 5)}])
    model, decoder, structure, rows = opened("paligemma")
    monkeypatch.setattr("hf_structprune.stats.seen._sees_all", lambda layer: False)
    with pytest.raises(UnsupportedModelError, match="something else alone"):
        see(model, decoder, structure, rows)
