"""What is installed here: this package, the libraries that count, and packages that only some features need."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .errors import StructPruneError


__version__ = "0.1.0.dev0"
LIBRARIES = ("torch", "transformers")


def need(*packages: str, extra: str) -> None:
    """Makes sure that packages, named as they are imported, are installed before any work is done.

    Raises:
        StructPruneError: Names what is missing and the `extra` of this package that installs it.
    """
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        raise StructPruneError(f'{" and ".join(missing)} is missing: `pip install "hf-structprune[{extra}]"`.')


def is_installed(name: str) -> bool:
    """Whether a package, named as it is imported, can be imported."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it would be in
        return False


def versions(*others: str) -> dict[str, str]:
    """Versions of this package, of the libraries that matter for what it computes, and of others that are there."""
    found = {"hf_structprune": __version__}
    for name in (*LIBRARIES, *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
