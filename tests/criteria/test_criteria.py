"""Every criterion against a naive loop over units, matrices and channels."""

import copy
import math

import families
import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.config import AGGREGATIONS, TAYLOR_VARIANTS
from hf_structprune.criteria import BY_NAME, Scoring, make_criterion
from hf_structprune.criteria.base import join
from hf_structprune.model.structure import ModelStructure
from hf_structprune.refit.closed_form import obs_scores
from hf_structprune.stats import gradients
from hf_structprune.stats.gradients import OUTPUTS, loss_metrics, taylor_salience
from hf_structprune.stats.moments import InputStatistics
from hf_structprune.units import WidthKind, level_criteria


CRITERIA = level_criteria(WidthKind)


KINDS = ("kv_groups", "query_heads", "mlp_neurons")
TOKENS = families.make_tokens(6, 12)


@pytest.fixture(scope="module")
def model():
    return families.make_model("llama_bias")


@pytest.fixture(scope="module")
def structure(model):
    return ModelStructure.of(model)


@pytest.fixture(scope="module")
def gpt2():
    return families.make_model("gpt2")


def consumer_inputs(model, module):
    """What a forward pass hands to a module, shape (sequences, length, d)."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    families.logits(model, TOKENS)
    handle.remove()
    return seen[0].reshape(*TOKENS.shape, -1)


def score(model, group, name, salience=None, drop=None, **options):
    inputs = consumer_inputs(model, group.reader.module)
    statistics = InputStatistics(inputs.shape[-1], gram=True)
    statistics.update(inputs)
    criterion = make_criterion(PruningConfig(criterion=name, **options))
    with torch.no_grad():
        return criterion.score(Scoring(group, model, statistics, salience, drop))


def close(got, expected):
    torch.testing.assert_close(got.double(), torch.tensor(expected).double(), rtol=2e-5, atol=1e-9)


def unit_sums(group, column):
    """Sums a function of a consumer's column over the columns of each unit."""
    return [sum(column(c) for c in columns) for columns in group.reader.index.tolist()]


@pytest.mark.parametrize("kind", KINDS)
def test_wanda_is_weight_magnitude_times_input_norm(model, structure, kind):
    group = structure.layers[1].group(kind)
    weight = model.get_submodule(group.reader.module).weight.detach().double()
    x = consumer_inputs(model, group.reader.module).double().flatten(0, 1)
    norms = [math.sqrt(float((x[:, c] ** 2).sum()) / len(x)) for c in range(x.shape[1])]  # of one token, on average
    got = score(model, group, "wanda")
    expected = unit_sums(group, lambda c: sum(abs(float(w)) for w in weight[:, c]) * norms[c])
    scale = float(got[0]) / expected[0]  # the number of tokens is the same for every unit
    assert scale == pytest.approx(1, rel=1e-4) or scale == pytest.approx(math.sqrt(len(x)), rel=1e-4)
    close(got, [scale * e for e in expected])


