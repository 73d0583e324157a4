"""The methods of quantisation: one file each, and here their list."""

from __future__ import annotations

from .backend import Backend
from .bnb import BitsAndBytes


BACKENDS: dict[str, Backend] = {
    "bitsandbytes": BitsAndBytes(),
}
