"""Does a classifier cheat? Finds marks that go with one class, and proves whether the model uses them.

    python train/audit.py runs/flowers --data DIR                   the report goes into the model's folder
    python train/audit.py runs/flowers --data DIR --out runs/audit --clean DIR2

A mark that a class has in train and in test, a watermark, a frame, a stamp, raises the test score and is of no use
anywhere else. Candidates are found in train by statistics. Each is then taken out of pictures of val and test that have
it, and put into pictures of other classes: what changes the answers is a suspect.

OUT/audit.json           accuracy on --part, the suspects and what they change, labels that are probably wrong
OUT/README.md            the same to read; in a model's folder it is its card
OUT/audit/mistakes.html  the confusion matrix; each cell opens its pictures with the evidence, the surest mistakes first
OUT/audit/suspect-1.png  before and after

--clean writes a copy of the data in which the suspects are painted over: train again on it, and its test score is one
that the model has without them.
"""

import argparse
import shutil
from contextlib import suppress
from pathlib import Path

import cli
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvlab import checkpoint, render
from cvlab.audit import fixed, patches, whole
from cvlab.audit.data import facts_of, odd_labels, telling
from cvlab.audit.mistakes import mistakes_page
from cvlab.audit.prove import Mark, Proof, prove, without
from cvlab.checkpoint import card
from cvlab.data.evaluation import note_test_read, parts_of, read_views
from cvlab.data.parts import PARTS
from cvlab.explain.many import predict_views
from cvlab.files import make_folder, new_folder, to_json, write_text
from cvlab.metrics import interval, wilson_interval
from cvlab.models import Model
from cvlab.transforms import ImageError, open_image, seen_part, square_view, to_float, to_uint8
from cvlab.trust import hide
from cvlab.trust.familiarity import features

MOST_OF_A_KIND = 3  # candidates that are proved: the more are tried, the surer each must be
SHOWN = 5  # pictures before and after


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model, a Hub name, or FILE.py:FUNCTION")
    parser.add_argument("--data", type=Path, help="folder, torchvision:NAME or hf:user/dataset; else synthetic scenes")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="test", help="the pictures that are counted")
    parser.add_argument("--out", type=Path, help="folder of the report, by default the model's")
    parser.add_argument("--clean", type=Path, metavar="DIR2", help="write the data there, with suspects painted over")
    args = parser.parse_args()
    model, folder, data = checkpoint.load_own(args.checkpoint), Path(args.checkpoint), args.data
    out = args.out or (folder if folder.is_dir() else "runs/hub" / folder)
    if model.task != "classification":
        raise ValueError(f"{args.checkpoint} is a segmenter: the audit is for classifiers.")
    if args.clean and (args.clean.exists() or data is None):
        raise ValueError(f"--clean {args.clean} needs --data, and must not exist yet: choose another folder.")
    make_folder(out)
    parts, trained_on = parts_of(model, data, args.part)
    if data and not trained_on:
        print(f"The model was trained on other pictures: {data} was cut into parts anew.")
    views, labels, rows, files = {}, {}, {}, {}
    for part in PARTS:
        views[part], given = read_views(parts, part, model)
        labels[part], rows[part] = torch.tensor(given), F.normalize(features(model, views[part]), dim=1)
        files[part] = [str(each[0].relative_to(data)) if data else f"scene {each}" for each in parts.samples[part]]
    counted = PARTS if args.part == "all" else (args.part,)
    shown, truth = (torch.cat([of[part] for part in counted]) for of in (views, labels))
    logits = torch.cat([*predict_views(model, shown)])
    right, names = logits.argmax(1) == truth, model.class_names

    marks: list[Mark] = []
    for kind in (fixed, patches, whole):
        found = kind.propose(views["train"], labels["train"], len(names))
        marks += sorted(found, key=lambda mark: -mark.strength)[:MOST_OF_A_KIND]
    held = torch.cat([views["val"], views["test"]]), torch.cat([labels["val"], labels["test"]])
    proofs = [prove(model, mark, *held, len(marks)) for mark in tqdm(marks, "proving", leave=False)]
    proofs.sort(key=lambda proof: -proof.strength)
    # Where one class is in another light, all others are too: the strongest verdict stands for the data set.
    families = {proof.mark.kind: proof for proof in reversed(proofs) if isinstance(proof.mark, whole.WholePicture)}
    proofs = [each for each in proofs if families.get(each.mark.kind, each) is each]
    used = [proof for proof in proofs if proof.level == "used"]
    told = [described(proof, names, views["train"], labels["train"], files["train"]) for proof in proofs]
    odd = odd_labels(torch.cat([*rows.values()]), torch.cat([*labels.values()]))
    every = [(file, names[label]) for part in PARTS for file, label in zip(files[part], labels[part], strict=True)]
    found = {
        "n": len(truth),
        "accuracy": interval(right.double().mean().item(), wilson_interval(int(right.sum()), len(truth))),
        "suspects": [each for each in told if each["level"] == "used"],
        "tried": told,
        "labels": [{"file": every[i][0], "label": every[i][1], "likely": names[likely]} for i, likely in odd],
        "telling": telling(facts_of(views["train"]), labels["train"]),
    }
    note_test_read(out, parts.name)
    write_text(out / "audit.json", to_json(found, indent=1) + "\n")
    title, listed = f"{folder.name} on {args.part} of {parts.name}", [file for part in counted for file in files[part]]
    near = (torch.cat([rows[part] for part in counted]) @ rows["train"].T).argmax(1).tolist()
    like = [(views["train"][i], files["train"][i]) for i in near]
    with new_folder(out / "audit") as filling:
        write_text(filling / "mistakes.html", mistakes_page(model, title, shown, truth, logits, listed, like))
        for number, proof in enumerate(used, 1):
            render.save_png(before_and_after(proof, held[0]), filling / f"suspect-{number}.png")
    if (out / "config.json").is_file():
        card.write(out)
    else:
        write_text(out / "README.md", card.markdown(card.audit(out)) + "\n")
    if args.clean:
        write_clean(args.clean, data, model, [proof.mark for proof in used if proof.removed])
    print(card.markdown(card.audit(out)), f"\n\nWritten: {out / 'audit.json'} and {out / 'audit' / 'mistakes.html'}")


