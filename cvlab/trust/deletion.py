"""Can a heatmap be trusted? Hide the area that it marks, and see whether the prediction changes.

Hidden pixels get the colours around them (`hide`), because a black or grey patch would be a new object with edges of
its own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import predict, predicted_masks
from cvlab.explain.scores import takes_wrapped
from cvlab.models import Model, probabilities

BORDER = 64  # this part of the picture's side is hidden around a region, because it still shows the region's edge
PIXELS_AT_ONCE = 2**18  # in a forward pass: 5 views of 224 x 224; the next question waits for no more than these


@takes_wrapped
def deletion_curves(
    model: Model,
    images: Tensor,
    attribution: Tensor,
    class_idx: int | None = None,
    region: Tensor | None = None,
    steps: int = 10,
) -> tuple[list[float], list[float], list[float]]:
    """The probability while more and more is hidden, the hottest first, and while more and more is shown.

    Petsiuk, Das and Saenko, "RISE", 2018. For a good map the first curve falls early and the second rises early.

    Args:
        images: one image, (1, 3, H, W) in [0, 1].
        attribution: its map, (1, 1, h, w), signed: negative values count as the coolest.
        class_idx: by default a classifier's predicted class, or a segmenter's class 0.
        region: pixels of a segmenter's output, (H, W) bool; by default the mask that it predicts with nothing hidden.
        steps: number of parts of equal area.

    Returns:
        Shares from 0 to 1, the probability with this share hidden, and with only this share shown: steps + 1 of each.
    """
    heat = F.interpolate(attribution, images.shape[-2:], mode="bilinear")[0, 0]
    _check_order(heat)
    order = heat.flatten().argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).reshape(heat.shape)
    shares = torch.linspace(0, 1, steps + 1)
    hottest = rank < (shares * rank.numel()).round()[:, None, None]
    parts = torch.cat([hottest, ~hottest])[:, None]
    values = _probabilities(
        model, torch.cat([images, hide(images.expand(len(parts), -1, -1, -1), parts)]), class_idx, region
    )
    return shares.tolist(), values[1 : steps + 2], values[steps + 2 :]


def hottest_part(heat: Tensor, share: float) -> Tensor:
    """The hottest `share` of the pixels of a heatmap (1, 1, H, W) >= 0, none of them 0, as (H, W) bool.

    Raises:
        ValueError: the heatmap is blank, or the same everywhere, as one of a single position is.
    """
    heat = heat[0, 0]
    count = min(round(share * heat.numel()), int((heat > 0).sum()))
    if not count:
        raise ValueError("the map shows no evidence, so there is nothing to hide: choose another stage or class")
    _check_order(heat)
    hottest = torch.zeros(heat.numel(), dtype=torch.bool)
    hottest[heat.flatten().topk(count).indices] = True
    return hottest.reshape(heat.shape)


def _check_order(heat: Tensor) -> None:
    if heat.max() - heat.min() <= 1e-5 * heat.abs().max():  # as resizing rounds
        raise ValueError("the map is the same everywhere, so no part of it is the hottest: choose an earlier stage")


def hide(images: Tensor, regions: Tensor) -> Tensor:
    """Pictures whose regions, with a border of a 64th of the side, are painted in the colours around them.

    The colours are means of the visible pixels over larger and larger squares (push-pull: Gortler, Grzeszczuk, Szeliski
    and Cohen, "The Lumigraph", 1996). If everything is hidden, the picture's mean colour is used.

    Args:
        images: (N, 3, H, W) in [0, 1].
        regions: (N, 1, H, W) bool.
    """
    border = -(-max(images.shape[-2:]) // BORDER)
    grown = F.max_pool2d(regions.float(), 2 * border + 1, 1, border)
    nothing_left = grown.amin((1, 2, 3), keepdim=True) > 0
    painted = _painted(images, 1 - grown)
    return torch.where(nothing_left, images.mean((2, 3), keepdim=True), painted).clamp(0, 1)


def _painted(images: Tensor, visible: Tensor) -> Tensor:
    """Images (N, 3, h, w) where `visible` (N, 1, h, w) is 1; elsewhere the result at half the size, bilinear."""
    if max(images.shape[-2:]) == 1:
        return images
    count = F.avg_pool2d(visible, 2, ceil_mode=True)
    means = F.avg_pool2d(images * visible, 2, ceil_mode=True) / count.clamp(min=1e-6)
    coarse = _painted(means, (count > 0).float())
    return torch.where(visible > 0, images, F.interpolate(coarse, images.shape[-2:], mode="bilinear"))


def _probabilities(model: Model, pictures: Tensor, class_idx: int | None, region: Tensor | None) -> list[float]:
    """The probability for each picture (N, 3, H, W), of the class and region that the first one decides."""
    at_once = max(1, PIXELS_AT_ONCE // pictures[0, 0].numel())
    asked: Callable[[Tensor], Tensor] | None = None
    values: list[float] = []
    for batch in pictures.split(at_once):
        logits = predict(model, batch)
        asked = asked or probability_of(model, logits[:1], class_idx, region)
        values += asked(logits).tolist()
    return values


def probability_of(
    model: Model, logits: Tensor, class_idx: int | None, region: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """A function from logits to (N,) probabilities."""
    if model.task == "classification":
        chosen = int(logits.argmax()) if class_idx is None else class_idx
        return lambda logits: probabilities(model, logits)[:, chosen]
    chosen = class_idx or 0
    pixels = predicted_masks(model, logits)[0, chosen] if region is None else region
    if not pixels.any():
        raise ValueError("the mask is empty: there is no pixel whose probability could change")
    return lambda logits: probabilities(model, logits)[:, chosen][:, pixels].mean(1)
