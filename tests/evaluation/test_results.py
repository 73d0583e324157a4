"""The format of everything that is measured: what is written is what is read."""

import json
import math
import os
from datetime import datetime, timedelta, timezone

import pytest
import torch
import transformers

import hf_structprune
from hf_structprune import installed
from hf_structprune.errors import ConfigurationError
from hf_structprune.evaluation.results import RESULTS_NAME, EvaluationResult, Figure, describe_environment


@pytest.fixture
def result():
    result = EvaluationResult(
        "me/small",
        "pruned",
        "them/large",
        settings={"texts": ["sample"], "seed": 7},
        environment={"versions": {"torch": "2"}},
        samples=[{"prompt": "p", "text": "t"}],
    )
    boolq = Figure("tasks/boolq/acc", 0.5, "", 0.01, True, "0-shot", {"version": 2.0, "limit": None})
    result.add(Figure("perplexity/sample", 12.345678901234567, higher_is_better=False), boolq)
    return result


def test_round_trip_keeps_everything(result, tmp_path):
    result.save(tmp_path / "r.json")
    assert EvaluationResult.load(tmp_path / "r.json") == result
    assert list(EvaluationResult.load(tmp_path / "r.json").figures) == ["perplexity/sample", "tasks/boolq/acc"]


def test_folder_is_read_by_its_file(result, tmp_path):
    result.save(tmp_path / "made" / RESULTS_NAME)
    assert EvaluationResult.load(tmp_path / "made") == result


def test_infinity_is_null_in_the_file_and_infinity_again_when_read(result, tmp_path):
    result.add(Figure("perplexity/sample", math.inf))
    result.save(tmp_path / "r.json")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert content["figures"][0]["value"] is None
    assert EvaluationResult.load(tmp_path / "r.json").value("perplexity/sample") == math.inf


def test_added_again_is_replaced_in_its_place(result):
    result.add(Figure("perplexity/sample", 1.0))
    assert (result.value("perplexity/sample"), len(result.figures)) == (1.0, 2)
    assert result.value("perplexity/other") is None


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"schema_version": 2, "model": "m", "figures": []}, "version 1 .*is 2"),
        ({"model": "m"}, "is None"),
        ([1], "r.json holds a list"),
        ({"schema_version": 1, "model": "m"}, "incomplete or of another kind: 'figures'"),
        ({"schema_version": 1, "figures": []}, "incomplete.*'model'"),
        ({"schema_version": 1, "model": "m", "figures": [], "speed": 3}, "'speed'"),
        ({"schema_version": 1, "model": "m", "figures": [{"name": "x"}]}, "'value'"),
        ({"schema_version": 1, "model": "m", "figures": [], "state": "squeezed"}, "'squeezed'.*dense, pruned"),
    ],
)
def test_other_files_are_refused(content, match, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match=match):
        EvaluationResult.load(tmp_path / "r.json")


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe"])
def test_no_json(content, tmp_path):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"r\.json is not JSON"):
        EvaluationResult.load(tmp_path / "r.json")


def test_no_file(tmp_path):
    with pytest.raises(ConfigurationError, match="There is no .*evaluation_results.json; `hf-structprune evaluate`"):
        EvaluationResult.load(tmp_path)


def test_interrupt_leaves_the_old_file_and_nothing_else(result, tmp_path, monkeypatch):
    result.save(tmp_path / "r.json")
    before = (tmp_path / "r.json").read_bytes()
    result.add(Figure("perplexity/sample", 1.0))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_what_is_no_json_leaves_the_old_file(result, tmp_path):
    result.save(tmp_path / "r.json")
    before = (tmp_path / "r.json").read_bytes()
    result.settings["limit"] = math.nan
    with pytest.raises(ValueError):
        result.save(tmp_path / "r.json")
    assert (tmp_path / "r.json").read_bytes() == before


def test_environment():
    found = describe_environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["versions"]["hf_structprune"] == hf_structprune.__version__
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])) < timedelta(minutes=1)
    hardware = found["hardware"]
    assert (hardware["type"], hardware["threads"]) == ("cpu", torch.get_num_threads())
    assert hardware["device"] and hardware["device"] == hardware["cpu"]
    assert hardware["memory"] > 2**28
    json.dumps(found, allow_nan=False)


def test_what_is_not_installed_has_no_version(monkeypatch):
    def missing(name):
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "version", missing)
    assert set(describe_environment()["versions"]) == {"hf_structprune"}