@pytest.mark.parametrize("kind", KINDS)
def test_wifv_is_input_variance_times_squared_weights(model, structure, kind):
    group = structure.layers[1].group(kind)
    weight = model.get_submodule(group.reader.module).weight.detach().double()
    x = consumer_inputs(model, group.reader.module).double().flatten(0, 1)
    close(
        score(model, group, "wifv"),
        unit_sums(group, lambda c: float(x[:, c].var()) * sum(float(w) ** 2 for w in weight[:, c])),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_activation_is_the_norm_over_sequences_of_the_mean_over_tokens(model, structure, kind):
    group = structure.layers[1].group(kind)
    x = consumer_inputs(model, group.reader.module).double()

    def column(c):
        return math.sqrt(sum((sum(abs(float(t[c])) for t in sequence) / len(sequence)) ** 2 for sequence in x))

    close(score(model, group, "activation"), unit_sums(group, column))


def matrices(model, group):
    return [part for part in group.slices if model.get_parameter(part.tensor).ndim > 1]


def naive_tensors(model, group, value):
    """Channel scores of every matrix of a group: `value(matrix, row or None, column or None)`."""
    scores = []
    for part in matrices(model, group):
        lines = list(model.get_parameter(part.tensor).detach().double().movedim(part.dim, 0))
        scores.append([[value(lines[i]) for i in unit] for unit in part.index.tolist()])
    return scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name, power", [("l1", 1), ("l2", 2)])
def test_magnitude_sums_all_weights_of_a_unit(model, structure, kind, name, power):
    group = structure.layers[1].group(kind)
    tensors = naive_tensors(model, group, lambda line: sum(abs(float(w)) ** power for w in line))
    expected = [sum(sum(tensor[unit]) for tensor in tensors) for unit in range(group.size)]
    close(score(model, group, name), expected)


def test_magnitude_reads_transposed_weights_the_right_way(gpt2):
    group = ModelStructure.of(gpt2).layers[0].group("mlp_neurons")
    block = gpt2.transformer.h[0].mlp
    expected = (block.c_fc.weight.abs().sum(0) + block.c_proj.weight.abs().sum(1)).tolist()
    close(score(gpt2, group, "l1"), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregation_joins_channel_by_channel_where_tensors_are_equally_wide(aggregation):
    tensors = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = {
        "sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "prod": math.prod,
        "first": lambda v: v[0], "last": lambda v: v[-1],
    }[aggregation]  # fmt: skip
    expected = [sum(rule([float(t[u, c]) for t in tensors]) for c in range(5)) for u in range(4)]
    torch.testing.assert_close(join(list(tensors), aggregation), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregation_sums_units_first_where_tensors_differ_in_width(aggregation):
    wide, narrow = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]), torch.tensor([[2.0, 3.0], [40.0, 50.0]])
    expected = {
        "sum": [15.0, 116.0], "mean": [7.5, 58.0], "max": [10.0, 90.0], "prod": [50.0, 2340.0],
        "first": [10.0, 26.0], "last": [5.0, 90.0],
    }[aggregation]  # fmt: skip
    assert join([wide, narrow], aggregation).tolist() == expected


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_criteria_use_the_aggregation_of_the_configuration(model, structure, aggregation):
    group = structure.layers[0].group("mlp_neurons")
    tensors = naive_tensors(model, group, lambda line: float(line.abs().sum()))
    rule = {"sum": sum, "mean": lambda v: sum(v) / 3, "max": max, "prod": math.prod}.get(aggregation)
    rule = rule or (lambda v: v[0 if aggregation == "first" else -1])
    expected = [rule([tensor[unit][0] for tensor in tensors]) for unit in range(group.size)]
    close(score(model, group, "l1", aggregation=aggregation), expected)


def test_a_kv_group_gets_the_scores_of_its_own_query_heads_by_hand(structure, model):
    """Eight-wide heads: query heads 0 and 1 read KV head 0, heads 2 and 3 read KV head 1."""
    group = structure.layers[0].group("kv_groups")
    salience = {(part.tensor, part.dim): torch.zeros(part.index.numel()) for part in group.slices}
    for head, value in enumerate((1.0, 10.0, 100.0, 1000.0)):
        salience["model.layers.0.self_attn.q_proj.weight", 0][8 * head : 8 * head + 8] = value
        salience["model.layers.0.self_attn.o_proj.weight", 1][8 * head : 8 * head + 8] = 2 * value
    for head, value in enumerate((0.1, 0.5)):
        salience["model.layers.0.self_attn.k_proj.weight", 0][8 * head : 8 * head + 8] = value
    assert score(model, group, "taylor", salience).tolist() == pytest.approx([8 * (33 + 0.1), 8 * (3300 + 0.5)])
    heads = structure.layers[0].group("query_heads")
    assert score(model, heads, "taylor", salience).tolist() == [24.0, 240.0, 2400.0, 24000.0]


def gradient(model, tokens):
    """Gradients of the mean next-token loss by full backward passes, by parameter name."""
    model = copy.deepcopy(model).requires_grad_(True)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def naive_taylor(weight, g, fisher, variant):
    if variant in ("vectorize", "first"):
        change = weight * g
    elif variant == "second":
        change = weight * fisher * weight
    else:
        change = weight * g - 0.5 * weight * fisher * weight
    return change if variant == "vectorize" else change.abs()


@pytest.mark.parametrize(
    "name, variant", [*(("llama_bias", variant) for variant in TAYLOR_VARIANTS), ("gpt2", "mix"), ("phi3", "mix")]
)
def test_taylor_equals_full_gradients(name, variant):
    model = families.make_model(name)
    structure = ModelStructure.of(model)
    got = taylor_salience(model, structure.groups, TOKENS, families.in_batches(taylor=variant, batch_size=len(TOKENS)))
    full = gradient(model, TOKENS)
    singles = [gradient(model, sequence[None]) for sequence in TOKENS]
    assert got.keys() == {(part.tensor, part.dim) for g in structure.groups for part in matrices(model, g)}
    for key, dim in got:
        fisher = sum(one[key].square() for one in singles) / len(singles)
        change = naive_taylor(model.get_parameter(key).detach().double(), full[key], fisher, variant)
        expected = change.movedim(dim, 0).sum(1).abs()
        size = float(expected.max())
        torch.testing.assert_close(got[key, dim].double(), expected, rtol=1e-3, atol=2e-5 * size)


@pytest.mark.parametrize("variant", ["second", "vectorize"])
def test_taylor_of_several_batches_is_that_of_one_where_the_order_of_sums_allows(model, structure, variant):
    one, several = (
        taylor_salience(model, structure.groups, TOKENS, families.in_batches(taylor=variant, batch_size=size))
        for size in (6, 4)
    )  # the last batch is smaller
    for key in one:
        torch.testing.assert_close(several[key], one[key], rtol=1e-3, atol=1e-5 * float(one[key].max()))


def test_taylor_first_averages_batches_by_their_size(model, structure):
    got = taylor_salience(model, structure.groups, TOKENS, families.in_batches(taylor="first", batch_size=4))
    parts = [
        taylor_salience(model, structure.groups, t, families.in_batches(taylor="first", batch_size=4))
        for t in TOKENS.split(4)
    ]
    for key in got:
        torch.testing.assert_close(got[key], parts[0][key] * 4 / 6 + parts[1][key] * 2 / 6)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon"])
def test_gradient_checkpointing_gives_the_same_salience(name):
    model = families.make_model(name)
    groups = ModelStructure.of(model).groups
    plain, checkpointed = (
        taylor_salience(
            model, groups, TOKENS, families.in_batches(taylor="mix", batch_size=3, gradient_checkpointing=on)
        )
        for on in (False, True)
    )
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)
    assert not model.training and not any(module.training for module in model.modules())
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_that_was_on_stays_on(model):
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    taylor_salience(
        model,
        ModelStructure.of(model).groups,
        TOKENS,
        families.in_batches(taylor="first", gradient_checkpointing=True),
    )
    assert model.is_gradient_checkpointing


