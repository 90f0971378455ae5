"""Prints the README's comparison with the five reports, and what was learned, from what runs left.

    python tests/bench/results.py                               print both
    python tests/bench/results.py --write                       put them into README.md
    python tests/bench/results.py --collect runs/NAME ...       keep a run's figures in tests/bench/results/NAME.json;
                                                                NAME=FOLDER for a folder of another name
    python tests/bench/results.py --time horses-unet 195 1      say how long a recipe would take here, on 195 pictures
                                                                of one class

Runs are not part of the repository; their figures are, without photographs. A run is collected after
`python train/evaluate.py runs/NAME --part test`, a sweep or a dropout study as it is.
"""

import argparse
import csv
import inspect
import json
import re
import statistics
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "tests" / "bench" / "results"
RECIPES = ROOT / "train" / "recipes"
WEIGHTS = "pretrained weights cannot be fetched there"
GPU = "neither a GPU nor a free core there"
# The experiments of the reports, in their order, with ours after them; and why one has no figures, where it has none.
EXPERIMENTS = {
    "flowers102-cnn": GPU,
    "flowers17-cvlab": GPU,
    "flowers17-transfer": WEIGHTS,
    "caltech256-baseline-adam": GPU,
    "caltech256-baseline-sgd": GPU,
    "caltech256-deep-sgd": GPU,
    "caltech256-deep-onecycle": GPU,
    "caltech-cvlab": GPU,
    "scenes8-plain": GPU,
    "scenes8-residual": GPU,
    "scenes8-dropout-study": GPU,
    "scenes8-resnet18-head": WEIGHTS,
    "scenes8-resnet18-last2": WEIGHTS,
    "scenes8-cvlab": GPU,
    "scenes8-transfer": WEIGHTS,
    "flowers5-basic": GPU,
    "flowers5-dropout": GPU,
    "flowers5-inception-features": WEIGHTS,
    "flowers5-inception-features-augmented": WEIGHTS,
    "flowers5-inception-frozen": WEIGHTS,
    "flowers5-cvlab": GPU,
    "flowers5-transfer": WEIGHTS,
    "sports100-vgg19": WEIGHTS,
    "sports100-transfer": WEIGHTS,
    "horses-unet": GPU,
    "horses-sweep": GPU,
    "horses-cvlab": GPU,
}
# What stands behind the name of a data folder; "for" names what a report used instead.
DATA = {
    "caltech101": "Caltech-101, at most 40 a class, for Caltech-256",
    "flower_photos": "flower photos, 400 a class",
    "flowers17": "Flowers17, for ten classes of Flowers102",
    "flowers102_64px": "Flowers102 at 64 px, classes 1 to 10",
    "horses": "Weizmann horses, 278",
    "scenes8": "eight scenes, 50 + 20 a class for train and val",
    "sports100": "a hundred sports, 40 + 5 a class",
}
NOT_RUN = "not run: {}"


