"""What is in the pictures, and that the files are what they should be."""

import math
import sys

import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection

from hf_structprune import installed
from hf_structprune.criteria.depth import LayerSimilarities
from hf_structprune.errors import ConfigurationError, StructPruneError
from hf_structprune.evaluation import pictures
from hf_structprune.evaluation.results import EvaluationResult, Figure, Parts
from hf_structprune.plan import Decision, PruningPlan, decisions_of


HALVES = ("attention sublayers", "MLP sublayers")


@pytest.fixture
def plan():
    groups = [
        Decision("mlp_neurons", 1, 64, 48),
        Decision("mlp_neurons", 2, 64, 32),
        Decision("kv_groups", 2, 4, 3),
    ]
    return PruningPlan(0.2, "llama", "per_layer", groups, 1000, 800, 900, 700, 10, 8, 2.0)


def make(state, model, parameters, perplexity, speed=1.0, windows=6, **extra):
    result = EvaluationResult(model, state)
    result.add(
        Figure("perplexity/sample", perplexity, "", 0.5, False, f"{windows} windows"),
        Figure("efficiency/parameters", parameters, "", None, False),
        Figure("efficiency/decode_throughput", 100 * speed, "tokens/s", None, True),
        Figure("efficiency/peak_memory", 2 * parameters, "B", None, False),
    )
    result.add(*[Figure(f"tasks/{task}/acc", value, "", None, True) for task, value in extra.items()])
    return result


@pytest.fixture
def results():
    return [
        make("dense", "d", 100e6, 18.0),
        make("pruned", "p20", 80e6, 20.0, 1.25),
        make("pruned", "p30", 70e6, 30.0),
    ]


def heights(container):
    return [bar.get_height() for bar in container]


def test_widths(plan):
    axes = pictures.widths_figure(plan).axes
    assert [axis.get_ylabel() for axis in axes] == ["KV groups", "MLP neurons"]
    assert [heights(container) for container in axes[0].containers] == [[4, 4, 4], [4, 4, 3]]
    assert [heights(container) for container in axes[1].containers] == [[64, 64, 64], [64, 48, 32]]
    assert "20.0 % of all parameters" in axes[0].get_title(loc="left")
    assert len(pictures.widths_figure(plan, num_layers=5).axes[0].containers[0]) == 5


def test_widths_of_what_is_dropped(plan):
    plan.num_layers = 5
    hidden = Decision("hidden", None, 32, 24)
    plan.decisions = decisions_of(plan.groups, {"layers": [0], "attention": [3]}, [hidden], 5)
    axes = pictures.widths_figure(plan).axes
    assert [axis.get_ylabel() for axis in axes] == ["KV groups", "MLP neurons", *HALVES, "hidden size"]
    kept = [heights(axis.containers[1]) for axis in axes]
    assert kept == [[0, 4, 3, 0, 4], [0, 48, 32, 64, 64], [0, 1, 1, 0, 1], [0, 1, 1, 1, 1], [24] * 5]
    plan.decisions = [one for one in plan.decisions if one.layer is None]
    assert len(pictures.widths_figure(plan).axes) == 3


def test_quality(results):
    (axis,) = pictures.quality_figure(results).axes
    points = [tuple(c.get_offsets()[0].tolist()) for c in axis.collections if isinstance(c, PathCollection)]
    assert points == [(100.0, 18.0), (80.0, 20.0), (70.0, 30.0)]
    assert [text.get_text() for text in axis.texts] == ["dense", "pruned p20", "pruned p30"]
    assert any(line.get_linestyle() == "--" and set(line.get_ydata()) == {18.0} for line in axis.get_lines())
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("parameters (M)", "perplexity, sample ↓")
    assert axis.get_yscale() == "linear"


def test_quality_of_a_task_and_far_apart_perplexities():
    dense, pruned = make("dense", "d", 9e6, 9.0, boolq=0.6), make("pruned", "p", 8e6, 900.0, boolq=0.5)
    (axis,) = pictures.quality_figure([dense, pruned], "tasks/boolq/acc").axes
    assert [c.get_offsets()[0].tolist() for c in axis.collections] == [[9.0, 60.0], [8.0, 50.0]]
    assert axis.get_ylabel() == "boolq, acc ↑ (%)"
    assert pictures.quality_figure([dense, pruned]).axes[0].get_yscale() == "log"


