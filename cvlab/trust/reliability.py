"""How far a model's heatmaps can be believed, and verdicts on them: by many more hidden parts than a verdict has.

The truth about a map is Pearson's correlation with the importance that 228 hidden parts give. None of these is a part
or has a filling that the verdict uses. A map is confirmed from CONFIRMED on, and refuted up to REFUTED.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import correlation, explain
from cvlab.models import Model
from cvlab.trust.judge import CELLS, LIMITS, REGION_LIMITS, Hiding, evidence, importance

CONFIRMED, REFUTED = 0.4, 0.15
ACCEPTED = 0.05  # share of the refuted maps that may be called believable
ENOUGH = 20  # refuted maps from which a model gets limits of its own


def oracle(hiding: Hiding, others: Tensor) -> tuple[Tensor, float]:
    """The importance of each cell by 228 hidden parts, (1, 1, 8, 8), and how well two halves of the parts agree on it.

    Hidden are windows of 1/4, 3/8 and 1/2 of the side. They get the picture's mean colour, what stands there in the
    picture upside down, and what stands there in other pictures (N, 3, S, S).
    """
    size = hiding.images.shape[-1]
    places = [(y, x, 6) for y in range(0, 19, 3) for x in range(0, 19, 3) if (y + x) % 2]  # between the verdict's
    places += [(y, x, 9) for y in range(0, 16, 3) for x in range(0, 16, 3)]
    places += [(y, x, 12) for y in range(0, 13, 4) for x in range(0, 13, 4)]
    windows = torch.zeros(len(places), 1, size, size, dtype=torch.bool)
    for window, place in zip(windows, places, strict=True):
        y, x, side = (round(value * size / 24) for value in place)
        window[:, y : y + side, x : x + side] = True
    images = hiding.images
    fillings = images.mean((2, 3), keepdim=True), images.flip(2), others[torch.arange(len(windows)) % len(others)]
    falls = [-hiding.ask(windows, filling)[0] for filling in fillings]
    halves = [importance(windows[i::2], [fall[i::2] for fall in falls]) for i in (0, 1)]
    return importance(windows, falls), correlation(*halves).item()


def truth(heat: Tensor, cells: Tensor) -> float:
    """How well a map at the picture's size, (1, 1, S, S), agrees with the importance of cells."""
    return correlation(F.adaptive_avg_pool2d(heat, CELLS), cells).item()


def examine(model: Model, images: Tensor, others: Tensor) -> dict[str, list[float]]:
    """Truth and evidence of one picture's Grad-CAM at each stage, and of the last one turned upside down, a fake.

    Args:
        images: (1, 3, S, S) in [0, 1].
        others: other pictures, (N, 3, S, S).

    Returns:
        By stage, without blank maps; nothing where a segmenter finds nothing.
    """
    try:
        hiding = Hiding(model, images, None, None)
    except ValueError:  # the mask is empty
        return {}
    hiding.look(0)
    cells, _ = oracle(hiding, others)
    maps = explain(model, images, hiding.score).maps["grad_cam"]
    heats = {name: hiding.placed(each, name) for name, each in maps.items()}
    heats["upside down"] = list(heats.values())[-1].flip(2)
    return {name: [truth(heat, cells), evidence(hiding.checks(heat))] for name, heat in heats.items() if heat.max() > 0}


def summary(model: Model, pictures: Sequence[dict[str, list[float]]]) -> dict:
    """Of the pictures that were examined: shares by stage, the best stage, limits of the model's own, their worth."""
    stages = {}
    for name in model.stages:
        truths = torch.tensor([found[name][0] for found in pictures if name in found])
        confirmed, refuted = ((truths >= CONFIRMED).sum().item(), (truths <= REFUTED).sum().item())
        stages[name] = {"confirmed": confirmed, "refuted": refuted, "undecided": len(pictures) - confirmed - refuted}
    best = max(stages, key=lambda name: stages[name]["confirmed"] - stages[name]["refuted"])
    usual = LIMITS if model.task == "classification" else REGION_LIMITS
    halves = [pictures[::2], pictures[1::2]]
    counts = torch.zeros(2, 3, dtype=torch.long)
    for fitted, held_out in (halves, halves[::-1]):  # limits of one half of the pictures are tried on the other
        high, low = own_limits(fitted, usual)
        for true, value in (each for found in held_out for each in found.values()):
            if not REFUTED < true < CONFIRMED:
                counts[int(true <= REFUTED), 0 if value > high else 2 if value < low else 1] += 1
    verdicts = {name: row.tolist() for name, row in zip(("confirmed", "refuted"), counts, strict=True)}
    limits = own_limits(pictures, usual)
    return {"pictures": len(pictures), "stages": stages, "recommended": best, "limits": limits, "verdicts": verdicts}


def own_limits(pictures: Sequence[dict[str, list[float]]], usual: tuple[float, float]) -> list[float]:
    """The evidence above which one refuted map in twenty lies, and the lower of it and the usual second limit."""
    refuted = [value for found in pictures for true, value in found.values() if true <= REFUTED]
    if len(refuted) < ENOUGH:
        return list(usual)
    high = torch.tensor(refuted).quantile(1 - ACCEPTED).item()
    return [high, min(high, usual[1])]
