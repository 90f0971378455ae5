"""Two answers beside each other: of two models, or about two pictures."""

from dataclasses import replace

import numpy as np
import torch

from cvlab.explain import peak
from cvlab.explain.many import likeness
from cvlab.page.html import number, paragraph
from cvlab.page.picture import captioned, cased, difference_layer, layers, outline, slider, with_photo
from cvlab.page.question import Question, settings_of
from cvlab.page.visit import UNIT, Answer, draw_map
from cvlab.page.words import percent, place, said
from cvlab.render import relative_heat
from cvlab.transforms import Box

SIDE = 192  # pixels at which two maps are subtracted
ALIKE = 0.02  # a difference that varies by less shows no place


def compare(answer: Answer, second: Answer) -> str:
    """Two models on one picture, one on two, or both; ValueError where a classifier is compared with a segmenter."""
    if (second.name, second.photo) == (answer.name, answer.photo):
        return paragraph("Choose a second model, a second picture, or both.")
    # Places belong to one picture, thresholds to one model.
    asked = replace(answer.question, region="mask", points="", rather_than="", threshold=0.0)
    first = answer.again(asked)
    _ = first.prediction, second.prediction
    if first.model.task != second.model.task:
        raise ValueError("A classifier and a segmenter are asked different questions: compare like with like.")
    asked = replace(asked, stage=first.stage)
    if first.model is second.model:  # the same class, so that the peaks can be compared
        asked = replace(asked, class_name=first.model.class_names[first.evidence.class_idx])
    second = second.again(Question(**settings_of(second.model, asked)))
    titles = (first.name, second.name) if first.name != second.name else ("First picture", "Second picture")
    drawn = ""
    for title, each in zip(titles, (first, second), strict=True):
        caption = f"{' '.join(said(each))} {each.words} at {each.stage}."
        caption += f" Peak {number(peak(each.attribution).item())} {UNIT}."
        drawn += with_photo(captioned(draw_map(each), title, caption), style=each.prediction.photo)
    if first.photo == second.photo:
        drawn += difference(first, second)
    agreement = paragraph(_agreement(first, second))
    return f'{agreement}{slider("Heat", first.question.opacity)}<div class="two">{drawn}</div>'


def relative_map(answer: Answer, part: Box) -> np.ndarray:
    """The map of an answer, divided by its maximum, in a part of what the model saw of the photo: (SIDE, SIDE)."""
    heat = relative_heat(answer.attribution, (SIDE, SIDE), answer.read_at)
    steps, seen = (np.arange(SIDE) + 0.5) / SIDE, answer.box
    across, down = (SIDE * (part[i] + steps * part[2 + i] - seen[i]) / seen[2 + i] for i in (0, 1))
    return heat[np.ix_(*(places.astype(int).clip(0, SIDE - 1) for places in (down, across)))]


def difference(first: Answer, second: Answer) -> str:
    """Where one of two models looks at a photo and the other does not, as a picture and in words."""
    boxes = first.box, second.box
    left, top = (max(box[i] for box in boxes) for i in (0, 1))
    right, bottom = (min(box[i] + box[2 + i] for box in boxes) for i in (0, 1))
    if right <= left or bottom <= top:
        return paragraph("The two maps are of different parts of the photo, so there is no difference to show.")
    part = left, top, right - left, bottom - top
    mine, theirs = relative_map(first, part), relative_map(second, part)
    more, whole, told = mine - theirs, np.maximum(mine, theirs).sum(), []
    lines = (("Orange, full line", first.name, second.name, 1), ("Blue, dashed line", second.name, first.name, -1))
    for line, name, other, sign in lines:
        alone = (sign * more).clip(0)
        if np.ptp(alone) > ALIKE:
            share, where = percent(alone.sum() / whole), place(torch.from_numpy(alone)[None, None])
            told.append(f"{line}: heat of {name} that {other} lacks, {share}, most of it {where}.")
    if whole:
        told.append(f"Heat of both: {percent(np.minimum(mine, theirs).sum() / whole)}.")
    told.append("Each map is divided by its own maximum; lines: where they differ by more than half of it.")
    edges = (*cased("edge", outline(more, 0.5, part)), *cased("spot", outline(-more, 0.5, part)))
    picture = layers(f"Heat of {first.name} minus heat of {second.name}", part, difference_layer(more), edges)
    return with_photo(captioned(picture, "Difference", " ".join(told)), "grey", first.prediction.photo)


def _agreement(first: Answer, second: Answer) -> str:
    if first.model is second.model:
        apart = "As they show different places, the maps are not subtracted." * (first.photo != second.photo)
        return f"One model, one class: the peaks of the two pictures can be compared. {apart}"
    r = likeness(first.attribution, second.attribution).item()
    places = "partly " * (r <= 0.7) + "look at the same places" if r > 0.3 else "look at different places"
    return (
        f"Agreement of the two maps: r = {r:.2f}; the models {places}. Of two models only the shape of maps can be "
        "compared, not peaks."
    )
