"""Whole experts: found by their key, cut as if no router chose them, ranked, re-fitted, in every family."""

import copy

import pytest
import torch
from families import in_batches, make_tokens
from moe_families import CONFIGS, make_moe
from transformers import AutoModelForCausalLM

from hf_structprune import PruningConfig, PruningPlan, StructuredPruner
from hf_structprune.criteria import Scoring, make_criterion
from hf_structprune.criteria.experts import BY_NAME
from hf_structprune.errors import ConfigurationError, RatioError
from hf_structprune.model.experts import Experts, without_experts
from hf_structprune.model.groups import tensor_of
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.surgery import mask_units
from hf_structprune.proof.guarantee import logits
from hf_structprune.refit.closed_form import obs_scores, refit
from hf_structprune.refit.experts import refit_experts
from hf_structprune.refit.merging import merge_experts, paired
from hf_structprune.stats.gradients import gate_salience
from hf_structprune.stats.routing import routing_statistics
from hf_structprune.units import KINDS as KINDS_BY_NAME


LEFT_ALONE = {"jetmoe": "are not understood, left alone", "dbrx": "norms of the layers (norm_attn_norm)"}
FAMILIES = [name for name in CONFIGS if name not in LEFT_ALONE]
SHARED = ["qwen2_moe", "granitemoeshared", "granitemoehybrid", "qwen3_next", "qwen3_5_moe_text", "nemotron_h"]
KINDS = [*((name, kind) for name in FAMILIES for kind in ("experts", "expert_neurons"))]
KINDS += [(name, "shared_neurons") for name in SHARED]
# Those of a family in one process, which keeps what planning has found out by trying on a small twin.
KINDS = [pytest.param(*one, marks=pytest.mark.xdist_group(f"experts of {one[0]}")) for one in KINDS]
IDS = make_tokens(2, 12)


def groups_of(model, kind="experts"):
    return [group for group in ModelStructure.of(model).groups if group.kind == kind]


def keep_of(structure, kind):
    """One expert less, or 8 neurons of each; and what that is in a group."""
    group = [group for group in structure.groups if group.kind == kind][-1]
    keep = group.size - group.blocks if kind == "experts" else 8
    return {kind: keep}, keep * (group.blocks if group.in_experts else 1)


