"""Somebody's machine before the Hub of hub_server.py: a process with a cache, a token and the true huggingface_hub.

huggingface_hub reads its environment when it is imported, so a client cannot share a process with another. torch takes
seconds to import and does not read that environment: it is imported once, and the clients are forked from there.
"""

import ctypes
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path

from hub_server import Hub

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_of_a_test"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "httpx2"])


class Client:
    """A cache in `home` and a token. `call` runs functions one after the other in a process of its own."""

    def __init__(self, hub: Hub, home: Path, token: str | None = TOKEN, **env: str) -> None:
        self.home = home
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.env |= hub.env(home, token) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env
        self.process: multiprocessing.Process | None = None
        self.connection: Connection | None = None

    def send(self, function: Callable, *arguments: object, **options: object) -> None:
        """Lets the process call a function of a module, and does not wait for the answer."""
        if self.process is None:
            self.connection, there = FORKS.Pipe()
            self.process = FORKS.Process(target=answer_calls, args=(there, self.env), daemon=True)
            self.process.start()
            there.close()
        self.connection.send((function, arguments, options))

    def call(self, function: Callable, *arguments: object, **options: object) -> object:
        """What the function returns in the process; what it raises there is raised here."""
        self.send(function, *arguments, **options)
        assert self.connection.poll(100), f"no answer of {function.__name__}"
        answer = self.connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def pull(self, model_id: str, **constants: float) -> Path:
        return self.call(of_hub, "pull", [model_id], {}, constants)

    def push(self, folder: Path, model_id: str, **options: object) -> str:
        return self.call(of_hub, "push", [folder, model_id], options)

    def command(self, *words: object) -> str:
        """`python WORDS`, in the process; returns what is printed."""
        return self.call(run_script, [str(word) for word in words])

    def run(self, *words: object) -> subprocess.CompletedProcess:
        """`python WORDS`, as somebody types it."""
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=100)

    def cached(self) -> set[str]:
        """Names of all files in the snapshots of the cache."""
        folders = self.home.glob("hub/*/snapshots/*")
        return {
            path.relative_to(folder).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()
        }


# --- in the process of a client ---------------------------------------------------------------------------------------


def answer_calls(connection: Connection, env: dict[str, str]) -> None:
    """Calls what comes, until the other end is closed."""
    os.environ.clear()
    os.environ.update(env)
    while True:
        try:
            function, arguments, options = connection.recv()
        except EOFError:
            return
        try:
            connection.send(function(*arguments, **options))
        except (Exception, SystemExit) as error:
            connection.send(error)


def of_hub(function: str, arguments: Sequence, options: dict, constants: dict | None = None) -> object:
    """A function of cvlab.checkpoint.hub, with other constants of the module."""
    from cvlab.checkpoint import hub

    before = dict(vars(hub))
    vars(hub).update(constants or {})
    try:
        return getattr(hub, function)(*arguments, **options)
    finally:
        vars(hub).update(before)


def run_script(words: Sequence[str]) -> str:
    sys.argv = [*words]
    with redirect_stdout(StringIO()) as printed:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    return printed.getvalue()


def logits_of(model_id: str, images: list) -> list:
    import torch

    from cvlab import checkpoint

    with torch.no_grad():
        return checkpoint.load(model_id)(torch.tensor(images)).tolist()


def logits_by_timm(model_id: str, normalized: list) -> list:
    """By timm alone."""
    assert not [name for name in sys.modules if name.startswith("cvlab")]
    import timm
    import torch

    model = timm.create_model(f"hf-hub:{model_id}", pretrained=True).eval()
    with torch.no_grad():
        return model(torch.tensor(normalized)).tolist()


def progress_of_pull(model_id: str) -> list[tuple[int, int]]:
    """The calls of on_progress."""
    from cvlab.checkpoint import hub

    calls = []
    hub.pull(model_id, lambda arrived, expected: calls.append((arrived, expected)))
    return calls


def warnings_of_pull(model_id: str, largest_file: int | None = None) -> tuple[Path, list[str]]:
    """The folder, and the warnings, by a process that may write no larger file, and root's files only as the owner."""
    import logging
    import resource

    from cvlab.checkpoint import hub

    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    give_up_rights()
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    hub.log.addHandler(handler)
    return hub.pull(model_id), warned


def give_up_rights() -> None:
    """root may write anywhere; without its capabilities it is refused like everybody else."""
    if os.geteuid() == 0:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # capset of version 3
        assert ctypes.CDLL(None).capset(header, nothing) == 0
