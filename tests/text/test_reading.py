import json

import pytest

from hf_structprune.errors import CalibrationError, StructPruneError, TextError
from hf_structprune.text.reading import read_lines, read_rows, read_table


def test_txt_without_a_last_line_break(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo", encoding="utf-8")
    assert read_lines(path) == ["one\n", "", "two\n"]


def test_read_jsonl_skips_blank_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x\\u2028y"}\n\n{"text": "z"}')
    assert list(read_rows(tmp_path / "a.jsonl")) == ["x\u2028y", "z"]


@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_a_list_or_lines(tmp_path, indent):
    rows = [{"body": "x\ny"}, {"body": "z", "more": 1}]
    (tmp_path / "list.json").write_text("\n" + json.dumps(rows, indent=indent))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    for name in ("list.json", "lines.json"):
        assert list(read_rows(tmp_path / name, column="body")) == ["x\ny", "z"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('[{"text": "x"}, {"body": "y"}]', r"Item 1 of .*a.json has no column 'text'; it has 'body'"),
        ('["x"]', "Item 0 of .*a.json is not an object"),
        ("[1, ", "a.json is not JSON"),
        ('{"text": "x"}\n{', "Line 2 of .*a.json is not JSON"),
    ],
)
def test_json_errors(tmp_path, content, match):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(TextError, match=match):
        list(read_rows(tmp_path / "a.json"))


def test_errors_are_of_one_kind():
    assert issubclass(CalibrationError, TextError) and issubclass(TextError, (StructPruneError, ValueError))


def test_tables_have_all_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y", "n": 1}')
    (tmp_path / "a.json").write_text('[{"text": "x"}, {"n": 1, "text": "y"}]')
    for name in ("a.jsonl", "a.json"):
        assert read_table(tmp_path / name)[:] == {"text": ["x", "y"], "n": [None, 1]}
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_table(tmp_path / "a.txt")[:] == {"text": ["one\n\ntwo"]}
    (tmp_path / "b.json").write_text('[{"text": "x"}, {"text": ["y"]}]')
    with pytest.raises(TextError, match="The rows of b.json are no table"):
        read_table(tmp_path / "b.json")
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n[1]')
    with pytest.raises(TextError, match="Line 2 of .*c.jsonl is not an object"):
        read_table(tmp_path / "c.jsonl")
    with pytest.raises(TextError, match="neither a .txt nor"):
        (tmp_path / "d.csv").write_text("text")
        read_table(tmp_path / "d.csv")
