"""Levels of groups, the choice among them, and the exchange that follows."""

import json
import random
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.allocation import evolution
from hf_structprune.allocation.exchange import Evolution, Exchange, Options, cheapest
from hf_structprune.allocation.levels import on_power_law, size_of_levels
from hf_structprune.errors import ConfigurationError, PlaceError, RatioError
from hf_structprune.files import writing
from hf_structprune.model.structure import ModelStructure


TOKENS = torch.randint(0, 128, (16, 24), generator=torch.Generator().manual_seed(0))


def configured(**options):
    options = {"search_evaluations": 22, "units": ("mlp_neurons", "kv_groups"), **options}
    calibration = CalibrationConfig(tokens=TOKENS, batch_size=4)
    return PruningConfig(layout="per_layer", allocation="evolution", calibration=calibration, **options)


def widths(plan):
    return {(group.layer, group.kind): group.keep for group in plan.groups}


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_programming_finds_what_trying_all_finds(seed):
    chance = random.Random(seed)
    costs = [[0.0, *sorted(chance.random() for _ in range(3))] for _ in range(4)]
    gone = [[0, *sorted(chance.sample(range(1, 30), 3))] for _ in range(4)]
    most, slack = 50, 6

    def total(choice, rows):
        return sum(row[level] for row, level in zip(rows, choice, strict=True))

    fitting = [c for c in product(range(4), repeat=4) if most - slack <= total(c, gone) <= most]
    found = cheapest(Options(costs, gone), most, slack)
    assert tuple(found) in fitting
    assert total(found, costs) == pytest.approx(min(total(c, costs) for c in fitting), abs=1e-12)


def test_more_than_all_levels_take_is_refused():
    with pytest.raises(RatioError, match="95 to 100"):
        cheapest(Options([[0.0, 1.0]], [[0, 60]]), 100, 5)


def test_costs_between_those_that_were_measured_follow_a_power_law():
    shares = [0.0, 0.1, 0.2, 0.4, 0.8]
    wanted = [0.0, *(3 * share**1.7 for share in shares[1:])]
    found = on_power_law(shares, {2: wanted[2], 4: wanted[4]})
    assert found[2:] == pytest.approx(wanted[2:])
    assert found[1] == pytest.approx(wanted[2] / 4)  # below the first: squares


def test_what_is_exchanged_keeps_the_parameters():
    exchange = Exchange(Options([], [[0, 10, 20, 30], [0, 10, 20, 30], [0, 4, 8]]), 40, 10)
    chance, choice = random.Random(0), [1, 2, 1]
    seen = set()
    for _ in range(200):
        other = exchange.other(choice, chance)
        if other is not None:
            assert exchange.fits(other) and other != choice
            seen.add(tuple(other))
    assert len(seen) > 5


def test_the_exchange_finds_the_best_of_few():
    gone = [[0, 1, 2, 3]] * 6
    best = [3, 0, 3, 0, 3, 0]

    def measure(choice, batches):
        return sum((a - b) ** 2 for a, b in zip(choice, best, strict=True))

    search = Evolution(Exchange(Options([], gone), 9, 0), measure, 4, 0, [1, 2, 1, 2, 1, 2])
    for _ in range(30):
        search.step()
    assert search.parent == best


def test_a_plan_is_repeated_and_gone_on_with_and_the_model_stays(tiny_llama, tmp_path):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    whole = StructuredPruner(tiny_llama, configured(search_evaluations=44, levels=str(tmp_path / "a"))).plan(0.15)
    assert abs(whole.ratio - 0.15) < 0.01 and len(set(widths(whole).values())) > 1
    assert "44 models were measured" in whole.reasons[-1]
    again = StructuredPruner(tiny_llama, configured(search_evaluations=44)).plan(0.15)  # a folder for the one run
    assert widths(again) == widths(whole)
    half = configured(search_evaluations=22, levels=str(tmp_path / "b"))
    StructuredPruner(tiny_llama, half).plan(0.15)
    assert json.loads((tmp_path / "b" / "search.json").read_text())["evaluations"] == 22
    rest = configured(search_evaluations=44, levels=str(tmp_path / "b"))
    assert widths(StructuredPruner(tiny_llama, rest).plan(0.15)) == widths(whole)
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_another_ratio_and_an_interrupted_run_compute_no_level_twice(tiny_llama, tmp_path, monkeypatch):
    config = configured(levels=str(tmp_path))
    StructuredPruner(tiny_llama, config).plan(0.15)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("layer-*")}
    assert len(times) == 3
    StructuredPruner(tiny_llama, config).plan(0.05)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("layer-*")} == times
    (tmp_path / "layer-00001.safetensors").unlink()  # as if it had been stopped before
    StructuredPruner(tiny_llama, config).plan(0.05)
    changed = {n for n, t in times.items() if (tmp_path / n).stat().st_mtime_ns != t}
    assert changed == {"layer-00001.safetensors"}


