"""What a visitor asks a model about a picture, and how the answer is drawn: all that a link to the page holds."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from urllib.parse import urlencode

from torch import Tensor

from cvlab.explain import METHODS, Score, against, class_score, default_stage, predicted_classes, region_score, regions
from cvlab.models import Model, mask_levels
from cvlab.page.html import quoted

REGIONS = {  # which pixels a segmenter is asked about: how that is offered, and how it stands in a sentence
    "mask": ("the whole mask", "the whole mask"),
    "part": ("the part of the mask that I click", "the part of the mask at {}"),
    "pixel": ("the pixel that I click", "the pixel at {}"),
    "box": ("a box", "the box"),
    "false positives": ("what was wrongly found (needs the true mask)", "what was wrongly found"),
    "false negatives": ("what was missed (needs the true mask)", "what was missed"),
}
COLORMAPS = ("inferno", "cividis", "gray", "jet")  # all but jet read the same to the colour-blind


@dataclass(frozen=True)
class Question:
    """One question. An empty field stands for the model's own choice: its prediction, its mask, its deepest stage."""

    class_name: str = ""  # the class whose evidence is asked for
    rather_than: str = ""  # a class to compare it with: why the one and not the other?
    against: bool = False  # ask for the evidence against it instead
    stage: str = ""  # a key of model.stages
    method: str = "grad_cam"  # of METHODS
    region: str = "mask"  # of REGIONS; which pixels a segmenter is asked about
    points: str = ""  # "x,y x,y ..." in pixels of the view, for part and pixel (the last), box (the last two)
    threshold: float = 0.0  # of the mask; 0 is the model's own
    colormap: str = COLORMAPS[0]  # of the heatmap over the photo
    opacity: float = 0.7  # of the heatmap

    def __post_init__(self) -> None:
        """Raises a ValueError for values that no widget of the page has: programs and links may send anything."""
        allowed = {"method": METHODS, "region": REGIONS, "colormap": COLORMAPS}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif value is None and field.type is str:  # an empty dropdown
                object.__setattr__(self, field.name, "")
            elif type(value) is not field.type:
                raise ValueError(f"{field.name} is a {field.type.__name__}, not {str(value)[:50]!r}.")
            if field.name in allowed and value not in allowed[field.name]:
                raise ValueError(f"There is no {field.name} {value!r}: choose {', '.join(allowed[field.name])}.")
        if not (math.isfinite(self.threshold) and 0 <= self.threshold < 1 and 0 <= self.opacity <= 1):
            raise ValueError("A threshold and an opacity lie between 0 and 1.")

    @property
    def asked(self) -> tuple:
        """The fields that decide which maps are computed; the others only choose among them and draw them."""
        return self.class_name, self.rather_than, self.against, self.region, self.points, self.threshold

    @property
    def chosen(self) -> dict[str, object]:
        """The fields that are not as usual."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Question, name)}


def settings_of(model: Model, question: Question) -> dict[str, object]:
    """What the widgets show of a question, by its fields, where the model can be asked so."""
    first, other = (name if name in model.class_names else "" for name in (question.class_name, question.rather_than))
    stage = question.stage if question.stage in model.stages else default_stage(model)
    threshold = question.threshold or model.threshold
    return asdict(replace(question, class_name=first, rather_than=other, stage=stage, threshold=threshold))


def to_query(model: str, question: Question, **photo: str) -> str:
    """The query of a link that restores model, question and photo: ?model=...&stage=... Defaults are left out.

    `photo` is the caption of an `example`, or the address of a `photo`; empty ones are left out.
    """
    return "?" + urlencode({"model": model, **{key: each for key, each in photo.items() if each}} | question.chosen)


def from_query(query: Mapping[str, str]) -> Question:
    """The question of a link. Wrong and unknown values are ignored: links of other versions of the page work."""
    question = Question()
    for field in fields(Question):
        try:
            text = query[field.name]
            value = text == "True" if field.type is bool else field.type(text)
            question = replace(question, **{field.name: value})
        except (KeyError, ValueError):
            continue
    return question


def parse_points(text: str) -> list[tuple[int, int]]:
    """The points of "x,y x,y ...".

    Raises:
        ValueError: there is none, or something else.
    """
    points = re.findall(r"(-?\d{1,5})\s*,\s*(-?\d{1,5})", text)
    if not points or re.sub(r"-?\d{1,5}\s*,\s*-?\d{1,5}", "", text).strip(" ;"):
        raise ValueError("Choose a place in the picture, or write it as x,y from the top left, for example 20,30.")
    return [(int(x), int(y)) for x, y in points]


def class_indices(question: Question, model: Model, logits: Tensor) -> tuple[int, int | None]:
    """The class that is asked about, and the one that it is compared with; of one image, (1, C) or (1, C, H, W).

    Raises:
        ValueError: the model does not have it, or both are the same.
    """
    names = model.class_names
    for name in (question.class_name, question.rather_than):
        if name and name not in names:
            raise ValueError(f"The model has no class {quoted(name)}; it has {', '.join(names[:20])}.")
    chosen = names.index(question.class_name) if question.class_name else int(predicted_classes(model, logits))
    other = names.index(question.rather_than) if question.rather_than else None
    if other == chosen:
        raise ValueError(f"Why {quoted(names[chosen])} rather than itself? Choose two different classes.")
    return chosen, other


def settled(
    question: Question, model: Model, logits: Tensor, true_mask: Tensor | None = None
) -> tuple[int, int | None, Tensor | None]:
    """The class, the class that it is compared with, and of a segmenter the region that a question means.

    Args:
        logits: of one image, (1, C) or (1, C, H, W); they decide what the question leaves open.
        true_mask: that of `open_mask` at the view's size, for false positives and false negatives.
    """
    region = region_of(question, model, logits, true_mask) if model.task == "segmentation" else None
    return *class_indices(question, model, logits), region


def score_of(question: Question, model: Model, true_mask: Tensor | None = None) -> Score:
    """The score that a question asks about, of one image, as in `settled`."""
    return lambda logits: settled_score(*settled(question, model, logits, true_mask), question.against)(logits)


def settled_score(class_idx: int, other: int | None, region: Tensor | None, negative: bool) -> Score:
    """The score of a class, or of a class minus another; of a segmenter in a region; `negative` flips the sign."""
    of = class_score if region is None else partial(region_score, region)
    score = of(class_idx) if other is None else lambda logits: of(class_idx)(logits) - of(other)(logits)
    return against(score) if negative else score


def mask_of(question: Question, model: Model, logits: Tensor) -> Tensor:
    """The predicted mask (H, W) of the class that is asked about, at the question's threshold."""
    chosen, _ = class_indices(question, model, logits)
    return mask_levels(model, logits.detach())[0, chosen] > (question.threshold or model.threshold)


