"""`units="auto"`: what is free on a model goes first, and nothing that was measured is cheaper than what is taken."""

import copy
import json
import math
from types import SimpleNamespace

import families
import moe_families
import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.choosing_kinds import Candidate, Curve, KindChooser
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit import price
from hf_structprune.stats.gradients import try_gradients


def auto(model, **options):
    tokens = torch.randint(3, 60, (24, 16), generator=torch.Generator().manual_seed(1))
    calibration = CalibrationConfig(tokens=tokens, batch_size=8)
    options = {"units": "auto", "round_to": 1, "calibration": calibration, **options}
    return StructuredPruner(model, PruningConfig(**options))


def why(plan):
    return next(note for note in plan.reasons if note.startswith("units='auto'"))


def without_neurons(model):
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, 12:] *= 1e-4


def without_groups(model):
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, layer.self_attn.o_proj.in_features // 2 :] *= 1e-4


def without_layer(model):
    model.model.layers[1].mlp.down_proj.weight.data *= 1e-4
    model.model.layers[1].self_attn.o_proj.weight.data *= 1e-4


FREE = [(without_neurons, {"mlp_neurons"}), (without_groups, {"kv_groups"}), (without_layer, {"layers"})]


@pytest.mark.parametrize(("spare", "kinds"), FREE, ids=[f"{kinds}" for _, kinds in FREE])
def test_what_does_nothing_goes_first(spare, kinds):
    model = families.make_model("llama", torch.float32, num_hidden_layers=4)
    spare(model)
    total = families.count(model)
    layer = families.count(model.model.layers[1])
    groups = sum(families.count(layer.self_attn) for layer in model.model.layers) / 2
    amounts = {"mlp_neurons": 0.1, "kv_groups": groups / total + 0.01, "layers": layer / total + 0.01}
    pruner = auto(model)
    plan = pruner.plan(amounts[next(iter(kinds))], estimate=True)
    pruner.prune(amounts[next(iter(kinds))])
    removed = pruner.last_plan.removed
    assert sum(removed[kind] for kind in kinds) > 0.8 * sum(removed.values())
    assert plan.removed == removed and plan.predicted_nats < 0.05


@pytest.mark.parametrize("spare", [without_neurons, without_groups, without_layer])
def test_on_other_text_it_is_as_good_as_the_best_single_kind(spare):
    """What 20 % costs on text that nothing was measured on, by each kind alone and by `auto`."""
    dense = families.make_model("llama", torch.float32, num_hidden_layers=4)
    spare(dense)
    tokens = torch.randint(3, 60, (32, 16), generator=torch.Generator().manual_seed(2))
    expected, nats = families.logits(dense, tokens).log_softmax(-1), {}
    for units in ("auto", "mlp_neurons", "kv_groups", "layers"):
        criterion = {} if units in ("auto", "layers") else {"criterion": "kfac"}  # the same choice within each kind
        pruner = auto(copy.deepcopy(dense), units=units, **criterion)
        try:
            pruner.prune(0.2)
        except RatioError:
            continue
        if abs(pruner.last_plan.ratio - 0.2) < 0.05:
            got = families.logits(pruner.model, tokens).log_softmax(-1)
            nats[units] = float((expected.exp() * (expected - got)).sum(-1).mean())
    assert len(nats) > 1 and nats["auto"] <= 1.02 * min(nats.values()) + 1e-3


def test_what_is_taken_is_the_cheapest_of_all_that_was_measured_each_time():
    model = families.make_model("llama", torch.float32, num_hidden_layers=4)
    plans = [auto(model).plan(0.25, estimate=True) for _ in range(2)]
    assert plans[0] == plans[1] and why(plans[0]) == why(plans[1])
    nats = [float(part.split(" nats")[0]) for part in why(plans[0]).split("+")[1:]]
    assert len(nats) > 1 and nats[0] == round(plans[0].predicted_nats, 3)
    assert nats[0] == min(nats) or "the default" in why(plans[0])


