import os

import pytest

from hf_structprune.files import places
from hf_structprune.files.places import claim, draft, drafts, kind_of, release
from hf_structprune.files.writing import write_text


NEVER = 2**22 + 1  # larger than any process id


def left_by(place, **changes):
    """A file that a process has left: this one, but for what is changed."""
    path = draft(place, "part")
    release(path)
    host, boot, pid, start, number = path.stem.rpartition(".")[2].split("-")
    fields = {"host": host, "boot": boot, "pid": pid, "start": start, "number": number} | changes
    path = path.with_name(f".{place.name}.{'-'.join(fields.values())}.part")
    path.write_text("half")
    return path


@pytest.mark.parametrize(
    ("changes", "dead"),
    [
        ({}, True),  # of this process, which does not write it any more
        ({"pid": str(NEVER)}, True),
        ({"pid": str(os.getppid()), "start": "1"}, True),  # the number belongs to another process now
        ({"boot": "0" * 8}, True),
        ({"host": "0" * 8, "pid": str(NEVER)}, False),
    ],
)
def test_whose_owner_is_dead(tmp_path, changes, dead):
    path = left_by(tmp_path / "a.txt", **changes)
    assert drafts(tmp_path / "a.txt", kinds=("part",)) == ([path] if dead else [])
    write_text(tmp_path / "a.txt", "whole")
    assert path.exists() != dead and (tmp_path / "a.txt").read_text() == "whole"


def test_what_lives_is_none(tmp_path):
    place = tmp_path / "a.txt"
    mine = draft(place, "part")
    mine.touch()
    parent = left_by(place, pid=str(os.getppid()), start=places._started(os.getppid()))
    assert drafts(place, kinds=("part",)) == [] and parent.exists()
    release(mine)
    assert drafts(place, kinds=("part",)) == [mine]


def test_names_that_look_alike(tmp_path):
    """A draft is of one name, and of nothing that only begins like it."""
    paths = [left_by(tmp_path / name) for name in ("a", "a.b", ".a", "a\nb", "ä" * 100, "ä" * 100 + "b")]
    for name, path in zip(("a", "a.b", ".a", "a\nb", "ä" * 100, "ä" * 100 + "b"), paths, strict=False):
        if len(name) < 60:
            assert drafts(tmp_path / name, kinds=("part",)) == [path]
    (tmp_path / ".a.mine.part").write_text("of the user")
    (tmp_path / ".a.abc").mkdir()
    assert drafts(tmp_path / "a", kinds=("part",)) == [paths[0]]
    assert drafts(tmp_path / "a", kinds=("new",)) == []


def test_long_names_have_room_for_an_owner(tmp_path):
    place = tmp_path / ("ä" * 127)
    write_text(place, "x")
    assert place.read_text() == "x"
    path = draft(place, "part")
    path.touch()
    release(path)
    assert drafts(place, kinds=("part",)) == [path] and drafts(tmp_path / ("ä" * 126), kinds=("part",)) == []


def test_one_of_several_finishes(tmp_path):
    path = left_by(tmp_path / "a.txt", pid=str(NEVER))
    mine = claim(path)
    assert mine.exists() and kind_of(mine) == "part" and claim(path) is None
    assert drafts(tmp_path / "a.txt", kinds=("part",)) == []
    release(mine)
