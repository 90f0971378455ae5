"""Prints the tables of train/recipes/README.md: the comparison with the five reports, and what was learned.

    python tests/bench/results.py                            print both
    python tests/bench/results.py --write                    put them into train/recipes/README.md
    python tests/bench/results.py --collect runs/NAME ...    copy the figures of a run to tests/bench/results/NAME.json;
                                                             NAME=FOLDER if the folder has another name
    python tests/bench/results.py --time horses-unet 195 1   estimate how long a recipe takes on this machine, with 195
                                                             training pictures of one class

Runs are not part of the repository. Their figures are, without photographs. Collect a run after
`python train/evaluate.py runs/NAME --part test`. Sweeps and dropout studies can be collected as they are.
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
PAGE = ROOT / "train" / "recipes" / "README.md"
RECIPES = ROOT / "train" / "recipes"
WEIGHTS = "the pretrained weights could not be downloaded"
GPU = "no GPU was available, and too little processor time"
# The experiments of the reports in their order, each report followed by ours. The value is the reason that the table
# gives for an experiment without figures.
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
    "horses-transfer": WEIGHTS,
}
# What a data folder holds; "for" names the data set that the report used.
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
    """The figures collected for an experiment, or None."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def collected(run: Path) -> dict:
    """The figures of a run, a sweep or a dropout study that the tables need, with the day when they were measured."""
    if (run / "study.json").is_file():
        return {"measured": today(), "study": json.loads((run / "study.json").read_text())}
    if (run / "runs.csv").is_file():
        with open(run / "runs.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["state"] == "done"]
        return {"measured": today(), "sweep": rows, "manifest": manifest_of(run / rows[0]["run"])}
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    score = next(name for name in ("iou", "accuracy") if f"val_{name}" in history[0])
    manifest = json.loads((run / "manifest.json").read_text())
    best = history[manifest["best_epoch"] - 1]
    val = {"value": best[f"val_{score}"], "epoch": best["epoch"]}
    metrics = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").is_file() else {}
    block = json.loads((run / "config.json").read_text())["cvlab"]
    test = {**metrics[score], "n": metrics["n"]} if metrics.get("part") == "test" else None
    facts = {"network": block["network"], "data": block["data"]["name"], "image_size": block["image_size"]}
    measured = manifest["finished"][:10]  # an ISO date: its day
    return {"measured": measured, "score": score, "val": val, "test": test, **facts, "manifest": manifest_of(run)}


def today() -> str:
    """The day as YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d", time.gmtime())


def manifest_of(run: Path) -> dict:
    """How a run was made: its command, cost and hardware."""
    manifest = json.loads((run / "manifest.json").read_text())
    keys = ("command", "started_from", "seed", "precision", "parameters", "epochs", "minutes", "hardware")
    chosen = {key: manifest.get(key) for key in keys}
    # Absolute paths mean nothing on another machine: only the last part is kept.
    return chosen | {"command": re.sub(r"(?<= )/\S*/", "", chosen["command"])}


def timed(recipe: str, pictures: int, num_classes: int, steps: int = 3) -> dict:
    """Estimates how long a recipe takes on this machine: the median time of `steps` steps, after one warm-up step.

    Both precisions are timed and the faster one is used, as the training scripts do.

    Args:
        recipe: name of a recipe of train/classifier.py or train/segmenter.py.
        pictures: number of training pictures.
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
            start = time.process_time()  # not wall time: other programs may be running
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
        "measured": today(),
        "timed": {**figures, "hours": float(f"{hours:.3g}"), "parameters": sum(p.numel() for p in model.parameters())},
    }


