"""The tab "Many pictures": what a model predicts for each and why, as a gallery and as a table.

Each picture is answered as the tab Predict answers it, one after the other. What deserves a look comes first: mistakes,
where the name of a file begins with the true class, then doubts. What cannot be opened gets a row with the reason.
"""

import base64
import csv
import html
import io
import re
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cvlab.explain import default_stage, peak
from cvlab.files import printable
from cvlab.models import Model
from cvlab.models.model import MOST_NAMES
from cvlab.page.evidence import predict_photo
from cvlab.page.host import sentence_of
from cvlab.page.html import folded, in_grid, paragraph
from cvlab.page.picture import captioned, heated, slider, with_photo
from cvlab.page.question import COLORMAPS, Question
from cvlab.page.words import SURE
from cvlab.transforms import WHOLE, ImageError, open_image
from cvlab.trust.diagnosis import diagnose
from cvlab.trust.familiarity import FOREIGN

MOST_PICTURES = 1000
MAX_NAME = 100  # characters of a label
PHOTO_SIDE = 480  # pixels of a photo in the gallery
MOST_SHOWN = 60  # pictures in the gallery; the table holds all
WORDS = re.compile(r"[^\W\d_]+|\d+").findall  # of a name: letters or digits in a row
# Why a picture deserves a look, in the order in which the pictures stand; the last one has no figure.
REASONS = ("mistake", "unfamiliar", "several classes", "unsure", "warning", "", "not opened")
HINT = "First come mistakes, if the name of a picture or its folder begins with the true class (daisy_12), then doubts."


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
    true: str = ""  # the class that the file's name begins with; empty where it begins with none
    look: str = ""  # why it deserves a look, of REASONS; empty where nothing speaks against the answer

    @property
    def place(self) -> tuple[int, float, int]:
        """What rows are sorted by: the surest of the mistakes come first, of the others the least sure."""
        share = self.share or 0.0
        return REASONS.index(self.look), -share if self.look == "mistake" else share, self.number


def explain_files(
    model: Model, files: Sequence[str], question: Question, progress: Callable[[tuple[int, int]], object]
) -> tuple[str, list[Row]]:
    """Explains what a model predicts: gallery and table as HTML, and the rows in the order of the files.

    Args:
        files: paths of pictures; those after the first MOST_PICTURES are not opened.
        question: its method is used, and its stage where the model has it.
        progress: told (pictures done, of how many) after each.

    Raises:
        ValueError: no files.
    """
    if not files:
        raise ValueError("Choose pictures.")
    stage = question.stage if question.stage in model.stages else default_stage(model)
    asked, taken = Question(stage=stage, method=question.method), files[:MOST_PICTURES]
    rows, shown = [], []
    for i, path in enumerate(taken, start=1):
        row, figure = explain_picture(model, Path(path), asked, i)
        rows.append(row)
        shown = sorted([*shown, (row.place, figure)])[:MOST_SHOWN]  # no more are kept in memory
        progress((i, len(taken)))
    content = base64.b64encode(to_csv(rows).encode("utf-8-sig")).decode()
    saved = f'<p><a download="table.csv" href="data:text/csv;base64,{content}">Save the table (CSV)</a></p>'
    figures = [figure for _, figure in shown if figure]
    drawn = slider("Heat", question.opacity) + in_grid(figures) if figures else ""
    listed = folded("All in a table", to_html(sorted(rows, key=lambda row: row.place)), "rows")
    return paragraph(_summary(rows, len(files) - len(taken))) + listed + saved + drawn, rows


def _summary(rows: Sequence[Row], left_out: int) -> str:
    """How many pictures there are, and how many of each kind."""
    named, looks = sum(bool(row.true) for row in rows), [row.look for row in rows]
    told = [f"{len(rows)} pictures."]
    told += [f"Mistakes: {looks.count('mistake')} of {named} named after a class."] * bool(named)
    told += [f"{reason.capitalize()}: {looks.count(reason)}." for reason in REASONS[1:] if reason and reason in looks]
    told += [f"The first {MOST_SHOWN} are shown; the table holds all."] * (len(rows) > MOST_SHOWN)
    return " ".join(told + [f"No more than {MOST_PICTURES} are taken: {left_out} are left out."] * bool(left_out))


def true_class(file: str, names: Sequence[str]) -> str:
    """The class that the name of a file begins with, word by word; the longest one, and empty where there is none."""
    begins = WORDS(file.casefold())
    found = [name for name in names if (words := WORDS(name.casefold())) and begins[: len(words)] == words]
    return max((name for name in found if not name.isdecimal()), key=len, default="")  # files are numbered, too


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
        return Row(number, file, None, None, None, sentence, look="not opened"), ""
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
    named = (prediction.names or ())[:MOST_NAMES]
    true = true_class(file, model.class_names) if model.task == "classification" else ""
    speaks = {
        "mistake": true and name != true,
        "unfamiliar": prediction.familiar is not None and prediction.familiar < FOREIGN,
        "several classes": len(named) > 1,
        "unsure": model.task == "classification" and share < SURE,
        "warning": warning,
    }
    look = next((reason for reason, holds in speaks.items() if holds), "")
    row = Row(number, file, name, share, largest, sentence, prediction.familiar, " or ".join(named), true, look)
    title = f"{number}: {name or 'nothing found'}" + f", not {true}" * (look == "mistake")
    figure = captioned(drawn, title, f"{share:.1%}, peak {largest:.3g}. {look.capitalize()}", f"<p>{opener(row)}</p>")
    return row, with_photo(figure, style=prediction.photo)


def opener(row: Row) -> str:
    """A button that opens a picture in the other tabs."""
    name = html.escape(f"Open {row.file}")
    return f'<button class="open" data-number="{row.number}" aria-label="{name}">{row.number}</button>'


def to_html(rows: Sequence[Row]) -> str:
    """The rows as a table: each begins with a button that opens its picture, each head is one that sorts."""
    heads = "".join(f'<th scope="col"><button class="sort">{name}</button></th>' for name in Row._fields)
    lines = []
    for row in rows:
        cells = [f"{cell:.4g}" if isinstance(cell, float) else html.escape(str(cell or "")) for cell in row[1:]]
        first = opener(row) if row.look != "not opened" else row.number
        lines.append(f"<tr><td>{first}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="rows" tabindex="0" role="region" aria-label="Results">{table}</div>'


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
