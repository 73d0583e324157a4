"""Every command that writes refuses a place that cannot be written before it looks for the model."""

import pytest
import yaml

from hf_structprune.commands import cli


COMMANDS = {
    "prune": ["prune", "no/model", "--ratio", "0.1", "--output-dir", "PLACE"],
    "demo": ["demo", "no/model", "--output-dir", "PLACE"],
    "shrink": ["shrink", "no/model", "--ratio", "0.1", "--minutes", "1", "--output-dir", "PLACE"],
    "quantize": ["quantize", "no/model", "--output-dir", "PLACE"],
    "recover": ["recover", "no/model", "--dataset", "no.jsonl", "--output-dir", "PLACE"],
    "export gguf": ["export", "no/model", "--format", "gguf", "--output", "PLACE", "--overwrite"],
    "export onnx": ["export", "no/model", "--format", "onnx", "--output", "PLACE", "--overwrite"],
    "export deci": ["export", "no/model", "--format", "deci", "--output", "PLACE", "--overwrite"],
    "plan": ["plan", "no/model", "--ratio", "0.1", "--output", "PLACE"],
    "evaluate": ["evaluate", "no/model", "--output", "PLACE"],
    "benchmark": ["benchmark", "no/model", "--output", "PLACE"],
    "compare": ["compare", "no.json", "--output", "PLACE"],
    "pictures": ["compare", "no.json", "--pictures", "PLACE"],
    "inspect": ["inspect", "no/model", "--depth", "--output-dir", "PLACE"],
    "run": ["run", "RECIPE"],
}


@pytest.mark.parametrize("place", ["file/out", "nowhere", ""])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_written_is_said_first(name, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("missing")
    recipe = {"model": "no/model", "output_dir": place, "prune": {"ratio": 0.1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = sorted(tmp_path.rglob("*"))
    argv = [{"PLACE": place, "RECIPE": "recipe.yaml"}.get(word, word) for word in COMMANDS[name]]
    assert cli.main(argv) == 2
    assert sorted(tmp_path.rglob("*")) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-structprune: error:")]
    if (name, place) == ("run", ""):
        assert "`output_dir` is missing" in lines[0]
        return
    said = {"file/out": "file is no folder", "nowhere": "a link to missing, where nothing is", "": "is empty"}[place]
    assert len(lines) == 1 and said in lines[0], lines
