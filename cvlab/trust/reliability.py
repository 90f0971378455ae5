"""How far a model's heatmaps can be believed, and verdicts on them: by many more hidden parts than a verdict has.

The truth about a map is its correlation with the importance of places that 228 hidden parts give, none of which has the
place or the filling of a verdict's part. A map is confirmed from CONFIRMED on, and refuted up to REFUTED.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import correlation, explain
from cvlab.models import Model
from cvlab.trust.hiding import Hiding
from cvlab.trust.judge import CELLS, LIMITS, REGION_LIMITS, Verdicts, evidence, importance

CONFIRMED, REFUTED = 0.4, 0.15
ACCEPTED, ENOUGH = 0.05, 20  # share of the refuted maps above a model's own limit, and how many such maps it takes
Examined = dict[str, list[float]]  # truth and evidence of each map of a picture


def oracle(hiding: Hiding, others: Tensor) -> list[Tensor]:
    """The importance of each cell, (1, 1, 8, 8), by all hidden parts, and by each half of them.

    Hidden are windows of 1/4, 3/8 and 1/2 of the side. They get the picture's mean colour, what stands there in the
    picture upside down, and what stands there in other pictures (N, 3, S, S).
    """
    size, images = hiding.images.shape[-1], hiding.images
    places = [(y, x, 6) for y in range(0, 19, 3) for x in range(0, 19, 3) if (y + x) % 2]  # in 24ths of the side
    places += [(y, x, 9) for y in range(0, 16, 3) for x in range(0, 16, 3)]
    places += [(y, x, 12) for y in range(0, 13, 4) for x in range(0, 13, 4)]
    windows = torch.zeros(len(places), 1, size, size, dtype=torch.bool)
    for window, place in zip(windows, places, strict=True):
        y, x, side = (round(value * size / 24) for value in place)
        window[:, y : y + side, x : x + side] = True
    fillings = images.mean((2, 3), keepdim=True), images.flip(2), others[torch.arange(len(windows)) % len(others)]
    falls = [-hiding.ask(windows, filling)[0] for filling in fillings]
    parts = (slice(None), slice(0, None, 2), slice(1, None, 2))
    return [importance(windows[part], [fall[part] for fall in falls]) for part in parts]


def examine(model: Model, images: Tensor, others: Tensor) -> Examined:
    """One picture's Grad-CAM at each stage, and a fake, the last one upside down; nothing without a predicted mask.

    Args:
        images: (1, 3, S, S) in [0, 1].
        others: other pictures, (N, 3, S, S).
    """
    try:
        verdicts = Verdicts(model, images, None, None, 0)
    except ValueError:  # the mask is empty
        return {}
    cells, *_ = oracle(verdicts, others)
    maps = explain(model, images, verdicts.score).maps["grad_cam"]
    heats = {name: verdicts.placed(each, name) for name, each in maps.items()}
    heats["upside down"] = list(heats.values())[-1].flip(2)
    return {
        name: [correlation(F.adaptive_avg_pool2d(heat, CELLS), cells).item(), evidence(verdicts.checks(heat))]
        for name, heat in heats.items()
        if heat.max() > 0
    }


def summary(model: Model, pictures: Sequence[Examined]) -> dict:
    """Confirmed and refuted maps by stage, the best stage, limits of the model's own, and the verdicts by them.

    The verdicts are on each half of the pictures, by limits that the other half gave.
    """
    stages = {}
    for name in model.stages:
        truths = [found[name][0] for found in pictures if name in found]
        confirmed, refuted = sum(each >= CONFIRMED for each in truths), sum(each <= REFUTED for each in truths)
        stages[name] = {"confirmed": confirmed, "undecided": len(truths) - confirmed - refuted, "refuted": refuted}
    best = max(stages, key=lambda name: stages[name]["confirmed"] - stages[name]["refuted"])
    verdicts = {"confirmed": [0, 0, 0], "refuted": [0, 0, 0]}  # believable, doubtful, not believable
    for half in (0, 1):
        high, low = own_limits(model, pictures[1 - half :: 2])
        for truth, value in (each for found in pictures[half::2] for each in found.values()):
            if not REFUTED < truth < CONFIRMED:
                verdicts["confirmed" if truth >= CONFIRMED else "refuted"][(value <= high) + (value < low)] += 1
    limits = own_limits(model, pictures)
    return {"pictures": len(pictures), "stages": stages, "recommended": best, "limits": limits, "verdicts": verdicts}


def own_limits(model: Model, pictures: Sequence[Examined]) -> list[float]:
    """The usual limits, the first one raised until it lets pass one refuted map in twenty at most.

    It is never lowered: the usual limits were chosen on more kinds of fakes than are tried here.
    """
    high, low = LIMITS if model.task == "classification" else REGION_LIMITS
    refuted = [value for found in pictures for truth, value in found.values() if truth <= REFUTED]
    if len(refuted) >= ENOUGH:
        high = max(high, torch.tensor(refuted).quantile(1 - ACCEPTED).item())
    return [high, low]
