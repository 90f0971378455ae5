"""What the page and its API answer for a photo: a prediction, the maps of a question, and what they are worth."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cvlab.explain import METHODS, correlation, default_stage, explain, peak, predict, predicted_masks
from cvlab.explain.paths import contributions
from cvlab.explain.slow import integrated_gradients, occlusion
from cvlab.metrics import SegmentationScores, segmentation_counts, segmentation_scores
from cvlab.models import Model
from cvlab.models.unet import UNet
from cvlab.page.question import SLOW_METHODS, Question, class_indices, mask_of, region_of, score_of, settled_score
from cvlab.render import mask_overlay
from cvlab.transforms import open_image, resize_logits, view, whole_mask
from cvlab.trust.diagnosis import diagnose

MOST_SIDE = 1024  # pixels of a displayed photo
WHOLE = "the whole picture"  # where a map stands that belongs to no stage
OCCLUSION_PARTS = 8  # windows beside each other in a view; half overlapping
GRADIENT_STEPS = 32


@dataclass(frozen=True)
class Evidence:
    """The maps that answer a question about one image.

    Attributes:
        logits: (1, C) or (1, C, H, W).
        score: what was explained.
        maps: maps[method][stage], signed (1, 1, h, w); the stage of a slow method is WHOLE.
        class_idx: the class that was asked about.
        other: the class that it was held against, or None.
        region: of a segmenter, (H, W) bool.
    """

    logits: Tensor
    score: float
    maps: dict[str, dict[str, Tensor]]
    class_idx: int
    other: int | None = None
    region: Tensor | None = None


@dataclass(frozen=True)
class Ways:
    """Which way a segmenter's answer came.

    Attributes:
        dependence: by method and stage Pearson's r between the map of the region and that of everything else; empty
            where the region is the whole picture.
        parts: what each way through a U-Net of cvlab added to the score, signed; empty of other networks.
    """

    dependence: dict[str, dict[str, float]]
    parts: dict[str, float]


@dataclass(frozen=True)
class Seen:
    """A photo as a model sees it, and what it says of it.

    Attributes:
        images: (1, 3, S, S) in [0, 1].
        logits: (1, C) or (1, C, S, S).
        shares: by class name a classifier's probability, or the share of the photo that a segmenter's mask covers.
        mask: the photo with a segmenter's mask; None of a classifier.
        sentence: on that mask.
        size: of the photo, (height, width).
        notes: what was done to open the photo.
        evidence: the answer to `Question()`, where there is one.
    """

    images: Tensor
    logits: Tensor
    shares: dict[str, float]
    mask: Image.Image | None
    sentence: str
    size: tuple[int, int]
    notes: list[str] = field(default_factory=list)
    evidence: Evidence | None = None

    @property
    def bytes(self) -> int:
        """Memory that it takes, nearly all of it."""
        picture = self.mask.width * self.mask.height * 3 if self.mask else 0
        return picture + size_of(self.evidence) + 4 * (self.images.numel() + self.logits.numel())


def size_of(evidence: Evidence | None) -> int:
    """Bytes of the maps of a question."""
    if evidence is None:
        return 0
    maps = [attribution for stages in evidence.maps.values() for attribution in stages.values()]
    return 4 * sum(each.numel() for each in (evidence.logits, *maps))


def see(image: Image.Image, model: Model) -> Seen:
    """A photo through a model's eyes, with the evidence for what it says: one forward and one backward pass."""
    images = view(image, model)
    try:
        evidence = evidence_for(images, model, Question())
        logits = evidence.logits
    except ValueError:  # no pixel was found, so there is nothing to explain
        evidence, logits = None, predict(model, images)
    size, notes = (image.height, image.width), image.info.get("notes", [])
    if model.task == "classification":
        shares = dict(zip(model.class_names, logits.softmax(1)[0].tolist(), strict=True))
        return Seen(images, logits, shares, None, "", size, notes, evidence)
    photo = image.copy()
    photo.thumbnail((MOST_SIDE, MOST_SIDE))
    masks = predicted_masks(model, resize_logits(logits, size))[0]
    shown = predicted_masks(model, resize_logits(logits, (photo.height, photo.width)))[0].any(0)
    shares = {name: mask.float().mean().item() for name, mask in zip(model.class_names, masks, strict=True)}
    pixels, total = int(masks.any(0).sum()), image.width * image.height
    sentence = f"The mask covers {pixels:,} of {total:,} pixels ({pixels / total:.1%}), threshold {model.threshold:g}."
    if pixels == 0:
        sentence = f"No pixel reaches the threshold of {model.threshold:g}: the model finds nothing here."
    return Seen(images, logits, shares, mask_overlay(photo, shown.numpy()), sentence, size, notes, evidence)


