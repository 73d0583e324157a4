"""`StructuredPruner` from end to end: allocations, steps, plans that are given, and the promises of `prune`."""

import copy

import families
import pytest
import torch

from hf_structprune import CalibrationConfig, PruningConfig, PruningPlan, StructuredPruner
from hf_structprune import pruner as pruner_module
from hf_structprune.errors import ConfigurationError, StructPruneError, UnsupportedModelError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.units import WidthKind, level_criteria


CRITERIA = level_criteria(WidthKind)


def make_pruner(model, **options):
    options = {"round_to": 1, "calibration": families.calibration(), **options}
    return StructuredPruner(model, PruningConfig(**options))


def check_config_is_true(model):
    """The class builds exactly these shapes from the configuration."""
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("criterion", ["l1", "taylor", "obs", "activation"])
def test_allocations_work_with_data_free_input_and_gradient_criteria(allocation, criterion):
    options = dict(allocation=allocation, criterion=criterion, layout="per_layer", units=("mlp_neurons", "kv_groups"))
    pruner = make_pruner(families.make_model("mistral"), **options)
    plan = pruner.plan(0.2)
    small = pruner.prune(0.2)
    assert families.count(small) == plan.parameters_after
    assert plan.ratio == pytest.approx(0.2, abs=0.002)


def language_model(name="llama"):
    """A model that has learnt something: next token = token + 1, so that pruning it costs loss."""
    model = families.make_model(name, tie_word_embeddings=False)
    torch.manual_seed(0)
    start = torch.randint(3, families.VOCAB, (32, 1))
    tokens = (start + torch.arange(16)) % families.VOCAB
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval(), tokens


@pytest.fixture(scope="module")
def learnt():
    return language_model()


@torch.no_grad()
def loss(model, tokens):
    return float(model(tokens, labels=tokens, use_cache=False).loss)


@pytest.mark.parametrize("criterion", ["random", "l1", "taylor", "wanda", "obs"])
def test_compensation_lowers_the_loss(learnt, criterion):
    model, tokens = learnt
    losses = {}
    for compensation in (True, False):
        calibration = CalibrationConfig(tokens=tokens, batch_size=8)
        pruner = make_pruner(
            copy.deepcopy(model), criterion=criterion, compensation=compensation, calibration=calibration
        )
        losses[compensation] = loss(pruner.prune(0.25), tokens)
    assert losses[True] < losses[False]


def output_of(model, module, tokens):
    """What a module gives in a forward pass."""
    seen = []
    handle = model.get_submodule(module).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    families.logits(model, tokens)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "falcon", "opt"])
def test_compensation_lowers_the_output_error_of_the_first_consumer(name):
    tokens = families.make_tokens(16, 16)
    errors = {}
    for compensation in (True, False):
        model = families.make_model(name, torch.float64)
        dense = copy.deepcopy(model)
        pruner = make_pruner(
            model, criterion="l2", compensation=compensation, error_correction=0.0, layout="per_layer", layers=[0]
        )
        small = pruner.prune(0.1)
        parent = ModelStructure.of(dense).layers[0].group("mlp_neurons").reader.module
        outputs = []
        for one in (dense, small):
            outputs.append(output_of(one, parent, tokens))
        errors[compensation] = float((outputs[0] - outputs[1]).square().sum())
    assert 0 < errors[True] < 0.9 * errors[False]


def test_prune_twice_says_so():
    pruner = make_pruner(families.make_model("llama"))
    pruner.prune(0.1)
    with pytest.raises(StructPruneError, match="has pruned its model.*new pruner"):
        pruner.prune(0.1)


def test_a_refused_ratio_leaves_the_pruner_usable_and_the_model_whole():
    model = families.make_model("llama")
    before = weights(model)
    pruner = make_pruner(model)
    with pytest.raises(ConfigurationError):
        pruner.prune(0.99)
    assert same_weights(before, weights(model))
    assert families.count(pruner.prune(0.1)) == pruner.last_plan.parameters_after