def rows_of(name: str, found: dict | None) -> list[str]:
    """The table rows of one experiment: a dropout study has one for each network, everything else has one."""
    path = RECIPES / f"{name}.toml"
    recipe = tomllib.loads(path.read_text()) if path.is_file() else {"report": {"row": "", "figure": ""}}
    report, options = recipe["report"], recipe.get("options", {})
    start = f"| {name}: {report['row']} | {report['figure']} |"
    if found is None:
        return [f"{start} {NOT_RUN.format(EXPERIMENTS[name])} | | | | |"]
    if "timed" in found:
        facts = found["timed"]
        steps = f"{facts['steps']} steps of {facts['seconds_a_step']} s in {facts['precision']}"
        time_taken = f"{facts['hours']:.0f} hours" if facts["hours"] >= 1.5 else f"{60 * facts['hours']:.0f} minutes"
        reason = f"it needs about {time_taken} of one core, estimated from {steps}"
        return [f"{start} {NOT_RUN.format(reason)} | | | {facts['parameters'] / 1e6:.2f} M | |"]
    if "study" in found:
        return [study_row(name, network, study) for network, study in found["study"].items()]
    manifest = found["manifest"]
    trainings = [manifest, *filter(None, [manifest["started_from"]])]
    epochs, minutes = (sum(each[key] for each in trainings) for key in ("epochs", "minutes"))
    test = interval(found["test"], found["score"]) if found["test"] else "not read"
    val = f"{found['val']['value']:.3f}"
    data = DATA.get(found["data"], found["data"])
    named, meant = re.search(r"--backbone (\S+)", manifest["command"]), options.get("backbone", "").split(".")[0]
    if named and named[1] != meant and not report["row"].startswith("ours"):
        data += f"; **{named[1]} stands in for {meant}**"
    parameters = f"{manifest['parameters'] / 1e6:.2f} M"
    return [f"{start} {test} | {val} | {data} | {parameters} | {epochs}, {minutes:.0f} |"]


def study_row(name: str, network: str, study: dict) -> str:
    """The dropout value with the best validation score, beside the control with dropout 0."""
    best = max(study["rows"], key=lambda row: row["after"]["val"]["value"])
    control = next(row for row in study["rows"] if float(row["dropout"]) == 0)
    test = f"{interval(best['after']['test'], 'accuracy')}; at 0 {control['after']['test']['value']:.3f}"
    val = f"{best['after']['val']['value']:.3f}"
    facts = f"{DATA['scenes8']} | dropout {best['dropout']} | {study['epochs']} more"
    return f"| {name}: {network} | | {test} | {val} | {facts} |"


def interval(score: dict, name: str) -> str:
    """A score on the test part with its 95% interval and the number of pictures."""
    return f"{name} **{score['value']:.3f}** ({score['low']:.3f} to {score['high']:.3f}), n = {score['n']}"


def table(folder: Path = FOLDER) -> str:
    """The comparison with the reports: every experiment, then the commands of those that were run."""
    found = {name: read(name, folder) for name in EXPERIMENTS}
    lines = [
        "| experiment | report | cvlab, test (95% interval) | best val | data | parameters | epochs, minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row for name, each in found.items() for row in rows_of(name, each)),
    ]
    manifests = [each["manifest"] for each in found.values() if each and "manifest" in each]
    hardware = "; ".join(sorted({manifest["hardware"] for manifest in manifests})).replace(" 1 threads", " 1 thread")
    note = (
        f"Measured on {days(found.values())} on {hardware}. One training each, with seed 0 unless the command names "
        "another, which validation chose. Nothing was trained on test pictures or chosen by them. Other programs ran "
        "on the machine, so the minutes are an upper bound. 95% intervals: Wilson for accuracy, bootstrap over "
        "pictures for iou."
    )
    # Where the data lay says nothing to a reader, who gives a folder of their own.
    commands = [re.sub(r"--data \S+", "--data DIR", manifest["command"]) for manifest in manifests]
    return "\n".join(["", *lines, "", note, "", "```", *commands, "```", ""])


def days(found: Iterable[dict | None]) -> str:
    """The day of the measurements, or the first and the last."""
    measured = sorted({each["measured"] for each in found if each})
    return " to ".join(measured[:1] + measured[1:][-1:])


