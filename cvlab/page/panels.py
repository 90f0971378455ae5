"""The panels of the page. Each is a function of an answer, and returns HTML or raises an error that `draw` words."""

import html
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cvlab.explain import METHODS
from cvlab.explain.paths import dependence_sentence
from cvlab.metrics import segmentation_counts, segmentation_scores
from cvlab.page.evidence import in_view, peak_of
from cvlab.page.gallery import compare
from cvlab.page.host import sentence_of
from cvlab.page.html import (
    Figure,
    Scale,
    as_html,
    code_block,
    number,
    pairs,
    paragraph,
    picker,
    quoted,
    table,
)
from cvlab.page.question import SLOW_METHODS, Question, mask_of, parse_points, settled_score, to_query
from cvlab.page.record import record_panel
from cvlab.page.snippet import as_python
from cvlab.page.visit import Answer
from cvlab.render import heatmap_picture, mask_overlay, outlined, overlay, to_picture
from cvlab.transforms import resize_logits
from cvlab.trust import deletion
from cvlab.trust.diagnosis import diagnose_model

METHOD_NAMES = {
    "grad_cam": "Grad-CAM",
    "hires_cam": "HiResCAM",
    "integrated_gradients": "Integrated Gradients",
    "occlusion": "Occlusion",
}
UNIT = "logits"
CLASSIFIER = (
    "This model is a classifier: it has no mask and no U-Net stages. Its own stages can be chosen in the tab Grad-CAM."
)
READING = (
    "Each map is divided by its own maximum. A peak is that maximum times the number of positions of its stage, in "
    "units of the score (logits). Peaks of one model's stages can be compared, peaks of two models cannot."
)
DEPENDENCE = "Does a map depend on your region? r near 1: it would look the same for any region."
ALL_SELECTED = "The region is the whole picture: there is nothing else to compare its maps with."
SAME_MAP = (
    "These lines compute the map that is shown, equal to within a thousandth of its largest value: the page runs a "
    "faster copy of the model, which rounds differently."
)


def draw(answer: Answer, names: Iterable[str], *others: Answer) -> dict[str, str]:
    """Panels by their names, as HTML; an error becomes a sentence.

    Where the panel "notes" fails, model or photo cannot be opened. That is said there, and the rest stays empty.

    Args:
        names: of PANELS; "notes" comes first.
        others: what a panel takes besides the answer.
    """
    drawn = dict.fromkeys(names, "")
    for name in drawn:
        try:
            drawn[name] = PANELS[name](answer, *others)
        except (ValueError, OSError) as error:
            drawn[name] = "" if name in SILENT else paragraph(sentence_of(error))
            if name == "notes":
                break
    return drawn


def notes(answer: Answer) -> str:
    """What was done to open the photo."""
    return "".join(map(paragraph, answer.prediction.notes))


def look(answer: Answer) -> str:
    """The prediction in one picture: the mask, or where the evidence for the predicted class is."""
    prediction = answer.prediction
    if prediction.mask is not None:
        alt_text = "The photo, grey outside the predicted mask"
        return as_html([Figure(prediction.mask, "Mask", prediction.sentence, alt_text)], "large")
    usual = answer.again(Question())
    laid = over_photo(prediction.images, usual.attribution, answer.question)
    return as_html([Figure(laid, usual.words, "By Grad-CAM; elsewhere the picture is unchanged.")], "large")


def why(answer: Answer) -> str:
    """Original, heatmap and overlay of one map in a row, with its scale, peak and warning."""
    question, attribution, stage = answer.question, answer.attribution, answer.stage
    images, side = answer.prediction.images, answer.prediction.images.shape[-1]
    top, largest = scale_of(attribution, _on_one_scale(answer), question)
    heat, laid = pictures(images, attribution, question, largest)
    words = answer.words
    at = f"{METHOD_NAMES[question.method]} at {stage}, {attribution.shape[-1]} x {attribution.shape[-2]} positions."
    peak = f"Peak {number(peak_of(attribution, question.method))} of a score of {number(answer.evidence.score)} {UNIT}."
    three = [
        Figure(to_picture(images), "Original", f"What the model sees: {side} x {side} pixels."),
        Figure(heat, words, f"{at} {peak}", f"Heatmap: {words} at {stage}", Scale(top, UNIT, question.colormap)),
        Figure(laid, "Where it is", "Elsewhere the picture is unchanged.", f"{words}, over the photo"),
    ]
    return as_html(three, "large") + paragraph(answer.warning(attribution))


def _on_one_scale(answer: Answer) -> list[Tensor]:
    """The maps on the scale of the shown one: a segmenter's at all stages, a classifier's of its prediction."""
    method = answer.question.method
    if not answer.question.common_scale:
        return []
    if answer.segments:
        return list(answer.evidence.maps[method].values())
    usual = answer.again(Question(stage=answer.question.stage)).evidence.maps
    return [usual[method][answer.stage]] if answer.stage in usual.get(method, {}) else []