@pytest.mark.parametrize("ratio, options", [(None, {}), (0.1, dict(mlp_ratio=0.2))])
def test_a_ratio_has_to_be_given_once(ratio, options):
    with pytest.raises(ConfigurationError, match="ratio"):
        make_pruner(families.make_model("llama"), **options).plan(ratio)


def kept_of(plan):
    return {(g.layer, g.kind): g.kept for g in plan.groups}


def sliced(dense, small, plan):
    """Whether the MLP weights of `small` are the rows and columns of `dense` that the plan names."""
    for (layer, _), kept in kept_of(plan).items():
        one, other = dense.model.layers[layer].mlp, small.model.layers[layer].mlp
        if not (
            torch.equal(one.gate_proj.weight[kept], other.gate_proj.weight)
            and torch.equal(one.up_proj.weight[kept], other.up_proj.weight)
            and torch.equal(one.down_proj.weight[:, kept], other.down_proj.weight)
        ):
            return False
    return True


@pytest.mark.parametrize(
    "criterion, allocation",
    [("l1", "uniform"), ("taylor", "global"), ("obs", "global"), ("kfac", "global"), ("random", "uniform")],
)
def test_three_steps_reach_the_same_size_and_name_units_of_the_original_model(criterion, allocation):
    dense = families.make_model("llama")
    layout = dict(layout="per_layer", allocation=allocation) if allocation == "global" else {}
    plans = {}
    for steps in (1, 3):
        pruner = make_pruner(
            copy.deepcopy(dense), criterion=criterion, iterative_steps=steps, compensation=False, **layout
        )
        small = pruner.prune(0.2)
        plans[steps] = pruner.last_plan
        assert sliced(dense, small, pruner.last_plan)
        assert families.count(small) == pruner.last_plan.parameters_after
    if allocation == "uniform":
        assert [g.keep for g in plans[3].groups] == [g.keep for g in plans[1].groups]
    assert plans[3].ratio == pytest.approx(plans[1].ratio, abs=0.005)


def test_by_kfac_the_global_allocation_takes_from_the_layer_that_the_loss_depends_on_least():
    """Scores within a layer, which other criteria compare, do not know how much its output counts."""
    dense = families.make_model("llama")
    layer = dense.model.layers[1].mlp
    layer.down_proj.weight.data.mul_(1e-2)
    kept = {}
    for criterion in ("obs", "kfac"):
        pruner = make_pruner(
            copy.deepcopy(dense), units="mlp_neurons", criterion=criterion, allocation="global", layout="per_layer"
        )
        small = pruner.prune(0.1)
        plan = pruner.last_plan
        kept[criterion] = [plan.keep(n, "mlp_neurons", families.WIDTH) for n in range(len(dense.model.layers))]
        assert families.count(small) == plan.parameters_after
        assert [one.mlp.down_proj.in_features for one in small.model.layers] == kept[criterion]
    others = kept["kfac"][:1] + kept["kfac"][2:]
    assert kept["kfac"][1] < 0.6 * kept["obs"][1] and kept["kfac"][1] < 0.6 * min(others)


def test_widths_that_are_planned_by_the_default_are_those_that_pruning_takes():
    model = families.make_model("llama")
    pruner = make_pruner(model, units="auto", allocation="global", layout="per_layer")
    planned = [group.keep for group in pruner.plan(0.1).groups]
    pruner.prune(0.1)
    assert [group.keep for group in pruner.last_plan.groups] == planned and len(set(planned)) > 1


def test_three_steps_with_heads_and_ratios_by_kind_reach_the_same_size():
    plans = []
    for steps in (1, 3):
        pruner = make_pruner(
            families.make_model("mistral"),
            iterative_steps=steps,
            attention_ratio=0.5,
            mlp_ratio=0.5,
            criterion="wanda",
        )
        pruner.prune()
        plans.append({(g.layer, g.kind): g.keep for g in pruner.last_plan.groups})
    assert plans[0] == plans[1]


def test_steps_compute_statistics_again():
    kept = []
    for steps in (1, 4):
        pruner = make_pruner(families.make_model("llama"), criterion="wifv", iterative_steps=steps)
        pruner.prune(0.3)
        kept.append(kept_of(pruner.last_plan))
    assert kept[0] != kept[1]


