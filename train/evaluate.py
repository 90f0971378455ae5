"""Measures a trained model on a part of its data and writes a report with pictures.

    python train/evaluate.py checkpoints/flowers --data DIR --part test
    python train/evaluate.py runs/a --data DIR --part val --compare runs/b
    python train/evaluate.py checkpoints/horses --images photo1.jpg photo2.jpg          Grad-CAM alone, no scores
    python train/evaluate.py --recipe vgg16-grad-cam --images photo.jpg                 as published

Scores go to metrics.json, their pictures and tables to report/README.md; pictures that show photographs are kept in
report/photos/. The parts are cut by the seed that the model was trained with, so the test part was never trained on;
every reading of it is noted in test_reads.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import classification_report
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository root: cvlab needs no installation

import cli

from cvlab import checkpoint, render, report
from cvlab.checkpoint import card
from cvlab.data.evaluation import note_test_read, parts_of, read_views
from cvlab.data.parts import SHAPES, Parts
from cvlab.explain import predict
from cvlab.files import write_text
from cvlab.metrics import (
    bootstrap_intervals,
    confusion_matrix,
    expected_calibration_error,
    fit_temperature,
    paired_interval,
    reliability,
    segmentation_counts,
    segmentation_scores,
    wilson_interval,
)
from cvlab.models import Model
from cvlab.transforms import open_image, resize_logits, square_view, to_float, to_uint8

BATCH_SIZE = 32  # fixed: the scores of a model do not depend on how it was asked


def main() -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder of a model, or its name on the Hub")
    parser.add_argument("--data", type=Path, help="data folder; without one, synthetic scenes (cvlab/data/shapes.py)")
    parser.add_argument("--part", choices=("test", "val", "train", "all"), default="test")
    parser.add_argument("--compare", metavar="CHECKPOINT", help="a second model, on the same images")
    parser.add_argument("--explain", choices=("six", "classes"), default="six", help="six images, or 5 classes x 2")
    parser.add_argument("--images", type=Path, nargs="+", help="explain these pictures instead; without --data no more")
    parser.add_argument("--stage", help="a classifier is explained there; by default at its last stage")
    parser.add_argument("--colormap", choices=("inferno", "viridis", "jet"), default=render.COLORMAP)
    parser.add_argument("--opacity", type=float, default=0.7, help="of an overlay where the evidence is strongest")
    parser.add_argument("--out", type=Path, help="where the report goes; by default the checkpoint's folder")
    args = parser.parse_args()
    if args.checkpoint is None:
        parser.error("which model? Give the folder of a checkpoint, or a name on the Hub.")
    model = checkpoint.load(args.checkpoint)
    out = args.out or Path(args.checkpoint)
    if args.images and args.data is None:
        path = out / "report" / "photos" / "explained.png"
        names = [image.name for image in args.images]
        render.save_png(explanations(model, open_views(args.images, model), names, args), path)
        print(f"Written: {path}")
        return
    parts, trained_on = parts_of(model, args.data, args.part)
    if args.part == "test":
        note_test_read(out, parts.name)

    evaluate = evaluate_classifier if model.task == "classification" else evaluate_segmenter
    other = checkpoint.load(args.compare) if args.compare else None
    args.report = out / "report"
    # Photographs stay apart from what may be published; synthetic scenes may be shown to anyone.
    metrics, lines = evaluate(
        model, other, parts, args, args.report if parts.name == SHAPES else args.report / "photos"
    )
    if trained_on and args.part in ("train", "all"):
        lines.append(f"\n{trained_on} of these pictures were trained on: this is no estimate for unseen ones.")
    lines += [f"\n{note}" for note in dict.fromkeys(parts.notes)]
    if parts.name != SHAPES:
        lines.append("\nPictures with photographs are in photos/, which is published only by --with-photos.")
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    title = f"# {Path(args.checkpoint).name} on the part {args.part!r} of {parts.name}\n"
    write_text(args.report / "README.md", "\n".join([title, *lines]) + "\n")
    if (out / "config.json").is_file():
        card.write(out)
    print("\n".join(line for line in lines if not line.startswith("\n![")))
    print(f"\nWritten: {out / 'metrics.json'} and {args.report / 'README.md'}")


def evaluate_classifier(
    model: Model, other: Model | None, parts: Parts, args: argparse.Namespace, folder: Path
) -> tuple[dict, list[str]]:
    """Accuracy, per-class scores, calibration, pictures: what goes into metrics.json, and the lines of the report."""
    views, labels = read_views(parts, args.part, model)
    labels = torch.tensor(labels)
    logits = predict_all(model, views)
    probs, predicted = logits.softmax(1), logits.argmax(1)
    right = predicted == labels
    accuracy = interval(right.double().mean().item(), wilson_interval(int(right.sum()), len(labels)))
    names, indices = model.class_names, range(len(model.class_names))
    table = classification_report(
        labels, predicted, labels=indices, target_names=names, output_dict=True, zero_division=0
    )
    calibration = {"expected_calibration_error": expected_calibration_error(probs, labels)}
    lines = [
        f"Accuracy **{accuracy['value']:.4f}** (95% Wilson interval {accuracy['low']:.4f} to {accuracy['high']:.4f}), "
        f"{len(labels)} pictures.\n",
        "| class | precision | recall | F1 | pictures |\n| --- | --- | --- | --- | --- |",
    ]
    for name in names:
        row = table[name]
        scores = " | ".join(f"{row[score]:.3f}" for score in ("precision", "recall", "f1-score"))
        lines.append(f"| {name} | {scores} | {row['support']:.0f} |")
    lines.append(f"\nExpected calibration error {calibration['expected_calibration_error']:.4f}.")
    if args.part == "test":
        val_views, val_labels = read_views(parts, "val", model)
        temperature = fit_temperature(predict_all(model, val_views), torch.tensor(val_labels))
        after = expected_calibration_error((logits / temperature).softmax(1), labels)
        calibration |= {"temperature": temperature, "expected_calibration_error_at_temperature": after}
        lines[-1] += f" At temperature {temperature:.3f}, fitted on val, {after:.4f}."
    metrics = {"part": args.part, "n": len(labels), "accuracy": accuracy, **calibration}
    metrics["classes"] = {name: table[name] for name in names}
    if other:
        other_right = predict_all(other, read_views(parts, args.part, other)[0]).argmax(1) == labels
        difference = paired_interval(right.double().numpy(), other_right.double().numpy(), np.mean)
        lines.append(compared(metrics, args.compare, "accuracy", difference))

    matrix = confusion_matrix(labels, predicted, len(names))
    picture(render.confusion_picture(matrix, names), args.report / "confusion_matrix.png", lines)
    picture(render.reliability_picture(reliability(probs, labels)), args.report / "reliability.png", lines)
    if not right.all():
        picture(report.misclassified(model, views, labels, predicted), folder / "misclassified.png", lines)
    chosen = report.spread(labels, args.explain == "classes")
    explained, titles = views[chosen], [names[label] for label in labels[chosen]]
    if args.images:
        explained, titles = open_views(args.images, model), [path.name for path in args.images]
    picture(explanations(model, explained, titles, args), folder / "grad_cam.png", lines)
    return metrics, lines


def evaluate_segmenter(
    model: Model, other: Model | None, parts: Parts, args: argparse.Namespace, folder: Path
) -> tuple[dict, list[str]]:
    """Scores over all pixels at the photos' own resolution, threshold curve, pictures; the same two returned."""
    views, masks = read_views(parts, args.part, model)
    (counts,) = mask_counts(model, views, masks, [model.threshold])
    scores, intervals = vars(segmentation_scores(counts)), bootstrap_intervals(counts)
    metrics = {"part": args.part, "n": len(masks), "threshold": model.threshold}
    metrics |= {name: interval(value, intervals[name]) for name, value in scores.items()}
    lines = [
        f"{len(masks)} pictures, all pixels of each at its own resolution, threshold {model.threshold:g}; "
        "95% intervals by bootstrap over pictures.\n",
        "| score | value | 95% interval |\n| --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {value:.4f} | {'{:.4f} to {:.4f}'.format(*intervals[name])} |" for name, value in scores.items()
    ]
    if other:
        (other_counts,) = mask_counts(other, read_views(parts, args.part, other)[0], masks, [other.threshold])
        difference = paired_interval(counts.numpy(), other_counts.numpy(), lambda rows: segmentation_scores(rows).iou)
        lines.append(compared(metrics, args.compare, "iou", difference))

    if args.part in ("test", "val"):
        lines += threshold_curve(model, parts, metrics, args.report)
    per_image = np.array([segmentation_scores(row[None]).iou for row in counts])
    order = np.argsort(per_image, kind="stable")
    for name, chosen in (("worst", order[:4]), ("best", order[::-1][:4])):
        pairs = report.mask_pairs(model, views[chosen.copy()], [masks[i] for i in chosen], per_image[chosen])
        picture(pairs, folder / f"{name}.png", lines)
    explained = open_views(args.images, model) if args.images else views[:: -(-len(views) // 5)]
    picture(explanations(model, explained, [], args), folder / "stages.png", lines)
    return metrics, lines


def explanations(model: Model, views: Tensor, titles: list[str], args: argparse.Namespace) -> Image.Image:
    """Grad-CAM of a classifier's predicted classes, or of a segmenter's masks at every stage."""
    if model.task == "classification":
        return report.grad_cam_rows(model, views, titles, args.stage, args.colormap, args.opacity)
    return report.stage_rows(model, views, args.colormap, args.opacity)


def threshold_curve(model: Model, parts: Parts, metrics: dict, folder: Path) -> list[str]:
    """iou on val over the threshold: into the metrics and, as a picture, into the report, whose lines are returned."""
    thresholds = [round(0.05 * step, 2) for step in range(1, 20)]
    ious = [segmentation_scores(each).iou for each in mask_counts(model, *read_views(parts, "val", model), thresholds)]
    metrics["threshold_curve_on_val"] = dict(zip(map(str, thresholds), ious, strict=True))
    lines = [f"\nOn val the threshold {thresholds[np.argmax(ious)]:g} gives the highest iou, {max(ious):.4f}."]
    picture(render.threshold_picture(thresholds, ious, model.threshold), folder / "threshold.png", lines)
    return lines


def open_views(paths: list[Path], model: Model) -> Tensor:
    """The same of single pictures."""
    return torch.stack([to_uint8(square_view(open_image(path), model)) for path in paths])


def predict_all(model: Model, views: Tensor) -> Tensor:
    """Logits (N, C) of uint8 views (N, 3, S, S)."""
    batches = tqdm(views.split(BATCH_SIZE), "predicting", leave=False)
    return torch.cat([predict(model, to_float(batch)) for batch in batches])


def mask_counts(model: Model, views: Tensor, masks: list[Tensor], thresholds: list[float]) -> list[Tensor]:
    """For each threshold the (N, 4) counts of `segmentation_counts` at the masks' own resolution."""
    counts: list[list[Tensor]] = [[] for _ in thresholds]
    for start in tqdm(range(0, len(views), BATCH_SIZE), "predicting", leave=False):
        logits = predict(model, to_float(views[start : start + BATCH_SIZE]))
        for square, mask in zip(logits, masks[start : start + BATCH_SIZE], strict=True):
            probs = resize_logits(square[None], mask.shape[-2:]).sigmoid()
            for each, threshold in zip(counts, thresholds, strict=True):
                each.append(segmentation_counts(probs > threshold, mask[None]))
    return [torch.cat(each) for each in counts]


def interval(value: float, bounds: tuple[float, float]) -> dict:
    """A score as metrics.json holds it."""
    return {"value": value, "low": bounds[0], "high": bounds[1]}


def compared(metrics: dict, other: str, score: str, difference: tuple[float, float, float]) -> str:
    """Adds the paired difference between two models to the metrics, and returns the report's line."""
    value, low, high = difference
    metrics["compared"] = {"with": other, "score": score, "difference": interval(value, (low, high))}
    return f"\n{score} minus that of {other}, same pictures: {value:+.4f} (95% interval {low:+.4f} to {high:+.4f})."


def picture(image: Image.Image, path: Path, lines: list[str]) -> None:
    """Saves a picture and adds it to the report, which is in the folder report/ above it."""
    render.save_png(image, path)
    inside = path.name if path.parent.name == "report" else f"{path.parent.name}/{path.name}"
    lines.append(f"\n![{path.stem.replace('_', ' ')}]({inside})")


if __name__ == "__main__":
    cli.run(main)
