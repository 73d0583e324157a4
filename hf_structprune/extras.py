"""Packages that only some of the features need."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import StructPruneError


def need(*packages: str, extra: str) -> None:
    """Makes sure that packages are installed, before any work is done.

    Args:
        packages: Names to import.
        extra: The extra of this package that installs them.

    Raises:
        StructPruneError: Names what is missing and the command that installs it.
    """
    missing = [name for name in packages if not _found(name)]
    if missing:
        raise StructPruneError(f'{" and ".join(missing)} is missing: `pip install "hf-structprune[{extra}]"`.')


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False
