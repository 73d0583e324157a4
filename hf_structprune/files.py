"""Names of files and folders; writing single files so that an interrupt leaves what was there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError


def can_only_be_a_path(name: str) -> bool:
    """Whether a name is no id of the Hub: those have at most one slash, within, and begin with a letter or digit."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file (UTF-8) all at once, see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file all at once: into a temporary file beside it, which then takes its name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def appearing(path: str | os.PathLike, size: int = 0) -> Iterator[Path]:
    """A temporary name beside a file, which takes the file's name when the block ends without an error.

    Args:
        path: The file; one of that name is replaced then.
        size: Bytes that will be written, to see before whether the disk has room for them.

    Raises:
        ExportError: There is too little room.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise ExportError(f"{path} needs {size / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB left.")
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
