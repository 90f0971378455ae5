"""Trains many times, over a grid, a list or a sampler's choice of options, and names the best run by validation.

    python train/sweep.py classifier --over lr=1e-4,1e-3 batch_size=16,32 --out runs/sweep -- --data DIR --epochs 20
    python train/sweep.py classifier --over lr=1e-4..1e-1 optimizer=sgd,adamw --trials 20 -- --data DIR
    python train/sweep.py --recipe scenes8-sweep --data DIR

What stands after -- goes to every run. After a stop or a crash the same command continues the sweep. Starting it again
in another terminal, or on another machine that shares the folder, adds a worker (run_queue.py). Eight on a cluster:

    sbatch --array=1-8 --gpus=1 --wrap "python train/sweep.py ... --storage postgresql://user@host/name --out SHARED"

OUT/001, 002, ...                     run folders of the script; what it printed is in their log.txt
OUT/README.md, runs.csv, curves.png   the table of the runs, the best in bold, and their losses and scores
OUT/by_OPTION.png                     what the option that took most numbers does to the score: have I enough photos?

    python train/sweep.py classifier --over "per_class=25 50,50 50,100 50" seed=0,1,2 -- --data DIR
"""

import argparse
import ctypes
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import cli
import optuna
from optuna.trial import TrialState
from run_queue import OF_A_DATABASE, SAMPLERS, folder_of, is_over, open_study, take
from sweep_plan import SCRIPTS, as_words, draw, find_script, make_plan
from sweep_tables import best_run, kept_epoch, markdown, table, val_scores, write_tables

POLL = 1.0  # seconds between two looks at a run
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def main() -> None:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", help=f"{', '.join(SCRIPTS)}, or the path of a similar script of your own")
    parser.add_argument("--data", type=Path, help="data folder of every run, as after --")
    parser.add_argument("--over", nargs="+", metavar="OPTION=VALUES", default=[], help=(
        "lr=1e-4,1e-3 (values), lr=1e-4..1e-1 (a range, logarithmic from a factor of ten), augment=on,off (a switch)"
    ))  # fmt: skip
    parser.add_argument("--trials", type=int, help="number of runs that a sampler draws, instead of the whole grid")
    parser.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="of Optuna; default tpe")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--prune", action=argparse.BooleanOptionalAction, help=(
        "stop a run while its val score is below the median of the others; by default only with --trials"
    ))  # fmt: skip
    parser.add_argument("--storage", metavar="URL", help="a database for the workers, in place of a journal in --out")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the sweep; default runs/sweep")
    args = parser.parse_args(sys.argv[1:cut])
    recipe = cli.read_recipe(args.recipe) if args.recipe else {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the training saves its state first

    plan = make_plan(args, recipe, sys.argv[cut + 1 :])
    try:
        study = open_study(args.out, plan, args.storage)
        while not all(map(is_over, study.trials)):
            if taken := take(study, args.out):
                trial, lock = taken
                train(study, trial, args.out)
                lock.release()
                write_tables(study, args.out)
            else:
                time.sleep(POLL)  # other workers have the last runs, and may die
            show(study, args.out)
        write_tables(study, args.out)
        conclude(study, args.out)
    except KeyboardInterrupt:
        sys.exit("\nStopped; every finished epoch is saved. The same command continues.")
    except OF_A_DATABASE as error:
        if not args.storage:
            raise
        needed = "It has to answer; PostgreSQL also needs pip install 'psycopg[binary]'."
        raise ValueError(f"The database of --storage is of no use. {needed} {error}") from error


def train(study: optuna.Study, trial: optuna.Trial, out: Path) -> None:
    """Runs the script until it ends or is pruned; records how it ended."""
    plan, folder = study.user_attrs["plan"], folder_of(out, trial.number)
    options = trial.user_attrs["options"] or {
        name: draw(trial, name, values) for name, values in plan["ranges"].items()
    }
    trial.set_user_attr("options", options)
    command = [sys.executable, str(find_script(plan["script"])), *plan["fixed"], *as_words(options)]
    command += ["--out", str(folder), "--resume"]
    with open(folder / "log.txt", "ab") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_the_sweep)
    reported = len(study.trials[trial.number].intermediate_values)
    try:
        while child.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(POLL)
            scores = val_scores(folder)
            for epoch in list(scores)[reported:] if plan["prune"] else []:
                trial.report(scores[epoch], epoch)
            reported = len(scores)
            if plan["prune"] and child.returncode is None and trial.should_prune():
                child.terminate()
                child.wait()
                study.tell(trial, state=TrialState.PRUNED)
                return
            show(study, out)
    except KeyboardInterrupt:
        child.terminate()  # it finishes its step and saves
        child.wait()
        raise
    if child.returncode == 0 and scores:
        study.tell(trial, scores[kept_epoch(folder)])
    else:
        lines = (folder / "log.txt").read_text(errors="replace").splitlines()
        printed = [line.strip() for line in lines if line.strip()]
        trial.set_user_attr("reason", printed[-1] if printed else "it printed nothing")


def die_with_the_sweep() -> None:
    """Asks Linux to kill the training when its worker dies: it would go on beside the one that replaces it."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def show(study: optuna.Study, out: Path) -> None:
    """Shows the table on a cleared terminal; nothing if the output goes elsewhere."""
    if sys.stdout.isatty():
        print(f"\033[H\033[J{markdown(table(study, out), best_run(study))}", flush=True)


def conclude(study: optuna.Study, out: Path) -> None:
    """Prints the table and the best run; ends with status 1 and the reasons if runs failed."""
    print((out / "README.md").read_text())
    fixed = study.user_attrs["plan"]["fixed"]
    data = f" --data {shlex.quote(fixed[fixed.index('--data') + 1])}" if "--data" in fixed else ""
    if best := best_run(study):
        print(f"Best by validation. Measure it once:  python train/evaluate.py {out / best}{data} --part test")
    failed = {trial.number: trial.user_attrs["reason"] for trial in study.trials if trial.user_attrs.get("reason")}
    if failed:
        reasons = "\n".join(f"  {number + 1:03}: {reason}" for number, reason in failed.items())
        sys.exit(f"{len(failed)} of {len(study.trials)} runs failed; the same command tries them again:\n{reasons}")


if __name__ == "__main__":
    cli.run(main)