def test_dropout_is_off_while_gradients_are_taken():
    plain = families.make_model("gpt2", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0)
    dropping = families.make_model("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    groups = ModelStructure.of(plain).groups
    expected = taylor_salience(plain, groups, TOKENS, families.in_batches(taylor="first"))
    for checkpointing in (False, True):
        got = taylor_salience(
            dropping, groups, TOKENS, families.in_batches(taylor="first", gradient_checkpointing=checkpointing)
        )
        assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_is_kept_and_flags_come_back(model, structure, checkpointing):
    model = copy.deepcopy(model)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    taylor_salience(
        model, structure.groups, TOKENS, families.in_batches(taylor="mix", gradient_checkpointing=checkpointing)
    )
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_a_training_model_stays_one(model, structure):
    model = copy.deepcopy(model).train()
    taylor_salience(model, structure.groups, TOKENS, families.in_batches(taylor="first"))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_obs_scores_the_consumer_with_the_second_moments_of_its_inputs(model, structure, kind):
    group = structure.layers[1].group(kind)
    x = consumer_inputs(model, group.reader.module).double().flatten(0, 1)
    weight = model.get_submodule(group.reader.module).weight.detach()
    drop = group.blocks * (group.size // group.blocks - 1)
    expected = obs_scores(weight, x.T @ x / len(x), group.reader.index, 0.3, drop, group.blocks)
    got = score(model, group, "obs", damping=0.3, drop=drop)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


def test_random_scores_follow_seed_layer_and_kind(model, structure):
    group, other = structure.layers[0].group("mlp_neurons"), structure.layers[1].group("mlp_neurons")
    one = score(model, group, "random", seed=3)
    assert torch.equal(one, score(model, group, "random", seed=3))
    assert not torch.equal(one, score(model, group, "random", seed=4))
    assert not torch.equal(one, score(model, other, "random", seed=3))
    assert one.min() >= 0 and one.max() < 1


def test_every_name_of_the_configuration_has_a_criterion():
    assert tuple(BY_NAME) == CRITERIA


def output_gradients(model, module, norm=None):
    """Gradients of the summed loss of each sequence by what a module puts out, shape (tokens, out).

    The loss is that of the tokens that the model finds most likely (`most_likely`). Where a norm is behind it: times
    the root mean square of the output, by which the norm divides.
    """
    seen = []

    def keep(_, __, output):
        output.retain_grad()
        seen.append(output)

    with model.get_submodule(module).register_forward_hook(keep):
        for sequence in TOKENS:
            logits = model(input_ids=sequence[None]).logits[0, :-1].float()
            torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum").backward()
    model.zero_grad()
    gradient = torch.cat([output.grad[0] for output in seen]).double()
    if norm is None:
        return gradient
    return gradient * (torch.cat([output[0].detach() for output in seen]).square().mean(-1, True) + norm.eps).sqrt()


@pytest.fixture
def most_likely(monkeypatch):
    """Instead of drawing tokens from what is predicted, the most likely ones are taken."""
    monkeypatch.setattr(gradients, "_drawn", lambda _, logits: logits.detach().argmax(-1))


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "gemma2"])
def test_metrics_of_the_loss_are_the_second_moments_of_the_gradients_at_the_consumers_outputs(
    name, monkeypatch, most_likely
):
    """Also where the output passes a norm, or where the map is stored the other way around."""
    model, config = families.make_model(name), PruningConfig(criterion="kfac", units="mlp_neurons")
    groups = [layer.group("mlp_neurons") for layer in ModelStructure.of(model).layers]
    got = loss_metrics(model, groups, TOKENS, config)
    assert not any(p.grad is not None for p in model.parameters())
    for group in groups:
        norm = getattr(model.get_submodule(group.parent.rpartition(".")[0]), "post_feedforward_layernorm", None)
        gradient = output_gradients(model, group.reader.module, norm)
        root = got[group.reader.module, OUTPUTS].double()
        expected = gradient.T @ gradient / len(gradient)
        atol = 1e-4 * float(expected.diagonal().mean())
        torch.testing.assert_close(root.T @ root, expected, rtol=1e-3, atol=atol)
    monkeypatch.setattr(gradients, "LARGEST", 4)  # narrower than the outputs: projected
    narrow = loss_metrics(model, groups, TOKENS, config)[groups[0].reader.module, OUTPUTS]
    assert narrow.shape == (4, families.HIDDEN)


