"""Answers with a promise: a set of classes that holds the true one, two outlines that an object lies between.

Both are fitted on val, and hold for photos like those, on average: of a hundred photos, at least 95. (Vovk, Gammerman
and Shafer, "Algorithmic Learning in a Random World", 2005; for masks Angelopoulos et al., "Conformal Risk Control",
2024.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

COVERAGE = 0.95
LEVELS = torch.linspace(-7, 7, 57, dtype=torch.float64).sigmoid().tolist()  # thresholds that are tried for outlines


def set_threshold(probs: Tensor, labels: Tensor, coverage: float = COVERAGE) -> float:
    """The lowest probability of the classes in a set, so that it holds the true class with `coverage`.

    Args:
        probs: (N, C) of pictures that the model was not trained on, as `cvlab.models.probabilities` gives them.
        labels: (N,).

    Raises:
        ValueError: there are too few pictures for the promise; the message says how many it takes.
    """
    left_out = int((1 - coverage) * (len(labels) + 1) + 1e-9)
    if left_out < 1:
        fewest = round(1 / (1 - coverage)) - 1
        raise ValueError(f"Val has {len(labels)} pictures: {coverage:.0%} can be promised from {fewest} on.")
    true = probs.gather(1, labels[:, None])[:, 0]
    return true.sort().values[left_out - 1].item()


def class_set(probs: Sequence[float], threshold: float) -> list[int]:
    """The classes of one picture whose probability reaches the threshold, the likeliest first; at least that one."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    return [i for i in order if probs[i] >= threshold] or order[:1]


def outline_thresholds(counts: Sequence[Tensor], coverage: float = COVERAGE) -> tuple[float | None, float | None]:
    """Thresholds of a sure core, of which `coverage` is object, and of a rim that holds `coverage` of the object.

    Both shares are means over pictures, and the core lies in the rim. None where no level can promise it, or val has
    fewer than 19 pictures.

    Args:
        counts: for each of `LEVELS` the sum over classes of `cvlab.metrics.class_counts`, (N, 4).
    """
    tp, fp, fn, _ = torch.stack(list(counts)).double().unbind(-1)  # (levels, N) each
    false = torch.where(tp + fp > 0, fp / (tp + fp), 0)  # of the core, what is no object
    false = false.flip(0).cummax(0).values.flip(0)  # no level counts as better than a higher one
    missed = torch.where(tp + fn > 0, fn / (tp + fn), 0)  # of the object, what lies outside the rim
    core, rim = ((each.sum(1) + 1) / (each.shape[1] + 1) <= 1 - coverage + 1e-9 for each in (false, missed))
    found = [level for level, holds in zip(LEVELS, core.tolist(), strict=True) if holds]
    held = [level for level, holds in zip(LEVELS, rim.tolist(), strict=True) if holds]
    return min((level for level in found if level >= max(held, default=0)), default=None), max(held, default=None)