def test_a_level_is_the_refit_of_the_one_reader(tiny_llama, tmp_path):
    """All of a reader's columns at a level, put into the model, give the cost that is written down."""
    config = configured(units=("mlp_neurons",), damping=0.1, levels=str(tmp_path))
    StructuredPruner(tiny_llama, config).plan(0.1)
    names = sorted(safe_open(tmp_path / "layer-00000.safetensors", "pt").keys())
    with safe_open(tmp_path / "layer-00000.safetensors", "pt") as file:
        kept = {name.split(".")[1]: file.get_tensor(name) for name in names if name.endswith("columns")}
        weights = {name.split(".")[1]: file.get_tensor(name) for name in names if name.endswith("weight")}
    for count, columns in kept.items():
        assert len(columns) == int(count) and weights[count].shape == (32, int(count))
    sets = [set(kept[count].tolist()) for count in sorted(kept, key=int)]
    assert all(small <= large for small, large in zip(sets, sets[1:], strict=False))  # one order for all
    costs = json.loads((tmp_path / "levels.json").read_text())["layers"]["0"]["mlp_neurons"]
    assert costs == sorted(costs) and costs[0] == 0


def test_levels_that_the_disk_has_no_room_for_are_refused(tiny_llama, tmp_path, monkeypatch):
    pruner, folder = StructuredPruner(tiny_llama, configured(levels=str(tmp_path / "levels"))), tmp_path / "levels"
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(PlaceError, match="levels.* needs .*B, but the disk has 1.00kB left"):
            pruner.plan(0.15)
    assert not folder.exists()
    pruner.plan(0.15)
    written = 0
    for path in folder.glob("layer-*"):
        with safe_open(path, "pt") as file:
            written += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    counts = {}
    for path in folder.glob("layer-*"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                kind, count, what = name.split(".")
                if what == "weight":
                    counts.setdefault((int(path.stem.split("-")[1]), kind), []).append(int(count))
    groups = {group.key: group for group in ModelStructure.of(tiny_llama).groups}
    assert written == sum(size_of_levels(tiny_llama, groups[key], left) for key, left in counts.items())


def test_the_end_is_never_worse_than_the_beginning(tiny_llama, monkeypatch):
    """Text that flatters the offspring does not count in the end."""
    monkeypatch.setattr(evolution.Evolution, "step", lambda self: setattr(self, "parent", self.parent[::-1]))
    found = []
    search = evolution.search

    def seen(*args):
        found.append(search(*args))
        return found[0]

    monkeypatch.setattr(evolution, "search", seen)
    StructuredPruner(tiny_llama, configured(search_minutes=1e-9, search_evaluations=None)).plan(0.15)
    assert found[0].ended <= found[0].begun


def test_levels_of_something_else_are_refused(tiny_llama, tmp_path):
    config = configured(levels=str(tmp_path))
    StructuredPruner(tiny_llama, config).plan(0.1)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.down_proj.weight.add_(0.1)
    with pytest.raises(ConfigurationError, match="another model, other text"):
        StructuredPruner(tiny_llama, config).plan(0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"units": ("hidden", "mlp_neurons")}, "cut 'hidden' first"),
        ({"units": ("layers", "mlp")}, "leave it out, depth_criterion='exchange'"),
        ({"units": ("mlp_neurons", "query_heads")}, "does not split query heads"),
        ({"units": ("mlp_neurons", "layers"), "num_layers": 2}, "`num_layers` and allocation='evolution'"),
        ({"units": ("experts",), "merge_experts": True}, "`merge_experts` and allocation='evolution'"),
        ({"mlp_ratio": 0.2, "units": ("mlp_neurons",)}, "`mlp_ratio` and allocation='evolution'"),
        ({"iterative_steps": 2}, "`iterative_steps` and allocation='evolution'"),
    ],
)
def test_options_that_go_against_it(options, message):
    with pytest.raises(ConfigurationError, match=message):
        configured(**options)


def test_options_of_it_alone():
    with pytest.raises(ConfigurationError, match="`levels` is given, but `allocation` is 'uniform'"):
        PruningConfig(levels="somewhere")
