"""What the page computes for a photo: the prediction, the maps that explain it, and how they depend on the question."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from PIL import Image
from torch import Tensor

from cvlab.data.masks import read_mask
from cvlab.explain import METHODS, default_stage, explain, predict, predicted_masks
from cvlab.explain.hooks import LARGEST
from cvlab.explain.many import predict_photos
from cvlab.explain.paths import contributions, region_dependence
from cvlab.models import Model, probabilities
from cvlab.models.model import TILES
from cvlab.page.picture import MAX_SIDE
from cvlab.page.question import Question, parse_points, region_of, score_of, settled, settled_score
from cvlab.render import picture_url
from cvlab.tiles import Tiles, starts, weights, window
from cvlab.transforms import WHOLE, Box, large_view, resize_logits, resize_mask, seen_part, to_uint8, view
from cvlab.trust import familiarity
from cvlab.trust.conformal import class_set
from cvlab.trust.familiarity import features, nearest

MOST_PIXELS = 24 * 2**20  # of the tiles of a photo
MOST_LOGITS = 64 * 2**20  # of a photo, of all classes together


@dataclass(frozen=True)
class Evidence:
    """The maps that answer a question about one image."""

    logits: Tensor  # (1, C) or (1, C, H, W)
    score: float  # what was explained
    maps: dict[str, dict[str, Tensor]]  # maps[method][stage], signed (1, 1, h, w)
    class_idx: int  # the class that was asked about
    images: Tensor  # the view that was explained, (1, 3, S, S) in [0, 1]
    box: Box  # where it lies in the photo
    points: str  # those of the question, in pixels of the view
    other: int | None = None  # the class that it was compared with
    region: Tensor | None = None  # of a segmenter, (H, W) bool

    @property
    def nbytes(self) -> int:
        """Memory that the tensors take."""
        maps = [attribution for stages in self.maps.values() for attribution in stages.values()]
        return sum(each.nbytes for each in (self.logits, *maps))


@dataclass(frozen=True)
class Paths:
    """How a segmenter came to its answer."""

    # By method and stage Pearson's r between the map of the region and that of everything else; empty where the region
    # is the whole picture.
    dependence: dict[str, dict[str, float]]
    # What each path through a U-Net added to the score, signed; empty for other networks.
    contributions: dict[str, float]


@dataclass(frozen=True)
class Prediction:
    """What a model sees in a photo."""

    images: Tensor  # the view of the model, (1, 3, S, S) in [0, 1]
    logits: Tensor  # (1, C), or (1, C, K, K) of the whole photo, where K is S, or of tiles up to MAX_SIDE
    large: Tensor | None  # the photo where it is seen in several tiles, (3, H, W) uint8
    shares: dict[str, float]  # by class a probability, or of each object the share of the view in its mask
    photo: str  # made smaller, as CSS for the layers over it
    size: tuple[int, int]  # of the photo as it was opened, (height, width)
    seconds: float  # that the pass took
    notes: list[str] = field(default_factory=list)  # what was done to open the photo
    evidence: Evidence | None = None  # None where nothing was found
    familiar: float | None = None  # `cvlab.trust.familiarity`; None for a model without statistics
    names: list[str] | None = None  # classes that hold the true one with 95%, the likeliest first; None if not promised
    # `cvlab.trust.familiarity.nearest`; empty for a model that keeps nothing for it.
    alike: list[tuple[str, float]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Memory of nearly all of it."""
        maps = self.evidence.nbytes if self.evidence else 0
        large = 0 if self.large is None else self.large.nbytes
        return len(self.photo) + maps + self.images.nbytes + self.logits.nbytes + large


