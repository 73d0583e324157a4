"""Lines of a file are those of Python's text files, and the file is not held."""

import random
import tracemalloc

import pytest

from hf_structprune.errors import TextError
from hf_structprune.text import reading as lines
from hf_structprune.text.reading import Lines, LongLine


def expected(path):
    found = path.read_text(encoding="utf-8").split("\n")
    return found if found[-1] else found[:-1]


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 16])
@pytest.mark.parametrize("seed", range(6))
def test_lines_are_those_of_a_text_file(tmp_path, monkeypatch, block, seed):
    monkeypatch.setattr(lines, "_BLOCK", block)
    rng = random.Random(seed)
    text = "".join(
        rng.choice(["\n", "\r", "\r\n", "\r\r\n", "a", "é", "東京", "🙂", "\u2028", " ", "word " * 9])
        for _ in range(300)
    )
    path = tmp_path / "a.txt"
    path.write_bytes((text + rng.choice(["", "\n", "\r", "end"])).encode())
    found, wanted = Lines(path), expected(path)
    assert len(found) == len(wanted) and list(found) == wanted
    assert found[3:9] == wanted[3:9] and found[-1] == wanted[-1]
    order = list(range(len(wanted)))
    rng.shuffle(order)
    assert [found[i] for i in order] == [wanted[i] for i in order]


@pytest.mark.parametrize("content", [b"", b"\n", b"\r", b"\r\n", b"x", b"\n\n", b"x\n", b"x\r\ny"])
def test_short_files(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert list(Lines(path)) == expected(path)
    with pytest.raises(IndexError):
        Lines(path)[len(expected(path))]


def test_what_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 4)
    for content in (b"\xff\xfe", b"fine\nthen \xff\n", "é".encode()[:1]):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(TextError, match="a.txt is not UTF-8"):
            Lines(tmp_path / "a.txt")
    with pytest.raises(TextError, match="There is no file"):
        Lines(tmp_path / "none.txt")


def test_long_lines_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_BLOCK", 16)
    texts = ["short", "ä" * 100, "short", "", "x" * 40, "東京" * 50, "🙂" * 100]
    for end in ("\n", ""):
        (tmp_path / "a.txt").write_text("\n".join(texts) + end, encoding="utf-8")
        found = list(Lines(tmp_path / "a.txt", longest=50))
        assert [isinstance(line, LongLine) for line in found] == [len(text.encode()) > 50 for text in texts]
        assert [line for line in found if isinstance(line, str)] == ["short", "short", "", "x" * 40]
        for line, text in ((found[1], texts[1]), (found[5], texts[5])):
            assert line.read(0, line.size).rstrip("\n") == text
            assert line.read(7, 20) in text and 5 <= len(line.read(7, 20)) <= 10


def test_the_file_is_not_held(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for number in range(20_000):
            file.write(f"line {number} " + "of a long text " * 10 + "\n")
        file.write("all on one line " * 200_000)
    size = path.stat().st_size
    tracemalloc.start()
    try:
        found = Lines(path, longest=100_000)
        assert found[12_345].startswith("line 12345 ") and sum(1 for _ in found) == 20_001
        assert found[20_000].size == 3_200_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 6_000_000 and peak < 1_000_000