def prune(model, kind="experts", **options):
    calibration = {"tokens": make_tokens(16, 16), "batch_size": 4}
    pruner = StructuredPruner(model, PruningConfig(calibration=calibration, units=kind, **options))
    pruner.prune(options.get("ratio"))
    return pruner


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_cut_is_as_if_they_were_not_there(name, kind):
    model = make_moe(name, torch.float64)
    dense, structure = copy.deepcopy(model), ModelStructure.of(model)
    keep, number = keep_of(structure, kind)
    calibration = {"tokens": make_tokens(16, 16), "batch_size": 4}
    pruner = StructuredPruner(model, PruningConfig(units=kind, keep=keep, compensation=False, calibration=calibration))
    planned = pruner.plan()
    pruner.prune()
    plan, after = pruner.last_plan, pruner.structure
    kept = {(one.layer, one.kind): torch.tensor(one.kept) for one in plan.groups}
    assert all(len(units) == number for units in kept.values()) and kept
    assert planned.matrix_parameters_after == after.matrix_parameters == plan.matrix_parameters_after
    assert planned.parameters_after == after.total_parameters
    before, masked = logits(dense, IDS), copy.deepcopy(dense)
    mask_units(masked, structure, kept)
    with without_experts(masked, structure.groups, kept):
        expected = logits(masked, IDS)
    with without_experts(dense, structure.groups, kept):
        pass
    assert (expected - before).abs().max() > 1e-5
    torch.testing.assert_close(logits(pruner.model, IDS), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(logits(dense, IDS), before, atol=0, rtol=0)  # the reference left nothing behind


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_refitted_checkpoints_load_and_generate(name, kind, tmp_path):
    model = make_moe(name)
    structure = ModelStructure.of(model)
    keep, _ = keep_of(structure, kind)
    group = next(group for group in reversed(structure.groups) if group.kind == kind)
    pruner = prune(model, kind, keep=keep)
    pruner.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert keep[kind] in [getattr(again.config, key) for key in KINDS_BY_NAME[kind].config_keys(
        ModelStructure.of(again).layers[group.layer], None, again.config)]  # fmt: skip
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


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_implementation_of_experts_gives_the_same(name):
    results = []
    for experts in ("eager", "grouped_mm", "batched_mm"):
        model = make_moe(name, experts=experts)
        pruner = prune(model, keep={"experts": 4 if name == "deepseek_v3" else 3})
        with torch.no_grad():
            results.append((pruner.last_plan.groups, pruner.model(IDS).logits))
    for groups, logits_then in results[1:]:
        assert groups == results[0][0]
        torch.testing.assert_close(logits_then, results[0][1], atol=2e-4, rtol=1e-3)


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
    got = gate_salience(model, groups, tokens, in_batches(2))
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


def test_a_plan_that_takes_unevenly_from_groups_is_refused():
    plan = prune(make_moe("deepseek_v3"), keep={"experts": 6}).last_plan
    model = make_moe("deepseek_v3")
    before = copy.deepcopy(model.state_dict())
    for kept in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 4]):
        plan.decisions[0].kept, plan.decisions[0].keep = kept, len(kept)
        with pytest.raises(ConfigurationError, match="at least 4 must stay, the same number in each of 2 blocks"):
            StructuredPruner(model, PruningConfig(units="experts")).prune(plan)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_token_finds_as_many_experts_as_it_is_sent_to():
    with pytest.raises(ConfigurationError, match="at least 2"):
        prune(make_moe("qwen3_moe"), keep={"experts": 1})
    with pytest.raises(RatioError, match="at most"):
        StructuredPruner(make_moe("qwen3_moe"), PruningConfig(units="experts")).plan(0.9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "dots1"])
@pytest.mark.parametrize("criterion", ["obs", "wanda", "l2"])
def test_neurons_of_each_expert_are_ranked_as_those_of_an_mlp(name, criterion):
    """Against the formulas over the tokens of each expert alone, matrices taken out of the stack by hand."""
    model = make_moe(name, torch.float64)
    group, x = groups_of(model, "expert_neurons")[-1], torch.randn(4, 32, 32, dtype=torch.float64)
    experts, config = Experts(model, group), PruningConfig(units="expert_neurons", criterion=criterion, damping=0.01)
    made = make_criterion(config)
    got = made.score(Scoring(group, model, routing_statistics(model, group, made, [x[:2], x[2:]])))
    module, _routing = model.get_submodule(group.parent).experts, experts.run(x)[1]
    width = group.whole
    for expert in range(len(module.down_proj)):
        _, phi, _ = experts.features(expert, _routing)
        down, up = module.down_proj[expert], module.gate_up_proj[expert]
        if name == "gpt_oss":  # transposed, gate and up by turns
            down, up = down.T, torch.cat([up.T[::2], up.T[1::2]])
        if criterion == "wanda":
            wanted = down.abs().sum(0) * phi.square().sum(0).sqrt()
        elif criterion == "l2":
            wanted = down.square().sum(0) + up.square().sum(1).view(2, width).sum(0)
        else:
            gram = phi.T @ phi / len(phi)
            wanted = obs_scores(down, gram, torch.arange(width)[:, None], 0.01)
        torch.testing.assert_close(got[expert * width : (expert + 1) * width], wanted.double(), rtol=1e-4, atol=1e-9)


