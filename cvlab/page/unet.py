"""The panels of segmenters: a region to ask about, the stages of a U-Net, and errors beside a true mask."""

import html
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from cvlab.explain import peak
from cvlab.explain.paths import dependence_sentence
from cvlab.metrics import class_counts, class_ious, segmentation_scores
from cvlab.models import mask_levels
from cvlab.page.host import sentence_of
from cvlab.page.html import folded, number, paragraph, quoted, table
from cvlab.page.picture import around, captioned, cased, hottest_edge, layers, legend, outline, slider, with_photo
from cvlab.page.question import class_indices, mask_of, parse_points
from cvlab.page.visit import METHOD_NAMES, UNIT, Answer, draw_map
from cvlab.page.words import percent, shares_of_evidence
from cvlab.transforms import WHOLE, resize_logits, whole_mask

CLASSIFIER = (
    "This model is a classifier: it has no mask and no U-Net stages. Its own stages can be chosen in the tab Grad-CAM."
)
READING = (
    "Each map is divided by its own maximum. A peak is that maximum times the number of positions of its stage, in "
    "units of the score (logits). Peaks of one model's stages can be compared, peaks of two models cannot."
)
COLOURS = 8  # of outlines in page.css; further classes repeat them with dashed lines
THIRDS = "Early: fine detail", "Middle: the whole scene", "Late: drawing the mask"
WORKING = "The stages that depend most on what was asked about are being worked out."
DEPENDENCE = "Does a map depend on your region? r near 1: it would look the same for any region."
ALL_SELECTED = "The region is the whole picture: there is nothing else to compare its maps with."


@lru_cache(maxsize=1)  # two tabs show it
def region_picker(answer: Answer) -> str:
    """The photo with the outlines of the masks and an orange line around the region, to choose another region in."""
    if not answer.segments:
        return ""
    model, prediction, question = answer.model, answer.prediction, answer.question
    pixels = prediction.logits.shape[-1]
    chosen, _ = class_indices(question, model, prediction.logits)
    threshold, names = question.threshold or model.threshold, model.class_names[model.first_object :]
    levels = mask_levels(model, prediction.logits)[0].numpy()
    objects = levels[model.first_object :]
    edge = outline(objects.max(0), threshold, WHOLE)
    lines = [("dim", around(edge) if edge else "")]
    bounds = [model.config.get(f"{name}_threshold") for name in ("core", "rim")]
    unsure = None not in bounds and not question.threshold
    if unsure:
        core, rim = (outline(levels[chosen], bound, WHOLE) for bound in bounds)
        lines.append(("rim", rim + core))  # what lies between the two
    classes = []
    for i, name in enumerate(names):
        if share := (objects[i] > threshold).mean():
            line = f"of{i} c{i % COLOURS}{' again' if i >= COLOURS else ''}" if len(names) > 1 else "edge"
            lines += cased(line, outline(objects[i], threshold, WHOLE))
            classes.append((line, name, percent(share)))
    says = "Not found. Click or drag to ask about a place."
    at = pixels // 2, pixels // 2
    with suppress(ValueError):  # the other panels say it; the picture is there to choose another region in
        lines += cased("spot", hottest_edge(answer.attribution, answer.box, answer.read_at))
        band = " Pale band: from what is surely in it to what may be." if unsure else ""
        tile = " Explained in the tile around it." if answer.box != WHOLE else ""
        says = f"Line: what was found. Dashed: where it looked most.{band}{tile} Click to ask about a part."
        if question.region != "mask":
            lines += cased("asked", outline(answer.evidence.region.numpy().astype(float), 0.5, answer.box))
            at = parse_points(question.points)[-1]
    label = "The photo, dark outside the mask; an orange line around what is asked about"
    below = (legend(classes) if len(names) > 1 and classes else "") + slider("Mask", question.opacity)
    return with_photo(captioned(layers(label, lines=lines, picks=pixels, at=at), "", says, below), "main")


def stages(answer: Answer) -> str:
    """The three stages that say most; on demand Grad-CAM beside HiResCAM at every stage, with their figures."""
    if not answer.segments:
        return paragraph(CLASSIFIER)
    evidence, paths = answer.evidence, answer.paths
    if not paths:
        return paragraph(WORKING)
    drawn = []
    for stage, first in evidence.maps["grad_cam"].items():
        two, sentences = [], []
        for method, maps in evidence.maps.items():
            attribution, name = maps[stage], METHOD_NAMES[method]
            caption = f"peak {number(peak(attribution).item())} {UNIT}"
            known = [answer.warning(attribution)]
            if paths.dependence:
                r = paths.dependence[method][stage]
                caption += f", r\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{r:.2f}"
                known.append(dependence_sentence(r))
            two.append(captioned(draw_map(answer, stage, method, spot=False), name, caption))
            sentences += [f"{name}: {each}" for each in known if each]
        head = f"<h3>{html.escape(stage)}, {first.shape[-1]} x {first.shape[-2]}</h3>"
        drawn.append(f'<div class="pair">{head}{"".join(two)}{paragraph(" ".join(sentences))}</div>')
    reading = f"{READING} {DEPENDENCE if paths.dependence else ALL_SELECTED}"
    score = paragraph(f"{answer.words}; score {number(evidence.score)} {UNIT}.")
    every = score + with_photo("".join(drawn), "pairs") + paragraph(reading)
    return three_stages(answer) + folded(f"All {len(drawn)} stages by both methods, with their figures", every, "all")