@pytest.mark.parametrize("name", ["llama_bias", "gemma2"])  # the head alone, and with what is done to logits
def test_metrics_are_factors_of_the_fisher_matrix(name, monkeypatch):
    """Of many draws: all tokens that could come next, each with the probability that the model gives it."""
    model = families.make_model(name)
    group, tokens = ModelStructure.of(model).layers[-1].group("mlp_neurons"), TOKENS[:1, :5]
    module, seen = model.get_submodule(group.reader.module), []
    norm = getattr(model.get_submodule(group.parent.rpartition(".")[0]), "post_feedforward_layernorm", None)
    with module.register_forward_hook(lambda _, __, output: seen.append(output)):
        log_probs = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    size = 1 if norm is None else (seen[0][0].detach().double().square().mean(-1, True) + norm.eps).sqrt()
    exact = 0
    for position, token in torch.cartesian_prod(*map(torch.arange, log_probs.shape)).tolist():
        (gradient,) = torch.autograd.grad(log_probs[position, token], seen[0], retain_graph=True)
        gradient = gradient[0].double() * size
        exact = exact + log_probs[position, token].detach().exp() * gradient.T @ gradient
    exact, draws = exact / tokens.numel(), 400
    monkeypatch.setattr(gradients, "_MOST", draws)
    repeated = tokens.expand(4 * draws, -1)  # of which a quarter is looked at
    root = loss_metrics(model, [group], repeated, PruningConfig(criterion="kfac", units="mlp_neurons"))
    found = root[group.reader.module, OUTPUTS].double()
    far = float((exact - exact.diagonal().mean() * torch.eye(len(exact))).norm())
    assert float((found.T @ found - exact).norm()) < 0.15 * far


