"""What the folder of a model tells of it, as HTML: scores, curves, data, training, its report and its card.

The folder may come from a stranger. Its texts are shown as text, its pictures are decoded by the one opener, and what
cannot be read is said.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

from cvlab import render
from cvlab.checkpoint.config import opened
from cvlab.checkpoint.hub import MAX_TEXT_BYTES
from cvlab.page.html import Figure, as_html, card_text, paragraph, table
from cvlab.transforms import open_image

MOST_PICTURES = 40
MOST_SIDE = 1600
MAX_PICTURE_BYTES = 8 * 2**20
TRAINING = ("command", "epochs", "minutes", "hardware", "precision", "seed", "parameters", "peak_memory_mb", "finished")
ALT_TEXTS = {
    "confusion matrix": "Confusion matrix: true classes in rows, predicted ones in columns",
    "curves": "Loss and score over the epochs, training and validation",
    "reliability": "Calibration: how sure the model is, and how often it is right",
    "threshold": "iou over the threshold of the mask",
}


def record_panel(folder: Path) -> str:
    """Everything that the folder of a model tells, one part after the other; a part that is broken says so."""
    parts = (_scores, _curves, _report, _training, _data, _frames, _card)
    return "".join(_or_sentence(part, folder) for part in parts)


def _or_sentence(part: Callable[[Path], str], folder: Path) -> str:
    try:
        return part(folder)
    except Exception as error:  # a stranger's JSON may hold anything anywhere
        return paragraph(f"A part of this model's record cannot be shown ({type(error).__name__}).")


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    with opened(path, MAX_TEXT_BYTES) as file:
        return file.read().decode("utf-8", errors="replace")


def _json(path: Path) -> dict:
    return json.loads(_text(path) or "{}")


def _scores(folder: Path) -> str:
    metrics = _json(folder / "metrics.json")
    if not metrics:
        return paragraph("No scores are in this model's folder: train/evaluate.py writes them.")
    rows = [
        (name.replace("_", " "), f"{score['value']:.4f}", f"{score['low']:.4f} to {score['high']:.4f}")
        for name, score in metrics.items()
        if isinstance(score, dict) and "low" in score
    ]
    shown = paragraph(f"Part {metrics['part']!r}, {metrics['n']} pictures.") + table(
        ("score", "value", "95% interval"), rows
    )
    if "expected_calibration_error" in metrics:
        error = metrics["expected_calibration_error"]
        shown += paragraph(
            f"Calibration: its probabilities are off by {error:.3f} on average (expected calibration error)"
            + (
                f", {metrics['expected_calibration_error_at_temperature']:.3f} after dividing the logits by "
                f"{metrics['temperature']:.3f}."
                if "temperature" in metrics
                else "."
            )
        )
    if classes := metrics.get("classes"):
        rows = [
            (name, *(f"{each[key]:.3f}" for key in ("precision", "recall", "f1-score")), f"{each['support']:.0f}")
            for name, each in classes.items()
        ]
        shown += table(("class", "precision", "recall", "F1", "pictures"), rows)
    return shown


def _curves(folder: Path) -> str:
    history = [json.loads(line) for line in _text(folder / "history.jsonl").splitlines() if line.strip()]
    if len(history) < 2 or (folder / "report" / "curves.png").is_file():
        return ""
    numbers = [value for line in history for value in line.values() if isinstance(value, float)]
    if not all(map(math.isfinite, numbers)):
        return paragraph("The history of the training holds values that are no numbers.")
    return as_html([Figure(render.curves(history), "Curves", "", ALT_TEXTS["curves"])], "wide")


def _report(folder: Path) -> str:
    return _gallery(sorted((folder / "report").glob("*.png")))


def _frames(folder: Path) -> str:
    """Where the model looked while it was trained, where that was recorded."""
    report = folder / "report"
    frames = sorted(report.glob("epochs/*.png")) or sorted(report.glob("photos/epochs/*.png"))
    if not frames:
        return ""
    every = -(-len(frames) // 12)
    return paragraph("Where it looked while it was trained:") + _gallery(frames[::-1][::every][::-1])


def _gallery(paths: list[Path]) -> str:
    drawn = []
    for path in paths[:MOST_PICTURES]:
        title = path.stem.replace("_", " ").replace("-", " ")
        with opened(path, MAX_PICTURE_BYTES) as file:
            image = open_image(file)
        image.thumbnail((MOST_SIDE, MOST_SIDE))
        drawn.append(Figure(image, title.capitalize(), "", ALT_TEXTS.get(title, f"Picture of the report: {title}")))
    return as_html(drawn, "wide") if drawn else ""


def _training(folder: Path) -> str:
    manifest = _json(folder / "manifest.json")
    names = (
        "command",
        "epochs",
        "minutes",
        "hardware",
        "precision",
        "seed",
        "parameters",
        "peak_memory_mb",
        "finished",
    )
    rows = [(name.replace("_", " "), str(manifest[name])[:500]) for name in names if name in manifest]
    return paragraph("Training") + table(("", ""), rows) if rows else ""


def _data(folder: Path) -> str:
    data = _json(folder / "config.json").get("cvlab", {}).get("data", {})
    if not data:
        return ""
    sizes = {part: len(prints) for part, prints in data.get("fingerprints", {}).items()}
    listed = ", ".join(f"{part} {size}" for part, size in sizes.items())
    return paragraph(
        f"Data: {data.get('name', 'unknown')}" + (f"; pictures: {listed}." if listed else ", drawn by a seed.")
    )


def _card(folder: Path) -> str:
    text = _text(folder / "README.md")
    return card_text("The model's card", text.split("---\n", 2)[-1]) if text else ""
