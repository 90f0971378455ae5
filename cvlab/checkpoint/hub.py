"""Checkpoints on the Hugging Face Hub: pull a folder, push a folder, publish the page as a Space.

A repository on the Hub may hold anything. Only the files of `FILES` are ever downloaded. Their sizes are checked before
the download and their checksums after it. Nothing in them is executed: weights are safetensors, the rest is text.
"""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx2  # the HTTP client of huggingface_hub, which passes its connection errors on
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    parse_hf_uri,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from tqdm.auto import tqdm

from cvlab.checkpoint.hub_errors import HubError, hub_errors, is_temporary, message
from cvlab.files import write_text

NEEDED = ["config.json", "model.safetensors"]
STATISTICS = "familiarity.safetensors"  # of photos of training
ONNX = "model.onnx"  # for other programs: sent, never downloaded
# At the root of a folder.
FILES = [*NEEDED, "README.md", "metrics.json", "trust.json", "history.jsonl", "manifest.json", STATISTICS]
STATE = "state"  # the branch of a training in progress
MAX_WEIGHTS_BYTES = 2 * 2**30  # model.safetensors, model.onnx
MAX_TEXT_BYTES = 4 * 2**20  # each of the others
AROUND = " \t\n\"'“”\u2018\u2019`\u00a0\u200b\u200e\u200f\u2060\ufeff"  # characters that are copied along with a name
PROBE_SECONDS = 4.0  # how long the Hub may take to answer before the local cache is used instead

log = logging.getLogger(__name__)


def name_of(text: str) -> str:
    """The name that a text means: without blanks and quotation marks around it, of a model's page user/name[@revision].

    What is neither a name nor the address of a page comes back as it is, without what stood around it.
    """
    text = text.strip(AROUND)
    try:
        page = parse_hf_uri(text, endpoint=constants.ENDPOINT)
    except ValueError:
        return text
    return (f"{page.id}@{page.revision}" if page.revision else page.id) if page.type == "model" else text


def is_id(text: str) -> bool:
    """Whether `text` has the form of a model name on the Hub: user/name or user/name@revision.

    A path to a folder may have this form too: look for the folder first.
    """
    repo_id, at, revision = text.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    # The revision becomes a path in the cache (refs/<revision>) and must not lead out of it.
    if at and (".." in revision or not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII)):
        return False
    return "/" in repo_id


def source_of(folder: Path) -> str:
    """Where a checkpoint comes from: user/name@commit for a folder in the Hugging Face cache, else the folder."""
    path = folder.resolve()  # of the cache: models--user--name/snapshots/commit
    repo = path.parent.parent.name
    if path.parent.name != "snapshots" or not repo.startswith("models--"):
        return str(folder)
    return f"{repo.removeprefix('models--').replace('--', '/', 1)}@{path.name}"


# --- downloading ------------------------------------------------------------------------------------------------------


