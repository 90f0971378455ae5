"""Is a classifier as often right as it is sure? Guo et al., "On Calibration of Modern Neural Networks", 2017."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor


def reliability(probs: Tensor, labels: Tensor, bins: int = 15) -> np.ndarray:
    """How sure the predictions were and how often right: (bins, 3) of mean confidence, accuracy, number of images.

    Args:
        probs: (N, C), rows adding up to 1.
        labels: (N,).
        bins: of equal width over the confidence of the predicted class; an empty bin is a row of zeros.
    """
    confidence, predicted = probs.double().max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1  # (0, 1/bins] is the first, as in Guo et al.
    count = torch.bincount(index, minlength=bins)
    totals = [
        torch.bincount(index, weights=each, minlength=bins) for each in (confidence, (predicted == labels).double())
    ]
    return torch.stack([total / count.clamp(min=1) for total in totals] + [count], dim=1).numpy()


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over the bins of `reliability`, weighted by their images.

    Guo et al., equation 3.
    """
    confidence, accuracy, count = reliability(probs, labels, bins).T
    return float((count * np.abs(confidence - accuracy)).sum() / count.sum())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T for which softmax(logits / T) has the least cross-entropy on these images (Guo et al., section 4.2).

    Fit it on val: it changes how sure a model says it is, never what it predicts.
    """
    logits = logits.double()
    found = minimize_scalar(
        lambda log_t: F.cross_entropy(logits / math.exp(log_t), labels).item(), bounds=(-3.0, 3.0), method="bounded"
    )
    return math.exp(found.x)
