"""Maps of many pictures: a model's predictions explained batch by batch, described, averaged, compared with another's.

Everything here takes a batch and keeps nothing of it but sums, so memory does not grow with the number of pictures.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain.maps import Explanation, correlation, default_stage, explain, peak
from cvlab.explain.scores import predicted_masks, predicted_score, region_score
from cvlab.models import Model


def explain_predictions(
    model: Model, images: Tensor, stages: Sequence[str] | None = None, methods: Sequence[str] = ("grad_cam",)
) -> Explanation:
    """Maps of each picture's predicted class, or of its predicted mask of the first class.

    Where a segmenter finds nothing, score and maps are 0: one picture without a mask does not stop a batch.

    Args:
        images: (N, 3, S, S) in [0, 1].
        stages, methods: as in `explain`.
    """
    if model.task == "classification":
        return explain(model, images, predicted_score(model), stages, methods)

    def score(logits: Tensor) -> Tensor:
        masks = predicted_masks(model, logits)[:, 0]
        found = masks.flatten(1).any(1)
        masks[~found] = True  # a region has pixels; what comes of these is multiplied by 0
        return region_score(masks)(logits) * found

    return explain(model, images, score, stages, methods)


def describe(model: Model, explanation: Explanation) -> list[dict]:
    """Of each picture: prediction (a class name; None where a segmenter found nothing), share, score, peak.

    The share is that of the picture which the mask covers, of a segmenter only; peaks come by method and stage.
    """
    logits, scores = explanation.logits, explanation.scores.tolist()
    if model.task == "classification":
        lines = [{"prediction": model.class_names[i]} for i in logits.argmax(1).tolist()]
    else:
        shares = predicted_masks(model, logits)[:, 0].float().mean((1, 2)).tolist()
        lines = [{"prediction": model.class_names[0] if share else None, "share": share} for share in shares]
    for line, score in zip(lines, scores, strict=True):
        line |= {"score": score, "peak": {method: {} for method in explanation.maps}}
    for method, stage, maps in every_map(explanation):
        for line, value in zip(lines, peak(maps).tolist(), strict=True):
            line["peak"][method][stage] = value
    return lines


def every_map(explanation: Explanation) -> Iterator[tuple[str, str, Tensor]]:
    """(method, stage, (N, 1, h, w)) of an explanation."""
    for method, stages in explanation.maps.items():
        for stage, maps in stages.items():
            yield method, stage, maps


def compared_stages(model: Model, other: Model, stages: Sequence[str]) -> tuple[str, str]:
    """Where two models are compared: at the first one's default stage, if it is among `stages`, else at their last one.

    Of the other model it is the stage of that name, else its default stage.
    """
    stage = default_stage(model) if default_stage(model) in stages else stages[-1]
    return stage, stage if stage in other.stages else default_stage(other)


def likeness(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """How alike two maps (N, 1, h, w) of each picture are in shape, at the finer of their resolutions: (N,) twice.

    Returns:
        Pearson's r, and the mean absolute difference after each map is divided by its largest absolute value: raw
        values of two models cannot be compared. Equal maps have a difference of exactly 0.
    """
    size = [max(sides) for sides in zip(mine.shape[-2:], theirs.shape[-2:], strict=True)]
    mine, theirs = (F.interpolate(maps, size, mode="bilinear") for maps in (mine, theirs))
    largest = (maps.abs().amax((1, 2, 3), keepdim=True) for maps in (mine, theirs))
    mine, theirs = (maps / torch.where(most > 0, most, 1.0) for maps, most in zip((mine, theirs), largest, strict=True))
    return correlation(mine, theirs), (mine - theirs).abs().mean((1, 2, 3))


class MeanMaps:
    """The mean map of each predicted class, from one batch after the other.

    Attributes:
        counts: (C,) pictures of each class.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self.counts = np.zeros(len(self.class_names), int)
        self._sums: dict[str, np.ndarray] = {}

    def add(self, predictions: Sequence[str | None], maps: dict[str, np.ndarray]) -> None:
        """Adds a batch: the predicted class of each picture, and by any name (N, h, w)."""
        predictions = np.array([self.class_names.index(name) if name else -1 for name in predictions])
        for class_idx in set(predictions.tolist()) - {-1}:
            self.counts[class_idx] += (predictions == class_idx).sum()
            for key, values in maps.items():
                sums = self._sums.setdefault(key, np.zeros((len(self.class_names), *values.shape[1:])))
                sums[class_idx] += values[predictions == class_idx].sum(0, dtype=np.float64)

    def means(self) -> dict[str, np.ndarray]:
        """By the name of the maps (C, h, w) float32; 0 for a class that nothing was predicted to be."""
        counts = np.maximum(self.counts, 1)[:, None, None]
        return {key: (sums / counts).astype(np.float32) for key, sums in self._sums.items()}
