"""The units that stay are the best ones, evenly over the blocks."""

import torch

from hf_structprune.criteria.base import best_units
from hf_structprune.model.structure import Group, Slice


def group(units, blocks=1):
    part = Slice("m.weight", 1, torch.arange(units)[:, None])
    return Group("mlp_neurons", 0, units, (part,), part, "m", (), blocks, 1, 1)


def test_the_highest_scores_stay_in_ascending_order():
    scores = torch.tensor([0.1, 0.9, 0.3, 0.7, 0.5])
    assert best_units(scores, group(5), 3).tolist() == [1, 3, 4]


def test_equal_scores_keep_the_lower_number():
    assert best_units(torch.ones(6), group(6), 2).tolist() == [0, 1]
    assert best_units(torch.tensor([1.0, 2.0, 1.0, 2.0]), group(4), 3).tolist() == [0, 1, 3]


def test_everything_stays_if_so_many_are_kept():
    assert best_units(torch.tensor([3.0, 1.0, 2.0]), group(3), 3).tolist() == [0, 1, 2]


def test_every_block_keeps_equally_many_whatever_its_scores():
    scores = torch.tensor([9.0, 8.0, 7.0, 0.1, 0.3, 0.2])
    assert best_units(scores, group(6, blocks=2), 4).tolist() == [0, 1, 4, 5]


def test_only_blocks_that_are_alive_keep_units():
    scores = torch.tensor([9.0, 8.0, 1.0, 2.0, 5.0, 4.0])
    assert best_units(scores, group(6, blocks=3), 2, torch.tensor([1, 2])).tolist() == [3, 4]
    assert best_units(scores, group(6, blocks=3), 4, torch.tensor([0, 2])).tolist() == [0, 1, 4, 5]


def test_scores_are_not_changed_and_may_be_half_precision():
    scores = torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert best_units(scores, group(3), 1).tolist() == [1]
    assert scores.tolist() == [1.0, 3.0, 2.0]
