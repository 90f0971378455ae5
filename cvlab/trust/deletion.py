"""Is a heatmap to be believed? Hide what it shows and see whether the model changes its mind.

Where a model looked is where hiding moves its answer. So the hottest part of a map is hidden, and for comparison the
same shape at random places: what moves the answer no more than they do was no evidence. Hidden pixels become what their
surroundings suggest (`hide`): black or grey patches would be objects of their own, with edges that a model sees.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import heatmap, predict, predicted_masks
from cvlab.models import Model

BORDER = 64  # of the picture's side, one part: pixels beside a region that still show the edge of what is hidden
PIXELS_AT_ONCE = 2**20  # in one forward pass: 20 views of 224 x 224


@dataclass(frozen=True)
class Deletion:
    """What hiding a part of the picture does to a probability.

    Attributes:
        before: of the whole picture: a class's probability, or the mean probability over a segmenter's region.
        hidden: with the hottest part of the map hidden.
        random: with the same shape hidden at random places, one value a repeat.
        share: of the picture that was hidden; less than asked for where a map has less evidence.
        picture: (1, 3, H, W), with the hottest part hidden.
    """

    before: float
    hidden: float
    random: list[float]
    share: float
    picture: Tensor

    @property
    def telling(self) -> bool:
        """Whether hiding the hottest part lowers the probability more than hiding any of the random ones."""
        return self.hidden < min(self.random)


def deletion(
    model: Model,
    images: Tensor,
    attribution: Tensor,
    class_idx: int | None = None,
    region: Tensor | None = None,
    share: float = 0.1,
    repeats: int = 8,
    seed: int = 0,
) -> Deletion:
    """Hides the hottest `share` of a picture, then the same shape at `repeats` random places: 2 + repeats forwards.

    A random place is the shape moved by any number of pixels right and down; what leaves the picture enters on the
    other side. So all have the same area and outline, and as much chance as any to meet what matters.

    Args:
        images: one image, (1, 3, H, W) in [0, 1].
        attribution: its map, (1, 1, h, w), signed or not; only evidence for the score counts.
        class_idx: whose probability; by default a classifier's top class, or a segmenter's class 0.
        region: of a segmenter, (H, W) bool: over which pixels; by default the predicted mask, fixed before hiding.

    Raises:
        ValueError: a map without evidence, or a region (or predicted mask) without a pixel.
    """
    hottest = hottest_part(heatmap(attribution, images.shape[-2:]), share)
    generator = torch.Generator().manual_seed(seed)
    moves = torch.stack([torch.randint(side, (repeats,), generator=generator) for side in hottest.shape[-2:]], 1)
    hidden = torch.stack([hottest, *(hottest.roll(tuple(move), (0, 1)) for move in moves.tolist())])[:, None]
    pictures = torch.cat([images, hide(images.expand(len(hidden), -1, -1, -1), hidden)])
    before, after, *random = _probabilities(model, pictures, class_idx, region)
    return Deletion(before, after, random, hottest.float().mean().item(), pictures[1:2])


def deletion_curves(
    model: Model,
    images: Tensor,
    attribution: Tensor,
    class_idx: int | None = None,
    region: Tensor | None = None,
    steps: int = 10,
) -> tuple[list[float], list[float], list[float]]:
    """The probability while more and more is hidden, hottest first, and while the hottest appears first.

    Petsiuk, Das and Saenko, "RISE", 2018. A map that is right falls early and rises early.

    Args:
        images, attribution, class_idx, region: as in `deletion`; here negative evidence counts too, as the coolest.
        steps: parts of equal area.

    Returns:
        Shares from 0 to 1, the probability with that share hidden, and with that share alone shown: steps + 1 each.
    """
    heat = F.interpolate(attribution, images.shape[-2:], mode="bilinear")[0, 0]
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
    """The hottest `share` of the pixels of a heatmap (1, 1, H, W) >= 0, but none without evidence: (H, W) bool.

    Raises:
        ValueError: the heatmap is blank.
    """
    heat = heat[0, 0]
    count = min(round(share * heat.numel()), int((heat > 0).sum()))
    if not count:
        raise ValueError("the map shows no evidence, so there is nothing to hide: take another stage or class")
    hottest = torch.zeros(heat.numel(), dtype=torch.bool)
    hottest[heat.flatten().topk(count).indices] = True
    return hottest.reshape(heat.shape)


def hide(images: Tensor, regions: Tensor) -> Tensor:
    """Pictures with their regions painted in the colours around them; a border of a 64th of the side goes as well.

    The colours are those of pull and push (Gortler, Grzeszczuk, Szeliski and Cohen, "The Lumigraph", 1996): means over
    ever larger squares, of the pixels that are not hidden. Where all is hidden, the picture's mean colour remains.

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
    """Images (N, 3, h, w) where `visible` (N, 1, h, w) is 1; elsewhere the same at half the size, bilinear."""
    if max(images.shape[-2:]) == 1:
        return images
    count = F.avg_pool2d(visible, 2, ceil_mode=True)
    means = F.avg_pool2d(images * visible, 2, ceil_mode=True) / count.clamp(min=1e-6)
    coarse = _painted(means, (count > 0).float())
    return torch.where(visible > 0, images, F.interpolate(coarse, images.shape[-2:], mode="bilinear"))


def _probabilities(model: Model, pictures: Tensor, class_idx: int | None, region: Tensor | None) -> list[float]:
    """Of each picture (N, 3, H, W), for the class and region that the first one settles."""
    at_once = max(1, PIXELS_AT_ONCE // pictures[0, 0].numel())
    probability_of: Callable[[Tensor], Tensor] | None = None
    values: list[float] = []
    for batch in pictures.split(at_once):
        logits = predict(model, batch)
        probability_of = probability_of or _probability_of(model, logits[:1], class_idx, region)
        values += probability_of(logits).tolist()
    return values


def _probability_of(
    model: Model, logits: Tensor, class_idx: int | None, region: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Logits to (N,) probabilities."""
    if model.task == "classification":
        chosen = int(logits.argmax()) if class_idx is None else class_idx
        return lambda logits: logits.softmax(1)[:, chosen]
    chosen = class_idx or 0
    pixels = predicted_masks(model, logits)[0, chosen] if region is None else region
    if not pixels.any():
        raise ValueError("there is no pixel whose probability could move: the mask is empty")
    return lambda logits: logits[:, chosen].sigmoid()[:, pixels].mean(1)
