"""Who does which run of a sweep: any number of processes, on one machine or several, that share a folder.

FOLDER/journal.log   Optuna's journal: every run that there is, who draws its options, how it ended
FOLDER/001, 002 ...  the folders of the runs, each with the sign of life of the process that does it in the file alive

A run is taken under a lock, so by one process only. A process that gives no sign of life is dead; its run waits again,
as a new trial of the same number.
"""

import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from cvlab.files import write_text

# A process without a sign of life for so many seconds is dead. One of this machine can be looked up besides; network
# folders show up to a minute late what another machine wrote.
DEAD_HERE, DEAD_ELSEWHERE = 3.0, 120.0


def open_study(out: Path, plan: dict) -> optuna.Study:
    """The study of a sweep's folder, begun if there is none.

    Args:
        plan: the sweep as JSON; plan["runs"] has the options of each run, None where they are to be drawn.

    Raises:
        ValueError: the folder holds a sweep by another plan.
    """
    journal = out / "journal.log"
    if not journal.exists():
        out.mkdir(parents=True, exist_ok=True)
        writing = out / f".journal.{platform.node()}.{os.getpid()}.tmp"
        writing.unlink(missing_ok=True)
        study = optuna.create_study(storage=_storage(writing), study_name="sweep", direction="maximize")
        study.set_user_attr("plan", plan)
        for run, chosen in enumerate(plan["runs"], 1):
            study.enqueue_trial({}, user_attrs={"run": run, "options": chosen})
        with suppress(FileExistsError):  # of several processes that begin at once, the first one's journal stands
            os.link(writing, journal)
        writing.unlink()
    study = optuna.load_study(study_name="sweep", storage=_storage(journal), pruner=optuna.pruners.MedianPruner())
    if study.user_attrs["plan"] != plan:
        raise ValueError(f"{out} holds a sweep by another command: choose another --out, or type that command again.")
    return study


def _storage(journal: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(journal)))


def latest(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The last attempt at each run, by the run's number."""
    return {trial.user_attrs["run"]: trial for trial in study.trials}


class Claims:
    """The runs of a study as one process takes them. What had failed before it began is tried once more."""

    def __init__(self, study: optuna.Study, out: Path) -> None:
        self.study, self.out = study, out
        self.owner = f"{platform.node()} {os.getpid()}"
        self.signs: dict[int, tuple[str, float]] = {}  # of each run: the last sign of life, and when it was new here
        self.failed_before = {run for run, trial in latest(study).items() if trial.state == TrialState.FAIL}

    def all_finished(self) -> bool:
        """Whether nothing is left to do, also by other processes."""
        return not any(not trial.state.is_finished() or self._lost(trial) for trial in latest(self.study).values())

    def take(self) -> optuna.Trial | None:
        """The next run that waits, for this process alone; None where there is none."""
        lock = JournalFileOpenLock(str(self.out / "claims"))
        lock.acquire()
        try:
            for run, trial in latest(self.study).items():
                dead = trial.state == TrialState.RUNNING and self._is_dead(run)
                if dead:
                    self.study.tell(trial.number, state=TrialState.FAIL)
                if dead or self._lost(trial):
                    chosen = trial.user_attrs["options"]
                    self.study.enqueue_trial(trial.params, user_attrs={"run": run, "options": chosen})
            self.failed_before.clear()
            if not self.study.get_trials(states=[TrialState.WAITING]):
                return None
            trial = self.study.ask()
            self.folder(trial).mkdir(exist_ok=True)
            self.sign(trial)
            return trial
        finally:
            lock.release()

    def folder(self, trial: optuna.Trial | FrozenTrial) -> Path:
        """Where a run keeps its files."""
        return self.out / f"{trial.user_attrs['run']:03}"

    def sign(self, trial: optuna.Trial) -> None:
        """Gives a sign of life; to be repeated every second or so."""
        write_text(self.folder(trial) / "alive", f"{self.owner} {time.monotonic()}")

    def is_mine(self, trial: optuna.Trial) -> bool:
        """False where this process slept so long that another one took its run."""
        return (self.folder(trial) / "alive").read_text().startswith(f"{self.owner} ")

    def _lost(self, trial: FrozenTrial) -> bool:
        """Failed, and not given up: without a reason its process died, the others had failed before this one began."""
        given_up = "reason" in trial.user_attrs and trial.user_attrs["run"] not in self.failed_before
        return trial.state == TrialState.FAIL and not given_up

    def _is_dead(self, run: int) -> bool:
        """Whether the owner of a run gave no sign of life for too long, by this process's own clock."""
        path = self.out / f"{run:03}" / "alive"
        sign = path.read_text() if path.exists() else ""
        if sign != self.signs.get(run, (None, 0))[0]:
            self.signs[run] = (sign, time.monotonic())
        host, pid = (sign.split() + ["", "0"])[:2]
        patience = DEAD_HERE if host == platform.node() and not _process_exists(int(pid)) else DEAD_ELSEWHERE
        return time.monotonic() - self.signs[run][1] > patience


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists, and is another user's
        pass
    return True
