"""What goes wrong with the Hugging Face Hub, as a HubError: what happened, what to do, and what the Hub says."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2  # the HTTP client of huggingface_hub, which passes its connection errors on
from huggingface_hub import constants, errors, get_token

NEW_TOKEN = "create one at https://huggingface.co/settings/tokens for `hf auth login`, or put it in HF_TOKEN."
MAX_REASON = 500  # characters of what the Hub says


class HubError(ValueError):
    """A checkpoint could not be downloaded or published. The message says why and what to do."""


@contextmanager
def hub_errors(model_id: str, sending: bool = False) -> Iterator[None]:
    """Turns the errors of huggingface_hub into a HubError (RuntimeError: its transfer library hf_xet)."""
    try:
        if not re.fullmatch(r"[\w.~+/=-]*", get_token() or "", re.ASCII):
            place = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "What `hf auth login` stored in place of HF_TOKEN"
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
    return isinstance(error, (httpx2.TransportError, errors.OfflineModeIsEnabled)) or _is_of_disk(error)


def _is_of_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno is not None  # the client's own errors have no number


def message(error: Exception, model_id: str, sending: bool = False) -> str:
    """What went wrong, what to do about it, and the reason that the Hub gives."""
    wrapped = isinstance(error, (errors.DryRunError, errors.LocalEntryNotFoundError))
    if wrapped and isinstance(error.__cause__, Exception):
        error = error.__cause__
    reason = " ".join((getattr(error, "server_message", None) or "").split())[:MAX_REASON]
    text = _what_to_do(error, model_id, sending, reason)
    return f"{text} The Hub says: {reason.rstrip('.')}." if reason else text


def _what_to_do(error: Exception, model_id: str, sending: bool, reason: str) -> str:
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    repo_id, _, revision = model_id.partition("@")
    about_token = status == 401 or not reason or re.search(r"token|write access", reason, re.IGNORECASE)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set: the Hub was not asked about {model_id}."
    if isinstance(error, httpx2.TransportError):
        return f"{model_id}: the Hub cannot be reached ({str(error) or type(error).__name__}). Check the connection."
    if _is_of_disk(error) and not sending:
        variable = "HF_HUB_CACHE" if os.environ.get("HF_HUB_CACHE") else "HF_HOME"
        where = f"{model_id} cannot be stored in {constants.HF_HUB_CACHE} ({error.strerror})"
        return f"{where}: set {variable} to a folder that exists, has room, and that you may write to."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit “{revision or 'main'}” on the Hub."
    if status == 401 and "credentials" in reason:
        return f"The Hub does not know your token: {NEW_TOKEN}"
    if status in (401, 403) and sending:
        refused = f"The Hub does not let you write to {repo_id}"
        return f"{refused}: it takes a token with write access; {NEW_TOKEN}" if about_token else f"{refused}."
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} has conditions: accept them at https://huggingface.co/{repo_id}, then run `hf auth login`."
    if status in (401, 403, 404):
        return f"{repo_id} is not on the Hub, or not open to you. Check the name; if it is private, `hf auth login`."
    if status == 429:
        return f"{model_id}: the Hub got too many requests from here. Wait some minutes, or run `hf auth login`."
    if status >= 500:
        return f"{model_id}: the Hub has a problem (HTTP {status}). Try again later."
    refused = f"{model_id} was not {'published' if sending else 'downloaded'}"
    return f"{refused}." if reason else f"{refused}: {' '.join(str(error).split()) or type(error).__name__}"
