"""What dropout does to a trained network: its weights in a copy with each value, before and after more training.

    python train/dropout_study.py --start runs/sweep --dropout 0 0.1 0.5 --epochs 20 --out runs/study
    python train/dropout_study.py --start runs/plain --dropout 0.1 0.5 --at early late both several --out runs/where
    python train/dropout_study.py --recipe scenes8-dropout-study

START is a run of train/classifier.py, or a sweep of such runs: then the study takes its best finished run by
validation, or the best one of each recipe if the sweep is over `recipe`. The training is a sweep over the values of
dropout, with the other options of that run, so the same command continues it, and more machines can help
(train/sweep.py).

OUT/README.md, study.json   the table; the value with the best val accuracy is in bold, dropout 0 is the control
OUT/before, OUT/after       by network and value: a confusion matrix of the test part, in after/ with the training runs
"""

import argparse
import csv
import importlib
import itertools
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import cli
import torch
import torch.nn.functional as F
from sweep_plan import NOT_FOR_RUNS, as_text, as_words
from torch import Tensor

from cvlab import checkpoint, models, plots, render
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
        rows = study_of(start, args, name)
        study[name] = {"start": str(start), "epochs": args.epochs, "rows": rows}
        lines += [f"## {name}\n", table(rows), ""]
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


def study_of(start: Path, args: argparse.Namespace, name: str) -> list[dict]:
    """One network: a row for each value of dropout, with its scores before and after training."""
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
    rows = []
    for run, ((places, at), p) in enumerate(itertools.product(spots.items(), args.dropout), 1):
        before = args.out / "before" / name / at / p
        checkpoint.save(with_dropout(model, float(p), places), before, data=model.config["data"])
        folders = {"before": before, "after": after / f"{run:03}"}
        rows.append({"dropout": p, "at": at} | {when: measured(folder, read) for when, folder in folders.items()})
    note_test_read(args.out, parts.name)
    return rows


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


def with_dropout(model: Model, p: float, places: Sequence[int] = ()) -> Model:
    """A copy of a trained model with dropout p, at other places if they are given, and the same weights, in eval mode.

    Dropout does nothing in eval mode: the logits are the same to the bit.
    """
    arguments = {**model.config["arguments"], "dropout": p} | ({"dropout_at": list(places)} if places else {})
    other = models.build(**models.settings_in(model.config) | {"arguments": arguments})
    other.load_state_dict(model.state_dict())
    return other.eval()


def measured(folder: Path, read: dict[str, tuple[Tensor, list[int]]]) -> dict[str, dict]:
    """Accuracy of a model on val and on test with its interval, and loss; the confusion matrix of test is drawn."""
    model, scores = checkpoint.load(folder), {}
    for part, (views, labels) in read.items():
        logits = torch.cat([*predict_views(model, views)])
        matrix = confusion_matrix(torch.tensor(labels), logits.argmax(1), len(model.class_names))
        right = int(matrix.trace())
        accuracy = interval(right / len(labels), wilson_interval(right, len(labels)))
        loss = F.cross_entropy(logits, torch.tensor(labels)).item()
        scores[part] = {**accuracy, "n": len(labels), "loss": loss}
    render.save_png(plots.confusion_picture(matrix, model.class_names), folder / "report" / "confusion_matrix.png")
    return scores


def table(rows: list[dict]) -> str:
    """The study of one network as Markdown. The (first) row with the highest val accuracy after training is bold."""
    best = max(rows, key=lambda row: row["after"]["val"]["value"])
    head = ["dropout", *(f"{part}, {when}" for when in ("before", "after") for part in ("val", "test", "test loss"))]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        cells = [f"{row['dropout']} {row['at']}".strip()]
        for when in ("before", "after"):
            val, test = row[when]["val"], row[when]["test"]
            cells += [f"{val['value']:.3f}", f"{test['value']:.3f} ({test['low']:.3f} to {test['high']:.3f})"]
            cells.append(f"{test['loss']:.3f}")
        bold = "**" if row is best else ""
        lines.append("| " + " | ".join(f"{bold}{cell}{bold}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
