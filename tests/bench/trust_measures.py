"""How right is a heatmap, where the truth is known? What tests/bench/trust.py measures, with source and known failure.

A heatmap is what a page draws: (H, W), >= 0, at the size of the view. The truth is what each object is worth to the
model's score, found by drawing the scene again without it (`cvlab.data.shapes.scene`). A figure that cannot be given is
NaN, and means leave it out.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository root: cvlab needs no installation

from cvlab.explain import heatmap
from cvlab.models import Stage
from cvlab.trust import hide
from cvlab.trust.hiding import BORDER

MATTERS = 0.25  # of the largest Shapley value: an object that is worth as much matters
CELLS = 4  # a side, of the grid whose cells are hidden one at a time
INFILLS = ("painted from around", "blurred", "mean colour")
GATE = 0.5  # a map passes if its median correlation with that of a network that learned nothing is lower


def shapley(scores: Sequence[float]) -> np.ndarray:
    """What each of K objects is worth: (K,), from the score of the scene with every subset of them, (2**K,).

    Bit i of the index says whether object i is drawn. An object's value is what it adds to the score when it is drawn,
    the mean over all orders of drawing; all values together are the full scene's score less the empty one's.

    Source: Shapley, "A Value for n-Person Games", 1953.
    Known failure: where one of two like objects would do, each is worth half, though neither is needed; an object that
    covers another is also worth what it hides.
    """
    scores = np.asarray(scores, float)
    count = int(np.log2(len(scores)))
    weights = [1.0]  # of a subset of so many others: its size! (count - size - 1)! / count!
    for size in range(1, count):
        weights.append(weights[-1] * size / (count - size))
    subsets = np.arange(len(scores))
    sizes = np.array([subset.bit_count() for subset in subsets.tolist()])
    values = []
    for i in range(count):
        others = subsets[subsets >> i & 1 == 0]
        values.append((np.array(weights)[sizes[others]] * (scores[others | 1 << i] - scores[others])).sum() / count)
    return np.array(values)


def what_matters(objects: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """The pixels (H, W) of the objects (K, H, W) worth at least a quarter of the most important one; maybe none."""
    return objects[(importance > 0) & (importance >= MATTERS * importance.max())].any(0)


def mass(heat: np.ndarray, area: np.ndarray) -> float:
    """The share of a heatmap's evidence that lies on the pixels that matter. By chance it is their share of the view.

    Source: "relevance mass accuracy" of Arras, Osman and Samek, "CLEVR-XAI", 2022.
    Known failure: one hot pixel inside is perfect, so sharp maps do well that miss the second object.
    """
    if not area.any():
        return np.nan
    return float(heat[area].sum() / heat.sum()) if heat.any() else float(area.mean())  # a blank map says nothing


def rank(heat: np.ndarray, area: np.ndarray) -> float:
    """The share that matters of as many hottest pixels as matter. By chance it is the share of the view that matters.

    Of equally hot pixels at the limit as many are counted as on average.

    Source: "relevance rank accuracy" of CLEVR-XAI.
    Known failure: it ignores how hot the rest is, so a map that is nearly the same everywhere can be perfect.
    """
    count = int(area.sum())
    if not count:
        return np.nan
    limit = np.partition(heat.ravel(), -count)[-count]
    above, at = heat > limit, heat == limit
    return float((area[above].sum() + (count - above.sum()) * area[at].mean()) / count)


def ceiling(area: np.ndarray, cells: int, stage: Stage | None) -> np.ndarray:
    """The heatmap of a stage of `cells` x `cells` whose cells hold the share of their place that matters.

    Its mass and rank are what an honest map of this resolution reaches.

    Known failure: it is no strict bound. A map that puts all into the cell that lies best has more mass.
    """
    pooled = F.adaptive_avg_pool2d(torch.from_numpy(area)[None, None].float(), cells)
    return heatmap(pooled, area.shape, stage)[0, 0].numpy()


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation of ranks; 0 where all values of one of them are equal."""
    a, b = (rankdata(each) - (len(each) + 1) / 2 for each in (a, b))
    norms = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norms) if norms else 0.0


