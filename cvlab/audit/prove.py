"""Does a model use a mark? The mark is taken out of pictures that have it, and put into pictures of other classes.

A mark that nearly all pictures of a class have may still be of no use to the model, and a change that is certain may be
of no weight: the size of the effect decides.
"""

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from cvlab.audit.fixed import FixedMark
from cvlab.audit.patches import Patch
from cvlab.audit.whole import WholePicture
from cvlab.explain import predict
from cvlab.metrics import interval
from cvlab.models import Model, probabilities
from cvlab.transforms import to_float
from cvlab.trust import hide

MATTERS = 0.06  # of probability: a smaller effect is none
OF_LIGHT = 0.2  # the same of light, in which classes differ by nature
MOST = 200  # pictures of each kind
BATCH = 50

Mark = FixedMark | Patch | WholePicture


class Proof(NamedTuple):
    """What became of a mark."""

    mark: Mark
    level: str  # "used", "there but not used", or "cannot be told"
    # By how much the probability falls without the mark, beyond the control, as `cvlab.metrics.interval`; None where
    # the mark is too rare.
    removed: dict[str, float] | None
    # By how much it rises with the mark in pictures of other classes, beyond the control.
    added: dict[str, float] | None
    marked: list[int]  # rows of the pictures of its class that have it
    bare: list[int]  # rows of pictures of other classes that do not

    @property
    def strength(self) -> float:
        """The larger of the two effects."""
        return max((each["value"] for each in (self.removed, self.added) if each), default=0.0)


def prove(model: Model, mark: Mark, views: Tensor, labels: Tensor, tried: int) -> Proof:
    """Measures what a mark changes on pictures that it was not found in.

    Args:
        views, labels: (N, 3, S, S) uint8 and (N,), not trained on.
        tried: how many marks are proved in all: the bounds are of 95% for all of them together (Bonferroni).
    """
    own, has, whole = labels == mark.class_idx, mark.has(views), isinstance(mark, WholePicture)
    marked, bare = (each.nonzero().flatten() for each in (own & has, ~own if whole else ~own & ~has))
    shuffled = torch.randperm(len(bare), generator=torch.Generator().manual_seed(0))
    marked, bare = marked[:MOST], bare[shuffled[:MOST]].sort().values
    removed = None if whole else _effect(model, mark, views[marked], without, -1, tried)
    added = _effect(model, mark, views[bare], type(mark).added, 1, tried)
    effects = [each for each in (removed, added) if each]
    limit = OF_LIGHT if mark.kind == "light" else MATTERS
    # What recurs may be the object itself, which may well be recognised elsewhere: its absence has to matter too.
    enough = all if isinstance(mark, Patch) else any
    if effects and enough(each["value"] >= limit and each["low"] > 0 for each in effects):
        level = "used"
    else:
        unused = effects and all(each["high"] < MATTERS for each in effects)
        level = "there but not used" if unused else "cannot be told"
    return Proof(mark, level, removed, added, marked.tolist(), bare.tolist())


def without(mark: Mark, images: Tensor, **control: bool) -> Tensor:
    """Pictures (N, 3, S, S) in [0, 1] with a mark taken out; `control` as in `Patch.removed`."""
    return hide(*mark.removed(images, **control))


def _effect(
    model: Model, mark: Mark, views: Tensor, change: Callable[..., Tensor], sign: int, tried: int
) -> dict[str, float] | None:
    """The mean change of the probability, times `sign`, and its bounds; None for fewer than two pictures.

    Of light and sharpness it is the change beyond that of the class that gains most besides.
    """
    if len(views) < 2:
        return None
    changes = []
    for images in map(to_float, views.split(BATCH)):
        # A patch is compared with another patch: whatever covers a part of a picture changes something.
        before = change(mark, images, control=True) if isinstance(mark, Patch) else images
        after, before = (probabilities(model, predict(model, each)) for each in (change(mark, images), before))
        changes.append(sign * (after - before))
    each = torch.cat(changes)
    rival = int(each.mean(0).index_fill(0, torch.tensor(mark.class_idx), -1).argmax())
    gains_too = isinstance(mark, WholePicture) and each[:, rival].mean() > 0
    each = each[:, mark.class_idx] - (each[:, rival] if gains_too else 0)
    mean, z = each.mean().item(), NormalDist().inv_cdf(1 - 0.025 / max(tried, 1))
    reach = z * each.std().item() / len(each) ** 0.5
    return interval(mean, (mean - reach, mean + reach))