class Change(NamedTuple):
    """One change to a training: the options of its runs in a sweep, its title, and a remark."""

    options: dict[str, str]
    title: str
    about: str
    against: str = ""  # the title of the change to compare with; by default the first of the sweep


PHOTOS = (25, 50, 100, 200, 300)
SWEEPS = {
    "lessons": [
        Change({"lr": "0.1"}, "SGD, one cycle, rate up to 0.1", "The baseline of this table."),
        Change({"lr": "0.01"}, "a tenth of the rate", "Tune the learning rate first, in factors of ten."),
        Change({"optimizer": "adam", "lr": "0.001"}, "Adam, rate 0.001", "Adam adapts the step size of every weight."),
        Change({"lr": "0.1", "schedule": "constant"}, "constant rate", "A falling rate lets the weights settle."),
        Change({"lr": "0.1", "depth": "2"}, "twice as deep", "More layers can represent more, and need more photos."),
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
        Change({"lr": "0.1", "dropout": "0.5"}, "dropout 0.5", "Dropout is for networks that overfit."),
        Change({"lr": "0.1", "augment": "off"}, "no augmentation", "Augmentation stands in for more photos."),
        Change({"lr": "0.1", "cutmix": "1"}, "CutMix", "Strong augmentation needs a longer training."),
    ],
    "lessons-loss": [
        Change({"loss": "bce"}, "binary cross-entropy", "Every pixel counts the same."),
        Change({"loss": "dice"}, "Dice", "It measures the overlap, as iou does."),
        Change({"loss": "focal"}, "focal", "Its usual alpha, 0.25, weights the object a third of the rest."),
        Change({"loss": "bce+dice"}, "binary cross-entropy + Dice", "Single pixels and the overlap."),
    ],
    "lessons-photos": [
        Change({"per_class": f"{n} 50"}, f"{n} photos a class, from scratch", "Other photos in val for each number.")
        for n in PHOTOS
    ],
    "lessons-photos-transfer": [
        Change({"per_class": f"{n} 50"}, f"{n} photos a class, pretrained", "A layer on a frozen EfficientNet-Lite0.")
        for n in PHOTOS
    ],
    "lessons-data": [
        Change({"data": "clean"}, "200 photos a class", "Five flowers at 64 pixels."),
        Change({"data": "wrong"}, "one label in ten is wrong", "Only in train; val is right."),
        Change({"data": "copies"}, "half of val is in train too", "Cropped copies: what is measured is memory."),
    ],
    "lessons-size": [
        Change({"image_size": "64"}, "64 pixels", "A picture of 128 pixels takes four times as long."),
        Change({"image_size": "96"}, "96 pixels", ""),
        Change({"image_size": "128"}, "128 pixels", ""),
    ],
    "lessons-dropout": [
        Change({"dropout": "0"}, "no dropout", "A plain network of four convolutions and two linear layers."),
        Change({"dropout": "0.25", "dropout_at": "2"}, "dropout 0.25 before an early convolution", ""),
        Change({"dropout": "0.25", "dropout_at": "4"}, "before the last convolution", ""),
        Change({"dropout": "0.25", "dropout_at": "2 4"}, "before both", ""),
        Change({"dropout": "0", "head_dropout": "0 0.5"}, "0.5 between the linear layers", ""),
    ],
}
# Two experiments on the same pictures, what was changed from the first to the second, and a remark.
PAIRS = [
    ("flowers5-basic", "flowers5-dropout", "dropout", "Both networks as in the report."),
    ("flowers5-basic", "flowers5-cvlab", "augmentation, BatchNorm, shortcuts", "150 epochs instead of 30."),
    ("caltech256-baseline-adam", "caltech256-baseline-sgd", "SGD for Adam", "Both as in the report."),
    ("caltech256-baseline-sgd", "caltech-cvlab", "augmentation, shortcuts, one cycle", "128 pixels instead of 224."),
    ("scenes8-plain", "scenes8-cvlab", "augmentation, CutMix, shortcuts", "A twelfth of the parameters."),
    ("scenes8-plain", "scenes8-residual", "shortcuts", "28 and 14 of 100 epochs."),
    ("flowers5-cvlab", "flowers5-transfer", "a pretrained network", "1,400 training photos."),
    ("flowers17-cvlab", "flowers17-transfer", "a pretrained network", "714 training photos."),
    ("scenes8-cvlab", "scenes8-transfer", "a pretrained network", "400 grey training photos."),
    ("horses-unet", "horses-cvlab", "BatchNorm, one cycle, 100 epochs", "17 of 75 epochs at 256 pixels before."),
]


