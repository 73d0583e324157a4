import os

import pytest
from filelock import Timeout

from hf_structprune.files.reading import can_only_be_a_path
from hf_structprune.files.writing import alone, appearing, draft, write_text


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


@pytest.mark.parametrize("name", ["a", "a.b", ".a", "a\nb", "ä" * 127])
def test_what_a_killed_process_has_left_goes_with_the_next_writing(tmp_path, name):
    place = tmp_path / name
    draft(place, "new").mkdir()  # as of a large file
    (draft(place, "new") / "half").touch()
    (tmp_path / ".a.mine.new").write_text("of the user")
    write_text(place, "x")
    draft(place, "new").write_text("half")
    with appearing(place) as path:
        path.write_text("y")
    assert place.read_text() == "y" and {*os.listdir(tmp_path)} == {name, ".a.mine.new"}


def test_names_of_drafts_differ_as_their_places_do(tmp_path):
    names = ("a", "a.b", "ä" * 100, "ä" * 100 + "b", "a/a")
    drafts = [draft(tmp_path / name, "new", inside=inside) for name in names for inside in (False, True)]
    assert len({*drafts}) == 10 and all(len(os.fsencode(path.name)) < 100 for path in drafts)


def test_one_at_a_time(tmp_path):
    with alone(tmp_path / "a"):
        with alone(tmp_path / "b", wait=False):
            pass
        with pytest.raises(Timeout), alone(tmp_path / "a", wait=False):
            pass
    with alone(tmp_path / "a", wait=False):
        pass


def test_without_room_for_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
