"""Whole experts: found by their key, cut as if no router chose them, ranked, re-fitted, in every family."""

import copy

import pytest
import torch
from families import make_tokens
from moe_families import CONFIGS, make_moe
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.criteria import Scoring
from hf_structprune.criteria.experts import BY_NAME
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.model.experts import Experts, without_experts
from hf_structprune.model.structure import ModelStructure
from hf_structprune.proof.guarantee import logits
from hf_structprune.refit.experts import refit_experts
from hf_structprune.stats.gradients import gate_salience
from hf_structprune.stats.routing import routing_statistics


LEFT_ALONE = {"jetmoe": "are not understood, left alone", "dbrx": "norms of the layers (norm_attn_norm)"}
FAMILIES = [name for name in CONFIGS if name not in LEFT_ALONE]
IDS = make_tokens(2, 12)


def groups_of(model):
    return [group for group in ModelStructure.of(model).groups if group.kind == "experts"]


def prune(model, **options):
    calibration = {"tokens": make_tokens(16, 16), "batch_size": 4}
    pruner = StructuredPruner(model, PruningConfig(calibration=calibration, units="experts", **options))
    pruner.prune(options.get("ratio"))
    return pruner


@pytest.mark.parametrize("name", FAMILIES)
def test_cut_is_as_if_no_router_chose_them(name, tmp_path):
    model = make_moe(name, torch.float64)
    dense, group = copy.deepcopy(model), groups_of(model)[-1]
    pruner = prune(model, keep={"experts": group.size - group.blocks}, compensation=False)
    kept = {(one.layer, one.kind): torch.tensor(one.kept) for one in pruner.last_plan.groups}
    assert all(len(units) == group.size - group.blocks for units in kept.values()) and kept
    before = logits(dense, IDS)
    with without_experts(dense, groups_of(dense), kept):
        expected = logits(dense, IDS)
    assert (expected - before).abs().max() > 1e-5
    torch.testing.assert_close(logits(pruner.model, IDS), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(logits(dense, IDS), before, atol=0, rtol=0)  # the reference left nothing behind


@pytest.mark.parametrize("name", FAMILIES)
def test_refitted_checkpoints_load_and_generate(name, tmp_path):
    model = make_moe(name)
    group = groups_of(model)[-1]
    pruner = prune(model, keep={"experts": group.size - group.blocks})
    pruner.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert getattr(again.config, group.key_in_config) == group.size - group.blocks
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, pruner.model(IDS).logits)
    new = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(again.generate(IDS, use_cache=True, **new), again.generate(IDS, use_cache=False, **new))
    assert PruningPlan.load(tmp_path) == pruner.last_plan


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_one_by_one_add_up_to_the_block(name):
    model = make_moe(name, torch.float64)
    experts = Experts(model, groups_of(model)[-1])
    with torch.no_grad():
        _, routing, total = experts.run(torch.randn(2, 6, 32, dtype=torch.float64))
        torch.testing.assert_close(experts.total(routing).double(), total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_not_understood_is_left_alone(name):
    structure = ModelStructure.of(make_moe(name))
    assert "experts" not in structure.kinds() and any(LEFT_ALONE[name] in note for note in structure.notes)


@pytest.mark.parametrize("backend", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_implementation_of_experts_gives_the_same(name, backend):
    results = []
    for experts in ("eager", backend):
        model = make_moe(name, experts=experts)
        pruner = prune(model, keep={"experts": 4 if name == "deepseek_v3" else 3})
        with torch.no_grad():
            results.append((pruner.last_plan.groups, pruner.model(IDS).logits))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], atol=2e-4, rtol=1e-3)