def described(proof: Proof, names: list[str], views: Tensor, labels: Tensor, files: list[str]) -> dict:
    """A proof as audit.json holds it; views, labels and files are those of train, in which the mark was found."""
    mark, name, has = proof.mark, names[proof.mark.class_idx], proof.mark.has(views)
    own = (has & (labels == mark.class_idx)).nonzero().flatten().tolist()
    if isinstance(mark, whole.WholePicture):
        sentence = f"“{name}”: its pictures differ in {mark.kind}, which is to be looked at: nature may explain it."
    else:
        sentence = f"“{name}”: something {mark.kind}, {mark.where}, is in {len(own)} of its "
        sentence += f"{int((labels == mark.class_idx).sum())} pictures in train and {int(has.sum()) - len(own)} others."
    for effect, words in ((proof.removed, "Taken out, it lowers"), (proof.added, "Put into others, it raises")):
        if effect:
            by = "{value:.2f} ({low:.2f} to {high:.2f})".format(**effect)
            sentence += f" {words} the probability of “{name}” by {by}."
    whose = None if isinstance(mark, whole.WholePicture) else name
    told = {"kind": mark.kind, "class_name": whose, "where": mark.where, "pictures": [files[i] for i in own]}
    return told | {"removed": proof.removed, "added": proof.added, "sentence": sentence, "level": proof.level}


def before_and_after(proof: Proof, views: Tensor) -> Image.Image:
    """Pictures that have the mark above the same without it, or others without it above the same with it."""
    images = to_float(views[(proof.marked if proof.removed else proof.bare)[:SHOWN]])
    changed = without(proof.mark, images) if proof.removed else proof.mark.added(images)
    drawn = [render.to_picture(each) for each in (*images, *changed)]
    return render.grid(drawn, ["before"] * len(images) + ["after"] * len(images), len(images))


def write_clean(folder: Path, data: Path, model: Model, marks: list[Mark]) -> None:
    """A copy of a data folder in which marks are painted over; files of pictures without one stay as they are."""
    with new_folder(folder) as filling:
        for path in tqdm([path for path in data.rglob("*") if path.is_file()], "cleaning", leave=False):
            target, cleaned = filling / path.relative_to(data), None
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(ImageError):  # it stays as it is
                cleaned = without_marks(open_image(path), model, marks)
            if cleaned:
                cleaned.save(target.with_suffix(".png"))
            else:
                shutil.copyfile(path, target)


def without_marks(photo: Image.Image, model: Model, marks: list[Mark]) -> Image.Image | None:
    """A photo at its own resolution with the marks that it has painted over; None if it has none."""
    view = to_uint8(square_view(photo, model))[None]
    marks = [mark for mark in marks if mark.has(view).item()]
    box = zip(seen_part(model, (photo.height, photo.width)), 2 * photo.size, strict=True)
    x, y, width, height = (round(share * side) for share, side in box)
    for mark in marks:
        seen = to_float(to_uint8(photo.crop((x, y, x + width, y + height))))[None]
        if isinstance(mark, fixed.FixedMark):
            seen, hidden = mark.removed(seen)
        else:
            _, square = mark.removed(to_float(view))
            hidden = F.interpolate(square.float(), seen.shape[-2:]).bool()
        photo.paste(render.to_picture(hide(seen, hidden)), (x, y))
    return photo if marks else None


if __name__ == "__main__":
    cli.run(main)
