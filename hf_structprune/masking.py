"""Secrets in what is shown or written: tokens, credentials in addresses and headers, values of secret variables.

Texts leave the package at three places, which all mask: the messages of its errors, the output of its commands, and
the text files that it writes.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from typing import Any


MASK = "[secret]"
_PATTERNS = (
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"), MASK),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[^\s'\",;]{8,}"), rf"\1{MASK}"),
    (re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}"), rf"\1{MASK}"),
    (re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@'\"]+@"), rf"\1{MASK}@"),
    (re.compile(r"(?i)([?&][\w-]*(?:token|signature|credential|secret|password|key)=)[^&\s'\"]+"), rf"\1{MASK}"),
)
_SECRET_NAME = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|PAT|API_?KEY|KEY)(?:_|$)")
_given: set[str] = set()


def remember(secret: Any) -> None:
    """Has a token that was given as an argument masked from now on; `None`, `True` and the like are none."""
    if isinstance(secret, str) and secret.strip():
        _given.add(secret.strip())


def masked(text: str) -> str:
    """A text with `[secret]` in place of what looks like a secret, or is known to be one.

    Known are those given as arguments, in variables of the environment, and stored by `hf auth login`.
    """
    named = (value for name, value in os.environ.items() if _SECRET_NAME.search(name.upper()))
    # A secret, and not a switch, a number or a file.
    known = {value for value in named if len(value) >= 8 and not value.isdecimal() and not os.path.exists(value)}
    hub = sys.modules.get("huggingface_hub")  # what was not imported has sent no token
    token = getattr(hub, "get_token", lambda: None)()
    for secret in sorted(known | _given | ({token} if token else set()), key=len, reverse=True):
        text = text.replace(secret, MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def is_masked(error: BaseException) -> bool:
    """Whether an error and all that it came from can be shown as they are."""
    return all(masked(said) == said for said in (f"{cause!r} {cause}" for cause in causes(error)))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and everything it was raised from."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


class MaskedStream:
    """A text stream that masks what is written to it, and is the stream in everything else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(masked(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self._stream.writelines(map(masked, lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