@torch.no_grad()
def test_neurons_that_stay_take_over_from_those_that_go():
    """The first expert to be re-fitted, against normal equations; and a better block than by cutting alone."""
    model = make_moe("qwen3_moe", torch.float64)
    group = groups_of(model, "expert_neurons")[-1]
    experts, x = Experts(model, group), torch.randn(16, 64, 6, dtype=torch.float64) @ torch.randn(6, 32).double()
    dense, own = experts.run(x)[0], experts._module.down_proj.clone()
    routing = experts.run(x)[1]
    busiest = int(torch.bincount(routing.index.flatten()).argmax())
    _, phi, _ = experts.features(busiest, routing)
    columns = torch.arange(0, group.whole, 2)
    kept = (torch.arange(4)[:, None] * group.whole + columns).flatten()
    gram, errors = phi.T @ phi / len(phi), []
    wanted = refit(experts.down(busiest), gram, columns, 0.01)
    for compensation in (False, True):
        config = PruningConfig(damping=0.01, compensation=compensation)
        outputs = refit_experts(model, group, [x], [dense.float()], None, config, kept)
        assert not experts._module.down_proj[:, :, 1::2].any()
        if compensation:
            torch.testing.assert_close(experts.down(busiest)[:, columns], wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs[0], experts.run(x)[0].float())
        errors.append(float((outputs[0] - dense).square().sum()))
        experts._module.down_proj.copy_(own)
    assert errors[1] < 0.9 * errors[0]


def test_neurons_of_experts_are_asked_for_by_their_number_in_each():
    with pytest.raises(ConfigurationError, match="has only 16 in each expert neurons of experts"):
        prune(make_moe("qwen3_moe"), "expert_neurons", keep={"expert_neurons": 17})
    with pytest.raises(ConfigurationError, match="'taylor' does not rank neurons of experts; these do: random"):
        PruningConfig(units="expert_neurons", criterion="taylor")
    with pytest.raises(ConfigurationError, match="'expert_neurons' beside whole experts: cut the one first"):
        PruningConfig(units=("experts", "expert_neurons"))
    model = make_moe("qwen3_moe")
    plan = StructuredPruner(model, PruningConfig(units="expert_neurons", align_to=8)).plan(0.2)
    assert {one.keep for one in plan.groups} == {4 * 8}


@pytest.mark.parametrize("allocation", ["global", "search"])
@pytest.mark.parametrize("kind", ["experts", "expert_neurons"])
def test_layers_may_differ(kind, allocation, tmp_path):
    model = make_moe("qwen3_moe", num_experts=8)
    pruner = StructuredPruner(
        model,
        PruningConfig(
            units=(kind, "kv_groups"), allocation=allocation, layout="per_layer",
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
    pruner = StructuredPruner(model, PruningConfig(units="expert_neurons"))
    plan = pruner.plan(0.25)
    assert plan.ratio == pytest.approx(0.25, abs=0.01) and {one.keep % (128 * 8) for one in plan.groups} == {0}
    # What is the same in all layers is in memory once.
    first, *others = (group for group in pruner.structure.groups if group.kind == "expert_neurons")
    assert len(others) == 47 and all(one.slices[0].index is first.slices[0].index for one in others)


def test_shared_experts_that_no_key_sizes_are_said(monkeypatch):
    monkeypatch.setattr("hf_structprune.units.experts._shared_key", lambda config: ())
    structure = ModelStructure.of(make_moe("qwen2_moe"))
    assert "shared_neurons" not in structure.kinds()
    assert "mlp.shared_expert: no key of the configuration is its width, left alone" in structure.notes
    for name in ("dots1", "qwen3_moe"):  # the key of all experts sizes it; there is none
        assert not any("shared" in note for note in ModelStructure.of(make_moe(name)).notes)


def test_neurons_are_paired_whatever_their_order():
    generator = torch.Generator().manual_seed(0)
    rows, order = torch.randn(12, 5, generator=generator), torch.randperm(12, generator=generator)
    assert torch.equal(order[paired(rows @ rows[order].T)], torch.arange(12))
    assert sorted(paired(torch.randn(9, 9, generator=generator)).tolist()) == list(range(9))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "dots1"])
