"""Lines of a file as a sequence that holds a small part of it at a time."""

from __future__ import annotations

import codecs
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from ..errors import TextError


# Bytes read at once; the place of a line is kept about every so many bytes.
_BLOCK = 1 << 16
_BREAK = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class LongLine:
    """A line that is not read whole.

    Args:
        path: The file.
        offset: Where the line begins, in bytes.
        size: Its bytes.
    """

    path: Path
    offset: int
    size: int

    def read(self, start: int, size: int) -> str:
        """About `size` bytes of the line from byte `start` on: the characters that are whole."""
        with self.path.open("rb") as file:
            file.seek(self.offset + start)
            content = file.read(min(size, self.size - start))
        while content and content[0] & 0xC0 == 0x80:  # within a character
            content = content[1:]
        return codecs.getincrementaldecoder("utf-8")().decode(content)


class Lines(Sequence[str]):
    """Lines of a UTF-8 text file without their line breaks, which are those of Python's text files.

    The file is read once to count them and to see that it is text, and then in blocks as they are asked for.

    Args:
        path: The file.
        longest: Lines of more bytes are given as `LongLine`. Default: none.

    Raises:
        TextError: There is no such file, or it is not UTF-8 text.
    """

    def __init__(self, path: Path, longest: int | None = None) -> None:
        if not path.is_file():
            raise TextError(f"There is no file {path}.")
        self.path, self.longest = path, longest
        # Numbers and places of lines that begin a block; a line longer than a block is one of its own.
        self._numbers, self._places = [0], [0]
        self._held: tuple[int, list[str]] = (-1, [])
        try:
            self._count()
        except UnicodeDecodeError as error:
            raise TextError(f"{path} is not UTF-8 text: {error}.") from error
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}.") from error

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        block = bisect_right(self._numbers, index, hi=len(self._numbers) - 1) - 1
        if self._is_long(block):
            return LongLine(self.path, self._places[block], self._size(block))
        if block != self._held[0]:
            self._held = (block, self._read(block))
        return self._held[1][index - self._numbers[block]]

    def _count(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        place = number = start = 0  # of the block of bytes; of the line that goes on in it, and where that begins
        held = b""
        with self.path.open("rb") as file:
            while content := held + (found := file.read(_BLOCK)):
                held = b"\r" if found and content.endswith(b"\r") else b""  # it may be half of a break
                content = content[: len(content) - len(held)]
                decoder.decode(content)
                breaks = [found.end() for found in _BREAK.finditer(content)]
                if breaks:
                    first = place + breaks[0]
                    if first - start > _BLOCK:
                        self._mark(number, start)
                        self._mark(number + 1, first)
                    elif first - self._places[-1] >= _BLOCK:
                        self._mark(number + 1, first)
                    number, start = number + len(breaks), place + breaks[-1]
                place += len(content)
        decoder.decode(b"", final=True)
        if place - start > _BLOCK:
            self._mark(number, start)
        self._length = number + (place > start)
        self._numbers.append(self._length)
        self._places.append(place)

    def _mark(self, number: int, place: int) -> None:
        if number != self._numbers[-1]:
            self._numbers.append(number)
            self._places.append(place)

    def _size(self, block: int) -> int:
        return self._places[block + 1] - self._places[block]

    def _is_long(self, block: int) -> bool:
        alone = self._numbers[block + 1] - self._numbers[block] == 1
        return self.longest is not None and alone and self._size(block) > self.longest

    def _read(self, block: int) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(self._places[block])
            text = file.read(self._size(block)).decode("utf-8")
        return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