def part_deletion(heat: np.ndarray, objects: np.ndarray, importance: np.ndarray, per_pixel: bool = False) -> float:
    """1/2 + 1/2 Spearman(evidence on each object, what it is worth): 1 is the right order.

    Source: "single deletion" of Hesse, Schaub-Meyer and Roth, "FunnyBirds", 2023, with Shapley values for single falls.
    Known failure: evidence is added up over an object's pixels, so large objects look important, and in these scenes
    they are: random maps reach much more than 1/2. With `per_pixel` it is the mean instead, and 1/2 is chance. The
    order among objects that are all worth about nothing counts as much as the others.
    """
    visible = objects.any((1, 2))
    if visible.sum() < 2:
        return np.nan
    sizes = objects.sum((1, 2))[visible] if per_pixel else 1
    return 0.5 + 0.5 * spearman((objects * heat).sum((1, 2))[visible] / sizes, importance[visible])


def single_deletion(heat: np.ndarray, falls: Sequence[float]) -> float:
    """Spearman(evidence in each of 4 x 4 cells, how far the score falls when it is greyed); chance is 0.

    Source: IDSDS of Hesse, Schaub-Meyer and Roth, "Benchmarking the Attribution Quality of Vision Models", 2024.
    Known failure: valid only for a model that was trained on pictures with grey cells (`--erase`): for another one a
    grey cell is an object of its own. Several cells of one object stand in for each other.
    """
    cells = torch.from_numpy(np.ascontiguousarray(heat))[None, None].float()
    return spearman(F.adaptive_avg_pool2d(cells, CELLS).flatten().numpy(), falls)


def mosaic_leak(heat: np.ndarray) -> float:
    """Of a mosaic of 2 x 2 scenes in which only the first can change the score: the evidence in the others; ideal is 0.

    Maps are resized, so a border of an eighth of the mosaic's side along the seams does not count.

    Source: DiFull of Rao, Böhle and Schiele, "Towards Better Understanding Attribution Methods", 2022.
    Known failure: a method may pass and yet point at the wrong object inside the right cell.
    """
    half, border = len(heat) // 2, len(heat) // 8
    kept = heat.copy()
    kept[half - border : half + border] = kept[:, half - border : half + border] = 0
    right, total = kept[:half, :half].sum(), kept.sum()
    return float(max(total - right, 0) / total) if total else np.nan


def gate(correlations: Sequence[float]) -> bool:
    """Whether maps depend on what the network learned: with its weights drawn anew they must not look alike.

    Source: Adebayo et al., "Sanity Checks for Saliency Maps", 2018.
    Known failure: a gate, never a score. Noise is as unlike as a map can be, so being less alike is not being better
    (Binder et al., "Shortcomings of Top-Down Randomization-Based Sanity Checks", 2022).
    """
    return bool(np.nanmedian(correlations) < GATE)


def infill(images: Tensor, regions: Tensor, kind: str) -> Tensor:
    """Images (N, 3, H, W) with regions (N, 1, H, W) bool hidden in one of three ways, with the border of `hide`.

    Source: the question which way to trust is that of AIM (Hsieh, Fang and Wei, 2605.16905, 2026), which judges an
    operator by what it does to random maps. Here the truth is known as well: hiding an object should do what drawing
    the scene without it does, and hiding background nothing.
    Known failure: AIM's own operator, adversarial pictures, is not among the three.
    """
    if kind == INFILLS[0]:
        return hide(images, regions)
    side = images.shape[-1]
    border = -(-side // BORDER)
    grown = F.max_pool2d(regions.float(), 2 * border + 1, 1, border) > 0
    smooth = gaussian_blur(images, 2 * (side // 4) + 1, side / 8) if kind == INFILLS[1] else images.mean((2, 3), True)
    return torch.where(grown, smooth, images)


def interval(values: Sequence[float], resamples: int = 1000) -> tuple[float, float, float]:
    """The mean of a figure over scenes and its 95% interval by bootstrap over scenes; NaN are left out.

    Known failure: it covers the choice of scenes, not that of the trained network.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return np.nan, np.nan, np.nan
    draws = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
