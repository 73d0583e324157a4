"""`plan --estimate`, `inspect --curve` and `--units auto` on the command line."""

import json

import families
import pytest
from tiny_tokenizers import build_tokenizer

from hf_structprune import PruningPlan
from hf_structprune.commands import cli


CALIBRATION = ["--calibration-num-samples", "12", "--calibration-length", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("model"))
    model = families.make_model("llama", vocab_size=128, num_hidden_layers=3, max_position_embeddings=256)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def output(capsys, *argv: str):
    capsys.readouterr()
    assert cli.main([*argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_curve_rises_and_the_plan_says_the_same(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, units = str(tmp_path / "out"), ["--units", "mlp_neurons"]
    data = json.loads(
        output(capsys, "inspect", folder, "--curve", *units, *CALIBRATION, "--json", "--output-dir", out)
    )
    points = data["points"]
    assert [point["requested"] for point in points] == [0.05, 0.1, 0.2, 0.3, 0.4][: len(points)] and len(points) >= 4
    nats = [point["nats"] for point in points]
    assert nats == sorted(nats) and nats[-1] > 2 * nats[0] > 0
    assert points[0]["ratio"] < data["knee"] < points[-1]["ratio"]
    assert (tmp_path / "out" / "loss_curve.png").stat().st_size > 5000
    plan = json.loads(
        output(
            capsys, "plan", folder, "--ratio", "0.2", "--estimate", *units, *CALIBRATION, "--round-to", "1", "--json"
        )
    )
    assert 0.5 < plan["predicted_nats"] / points[2]["nats"] < 2  # widths are rounded otherwise
    assert "predicted loss: +" in output(capsys, "plan", folder, "--ratio", "0.2", "--estimate", *units, *CALIBRATION)


def test_units_auto_prunes_and_says_why(folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--ratio", "0.2", "--units", "auto", *CALIBRATION, "--output-dir", str(out)]
    assert "units='auto' took the" in " ".join(output(capsys, "prune", folder, *options).split())
    plan = PruningPlan.load(out)
    assert plan.predicted_nats > 0 and "auto" not in json.loads((out / "pruning_config.json").read_text())["units"]
    assert "parameters" in output(capsys, "plan", folder, "--ratio", "0.2", "--units", "auto", *CALIBRATION)


@pytest.mark.parametrize("options", [["--units", "layers"], ["--vocabulary-tokens", "9"], ["--depth", "--curve"]])
def test_options_that_go_with_others_are_refused_alone(folder, options, capsys):
    assert cli.main(["inspect", folder, *options]) == 2
    assert options[0] in capsys.readouterr().err
