"""What the Hub's client raises, in words that say what to do. No message repeats a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..errors import HubError, StructPruneError
from ..masking import is_masked, remember


# The base class of the errors of the client's HTTP library, which is another one in other versions of the client.
_HTTP_ERROR = HfHubHTTPError.__mro__[1]
LOGIN = "`hf auth login`, the environment variable HF_TOKEN or the argument `token` gives one"


def is_network_error(error: BaseException) -> bool:
    """Whether an error comes from the connection and not from what was asked."""
    known = isinstance(error, (ConnectionError, TimeoutError, _HTTP_ERROR))
    return known and not isinstance(error, HfHubHTTPError)


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and everything it was raised from."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        yield current
        seen.append(current)
        current = current.__cause__ or current.__context__


@contextmanager
def clear_errors(repo_id: str, token: str | None = None) -> Iterator[None]:
    """Turns what the client raises while it talks about a repository into `HubError`s.

    Raises:
        HubError: Says what was wrong and what to do. What it was raised from is kept for the traceback unless the
            token stands in it.
    """
    remember(token)
    try:
        yield
    except StructPruneError:
        raise
    except Exception as error:
        message = explain(error, repo_id)
        if message is None:
            raise
        raise HubError(message) from (error if is_masked(error) else None)


@contextmanager
def gated_errors(repo_id: str) -> Iterator[None]:
    """Turns what Transformers raises for a gated model into a `HubError` that says how to get access.

    Raises:
        HubError: The model is gated, and there is no token or its account has not accepted the conditions.
    """
    try:
        yield
    except OSError as error:
        if any(isinstance(cause, GatedRepoError) for cause in causes(error)):
            raise HubError(f"{explain(error, repo_id)}") from (error if is_masked(error) else None)
        raise


def explain(error: BaseException, repo_id: str) -> str | None:
    """One sentence for an error of the client and its causes; `None` for one that is not about the Hub."""
    if isinstance(error, ValueError) and "README.md" in str(error):
        return f"The Hub refuses the model card: {error}"
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so that nothing can be pushed; unset it and push again."
        if isinstance(cause, LocalTokenNotFoundError):
            return f"There is no token for the Hub; {LOGIN}."
        if isinstance(cause, GatedRepoError):
            return (
                f"{repo_id} is gated: accept its conditions on its page on the Hub with the account of your token, "
                f"then try again ({LOGIN})."
            )
        if isinstance(cause, HFValidationError):
            return f"{repo_id!r} is not the id of a repository, such as user/name: {cause}"
    for cause in chain:
        if isinstance(cause, HfHubHTTPError) and getattr(cause, "response", None) is not None:
            return _explain_status(cause, repo_id)
    for cause in chain:
        if is_network_error(cause):
            return (
                f"The connection to the Hub was lost while pushing to {repo_id} ({type(cause).__name__}: {cause}). "
                "Nothing is lost here, and files that had arrived stay there: the same command uploads only what is "
                "missing."
            )
    if isinstance(error, (OSError, RuntimeError)):  # the storage backend has errors of many kinds
        return f"The push to {repo_id} failed: {error}. Nothing is lost here; push again."
    return None


def _explain_status(error: HfHubHTTPError, repo_id: str) -> str:
    status, said = error.response.status_code, (error.server_message or "").strip()
    reason = f" The Hub says: {said}" if said else ""
    if status == 401:
        return f"The Hub does not accept the token for {repo_id}: it is wrong or has expired; {LOGIN}.{reason}"
    if status == 403:
        return (
            f"The token has no right to write to {repo_id}: use one with the role `write` of an account that may, "
            f"choose a repository of your own, or propose the change with `create_pr`.{reason}"
        )
    if status == 404:
        return (
            f"There is no {repo_id} on the Hub, or the token cannot see it; check the name and the revision.{reason}"
        )
    if status in (409, 412):
        return f"{repo_id} was changed by someone else at the same time; nothing was committed, push again.{reason}"
    if status == 429:
        return f"The Hub asks to slow down; wait a few minutes and push again.{reason}"
    if status >= 500:
        return (
            f"The Hub answered with the error {status}; nothing was committed to {repo_id}, push again later.{reason}"
        )
    return f"The Hub refused the request for {repo_id} ({status}).{reason}"