def region_of(question: Question, model: Model, logits: Tensor, true_mask: Tensor | None = None) -> Tensor:
    """The pixels (H, W) that a question asks a segmenter about.

    Raises:
        ValueError: there is no such pixel, or the true mask is needed and was not given.
    """
    mask = mask_of(question, model, logits)
    if question.region == "mask":
        return regions.whole(mask)
    if question.region.startswith("false"):
        if true_mask is None:
            raise ValueError("Upload the true mask first: errors are found by comparing with it.")
        compare = regions.false_positives if question.region == "false positives" else regions.false_negatives
        chosen, _ = class_indices(question, model, logits)
        return compare(mask & true_mask.any(0), true_mask[1 + chosen - model.first_object])
    points, size = parse_points(question.points), mask.shape
    if question.region == "part":
        return regions.component(mask, *points[-1])
    if question.region == "pixel":
        return regions.pixel(size, *points[-1])
    if len(points) < 2:
        raise ValueError("A box has two corners: choose the other one too.")
    return regions.box(size, *points[-2:])


def region_words(question: Question) -> str:
    """The region in words, to stand in a sentence."""
    at = question.points.split() or ["?"]
    return REGIONS[question.region][1].format(at[-1])


def picked(question: Question, model: Model, logits: Tensor, points: list) -> Question:
    """The question after a click (one point) or a drag (from the first point to the last) in the picture.

    Where no box was chosen, a click on a mask asks about that part of it, a click elsewhere about the pixel, and a drag
    about a box. A click on the mask of a class asks about this class; where masks overlap, about the one with the
    highest level.
    """
    side, first = logits.shape[-1], model.first_object
    points = [(min(max(int(x), 0), side - 1), min(max(int(y), 0), side - 1)) for x, y in (points[0], points[-1])]
    dragged = math.dist(*points) > side / 50
    region = question.region
    if region != "box":
        level, index = mask_levels(model, logits.detach())[0, first:, points[0][1], points[0][0]].max(0)
        region = "box" if dragged else "part" if level > (question.threshold or model.threshold) else "pixel"
        if region == "part":
            name = model.class_names[first + index]
            rather_than = question.rather_than if question.rather_than != name else ""
            question = replace(question, class_name=name, rather_than=rather_than)
    if not dragged:  # two taps make a box
        before = parse_points(question.points) if region == "box" and question.points else []
        points = before[-1:] + points[:1]
    return replace(question, region=region, points=" ".join(f"{x},{y}" for x, y in points))
