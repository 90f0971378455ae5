"""The tab "Many pictures": what a model predicts for each and why, as a gallery and as a table.

Each picture is answered as the tab Predict answers it, one after the other, and only its row and its figure are kept. A
picture that cannot be opened gets a row with the reason.
"""

import csv
import io
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cvlab.explain import default_stage, peak
from cvlab.files import printable, write_bytes
from cvlab.models import Model
from cvlab.models.model import MOST_NAMES
from cvlab.page.evidence import predict_photo
from cvlab.page.host import sentence_of
from cvlab.page.html import in_grid, paragraph
from cvlab.page.picture import captioned, heated, slider, with_photo
from cvlab.page.question import COLORMAPS, Question
from cvlab.transforms import WHOLE, ImageError, open_image
from cvlab.trust.diagnosis import diagnose
from cvlab.trust.familiarity import FOREIGN

MOST_PICTURES = 1000
MAX_NAME = 100  # characters of a label
PHOTO_SIDE = 480  # pixels of a photo in the gallery
MOST_SHOWN = 60  # pictures in the gallery; the table holds all
WIDTHS = (90, 180, 130, 90, 90, 260, 90, 140)  # of the table's columns, in pixels


class Row(NamedTuple):
    """The table's row for one picture; the fields name its columns."""

    number: int  # from 1
    file: str  # name of the picture
    prediction: str | None  # a class; None if a segmenter found nothing or the picture could not be opened
    share: float | None  # probability of the class, or the share of the view that the mask covers
    peak: float | None  # of the map that explains the prediction
    sentence: str  # a warning about the map, or why there is none
    familiar: float | None = None  # how familiar the picture is, as `cvlab.trust.familiarity` says
    set: str = ""  # the classes that hold the true one with 95%; empty where that is not promised


def explain_files(
    model: Model, files: Sequence[str], question: Question, progress: Callable[[tuple[int, int]], object], folder: Path
) -> tuple[str, list[list], str]:
    """Explains what a model predicts for many pictures.

    Args:
        files: paths of pictures; those after the first MOST_PICTURES are not opened.
        question: its method is used, and its stage where the model has it.
        progress: told (pictures done, of how many) after each.
        folder: gets table.csv.

    Returns:
        The gallery as HTML, the rows of the table, the path of table.csv.

    Raises:
        ValueError, OSError: no files, or the table cannot be written.
    """
    if not files:
        raise ValueError("Choose pictures.")
    stage = question.stage if question.stage in model.stages else default_stage(model)
    asked, taken = Question(stage=stage, method=question.method), files[:MOST_PICTURES]
    rows, shown = [], []
    for number, path in enumerate(taken, start=1):
        row, figure = explain_picture(model, Path(path), asked, number)
        rows.append(row)
        if figure and len(shown) < MOST_SHOWN:
            shown.append(figure)
        progress((number, len(taken)))
    if len(files) > len(taken):
        rest = f"Only the first {len(taken)} of {len(files)} pictures are taken."
        rows.append(Row(len(taken) + 1, "the rest", None, None, None, rest))
    table = folder / "table.csv"
    write_bytes(table, to_csv(rows).encode("utf-8-sig"))
    cells = [[round(cell, 4) if isinstance(cell, float) else cell for cell in row] for row in rows]
    more = f" The first {MOST_SHOWN} are shown; the table holds all." if len(shown) == MOST_SHOWN else ""
    drawn = slider("Heat", question.opacity) + in_grid(shown) if shown else ""
    known = [row.familiar for row in rows if row.familiar is not None]
    foreign = f" Unlike anything it was trained on: {sum(each < FOREIGN for each in known)}." if known else ""
    return paragraph(f"{len(taken)} pictures.{foreign}{more}") + drawn, cells, str(table)


def explain_picture(model: Model, path: Path, question: Question, number: int) -> tuple[Row, str]:
    """The row of a picture, and its figure with the evidence for what is predicted; empty if it cannot be opened.

    Args:
        question: its stage, a key of model.stages, and its method are used.
    """
    file = clean(path.name)
    try:
        prediction = predict_photo(open_image(path, None, model.channels), model, question, PHOTO_SIDE)
    except (ImageError, OSError) as error:
        zipped = "This is a zip, not a picture: unpack it and choose the pictures in it."
        sentence = zipped if zipfile.is_zipfile(path) else sentence_of(error)
        return Row(number, file, None, None, None, sentence), ""
    if evidence := prediction.evidence:
        name, attribution = model.class_names[evidence.class_idx], evidence.maps[question.method][question.stage]
        share = prediction.shares[name]
        warning = diagnose(attribution, evidence.logits / model.temperature, evidence.class_idx)
    else:
        name, share, attribution = None, 0.0, torch.zeros(1, 1, 1, 1)
        warning = f"No pixel reaches the threshold of {model.threshold:g}: the model finds nothing here."
    sentence, largest = " ".join(filter(None, [warning, *prediction.notes])), peak(attribution).item()
    label, box = f"{file}: evidence for {name or 'nothing'}", evidence.box if evidence else WHOLE
    drawn = heated(attribution, model.stages[question.stage], box, label, COLORMAPS[0], False)
    figure = captioned(drawn, f"{number}: {name or 'nothing found'}", f"{share:.1%}, peak {largest:.3g}")
    named = " or ".join((prediction.names or ())[:MOST_NAMES])
    row = Row(number, file, name, share, largest, sentence, prediction.familiar, named)
    return row, with_photo(figure, style=prediction.photo)


def clean(name: str) -> str:
    """A file name as a label: invisible characters become ?, and long names lose their middle."""
    name = printable(name)
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}...{name[3 - MAX_NAME // 2 :]}"


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with a heading, for spreadsheets. A text that would run as a formula gets an apostrophe in front."""
    lines = io.StringIO()
    cells = ([_harmless(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    csv.writer(lines, lineterminator="\n").writerows([Row._fields, *cells])
    return lines.getvalue()


def _harmless(text: str) -> str:
    # Spreadsheets skip spaces before = + - @ and accept their full-width forms, which NFKC makes plain.
    return f"'{text}" if unicodedata.normalize("NFKC", text).lstrip()[:1] in ("=", "+", "-", "@") else text