def test_experts_that_no_token_is_sent_to_go():
    model = moe_families.make_moe("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[-1] = 0
        layer.mlp.gate.weight.data[:-1] = layer.mlp.gate.weight.data[:-1].abs() * 10
        layer.post_attention_layernorm.weight.data.abs_()
    pruner = auto(model)
    expert = sum(p[0].numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    plan = pruner.plan((expert + 100) / families.count(model), estimate=True)
    assert set(plan.removed) & {"experts", "expert_neurons"}


def test_the_saved_configuration_names_what_was_taken(tmp_path):
    pruner = auto(families.make_model("qwen3", torch.float32))
    pruner.prune(0.2)
    pruner.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "pruning_config.json").read_text())
    assert "auto" not in saved["units"] and pruner.config.units == ("auto",)
    again = StructuredPruner(families.make_model("qwen3", torch.float32), PruningConfig.load(tmp_path / "out"))
    again.config.calibration = pruner.config.calibration
    again.prune(0.2)
    for name, tensor in pruner.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def test_layers_are_ranked_once_and_those_that_were_priced_go(monkeypatch):
    model = families.make_model("llama", torch.float32, num_hidden_layers=4)
    without_layer(model)
    calls, able = [], price.layer_similarities
    monkeypatch.setattr(price, "layer_similarities", lambda *a, **k: calls.append(a) or able(*a, **k))
    pruner = auto(model)
    pruner.prune(families.count(model.model.layers[1]) / families.count(model) + 0.01)
    assert pruner.last_plan.dropped["layers"] == [1] == pruner.depth_choice.dropped["layers"] and len(calls) == 1


def test_what_is_taken_is_as_near_to_the_ratio_as_whole_units_allow():
    model = moe_families.make_moe("deepseek_v3")  # experts alone go by 13 %, some heads by 5 %
    plan = auto(model).plan(0.15, estimate=True)
    assert abs(plan.ratio - 0.15) < 0.03


def test_a_plan_that_is_given_needs_no_choice(tmp_path):
    plan = auto(families.make_model("llama", torch.float32)).plan(0.2, estimate=True)
    pruner = auto(families.make_model("llama", torch.float32))
    pruner.prune(plan)
    pruner.save_pretrained(tmp_path / "out")
    assert set(PruningConfig.load(tmp_path / "out").units) == set(plan.removed)
    assert pruner.last_plan.removed == plan.removed


def test_a_configuration_that_is_put_in_its_place_counts():
    pruner = auto(families.make_model("llama", torch.float32))
    pruner.plan(0.2)
    pruner.config = PruningConfig(units="kv_groups", criterion="l2", compensation=False)
    assert set(pruner.plan(0.1).removed) == {"kv_groups"}


def test_prices_differ_by_more_than_they_are_unsure_or_they_do_not():
    mine, others = torch.tensor([0.5, 0.7, 0.6, 0.8]), torch.tensor([0.4, 0.5, 0.5, 0.6])  # 0.1 0.2 0.1 0.2 apart
    gain, unsure = price.Price([mine], 0.66).over(price.Price([others], 0.5))
    assert gain == pytest.approx(0.16) and unsure == pytest.approx(2 * (0.01 / 3) ** 0.5 / 2)
    twice = price.Price([mine + 0.3, mine], 0.66), price.Price([others, others], 0.5)
    assert twice[0].over(twice[1])[1] == pytest.approx(0.3)  # what three times the text changed
    assert price.Price([mine[:1]], 0.6).over(price.Price([others[:1]], 0.5))[1] == math.inf


def test_a_second_look_says_what_all_text_would_give():
    model = families.make_model("llama", torch.float32)
    structure, tokens = ModelStructure.of(model), torch.randint(3, 60, (64, 8))
    prices = price.Prices(model, structure, tokens, CalibrationConfig(batch_size=8))
    looks = {16: 5.0, 48: 3.0}  # 2 + 48 / n
    prices._look = lambda plan, config, n: (torch.zeros(8), torch.full((8,), looks[n]))
    plan, config = StructuredPruner(model).plan(0.1), PruningConfig(units="mlp_neurons")
    assert prices.price(plan, config).nats == pytest.approx(5 * (1 + 16 / 64) / 2)
    assert prices.price(plan, config, 48).nats == pytest.approx(2 + 48 / 64)
    assert torch.equal(prices._first(48), torch.cat([tokens[:16], tokens[24:56]]))  # none that is held out
    assert torch.equal(prices._first(16), prices.fit) and torch.equal(prices.fit, tokens[:16])


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        ((-0.1,), "default"),
        ((0.02,), "default"),
        ((0.05, 0.05), "other"),
        ((0.5,), "other"),
        ((0.05, 0.01), "default"),
    ],
)
def test_the_default_stays_unless_something_is_clearly_cheaper(gains, taken):
    """Another kind costs `1 - gain` times as much, give or take 2 % on each sequence, at a first and a second look."""
    noise, looked = 0.02 * (-1.0) ** torch.arange(8), {}

    def price_of(plan, config, sequences):
        look = looked.setdefault(plan, []).append(sequences) or min(len(gains), len(looked[plan])) - 1
        return price.Price([torch.ones(8)], 1.0) if plan == "default" else price.Price(
            [1 - gains[look] + noise], 1 - gains[look]
        )  # fmt: skip

    kinds = SimpleNamespace(model=None, structure=None, config=None, kind="mlp_neurons")
    chooser = KindChooser(kinds, lambda: SimpleNamespace(price=price_of))
    alone, other = PruningConfig(units="mlp_neurons"), PruningConfig(units="kv_groups")
    found = [Candidate(alone, "default", nats=1.0), Candidate(other, "other", nats=1 - gains[0])]
    assert chooser._best(found)[0].plan == taken
    assert looked.get("other", []) == [16, 48][: len(gains)] * (gains[0] > 0)


