"""How many matrices of width x width are in memory when units are ranked and the map that reads them is re-fitted."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hf_structprune import PruningConfig
from hf_structprune.refit import closed_form
from hf_structprune.refit.layer_by_layer import MATRICES
from hf_structprune.refit.reader import refitted
from hf_structprune.stats import moments
from hf_structprune.stats.moments import InputStatistics


WIDTH, OUT = 512, 4


def peak(run) -> float:
    """Most memory that is allocated at once while something runs, in float32 matrices of this width."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    now = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / (WIDTH**2 * 4)


@pytest.fixture
def statistics(monkeypatch) -> InputStatistics:
    # In proportion to the width as they are in models: blocks are a small part of it.
    monkeypatch.setattr(moments, "_BLOCK", 32)
    monkeypatch.setattr(closed_form, "_ROWS", 32)
    generator = torch.Generator().manual_seed(0)
    found = InputStatistics(WIDTH, True, OUT)
    for _ in range(2):
        found.update(*(torch.randn(8, 4, size, generator=generator) for size in (WIDTH, OUT)))
    return found


def test_sums_take_a_matrix_for_both_parts(statistics):
    sums = [block for part in (statistics.fit, statistics.held_out) for block in part.lower]
    assert sum(block.numel() for block in sums) / WIDTH**2 < 1.1


@torch.no_grad()
def test_ranking_and_refit_stay_below_what_is_stated(statistics):
    reader, config = torch.nn.Linear(WIDTH, OUT, bias=False), PruningConfig()
    units = torch.arange(WIDTH)[:, None]

    def rank():
        gram = statistics.moments.matrix(torch.float64)
        closed_form.obs_scores(reader.weight, gram, units, drop=WIDTH // 5, overwrite=True)

    sums = 1.07  # which were there before
    assert sums + peak(rank) < MATRICES - 0.5
    for kept in (torch.arange(WIDTH * 4 // 5), torch.arange(WIDTH)):
        assert sums + peak(lambda kept=kept: refitted(reader, statistics, kept, config)) < MATRICES


def test_matrices_are_written_over_only_where_that_is_said():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 24, generator=generator, dtype=torch.float64)
    gram, weight, kept = x.T @ x, torch.randn(3, 24, generator=generator), torch.arange(0, 24, 2)
    before = gram.clone()
    units = torch.randperm(24, generator=generator).view(-1, 2)
    scores = closed_form.obs_scores(weight, gram, units)
    refit = closed_form.refit(weight, gram, kept, 0.1)
    assert torch.equal(gram, before)
    assert torch.equal(closed_form.obs_scores(weight, before, units, overwrite=True), scores)
    matrix = gram[kept][:, kept]
    matrix.diagonal().add_(closed_form.ridge(gram, 0.1))
    others = torch.arange(1, 24, 2)
    right = weight.double()[:, others] @ gram[others][:, kept]
    expected = weight.double()[:, kept] + torch.cholesky_solve(right.T, torch.linalg.cholesky(matrix)).T
    assert torch.equal(refit, expected)
