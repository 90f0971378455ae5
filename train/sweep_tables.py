"""The tables and curves of a sweep: README.md, runs.csv and its pictures."""

import csv
import io
import math
import shlex
from contextlib import suppress
from pathlib import Path

import optuna
from optuna.trial import TrialState
from run_queue import folder_of

from cvlab import plots, render
from cvlab.checkpoint.card import read_history
from cvlab.files import read_json, write_text

STATES = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "done", "PRUNED": "pruned"}
MEASURED = ("state", "epochs", "best val", "at epoch", "minutes", "test")  # columns after the options


def val_scores(folder: Path) -> dict[int, float]:
    """val_iou of a run, or val_accuracy if it has none, by epoch."""
    named = {line["epoch"]: line.get("val_iou", line.get("val_accuracy")) for line in read_history(folder)}
    return {epoch: score for epoch, score in named.items() if score is not None and math.isfinite(score)}


def kept_epoch(folder: Path) -> int | None:
    """The epoch whose weights a run kept; before its end the one with the highest score so far, None without any."""
    scores, best = val_scores(folder), read_json(folder / "manifest.json").get("best_epoch")
    return best if best in scores else max(scores, key=scores.get, default=None)


def table(study: optuna.Study, out: Path) -> list[dict[str, str]]:
    """One row a run: its options, its state, the epoch that it kept with the val score of that, minutes.

    The score on test with its interval is there where train/evaluate.py measured a run.
    """
    rows, names = [], {}
    for trial in study.trials:
        folder, options = folder_of(out, trial.number), trial.user_attrs["options"] or {}
        history, epoch = read_history(folder), kept_epoch(folder)
        best = f"{val_scores(folder)[epoch]:.4f}" if epoch else ""
        minutes = f"{sum(line['seconds'] for line in history) / 60:.1f}"
        found = read_json(folder / "metrics.json")
        score = found.get("accuracy", found.get("iou")) if found.get("part") == "test" else None
        test = "{value:.3f} ({low:.3f} to {high:.3f})".format(**score) if score else ""
        state = "failed" if trial.user_attrs.get("reason") else STATES[trial.state.name]
        measured = (state, str(len(history)), best, str(epoch or ""), minutes, test)
        rows.append({"run": folder.name, **options, **dict(zip(MEASURED, measured, strict=True))})
        names |= options
    shown = ("run", *names, *(name for name in MEASURED if name != "test" or any(row["test"] for row in rows)))
    return [{name: row.get(name, "") for name in shown} for row in rows]


def markdown(rows: list[dict[str, str]], best: str | None) -> str:
    """The table with aligned columns, so that a terminal can show it too; the best run in bold."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[f"**{cell}**" if cell and row["run"] == best else cell for cell in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def best_run(study: optuna.Study) -> str | None:
    """The finished run with the highest val score, the first one if several have it; None if none has finished."""
    done = {trial.number: trial.value for trial in study.trials if trial.state == TrialState.COMPLETE}
    return f"{max(done, key=done.get) + 1:03}" if done else None


def by_number(rows: list[dict[str, str]]) -> tuple[str, dict[str, list[tuple[float, float]]]] | None:
    """The option, but seed, that took most numbers, and the (number, best val) of its runs, by their other options.

    Of several values of an option the first one counts. None if no option took three numbers.
    """
    done = [row for row in rows if row["best val"]]
    options = [name for name in rows[0] if name not in ("run", "seed", *MEASURED)]
    numbers: dict[str, list[float]] = {}
    for name in options:
        with suppress(ValueError, IndexError):
            numbers[name] = [float(row[name].split()[0]) for row in done]
    chosen = max(numbers, key=lambda name: len(set(numbers[name])), default=None)
    if not chosen or len(set(numbers[chosen])) < 3:
        return None
    points: dict[str, list[tuple[float, float]]] = {}
    for row, number in zip(done, numbers[chosen], strict=True):
        others = ", ".join(f"{name} {row[name]}" for name in options if name != chosen)
        points.setdefault(others, []).append((number, float(row["best val"])))
    return chosen, points


def write_tables(study: optuna.Study, out: Path) -> None:
    """Writes README.md, runs.csv and curves.png with the runs so far."""
    rows, best, plan = table(study, out), best_run(study), study.user_attrs["plan"]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "runs.csv", file.getvalue())
    lines = [f"# Sweep of {plan['script']}\n", f"Every run has `{shlex.join(plan['fixed'])}`.\n"]
    lines += [markdown(rows, best), "\nThe best run by validation is in bold; the sweep does not read the test part."]
    kept = {row["run"]: epoch for row in rows if (epoch := kept_epoch(out / row["run"]))}
    if kept:
        histories = {run: read_history(out / run) for run in kept}
        render.save_png(plots.many_curves(histories, kept, best), out / "curves.png")
        lines.append("\n![loss and score of all runs](curves.png)")
    if found := by_number(rows):
        render.save_png(plots.scores_by_number(found[1], found[0], "best val"), out / f"by_{found[0]}.png")
        lines.append(f"\n![best val by {found[0]}](by_{found[0]}.png)")
    write_text(out / "README.md", "\n".join(lines) + "\n")