def naive_scores(model, group, x):
    """Frequency, mean probability and REAP, token by token and expert by expert."""
    experts, module = Experts(model, group), model.get_submodule(group.parent).experts
    _, routing, _ = experts.run(x)
    count, probability, reap = (torch.zeros(group.size, dtype=torch.float64) for _ in range(3))
    for token, (row, weights) in enumerate(zip(routing.index, routing.weights, strict=True)):
        probability += routing.logits[token].double().softmax(-1) / len(routing.index)
        for expert, weight in zip(row.tolist(), weights, strict=True):
            alone = module(routing.inputs[token : token + 1], torch.tensor([[expert]]), weight.view(1, 1))
            count[expert] += 1
            reap[expert] += alone.norm()
    return count / len(routing.index), probability, reap / count.clamp_min(1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_scores_are_those_of_a_loop(name):
    model = make_moe(name, torch.float64)
    group = groups_of(model)[-1]
    x = torch.randn(3, 8, 32, dtype=torch.float64)
    expected = naive_scores(model, group, x)
    for criterion, wanted in zip(("frequency", "router", "reap"), expected, strict=True):
        made = BY_NAME[criterion](PruningConfig())
        got = made.score(Scoring(group, model, routing_statistics(model, group, made, [x[:2], x[2:]])))
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_l2_is_the_norm_of_all_its_matrices():
    model = make_moe("gpt_oss")
    group = groups_of(model)[0]
    module = model.get_submodule(group.parent).experts
    wanted = [
        sum(w[e].double().square().sum() for w in (module.gate_up_proj, module.down_proj)) for e in range(group.size)
    ]
    got = BY_NAME["l2"](PruningConfig()).score(Scoring(group, model))
    biases = [b[:, :, None] for b in (module.gate_up_proj_bias, module.down_proj_bias)]
    with_biases = [w + sum(b[e].double().square().sum() for b in biases) for e, w in enumerate(wanted)]
    assert torch.allclose(got.square(), torch.stack(wanted), rtol=1e-5)
    assert not torch.allclose(got.square(), torch.stack(with_biases), rtol=1e-5)


def test_taylor_is_the_gradient_of_a_gate():
    model = make_moe("qwen3_moe", torch.float64)
    groups, tokens = groups_of(model), make_tokens(4, 8)
    got = gate_salience(model, groups, tokens, batch_size=2, gradient_checkpointing=False)
    module = model.get_submodule(groups[1].parent).experts
    expected = torch.zeros(groups[1].size, dtype=torch.float64)
    for batch in tokens.split(2):
        for expert in range(groups[1].size):
            losses = []
            for step in (0.05, -0.05):
                with torch.no_grad():
                    module.down_proj[expert] *= 1 + step
                    losses.append(float(model(batch, labels=batch).loss))
                    module.down_proj[expert] /= 1 + step
            expected[expert] += ((losses[0] - losses[1]) / 0.1) ** 2 / 2
    torch.testing.assert_close(got[groups[1].parent, 0], expected, rtol=3e-2, atol=1e-9)


@torch.no_grad()
def test_loss_removes_greedily_what_changes_the_block_least():
    model = make_moe("mixtral", torch.float64)
    group, x = groups_of(model)[0], torch.randn(2, 8, 32, dtype=torch.float64)
    criterion, experts = BY_NAME["loss"](PruningConfig()), Experts(model, group)
    scores = criterion.score(Scoring(group, model, routing_statistics(model, group, criterion, [x])))
    dense = experts.run(x)[0]

    def error(kept):
        with without_experts(model, [group], {group.key: torch.tensor(sorted(kept))}):
            return float((experts.run(x)[0] - dense).square().sum())

    alive = set(range(group.size))
    for place in range(group.size - group.least):
        gone = min(alive, key=lambda one: error(alive - {one}))
        assert scores.argsort()[place] == gone
        alive.remove(gone)


@torch.no_grad()
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text", "dots1"])
def test_refit_is_ridge_regression_of_what_is_lacking(name, weighted):
    """The first expert that is re-fitted, against normal equations over its tokens, and never a larger error."""
    model = make_moe(name, torch.float64)
    group = groups_of(model)[-1]
    experts = Experts(model, group)
    inputs = [torch.randn(4, 64, 32, dtype=torch.float64) for _ in range(2)]
    own = [experts.down(expert).clone() for expert in range(group.size)]
    for expert, down in enumerate(own):
        experts.down(expert).add_(0.1 * torch.randn_like(down))
    targets = [experts.run(x)[0].float() for x in inputs]
    for expert, down in enumerate(own):
        experts.down(expert).copy_(down)
    weights = [torch.rand(4, 64) + 0.1 for _ in inputs] if weighted else None
    _, routing, _ = experts.run(torch.cat(inputs))
    busiest = int(torch.bincount(routing.index.flatten(), minlength=group.size).argmax())
    tokens, phi, _ = experts.features(busiest, routing)
    lack = (torch.cat(targets) - experts.run(torch.cat(inputs))[0].float()).flatten(0, 1)[tokens].double()
    root = (torch.cat(weights).flatten()[tokens].sqrt() if weighted else torch.ones(len(tokens))).double()[:, None]
    a, b = phi * root, lack * root
    gram = a.T @ a / len(a)
    ridge = 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    wanted = experts.down(busiest) + (b.T @ a / len(a)) @ torch.linalg.inv(gram + ridge)
    before = sum(float((t - experts.run(x)[0]).square().sum()) for x, t in zip(inputs, targets, strict=True))
    config = PruningConfig(damping=0.01, token_weighting=weighted)
    copies = [target.clone() for target in targets]
    outputs = refit_experts(model, group, inputs, copies, weights, config)
    changed = experts.down(busiest)
    torch.testing.assert_close(changed, wanted, atol=1e-4, rtol=1e-4)
    for x, output in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(output, experts.run(x)[0].float(), atol=1e-4, rtol=1e-4)
    after = sum(float((t - o).square().sum()) for o, t in zip(outputs, targets, strict=True))
    assert after < 0.5 * before


def test_refit_brings_the_model_nearer_to_the_dense_one():
    """On a model that means something to its text: outputs of its own blocks."""
    errors = {}
    for compensation in (False, True):
        model = make_moe("mixtral")
        dense = copy.deepcopy(model)
        pruner = prune(model, keep={"experts": 3}, compensation=compensation, criterion="frequency")
        tokens = make_tokens(16, 16)
        with torch.no_grad():
            errors[compensation] = float((pruner.model(tokens).logits - dense(tokens).logits).square().mean())
    assert errors[True] < errors[False]


def test_the_plan_says_how_many_tokens_each_expert_got():
    model = make_moe("qwen3_moe")
    plan = prune(model, keep={"experts": 3}).last_plan
    assert [sum(one.seen) for one in plan.groups] == [2 * 16 * 16] * 2  # each token goes to two
    assert any("calibration tokens" in note for note in plan.warnings)


def test_groups_of_a_router_lose_the_same_number():
    plan = prune(make_moe("deepseek_v3"), keep={"experts": 6}).last_plan
    kept = plan.groups[0].kept
    assert sum(number < 4 for number in kept) == 3 == sum(number >= 4 for number in kept)
    with pytest.raises(ConfigurationError, match="same number in each of 2 parts"):
        prune(make_moe("deepseek_v3"), keep={"experts": 5})


@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 4]])
def test_a_plan_that_takes_unevenly_from_groups_is_refused(kept):
    plan = prune(make_moe("deepseek_v3"), keep={"experts": 6}).last_plan
    plan.decisions[0].kept, plan.decisions[0].keep = kept, len(kept)
    model = make_moe("deepseek_v3")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match="at least 4 must stay, the same number in each of 2 blocks"):
        StructuredPruner(model, PruningConfig(units="experts")).prune(plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_token_finds_as_many_experts_as_it_is_sent_to():
    with pytest.raises(ConfigurationError, match="at least 2"):
        prune(make_moe("qwen3_moe"), keep={"experts": 1})
    with pytest.raises(RatioError, match="at most"):
        StructuredPruner(make_moe("qwen3_moe"), PruningConfig(units="experts")).plan(0.9)


@pytest.mark.parametrize("allocation", ["global", "search"])
def test_layers_may_differ(allocation, tmp_path):
    model = make_moe("qwen3_moe", num_experts=8)
    pruner = StructuredPruner(
        model,
        PruningConfig(
            units=("experts", "kv_groups"), allocation=allocation, layout="per_layer",
            calibration={"tokens": make_tokens(16, 16), "batch_size": 4},
        ),
    )  # fmt: skip
    pruner.prune(0.25)
    assert pruner.last_plan.ratio == pytest.approx(0.25, abs=0.05)
    pruner.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, pruner.model(IDS).logits, atol=1e-5, rtol=1e-4)


def test_a_large_shape_is_planned_without_weights():
    import transformers

    config = transformers.Qwen3MoeConfig(num_hidden_layers=48, moe_intermediate_size=768, num_experts=128)
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    plan = StructuredPruner(model, PruningConfig(units="experts")).plan(0.25)
    assert plan.ratio == pytest.approx(0.25, abs=0.004) and {one.keep for one in plan.groups} == {95}
