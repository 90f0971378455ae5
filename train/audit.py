"""Does a classifier cheat? Finds marks that go with one class, and proves whether the model uses them.

    python train/audit.py runs/flowers --data DIR --out runs/flowers-audit
    python train/audit.py runs/flowers --data DIR --out runs/flowers-audit --clean DIR2

A mark that a class has in train and in test, a watermark, a frame, a stamp, raises the test score and is of no use
anywhere else. Candidates are found in train by statistics. Each is then taken out of pictures of val and test that have
it, and put into pictures of other classes: what changes the answers is a suspect.

OUT/audit.json   accuracy on --part, the suspects with what they change, labels that are probably wrong
OUT/README.md    the same to read, with OUT/suspect-1.png, ...: pictures before and after
OUT/mistakes.html   the confusion matrix; each cell opens its pictures with their heatmaps, the surest mistakes first

--clean writes a copy of the data in which the suspects are painted over: train again on it, and its test score is one
that the model has without them.
"""

import argparse
import shutil
from pathlib import Path

import cli
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvlab import checkpoint, render
from cvlab.audit import fixed, patches
from cvlab.audit.labels import odd_labels
from cvlab.audit.prove import Effect, Mark, Proof, prove, without
from cvlab.checkpoint import card
from cvlab.data.evaluation import note_test_read, parts_of, read_views
from cvlab.data.parts import PARTS, Parts
from cvlab.explain.many import predict_views
from cvlab.files import new_folder, to_json, write_text
from cvlab.metrics import interval, wilson_interval
from cvlab.models import Model
from cvlab.transforms import open_image, seen_part, square_view, to_float, to_uint8
from cvlab.trust import hide
from cvlab.trust.familiarity import features

MOST_OF_A_KIND = 3  # candidates that are proved: the more are tried, the surer each must be
SHOWN = 5  # pictures before and after


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model, or its name on the Hub")
    parser.add_argument("--data", type=Path, help="data folder, or torchvision:NAME; by default synthetic scenes")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="test", help="the pictures that are counted")
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--clean", type=Path, metavar="DIR", help="write the data there, with suspects painted over")
    args = parser.parse_args()
    if args.clean and (args.clean.exists() or args.data is None):
        raise ValueError(f"--clean {args.clean} needs --data, and a folder that does not exist yet.")
    model = checkpoint.load(args.checkpoint)
    if model.task != "classification":
        raise ValueError(f"{args.checkpoint} is a segmenter: only classifiers can be audited.")
    parts, _ = parts_of(model, args.data, args.part)
    note_test_read(args.out, parts.name)
    views, labels = {}, {}
    for part in PARTS:
        views[part], given = read_views(parts, part, model)
        labels[part] = torch.tensor(given)

    marks = candidates(views["train"], labels["train"], len(model.class_names))
    held = torch.cat([views["val"], views["test"]]), torch.cat([labels["val"], labels["test"]])
    proofs = [prove(model, mark, *held, len(marks)) for mark in tqdm(marks, "proving", leave=False)]
    proofs.sort(key=lambda proof: -proof.strength)
    suspects = [proof for proof in proofs if proof.level == "used"]

    counted = PARTS if args.part == "all" else (args.part,)
    shown, truth = (torch.cat([of[part] for part in counted]) for of in (views, labels))
    answers = torch.cat([*predict_views(model, shown)]).argmax(1)
    right = int((answers == truth).sum())
    found = {
        "n": len(truth),
        "accuracy": interval(right / len(truth), wilson_interval(right, len(truth))),
        "suspects": [described(proof, model, parts, views["train"]) for proof in suspects],
        "tried": [described(proof, model, parts, views["train"]) for proof in proofs],
        "labels": doubtful_labels(model, parts, views, labels),
    }
    write_text(args.out / "audit.json", to_json(found, indent=1) + "\n")
    for number, proof in enumerate(suspects, 1):
        render.save_png(before_and_after(proof, held[0]), args.out / f"suspect-{number}.png")
    write_text(args.out / "README.md", report(found, parts, args))
    if args.clean:
        write_clean(args.clean, args.data, model, parts, [proof.mark for proof in suspects])
    print((args.out / "README.md").read_text("utf-8"))


def candidates(views: Tensor, labels: Tensor, num_classes: int) -> list[Mark]:
    """The marks in pictures (N, 3, S, S) uint8 that stand out most, of each kind."""
    found: list[Mark] = []
    for kind in (fixed, patches):
        marks = sorted(kind.propose(views, labels, num_classes), key=lambda mark: -mark.strength)
        found += marks[:MOST_OF_A_KIND]
    return found