def test_where_little_of_the_neurons_goes_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(price, "Prices", None)
    model = families.make_model("llama", torch.float32)
    pruner = auto(model)
    there = sum(families.count(layer.mlp) for layer in model.model.layers) / families.count(model)
    pruner.prune(0.28 * there)
    assert set(pruner.last_plan.removed) == {"mlp_neurons"} and "alone, 28% of them" in why(pruner.last_plan)


def test_a_plan_measures_nothing_unless_it_is_asked_to():
    model = families.make_model("llama", torch.float32)
    config = PruningConfig(units="auto", round_to=1)
    plan = StructuredPruner(model, config).plan(0.2)  # there is no text
    assert "a plan measures nothing" in why(plan) and plan.predicted_nats is None
    neurons = StructuredPruner(model, PruningConfig(units="mlp_neurons", round_to=1)).plan(0.2)
    assert plan.decisions == neurons.decisions


UNMEASURED = [
    ({"criterion": "taylor"}, "gradients"), ({"criterion": "l2", "compensation": False}, "does not look at text"),
    ({"iterative_steps": 2}, "iterative_steps"),
    ({"calibration": CalibrationConfig(tokens=torch.full((9, 9), 5))}, "it takes 12"),
    ({"layout": "per_layer", "allocation": "evolution", "search_evaluations": 0}, "evolution"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "said"), UNMEASURED, ids=[said for _, said in UNMEASURED])
def test_where_nothing_can_be_measured_the_default_goes_and_it_is_said(options, said):
    calibration = CalibrationConfig(tokens=torch.randint(3, 60, (12, 16)), batch_size=8)
    model = families.make_model("llama", torch.float32)
    pruner = StructuredPruner(
        model, PruningConfig(**{"units": "auto", "calibration": calibration, "round_to": 1, **options})
    )
    pruner.prune(0.2)
    assert set(pruner.last_plan.removed) == {"mlp_neurons"} and said in why(pruner.last_plan)


def test_what_the_default_cannot_reach_without_a_measurement_groups_help_with():
    model = families.make_model("llama", torch.float32, vocab_size=512)
    there = sum(families.count(layer.mlp) for layer in model.model.layers) / families.count(model)
    plan = StructuredPruner(model, PruningConfig(units="auto", round_to=1)).plan(there)
    assert set(plan.removed) == {"mlp_neurons", "kv_groups"} and abs(plan.ratio - there) < 0.05


def test_without_weights_the_plan_says_that_nothing_was_measured():
    with torch.device("meta"):
        model = families.make_model("llama", torch.float32)
    plan = auto(model).plan(0.2)
    assert set(plan.removed) == {"mlp_neurons"} and "not in memory" in why(plan)


def test_what_takes_most_of_several_kinds_is_found():
    model = families.make_model("llama", torch.float32, num_hidden_layers=4, vocab_size=512)
    plan = auto(model).plan(0.4, estimate=True)
    assert abs(plan.ratio - 0.4) < 0.03 and len(plan.removed) > 1  # no kind alone can


def test_more_than_can_go_is_refused_with_what_can():
    with pytest.raises(RatioError, match="at most"):
        auto(families.make_model("gpt2", torch.float32)).plan(0.97)


@pytest.mark.parametrize("options", [{"units": ("auto", "layers")}, {"units": "auto", "num_layers": 2}])
def test_it_stands_alone(options):
    with pytest.raises(ConfigurationError, match="auto"):
        PruningConfig(**options)


def test_a_ratio_is_needed():
    with pytest.raises(ConfigurationError, match="ratio"):
        auto(families.make_model("llama", torch.float32)).plan()


def test_a_curve_goes_through_its_points_and_ends_with_them():
    curve = Curve([(100, 0.1), (300, 0.9)])  # 0.1 * (x / 100) ** 2
    assert [curve.at(x) for x in (0, 50, 100, 200, 300, 400)] == pytest.approx([0, 0.025, 0.1, 0.4, 0.9, 1.6])
    assert Curve([(100, 0.1), (100, 0.1)], power=2).at(200) == pytest.approx(0.4)  # the same amount twice
    assert curve.at(1201) == math.inf and Curve([]).at(1) == math.inf
    assert Curve([(100, 0.1)], power=1.5).at(200) == pytest.approx(0.1 * 2**1.5)
    assert Curve([(100, 0.2), (200, 0.3)]).at(50) == pytest.approx(0.1)  # never less than in proportion


