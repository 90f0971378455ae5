"""Does a model cheat? Finds marks that go with one class, and proves whether the model uses them.

    python train/audit.py runs/flowers --data DIR                   the report goes into the model's folder
    python train/audit.py runs/flowers --data DIR --out runs/audit --clean DIR2

A mark that a class has in train and in test, a watermark, a frame, a stamp, raises the test score and is of no use
anywhere else. Candidates are found in train by statistics. Each is then taken out of pictures of val and test that have
it, and put into pictures of other classes: what changes the answers is a suspect.

A segmenter has no classes of pictures that could share a mark. Of it the light, the blur and the compression of few
pictures of train are put into pictures of val and test: is its iou lower there?

OUT/audit.json           accuracy or iou on --part, the suspects and what they change, groups that fail more, odd labels
OUT/README.md            the same to read; in a model's folder it is its card
OUT/audit/mistakes.html  the confusion matrix; each cell opens its pictures with the evidence, the surest mistakes
                         first; of a segmenter the worst masks
OUT/audit/suspect-1.png  before and after

--clean writes a copy of the data in which the suspects are painted over: train again on it, and its test score is one
that the model has without them. The same command continues what was stopped.
"""

import argparse
import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import cli
import torch
import torch.nn.functional as F
from accelerator import goes_on, processes
from measure import pixel_counts
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cvlab import checkpoint, render
from cvlab.audit import fixed, patches, whole
from cvlab.audit.clean import write_clean
from cvlab.audit.data import facts_of, odd_labels, telling, weak_groups
from cvlab.audit.mistakes import mistakes_page, worst_page
from cvlab.audit.prove import Mark, Proof, prove, without
from cvlab.checkpoint import card
from cvlab.data.evaluation import note_test_read, parts_of, read_photos, read_views
from cvlab.data.parts import PARTS, Parts
from cvlab.explain.many import predict_views
from cvlab.files import Kept, make_folder, new_folder, to_json, write_text
from cvlab.metrics import bootstrap_intervals, interval, mean_iou, segmentation_scores, wilson_interval
from cvlab.models import Model
from cvlab.tiles import middle
from cvlab.transforms import seen_mask, to_float
from cvlab.trust.familiarity import features

