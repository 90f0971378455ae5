"""Many pictures at once: what a model predicts for each, where it looked, as a table and as a zip of maps.

    maps/00001.npy       the raw signed map, float32 (h, w) at the stage's resolution
    pictures/00001.jpg   the same over the view that the model saw
    table.csv            a row a picture
    manifest.json        model, score, stage, method, scaling, and the rows again

Pictures are read and explained batch by batch and written at once, so memory does not grow with their number. One that
cannot be opened is a row with the reason.
"""

import csv
import io
import json
import math
import os
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvlab.explain import check_stages, default_stage
from cvlab.explain.many import describe, explain_predictions
from cvlab.models import Model
from cvlab.page.unzip import Picture
from cvlab.render import overlay
from cvlab.transforms import ImageError, view
from cvlab.trust.diagnosis import diagnose

BATCH = 16
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """What is told of one picture.

    Attributes:
        number: from 1; the name of its map and picture in the zip.
        file: its name, for people.
        prediction: a class; None where a segmenter found nothing, or the picture could not be opened.
        share: the class's probability, or the part of the view that the mask covers.
        peak: of the map of what was predicted.
        sentence: what to know of the map, or why there is none.
    """

    number: int
    file: str
    prediction: str | None
    share: float | None
    peak: float | None
    sentence: str


@dataclass(frozen=True)
class Explained:
    """A row, and of a picture that could be opened the view (1, 3, S, S) and the signed map (1, 1, h, w)."""

    row: Row
    view: Tensor | None = None
    attribution: Tensor | None = None


def explain_many(
    model: Model,
    pictures: Sequence[Picture],
    stage: str | None = None,
    method: str = "grad_cam",
    progress: Progress | None = None,
) -> Iterator[Explained]:
    """What the model predicts for each picture and the map of that prediction, in their order, batch by batch.

    Args:
        stage: a key of model.stages; by default `default_stage(model)`.
        method: a key of `cvlab.explain.METHODS`.
        progress: is told how many pictures are done, and of how many.

    Raises:
        ValueError: a stage or method that is not there.
    """
    (stage,) = check_stages(model, [stage or default_stage(model)])
    numbered = list(enumerate(pictures, start=1))
    for start in range(0, len(numbered), BATCH):
        batch = numbered[start : start + BATCH]
        yield from _explained(model, batch, stage, method)
        if progress:
            progress(start + len(batch), len(numbered))


def _explained(model: Model, batch: Sequence[tuple[int, Picture]], stage: str, method: str) -> Iterator[Explained]:
    views: dict[int, Tensor] = {}
    sentences: dict[int, str] = {}
    for number, picture in batch:
        try:
            image = picture.open()
            views[number], sentences[number] = view(image, model), " ".join(image.info["notes"])
        except ImageError as error:
            sentences[number] = str(error)[:1].upper() + str(error)[1:]
    answers = _answers(model, torch.cat(list(views.values())), stage, method) if views else iter([])
    for number, picture in batch:
        if number in views:
            prediction, share, peak, sentence, attribution = next(answers)
            sentence = " ".join(filter(None, [sentence, sentences[number]]))
            yield Explained(Row(number, picture.label, prediction, share, peak, sentence), views[number], attribution)
        else:
            yield Explained(Row(number, picture.label, None, None, None, sentences[number]))


def _answers(
    model: Model, images: Tensor, stage: str, method: str
) -> Iterator[tuple[str | None, float, float, str, Tensor]]:
    """Prediction, share, peak, sentence and map of each image."""
    explanation = explain_predictions(model, images, [stage], [method])
    attributions = explanation.maps[method][stage].split(1)
    for i, line in enumerate(describe(model, explanation)):
        logits, prediction = explanation.logits[i : i + 1], line["prediction"]
        class_idx = model.class_names.index(prediction) if prediction else 0
        share = line["share"] if "share" in line else logits.softmax(1)[0, class_idx].item()
        nothing = f"No pixel reaches the threshold of {model.threshold:g}: the model finds nothing here."
        sentence = diagnose(attributions[i], logits, class_idx) if prediction else nothing
        yield prediction, share, line["peak"][method][stage], sentence, attributions[i]


def write_zip(
    path: str | Path, model: Model, explained: Iterator[Explained], stage: str, method: str, source: str
) -> list[Row]:
    """Writes maps, pictures, table and manifest as they come, whole or not at all, and returns the rows.

    Args:
        explained: of `explain_many`, with the same stage and method.
        source: what the model is called, for the manifest.
    """
    path, rows = Path(path), []
    writing = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(writing, "w") as archive:  # stored: maps and JPEGs hardly become smaller
            for each in explained:
                rows.append(each.row)
                if each.attribution is not None:
                    name = f"{each.row.number:05d}"
                    archive.writestr(f"maps/{name}.npy", _npy(each.attribution[0, 0].numpy()))
                    archive.writestr(f"pictures/{name}.jpg", to_jpeg(each))
            archive.writestr("table.csv", to_csv(rows).encode("utf-8-sig"), zipfile.ZIP_DEFLATED)
            archive.writestr("manifest.json", _manifest(model, rows, stage, method, source), zipfile.ZIP_DEFLATED)
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)
    return rows


def to_jpeg(explained: Explained) -> bytes:
    """The map over the view, as a JPEG file."""
    buffer = io.BytesIO()
    overlay(explained.view, explained.attribution).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def to_csv(rows: Sequence[Row]) -> str:
    """A table with a heading, for spreadsheets: text that would be a formula begins with an apostrophe."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for row in rows:
        cells = (getattr(row, field.name) for field in fields(Row))
        writer.writerow([_harmless(cell) if isinstance(cell, str) else cell for cell in cells])
    return lines.getvalue()


def _harmless(text: str) -> str:
    """The text, not as a formula: wide forms of = + - @ are taken for these, and spaces before them are skipped."""
    return f"'{text}" if unicodedata.normalize("NFKC", text).lstrip()[:1] in ("=", "+", "-", "@") else text


def _manifest(model: Model, rows: Sequence[Row], stage: str, method: str, source: str) -> str:
    mask = f"the mean logit over the predicted mask of {model.class_names[0]!r}"
    manifest = {
        "model": source,
        "task": model.task,
        "class_names": model.class_names,
        "image_size": model.image_size,
        "score": "the logit of the predicted class" if model.task == "classification" else mask,
        "stage": stage,
        "method": method,
        "maps": "maps/NUMBER.npy: float32 (h, w) at the stage's resolution, raw and signed, not scaled",
        "pictures": "pictures/NUMBER.jpg: positive values over the view, each divided by its own maximum",
        "peak": "the map's maximum times h*w: comparable within one model and stage, not between models",
        "rows": [{key: _finite(value) for key, value in asdict(row).items()} for row in rows],
    }
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.float32), allow_pickle=False)
    return buffer.getvalue()
