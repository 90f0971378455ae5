"""Hands the runs of a sweep to its workers; a run whose worker died is queued again.

A worker is a process of train/sweep.py. Any number of them share the folder of a sweep, on one machine or several:

FOLDER/journal.log   Optuna's journal: every run, its options, how it ended; journal.lock is held while it is written
FOLDER/queue.lock    held by the worker that takes a run: one at a time
FOLDER/NNN/lock      held by the worker that trains run NNN

The system takes the lock of a worker that died, also of a killed one. Its run is queued again, as another trial with
the same run number. Workers on several machines need a folder whose file locks bind them all, as those of NFS 4 do.
"""

from pathlib import Path

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState


class Journal(JournalFileBackend):
    """Of a worker that died the system takes the lock; the half line that it left, as on a full disk, is cut off."""

    def append_logs(self, logs: list[dict]) -> None:  # noqa: D102
        with self._lock, open(self._file_path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
            super().append_logs(logs)


def open_study(out: Path, plan: dict) -> optuna.Study:
    """Opens the study of a sweep's folder, and creates it if there is none.

    `plan` is the sweep as JSON; plan["runs"] has the options of each run, None where a sampler draws them.
    """
    out.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(Journal(str(out / "journal.log"), FileLock(out / "journal.lock")))
    names = {"study_name": "sweep", "direction": "maximize", "load_if_exists": True}
    with FileLock(out / "queue.lock"):
        study = optuna.create_study(storage=storage, pruner=optuna.pruners.MedianPruner(), **names)
        if study.user_attrs.get("plan", plan) != plan:
            raise ValueError(f"{out} holds the sweep of another command: choose another --out, or repeat that command.")
        study.set_user_attr("plan", plan)
        queued = latest(study)  # all of them, unless the first worker was killed here
        for run, options in enumerate(plan["runs"], 1):
            if run not in queued:
                study.enqueue_trial({}, user_attrs={"run": run, "options": options})
    return study


def latest(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The last attempt at each run, by run number."""
    return {trial.user_attrs["run"]: trial for trial in study.trials}


class RunQueue:
    """The runs of a study as one worker sees them. Runs that had failed before it started are tried once more."""

    def __init__(self, study: optuna.Study, out: Path) -> None:
        self.study, self.out = study, out
        self.failed_before = {run for run, trial in latest(study).items() if trial.state == TrialState.FAIL}

    def is_done(self) -> bool:
        """Whether no worker has anything left to do."""
        return all(trial.state.is_finished() and not self._try_again(trial) for trial in latest(self.study).values())

    def take(self) -> tuple[optuna.Trial, FileLock] | None:
        """The next waiting run with its lock, for this worker alone until it releases that; None if no run is waiting.

        How the run ended has to be recorded before the release.
        """
        with FileLock(self.out / "queue.lock"):
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
            lock = self._lock(trial.user_attrs["run"])
            lock.acquire()
            return trial, lock

    def folder(self, run: int) -> Path:
        """The folder of a run."""
        return self.out / f"{run:03}"

    def _try_again(self, trial: FrozenTrial) -> bool:
        """Whether a run failed because its worker died, which leaves no reason, or before this worker started."""
        failed = trial.state == TrialState.FAIL
        return failed and ("reason" not in trial.user_attrs or trial.user_attrs["run"] in self.failed_before)

    def _is_dead(self, run: int) -> bool:
        """Whether a run has no worker and no end: one records the end, then lets go of the lock."""
        try:
            with self._lock(run).acquire(timeout=0):
                return latest(self.study)[run].state == TrialState.RUNNING
        except Timeout:
            return False

    def _lock(self, run: int) -> FileLock:
        self.folder(run).mkdir(exist_ok=True)
        return FileLock(self.folder(run) / "lock")
