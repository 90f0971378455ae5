"""The answer in plain sentences: what the model thinks, and where it looked."""

import time
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from cvlab.explain import heatmap
from cvlab.explain.regions import in_words
from cvlab.models import Stage
from cvlab.page.html import quoted
from cvlab.page.question import Question, mask_of, region_words
from cvlab.page.visit import Answer
from cvlab.render import relative_heat
from cvlab.trust import hottest_part
from cvlab.trust.familiarity import FOREIGN

GRID = 96  # pixels a side, on which places are found
SURE, LIKELY = 0.6, 0.4  # below the first the model is not sure, below the second it guesses
MOST_NAMED = 3  # classes between which it hesitates, as more say nothing; of a segmenter, besides the one asked about
EDGE = 1 / 40  # of the side: so near is along the edge of a region


def said(answer: Answer) -> tuple[str, str]:
    """What the model thinks and looked at; the usual question if it has no answer. Errors as of `Answer.prediction`."""
    prediction = answer.prediction
    try:
        attribution = answer.attribution
    except ValueError:
        if answer.question != Question():
            return said(answer.again(Question()))
        names = answer.model.class_names[answer.model.first_object :]
        return "Nothing found.", f"No part of the photo looks enough like {either(names)}."
    if answer.segments:
        return found(answer), asked_about(answer)
    evidence, names = answer.evidence, answer.model.class_names
    name, share = plain(names[evidence.class_idx]), prediction.shares[names[evidence.class_idx]]
    where = place(attribution, answer.read_at)
    if answer.question.against or evidence.other is not None or share < max(prediction.shares.values()):
        side = "against" if answer.question.against else "for"
        rather = "" if evidence.other is None else f" rather than {plain(names[evidence.other])}"
        lies = f"lies {where}" if where else "is nowhere in the picture"
        return upper(f"{name} got {percent(share)}."), f"What speaks {side} it{rather} {lies}."
    doubt = "" if share >= SURE else "Not sure: " if share >= LIKELY else "A guess: "
    if prediction.familiar is not None and prediction.familiar < FOREIGN:
        doubt = "Unlike anything it was trained on. Nearest: "
    elif prediction.names and 1 < len(prediction.names) <= MOST_NAMED:
        doubt = f"{' or '.join(map(plain, prediction.names))}; most likely "
    looked = f"It looked {where}." if where else "No part of the picture speaks for it."
    return upper(f"{doubt}{name}, {percent(share)}."), looked


def found(answer: Answer) -> str:
    """How much of the picture a segmenter found, at the question's threshold."""
    asked = answer.model.class_names[answer.evidence.class_idx]
    mask = mask_of(answer.question, answer.model, answer.prediction.logits)
    if not mask.any():
        return f"No {plain(asked)} found."
    ranked = sorted(answer.prediction.shares.items(), key=lambda item: -item[1])
    others = [f", {plain(name)} {percent(share)}" for name, share in ranked if share > 0 and name != asked]
    also = "".join(others[:MOST_NAMED]) + (f" and {len(others) - MOST_NAMED} more" if others[MOST_NAMED:] else "")
    return upper(f"{plain(asked)} found: {percent(mask.float().mean().item())} of the picture{also}.")


def asked_about(answer: Answer) -> str:
    """Where the evidence for a segmenter's region lies, mostly."""
    lies = shares_of_evidence(answer.attribution, answer.evidence.region, answer.read_at)
    if not lies:
        return "No part of the picture speaks for it."
    where = max(lies, key=lies.get)
    if answer.question.region == "mask" and answer.testable:
        return f"It looked mostly {where}."
    region = region_words(answer.question)
    side = "against" if answer.question.against else "for"
    return f"What speaks {side} {region} lies mostly {where}."


def shares_of_evidence(attribution: Tensor, region: Tensor, stage: Stage | None = None) -> dict[str, float]:
    """The shares of a map's evidence inside a region (H, W), along its edge and around it; empty for a blank map."""
    heat = relative_heat(attribution, region.shape, stage=stage)
    if not heat.any():
        return {}
    near, whole = max(1, round(EDGE * region.shape[-1])), region[None, None].float()

    def grown(part: Tensor) -> np.ndarray:
        rows = F.max_pool2d(part, (2 * near + 1, 1), 1, (near, 0))
        return F.max_pool2d(rows, (1, 2 * near + 1), 1, (0, near))[0, 0].numpy()

    parts = grown(1 - whole) == 0, grown(whole) == 0
    inside, outside = (float(heat[part].sum() / heat.sum()) for part in parts)
    return {"inside it": inside, "along its edge": max(0.0, 1 - inside - outside), "around it": outside}


def place(attribution: Tensor, stage: Stage | None = None) -> str:
    """Where the hottest tenth of a map lies; empty for a blank map."""
    heat = heatmap(attribution, (GRID, GRID), stage)
    if not (heat > 0).any():
        return ""
    return in_words(hottest_part(heat, 0.1))


def percent(share: float) -> str:
    """A share for reading: whole percent, and never 0% or 100% of what is neither."""
    if 0 < share < 0.005:
        return "under 1%"
    return "over 99%" if 0.995 <= share < 1 else f"{share:.0%}"


def plain(name: str) -> str:
    """A name without quotation marks; characters that cannot be printed are spelled out."""
    return quoted(name)[1:-1]


def either(names: Sequence[str], most: int = 8) -> str:
    """Names as in: a, b or c. Beyond the first `most` their number is told."""
    shown = [plain(name) for name in names[:most]] + [f"{len(names) - most} more"] * (len(names) > most)
    return " or ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


def time_left(begun: float, done: int, of: int) -> str:
    """How long the rest takes at the mean pace since `begun`, of time.monotonic(), as the end of a sentence."""
    seconds = (time.monotonic() - begun) * (of - done) / max(done, 1)
    return (f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left") * (done > 0)


def upper(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]
