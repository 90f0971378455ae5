"""Checkpoints on the Hugging Face Hub: pull a folder, push a folder.

A stranger's repository can hold anything. Only the files of `FILES` are ever downloaded, their sizes are asked before
and their checksums compared after, and nothing in them is executed: weights are safetensors, the rest is text.
"""

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx2  # the HTTP client of huggingface_hub, whose connection errors come through as they are
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from tqdm.auto import tqdm

NEEDED = ["config.json", "model.safetensors"]
FILES = [*NEEDED, "README.md", "metrics.json", "history.jsonl", "manifest.json"]  # at the root of the repository
MAX_WEIGHTS_BYTES = 2 * 2**30  # model.safetensors
MAX_TEXT_BYTES = 4 * 2**20  # each of the others
PROBE_SECONDS = 4.0  # how long the Hub may take to answer before the cache is used instead

log = logging.getLogger(__name__)


class HubError(ValueError):
    """A checkpoint could not be fetched from the Hub or sent to it; the message is a sentence for people."""


def is_id(text: str) -> bool:
    """Whether `text` is written like a model on the Hub: user/name or user/name@revision.

    A folder may be written the same way: look for the folder first.
    """
    repo_id, at, revision = text.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    # A revision becomes a path in the cache (refs/<revision>), and must not lead out of it.
    if at and (".." in revision or not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII)):
        return False
    return "/" in repo_id


