"""What to explain: a score, a function of the logits that gives one number per image.

It may ask about a class (`class_score`), about one class rather than another (`contrast_score`) or about the pixels of
a region (`region_score`). maps.py explains it.
"""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor, nn

from cvlab.models import Model, mask_levels

Score = Callable[[Tensor], Tensor]
WRAPPED_AS = ("_orig_mod", "module")  # by torch.compile; by DataParallel, AveragedModel, ModelEma


def takes_wrapped(function: Callable) -> Callable:
    """Lets a function of a model also take the model in a wrapper that training put around it."""

    @wraps(function)
    def unwrapped(model: nn.Module, *args: object, **options: object) -> object:
        while inner := [child for name, child in model.named_children() if name in WRAPPED_AS]:
            model = inner[0]
        return function(model, *args, **options)

    return unwrapped


def class_score(class_idx: int | Tensor) -> Score:
    """The logit of a class, (N, C) -> (N,). A tensor of N indices gives each image its own class."""

    def score(logits: Tensor) -> Tensor:
        # A clone: autograd cannot save a tensor that was made in inference mode.
        index = torch.as_tensor(class_idx, device=logits.device).clone().expand(len(logits))
        _check_classes(index.tolist(), logits)
        return logits.gather(1, index[:, None])[:, 0]

    return score


def contrast_score(a: int | Tensor, b: int | Tensor) -> Score:
    """Class a rather than class b: the difference of their logits, (N, C) -> (N,)."""
    score_a, score_b = class_score(a), class_score(b)
    return lambda logits: score_a(logits) - score_b(logits)


def against(score: Score) -> Score:
    """The evidence against a score: its negative. For a region this is the evidence for background."""
    return lambda logits: -score(logits)


def region_score(region: Tensor, class_idx: int = 0) -> Score:
    """The mean logit of a class over a region of the image, (N, C, H, W) -> (N,).

    The mean logit, not the sum of probabilities: the sigmoid's gradient vanishes where the network is sure, and a sum
    would make large regions look important.

    Args:
        region: bool, (H, W) for all images or (N, H, W) or (N, 1, H, W).

    Raises:
        ValueError: the region is not boolean, has another size than the logits, or is empty.
    """
    if region.dtype != torch.bool:
        raise ValueError(f"a region must be a boolean mask, not {str(region.dtype).removeprefix('torch.')}")

    def score(logits: Tensor) -> Tensor:
        _check_classes([class_idx], logits)
        chosen = logits[:, class_idx]  # (N, H, W)
        if region.shape[-2:] != chosen.shape[-2:]:
            size, expected = "x".join(map(str, region.shape[-2:])), "x".join(map(str, chosen.shape[-2:]))
            raise ValueError(f"the region is {size} pixels and the model's logits are {expected}")
        inside = region.to(logits.device, copy=True).reshape(-1, *region.shape[-2:])  # a copy: as in class_score
        if len(inside) not in (1, len(chosen)):
            raise ValueError(f"there are {len(inside)} regions for {len(chosen)} images")
        pixels = inside.sum((1, 2))
        if not pixels.all():
            raise ValueError("the region is empty: there is no pixel to explain")
        return (chosen * inside).sum((1, 2)) / pixels

    return score


@takes_wrapped
def predicted_score(model: Model, class_idx: int | Tensor | None = None) -> Score:
    """The model's own prediction: the logit of a class, or the mean logit over the predicted mask of a class.

    The class is by default the predicted one of each image, see `predicted_classes`.
    """

    def score(logits: Tensor) -> Tensor:
        index = predicted_classes(model, logits) if class_idx is None else class_idx
        if model.task == "classification":
            return class_score(index)(logits)
        index = torch.as_tensor(index, device=logits.device).expand(len(logits))
        _check_classes(index.tolist(), logits)
        chosen = torch.arange(len(logits)), index
        return region_score(predicted_masks(model, logits)[chosen])(logits[chosen][:, None])

    return score


@takes_wrapped
def predicted_classes(model: Model, logits: Tensor) -> Tensor:
    """The class that each image is about, (N,): the likeliest, or of a segmenter the one whose mask covers most.

    The background is none; where a segmenter finds nothing it is the first class.
    """
    if model.task == "classification":
        return logits.argmax(1)
    first = getattr(model, "first_object", 0)
    return first + predicted_masks(model, logits)[:, first:].sum((2, 3)).argmax(1)


@takes_wrapped
def predicted_masks(model: Model, logits: Tensor) -> Tensor:
    """Where `cvlab.models.mask_levels` exceed the model's threshold: (N, C, H, W) bool."""
    return mask_levels(model, logits.detach()) > model.threshold


def _check_classes(indices: Sequence[int], logits: Tensor) -> None:
    for index in indices:
        if not 0 <= index < logits.shape[1]:
            raise ValueError(f"there is no class {index}: the model has {logits.shape[1]} classes, counted from 0")
