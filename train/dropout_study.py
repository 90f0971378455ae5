"""What dropout does to a trained network: its scores before and after more training with each value.

    python train/dropout_study.py --start runs/sweep --dropout 0 0.1 0.5 --epochs 20 --out runs/study
    python train/dropout_study.py --start runs/plain --dropout 0.1 0.5 --at early late both several --out runs/where
    python train/dropout_study.py --recipe scenes8-dropout-study

START is a run of train/classifier.py, or a sweep of such runs: then the study takes its best finished run by
validation, or the best one of each recipe if the sweep is over `recipe`. The training is a sweep over the values of
dropout, with the other options of that run, so the same command continues it, and more machines can help
(train/sweep.py).

OUT/README.md, study.json   the table; the value with the best val accuracy is in bold, dropout 0 is the control
OUT/before/NAME             of the network as it starts: a confusion matrix of the test part
OUT/after/NAME/001, ...     the training runs, with a confusion matrix each

Dropout does nothing in eval mode, so before the training every value has the same scores: the table has them once.
"""

import argparse
import csv
import importlib
import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import cli
import torch
import torch.nn.functional as F
from sweep_plan import NOT_FOR_RUNS, as_text, as_words
from torch import Tensor

from cvlab import checkpoint, plots, render
from cvlab.data.evaluation import note_test_read, parts_of, read_views
from cvlab.explain.many import predict_views
from cvlab.files import read_json, to_json, write_text
from cvlab.metrics import confusion_matrix, interval, wilson_interval
from cvlab.models import Model

POSITIONS = ("early", "late", "both", "several")


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=Path("runs/sweep"), help="a run, or a sweep of runs")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0, 0.01, 0.1, 0.25, 0.5], metavar="P")
    parser.add_argument(
        "--at", choices=POSITIONS, nargs="+", help="where it stands; by default where the network has it"
    )
    parser.add_argument("--epochs", type=int, default=100, help="of the training with each value")
    parser.add_argument("--data", type=Path, help="data folder, if it has moved since the run")
    parser.add_argument("--out", type=Path, default=Path("runs/dropout-study"))
    args = parser.parse_args()
    args.dropout = [f"{p:g}" for p in args.dropout]  # as options of a sweep and names of folders
    lines, study = [f"# Trained networks with dropout, {args.epochs} more epochs\n"], {}
    for name, start in best_runs(args.start).items():
        before, rows = study_of(start, args, name)
        study[name] = {"start": str(start), "epochs": args.epochs, "before": before, "rows": rows}
        lines += [f"## {name}\n", table(before, rows), ""]
    lines.append("In bold: the value with the highest val accuracy after training. Intervals: Wilson, 95%.")
    write_text(args.out / "study.json", to_json(study, indent=1) + "\n")
    write_text(args.out / "README.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def best_runs(start: Path) -> dict[str, Path]:
    """The runs to start with, by the name of their network: a single run, or the best one of each recipe of a sweep."""
    if (start / "manifest.json").is_file():
        return {start.name: start}
    if not (start / "runs.csv").is_file():
        raise ValueError(f"{start} is neither a run nor a sweep: train one first (python train/sweep.py --help).")
    with open(start / "runs.csv", newline="") as file:
        done = [row for row in csv.DictReader(file) if row["state"] == "done"]
    if not done:
        raise ValueError(f"No run of {start} has finished yet.")
    best: dict[str, Path] = {}
    for row in sorted(done, key=lambda row: -float(row["best val"])):
        best.setdefault(row.get("recipe", start.name), start / row["run"])
    return best


def study_of(start: Path, args: argparse.Namespace, name: str) -> tuple[dict, list[dict]]:
    """One network: its scores before training, and a row for each value of dropout with the scores after it."""
    options, model = options_of(start, args), checkpoint.load(start)
    spots = {places_of(model, at): at for at in args.at or [""]}
    after, over = args.out / "after" / name, [f"dropout={','.join(args.dropout)}"]
    if args.at:
        options.pop("dropout_at", None)
        over.insert(0, f"dropout_at={','.join(' '.join(map(str, places)) for places in spots)}")
    command = [sys.executable, Path(__file__).with_name("sweep.py"), "classifier", "--over", *over, "--out", after]
    command += ["--", *as_words({option: as_text(value) for option, value in options.items()})]
    if subprocess.run(list(map(str, command)), check=False).returncode:
        raise ValueError(f"The training from {start} failed (see above); the same command continues it.")

    parts, _ = parts_of(model, options.get("data"), "test")
    read = {part: read_views(parts, part, model) for part in ("val", "test")}
    before, rows = measured(model, read, args.out / "before" / name), []
    for run, (at, p) in enumerate(itertools.product(spots.values(), args.dropout), 1):
        folder = after / f"{run:03}"
        rows.append({"dropout": p, "at": at, "after": measured(checkpoint.load(folder), read, folder / "report")})
    note_test_read(args.out, parts.name)
    return before, rows


def places_of(model: Model, at: str) -> tuple[int, ...]:
    """The numbers of a network's places of dropout that one of `POSITIONS` means; none for an empty one."""
    if at and not hasattr(model, "dropout_places"):
        raise ValueError(f"The network {model.config['network']} has one place for dropout: leave out --at.")
    places = tuple(model.dropout_places) if at else ()
    return {"early": places[:1], "late": places[-1:], "both": places[:1] + places[-1:]}.get(at, places)


def options_of(start: Path, args: argparse.Namespace) -> dict[str, object]:
    """The options of the run that trained `start`, to train from its weights; dropout is left to the sweep."""
    parser = importlib.import_module("classifier").parser()
    options = vars(parser.parse_args(shlex.split(read_json(start / "manifest.json")["command"])[2:]))
    left_out = NOT_FOR_RUNS | {"dropout"}
    kept = {name: v for name, v in options.items() if name not in left_out and v != parser.get_default(name)}
    return kept | {"start_from": start, "epochs": args.epochs} | ({"data": args.data} if args.data else {})


def measured(model: Model, read: dict[str, tuple[Tensor, list[int]]], out: Path) -> dict[str, dict]:
    """Accuracy of a model on val and on test with its interval, and loss; draws the confusion matrix of test."""
    scores = {}
    for part, (views, labels) in read.items():
        logits = torch.cat([*predict_views(model, views)])
        matrix = confusion_matrix(torch.tensor(labels), logits.argmax(1), len(model.class_names))
        right = int(matrix.trace())
        accuracy = interval(right / len(labels), wilson_interval(right, len(labels)))
        loss = F.cross_entropy(logits, torch.tensor(labels)).item()
        scores[part] = {**accuracy, "n": len(labels), "loss": loss}
    render.save_png(plots.confusion_picture(matrix, model.class_names), out / "confusion_matrix.png")
    return scores


def table(before: dict, rows: list[dict]) -> str:
    """The study of one network as Markdown. The (first) row with the highest val accuracy after training is bold."""
    best = max(rows, key=lambda row: row["after"]["val"]["value"])
    lines = ["| dropout | val | test | test loss |", "| --- | --- | --- | --- |"]
    after = [(f"{row['dropout']} {row['at']}".strip(), row["after"]) for row in rows]
    for name, scores in [("before", before), *after]:
        val, test = scores["val"], scores["test"]
        cells = [name, f"{val['value']:.3f}", f"{test['value']:.3f} ({test['low']:.3f} to {test['high']:.3f})"]
        cells.append(f"{test['loss']:.3f}")
        bold = "**" if scores is best["after"] else ""
        lines.append("| " + " | ".join(f"{bold}{cell}{bold}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