def test_bars_are_of_the_difference_where_there_are_pairs():
    def add_tasks(parts, spread):
        results = [make(*model) for model in (("dense", "d", 9e6, 9.0), ("pruned", "p", 8e6, 9.0))]
        for result, sums in zip(results, parts, strict=True):
            kept = Parts.of("k", sums) if spread else None
            result.add(Figure("tasks/qa/f1", sum(sums) / 40, "", 0.2, True, parts=kept))
        (axis,) = pictures.quality_figure(results, "tasks/qa/f1").axes
        bars = [line for line in axis.collections if isinstance(line, LineCollection)]
        return [bar.get_segments()[0][:, 1].tolist() for bar in bars], axis.get_title(loc="left") + axis.get_title()

    base = [0.9, 0.1] * 20
    lower = [value - 0.05 - 0.01 * (i % 4 > 1) for i, value in enumerate(base)]
    found, title = add_tasks((base, lower), True)
    assert len(found) == 1 and "95 % intervals of the paired difference" in title
    middle, half = 100 * (0.5 - 0.055), 100 * 2 * math.sqrt(40 / 39 * 40 * 0.005**2) / 40
    assert found[0] == pytest.approx([middle - half, middle + half])
    found, title = add_tasks((base, lower), False)
    assert found == [pytest.approx([10, 90]), pytest.approx([4.5, 84.5])] and "of each model alone" in title


def test_quality_measured_otherwise_is_left_out(results):
    (axis,) = pictures.quality_figure([*results, make("recovered", "r", 70e6, 19.0, windows=1)]).axes
    assert [text.get_text() for text in axis.texts] == ["dense", "pruned p20", "pruned p30"]
    with pytest.raises(ConfigurationError, match="1 of the results"):
        pictures.quality_figure([results[0], make("pruned", "p", 70e6, 19.0, windows=1)])


def test_speed(results):
    (axis,) = pictures.speed_figure(results).axes
    assert [heights(container) for container in axis.containers] == [[1.25, 0.8], pytest.approx([1.0, 0.7])]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert [" ".join(label.split()) for label in labels] == ["decode throughput ↑", "peak memory ↓"]
    (legend,) = axis.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "pruned p20", "pruned p30"]


def test_files_are_png_with_the_same_bytes_each_time(plan, results, tmp_path):
    """And pyplot, which keeps figures, stays out."""
    sys.modules.pop("matplotlib.pyplot", None)
    drawn = pictures.draw_all(results, tmp_path, plan)
    assert [path.name for path in drawn] == ["widths.png", "quality.png", "speed.png"]
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and b"Software" not in content and b"tEXt" not in content
    pictures.save(pictures.widths_figure(plan), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == drawn[0].read_bytes()
    assert "matplotlib.pyplot" not in sys.modules


def test_only_what_there_is_is_drawn(plan, results, tmp_path):
    assert [path.name for path in pictures.draw_all(results[:1], tmp_path, plan)] == ["widths.png"]
    sizes = [make("dense", "d", 9e6, math.inf), make("pruned", "p", 8e6, math.inf)]
    assert [path.name for path in pictures.draw_all(sizes, tmp_path)] == ["speed.png"]
    with pytest.raises(ConfigurationError, match="Nothing can be drawn"):
        pictures.draw_all(results[:1], tmp_path)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: pictures.widths_figure(PruningPlan(0, "x", "uniform", [], 1, 1, 1, 1, 1, 1, 2.0)), "cuts nothing"),
        (lambda: pictures.speed_figure([EvaluationResult("d"), EvaluationResult("p")]), "No speed"),
        (lambda: pictures.quality_figure([EvaluationResult("d"), EvaluationResult("p")]), "No perplexity"),
    ],
)
def test_nothing_to_draw(build, match):
    with pytest.raises(ConfigurationError, match=match):
        build()


def test_missing_extra_is_named(plan, monkeypatch):
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(StructPruneError, match=r"hf-structprune\[report\]"):
        pictures.widths_figure(plan)


def example(layers):
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(layers + 1, generator=generator, dtype=torch.float64) / layers
    places = steps.cumsum(0)
    return LayerSimilarities((places[:, None] - places).abs(), {}, {})


@pytest.mark.parametrize("layers", [2, 30])
def test_every_block_has_its_cell_and_the_best_of_each_size_its_dot(layers):
    found = example(layers)
    axis, bar = pictures.distances_figure(found).axes
    cells = axis.images[0].get_array()
    assert cells.shape == (layers - 1, layers - 1) and int((~cells.mask).sum()) == layers * (layers - 1) // 2
    for size in range(1, layers):
        for start, _, distance in found.blocks(size):
            assert cells[size - 1, start - 1] == pytest.approx(distance)
    dots = axis.collections[0].get_offsets()
    expected = [(found.best_block(size)[0], size) for size in range(1, layers)]
    assert [tuple(map(int, dot)) for dot in dots] == expected
    assert axis.get_xlabel() and axis.get_ylabel() and bar.get_ylabel()


def test_one_layer_gives_no_picture():
    with pytest.raises(ConfigurationError, match="one layer"):
        pictures.distances_figure(example(1))