def learned(folder: Path = FOLDER) -> str:
    """What the collected runs teach: changes to one training over several seeds, then pairs of experiments."""
    lines: list[str] = []
    kept = {name: read(name, folder) for name in {*SWEEPS, *(name for pair in PAIRS for name in pair[:2])}}
    for name, changes in SWEEPS.items():
        rows = (kept[name] or {"sweep": []})["sweep"]
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
    measured = [pair for pair in PAIRS if all(kept[name] and kept[name].get("test") for name in pair[:2])]
    if measured:
        lines += ["\n| change | from | to, on test | |", "| --- | --- | --- | --- |"]
    for *names, title, about in measured:
        before, after = (f"{name} {kept[name]['test']['value']:.3f}" for name in names)
        lines.append(f"| {title} | {before} | {after} | {about} |")
    if not lines:
        lines = ["\nNothing is measured yet. Begin with `python train/sweep.py --recipe lessons --data DIR`."]
    return "\n".join([f"\nMeasured on {days(kept.values())}." * any(kept.values()), *lines, ""])


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean, lowest and highest."""
    values = list(values)
    return f"{statistics.mean(values):{sign}.3f} ({min(values):{sign}.3f} to {max(values):{sign}.3f})"


def differences(values: dict[str, float], others: dict[str, float]) -> str:
    """Mean, lowest and highest difference between two trainings with the same seed; empty for the baseline itself."""
    found = [values[seed] - others[seed] for seed in values if seed in others]
    return spread(found, "+") if values != others and found else ""


def scores_of(rows: list[dict[str, str]], options: dict[str, str]) -> dict[str, float]:
    """The best validation score of each seed, from the runs with exactly these options."""
    standing = ("run", "seed", "state", "epochs", "best val", "at epoch", "minutes")
    return {
        row["seed"]: float(row["best val"])
        for row in rows
        if {name: value for name, value in row.items() if value and name not in standing} == options
    }


def inserted(page: str, folder: Path = FOLDER) -> str:
    """The text of train/recipes/README.md with both parts between their marks."""
    for mark, text in (("results", table(folder)), ("learned", learned(folder))):
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
        before, rest = page.split(start)
        page = before + start + text + end + rest.split(end)[1]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put both parts into train/recipes/README.md")
    parser.add_argument("--collect", nargs="+", metavar="RUN", default=[], help="folders of runs")
    parser.add_argument("--time", nargs=3, metavar=("RECIPE", "PICTURES", "CLASSES"), help="time three steps")
    args = parser.parse_args()
    runs = [word.partition("=")[::2] if "=" in word else (Path(word).name, word) for word in args.collect]
    kept = {name: collected(Path(run)) for name, run in runs}
    if args.time:
        kept[args.time[0]] = timed(args.time[0], *map(int, args.time[1:]))
    for name, figures in kept.items():
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
        print(f"Kept: {FOLDER / f'{name}.json'}")
    if args.write:
        PAGE.write_text(inserted(PAGE.read_text()))
    elif not kept:
        print(table(), learned())


if __name__ == "__main__":
    main()