def predict_photo(
    image: Image.Image,
    model: Model,
    question: Question | None = None,
    side: int = MAX_SIDE,
    progress: Callable[[Sequence], Iterable] = iter,
) -> Prediction:
    """The prediction for a photo and the evidence for it, in one forward and one backward pass; of tiles in more.

    Args:
        image: it is made smaller in place, as a copy of a large one takes 240 MB.
        question: what the evidence answers, by default `Question()`.
        side: pixels of the photo that is kept.
        progress: of tiles, see `predict_photos`.
    """
    size, notes, asked = (image.height, image.width), image.info.get("notes", []), question or Question()
    images, large, logits = view(image, model), None, None
    if model.crop_mode == TILES and max(size) > model.image_size:
        large = to_uint8(few_tiles(image, model, notes))
        (whole,) = predict_photos(model, [large], progress)
        logits = resize_logits(whole, 2 * [min(MAX_SIDE, max(whole.shape[-2:]))])
    begun = time.perf_counter()
    try:
        if large is None:
            evidence = evidence_for(images, model, asked, box=seen_part(model, size))
        else:
            evidence = evidence_in_tile(large, logits, model, asked)
        logits = evidence.logits if logits is None else logits
    except ValueError:
        evidence, logits = None, predict(model, images) if logits is None else logits
        found = model.task == "classification" or predicted_masks(model, logits)[0, model.first_object :].any()
        if found and large is None:
            raise  # else no pixel was found, or none in the tile, so there is nothing to explain
    seconds = time.perf_counter() - begun
    if model.task == "classification":
        values = probabilities(model, logits)[0]
    else:
        values = predicted_masks(model, logits)[0, model.first_object :].float().mean((1, 2))
    shares = dict(zip(model.class_names[model.first_object :], values.tolist(), strict=True))
    image = image.convert("RGB") if model.channels else image
    image.thumbnail((side, side))
    style = f"--photo:url({picture_url(image)});--ratio:{size[1] / size[0]:.4f}"
    known, alike = None, []
    if model.statistics:
        found = features(model, images)
        known = familiarity(model, images, found).item()
        alike = nearest(model, images, found) if "rows" in model.statistics else []
    names = None
    if model.task == "classification" and "set_threshold" in model.config:
        names = [model.class_names[i] for i in class_set(values.tolist(), model.config["set_threshold"])]
    return Prediction(images, logits, large, shares, style, size, seconds, notes, evidence, known, names, alike)


def few_tiles(image: Image.Image, model: Model, notes: list[str]) -> Image.Image:
    """The `large_view` of a photo. One that takes too many tiles or logits is made smaller first, as `notes` say."""
    side, large = model.image_size, large_view(image, model.image_size)

    def allowed() -> float:
        """The share of the pixels that can be looked at."""
        tiles, logits = math.prod(len(starts(length, side)) for length in large.size), math.prod(large.size)
        return min(MOST_PIXELS / (tiles * side**2), MOST_LOGITS / (logits * len(model.class_names)))

    while (share := allowed()) < 1:
        large = large_view(large.resize([math.floor(length * share**0.5) for length in large.size]), side)
    if large.width < image.width or large.height < image.height:
        notes.append(f"Looked at in tiles of {side} pixels, at {large.width} x {large.height} pixels.")
    return large


def mask_size(model: Model, size: tuple[int, int]) -> list[int]:
    """That of a photo (height, width), or smaller where masks of all classes would have more than MOST_LOGITS."""
    most = MOST_LOGITS // len(model.class_names)  # pixels; of a line of them, too
    share = min(1.0, (most / math.prod(size)) ** 0.5)
    return [max(1, min(most, int(side * share))) for side in size]


def evidence_of(prediction: Prediction, model: Model, question: Question, true_mask: Tensor | None = None) -> Evidence:
    """The evidence for what a question asks about a photo: `evidence_for` its view, or `evidence_in_tile`.

    `true_mask` is that of `open_mask` at the size of the prediction's logits.
    """
    if prediction.large is not None:
        return evidence_in_tile(prediction.large, prediction.logits, model, question, true_mask)
    return evidence_for(prediction.images, model, question, true_mask, seen_part(model, prediction.size))


