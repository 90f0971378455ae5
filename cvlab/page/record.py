"""The tabs Report and Audit: what the folder of a model tells about it, as HTML.

The sections are those of the card (cvlab/checkpoint/card.py), with the pictures of each epoch and the card itself. The
folder may come from a stranger: its text is escaped, its pictures are opened like an uploaded photo, and a part that is
not valid says so instead of hiding the others.
"""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cvlab.checkpoint.card import SECTIONS, Section, audit, read_text, title_and_alt_text
from cvlab.checkpoint.config import opened
from cvlab.metrics import paired_interval
from cvlab.page.html import code_block, figure, folded, in_grid, paragraph, table
from cvlab.transforms import open_image

MOST_PICTURES = 40
MOST_EPOCHS = 12
MOST_SIDE = 1600
MAX_PICTURE_BYTES = 8 * 2**20


def record_panel(folder: Path) -> str:
    """Everything that the folder of a model tells, part after part."""
    return "".join(_shown(part, folder) for part in (*SECTIONS, _epochs, _card) if part is not audit)


def audit_panel(folder: Path) -> str:
    """What an audit found, or how to ask for one."""
    return _shown(audit, folder) or paragraph("Does it cheat? Ask: python train/audit.py FOLDER --data DIR")


def side_by_side(folders: Mapping[str, Path]) -> str:
    """What the folders of two models tell, by the names of the models, and how far their scores differ."""
    told = [f"<div><h2>{html.escape(name)}</h2>{record_panel(folder)}</div>" for name, folder in folders.items()]
    (first, own), (second, other) = folders.items()
    return _shown(partial(_difference, first, second, own), other) + f'<div class="two">{"".join(told)}</div>'


def _difference(first: str, second: str, own: Path, other: Path) -> str:
    """The difference of the scores of two models on the same pictures, or why there is none to tell."""
    mine, theirs = (json.loads(read_text(folder / "metrics.json") or "{}") for folder in (own, other))
    ours, others = mine.get("pictures", {}), theirs.get("pictures", {})
    if not (ours and others):
        return paragraph(f"No difference: train/evaluate.py scored no single picture of {second if ours else first}.")
    if ours.keys() != others.keys() or ("iou" in mine) != ("iou" in theirs):
        return paragraph("No difference: the scores are of other pictures, or of another task.")
    rows = (np.array([scores[picture] for picture in ours], float) for scores in (ours, others))
    told = "{:+.4f} (95% interval {:+.4f} to {:+.4f})".format(*paired_interval(*rows, np.mean))
    score = "Mean iou of a picture" if "iou" in mine else "Accuracy"
    return paragraph(f"{score} of {first} minus that of {second}, on the same {len(ours)} pictures: {told}.")


def _shown(part: Callable[[Path], Section | str], folder: Path) -> str:
    try:
        found = part(folder)
        return _section(found) if isinstance(found, Section) else found
    except Exception as error:  # a stranger's JSON may hold anything anywhere
        return paragraph(f"A part of this model's record cannot be shown ({type(error).__name__}).")


def _section(section: Section) -> str:
    """A section of the card as HTML; empty where only its title is there."""
    shown = code_block(section.code) if section.code else ""
    shown += table(("", ""), section.facts) if section.facts else ""
    shown += paragraph(" ".join(section.sentences))
    shown += "".join(table(head, rows) for head, *rows in section.tables)
    shown += _gallery(section.pictures)
    return f"<h2>{section.title}</h2>{shown}" if shown else ""


def _gallery(paths: Sequence[Path]) -> str:
    drawn = []
    for path in paths[:MOST_PICTURES]:
        with opened(path, MAX_PICTURE_BYTES) as file:
            image = open_image(file)
        image.thumbnail((MOST_SIDE, MOST_SIDE))
        title, alt_text = title_and_alt_text(path)
        drawn.append(figure(image, title, "", alt_text))
    return in_grid(drawn, "wide") if drawn else ""


def _epochs(folder: Path) -> str:
    """Where the model looked while it was trained, if that was recorded: a few epochs, up to the last."""
    report = folder / "report"
    frames = sorted(report.glob("epochs/*.png")) or sorted(report.glob("photos/epochs/*.png"))
    if not frames:
        return ""
    step = math.ceil(len(frames) / MOST_EPOCHS)
    return paragraph("Where the model looked during the training:") + _gallery(frames[::-step][::-1])


def _card(folder: Path) -> str:
    text = html.escape(read_text(folder / "README.md").split("---\n", 2)[-1])  # no Markdown in it is rendered
    return folded("The model's card", f'<pre class="card" tabindex="0">{text}</pre>', "card") if text else ""
