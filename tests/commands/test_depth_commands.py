"""Depth and hidden size on the command line."""

import csv
import json

import families
import pytest
from tiny_tokenizers import build_tokenizer
from transformers import AutoModelForCausalLM

from hf_structprune import PruningPlan
from hf_structprune.commands import cli


CALIBRATION = ["--calibration-num-samples", "4", "--calibration-length", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    model = families.make_model("llama", vocab_size=128, num_hidden_layers=6, max_position_embeddings=256)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def run(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main([*argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main([*argv]) == 2
    return capsys.readouterr().err


def test_inspect_depth_writes_the_csv_and_the_heat_map(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "depth"
    data = json.loads(run(capsys, "inspect", folder, "--depth", "--output-dir", str(out), "--json", *CALIBRATION))
    assert [row["layer"] for row in data["layers"]] == list(range(6))
    assert [len(block["layers"]) for block in data["blocks"]] == [1, 2, 3, 4, 5]
    rows = list(csv.DictReader((out / "layer_distances.csv").open()))
    assert list(rows[0]) == ["block_start", "block_end", "average_distance"]
    assert len(rows) == 5 + 4 + 3 + 2 + 1
    pairs = [row for row in rows if int(row["block_end"]) - int(row["block_start"]) == 2]
    best = min(pairs, key=lambda row: float(row["average_distance"]))
    assert data["blocks"][1]["layers"] == list(range(int(best["block_start"]), int(best["block_end"])))
    assert (out / "layer_distances.png").read_bytes().startswith(b"\x89PNG")
    assert "files" in data and len(data["files"]) == 2
    monkeypatch.setenv("COLUMNS", "80")
    text = run(capsys, "inspect", folder, "--depth", *CALIBRATION)
    assert "Blocks that turn them least" in text
    assert text.splitlines()[2].count(" influence ") == 3  # words and numbers are not broken


def test_inspect_depth_does_not_write_over_something(folder, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert "--overwrite" in refused(capsys, "inspect", folder, "--depth", "--output-dir", str(tmp_path), *CALIBRATION)
    assert "goes with --depth" in refused(capsys, "inspect", folder, "--output-dir", str(tmp_path / "new"))


def test_prune_drops_layers_and_says_which(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["--units", "layers", "--num-layers", "2", "--criterion", "angular", *CALIBRATION]
    data = json.loads(run(capsys, "prune", folder, "--output-dir", out, "--json", *arguments))
    first, second = data["dropped"]["layers"]
    assert second == first + 1
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 4 and model.num_parameters() == data["parameters_after"]
    text = run(capsys, "prune", folder, "--output-dir", str(tmp_path / "again"), *arguments)
    assert f"{first} {second}" in text and "decoder layers, gone" in text


def test_plan_of_layers_is_made_on_the_weights_and_can_be_carried_out(folder, tmp_path, capsys):
    file, out = str(tmp_path / "plan.json"), str(tmp_path / "out")
    run(capsys, "plan", folder, "--units", "layers", "--ratio", "0.3", "--output", file, *CALIBRATION)
    gone = PruningPlan.load(file).dropped["layers"]
    done = json.loads(run(capsys, "prune", folder, "--plan", file, "--units", "layers", "--output-dir", out, "--json",
                          *CALIBRATION))  # fmt: skip
    assert done["dropped"] == {"layers": list(gone)} and len(gone) == 2


def test_split_on_the_command_line(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    data = json.loads(
        run(capsys, "prune", folder, "--ratio", "0.3", "--split", "layers=0.5", "mlp_neurons=0.5", "--round-to", "1",
            "--output-dir", out, "--json", *CALIBRATION)
    )  # fmt: skip
    assert set(data["removed"]) == {"layers", "mlp_neurons"} and data["ratio"] == pytest.approx(0.3, abs=0.01)


def test_hidden_size_on_the_command_line(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    run(capsys, "prune", folder, "--hidden-size", "24", "--output-dir", out, *CALIBRATION)
    assert AutoModelForCausalLM.from_pretrained(out).config.hidden_size == 24


def test_mistakes_are_told_before_work(folder, tmp_path, capsys):
    out = ["--output-dir", str(tmp_path / "out")]
    assert "--ratio is missing" in refused(capsys, "prune", folder, "--units", "layers", *out)
    both = refused(capsys, "prune", folder, "--num-layers", "2", "--ratio", "0.2", *out)
    assert "--ratio and --num-layers are both given" in both
    assert "layout='per_layer'" in refused(capsys, "prune", folder, "--units", "attention", "--ratio", "0.1", *out)
