"""A folder is the one from before or the new one, whatever it is and whenever the process is killed."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import killed_writing
import pytest
from killed_writing import AFTER, NEW, OLD, contents, fill, left, write_new

from hf_structprune.errors import CheckpointError, PlaceError
from hf_structprune.files import writing
from hf_structprune.files.writing import settle, write_folder


def working_directory(monkeypatch, folder):
    monkeypatch.chdir(folder)


def holds_a_mount(monkeypatch, folder):
    monkeypatch.setattr(writing, "_mounts", lambda: [folder / "data"])


def foreign_parent(monkeypatch, folder):
    refused(monkeypatch, folder.parent, errno.EACCES)


WAYS = {
    **killed_writing.WAYS, "working directory": working_directory, "holds a mount": holds_a_mount,
    "foreign parent": foreign_parent,
}  # fmt: skip
STAYS = (*killed_writing.STAYS, "working directory", "holds a mount", "foreign parent")


def refused(monkeypatch, parent, number):
    """Nothing can be made in one folder, as for a user without permission; the tests may run as root."""
    mkdir = type(parent).mkdir

    def refuse(self, *args, **kwargs):
        if self.parent == parent:
            raise OSError(number, os.strerror(number), str(self))
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(type(parent), "mkdir", refuse)


@pytest.mark.parametrize("way", WAYS)
def test_another_folder_takes_the_place_and_other_files_stay(tmp_path, monkeypatch, way):
    fill(tmp_path / "out", OLD)
    fill(tmp_path / "out" / "runs", {"log.txt": "mine", "config.json": "mine too"})
    (tmp_path / "out" / "link").symlink_to("runs")
    (tmp_path / "out").chmod(0o750)
    before = (tmp_path / "out").stat()
    WAYS[way](monkeypatch, tmp_path / "out")
    write_folder(tmp_path / "out", write_new)
    assert contents(tmp_path / "out") == {
        **AFTER, "runs/log.txt": "mine", "runs/config.json": "mine too"
    } and not left(tmp_path / "out")  # fmt: skip
    assert os.readlink(tmp_path / "out" / "link") == "runs"
    after = (tmp_path / "out").stat()
    assert after.st_mode == before.st_mode and (after.st_ino == before.st_ino) == (way in STAYS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_the_folder_as_it_was(tmp_path, monkeypatch, way, failure):
    def fail(folder):
        write_new(folder)
        raise failure

    fill(tmp_path / "out", OLD)
    WAYS[way](monkeypatch, tmp_path / "out")
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        write_folder(tmp_path / "out", fail)
    assert contents(tmp_path / "out") == OLD and not left(tmp_path / "out")


@pytest.mark.parametrize("way", ["fresh", *killed_writing.WAYS, "settling"])
def test_a_kill_before_any_change_leaves_the_old_folder_or_the_new_one(tmp_path, way):
    """In a process of its own, which is forked in a moment because it is small."""
    done = subprocess.run(
        [sys.executable, killed_writing.__file__, way, tmp_path], capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 4


def test_who_comes_second_waits_and_leaves_the_draft_of_the_first_alone(tmp_path):
    def second(folder):
        assert contents(tmp_path / "out") == AFTER
        fill(folder, {**NEW, "config.json": "second"})

    others = threading.Thread(target=write_folder, args=(tmp_path / "out", second))

    def first(folder):
        others.start()
        settle(tmp_path / "out")
        others.join(0.2)
        assert folder.is_dir() and others.is_alive() and contents(tmp_path / "out") == OLD
        write_new(folder)

    fill(tmp_path / "out", OLD)
    write_folder(tmp_path / "out", first)
    others.join()
    assert contents(tmp_path / "out") == {**AFTER, "config.json": "second"} and not left(tmp_path / "out")


def test_what_another_machine_has_left_is_left_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_HERE", "0" * 8)
        theirs = writing.draft(tmp_path / "out", "new")
    theirs.mkdir()
    write_folder(tmp_path / "out", write_new)
    assert theirs.is_dir()


def test_where_files_cannot_have_two_names_those_of_the_user_stay_where_they_are(tmp_path, monkeypatch):
    def refuse(path, name):
        if Path(path).name == "b.txt":
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    fill(tmp_path / "out", OLD)
    fill(tmp_path / "out" / "runs", {"a.txt": "mine", "b.txt": "mine"})
    monkeypatch.setattr(os, "link", refuse)
    write_folder(tmp_path / "out", write_new)
    mine = {"runs/a.txt": "mine", "runs/b.txt": "mine"}
    assert contents(tmp_path / "out") == {**AFTER, **mine} and not left(tmp_path / "out")


def test_a_link_stays_and_its_folder_is_filled(tmp_path):
    fill(tmp_path / "real" / "out", OLD)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "out")
    write_folder(tmp_path / "link", write_new)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real" / "out") == AFTER
    assert not left(tmp_path / "real" / "out")


def test_the_working_directory_stays_under_the_process(tmp_path, monkeypatch):
    fill(tmp_path / "out" / "deep", OLD)
    monkeypatch.chdir(tmp_path / "out" / "deep")
    write_folder(".", write_new)
    assert contents(Path(".")) == AFTER
    write_folder("..", write_new)
    assert os.path.samefile(os.getcwd(), tmp_path / "out" / "deep")


def test_folders_made_on_the_way_go_after_an_error(tmp_path):
    def fail(folder):
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match="out is unchanged: disk full"):
        write_folder(tmp_path / "a" / "b" / "out", fail)
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_single_file_says_what_it_means_for_the_folder(tmp_path):
    def fail(folder):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise PlaceError("the card cannot be written") from error

    with pytest.raises(CheckpointError, match="out is unchanged: no space left on device"):
        write_folder(tmp_path / "out", fail)

    def refuse(folder):
        raise CheckpointError("of another kind")

    with pytest.raises(CheckpointError, match="^of another kind$"):
        write_folder(tmp_path / "out", refuse)


def test_a_full_disk_is_one_line_from_the_tokenizer_too(tmp_path):
    def fail(folder):
        raise Exception("No space left on device (os error 28)")  # as the tokenizers library words it

    with pytest.raises(CheckpointError, match="out is unchanged: no space left on device"):
        write_folder(tmp_path / "out", fail)

    def bug(folder):
        raise Exception("something else")

    with pytest.raises(Exception, match="^something else$"):
        write_folder(tmp_path / "out", bug)