MOST_OF_A_KIND = 3  # candidates that are proved: the more are tried, the surer each must be
SHOWN = 5  # pictures before and after
Proposed = tuple[list[str], list[Tensor], list[Mark]]  # names of classes, the rows of each, marks


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a model, a Hub name, or FILE.py:FUNCTION")
    parser.add_argument("--data", type=Path, help="folder, torchvision:NAME or hf:user/dataset; else synthetic scenes")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="test", help="the pictures that are counted")
    parser.add_argument("--out", type=Path, help="folder of the report, by default the model's")
    parser.add_argument("--clean", type=Path, metavar="DIR2", help="write the data there, with suspects painted over")
    args = parser.parse_args()
    sharing = processes()
    model, folder, data = checkpoint.load_own(args.checkpoint), Path(args.checkpoint), args.data
    classifies = model.task == "classification"
    if model.channels:
        raise ValueError("The audit looks for marks in photos; this model sees TIFF or .npy.")
    out = args.out or (folder if folder.is_dir() else "runs/hub" / folder)
    make_folder(out)
    parts, trained_on = parts_of(model, data, args.part)
    if data and not trained_on:
        print(f"The model was trained on other pictures: {data} was cut into parts anew.")
    key = hashlib.sha256(repr((args, parts.samples, parts.fingerprints, model.config)).encode("utf-8", "replace"))
    for tensor in model.state_dict().values():
        key.update(tensor.cpu().float().numpy().tobytes())
    kept = Kept(out / ".audit.json", key.hexdigest(), sharing.is_main_process)
    clean = args.clean and str(args.clean.resolve())
    if clean and (data is None or not classifies or (args.clean.exists() and kept.get("clean") != clean)):
        raise ValueError(f"--clean {args.clean} needs --data and a classifier, and must not exist yet.")
    views, truth, answers, errors, files, facts = {}, {}, {}, {}, {}, {}
    for part in PARTS:
        views[part], truth[part], answers[part], errors[part] = read(model, parts, part)
        files[part] = [str(each[0].relative_to(data)) if data else f"scene {each}" for each in parts.samples[part]]
        facts[part] = facts_of(views[part], parts.samples[part])
        if not classifies:
            facts[part]["share of objects"] = truth[part][:, model.first_object :].any(1).float().mean((1, 2))
    counted = PARTS if args.part == "all" else (args.part,)
    shown, true, answered, lacks = (torch.cat([of[part] for part in counted]) for of in (views, truth, answers, errors))
    listed, title = [file for part in counted for file in files[part]], f"{folder.name} on {args.part} of {parts.name}"

    propose = of_classes if classifies else of_tails
    names, own, marks = propose(model, views["train"], truth["train"], facts["train"])
    held = torch.cat([views["val"], views["test"]]), torch.cat([truth["val"], truth["test"]])
    proofs = []
    for mark in tqdm(marks, "proving", leave=False):
        measured = kept.of(f"proof {len(proofs)}", lambda mark=mark: prove(model, mark, *held, len(marks))[1:])
        proofs.append(Proof(mark, *measured))
    proofs.sort(key=lambda proof: -proof.strength)
    # Where one class is in another light, all others are too: the strongest verdict stands for the data set.
    families = {proof.mark.kind: proof for proof in reversed(proofs) if isinstance(proof.mark, whole.WholePicture)}
    proofs = [each for each in proofs if families.get(each.mark.kind, each) is each]
    used = [proof for proof in proofs if proof.level == "used"]
    told = [described(each, names, views["train"], own[each.mark.class_idx], files["train"]) for each in proofs]
    found = {"n": len(shown), "suspects": [each for each in told if each["level"] == "used"], "tried": told}
    found |= {"groups": weak_groups(facts, errors), "labels": [], "telling": {}}
    if classifies:
        right, given = int((lacks == 0).sum()), torch.cat([*truth.values()])
        rows = {part: F.normalize(features(model, views[part]), dim=1) for part in PARTS}
        odd = kept.of("odd", lambda: odd_labels(torch.cat([*rows.values()]), given))
        found["accuracy"] = interval(right / len(shown), wilson_interval(right, len(shown)))
        every = [file for part in PARTS for file in files[part]]
        found["labels"] = [{"file": every[i], "label": names[given[i]], "likely": names[likely]} for i, likely in odd]
        found["telling"] = kept.of("telling", lambda: telling(facts["train"], truth["train"]))
        found["chance"] = 1 / len(truth["train"].unique())
        near = (torch.cat([rows[part] for part in counted]) @ rows["train"].T).argmax(1).tolist()
        like = [(views["train"][i], files["train"][i], truth["train"][i].item()) for i in near]
        page = partial(mistakes_page, model, title, shown, true, answered, listed, like)
    else:
        counts = answered.sum(1)
        found["iou"] = interval(segmentation_scores(counts)["iou"], bootstrap_intervals(counts)["iou"])
        page = partial(worst_page, model, title, shown, true, 1 - lacks, listed)
    if not goes_on():
        return
    note_test_read(out, parts.name)
    write_text(out / "audit.json", to_json(found, indent=1) + "\n")
    with new_folder(out / "audit") as filling:
        write_text(filling / "mistakes.html", page())
        for number, proof in enumerate(used, 1):
            render.save_png(before_and_after(proof, held[0]), filling / f"suspect-{number}.png")
    if (out / "config.json").is_file():
        card.write(out)
    else:
        write_text(out / "README.md", card.markdown(card.audit(out)) + "\n")
    if clean and not args.clean.exists():
        kept.of("clean", lambda: clean)  # from here on the folder is known to be written by this command
        write_clean(args.clean, data, model, [proof.mark for proof in used if proof.removed])
    print(card.markdown(card.audit(out)), f"\n\nWritten: {out / 'audit.json'} and {out / 'audit' / 'mistakes.html'}")
    kept.path.unlink(missing_ok=True)