@pytest.mark.parametrize("options", [{}, dict(compensation=False), dict(criterion="taylor")])
def test_a_saved_plan_does_the_same_again_bit_for_bit(tmp_path, options):
    options = dict(units=("mlp_neurons", "kv_groups", "query_heads"), **options)
    first = make_pruner(families.make_model("mistral"), **options)
    first.prune(0.2)
    first.last_plan.save(tmp_path / "plan.json")
    second = make_pruner(families.make_model("mistral"), **options)
    again = second.prune(PruningPlan.load(tmp_path / "plan.json"))
    assert same_weights(weights(again), weights(first.model))
    assert kept_of(second.last_plan) == kept_of(first.last_plan)


def test_a_plan_without_a_choice_is_completed():
    planning = make_pruner(families.make_model("llama"))
    small = make_pruner(families.make_model("llama")).prune(planning.plan(0.2))
    assert same_weights(weights(small), weights(planning.prune(0.2)))


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_units_named_in_a_plan_are_the_ones_that_stay(layout):
    dense = families.make_model("llama")
    pruner = make_pruner(copy.deepcopy(dense), compensation=False, layout=layout)
    plan = pruner.plan(0.2)
    for group in plan.groups:
        group.kept = list(range(group.layer, group.layer + group.keep))
    small = pruner.prune(plan)
    assert kept_of(pruner.last_plan) == kept_of(plan)
    assert sliced(dense, small, plan)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_seed_gives_the_same_plan_and_weights(criterion):
    runs = []
    for _ in range(2):
        pruner = make_pruner(
            families.make_model("mistral"), criterion=criterion, seed=5, units=("mlp_neurons", "kv_groups")
        )
        pruner.prune(0.2)
        torch.rand(1)  # nothing depends on the global generator
        runs.append((pruner.last_plan, weights(pruner.model)))
    assert runs[0][0] == runs[1][0] and same_weights(runs[0][1], runs[1][1])


def test_another_seed_chooses_other_random_units():
    plans = []
    for seed in (0, 1):
        pruner = make_pruner(families.make_model("llama"), criterion="random", seed=seed)
        pruner.prune(0.2)
        plans.append(kept_of(pruner.last_plan))
    assert plans[0] != plans[1]


