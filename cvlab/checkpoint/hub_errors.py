"""What goes wrong with the Hugging Face Hub, as a HubError: what happened, what to do, and what the Hub says."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2  # the HTTP client of huggingface_hub, which passes its connection errors on
from huggingface_hub import constants, errors, get_token

UNREACHED = httpx2.TransportError, errors.OfflineModeIsEnabled  # which says that HF_HUB_OFFLINE is set
MAX_REASON = 500  # characters of what the Hub says


class HubError(ValueError):
    """A checkpoint could not be downloaded or published. The message says why and what to do."""


@contextmanager
def hub_errors(model_id: str, sending: bool = False) -> Iterator[None]:
    """Turns the errors of huggingface_hub into a HubError (RuntimeError: its transfer library hf_xet)."""
    try:
        if not re.fullmatch(r"[\w.~+/=-]*", get_token() or "", re.ASCII):
            place = "HF_TOKEN, or else the token of `hf auth login`,"
            raise HubError(f"{place} has a character that no token has, such as a quotation mark: copy it again.")
        yield
    except HubError:
        raise
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(message(error, model_id, sending)) from error


def is_temporary(error: Exception) -> bool:
    """Whether a later try may succeed: no connection, too many requests, an error of the Hub, or of this disk."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, UNREACHED) or _is_of_disk(error)


def _is_of_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno is not None  # the client's own errors have no number


def message(error: Exception, model_id: str, sending: bool = False) -> str:
    """What went wrong, what to do about it, and the reason that the Hub gives."""
    if isinstance(error, (errors.DryRunError, errors.LocalEntryNotFoundError)):
        error = error.__cause__ or error
    reason = " ".join((getattr(error, "server_message", None) or "").split())[:MAX_REASON]
    text = _what_to_do(error, model_id, sending, reason)
    return f"{text} The Hub says: {reason.rstrip('.')}." if reason else text


def _what_to_do(error: Exception, model_id: str, sending: bool, reason: str) -> str:
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    repo_id, _, revision = model_id.partition("@")
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, UNREACHED):
        return f"{model_id}: the Hub cannot be reached ({said}). Check the connection."
    if _is_of_disk(error) and not sending:
        where = f"{model_id} cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror}): set HF_HOME"
        return f"{where} (HF_HUB_CACHE where you use it) to a folder that exists, has room, and that you may write to."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit “{revision or 'main'}” on the Hub."
    refused = status == 401 or (status == 403 and re.search("^$|token|write access", reason, re.IGNORECASE))
    if refused and (sending or "credentials" in reason):
        needed = f"The Hub takes a token that it knows{' and that may write' if sending else ''}: create one at"
        return f"{needed} https://huggingface.co/settings/tokens for `hf auth login`, or put it in HF_TOKEN."
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} has conditions: accept them at https://huggingface.co/{repo_id}, then run `hf auth login`."
    if status in (401, 404) or (status == 403 and not sending):
        return f"{repo_id} is not on the Hub, or not open to you. Check the name; if it is private, `hf auth login`."
    if status == 429 or status >= 500:
        return f"{model_id}: the Hub is busy or has a problem (HTTP {status}). Try again in some minutes."
    return f"{model_id} was not {'published' if sending else 'downloaded'}{'' if reason else f': {said}'}."