def pull(model_id: str, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder, in the Hugging Face cache, of user/name or user/name@revision (a branch, tag or commit).

    Files that the cache holds are not downloaded again. If the Hub cannot be reached or is busy, or the cache cannot be
    written, the copy in the cache is used, with a warning in the log. The address of the model's page is a name too.

    Args:
        on_progress: called with the bytes downloaded so far and in total, in the threads of the download. By default a
            progress bar is drawn in the terminal.

    Raises:
        HubError: it is not there or not open to you, or is refused: a file is missing, too large or damaged.
    """
    model_id = name_of(model_id)
    if not is_id(model_id):
        raise HubError(f"“{model_id}” is not a name on the Hub: write user/name or user/name@revision.")
    repo_id, _, revision = model_id.partition("@")
    revision = revision or "main"
    with hub_errors(model_id):
        try:
            commit = _probe(repo_id, revision)  # the branch may move: what follows is about this commit
            no_bar = partial(tqdm, disable=True)
            files = snapshot_download(repo_id, revision=commit, allow_patterns=FILES, dry_run=True, tqdm_class=no_bar)
            _check_sizes({file.filename: file.file_size for file in files}, f"{model_id} on the Hub")
            expected = sum(file.file_size for file in files if file.will_download)
            bar = _reporting_bar(on_progress, expected) if on_progress else None
            folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=FILES, tqdm_class=bar))
        except (httpx2.HTTPError, OSError) as error:
            if is_temporary(error):
                return _cached(model_id, repo_id, revision, error)
            raise
        if expected:
            _check_sums(repo_id, commit, folder)
        if revision != commit:  # in the cache a branch moves when all files of its new commit are there
            with suppress(OSError):  # a cache that cannot be written
                write_text(folder.parents[1] / "refs" / revision, commit)
    return folder


def pull_file(address: str, most: int, owners: Sequence[str] = ()) -> Path | None:
    """A single file of a repository on the Hub, in the Hugging Face cache; None if the address is of something else.

    Args:
        address: hf://datasets/user/name/photo.jpg, or that of the file's page.
        most: bytes that it may have.
        owners: whose repositories; empty for everybody's.

    Raises:
        HubError: it is not there, not open to you or to this page, or too large.
    """
    try:
        file = parse_hf_uri(address.strip(AROUND), endpoint=constants.ENDPOINT)
    except ValueError:
        return None
    if not is_id(f"{file.id}@{file.revision or 'main'}") or not file.path_in_repo:
        raise HubError("That is no file of a repository on the Hub: write hf://datasets/user/name/photo.jpg.")
    if owners and file.id.split("/")[0] not in owners:
        raise HubError(f"This page opens files of {', '.join(owners)} only, not of {file.id}.")
    wanted = partial(hf_hub_download, file.id, file.path_in_repo, repo_type=file.type)
    with hub_errors(file.id):
        found = wanted(revision=file.revision, dry_run=True)
        if found.file_size > most:
            raise HubError(f"{file.path_in_repo} has {found.file_size:,} bytes; the limit is {most:,}.")
        return Path(wanted(revision=found.commit_hash))


def _cached(model_id: str, repo_id: str, revision: str, cause: Exception) -> Path:
    """The folder in the cache, used because of `cause`."""
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=FILES, local_files_only=True))
    except OSError:  # no copy, or one that may not be read
        raise HubError(f"{message(cause, model_id)} The local cache has no complete copy either.") from cause
    _check_sizes(_sizes(folder), f"{model_id} in the local cache")
    log.warning("%s The copy in the local cache is used.", message(cause, model_id))
    return folder


def _sizes(folder: Path) -> dict[str, int]:
    """The bytes of each file of `FILES` in a folder, and of model.onnx."""
    return {name: (folder / name).stat().st_size for name in (*FILES, ONNX) if (folder / name).is_file()}


def _check_sizes(sizes: dict[str, int | None], where: str) -> None:
    """Refuses a checkpoint that lacks a file or has one over the limits. None is an unknown size."""
    if missing := [name for name in NEEDED if name not in sizes]:
        raise HubError(f"{where} has no {' and no '.join(missing)}: it is not a checkpoint of cvlab.")
    for name, size in sizes.items():
        limit = MAX_WEIGHTS_BYTES if name in ("model.safetensors", ONNX) else MAX_TEXT_BYTES
        if size is None or size > limit:
            found = "is of unknown size" if size is None else f"has {size:,} bytes"
            raise HubError(f"{where} is refused: {name} {found}, and the limit is {limit:,}.")


def _check_sums(repo_id: str, commit: str, folder: Path) -> None:
    """Compares the downloaded files with the checksums of the repository: the client compares only their lengths."""
    damaged = [mismatch["path"] for mismatch in HfApi().verify_repo_checksums(repo_id, revision=commit).mismatches]
    for name in damaged:  # or the cache would serve them the next time
        (folder / name).resolve().unlink()
        (folder / name).unlink(missing_ok=True)
    if damaged:
        raise HubError(f"{', '.join(damaged)} of {repo_id} arrived damaged (wrong checksum). Try again.")


def _reporting_bar(on_progress: Callable[[int, int], None], expected: int) -> type[tqdm]:
    """A class of progress bars that draw nothing and call `on_progress` instead."""

    class ReportingBar(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.counts_bytes, self.arrived = options.get("unit") == "B", 0  # another bar counts files

        def update(self, n: float | None = 1) -> None:
            self.arrived += int(n or 0)
            if self.counts_bytes:
                on_progress(min(self.arrived, expected), expected)

    return ReportingBar


# --- publishing -------------------------------------------------------------------------------------------------------


def push(
    folder: str | Path, model_id: str, private: bool = False, revision: str | None = None, with_photos: bool = False
) -> str:
    """Publishes a checkpoint folder as the model user/name in one commit; returns the address of the commit.

    Sends the files of `FILES`, model.onnx, report/*.png and report/*.md. Unchanged files are not sent again. If nothing
    has changed, no commit is made and the address is that of the last one. What an earlier model left there, its
    model.onnx and statistics, is deleted.

    Args:
        folder: holds at least config.json and model.safetensors, within the size limits of `pull`.
        model_id: user/name; the repository is created if needed.
        private: make the repository private.
        revision: the branch, created if needed; None for main.
        with_photos: also send report/photos/*.

    Raises:
        HubError: the folder or the name is not valid, there is no token with write access, `private` is set and the
            repository is public, or the Hub cannot be reached.
    """
    folder, model_id = Path(folder), name_of(model_id)
    sizes = _sizes(folder)
    _check_sizes(sizes, str(folder))
    patterns = ["report/*.png", "report/*.md"] + (["report/photos/*"] if with_photos else [])
    report = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    names = [*sizes, *(path.relative_to(folder).as_posix() for path in report)]

    return _send(folder, names, model_id, revision, private)


def push_state(folder: Path, state: Path, model_id: str) -> None:
    """Puts a state of a training with its best model so far on the branch STATE, in one commit, in place of the last.

    `state` is a folder below the training's own. Raises HubError as `push`.
    """
    paths = [*(folder / name for name in NEEDED), *sorted(state.iterdir())]
    _send(folder, [path.relative_to(folder).as_posix() for path in paths if path.is_file()], name_of(model_id), STATE)


def pull_state(folder: Path, model_id: str) -> None:
    """Brings into a folder what `push_state` left; nothing where there is none. HubError if it cannot be fetched."""
    with hub_errors(model_id), suppress(RepositoryNotFoundError, RevisionNotFoundError):
        snapshot_download(name_of(model_id), revision=STATE, allow_patterns=["state/*", *NEEDED], local_dir=folder)


def _send(folder: Path, names: list[str], model_id: str, revision: str | None, private: bool = False) -> str:
    """Sends files in one commit, and deletes those of before that tell of another model; returns its address."""
    # Named one by one, because upload_folder is not safe here: its * matches / too, so report/*.png would send
    # report/photos/; and it may split a large upload into several commits.
    operations = [CommitOperationAdd(name, folder / name) for name in names]
    with hub_errors(model_id, sending=True):
        api = _open_repository(model_id, "model", private)
        if revision is not None:
            api.create_branch(model_id, branch=revision, exist_ok=True)
        left = set(api.list_repo_files(model_id, revision=revision)) - set(names)
        gone = [name for name in sorted(left) if name in (STATISTICS, ONNX) or name.startswith("state/")]
        operations += map(CommitOperationDelete, gone)
        commit = api.create_commit(model_id, operations, commit_message="Publish a cvlab checkpoint", revision=revision)
    return commit.commit_url


def push_space(files: dict[str, Path | bytes], space_id: str, variables: dict[str, str], private: bool = False) -> str:
    """Publishes a Gradio Space in one commit; returns the address of the Space.

    Args:
        files: path in the repository to a file or its content. In the folders named here, files that are not listed are
            deleted; all other files of the repository stay.
        space_id: user/name; the Space is created if needed.
        variables: the Space's environment variables, set before the commit.
        private: make the Space private.

    Raises:
        HubError: as `push`.
    """
    folders = {name.split("/")[0] for name in files if "/" in name}
    with hub_errors(space_id, sending=True):
        api = _open_repository(space_id, "space", private)
        for key, value in variables.items():
            api.add_space_variable(space_id, key, value)
        there = api.list_repo_files(space_id, repo_type="space")
        gone = [name for name in there if name.split("/")[0] in folders and name not in files]
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in gone]
        api.create_commit(space_id, operations, commit_message="Publish a cvlab page", repo_type="space")
    return f"{api.endpoint}/spaces/{space_id}"


def _open_repository(repo_id: str, repo_type: str, private: bool) -> HfApi:
    """Creates the repository if needed; returns the client to write to it with."""
    if not is_id(repo_id) or "@" in repo_id:
        raise HubError(f"“{repo_id}” is not the name of a repository on the Hub: write user/name, without @.")
    try:
        _probe(repo_id, None, repo_type)  # later requests wait without limit for an answer
    except HfHubHTTPError as error:  # such as 404: it is created below
        if is_temporary(error):
            raise
    api = HfApi()
    sdk = "gradio" if repo_type == "space" else None
    # None, not False: an organisation may keep its repositories private by default.
    api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True, space_sdk=sdk)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise HubError(f"{repo_id} exists and is public: make it private in its settings, or take another name.")
    return api


def _probe(repo_id: str, revision: str | None, repo_type: str = "model") -> str:
    """Asks the Hub for the commit of a revision, once and for at most PROBE_SECONDS.

    huggingface_hub itself waits without limit for an answer, and repeats a failed request for 23 s. The request runs in
    a thread because the client's timeout does not cover the look-up of the Hub's address.

    Raises:
        httpx2.HTTPError, OSError: there was no answer, or a refusal.
    """
    answer: Future[str] = Future()

    def ask() -> None:
        try:
            info = HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=PROBE_SECONDS)
            answer.set_result(info.sha)
        except Exception as error:  # raised where the answer is waited for
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(timeout=PROBE_SECONDS)
    except TimeoutError:
        raise httpx2.ConnectTimeout(f"no answer within {PROBE_SECONDS:g} seconds") from None
