"""The mathematics against brute force, in float64."""

import pytest
import torch

from hf_structprune import PruningConfig
from hf_structprune.refit.closed_form import DAMPINGS, DEFAULT_DAMPING, choose_damping, obs_scores, output_error, refit
from hf_structprune.refit.reader import TokenWeights, damping_for
from hf_structprune.stats.moments import InputStatistics


OUT, WIDTH, SAMPLES = 7, 12, 50


def problem(seed=0, width=WIDTH, samples=SAMPLES):
    """A weight, correlated inputs (rows) and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, width, generator=generator, dtype=torch.float64) @ mixing + 0.5
    return weight, inputs, inputs.T @ inputs / samples


def ridge_by_least_squares(weight, inputs, kept, lam, outputs):
    """`min E||y - W' x_K||^2 + lam ||W' - W_K||^2` as one least-squares problem."""
    rows = torch.cat([inputs[:, kept] / len(inputs) ** 0.5, lam**0.5 * torch.eye(len(kept), dtype=torch.float64)])
    right = torch.cat([outputs / len(inputs) ** 0.5, lam**0.5 * weight[:, kept].T])
    return torch.linalg.lstsq(rows, right).solution.T


@pytest.mark.parametrize("damping", [0.001, 0.1, 1.0])
@pytest.mark.parametrize("kept", [[0, 2, 3, 7, 11], [5], list(range(11))])
def test_refit_solves_the_ridge_problem(kept, damping):
    weight, inputs, gram = problem()
    kept = torch.tensor(kept)
    lam = damping * gram.diagonal().mean()
    expected = ridge_by_least_squares(weight, inputs, kept, lam, inputs @ weight.T)
    torch.testing.assert_close(refit(weight, gram, kept, damping), expected, rtol=1e-9, atol=1e-10)


def test_refit_towards_a_target_solves_the_ridge_problem_of_the_changed_outputs():
    weight, inputs, gram = problem()
    kept = torch.tensor([1, 4, 5, 8])
    change = torch.randn(SAMPLES, OUT, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    lam = 0.1 * gram.diagonal().mean()
    expected = ridge_by_least_squares(weight, inputs, kept, lam, inputs @ weight.T + change)
    got = refit(weight, gram, kept, 0.1, target=change.T @ inputs / SAMPLES)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_refit_equals_the_optimal_brain_surgeon_update():
    weight, _, gram = problem()
    kept, gone = torch.tensor([0, 1, 5, 6, 9]), torch.tensor([2, 3, 4, 7, 8, 10, 11])
    inverse = torch.linalg.inv(gram + 0.1 * gram.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64))
    update = weight[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
    expected = weight - update
    assert expected[:, gone].abs().max() < 1e-10
    torch.testing.assert_close(refit(weight, gram, kept, 0.1), expected[:, kept], rtol=1e-9, atol=1e-10)


def test_refit_of_everything_changes_nothing():
    weight, _, gram = problem()
    assert torch.equal(refit(weight, gram, torch.arange(WIDTH), 0.1), weight)


def test_strong_damping_keeps_the_original_weights():
    weight, _, gram = problem()
    kept = torch.arange(6)
    torch.testing.assert_close(refit(weight, gram, kept, 1e9), weight[:, kept], rtol=0, atol=1e-6)


def test_refit_lowers_the_output_error():
    weight, _, gram = problem()
    kept = torch.arange(6)
    refitted = refit(weight, gram, kept, 0.01)
    assert output_error(weight, refitted, gram, kept) < output_error(weight, weight[:, kept], gram, kept) / 2


def test_output_error_is_the_mean_over_samples():
    weight, inputs, gram = problem()
    kept = torch.tensor([1, 2, 6, 10])
    other = torch.randn(OUT, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = sum(float(((weight @ x - other @ x[kept]) ** 2).sum()) for x in inputs) / SAMPLES
    assert output_error(weight, other, gram, kept) == pytest.approx(expected, rel=1e-12)


def test_output_error_with_a_target_leaves_out_its_own_square():
    weight, inputs, gram = problem()
    kept = torch.tensor([1, 2, 6, 10])
    targets = torch.randn(SAMPLES, OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    refitted = weight[:, kept] * 0.9
    errors = [((weight @ x + t - refitted @ x[kept]) ** 2).sum() - (t**2).sum() for x, t in zip(inputs, targets)]  # noqa: B905
    got = output_error(weight, refitted, gram, kept, targets.T @ inputs / SAMPLES)
    assert got == pytest.approx(float(sum(errors)) / SAMPLES, rel=1e-10)


def removal_error(weight, hessian, gone):
    """Least output error of all weights without the columns `gone`, by solving for them."""
    left = [i for i in range(weight.shape[1]) if i not in gone]
    changed = torch.zeros_like(weight)
    if left:
        root = torch.linalg.cholesky(hessian).T  # ||root @ (w - w')||^2 is the error of one row
        changed[:, left] = torch.linalg.lstsq(root[:, left], root @ weight.T).solution.T
    difference = weight - changed
    return float(((difference @ hessian) * difference).sum())


def greedy_by_hand(weight, gram, index, damping, drop, blocks=1, chunk=1):
    """`chunk` units at a time, each the one that costs least when the rest is re-fitted."""
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    units = len(index)
    gone, scores, level = [], {}, 0.0
    quota = [drop // blocks] * blocks
    while drop > 0:
        columns = [c for u in gone for c in index[u].tolist()]
        base = removal_error(weight, hessian, columns)
        errors = {
            u: removal_error(weight, hessian, columns + index[u].tolist()) - base
            for u in range(units) if u not in gone and quota[u * blocks // units] > 0
        }  # fmt: skip
        chosen = sorted(errors, key=errors.get)[: min(chunk, drop)]
        for u in chosen:
            scores[u] = max(level, errors[u])
            quota[u * blocks // units] -= 1
        level = max(scores[u] for u in chosen)
        gone += chosen
        drop -= len(chosen)
    return scores


@pytest.mark.parametrize("seed", range(3))
def test_obs_of_single_columns_is_the_exact_rise_of_the_error(seed):
    weight, _, gram = problem(seed)
    index = torch.arange(WIDTH)[:, None]
    expected = greedy_by_hand(weight, gram, index, 0.01, drop=8)
    scores = obs_scores(weight, gram, index, 0.01, drop=8)
    got = dict(enumerate(scores.tolist()))
    assert {u: got[u] for u in expected} == pytest.approx(expected, rel=1e-7)
    assert min(got[u] for u in got if u not in expected) > max(expected.values())


@pytest.mark.parametrize("seed", range(3))
def test_obs_of_heads_goes_one_by_one(seed):
    weight, _, gram = problem(seed)
    index = torch.arange(WIDTH).view(4, 3)
    expected = greedy_by_hand(weight, gram, index, 0.1, drop=3)
    scores = obs_scores(weight, gram, index, 0.1)  # all but one
    assert {u: float(scores[u]) for u in expected} == pytest.approx(expected, rel=1e-7)
    last = ({0, 1, 2, 3} - set(expected)).pop()
    assert scores.argmax() == last


def test_obs_of_many_columns_goes_in_sixteen_chunks():
    weight, _, gram = problem(width=40, samples=200)
    index = torch.arange(40)[:, None]
    expected = greedy_by_hand(weight, gram, index, 0.01, drop=32, chunk=2)
    scores = obs_scores(weight, gram, index, 0.01, drop=32)
    assert {u: float(scores[u]) for u in expected} == pytest.approx(expected, rel=1e-6)


def test_obs_takes_equally_many_units_from_every_block():
    weight, _, gram = problem()
    index = torch.arange(WIDTH).view(6, 2)
    weight[:, :6] *= 1e-3  # without the quota all units of the first block would go first
    expected = greedy_by_hand(weight, gram, index, 0.1, drop=4, blocks=2)
    scores = obs_scores(weight, gram, index, 0.1, drop=4, blocks=2)
    assert {u: float(scores[u]) for u in expected} == pytest.approx(expected, rel=1e-7)
    assert sorted(u // 3 for u in expected) == [0, 0, 1, 1]
    assert set(scores.argsort()[:4].tolist()) == set(expected)


def test_obs_reads_units_whose_columns_are_scattered():
    weight, _, gram = problem()
    index = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3)).view(4, 3)
    expected = greedy_by_hand(weight, gram, index, 0.1, drop=2)
    scores = obs_scores(weight, gram, index, 0.1, drop=2)
    assert {u: float(scores[u]) for u in expected} == pytest.approx(expected, rel=1e-7)


def test_obs_leaves_its_arguments_alone():
    weight, _, gram = problem()
    before = weight.clone(), gram.clone()
    obs_scores(weight, gram, torch.arange(WIDTH)[:, None], 0.1)
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


def moments(inputs):
    """Held-out and fitted moments of 64 short sequences, as calibration computes them."""
    statistics = InputStatistics(inputs.shape[-1], gram=True)
    statistics.update(inputs)
    return statistics.fit, statistics.held_out


@pytest.mark.parametrize("tokens, noise", [(1, 0.3), (2, 0.3), (4, 0.1), (32, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_chosen_damping_is_the_minimum_over_the_grid(seed, tokens, noise):
    weight, inputs, _ = problem(seed, width=24, samples=64 * tokens)
    inputs = inputs + noise * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed))
    fit, held_out = moments(inputs.view(64, tokens, 24))
    kept = torch.arange(0, 24, 2)
    errors = {}
    for damping in DAMPINGS:
        refitted = refit(weight, fit.gram, kept, damping)
        errors[damping] = output_error(weight, refitted, held_out.gram.double(), kept)
    assert choose_damping(weight.float(), fit, held_out, kept) == min(errors, key=errors.get)


def test_little_text_gets_more_damping_than_much():
    chosen = []
    for tokens in (1, 64):
        weight, inputs, _ = problem(0, width=48, samples=64 * tokens)
        fit, held_out = moments(inputs.view(64, tokens, 48))
        chosen.append(choose_damping(weight.float(), fit, held_out, torch.arange(40)))
    assert chosen[0] > chosen[1]


def test_tokens_count_by_what_the_next_norm_divides_by_relative_to_the_first_batch():
    weights = TokenWeights()
    assert weights(torch.ones(1, 3, 4)).tolist() == [[1, 1, 1]]
    assert weights(2 * torch.ones(1, 2, 4)).tolist() == [[0.5, 0.5]]
    assert weights(torch.ones(1, 1, 4), torch.full((1, 1, 1), 3.0)).tolist() == [[9.0]]  # a norm comes before


def test_the_damping_is_the_configured_one_or_suits_what_is_held_out():
    weight, inputs, _ = problem(0, width=48, samples=64 * 64)
    kept, few = torch.arange(40), moments(inputs[: 3 * 64].view(3, 64, 48))
    much = moments(inputs.view(64, 64, 48))
    chosen = choose_damping(weight.float(), *much, kept)
    assert damping_for(weight, *much, kept, PruningConfig()) == chosen != DEFAULT_DAMPING
    assert damping_for(weight, *much, kept, PruningConfig(damping=0.7)) == 0.7
    assert damping_for(weight, *few, kept, PruningConfig()) == DEFAULT_DAMPING
