import os

import pytest

from hf_structprune.files.writing import can_only_be_a_path, write_text


def test_what_no_id_of_the_hub_looks_like():
    assert not any(map(can_only_be_a_path, ("gpt2", "me/model", "me/model-0.5B.v1")))
    assert all(map(can_only_be_a_path, ("./m", "../m", "/m", "~/m", "m/", "me/model/", "a/b/c")))


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