def scale_of(attribution: Tensor, others: Sequence[Tensor], question: Question) -> tuple[float, float | None]:
    """The top of a map's scale as a peak, and the value of the map that it stands for; None for the map's own maximum.

    Args:
        others: maps on the same scale, where the question wants one.
    """
    method = question.method
    if not question.common_scale:
        return peak_of(attribution, method), None
    top = max(peak_of(each, method) for each in (attribution, *others))
    return top, top if method == "occlusion" else top / attribution[0, 0].numel()


def pictures(
    images: Tensor, attribution: Tensor, question: Question, largest: float | None = None
) -> tuple[Image.Image, Image.Image]:
    """A map alone, and over the photo, as a question wants them drawn."""
    heat = heatmap_picture(attribution, images.shape[-2:], question.colormap, largest)
    return heat, over_photo(images, attribution, question, largest)


def over_photo(images: Tensor, attribution: Tensor, question: Question, largest: float | None = None) -> Image.Image:
    """A map over the photo, as a question wants it drawn."""
    return overlay(images, attribution, question.colormap, question.opacity, largest)


def believe(answer: Answer) -> str:
    """What hiding the hottest tenth of the picture does to the probability, and what speaks against the map."""
    evidence, question, attribution = answer.evidence, answer.question, answer.attribution
    images, name = answer.prediction.images, quoted(answer.model.class_names[evidence.class_idx])
    reason = ""
    if question.method in METHODS:
        score = settled_score(evidence.class_idx, evidence.other, evidence.region, question.against)
        reason = paragraph(diagnose_model(answer.model, images, score, answer.stage, question.method))
    if reason and attribution.max() <= 0:
        return reason  # there is no hottest part to hide
    check = deletion(answer.model, images, attribution, evidence.class_idx, evidence.region)
    moved = "lowers" if check.hidden < check.before else "does not lower"
    verdict = (
        "It changes more than with any of the random places hidden: the model did look there."
        if check.telling
        else "Hiding random places changes it as much: this map is not evidence."
    )
    if question.against or evidence.other is not None:
        verdict = ""  # what speaks against a class need not lower its probability
    rows = [
        ("whole picture", f"{check.before:.1%}"),
        (f"hottest {check.share:.0%} hidden", f"{check.hidden:.1%}"),
        (f"{len(check.random)} random places hidden, mean", f"{np.mean(check.random):.1%}"),
        ("random places, from and to", f"{min(check.random):.1%} to {max(check.random):.1%}"),
    ]
    shown = Figure(to_picture(check.picture), "The hottest part hidden", f"Painted over: {answer.stage}.")
    sentence = paragraph(f"Hiding the hottest part {moved} the probability of {name}. {verdict}")
    return sentence + reason + table(("shown to the model", f"probability of {name}"), rows) + as_html([shown])


def link(answer: Answer) -> str:
    """A link to the model and the question."""
    href = html.escape(to_query(answer.visit.name, answer.question))
    return f'<a class="question-link" href="{href}">Link to this model and these settings</a> (without the photo)'


def code(answer: Answer) -> str:
    """Python that computes the map again."""
    visit = answer.visit
    _ = answer.prediction  # without a photo there is nothing to compute
    lines = as_python(visit.models.public_name(visit.name), Path(visit.photo).name, answer.model, answer.question)
    return paragraph(SAME_MAP) + code_block(lines)


def record(answer: Answer) -> str:
    """The scores, training and card in the folder of the model."""
    visit = answer.visit
    _ = visit.model  # opening it checks what stands in its folder
    return record_panel(visit.models.folder(visit.name))


# --- segmenters -------------------------------------------------------------------------------------------------------


def region_picker(answer: Answer) -> str:
    """The photo with the mask at the question's threshold and a line around the region, to choose another region in."""
    if not answer.segments:
        return ""
    shown, side = mask_picture(answer), answer.prediction.images.shape[-1]
    with suppress(ValueError):  # a question without an answer leaves the picture to choose another region in
        shown = outlined(shown, answer.evidence.region.numpy())
    try:
        at = parse_points(answer.question.points)[-1]
    except ValueError:
        at = side // 2, side // 2
    return picker(shown, side, at)


def mask_picture(answer: Answer) -> Image.Image:
    """The photo as the model sees it, grey outside the mask at the question's threshold."""
    prediction = answer.prediction
    mask = mask_of(answer.question, answer.model, prediction.logits)
    return mask_overlay(to_picture(prediction.images), mask.numpy())


