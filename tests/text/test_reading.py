"""Files, lists and tables of text; lines are those of Python's text files, and the file is not held."""

import json
import random
import tracemalloc

import pytest

from hf_structprune.errors import CalibrationError, StructPruneError, TextError
from hf_structprune.text import reading
from hf_structprune.text.reading import lines_of, read_lines, read_rows, read_table


def expected(path):
    found = path.read_text(encoding="utf-8").split("\n")
    return found if found[-1] else found[:-1]


@pytest.mark.parametrize("seed", range(6))
def test_lines_are_those_of_a_text_file(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(reading, "_BLOCK", 7)
    rng = random.Random(seed)
    text = "".join(
        rng.choice(["\n", "\r", "\r\n", "\r\r\n", "a", "é", "東京", "🙂", "\u2028", " ", "word " * 9])
        for _ in range(300)
    )
    path = tmp_path / "a.txt"
    path.write_bytes((text + rng.choice(["", "\n", "\r", "end"])).encode())
    found, wanted = lines_of(path), expected(path)
    assert len(found) == len(wanted) and list(found) == wanted
    assert found[3:9] == wanted[3:9] and found[-1] == wanted[-1]
    order = list(range(len(wanted)))
    rng.shuffle(order)
    assert [found[i] for i in order] == [wanted[i] for i in order]


@pytest.mark.parametrize("content", [b"", b"\n", b"\r", b"\r\n", b"x", b"\n\n", b"x\n", b"x\r\ny"])
def test_short_files(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert list(lines_of(path)) == expected(path)
    with pytest.raises(IndexError):
        lines_of(path)[len(expected(path))]


def test_what_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BLOCK", 4)
    for content in (b"\xff\xfe", b"fine\nthen \xff\n", "é".encode()[:1]):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(TextError, match="a.txt is not UTF-8"):
            lines_of(tmp_path / "a.txt")
    with pytest.raises(TextError, match="There is no file"):
        lines_of(tmp_path / "none.txt")


def test_the_file_is_not_held(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(f"line {number} " + "of a long text " * 10 + "\n")
    size = path.stat().st_size
    tracemalloc.start()
    try:
        found = lines_of(path)
        assert found[12_345].startswith("line 12345 ") and sum(1 for _ in found) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 3_000_000 and peak < 1_000_000


def test_txt_without_a_last_line_break(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo", encoding="utf-8")
    assert list(read_lines(path)) == ["one\n", "", "two\n"]


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