def pull(model_id: str, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder, in the Hugging Face cache, of user/name or user/name@revision (a branch, tag or commit).

    What is in the cache already is not downloaded again. When the Hub cannot be reached, or asks for a pause, the copy
    in the cache is used, with a warning in the log.

    Args:
        on_progress: called with the bytes that have arrived and those that will, in threads of the download; by
            default a bar is drawn in the terminal.

    Raises:
        HubError: no such repository or revision, no access, config.json or model.safetensors missing, a file over the
            limits or damaged on the way, or no Hub and no copy.
    """
    if not is_id(model_id):
        raise HubError(f"'{model_id}' is not a name on the Hub: write user/name or user/name@revision.")
    repo_id, _, revision = model_id.partition("@")
    revision = revision or "main"
    try:
        _probe(repo_id, revision)
    except (httpx2.HTTPError, OSError) as error:
        if not _may_pass(error):
            raise HubError(_sentence(error, model_id)) from error
        return _cached(model_id, repo_id, revision, error)

    with _in_sentences(model_id):
        no_bar = partial(tqdm, disable=True)  # the download draws its own
        files = snapshot_download(repo_id, revision=revision, allow_patterns=FILES, dry_run=True, tqdm_class=no_bar)
        _check({file.filename: file.file_size for file in files}, f"{model_id} on the Hub")
        commit = files[0].commit_hash  # what was measured is what is fetched, also when the branch moves meanwhile
        expected = sum(file.file_size for file in files if file.will_download)
        bar = _reporting_bar(on_progress, expected) if on_progress else None
        folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=FILES, tqdm_class=bar))
        if any(file.will_download for file in files):
            _verify(repo_id, commit, folder)
    return folder


def source_of(folder: Path) -> str:
    """Where a model comes from, for people: user/name@commit of a folder in the Hugging Face cache, else the folder."""
    commit, snapshots, repo = folder.resolve().name, folder.resolve().parent, folder.resolve().parents[1:2]
    if snapshots.name == "snapshots" and repo and repo[0].name.startswith("models--"):
        return f"{repo[0].name.removeprefix('models--').replace('--', '/', 1)}@{commit}"
    return str(folder)


def push(
    folder: str | Path, model_id: str, private: bool = False, revision: str | None = None, with_photos: bool = False
) -> str:
    """Publishes a checkpoint folder as the model user/name in one commit; returns the address of the commit.

    Sends the files of `FILES`, report/*.png and report/*.md. Unchanged files are not sent again; where nothing has
    changed there is no commit, and the address is that of the last one.

    Args:
        folder: with at least config.json and model.safetensors, within the limits of `pull`.
        model_id: user/name, made if it is not there.
        private: only those with access see the repository.
        revision: a branch, made if it is not there; None for main.
        with_photos: sends report/photos/* too.

    Raises:
        HubError: the folder or the name will not do, a token is needed, `private` was asked for a public repository, or
            the Hub cannot be reached.
    """
    folder = Path(folder)
    if not is_id(model_id) or "@" in model_id:
        raise HubError(f"'{model_id}' is not a name on the Hub: write user/name (a branch is given as the revision).")
    sizes = _sizes(folder)
    _check(sizes, str(folder))
    patterns = ["report/*.png", "report/*.md"] + ["report/photos/*"] * with_photos
    report = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    names = [*sizes, *(path.relative_to(folder).as_posix() for path in report)]

    # Named one by one: in the patterns of upload_folder * matches / too, and report/*.png would send photos.
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
    return _send(operations, model_id, "model", private, revision)


def push_space(files: dict[str, bytes], space_id: str, variables: dict[str, str], private: bool = False) -> str:
    """Publishes a Gradio Space in one commit; returns the address of the Space.

    Args:
        files: path in the repository to content. Files of the folders named here that are no longer among them are
            deleted; others that its owner has put there stay.
        space_id: user/name, made if it is not there.
        variables: the Space's environment variables, set before its code is replaced.
        private: only those with access see the Space.

    Raises:
        HubError: as `push`.
    """
    if not is_id(space_id) or "@" in space_id:
        raise HubError(f"'{space_id}' is not a name on the Hub: write user/name.")
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    _send(operations, space_id, "space", private, None, variables)
    return f"{HfApi().endpoint}/spaces/{space_id}"


def _send(
    operations: list,
    repo_id: str,
    repo_type: str,
    private: bool,
    revision: str | None,
    variables: dict[str, str] | None = None,
) -> str:
    """One commit to a repository, which is made if it is not there; the address of the commit."""
    api = HfApi()
    with _in_sentences(repo_id, sending=True):
        try:
            _probe(repo_id, None, repo_type)  # later requests wait without limit for an answer
        except HfHubHTTPError as error:
            if _may_pass(error):
                raise
        # None, not False: an organisation may keep its repositories private by default.
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=sdk)
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise HubError(f"{repo_id} exists and is public: make it private in its settings, or take another name.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        for key, value in (variables or {}).items():
            api.add_space_variable(repo_id, key, value)
        if repo_type == "space":
            sent = {operation.path_in_repo for operation in operations}
            folders = {name.split("/")[0] + "/" for name in sent if "/" in name}
            there = api.list_repo_files(repo_id, repo_type="space")
            gone = [name for name in there if name not in sent and name.startswith(tuple(folders))]
            operations = operations + [CommitOperationDelete(path_in_repo=name) for name in gone]
        commit = api.create_commit(
            repo_id,
            operations=operations,
            commit_message=f"Publish a cvlab {'page' if repo_type == 'space' else 'checkpoint'}",
            repo_type=repo_type,
            revision=revision,
        )
    return commit.commit_url


def _probe(repo_id: str, revision: str | None, repo_type: str = "model") -> None:
    """Asks the Hub once, within PROBE_SECONDS: its own client waits without limit, and repeats what fails for 23 s.

    In a thread, because a timeout of the client does not cover the look-up of the Hub's name.

    Raises:
        httpx2.HTTPError, OSError: no answer, or one that refuses.
    """
    raised: list[Exception] = []

    def ask() -> None:
        try:
            HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=PROBE_SECONDS)
        except (httpx2.HTTPError, OSError) as error:
            raised.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    if asking.is_alive():
        raise httpx2.ConnectTimeout(f"no answer within {PROBE_SECONDS:g} seconds")
    if raised:
        raise raised[0]


def _sizes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in FILES if (folder / name).is_file()}


def _check(sizes: dict[str, int | None], where: str) -> None:
    """Refuses a checkpoint, given as the bytes of each file, that is not whole or is over the limits."""
    if missing := [name for name in NEEDED if name not in sizes]:
        raise HubError(f"{where} has no {' and no '.join(missing)}: it is not a checkpoint of cvlab.")
    for name, size in sizes.items():
        limit = MAX_WEIGHTS_BYTES if name == "model.safetensors" else MAX_TEXT_BYTES
        if size is None or size > limit:
            found = "is of unknown size" if size is None else f"has {size:,} bytes"
            raise HubError(f"{where} is refused: {name} {found}, and the limit is {limit:,}.")


def _verify(repo_id: str, commit: str, folder: Path) -> None:
    """Compares what was downloaded with the repository's checksums: the client compares only the length."""
    damaged = [mismatch["path"] for mismatch in HfApi().verify_repo_checksums(repo_id, revision=commit).mismatches]
    for name in damaged:  # out of the cache, or it would be served from there the next time
        (folder / name).resolve().unlink()
        (folder / name).unlink(missing_ok=True)
    if damaged:
        raise HubError(f"{', '.join(damaged)} of {repo_id} arrived damaged (wrong checksum). Try again.")


def _reporting_bar(on_progress: Callable[[int, int], None], expected: int) -> type[tqdm]:
    """A class of bars that draw nothing and tell how many of the expected bytes are there."""

    class ReportingBar(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.counts_bytes, self.arrived = options.get("unit") == "B", 0

        def update(self, n: float | None = 1) -> None:
            self.arrived += int(n or 0)
            if self.counts_bytes:
                on_progress(min(self.arrived, expected), expected)

    return ReportingBar


def _cached(model_id: str, repo_id: str, revision: str, cause: Exception) -> Path:
    """The folder as the cache holds it, or the sentence that says why the Hub did not give it."""
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        raise HubError(f"{_sentence(cause, model_id)} The local cache does not hold it whole either.") from cause
    _check(_sizes(Path(folder)), f"{model_id} in the local cache")
    log.warning("%s The copy in the local cache is used.", _sentence(cause, model_id))
    return Path(folder)


def _may_pass(error: Exception) -> bool:
    """Whether the same question may be answered another time: no connection, too many requests, out of order."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, (httpx2.TransportError, OfflineModeIsEnabled))


@contextmanager
def _in_sentences(model_id: str, sending: bool = False) -> Iterator[None]:
    """Turns what huggingface_hub raises (RuntimeError: its transfer library hf_xet) into a HubError."""
    try:
        yield
    except HubError:
        raise
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(_sentence(error, model_id, sending)) from error


def _sentence(error: Exception, model_id: str, sending: bool = False) -> str:
    """What went wrong between here and the Hub, and what to do about it."""
    if isinstance(error, (DryRunError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    repo_id, _, revision = model_id.partition("@")
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set: the Hub was not asked about {model_id}."
    if isinstance(error, httpx2.TransportError):
        return f"{model_id}: the Hub cannot be reached ({str(error) or type(error).__name__}). Check the connection."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no branch, tag or commit '{revision or 'main'}' on the Hub."
    if status in (401, 403) and sending:
        return (
            f"The Hub does not let you write to {repo_id}: get a token with write access at "
            "https://huggingface.co/settings/tokens and give it to `hf auth login` or in HF_TOKEN."
        )
    if isinstance(error, GatedRepoError):
        return f"{repo_id} has conditions: accept them at https://huggingface.co/{repo_id}, then run `hf auth login`."
    if status in (401, 403, 404):
        return f"{repo_id} is not on the Hub, or not open to you. Check the name; if it is private, `hf auth login`."
    if status == 429:
        return f"{model_id}: the Hub had too many requests from here. Wait some minutes, or run `hf auth login`."
    if status >= 500:
        return f"{model_id}: the Hub is out of order (HTTP {status}). Try again later."
    first_line = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{model_id} was not {'sent' if sending else 'fetched'}: {first_line}"