def stages(answer: Answer) -> str:
    """Grad-CAM beside HiResCAM at every stage, and how far each map depends on the region, where that is known."""
    if not answer.segments:
        return paragraph(CLASSIFIER)
    evidence, question, paths = answer.evidence, answer.question, answer.paths
    if question.method in SLOW_METHODS:
        return paragraph(f"{METHOD_NAMES[question.method]} belongs to no stage: see the tab Grad-CAM.")
    drawn = []
    for stage, first in evidence.maps["grad_cam"].items():
        two, sentences = [], []
        for method, maps in evidence.maps.items():
            attribution, name = maps[stage], METHOD_NAMES[method]
            top, largest = scale_of(attribution, [*maps.values()], question)
            caption = f"peak {number(peak_of(attribution, method))} {UNIT}"
            known = [answer.warning(attribution)]
            if paths and paths.dependence:
                r = paths.dependence[method][stage]
                caption += f", r\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{r:.2f}"
                known.append(dependence_sentence(r))
            scale = Scale(top, "", question.colormap) if question.common_scale else None
            alt_text = f"{answer.words} at {stage} by {name}, over the photo"
            laid = over_photo(answer.prediction.images, attribution, question, largest)
            two.append(Figure(laid, name, caption, alt_text, scale))
            sentences += [f"{name}: {sentence}" for sentence in known if sentence]
        drawn.append((f"{stage}, {first.shape[-1]} x {first.shape[-2]}", " ".join(sentences), two))
    reading = READING
    if paths:
        reading += f" {DEPENDENCE if paths.dependence else ALL_SELECTED}"
    return paragraph(f"{answer.words}; score {number(evidence.score)} {UNIT}.") + pairs(drawn) + paragraph(reading)


def contributions(answer: Answer) -> str:
    """What each path through a U-Net added to the score, once that was worked out."""
    if not answer.segments or not answer.paths:
        return ""
    parts = answer.paths.contributions
    if not parts:
        return paragraph("The contributions of the skips are worked out for cvlab's own U-Net only.")
    reading = "What each path through the U-Net added to the score; together they are the score. Orange is against it."
    return paragraph(reading) + table(("path", UNIT), [*parts.items(), ("score", answer.evidence.score)])


def errors(answer: Answer) -> str:
    """The true mask compared with the predicted one: scores, where they differ, and why.

    Of what was wrongly found the evidence for it is shown, of what was missed the evidence against it.
    """
    if answer.mask is None or not answer.segments:
        return ""
    question, model, prediction, true_mask = answer.question, answer.model, answer.prediction, answer.true_mask
    predicted = mask_of(question, model, resize_logits(prediction.logits, true_mask.shape))
    scores = segmentation_scores(segmentation_counts(predicted[None, None], true_mask[None, None]))
    found, true = mask_of(question, model, prediction.logits), in_view(true_mask, model)
    false, missed = found & ~true, true & ~found
    pixels = np.asarray(to_picture(prediction.images)).copy()
    for wrong, color in ((false.numpy(), (213, 94, 0)), (missed.numpy(), (0, 114, 178))):
        pixels[wrong] = np.round(0.25 * pixels[wrong] + 0.75 * np.array(color)).astype(np.uint8)
    shares = f"{false.float().mean():.1%} of the picture is wrongly found, {missed.float().mean():.1%} is missed."
    drawn = [Figure(Image.fromarray(pixels), "Errors", f"Orange: wrongly found, blue: missed. {shares}")]
    method = "grad_cam" if question.method in SLOW_METHODS else question.method
    for title, region in (("Why wrongly found", "false positives"), ("Why missed", "false negatives")):
        against = region == "false negatives"
        asked = answer.again(replace(question, region=region, against=against, method=method))
        try:
            laid = over_photo(prediction.images, asked.attribution, question)
            peak = f"peak {number(peak_of(asked.attribution, method))} {UNIT}"
            drawn.append(Figure(laid, title, f"{asked.words} at {asked.stage}, {peak}."))
        except ValueError as error:  # there is no such error
            drawn.append(Figure(to_picture(prediction.images), title, sentence_of(error)))
    listed = ", ".join(f"{name} {getattr(scores, name):.3f}" for name in ("iou", "dice", "precision", "recall"))
    return paragraph(f"At threshold {question.threshold or model.threshold:g}: {listed}.") + as_html(drawn, "large")


PANELS: dict[str, Callable[..., str]] = {
    "notes": notes,
    "look": look,
    "grad_cam": why,
    "picker": region_picker,
    "stages": stages,
    "contributions": contributions,
    "errors": errors,
    "link": link,
    "code": code,
    "believe": believe,
    "compared": compare,
    "record": record,
}
SILENT = ("look", "picker", "contributions", "link")  # what these cannot show, the panel beside them says
