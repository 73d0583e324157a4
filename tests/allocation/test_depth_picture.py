import pytest
import torch


pytest.importorskip("matplotlib")

from hf_structprune.criteria.depth import LayerSimilarities  # noqa: E402
from hf_structprune.errors import ConfigurationError  # noqa: E402
from hf_structprune.evaluation.pictures import distances_figure, save  # noqa: E402


def example(layers):
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(layers + 1, generator=generator, dtype=torch.float64) / layers
    places = steps.cumsum(0)
    return LayerSimilarities((places[:, None] - places).abs(), {}, {})


@pytest.mark.parametrize("layers", [2, 30, 80])
def test_every_block_has_its_cell_and_the_best_of_each_size_its_dot(layers):
    found = example(layers)
    axis, bar = distances_figure(found).axes
    cells = axis.images[0].get_array()
    assert cells.shape == (layers - 1, layers - 1) and int((~cells.mask).sum()) == layers * (layers - 1) // 2
    for size in range(1, layers):
        for start, _, distance in found.blocks(size):
            assert cells[size - 1, start - 1] == pytest.approx(distance)
    dots = axis.collections[0].get_offsets()
    expected = [(found.best_block(size)[0], size) for size in range(1, layers)]
    assert [tuple(map(int, dot)) for dot in dots] == expected
    assert axis.get_xlabel() and axis.get_ylabel() and bar.get_ylabel()


def test_the_same_distances_give_the_same_png(tmp_path):
    save(distances_figure(example(30)), tmp_path / "a.png")
    save(distances_figure(example(30)), tmp_path / "b.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and content == (tmp_path / "b.png").read_bytes()


def test_one_layer_gives_no_picture():
    with pytest.raises(ConfigurationError, match="one layer"):
        distances_figure(example(1))