def read(name: str, folder: Path = FOLDER) -> dict | None:
    """What was collected of an experiment, None where nothing was."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def collected(run: Path) -> dict:
    """What the table needs of a run folder, a sweep's or a dropout study's."""
    if (run / "study.json").is_file():
        return {"study": json.loads((run / "study.json").read_text())}
    if (run / "runs.csv").is_file():
        with open(run / "runs.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["state"] == "done"]
        return {"sweep": rows, "manifest": manifest_of(run / rows[0]["run"])}
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    score = next(name for name in ("accuracy", "iou") if f"val_{name}" in history[0])
    manifest = json.loads((run / "manifest.json").read_text())
    best = history[manifest["best_epoch"] - 1]
    val = {"value": best[f"val_{score}"], "epoch": best["epoch"]}
    metrics = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").is_file() else {}
    block = json.loads((run / "config.json").read_text())["cvlab"]
    test = {**metrics[score], "n": metrics["n"]} if metrics.get("part") == "test" else None
    facts = {"network": block["network"], "data": block["data"]["name"], "image_size": block["image_size"]}
    return {"score": score, "val": val, "test": test, **facts, "manifest": manifest_of(run)}


def manifest_of(run: Path) -> dict:
    """What is said of how a run was made."""
    manifest = json.loads((run / "manifest.json").read_text())
    keys = ("command", "started_from", "seed", "precision", "parameters", "epochs", "minutes", "hardware")
    chosen = {key: manifest.get(key) for key in keys}
    # Folders of this machine say nothing to others.
    return chosen | {"command": re.sub(r"(?<= )/\S*/", "", chosen["command"])}


def timed(recipe: str, pictures: int, num_classes: int, steps: int = 3) -> dict:
    """How long a recipe would take here on so many training pictures: by the median of some steps, after one more.

    Both precisions are timed, and the faster one is taken, as the training scripts do.
    """
    import torch

    from cvlab import models
    from cvlab.learning import optim
    from cvlab.learning.losses import SEGMENTATION_LOSSES

    chosen = tomllib.loads((RECIPES / f"{recipe}.toml").read_text())
    settings, segmenter = chosen["options"], chosen["script"] == "segmenter"
    network = "unet" if segmenter else settings.get("network", "convnet")
    taken = inspect.signature(models.network_class(network)).parameters
    arguments = {name: value for name, value in settings.items() if name in taken and name != "image_size"}
    side, batch_size = settings["image_size"], settings["batch_size"]
    classes = [str(i) for i in range(num_classes)]
    model = models.build(network, classes, side, arguments).to(memory_format=torch.channels_last)
    optimizer = optim.optimizer(settings["optimizer"], model, settings["lr"], settings["weight_decay"])
    images = torch.rand(batch_size, 3, side, side).contiguous(memory_format=torch.channels_last)
    masks, labels = torch.rand(batch_size, num_classes, side, side) > 0.5, torch.randint(num_classes, (batch_size,))
    targets = masks if segmenter else labels
    criterion = SEGMENTATION_LOSSES[settings["loss"]] if segmenter else torch.nn.functional.cross_entropy
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for precision, taken_by in seconds.items():
        for _ in range(steps + 1):
            start = time.process_time()  # of this process alone: the machine may have other work
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(images)
            criterion(logits.float(), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            taken_by.append(time.process_time() - start)
    medians = {precision: statistics.median(taken_by[1:]) for precision, taken_by in seconds.items()}
    precision = min(medians, key=medians.get)
    hours = medians[precision] * (pictures // batch_size) * settings["epochs"] / 3600
    figures = {"seconds_a_step": float(f"{medians[precision]:.3g}"), "steps": steps, "precision": precision}
    return {
        "timed": {**figures, "hours": float(f"{hours:.3g}"), "parameters": sum(p.numel() for p in model.parameters())}
    }


def rows_of(name: str, found: dict | None) -> list[str]:
    """The rows of the table for one experiment: one, of a dropout study one for each network."""
    path = RECIPES / f"{name}.toml"
    report = tomllib.loads(path.read_text())["report"] if path.is_file() else {"row": "", "figure": ""}
    start = f"| {name}: {report['row']} | {report['figure']} |"
    if found is None:
        return [f"{start} {NOT_RUN.format(EXPERIMENTS[name])} | | | | |"]
    if "timed" in found:
        facts = found["timed"]
        steps = f"{facts['steps']} steps of {facts['seconds_a_step']} s in {facts['precision']}"
        time_taken = f"{facts['hours']:.0f} hours" if facts["hours"] >= 1.5 else f"{60 * facts['hours']:.0f} minutes"
        reason = f"about {time_taken} of one core, by {steps}"
        return [f"{start} {NOT_RUN.format(reason)} | | | {facts['parameters'] / 1e6:.2f} M | |"]
    if "study" in found:
        return [study_row(name, network, study) for network, study in found["study"].items()]
    manifest = found["manifest"]
    trainings = [manifest, *filter(None, [manifest["started_from"]])]
    epochs, minutes = (sum(each[key] for each in trainings) for key in ("epochs", "minutes"))
    test = interval(found["test"], found["score"]) if found["test"] else "not read"
    val = f"{found['val']['value']:.3f}"
    data = DATA.get(found["data"], found["data"])
    parameters = f"{manifest['parameters'] / 1e6:.2f} M"
    return [f"{start} {test} | {val} | {data} | {parameters} | {epochs}, {minutes:.0f} |"]


def study_row(name: str, network: str, study: dict) -> str:
    """The value of dropout that val chooses, and the control."""
    best = max(study["rows"], key=lambda row: row["after"]["val"]["value"])
    control = next(row for row in study["rows"] if float(row["dropout"]) == 0)
    test = f"{interval(best['after']['test'], 'accuracy')}; at 0 {control['after']['test']['value']:.3f}"
    val = f"{best['after']['val']['value']:.3f}"
    facts = f"{DATA['scenes8']} | dropout {best['dropout']} | {study['epochs']} more"
    return f"| {name}: {network} | | {test} | {val} | {facts} |"


def interval(score: dict, name: str) -> str:
    """A score on the test part as the table shows it."""
    return f"{name} **{score['value']:.3f}** ({score['low']:.3f} to {score['high']:.3f}), n = {score['n']}"


def table(folder: Path = FOLDER) -> str:
    """The comparison: every experiment, with the commands of those that were run."""
    found = {name: read(name, folder) for name in EXPERIMENTS}
    lines = [
        "| experiment | report | cvlab, test (95% interval) | best val | data | parameters | epochs, minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row for name, each in found.items() for row in rows_of(name, each)),
    ]
    manifests = [each["manifest"] for each in found.values() if each and "manifest" in each]
    hardware = "; ".join(sorted({manifest["hardware"] for manifest in manifests}))
    notes = [
        f"One training each (seed 0; any that a command names was chosen by val), on {hardware}, which had other work "
        "beside it: the minutes are an upper bound. Test pictures were neither trained on nor chosen by. Intervals as "
        "in the table above. The commands:",
        *("    " + manifest["command"] for manifest in manifests),
    ]
    return "\n".join(["", *lines, "", notes[0], "", *notes[1:], ""])


class Change(NamedTuple):
    """One change to a training: the options of its runs in a sweep, what it is called, and what it is about."""

    options: dict[str, str]
    title: str
    about: str
    against: str = ""  # the title of what it is held against; by default the first of the sweep


SWEEPS = {
    "lessons": [
        Change({"lr": "0.1"}, "SGD, one cycle, rate up to 0.1", "What the others differ from."),
        Change({"lr": "0.01"}, "a tenth of the rate", "The rate is what to tune first, by factors of ten."),
        Change({"optimizer": "adam", "lr": "0.001"}, "Adam, rate 0.001", "Adam fits the rate to every weight."),
        Change({"lr": "0.1", "schedule": "constant"}, "the rate stays", "A rate that falls lets the weights settle."),
        Change({"lr": "0.1", "depth": "2"}, "twice as deep", "More layers can say more, and need more to learn from."),
        Change(
            {
                "lr": "0.1",
                "network": "plain",
                "widths": "24 48 96 192",
                "depth": "4",
                "batch_norm": "on",
                "pool_to": "1",
            },
            "as deep, without shortcuts",
            "Shortcuts carry the gradient to the first layers.",
            "twice as deep",
        ),
        Change({"lr": "0.1", "dropout": "0.5"}, "dropout 0.5", "Dropout is for networks that learn photos by heart."),
        Change({"lr": "0.1", "augment": "off"}, "no augmentation", "Changed photos stand for those never taken."),
        Change({"lr": "0.1", "cutmix": "1"}, "CutMix", "Strong augmentation wants a longer training than this one."),
    ],
    "lessons-loss": [
        Change({"loss": "bce"}, "binary cross-entropy", "Every pixel counts alike."),
        Change({"loss": "dice"}, "Dice", "The overlap itself, as iou measures it."),
        Change(
            {"loss": "focal"},
            "focal",
            "Its usual alpha, 0.25, counts the object a third of the rest.",
        ),
        Change({"loss": "bce+dice"}, "both", "Pixels and overlap."),
    ],
}
# Two experiments on the same pictures, what was changed between them, and what it is about.
PAIRS = [
    ("flowers5-basic", "flowers5-dropout", "dropout", "D2 against D1, as the report has it."),
    (
        "flowers5-basic",
        "flowers5-cvlab",
        "augmentation, BatchNorm, shortcuts",
        "Ten years of practice.",
    ),
    ("caltech256-baseline-adam", "caltech256-baseline-sgd", "SGD for Adam", "Both as the report has them."),
    (
        "caltech256-baseline-sgd",
        "caltech-cvlab",
        "augmentation, shortcuts, one cycle",
        "The same 20 epochs, fewer pixels.",
    ),
    ("scenes8-plain", "scenes8-cvlab", "augmentation, CutMix, shortcuts", "A twelfth of the parameters."),
    ("scenes8-plain", "scenes8-residual", "shortcuts", "C2 against C1, as the report has it."),
    ("flowers5-cvlab", "flowers5-transfer", "a pretrained network", "1,400 photos to train on."),
    ("flowers17-cvlab", "flowers17-transfer", "a pretrained network", "714 photos to train on."),
    ("scenes8-cvlab", "scenes8-transfer", "a pretrained network", "400 grey photos to train on."),
    (
        "horses-unet",
        "horses-cvlab",
        "BatchNorm, one cycle, small pictures",
        "Small pictures leave time for epochs.",
    ),
]


def learned(folder: Path = FOLDER) -> str:
    """What was learned, of what was run: changes of one training over seeds, then pairs of experiments."""
    lines = []
    for name, changes in SWEEPS.items():
        rows = (read(name, folder) or {"sweep": []})["sweep"]
        found = {change.title: scores_of(rows, change.options) for change in changes}
        if not found[changes[0].title]:
            continue
        score = "iou" if "loss" in rows[0] else "accuracy"
        lines += [
            f"\n| {name} | val {score}, mean (lowest to highest) | difference by seed | |",
            "| --- | --- | --- | --- |",
        ]
        for change in changes:
            if values := found[change.title]:
                difference = differences(values, found[change.against or changes[0].title])
                against = f", against {change.against}" if change.against else ""
                lines.append(f"| {change.title} | {spread(values.values())} | {difference}{against} | {change.about} |")
    pairs = [(read(a, folder), read(b, folder), a, b, *said) for a, b, *said in PAIRS]
    pairs = [pair for pair in pairs if all(each and each.get("test") for each in pair[:2])]
    if pairs:
        lines += ["\n| change | from | to, on test | |", "| --- | --- | --- | --- |"]
    for before, after, a, b, title, about in pairs:
        cells = [f"{name} {found['test']['value']:.3f}" for name, found in ((a, before), (b, after))]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {about} |")
    if not lines:
        lines = ["\nNothing of it is measured yet: `python train/sweep.py --recipe lessons --data DIR` begins."]
    return "\n".join([*lines, ""])


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean, lowest and highest."""
    values = list(values)
    return f"{statistics.mean(values):{sign}.3f} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"