def test_an_expert_merged_with_its_own_copy_changes_nothing(name):
    """Two experts that are the same but for the order of their neurons, half the tokens each."""
    model = make_moe(name, torch.float64)
    group, neurons = groups_of(model)[-1], groups_of(model, "expert_neurons")[-1]
    experts, order = Experts(model, group), torch.randperm(neurons.whole)
    for part in (part for part in neurons.slices if part.stacked):
        stack, index = tensor_of(model, part.tensor), part.index[: neurons.whole]
        rows = stack[0].movedim(part.dim - 1, 0).clone()
        stack[1].movedim(part.dim - 1, 0)[index.flatten()] = rows[index[order].flatten()]
    if name == "gpt_oss":
        experts._module.down_proj_bias[1] = experts._module.down_proj_bias[0]
    x, own = torch.randn(4, 16, 32, dtype=torch.float64), experts.inner(0, torch.eye(32).double())
    torch.testing.assert_close(experts.inner(1, torch.eye(32).double()), own[:, order])
    before = [experts._module.down_proj[expert].clone() for expert in range(4)]
    merge_experts(model, group, neurons, torch.tensor([0, 2, 3]), [x])
    for expert in (0, 2, 3):
        torch.testing.assert_close(experts._module.down_proj[expert], before[expert], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(experts.inner(0, torch.eye(32).double()), own, atol=1e-6, rtol=1e-6)


def test_merged_experts_are_the_mean_of_those_nearest_weighted_by_their_tokens():
    model = make_moe("mixtral", torch.float64)
    dense, group = copy.deepcopy(model), groups_of(model)[0]
    pruner = prune(model, keep={"experts": 3}, compensation=False, merge_experts=True, layers=[0], layout="per_layer")
    kept = pruner.last_plan.groups[0].kept
    gone = next(number for number in range(4) if number not in kept)
    seen = pruner.last_plan.groups[0].seen
    old, new = (m.get_submodule(group.parent).experts for m in (dense, pruner.model))
    changed = [i for i, e in enumerate(kept) if not torch.equal(new.down_proj[i], old.down_proj[e])]
    assert len(changed) == 1
    survivor = kept[changed[0]]
    weights = torch.tensor([seen[survivor], seen[gone]]).double() / (seen[survivor] + seen[gone])
    total = weights[0] * old.down_proj[survivor].sum(1) + weights[1] * old.down_proj[gone].sum(1)
    torch.testing.assert_close(new.down_proj[changed[0]].sum(1), total, atol=1e-5, rtol=1e-5)  # in whatever order


@torch.no_grad()
def test_the_nearest_expert_is_the_one_with_the_nearest_mean_output():
    """Biases count: two experts that differ by the bias of what they put out alone."""
    model = make_moe("gpt_oss", torch.float64)
    group, neurons = groups_of(model)[-1], groups_of(model, "expert_neurons")[-1]
    module = model.get_submodule(group.parent).experts
    for name, parameter in module.named_parameters():
        parameter[:] = parameter[:1].clone()
        if name == "down_proj_bias":
            parameter += torch.tensor([0.0, 5.0, 1.0, -9.0])[:, None].double()
    x = torch.randn(4, 16, 32, dtype=torch.float64)
    tokens = torch.bincount(Experts(model, group).run(x)[1].index.flatten(), minlength=4).double()
    own = module.down_proj_bias.clone()
    merge_experts(model, group, neurons, torch.tensor([1, 2, 3]), [x])  # 0 goes into 2
    torch.testing.assert_close(module.down_proj_bias[[1, 3]], own[[1, 3]])
    wanted = (own[0] * tokens[0] + own[2] * tokens[2]) / (tokens[0] + tokens[2])
    torch.testing.assert_close(module.down_proj_bias[2], wanted, atol=1e-5, rtol=1e-5)


def test_merging_is_refused_where_nothing_is_merged():
    with pytest.raises(ConfigurationError, match="`merge_experts` is given.*no whole experts go"):
        PruningConfig(units="mlp_neurons", merge_experts=True)
