"""The sweep over all model types: a few of them, and what it does about a type that ends, hangs or is done already."""

import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).parents[1] / "stress"))

import sweep_model_types as sweeping  # noqa: E402
from sweep_model_types import CRASH, REFUSED, RIGHT, TOOK, TYPES, WRONG  # noqa: E402


@pytest.mark.parametrize(
    ("model_type", "right", "refused"),
    [
        ("olmoe", {"experts", "kv_groups"}, set()),
        ("falcon_h1", {"kv_groups"}, set()),  # which fills in a buffer when it is loaded
        ("gpt2", {"mlp_neurons"}, {"head_dim"}),
        ("openai-gpt", {"layers"}, set()),  # which put out lists
        ("mistral3", {"mlp_neurons"}, {"hidden"}),  # which what it sees is written into
    ],
)
def test_a_type_is_right_or_refused(model_type, right, refused):
    rows = []
    sweeping.sweep(model_type, rows.append, {*right, *refused})
    found = {kind: outcome for kind, outcome, _ in rows}
    assert found == dict.fromkeys(right, RIGHT) | dict.fromkeys(refused, REFUSED)


def test_a_checkpoint_that_holds_something_else_is_wrong(monkeypatch):
    def save(pruner, folder):
        other = copy.deepcopy(pruner.model)
        other.get_input_embeddings().weight.data.mul_(2)
        other.save_pretrained(folder)

    monkeypatch.setattr(sweeping.StructuredPruner, "save_pretrained", save)
    rows = []
    sweeping.sweep("gpt2", rows.append, ["mlp_neurons"])
    assert rows == [("mlp_neurons", WRONG, "the loaded model gives other logits")]


@pytest.fixture
def ending(monkeypatch, tmp_path):
    """A sweep that ends as the name of the type says, and leaves files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def sweep(model_type, put, among=()):
        put(("layers", RIGHT, ""))
        Path(tempfile.mkdtemp(), "model").write_text("large")
        if model_type == "hangs":
            time.sleep(60)
        if model_type == "dies":
            time.sleep(1)  # what was put is sent by a thread
            sweeping.os._exit(3)

    monkeypatch.setattr(sweeping, "sweep", sweep)
    return tmp_path


@pytest.mark.parametrize(("way", "last"), [("hangs", CRASH), ("dies", CRASH), ("ends", TOOK)])
def test_what_a_type_found_is_kept_and_what_it_took_is_given_back(ending, way, last):
    started = time.monotonic()
    first, second = sweeping.run(way, 1.5)
    assert first == ("layers", RIGHT, "") and second[:2] == ("", last)
    assert time.monotonic() - started < 30
    assert not list(ending.iterdir())
    assert not sweeping.multiprocessing.active_children()


def test_parts_are_added_to_one_file_and_a_run_goes_on(ending, monkeypatch, capsys):
    output, types = ending / "sweep.json", ["ends", "dies", "gpt2"]
    for part, code in (("1/2", 0), ("2/2", 1), ("1/1", 1)):
        monkeypatch.setattr(sys, "argv", ["sweep", *types, "--part", part, "--output", str(output)])
        assert sweeping.main() == code
    assert list(json.loads(output.read_text())) == ["ends", "gpt2", "dies"]
    assert len(capsys.readouterr().out.split("dies ")) == 3  # tried once: two rows


def test_every_type_is_in_one_part():
    parts = [name for number in range(1, 5) for name in sweeping.part_of(TYPES, f"{number}/4")]
    assert sorted(parts) == sorted(TYPES) and len(set(parts)) == len(TYPES) > 250
    with pytest.raises(ValueError, match="no part"):
        sweeping.part_of(TYPES, "5/4")