@pytest.mark.parametrize(
    "first, second", [("uniform", "uniform"), ("uniform", "per_layer"), ("per_layer", "per_layer")]
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pruned_model_can_be_pruned_again(name, first, second):
    model = families.make_model(name)
    kinds = families.kinds_of(name)
    for layout in (first, second):
        uniform_heads = layout == "uniform" and name in families.DERIVED_HEAD_DIM
        units = ("mlp_neurons",) if uniform_heads else kinds
        layers = {"layers": [1, 2]} if layout == "per_layer" else {}
        pruner = make_pruner(model, layout=layout, units=units, criterion="l2", **layers)
        before = families.count(model)
        model = pruner.prune(0.1)
        assert families.count(model) == pruner.last_plan.parameters_after < before
        assert pruner.last_plan.parameters_before == before
        check_config_is_true(model)
    assert families.logits(model, families.make_tokens(2)).isfinite().all()


def test_a_per_layer_model_is_not_forced_into_the_uniform_layout():
    model = make_pruner(families.make_model("llama"), layout="per_layer", layers=[0]).prune(0.1)
    with pytest.raises(StructPruneError, match="per_layer"):
        make_pruner(model).prune(0.1)


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_tied_embeddings_stay_tied(layout):
    model = families.make_model("qwen2", tie_word_embeddings=True)
    small = make_pruner(model, layout=layout).prune(0.2)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.config.tie_word_embeddings is True


@pytest.mark.parametrize("criterion", ["obs", "taylor", "wanda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype, criterion):
    small = make_pruner(families.make_model("llama", dtype), criterion=criterion).prune(0.2)
    assert {p.dtype for p in small.parameters()} == {dtype} and small.dtype == dtype
    assert all(p.isfinite().all() for p in small.parameters())


def test_flags_and_implementations_of_the_model_stay():
    model = families.make_model("mixtral")
    model.set_attn_implementation("eager")
    model.model.embed_tokens.weight.requires_grad_(False)
    small = make_pruner(model, units=("kv_groups",), criterion="l1").prune(0.05)
    assert small.config._attn_implementation == "eager"
    assert small.config._experts_implementation == "eager"
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_a_meta_model_can_be_planned_but_not_pruned():
    with torch.device("meta"):
        model = families.AutoModelForCausalLM.from_config(families.make_config("llama"))
    pruner = make_pruner(model)
    assert pruner.plan(0.2).ratio == pytest.approx(0.2, abs=0.005)
    with pytest.raises(UnsupportedModelError, match="only planning is possible"):
        pruner.prune(0.2)


def test_planning_changes_nothing():
    model = families.make_model("llama")
    before, config = weights(model), model.config.to_dict()
    pruner = make_pruner(model, allocation="global", layout="per_layer", criterion="taylor")
    pruner.plan(0.2)
    assert same_weights(before, weights(model)) and model.config.to_dict() == config
    assert families.count(pruner.prune(0.2)) < sum(w.numel() for w in before.values())


def test_ratio_0_leaves_the_model_as_it_is():
    model = families.make_model("llama")
    before = weights(model)
    pruner = make_pruner(model)
    assert same_weights(weights(pruner.prune(0.0)), before)
    assert pruner.last_plan.groups == [] and pruner.last_plan.ratio == 0


def test_options_of_loading_are_refused_for_a_loaded_model():
    with pytest.raises(ConfigurationError, match="`dtype` is an option of loading"):
        StructuredPruner.from_pretrained(families.make_model("llama"), dtype=torch.float16)


def test_saving_before_pruning_says_so(tmp_path):
    with pytest.raises(StructPruneError, match="call `prune` before"):
        make_pruner(families.make_model("llama")).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_outside_the_vocabulary_raise_before_anything_changes():
    model = families.make_model("llama")
    before = weights(model)
    tokens = torch.full((8, 8), families.VOCAB)
    pruner = make_pruner(model, calibration=CalibrationConfig(tokens=tokens))
    with pytest.raises(StructPruneError, match="vocabulary"):
        pruner.prune(0.2)
    assert same_weights(before, weights(model))


def test_questions_are_asked_once_and_of_the_dense_model(tiny_tokenizer, tiny_llama, monkeypatch, tmp_path):
    asked, dense = [], families.count(tiny_llama)
    documents = [f"Question: is it {i:04d}?\nAnswer: {i:04d}" for i in range(300)]

    def own_documents(model, tokenizer, count, *, seed):
        asked.append((families.count(model), count, seed, tokenizer is tiny_tokenizer, model.training))
        return documents

    monkeypatch.setattr(pruner_module, "own_documents", own_documents)
    calibration = CalibrationConfig(num_samples=6, length=32, dense_questions=5, seed=3)
    config = PruningConfig(round_to=1, iterative_steps=2, criterion="obs", calibration=calibration)
    pruner = StructuredPruner(tiny_llama, config, tiny_tokenizer)
    pruner.prune(0.2)
    assert asked == [(dense, 5, 3, True, False)]  # before the first of two steps
    seen = tiny_tokenizer.batch_decode(pruner.calibration_tokens())
    assert [("Question" in text or "Answer" in text) for text in seen] == [True, False, False, False, True, False]
    pruner.save_pretrained(tmp_path / "small")
    assert PruningConfig.load(tmp_path / "small").calibration.dense_questions == 5
    again = StructuredPruner.from_pretrained(str(tmp_path / "small"), PruningConfig(calibration=calibration))
    assert len(asked) == 1 and again.plan(0.1) and len(asked) == 1  # a plan that needs no text asks nothing


def test_questions_need_the_whole_model(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path)
    config = PruningConfig(criterion="obs", calibration=CalibrationConfig(dense_questions=5))
    pruner = StructuredPruner.from_pretrained(str(tmp_path), config, stream=True)
    with pytest.raises(ConfigurationError, match="`dense_questions` of the calibration, which the whole model writes"):
        pruner.prune(0.1, tmp_path / "small")
