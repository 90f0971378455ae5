"""What goes with the whole pictures of a class: the colour of the light, and how sharp they are.

Nature has such differences too: yellow flowers are no colour cast, and clouds are no blur. So the colour must differ in
the light, grey and dark parts alike, and a model's use of it is a difference to look at, not a verdict.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from cvlab.audit.fixed import BATCH, FEWEST
from cvlab.transforms import to_float

CAST = 0.08  # between the medians of two classes, of the logarithm of green, or of red or blue by green
BLURRED = 0.3  # area under the ROC beyond one half, of a class against each other one
SIGMAS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # pixels of the view


@dataclass(frozen=True)
class WholePicture:
    """A difference that can be put into pictures of other classes."""

    class_idx: int  # the class that differs
    strength: float  # by how much, as `CAST` or `BLURRED`
    gains: Tensor  # of red, green and blue, (3, 1, 1)
    sigma: float  # of a blur; 0 for none
    kind: str  # "light" or "sharpness"
    where = "in the whole picture"

    def has(self, views: Tensor) -> Tensor:
        """All pictures: what differs is only an average."""
        return torch.ones(len(views), dtype=torch.bool)

    def added(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, S, S) in [0, 1] in that light, or as little sharp."""
        images = (images * self.gains).clamp(0, 1)
        return gaussian_blur(images, 2 * round(3 * self.sigma) + 1, self.sigma) if self.sigma else images


def propose(views: Tensor, labels: Tensor, num_classes: int) -> Iterator[WholePicture]:
    """The classes whose pictures (N, 3, S, S) uint8 are in another light, and those whose are less sharp than all."""
    classes = [i for i in range(num_classes) if FEWEST <= (labels == i).sum() <= len(labels) - FEWEST]
    casts = torch.cat([_casts(to_float(some)) for some in views.split(BATCH)])
    sharp = torch.cat([_sharpness(to_float(some)) for some in views.split(BATCH)])
    for i in classes:
        own, unlike = labels == i, casts[labels == i].median(0).values - casts[labels != i].median(0).values
        same_sign = (unlike.sign() == unlike[0].sign()).all(0)
        least = unlike.gather(0, unlike.abs().argmin(0, keepdim=True))[0] * same_sign
        if least.abs().max() > CAST:
            gains = (least * torch.tensor([1.0, 0.0, 1.0]) + least[1]).exp().view(3, 1, 1)
            yield WholePicture(i, least.abs().max().item(), gains, 0.0, "light")
        areas = [roc_auc_score(own[own | (labels == j)], -sharp[own | (labels == j)]) for j in classes if j != i]
        if areas and min(areas) - 0.5 >= BLURRED:
            others = to_float(views[~own][:: max(1, len(views) // 100)])
            medians = torch.stack([_sharpness(gaussian_blur(others, 2 * round(3 * s) + 1, s)).median() for s in SIGMAS])
            sigma = SIGMAS[int((medians - sharp[own].median()).abs().argmin())]
            yield WholePicture(i, min(areas) - 0.5, torch.ones(3, 1, 1), sigma, "sharpness")


def _casts(images: Tensor) -> Tensor:
    """Logarithms of red by green, green, blue by green: of all pixels, the greyest, lightest, darkest: (N, 4, 3)."""
    pixels, tones = images.flatten(2), []
    light = pixels.mean(1)
    for score, share in ((light, 1.0), (pixels.amin(1) - pixels.amax(1), 0.2), (light, 0.05), (-light, 0.1)):
        chosen = score.topk(max(1, round(share * score.shape[1]))).indices
        tones.append(pixels.gather(2, chosen[:, None].expand(-1, 3, -1)).mean(2))
    red, green, blue = torch.stack(tones, 1).clamp(min=0.01).log().unbind(2)
    return torch.stack([red - green, green, blue - green], 2)


def _sharpness(images: Tensor) -> Tensor:
    """The steepest changes of the slope by the steepest slopes, (N,): a blur lowers it, a plain picture does not."""
    grey = images.mean(1)
    slopes, bends = grey.diff(dim=2).abs(), grey.diff(n=2, dim=2).abs()
    return bends.flatten(1).quantile(0.99, 1) / slopes.flatten(1).quantile(0.99, 1).clamp(min=1e-3)
