"""Many pictures at once: what a model predicts for each and why, as a table and as a zip of maps.

    maps/00001.npy       the raw signed map, float32 (h, w) at the stage's resolution
    pictures/00001.jpg   the same map, drawn over what the model saw
    table.csv            a row a picture
    manifest.json        model, score, stage, method, scaling, and the rows again

Pictures are read, explained and written batch by batch, so memory does not grow with their number. A picture that
cannot be opened gets a row with the reason.
"""

import csv
import io
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cvlab.explain import check_stages, default_stage
from cvlab.explain.many import explain_batches
from cvlab.files import to_json, whole_file
from cvlab.models import Model, probabilities
from cvlab.page.unzip import Picture
from cvlab.render import overlay
from cvlab.transforms import ImageError, view
from cvlab.trust import familiarity
from cvlab.trust.diagnosis import diagnose

BATCH = 16
PHOTO_SIDE = 480  # pixels of a photo in the gallery
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """The table's row for one picture.

    Attributes:
        number: from 1; the name of the picture's files in the zip.
        file: name of the picture.
        prediction: a class; None if a segmenter found nothing or the picture could not be opened.
        share: probability of the class, or the share of the view that the mask covers.
        peak: of the map that explains the prediction.
        sentence: a warning about the map, or why there is none.
        familiar: how familiar the picture is, as `cvlab.trust.familiarity` says.
    """

    number: int
    file: str
    prediction: str | None
    share: float | None
    peak: float | None
    sentence: str
    familiar: float | None = None


@dataclass(frozen=True)
class Explained:
    """A row with the view (1, 3, S, S), the signed map (1, 1, h, w) and the photo, at most PHOTO_SIDE pixels a side.

    All three are None if the picture could not be opened.
    """

    row: Row
    view: Tensor | None = None
    attribution: Tensor | None = None
    photo: Image.Image | None = None


def explain_many(
    model: Model,
    pictures: Sequence[Picture],
    stage: str | None = None,
    method: str = "grad_cam",
    progress: Progress | None = None,
) -> Iterator[Explained]:
    """The prediction for each picture and the map that explains it, in order, batch by batch.

    Args:
        stage: a key of model.stages; by default `default_stage(model)`.
        method: a key of `cvlab.explain.METHODS`.
        progress: called after each batch with how many pictures are done, and of how many.

    Raises:
        ValueError: a stage or method that is not there.
    """
    (stage,) = check_stages(model, [stage or default_stage(model)])
    photos: dict[int, Image.Image] = {}  # by the id of a picture: the same file may come twice

    def open_view(picture: Picture) -> Tensor | str:
        try:
            image = picture.open()
        except ImageError as error:
            return str(error)[:1].upper() + str(error)[1:]
        seen = view(image, model)
        image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
        photos[id(picture)] = image
        return seen

    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    explained = explain_batches(model, batches, open_view, [stage], [method])
    for k, (batch, (opened, explanation, lines)) in enumerate(zip(batches, explained, strict=True)):
        if explanation:
            described = zip(lines, explanation.logits.split(1), explanation.maps[method][stage].split(1), strict=True)
        for number, (picture, seen) in enumerate(zip(batch, opened, strict=True), start=k * BATCH + 1):
            if isinstance(seen, str):
                yield Explained(Row(number, picture.label, None, None, None, seen))
                continue
            line, logits, attribution = next(described)
            prediction = line["prediction"]
            class_idx = model.class_names.index(prediction) if prediction else 0
            share = line["share"] if "share" in line else probabilities(model, logits)[0, class_idx].item()
            nothing = f"No pixel reaches the threshold of {model.threshold:g}: the model finds nothing here."
            warning = diagnose(attribution, logits / model.temperature, class_idx) if prediction else nothing
            photo = photos.pop(id(picture))
            sentence = " ".join(filter(None, [warning, *photo.info["notes"]]))
            known = familiarity(model, seen).item() if model.statistics else None
            row = Row(number, picture.label, prediction, share, line["peak"][method][stage], sentence, known)
            yield Explained(row, seen, attribution, photo)
        if progress:
            progress(number, len(pictures))


def write_zip(
    path: str | Path, model: Model, explained: Iterator[Explained], stage: str, method: str, source: str
) -> list[Row]:
    """Writes maps, pictures, table and manifest to a zip, whole or not at all, and returns the rows.

    Args:
        explained: from `explain_many` with the same stage and method.
        source: name of the model, for the manifest.
    """
    rows = []
    with whole_file(path) as writing, zipfile.ZipFile(writing, "w") as archive:  # stored: hardly anything would shrink
        for each in explained:
            rows.append(each.row)
            if each.attribution is not None:
                name = f"{each.row.number:05d}"
                with archive.open(f"maps/{name}.npy", "w") as file:
                    np.save(file, each.attribution[0, 0].numpy(), allow_pickle=False)
                with archive.open(f"pictures/{name}.jpg", "w") as file:
                    overlay(each.view, each.attribution, stage=model.stages[stage]).save(file, "JPEG", quality=90)
        archive.writestr("table.csv", to_csv(rows).encode("utf-8-sig"), zipfile.ZIP_DEFLATED)
        archive.writestr("manifest.json", _manifest(model, rows, stage, method, source), zipfile.ZIP_DEFLATED)
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with a heading, for spreadsheets. A text that would run as a formula gets an apostrophe in front."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    for row in rows:
        writer.writerow([_harmless(cell) if isinstance(cell, str) else cell for cell in astuple(row)])
    return lines.getvalue()


def _harmless(text: str) -> str:
    # Spreadsheets skip spaces before = + - @ and accept their full-width forms, which NFKC makes plain.
    return f"'{text}" if unicodedata.normalize("NFKC", text).lstrip()[:1] in ("=", "+", "-", "@") else text


def _manifest(model: Model, rows: Sequence[Row], stage: str, method: str, source: str) -> str:
    mask = f"the mean logit over the predicted mask of “{model.class_names[0]}”"
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
        "rows": [asdict(row) for row in rows],
    }
    return to_json(manifest, indent=1) + "\n"
