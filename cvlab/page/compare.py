"""Two answers beside each other: of two models, or about two pictures."""

from dataclasses import replace

import numpy as np
import torch

from cvlab.explain import peak
from cvlab.explain.many import likeness
from cvlab.explain.regions import in_words
from cvlab.page.html import number, paragraph
from cvlab.page.picture import captioned, cased, difference_layer, layers, outline, slider, with_photo
from cvlab.page.question import Question, settings_of
from cvlab.page.visit import UNIT, Answer, draw_map
from cvlab.page.words import percent, said
from cvlab.render import relative_heat
from cvlab.transforms import Box
from cvlab.trust import hottest_part

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
    titles = first.name, second.name
    if titles[0] == titles[1]:
        titles = "First picture", "Second picture"
    drawn = ""
    for title, each in zip(titles, (first, second), strict=True):
        caption = f"{' '.join(said(each))} {each.words} at {each.stage}."
        caption += f" Peak {number(peak(each.attribution).item())} {UNIT}."
        drawn += with_photo(captioned(draw_map(each), title, caption), style=each.prediction.photo)
    if first.photo == second.photo:
        drawn += difference(first, second)
    agreement = paragraph(_agreement(first, second))
    return f'{agreement}{slider("Heat", first.question.opacity)}<div class="two">{drawn}</div>'


def seen_by_both(first: Box, second: Box) -> Box:
    """The part of a photo that lies in two parts of it; its width or height is 0 or less where there is none."""
    left, top = (max(first[i], second[i]) for i in (0, 1))
    right, bottom = (min(box[i] + box[2 + i] for box in (first, second)) for i in (0, 1))
    return left, top, right - left, bottom - top


def relative_map(answer: Answer, part: Box) -> np.ndarray:
    """The map of an answer, divided by its maximum, in a part of what the model saw of the photo: (SIDE, SIDE)."""
    heat = relative_heat(answer.attribution, (SIDE, SIDE), answer.read_at)
    steps, seen = (np.arange(SIDE) + 0.5) / SIDE, answer.box
    across, down = (SIDE * (part[i] + steps * part[2 + i] - seen[i]) / seen[2 + i] for i in (0, 1))
    return heat[np.ix_(down.astype(int), across.astype(int))]


def difference(first: Answer, second: Answer) -> str:
    """Where one of two models looks at a photo and the other does not, as a picture and in words."""
    part = seen_by_both(first.box, second.box)
    if min(part[2:]) <= 0:
        return paragraph("The two maps are of different parts of the photo, so there is no difference to show.")
    mine, theirs = relative_map(first, part), relative_map(second, part)
    more, whole, told = mine - theirs, float(np.maximum(mine, theirs).sum()), []
    for line, name, other, alone in (
        ("Orange, full line", first.name, second.name, more.clip(0)),
        ("Blue, dashed line", second.name, first.name, (-more).clip(0)),
    ):
        if alone.max() - alone.min() > ALIKE:
            where = in_words(hottest_part(torch.from_numpy(alone)[None, None], 0.1))
            told.append(
                f"{line}: heat of {name} that {other} lacks, {percent(alone.sum() / whole)}, most of it {where}."
            )
    if whole:
        told.append(f"Heat of both: {percent(np.minimum(mine, theirs).sum() / whole)}.")
    told.append("Each map is divided by its own maximum; lines: where they differ by more than half of it.")
    lines = (*cased("edge", outline(more, 0.5, part)), *cased("spot", outline(-more, 0.5, part)))
    picture = layers(f"Heat of {first.name} minus heat of {second.name}", part, difference_layer(more), lines)
    shown = captioned(picture, "Difference of the two maps", " ".join(told))
    return with_photo(shown, "grey", first.prediction.photo)


def _agreement(first: Answer, second: Answer) -> str:
    if first.model is second.model:
        apart = "They show different places, so the maps are not subtracted." * (first.photo != second.photo)
        return f"One model, one class: the peaks of the two pictures can be compared. {apart}"
    r = likeness(first.attribution, second.attribution).item()
    partly = "" if r > 0.7 else "partly "
    places = f"{partly}look at the same places" if r > 0.3 else "look at different places"
    return (
        f"Agreement of the two maps: r = {r:.2f}; the models {places}. Of two models only the shape of maps can be "
        "compared, not peaks."
    )