def evidence_in_tile(
    large: Tensor, logits: Tensor, model: Model, question: Question, true_mask: Tensor | None = None
) -> Evidence:
    """The evidence in the tile that holds most of what a question is about, as far from its edges as possible.

    Args:
        large: the photo, (3, H, W) uint8.
        logits: of the whole photo, (1, C, K, K).
        true_mask: as in `evidence_for`, at K x K pixels.
    """
    side, (height, width), tiles = model.image_size, large.shape[1:], Tiles([large], model.image_size)
    region = resize_mask(region_of(question, model, logits, true_mask)[None], (height, width))[0]
    middle = weights(side)
    _, top, left = max(tiles.places, key=lambda place: (window(region, *place[1:], side) * middle).sum().item())
    if true_mask is not None:
        true_mask = window(resize_mask(true_mask, (height, width)), top, left, side)
    if question.region in ("part", "pixel", "box"):
        by_x, by_y = width / logits.shape[-1], height / logits.shape[-1]
        points = [(int((x + 0.5) * by_x) - left, int((y + 0.5) * by_y) - top) for x, y in parse_points(question.points)]
        inside = [[min(max(place, 0), side - 1) for place in point] for point in points]
        question = replace(question, points=" ".join(f"{x},{y}" for x, y in inside))
    images, box = window(large, top, left, side)[None] / 255, (left / width, top / height, side / width, side / height)
    return evidence_for(images, model, question, true_mask, box)


def evidence_for(
    images: Tensor, model: Model, question: Question, true_mask: Tensor | None = None, box: Box = WHOLE
) -> Evidence:
    """The maps of a question: of a classifier at its stage, of a segmenter at every stage; Grad-CAM and HiResCAM.

    Args:
        images: one image, (1, 3, S, S) in [0, 1].
        true_mask: that of `open_mask` at the view's size, for false positives and false negatives.
        box: where the image lies in the photo.

    Raises:
        ValueError: a class or stage that the model does not have, or a region without a pixel.
    """
    stages = [question.stage or default_stage(model)] if model.task == "classification" else None
    found = explain(model, images, score_of(question, model, true_mask), stages, tuple(METHODS))
    if not all((each.abs() < LARGEST).all() for maps in found.maps.values() for each in maps.values()):
        raise ValueError("the maps of this model are not finite: its weights are damaged")
    class_idx, other, region = settled(question, model, found.logits, true_mask)
    seen = images, box, question.points
    return Evidence(found.logits, found.scores.item(), found.maps, class_idx, *seen, other, region)


def paths_of(model: Model, evidence: Evidence, against: bool) -> Paths:
    """How far a segmenter's maps depend on the region, and what each path through it added; two more passes."""
    dependence, parts = {}, {}
    score_in = partial(settled_score, evidence.class_idx, evidence.other, negative=against)
    if not evidence.region.all():
        found = region_dependence(model, evidence.images, evidence.maps, score_in(~evidence.region))
        dependence = {method: {stage: r.item() for stage, r in each.items()} for method, each in found.items()}
    if hasattr(model, "cuts"):
        parts = contributions(model, evidence.images, score_in(evidence.region))
    return Paths(dependence, {name: value.item() for name, value in parts.items()})


def open_mask(file: str, model: Model, size: tuple[int, int]) -> Tensor:
    """The true mask for a photo of `size` (height, width): (1 + objects, H, W) bool at its own size or `mask_size`.

    It is read as the trainers read masks. First comes the background, then each object of the model. A pixel that is
    not scored is in none. White of a black and white mask is in all objects, as it shows the one that is asked about.

    Raises:
        ValueError: no mask, not clear what its values mean, or of another shape than the photo.
    """
    objects = len(model.class_names) - model.first_object
    # White is read as a class beyond the last one, which leaves it in no channel.
    masks = read_mask(file, objects, white=objects, background=True, ignore=255 if model.exclusive else None)
    if not masks[1:].any():
        masks[1:] = ~masks[0]
    height, width = masks.shape[1:]
    if abs(width / height - size[1] / size[0]) > 0.02 * size[1] / size[0]:
        raise ValueError(f"The mask is {width} x {height} pixels and the photo {size[1]} x {size[0]}: another shape.")
    return resize_mask(masks, mask_size(model, (height, width)))
