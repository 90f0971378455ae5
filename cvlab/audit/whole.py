"""What goes with the whole pictures of a class: the colour of the light, how sharp and how compressed they are.

Nature has such differences too: yellow flowers are no colour cast, and clouds are no blur. So the colour must differ in
the light, grey and dark parts alike, and a model's use of it is a difference to look at, not a verdict.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import gaussian_blur

from cvlab.audit.fixed import BATCH, FEWEST
from cvlab.transforms import to_float

CAST = 0.08  # between the medians of two classes, of the logarithm of green, or of red or blue by green
BLURRED = 0.3  # area under the ROC beyond one half, of a class against each other one
SIGMAS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # pixels of the view
WHITE = torch.ones(3, 1, 1)
TAIL = 0.2  # of the pictures have the lowest or highest value of a fact
FACTS, SIDES = ("brightness", "red less blue", "sharpness", "JPEG quality"), (("lowest", -1), ("highest", 1))


@dataclass(frozen=True)
class WholePicture:
    """A difference that can be put into pictures of other classes."""

    class_idx: int  # the class that differs
    strength: float  # by how much, as `CAST` or `BLURRED`
    kind: str  # "light", "sharpness" or "compression"
    gains: Tensor = WHITE  # of red, green and blue, (3, 1, 1)
    sigma: float = 0.0  # of a blur; 0 for none
    quality: int = 0  # of a JPEG; 0 for none
    scale: float = 1.0  # side of the pictures that were compressed, by the side of the view
    where = "in the whole picture"

    def has(self, views: Tensor) -> Tensor:
        """All pictures: what differs is only an average."""
        return torch.ones(len(views), dtype=torch.bool)

    def added(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [0, 1] in that light, as little sharp, or as compressed."""
        images = (images * self.gains).clamp(0, 1)
        if self.quality:
            larger = F.interpolate(images, scale_factor=self.scale, mode="bilinear")
            saved = [decode_jpeg(encode_jpeg((255 * each).round().byte(), self.quality)) for each in larger]
            images = F.interpolate(to_float(torch.stack(saved)), images.shape[-2:], mode="bilinear", antialias=True)
        return gaussian_blur(images, 2 * round(3 * self.sigma) + 1, self.sigma) if self.sigma else images


def propose(views: Tensor, labels: Tensor, num_classes: int, facts: Mapping[str, Tensor]) -> Iterator[WholePicture]:
    """The classes whose pictures are in another light, less sharp than all or more compressed: views and `facts_of`."""
    classes = [i for i in range(num_classes) if FEWEST <= (labels == i).sum() <= len(labels) - FEWEST]
    casts = torch.cat([_casts(to_float(some)) for some in views.split(BATCH)])
    sharp = torch.cat([_sharpness(to_float(some)) for some in views.split(BATCH)])
    for i in classes:
        own, unlike = labels == i, casts[labels == i].median(0).values - casts[labels != i].median(0).values
        same_sign = (unlike.sign() == unlike[0].sign()).all(0)
        least = unlike.gather(0, unlike.abs().argmin(0, keepdim=True))[0] * same_sign
        if least.abs().max() > CAST:
            gains = (least * torch.tensor([1.0, 0.0, 1.0]) + least[1]).exp().view(3, 1, 1)
            yield WholePicture(i, least.abs().max().item(), "light", gains)
        if (lower := _lower(sharp, labels, i, classes)) >= BLURRED:
            others = to_float(views[~own][:: max(1, len(views) // 100)])
            medians = torch.stack([_sharpness(gaussian_blur(others, 2 * round(3 * s) + 1, s)).median() for s in SIGMAS])
            sigma = SIGMAS[int((medians - sharp[own].median()).abs().argmin())]
            yield WholePicture(i, lower, "sharpness", sigma=sigma)
        if "JPEG quality" in facts and (lower := _lower(facts["JPEG quality"], labels, i, classes)) >= BLURRED:
            quality, width, height = (facts[name][own].median() for name in ("JPEG quality", "width", "height"))
            # What is larger than eight views is compressed as if it were so large.
            scale = (min(width, height) / views.shape[-1]).clamp(1, 8).item()
            yield WholePicture(i, lower, "compression", quality=round(quality.item()), scale=scale)


def tails(facts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name which pictures are the fifth with the lowest or the highest value of a fact, (N,) bool."""
    signed = {f"{side} {fact}": sign * facts[fact] for fact in FACTS if fact in facts for side, sign in SIDES}
    return {name: values > values.quantile(1 - TAIL) for name, values in signed.items()}


def _lower(values: Tensor, labels: Tensor, own: int, classes: list[int]) -> float:
    """How much lower the values of a class are than those of each other one: area under the ROC beyond one half."""
    pairs = [(labels == own) | (labels == other) for other in classes if other != own]
    return min((roc_auc_score(labels[pair] == own, -values[pair]) for pair in pairs), default=0.5) - 0.5


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