def differences(values: dict[str, float], others: dict[str, float]) -> str:
    """The differences of two trainings with the same seed: their mean, the lowest and the highest."""
    found = [values[seed] - others[seed] for seed in values if seed in others]
    return spread(found, "+") if values != others and found else ""


def scores_of(rows: list[dict[str, str]], options: dict[str, str]) -> dict[str, float]:
    """By seed the best val scores of the runs that have exactly these options."""
    standing = ("run", "seed", "state", "epochs", "best val", "at epoch", "minutes")
    return {
        row["seed"]: float(row["best val"])
        for row in rows
        if {name: value for name, value in row.items() if value and name not in standing} == options
    }


def inserted(readme: str, folder: Path = FOLDER) -> str:
    """The README with both parts between their marks."""
    for mark, text in (("results", table(folder)), ("learned", learned(folder))):
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
        before, rest = readme.split(start)
        readme = before + start + text + end + rest.split(end)[1]
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put both parts into README.md")
    parser.add_argument("--collect", nargs="+", metavar="RUN", default=[])
    parser.add_argument("--time", nargs=3, metavar=("RECIPE", "PICTURES", "CLASSES"))
    args = parser.parse_args()
    runs = [word.partition("=")[::2] if "=" in word else (Path(word).name, word) for word in args.collect]
    kept = {name: collected(Path(run)) for name, run in runs}
    if args.time:
        kept[args.time[0]] = timed(args.time[0], *map(int, args.time[1:]))
    for name, figures in kept.items():
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(f"Kept: {FOLDER / f'{name}.json'}")
    readme = ROOT / "README.md"
    if args.write:
        readme.write_text(inserted(readme.read_text()))
    elif not kept:
        print(table(), learned())


if __name__ == "__main__":
    main()
