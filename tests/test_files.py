import os

import pytest

from hf_structprune.files import write_text


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one\nüber\n")
    write_text(path, "two\n")
    assert path.read_bytes() == b"two\n" and os.listdir(path.parent) == ["a.txt"]


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
