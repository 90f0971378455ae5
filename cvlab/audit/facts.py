"""Simple facts of pictures, such as brightness: does one of them alone tell the classes, or where a model fails?"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cvlab.metrics import wilson_interval
from cvlab.transforms import to_float

LEAVES = 8  # of a decision tree on a single number
GROUP = 0.2  # of the pictures: the lowest and the highest of each fact


def facts_of(views: Tensor) -> dict[str, np.ndarray]:
    """By name a number for each picture (N, 3, S, S) uint8."""
    rows = []
    for some in map(to_float, views.split(256)):
        red, green, blue = some.mean((2, 3)).T
        border = torch.cat([some[..., :3, :].flatten(2), some[..., -3:, :].flatten(2)], 2).mean((1, 2))
        edges = some.diff(dim=2).abs().mean((1, 2, 3)) + some.diff(dim=3).abs().mean((1, 2, 3))
        light = some.mean((1, 2, 3))
        rows.append(torch.stack([light, red - blue, green - light, some.std((1, 2, 3)), edges, border], 1))
    names = "brightness", "red less blue", "green", "contrast", "sharpness", "brightness of the border"
    return dict(zip(names, torch.cat(rows).T.numpy(), strict=True))


def telling(facts: dict[str, np.ndarray], labels: Tensor) -> dict[str, float]:
    """How well each fact alone tells the classes: the balanced accuracy of a small tree on pictures it did not see."""
    from sklearn.model_selection import cross_val_score  # imported here: it takes a second
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_leaf_nodes=max(LEAVES, 2 * len(labels.unique())), class_weight="balanced")
    scored = {"scoring": "balanced_accuracy", "cv": 3}
    return {name: cross_val_score(tree, each[:, None], labels.numpy(), **scored).mean() for name, each in facts.items()}


def weak_groups(facts: dict[str, np.ndarray], right: Tensor) -> Iterator[tuple[str, int, int]]:
    """Groups of pictures that fail more than the rest: what they share, how many were right, and how many there are.

    Args:
        right: whether the model was right, (N,) bool.
    """
    right, number = right.numpy(), max(1, round(GROUP * len(right)))
    for name, each in facts.items():
        order = each.argsort()
        for words, rows in ((f"the least {name}", order[:number]), (f"the most {name}", order[-number:])):
            inside, everywhere = int(right[rows].sum()), int(right.sum())
            rest = wilson_interval(everywhere - inside, len(right) - number)
            if wilson_interval(inside, number)[1] < rest[0]:
                yield words, inside, number
