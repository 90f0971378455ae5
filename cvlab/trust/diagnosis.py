"""Why a map is blank, inverted, or not worth believing, by its numbers: the first reason that is found, in a sentence.

A cause comes before its consequences. A sentence begins with the name of the reason and a colon: Not finite, Blank,
Coarse, Tautology, Inverted, Flat, Unsure.
"""

import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import correlation

SAME = 0.999  # two maps with a higher correlation are the same
FLAT = 0.02  # a flat map varies by less than this share of its largest value
FOR_SHARE = 0.01  # an inverted map has less than this share of its evidence for the score
GAP = 0.1  # difference of probabilities below which the network is unsure between two classes
COARSE = 2  # positions a side; a map with no more cannot show a place


def diagnose(attribution: Tensor, logits: Tensor | None = None, class_idx: int = 0) -> str:
    """A warning about a map in a sentence, or "" if there is nothing to warn of.

    Args:
        attribution: the signed map of one image, (1, 1, h, w).
        logits: (1, C) or (1, C, H, W) at the model's temperature: show an unsure prediction, or a map that repeats it.
        class_idx: the class that was explained.
    """
    if not attribution.isfinite().all():
        return "Not finite: the map holds NaN or infinity."
    largest = attribution.abs().max()
    if largest == 0:
        return "Blank: all activations or all gradients of this stage are 0, so the score does not depend on it."
    if attribution.max() <= 0:
        return "Blank: all evidence at this stage is against the score, and a heatmap shows only evidence for it."
    if max(attribution.shape[-2:]) <= COARSE:
        size = "x".join(map(str, attribution.shape[-2:]))
        return f"Coarse: this stage has only {size} positions. Choose an earlier stage or a larger image."
    if logits is not None and logits.ndim == 4:
        # A map that is its class's logits at the map's resolution explains nothing. At the last decoder stage under a
        # 1x1 head it is so: there Grad-CAM is a constant times (logit - bias) for every region.
        score_map = F.adaptive_avg_pool2d(logits[:, class_idx : class_idx + 1], attribution.shape[-2:])
        repeats = correlation(attribution, score_map).item()
        if repeats > SAME:
            return "Tautology: this map is the prediction times a constant. It shows what was found, not why."
        if repeats < -SAME:
            return "Inverted: this map is the prediction times a negative constant, brightest where nothing was found."
    if attribution.max() - attribution.min() < FLAT * largest:
        return "Flat: the evidence is the same everywhere, so the map is bright everywhere and shows no place."
    share = (attribution.relu().sum() / attribution.abs().sum()).item()
    if share < FOR_SHARE:
        return (
            f"Inverted: {1 - share:.1%} of the evidence is against the score, and the heatmap shows the rest. "
            "Ask for the evidence against it (against)."
        )
    if logits is not None and logits.ndim == 2 and logits.shape[1] > 1:
        probs, likeliest = logits[0].softmax(0).topk(2)
        if probs[0] - probs[1] < GAP and class_idx in likeliest.tolist():
            return (
                f"Unsure: class {likeliest[0]} ({probs[0]:.0%}) and class {likeliest[1]} ({probs[1]:.0%}) are almost "
                "equally likely. Ask why one rather than the other (contrast_score)."
            )
    return ""
