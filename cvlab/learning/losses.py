"""Segmentation losses by name: each takes logits and masks (N, C, H, W) and returns a mean.

Classification uses torch's cross-entropy, which takes class indices as well as mixed targets.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss


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


def bce_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """The sum of both: cross-entropy for single pixels, Dice for the overlap."""
    return bce(logits, masks) + dice(logits, masks)


SEGMENTATION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": bce,
    "dice": dice,
    "focal": focal,
    "bce+dice": bce_dice,
}
