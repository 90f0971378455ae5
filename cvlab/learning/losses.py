"""Segmentation losses by name: each takes logits and masks (N, C, H, W), bool, and returns a mean.

Classification uses torch's cross-entropy, which takes class indices as well as mixed targets.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

IGNORED = -100  # stands for the class of a pixel that is not scored
EXCLUSIVE_LOSSES = ("ce", "ce+dice")


def cross_entropy(
    label_smoothing: float, weighting: str, labels: Tensor, num_classes: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of logits (N, C) with class indices (N,) or mixed targets (N, C), a mean over images.

    Args:
        weighting: "balanced": all classes weigh the same, as with class_weight="balanced" of scikit-learn: an image of
            a class with n of the N training `labels` weighs N / (num_classes * n); "none": all images weigh the same.
    """
    if weighting == "none":
        return partial(F.cross_entropy, label_smoothing=label_smoothing)
    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    weights = len(labels) / (num_classes * counts.clamp(min=1))  # a class may have no label

    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        settings = {"weight": weights.to(logits.device), "label_smoothing": label_smoothing, "reduction": "none"}
        # torch's own mean divides by the weights of the batch, but only for indices.
        return F.cross_entropy(logits, targets, **settings).mean()

    return criterion


def bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy, mean over all pixels."""
    return F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype))


def dice(logits: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - soft Dice of each image and channel, mean over both (Milletari et al., "V-Net", 2016, without squares).

    With `smooth`, in pixels, the loss of an empty mask that is predicted empty is 0.
    """
    probs, masks = logits.sigmoid(), masks.to(logits.dtype)
    overlap = (probs * masks).sum(dim=(2, 3))
    total = probs.sum(dim=(2, 3)) + masks.sum(dim=(2, 3))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def focal(logits: Tensor, masks: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Focal loss, mean over all pixels (Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 5)."""
    return sigmoid_focal_loss(logits, masks.to(logits.dtype), alpha, gamma, reduction="mean")


def segmentation_loss(
    name: str | None, exclusive: bool, weights: Tensor | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a name; by default "bce+dice", for classes that exclude each other "ce+dice".

    "ce" and "ce+dice", with the soft Dice of each class over a batch, take one-hot masks. A pixel that no class has is
    not scored.

    Args:
        weights: of the classes in the cross-entropy, (C,), as `pixel_weights` gives them.

    Raises:
        ValueError: weights are given to a loss that has none.
    """
    name = name or ("ce+dice" if exclusive else "bce+dice")
    if name in SEGMENTATION_LOSSES and weights is None:
        return SEGMENTATION_LOSSES[name]
    if name in SEGMENTATION_LOSSES:
        raise ValueError(
            f"--class-weights balanced is for the losses {' and '.join(EXCLUSIVE_LOSSES)}, not for {name}."
        )
    from segmentation_models_pytorch.losses import DiceLoss  # imported here: classifiers need not wait for it

    dice_of_classes = DiceLoss("multiclass", ignore_index=IGNORED)

    def criterion(logits: Tensor, masks: Tensor) -> Tensor:
        labelled = masks.any(1)
        labels = torch.where(labelled, masks.byte().argmax(1), IGNORED)
        factors = None if weights is None else weights.to(logits)
        loss = F.cross_entropy(logits, labels, factors, ignore_index=IGNORED, reduction="sum")
        loss = loss / labelled.sum().clamp(min=1)
        return loss + dice_of_classes(logits, labels) if name == "ce+dice" else loss

    return criterion


def pixel_weights(masks: Sequence[Tensor]) -> Tensor:
    """Weights by which all classes count the same, rare or not, (C,): pixels / (C * pixels of the class)."""
    counts = sum(mask.sum((1, 2)) for mask in masks)
    return counts.sum() / (len(counts) * counts.clamp(min=1))


SEGMENTATION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": bce,
    "dice": dice,
    "focal": focal,
    "bce+dice": lambda logits, masks: bce(logits, masks) + dice(logits, masks),  # single pixels, and the overlap
}
