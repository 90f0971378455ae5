"""What dropout does to a trained network: its weights carried into it with each value, before and after training on.

    python train/dropout_study.py --start runs/sweep --dropout 0 0.1 0.5 --epochs 20 --out runs/study
    python train/dropout_study.py --recipe scenes8-dropout-study

START is a run of train/classifier.py, or a sweep of them: then the best finished run by validation is taken, of a sweep
over `recipe` the best of each recipe. Training on is a sweep over the values with the options of that run: it goes on
by the same command, and on several machines, as train/sweep.py does.

OUT/README.md, study.json        the table; which value val chooses is in bold, dropout 0 is the control
OUT/before, OUT/after            per network and value: a confusion matrix of the test part; in after/ the run folders
"""

import argparse
import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import cli

from cvlab import checkpoint, models, render
from cvlab.data.evaluation import note_test_read, parts_of, read_views
from cvlab.explain.many import predict_views
from cvlab.files import write_text
from cvlab.metrics import confusion_matrix, wilson_interval
from cvlab.models import Model


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=Path("runs/sweep"), help="a run, or a sweep of runs")
    parser.add_argument("--dropout", nargs="+", default=["0", "0.01", "0.1", "0.25", "0.5"], metavar="P")
    parser.add_argument("--epochs", type=int, default=100, help="to train on")
    parser.add_argument("--data", type=Path, help="data folder, if it is not where it was")
    parser.add_argument("--out", type=Path, default=Path("runs/dropout-study"))
    args = parser.parse_args()
    lines, study = [f"# Dropout carried into trained networks, {args.epochs} epochs more\n"], {}
    for name, start in best_runs(args.start).items():
        rows = study_of(start, args, name)
        study[name] = {"start": str(start), "epochs": args.epochs, "rows": rows}
        lines += [f"## {name}\n", table(rows), ""]
    lines.append("In bold: the value with the highest val accuracy after training on. Intervals: Wilson, 95%.")
    write_text(args.out / "study.json", json.dumps(study, indent=1) + "\n")
    write_text(args.out / "README.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def best_runs(start: Path) -> dict[str, Path]:
    """The runs to begin with, by the name of their network: a single run, or the best of each recipe of a sweep."""
    if (start / "manifest.json").is_file():
        return {start.name: start}
    if not (start / "runs.csv").is_file():
        raise ValueError(f"{start} is neither a run nor a sweep: train one first (python train/sweep.py --help).")
    with open(start / "runs.csv", newline="") as file:
        done = [row for row in csv.DictReader(file) if row["state"] == "done"]
    best: dict[str, dict] = {}
    for row in done:
        name = row.get("recipe", start.name)
        if name not in best or float(row["best val"]) > float(best[name]["best val"]):
            best[name] = row
    if not best:
        raise ValueError(f"No run of {start} has finished yet.")
    return {name: start / row["run"] for name, row in best.items()}


def study_of(start: Path, args: argparse.Namespace, name: str) -> list[dict]:
    """One network: a row for each value of dropout, with its scores before and after training on."""
    words = again(start, args)
    sweep = Path(__file__).with_name("sweep.py")
    after = args.out / "after" / name
    values = f"dropout={','.join(args.dropout)}"
    command = [sys.executable, sweep, "classifier", "--over", values, "--out", after, "--", *words]
    if subprocess.run(list(map(str, command)), check=False).returncode:
        raise ValueError(f"Training on from {start} did not come to its end (above): the same command goes on.")

    model = checkpoint.load(start)
    data = Path(words[words.index("--data") + 1]) if "--data" in words else None
    parts, _ = parts_of(model, data, "test")
    read = {part: read_views(parts, part, model) for part in ("val", "test")}
    rows = []
    for run, p in enumerate(args.dropout, 1):
        before = args.out / "before" / name / p
        checkpoint.save(carried(model, float(p)), before, data=model.config["data"])
        folders = {"before": before, "after": after / f"{run:03}"}
        rows.append({"dropout": p, **{when: measured(folder, read) for when, folder in folders.items()}})
    note_test_read(args.out, parts.name)
    return rows


def again(start: Path, args: argparse.Namespace) -> list[str]:
    """The options of the run that trained `start`, for runs that go on from its weights."""
    words = shlex.split(json.loads((start / "manifest.json").read_text())["command"])[2:]
    lengths = {"--resume": 1, "--out": 2, "--dropout": 2, "--epochs": 2, "--start-from": 2}
    given = ["--start-from", str(start), "--epochs", str(args.epochs)]
    if args.data:
        lengths["--data"], given = 2, [*given, "--data", str(args.data)]
    kept = []
    while words:
        length = lengths.get(words[0], 0)
        kept += [] if length else words[:1]
        words = words[length or 1 :]
    return kept + given


def carried(model: Model, p: float) -> nn.Module:
    """The network of a trained model with dropout p and the same weights.

    Dropout is off in eval mode: the logits are the same to the bit.
    """
    names = ("network", "class_names", "image_size", "mean", "std", "crop_pct", "threshold", "interpolation")
    settings = {name: model.config[name] for name in names}
    other = models.build(arguments={**model.config["arguments"], "dropout": p}, **settings)
    other.load_state_dict(model.state_dict())
    return other.eval()


def measured(folder: Path, read: dict[str, tuple[Tensor, list[int]]]) -> dict[str, dict]:
    """Accuracy on val and on test with its interval; the confusion matrix of test goes into the folder's report."""
    model, scores = checkpoint.load(folder), {}
    for part, (views, labels) in read.items():
        logits = torch.cat([*predict_views(model, views)])
        matrix = confusion_matrix(torch.tensor(labels), logits.argmax(1), len(model.class_names))
        right = int(matrix.trace())
        low, high = wilson_interval(right, len(labels))
        scores[part] = {"value": right / len(labels), "low": low, "high": high, "n": len(labels)}
    render.save_png(render.confusion_picture(matrix, model.class_names), folder / "report" / "confusion_matrix.png")
    return scores


def chosen(rows: list[dict]) -> dict:
    """The row with the highest val accuracy after training on, the first one of several."""
    return max(rows, key=lambda row: row["after"]["val"]["value"])


def table(rows: list[dict]) -> str:
    """The study of one network as Markdown."""
    lines = ["| dropout | val before | test before | val after | test after |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [row["dropout"]]
        for when in ("before", "after"):
            val, test = row[when]["val"], row[when]["test"]
            cells += [f"{val['value']:.3f}", f"{test['value']:.3f} ({test['low']:.3f} to {test['high']:.3f})"]
        bold = "**" if row is chosen(rows) else ""
        lines.append("| " + " | ".join(f"{bold}{cell}{bold}" for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
