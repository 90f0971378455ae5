"""What pictures and labels say without a model: does brightness alone tell the classes? Which label is odd?

scikit-learn is imported where it is used: it takes a second.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cvlab.transforms import to_float

LEAVES = 8  # of a decision tree on a single number
FOLDS = 5
STRENGTH = 0.001  # inverse of the regularisation: a weaker one learns wrong labels by heart


def facts_of(views: Tensor) -> dict[str, Tensor]:
    """Simple facts by name, a number for each picture (N, 3, S, S) uint8."""
    rows = []
    for some in map(to_float, views.split(256)):
        red, green, blue = some.mean((2, 3)).T
        border = torch.cat([some[..., :3, :].flatten(2), some[..., -3:, :].flatten(2)], 2).mean((1, 2))
        edges = some.diff(dim=2).abs().mean((1, 2, 3)) + some.diff(dim=3).abs().mean((1, 2, 3))
        light = some.mean((1, 2, 3))
        rows.append(torch.stack([light, red - blue, green - light, some.std((1, 2, 3)), edges, border], 1))
    names = "brightness", "red less blue", "green", "contrast", "sharpness", "brightness of the border"
    return dict(zip(names, torch.cat(rows).T, strict=True))


def telling(facts: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """How well each fact alone tells the classes: the balanced accuracy of a small tree on pictures it did not see."""
    from sklearn.model_selection import cross_val_score
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_leaf_nodes=max(LEAVES, 2 * len(labels.unique())), class_weight="balanced")
    scored = {"scoring": "balanced_accuracy", "cv": 3}
    return {name: cross_val_score(tree, each[:, None], labels, **scored).mean() for name, each in facts.items()}


def odd_labels(features: Tensor, labels: Sequence[int]) -> list[tuple[int, int]]:
    """Rows whose label a regression that never saw them finds less likely than another one, the oddest first.

    A ranked list to look through, never a verdict.

    Args:
        features: (N, D) of a network, best of one that was trained on other pictures.
        labels: of each row.

    Returns:
        (row, the likelier label) each. Empty where a class has fewer pictures than there are folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, given = torch.unique(torch.as_tensor(labels), return_inverse=True)
    if torch.bincount(given).min() < FOLDS:
        return []
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=500))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    probs = torch.from_numpy(cross_val_predict(model, features, given, cv=folds, method="predict_proba"))
    order = probs.gather(1, given[:, None])[:, 0].argsort()
    likely = probs.argmax(1)
    return [(row, int(known[likely[row]])) for row in order.tolist() if likely[row] != given[row]]
