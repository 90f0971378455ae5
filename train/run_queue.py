"""Hands the runs of a sweep to its workers; a run whose worker died is queued again.

A worker is a process of train/sweep.py. Any number of them share the folder of a sweep, on one machine or several:

FOLDER/journal.log     Optuna's journal: every run, its options, how it ended
FOLDER/NNN/heartbeat   names the worker of run NNN, which touches the file every second

Workers take runs under a lock, one worker at a time. A worker whose heartbeat stops is dead: its run is queued again,
as another trial with the same run number. A file lock that the worker holds would be shorter, but on a network folder
it may bind only the workers of one machine (sshfs, or NFS mounted with local_lock), and NFS 3 keeps the lock of a
machine that crashed.
"""

import errno
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from cvlab.files import write_text

# Seconds without a heartbeat after which a worker is dead: one whose process does not exist on this machine, and any
# other one. Network folders may show a change a minute late.
DEAD_HERE, DEAD_ELSEWHERE = 3.0, 120.0


def open_study(out: Path, plan: dict) -> optuna.Study:
    """Opens the study of a sweep's folder, and creates it if there is none.

    `plan` is the sweep as JSON; plan["runs"] has the options of each run, None where a sampler draws them.
    """
    out.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(out / "journal.log")))
    names = {"study_name": "sweep", "direction": "maximize", "load_if_exists": True}
    with _locked(out):
        study = optuna.create_study(storage=storage, pruner=optuna.pruners.MedianPruner(), **names)
        if study.user_attrs.get("plan", plan) != plan:
            raise ValueError(f"{out} holds the sweep of another command: choose another --out, or repeat that command.")
        study.set_user_attr("plan", plan)
        queued = latest(study)  # all of them, unless the first worker was killed here
        for run, options in enumerate(plan["runs"], 1):
            if run not in queued:
                study.enqueue_trial({}, user_attrs={"run": run, "options": options})
    return study


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One worker at a time, on network folders too."""
    lock = JournalFileOpenLock(str(out / "queue"))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def latest(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The last attempt at each run, by run number."""
    return {trial.user_attrs["run"]: trial for trial in study.trials}


class RunQueue:
    """The runs of a study as one worker sees them. Runs that had failed before it started are tried once more."""

    def __init__(self, study: optuna.Study, out: Path) -> None:
        self.study, self.out = study, out
        self.worker = f"{platform.node()} {os.getpid()}"
        self.heartbeats: dict[int, tuple[tuple, float]] = {}  # by run: the last one, and when this worker first saw it
        self.failed_before = {run for run, trial in latest(study).items() if trial.state == TrialState.FAIL}

    def is_done(self) -> bool:
        """Whether no worker has anything left to do."""
        return all(trial.state.is_finished() and not self._try_again(trial) for trial in latest(self.study).values())

    def take(self) -> optuna.Trial | None:
        """The next waiting run, for this worker alone; None if no run is waiting."""
        with _locked(self.out):
            for run, trial in latest(self.study).items():
                died = trial.state == TrialState.RUNNING and self._is_dead(run)
                if died:
                    self.study.tell(trial.number, state=TrialState.FAIL)
                if died or self._try_again(trial):
                    options = trial.user_attrs["options"]
                    self.study.enqueue_trial(trial.params, user_attrs={"run": run, "options": options})
            self.failed_before.clear()
            if not self.study.get_trials(states=[TrialState.WAITING]):
                return None
            trial = self.study.ask()
            write_text(self.folder(trial.user_attrs["run"]) / "heartbeat", self.worker)
            return trial

    def folder(self, run: int) -> Path:
        """The folder of a run."""
        return self.out / f"{run:03}"

    def beat(self, run: int) -> bool:
        """Gives this worker's heartbeat. False if it had paused for so long that another worker took the run."""
        heartbeat = self.folder(run) / "heartbeat"
        if heartbeat.read_text() != self.worker:
            return False
        heartbeat.touch()
        return True

    def _try_again(self, trial: FrozenTrial) -> bool:
        """Whether a run failed because its worker died, which leaves no reason, or before this worker started."""
        failed = trial.state == TrialState.FAIL
        return failed and ("reason" not in trial.user_attrs or trial.user_attrs["run"] in self.failed_before)

    def _is_dead(self, run: int) -> bool:
        """Whether the worker of a run gave no heartbeat for too long, by this worker's own clock."""
        path = self.folder(run) / "heartbeat"
        heartbeat = (path.read_text(), path.stat().st_mtime_ns) if path.exists() else ("", 0)
        if self.heartbeats.get(run, (None, 0))[0] != heartbeat:
            self.heartbeats[run] = (heartbeat, time.monotonic())
        host, _, pid = heartbeat[0].rpartition(" ")
        patience = DEAD_HERE if host == platform.node() and not _process_exists(int(pid)) else DEAD_ELSEWHERE
        return time.monotonic() - self.heartbeats[run][1] > patience


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # "no such process"; another user's must not be asked
    return True
