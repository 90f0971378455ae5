"""Hides parts of a picture from a model, and asks what it answers then.

Hidden pixels get the colours around them (`hide`): a black or grey patch would be a new object with edges of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import class_score, heatmap, predict, predicted_classes, predicted_masks, region_score
from cvlab.explain.many import MOST_ACTIVATIONS
from cvlab.models import Model, probabilities

BORDER = 64  # this part of the picture's side is hidden around a region, because it still shows the region's edge
PIXELS_AT_ONCE = 2**18  # in a forward pass: 5 views of 224 x 224; the next question waits for no more than these


class Hiding:
    """A model before one picture of which parts are hidden.

    Args:
        model, images, class_idx, region: as `cvlab.trust.judge` takes them.
    """

    def __init__(self, model: Model, images: Tensor, class_idx: int | None, region: Tensor | None) -> None:
        self.model, self.images, self.region = model, images, None  # region: (S, S) bool, of a segmenter
        logits = predict(model, images)
        self.class_idx = int(predicted_classes(model, logits)) if class_idx is None else class_idx
        if model.task == "classification":
            self.score = class_score(self.class_idx)  # what is explained, from logits to (N,)
        else:
            self.region = predicted_masks(model, logits)[0, self.class_idx] if region is None else region
            self.score = region_score(self.region, self.class_idx)
        # The whole picture's score, and probability of the class or its mean over the region.
        self.before, self.probability = self._answers(logits)[:, 0].tolist()

    def ask(self, hidden: Tensor, filling: Tensor | None = None) -> Tensor:
        """Scores and probabilities with parts of the picture hidden, (2, N).

        Args:
            hidden: (N, 1, S, S) bool.
            filling: what stands there instead, (N or 1, 3, S, S); by default the colours around (`hide`).
        """
        images = self.images.expand(len(hidden), -1, -1, -1)
        pictures = hide(images, hidden) if filling is None else torch.where(hidden, filling, images)
        most = MOST_ACTIVATIONS // max(1, getattr(self.model, "activations", 0))  # a network may be small and wide
        batches = pictures.split(max(1, min(most, PIXELS_AT_ONCE // hidden[0].numel())))
        return torch.cat([self._answers(predict(self.model, batch)) for batch in batches], 1)

    def _answers(self, logits: Tensor) -> Tensor:
        probs = probabilities(self.model, logits)[:, self.class_idx]
        return torch.stack([self.score(logits), probs if self.region is None else probs[:, self.region].mean(1)])

    def placed(self, attribution: Tensor, stage: str) -> Tensor:
        """A signed map over the picture, (1, 1, S, S); with a stage's name by the geometry of that stage."""
        size, place = self.images.shape[-2:], self.model.stages.get(stage)
        return heatmap(attribution, size, place) - heatmap(-attribution, size, place)


def hottest_part(heat: Tensor, share: float) -> Tensor:
    """The hottest `share` of a heatmap (1, 1, H, W) >= 0, none of it 0: (H, W) bool. ValueError if blank or flat."""
    heat = heat[0, 0]
    count = min(round(share * heat.numel()), int((heat > 0).sum()))
    if not count:
        raise ValueError("the map shows no evidence, so there is nothing to hide: choose another stage or class")
    if heat.max() - heat.min() <= 1e-5 * heat.abs().max():  # as resizing rounds
        raise ValueError("the map is the same everywhere, so no part of it is the hottest: choose an earlier stage")
    hottest = torch.zeros(heat.numel(), dtype=torch.bool)
    hottest[heat.flatten().topk(count).indices] = True
    return hottest.reshape(heat.shape)


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
