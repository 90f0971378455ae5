"""Predictions for many pictures, their maps and what they say in words, and how alike two maps are."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from cvlab.explain.maps import Explanation, correlation, explain, peak, predict
from cvlab.explain.scores import predicted_classes, predicted_masks, predicted_score, region_score, takes_wrapped
from cvlab.models import Model
from cvlab.tiles import Tiles

BATCH_SIZE = 32  # fixed, so that a model's scores are always the same
MOST_ACTIVATIONS = 2**30  # of a batch of tiles; without gradients few of them are in memory at once


def predict_views(model: Model, views: Tensor) -> Iterator[Tensor]:
    """The logits for many views (N, 3, S, S) uint8: batches of (n, C) or (n, C, S, S), with a progress bar."""
    batches = tqdm(views.split(BATCH_SIZE), "predicting", leave=False)
    return shared(batches, lambda batch: predict(model, batch / 255))


def shared(batches: Iterable, work: Callable) -> Iterator:
    """What `work` makes of each batch, in their order; processes of torchrun take turns, and each gets all results."""
    if not (dist.is_available() and dist.is_initialized()):
        yield from map(work, batches)
        return
    rank, processes = dist.get_rank(), dist.get_world_size()
    for turn in zip_longest(*processes * [iter(batches)]):
        results = processes * [None]
        dist.all_gather_object(results, None if turn[rank] is None else work(turn[rank]))
        yield from results[: sum(batch is not None for batch in turn)]


def predict_photos(
    model: Model, photos: Sequence[Tensor], progress: Callable[[Sequence], Iterable] | None = None
) -> Iterator[Tensor]:
    """The logits of a segmenter for each photo, (1, C, H, W), by overlapping tiles.

    Args:
        photos: (3, H, W) uint8 each, not smaller than the model's view; one of that size is predicted in one piece.
        progress: goes through the batches and shows how many are done; by default a progress bar.
    """
    tiles = Tiles(photos, model.image_size)
    size = max(1, min(BATCH_SIZE, MOST_ACTIVATIONS // max(1, model.activations)))
    progress = progress or partial(tqdm, desc="predicting", leave=False)
    batches = progress([range(len(tiles))[start : start + size] for start in range(0, len(tiles), size)])
    return tiles.join(shared(batches, lambda batch: predict(model, torch.stack([tiles[i] for i in batch]) / 255)))


@takes_wrapped
def explain_predictions(
    model: Model, images: Tensor, stages: Sequence[str] | None = None, methods: Sequence[str] = ("grad_cam",)
) -> Explanation:
    """Maps of each picture's predicted class, of a segmenter for its mask of that class; arguments as in `explain`.

    Score and maps are 0 for a picture in which a segmenter finds nothing.
    """
    if model.task == "classification":
        return explain(model, images, predicted_score(model), stages, methods)

    def score(logits: Tensor) -> Tensor:
        chosen = torch.arange(len(logits)), predicted_classes(model, logits)
        masks = predicted_masks(model, logits)[chosen]
        found = masks.flatten(1).any(1)
        masks[~found] = True  # region_score refuses an empty region; the score is multiplied by 0 instead
        return region_score(masks)(logits[chosen][:, None]) * found

    return explain(model, images, score, stages, methods)


@takes_wrapped
def describe(model: Model, explanation: Explanation) -> list[dict]:
    """A dict for each picture: prediction, score, peak, and of a segmenter the share of the view that the mask covers.

    The prediction is a class name, or None if a segmenter found nothing. The peaks are peak[method][stage].
    """
    logits, scores = explanation.logits, explanation.scores.tolist()
    classes = predicted_classes(model, logits)
    names = [model.class_names[i] for i in classes.tolist()]
    if model.task == "classification":
        lines = [{"prediction": name} for name in names]
    else:
        shares = predicted_masks(model, logits)[torch.arange(len(logits)), classes].float().mean((1, 2)).tolist()
        both = zip(names, shares, strict=True)
        lines = [{"prediction": name if share else None, "share": share} for name, share in both]
    for line, score in zip(lines, scores, strict=True):
        line |= {"score": score, "peak": {method: {} for method in explanation.maps}}
    for method, stages in explanation.maps.items():
        for stage, maps in stages.items():
            for line, value in zip(lines, peak(maps).tolist(), strict=True):
                line["peak"][method][stage] = value
    return lines


def likeness(mine: Tensor, theirs: Tensor) -> Tensor:
    """Pearson's r of two maps (N, 1, h, w) of each picture, at the finer of their resolutions: (N,)."""
    size = [max(sides) for sides in zip(mine.shape[-2:], theirs.shape[-2:], strict=True)]
    return correlation(*(F.interpolate(maps, size, mode="bilinear") for maps in (mine, theirs)))
