"""What cannot be written is refused in one line, and nothing is left of the question."""

import errno
import os
import types

import pytest

from hf_structprune import PruningPlan, StructuredPruner
from hf_structprune.errors import CheckpointError, ConfigurationError, PlaceError
from hf_structprune.files.writing import appearing, check_place, check_room, must_stay, write_folder, write_text


LONG = "x" * 300
# Names that cannot be: of a folder and of a file, below a folder with the file `file` and the link `nowhere`.
NAMES = {
    "": "is empty", " ": "is empty", "a\0b": "NUL", "file/out": "file is no folder", "file/a/out": "file is no folder",
    "nowhere": "a link to .*missing, where nothing is", "nowhere/out": "a link to .*missing, where nothing is",
    LONG: "too long", f"new/{LONG}/out": "too long", "out/" * 2000: "too long",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cannot_be_written(path, match, file=False):
    def write(folder):
        pytest.fail("written")

    for action in (
        lambda: check_place(path, file=file),
        lambda: check_room(path, 1, file=file),
        lambda: write_text(path, "new") if file else write_folder(path, write),
    ):
        with pytest.raises(PlaceError, match=match) as caught:
            action()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_cannot_be(here, name, file):
    before = sorted(here.rglob("*"))
    cannot_be_written(name, NAMES[name], file)
    assert sorted(here.rglob("*")) == before


def test_a_folder_is_no_file_and_a_file_no_folder(here):
    cannot_be_written("file", "is a file; give the name of a folder")
    (here / "out").mkdir()
    cannot_be_written("out", "is a folder; give the name of a file", file=True)
    assert issubclass(PlaceError, CheckpointError) and issubclass(PlaceError, ConfigurationError)


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_where_nothing_can_be_made(here, monkeypatch, number, file):
    """A file system that can only be read has no room left either, which is not the reason."""

    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(type(here), "mkdir", refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda path: pytest.fail("asked for room"))
    reason = os.strerror(number).lower()
    for name in ("out", "new/out"):
        with pytest.raises(PlaceError, match=f"^{name} cannot be written: {reason}; choose another place.$"):
            check_room(name, 10**6, file=file)


def test_what_can_be_written_is_not_touched(here):
    for name in ("out", "new/out", "here"):
        (here / "here").mkdir(exist_ok=True)
        check_place(name)
        check_place(f"{name}.json", file=True)
    check_place("file", file=True)
    check_place(os.devnull, file=True)
    assert sorted(path.name for path in here.iterdir()) == ["file", "here", "nowhere"]


def test_room_is_that_of_the_folder_itself(here, monkeypatch):
    asked = []
    usage = type("Usage", (), {"free": 2_500_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or usage)
    (here / "out").mkdir()
    check_room("out", 2_500_000)
    check_room("new/out", 2_500_000)
    check_room("file", 2_500_000, file=True)
    with pytest.raises(PlaceError, match="^out needs 2.50MB, but the disk has 2.50MB left.$"):
        check_room("out", 2_500_001)
    assert asked[:3] == [here / "out", here, here]


def test_folders_that_stay(here, monkeypatch):
    (here / "out" / "deep").mkdir(parents=True)
    assert must_stay(here) and must_stay(here.parent) and not must_stay(here / "out")
    monkeypatch.chdir(here / "out" / "deep")
    assert must_stay(here / "out")
    monkeypatch.chdir(here)
    mounted = [types.SimpleNamespace(mountpoint=str(path)) for path in ("/", here / "other", here / "with space")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounted)
    assert must_stay(here / "other") and must_stay(here / "with space") and not must_stay(here / "out")


def test_a_removed_working_directory(here, monkeypatch):
    (here / "gone").mkdir()
    monkeypatch.chdir(here / "gone")
    (here / "gone").rmdir()
    with pytest.raises(PlaceError, match="cannot be written"):
        check_place("out")
    write_folder(here / "out", lambda folder: (folder / "file").write_text("x"))
    assert (here / "out" / "file").is_file()


def test_links_to_files_stay(here):
    (here / "real").mkdir()
    (here / "real" / "a.txt").write_text("old")
    (here / "real" / "a.txt").chmod(0o600)
    (here / "a.txt").symlink_to(here / "real" / "a.txt")
    write_text("a.txt", "new")
    assert (here / "a.txt").is_symlink() and (here / "real" / "a.txt").read_text() == "new"
    assert (here / "real" / "a.txt").stat().st_mode & 0o777 == 0o600
    with appearing("a.txt") as path:
        path.write_text("newer")
    assert (here / "a.txt").is_symlink() and (here / "real" / "a.txt").read_text() == "newer"
    assert os.listdir(here / "real") == ["a.txt"]


def test_devices_take_what_is_written_and_stay(here):
    write_text(os.devnull, "x")
    assert not os.path.isfile(os.devnull)
    with pytest.raises(PlaceError, match="neither a file nor a folder"), appearing(os.devnull):
        pass


@pytest.mark.parametrize("name", ["", "file", "nowhere"])
def test_saving_refuses_before_anything_is_written(here, tiny_llama, name):
    pruner = StructuredPruner(tiny_llama)
    pruner.last_plan = PruningPlan.__new__(PruningPlan)
    with pytest.raises(PlaceError):
        pruner.save_pretrained(name)
    assert sorted(path.name for path in here.iterdir()) == ["file", "nowhere"]