def test_the_knee_is_where_more_costs_as_much_as_on_average():
    square = Curve([(0.1, 0.1), (0.2, 0.4), (0.4, 1.6)])  # 10 * x ** 2: the slope is that of the chord halfway
    assert square.knee() == pytest.approx(0.2)
    assert (
        Curve([(0.1, 0.1), (0.2, 0.2), (0.3, 0.25)]).knee() is None and Curve([(0.1, 0.1), (0.2, 0.4)]).knee() is None
    )


def test_a_large_vocabulary_is_named():
    large, small = (families.make_model("llama", torch.float32, vocab_size=size) for size in (512, 60))
    assert [any("`vocabulary_text`" in note for note in auto(one).plan(0.05).reasons) for one in (large, small)] == [
        True, families.count(small.model.layers) < 0.7 * families.count(small),
    ]  # fmt: skip


def test_a_plan_that_takes_most_of_a_small_part_says_so_and_the_card_does_not():
    model = families.make_model("llama", torch.float32, vocab_size=512)
    config = PruningConfig(units="mlp_neurons", criterion="l2", compensation=False, round_to=1)
    (line,) = [one for one in StructuredPruner(model, config).plan(0.2).warnings if "auto" in one]
    share = sum(families.count(layer.mlp) for layer in model.model.layers) / families.count(model)
    assert f"{0.2 / share:.0%} of all MLP neurons go" in line and f"only {share:.0%}" in line
    assert "units='vocabulary'" in line
    assert not [one for one in StructuredPruner(model, config).plan(0.05).warnings if "auto" in one]
    with_auto = StructuredPruner(model, PruningConfig(criterion="l2", compensation=False, round_to=1)).plan(0.2)
    assert not [one for one in with_auto.warnings if "auto" in one] and "auto" in with_auto.reasons[0]
    pruner = StructuredPruner(model, config)
    pruner.prune(0.2)
    assert not [one for one in pruner.last_plan.warnings if "auto" in one]


def test_where_whole_experts_are_too_coarse_another_kind_in_mlps_goes_unmeasured():
    model, calibration = families.make_model("qwen3_moe"), families.calibration(8, 12)
    experts = StructuredPruner(model, PruningConfig(units="experts", calibration=calibration)).plan(0.05)
    assert abs(experts.ratio - 0.05) > 0.02
    plan = StructuredPruner(model, PruningConfig(round_to=1, calibration=calibration)).plan(0.05)
    assert abs(plan.ratio - 0.05) < 0.02 and plan.removed and "experts" not in plan.removed


def test_what_auto_takes_is_ranked_by_the_loss():
    """As `kfac` of these units, also where a plan is given; explicit criteria stay."""
    model = families.make_model("llama", torch.float32, num_hidden_layers=4)
    pruner = auto(copy.deepcopy(model))
    pruner.prune(0.1)
    assert not any("obs" in note for note in pruner.last_plan.reasons)
    named = auto(copy.deepcopy(model), units="mlp_neurons", criterion="kfac")
    named.prune(0.1)
    planned = auto(copy.deepcopy(model))
    planned.prune(planned.plan(0.1))
    explicit, plain = auto(copy.deepcopy(model), criterion="obs"), auto(copy.deepcopy(model), units="mlp_neurons")
    explicit.prune(0.1)
    plain.prune(0.1)
    kept = [[group.kept for group in one.last_plan.groups] for one in (pruner, named, planned, explicit, plain)]
    assert kept[0] == kept[1] == kept[2] != kept[3] == kept[4]


def test_where_there_are_no_gradients_auto_ranks_by_outputs_and_says_so(monkeypatch):
    class WithoutGradient(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(_, __):
            raise NotImplementedError("no backward pass is written")

    model = families.make_model("llama", torch.float32, num_hidden_layers=4)
    monkeypatch.setattr(type(model.model.layers[2].mlp.act_fn), "forward", lambda _, x: WithoutGradient.apply(x))
    plain, pruner = auto(copy.deepcopy(model), units="mlp_neurons"), auto(model)
    plain.prune(0.1)
    pruner.prune(0.1)
    (note,) = [note for note in pruner.last_plan.reasons if "'obs', not 'kfac'" in note]
    assert "no backward pass is written" in note
    assert [g.kept for g in pruner.last_plan.groups] == [g.kept for g in plain.last_plan.groups]


MODELS = [
    *((families.make_model, name) for name in families.FAMILIES),
    *((moe_families.make_moe, name) for name in moe_families.CONFIGS if name != "dbrx"),  # does not run
]


def test_every_family_has_gradients():
    for make, name in MODELS:
        try_gradients(make(name), torch.arange(3, 15)[None])
