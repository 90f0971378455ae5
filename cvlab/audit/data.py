"""What pictures and labels say without a model: does brightness alone tell the classes? Which label is odd?

scikit-learn is imported where it is used: it takes a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from cvlab.metrics import normal_interval
from cvlab.transforms import FORMATS, to_float

LEAVES = 8  # of a decision tree on a single number
FOLDS = 5
STRENGTH = 0.001  # inverse of the regularisation: a weaker one learns wrong labels by heart
AT_HALF = 898  # sum of the 32 smallest numbers of the table of brightness at JPEG quality 50 (ITU T.81, table K.1)
TAIL, FEWEST, MOST_GROUPS = 0.2, 10, 3  # share of val in a group; pictures in and out of it; groups tried on test


def facts_of(views: Tensor, samples: Sequence = ()) -> dict[str, Tensor]:
    """Simple facts by name, a number for each picture (N, 3, S, S) uint8; for samples (path, ...) also of the files."""
    rows = []
    for some in map(to_float, views.split(256)):
        red, green, blue = some.mean((2, 3)).T
        border = torch.cat([some[..., :3, :].flatten(2), some[..., -3:, :].flatten(2)], 2).mean((1, 2))
        edges = some.diff(dim=2).abs().mean((1, 2, 3)) + some.diff(dim=3).abs().mean((1, 2, 3))
        light = some.mean((1, 2, 3))
        rows.append(torch.stack([light, red - blue, green - light, some.std((1, 2, 3)), edges, border], 1))
    names = "brightness", "red less blue", "green", "contrast", "sharpness", "brightness of the border"
    facts = dict(zip(names, torch.cat(rows).T, strict=True))
    if samples and isinstance(samples[0], tuple):
        names = "width", "height", "width by height", "JPEG quality", "has EXIF", "bytes by pixel"
        facts |= zip(names, torch.tensor([_of_file(sample[0]) for sample in samples]).T, strict=True)
    return facts


def _of_file(path: Path) -> tuple[float, ...]:
    """What the head of a picture's file tells; the quality is that at which libjpeg takes such a table, else 100."""
    with Image.open(path, formats=FORMATS) as image:
        (width, height), exif = image.size, "exif" in image.info
        table = next(iter(image.quantization.values())) if isinstance(image, JpegImageFile) else [0]
    scale = 100 * sum(sorted(table)[:32]) / AT_HALF  # the largest are cut at 255
    quality = 100 - scale / 2 if scale <= 100 else 5000 / scale
    return float(width), height, width / height, quality, exif, path.stat().st_size / (width * height)


def telling(facts: dict[str, Tensor], labels: Tensor) -> dict[str, float]:
    """How well each fact alone tells the classes: the balanced accuracy of a small tree on pictures it did not see."""
    from sklearn.model_selection import cross_val_score
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_leaf_nodes=max(LEAVES, 2 * len(labels.unique())), class_weight="balanced")
    scored = {"scoring": "balanced_accuracy", "cv": 3}
    differ = {name: each for name, each in facts.items() if each.min() < each.max()}
    return {name: cross_val_score(tree, each[:, None], labels, **scored).mean() for name, each in differ.items()}


def weak_groups(facts: Mapping[str, Mapping[str, Tensor]], errors: Mapping[str, Tensor]) -> list[dict]:
    """Groups of pictures that fail more than the rest, and the fact that they share.

    A group is the fifth with the lowest or the highest values of a fact (N,), chosen on val. It is told if its errors
    (N,), wrong or 1 - iou, are more in test too, with bounds of 95% for all that were tried (Bonferroni).
    """
    groups, chosen = [], []
    for name, values in facts["val"].items():
        for side, sign in (("at most", -1), ("at least", 1)):
            bound = (sign * values).quantile(1 - TAIL).item()
            inside, in_test = sign * values >= bound, sign * facts["test"][name] >= bound
            if min(group.sum() for group in (inside, ~inside, in_test, ~in_test)) >= FEWEST:
                told = {"fact": name, "side": side, "bound": sign * bound, "n": int(in_test.sum())}
                groups.append((_more(errors["val"], inside, 1)["low"], inside, in_test, told))
    for low, inside, in_test, told in sorted(groups, key=lambda group: -group[0]):
        # Facts go together: what is mostly the same pictures is tried once.
        differs = all((inside & other).sum() < 0.5 * (inside | other).sum() for other, _, _ in chosen)
        if low > 0 and differs and len(chosen) < MOST_GROUPS:
            chosen.append((inside, in_test, told))
    for _, in_test, told in chosen:
        told |= {"error": errors["test"][in_test].mean().item(), "rest": errors["test"][~in_test].mean().item()}
        told["more"] = _more(errors["test"], in_test, len(chosen))
    return [told for _, _, told in chosen if told["more"]["low"] > 0]


def _more(errors: Tensor, inside: Tensor, tried: int) -> dict[str, float]:
    """The mean error inside less that of the rest, and its bounds by Welch's standard error."""
    own, rest = errors[inside], errors[~inside]
    spread = own.var() / len(own) + rest.var() / len(rest)
    return normal_interval((own.mean() - rest.mean()).item(), spread.sqrt().item(), tried)


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
