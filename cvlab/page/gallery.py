"""Answers beside each other: two models, two pictures, or a gallery of many pictures."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from cvlab.checkpoint.card import confirmed
from cvlab.explain import default_stage, peak
from cvlab.explain.many import likeness
from cvlab.files import write_bytes
from cvlab.models import Model
from cvlab.page.html import number, paragraph, sorted_by
from cvlab.page.many import Explained, explain_many, to_csv
from cvlab.page.picture import captioned, heated, photo_style, slider, with_photo
from cvlab.page.question import COLORMAPS, Question
from cvlab.page.unzip import list_pictures
from cvlab.page.visit import Answer
from cvlab.page.words import said
from cvlab.render import picture_url
from cvlab.transforms import seen_part

MOST_SHOWN = 60  # of many pictures; the table holds all
# The columns of the table and their widths in pixels.
ROWS = {"no.": 60, "file": 180, "prediction": 130, "share": 90, "peak": 90, "what to know": 260, "familiar": 90}
ORDERS = {
    "number": lambda row: row.number,
    "prediction": lambda row: (row.prediction or "", -row.share),
    "share, the least first": lambda row: row.share,
    "peak, the highest first": lambda row: -row.peak,
}


def compare(answer: Answer, second: Answer) -> str:
    """Two models on one picture, one on two, or both; ValueError where a classifier is compared with a segmenter."""
    if (second.visit.name, second.visit.photo) == (answer.visit.name, answer.visit.photo):
        return paragraph("Choose a second model, a second picture, or both.")
    first = answer.again(_comparable(answer.question))
    _ = first.prediction, second.prediction
    if first.model.task != second.model.task:
        raise ValueError("A classifier and a segmenter are asked different questions: compare like with like.")
    second = second.again(_of_second(first, second))
    titles = first.visit.name, second.visit.name
    if titles[0] == titles[1]:
        titles = "First picture", "Second picture"
    drawn = ""
    for title, each in zip(titles, (first, second), strict=True):
        attribution, question = each.attribution, each.question
        words = f"{each.words} at {each.stage}"
        shown = heated(attribution, each.read_at, each.box, f"{title}: {words}", question.colormap, None, True)
        tested = confirmed(each.visit.models.folder(each.visit.name), each.stage)
        caption = f"{' '.join(said(each))} {words}. Peak {number(peak(attribution).item())} logits. {tested}"
        drawn += with_photo(captioned(shown, title, caption), style=each.prediction.photo)
    agreement = paragraph(_agreement(first, second))
    return f'{agreement}{slider("Heat", first.question.opacity)}<div class="two">{drawn}</div>'


def _comparable(question: Question) -> Question:
    """What both sides can be asked: places belong to one picture, thresholds to one model."""
    return replace(question, region="mask", points="", rather_than="", threshold=0.0)


def _of_second(first: Answer, second: Answer) -> Question:
    """The question to the second side: at the same stage and about the same class, where its model has them."""
    stage = first.question.stage or default_stage(first.model)
    asked = replace(first.question, stage=stage if stage in second.model.stages else "")
    if first.model is second.model:  # the same class, so that the peaks can be compared
        return replace(asked, class_name=first.model.class_names[first.evidence.class_idx])
    return asked if asked.class_name in second.model.class_names else replace(asked, class_name="")


def _agreement(first: Answer, second: Answer) -> str:
    if first.model is second.model:
        return "One model, one class: the peaks of the two pictures can be compared."
    r, difference = (each.item() for each in likeness(first.attribution, second.attribution))
    partly = "" if r > 0.7 else "partly "
    places = f"{partly}look at the same places" if r > 0.3 else "look at different places"
    return (
        f"Agreement of the two maps: r = {r:.2f}; the models {places}. On average the maps differ by {difference:.2f} "
        "of their largest values. Of two models only the shape of maps can be compared, not peaks."
    )


def explain_files(
    model: Model, files: Sequence[str], question: Question, progress: Callable[[tuple[int, int]], object], folder: Path
) -> tuple[str, list[list], str]:
    """Explains what a model predicts for many pictures.

    Args:
        files: paths of pictures and zips.
        question: its method is used, and its stage where the model has it.
        progress: told (pictures done, of how many).
        folder: gets table.csv.

    Returns:
        The gallery as HTML, the rows of the table, the path of table.csv.

    Raises:
        ValueError, OSError: no files, or the table cannot be written.
    """
    if not files:
        raise ValueError("Choose pictures, or a zip of pictures.")
    stage = question.stage if question.stage in model.stages else default_stage(model)
    rows, shown = [], []
    explained = explain_many(model, list_pictures(files), stage, question.method, lambda done, of: progress((done, of)))
    for each in explained:
        rows.append(each.row)
        if each.attribution is not None and len(shown) < MOST_SHOWN:
            shown.append(each)
    table = folder / "table.csv"
    write_bytes(table, to_csv(rows).encode("utf-8-sig"))
    cells = [[round(cell, 4) if isinstance(cell, float) else cell for cell in astuple(row)] for row in rows]
    orders = {name: sorted(range(len(shown)), key=lambda i, key=key: key(shown[i].row)) for name, key in ORDERS.items()}
    more = f" The first {MOST_SHOWN} are shown; the table holds all." if len(shown) == MOST_SHOWN else ""
    drawn = sorted_by(orders) + slider("Heat", question.opacity) + gallery(shown, model, stage) if shown else ""
    return paragraph(f"{len(rows)} pictures.{more}") + drawn, cells, str(table)


def gallery(drawn: Sequence[Explained], model: Model, stage: str) -> str:
    """The figures of many pictures, each with the evidence for its prediction, read at a stage."""
    figures = ""
    for each in drawn:
        row, (width, height) = each.row, each.photo.size
        found = row.prediction or "nothing found"
        label = f"{row.file}: evidence for {row.prediction or 'nothing'}"
        box = seen_part(model, (height, width))
        picture = heated(each.attribution, model.stages[stage], box, label, COLORMAPS[0], None, False)
        figure = captioned(picture, f"{row.number}: {found}", f"{row.share:.1%}, peak {row.peak:.3g}")
        figures += with_photo(figure, style=photo_style(picture_url(each.photo), (height, width)))
    return f'<div class="figures">{figures}</div>'
