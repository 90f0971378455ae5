"""Trains many times, over a grid, a list or a sampler's draws of options, and names the best run by validation.

    python train/sweep.py classifier --over lr=1e-4,1e-3 batch_size=16,32 --out runs/sweep -- --data DIR --epochs 20
    python train/sweep.py classifier --over lr=1e-4..1e-1 optimizer=sgd,adamw --trials 20 -- --data DIR
    python train/sweep.py --recipe scenes8-sweep --data DIR

What stands after -- goes to every run. The same command goes on where a sweep was stopped or killed; typed once more in
another terminal, or on another machine that shares the folder, it takes its part of the runs (claims.py).

OUT/001, 002, ...                     run folders of the script, what it printed is in their log.txt
OUT/README.md, runs.csv, curves.png   the table of the runs, the best in bold, and their validation curves
"""

import argparse
import csv
import ctypes
import io
import itertools
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import optuna
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import cli
from claims import Claims, latest, open_study

from cvlab import render
from cvlab.files import write_text

SCRIPTS = ("classifier", "segmenter", "transfer")
SAMPLERS = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "gp": optuna.samplers.GPSampler,
}
OURS = {"out", "resume", "push"}  # options of a run that the sweep gives itself, or that many runs cannot share
LOOK = 1.0  # seconds from one look at a run to the next
STATES = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def main() -> None:
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", nargs="?", help=f"{', '.join(SCRIPTS)}, or the path of your own script like them")
    parser.add_argument("--data", type=Path, help="data folder of every run, as after --")
    parser.add_argument("--over", nargs="+", metavar="OPTION=VALUES", default=[], help=(
        "lr=1e-4,1e-3 (values), lr=1e-4..1e-1 (a range, logarithmic from a factor of ten), cosine=on,off (a switch)"
    ))  # fmt: skip
    parser.add_argument("--trials", type=int, help="let a sampler draw so many runs, instead of the whole grid")
    parser.add_argument("--sampler", choices=SAMPLERS, default="tpe", help="Optuna's; default tpe")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--prune", action=argparse.BooleanOptionalAction, help=(
        "stop runs whose val score stays under the median of the others; by default only with --trials"
    ))  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the sweep; default runs/sweep")
    args = parser.parse_args(sys.argv[1:cut])
    recipe = cli.read_recipe(args.recipe) if args.recipe else {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run in hand saves its state first

    study = open_study(args.out, planned(args, recipe, sys.argv[cut + 1 :]))
    claims = Claims(study, args.out)
    try:
        while not claims.all_finished():
            if trial := claims.take():
                carry_out(study, trial, claims)
                write_tables(study, args.out)
            else:
                time.sleep(LOOK)  # the last runs are in other hands, which may die
            show(study, args.out)
    except KeyboardInterrupt:
        sys.exit("\nStopped; what was trained is safe. The same command goes on.")
    write_tables(study, args.out)
    conclude(study, args.out)


def planned(args: argparse.Namespace, recipe: dict, fixed: list[str]) -> dict:
    """What makes a sweep this one and no other, as JSON. Its "runs" are the options of each run as text, or None where
    a sampler is to draw them from "ranges".

    Raises:
        ValueError: a script, option or value that cannot be; the message names the nearest.
    """
    name_of_script = args.script or recipe.get("of")
    script = find_script(name_of_script)
    fixed = recipe.get("fixed", []) + (["--data", str(args.data)] if args.data else []) + fixed
    ranges = {}
    for word in args.over:
        name, _, values = word.partition("=")
        if not all(values.split(",")):
            raise ValueError(f"--over {word}: write OPTION=VALUE,VALUE or OPTION=LOW..HIGH.")
        ranges[name.replace("-", "_")] = values
        borders(word, values)
    if args.trials:
        runs = [None] * args.trials
    elif any(".." in values for values in ranges.values()):
        raise ValueError("A range has no end of values: say with --trials how many runs a sampler shall draw.")
    else:
        listed = [{name: as_text(value) for name, value in row.items()} for row in recipe.get("runs", [{}])]
        grid = itertools.product(*(dict.fromkeys(values.split(",")) for values in ranges.values()))
        runs = [dict(zip(ranges, values, strict=True)) | row for values in grid for row in listed]

    swept = {*ranges, *itertools.chain(*filter(None, runs))} - {"report"}
    if not swept:
        raise ValueError("Nothing to sweep over: give --over OPTION=VALUES, or a --recipe that lists runs.")
    given = {word[2:].split("=")[0].replace("-", "_") for word in fixed if word.startswith("--")}
    for name in sorted(swept | given):
        if name in OURS:
            raise ValueError(f"--{name} is not for the runs of a sweep: it gives each a folder of its own.")
        if name in swept & given:
            raise ValueError(f"{name} is given after -- and swept over as well: leave it out at one of the two places.")
    if script.parent == Path(__file__).parent:  # of another script its runs will say what it does not know
        texts = script.read_text() + Path(cli.__file__).read_text()
        known = [name.replace("-", "_") for name in re.findall(r'"--([a-z][a-z0-9-]*)"', texts)]
        for name in sorted(swept | given):
            if name.removeprefix("no_") not in known and name not in known:
                raise ValueError(f"{script.name} has no option {name}{cli.nearest(name, known)}")
    prune = bool(args.trials) if args.prune is None else args.prune
    settings = {"sampler": args.sampler, "seed": args.seed, "prune": prune}
    return {"script": name_of_script, "fixed": fixed, "ranges": ranges, "runs": runs, **settings}


def find_script(name: str | None) -> Path:
    """The file of a training script by its name, or by its path."""
    if name is None:
        raise ValueError(f"Which script? One of {', '.join(SCRIPTS)}, or the path of your own.")
    path = Path(name) if name.endswith(".py") else Path(__file__).with_name(f"{name}.py")
    if not path.is_file() or path.stem == name not in SCRIPTS:
        raise ValueError(f"There is no training script {name}{cli.nearest(name, SCRIPTS)}")
    return path


def as_text(value: object) -> str:
    """An option's value in a recipe as --over writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def borders(word: str, values: str) -> tuple[float, float, bool] | None:
    """Both ends of a range, and whether it is drawn logarithmically; None of values with commas."""
    if ".." not in values:
        return None
    try:
        low, high = ((int if re.fullmatch(r"-?\d+", end) else float)(end) for end in values.split(".."))
    except ValueError:
        low, high = 1, 0
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"--over {word}: a range is LOW..HIGH, two numbers, the smaller one first.")
    return low, high, low > 0 and high >= 10 * low


def drawn(trial: optuna.Trial, name: str, values: str) -> str:
    """One option's value, by the study's sampler."""
    if not (ends := borders(name, values)):
        return trial.suggest_categorical(name, values.split(","))
    low, high, log = ends
    if isinstance(low, int) and isinstance(high, int):
        return str(trial.suggest_int(name, low, high, log=log))
    return f"{trial.suggest_float(name, low, high, log=log):.4g}"


def words(chosen: dict[str, str]) -> list[str]:
    """Options as a command line has them; a switch is --NAME or --no-NAME."""
    line = []
    for name, value in chosen.items():
        if name != "report":  # the figure that a recipe's run is compared with
            flag = f"--{'no-' if value == 'off' else ''}{name.replace('_', '-')}"
            line += [flag, *([] if value in ("on", "off") else value.split())]
    return line


def carry_out(study: optuna.Study, trial: optuna.Trial, claims: Claims) -> None:
    """Runs the script until it ends, is pruned, or is found to be in other hands; tells the journal how it ended."""
    plan, folder = study.user_attrs["plan"], claims.folder(trial)
    # By the trial's number: processes with one seed would all begin with the same draw.
    study.sampler = SAMPLERS[plan["sampler"]](seed=plan["seed"] + trial.number)
    chosen = trial.user_attrs["options"] or {
        name: drawn(trial, name, values) for name, values in plan["ranges"].items()
    }
    trial.set_user_attr("options", chosen)
    command = [sys.executable, str(find_script(plan["script"])), *plan["fixed"], *words(chosen)]
    command += ["--out", str(folder), "--resume"]
    with open(folder / "log.txt", "ab") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_the_sweep)
    reported = 0
    try:
        while child.returncode is None:
            with suppress(subprocess.TimeoutExpired):
                child.wait(LOOK)
            if not claims.is_mine(trial):
                child.kill()
                return
            claims.sign(trial)
            scores = val_scores(folder)
            for epoch in list(scores)[reported:] if plan["prune"] else []:
                trial.report(scores[epoch], epoch)
            reported = len(scores)
            if plan["prune"] and child.returncode is None and trial.should_prune():
                child.terminate()
                child.wait()
                study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
                return
            show(study, claims.out)
    except KeyboardInterrupt:
        child.terminate()  # it finishes its step and saves
        child.wait()
        raise
    if child.returncode == 0 and scores:
        study.tell(trial, max(scores.values()), skip_if_finished=True)
    else:
        said = (folder / "log.txt").read_text(errors="replace").split("\n")
        trial.set_user_attr("reason", next(filter(None, map(str.strip, reversed(said))), "it said nothing"))
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)


def end_with_the_sweep() -> None:
    """Linux ends a run together with its sweep, also with a killed one: else it and its successor would both train."""
    if LIBC:
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def read_history(folder: Path) -> list[dict]:
    """The epochs of a run so far."""
    path = folder / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def val_scores(folder: Path) -> dict[int, float]:
    """val_accuracy or val_iou of a run, whichever it has, by epoch."""
    named = {line["epoch"]: line.get("val_accuracy", line.get("val_iou")) for line in read_history(folder)}
    return {epoch: score for epoch, score in named.items() if score is not None and math.isfinite(score)}


def table(study: optuna.Study, out: Path) -> list[dict[str, str]]:
    """A row a run: its options, how it stands, its best val score and the epoch of that, minutes."""
    rows, names = [], {}
    for run, trial in sorted(latest(study).items()):
        history, scores = read_history(out / f"{run:03}"), val_scores(out / f"{run:03}")
        best, chosen = max(scores, key=scores.get, default=None), trial.user_attrs["options"] or {}
        standing = {
            "state": STATES[trial.state.name],
            "epochs": str(len(history)),
            "best val": f"{scores[best]:.4f}" if scores else "",
            "at epoch": str(best or ""),
            "minutes": f"{sum(line['seconds'] for line in history) / 60:.1f}",
        }
        rows.append({"run": f"{run:03}", **chosen, **standing})
        names |= chosen
    return [{name: row.get(name, "") for name in ("run", *names, *standing)} for row in rows]


def markdown(rows: list[dict[str, str]], best: str | None) -> str:
    """The table with its columns aligned, so that a terminal can show it too; the best run in bold."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"**{cell}**" if cell and row["run"] == best else cell for cell in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def best_run(study: optuna.Study) -> str | None:
    """The finished run with the highest val score, the first one of several; None where none has finished."""
    done = {run: trial.value for run, trial in sorted(latest(study).items()) if trial.state == TrialState.COMPLETE}
    return f"{max(done, key=done.get):03}" if done else None


def show(study: optuna.Study, out: Path) -> None:
    """The table as it stands, on an emptied screen; nothing where no one watches."""
    if sys.stdout.isatty():
        print(f"\033[H\033[J{markdown(table(study, out), best_run(study))}", flush=True)


def write_tables(study: optuna.Study, out: Path) -> None:
    """README.md, runs.csv and curves.png as the sweep stands."""
    rows, best, plan = table(study, out), best_run(study), study.user_attrs["plan"]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "runs.csv", file.getvalue())
    lines = [f"# Sweep of {plan['script']}\n", f"Every run has `{shlex.join(plan['fixed'])}`.\n"]
    lines += [markdown(rows, best), "\nThe best by validation is in bold; no run has read the test part."]
    curves = {row["run"]: val_scores(out / row["run"]) for row in rows if val_scores(out / row["run"])}
    if curves:
        render.save_png(render.many_curves(curves, best), out / "curves.png")
        lines.append("\n![validation curves](curves.png)")
    write_text(out / "README.md", "\n".join(lines) + "\n")


def conclude(study: optuna.Study, out: Path) -> None:
    """Prints the table and the best run; ends with status 1 and the reasons where runs failed."""
    print((out / "README.md").read_text())
    fixed = study.user_attrs["plan"]["fixed"]
    data = f" --data {shlex.quote(fixed[fixed.index('--data') + 1])}" if "--data" in fixed else ""
    if best := best_run(study):
        print(f"Best by validation. Measure it once:  python train/evaluate.py {out / best}{data} --part test")
    failed = {run: trial for run, trial in latest(study).items() if trial.state == TrialState.FAIL}
    if failed:
        reasons = "\n".join(f"  {run:03}: {trial.user_attrs.get('reason')}" for run, trial in failed.items())
        sys.exit(f"{len(failed)} of {len(latest(study))} runs failed; the same command tries them again:\n{reasons}")


if __name__ == "__main__":
    cli.run(main)
