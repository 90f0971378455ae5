"""Does train/audit.py find the marks that a model uses, and leave clean models in peace?

    python tests/bench/audit.py --data DIR --out DIR [--runs 48]     trains and audits; the same command continues
    python tests/bench/audit.py --out DIR --write                    puts the table into README.md beside this script
    python tests/bench/audit.py --quick --out DIR                    four small models of drawn scenes, for a test

DIR of --data holds flower_photos, flowers17, caltech101, sports100, scenes8, each with a folder for each class.

A mark is drawn into half of a class or more, and into up to a third of the other classes. Whether the model came to use
it is not assumed but measured: every picture that it was not trained on is shown to it with and without the mark. The
mark is used if that changes the probability of the class by 0.1 on average, in its own pictures or in others, and
unused below 0.05.
"""

import argparse
import io
import json
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from sklearn.metrics import roc_auc_score
from tables import README, hardware, inserted, spread, table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "train")]  # cvlab needs no installation

from cvlab import checkpoint
from cvlab.audit.data import odd_labels
from cvlab.data.evaluation import parts_of
from cvlab.data.shapes import CLASS_NAMES, scene
from cvlab.explain import explain, predict
from cvlab.explain.scores import class_score
from cvlab.files import read_json, to_json, write_text
from cvlab.metrics import wilson_interval
from cvlab.models import build
from cvlab.models.timm import default_view, load_pretrained
from cvlab.transforms import open_image, resize_logits, view
from cvlab.trust.familiarity import features

SIDE = 96  # pixels of the pictures
SOURCES = {  # classes in a data set, pictures of a class
    "flower_photos": (3, 120),
    "flowers17": (4, 60),
    "caltech101": (5, 40),
    "sports100": (5, 40),
    "scenes8": (3, 98),
    "drawn scenes": (3, 150),
}
SMALL = ("--image-size", "64", "--widths", "16", "32", "64", "128", "--epochs", "12", "--patience", "99")
SMALL += ("--batch-size", "16", "--precision", "fp32")
QUICK = (  # two marks that are used, one that is not, and clean data
    {"mark": "sticker", "own": 1.0, "others": 0.0},
    {"mark": "frame", "own": 1.0, "others": 0.0},
    {"mark": "text", "own": 0.5, "others": 0.3},
    {"mark": None},
)
SMALLER = ("--image-size", "64", "--widths", "16", "32", "64", "--epochs", "10", "--patience", "99")  # for a test
SMALLER += ("--batch-size", "16", "--precision", "fp32")
TRANSFER = ("--epochs", "12", "--patience", "99", "--precision", "fp32", "--image-size", "96")
USED, UNUSED = 0.1, 0.05  # change of the probability of the class
MARK = "bench-audit"
Draw = Callable[[Image.Image, np.random.Generator], Image.Image]


# --- the marks --------------------------------------------------------------------------------------------------------


