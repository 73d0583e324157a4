"""A split by measured cost: kinds that all layers share are priced beside others, and the cheapest is taken."""

import copy
import itertools
import math

import families
import pytest
import torch
from kinds_of_tokenizers import TEXTS, tokenizer_of

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.choosing_kinds import Curve
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.held_out import HeldOut
from hf_structprune.measured_split import divided
from hf_structprune.vocabulary.counting import Counted


KINDS = ("vocabulary", "mlp_neurons")


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A model that has learnt its text, a third of whose tokens the text does not have."""
    tokenizer = tokenizer_of("byte_level")
    path = tmp_path_factory.mktemp("text") / "my.txt"
    path.write_text("\n".join(TEXTS * 4), encoding="utf-8")
    ids = list(itertools.chain(*tokenizer(TEXTS, add_special_tokens=False)["input_ids"]))
    tokens = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    model = families.make_model("llama", vocab_size=1002, intermediate_size=96, tie_word_embeddings=True)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(40):
        some = tokens[step % 8 :: 8][:64]
        optimizer.zero_grad()
        model(some, labels=some, use_cache=False).loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), tokenizer, CalibrationConfig(tokens=tokens[:32], batch_size=8), str(path)


def _pruner(learnt, **options):
    model, tokenizer, calibration, text = learnt
    options = {"units": KINDS, "split": "measured", "calibration": calibration, "round_to": 1, **options}
    if "vocabulary" in options["units"]:
        options.setdefault("vocabulary_text", text)
    return StructuredPruner(copy.deepcopy(model), PruningConfig(**options), tokenizer)


def _loss(model):
    """In the place of `HeldOut.loss`: `x^2` of tokens and `3 x^2` of neurons, `x` being their part of all."""

    def loss(self, small, tokenizer):
        assert len(tokenizer) == small.config.vocab_size
        tokens = (1002 - small.config.vocab_size) * families.HIDDEN
        neurons = (96 - small.config.intermediate_size) * 3 * families.HIDDEN * len(small.model.layers)
        return (tokens**2 + 3 * neurons**2) / model.num_parameters() ** 2

    return loss


def test_a_division_is_the_cheapest_of_all():
    curves = {"a": Curve([(50, 0.01), (100, 0.2)]), "b": Curve([(50, 0.05), (100, 0.12)]), "c": Curve([(30, 0.004)])}

    def cost(parts):
        return sum(max(0.0, curve.at(part, 1.05)) for curve, part in zip(curves.values(), parts, strict=True))

    every = [(a, b, 40 - a - b) for a in range(41) for b in range(41 - a)]
    best = min(cost([part * 2.5 for part in parts]) for parts in every)
    found = divided(curves, 100)
    assert sum(found.values()) == pytest.approx(1) and list(found) == ["a", "b", "c"] and all(found.values())
    assert cost([part * 100 for part in found.values()]) == pytest.approx(best)
    assert divided({"a": curves["a"]}, 100) == {"a": 1} and divided({"c": curves["c"]}, 100) == {}


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_losses_of_the_same_text_by_two_tokenizers(kind):
    """What counts is what the text goes on with behind the first token of the dense tokenizer."""
    tokenizer, model = tokenizer_of(kind), families.make_model("llama", vocab_size=1100)
    text = HeldOut.of_sources([Counted("a", torch.zeros(1100).numpy(), TEXTS[:2])], tokenizer, 48)
    config = PruningConfig(units="vocabulary", calibration=CalibrationConfig(texts=TEXTS))
    pruner = StructuredPruner(model, config, tokenizer)
    numbers = []
    for one, spelled in ((model, tokenizer), (pruner.prune(0.2), pruner.tokenizer)):
        total, number = 0.0, 0
        for piece, after in text.pieces:
            found = spelled(piece, return_offsets_mapping=True)  # <s> ... </s>
            ids, ends = torch.tensor([found["input_ids"]]), [end for _, end in found["offset_mapping"]]
            losses = -one(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            counts = torch.tensor([end > after for end in ends[1:]])
            total, number = total + losses[counts].sum().item(), number + int(counts.sum())
        numbers.append(number)
        assert text.loss(one, spelled) == pytest.approx(total / numbers[0], rel=1e-5)
    assert numbers[1] > numbers[0] == text.tokens > 512


def test_the_division_that_costs_least_is_taken(learnt, monkeypatch):
    """Where costs are `x^2` of tokens and `3 x^2` of neurons, three quarters go by tokens."""
    model = learnt[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with monkeypatch.context() as patched:
        patched.setattr(HeldOut, "loss", _loss(model))
        pruner = _pruner(learnt)
        small = pruner.prune(0.25)
    plan = pruner.last_plan
    assert plan.ratio == pytest.approx(0.25, abs=0.01) and small.config.vocab_size == len(pruner.tokenizer)
    assert plan.removed["vocabulary"] == pytest.approx(3 * plan.removed["mlp_neurons"], rel=0.1)
    reason = next(line for line in plan.reasons if "split='measured'" in line)
    assert "+0.047 nats a token; instead of vocabulary 25.0%: +0.06" in reason
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_prices_are_measured(learnt):
    plan = _pruner(learnt).plan(0.25)
    reason = next(line for line in plan.reasons if "split='measured'" in line)
    alone = {kind: float(reason.partition(f"{kind} 25.0%: ")[2].split(" ")[0]) for kind in KINDS}
    assert set(plan.removed) == {min(alone, key=alone.get)} and max(alone.values()) > 0.5


def test_kinds_without_tokens_need_no_tokenizer(learnt):
    model, _, calibration, _ = learnt
    config = PruningConfig(("hidden", "mlp_neurons"), "wanda", split="measured", calibration=calibration)
    plan = StructuredPruner(model, config).plan(0.2)
    assert plan.ratio == pytest.approx(0.2, abs=0.03)
    with pytest.raises(RatioError, match="cannot be reached by mlp_neurons, kv_groups"):
        _pruner(learnt, units=("mlp_neurons", "kv_groups")).plan(0.9)


def test_what_cannot_be_measured_is_said():
    with pytest.raises(ConfigurationError, match="name the kinds"):
        PruningConfig(split="measured")
    with pytest.raises(ConfigurationError, match="held out of `vocabulary_text`"):
        PruningConfig(units=KINDS, split="measured")
    with pytest.raises(ConfigurationError, match="hold parts of the same matrices"):
        PruningConfig(units=("kv_groups", "query_heads"), split="measured")
    with pytest.raises(ConfigurationError, match="or 'measured'"):
        PruningConfig(units=KINDS, split="cheapest")
    assert math.isclose(sum(PruningConfig(split={"layers": 0.5, "mlp_neurons": 0.5}).parts.values()), 1)


def test_a_text_for_tokens_lets_auto_take_them(learnt, monkeypatch):
    """It is the split that is measured of the vocabulary and the kind that goes by default; by size, too."""
    model, tokenizer, calibration, text = learnt
    monkeypatch.setattr(HeldOut, "loss", _loss(model))

    def pruner(**options):
        config = PruningConfig(calibration=calibration, round_to=1, vocabulary_text=text, **options)
        return StructuredPruner(copy.deepcopy(model), config, tokenizer)

    auto = pruner()
    auto.prune(0.25)
    plan, other = auto.last_plan, _pruner(learnt).plan(0.25)
    assert plan.removed == other.removed and plan.removed["vocabulary"] > plan.removed["mlp_neurons"] > 0
    assert other.reasons[0] in plan.reasons and "split='measured' took" in other.reasons[0]
    assert len(auto.tokenizer) == auto.model.config.vocab_size
    by_size = pruner().plan(target_parameters=0.75 * model.num_parameters())
    assert by_size.removed["vocabulary"] and by_size.ratio == pytest.approx(0.25, abs=0.02)
    with pytest.raises(ConfigurationError, match="nothing can be measured, since each of `iterative_steps`"):
        pruner(iterative_steps=2).plan(0.25)
