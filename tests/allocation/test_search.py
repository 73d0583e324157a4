import itertools

import families
import torch

from hf_structprune.allocation.widths import Budget, allocate
from hf_structprune.config import PruningConfig
from hf_structprune.model.structure import ModelStructure
from hf_structprune.plan import PruningPlan


def test_search_is_as_good_as_trying_everything():
    """Greedy against brute force over all widths (multiples of 8) that remove as much."""
    structure = ModelStructure.of(families.make_model("llama", torch.float32))
    config = PruningConfig(units="mlp_neurons", allocation="search", layout="per_layer", round_to=8)
    cost = {(0, "mlp_neurons"): 4.0, (1, "mlp_neurons"): 1.0, (2, "mlp_neurons"): 2.5}
    unit = structure.layers[0].group("mlp_neurons").cost
    steps = 7  # of 8 neurons each
    ratio = steps * 8 * unit / structure.total_parameters
    counts = allocate(Budget(structure, config), ratio, sensitivity=cost)
    widths = [counts.get((layer, "mlp_neurons"), 48) for layer in range(3)]

    def total(kept):
        return sum(cost[layer, "mlp_neurons"] * ((48 - width) / 48) ** 2 for layer, width in enumerate(kept))

    choices = [kept for kept in itertools.product(range(16, 49, 8), repeat=3) if sum(kept) == 3 * 48 - steps * 8]
    assert sum(widths) == 3 * 48 - steps * 8
    assert total(widths) == min(map(total, choices))
    plan = PruningPlan.from_counts(structure, counts, model_type="llama", layout="per_layer")
    assert abs(plan.ratio - ratio) < 1e-12


def test_search_goes_beyond_two_thirds_only_if_it_must():
    structure = ModelStructure.of(families.make_model("llama", torch.float32))
    config = PruningConfig(units="mlp_neurons", allocation="search", layout="per_layer", round_to=1)
    cost = {(0, "mlp_neurons"): 1e6, (1, "mlp_neurons"): 1.0, (2, "mlp_neurons"): 1.0}
    unit = structure.layers[0].group("mlp_neurons").cost
    for neurons in (60, 64, 110, 140):
        counts = allocate(Budget(structure, config), neurons * unit / structure.total_parameters, sensitivity=cost)
        gone = [48 - counts.get((layer, "mlp_neurons"), 48) for layer in range(3)]
        assert sum(gone) == neurons
        assert (max(gone) <= 32) == (neurons <= 96)
