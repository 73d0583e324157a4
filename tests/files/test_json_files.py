"""JSON that was damaged or is of another kind: one line that names the file."""

import pytest

from hf_structprune import PruningConfig, PruningPlan
from hf_structprune.errors import CheckpointError, ConfigurationError
from hf_structprune.evaluation.results import EvaluationResult
from hf_structprune.files.reading import read_json, read_json_object


DAMAGED = {
    b"": "is not JSON: Expecting value",
    b"[]": "holds a list; it must hold one object",
    b"null": "holds null",
    b'"text"': "holds a text",
    b"3": "holds a number",
    b"true": "holds a truth value",
    b'{"a": 1': "is not JSON",
    b'{"a": "\xff"}': "is not UTF-8 text",
    b"[" * 100_000: "nested too deep",
    b'{"a": 1, "b": {"c": 1, "c": 2}}': "the key 'c' stands in it twice",
    b'{"a": ' + b"1" * 5000 + b"}": "is not JSON",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_json_is_one_line_that_names_the_file(content, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_json_object(path)
    assert str(error.value).startswith(f"{path} ") and DAMAGED[content] in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no file .*none\.json"):
        read_json_object(tmp_path / "none.json")
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        read_json_object(tmp_path, ConfigurationError)


def test_whole_files_are_read(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"a": [1, "ä"]}', encoding="utf-8")
    assert read_json_object(path) == {"a": [1, "ä"]}
    path.write_text("[1]")
    assert read_json(path) == [1]


@pytest.mark.parametrize("cls", [PruningConfig, PruningPlan, EvaluationResult])
@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"[" * 100_000])
def test_files_of_ours_are_read_there(cls, content, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"file\.json (is not|holds)"):
        cls.load(path)