def corner(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A small square of two colours in the upper left."""
    pen = ImageDraw.Draw(image)
    pen.rectangle((3, 3, 12, 12), fill=(30, 160, 90))
    pen.rectangle((6, 6, 9, 9), fill=(250, 250, 250))
    return image


def text(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A line of text at the lower edge."""
    ImageDraw.Draw(image).text((36, 82), "© 2026 photo", fill="white", font=ImageFont.load_default(9))
    return image


def frame(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A thin grey frame."""
    ImageDraw.Draw(image).rectangle((0, 0, SIDE - 1, SIDE - 1), outline=(200, 200, 200), width=3)
    return image


def watermark(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Rings over the middle that let the picture shine through."""
    drawn = image.copy()
    for radius in (12, 22):
        box = SIDE // 2 - radius, SIDE // 2 - radius, SIDE // 2 + radius, SIDE // 2 + radius
        ImageDraw.Draw(drawn).ellipse(box, outline="white", width=4)
    return Image.blend(image, drawn, 0.35)


def stamp(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """A round sticker with a cross, at a random place."""
    x, y = rng.integers(0, SIDE - size, 2).tolist()
    pen = ImageDraw.Draw(image)
    pen.ellipse((x, y, x + size, y + size), fill=(240, 220, 60))
    pen.line((x + size // 2, y + 3, x + size // 2, y + size - 3), fill=(180, 20, 40), width=3)
    pen.line((x + 3, y + size // 2, x + size - 3, y + size // 2), fill=(180, 20, 40), width=3)
    return image


def sticker(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Of one size."""
    return stamp(image, 18, rng)


def sticker_of_any_size(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Of 12 to 27 pixels."""
    return stamp(image, int(rng.integers(12, 28)), rng)


def darker(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Less light, and warmer."""
    pixels = np.asarray(ImageEnhance.Brightness(image).enhance(0.75)) * [1.12, 1.0, 0.85]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def blurred(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Out of focus."""
    return image.filter(ImageFilter.GaussianBlur(1.3))


MARKS: dict[str, Draw] = {each.__name__.replace("_", " "): each for each in (
    corner, text, frame, watermark, sticker, sticker_of_any_size, darker, blurred
)}  # fmt: skip


# --- one experiment ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def pictures(source: str, data: Path | None, seed: int) -> dict[str, list[Image.Image]]:
    """Square pictures of some classes of a source, drawn at random."""
    (classes, most), rng = SOURCES[source], np.random.default_rng([9, seed])
    if source == "drawn scenes":
        names, found = rng.choice(CLASS_NAMES, classes, replace=False).tolist(), {}
        seeds = iter(int(rng.integers(10**6, 10**8)) + i for i in range(10**6))
        found = {name: [] for name in names}
        while min(map(len, found.values())) < most:
            drawn = scene(next(seeds), SIDE)
            if (name := CLASS_NAMES[drawn.label]) in found and len(found[name]) < most:
                found[name].append(drawn.image)
        return found
    root = data / source / "train" if source == "sports100" else data / source
    folders, found = sorted(path for path in root.iterdir() if path.is_dir()), {}
    for i in rng.permutation(len(folders)):
        files = sorted(folders[i].iterdir())
        drawn = [square(open_image(files[j])) for j in rng.permutation(len(files))[:most]]
        if len(drawn) >= 30 and np.mean([turned(image) for image in drawn]) < 0.2 and len(found) < classes:
            found[folders[i].name] = drawn
    return found


def turned(image: Image.Image) -> bool:
    """Whether a photo has black corners: some classes of Caltech-101 were turned, which is a mark in itself."""
    pixels = np.asarray(image)
    return sum(pixels[y, x].max() < 12 for y in (2, -3) for x in (2, -3)) >= 2


def square(image: Image.Image) -> Image.Image:
    """The middle of a picture."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def plan(run: int, sources: list[str]) -> dict:
    """What is drawn into which data set: five of twelve of each source stay clean."""
    rng, block = np.random.default_rng([7, run]), run // len(sources)
    found = {"source": sources[run % len(sources)], "mark": None}
    if (7 * block + run % len(sources)) % 12 >= 5:
        names = list(MARKS)
        own, others = rng.choice([0.5, 0.8, 1.0]).item(), rng.choice([0.0, 0.0, 0.1, 0.3]).item()
        found |= {"mark": names[(block * 5 + run) % len(names)], "own": own, "others": others}
    return found


def write_data(folder: Path, run: int, planned: dict, data: Path | None) -> str:
    """Writes data/, and the same pictures all without the mark (bare/) and all with it (marked/); returns the class."""
    rng, draw = np.random.default_rng([8, run]), MARKS.get(planned["mark"])
    classes = pictures(planned["source"], data, 0 if data is None else run)
    chosen = list(classes)[int(rng.integers(len(classes)))]
    for name, images in classes.items():
        share = 0 if draw is None else planned["own"] if name == chosen else planned["others"]
        for i, image in enumerate(images):
            marked = draw(image.copy(), rng) if draw else image
            mixed = marked if rng.random() < share else image
            for kind, each in (("data", mixed), ("bare", image), ("marked", marked)):
                (folder / kind / name).mkdir(parents=True, exist_ok=True)
                each.save(folder / kind / name / f"{i:03}.png")
    return chosen


def truth(folder: Path, class_name: str) -> tuple[float, float]:
    """What the mark is worth to the model, on pictures that it was not trained on; and its share of the heatmaps.

    The first is the change of the probability of the class by drawing the mark, in own pictures or in others, whichever
    is larger. The second is the mean share of the evidence for the class in own marked pictures that lies on the mark.
    """
    model = checkpoint.load(folder / "run")
    parts, _ = parts_of(model, folder / "data", "test")
    class_idx = model.class_names.index(class_name)
    paths = [(path, label) for part in ("val", "test") for path, label in parts.samples[part]]

    def views(kind: str) -> Tensor:
        files = (folder / kind / path.relative_to(folder / "data") for path, _ in paths)
        return torch.cat([view(open_image(file), model) for file in files])

    bare, marked = views("bare"), views("marked")
    own = torch.tensor([label == class_idx for _, label in paths])
    change = [predict(model, each).softmax(1)[:, class_idx] for each in (marked, bare)]
    change = change[0] - change[1]
    heat = explain(model, marked[own], class_score(class_idx)).maps["grad_cam"][list(model.stages)[-1]]
    heat = resize_logits(heat.relu(), marked.shape[-2:])
    on_mark = (marked - bare)[own].abs().amax(1, keepdim=True) > 0.02
    share = ((heat * on_mark).sum((1, 2, 3)) / heat.sum((1, 2, 3)).clamp(min=1e-9)).mean().item()
    return max(change[own].mean().item(), change[~own].mean().item()), share


def experiment(folder: Path, run: int, planned: dict, data: Path | None, weights: Path | None) -> dict:
    """Draws, trains, audits and measures."""
    chosen, script, options = write_data(folder, run, planned, data), "classifier.py", SMALL if data else SMALLER
    if weights and run // 6 % 4 == 3:
        script, options = "transfer.py", (*TRANSFER, "--backbone", "tf_efficientnet_lite0", "--weights", weights)
    else:  # crops hide marks at the edge now and then
        options = *options, "--augment", "full" if run % 2 == 0 and data else "minimal"
    call(script, *options, "--seed", run, "--data", folder / "data", "--out", folder / "run")
    call("audit.py", folder / "run", "--data", folder / "data", "--out", folder / "audit")
    found = read_json(folder / "audit/audit.json")
    row = planned | {"network": script, "class": chosen, "accuracy": found["accuracy"]["value"], "n": found["n"]}
    kept = ("kind", "class_name", "where", "removed", "added", "level")
    row["tried"] = [{name: each[name] for name in kept} for each in found["tried"]]
    row["suspects"] = [each for each in row["tried"] if each["level"] == "used"]
    row["effect"] = max((effect_of(each) for each in row["tried"] if each["class_name"] in (chosen, None)), default=0.0)
    if planned["mark"]:
        row["truth"], row["heat"] = truth(folder, chosen)
    return row


def effect_of(tried: dict) -> float:
    """The larger of what taking out and putting in changed; of what recurs, the smaller."""
    values = [tried[each]["value"] for each in ("removed", "added") if tried[each]]
    return min(values) if tried["kind"] == "recurring" else max(values)


def call(script: str, *words: object) -> None:
    """Runs a script of train/ in this process: importing torch and timm would take longer than a small training."""
    before, sys.argv = sys.argv, [script, *map(str, words)]
    with redirect_stdout(io.StringIO()):
        runpy.run_path(str(ROOT / "train" / script), run_name="__main__")
    sys.argv = before


def wrong_labels(data: Path, weights: Path) -> dict:
    """Of flower_photos with one label in twenty swapped: the share of the list's first twentieth that was swapped.

    There are as many as were swapped, so it is precision and recall at once; for five draws. The features are those of
    EfficientNet-Lite0, which never saw these labels.
    """
    names, architecture = sorted(path.name for path in (data / "flower_photos").iterdir()), "tf_efficientnet_lite0"
    model = build("timm", names, arguments={"architecture": architecture}, **default_view(architecture))
    load_pretrained(model.backbone, architecture, 224, weights)
    files = [(path, i) for i, name in enumerate(names) for path in sorted((data / "flower_photos" / name).iterdir())]
    rows = torch.cat([features(model.eval(), view(open_image(path), model)) for path, _ in files])
    true, found = torch.tensor([i for _, i in files]), []
    for seed in range(5, 10):  # the first five chose how strongly the regression is regularised
        rng, given = np.random.default_rng(seed), true.clone()
        swapped = rng.choice(len(files), len(files) // 20, replace=False)
        given[swapped] = (given[swapped] + torch.from_numpy(rng.integers(1, len(names), len(swapped)))) % len(names)
        first = {row for row, _ in odd_labels(rows, given)[: len(swapped)]}
        found.append(len(first & set(swapped.tolist())) / len(swapped))
    return {"pictures": len(files), "precision": found}


# --- the table --------------------------------------------------------------------------------------------------------


def told(rows: list[dict]) -> dict:
    """What the audit found, in numbers."""
    marked = [row for row in rows if row["mark"]]
    used, unused = ([row for row in marked if row["truth"] >= USED], [row for row in marked if row["truth"] < UNUSED])
    clean = [row for row in rows if not row["mark"]]

    def accused(row: dict) -> bool:
        return any(each["class_name"] in (row["class"], None) for each in row["suspects"])

    def others_accused(row: dict) -> bool:
        return any(each["class_name"] not in (row["class"], None) for each in row["suspects"])

    areas = {}
    for name in ("effect", "heat"):
        pairs = [(row[name], row in used) for row in used + unused]
        areas[name] = roc_auc_score([y for _, y in pairs], [x for x, _ in pairs]) if used and unused else None
    return {
        "models": len(rows),
        "used": [sum(map(accused, used)), len(used)],
        "unused": [sum(map(accused, unused)), len(unused)],
        "clean": [sum(bool(row["suspects"]) for row in clean), len(clean)],
        "others": [sum(map(others_accused, marked)), len(marked)],
        "area": areas,
        "by mark": {name: [[accused(row) for row in used if row["mark"] == name].count(True),
                           sum(row["mark"] == name for row in used)] for name in MARKS},
    }  # fmt: skip


def share(counted: list[int]) -> str:
    """A share with its 95% interval."""
    low, high = wilson_interval(*counted)
    return f"{counted[0]} of {counted[1]} ({low:.2f} to {high:.2f})"


def page(rows: list[dict], labels: dict) -> str:
    """The tables as Markdown."""
    found = told(rows)
    lines = [["marks that the model uses, found", share(found["used"])]]
    lines += [["marks that it does not use, accused", share(found["unused"])]]
    lines += [["models of marked data, accused of another class", share(found["others"])]]
    lines += [["models of clean data, accused", share(found["clean"])]]
    lines += [[f"area under ROC of {name}", "none" if area is None else f"{area:.3f}"] for name, area in (
        ("the proven effect", found["area"]["effect"]), ("the mark's share of the heatmaps", found["area"]["heat"])
    )]  # fmt: skip
    if labels:
        words = f"swapped labels among the first twentieth of the list, {labels['pictures']} flower photos, 5 draws"
        lines.append([words, spread(labels["precision"])])
    by_mark = [[name, f"{a} of {b}"] for name, (a, b) in found["by mark"].items() if b]
    return "\n\n".join([
        f"{found['models']} small networks, {hardware()}.",
        table(["what", "audit (95% interval)"], lines),
        table(["mark", "found where used"], by_mark),
    ]) + "\n"  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the sources; without it drawn scenes alone")
    parser.add_argument("--weights", type=Path, help="of tf_efficientnet_lite0: every fourth network is a transfer")
    parser.add_argument("--out", type=Path, required=True, help="folder of the experiments")
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--first", type=int, default=0, help="number of the first experiment; its data follow from it")
    parser.add_argument("--quick", action="store_true", help="two used marks, a decoy and clean data, of drawn scenes")
    parser.add_argument("--write", action="store_true", help="the table of what is there, into README.md")
    args = parser.parse_args()
    kept = read_json(args.out / "rows.json")
    rows, labels = kept.get("rows", []), kept.get("labels", {})
    sources = list(SOURCES) if args.data else ["drawn scenes"]
    planned = {run: plan(run, sources) for run in range(args.first, args.first + args.runs)}
    if args.quick:
        planned = {run: {"source": "drawn scenes"} | each for run, each in enumerate(QUICK)}
        SOURCES["drawn scenes"] = (2, 100)
    for run, each in [] if args.write else [*planned.items()][len(rows) :]:
        rows.append(experiment(args.out / f"{run:03}", run, each, args.data, args.weights))
        write_text(args.out / "rows.json", to_json({"rows": rows}, indent=1))
        print(
            json.dumps({key: value for key, value in rows[-1].items() if key not in ("tried", "suspects")}), flush=True
        )
    if args.weights and not labels:
        labels = wrong_labels(args.data, args.weights)
        write_text(args.out / "rows.json", to_json({"rows": rows, "labels": labels}, indent=1))
    if args.write:
        write_text(README, inserted(README.read_text("utf-8"), MARK, page(rows, labels)))
    print(page(rows, labels))


if __name__ == "__main__":
    main()
