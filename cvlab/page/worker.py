"""A process apart for models that the owner of the page did not name: whatever they do, the page itself lives on.

    python -m cvlab.page.worker < jobs > answers

The page writes one line of JSON for each event, and reads lines of JSON: how far it is, and at last the answer or a
sentence. The worker may take only so much memory, and may be silent only so long; then it is ended, and the next event
starts another one.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from cvlab.checkpoint import hub
from cvlab.page import host
from cvlab.page.events import Events, Report
from cvlab.page.models import Models

ROOT = Path(__file__).resolve().parents[2]
GIB = 2.5  # of memory, beyond what it has when it begins
SILENT = 120.0  # seconds without a word, after which it is ended
MOST_WAITING = 8  # events: the page answers ten at once, and the others go on
STOPPED = (
    "This model was stopped: the page limits the memory and the time of models that it did not come with. On a machine "
    "of your own `python app.py user/name` has no such limits."
)
BUSY = "Too many visitors ask for models that this page did not come with: try again in a minute."


class Refusal(Models):
    """Models of which none opens, for one reason: the page then says it where it says why a model does not open."""

    def __init__(self, reason: Exception) -> None:
        super().__init__({})
        self.reason = reason

    def __getitem__(self, name: str) -> None:
        raise self.reason


class SafeEvents:
    """The events of a page: worked on here, or by the worker where a model is not one that the owner named.

    Args:
        models: what the page opens.
        report: shows the visitor how far the work is.
    """

    def __init__(self, models: Models, report: Report) -> None:
        self.models, self.report = models, report
        self.here, self.process, self.lock = Events(models, report), None, threading.Lock()
        self.line = threading.BoundedSemaphore(MOST_WAITING)
        self.command = [sys.executable, "-m", "cvlab.page.worker", json.dumps(models.offered)]

    def run(self, event: str, names: list[str], *arguments: object) -> object:
        """The answer to an event of `Events`; `names` are those of the models in it."""
        try:
            foreign = filter(self.models.is_foreign, names)
            if folders := {hub.name_of(name): str(self.models.folder(name)) for name in foreign}:
                if not self.line.acquire(blocking=False):
                    raise ValueError(BUSY)
                try:
                    return self.work(event, arguments, folders)
                finally:
                    self.line.release()
        except (ValueError, OSError) as error:
            return getattr(Events(Refusal(error), self.report), event)(*arguments)
        return getattr(self.here, event)(*arguments)

    def work(self, event: str, arguments: tuple, folders: dict[str, str]) -> object:
        """The answer of the worker. One event after the other: a second large model would need the same memory again.

        Raises:
            ValueError: what the event raised, or the worker was ended.
        """
        with self.lock:
            process, kind, value = self.running() or self.started(), "progress", None
            self.process = process
            try:
                with suppress(BrokenPipeError):  # it died: it says nothing more
                    print(json.dumps([event, arguments, folders]), file=process.stdin, flush=True)
                while kind == "progress" and (line := self.next_line(process)):
                    kind, value = json.loads(line)
                    if kind == "progress":
                        self.report(*value)
            finally:
                if kind == "progress":  # it ended, or nobody waits: what it still says is no answer to the next event
                    process.kill()
                    process.wait()
        if kind == "answer":
            return value
        raise ValueError(value if kind == "error" else STOPPED)

    def next_line(self, process: subprocess.Popen) -> str:
        """What the worker says next; empty when it died or was silent for too long."""
        timer = threading.Timer(SILENT, process.kill)
        timer.start()
        try:
            return process.stdout.readline()
        finally:
            timer.cancel()

    def running(self) -> subprocess.Popen | None:
        """The worker, if it is alive."""
        return self.process if self.process and self.process.poll() is None else None

    def started(self) -> subprocess.Popen:
        """Another worker, which ends with the page."""
        found = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {host.WORKER_OF: str(host.own_folder()), "PYTHONPATH": found}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the memory that it could take of a GPU has no limit
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(self.command, env=environment, text=True, encoding="utf-8", **pipes)
        atexit.register(process.kill)
        return process


def main() -> None:
    """The worker itself."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    limit_memory()

    def say(kind: str, value: object) -> None:
        print(json.dumps([kind, value]), file=answers, flush=True)

    folders: dict[str, str] = {}
    models = Models(json.loads(sys.argv[1]), fetch=lambda name: Path(folders[name]))
    events = Events(models, lambda *done: say("progress", done))
    for line in sys.stdin:
        event, arguments, given = json.loads(line)
        folders |= given
        try:
            say("answer", getattr(events, event)(*arguments))
        except (ValueError, OSError) as error:
            say("error", host.sentence_of(error))
        except Exception as error:  # mostly for want of memory, which leaves nothing to rely on
            sys.exit(f"The worker of the page ends: {type(error).__name__}: {error}")


def limit_memory() -> None:
    """Refuses this process more than GIB of memory beyond what it has, where the system can (Linux)."""
    with suppress(ImportError, OSError):
        import resource

        status = Path("/proc/self/status").read_text()
        has = int(status.partition("VmData:")[2].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, 2 * [has + int(GIB * 2**30)])


if __name__ == "__main__":
    main()
