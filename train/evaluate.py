"""Measures a trained model on a part of its data and writes a report with pictures.

    python train/evaluate.py checkpoints/flowers --data DIR --part test
    python train/evaluate.py runs/a --data DIR --part val --compare runs/b
    python train/evaluate.py checkpoints/horses --images photo1.jpg photo2.jpg          Grad-CAM only, no scores
    python train/evaluate.py checkpoints/flowers --data DIR --trust     how far its heatmaps can be believed, by val
    python train/evaluate.py --recipe vgg16-grad-cam --images photo.jpg                 as published

The parts are cut with the seed of the training, so nothing in test was trained on. Every reading of test is noted in
test_reads.jsonl. OUT is --out, else the model's folder, else (for a model of the Hub) runs/hub/USER/NAME.

OUT/metrics.json, OUT/report/         scores, also of each picture by its hash, README.md, pictures; photos in photos/
OUT/report/val/, report/NAME-test/    the same of other parts or other data, if OUT is the default or holds a model
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cli
import measure
import numpy as np
import torch
import torch.nn.functional as F
from accelerator import goes_on, processes
from calibration import answers, calibrate, mask_counts
from PIL import Image
from sklearn.metrics import classification_report
from torch import Tensor

from cvlab import checkpoint, metrics, plots, render
from cvlab.checkpoint import card
from cvlab.data.evaluation import is_own_test_part, note_test_read, open_views, parts_of, read_photos, read_views
from cvlab.data.parts import SHAPES, Parts
from cvlab.explain.many import predict_views
from cvlab.files import make_folder, to_json, write_text
from cvlab.models import Model, probabilities
from cvlab.models.model import TILES
from cvlab.tiles import middle

# What metrics.json holds, and by file name the functions that draw the pictures of the report.
Evaluation = tuple[dict, dict[str, Callable[[], Image.Image]]]


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder of a model, a Hub name, or FILE.py:FUNCTION")
    parser.add_argument("--data", type=Path, help="folder, torchvision:NAME or hf:user/dataset; else synthetic scenes")
    parser.add_argument("--part", choices=("test", "val", "train", "all"), default="test")
    parser.add_argument("--compare", metavar="CHECKPOINT", help="a second model, on the same pictures")
    tiles = "predict photos at their own resolution in overlapping tiles; by default as it was trained"
    parser.add_argument("--tiles", action=argparse.BooleanOptionalAction, help=tiles)
    parser.add_argument("--explain", choices=render.SPREADS, default="six", help="which: in order, or at random")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice of pictures to explain")
    parser.add_argument("--unknown", type=Path, nargs="+", default=[], metavar="DIR", help="photos of anything else")
    parser.add_argument("--calibrate", action="store_true", help="first fit on val what a folder tells")
    parser.add_argument("--others", type=Path, metavar="DIR", help="for --calibrate: photos of anything else")
    parser.add_argument("--images", type=Path, nargs="+", help="explain these; without --data nothing is measured")
    parser.add_argument("--stage", help="stage at which a classifier is explained, by default its last")
    parser.add_argument("--colormap", choices=("inferno", "viridis", "jet"), default=render.COLORMAP)
    parser.add_argument("--opacity", type=float, default=0.7, help="of an overlay where the evidence is strongest")
    parser.add_argument("--out", type=Path, help="where the report goes, by default the model's folder")
    parser.add_argument("--trust", type=int, nargs="?", const=30, metavar="N", help="test the maps of N val pictures")
    args = parser.parse_args()
    if args.checkpoint is None:
        parser.error("which model? Give the folder of a checkpoint, or a name on the Hub.")
    processes(alone=bool(args.calibrate or args.trust or args.images))
    model = checkpoint.load_own(args.checkpoint)
    if args.calibrate:
        model = calibrate(args.checkpoint, parts_of(model, args.data, "val")[0], args.others)
    other = checkpoint.load_own(args.compare) if args.compare else None
    if args.tiles is not None:
        if model.task == "classification":
            raise ValueError("--tiles is for segmenters: a classifier sees one square of a photo.")
        model.crop_mode = TILES if args.tiles else "center"
    folder = Path(args.checkpoint)
    out = args.out or (folder if folder.is_dir() else "runs/hub" / folder)  # USER/NAME would hide the Hub's model
    make_folder(out)
    report, figures = out / "report", out / "metrics.json"
    if args.images and args.data is None:
        render.save_png(explanations(model, *open_views(args.images, model), args), report / "photos" / "explained.png")
        print(f"Written: {report / 'photos' / 'explained.png'}")
        return
    if args.trust:
        measure.measure_trust(model, parts_of(model, args.data, "val")[0], args.trust, folder)
        print(f"Written: {folder / 'trust.json'} and {folder / 'README.md'}")
        return
    parts, trained_on = parts_of(model, args.data, args.part)
    own = is_own_test_part(model, parts)
    if not (own and args.part == "test") and (args.out is None or (out / "config.json").is_file()):
        report = out / "report" / (args.part if own else f"{Path(parts.name).name}-{args.part}")
        figures = report / "metrics.json"

    evaluate = evaluate_classifier if model.task == "classification" else evaluate_segmenter
    found, pictures = evaluate(model, other, parts, args)
    if not goes_on():
        return
    if args.part == "test":
        note_test_read(out, parts.name)
    title = f"{Path(args.checkpoint).name} on the part {args.part} of {parts.name}"
    told = card.scores(found)
    notes = [*told.sentences, *dict.fromkeys(parts.notes)]
    if trained_on and args.part in ("train", "all"):
        notes.append(f"{trained_on} of these pictures were trained on: this is no estimate for unseen ones.")
    lines = [card.markdown(replace(told, title=title, sentences=notes))[1:]]  # a heading of the first level

    def write() -> None:
        write_text(figures, to_json(found, indent=1) + "\n")
        write_text(report / "README.md", "\n".join(lines) + "\n")
        if figures == out / "metrics.json" and (out / "config.json").is_file():
            card.write(out)

    write()  # before the pictures: a run that is stopped while they are drawn keeps its scores
    print("\n".join(lines))
    for name, draw in pictures.items():
        if parts.name == SHAPES:
            name = name.removeprefix("photos/")  # drawn scenes may be published
        render.save_png(draw(), report / name)
        lines.append(f"\n![{Path(name).stem.replace('_', ' ')}]({name})")
    if parts.name != SHAPES:
        lines.append("\nPictures with photographs are in photos/, which is published only with --with-photos.")
    write()
    print(f"\nWritten: {figures} and {report / 'README.md'}")


def evaluate_classifier(model: Model, other: Model | None, parts: Parts, args: argparse.Namespace) -> Evaluation:
    """Accuracy, scores of each class and calibration: for metrics.json, and as pictures."""
    views, labels = read_views(parts, args.part, model)
    labels, logits = torch.tensor(labels), torch.cat([*predict_views(model, views)])
    probs, predicted = probabilities(model, logits), logits.argmax(1)
    right = predicted == labels
    names, options = model.class_names, {"output_dict": True, "zero_division": 0}
    table = classification_report(labels, predicted, labels=range(len(names)), target_names=names, **options)
    loss = measure.mean_loss(F.cross_entropy(logits, labels, reduction="none"))
    found = {"part": args.part, "n": len(labels), "accuracy": measure.share_of(right), "loss": loss}
    found |= metrics.balanced_scores(labels, predicted) | {"classes": {name: table[name] for name in names}}
    measure.add_pictures(found, parts.samples[args.part], right.tolist())
    measure.add_calibration(found, model, logits, labels)
    measure.add_sets(found, model, probs, labels)
    if other:
        other_views, _ = read_views(parts, args.part, other)
        other_right = torch.cat([*predict_views(other, other_views)]).argmax(1) == labels
        measure.add_comparison(found, args.compare, "accuracy", right.double(), other_right.double(), np.mean)

    chosen = render.spread(labels, args.explain, args.seed)
    chosen = open_views(args.images, model) if args.images else (views[chosen], [names[i] for i in labels[chosen]])
    matrix = metrics.confusion_matrix(labels, predicted, len(names))
    tables = [metrics.reliability(each, labels) for each in (probs, logits.softmax(1))]
    pictures = {
        "confusion_matrix.png": lambda: plots.confusion_picture(matrix, names),
        "reliability.png": partial(plots.reliability_picture, *tables),
    }
    measure.add_unknown(found, pictures, model, views, args.unknown)
    if not right.all():
        if len(names) > plots.MOST_NUMBERED:
            pictures["confused_pairs.png"] = lambda: plots.confused_pairs_picture(matrix, names)
        pictures["photos/misclassified.png"] = lambda: render.misclassified(model, views, labels, predicted)
    pictures["photos/grad_cam.png"] = lambda: explanations(model, *chosen, args)
    return found, pictures


def evaluate_segmenter(model: Model, other: Model | None, parts: Parts, args: argparse.Namespace) -> Evaluation:
    """Scores over all pixels at the photos' own resolution, and the best threshold on val: returned as above."""
    views, masks = read_photos(parts, args.part, model)
    by_class, edges, confusions, losses = measure.pixel_counts(model, views, masks)
    counts, names = by_class.sum(1), model.class_names[model.first_object :]
    scores, intervals = metrics.segmentation_scores(counts), metrics.bootstrap_intervals(counts)
    found = {"part": args.part, "n": len(masks), "threshold": model.threshold, "loss": measure.mean_loss(losses)}
    found |= {"tiles": True} if model.crop_mode == TILES else {}
    found |= {name: metrics.interval(value, intervals[name]) for name, value in scores.items()}
    found["boundary_iou"] = metrics.class_scores(edges, names)["mean_iou"]
    if len(names) > 1:
        found |= metrics.class_scores(by_class, names)
    if other:
        theirs = measure.pixel_counts(other, read_photos(parts, args.part, other)[0], masks)[0]
        score = "mean iou" if len(names) > 1 else "iou"
        measure.add_comparison(found, args.compare, score, by_class, theirs, metrics.mean_iou)
    measure.add_calibration(found, model, *answers(model, views, masks))
    pictures = {}
    if model.exclusive:
        found["pixel_accuracy"] = metrics.pixel_accuracy(confusions)
        shares = confusions.sum(0) / confusions.sum((0, 2))[:, None].clamp(min=1)
        percent = (100 * shares).round().long()
        pictures["confusion_matrix.png"] = lambda: plots.confusion_picture(percent, model.class_names)
    else:
        measure.add_outlines(found, model, views, masks)
        if args.part in ("test", "val") and parts.samples["val"]:
            thresholds = [round(0.05 * step, 2) for step in range(1, 20)]
            found_on_val = mask_counts(model, *read_photos(parts, "val", model), thresholds)
            ious = [metrics.mean_iou(each) for each in found_on_val]
            found["threshold_curve_on_val"] = dict(zip(map(str, thresholds), ious, strict=True))
            curve = {"iou on val": (thresholds, ious)}
            pictures["threshold.png"] = partial(plots.lines_picture, curve, model.threshold, "threshold")
    per_image = np.array([metrics.mean_iou(each[None]) for each in by_class])
    measure.add_pictures(found, parts.samples[args.part], per_image.tolist())
    order = np.argsort(per_image, kind="stable").tolist()
    for name, chosen in (("worst", order[:4]), ("best", order[::-1][:4])):
        shown = [views[i] for i in chosen], [masks[i] for i in chosen], per_image[chosen]
        pictures[f"photos/{name}.png"] = partial(render.mask_triples, model, *shown)
    chosen = range(0, len(views), -(-len(views) // 5))
    if args.explain == "ten":
        chosen = render.spread(torch.zeros(len(views)), "ten", args.seed)
    explained = (
        open_views(args.images, model)[0] if args.images else [middle(views[i], model.image_size) for i in chosen]
    )
    pictures["photos/stages.png"] = lambda: explanations(model, explained, [], args)
    return found, pictures


def explanations(model: Model, views: Tensor, titles: list[str], args: argparse.Namespace) -> Image.Image:
    """Grad-CAM of a classifier's predicted classes, or of a segmenter's predicted masks at every stage."""
    if model.task == "classification":
        return render.grad_cam_rows(model, views, titles, args.stage, args.colormap, args.opacity)
    return render.stage_rows(model, views, args.colormap, args.opacity)


if __name__ == "__main__":
    cli.run(main)
