"""The table of model types: how rows come about, and that the committed page is what they are."""

from pathlib import Path

import pytest

from hf_structprune.commands import cli
from hf_structprune.commands.models_table import (
    COLUMNS,
    Row,
    build,
    markdown,
    model_types,
    read_markdown,
    row_of,
    seeing_types,
)
from hf_structprune.errors import StructPruneError
from hf_structprune.model.structure import ModelStructure
from hf_structprune.model.towers import Towers, has_towers
from hf_structprune.proof.guarantee import has_units


PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def cells_of(text, sees=False):
    return {name: row.cells for name, row in read_markdown(text, sees).items()}


def test_a_row_says_what_is_proven_and_what_is_left_alone():
    row = row_of("bloom")
    assert row.cells == {"mlp_neurons": "proven (per layer)", "layers": "proven"}
    assert any("ALiBi" in note for note in row.notes)


def test_layouts_are_named():
    assert row_of("opt", ["kv_groups", "mlp_neurons"]).cells == {
        "kv_groups": "proven (per layer)",
        "mlp_neurons": "proven",
    }


def test_a_page_says_what_the_rows_say():
    rows = {"llama": Row({"layers": "works", "experts": "proven"}, ["a | b, left alone"]), "bert": Row()}
    text = markdown(rows)
    assert cells_of(text) == {"llama": rows["llama"].cells, "bert": {}}
    assert "experts 1" in text and "decoder layers 0" in text and "| a / b |" in text
    both = markdown(rows, {"llava": Row({"layers": "proven"})})
    assert both.startswith(text) and read_markdown(both) == read_markdown(text)
    assert cells_of(both, sees=True) == {"llava": {"layers": "proven"}}
    assert markdown(read_markdown(both), read_markdown(both, sees=True)) == both


def test_unknown_types_are_refused(capsys):
    assert cli.main(["models", "lama"]) == 2
    assert "'lama' is no model type" in capsys.readouterr().err


def test_all_types_are_tried_where_none_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("hf_structprune.commands.models_table.model_types", lambda: ["opt"])
    monkeypatch.setattr("hf_structprune.commands.models_table.seeing_types", lambda: ["git"])
    assert cli.main(["models", "--output", str(tmp_path / "models.md")]) == 0
    page = (tmp_path / "models.md").read_text()
    assert list(read_markdown(page)) == ["opt"] and cells_of(page, sees=True) == {"git": {}}


def test_rows_of_types_that_are_named_are_made_anew_in_a_page(tmp_path, capsys):
    page = tmp_path / "models.md"
    page.write_text(markdown({"opt": Row({"layers": "old"}), "zamba": Row({}, ["a; b"])}, {"llava": Row()}))
    assert cli.main(["models", "opt", "--output", str(page)]) == 0
    text = page.read_text()
    assert list(read_markdown(text)) == ["opt", "zamba"] and cells_of(text)["opt"]["layers"] == "proven"
    assert "`zamba` |  |  |  |  |  |  |  |  |  |  | a; b |" in text and list(read_markdown(text, sees=True)) == [
        "llava"
    ]
    page.write_text(text.replace("; do not edit", ".0; do not edit"))
    assert cli.main(["models", "opt", "--output", str(page)]) == 2
    assert "make it anew" in capsys.readouterr().err


@pytest.fixture(scope="module")
def page():
    return cells_of(PAGE.read_text())


@pytest.fixture(scope="module")
def seeing():
    return cells_of(PAGE.read_text(), sees=True)


def test_the_page_has_every_type(page, seeing):
    assert list(page) == model_types() and list(seeing) == seeing_types()


@pytest.mark.parametrize("name", ["qwen2_vl", "blip-2"])
def test_the_page_is_up_to_date_about_models_that_see(seeing, name):
    assert row_of(name, sees=True).cells == seeing[name]


@pytest.mark.parametrize("name", ["granite", "gpt_oss", "youtu", "bart", "olmoe"])
def test_the_page_is_up_to_date(page, name):
    assert row_of(name).cells == page[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", model_types()[::8])
def test_what_the_page_says_can_be_cut_is_found(page, name):
    """One type in eight; the whole, with every kind tried, takes half an hour: `hf-structprune models`."""
    try:
        model = build(name)
        towers = Towers(model) if has_towers(model.config) else None
        structure = ModelStructure.of(model if towers is None else towers.decoder(), towers=towers)
    except (StructPruneError, *_NOT_BUILT):
        assert page[name] == {}
        return
    assert set(page[name]) <= {kind for kind in COLUMNS if has_units(structure, kind)}


_NOT_BUILT = (ImportError, AttributeError, TypeError, KeyError, AssertionError, ValueError)
