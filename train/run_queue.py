"""Hands the runs of a sweep to its workers; the run of a worker that died is continued by another one.

A worker is a process of train/sweep.py. Any number of them share the folder of a sweep, on one machine or several:

FOLDER/journal.log   Optuna's journal: every run, its options, how it ended; journal.lock is held while it is written
FOLDER/queue.lock    held by a worker that opens the sweep
FOLDER/NNN/lock      held by the worker that trains run NNN; the system takes it from one that died, also by a kill

Run NNN is Optuna's trial NNN - 1. With --storage a database stands in for the journal. Workers on several machines
need a folder whose file locks bind them all, as those of NFS 4 do.
"""

from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import OptunaError
from optuna.samplers import GPSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

SAMPLERS = {"tpe": TPESampler, "random": RandomSampler, "gp": GPSampler}
OF_A_DATABASE = (ImportError, OptunaError, SQLAlchemyError)  # its driver is absent, it does not answer, or refuses


class Journal(JournalFileBackend):
    """Of a worker that died the system takes the lock; the half line that it left, as on a full disk, is cut off."""

    def append_logs(self, logs: list[dict]) -> None:  # noqa: D102
        with self._lock, open(self._file_path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)


def open_study(out: Path, plan: dict, database: str | None = None) -> optuna.Study:
    """Opens the study of a sweep's folder, and creates it if there is none. What had failed is to be tried again.

    `plan` is the sweep as JSON; plan["runs"] has the options of each run, None where a sampler draws them. `database`
    is an SQLAlchemy URL, in place of the folder's journal. Raises OF_A_DATABASE.
    """
    out.mkdir(parents=True, exist_ok=True)
    with FileLock(out / "queue.lock"):  # all runs are queued once
        if database:
            storage, name = RDBStorage(database), f"cvlab sweep in {out.resolve()}"
        else:
            storage, name = JournalStorage(Journal(str(out / "journal.log"), FileLock(out / "journal.lock"))), "sweep"
        names = {"study_name": name, "direction": "maximize", "load_if_exists": True}
        study = optuna.create_study(storage=storage, pruner=optuna.pruners.MedianPruner(), **names)
        if study.user_attrs.get("plan", plan) != plan:
            raise ValueError(f"{out} holds the sweep of another command: choose another --out, or repeat that command.")
        study.set_user_attr("plan", plan)
        for trial in study.trials:
            if trial.user_attrs.get("reason"):
                storage.set_trial_user_attr(trial._trial_id, "reason", None)
        for options in plan["runs"][len(study.trials) :]:  # all of them, unless the first worker was killed here
            study.enqueue_trial({}, user_attrs={"options": options})
    return study


def is_over(trial: FrozenTrial) -> bool:
    """Whether a run has ended. One that failed keeps Optuna's state "running", so that it can be tried again."""
    return trial.state.is_finished() or bool(trial.user_attrs.get("reason"))


def take(study: optuna.Study, out: Path) -> tuple[Trial, FileLock] | None:
    """The next run that has no worker, with its lock, for this worker alone until it releases that; None without any.

    How the run ended has to be recorded before the release.
    """
    for i, listed in enumerate(study.trials):
        if is_over(listed):
            continue
        folder_of(out, i).mkdir(exist_ok=True)
        lock = FileLock(folder_of(out, i) / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        trial = study.trials[i]  # with the lock in hand: another worker may have ended it just before
        # A running one lost its worker; a waiting one the storage gives to one worker only.
        running, start = trial.state == TrialState.RUNNING, study._storage.set_trial_state_values
        if not is_over(trial) and (running or start(trial._trial_id, TrialState.RUNNING)):
            plan = study.user_attrs["plan"]
            # The number is in the seed: workers with the same seed would all begin with the same draw.
            study.sampler = SAMPLERS[plan["sampler"]](seed=plan["seed"] + i)
            return Trial(study, trial._trial_id), lock
        lock.release()
    return None


def folder_of(out: Path, number: int) -> Path:
    """The folder of a run, by its trial's number."""
    return out / f"{number + 1:03}"
