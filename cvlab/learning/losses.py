"""Losses of segmentation, by name: each takes logits (N, C, H, W) and masks (N, C, H, W), and returns a mean.

Classification needs none of its own: torch's cross-entropy takes class indices and mixtures alike.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy, mean over all pixels."""
    return F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype))


def dice(logits: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - soft Dice of each image and channel, mean over both (Milletari et al., "V-Net", 2016, with plain sums).

    `smooth`, in pixels, keeps an empty mask that is predicted empty at loss 0.
    """
    probs, masks = logits.sigmoid(), masks.to(logits.dtype)
    overlap = (probs * masks).sum(dim=(2, 3))
    total = probs.sum(dim=(2, 3)) + masks.sum(dim=(2, 3))
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def focal(logits: Tensor, masks: Tensor, gamma: float = 2.0, alpha: float = 0.25) -> Tensor:
    """Focal loss, mean over all pixels (Lin et al., "Focal Loss for Dense Object Detection", 2017, equation 5)."""
    masks = masks.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    probs = logits.sigmoid()
    p_true = probs * masks + (1 - probs) * (1 - masks)
    weight = alpha * masks + (1 - alpha) * (1 - masks)
    return (weight * (1 - p_true) ** gamma * cross_entropy).mean()


def bce_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Sum of the two: cross-entropy teaches pixels, Dice the overlap."""
    return bce(logits, masks) + dice(logits, masks)


SEGMENTATION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bce": bce,
    "dice": dice,
    "focal": focal,
    "bce+dice": bce_dice,
}
