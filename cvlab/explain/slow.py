"""Slow second opinions at image size, through Captum: Integrated Gradients and Occlusion.

They ask the model dozens or hundreds of times where `cvlab.explain` asks once, and share none of its assumptions: what
they agree on with a heatmap is not made by the method. The score has to be the same function throughout, so a class or
a region is given (`class_score`, `region_score`); what the model predicts would change on the way.
"""

from collections.abc import Callable

import torch
from captum.attr import IntegratedGradients, Occlusion
from torch import Tensor

from cvlab.explain.hooks import alone_with, differentiable
from cvlab.explain.scores import Score
from cvlab.models import Model

Progress = Callable[[float], None]
GREY = 0.5  # what stands for "nothing there": about the mean of photos, so about 0 after normalisation


def integrated_gradients(
    model: Model,
    images: Tensor,
    score: Score,
    baseline: float | Tensor = GREY,
    steps: int = 50,
    progress: Progress | None = None,
) -> Tensor:
    """The gradient's mean on the way from a baseline to the image, times that way, summed over colours: (N, 1, H, W).

    A map adds up to score(image) - score(baseline), but for the error of so many steps (Sundararajan, Taly and Yan,
    "Axiomatic Attribution for Deep Networks", 2017).

    Args:
        images: (N, 3, H, W) in [0, 1].
        score: logits to (N,).
        baseline: a grey value, or images.
        steps: forward and backward passes; memory is that of one.
        progress: is told the share that is done, up to 1.
    """
    with alone_with(model), differentiable(images) as images:
        # One step at a time, so that the score always meets the N images that it is about.
        method = IntegratedGradients(_counted(model, score, steps, progress))
        parts = method.attribute(images, baseline, n_steps=steps, internal_batch_size=len(images))
    return parts.detach().sum(1, keepdim=True).to(images.dtype)


def occlusion(
    model: Model,
    images: Tensor,
    score: Score,
    window: int,
    stride: int | None = None,
    baseline: float | Tensor = GREY,
    progress: Progress | None = None,
) -> Tensor:
    """How much the score falls where a square window covers the image, the mean over all windows: (N, 1, H, W).

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014. One forward pass a window.

    Args:
        images: (N, 3, H, W) in [0, 1].
        score: logits to (N,).
        window: side in pixels; what is larger than the window cannot be found by it.
        stride: pixels between two windows; by default half of the window.
        baseline: what the window is filled with, a grey value or images.
        progress: is told the share that is done, up to 1.

    Raises:
        ValueError: the window is larger than the image.
    """
    stride = stride or -(-window // 2)
    if window > min(images.shape[-2:]):
        raise ValueError(f"a window of {window} pixels is larger than the image")
    passes = 1
    for side in images.shape[-2:]:
        passes *= -(-(side - window) // stride) + 1
    with alone_with(model), torch.no_grad():
        method = Occlusion(_counted(model, score, passes + 1, progress))
        parts = method.attribute(images, (3, window, window), (3, stride, stride), baseline)
    return parts[:, :1].to(images.dtype)  # the same for every colour: they are covered together


def _counted(model: Model, score: Score, passes: int, progress: Progress | None) -> Score:
    """The score of images, telling `progress` after every forward pass."""
    done = 0

    def score_of(images: Tensor) -> Tensor:
        nonlocal done
        scores = score(model(images))
        done += 1
        if progress:
            progress(min(done / passes, 1.0))
        return scores

    return score_of