def test_tokens_are_drawn_as_often_as_they_are_predicted():
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]]).expand(20_000, 4)
    drawn = gradients._drawn(torch.Generator().manual_seed(0), logits)
    torch.testing.assert_close(torch.bincount(drawn) / len(drawn), logits[0].softmax(-1), atol=0.01, rtol=0)
    assert torch.equal(drawn, gradients._drawn(torch.Generator().manual_seed(0), logits))
    certain = torch.tensor([[-1e4, -1e4, 0.0, -1e4]]).expand(100, 4)
    assert gradients._drawn(torch.Generator(), certain).unique().tolist() == [2]


def test_projected_metrics_keep_norms(monkeypatch, most_likely):
    """`R v` of many random signs is as long as `G^1/2 v`, within what so many leave open."""
    model, config = families.make_model("llama"), PruningConfig(criterion="kfac", units="mlp_neurons")
    group = ModelStructure.of(model).layers[0].group("mlp_neurons")
    exact = loss_metrics(model, [group], TOKENS, config)[group.reader.module, OUTPUTS]
    monkeypatch.setattr(gradients, "LARGEST", 31)
    found = []
    for seed in range(60):
        config = PruningConfig(criterion="kfac", units="mlp_neurons", seed=seed)
        found.append(loss_metrics(model, [group], TOKENS, config)[group.reader.module, OUTPUTS])
    roots = torch.stack(found)
    metric, right = (roots.mT @ roots).mean(0), exact.T @ exact
    assert float(metric.trace()) == pytest.approx(float(right.trace()), rel=0.2)  # of other sequences
    metric, right = (one * len(one) / one.trace() for one in (metric, right))
    assert float((metric - right).norm()) < 0.25 * float((torch.eye(len(right)) - right).norm())


@pytest.mark.parametrize("kind", ["kv_groups", "mlp_neurons"])
def test_kfac_is_obs_of_the_weights_in_the_metric_of_the_loss(model, structure, kind):
    group, drop = structure.layers[1].group(kind), 1 if kind == "kv_groups" else 20
    salience = loss_metrics(model, [group], TOKENS, PruningConfig(criterion="kfac", units=kind))
    weight = model.get_submodule(group.reader.module).weight.detach().double()
    x = consumer_inputs(model, group.reader.module).double().flatten(0, 1)
    root = salience[group.reader.module, OUTPUTS].double()
    expected = obs_scores(root @ weight, x.T @ x / len(x), group.reader.index, 0.3, drop, group.blocks)
    got = score(model, group, "kfac", salience, drop=drop, damping=0.3)
    close(got, expected.tolist())
    plain = obs_scores(weight, x.T @ x / len(x), group.reader.index, 0.3, drop, group.blocks)
    assert kind == "kv_groups" or got.argsort().tolist() != plain.argsort().tolist()


@pytest.mark.parametrize("sequences", [128, 500])
@pytest.mark.parametrize("sources", [2, 3, 4, 8])
def test_all_sources_have_a_part_in_the_metric_of_the_loss(model, sources, sequences, monkeypatch):
    """Sources take turns in calibration text: every fourth sequence must not be of the same one each time."""
    seen = []
    monkeypatch.setattr(gradients, "_backward_passes", lambda _, tokens, *others, **named: seen.append(tokens))
    group = ModelStructure.of(model).layers[0].group("mlp_neurons")
    tokens = torch.arange(sequences)[:, None].expand(sequences, 4)
    loss_metrics(model, [group], tokens, PruningConfig(criterion="kfac", units="mlp_neurons"))
    assert len(seen[0]) == 32
    counts = torch.bincount(seen[0][:, 0] % sources, minlength=sources)
    assert counts.min() >= 0.25 * 32 / sources