def three_stages(answer: Answer) -> str:
    """Of the early, middle and late stages the one whose map depends most on the region, a sentence each."""
    if not answer.segments:
        return ""
    evidence, paths = answer.evidence, answer.paths
    if not paths:
        return paragraph(WORKING)
    method = answer.question.method
    maps, r = evidence.maps[method], paths.dependence.get(method, {})
    order, drawn = list(maps), []
    for i, title in enumerate(THIRDS):
        third = order[i * len(order) // 3 : (i + 1) * len(order) // 3]
        if not third:
            continue
        stage = min(third, key=lambda each: abs(r.get(each, 1.0)))
        lies = shares_of_evidence(maps[stage], evidence.region, answer.model.stages[stage])
        most = max(lies, key=lies.get, default="")
        says = f"{lies[most]:.0%} of the evidence lies {most}." if lies else "No evidence here."
        alike = " It would look the same for any part." if dependence_sentence(r.get(stage, 0.0)) else ""
        shown = captioned(draw_map(answer, stage, spot=False), stage, says + alike)
        drawn.append(f"<div><h3>{title}</h3>{shown}</div>")
    return with_photo("".join(drawn), "three") + slider("Heat", answer.question.opacity)


def contributions(answer: Answer) -> str:
    """What each path through a U-Net added to the score, once that was worked out."""
    if not answer.segments or not answer.paths or not (parts := answer.paths.contributions):
        return ""
    reading = "What each path through the U-Net added to the score; together they are the score. Orange is against it."
    return paragraph(reading) + table(("path", UNIT), [*parts.items(), ("score", answer.evidence.score)])


def errors(answer: Answer) -> str:
    """The true mask compared with the predicted one: scores, also of the other classes, where they differ, and why.

    Of what was wrongly found the evidence for it is shown, of what was missed the evidence against it.
    """
    if answer.mask is None or not answer.segments:
        return ""
    question, model, prediction, masks = answer.question, answer.model, answer.prediction, answer.true_mask
    threshold, first = question.threshold or model.threshold, model.first_object
    chosen, _ = class_indices(question, model, prediction.logits)
    predicted = mask_levels(model, resize_logits(prediction.logits, masks.shape[1:])) > threshold
    counts = class_counts(predicted, masks[None, 1 - first :], masks.any(0)[None, None])
    scores = segmentation_scores(counts[:, chosen])
    small = whole_mask(masks, prediction.logits.shape[-1])
    found, true = mask_of(question, model, prediction.logits), small[1 + chosen - first]
    false, missed = found & small.any(0) & ~true, true & ~found
    parts = [outline(part.numpy().astype(float), 0.5, WHOLE) for part in (false, missed)]
    shares = f"{false.float().mean():.1%} of the picture is wrongly found, {missed.float().mean():.1%} is missed."
    shown = layers("The errors over the photo", lines=(("false", parts[0]), ("missed", parts[1])))
    drawn = captioned(shown, "Errors", f"Orange: wrongly found; blue, striped edge: missed. {shares}")
    for title, region in (("Why wrongly found", "false positives"), ("Why missed", "false negatives")):
        against = region == "false negatives"
        asked = answer.again(replace(question, region=region, against=against))
        try:
            caption = f"{asked.words} at {asked.stage}, peak {number(peak(asked.attribution).item())} {UNIT}."
            drawn += captioned(draw_map(asked), title, caption)
        except ValueError as error:  # there is no such error
            drawn += captioned(layers(title), title, sentence_of(error))
    listed = ", ".join(f"{name} {scores[name]:.3f}" for name in ("iou", "dice", "precision", "recall"))
    says = paragraph(f"{quoted(model.class_names[chosen])} at threshold {threshold:g}: {listed}.")
    if len(masks) > 2 and not (masks[1] & masks[2]).any():  # else it is black and white, and shows one class
        says += class_table(counts[:, first:], model.class_names[first:])
    return says + with_photo(drawn, "three")


def class_table(counts: Tensor, class_names: Sequence[str]) -> str:
    """The shares of each class in the predicted and the true mask and its iou, from `class_counts` (1, C, 4)."""
    rows = []
    for i, iou in class_ious(counts).items():
        tp, fp, fn, tn = counts[0, i].tolist()
        found, true = ((tp + each) / (tp + fp + fn + tn) for each in (fp, fn))
        rows.append((class_names[i], percent(found), percent(true), f"{iou:.3f}"))
    return table(("class", "found", "true mask", "iou"), rows)
