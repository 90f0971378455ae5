"""Many pictures at once: what a model predicts for each and why, with a row of a table for each.

Pictures are read and explained batch by batch, so memory does not grow with their number. A picture that cannot be
opened gets a row with the reason.
"""

import csv
import io
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields

from PIL import Image
from torch import Tensor

from cvlab.explain import check_stages, default_stage
from cvlab.explain.many import explain_batches
from cvlab.models import Model, probabilities
from cvlab.page.unzip import Picture
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
        number: from 1.
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
    """A row with the signed map (1, 1, h, w) and the photo, at most PHOTO_SIDE pixels a side.

    Both are None if the picture could not be opened.
    """

    row: Row
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
            yield Explained(row, attribution, photo)
        if progress:
            progress(number, len(pictures))


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
