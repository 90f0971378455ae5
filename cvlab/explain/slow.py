"""Two slow methods at image size, by Captum: Integrated Gradients and Occlusion.

They run the model dozens or hundreds of times, where `cvlab.explain` runs it once, and work in another way: where they
agree with a heatmap, the method did not cause it. Give a fixed class or region (`class_score`, `region_score`): the
predicted one could change while the image is being changed.
"""

import math
from collections.abc import Callable

import torch
from captum.attr import IntegratedGradients, Occlusion
from torch import Tensor

from cvlab.explain.hooks import alone_with, differentiable, forward
from cvlab.explain.scores import Score, takes_wrapped
from cvlab.models import Model

Progress = Callable[[float], None]
GREY = 0.5  # the image without content: about the mean of photos, so about 0 after normalisation


@takes_wrapped
def integrated_gradients(
    model: Model,
    images: Tensor,
    score: Score,
    baseline: float | Tensor = GREY,
    steps: int = 50,
    progress: Progress | None = None,
) -> Tensor:
    """(image - baseline) times the mean gradient on the line between the two, summed over colours: (N, 1, H, W).

    A map adds up to score(image) - score(baseline), up to the error of a finite number of steps (Sundararajan, Taly and
    Yan, "Axiomatic Attribution for Deep Networks", 2017).

    Args:
        images: (N, 3, H, W) in [0, 1].
        score: logits to (N,).
        baseline: a grey value, or images.
        steps: number of forward and backward passes; they need the memory of one.
        progress: called with the share that is done, up to 1.
    """
    with alone_with(model), differentiable(images) as images:
        # One step at a time: the score is about N images, and must always get these.
        method = IntegratedGradients(_counted(model, score, steps, progress))
        parts = method.attribute(images, baseline, n_steps=steps, internal_batch_size=len(images))
    return parts.detach().sum(1, keepdim=True).to(images.dtype)


@takes_wrapped
def occlusion(
    model: Model,
    images: Tensor,
    score: Score,
    window: int,
    stride: int | None = None,
    baseline: float | Tensor = GREY,
    progress: Progress | None = None,
) -> Tensor:
    """How much the score falls when a square window covers a pixel, the mean over all such windows: (N, 1, H, W).

    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014. One forward pass per window.

    Args:
        images, score, progress: as in `integrated_gradients`.
        window: its side in pixels; evidence larger than the window is missed.
        stride: pixels from one window to the next; by default half of the window.
        baseline: what the window is filled with, a grey value or images.

    Raises:
        ValueError: the window is larger than the image.
    """
    stride = stride or math.ceil(window / 2)
    if window > min(images.shape[-2:]):
        raise ValueError(f"a window of {window} pixels is larger than the image")
    passes = 1
    for side in images.shape[-2:]:
        passes *= math.ceil((side - window) / stride) + 1
    with alone_with(model), torch.no_grad():
        method = Occlusion(_counted(model, score, passes + 1, progress))
        parts = method.attribute(images, (3, window, window), (3, stride, stride), baseline)
    return parts[:, :1].to(images.dtype)  # the same for all colours, which are covered together


def _counted(model: Model, score: Score, passes: int, progress: Progress | None) -> Score:
    """The score as a function of images, which reports to `progress` after every forward pass."""
    done = 0

    def score_of(images: Tensor) -> Tensor:
        nonlocal done
        scores = score(forward(model, images))
        done += 1
        if progress:
            progress(min(done / passes, 1.0))
        return scores

    return score_of