def described(proof: Proof, model: Model, parts: Parts, views: Tensor) -> dict:
    """A proof as audit.json holds it; `views` are those of train, in which the mark was found."""
    mark, name = proof.mark, model.class_names[proof.mark.class_idx]
    has = mark.has(views).tolist()
    samples = [sample for sample, marked in zip(parts.samples["train"], has, strict=True) if marked]
    own = [sample for sample in samples if isinstance(sample, tuple) and sample[1] == mark.class_idx]
    sentence = f"“{name}”: something {mark.kind}, {mark.where}, is in {len(own)} of its pictures in train and in "
    sentence += f"{len(samples) - len(own)} of other classes."
    for effect, words in ((proof.removed, "Taken out, it lowers"), (proof.added, "Put into others, it raises")):
        if effect:
            value, low, high = (f"{each:.2f}" for each in effect)
            sentence += f" {words} the probability of “{name}” by {value} ({low} to {high})."
    return {
        "kind": mark.kind,
        "class_name": name,
        "where": mark.where,
        "pictures": [str(sample[0]) for sample in own],
        **{key: as_interval(getattr(proof, key)) for key in ("removed", "added")},
        "sentence": sentence,
        "level": proof.level,
    }


def as_interval(effect: Effect | None) -> dict | None:
    """An effect as audit.json holds it."""
    return interval(effect.value, effect[1:]) if effect else None


def doubtful_labels(model: Model, parts: Parts, views: dict[str, Tensor], labels: dict[str, Tensor]) -> list[dict]:
    """Files of all parts whose label is probably wrong, the most doubtful first."""
    samples = [sample for part in PARTS for sample in parts.samples[part]]
    rows = torch.cat([features(model, views[part]) for part in PARTS])
    names, given = model.class_names, torch.cat([labels[part] for part in PARTS])
    return [
        {"file": str(samples[i][0]), "label": names[given[i]], "likely": names[likely]}
        for i, likely in odd_labels(rows, given)
        if isinstance(samples[i], tuple)
    ]


def before_and_after(proof: Proof, views: Tensor) -> Image.Image:
    """Pictures that have the mark above the same without it, or others without it above the same with it."""
    rows = proof.marked if proof.removed else proof.bare
    images = to_float(views[rows[:SHOWN]])
    changed = without(proof.mark, images) if proof.removed else proof.mark.added(images)
    return render.grid(
        [*map(render.to_picture, images), *map(render.to_picture, changed)], [""] * 2 * len(images), len(images)
    )


def report(found: dict, parts: Parts, args: argparse.Namespace) -> str:
    """README.md."""
    accuracy = "Accuracy {value:.3f} ({low:.3f} to {high:.3f})".format(**found["accuracy"])
    lines = [f"# Audit of {Path(args.checkpoint).name} on {parts.name}\n", f"{accuracy} on {found['n']} pictures.\n"]
    if not found["suspects"]:
        lines.append(f"No mark was found that the model uses; {len(found['tried'])} candidates were tried.\n")
    for number, suspect in enumerate(found["suspects"], 1):
        lines += [card.escaped(suspect["sentence"]), f"\n![before and after](suspect-{number}.png)\n"]
    if found["suspects"]:
        lines.append("What to do: `--clean DIR2` writes the data with these marks painted over; train again on it.\n")
    if others := [each for each in found["tried"] if each["level"] != "used"]:
        lines.append("## Tried, and not shown to be used\n")
        lines += [f"- {card.escaped(each['sentence'])} {each['level']}" for each in others]
    if found["labels"]:
        lines.append("\n## Labels to look at, the most doubtful first\n")
        rows = [("file", "label", "likelier"), *(tuple(each.values()) for each in found["labels"][:40])]
        lines.append(card.table(rows))
    return "\n".join(lines) + "\n"


def write_clean(folder: Path, data: Path, model: Model, parts: Parts, marks: list[Mark]) -> None:
    """A copy of the pictures of all parts in which marks are painted over; pictures without one are copied as files."""
    with new_folder(folder) as filling:
        for path, _ in tqdm([sample for part in PARTS for sample in parts.samples[part]], "cleaning", leave=False):
            target = filling / path.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            photo = open_image(path)
            cleaned = without_marks(photo, model, marks)
            if cleaned is None:
                shutil.copyfile(path, target)
            else:
                cleaned.save(target.with_suffix(".png"))


def without_marks(photo: Image.Image, model: Model, marks: list[Mark]) -> Image.Image | None:
    """A photo at its own resolution with the marks that it has painted over; None if it has none."""
    view = to_uint8(square_view(photo, model))[None]
    marks = [mark for mark in marks if mark.has(view).item()]
    x, y, width, height = (
        round(share * side)
        for share, side in zip(seen_part(model, (photo.height, photo.width)), 2 * photo.size, strict=True)
    )
    for mark in marks:
        seen = to_float(to_uint8(photo.crop((x, y, x + width, y + height))))[None]
        if isinstance(mark, fixed.FixedMark):
            restored, hidden = mark.removed(seen)
        else:
            _, small = mark.removed(to_float(view))
            restored, hidden = seen, F.interpolate(small.float(), seen.shape[-2:]).bool()
        photo.paste(render.to_picture(hide(restored, hidden) if hidden.any() else restored), (x, y))
    return photo if marks else None


if __name__ == "__main__":
    cli.run(main)
