"""Which labels of a data set are probably wrong: a ranked list to look through, never a verdict."""

from collections.abc import Sequence

import torch
from torch import Tensor

FOLDS = 5
STRENGTH = 0.01  # inverse of the regularisation: a weaker one learns wrong labels by heart


def odd_labels(features: Tensor, labels: Sequence[int]) -> list[tuple[int, int]]:
    """Rows whose label a regression that never saw them finds less likely than another one, the oddest first.

    Args:
        features: (N, D) of a trained network, best of one that was trained on other pictures.
        labels: of each row.

    Returns:
        (row, the likelier label) each. Empty where a class has fewer pictures than there are folds.
    """
    from sklearn.linear_model import LogisticRegression  # imported here: it takes a second
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    given = torch.as_tensor(labels)
    if min(torch.bincount(given)[given]) < FOLDS:
        return []
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=500))
    probs = torch.from_numpy(cross_val_predict(model, features.numpy(), given.numpy(), method="predict_proba"))
    likely = given.unique()[probs.argmax(1)]
    own = probs.gather(1, torch.searchsorted(given.unique(), given)[:, None])[:, 0]
    margin = probs.amax(1) - own
    rows = (likely != given).nonzero().flatten()
    rows = rows[margin[rows].argsort(descending=True)]
    return list(zip(rows.tolist(), likely[rows].tolist(), strict=True))