def read(model: Model, parts: Parts, part: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of a part (N, 3, S, S), labels, logits, which are wrong; or masks of the views, `class_counts`, 1 - iou."""
    if model.task == "classification":
        views, labels = read_views(parts, part, model)
        labels, logits = torch.tensor(labels), torch.cat([*predict_views(model, views)])
        return views, labels, logits, (logits.argmax(1) != labels).double()
    photos, masks = read_photos(parts, part, model)
    counts, *_ = pixel_counts(model, photos, masks)
    views = torch.stack([middle(photo, model.image_size) for photo in photos])
    seen = torch.stack([seen_mask(mask, model) for mask in masks])
    return views, seen, counts, torch.tensor([1 - mean_iou(each[None]) for each in counts])


def of_classes(model: Model, views: Tensor, labels: Tensor, facts: dict[str, Tensor]) -> Proposed:
    """What goes with one class."""
    names, marks = model.class_names, []
    for propose in (fixed.propose, patches.propose, partial(whole.propose, facts=facts)):
        found = propose(views, labels, len(names))
        marks += sorted(found, key=lambda mark: -mark.strength)[:MOST_OF_A_KIND]
    return names, [labels == class_idx for class_idx in range(len(names))], marks


def of_tails(model: Model, views: Tensor, masks: Tensor, facts: dict[str, Tensor]) -> Proposed:
    """In what the darkest pictures differ from the others, the lightest, and so on: for a segmenter each is a class."""
    tails, marks = whole.tails(facts), []
    for number, rows in enumerate(tails.values()):
        found = whole.propose(views, rows.long(), 2, facts)
        marks += [replace(mark, class_idx=number) for mark in found if mark.class_idx == 1]
    return [*tails], [*tails.values()], marks


def described(proof: Proof, names: list[str], views: Tensor, own: Tensor, files: list[str]) -> dict:
    """A proof as audit.json holds it; views, own (which are of its class) and files are those of train."""
    mark, name, has = proof.mark, names[proof.mark.class_idx], proof.mark.has(views)
    rows = (has & own).nonzero().flatten().tolist()
    if isinstance(mark, whole.WholePicture):
        sentence = f"“{name}”: its pictures differ in {mark.kind}, which is to be looked at: nature may explain it."
    else:
        sentence = f"“{name}”: something {mark.kind}, {mark.where}, is in {len(rows)} of its {int(own.sum())} pictures "
        sentence += f"in train and {int(has.sum()) - len(rows)} others."
    for effect, words in ((proof.removed, "Taken out, it lowers"), (proof.added, "Put into others, it raises")):
        if effect:
            by = "{value:.2f} ({low:.2f} to {high:.2f})".format(**effect)
            sentence += f" {words} {proof.measured.format(name)} by {by}."
    whose = None if isinstance(mark, whole.WholePicture) else name
    told = {"kind": mark.kind, "class_name": whose, "where": mark.where, "pictures": [files[i] for i in rows]}
    return told | {"removed": proof.removed, "added": proof.added, "sentence": sentence, "level": proof.level}


def before_and_after(proof: Proof, views: Tensor) -> Image.Image:
    """Pictures that have the mark above the same without it, or others without it above the same with it."""
    images = to_float(views[(proof.marked if proof.removed else proof.bare)[:SHOWN]])
    changed = without(proof.mark, images) if proof.removed else proof.mark.added(images)
    drawn = [render.to_picture(each) for each in (*images, *changed)]
    return render.grid(drawn, ["before"] * len(images) + ["after"] * len(images), len(images))


if __name__ == "__main__":
    cli.run(main)
