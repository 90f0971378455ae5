"""The tab "Break it": what becomes of the answer when parts of the photo are changed (changes.py).

Every change makes another photo, about which the whole page then answers. The history is a list of `Step`s as dicts, so
that JSON can hold it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from cvlab.explain import heatmap
from cvlab.explain.regions import in_words
from cvlab.page.changes import DONE, SIDE, box_of, changed, frame_of, pixels_of
from cvlab.page.html import paragraph, quoted, table
from cvlab.page.picture import MAX_SIDE, captioned, cased, layers, slider, with_photo
from cvlab.page.question import Question
from cvlab.page.visit import Answer, marks
from cvlab.page.words import GRID, percent, upper
from cvlab.transforms import WHOLE, Box, open_image

MOST_CLASSES = 5  # in the table, those with the largest shares
BACK = {"Undo": slice(-1), "Start again": slice(1)}  # the part of the history that is kept
TOOLS = ("Erase", "Darken", "Blur", "Turn", "Recolour", "Cut", "Copy", "Paste", *BACK)
BEGIN = "Can you change its mind? What you try stands here, beside what the heat had promised."


class Step(NamedTuple):
    """An entry of the history."""

    photo: str  # its path
    did: str = ""  # a value of `changes.DONE`; empty for the photo as it came
    part: str = ""  # that was changed


def change(
    tool: str,
    part: str,
    clipboard: str | None,
    trail: list[dict],
    photo: str | None,
    save: Callable[[Image.Image], str],
) -> dict:
    """What a button of `TOOLS` does: the "photo" and the "trail" of changes after it, or a "clipboard".

    Args:
        part: that is changed, "" for none.
        clipboard: path of the part that was copied.
        trail: the history, of another photo or of this one.
        photo: path of the photo.
        save: writes a picture and returns its path.

    Raises:
        ValueError: no part, nothing to paste, to undo or to change; the sentence says what to do.
        OSError: the photo was deleted.
    """
    trail = trail if trail and trail[-1]["photo"] == photo else []
    if tool in BACK:
        if not (kept := trail[BACK[tool]]):
            raise ValueError("Nothing was changed yet.")
        return {"photo": kept[-1]["photo"], "trail": kept}
    if photo is None:
        raise ValueError("Drop a photo, or choose an example.")
    image = open_image(photo)
    if max(image.size) > MAX_SIDE:  # a larger one would take too long
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        photo = save(image)
    copied = {"clipboard": save(image.crop(pixels_of(part, image)))} if tool in ("Copy", "Cut") else {}
    if tool == "Copy":
        return copied
    after = save(changed(image, tool, part, open_image(clipboard) if clipboard else None))
    steps = trail or [Step(photo)._asdict()]
    return copied | {"photo": after, "trail": [*steps, Step(after, DONE[tool], part)._asdict()]}


def canvas(answer: Answer, part: str = "") -> str:
    """The photo with the evidence and the part that is chosen, to choose another one in."""
    shown = marks(answer)
    at = SIDE // 2, SIDE // 2
    if part:
        left, top, width, height = (round(SIDE * share) for share in box_of(part))
        shown["lines"] += cased("asked", frame_of(part))
        at = left + width // 2, top + height // 2
    label = "The photo; an orange line around the part that is chosen"
    lines = "Line: what was found. Dashed: the" if answer.segments else "White line: the"
    says = f"{lines} hottest tenth. Click a part or drag over it, then choose what to do with it."
    bar = slider("Heat", answer.question.opacity)
    return with_photo(captioned(layers(label, **shown, picks=SIDE, at=at), "", says, bar), "main")


def history(answer: Answer, trail: Sequence[dict] = ()) -> str:
    """The answer at first and after all changes; and each change, with the heat that was there before."""
    steps = [Step(**step) for step in trail]
    if len(steps) < 2 or steps[-1].photo != answer.photo:
        return paragraph(BEGIN)
    answers = [replace(answer, photo=step.photo, mask=None) for step in steps]
    shares = [each.prediction.shares for each in answers]
    first, last = shares[0], shares[-1]
    name = max(first, key=first.get)
    ranked = sorted(first, key=lambda each: -max(first[each], last[each]))[:MOST_CLASSES]
    of = "share of the picture" if answer.segments else "probability"
    compared = [(each, percent(first[each]), percent(last[each])) for each in ranked]
    done = []
    for before, step, share, then in zip(answers, steps[1:], shares, shares[1:], strict=False):
        place = in_words(inside(step.part, WHOLE))
        asked = before.again(Question(class_name=name, method=answer.question.method, stage=answer.question.stage))
        became = f"{percent(share[name])} to {percent(then[name])}"
        done.append((f"{upper(step.did)} {place}", percent(heat_in(asked, step.part)), became))
    head = "what you did", "heat that was there", f"{quoted(name)} went from"
    return table((of, "at first", "now"), compared) + table(head, done[::-1])


def heat_in(answer: Answer, part: str) -> float:
    """The share of a map's evidence that lies in a part of the photo; 0 where there is none."""
    try:
        heat = heatmap(answer.attribution, (GRID, GRID), answer.read_at)[0, 0]
    except ValueError:  # a segmenter found nothing
        return 0.0
    return (heat[inside(part, answer.box)].sum() / heat.sum().clamp(min=1e-9)).item()


def inside(part: str, box: Box) -> Tensor:
    """Which cells of a grid over a box of the photo a part touches, (GRID, GRID) bool."""
    begin = torch.arange(GRID) / GRID

    def touched(start: float, length: float, low: float, extent: float) -> Tensor:
        first, end = low + begin * extent, low + (begin + 1 / GRID) * extent
        return (end > start + 1e-6) & (first < start + max(length, 2 / SIDE) - 1e-6)

    left, top, width, height = box_of(part)
    return touched(top, height, box[1], box[3])[:, None] & touched(left, width, box[0], box[2])
