"""Damaged files of this package beside a checkpoint are found when they are first seen, before any work."""

import json

import pytest

from hf_structprune.commands import cli
from hf_structprune.errors import StructPruneError
from hf_structprune.evaluation.results import EvaluationResult, Figure
from hf_structprune.hub import push_folder
from hf_structprune.hub.contents import check_card, check_own_files

from .reports import make_quantisation, make_report


RESULTS = {
    "evaluation_results.json": "quantised", "evaluation_results_dense.json": "dense",
    "evaluation_results_pruned.json": "pruned", "evaluation_results_recovered.json": "recovered",
}  # fmt: skip
REPORTS = {"recovery.json": make_report(), "quantization.json": make_quantisation()}
FILES = ("config.json", "pruning_config.json", "pruning_plan.json", *REPORTS, *RESULTS)


@pytest.fixture
def full(folder):
    """A checkpoint with every file that this package may write."""
    for name, state in RESULTS.items():
        result = EvaluationResult("m", state)
        result.add(Figure("tasks/boolq/acc", 0.5, details={"samples": 3270, "samples_of_task": 3270}))
        result.save(folder / name)
    for name, report in REPORTS.items():
        (folder / name).write_text(json.dumps(report))
    return folder


def test_a_whole_folder_and_one_without_our_files(full, tmp_path):
    check_own_files(full)
    check_card(full)
    (tmp_path / "theirs").mkdir()
    check_own_files(tmp_path / "theirs")
    check_card(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_each_damaged_file_is_named(full, name):
    whole = (full / name).read_bytes()
    damaged = [b"", b"null", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, whole[: len(whole) // 2]]
    if "config.json" not in name:  # an empty one has the defaults
        damaged.append(b"{}")
    for content in damaged:
        (full / name).write_bytes(content)
        with pytest.raises(StructPruneError) as caught:
            check_own_files(full)
        assert str(full / name) in str(caught.value), content[:20]


@pytest.mark.parametrize("name", [*REPORTS, "pruning_plan.json"])
def test_each_field_that_the_card_needs_is_read(full, name):
    """Without any one key, or with nonsense under it, a file is refused or the card can be made all the same."""
    from hf_structprune.hub.card import make_card

    content = json.loads((full / name).read_text())
    refused = set()
    for key in content:
        for other in ({k: v for k, v in content.items() if k != key}, {**content, key: "nonsense"}):
            (full / name).write_text(json.dumps(other))
            try:
                check_own_files(full)
            except StructPruneError:
                refused.add(key)
            else:
                make_card(full)
    assert refused


def test_cards_that_cannot_be_read(full):
    for content in (b"\xff\xfe", b"---\na: [\n---\n"):
        (full / "README.md").write_bytes(content)
        for check in (check_own_files, check_card):
            with pytest.raises(StructPruneError, match="README.md cannot be used"):
                check(full)


def test_results_of_another_model(full):
    result = EvaluationResult.load(full / "evaluation_results_dense.json")
    result.add(Figure("efficiency/parameters", 7))
    result.save(full / "evaluation_results_dense.json")
    with pytest.raises(StructPruneError, match="was measured on another model"):
        check_own_files(full)


def test_nothing_is_begun(full, tmp_path, online, capsys, monkeypatch):
    """Each command that would read a file late reads it first: no weights, no data, no repository."""
    (full / "evaluation_results_dense.json").unlink()
    (full / "quantization.json").unlink()
    for name in RESULTS:
        (full / name).unlink(missing_ok=True)
    monkeypatch.setattr("safetensors.safe_open", None)
    monkeypatch.setattr("hf_structprune.recovery.recovering.load_rows", None)
    for name, content in (("pruning_plan.json", "null"), ("recovery.json", '{"schema_version": 1}')):
        whole = (full / name).read_text()
        (full / name).write_text(content)
        for argv in (
            ["recover", str(full), "--dataset", "nothing.jsonl", "--output-dir", str(tmp_path / "out")],
            ["quantize", str(full), "--output-dir", str(tmp_path / "out")],
        ):
            assert cli.main(argv) == 2
            assert f"{full / name} cannot be used" in capsys.readouterr().err
        with pytest.raises(StructPruneError, match="cannot be used"):
            push_folder(full, "me/small", token="token")
        (full / name).write_text(whole)
    assert not (tmp_path / "out").exists() and not online.repos