def evidence_for(
    images: Tensor,
    model: Model,
    question: Question,
    true_mask: Tensor | None = None,
    progress: Callable[[float], None] | None = None,
) -> Evidence:
    """The maps of a question: of a classifier at its stage, of a segmenter at every stage; Grad-CAM and HiResCAM.

    Args:
        images: one image, (1, 3, S, S) in [0, 1].
        true_mask: (S, S) bool, for false positives and false negatives.
        progress: of a slow method, told the share that is done.

    Raises:
        ValueError: a class or stage that the model does not have, or a region without a pixel.
    """
    if question.method not in SLOW_METHODS:
        stages = [question.stage or default_stage(model)] if model.task == "classification" else None
        explanation = explain(model, images, score_of(question, model, true_mask), stages, tuple(METHODS))
        settled = _settled(question, model, explanation.logits, true_mask)
        return Evidence(explanation.logits, explanation.scores.item(), explanation.maps, *settled)
    logits = predict(model, images)
    # Settled by the whole picture: with parts of it hidden the model may see another class or mask.
    settled = _settled(question, model, logits, true_mask)
    score = settled_score(*settled, question.against)
    if question.method == "occlusion":
        attribution = occlusion(model, images, score, max(1, images.shape[-1] // OCCLUSION_PARTS), progress=progress)
    else:
        attribution = integrated_gradients(model, images, score, steps=GRADIENT_STEPS, progress=progress)
    return Evidence(logits, score(logits).item(), {question.method: {WHOLE: attribution}}, *settled)


def _settled(
    question: Question, model: Model, logits: Tensor, true_mask: Tensor | None
) -> tuple[int, int | None, Tensor | None]:
    """The class, the other class and the region that a question means where these are the logits."""
    region = region_of(question, model, logits, true_mask) if model.task == "segmentation" else None
    return *class_indices(question, model, logits), region


def map_of(evidence: Evidence, model: Model, question: Question) -> tuple[str, Tensor]:
    """The stage and the map that a question asks to see."""
    stages = evidence.maps[question.method]
    stage = WHOLE if WHOLE in stages else question.stage or default_stage(model)
    if stage not in stages:
        raise ValueError(f"The model has no stage {stage!r}; it has {', '.join(model.stages)}.")
    return stage, stages[stage]


def peak_of(attribution: Tensor, method: str = "grad_cam") -> float:
    """The largest evidence of a map in units of the score.

    Of occlusion it is what the score falls by; of the others `cvlab.explain.peak`.
    """
    return attribution.max().relu().item() if method == "occlusion" else peak(attribution).item()


def worth_of(attribution: Tensor, evidence: Evidence, question: Question) -> str:
    """What there is to know before a map is believed, in a sentence; empty where there is nothing to warn of."""
    if question.method in SLOW_METHODS:
        return "" if attribution.max() > 0 else "Blank: all evidence speaks against the score."
    plain = evidence.other is None and not question.against
    return diagnose(attribution, evidence.logits if plain else None, evidence.class_idx)


def ways_of(images: Tensor, model: Model, evidence: Evidence, against: bool) -> Ways:
    """How far a segmenter's maps depend on the region, and what each way through it added; two more passes."""
    dependence = {}
    if not evidence.region.all():
        elsewhere = settled_score(evidence.class_idx, evidence.other, ~evidence.region, against)
        others = explain(model, images, elsewhere, None, tuple(METHODS)).maps
        dependence = {
            method: {stage: correlation(each, others[method][stage]).item() for stage, each in stages.items()}
            for method, stages in evidence.maps.items()
        }
    if not isinstance(model, UNet):
        return Ways(dependence, {})
    score = settled_score(evidence.class_idx, evidence.other, evidence.region, against)
    parts = contributions(model, images, score)
    return Ways(dependence, {name: value.item() for name, value in parts.parts.items()})


def open_mask(file: object, model: Model, class_idx: int, size: tuple[int, int]) -> Tensor:
    """The true mask of a class for a photo of `size` (height, width), (H, W) bool at its own resolution.

    White (or 1) is the class; of several classes the values may be their numbers, counted from 1.

    Raises:
        ValueError: no picture, or of another shape than the photo.
    """
    values = np.asarray(open_image(file)).max(2)
    height, width = values.shape
    if abs(width / height - size[1] / size[0]) > 0.02 * size[1] / size[0]:
        raise ValueError(f"The mask is {width} x {height} pixels and the photo {size[1]} x {size[0]}: another shape.")
    numbered = values.max() <= len(model.class_names)
    return torch.from_numpy(values == class_idx + 1 if numbered else values > values.max() / 2)


def in_view(mask: Tensor, model: Model) -> Tensor:
    """A mask (H, W) of a photo as the model sees it, (S, S)."""
    return whole_mask(mask[None], model.image_size)[0]


def scores_of(logits: Tensor, model: Model, question: Question, true_mask: Tensor) -> SegmentationScores:
    """iou and the like of the class that is asked about, at the true mask's own resolution (H, W)."""
    predicted = mask_of(question, model, resize_logits(logits, true_mask.shape))
    return segmentation_scores(segmentation_counts(predicted[None, None], true_mask[None, None]))
